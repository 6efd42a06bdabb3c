"""The calibration set: its batches, its loss, and how much each batch and example counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from .peers import Peers

Batch = Mapping[str, Any]
LossFn = Callable[[nn.Module, Batch], torch.Tensor]

# Values of `model.loss_type` (Transformers) whose labels are not shifted by one position against the logits.
UNSHIFTED = ("ForMaskedLM", "ForTokenClassification", "ForConditionalGeneration")
IGNORED = -100


def model_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The default loss: what the model returns as `.loss` (or `["loss"]`) for a batch with labels."""
    output = model(**batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise UserError("the model returned no loss; give batches with labels, or a loss_fn(model, batch)")
    return loss


def _tensors(batch: Batch) -> Iterator[torch.Tensor]:
    return (v for v in batch.values() if isinstance(v, torch.Tensor) and v.dim())


def _on(device: torch.device, batch: Batch) -> Batch:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def batch_size(batch: Batch) -> int:
    """Examples in a batch: the first dimension of its first tensor."""
    first = next(_tensors(batch), None) if isinstance(batch, Mapping) else None
    if first is None:
        raise UserError("a calibration batch must hold at least one tensor whose first dimension counts the examples")
    return first.shape[0]


def sequence_length(batch: Batch) -> int | None:
    """Tokens of an example, padding included; None without a tensor of two dimensions."""
    return next((t.shape[1] for t in _tensors(batch) if t.dim() >= 2), None)


def shares_of_examples(model: nn.Module, batch: Batch) -> torch.Tensor:
    """What share of the batch's mean loss each example holds, [B].

    Token labels [B, T]: the loss is the mean over labelled tokens, so an example counts by its labelled tokens (from the
    second on where the model predicts the next token). All other labels: the mean over examples.
    """
    count, labels = batch_size(batch), batch.get("labels")
    if isinstance(labels, torch.Tensor) and labels.dim() == 2 and not labels.is_floating_point():
        unshifted = getattr(model, "loss_type", None) in UNSHIFTED
        tokens_B = (labels[:, 0 if unshifted else 1 :] != IGNORED).sum(1).to(torch.float64)
        return tokens_B / tokens_B.sum().clamp(min=1)
    return torch.full((count,), 1.0 / count, dtype=torch.float64)


class Calibration:
    """Batches that can be gone over several times, with a loss.

    A list or tuple is used as it is. Any other iterable is read once and let go when one pass is all that is needed; for
    several passes it is kept (token ids are small), so that a shuffling loader gives each of them the same examples.
    """

    def __init__(
        self, model: nn.Module, batches: Iterable[Batch], loss_fn: LossFn | None, peers: Peers | None = None, together: bool = False
    ) -> None:
        if isinstance(batches, Mapping):
            raise UserError("batches must be a list (or other iterable) of batches, got one batch; put it in a list")
        self.model, self.loss_fn = model, loss_fn or model_loss
        self._batches = batches
        self.examples = 0  #: examples in the calibration set, known after the first pass
        self.first = 0  #: examples in its first batch, known from the first batch on
        self.weight = 0.0  #: batches so far, each counted by its size as a share of the first
        self.peers = peers if peers is not None and peers.world > 1 else None
        self.together = together  #: every forward and backward needs all ranks
        self.shared: Mapping[str, torch.Tensor] = {}  #: the sums that the present pass adds each batch to

    def keep(self) -> None:
        """Make several passes possible."""
        if not isinstance(self._batches, Sequence):
            self._batches = list(self._batches)

    def __iter__(self) -> Iterator[tuple[int, Batch, int]]:
        """(number, batch on the model's device, examples); among peers those of this rank. UserError when there is none."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        number, seen, self.weight = -1, 0, 0.0
        world, rank = (1, 0) if self.peers is None else (self.peers.world, self.peers.rank)
        for number, batch in enumerate(self._batches):
            size = batch_size(batch)
            self.first = self.first or size
            seen, self.weight = seen + size, self.weight + size / self.first
            if number % world == rank:
                yield number, _on(device, batch), size
            if self.peers is not None and number % world == world - 1:
                self.peers.combine(self.shared, world)
        present = (number + 1) % world
        if self.peers is not None and present:
            if self.together and rank >= present:
                self.peers.idle = True
                yield number, _on(device, batch), size
                self.peers.idle = False
            self.peers.combine(self.shared, present)
        if number < 0:
            raise UserError("a data-driven metric needs at least one calibration batch, got none")
        self.examples = seen

    def loss(self, number: int, batch: Batch) -> torch.Tensor:
        """The loss of one batch; UserError when it is not finite or cannot be differentiated."""
        loss = self.loss_fn(self.model, batch)
        wrong = None
        if not bool(torch.isfinite(loss.detach()).all()):
            wrong = f"the calibration loss must be finite, batch {number} gives {loss.detach().mean().item()}"
        elif not loss.requires_grad:
            wrong = "the calibration loss does not depend on the targets; are they used in the model's forward?"
        if self.peers is not None and self.together:
            self.peers.agree(wrong)
        elif wrong is not None:
            raise UserError(wrong)
        return loss

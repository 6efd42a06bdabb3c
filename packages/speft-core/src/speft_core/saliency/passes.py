"""The passes over the calibration set, one function per statistic: name -> tensor, in the parameter's shape.

A pass gets the names of one group of targets and fills their accumulators, wherever the plan of memory.py put them.

Shape suffixes: B examples, T tokens, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..partitioned import Recompute
from ..targets import base_parameters, owners_of, parameter_shape
from .accumulate import Examples, Rule, accumulating, frozen, is_batched, is_conv1d
from .calibration import Batch, Calibration, batch_size, sequence_length, shares_of_examples
from .recompute import recomputing
from .sums import Accumulator, wide_dtype

Statistics = dict[str, torch.Tensor]


@dataclass
class Pass:
    """What a statistic is computed from. `where`: name -> device of the accumulator (the parameter's own when missing)."""

    model: nn.Module
    calibration: Calibration
    all_names: Sequence[str]
    where: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)  #: what the mask should remember of how it was computed
    kept: dict[str, Any] = field(default_factory=dict)  #: what a later group's pass can use again

    def accumulators(self, names: Sequence[str]) -> dict[str, Accumulator]:
        """Fresh accumulators of `names`, at zero."""
        parameters = base_parameters(self.model)
        return {n: Accumulator(n, parameters[n], self.where.get(n), self.calibration.peers) for n in names}


def mean_gradient(run: Pass, names: Sequence[str]) -> Statistics:
    """g: the mean over examples of the signed gradient (SPEFT, section 3).

    Each batch counts by its number of examples, so that a short last batch weighs less. Dropout is off meanwhile.
    """
    with frozen(run.model) as again:
        return frozen_gradient(run, names, again)


def frozen_gradient(run: Pass, names: Sequence[str], again: Recompute) -> Statistics:
    """`mean_gradient` of a model that is frozen already, whose weights are taken as they are: perhaps not base + values."""
    sums = run.accumulators(names)
    run.calibration.shared = _combined(sums)
    with recomputing(run.model, again), accumulating(run.model, sums, Rule(), run.all_names), torch.enable_grad():
        for number, batch, size in run.calibration:
            loss = run.calibration.loss(number, batch).mean()
            # The product is exact for all batches as large as the first.
            (loss * (size / run.calibration.first)).backward()
    return {n: s.sum.div_(run.calibration.weight) for n, s in sums.items()}


def _combined(sums: Mapping[str, Accumulator]) -> Statistics:
    """The sums that ranks combine after each round; those in shards are combined layer by layer."""
    return {n: s.sum for n, s in sums.items() if not s.is_shard}


def _per_example(run: Pass, names: Sequence[str], function: Callable[[torch.Tensor], torch.Tensor]) -> Statistics:
    """Sums over examples of a function of each example's gradient: name -> sum.

    Weights and biases of linear layers get all examples of a batch at once, by batched products in tiles. Other
    parameters, tied ones and those of layers that are called more than once (or under autocast, or whose weight another
    module reads) only know the whole batch's gradient, so they take a second round in which each example is a batch of its own.
    """
    sums = run.accumulators(names)
    with frozen(run.model) as again, recomputing(run.model, again):
        batched = is_batched(run.model, names)
        at_once, alone = [n for n in names if batched[n]], [n for n in names if not batched[n]]
        _check_alone(run, alone)
        run.calibration.keep()
        if at_once:
            part = {n: sums[n] for n in at_once}
            run.calibration.shared = _combined(part)
            with accumulating(run.model, part, Rule(function), run.all_names) as examples, torch.enable_grad():
                for number, batch, _ in run.calibration:
                    _backward_examples(run, number, batch, examples)
            mixed = examples.mixed if run.calibration.peers is None else run.calibration.peers.union(examples.mixed)
            for name in mixed:
                sums[name].sum.zero_()
            alone = [n for n in names if n in mixed or not batched[n]]
            _check_alone(run, alone)
        if alone:
            gradients = run.accumulators(alone)
            run.calibration.shared = _combined({n: sums[n] for n in alone})
            with accumulating(run.model, gradients, Rule(), run.all_names) as examples, torch.enable_grad():
                for number, batch, _ in run.calibration:
                    for piece in _single_examples(batch):
                        _backward_examples(run, number, piece, examples)
                        for name, gradient in gradients.items():
                            sums[name].add(function(gradient.sum))
                            gradient.sum.zero_()
    return {n: s.sum for n, s in sums.items()}


def _check_alone(run: Pass, alone: Sequence[str]) -> None:
    if alone and run.calibration.together:
        raise UserError(
            f"the weights are partitioned over the ranks, which can score single examples for untied linear layers alone that are"
            f" called once; {alone[0]} is none: choose other targets, or find the mask where the weights are whole (ZeRO stage 0 to 2)"
        )


def _single_examples(batch: Batch) -> list[Batch]:
    count = batch_size(batch)

    def part(value: Any, number: int) -> Any:
        is_per_example = isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == count
        return value[number : number + 1] if is_per_example else value

    return [{k: part(v, number) for k, v in batch.items()} for number in range(count)]


def _backward_examples(run: Pass, number: int, batch: Batch, examples: Examples) -> None:
    examples.count, examples.length = batch_size(batch), sequence_length(batch)
    examples.share_B = shares_of_examples(run.model, batch)
    examples.added.clear()
    if not run.calibration.together and not bool((examples.share_B > 0).any()):
        return  # no labelled token, so no loss
    loss = run.calibration.loss(number, batch)
    if loss.dim() == 1 and loss.numel() == examples.count:
        examples.share_B = None  # the loss function gave each example's own loss
    loss.sum().backward()


def squared_gradient(run: Pass, names: Sequence[str]) -> Statistics:
    """Σ over examples of (∂ℓ/∂θ)², ℓ an example's own mean loss: the diagonal of the empirical Fisher information."""
    return _per_example(run, names, torch.square)


def absolute_gradient(run: Pass, names: Sequence[str]) -> Statistics:
    """The mean over examples of |∂ℓ/∂θ|, ℓ an example's own mean loss."""
    sums = _per_example(run, names, torch.abs)
    return {n: s.div_(run.calibration.examples) for n, s in sums.items()}


def input_norms(run: Pass, names: Sequence[str]) -> Statistics:
    """‖x_i‖₂ over all tokens that the attention mask lets through, of each input i of a linear weight.

    In a shape that broadcasts against the weight: [1, I], for Conv1D [I, 1]. UserError for targets that are not weights of
    linear layers.
    """
    parameters, owners = base_parameters(run.model), owners_of(run.model)
    squares: Statistics = {}
    hooks: list[Any] = []
    current: dict[str, torch.Tensor | None] = {"mask": None}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = (*args, *named.values())[0].detach()
            x_TI = x.reshape(-1, x.shape[-1]).to(squares[name].dtype)
            mask = current["mask"]
            if mask is not None and mask.numel() == x_TI.shape[0]:
                x_TI = x_TI * mask.reshape(-1, 1).to(x_TI.dtype)
            squares[name] += x_TI.square().sum(0).reshape(squares[name].shape)

        return hook

    for name in names:
        weight = parameters[name]
        for module, attribute in owners[id(weight)]:
            if attribute != "weight" or not (isinstance(module, nn.Linear) or is_conv1d(module)):
                if isinstance(module, nn.Embedding) and len(owners[id(weight)]) > 1:
                    continue  # a head tied to the embeddings: its inputs are the head's
                raise UserError(f"wanda scores only weights of linear layers, {name} is none; choose other targets")
            transposed = is_conv1d(module)
            rows, columns = parameter_shape(weight)
            shape = (rows, 1) if transposed else (1, columns)
            squares.setdefault(name, torch.zeros(shape, dtype=wide_dtype(weight.dtype), device=weight.device))
            hooks.append(module.register_forward_pre_hook(watch(name), with_kwargs=True))
    run.calibration.shared = squares
    peers = run.calibration.peers if run.calibration.together else None
    try:
        with frozen(run.model), torch.no_grad():
            for _, batch, _ in run.calibration:
                current["mask"] = batch.get("attention_mask")
                run.calibration.loss_fn(run.model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if peers is not None:
        squares = {n: peers.told_by(0, lambda s=s: s, s.clone()) for n, s in squares.items()}  # type: ignore[misc]
    return {n: s.sqrt_() for n, s in squares.items()}


# Passes that several ranks can share: each batch adds to sums, and nothing else is kept of it.
SHARED = (mean_gradient, squared_gradient, absolute_gradient, input_norms)

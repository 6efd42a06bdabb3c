"""A training step on tensors without data: which bytes live when, from the model's configuration alone.

The model's own code runs under PyTorch's FakeTensorMode, so that what autograd keeps, and what forward and backward need for a
moment, are counted and not guessed. Every position is taken to have a label, which is the most that a batch can hold; the
columns that a sparse layer keeps are taken to be all of them.

Shape suffixes: B examples, T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from speft_core.errors import UserError
from speft_core.ops.functions import SparseLinear, Work
from speft_core.ops.layout import Layout
from speft_core.ops.plans import Plan
from speft_core.ops.recipes import hooks_forbid, recipe_of
from speft_core.targets import base_parameters, owners_of, resolve_targets

from . import methods_peft, models
from .config import RunConfig

Forward = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Step:
    """Bytes of one forward and backward beside weights, values and optimizer.

    kept: alive at the end of forward. peak: the most alive at once, gradients of parameters left out. with_gradients: the same
    with the gradients as they come. gradients: all of them. trained: bytes of what has a gradient.
    """

    kept: int
    peak: int
    with_gradients: int
    gradients: int
    trained: int


class Live(TorchDispatchMode):
    """Counts the storages that are alive. `known` storages (weights) do not count; gradients can be moved to a count of their own."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.sizes = known, dict[int, int]()
        self.now = self.peak = self.gradients = self.both = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor)
        return out

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known or key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.now += self.sizes[key]
        self.peak, self.both = max(self.peak, self.now), max(self.both, self.now + self.gradients)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)

    def is_gradient(self, parameter: torch.Tensor) -> None:
        """The parameter's gradient is made: it counts on its own from now on."""
        assert parameter.grad is not None
        size = self.sizes.pop(parameter.grad.untyped_storage()._cdata, 0)
        self.now -= size
        self.gradients += size


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What the method trains: a share of each target (sparse), matrices of a rank (LoRA).

    scores: the step is one of the saliency pass, which keeps the targets' inputs.
    """

    density: float = 0.0
    rank: int = 0
    scores: bool = False


def step(cfg: RunConfig, what: Trained, rows: int, length: int, layers: int | None = None) -> Step:
    """One step of `rows` x `length` tokens by the config's method, on the model or its first `layers` layers.

    UserError where the model's code cannot do without data: looks at it, or has kernels that are not known for such tensors.
    """
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it writes the traceback of what is told in one line below
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = _empty_model(cfg, layers)
            _adapt(model, cfg, what)
            return _run(model, cfg, rows, length)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"a plan runs the model without data, which {cfg.model.name} cannot do ({reason}); measure a short run instead"
        ) from error
    finally:
        log.setLevel(level)


def _empty_model(cfg: RunConfig, layers: int | None) -> Any:
    import transformers
    from transformers.initialization import no_init_weights

    config = models.load_model_config(cfg, known=True)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    text = config.get_text_config()
    if cfg.model.task == "sequence_classification" and getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = 0  # a run takes the tokenizer's; without one decoders refuse more than one example
    auto = getattr(transformers, models.TASKS[cfg.model.task])
    with no_init_weights():
        model = auto.from_config(config, dtype=models.DTYPES.get(cfg.model.dtype, config.dtype))
    model.tie_weights()
    return model


def _adapt(model: Any, cfg: RunConfig, what: Trained) -> None:
    """What the method trains, as far as memory is concerned."""
    section = cfg.adapter
    if cfg.train.get("activation_checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    model.requires_grad_(section.method == "full")
    if section.method in methods_peft.KINDS:
        _adapt_linears(model, section.lora.targets or section.targets, lambda module: _lora_forward(module, what.rank))
    elif section.method == "sparse":
        _adapt_linears(model, section.targets, lambda module: _sparse_forward(module, what))


def _adapt_linears(model: Any, targets: Any, make: Callable[[nn.Linear], Forward]) -> None:
    """Each Linear that is a target computes as an adapted one does; other targets are left out."""
    parameters, owners = base_parameters(model), owners_of(model)
    for name in resolve_targets(model, targets):
        for module, attribute in owners[id(parameters[name])]:
            if type(module) is nn.Linear and attribute == "weight":
                module.forward = make(module)  # type: ignore[method-assign, assignment]
    # As attach and PEFT do for checkpointed segments: their inputs must want a gradient.
    model.get_input_embeddings().register_forward_hook(lambda _module, _args, output: output.requires_grad_(True))


def _lora_forward(module: nn.Linear, rank: int) -> Forward:
    """As PEFT's: the matrices in float32, the input cast for them."""
    down, up = nn.Parameter(torch.zeros(rank, module.in_features)), nn.Parameter(torch.zeros(module.out_features, rank))
    module.register_parameter("lora_A", down)
    module.register_parameter("lora_B", up)

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.linear(x, module.weight, module.bias)
        beside = nn.functional.linear(nn.functional.linear(x.to(down.dtype), down), up) * 1.0
        return (y + beside).to(y.dtype)

    return forward


def _sparse_forward(module: nn.Linear, what: Trained) -> Forward:
    count = max(1, round(what.density * module.weight.numel()))
    values_K = nn.Parameter(torch.zeros(count))
    module.register_parameter("weight_values", values_K)
    empty = torch.empty(0, dtype=torch.int32)
    columns_C = torch.empty(module.in_features, dtype=torch.int32)
    layout = Layout((module.out_features, module.in_features), empty, columns_C, empty, empty, empty, empty)
    work = Work(Plan("none", lambda _inputs, _grad, _layout: torch.empty(count), "no data"), layout)

    def forward(x: torch.Tensor) -> torch.Tensor:
        recipe = None if what.scores or hooks_forbid() else recipe_of(x)
        made: torch.Tensor = SparseLinear.apply(x, module.weight, module.bias, values_K, work, recipe)
        return made

    return forward


def _run(model: Any, cfg: RunConfig, rows: int, length: int) -> Step:
    model.train()
    known = {p.untyped_storage()._cdata for p in model.parameters()}
    known |= {b.untyped_storage()._cdata for b in model.buffers()}
    trained = [p for p in model.parameters() if p.requires_grad]
    ids_BT = torch.zeros(rows, length, dtype=torch.long)
    live = Live(known)
    hooks = [p.register_post_accumulate_grad_hook(live.is_gradient) for p in trained]
    with live:
        loss = _loss(model, cfg, ids_BT)
        kept = live.now
        loss.backward()
    for hook in hooks:
        hook.remove()
    return Step(
        kept=kept,
        peak=live.peak,
        with_gradients=live.both,
        gradients=live.gradients,
        trained=sum(p.numel() * p.element_size() for p in trained),
    )


def _loss(model: Any, cfg: RunConfig, ids_BT: torch.Tensor) -> torch.Tensor:
    """The loss as training computes it (see label_rows.py)."""
    from . import label_rows

    if cfg.model.task == "sequence_classification":
        found: torch.Tensor = model(input_ids=ids_BT, labels=ids_BT[:, 0], attention_mask=torch.ones_like(ids_BT)).loss
        return found
    if label_rows.supports(model) is not None:
        found = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        return found
    inner = label_rows.unwrap(model)
    head = inner.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(
        lambda _module, args: (args[0][:, :-1].reshape(1, -1, args[0].shape[-1]).clone(), *args[1:]), prepend=True
    )
    try:
        logits_1NV = model(input_ids=ids_BT, use_cache=False).logits
    finally:
        handle.remove()
    targets_N = ids_BT[:, 1:].reshape(-1)
    found = inner.loss_function(  # type: ignore[operator]
        logits=logits_1NV, labels=None, shift_labels=targets_N, vocab_size=logits_1NV.shape[-1], num_items_in_batch=None
    )
    return found

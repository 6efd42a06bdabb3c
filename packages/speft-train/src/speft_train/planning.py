"""`speft-train plan`: bytes on each GPU by method and ZeRO stage, what fits, and the largest micro-batch.

From the model's configuration alone. Weights and everything that is trained are counted from shapes; activations and workspace
come from a step on tensors without data (simulate.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from speft_core.errors import UserError
from speft_core.targets import base_parameters, resolve_targets

from . import engine, methods, methods_peft, models, simulate
from .config import AdapterSection, RunConfig, batch_plan
from .memory import bytes_of

GB = 1e9
METHODS = ("sparse", "lora", "full")
ZERO_STAGES = (0, 1, 2, 3)
# Bytes of a trained scalar in float32: itself, its gradient, Adam's two moments, ZeRO's master copy.
VALUE, GRADIENT, MOMENTS, MASTER = 4, 4, 8, 4
# A sparse value's index, and its row and column in the layout of its layer.
INDEX, LAYOUT = 4, 8
# Bytes of an index in a saved adapter at densities of a percent, at most (docs/formats.md).
SAVED_INDEX = 1.4
DEEP = 12  # layers; deeper models are planned from a few of them
MOST = 4096  # micro-batches are not looked at beyond this
ROWS = (
    "weights",
    "gathered weights",
    "values",
    "indices",
    "kept activations",
    "workspace",
    "gradients",
    "optimizer",
    "communication",
)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a plan is for."""

    gpus: int = 1
    memory: float = 80e9  #: bytes of one GPU
    headroom: float = 0.08  #: share of it left to the CUDA context, NCCL and fragments
    length: int = 1024  #: tokens of an example
    micro: int = 1  #: examples of a forward
    accumulation: int = 1


class Planner:
    """One method on one model: sizes that depend on neither stage nor batch, and simulated steps, made once each."""

    def __init__(self, cfg: RunConfig, method: str, length: int) -> None:
        self.cfg, self.method, self.length = with_method(cfg, method), method, length
        model = models.meta_model(self.cfg)
        parameters = base_parameters(model)
        names = resolve_targets(model, cfg.adapter.targets)
        self.weights = sum(p.numel() * p.element_size() for p in model.parameters())
        self.total = sum(p.numel() for p in model.parameters())
        self.pool = sum(parameters[n].numel() for n in names)
        self.k = methods.trained_count(model, self.cfg, names)
        self.size = model.dtype.itemsize
        self.largest_target = max(parameters[n].numel() for n in names)
        blocks = (block for m in model.modules() if isinstance(m, nn.ModuleList) for block in m)
        self.block = max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0) * self.size
        rank = methods_peft.lora_rank(model, self.cfg.adapter) if method == "lora" else 0
        self.what = simulate.Trained(density=self.k / self.pool, rank=rank)
        self.layers = int(getattr(model.config, "num_hidden_layers", 0))
        self.zero = engine.settings(replace(cfg.deepspeed, zero_stage=3))["zero_optimization"]
        self.bucket = _elements(self.zero.get("reduce_bucket_size"), int(getattr(model.config, "hidden_size", 0)) ** 2)
        self.live = _elements(self.zero.get("stage3_max_live_parameters"), engine.LIVE_PARAMETERS)
        self._steps: dict[tuple[int, bool], simulate.Step] = {}

    def _simulated(self, rows: int, scores: bool) -> simulate.Step:
        """The step of a small micro-batch; of a deep model by the straight line through 4 and 8 layers, which are alike."""
        what = replace(self.what, scores=scores)
        if self.layers <= DEEP:
            return simulate.step(self.cfg, what, rows, self.length)
        few, more = (simulate.step(self.cfg, what, rows, self.length, layers) for layers in (4, 8))
        made = _line(few, more, (self.layers - 4) / 4)
        return replace(made, with_gradients=made.peak + made.gradients) if self.method == "full" else made

    def step(self, rows: int, scores: bool = False) -> simulate.Step:
        """The simulated step of a micro-batch (or of the saliency pass); from 3 on by the line through 1 and 2."""
        if rows <= 2:
            if (rows, scores) not in self._steps:
                self._steps[rows, scores] = self._simulated(rows, scores)
            return self._steps[rows, scores]
        return _line(self.step(1, scores), self.step(2, scores), rows - 1)

    def rows(self, stage: int, setting: Setting, micro: int) -> dict[str, int]:
        """What -> bytes on each GPU while training, in the order of ROWS; their sum is the peak."""
        n, step, full = setting.gpus, self.step(micro), self.method == "full"
        bucket = GRADIENT * min(self.k, self.bucket)
        own = self.size if full else VALUE  # bytes of a trained scalar as the model holds it
        host = engine.offloaded(self.zero, stage)
        held = {what: 0 if place in host else count for what, (place, count) in self._movable(stage, n).items()}
        in_parts = stage == 3 and (n > 1 or "weights" in host)
        gradients = own * self.k // (n if stage >= 2 else 1)
        if stage <= 1 and setting.accumulation == 1:  # gradients come as activations go
            gradients = min(gradients, max(0, step.with_gradients - step.peak))
        found = {
            "weights": held["weights"],
            "gathered weights": min(self.weights, self.live * self.size) if in_parts else 0,
            "values": held["values"],
            "indices": (INDEX + LAYOUT + self.size) * self.k if self.method == "sparse" else 0,
            "kept activations": step.kept,
            "workspace": max(0, step.peak - step.kept),
            "gradients": gradients,
            "optimizer": held["optimizer"],
            "communication": bucket if n > 1 or stage >= 1 else 0,
        }
        assert tuple(found) == ROWS
        return found

    def _movable(self, stage: int, gpus: int) -> dict[str, tuple[str, int]]:
        """Row -> which of DeepSpeed's offloads moves it to host memory, and its bytes for each GPU."""
        full, shards = self.method == "full", gpus if stage == 3 else 1
        moments = 2 * self.size if full and stage == 0 else MOMENTS
        master = MASTER if stage >= 1 else 0
        return {
            "weights": ("weights", self.weights // shards),
            "values": ("weights", 0 if full else VALUE * self.k // shards),
            "optimizer": ("optimizer", (moments + master) * self.k // (gpus if stage >= 1 else 1)),
        }

    def in_host_memory(self, stage: int, setting: Setting) -> int:
        """Bytes that are offloaded while training, for each GPU."""
        host = engine.offloaded(self.zero, stage)
        return sum(count for place, count in self._movable(stage, setting.gpus).values() if place in host)

    def peak(self, stage: int, setting: Setting, micro: int) -> int:
        """Bytes on each GPU while training."""
        return sum(self.rows(stage, setting, micro).values())

    def accumulators(self, stage: int, setting: Setting) -> int:
        """Bytes of the saliency pass's sums on each GPU; of shares at stage 3."""
        shards = setting.gpus if stage == 3 else 1
        free = max(0, int(setting.memory) - self._weights_while_scoring(stage, shards))
        return accumulators(self.cfg.adapter, self.pool // shards, free // 2)

    def _weights_while_scoring(self, stage: int, shards: int) -> int:
        """Bytes of the weights on each GPU before training: on one GPU nothing is in shards yet, nor offloaded."""
        return 0 if shards > 1 and "weights" in engine.offloaded(self.zero, stage) else self.weights // shards

    def mask_peak(self, stage: int, setting: Setting) -> int:
        """Bytes on each GPU while the mask is found: weights, sums, and a step of the calibration batch; or 0.

        At stage 3 shares of the first two, and one layer: its weight, its gradient, and all ranks' parts of this GPU's share. With
        activation checkpointing a whole block's weights stay until its backward is through.
        """
        sums, shards = self.accumulators(stage, setting), setting.gpus if stage == 3 else 1
        if not accumulators(self.cfg.adapter, self.pool):
            return 0
        layer = (self.size + 2 * VALUE) * self.largest_target if shards > 1 else 0
        layer += self.block if shards > 1 and self.cfg.train.get("activation_checkpointing") else 0
        step = self.step(self.cfg.adapter.calibration_batch_size, scores=True)
        return self._weights_while_scoring(stage, shards) + sums + layer + step.peak

    def largest(self, stage: int, setting: Setting) -> int:
        """The largest micro-batch that fits; 0 when none does."""
        room = setting.memory * (1 - setting.headroom)
        low, high = 0, 1
        while high <= MOST and self.peak(stage, setting, high) <= room:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.peak(stage, setting, middle) <= room else (low, middle)
        return min(low, MOST)

    def adapter_bytes(self) -> int:
        """What is saved in the end, at most."""
        if self.method == "full":
            return self.weights
        if self.method != "sparse":
            return VALUE * self.k
        return int((self.size + (0 if self.cfg.adapter.metric == "random" else SAVED_INDEX)) * self.k)


def accumulators(section: AdapterSection, pool: int, room: int | None = None) -> int:
    """Bytes of the saliency pass's accumulators on the device for `pool` targeted scalars: at most adapter.memory_limit, or `room`."""
    if section.method != "sparse" or section.metric in ("random", "magnitude") or section.mask:
        return 0
    limit = bytes_of(section.memory_limit)
    limit = room if limit is None else limit
    return 4 * pool if limit is None else min(4 * pool, limit)


def _elements(given: Any, otherwise: int) -> int:
    """A count of a DeepSpeed config, or what stands for "auto" there."""
    return int(given) if isinstance(given, (int, float)) else otherwise


def _line(first: simulate.Step, second: simulate.Step, steps: float) -> simulate.Step:
    """`first` and `steps` times what `second` has more."""
    return simulate.Step(**{n: int(v + steps * (getattr(second, n) - v)) for n, v in vars(first).items()})


def with_method(cfg: RunConfig, method: str) -> RunConfig:
    """The config with another method and the same budget."""
    if cfg.adapter.method == method or (method == "lora" and cfg.adapter.method in methods_peft.KINDS):
        return cfg
    return replace(cfg, adapter=replace(cfg.adapter, method=method))


def planners(cfg: RunConfig, length: int) -> list[Planner]:
    """The methods that can be set side by side: those that the config's budget allows."""
    found, why = [], []
    for method in METHODS:
        try:
            found.append(Planner(cfg, method, length))
        except UserError as error:
            why.append(str(error))
            if method == cfg.adapter.method:
                raise
    if not found:
        raise UserError(why[0])
    return found


def show(cfg: RunConfig, gpus: int, memory: float, length: int | None, console: Console) -> None:
    """Print the tables for `gpus` GPUs of `memory` bytes."""
    if gpus < 1 or memory <= 0:
        raise UserError(f"a plan needs at least 1 GPU with more than 0 GB; got --gpus {gpus} --gpu-memory {memory / GB:g}")
    micro, accumulation = batch_plan(cfg, gpus)
    setting = Setting(gpus=gpus, memory=memory, length=length or cfg.data.max_length, micro=micro, accumulation=accumulation)
    side = planners(cfg, setting.length)
    first = side[0]
    console.print(
        f"model: {cfg.model.name}, {first.total:,} parameters, {first.weights / GB:.2f} GB; {gpus} GPU{'s' if gpus > 1 else ''}"
        f" of {memory / GB:g} GB, of which {setting.headroom:.0%} are left free; micro-batch {micro} x {setting.length} tokens,"
        f" accumulation {accumulation}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    for planner in side:
        size = f"{planner.adapter_bytes() / 1e6:,.1f} MB"
        console.print(f"{planner.method}: k = {planner.k:,}, saved adapter at most {size}", highlight=False, soft_wrap=True)
        console.print(_bytes_table(planner, setting))
    console.print(_summary(side, setting))
    console.print("Every position is taken to have a label; prompts without labels and padding need less.", highlight=False)


def _bytes_table(planner: Planner, setting: Setting) -> Table:
    table = Table(title=f"{planner.method}, GB on each GPU", title_justify="left")
    table.add_column("ZeRO stage")
    columns = [planner.rows(stage, setting, setting.micro) for stage in ZERO_STAGES]
    for stage in ZERO_STAGES:
        table.add_column(str(stage), justify="right")
    for what in ROWS:
        if any(column[what] for column in columns):
            table.add_row(what, *(f"{column[what] / GB:.3f}" for column in columns))
    table.add_section()
    table.add_row("while training", *(f"{sum(column.values()) / GB:.2f}" for column in columns))
    if any(host := [planner.in_host_memory(stage, setting) for stage in ZERO_STAGES]):
        table.add_row("offloaded to host memory", *(f"{count / GB:.2f}" for count in host))
    if accumulators(planner.cfg.adapter, planner.pool):
        sums = [planner.accumulators(stage, setting) for stage in ZERO_STAGES]
        table.add_row("saliency accumulators", *(f"{count / GB:.3f}" for count in sums))
        table.add_row("while the mask is found", *(f"{planner.mask_peak(stage, setting) / GB:.2f}" for stage in ZERO_STAGES))
    return table


def _summary(side: list[Planner], setting: Setting) -> Table:
    table = Table(title="what fits", title_justify="left")
    table.add_column("ZeRO stage")
    for planner in side:
        table.add_column(f"{planner.method}: GB, largest micro-batch", justify="right")
    for stage in ZERO_STAGES:
        table.add_row(str(stage), *(_verdict(planner, stage, setting) for planner in side))
    return table


def _verdict(planner: Planner, stage: int, setting: Setting) -> str:
    peak = max(planner.peak(stage, setting, setting.micro), planner.mask_peak(stage, setting))
    largest = planner.largest(stage, setting)
    fits = peak <= setting.memory * (1 - setting.headroom)
    return f"{peak / GB:.1f}, {'fits' if fits else 'too large'}, {largest or 'none'}"


def advice(cfg: RunConfig, world: int, memory: float) -> str:
    """For a run that went out of memory: the micro-batch that the plan holds possible, or what else would help.

    UserError for a method or a model that cannot be planned, whatever the planner stumbles over: the run has failed of something else.
    """
    engine.unannounce()
    try:
        return _advice(cfg, world, memory)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{cfg.model.name} cannot be planned: {type(error).__name__}: {error}") from error


def _advice(cfg: RunConfig, world: int, memory: float) -> str:
    stage = engine.zero_stage(cfg.deepspeed) if engine.is_enabled(cfg.deepspeed) else 0
    micro, accumulation = batch_plan(cfg, world)
    setting = Setting(gpus=world, memory=memory, length=cfg.data.max_length, micro=micro, accumulation=accumulation)
    method = "lora" if cfg.adapter.method in methods_peft.KINDS else cfg.adapter.method
    if method not in METHODS:
        raise UserError(f"a plan is for {', '.join(METHODS)}; got {method}")
    planner = Planner(cfg, method, setting.length)
    largest = planner.largest(stage, setting)
    if largest >= micro:
        largest = micro // 2
    if largest < 1:
        return "train.activation_checkpointing=true, a smaller data.max_length, or deepspeed.zero_stage=3 on more GPUs"
    return f"train.per_device_train_batch_size={largest} (now {micro})"

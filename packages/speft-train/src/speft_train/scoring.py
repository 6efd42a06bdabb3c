"""From the `adapter` section to core's saliency pass: the metric, its options, the calibration examples."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

import speft_core as sc
from speft_core.errors import UserError, nearest
from speft_core.partitioned import is_partitioned
from speft_core.saliency.metrics import as_metric
from speft_core.saliency.peers import PeerFailed, Peers

from . import classification, data, label_rows
from .attached import budget_of
from .config_names import WEIGHT_CHANGE
from .memory import bytes_of
from .ranks import PeerError

if TYPE_CHECKING:
    from .config import AdapterSection, RunConfig
    from .context import Run


def score(run: Run, peers: Peers | None = None) -> sc.SparsityMask:
    """The mask of the config's metric and budget; with `peers` the ranks share the pass and rank 0 has the mask."""
    section = run.cfg.adapter
    metric = metric_of(run.cfg, run.model, run.ranks.world)
    with _checkpointing(run):
        return sc.find_mask(
            run.model,
            calibration(run, section.calibration_examples) if metric.needs_gradient else (),
            metric=metric,
            budget=budget_of(section),
            targets=section.targets,
            scope=section.scope,
            loss_fn=loss_of(run),
            seed=run.cfg.seed,
            memory_limit=bytes_of(section.memory_limit),
            random_mode=section.random_mode,
            peers=peers,
            **options_of(section, metric),
        )


@contextmanager
def _checkpointing(run: Run) -> Iterator[None]:
    """Layers recompute as in training, whose own switch comes too late for the pass and leaves a hook on the embeddings."""
    wanted = bool(run.cfg.train.get("activation_checkpointing"))
    before = [(m, m.gradient_checkpointing) for m in run.model.modules() if hasattr(m, "gradient_checkpointing")]
    try:
        for module, was in before:
            module.gradient_checkpointing = was or wanted
        yield
    finally:
        for module, was in before:
            module.gradient_checkpointing = was


def score_together(run: Run, finish: Callable[[sc.SparsityMask], int]) -> int:
    """All ranks score, each its batches; rank 0 chooses and calls `finish` with the mask. What that returns, on all ranks.

    Where the ranks hold shards of the weights, one that fails within a layer leaves the others waiting in it: the launcher ends
    them.
    """
    ranks = run.ranks
    peers = Peers(ranks.rank, ranks.world, ranks.group, ranks.group if run.model.device.type == "cpu" else None)
    found = 0
    try:
        mask = score(run, peers)
        if ranks.is_main:
            found = finish(mask)
    except PeerFailed as error:
        raise PeerError(str(error)) from None
    except BaseException as error:
        if not isinstance(error, UserError) and any(is_partitioned(p) for p in run.model.parameters()):
            raise
        if peers.failed(error) and not ranks.is_main:
            raise PeerError(f"rank 0 stopped: {error}") from error  # it has told the user
        raise
    try:
        peers.done()
    except PeerFailed as error:
        raise PeerError(str(error)) from None
    return ranks.gather(found)[0]


def metric_of(cfg: RunConfig, model: Any, world: int = 1) -> sc.Metric:
    """The row of core's table that `adapter.metric` means: a name, one's own function or Metric, or weight_change."""
    name = cfg.adapter.metric
    if name == WEIGHT_CHANGE:
        return _weight_change(cfg, model, world)
    if ":" not in name:
        return as_metric(name)
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"adapter.metric: module {module_name} cannot be imported ({error}); is it on PYTHONPATH?") from None
    if not hasattr(module, attribute):
        raise UserError(f"adapter.metric: {module_name} has no {attribute!r}.{nearest(attribute, vars(module))}")
    found = getattr(module, attribute)
    if not isinstance(found, sc.Metric) and not callable(found):
        raise UserError(
            f"adapter.metric: {name} must be a function of (weight, mean gradient) or a speft_core.Metric;"
            f" got {type(found).__name__}"
        )
    return as_metric(found)


def options_of(section: AdapterSection, metric: sc.Metric) -> dict[str, Any]:
    """What find_mask takes beside scope and memory_limit, the same for the first and for every later mask."""
    given = {key: value for key, value in asdict(section.grasp).items() if value is not None}
    return {
        "structure": section.structure,
        "min_per_layer": section.min_per_layer,
        "max_per_layer": section.max_per_layer,
        "options": {key: given[key] for key in metric.source.options if key in given},
    }


def loss_of(run: Run) -> Any:
    """The loss that is trained: that of a classification, the next token's from the labelled rows alone, or None for the model's own."""
    if run.cfg.model.task == "sequence_classification":
        return _of_classes
    if label_rows.supports(run.model):
        return None
    return lambda model, batch: label_rows.next_token_loss(model, run.model, dict(batch))


def _of_classes(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Mean over the examples, in fp32: the models' own losses compute in the dtype of the weights, or fail where labels are of another."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return classification.loss(model(**inputs), batch["labels"])


def calibration(run: Run, count: int, change: int = 0) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of `count` training examples drawn by the seed, on the model's device, with a progress bar.

    change: number of the change of mask that they are for, each of which has examples of its own; 0 for the first mask.
    """
    from tqdm.auto import tqdm

    examples = run.data.train
    chosen = data.calibration_rows(examples, count, f"{run.cfg.seed} change {change}" if change else run.cfg.seed)
    size, collate = run.cfg.adapter.calibration_batch_size, run.data.collator(run.tokenizer)
    starts = range(0, len(chosen), size)
    for start in tqdm(starts, desc="saliency", unit="batch", dynamic_ncols=True, disable=not run.shows_progress):
        batch = collate([examples[i] for i in chosen[start : start + size]])
        yield {key: value.to(run.model.device) for key, value in batch.items()}


def _weight_change(cfg: RunConfig, model: Any, world: int) -> sc.Metric:
    """|θ_tuned − θ|, from a checkpoint of the same architecture that was fully fine-tuned."""
    import dataclasses

    from . import models, shards

    assert cfg.adapter.tuned_model is not None
    other = dataclasses.replace(cfg.model, name=cfg.adapter.tuned_model, revision=None)
    with models.one_line_errors(other), shards.loading(cfg.deepspeed, world) as finish:
        tuned = type(model).from_pretrained(models.locate(other), dtype=model.dtype, trust_remote_code=False)
    finish(tuned)
    return sc.weight_change(tuned)

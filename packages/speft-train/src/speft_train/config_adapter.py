"""The `adapter` section of the configuration: what is trained, and how it is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .config_checks import key
from .config_names import BUDGET_UNITS, METHODS, METRICS, PEFT_METHODS, POLICIES, WEIGHT_CHANGE

DTYPES = ("float32", "bfloat16", "float16")
STRUCTURES = "entries, rows, columns, blocks:B (such as blocks:16) or N:M (such as 2:4)"


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """How many scalars are trained: exactly one of k, density and like_lora_r; setting one drops the others of the
    base file.
    """

    k: int | None = key(None, "number of scalars", minimum=1)
    density: float | None = key(None, "share of the scalars that `of` names", above=0, maximum=1)
    of: str = key("model", "what density is a share of", choices=("model", "targets", "body"))
    like_lora_r: int | None = key(None, "as many scalars as LoRA of this rank has on the same targets", minimum=1)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA, for comparison."""

    r: int | None = key(None, "rank; default: the largest whose parameters stay within adapter.budget", minimum=1)
    alpha: float | None = key(None, "scale is alpha / r; default: alpha = r", above=0)
    dropout: float = key(0.0, "dropout before the down projection", minimum=0, below=1)
    targets: str | list[str] | None = key(None, "modules; default: adapter.targets")


@dataclass(frozen=True, kw_only=True)
class GraspConfig:
    """Options of metric grasp."""

    sign: int = key(-1, "-1 as the paper has it, or 1 as the published code", choices=(-1, 1))
    hessian: str = key(
        "auto", "differentiate twice, or take finite differences (float32 weights)", choices=("auto", "exact", "finite")
    )
    step: float | None = key(None, "length of a finite difference, relative to that of the weights", above=0)


@dataclass(frozen=True, kw_only=True)
class DynamicConfig:
    """A mask that changes while training."""

    interval: int | None = key(None, "optimizer steps between two changes; default: the mask stays", minimum=1)
    policy: str = key("rescore", "score all anew (SPEFT), or swap the worst (SpIEL)", choices=POLICIES)
    examples: int = key(1024, "training examples that each change reads", minimum=1)
    keep_optimizer_state: bool = key(False, "keep the moments of entries that stay, else start the optimizer anew")
    swap: float = key(0.2, "share of k that grow_and_drop exchanges", above=0, maximum=1)
    stop_after: int | None = key(None, "no change after this many optimizer steps", minimum=1)
    final_budget: int | str | None = key(
        None, "after training keep so many entries of all that were trained, or `k`: as many as the mask", pattern="k",
        words="k, or a whole number", minimum=1,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AdapterSection:
    """What is trained."""

    method: str = key("sparse", "how the model is adapted", choices=METHODS)
    metric: str = key(
        "gradient", "saliency metric that chooses the scalars; package.module:name is your own",
        choices=(*METRICS, WEIGHT_CHANGE), or_pattern=r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", or_words="package.module:name",
    )  # fmt: skip
    budget: BudgetConfig = key(BudgetConfig, "how many scalars are trained")
    targets: str | list[str] = key("all-linear", "parameters to choose from: names, suffixes, a regex, all-linear or body")
    scope: str = key("global", "one threshold over all targets, or the same density in each", choices=("global", "local"))
    structure: str = key(
        "entries", f"what is chosen: {STRUCTURES}", pattern=r"entries|rows|columns|blocks:0*([2-9]|[1-9]\d+)|\d+:\d+",
        words=STRUCTURES, added=True,
    )  # fmt: skip
    min_per_layer: int | float | None = key(
        None, "least entries of each target: a count, or a share of it as 0.001", minimum=0, added=True
    )
    max_per_layer: int | float | None = key(
        None, "most entries of each target: a count, or a share of it as 0.5", minimum=0, added=True
    )
    random_mode: str = key(
        "exact", "exactly k scalars, or each drawn on its own (metric random)", choices=("exact", "bernoulli")
    )
    grasp: GraspConfig = key(GraspConfig, "options of metric grasp", added=True)
    tuned_model: str | None = key(None, "a fully fine-tuned model (metric weight_change)", added=True)
    backward: str = key(
        "auto", "how the gradient of the values is computed", choices=("auto", "compact", "sampled", "native", "dense")
    )
    keep_dtype: str | None = key(
        None, "dtype of the inputs kept for backward; default: as they are", choices=DTYPES, added=True
    )
    calibration_examples: int = key(1024, "training examples that the saliency pass reads", minimum=1)
    calibration_batch_size: int = key(16, "examples a batch of the saliency pass", minimum=1)
    memory_limit: int | str | None = key(
        None,
        "bytes of scores on the device, as 2GiB (default on a GPU: half of what is free); the rest goes to host memory, then to"
        " several passes",
        pattern=r"\d+(\.\d+)? ?([kMGT]i?B|B)", words="a number of bytes, or one with a unit such as 512MiB or 2GB",
        minimum=1, added=True,
    )  # fmt: skip
    dtype: str | None = key(None, "dtype of the saved values; default: that of the weights", choices=DTYPES)
    train_dense: list[str] = key(list, "parameters that are trained whole, such as a classification head")
    mask: str | None = key(None, "a saved mask to use in place of the saliency pass")
    dynamic: DynamicConfig = key(DynamicConfig, "a mask that changes while training", added=True)
    lora: LoraConfig = key(LoraConfig, "options of method lora")


def check_adapter(adapter: Mapping[str, Any]) -> list[str]:
    """Mistakes that need more than one key of the section, whose keys are sound one by one."""
    mistakes = []
    budget, dynamic = adapter.get("budget") or {}, adapter.get("dynamic") or {}
    given = [unit for unit in BUDGET_UNITS if budget.get(unit) is not None]
    method, metric = adapter.get("method", "sparse"), adapter.get("metric", "gradient")
    needs_budget = (method == "sparse" and adapter.get("mask") is None) or (
        method in PEFT_METHODS and (adapter.get("lora") or {}).get("r") is None
    )
    if len(given) > 1 or (needs_budget and not given):
        mistakes.append(
            f"adapter.budget: exactly one of {', '.join(BUDGET_UNITS)} must be set; got {', '.join(given) or 'none'}"
        )
    structure = adapter.get("structure", "entries")
    bounds = [b for b in ("min_per_layer", "max_per_layer") if adapter.get(b) is not None]
    for bound in bounds:
        if isinstance(adapter[bound], float) and adapter[bound] > 1:
            mistakes.append(f"adapter.{bound}: a share must be at most 1.0, a count a whole number; got {adapter[bound]}")
    if bounds and (adapter.get("scope") == "local" or structure != "entries"):
        mistakes.append(
            f"adapter.{bounds[0]}: needs scope global and structure entries; got {adapter.get('scope', 'global')}, {structure}"
        )
    if metric == "random" and (bounds or structure != "entries"):
        mistakes.append("adapter.metric: random has no scores, so it takes no structure, min_per_layer or max_per_layer")
    if ":" in structure and not structure.startswith("blocks"):
        keep, of = map(int, structure.split(":"))
        if not 0 < keep < of:
            mistakes.append(f"adapter.structure: N:M keeps N of each M, with 0 < N < M; got {structure}")
    if metric == WEIGHT_CHANGE and adapter.get("tuned_model") is None:
        mistakes.append("adapter.tuned_model: must name the fully fine-tuned model that metric weight_change compares with")
    if dynamic.get("interval") is not None and method != "sparse":
        mistakes.append(f"adapter.dynamic.interval: needs method sparse; got {method}")
    if dynamic.get("interval") is not None and metric == "random" and dynamic.get("policy", "rescore") == "rescore":
        mistakes.append("adapter.dynamic.policy: rescore needs a metric other than random, whose mask would never change")
    single = adapter.get("scope", "global") == "global" and structure == "entries" and not bounds
    if dynamic.get("interval") is not None and dynamic.get("policy") == "grow_and_drop" and not single:
        mistakes.append(
            "adapter.dynamic.policy: grow_and_drop exchanges single entries over all targets, so it needs scope global, structure"
            " entries and no bounds; with others use rescore"
        )
    if dynamic.get("final_budget") is not None and dynamic.get("interval") is None:
        mistakes.append("adapter.dynamic.final_budget: needs dynamic.interval; a mask that stays is not pruned")
    return mistakes

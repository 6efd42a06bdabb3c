"""The configuration of one run: what every key means, how files and `key=value` overrides combine, and what is refused.

A file may name others to start from with `base: parts/common.yaml` (or a list), relative to itself: later layers win
key by key, lists are replaced as a whole, and `key=value` overrides come last. Everything is checked before anything
is loaded, and all mistakes are reported at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from speft_core.errors import UserError

from .config_adapter import AdapterSection, BudgetConfig, DynamicConfig, check_adapter
from .config_checks import check_read, check_tree, key
from .config_layers import read_layers
from .config_names import METRICS, PROBLEM_KINDS, TASKS, TEMPLATES
from .train_args import check_best, with_no

__all__ = ["METRICS", "AdapterSection", "BudgetConfig", "DynamicConfig", "RunConfig", "from_mapping", "load_config"]


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The head of a sequence_classification model."""

    train: bool = key(True, "train it whole, beside the adapter; false leaves it as it starts")
    init_std: float | None = key(
        None, "spread of its random start; default: 0.06 / sqrt(width) on a decoder, the model's own on an encoder", above=0
    )
    bias: str = key(
        "zero", "its bias starts at zero, or at the training labels: their mean, or the log of each share",
        choices=("zero", "labels"), added=True,
    )  # fmt: skip
    words: dict[str, str] = key(dict, "label -> answer word: the head starts as these rows of the vocabulary head")
    weight_decay: float | None = key(None, "its own weight decay; default: train.weight_decay", minimum=0, added=True)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The pre-trained model and the form in which its weights are held."""

    name: str = key("", "Hub id, folder, bundled:smollm2-135m or bundled:minilm-l6", required=True)
    revision: str | None = key(None, "branch, tag or commit of a Hub model")
    task: str = key("causal_lm", "kind of model to load", choices=TASKS)
    num_labels: int | None = key(None, "outputs of a classification head; default: read from the data", minimum=1)
    head: HeadConfig = key(HeadConfig, "the head of a sequence_classification model")
    dtype: str = key(
        "auto", "dtype of the weights; auto is that of the checkpoint", choices=("auto", "float32", "bfloat16", "float16")
    )
    attn_implementation: str | None = key(None, "attention of transformers: eager, sdpa, flash_attention_2, ...")
    cache_dir: str | None = key(None, "folder for downloaded and converted models (default: the Hugging Face and speft caches)")


@dataclass(frozen=True, kw_only=True)
class WordProblemsConfig:
    """How hard `bundled:word-problems` is."""

    kinds: list[str] = key(
        lambda: list(PROBLEM_KINDS), "kinds of problems, drawn in equal shares", each=PROBLEM_KINDS, nonempty=True
    )
    max_number: int = key(60, "largest number that is added or subtracted", minimum=20, maximum=100_000)
    max_factor: int = key(12, "largest factor of a multiplication", minimum=8, maximum=1000)
    seed: int = key(0, "seed of the problems; train and test stay disjoint under every seed", minimum=0)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the examples come from, and how they become token ids and labels."""

    train: str = key("", "bundled:word-problems, a .jsonl or .csv file, or a Hub data set id", required=True)
    test: str | None = key(None, "held-out data to evaluate on; default: the test split of train, or else the validation data")
    validation: str | None = key(None, "data for the loss during training, measured where there are no test data; none if absent")
    subset: str | None = key(None, "configuration name of a Hub data set, such as main")
    revision: str | None = key(None, "branch, tag or commit of a Hub data set")
    train_split: str = key("train", "split of train, for Hub and bundled data")
    test_split: str = key("test", "split of test, for Hub and bundled data")
    validation_split: str = key("validation", "split of validation, for Hub and bundled data")
    template: str = key("question_answer", "how a row becomes a prompt and an answer", choices=TEMPLATES)
    columns: dict[str, str] = key(
        dict, "role -> column of the data: roles of the template, or text, text_pair and label for classification"
    )
    labels: str = key("auto", "labels are classes, or numbers to predict", choices=("auto", "classes", "numbers"))
    label_names: list[str] = key(list, "classes in the order of the outputs; default: sorted, as the data have them")
    instruction: str | None = key(None, "words around the text of a classification: {text} and {text_pair} stand in it")
    system_prompt: str | None = key(None, "system message of the chat template")
    train_size: int | None = key(None, "number of training rows, the first ones (bundled data: how many to make)", minimum=1)
    test_size: int | None = key(None, "number of test rows, the first ones", minimum=1)
    validation_size: int | None = key(None, "number of validation rows, the first ones", minimum=1)
    shuffle_seed: int | None = key(
        None, "shuffle each file's rows by this seed before any are taken; many are sorted", minimum=0, added=True
    )
    more_tests: dict[str, str] = key(
        dict, "name -> file, or split of the Hub data set, that a classification is scored on too", added=True
    )
    validation_from_train: int = key(0, "take this many rows from the end of train for validation", minimum=0)
    max_length: int = key(1024, "longest example in tokens, prompt and answer", minimum=2)
    overlong: str = key(
        "drop", "what to do with longer examples; of a classification those that are scored are always cut",
        choices=("drop", "truncate"),
    )  # fmt: skip
    prompt_loss: bool = key(False, "learn the prompt's tokens too, not the answer's alone; what is measured stays the answer's")
    word_problems: WordProblemsConfig = key(WordProblemsConfig, "options of bundled:word-problems")


@dataclass(frozen=True, kw_only=True)
class DeepspeedSection:
    """DeepSpeed. A run in one plain process needs none of it."""

    enabled: str | bool = key("auto", "auto is true when the deepspeed launcher started the run", choices=("auto", True, False))
    zero_stage: int = key(
        0, "what is sharded: 0 nothing, 1 optimizer states, 2 gradients too, 3 weights too", minimum=0, maximum=3
    )
    offload_optimizer: str | None = key(None, "where optimizer states live", choices=("none", "cpu"))
    offload_param: str | None = key(None, "where partitioned weights live (stage 3)", choices=("none", "cpu"))
    config: str | dict[str, Any] | None = key(None, "a DeepSpeed config (JSON file or mapping) whose keys win over ours")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is measured on the test data (or else on the validation data), before and after training."""

    enabled: bool = key(True, "evaluate at all")
    base: bool = key(True, "evaluate the model before training too")
    generation: bool = key(True, "generate answers and score them by exact match")
    loss: bool = key(True, "mean loss per answer token")
    batch_size: int = key(32, "prompts generated at once, and examples of a loss: fewer where their logits are many", minimum=1)
    max_new_tokens: int = key(256, "longest generated answer in tokens", minimum=1)
    limit: int | None = key(None, "number of test rows that are evaluated, the first ones", minimum=1)
    validation: bool = key(
        False, "measure the validation data beside the test data, as a classification always does", added=True
    )
    examples: int = key(5, "generated answers shown in the report", minimum=0)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run."""

    output_dir: str = key("", "folder of the run's results", required=True)
    seed: int = key(0, "seed of the mask, the order of the data and everything else that is drawn", minimum=0)
    model: ModelConfig = key(ModelConfig, "the pre-trained model")
    data: DataConfig = key(DataConfig, "the examples")
    adapter: AdapterSection = key(AdapterSection, "what is trained")
    train: dict[str, Any] = key(dict, "fields of transformers.TrainingArguments, and global_batch_size")
    deepspeed: DeepspeedSection = key(DeepspeedSection, "DeepSpeed")
    evaluate: EvaluateConfig = key(EvaluateConfig, "what is measured")


SECTIONS = tuple(f.name for f in fields(RunConfig))


def load_config(path: str | Path, overrides: Sequence[str] = (), *, stored: bool = False) -> RunConfig:
    """Read a config file and its bases, apply `key=value` overrides, check it all; stored: see `from_mapping`.

    Raises a UserError of one line that names every mistake with its key's path.
    """
    tree = read_layers(Path(path), overrides)
    tree.pop("sweep", None)  # for `speft-train sweep` alone
    return from_mapping(tree, name=str(path), stored=stored)


def from_mapping(tree: Mapping[str, Any], name: str = "config", *, stored: bool = False) -> RunConfig:
    """Check a plain mapping and make a RunConfig of it; `name` is what messages call it.

    stored: it is of a run that was accepted when it began, maybe by a version that knew fewer rules. What settings mean together is not
    asked again: such a run stays readable, and a start of it is checked by the config that the start is given.
    """
    if isinstance(tree.get("train"), Mapping):
        tree = {**tree, "train": with_no(tree["train"])}
    mistakes = check_tree(RunConfig, tree)
    if not mistakes and not stored:
        mistakes = _check_together(tree)
    if mistakes:
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        raise UserError(f"{name} has {count}: " + "; ".join(mistakes))
    return _build(RunConfig, tree)


def to_dict(cfg: RunConfig) -> dict[str, Any]:
    """The whole configuration as plain dicts, lists and scalars."""
    return asdict(cfg)


def to_yaml(cfg: RunConfig) -> str:
    """YAML that `load_config` reads back to an equal RunConfig."""
    return str(OmegaConf.to_yaml(OmegaConf.create(to_dict(cfg))))


def identity_dict(cfg: Any) -> dict[str, Any]:
    """`to_dict` without the keys that came later and are at their default: a new version's key makes no run another."""
    tree = {}
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        if f.metadata.get("added") and value == getattr(type(cfg)(), f.name):
            continue
        tree[f.name] = identity_dict(value) if is_dataclass(value) else value
    return tree


def section_hash(cfg: RunConfig, *sections: str) -> str:
    """A short hash of some sections (all if none is named; dots reach into one, as in "adapter.budget")."""
    tree = identity_dict(cfg)
    chosen = {name: _reach(tree, name) for name in sections or SECTIONS}
    text = json.dumps(chosen, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def batch_plan(cfg: RunConfig, world_size: int) -> tuple[int, int]:
    """(examples a device and forward, accumulation steps) so that `train.global_batch_size` holds on `world_size`
    devices.

    Without global_batch_size the two fields of TrainingArguments are returned as they are.
    """
    per_device = cfg.train.get("per_device_train_batch_size")
    total = cfg.train.get("global_batch_size")
    if total is None:
        return per_device or 8, cfg.train.get("gradient_accumulation_steps", 1)
    share, rest = divmod(total, world_size)
    if rest or share == 0:
        raise UserError(f"train.global_batch_size must be a multiple of the number of processes ({world_size}); got {total}")
    if per_device is None:
        per_device = next(size for size in range(min(share, 8), 0, -1) if share % size == 0)
    if share % per_device:
        raise UserError(
            "train.global_batch_size must be a multiple of train.per_device_train_batch_size x processes"
            f" ({per_device} x {world_size}); got {total}"
        )
    return per_device, share // per_device


def key_table() -> list[tuple[str, str, str]]:
    """(key, default, documentation) of every key, for docs/reference.md."""
    rows: list[tuple[str, str, str]] = []

    def walk(cls: Any, prefix: str) -> None:
        for f in fields(cls):
            value = getattr(cls(), f.name)
            if is_dataclass(value):
                walk(type(value), f"{prefix}{f.name}.")
            else:
                default = "required" if f.metadata.get("required") else json.dumps(value)
                choices = ", ".join(json.dumps(c).strip('"') for c in f.metadata.get("choices", ()))
                rows.append((prefix + f.name, default, f.metadata["doc"] + (f" ({choices})" if choices else "")))

    walk(RunConfig, "")
    return rows


def _build(cls: Any, tree: Mapping[str, Any]) -> Any:
    """Dataclasses from a tree that has passed the checks."""
    made = {}
    for f in fields(cls):
        if f.name not in tree:
            continue
        value, default = tree[f.name], f.default_factory if callable(f.default_factory) else None
        if is_dataclass(default):
            value = _build(default, value or {})
        elif isinstance(value, int) and not isinstance(value, bool) and f.type in ("float", "float | None"):
            value = float(value)
        made[f.name] = value
    return cls(**made)


def _reach(tree: Mapping[str, Any], path: str) -> Any:
    value: Any = tree
    for part in path.split("."):
        value = value[part]
    return value


def _check_together(tree: Mapping[str, Any]) -> list[str]:
    """Rules that need more than one key."""
    train = tree.get("train") or {}
    mistakes = check_adapter(tree.get("adapter") or {})
    task, data = (tree.get("model") or {}).get("task", "causal_lm"), tree.get("data") or {}
    mistakes += check_best(train, task, data.get("labels", "auto")) + check_read(task, data)
    if "global_batch_size" in train and "gradient_accumulation_steps" in train:
        mistakes.append("train: set global_batch_size or gradient_accumulation_steps, not both; the first works out the second")
    deepspeed = tree.get("deepspeed") or {}
    if deepspeed.get("offload_param") == "cpu" and deepspeed.get("zero_stage", 0) != 3:
        mistakes.append(f"deepspeed.offload_param: cpu needs zero_stage 3; got stage {deepspeed.get('zero_stage', 0)}")
    if deepspeed.get("offload_optimizer") == "cpu" and not deepspeed.get("zero_stage") and not deepspeed.get("config"):
        mistakes.append("deepspeed.offload_optimizer: cpu needs zero_stage 1, 2 or 3; at stage 0 DeepSpeed offloads nothing")
    return mistakes

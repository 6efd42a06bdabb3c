"""The `train` section: fields of transformers.TrainingArguments, checked without importing transformers.

Names, types and enumerations are read from the source text of the installed version: importing it takes ten seconds,
and a misspelt key should be told at once. The range checks that TrainingArguments does itself come later, when it is
made.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speft_core.errors import nearest

from .config_names import FIGURES

# Keys of TrainingArguments that other parts of the config own, or that a run cannot honour, and what to do instead.
MANAGED = {
    "output_dir": "set output_dir at the top level",
    "seed": "set seed at the top level",
    "deepspeed": "use the deepspeed section",
    "do_train": "a run always trains; remove it",
    "do_eval": "use the evaluate section",
    "do_predict": "use the evaluate section",
    "resume_from_checkpoint": "a run resumes by itself from its newest complete checkpoint; remove it",
    "local_rank": "the launcher sets it; remove it",
    "dataloader_drop_last": "each epoch is cut into whole global batches, what does not fill one waits for the next; remove it",
    "remove_unused_columns": "the data are already token ids and labels; remove it",
    "fsdp": "sharding is done by the deepspeed section",
    "fsdp_config": "sharding is done by the deepspeed section",
    "enable_jit_checkpoint": "it deadlocks on several processes, and runs save on SIGTERM without it; remove it",
    "push_to_hub": "use `speft-hub push` on the finished adapter",
    "hub_model_id": "use `speft-hub push` on the finished adapter",
    "hub_token": "a token must not stand in a config; log in with `hf auth login`",
    "auto_find_batch_size": "it would change the batches unseen; set per_device_train_batch_size",
}
# Names that people know from older versions or other tools.
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "warmup_ratio": "warmup_steps (a value below 1 is a share of all steps)",
    "group_by_length": "train_sampling_strategy=group_by_length",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "batch_size": "global_batch_size or per_device_train_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "logging_dir": "output_dir at the top level (logs go below it)",
}
OWN = {"global_batch_size": ("int",), "early_stopping_patience": ("int", "None")}
LIMITS: dict[str, tuple[str, Any]] = {
    "learning_rate": ("more than 0", lambda v: v > 0),
    "global_batch_size": ("at least 1", lambda v: v >= 1),
    "early_stopping_patience": ("at least 1 evaluation", lambda v: v >= 1),
    "per_device_train_batch_size": ("at least 1", lambda v: v >= 1),
    "per_device_eval_batch_size": ("at least 1", lambda v: v >= 1),
    "gradient_accumulation_steps": ("at least 1", lambda v: v >= 1),
    "num_train_epochs": ("more than 0", lambda v: v > 0),
    "max_steps": ("at least 1, or -1 for num_train_epochs", lambda v: v == -1 or v >= 1),
    "warmup_steps": ("at least 0", lambda v: v >= 0),
    "weight_decay": ("at least 0", lambda v: v >= 0),
    "adam_beta1": ("from 0 to less than 1", lambda v: 0 <= v < 1),
    "adam_beta2": ("from 0 to less than 1", lambda v: 0 <= v < 1),
    "max_grad_norm": ("at least 0", lambda v: v >= 0),
    "label_smoothing_factor": ("from 0 to less than 1", lambda v: 0 <= v < 1),
    "logging_steps": ("more than 0", lambda v: v > 0),
    "save_steps": ("more than 0", lambda v: v > 0),
    "dataloader_num_workers": ("at least 0", lambda v: v >= 0),
}
LOGGING_STEPS = 10  # between two logs, and between two evaluations by steps, where the config does not say
STEERED = ("reduce_lr_on_plateau", "greedy")  # schedules for which transformers takes the loss where no metric is named
PRIMITIVES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "None": (type(None),),
    "dict": (dict,),
    "list": (list,),
    "False": (bool,),
}
IN_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "None": "null",
    "dict": "a mapping",
    "list": "a list",
    "False": "false",
}


def with_no(train: Mapping[str, Any]) -> dict[str, Any]:
    """`train` with "no" again where YAML has made false of it, as in save_strategy: no."""
    known, choices = training_fields(), enumerations()

    def is_no(key: str, value: Any) -> bool:
        kinds = known.get(key, ())
        return value is False and "bool" not in kinds and any("no" in choices.get(kind, ()) for kind in kinds)

    return {key: "no" if is_no(key, value) else value for key, value in train.items()}


def check_train(train: Mapping[str, Any]) -> list[str]:
    """The mistakes of a `train` section, each with its key's path."""
    known = training_fields()
    mistakes = []
    for key, value in train.items():
        path = f"train.{key}"
        if key in MANAGED:
            mistakes.append(f"{path}: cannot be set here: {MANAGED[key]}")
        elif key in RENAMED:
            mistakes.append(f"{path}: is named {RENAMED[key]}")
        elif key not in known:
            hint = nearest(str(key), list(known)) or " It must be a field of transformers.TrainingArguments"
            mistakes.append(f"{path}: unknown key.{hint}")
        elif not _fits(value, known[key]):
            words = " or ".join(dict.fromkeys(IN_WORDS[kind] for kind in known[key] if kind in IN_WORDS))
            mistakes.append(f"{path}: must be {words or 'text'}; got {value!r}")
        else:
            mistakes += _check_value(path, key, value, known[key])
    return mistakes


def check_best(train: Mapping[str, Any], task: str, labels: str = "auto") -> list[str]:
    """Early stopping needs evaluations and a figure to stop by; what is best is told by a figure that is measured.

    The Trainer finds out when it starts, or after the first evaluation, and then in other words.
    """
    mistakes = []
    metric = train.get("metric_for_best_model")
    if train.get("early_stopping_patience") is not None:
        key = "train.early_stopping_patience"
        if train.get("eval_strategy", "no") == "no":
            mistakes.append(f"{key}: needs train.eval_strategy epoch or steps; got no")
        by_loss = train.get("load_best_model_at_end") or train.get("lr_scheduler_type") in STEERED
        if metric is None and not by_loss:
            mistakes.append(f"{key}: needs train.load_best_model_at_end=true, or train.metric_for_best_model to stop by")
    mistakes += _check_shipped(train)
    if (task, labels) == ("sequence_classification", "numbers") and train.get("label_smoothing_factor"):
        rule = "a regression has no labels to smooth, remove it"
        mistakes.append(f"train.label_smoothing_factor: {rule}; got {train['label_smoothing_factor']!r}")
    names = FIGURES[labels] if task == "sequence_classification" else ("loss",)
    if metric is not None and metric.removeprefix("eval_") not in names:
        one = f"one of {', '.join(names)}" if len(names) > 1 else f"loss, all that a {task} is measured by while it trains"
        hint = nearest(metric.removeprefix("eval_"), names)
        mistakes.append(f"train.metric_for_best_model: must be {one}; got {metric!r}.{hint}".removesuffix("."))
    return mistakes


def steps_to_best(train: Mapping[str, Any]) -> float | None:
    """Steps between two evaluations of a run that ships its best checkpoint and saves by steps too; None for every other.

    Each evaluated step is saved then: what turns out to be the best could not ship otherwise.
    """
    by_steps = train.get("eval_strategy") == "steps" and train.get("save_strategy", "steps") == "steps"
    if not (train.get("load_best_model_at_end") and by_steps):
        return None
    return train.get("eval_steps") or train.get("logging_steps") or LOGGING_STEPS


def _check_shipped(train: Mapping[str, Any]) -> list[str]:
    """What ships as the best must have been measured, and saved whenever it was."""
    if not train.get("load_best_model_at_end"):
        return []
    if train.get("eval_strategy", "no") == "no":
        return ["train.load_best_model_at_end: needs train.eval_strategy epoch or steps; got no"]
    wanted, given = steps_to_best(train), train.get("save_steps")
    if wanted is None or given in (None, wanted):
        return []
    rule = f"with train.load_best_model_at_end every evaluation is saved, so it must be {wanted:g} as train.eval_steps, or left out"
    return [f"train.save_steps: {rule} (train.save_strategy=best saves the best ones alone); got {given!r}"]


def _check_value(path: str, key: str, value: Any, kinds: tuple[str, ...]) -> list[str]:
    if key in LIMITS and value is not None:
        words, holds = LIMITS[key]
        return [] if holds(value) else [f"{path}: must be {words}; got {value!r}"]
    choices = [choice for kind in kinds for choice in enumerations().get(kind, ())]
    if isinstance(value, str) and choices and value not in choices:
        hint = nearest(value, choices) or f" Choices: {', '.join(choices)}"
        return [f"{path}: {value!r} is not a choice of transformers.{hint}"]
    return []


def _fits(value: Any, kinds: tuple[str, ...]) -> bool:
    for kind in kinds:
        allowed = PRIMITIVES.get(kind, (str,))
        if isinstance(value, allowed) and (bool in allowed or not isinstance(value, bool)):
            return not isinstance(value, float) or math.isfinite(value)
    return False


@functools.cache
def training_fields() -> dict[str, tuple[str, ...]]:
    """Field of TrainingArguments -> names of the types that it takes."""
    found: dict[str, tuple[str, ...]] = dict(OWN)
    for node in _classes("training_args.py").get("TrainingArguments", ()):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = _type_names(node.annotation)
    assert len(found) > 50, "TrainingArguments was not found in the source of transformers"
    return found


@functools.cache
def enumerations() -> dict[str, tuple[str, ...]]:
    """Name of an enumeration that TrainingArguments uses -> its values."""
    found = {}
    for file in ("training_args.py", "trainer_utils.py"):
        for name, body in _classes(file).items():
            values = [n.value.value for n in body if isinstance(n, ast.Assign) and isinstance(n.value, ast.Constant)]
            texts = [value for value in values if isinstance(value, str)]
            if texts and len(texts) == len(values):
                found[name] = tuple(texts)
    return found


def _classes(file: str) -> dict[str, list[ast.stmt]]:
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.submodule_search_locations, "transformers is a requirement of speft-train"
    source = (Path(spec.submodule_search_locations[0]) / file).read_text(encoding="utf-8")
    return {node.name: node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}


def _type_names(annotation: ast.expr) -> tuple[str, ...]:
    """`str | list[str] | None` -> ("str", "list", "None")."""
    if isinstance(annotation, ast.BinOp):
        return _type_names(annotation.left) + _type_names(annotation.right)
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return _type_names(ast.parse(annotation.value, mode="eval").body)
    if isinstance(annotation, ast.Constant):
        return (str(annotation.value),)
    if isinstance(annotation, ast.Attribute):
        return (annotation.attr,)
    if isinstance(annotation, ast.Name):
        return (annotation.id,)
    if isinstance(annotation, ast.Subscript):
        (base,) = _type_names(annotation.value)
        if base in ("Union", "Optional", "Literal"):
            inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
            return tuple(name for item in inner for name in _type_names(item)) + (
                ("None",) if base == "Optional" else ()
            )
        return (base,)
    return ("Any",)

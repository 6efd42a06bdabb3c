"""The `config.json` of an export: the base's, with what the adapter's own says of the head, and no reference to code that is not copied."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from .names import VOCABULARY

LABEL_KEYS = ("id2label", "label2id", "num_labels", "problem_type")
TAKEN: dict[str, tuple[type, ...]] = {  # of the adapted model's configuration, which anybody may have written
    "id2label": (dict,),
    "label2id": (dict,),
    "num_labels": (int,),
    "problem_type": (str, type(None)),
    "pad_token_id": (int, type(None)),
}
HEAD_KEY = re.compile(r"(classifier|pooler|summary)_\w+")  # how a head is laid out, as classifier_pooling of ModernBERT
# The last matrix of a classifier, one row an output, as Transformers' classes call it.
OUTPUTS = (
    "score.weight",
    "classifier.weight",
    "classifier.out_proj.weight",
    "classification_head.out_proj.weight",
    "logits_proj.weight",
)
ENDINGS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForPreTraining", "ForConditionalGeneration", "Model")
CODE_KEYS = ("auto_map", "custom_pipelines")
DTYPE_KEYS = ("dtype", "torch_dtype")
TOKENIZER = "tokenizer_config.json"
WITHOUT_VOCABULARY = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer")  # they read bytes or code points


def made_config(
    folder: Path, dense: dict[str, torch.Tensor], base: dict[str, Any], labels: dict[str, Any] | None
) -> dict[str, Any]:
    """The base's configuration, made a classifier's if need be.

    folder: the adapter's, whose own config.json says how its head is laid out and what its outputs mean; nothing else is taken.
    labels: what the outputs of a multi-head folder's head mean; None for an adapter that has one head.
    """
    head = next((t for n, t in dense.items() if n in OUTPUTS), None)
    config, own = dict(base), _own(folder, base)
    if own is not None:
        if head is not None and labels is None:  # a label key that it lacks has the value that Transformers takes as given
            config = {k: v for k, v in config.items() if k not in LABEL_KEYS}
        left = LABEL_KEYS if labels is not None else ()  # those of a multi-head folder are one head's
        config |= {k: v for k, v in own.items() if k not in left and _is_taken(k, v)}
    architectures = [str(a) for a in config.get("architectures") or []]
    if head is not None and not any("Classification" in a for a in architectures):
        said = (own or {}).get("architectures")
        told = [a for a in said if str(a).isidentifier() and "Classification" in a] if isinstance(said, list) else []
        config["architectures"] = told or [_classifier(a) for a in architectures]
    if head is not None and (labels is not None or len(config.get("id2label") or {0: "", 1: ""}) != head.shape[0]):
        for key in LABEL_KEYS:
            config.pop(key, None)
        names = (labels or {}).get("id2label") or {str(i): f"LABEL_{i}" for i in range(head.shape[0])}
        config["id2label"], config["label2id"] = names, {name: int(place) for place, name in names.items()}
        if (labels or {}).get("problem_type"):
            config["problem_type"] = (labels or {})["problem_type"]
    for private in ("_name_or_path", "name_or_path"):
        config.pop(private, None)
    return config


def _own(folder: Path, base: dict[str, Any]) -> dict[str, Any] | None:
    """The configuration beside the adapter, if it is of a model of the base's kind."""
    if not (folder / "config.json").is_file():
        return None
    own: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return own if own.get("model_type") == base.get("model_type") else None


def _is_taken(key: str, value: Any) -> bool:
    plain = value is None or isinstance(value, (str, int, float))
    return isinstance(value, TAKEN[key]) if key in TAKEN else plain and HEAD_KEY.fullmatch(key) is not None


def _classifier(architecture: str) -> str:
    for ending in ENDINGS:
        if architecture.endswith(ending):
            return architecture.removesuffix(ending) + "ForSequenceClassification"
    return architecture


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The configuration where the weights are stored in `dtype`, those of its parts too."""
    parts = {k: v | {key: dtype for key in DTYPE_KEYS if key in v} for k, v in config.items() if isinstance(v, dict)}
    return config | parts | {key: dtype for key in DTYPE_KEYS if key in config or key == "dtype"}


def without_code(config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The configuration without the classes that it names in Python files beside it, which an export does not copy; and those.

    What names the repository that holds its code (`repository--module.Class`) stays.
    """
    kept, left = dict(config), []
    for key in CODE_KEYS:
        if isinstance(config.get(key), dict):
            here = {name: value for name, value in config[key].items() if not _elsewhere(value)}
            kept[key] = {name: value for name, value in config[key].items() if name not in here}
            left += sorted(here)
            if not kept[key]:
                del kept[key]
    return kept, left


def _elsewhere(value: Any) -> bool:
    parts = [value.get("impl")] if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return all("--" in str(part) for part in parts if part is not None)


def write_configs(folder: Path, config: dict[str, Any], dtype: str | None) -> list[str]:
    """Write an export's `config.json`, for weights in `dtype` if given; returns what a person should know of what did not come along."""
    notes, left = [], []
    tokenizer = _read(folder / TOKENIZER)
    for name, content in (("config.json", with_dtype(config, dtype) if dtype else config), (TOKENIZER, tokenizer)):
        kept, gone = without_code(content)
        left += gone
        if gone or name != TOKENIZER:
            (folder / name).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    if left:
        listed = ", ".join(dict.fromkeys(left))
        notes.append(
            f"Python files of the base are not copied, and the export names them no more ({listed});"
            " a kind of model or tokenizer that Transformers itself does not have needs them"
        )
    found = any(VOCABULARY.fullmatch(file.name) for file in folder.iterdir())
    if tokenizer and not found and tokenizer.get("tokenizer_class") not in WITHOUT_VOCABULARY:
        notes.append(f"the base has a {TOKENIZER} and no vocabulary file that speft knows; copy its tokenizer's files by hand")
    return notes


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    return content if isinstance(content, dict) else {}

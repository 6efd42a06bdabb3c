"""The model card of an adapter: what the Hub shows of it, generated from the adapter itself."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from speft_core import SparseAdapter, UserError

from . import licences, names
from .addresses import public_base
from .evaluation import EVAL_RESULTS, Evaluation, eval_results_yaml, model_index, read_results
from .picture import density_svg, density_table

PIPELINE_OF_TASK = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}


@dataclass(frozen=True, kw_only=True)
class CardFields:
    """What a person says of an adapter, beyond what it says itself. None or empty: not said."""

    license: str | None = None  #: an SPDX id or one of the Hub's
    license_name: str | None = None  #: with license "other"
    license_link: str | None = None  #: with license "other"
    language: tuple[str, ...] = ()  #: ISO 639 codes
    pipeline_tag: str | None = None  #: the task, as the Hub calls it
    datasets: tuple[str, ...] = ()  #: ids on the Hub
    tags: tuple[str, ...] = ()  #: free
    base_model: str | None = None  #: the id on the Hub, when the adapter knows its base by a path
    relation: str = "adapter"  #: "adapter", or "finetune" for an export
    title: str | None = None  #: the heading of a new card
    results: Path | None = None  #: a results.json whose figures are shown
    evaluations: tuple[Evaluation, ...] = ()  #: figures to show

    def given(self) -> set[str]:
        """The metadata keys that were said explicitly this time and so win over what a card has."""
        said = {f.name for f in fields(self) if getattr(self, f.name) not in (None, ()) and f.name not in ("relation", "title")}
        return said | ({"model-index", "metrics"} if said & {"results", "evaluations"} else set())

    def check(self) -> None:
        """UserError for what the Hub would misunderstand or refuse."""
        if self.license is not None:
            licences.check_licence(self.license, self.license_name, self.license_link)
        for language in self.language:
            licences.check_language(language)
        if self.pipeline_tag is not None:
            licences.check_pipeline(self.pipeline_tag)
        for dataset in self.datasets:
            licences.check_hub_id("datasets", dataset)
        if self.base_model is not None:
            licences.check_hub_id("base_model", self.base_model)


@dataclass(frozen=True)
class Rendered:
    """Generated: metadata, body sections by name (in order), the heading, and the files that go along."""

    title: str
    metadata: dict[str, Any]
    sections: dict[str, str]
    files: dict[str, str] = field(default_factory=dict)


def find_results(folder: Path) -> Path | None:
    """The figures of the run that made an adapter: in its folder, or in the run's folder when it is `RUN/adapter`."""
    beside = [
        folder / "results.json",
        *([folder.resolve().parent / "results.json"] if folder.resolve().name == "adapter" else []),
    ]
    return next((path for path in beside if path.is_file()), None)


def read_text(path: Path) -> str:
    """The text of a file that people write; UserError when it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} must be UTF-8 text; save it so") from None


def plain(text: Any, limit: int = 200) -> str:
    """`text` on one line of Markdown, with nothing in it that Markdown or HTML would act on."""
    line = " ".join(str(text).split())
    line = line if len(line) <= limit else line[: limit - 1] + "…"
    line = re.sub(r"[\x00-\x1f\x7f]", "", line).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]|#!~])", r"\\\1", line)


def fenced(text: str, language: str) -> str:
    """A code block that no line of `text` can close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _base(adapter: SparseAdapter, given: CardFields) -> tuple[str | None, str | None]:
    """The base as an id on the Hub if there is one, and as a person may read it."""
    told = given.base_model or public_base(adapter.config.base_model_name_or_path)
    original = given.base_model or adapter.config.base_model_name_or_path
    on_hub = told if told and told == original and licences.HUB_ID.fullmatch(told) and "/" in told else None
    return on_hub, told


def render(adapter: SparseAdapter, folder: Path, address: str, given: CardFields) -> Rendered:
    """Generate the card of the adapter in `folder`, to be published at `address` (without a revision)."""
    given.check()
    config = adapter.config
    on_hub, base = _base(adapter, given)
    results = given.results or find_results(folder)
    task = given.pipeline_tag or PIPELINE_OF_TASK.get(config.task_type or "")
    found = (read_results(results, folder, task) if task else read_results(results, folder)) if results else []
    evaluations = [*given.evaluations, *found]
    tags = ["speft", "sparse", *(["merge"] if config.extra.get("merge") else []), *given.tags]
    metadata: dict[str, Any] = {
        "library_name": "speft" if given.relation == "adapter" else "transformers",
        "base_model": on_hub,
        "base_model_relation": given.relation if on_hub else None,
        "license": licences.check_licence(given.license, given.license_name, given.license_link) if given.license else None,
        "license_name": given.license_name,
        "license_link": given.license_link,
        "language": list(given.language) or None,
        "pipeline_tag": task,
        "datasets": list(given.datasets) or None,
        "metrics": sorted({e.metric for e in evaluations}) or None,
        "tags": list(dict.fromkeys([*tags, *([f"base_model:{given.relation}:{on_hub}"] if on_hub else [])])),
        "model-index": model_index(address.rsplit("/", 1)[-1], evaluations) or None,
    }
    sections = {
        "summary": _summary(adapter, folder, base),
        "load": _load(address, base or "BASE_MODEL", config.task_type or config.extra.get("merge", {}).get("task_type")),
        "results": _results(evaluations),
        "density": _density(adapter),
        "training": _training(folder),
        "merge": _merge(config.extra.get("merge")),
    }
    files = {names.PICTURE: density_svg(adapter.deltas)}
    if text := eval_results_yaml(evaluations):
        files[EVAL_RESULTS] = text
    title = given.title or f"{address.rsplit('/', 1)[-1]}: a sparse adapter" + (f" for {base}" if base else "")
    kept = {k: v for k, v in metadata.items() if v is not None}
    return Rendered(plain(title), kept, {name: text for name, text in sections.items() if text}, files)


def _summary(adapter: SparseAdapter, folder: Path, base: str | None) -> str:
    config = adapter.config
    numel = sum(d.numel for d in adapter.deltas.values())
    dense = sum(t.numel() for t in adapter.dense.values())
    size = (folder / names.WEIGHTS).stat().st_size if (folder / names.WEIGHTS).is_file() else 0
    dtypes = sorted({str(d.values_K.dtype).removeprefix("torch.") for d in adapter.deltas.values()})
    budget = ", ".join(f"{k} = {v}" for k, v in config.budget.items() if v is not None)
    rows = [
        ("Base model", plain(base or "not recorded")),
        ("Base commit", plain(config.base_model_revision or "not recorded")),
        (
            "Changed parameters",
            f"{adapter.nnz:,} of {numel:,} ({100 * adapter.nnz / max(1, numel):.3g} % of {len(adapter.deltas)} tensors)",
        ),
        ("Whole tensors (heads)", f"{dense:,} parameters in {len(adapter.dense)}" if dense else "none"),
        (
            "Size",
            f"{size:,} bytes, {size / max(1, adapter.nnz + dense):.2f} a parameter, values in {', '.join(dtypes) or 'none'}",
        ),
        (
            "Selection",
            plain(f"{config.metric or 'not recorded'}, {config.scope or 'no'} scope; {budget or 'budget not recorded'}"),
        ),
        ("Targets", plain(", ".join(config.targets) or "not recorded")),
        ("Seed", plain("not recorded" if config.seed is None else config.seed)),
        ("Made with", plain(", ".join(f"{k} {v}" for k, v in config.library_versions.items()) or "not recorded")),
    ]
    lines = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)]
    intro = (
        "A sparse change to a frozen base model: a list of single weights and what is added to each."
        " It goes on and comes off exactly."
    )
    return intro + "\n\n" + "\n".join(lines)


def _load(address: str, base: str, task: str | None) -> str:
    kind = {"SEQ_CLS": "AutoModelForSequenceClassification", "TOKEN_CLS": "AutoModelForTokenClassification"}.get(
        task or "", "AutoModelForCausalLM"
    )
    name = re.sub(r"[^\w.-]", "_", address.rsplit("/", 1)[-1])
    served = f"     # or: vllm serve {name}-full" if kind == "AutoModelForCausalLM" else ""
    quoted, base = json.dumps(address), re.sub(r"[^\w./:-]", "_", base)
    python = f"""import speft_core as sc
from speft_hub import pull
from transformers import {kind}

adapter = sc.SparseAdapter.load(pull({quoted}).path)
model = {kind}.from_pretrained("{base}")
with adapter.applied(model):  # in place; the base's bits are back afterwards
    ..."""
    shell = f"speft-hub pull '{address}' {name}     # pinned to a commit, every byte checked\nspeft-hub inspect {name}"
    export = f"""speft-hub pull '{address}' {name}
speft-hub export {name} {name}-full --base {base}
python -c 'from transformers import {kind} as M; M.from_pretrained("{name}-full")'{served}"""
    return "\n\n".join(
        [
            "## How to load it",
            "In Python, put onto the base model in place:",
            fenced(python, "python"),
            "From a shell, to look at it, merge it or compose it:",
            fenced(shell, "bash"),
            "As a plain Transformers checkpoint that needs no speft (Transformers, lm-eval, vLLM):",
            fenced(export, "bash"),
        ]
    )


def _results(evaluations: list[Evaluation]) -> str:
    if not evaluations:
        return ""
    rows = []
    for e in evaluations:
        before = "" if e.base is None else f"{e.base:.4g}"
        rows.append(f"| {plain(e.dataset)} | {plain(e.split)} | {plain(e.metric)} | {before} | {e.value:.4g} |")
    return "\n".join(
        ["## Results", "", "| data set | split | metric | base | with this adapter |", "|---|---|---|---|---|", *rows]
    )


def _density(adapter: SparseAdapter) -> str:
    rows = density_table(adapter.deltas)
    lines = [f"| {plain(n)} | {layers} | {kept:,} | {100 * kept / max(1, of):.4g} % |" for n, layers, kept, of in rows[:60]]
    if len(rows) > 60:
        lines.append(f"| and {len(rows) - 60} more | | | |")
    picture = f"![Density by layer and matrix]({names.PICTURE})"
    return "\n".join(
        ["## Where it changes the model", "", picture, "", "| matrix | layers | kept | density |", "|---|---|---|---|", *lines]
    )


def _training(folder: Path) -> str:
    path = folder / "training_config.yaml"
    if not path.is_file():
        return ""
    text = read_text(path)
    try:
        yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError(f"{path} is not readable YAML") from None
    return "## Training configuration\n\n" + fenced(text, "yaml")


def _merge(record: Any) -> str:
    if not isinstance(record, dict):
        return ""
    lines = [f"Merged by `speft-hub merge`, method **{plain(record.get('method'))}**"]
    options = [f"{k} {plain(record[k])}" for k in ("weights", "density", "seed") if record.get(k) is not None]
    lines[0] += f" ({', '.join(options)})." if options else "."
    for source in record.get("sources") or []:
        if isinstance(source, dict):
            lines.append(f"- {plain(source.get('name'))}: {source.get('nnz', 0):,} parameters")
    if apart := record.get("heads_left_apart"):
        named = ", ".join(plain(name) for name in (apart if isinstance(apart, list) else [apart]))
        lines += ["", f"Left out, because the sources differ in it: {named}. This adapter has nothing of its own in its place."]
    figures = record.get("figures")
    if isinstance(figures, dict):
        lines += ["", f"Overlap {figures.get('overlap', 0):,} entries, sign conflicts {figures.get('sign_conflicts', 0):,}."]
    return "## Merge\n\n" + "\n".join(lines)

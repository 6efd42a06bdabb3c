"""results.json: the figures of a run, gathered from what its stages recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from speft_core.files import atomic_write

from .config import RunConfig
from .folder import RunFolder

RESULTS = "results.json"


def collect(folder: RunFolder, cfg: RunConfig) -> dict[str, Any]:
    """The keys that other tools read, then what helps to read them. Absent figures are null."""
    load, mask, train, save = (folder.result(name) for name in ("load", "mask", "train", "save"))
    return {
        "base": folder.result("base").get("figures"),
        "adapted": folder.result("evaluate").get("figures"),
        "trainable_parameters": train.get("trainable_parameters"),
        "total_parameters": load.get("total_parameters"),
        "adapter_bytes": save.get("adapter_bytes"),
        "saliency_seconds": mask.get("saliency_seconds"),
        "train_seconds": train.get("train_seconds"),
        "peak_memory_bytes": train.get("peak_memory_bytes"),
        "optimizer_bytes": train.get("optimizer_bytes"),
        "gradient_bytes": train.get("gradient_bytes"),
        "seed": cfg.seed,
        "steps": train.get("steps"),
        "method": cfg.adapter.method,
        "model": cfg.model.name,
        "global_batch_size": train.get("global_batch_size"),
        "world_size": train.get("world_size"),
        "digest": train.get("digest"),
        **({"dynamic": train["dynamic"]} if "dynamic" in train else {}),
        "history": train.get("history", []),
    }


def write(folder: RunFolder, found: dict[str, Any]) -> None:
    """Write results.json."""
    atomic_write(folder.path / RESULTS, json.dumps(found, indent=1) + "\n")


def read(folder: RunFolder) -> dict[str, Any]:
    """What `write` wrote."""
    found: dict[str, Any] = json.loads((folder.path / RESULTS).read_text(encoding="utf-8"))
    return found


def share(found: dict[str, Any]) -> float | None:
    """Trained scalars over all scalars."""
    if not found["trainable_parameters"] or not found["total_parameters"]:
        return None
    return float(found["trainable_parameters"] / found["total_parameters"])


def figure_rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(figure, base, adapted) in words, for the tables of the terminal, the report and the card."""
    base, adapted = found["base"] or {}, found["adapted"] or {}
    rows = []
    unit = "answer token" if "tokens" in adapted else "example"
    for key, name in (
        ("exact_match", "exact match (number after ####)"),
        ("exact_match_last_number", "exact match (last number)"),
        ("loss", f"loss per {unit}"),
        ("accuracy", "accuracy"),
        ("accuracy_per_character", "accuracy (likelihood a character)"),
        ("f1", "F1"),
        ("matthews", "Matthews correlation"),
        ("pearson", "Pearson correlation"),
        ("spearman", "Spearman correlation"),
        ("count", f"{adapted.get('split', 'test')} examples"),
    ):
        for part in (None, *(n for n, found in adapted.items() if isinstance(found, dict))):
            was, now = (base, adapted) if part is None else (base.get(part) or {}, adapted[part])
            if key in was or key in now:
                rows.append((name + (f", {part}" if part else ""), _word(was.get(key)), _word(now.get(key))))
    return rows


def fact_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, value) in words."""
    part = share(found)
    trained = f"{found['trainable_parameters']:,}" + (f" ({part:.3%} of {found['total_parameters']:,})" if part else "")
    changes = found.get("dynamic")
    resting = changes["union"] - changes["active"] if changes else 0  # what an earlier mask trained ships too
    per_scalar = (found["adapter_bytes"] or 0) / max(1, (found["trainable_parameters"] or 0) + resting)
    rows = [
        ("trained parameters", trained),
        ("adapter", f"{found['adapter_bytes']:,} bytes ({per_scalar:.2f} a parameter)"),
        ("steps", f"{found['steps']:,} of {found['global_batch_size']} examples"),
        ("training", f"{found['train_seconds']:.1f} s, peak memory {found['peak_memory_bytes'] / 2**20:,.0f} MiB"),
    ]
    if found["saliency_seconds"] is not None:
        rows.append(("saliency", f"{found['saliency_seconds']:.1f} s"))
    if changes:
        rows += dynamic_rows(changes)
    losses = [row["loss"] for row in found["history"] if "loss" in row]
    if losses:
        rows.append(("training loss", f"{losses[0]:.4f} at first, {losses[-1]:.4f} at last"))
    return rows


def dynamic_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, value) in words, of the `dynamic` part of results.json."""
    changes = found["changes"]
    shares = [change["overlap"] for change in changes]
    kept = f", {min(shares):.1%} to {max(shares):.1%} of a mask as before" if shares else ""
    rows = [
        ("mask", f"changed {len(changes)} times, every {found['interval']:,} optimizer steps, by {found['policy']}{kept}"),
        ("active, and changed in all", f"{found['active']:,} and {found['union']:,} scalars"),
    ]
    if pruned := found.get("pruned"):
        loss = f"loss {pruned['loss_before']:.4f} -> {pruned['loss_after']:.4f}"
        rows.append(
            (
                "pruned at the end",
                f"{pruned['union']:,} to {pruned['kept']:,}; {pruned['lost']:.2%} of the squared change, {loss}",
            )
        )
    return rows


def change_table(found: Mapping[str, Any]) -> str:
    """A Markdown line for each change."""
    rows = [f"| {c['step']:,} | {c['overlap']:.1%} | {c['active']:,} | {c['union']:,} |" for c in found["changes"]]
    return "\n".join(["| optimizer step | as before | active | changed in all |", "|---:|---:|---:|---:|", *rows])


def _word(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else f"{value:,}"

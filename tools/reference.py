"""Write docs/reference.md: every command with its options, and every key of a run's configuration, from the programs themselves.

python tools/reference.py            write it
python tools/reference.py --check    exit with 1 when the page is not what the programs offer
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import typer

from speft_hub.cli import app as hub
from speft_train.cli import app as train
from speft_train.config import key_table

PAGE = Path(__file__).parents[1] / "docs/reference.md"
HEAD = """# Commands and configuration

Every command and option, and every key of a run's YAML, written by `python tools/reference.py` from the programs themselves; a test
fails when this page and they differ. What things are for stands in the pages of their subjects ([training](training.md), [tasks](tasks.md),
[hub](hub.md), [merging](merging.md)); what a command answers when something is wrong in [errors](errors.md).
"""
CONFIGURATION = """## Configuration

A file may start from others: `base: FILE` or `base: [FILE, FILE]`, relative to itself; later ones win key by key, lists are replaced whole,
and `key=value` on the command line comes last. `${section.key}` stands for another key's value. Unknown keys are refused with the nearest
name. `sweep` (its keys are `rows`, `columns`, `tune`, `seeds`, `vars`) is for `speft-train sweep` ([tasks](tasks.md)).
"""
TRAIN = """### train

`train` takes the fields of `transformers.TrainingArguments` of the installed version, but for those that other sections own, and two of
speft's own: `global_batch_size` (examples of one optimizer step over all processes) and `early_stopping_patience` (evaluations without a
better score).

Where a run differs from `TrainingArguments`: `logging_steps` is 10, `save_steps` 200 (`eval_steps` where
`load_best_model_at_end` ships the best of the evaluations by steps), `save_total_limit` 2, and
`per_device_eval_batch_size` the micro-batch; `per_device_train_batch_size` is 8, or with `global_batch_size` the largest divisor
of a process's share up to 8; TensorBoard's files lie in `OUTPUT_DIR/tensorboard`. `report_to` names what else is told (`wandb`,
`mlflow`, ...: `[tensorboard, wandb]` for both), and `none` nothing.
"""


def cell(text: str) -> str:
    """Text that may stand in a table."""
    return " ".join(text.split()).replace("|", "\\|")


def without_stop(text: str | None) -> str:
    """A sentence without its full stop."""
    text = text or ""
    return text if text.endswith("...") else text.removesuffix(".")


def option(parameter: Any) -> str:
    """A row: how an option is written, and what it is for, with its default where it has one to speak of."""
    names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    remarks = ["required"] if parameter.required else []
    remarks += ["may be repeated"] if parameter.multiple and "may be repeated" not in parameter.help else []
    told = parameter.default is not None and not isinstance(parameter.default, bool) and parameter.default not in ("", ())
    remarks += [f"default {parameter.default}"] if told else []
    return f"| {names} | {cell('; '.join([without_stop(parameter.help), *remarks]))} |"


def command(program: str, name: str, found: Any) -> str:
    """A command's words, what it does, and the table of its options."""
    shown = [p for p in found.params if not getattr(p, "hidden", False) and p.name != "help"]
    words, options = ([p for p in shown if p.param_type_name == kind] for kind in ("argument", "option"))
    usage = [p.name.upper() + (" ..." if p.nargs == -1 else "") for p in words]
    usage = [word if p.required else f"[{word}]" for word, p in zip(usage, words, strict=True)]
    said = "".join(f" {p.name.upper()}: {without_stop(cell(p.help))}." for p in words if p.help)
    about = cell((found.help or "").split("\n\n")[0])
    table = ["", "| option | |", "|---|---|", *map(option, options)] if options else []
    return "\n".join([f"### {' '.join([program, name, *usage])}", "", about + said, *table, ""])


def commands(program: str, app: typer.Typer) -> str:
    """All commands of a program."""
    group: Any = typer.main.get_command(app)
    return f"## {program}\n\n" + "\n".join(command(program, name, found) for name, found in group.commands.items())


def configuration() -> str:
    """The keys, a table a section."""
    groups: dict[str, list[str]] = {}
    for key, default, about in key_table():
        section = key.partition(".")[0] if "." in key else ""
        shown = "" if default in ("null", "{}", "[]") else f"`{cell(default)}`"
        groups.setdefault(section, []).append(f"| `{key}` | {shown} | {cell(about)} |")
    parts = [CONFIGURATION]
    for section, rows in groups.items():
        parts.append("\n".join([f"### {section or 'At the top'}", "", "| key | default | |", "|---|---|---|", *rows, ""]))
    return "\n".join([*parts, TRAIN])


def text() -> str:
    """The whole page."""
    return "\n".join([HEAD, commands("speft-train", train), commands("speft-hub", hub), configuration()])


def main(words: list[str] | None = None) -> int:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args(words)
    wanted = text()
    if asked.check:
        same = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == wanted
        if not same:
            print("docs/reference.md is not what the programs offer: python tools/reference.py", file=sys.stderr)
        return int(not same)
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

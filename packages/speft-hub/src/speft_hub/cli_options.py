"""The Typer app and the options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, help="Publish, fetch, check, combine and export sparse adapters."
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing adapter there.")]
Source = Annotated[str, typer.Argument(help="A folder, owner/name[@revision], or file:///path/owner/name[@revision].")]
Sources = Annotated[list[str], typer.Argument(help="Folders or repositories.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="The new folder.")]
Text = Optional[str]  # noqa: UP045 - Typer reads this at run time, and Python 3.10 has it this way
Texts = Optional[list[str]]  # noqa: UP045
Number = Optional[float]  # noqa: UP045


def card_fields(**given: Any) -> Any:
    """What the command line said of an adapter's card, as CardFields."""
    from .card import CardFields

    said: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v not in (None, [])}
    return CardFields(**said)


License = Annotated[Text, typer.Option(help="SPDX id or Hub id.")]
LicenseName = Annotated[Text, typer.Option(help="With --license other.")]
LicenseLink = Annotated[Text, typer.Option(help="With --license other.")]
Language = Annotated[Texts, typer.Option(help="ISO 639 code; may be repeated.")]
Pipeline = Annotated[Text, typer.Option(help="The task as the Hub calls it, such as text-generation.")]
Datasets = Annotated[Texts, typer.Option("--dataset", help="Id on the Hub; may be repeated.")]
Tags = Annotated[Texts, typer.Option("--card-tag", help="Free tag; may be repeated.")]
BaseModel = Annotated[Text, typer.Option(help="The base model's id on the Hub, where the adapter knows a path.")]
Results = Annotated[Optional[Path], typer.Option(help="A run's results.json, shown in the card.")]  # noqa: UP045


Method = Annotated[str, typer.Option(help="sum, mean, weighted, ties, dare, dare_ties, magnitude or negate.")]
Weights = Annotated[Text, typer.Option(help="One number for each adapter, with commas between.")]
Density = Annotated[Number, typer.Option(help="Share of each adapter's own entries to keep, in (0, 1].")]
Seed = Annotated[int, typer.Option(help="Of DARE's draws.")]
Dtype = Annotated[Text, typer.Option(help="Of the merged values: float32, bfloat16 or float16.")]
NoBase = Annotated[bool, typer.Option("--no-base-check", help="Merge although the bases seem to differ.")]

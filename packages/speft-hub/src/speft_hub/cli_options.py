"""The Typer app and the options that several commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
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
NoBase = Annotated[bool, typer.Option("--no-base-check", help="Go on although the bases seem to differ.")]


def card_fields(
    license: License = None,
    license_name: LicenseName = None,
    license_link: LicenseLink = None,
    language: Language = None,
    pipeline_tag: Pipeline = None,
    dataset: Datasets = None,
    card_tag: Tags = None,
    base_model: BaseModel = None,
    results: Results = None,
) -> Any:
    """What the command line said of an adapter's card, as CardFields."""
    from .card import CardFields

    return CardFields(
        license=license,
        license_name=license_name,
        license_link=license_link,
        language=tuple(language or ()),
        pipeline_tag=pipeline_tag,
        datasets=tuple(dataset or ()),
        tags=tuple(card_tag or ()),
        base_model=base_model,
        results=results,
    )


def merge_options(
    method: Method = "sum",
    weights: Weights = None,
    density: Density = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    no_base_check: NoBase = False,
    force: Force = False,
) -> dict[str, Any]:
    """How to merge, as `combining.merge_adapters` takes it."""
    from speft_core import UserError

    try:
        numbers = [float(part) for part in weights.split(",")] if weights else None
    except ValueError:
        raise UserError(f"--weights must be numbers with commas between, such as 1,0.5; got {weights!r}") from None
    given = {"method": method, "weights": numbers, "density": density, "seed": seed, "dtype": dtype}
    return {**given, "check_base": not no_base_check, "force": force}


def shares(options: Callable[..., Any], into: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command that also takes the options that are the parameters of `options`; what that makes of them is its parameter `into`."""
    added = inspect.signature(options, eval_str=True).parameters.values()

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def whole(**given: Any) -> None:
            command(**{into: options(**{p.name: given.pop(p.name) for p in added})}, **given)

        shown: list[inspect.Parameter] = []
        for own in inspect.signature(command, eval_str=True).parameters.values():
            shown += added if own.name == into else [own]
        as_keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in shown]
        whole.__signature__ = inspect.Signature(as_keywords)  # type: ignore[attr-defined]
        whole.__name__, whole.__doc__, whole.__module__ = command.__name__, command.__doc__, command.__module__
        return whole

    return decorate

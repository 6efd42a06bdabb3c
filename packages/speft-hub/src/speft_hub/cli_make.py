"""Commands that make something of adapters: merge, multihead, export, diff, convert."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from speft_core import UserError
from speft_core.files import atomic_folder
from speft_core.merge import is_head
from speft_core.merge_report import totals

from .addresses import is_reference
from .cli_options import BaseModel, Force, Json, NoBase, Out, Source, Sources, Text, Texts, app, merge_options, shares
from .combining import merge_adapters, multihead
from .console import note, progress_bar, show, table
from .names import check_place


@app.command()
@shares(merge_options, into="how")
def merge(sources: Sources, out: Out, how: Any = None, json: Json = False) -> None:
    """Merge adapters of one base into one; a tensor at a time."""
    with progress_bar(json) as progress:
        rows, apart = merge_adapters(sources, out, progress=progress, **how)
    if apart:
        advice = "; speft-hub multihead keeps every head" if all(map(is_head, apart)) else ""
        note(f"left out, because the adapters differ in it: {', '.join(apart)}{advice}")
    figures = totals(rows, len(sources))
    record = {"out": str(out), "method": how["method"], "figures": figures, "heads_left_apart": apart}
    record["tensors"] = [asdict(r) for r in rows]

    def text() -> None:
        print(out)
        parts = " + ".join(f"{n:,}" for n in figures["nnz"])
        print(
            f"{parts} entries -> {figures['merged']:,}; overlap {figures['overlap']:,}, "
            f"sign conflicts {figures['sign_conflicts']:,}"
        )
        shown = sorted(rows, key=lambda r: -r.sign_conflicts)[:20]
        columns = ["tensor (most sign conflicts first)", "kept by each", "overlap", "conflicts", "norms", "merged norm"]
        cells = [
            [
                r.name,
                "/".join(map(str, r.nnz)),
                r.overlap,
                r.sign_conflicts,
                "/".join(f"{n:.3g}" for n in r.norms),
                f"{r.merged_norm:.3g}",
            ]
            for r in shown
        ]
        table("", columns, cells)

    show(record, json, text)


@app.command(name="multihead")
@shares(merge_options, into="how")
def multihead_(
    sources: Sources,
    out: Out,
    task: Annotated[Texts, typer.Option(help="Name of a head, once for each adapter.")] = None,
    how: Any = None,
    json: Json = False,
) -> None:
    """Merge the bodies and keep every head: one forward answers all tasks (speft_core.MultiHeadModel.load)."""
    with progress_bar(json) as progress:
        kinds = multihead(sources, out, task, progress=progress, **how)
    show(
        {"out": str(out), "heads": kinds}, json, lambda: print("\n".join([str(out), *(f"{t}: {k}" for t, k in kinds.items())]))
    )


@app.command()
def export(
    source: Source,
    out: Annotated[Path, typer.Argument(help="The new folder.")],
    base: Annotated[
        Text, typer.Option(help="The base: a folder, name or owner/name, bundled:NAME; by default what the adapter names.")
    ] = None,
    head: Annotated[Text, typer.Option(help="Of a multi-head folder: the task whose head to take.")] = None,
    dtype: Annotated[
        Text, typer.Option(help="float32: widen a 16-bit base first, for an adapter trained in float32; by default the base's own.")
    ] = None,
    no_base_check: NoBase = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write a plain Transformers checkpoint that needs no speft."""
    from .export import export as write
    from .sources import adapter_folder

    with progress_bar(json) as progress, adapter_folder(source, progress) as folder:
        write(folder, out, base, head=head, dtype=dtype, check_base=not no_base_check, force=force, progress=progress, say=note)
    show({"out": str(out)}, json, lambda: print(out))


@app.command()
def diff(
    a: Source,
    b: Source,
    rank: Annotated[bool, typer.Option("--rank", help="Also the rank of each matrix of the difference (slow).")] = False,
    json: Json = False,
) -> None:
    """Compare two checkpoints (folders) or two adapters, matrix by matrix."""
    from .diff import diff_adapters, diff_checkpoints
    from .sources import adapter_folder

    if not is_reference(a) and not is_reference(b) and not any((Path(x) / "adapter_config.json").is_file() for x in (a, b)):
        rows = list(diff_checkpoints(a, b, rank))
    else:
        with progress_bar(json) as progress, adapter_folder(a, progress) as first, adapter_folder(b, progress) as second:
            rows = list(diff_adapters(first, second, rank))
    cells = []
    for r in rows:
        kept = "" if r.kept is None else f"{r.kept[0]:,}/{r.kept[1]:,}/{r.overlap:,}"
        kept = kept if r.only is None else f"in {r.only} alone"
        rank_text = "" if r.rank is None else r.rank
        cells.append(
            [r.name, f"{r.changed:,}", f"{100 * r.density:.4g} %", f"{r.norm:.4g}", f"{r.largest:.4g}", rank_text, kept]
        )
    columns = ["tensor", "changed", "density", "norm", "largest", "rank", "kept a/b/both"]
    show([r.record() for r in rows], json, lambda: table("", columns, cells))


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(help="A PEFT SHiRA, SpaRTA or speft adapter; or, with --against, a changed checkpoint.")
    ],
    out: Annotated[Path, typer.Argument(help="The new folder.")],
    to: Annotated[str, typer.Option(help="speft or shira.")] = "speft",
    base: Annotated[Text, typer.Option(help="The base checkpoint (a folder), to read other formats.")] = None,
    against: Annotated[
        Text, typer.Option(help="The checkpoint (a folder) that SOURCE was trained from: their difference becomes an adapter.")
    ] = None,
    top_k: Annotated[Optional[int], typer.Option(help="With --against: only the largest changes.")] = None,  # noqa: UP045
    base_model: BaseModel = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Convert adapters of others, to and from; or the difference of two checkpoints."""
    from .added import keep_config
    from .convert import convert as run_convert
    from .diff import adapter_between
    from .sources import base_folder

    alone = {"--top-k": top_k, "--base-model": base_model} if against is None else {"--base": base}
    for option, value in alone.items():
        if value is not None:
            raise UserError(f"{option} has no use {'without' if against is None else 'with'} --against; leave it out")
    rounded = 0
    if against is not None:
        if to != "speft":
            raise UserError(f"--against makes a speft adapter, got --to {to}; convert what it makes in a second step")
        check_place(out, force)
        made = adapter_between(base_folder(against) or against, source, top_k, base_model)
        with atomic_folder(out, check=partial(check_place, out, force)) as beside:  # nothing of what is replaced stays behind
            made.save(beside)
            if made.dense:
                keep_config(source, beside)
        kind, rounded = "checkpoint", made.config.extra.get("rounded", 0)
    else:
        kind = run_convert(source, out, to, base_folder(base) or base if base else None, force)
    if rounded:
        note(f"{rounded:,} entries of {source} are rounded to the dtype of {against}: on this base no adapter can give them exactly")
    record = {"out": str(out), "from": kind, "to": to, "rounded": rounded}
    show(record, json, lambda: print(f"{kind} -> {to}: {out}"))

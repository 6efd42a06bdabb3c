"""speft-hub: publish, fetch, check, combine and export sparse adapters. Thin: parse, call, print."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from speft_core.merge_report import totals

from .combining import merge_adapters, multihead, write_card
from .console import progress_bar, run, show, table
from .registry import is_reference, parse

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing adapter there.")]
Source = Annotated[str, typer.Argument(help="A folder, owner/name[@revision], or file:///path/owner/name[@revision].")]
Sources = Annotated[list[str], typer.Argument(help="Folders or repositories.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="The new folder.")]
Text = Optional[str]  # noqa: UP045 - Typer reads this at run time, and Python 3.10 has it this way
Texts = Optional[list[str]]  # noqa: UP045
Number = Optional[float]  # noqa: UP045


def _fields(**given: Any) -> Any:
    from .card import CardFields

    return CardFields(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v not in (None, [])})


License = Annotated[Text, typer.Option(help="SPDX id or Hub id.")]
LicenseName = Annotated[Text, typer.Option(help="With --license other.")]
LicenseLink = Annotated[Text, typer.Option(help="With --license other.")]
Language = Annotated[Texts, typer.Option(help="ISO 639 code; may be repeated.")]
Pipeline = Annotated[Text, typer.Option(help="The task as the Hub calls it, such as text-generation.")]
Datasets = Annotated[Texts, typer.Option("--dataset", help="Id on the Hub; may be repeated.")]
Tags = Annotated[Texts, typer.Option("--card-tag", help="Free tag; may be repeated.")]
BaseModel = Annotated[Text, typer.Option(help="The base model's id on the Hub, where the adapter knows a path.")]
Results = Annotated[Optional[Path], typer.Option(help="A run's results.json, shown in the card.")]  # noqa: UP045


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    repo: Annotated[str, typer.Argument(help="owner/name, or file:///path/owner/name.")],
    branch: Annotated[Text, typer.Option(help="Branch; made from main when it is new.")] = None,
    parent: Annotated[Text, typer.Option(help="The commit this push builds on; refused when the branch has moved.")] = None,
    tag: Annotated[Text, typer.Option(help="Tag the commit.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    message: Annotated[Text, typer.Option("--message", "-m", help="Title of the commit.")] = None,
    keep: Annotated[str, typer.Option(help="Whose edits of README.md to keep when both were edited: local or hub.")] = "auto",
    license: License = None,  # noqa: A002
    license_name: LicenseName = None,
    license_link: LicenseLink = None,
    language: Language = None,
    pipeline_tag: Pipeline = None,
    dataset: Datasets = None,
    card_tag: Tags = None,
    base_model: BaseModel = None,
    results: Results = None,
    json: Json = False,
) -> None:
    """Publish an adapter: checked first, only its own files, one commit."""
    from .pushing import push as publish

    fields = _fields(
        license=license, license_name=license_name, license_link=license_link, language=language, pipeline_tag=pipeline_tag,
        datasets=dataset, tags=card_tag, base_model=base_model, results=results,
    )  # fmt: skip
    done = publish(folder, repo, branch=branch, parent=parent, private=private, tag=tag, message=message, fields=fields, card=keep)

    def text() -> None:
        print(f"{done.repo}@{done.sha}")
        print("nothing changed" if not done.changed + done.deleted else f"changed: {', '.join(done.changed)}")
        if done.deleted:
            print(f"deleted: {', '.join(done.deleted)}")
        if done.left_out:
            print(f"left here: {', '.join(done.left_out[:10])}{' …' if len(done.left_out) > 10 else ''}")

    show(asdict(done), json, text)


@app.command()
def pull(
    repo: Annotated[str, typer.Argument(help="owner/name[@revision], or file:///path/owner/name[@revision].")],
    folder: Annotated[Optional[Path], typer.Argument(help="Where to; by default the repository's name.")] = None,  # noqa: UP045
    force: Force = False,
    max_bytes: Annotated[int, typer.Option(help="Refuse an adapter larger than this.")] = 16 << 30,
    json: Json = False,
) -> None:
    """Fetch an adapter: pinned to a commit, every byte and index checked, then moved into place."""
    from .pulling import pull as fetch

    with progress_bar(json) as progress:
        done = fetch(repo, folder, force=force, max_bytes=max_bytes, progress=progress)
    record = asdict(done)
    show(record, json, lambda: print(f"{done.repo}@{done.sha}\n{done.path}" + ("" if done.fetched else "  (was there already)")))


@app.command()
def inspect(source: Source, json: Json = False) -> None:
    """Show what an adapter is: base, selection, size, density by matrix, heads, provenance."""
    from .describe import describe
    from .sources import adapter_folder

    with progress_bar(json) as progress, adapter_folder(source, progress) as folder:
        found = describe(folder)

    def text() -> None:
        for key in ("base_model", "base_revision", "task_type", "metric", "scope", "budget", "seed", "sha256"):
            print(f"{key:20} {found[key]}")
        print(f"{'parameters':20} {found['parameters']:,} of {found['of']:,} ({100 * found['density']:.4g} %) in {found['tensors']} tensors")
        print(f"{'size':20} {found['bytes']:,} bytes, {found['bytes_per_parameter']:.2f} a parameter, {', '.join(found['dtypes'])}")
        for name, shape in found["dense"].items():
            print(f"{'head':20} {name} {shape}")
        for task, head in found.get("heads", {}).items():
            print(f"{'task':20} {task}: {head['kind']} {', '.join(head['tensors'])}")
        if "merge" in found:
            print(f"{'merge':20} {found['merge'].get('method')} of {', '.join(s['name'] for s in found['merge'].get('sources', []))}")
        rows = [[m["name"], m["layers"], f"{m['kept']:,}", f"{100 * m['kept'] / max(1, m['of']):.4g} %"] for m in found["matrices"][:60]]
        table("", ["matrix", "layers", "kept", "density"], rows)

    show(found, json, text)


@app.command()
def verify(
    source: Source,
    base: Annotated[Text, typer.Option(help="Also check that this base (a folder, or bundled:NAME) is the adapter's.")] = None,
    json: Json = False,
) -> None:
    """Check an adapter: format, indices, values; and with --base that it belongs to that model. Exit code 2 when it fails."""
    from speft_core import UserError

    from .describe import check_against
    from .pulling import check_folder
    from .sources import adapter_folder, base_folder

    with progress_bar(json) as progress, adapter_folder(source, progress) as folder:
        adapter = check_folder(folder)
        checked = None
        if base is not None:
            local = base_folder(base)
            if local is None:
                raise UserError(f"--base must be a folder or a bundled model, got {base!r}")
            checked = check_against(adapter, local)
    record = {"ok": True, "tensors": len(adapter.deltas), "parameters": adapter.nnz, "base_tensors_checked": checked}
    fits = "" if checked is None else f"; fits {base} ({checked} tensors compared)"
    show(record, json, lambda: print(f"ok: {adapter.nnz:,} parameters in {len(adapter.deltas)} tensors{fits}"))


@app.command(name="list")
def list_(
    owner: Annotated[Text, typer.Argument(help="An owner on the Hub, or file:///path of a folder with registries.")] = None,
    json: Json = False,
) -> None:
    """List the adapters you may see, of an owner or in a folder."""
    from .folder import FolderRegistry
    from .hub import HubRegistry

    if owner and owner.startswith("file:"):
        found = FolderRegistry().search(parse(owner).repo)
    else:
        found = HubRegistry().search(owner)
    rows = [[f.repo, f.sha[:12], f.base_model or "", f.date[:19], "private" if f.private else ""] for f in found]
    show([asdict(f) for f in found], json, lambda: table("", ["repository", "commit", "base model", "date", ""], rows))


@app.command()
def history(repo: Annotated[str, typer.Argument(help="owner/name[@revision] or file:///…")], json: Json = False) -> None:
    """Show a repository's commits, branches and tags."""
    reference = parse(repo)
    registry = reference.registry
    commits = registry.history(reference.repo, registry.resolve(reference.repo, reference.revision or "main"))
    names = registry.references(reference.repo)
    marks: dict[str, list[str]] = {}
    for name, sha in [*names.branches.items(), *((f"tag {n}", registry.resolve(reference.repo, n)) for n in names.tags)]:
        marks.setdefault(sha, []).append(name)
    rows = [[c.sha[:12], c.title, c.date[:19], c.author, ", ".join(marks.get(c.sha, []))] for c in commits]
    record = {"commits": [asdict(c) for c in commits], "branches": names.branches, "tags": names.tags}
    show(record, json, lambda: table("", ["commit", "title", "date", "author", ""], rows))


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(help="The adapter's folder; README.md is written there.")],
    repo: Annotated[Text, typer.Option(help="Where it will be published; used in the loading instructions.")] = None,
    license: License = None,  # noqa: A002
    license_name: LicenseName = None,
    license_link: LicenseLink = None,
    language: Language = None,
    pipeline_tag: Pipeline = None,
    dataset: Datasets = None,
    card_tag: Tags = None,
    base_model: BaseModel = None,
    results: Results = None,
    json: Json = False,
) -> None:
    """Write or renew an adapter's card; what a person wrote in it stays."""
    fields = _fields(
        license=license, license_name=license_name, license_link=license_link, language=language, pipeline_tag=pipeline_tag,
        datasets=dataset, tags=card_tag, base_model=base_model, results=results,
    )  # fmt: skip
    address = str(parse(repo)).partition("@")[0] if repo else f"OWNER/{folder.resolve().name}"
    path = write_card(folder, address, fields)
    show({"card": str(path)}, json, lambda: print(path))


def _numbers(text: str | None) -> list[float] | None:
    from speft_core import UserError

    try:
        return [float(part) for part in text.split(",")] if text else None
    except ValueError:
        raise UserError(f"--weights must be numbers with commas between, such as 1,0.5; got {text!r}") from None


Method = Annotated[str, typer.Option(help="sum, mean, weighted, ties, dare, dare_ties, magnitude or negate.")]
Weights = Annotated[Text, typer.Option(help="One number for each adapter, with commas between.")]
Density = Annotated[Number, typer.Option(help="Share of each adapter's own entries to keep, in (0, 1].")]
Seed = Annotated[int, typer.Option(help="Of DARE's draws.")]
Dtype = Annotated[Text, typer.Option(help="Of the merged values: float32, bfloat16 or float16.")]
NoBase = Annotated[bool, typer.Option("--no-base-check", help="Merge although the bases seem to differ.")]


@app.command()
def merge(
    sources: Sources, out: Out, method: Method = "sum", weights: Weights = None, density: Density = None, seed: Seed = 0,
    dtype: Dtype = None, no_base_check: NoBase = False, force: Force = False, json: Json = False,
) -> None:  # fmt: skip
    """Merge adapters of one base into one; a tensor at a time."""
    with progress_bar(json) as progress:
        rows = merge_adapters(
            sources, out, method=method, weights=_numbers(weights), density=density, seed=seed, dtype=dtype,
            check_base=not no_base_check, force=force, progress=progress,
        )  # fmt: skip
    figures = totals(rows)
    record = {"out": str(out), "method": method, "figures": figures, "tensors": [asdict(r) for r in rows]}

    def text() -> None:
        print(out)
        parts = " + ".join(f"{n:,}" for n in figures["nnz"])
        print(f"{parts} entries -> {figures['merged']:,}; overlap {figures['overlap']:,}, sign conflicts {figures['sign_conflicts']:,}")
        shown = sorted(rows, key=lambda r: -r.sign_conflicts)[:20]
        columns = ["tensor (most sign conflicts first)", "kept by each", "overlap", "conflicts", "norms", "merged norm"]
        cells = [
            [r.name, "/".join(map(str, r.nnz)), r.overlap, r.sign_conflicts, "/".join(f"{n:.3g}" for n in r.norms), f"{r.merged_norm:.3g}"]
            for r in shown
        ]
        table("", columns, cells)

    show(record, json, text)


@app.command(name="multihead")
def multihead_(
    sources: Sources, out: Out, task: Annotated[Texts, typer.Option(help="Name of a head, once for each adapter.")] = None,
    method: Method = "sum", weights: Weights = None, density: Density = None, seed: Seed = 0, dtype: Dtype = None,
    no_base_check: NoBase = False, force: Force = False, json: Json = False,
) -> None:  # fmt: skip
    """Merge the bodies and keep every head: one forward answers all tasks (speft_core.MultiHeadModel.load)."""
    with progress_bar(json) as progress:
        kinds = multihead(
            sources, out, task, method=method, weights=_numbers(weights), density=density, seed=seed, dtype=dtype,
            check_base=not no_base_check, force=force, progress=progress,
        )  # fmt: skip
    show({"out": str(out), "heads": kinds}, json, lambda: print("\n".join([str(out), *(f"{t}: {k}" for t, k in kinds.items())])))


@app.command()
def export(
    source: Source,
    out: Annotated[Path, typer.Argument(help="The new folder.")],
    base: Annotated[Text, typer.Option(help="The base: a folder, owner/name, bundled:NAME; by default what the adapter names.")] = None,
    head: Annotated[Text, typer.Option(help="Of a multi-head folder: the task whose head to take.")] = None,
    no_base_check: NoBase = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write a plain Transformers checkpoint that needs no speft."""
    from .export import export as write
    from .sources import adapter_folder

    with progress_bar(json) as progress, adapter_folder(source, progress) as folder:
        write(folder, out, base, head=head, check_base=not no_base_check, force=force, progress=progress)
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
        rank_text = "" if r.rank is None else r.rank
        cells.append([r.name, f"{r.changed:,}", f"{100 * r.density:.4g} %", f"{r.norm:.4g}", f"{r.largest:.4g}", rank_text, kept])
    columns = ["tensor", "changed", "density", "norm", "largest", "rank", "kept a/b/both"]
    show([r.record() for r in rows], json, lambda: table("", columns, cells))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A PEFT SHiRA, SpaRTA or speft adapter; or, with --against, a changed checkpoint.")],
    out: Annotated[Path, typer.Argument(help="The new folder.")],
    to: Annotated[str, typer.Option(help="speft or shira.")] = "speft",
    base: Annotated[Text, typer.Option(help="The base checkpoint (a folder), to read other formats.")] = None,
    against: Annotated[Text, typer.Option(help="The checkpoint (a folder) that SOURCE was trained from: their difference becomes an adapter.")] = None,
    top_k: Annotated[Optional[int], typer.Option(help="With --against: only the largest changes.")] = None,  # noqa: UP045
    base_model: BaseModel = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Convert adapters of others, to and from; or the difference of two checkpoints."""
    from .combining import check_out
    from .convert import convert as run_convert
    from .diff import adapter_between
    from .sources import base_folder

    if against is not None:
        check_out(out, force)
        adapter_between(base_folder(against) or against, source, top_k, base_model).save(out)
        kind = "checkpoint"
    else:
        kind = run_convert(source, out, to, base_folder(base) or base if base else None, force)
    show({"out": str(out), "from": kind, "to": to}, json, lambda: print(f"{kind} -> {to}: {out}"))


def main() -> None:
    """The console script."""
    sys.exit(run(app))

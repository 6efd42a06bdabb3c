"""Commands about one adapter: push, pull, inspect, verify, list, history, card."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from .addresses import parse
from .cli_options import Force, Json, Source, Text, app, card_fields, shares
from .combining import write_card
from .console import progress_bar, show, table


@app.command()
@shares(card_fields, into="fields")
def push(
    folder: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    repo: Annotated[str, typer.Argument(help="owner/name, or file:///path/owner/name.")],
    branch: Annotated[Text, typer.Option(help="Branch; made from main when it is new.")] = None,
    parent: Annotated[Text, typer.Option(help="The commit this push builds on; refused when the branch has moved.")] = None,
    tag: Annotated[Text, typer.Option(help="Tag the commit.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    message: Annotated[Text, typer.Option("--message", "-m", help="Title of the commit.")] = None,
    keep: Annotated[str, typer.Option(help="Whose edits of README.md to keep when both were edited: local or hub.")] = "auto",
    fields: Any = None,
    json: Json = False,
) -> None:
    """Publish an adapter: checked first, only its own files, one commit."""
    from .pushing import push as publish

    done = publish(
        folder, repo, branch=branch, parent=parent, private=private, tag=tag, message=message, fields=fields, card=keep
    )

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
    show(
        record, json, lambda: print(f"{done.repo}@{done.sha}\n{done.path}" + ("" if done.fetched else "  (was there already)"))
    )


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
        print(
            f"{'parameters':20} {found['parameters']:,} of {found['of']:,} ({100 * found['density']:.4g} %), "
            f"{found['tensors']} tensors"
        )
        print(
            f"{'size':20} {found['bytes']:,} bytes, {found['bytes_per_parameter']:.2f} a parameter, "
            f"{', '.join(found['dtypes'])}"
        )
        for name, shape in found["dense"].items():
            print(f"{'head':20} {name} {shape}")
        for task, head in found.get("heads", {}).items():
            print(f"{'task':20} {task}: {head['kind']} {', '.join(head['tensors'])}")
        if "merge" in found:
            sources = ", ".join(str(s.get("name")) for s in found["merge"].get("sources", []))
            print(f"{'merge':20} {found['merge'].get('method')} of {sources}")
        rows = [
            [m["name"], m["layers"], f"{m['kept']:,}", f"{100 * m['kept'] / max(1, m['of']):.4g} %"]
            for m in found["matrices"][:60]
        ]
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
@shares(card_fields, into="fields")
def card(
    folder: Annotated[Path, typer.Argument(help="The adapter's folder; README.md is written there.")],
    repo: Annotated[Text, typer.Option(help="Where it will be published; used in the loading instructions.")] = None,
    fields: Any = None,
    json: Json = False,
) -> None:
    """Write or renew an adapter's card; what a person wrote in it stays."""
    address = str(parse(repo)).partition("@")[0] if repo else f"OWNER/{folder.resolve().name}"
    path = write_card(folder, address, fields)
    show({"card": str(path)}, json, lambda: print(path))

"""`speft-train run CONFIG [key=value ...]`: parse, build, call. Every expected failure is one line and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from speft_core.errors import UserError

from .signals import Stopped, handled

USAGE_ERROR, INTERRUPTED = 2, 130
PATIENCE = 30.0  # seconds between the ranks of one launch until they find the same mistake; launchers look every second or more often

app = typer.Typer(
    help="Sparse fine-tuning runs of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigArg = Annotated[Path, typer.Argument(help="the run's YAML file", show_default=False)]
OverridesArg = Annotated[list[str] | None, typer.Argument(help="key=value, as train.max_steps=10", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print what would be done and needed, and do nothing")]
GridOption = Annotated[list[str] | None, typer.Option("--grid", help="key=value,value: a row for each", show_default=False)]
LocalRank = Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)]


@app.callback()
def _group() -> None:
    """Sparse fine-tuning runs of language models."""


@app.command()
def run(config: ConfigArg, overrides: OverridesArg = None, dry_run: DryRun = False, local_rank: LocalRank = -1) -> None:
    """Run a config: load, mask, attach, train, save, evaluate, report. Finished stages are reused."""
    if local_rank >= 0:  # the deepspeed launcher passes it before the config, and older ones do not set the variable
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    raise typer.Exit(guarded(lambda: execute(config, overrides or [], dry_run)))


@app.command("sweep")
def sweep_command(
    config: ConfigArg,
    overrides: OverridesArg = None,
    grid: GridOption = None,
    seeds: Annotated[int | None, typer.Option(help="number of seeds: 0, 1, ...", min=1)] = None,
    jobs: Annotated[int, typer.Option(help="runs at once, each in a process of its own", min=1)] = 1,
    devices: Annotated[str, typer.Option(help="GPUs that the runs share out among them, as 0,1,2")] = "",
    lock: Annotated[Path | None, typer.Option(help="hold this lock file while a run lasts")] = None,
    table: Annotated[bool, typer.Option("--table", help="run nothing, write the table of what is done")] = False,
    dry_run: DryRun = False,
) -> None:
    """Run every cell of a table and write it: the config's sweep section, or --grid a=1,2 b=x,y. Done cells are kept."""
    from . import sweep

    axes, plain = list(grid or []), list[str]()
    for item in overrides or []:  # --grid a=1,2 b=3,4: what follows the first axis and lists values is an axis too
        (axes if grid and "," in item.partition("=")[2] and "[" not in item else plain).append(item)
    settings = sweep.Settings(lock=lock, jobs=jobs, devices=[d.strip() for d in devices.split(",") if d.strip()], table_only=table)
    _quiet()
    raise typer.Exit(guarded(lambda: sweep.execute(config, plain, axes, seeds, dry_run, settings)))


@app.command("mask")
def mask_command(
    config: ConfigArg,
    overrides: OverridesArg = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="save it as this file, and leave the run's folder alone")
    ] = None,
) -> None:
    """Compute a run's mask and save it; the run itself, and adapter.mask=FILE of another, take it up."""
    from . import masks

    _quiet()
    raise typer.Exit(guarded(lambda: masks.find(config, overrides or [], output)))


@app.command("inspect")
def inspect_command(
    masks: Annotated[list[Path], typer.Argument(help="mask files, run folders or adapter folders", show_default=False)],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="draw the pictures into this folder")] = None,
) -> None:
    """Print the density of masks by layer and module, and how much several of them share."""
    from .masks import inspect

    raise typer.Exit(guarded(lambda: inspect(masks, output)))


@app.command("eval")
def eval_command(
    paths: Annotated[list[str], typer.Argument(help="run folders, adapter folders, models or checkpoints", show_default=False)],
    tasks: Annotated[str, typer.Option(help="names of lm-eval, or task files, as gsm8k,mmlu,my.yaml", show_default=False)],
    data: Annotated[Path | None, typer.Option(help="folder of local data for the tasks that come with speft-train")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="examples before each question; default: the task's", min=0)] = None,
    limit: Annotated[int | None, typer.Option(help="questions of each task, the first ones", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="questions at once", min=1)] = 8,
    base: Annotated[bool, typer.Option(help="evaluate the base of the adapters too")] = True,
    model: Annotated[str | None, typer.Option(help="another place of the base model")] = None,
    dtype: Annotated[str | None, typer.Option(help="dtype of the weights: float32, bfloat16 or float16")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="folder for eval.json, eval.md and the answers")] = None,
    execute_code: Annotated[
        bool, typer.Option("--execute-code", help="run what the model writes, outside any sandbox")
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help="put questions into the model's chat template")] = False,
) -> None:
    """Score models with lm-eval, adapters in place on their base: a column each, with standard errors."""
    _quiet()
    from .lm import run as lm

    settings = lm.Settings(
        tasks=[t for t in tasks.split(",") if t], num_fewshot=num_fewshot, limit=limit, batch_size=batch_size, data=data,
        base=base, output=output, model=model, dtype=dtype, execute_code=execute_code, chat=chat,
    )  # fmt: skip
    raise typer.Exit(guarded(lambda: lm.evaluate(paths, settings)))


@app.command("plan")
def plan_command(
    config: ConfigArg,
    overrides: OverridesArg = None,
    gpus: Annotated[int, typer.Option(help="GPUs in all")] = 1,
    gpu_memory: Annotated[float, typer.Option(help="GB (10^9 bytes) of each GPU")] = 80.0,
    length: Annotated[int | None, typer.Option(help="tokens of an example; default: data.max_length", min=2)] = None,
) -> None:
    """Bytes on each GPU for every ZeRO stage, what fits and the largest micro-batch: sparse, LoRA and full side by side."""

    def work() -> None:
        from rich.console import Console

        from . import planning
        from .config import load_config

        planning.show(load_config(config, overrides or []), gpus, gpu_memory * 1e9, length, Console())

    _quiet()
    raise typer.Exit(guarded(work))


@app.command("doctor")
def doctor_command() -> None:
    """Check this machine: versions, compiler, GPUs, memory, disk; and what to do where a run would fail."""

    def work() -> None:
        from rich.console import Console

        from . import doctor

        doctor.show(Console())

    _quiet()
    raise typer.Exit(guarded(work))


def main() -> None:
    """The `speft-train` command."""
    app()


def run_main() -> None:
    """`python run.py CONFIG ...`: the run command alone."""
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    alone.command()(run)
    alone()


def guarded(work: Callable[[], Any]) -> int:
    """Do the work; print what a user can act on in one line, and give the exit code. A bug keeps its traceback."""
    with handled():  # also while the message is printed: a launcher's second signal may come by then
        return _guarded(work)


def _guarded(work: Callable[[], Any]) -> int:
    try:
        work()
        return 0
    except UserError as error:
        return _fail(str(error))
    except Stopped as stopped:
        _print(str(stopped))
        return stopped.exit_code
    except KeyboardInterrupt:
        _print("interrupted")
        return INTERRUPTED
    except OSError as error:
        return _fail(_os_error(error))
    except Exception as error:
        reason = _full_disk(error)
        if reason is None:
            raise
        return _fail(reason)


def execute(config: Path, overrides: list[str], dry_run: bool) -> None:
    """One run, from its file to its summary."""
    from rich.console import Console

    from . import engine, refusals
    from .config import load_config
    from .folder import RunFolder

    console = Console(stderr=False)
    cfg = load_config(config, overrides)
    refusals.check_run(cfg)
    folder = RunFolder(cfg.output_dir)
    folder.check(cfg)
    if cfg.adapter.mask and not Path(cfg.adapter.mask).is_file() and not (folder.path / "mask.safetensors").is_file():
        raise UserError(
            f"adapter.mask must be a mask file; {cfg.adapter.mask} does not exist"
        )  # told before hours of other stages
    if dry_run:
        from . import plan

        rank, world, _ = engine.launched_ranks()
        if rank == 0:
            plan.show(cfg, world, console)
        return
    _quiet()
    run_checked(cfg, folder, console)


def run_checked(cfg: Any, folder: Any, console: Any, only: str | None = None, end: Callable[[Any], None] | None = None) -> None:
    """One run, from its checked config and folder to its summary; or `only` one stage, and another `end`."""
    from . import engine, report, stages
    from .context import Run

    with handled() as request:
        ranks = engine.start(cfg.deepspeed)
        contents = ranks.on_main(lambda: folder.claim(cfg))
        try:
            this = Run(cfg=cfg, ranks=ranks, folder=folder, request=request, console=console, contents=contents)
            stages.run_stages(this, only)
            if ranks.is_main:
                (end or report.print_summary)(this)
        finally:
            folder.release()
        ranks.barrier()
        engine.stop(ranks)  # not after a failure: it could wait for ranks that never come


def _quiet() -> None:
    """Libraries speak through the log at warning level or not at all; other ranks say nothing."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def _fail(message: str) -> int:
    if not _is_told_by_rank_0():
        _print(f"error: {message}")
    return USAGE_ERROR


def _is_told_by_rank_0() -> bool:
    """Whether rank 0 found an error too: before the ranks have joined they all read the same config, and mostly find the same.

    Nobody can be asked yet. But the launcher ends this rank as soon as rank 0 has told and left; if it does not within a while, this
    rank alone knows.
    """
    if os.environ.get("RANK", "0") == "0" or _have_joined():
        return False
    try:
        time.sleep(PATIENCE)
    except Stopped:
        return True
    return False


def _have_joined() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def _print(message: str) -> None:
    """Rank 0 speaks for all; another rank only of what happened to it alone, which PeerError is not."""
    from .ranks import PeerError

    rank = os.environ.get("RANK", "0")
    error = sys.exc_info()[1]
    told = isinstance(error, PeerError) or (isinstance(error, Stopped) and error.by_all)
    if rank == "0" or not told:
        one_line = " ".join(message.split())
        print(one_line if rank == "0" else f"rank {rank}: {one_line}", file=sys.stderr, flush=True)


def _os_error(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    advice = "; free some, or choose another output_dir" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"{error.strerror or error}{where}{advice}"


def _full_disk(error: Exception) -> str | None:
    """torch and safetensors report a full disk as errors of their own."""
    text = str(error)
    signs = (
        "No space left on device",
        "Disk quota exceeded",
        "File too large",
        "PytorchStreamWriter failed writing",
        "inline_container",
        "basic_ios",
    )
    if any(sign in text for sign in signs):
        return f"the disk is full or cannot be written: {text.splitlines()[0]}"
    return None

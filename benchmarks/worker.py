"""One method in a process of its own. Reads commands from stdin, a line each, and answers each with a line of JSON.

step: one optimizer step, its seconds. saved: bytes kept for backward. peak: the resident high-water mark, reset before the first
step. swap N: seconds of N rounds of putting the adapter on and off, and how many bits changed.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from methods import METHODS
from models import load, make_mask, token_batches

import speft_core as sc


class Worker:
    """The model of one method and its batch."""

    def __init__(self, spec: dict[str, Any]) -> None:
        torch.set_num_threads(spec["threads"])
        torch.manual_seed(0)
        self.spec = spec
        model = load(spec["model"], spec["dtype"], spec.get("width"))
        self.model, self.optimizer = METHODS[spec["method"]](model, spec)
        (self.ids,) = token_batches(spec["model"], spec.get("data"), spec["rows"], spec["length"], 1)
        self.trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def step(self) -> float:
        """One step: forward, backward, update; its seconds."""
        started = time.perf_counter()
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    def saved(self) -> int:
        """Bytes of the distinct storages saved for backward, parameters left out."""
        left_out = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            parts = (tensor._indices(), tensor._values()) if tensor.layout == torch.sparse_coo else (tensor,)  # SHiRA saves sparse ones
            for storage in (part.untyped_storage() for part in parts):
                if storage.data_ptr() not in left_out:
                    storages[storage.data_ptr()] = storage  # held, so that its address is not given out again
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = self.model(input_ids=self.ids, labels=self.ids).loss
        total = sum(s.nbytes() for s in storages.values())
        del loss  # and the graph with it: forward alone is asked
        return total

    def peak(self, steps: int = 3) -> int:
        """The resident high-water mark of `steps` steps, in bytes, reset before the first; the weights are in it."""
        gc.collect()
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except OSError:
            pass
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        for _ in range(steps):
            self.step()
        return _status("VmHWM")

    def swap(self, rounds: int) -> dict[str, Any]:
        """Seconds a round of putting the adapter on and taking it off again, and the share of elements whose bits changed after all."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=1e-3)
        if self.spec["method"] == "lora":
            bases = {n: m for n, m in self.model.named_modules() if n.endswith("base_layer")}
            on, off = self.model.merge_adapter, self.model.unmerge_adapter
        else:
            tuner = self.model._speft_tuner
            adapter = tuner.adapter()
            tuner.detach()
            bases = {n: m for n, m in self.model.named_modules() if isinstance(m, torch.nn.Linear)}
            handle: list[sc.Applied] = []
            on = lambda: handle.append(adapter.apply(self.model))  # noqa: E731
            off = lambda: handle.pop().restore()  # noqa: E731
        before = {n: m.weight.detach().clone() for n, m in bases.items()}
        times = []
        for _ in range(rounds):
            started = time.perf_counter()
            on()
            off()
            times.append(time.perf_counter() - started)
        raw = {4: torch.int32, 2: torch.int16}
        as_bits = {n: raw[m.weight.element_size()] for n, m in bases.items()}
        changed = sum(int((m.weight.view(as_bits[n]) != before[n].view(as_bits[n])).sum()) for n, m in bases.items())
        return {
            "seconds": sorted(times)[len(times) // 2],
            "changed": changed,
            "elements": sum(t.numel() for t in before.values()),
        }


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def main() -> None:
    """Build what the spec in argv asks for, then obey."""
    warnings.filterwarnings("ignore")
    spec = json.loads(sys.argv[1])
    out = sys.stdout
    sys.stdout = sys.stderr  # what libraries print must not mix with the answers
    if spec["method"] == "mask":
        make_mask(spec, Path(spec["mask"]))
        print(json.dumps({"ready": True}), file=out, flush=True)
        return
    worker = Worker(spec)
    print(json.dumps({"ready": True, "trainable": worker.trainable}), file=out, flush=True)
    for line in sys.stdin:
        command, *words = line.split()
        answer = getattr(worker, command)(*(int(w) for w in words))
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()

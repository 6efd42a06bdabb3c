"""attach: make the masked scalars of a model trainable, in place; detach: give the model back bit for bit.

Shape suffixes: K kept entries.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from .adapter import AdapterConfig, SparseAdapter
from .delta import VALUE_DTYPES, SparseDelta
from .errors import UserError, nearest
from .fingerprint import fingerprint
from .mask import SparsityMask, random_origin
from .ops.plans import PLANS
from .outside import Outside
from .partitioned import own_part, whole
from .remask import Parked, put_back, remask, with_parked
from .slots import AttachedForward, Slot, check_adaptable
from .targets import base_parameters, check_reachable, owners_of, parameter_shape
from .together import Together
from .whole_slots import SHORT, WholeSlot


@dataclass(frozen=True)
class PlanRow:
    """How one parameter's gradient is computed: `plan` ("tap" for all but plain Linear weights) and why."""

    plan: str
    reason: str
    nnz: int
    shape: tuple[int, ...]


def attach(
    model: nn.Module,
    mask: SparsityMask,
    train_dense: Sequence[str] = (),
    backward: str = "auto",
    keep_dtype: torch.dtype | None = None,
    keep_empty: bool = False,
) -> Tuner:
    """Make the `mask`'s entries of `model` trainable and freeze all else; returns the Tuner that holds them.

    mask: from find_mask, or your own. train_dense: modules or parameters (names or dotted suffixes) that are trained
    whole, such as a new head. backward: "auto" or a plan's name (see ops/plans.py) for every Linear. keep_dtype: what the
    input columns kept for backward are stored in, such as torch.bfloat16 to halve them (None: as they are, exact).
    keep_empty: adapt parameters without entries too, so that a later mask may give them some (see remask.py).

    Forward writes base + values into the weights in place. UserError when the mask does not fit the model, when a tuner is
    attached already or an adapter applied, or for a name that matches nothing; the model is untouched then.
    """
    if getattr(model, "_speft_tuner", None) is not None:
        raise UserError("this model has a tuner attached already; call its detach() first")
    if getattr(model, "_speft_applied", None):
        raise UserError("an adapter is applied to this model; restore it before attaching")
    if backward != "auto" and backward not in PLANS:
        raise UserError(f"backward must be auto or one of {', '.join(PLANS)}, got {backward!r}")
    mask.check_model(model)
    for name, parameter in base_parameters(model).items():
        if name in mask.indices:
            check_adaptable(name, parameter)
    check_reachable(model, mask.indices)
    dense_names = _dense_names(model, mask, train_dense)
    if keep_dtype is not None and keep_dtype not in VALUE_DTYPES:
        raise UserError(f"keep_dtype must be None or one of {', '.join(str(d) for d in VALUE_DTYPES)}, got {keep_dtype}")
    return Tuner(model, mask, dense_names, backward, keep_dtype, keep_empty)


def _dense_names(model: nn.Module, mask: SparsityMask, train_dense: Sequence[str]) -> list[str]:
    if isinstance(train_dense, str):
        raise UserError(f"train_dense must be a list of names, got the string {train_dense!r}")
    parameters, owners, found = base_parameters(model), owners_of(model), []
    for wanted in train_dense:
        hits = [n for n in parameters if any(_ends_with(prefix, wanted) for prefix in _prefixes(n))]
        if not hits:
            raise UserError(f"train_dense: {wanted!r} matches no parameter.{nearest(wanted, _last_parts(parameters))}")
        found += hits
    for name in dict.fromkeys(found):
        if name in mask.indices:
            raise UserError(f"{name} is a target of the mask and in train_dense; it can be only one of them")
        if len(owners[id(parameters[name])]) > 1:
            raise UserError(
                f"train_dense: {name} is tied to another module's weight; untie the two before training one of them"
            )
    return list(dict.fromkeys(found))


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    for stop in range(1, len(parts) + 1):
        yield ".".join(parts[:stop])


def _ends_with(full: str, wanted: str) -> bool:
    return full == wanted or full.endswith("." + wanted)


def _last_parts(names: Iterable[str]) -> list[str]:
    return sorted({part for n in names for part in n.split(".")[-2:]})


class Tuner:
    """The trainable part of an attached model: `values` per masked parameter, and the dense parameters.

    values: parameter name -> its values (fp32; float64 for float64 weights), a Parameter that the model's modules own too.
    dense: name -> what is trained whole: the model's own parameter, or one in fp32 for a parameter of 16 bits (whole_slots.py).
    mask: the mask it was attached with.
    """

    def __init__(
        self, model: nn.Module, mask: SparsityMask, dense_names: list[str], backward: str,
        keep_dtype: torch.dtype | None = None, keep_empty: bool = False,
    ) -> None:
        self.model, self.mask = model, mask
        parameters, owners = base_parameters(model), owners_of(model)
        self._required_grad = {p: p.requires_grad for p in model.parameters()}
        self.dense: dict[str, nn.Parameter] = {n: parameters[n] for n in dense_names}
        self._dense_weights = dict(self.dense)
        self._dense_before = {n: own_part(p).clone() for n, p in self.dense.items()}
        self._whole: dict[str, WholeSlot] = {}
        self.values: dict[str, nn.Parameter] = {}
        self.fingerprint: dict[str, dict[str, Any]] = {}
        self._slots: dict[str, list[Slot]] = {}
        self._forwards: list[AttachedForward] = []
        self._hooks: list[Any] = []
        self.parked: dict[str, Parked] = {}  #: entries that an earlier mask trained and the present one does not
        by_module: dict[nn.Module, list[Slot]] = {}
        together = Together()
        try:
            for name, indices_K in mask.indices.items():
                if indices_K.numel() == 0 and not keep_empty:
                    continue  # a parameter of no elements breaks ZeRO-3 and FSDP
                weight = parameters[name]
                self._slots[name] = []
                with whole([weight]):
                    self.fingerprint[name] = fingerprint(weight, indices_K.to(weight.device))
                    for module, attribute in owners[id(weight)]:
                        slot = Slot(name, module, attribute, indices_K, backward, keep_dtype, together)
                        self._slots[name].append(slot)
                        if name in self.values:  # tied: one Parameter serves all owners
                            module.register_parameter(f"{attribute}_values", self.values[name])
                        by_module.setdefault(module, []).append(slot)
                        self.values[name] = slot.values_K
                together.add(self._slots[name])
            for name, weight in self._dense_weights.items():
                if weight.dtype in SHORT:
                    ((module, attribute),) = owners[id(weight)]
                    with whole([weight]):
                        self._whole[name] = WholeSlot(name, module, attribute, together)
                    by_module.setdefault(module, []).append(self._whole[name])
                    self.dense[name] = self._whole[name].values_K
            self._install(by_module, together)
        except BaseException:  # Ctrl-C and a full memory too
            self._take_off()
            raise
        model._speft_tuner = self  # type: ignore[assignment]

    def _install(self, by_module: dict[nn.Module, list[Slot]], together: Together) -> None:
        for parameter in self._required_grad:
            parameter.requires_grad_(False)
        for parameter in self.dense.values():
            parameter.requires_grad_(True)
        for module, slots in by_module.items():
            forward = AttachedForward(module, slots, self.parked)
            forward.install()
            self._forwards.append(forward)
        self.outside = Outside(self.model, self._forwards, together)
        self._install_input_gradients()

    def _install_input_gradients(self) -> None:
        """Reentrant gradient checkpointing drops gradients unless a segment's input wants one; make the embeddings' output do."""
        on = (
            "is_activation_checkpointing" if hasattr(self.model, "is_activation_checkpointing") else "is_gradient_checkpointing"
        )
        if getattr(self.model, on, False):  # transformers 5 renamed it and warns at the old name
            embeddings = getattr(self.model, "get_input_embeddings", lambda: None)()
            if embeddings is not None:
                self._hooks.append(embeddings.register_forward_hook(lambda _m, _i, output: output.requires_grad_(True)))

    def parameters(self) -> Iterator[nn.Parameter]:
        """What an optimizer takes: values, then dense parameters."""
        yield from self.values.values()
        yield from self.dense.values()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name of the adapted parameter, its values), then (name, dense parameter)."""
        yield from self.values.items()
        yield from self.dense.items()

    @property
    def trainable_parameters(self) -> int:
        """Scalars that are trained: k and the dense ones."""
        return sum(math.prod(parameter_shape(p)) for p in self.parameters())

    def plan(self) -> dict[str, PlanRow]:
        """Parameter name -> the backward plan chosen for it and why."""
        rows = {}
        for name, slots in self._slots.items():
            slot = slots[0]
            kind = slot.plan.name if slot.plan else "tap"
            rows[name] = PlanRow(kind, slot.reason, slot.indices_K.numel(), self.mask.shapes[name])
        return rows

    @torch.no_grad()
    def sync(self) -> None:
        """Write base + values into the weights now; for use after something wrote `values.data` behind torch's back."""
        for slots in self._slots.values():
            for slot in slots:
                slot.stale = True
                slot.write()
        for dense in self._whole.values():
            dense.stale = True
            dense.write()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """`values.<name>` and `dense.<name>`, detached, and `mask`, by which they are recognised; nothing frozen.

        What a checkpoint needs beside the optimizer.
        """
        state = {f"values.{n}": p.detach() for n, p in self.values.items()}
        return state | {f"dense.{n}": p.detach() for n, p in self.dense.items()} | {"mask": self._mask_hash()}

    def _mask_hash(self, wide: bool = False) -> torch.Tensor:
        """[8] bytes that tell which entries are trained, as fp32 numbers: an average of states keeps them. wide: of int64 indices."""
        digest = hashlib.blake2b(digest_size=8)
        for name, slots in self._slots.items():
            digest.update(name.encode() + b"\0")
            indices_K = slots[0].indices_K.cpu()
            digest.update((indices_K.long() if wide else indices_K).numpy().data)
        return torch.tensor(list(digest.digest()), dtype=torch.float32)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load what `state_dict` gave and write it into the weights; UserError when names or shapes differ."""
        own = self.state_dict()
        mask = own.pop("mask")
        if set(own) != set(state) - {"mask"}:
            odd = sorted(set(own) ^ (set(state) - {"mask"}))[0]
            raise UserError(f"the saved values are of another mask: {odd!r} is in only one of the two")
        if "mask" in state:  # states of earlier versions have none, or one of the int64 indices that a mask could have
            saved = state["mask"].detach().cpu().float().round()
            if not torch.equal(mask, saved) and not torch.equal(self._mask_hash(wide=True), saved):
                raise UserError("the saved values are of another mask: it has the same sizes, but other entries")
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise UserError(f"{name} has shape {tuple(state[name].shape)}, this mask wants {tuple(tensor.shape)}")
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self.sync()

    @torch.no_grad()
    def adapter(self, dtype: torch.dtype | None = None, **config: Any) -> SparseAdapter:
        """The adapter as it ships, on the CPU. `dtype` of the values: the weights' own unless given.

        The tuner's values are rounded to that dtype first and written, so that what is evaluated from here on is what
        ships. `config` sets fields of AdapterConfig (base_model_name_or_path, task_type, ...); the mask gives the rest.
        """
        if dtype is not None and dtype not in VALUE_DTYPES:
            raise UserError(f"dtype must be one of {', '.join(str(d) for d in VALUE_DTYPES)}, got {dtype}")
        deltas = {}
        for name, values_K in self.values.items():
            slot = self._slots[name][0]
            rounded_K = values_K.detach().to(dtype or slot.weight.dtype)
            values_K.copy_(rounded_K)
            delta = SparseDelta(slot.indices_K.cpu(), rounded_K.cpu().clone(), self.mask.shapes[name])
            deltas[name] = with_parked(self, name, delta).check(name)
        dense = {}
        for name, parameter in self.dense.items():
            short = name in self._whole
            with whole([parameter], change=short):
                rounded = parameter.detach().to(self._dense_weights[name].dtype)
                dense[name] = rounded.cpu().clone()
                if short:
                    parameter.copy_(rounded)
        self.sync()
        return SparseAdapter(deltas, dense, self._config(config), {n: dict(f) for n, f in self.fingerprint.items()})

    def _config(self, given: Mapping[str, Any]) -> AdapterConfig:
        known = {f.name for f in fields(AdapterConfig)}
        for key in given:
            if key not in known:
                raise UserError(f"the adapter's config has no field {key!r}.{nearest(key, known)}")
        made, origin = self.mask.made, random_origin(self.mask.made)
        settings = getattr(self.model, "config", None)
        ours = {
            "base_model_name_or_path": getattr(settings, "_name_or_path", None) or None,
            "base_model_revision": getattr(settings, "_commit_hash", None),
            "metric": made.get("metric"),
            "scope": made.get("scope"),
            "budget": made.get("budget") or {"k": self.mask.nnz},
            "targets": made.get("targets") or [],
            "seed": made.get("seed"),
            "random": dict(origin) if origin else None,
            "library_versions": library_versions(),
        }
        return AdapterConfig(**{**ours, **given})

    def remask(self, mask: SparsityMask, revert: bool = False) -> None:
        """Train the entries of another `mask` from now on; those that leave keep their change (see remask.py)."""
        remask(self, mask, revert)

    def detach(self) -> None:
        """Restore every bit of the base, dense parameters and requires_grad included. A second call does nothing.

        Should it fail while it writes, the tuner stays attached and the model as trained: call it again.
        """
        if getattr(self.model, "_speft_tuner", None) is not self:
            return
        put_back(self)
        for parameter in self._dense_weights.values():
            parameter.grad = None
        self._take_off()
        self.parked.clear()
        del self.model._speft_tuner

    def _take_off(self) -> None:
        """Take everything off the model, also what was put on in part. The weights hold the base by now."""
        if hasattr(self, "outside"):
            self.outside.remove()
        for forward in self._forwards:
            forward.remove()
        for hook in self._hooks:
            hook.remove()
        for slots in (*self._slots.values(), self._whole.values()):
            for slot in slots:
                slot.remove()
        for parameter, required in self._required_grad.items():
            parameter.requires_grad_(required)


def library_versions() -> dict[str, str]:
    """Versions of speft-core, torch and, where installed, transformers."""
    versions = {}
    for package in ("speft-core", "torch", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions

"""Masks that change while training: Algorithm 1 of SPEFT, and SpIEL's grow and drop.

    tuner = attach(model, mask, keep_empty=True)
    dynamic = DynamicMask(tuner=tuner, batches=fresh_batches, interval=1000)
    for batch in data:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dynamic.after_step(optimizer)       # counts optimizer steps, and every `interval` of them changes the mask

The parameters in tuner.values stay the same objects when the mask changes, with other sizes, so the optimizer keeps its
parameters; engines that flatten them (stages 1 to 3 of DeepSpeed, FSDP, DDP's buckets) cannot follow.

Shape suffixes: K active entries, U all entries that were ever trained and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .attach import Tuner
from .errors import UserError, nearest
from .mask import Budget, SparsityMask
from .remask import active, load_snapshot, remask, set_entries, snapshot, union, union_size
from .saliency import find_mask
from .saliency.calibration import Batch, LossFn
from .saliency.find import AnyMetric
from .saliency.metrics import Metric, Statistic
from .saliency.passes import Pass, Statistics, mean_gradient
from .select import select_topk

OPTIMIZER_STATES = ("clear", "keep")
Chosen = tuple[SparsityMask, bool]  # the new mask, and whether what leaves it returns to the base


def here(choose: Callable[[], Chosen]) -> Chosen:
    """Choose in this process: what DynamicMask.agree does with one."""
    return choose()


@dataclass(kw_only=True)
class DynamicMask:
    """Changes a tuner's mask every `interval` optimizer steps.

    tuner: attached with keep_empty=True. batches(n): the calibration batches of the n-th change (from 1); fresh examples, and
    the same ones whenever n is the same, or a resumed run goes another way. policy: a name of POLICIES. metric, scope, loss_fn,
    memory_limit, options: as in find_mask ("grow_and_drop" grows by the gradient). optimizer_state: "clear" starts the
    optimizer afresh, as Algorithm 1 does; "keep" keeps what belongs to surviving entries. swap: share of k that
    "grow_and_drop" exchanges. stop_after: no change after so many optimizer steps. agree: with several processes that hold the
    same model, calls the function it is given on one of them and returns its result on all.
    """

    tuner: Tuner
    batches: Callable[[int], Iterable[Batch]]
    interval: int = 1000
    policy: str = "rescore"
    metric: AnyMetric = "gradient"
    scope: str = "global"
    loss_fn: LossFn | None = None
    memory_limit: int | None = None
    find_options: Mapping[str, Any] = field(default_factory=dict)
    optimizer_state: str = "clear"
    swap: float = 0.2
    stop_after: int | None = None
    agree: Callable[[Callable[[], Chosen]], Chosen] = here
    steps: int = field(default=0, init=False)
    changes: list[dict[str, Any]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UserError(
                f"policy must be one of {', '.join(POLICIES)}, got {self.policy!r}.{nearest(self.policy, POLICIES)}"
            )
        if self.optimizer_state not in OPTIMIZER_STATES:
            raise UserError(f"optimizer_state must be one of {', '.join(OPTIMIZER_STATES)}, got {self.optimizer_state!r}")
        if not isinstance(self.interval, int) or self.interval < 1:
            raise UserError(f"interval must be a whole number of at least 1 optimizer step, got {self.interval!r}")
        if not 0 < self.swap <= 1:
            raise UserError(f"swap must lie in (0, 1], got {self.swap!r}")
        if self.policy == "grow_and_drop":
            _check_single(self.scope, {**self.tuner.mask.made, **self.find_options})
        self.made = dict(self.tuner.mask.made)
        self.k = self._budget()  #: what every mask may hold

    def _budget(self) -> int:
        """As many entries as the mask; of a structure, whose last unit may not have fitted in, as many as were asked for."""
        mask, asked = self.tuner.mask, self.made.get("budget")
        if not self.made.get("structure") or not isinstance(asked, Mapping):
            return mask.nnz
        return max(mask.nnz, Budget(**asked).resolve(self.tuner.model, list(mask.names)))

    def after_step(self, optimizer: torch.optim.Optimizer, last: bool = False) -> bool:
        """Count one optimizer step; change the mask when it is time. Returns whether it changed.

        last: no step comes after this one, so a new mask would not be trained; it stays.
        """
        self.steps += 1
        if self.steps % self.interval or (self.stop_after is not None and self.steps > self.stop_after) or last:
            return False
        self.change(optimizer)
        return True

    def change(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Choose a new mask by the policy and train it from now on."""
        number, before = len(self.changes) + 1, self.tuner.mask
        mask, revert = self.agree(lambda: POLICIES[self.policy](self, number))
        remask(self.tuner, mask, revert)
        if optimizer is not None:
            _move_state(optimizer, self.tuner, before, mask, self.optimizer_state == "keep")
        kept = sum(int(torch.isin(i, before.indices[n]).sum()) for n, i in mask.indices.items())
        self.changes.append({"step": self.steps, "kept": kept, "active": mask.nnz, "union": union_size(self.tuner)})

    def report(self) -> dict[str, Any]:
        """Plain figures: active k, the union that the adapter holds, and of each change its step and the share that stayed."""
        changes = [{**c, "overlap": c["kept"] / max(1, c["active"])} for c in self.changes]
        return {"policy": self.policy, "interval": self.interval, "optimizer_steps": self.steps, "active": self.tuner.mask.nnz,
                "union": union_size(self.tuner), "changes": changes}  # fmt: skip

    def prune(self, k: int, optimizer: torch.optim.Optimizer | None = None) -> dict[str, float]:
        """Keep the `k` entries of the union that moved most and return the others to the base; what that costs.

        Returns {"kept", "dropped", "lost": share of the squared length of all changes that is gone}. All kept entries are
        active afterwards.
        """
        if not isinstance(k, int) or k < 1:
            raise UserError(f"final_budget must be a whole number of at least 1, got {k!r}")
        entries = {n: union(self.tuner, n) for n in self.tuner.values}
        total = sum(i.numel() for i, _ in entries.values())
        chosen = select_topk({n: v.abs() for n, (_, v) in entries.items()}, min(k, total))
        before, indices, whole, lost = self.tuner.mask, {}, 0.0, 0.0
        for name, (indices_U, values_U) in entries.items():
            kept_U = chosen[name].long().to(indices_U.device)
            squares = values_U.double().square()
            whole += float(squares.sum())
            lost += float(squares.sum() - squares[kept_U].sum())
            indices[name] = indices_U[kept_U].cpu()
            set_entries(self.tuner, name, indices_U[kept_U], values_U[kept_U], indices_U[:0], values_U[:0])
        self.tuner.mask = SparsityMask(indices, before.shapes, {**self.made, "final_budget": k})
        if optimizer is not None:
            _move_state(optimizer, self.tuner, before, self.tuner.mask, False)
        return {"kept": min(k, total), "dropped": max(0, total - k), "lost": lost / whole if whole else 0.0}

    def state_dict(self) -> dict[str, Any]:
        """Steps, changes, and for each parameter what trains, what rests and how far it moved; safe for weights_only."""
        return {
            "steps": self.steps,
            "changes": [dict(c) for c in self.changes],
            "tensors": snapshot(self.tuner),
            "made": dict(self.tuner.mask.made),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, with a tuner attached to the same base and targets.

        Values come along; load it before the optimizer's state, which must find the sizes that it was saved with.
        """
        load_snapshot(self.tuner, state["tensors"], state["made"])
        self.steps, self.changes = int(state["steps"]), [dict(c) for c in state["changes"]]


def _check_single(scope: str, made: Mapping[str, Any]) -> None:
    """Entries are dropped and grown one by one, wherever they lie: UserError for a mask that is made by other rules."""
    rules = {key: made.get(key) for key in ("structure", "min_per_layer", "max_per_layer")}
    if scope != "global" or made.get("scope") == "local":
        rules["scope"] = "local"
    broken = next((key for key, value in rules.items() if value not in (None, "entries")), None)
    if broken is not None:
        raise UserError(
            f"policy grow_and_drop exchanges single entries over all targets, so that {broken} {rules[broken]} would not last; use"
            " rescore, or a global mask of entries without bounds"
        )


def _rescore(dynamic: DynamicMask, number: int) -> Chosen:
    """Algorithm 1: score the model as it has become on fresh examples and take the k best."""
    tuner = dynamic.tuner
    mask = find_mask(
        tuner.model, dynamic.batches(number), dynamic.metric, Budget(k=dynamic.k), list(tuner.values), dynamic.scope,
        dynamic.loss_fn, memory_limit=dynamic.memory_limit, **dynamic.find_options,
    )  # fmt: skip
    return SparsityMask(mask.indices, mask.shapes, {**dynamic.made, "changed": number}), False


def _grow_and_drop(dynamic: DynamicMask, number: int) -> Chosen:
    """SpIEL (arXiv 2401.16405): the entries that moved least return to the base, as many with the largest gradients grow."""
    tuner = dynamic.tuner
    k = tuner.mask.nnz
    count = min(max(1, round(dynamic.swap * k)), tuner.mask.numel - k)
    entries = {n: active(tuner, n) for n in tuner.values}
    stay = select_topk({n: v.abs() for n, (_, v) in entries.items()}, k - count)

    def gradient_elsewhere(run: Pass, names: Any) -> Statistics:
        found = {n: g.abs_() for n, g in mean_gradient(run, names).items()}
        for name in names:
            found[name].view(-1)[entries[name][0].long().to(found[name].device)] = -1.0
        return found

    grown = find_mask(
        tuner.model, dynamic.batches(number), Metric("growth", Statistic(gradient_elsewhere, True), lambda w, s: s, "|g|"),
        Budget(k=count), list(tuner.values), "global", dynamic.loss_fn, memory_limit=dynamic.memory_limit,
    )  # fmt: skip
    indices = {}
    for name, (indices_K, _) in entries.items():
        kept_K = indices_K.cpu()[stay[name].long()]
        indices[name] = torch.cat([kept_K, grown.indices[name].to(kept_K.dtype)]).sort().values
    return SparsityMask(indices, tuner.mask.shapes, {**dynamic.made, "changed": number}), True


POLICIES: dict[str, Callable[[DynamicMask, int], Chosen]] = {"rescore": _rescore, "grow_and_drop": _grow_and_drop}


def _move_state(optimizer: torch.optim.Optimizer, tuner: Tuner, before: SparsityMask, after: SparsityMask, keep: bool) -> None:
    """Fit the optimizer's state to the new entries: dropped, or kept for those that survive and zero for new ones."""
    states = getattr(optimizer, "optimizer", optimizer).state  # accelerate wraps the optimizer
    for parameter in () if keep else tuner.dense.values():
        states.pop(parameter, None)
    for name, values_K in tuner.values.items():
        state = states.get(values_K)
        if not state:
            continue
        if not keep:
            del states[values_K]
            continue
        old_K, new_K = before.indices[name], after.indices[name]
        survives_K = torch.isin(new_K, old_K)
        source_K = torch.searchsorted(old_K, new_K[survives_K])
        for key, tensor in state.items():
            if isinstance(tensor, torch.Tensor) and tensor.shape == old_K.shape and tensor.dim() == 1:
                moved_K = tensor.new_zeros(new_K.numel())
                moved_K[survives_K.to(tensor.device)] = tensor[source_K.to(tensor.device)]
                state[key] = moved_K

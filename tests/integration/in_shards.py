"""Two ranks that hold pico models in shards, held against the same models whole in each of them.

deepspeed --num_gpus 2 in_shards.py FOLDER. Rank 0 prints the name of each check that has passed on both.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import pico
import speft_core as sc
from speft_core.errors import UserError
from speft_core.partitioned import gathering, is_partitioned, whole
from speft_core.saliency.peers import Peers
from speft_train import engine, shards
from speft_train.config import DeepspeedSection
from speft_train.ranks import Ranks

SECTION = DeepspeedSection(enabled=True, zero_stage=3)
METRICS = ("gradient", "snip", "force", "taylor_fo", "fisher", "absolute_gradient", "wanda", "magnitude", "random")
BUDGET = sc.Budget(density=0.05, of="targets")


def both(folder: Path, kind: str, dtype: torch.dtype, tied: bool = True) -> tuple[Any, Any]:
    """(whole, in shards): one checkpoint, loaded in the two ways."""
    made = pico.MODELS[kind](dtype=dtype, tied=tied)
    where = folder / f"{kind}-{tied}-{str(dtype)[6:]}"
    if RANKS.is_main:
        made.save_pretrained(where)
    RANKS.barrier()
    plain = type(made).from_pretrained(where, dtype="auto").eval()
    with shards.loading(SECTION, RANKS.world) as finish:
        cut = type(made).from_pretrained(where, dtype="auto")
    finish(cut)
    return plain, cut.eval()


def assert_same_bits(plain: Any, cut: Any) -> None:
    ours, theirs = dict(plain.named_parameters()), dict(cut.named_parameters())
    assert list(ours) == list(theirs)
    for name, parameter in theirs.items():
        assert is_partitioned(parameter) and parameter.numel() == 0, name
        with whole([parameter]):
            assert parameter.dtype == ours[name].dtype and torch.equal(parameter, ours[name]), name


def batches(model: Any) -> list[dict[str, torch.Tensor]]:
    """Seven, the last of which is short: rank 1 has none in the last round."""
    return [pico.batch(model, rows=3 if n < 6 else 1, seed=n) for n in range(7)]


def peers() -> Peers:
    return Peers(RANKS.rank, RANKS.world, RANKS.group, RANKS.group)


def loads(folder: Path) -> None:
    """Every bit, dtype and name; tied or not; both ranks hold half."""
    for kind in pico.MODELS:
        for dtype in (torch.float32, torch.bfloat16):
            for tied in (True, False):
                plain, cut = both(folder, kind, dtype, tied)
                assert cut.dtype == dtype
                assert_same_bits(plain, cut)
                numel = sum(p.numel() for p in plain.parameters())
                assert shards.total(cut) == numel
                assert sum(p.ds_tensor.numel() for p in cut.parameters()) <= numel / 2 + len(list(cut.parameters()))
                if kind != "bert":
                    assert (cut.get_input_embeddings().weight is cut.get_output_embeddings().weight) == tied


def masks(folder: Path) -> None:
    """Of one process with whole weights, whatever the metric, architecture, structure, scope and limit of memory."""
    cases: list[tuple[str, dict[str, Any]]] = [(metric, {}) for metric in METRICS]
    cases += [("gradient", {"scope": "local"}), ("snip", {"memory_limit": 3000}), ("gradient", {"structure": "rows"})]
    cases += [("snip", {"structure": "columns"}), ("gradient", {"structure": "2:4"}), ("wanda", {"min_per_layer": 3})]
    for kind, dtype, part in (("llama", torch.bfloat16, cases), ("gpt2", torch.float32, cases[:8]), ("opt", torch.float32, cases[:8])):
        plain, cut = both(folder, kind, dtype, tied=kind != "opt")
        for metric, more in part:
            alone = sc.find_mask(plain, batches(plain), metric, BUDGET, **more)
            found = sc.find_mask(cut, batches(cut), metric, BUDGET, peers=peers(), **more)
            assert found == alone and alone.nnz > 0, (kind, metric, more)
            assert found.made == alone.made
        assert_same_bits(plain, cut)
    plain, cut = both(folder, "llama", torch.float32, tied=False)
    for targets in (["embed_tokens", "lm_head"], ["norm"], "body"):  # taps as well as linear layers
        alone = sc.find_mask(plain, batches(plain), "gradient", BUDGET, targets)
        assert sc.find_mask(cut, batches(cut), "gradient", BUDGET, targets, peers=peers()) == alone


def forwards(folder: Path) -> None:
    """The very logits, though the ranks do not run equally many; answers too."""
    for kind in pico.MODELS:
        plain, cut = both(folder, kind, torch.float32)
        batch = pico.batch(plain)
        with torch.no_grad(), shards.evaluating(cut, RANKS):
            for _ in range(3 if RANKS.is_main else 1):
                assert torch.equal(cut(**batch).logits, plain(**batch).logits)
            if kind != "bert" and RANKS.is_main:
                ask = {"input_ids": batch["input_ids"][:1], "max_new_tokens": 5, "do_sample": False}
                assert torch.equal(cut.generate(**ask), plain.generate(**ask))
        assert_same_bits(plain, cut)


def gradients(folder: Path) -> None:
    """Of an input, through every layer; no weight stays whole between forward and backward."""
    plain, cut = both(folder, "llama", torch.float32)
    found = []
    for model in (plain, cut):
        model.requires_grad_(False)
        x = torch.randn(2, 5, pico.HIDDEN, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with gathering(model):
            loss = model(inputs_embeds=x).logits.square().sum()
            assert model is plain or all(p.numel() == 0 for p in model.parameters())
            loss.backward()
        found.append(x.grad)
    assert torch.equal(found[0], found[1]) and bool(found[0].abs().max() > 0)


def adapters(folder: Path) -> None:
    """Attached, saved, detached, applied and restored as on the whole model, dense parts and tied weights included."""
    for kind, dense in (("llama", ["model.norm"]), ("bert", ["classifier"])):
        plain, cut = both(folder, kind, torch.bfloat16)
        targets = ["embed_tokens", "q_proj"] if kind == "llama" else "all-linear"
        mask = sc.find_mask(plain, metric="random", budget=BUDGET, targets=targets)
        saved = []
        for model in (plain, cut):
            tuner = sc.attach(model, mask, dense)
            assert tuner.trainable_parameters > mask.nnz
            for number, values in enumerate(tuner.values.values()):
                values.data.copy_(torch.randn(values.shape, generator=torch.Generator().manual_seed(number)))
            for parameter in tuner.dense.values():
                with torch.no_grad(), whole([parameter], change=True):
                    parameter.add_(0.5)
            saved.append(tuner.adapter())
            tuner.detach()
        for name, delta in saved[0].deltas.items():
            assert torch.equal(delta.values_K, saved[1].deltas[name].values_K)
        assert saved[0].fingerprint == saved[1].fingerprint
        assert saved[0].dense and all(torch.equal(t, saved[1].dense[n]) for n, t in saved[0].dense.items())
        assert_same_bits(plain, cut)
        batch = pico.batch(plain)
        with torch.no_grad(), saved[0].applied(plain), saved[1].applied(cut), shards.evaluating(cut, RANKS):
            logits = plain(**batch).logits
            assert torch.equal(cut(**batch).logits, logits)
        with torch.no_grad():
            assert not torch.equal(plain(**batch).logits, logits)
        assert_same_bits(plain, cut)


def refusals(folder: Path) -> None:
    """What needs whole weights says so, and what to do; a loss that is not finite on one rank stops both."""
    _, cut = both(folder, "llama", torch.float32)
    for metric in ("grasp", "synflow"):
        refused(lambda m=metric: sc.find_mask(cut, batches(cut), m, BUDGET, peers=peers()), "stage 0 to 2")
    refused(lambda: sc.find_mask(cut, batches(cut), "gradient", BUDGET), "as many peers")
    refused(lambda: sc.find_mask(cut, batches(cut), "fisher", BUDGET, "body", peers=peers()), "untied linear layers")
    refused(lambda: sc.find_mask(cut, batches(cut), "fisher", BUDGET, peers=peers(), loss_fn=in_a_row), "untied linear layers")
    refused(lambda: sc.saliency_scores(cut, batches(cut)), "use find_mask")
    broken = batches(cut)
    broken[3]["labels"] = torch.full_like(broken[3]["labels"], -100)  # of rank 1
    refused(lambda: sc.find_mask(cut, broken, "gradient", BUDGET, peers=peers()), "the calibration loss must be finite, batch 3")


def in_a_row(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss; on rank 1 of all examples in one row, which cannot be told apart there."""
    given = {k: v.reshape(1, -1) for k, v in batch.items()} if RANKS.rank else batch
    return model(**given).loss  # type: ignore[no-any-return]


def refused(work: Callable[[], Any], words: str) -> None:
    try:
        work()
    except UserError as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"no refusal with {words!r}")


CHECKS = (loads, masks, forwards, gradients, adapters, refusals)
RANKS = Ranks()


def main() -> None:
    """Run all checks; one that fails ends the launch, since the ranks may have parted."""
    global RANKS
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=0)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    RANKS = engine.start(SECTION)
    for check in CHECKS:
        check(folder)
        RANKS.barrier()
        if RANKS.is_main:
            print(f"passed {check.__name__}", flush=True)
    engine.stop(RANKS)


if __name__ == "__main__":
    main()

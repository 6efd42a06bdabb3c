"""The adapter folder: what goes in comes out, base and restore to the bit, and nothing hostile reaches a weight."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import speft_core as sc
from speft_core.adapter_files import CONFIG_FILE, MAX_CONFIG_BYTES, WEIGHTS_FILE
from speft_core.writing import add_values

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class Classifier(nn.Module):
    """Two linear layers and a head; small enough to read, real enough for every path here."""

    def __init__(self, seed: int = 0, width: int = 24) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(16, width)
        self.second = nn.Linear(width, 16, bias=False)
        self.score = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.score(torch.tanh(self.second(torch.tanh(self.first(x)))))
        output = {"logits": logits}
        if labels is not None:
            output["loss"] = nn.functional.cross_entropy(logits, labels)
        return output


def batch(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"x": torch.randn(8, 16, generator=generator).to(dtype), "labels": torch.arange(8) % 3}


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def same_bits(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(t, before[n]) for n, t in after.items())


def trained(model: nn.Module, dtype: torch.dtype | None = None, **mask: Any) -> tuple[sc.SparseAdapter, torch.Tensor]:
    """An adapter of a few real steps on first, second and the head, and the logits that it gave while attached."""
    data = batch(next(model.parameters()).dtype)
    mask = {"budget": sc.Budget(density=0.1, of="targets"), "targets": ["first", "second"], **mask}
    tuner = sc.attach(model, sc.find_mask(model, [data], **mask), train_dense=["score"])
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2, eps=1e-4)  # an eps that fp16 heads can hold
    for _ in range(4):
        model(**data)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    adapter = tuner.adapter(dtype, base_model_name_or_path="tests/classifier")
    with torch.no_grad():
        logits = model(**data)["logits"]
    tuner.detach()
    return adapter, logits


@pytest.mark.parametrize("dtype", DTYPES)
def test_saved_loaded_applied_restored_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model = Classifier().to(dtype)
    before = bits(model)
    adapter, logits = trained(model)
    assert same_bits(model, before)
    adapter.save(tmp_path)
    loaded = sc.SparseAdapter.load(tmp_path)
    assert loaded.config == adapter.config
    assert loaded.nnz == adapter.nnz > 0
    assert {d.values_K.dtype for d in loaded.deltas.values()} == {dtype}
    for _ in range(100):
        with loaded.applied(model):
            assert not same_bits(model, before)
            with torch.no_grad():
                assert torch.equal(model(**batch(dtype))["logits"], logits)
        assert same_bits(model, before)


def test_values_in_bf16_on_fp32_weights_are_what_was_evaluated(tmp_path: Path) -> None:
    model = Classifier()
    adapter, logits = trained(model, torch.bfloat16)
    adapter.save(tmp_path)
    loaded = sc.SparseAdapter.load(tmp_path)
    assert {d.values_K.dtype for d in loaded.deltas.values()} == {torch.bfloat16}
    with loaded.applied(model), torch.no_grad():
        assert torch.equal(model(**batch())["logits"], logits)


def test_another_process_gets_the_same_logits(tmp_path: Path) -> None:
    model = Classifier()
    adapter, logits = trained(model)
    adapter.save(tmp_path)
    torch.save(logits, tmp_path / "logits.pt")
    code = (
        "import sys, torch, speft_core as sc; sys.path.insert(0, sys.argv[1]); torch.set_num_threads(1)\n"
        "from test_adapter import Classifier, batch\n"
        "model = Classifier(); folder = sys.argv[2]\n"
        "with sc.SparseAdapter.load(folder).applied(model), torch.no_grad():\n"
        "    assert torch.equal(model(**batch())['logits'], torch.load(folder + '/logits.pt'))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)], check=True, timeout=120)


@pytest.mark.parametrize("mode", ["exact", "bernoulli"])
def test_a_seeded_random_mask_stores_no_indices(tmp_path: Path, mode: str) -> None:
    model = Classifier()
    adapter, logits = trained(model, metric="random", seed=7, random_mode=mode)
    adapter.save(tmp_path)
    keys = safetensors.torch.load_file(tmp_path / WEIGHTS_FILE)
    assert not [k for k in keys if k.endswith(".gaps")]
    with sc.SparseAdapter.load(tmp_path).applied(model), torch.no_grad():
        assert torch.equal(model(**batch())["logits"], logits)


@pytest.mark.parametrize("mode", ["exact", "bernoulli"])
def test_indices_that_differ_from_the_seeded_draw_are_stored(tmp_path: Path, mode: str) -> None:
    model = Classifier()
    adapter, _ = trained(model, metric="random", seed=7, random_mode=mode)
    name = "first.weight"
    kept = adapter.deltas[name]
    adapter.deltas[name] = sc.SparseDelta(kept.indices_K[-2:], kept.values_K[-2:], kept.shape)
    adapter.save(tmp_path)
    assert torch.equal(sc.SparseAdapter.load(tmp_path).deltas[name].indices_K, kept.indices_K[-2:])


def test_another_base_is_refused_by_its_first_differing_tensor() -> None:
    adapter, _ = trained(Classifier())
    other = Classifier(seed=1)
    before = bits(other)
    with pytest.raises(sc.UserError, match=r"another base \(tests/classifier\).*first\.weight"):
        adapter.apply(other)
    with pytest.raises(sc.UserError, match=r"first\.weight has shape \(32, 16\)"):
        adapter.apply(Classifier(width=32))
    nudged = Classifier()
    with torch.no_grad():
        nudged.second.weight.view(-1)[int(adapter.deltas["second.weight"].indices_K[0])] += 1e-2
    with pytest.raises(sc.UserError, match=r"second\.weight"):
        adapter.apply(nudged)
    with pytest.raises(sc.UserError, match="no parameter"):
        adapter.apply(nn.Linear(2, 2))
    assert same_bits(other, before)
    with adapter.applied(other, check_base=False):
        assert not same_bits(other, before)


def test_a_base_that_agreed_is_compared_again_each_time() -> None:
    model = Classifier()
    adapter, _ = trained(model)
    before = bits(model)
    for _ in range(3):
        with adapter.applied(model):
            pass
    assert same_bits(model, before)
    delta = adapter.deltas["second.weight"]
    with torch.no_grad():
        model.second.weight.view(-1)[int(delta.indices_K[0])] += 1e-2
    with pytest.raises(sc.UserError, match=r"second\.weight"):
        adapter.apply(model)
    model.load_state_dict(before)
    # As libraries merge: a change that torch's version counter does not see.
    model.second.weight.data.view(-1)[int(delta.indices_K[0])] += 1e-2
    with pytest.raises(sc.UserError, match=r"second\.weight"):
        adapter.apply(model)
    model.load_state_dict(before)
    with adapter.applied(model):
        pass
    moved = dict(adapter.deltas)
    adapter.deltas["second.weight"] = sc.SparseDelta((delta.indices_K + 1) % delta.numel, delta.values_K, delta.shape)
    with pytest.raises(sc.UserError, match=r"second\.weight"):
        adapter.apply(model)
    adapter.deltas.update(moved)
    model.load_state_dict(Classifier(seed=1).state_dict())
    with pytest.raises(sc.UserError, match="another base"):
        adapter.apply(model)
    assert same_bits(model, bits(Classifier(seed=1)))


def test_what_passed_is_known_by_its_bits_and_its_record() -> None:
    model = Classifier()
    with torch.no_grad():
        model.second.weight.zero_()
    adapter, _ = trained(model)
    with adapter.applied(model):
        pass
    adapter.check_base(model)
    with torch.no_grad():
        model.second.weight.neg_()  # equal numbers, other bits
    with pytest.raises(sc.UserError, match=r"second\.weight"):
        adapter.apply(model)
    with torch.no_grad():
        model.second.weight.neg_()
    adapter.check_base(model)
    record = adapter.fingerprint["second.weight"]
    record["base_float32"] = record["base_float32"][::-1]
    with pytest.raises(sc.UserError, match=r"second\.weight"):
        adapter.apply(model)


@pytest.mark.parametrize(
    ("trained_in", "applied_in"),
    [
        (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float16),
        (torch.float16, torch.float32), (torch.bfloat16, torch.float16), (torch.float16, torch.float64),
    ],
)  # fmt: skip
def test_the_same_base_in_another_dtype_is_recognised(trained_in: torch.dtype, applied_in: torch.dtype) -> None:
    adapter, _ = trained(Classifier().to(trained_in))
    with adapter.applied(Classifier().to(trained_in).to(applied_in)):
        pass
    with pytest.raises(sc.UserError, match="another base"):
        adapter.apply(Classifier(seed=1).to(applied_in))


@pytest.mark.parametrize("applied_in", [torch.float16, torch.bfloat16])
def test_a_merged_adapter_is_recognised_by_its_sample(applied_in: torch.dtype) -> None:
    one, other = (trained(Classifier(), metric="random", seed=seed)[0] for seed in (0, 1))
    merged = sc.merge([one, other], method="sum", check_base=True)
    assert not any(key.startswith("base_") for f in merged.fingerprint.values() for key in f)
    with merged.applied(Classifier().to(applied_in)):
        pass
    with pytest.raises(sc.UserError, match="another base"):
        merged.apply(Classifier(seed=1).to(applied_in))


def test_what_one_16_bit_dtype_says_of_another_is_too_little() -> None:
    adapter, _ = trained(Classifier().to(torch.float16))
    with pytest.raises(sc.UserError, match=r"rounded to torch.bfloat16, load it in the dtype that the adapter was trained in"):
        adapter.apply(Classifier().to(torch.bfloat16))


def test_adapters_stack_and_come_off_in_reverse() -> None:
    model = Classifier()
    before = bits(model)
    adapter, _ = trained(model)
    below = adapter.apply(model)
    between = bits(model)
    above = adapter.apply(model, check_base=False)
    with pytest.raises(sc.UserError, match="reverse order"):
        below.restore()
    above.restore()
    assert same_bits(model, between)
    below.restore()
    below.restore()
    assert same_bits(model, before)


def test_apply_and_attach_exclude_each_other() -> None:
    model = Classifier()
    adapter, _ = trained(model)
    mask = sc.find_mask(model, metric="magnitude", targets=["first"])
    tuner = sc.attach(model, mask)
    with pytest.raises(sc.UserError, match="detach"):
        adapter.apply(model)
    tuner.detach()
    with adapter.applied(model), pytest.raises(sc.UserError, match="restore"):
        sc.attach(model, mask)


def test_restored_also_when_the_body_raises() -> None:
    model = Classifier()
    before = bits(model)
    adapter, _ = trained(model)
    with pytest.raises(ZeroDivisionError), adapter.applied(model):
        raise ZeroDivisionError
    assert same_bits(model, before)


def _edit_config(folder: Path, change: dict[str, Any]) -> None:
    record = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**record, **change}))


def _edit_tensor(folder: Path, key: str, tensor: torch.Tensor | None) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    tensors.pop(key, None)
    if tensor is not None:
        tensors[key] = tensor
    safetensors.torch.save_file(tensors, folder / WEIGHTS_FILE)


HOSTILE = {
    "no such folder": lambda d: [f.unlink() for f in d.iterdir()],
    "no weights": lambda d: (d / WEIGHTS_FILE).unlink(),
    "truncated weights": lambda d: (d / WEIGHTS_FILE).write_bytes((d / WEIGHTS_FILE).read_bytes()[:-100]),
    "not safetensors": lambda d: (d / WEIGHTS_FILE).write_bytes(b"\x80\x04 pickle"),
    "huge header": lambda d: (d / WEIGHTS_FILE).write_bytes(b"\xff" * 8 + b"{}"),
    "not JSON": lambda d: (d / CONFIG_FILE).write_text("{"),
    "nested JSON": lambda d: (d / CONFIG_FILE).write_text("[" * 100_000),
    "JSON of another kind": lambda d: (d / CONFIG_FILE).write_text("[]"),
    "PEFT's config": lambda d: (d / CONFIG_FILE).write_text('{"peft_type": "LORA"}'),
    "newer format": lambda d: _edit_config(d, {"format_version": 99}),
    "no tensors": lambda d: _edit_config(d, {"tensors": None}),
    "unlisted tensor": lambda d: _edit_tensor(d, "other.values", torch.ones(2)),
    "missing values": lambda d: _edit_tensor(d, "first.weight.values", None),
    "missing gaps": lambda d: _edit_tensor(d, "first.weight.gaps", None),
    "too few values": lambda d: _edit_tensor(d, "first.weight.values", torch.ones(2)),
    "NaN": lambda d: _edit_tensor(d, "second.weight.values", torch.full((38,), float("nan"))),
    "integers": lambda d: _edit_tensor(d, "second.weight.values", torch.ones(38, dtype=torch.int32)),
    "negative shape": lambda d: _edit_config(d, {"tensors": {"first.weight": {"shape": [-24, 16]}}}),
    "matrix of values": lambda d: _edit_tensor(d, "first.weight.values", torch.ones(2, 19)),
    "config too large": lambda d: (d / CONFIG_FILE).write_text(" " * (MAX_CONFIG_BYTES + 1)),
    "integer head": lambda d: _edit_tensor(d, "dense.score.bias", torch.ones(3, dtype=torch.int64)),
    "head not finite": lambda d: _edit_tensor(d, "dense.score.bias", torch.full((3,), float("inf"))),
    "sparse and dense": lambda d: _edit_tensor(d, "dense.first.weight", torch.ones(24, 16)),
    "small shape": lambda d: _edit_config(d, {"tensors": {"first.weight": {"shape": [2, 2]}}}),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_folders_get_one_line(tmp_path: Path, attack: str) -> None:
    adapter, _ = trained(Classifier())
    adapter.save(tmp_path)
    HOSTILE[attack](tmp_path)
    with pytest.raises(sc.UserError) as caught:
        sc.SparseAdapter.load(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_unknown_config_field_is_refused_with_the_nearest_name() -> None:
    model = Classifier()
    tuner = sc.attach(model, sc.find_mask(model, metric="magnitude", targets=["first"]))
    with pytest.raises(sc.UserError, match="Did you mean 'task_type'"):
        tuner.adapter(task_typ="CAUSAL_LM")
    tuner.detach()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_definition_of_an_adapted_entry(dtype: torch.dtype) -> None:
    base_K, values_K = torch.randn(20_000).to(dtype), (0.01 * torch.randn(20_000)).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(add_values(base_K, values_K), (base_K.to(wide) + values_K.to(wide)).to(dtype))

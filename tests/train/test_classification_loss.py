"""The loss of a classification: smoothed where it trains, the same in the mask as in training, in any dtype."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pico
import pico_tokenizers
import speft_core as sc
from speft_core.errors import UserError
from speft_train import classification, cli, config, masks, results, scoring
from speft_train.folder import RunFolder

KINDS = {"classes": ["no", "yes", "maybe"], "numbers": [0.25, 1.5, 2.75]}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = pico_tokenizers.byte_level()
    pico.bert(vocab_size=len(tokenizer), dtype=getattr(torch, request.param)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tree(model: Path, folder: Path, kind: str = "classes", /, **sections: Any) -> dict[str, Any]:
    rows = [{"text": "xyz"[place % 3] * (1 + place % 5), "label": KINDS[kind][place % 3]} for place in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "model": {"name": str(model), "task": "sequence_classification"},
        "data": {"train": str(folder / "rows.jsonl"), "validation_from_train": 5},
        "adapter": {"targets": ["query", "value"], "budget": {"k": 60}, "calibration_examples": 8},
        "train": {"global_batch_size": 4, "max_steps": 3, "learning_rate": 1e-2, "save_strategy": "no", "logging_steps": 1},
        "evaluate": {"base": False},
    }
    return {name: {**made.get(name, {}), **sections.get(name, {})} if name != "output_dir" else made[name] for name in made}


def run(tree: dict[str, Any], name: str = "run") -> dict[str, Any]:
    output = Path(tree["output_dir"]).with_name(name)
    file = output.with_suffix(".json")
    file.write_text(json.dumps({**tree, "output_dir": str(output)}))
    cli.execute(file, [], dry_run=False)
    return results.read(RunFolder(output))


def dtype_of(model: Path) -> torch.dtype:
    found: torch.dtype = getattr(torch, json.loads((model / "config.json").read_text())["dtype"])
    return found


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("metric", ["gradient", "fisher"])
def test_masks_score_the_loss_that_is_trained(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, metric: str
) -> None:
    """Also a regression in 16 bits; in fp32 the mask is that of the model's own loss."""
    (tmp_path / "run.json").write_text(json.dumps(tree(model, tmp_path, kind, adapter={"metric": metric})))
    seen: list[torch.dtype] = []
    given = classification.loss

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(args[0].logits.dtype)
        return given(*args, **kwargs)

    monkeypatch.setattr(classification, "loss", watched)
    found = mask_of(tmp_path, "found")
    assert found.nnz == 60 and set(seen) == {dtype_of(model)}
    if dtype_of(model) == torch.float32:
        monkeypatch.setattr(scoring, "loss_of", lambda run: None)
        assert mask_of(tmp_path, "own") == found


def mask_of(folder: Path, name: str) -> sc.SparsityMask:
    masks.find(folder / "run.json", [], folder / f"{name}.safetensors")
    return sc.SparsityMask.load(folder / f"{name}.safetensors")


def test_labels_are_smoothed_while_training_and_not_in_a_validation(model: Path, tmp_path: Path) -> None:
    train = {"eval_strategy": "epoch", "max_steps": 1, "learning_rate": 1e-12}
    plain, smoothed = (
        run(tree(model, tmp_path, train={**train, "label_smoothing_factor": factor}), name)
        for name, factor in (("plain", 0.0), ("smoothed", 0.4))
    )
    losses = [[row[key] for row in found["history"] if key in row] for key in ("loss", "eval_loss") for found in (plain, smoothed)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3) and losses[2] == pytest.approx(losses[3], rel=1e-6)
    logits_BO, labels_B = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 2, 1, 1])
    expected = torch.nn.functional.cross_entropy(logits_BO, labels_B, label_smoothing=0.4)
    assert classification.loss({"logits": logits_BO}, labels_B, smoothing=0.4).item() == pytest.approx(expected.item(), rel=1e-6)
    halves = sum(classification.loss({"logits": logits_BO[i : i + 2]}, labels_B[i : i + 2], 4, 0.4).item() for i in (0, 2))
    assert halves == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("data", [{"labels": "numbers"}, {}], ids=["told", "found"])
def test_a_regression_has_no_labels_to_smooth(model: Path, tmp_path: Path, data: dict[str, Any]) -> None:
    made = tree(model, tmp_path, "numbers", train={"label_smoothing_factor": 0.1}, data=data)
    with pytest.raises(UserError, match="train.label_smoothing_factor: a regression has no labels to smooth, remove it; got 0.1"):
        config.from_mapping(made) if data else run(made)
    assert not (tmp_path / "run/mask.safetensors").exists()


@pytest.mark.parametrize("method", ["sparse", "head"])
def test_the_configuration_that_ships_is_the_model_s_own(model: Path, tmp_path: Path, method: str) -> None:
    """The Trainer turns use_cache off, also where the model has none."""
    run(tree(model, tmp_path, adapter={"method": method}))
    theirs = json.loads((model / "config.json").read_text())
    ours = json.loads((tmp_path / "run/adapter/config.json").read_text())
    assert theirs["use_cache"] is True
    labels = ("id2label", "label2id", "problem_type", "transformers_version")
    assert {key: value for key, value in ours.items() if key not in labels} == {
        key: value for key, value in theirs.items() if key not in labels
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_validation_s_loss_is_that_of_its_own_examples(kind: str) -> None:
    """On several ranks the Trainer's mean counts those that fill up the last batch; what it gives the metrics has each once."""
    labels = torch.tensor([0, 2, 1] if kind == "classes" else KINDS["numbers"])
    outputs = torch.randn(3, 3 if kind == "classes" else 1)
    space = SimpleNamespace(is_regression=kind == "numbers")
    given = SimpleNamespace(predictions=outputs.numpy(), label_ids=labels.numpy())
    found = classification.trainer_metrics(space)(given)["loss"]  # type: ignore[arg-type]
    plain = torch.nn.functional.cross_entropy if kind == "classes" else lambda y, t: (y[:, 0] - t).square().mean()
    assert found == pytest.approx(plain(outputs, labels).item())

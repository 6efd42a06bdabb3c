"""Masks alone: what the adapter section asks of core reaches it, `speft-train mask`, and `speft-train inspect`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import speft_core as sc
from pico_run import make_config, make_model
from speft_core import UserError
from speft_train import cli, config, data, masks, models
from speft_train.folder import RunFolder

Find = Callable[..., sc.SparsityMask]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def find(tmp_path: Path, model: Path) -> Find:
    """The mask of a config, through the command's own function."""

    def of(*overrides: str, **adapter: Any) -> sc.SparsityMask:
        section = {"budget": {"k": 300}, "calibration_examples": 6, "calibration_batch_size": 4, **adapter}
        file = make_config(tmp_path / "a.yaml", model, tmp_path / "run", adapter=section)
        masks.find(file, list(overrides), tmp_path / "mask.safetensors")
        return sc.SparsityMask.load(tmp_path / "mask.safetensors")

    return of


def direct(folder: Path, model: Path, **settings: Any) -> sc.SparsityMask:
    """The same by core alone."""
    file = make_config(folder / "direct.yaml", model, folder / "direct", adapter={"budget": {"k": 300}})
    cfg = config.load_config(file)
    base, tokenizer = models.load_model(cfg)
    bundle = data.build(cfg, tokenizer)
    rows = [bundle.train[i] for i in data.calibration_rows(bundle.train, 6, 0)]
    batches = [bundle.collator(tokenizer)(rows[i : i + 4]) for i in (0, 4)]
    return sc.find_mask(base, batches, **{"budget": sc.Budget(k=300), **settings})


def best_by_cube(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """A metric of one's own, found by name."""
    return (weight * gradient).abs() ** 3


@pytest.mark.parametrize(
    ("adapter", "settings"),
    [
        ({"metric": "wanda"}, {"metric": "wanda"}),
        ({"metric": "absolute_gradient", "memory_limit": "5kB"}, {"metric": "absolute_gradient"}),
        ({"structure": "blocks:2"}, {"structure": "blocks:2"}),
        ({"min_per_layer": 4, "max_per_layer": 0.3}, {"min_per_layer": 4, "max_per_layer": 0.3}),
        ({"metric": "grasp", "grasp": {"sign": 1, "hessian": "finite"}}, {"metric": "grasp", "options": {"sign": 1, "hessian": "finite"}}),
        ({"scope": "local", "metric": "fisher", "targets": ["q_proj"]}, {"scope": "local", "metric": "fisher", "targets": ["q_proj"]}),
    ],
    ids=str,
)  # fmt: skip
def test_the_config_reaches_core(
    tmp_path: Path, model: Path, find: Find, adapter: dict[str, Any], settings: dict[str, Any]
) -> None:
    found = find(**adapter)
    assert found == direct(tmp_path, model, **settings)
    assert found.made["metric"] == settings.get("metric", "gradient")
    assert not (tmp_path / "run").exists(), "with --output the run's folder is not claimed"


def test_a_metric_of_ones_own_by_name(tmp_path: Path, model: Path, find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "my_scores.py").write_text("def cube(weight, gradient):\n    return (weight * gradient).abs() ** 3\n\nCOUNT = 3\n")
    monkeypatch.syspath_prepend(str(own))
    found = find(metric="my_scores:cube")
    assert found == direct(tmp_path, model, metric=best_by_cube) and found.made["metric"] == "cube"
    for name, words in [
        ("my_scores:cubed", "my_scores has no 'cubed'. Did you mean 'cube'?"),
        ("my_score:cube", "module my_score cannot be imported"),
        ("my_scores:COUNT", "must be a function of"),
    ]:
        with pytest.raises(UserError, match=words.replace("?", r"\?")):
            find(metric=name)


def test_weight_change_compares_with_a_tuned_model(tmp_path: Path, model: Path, find: Find) -> None:
    tuned = make_model(tmp_path / "tuned")
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(tuned)
    name = "model.layers.1.self_attn.v_proj.weight"
    with torch.no_grad():
        dict(other.named_parameters())[name].add_(1.0)
    other.save_pretrained(tuned)
    found = find(metric="weight_change", tuned_model=str(tuned), budget={"k": 20})
    assert found.nnz == 20 == found.indices[name].numel()
    with pytest.raises(UserError, match="does not exist"):
        find(metric="weight_change", tuned_model=str(tmp_path / "nowhere" / "at" / "all"))


def test_the_command_leaves_what_a_run_takes_up(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make_config(tmp_path / "a.yaml", model, tmp_path / "run", evaluate={"enabled": False})
    done = CliRunner().invoke(cli.app, ["mask", str(file), "train.max_steps=2"])
    assert done.exit_code == 0, done.output
    first = (tmp_path / "run/mask.safetensors").read_bytes()
    assert "density, % of the tensor" in done.output and "mask: " in done.output
    assert set(RunFolder(tmp_path / "run").records()) == {"load", "mask"}
    assert not (tmp_path / "run/adapter").exists()
    from speft_train import scoring

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "score", lambda run: pytest.fail("the mask was made anew"))
        cli.execute(file, ["train.max_steps=2"], dry_run=False)
    assert (tmp_path / "run/mask.safetensors").read_bytes() == first
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()
    shown = CliRunner().invoke(cli.app, ["inspect", str(tmp_path / "run"), str(tmp_path / "run/adapter")])
    assert shown.exit_code == 0 and "1.000" in shown.output  # the adapter changes the mask's entries


def test_the_command_refuses(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = make_config(tmp_path / "a.yaml", model, tmp_path / "run")
    assert CliRunner().invoke(cli.app, ["mask", str(file), "adapter.method=lora"]).exit_code == 2
    for arguments in (["mask", str(file), "--output", str(tmp_path)], ["inspect", str(tmp_path)], ["inspect", str(file)]):
        done = CliRunner().invoke(cli.app, arguments)
        assert done.exit_code == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    with pytest.raises(UserError, match="needs adapter.method sparse; got lora"):
        masks.find(file, ["adapter.method=lora"], None)


def made(**kept: list[int]) -> sc.SparsityMask:
    names = {"a": "model.layers.0.q_proj.weight", "b": "model.layers.10.q_proj.weight", "c": "model.norm.weight"}
    shapes = {"a": (4, 5), "b": (4, 5), "c": (10,)}
    indices = {names[n]: torch.tensor(sorted(i), dtype=torch.int32) for n, i in kept.items()}
    return sc.SparsityMask(indices, {names[n]: shapes[n] for n in kept}, {"metric": "gradient"})


def test_inspect_tells_densities_and_overlaps(tmp_path: Path) -> None:
    first, second = made(a=[0, 1, 2, 3], b=[], c=[9]), made(a=[2, 3, 4], b=[7])
    first.save(tmp_path / "one/mask.safetensors" if (tmp_path / "one").mkdir() else tmp_path / "one/mask.safetensors")
    second.save(tmp_path / "two.safetensors")
    console = Console(width=140, record=True)
    masks.inspect([tmp_path / "one", tmp_path / "two.safetensors"], tmp_path / "out", console)
    text = console.export_text()
    assert "k = 5 of 50 in 3 tensors (10.000%), 1 of them without any, metric gradient" in text
    rows = [line.split("│")[1:-1] for line in text.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert ["0", "20.00", "", "20.00"] in cells and ["10", "0.00", "", "0.00"] in cells and ["-", "", "10.00", "10.00"] in cells
    assert ["all", "10.00", "10.00", "10.00"] in cells
    assert ["one", "1.000", "0.400"] in cells and ["two", "0.500", "1.000"] in cells
    found = json.loads((tmp_path / "out/inspect.json").read_text())
    assert found["overlap"] == [[1.0, 0.4], [0.5, 1.0]] and found["masks"][0]["k"] == 5
    for name in ("density-one.png", "density-two.png", "overlap.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_masks_of_different_models_are_not_compared() -> None:
    other = sc.SparsityMask({"model.norm.weight": torch.tensor([1], dtype=torch.int32)}, {"model.norm.weight": (12,)})
    with pytest.raises(UserError, match="different models cannot be compared: model.norm.weight"):
        masks.overlaps([made(c=[1]), other])


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["runs/a/mask.safetensors"], ["mask"]),
        (["runs/a/mask.safetensors", "runs/b/mask.safetensors"], ["a", "b"]),
        (["r/a/mask.safetensors", "r/a/masks/step-1.safetensors"], ["mask", "masks/step-1"]),
        (["same.safetensors", "same.safetensors"], ["same.safetensors", "same.safetensors"]),
    ],
)
def test_short_names(names: list[str], short: list[str]) -> None:
    assert masks._short(names) == short


def test_activation_checkpointing_reaches_the_pass_and_leaves_nothing_behind(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, list[bool]]] = []
    watched_models: list[Any] = []
    inner = sc.find_mask

    def watched(base: Any, *args: Any, **kwargs: Any) -> sc.SparsityMask:
        calls: list[int] = []
        handle = base.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        found = inner(base, *args, **kwargs)
        handle.remove()
        watched_models.append(base)
        seen.append((len(calls), [bool(m._forward_hooks) for m in base.modules()]))
        return found

    monkeypatch.setattr(sc, "find_mask", watched)
    section = {"budget": {"k": 300}, "calibration_examples": 6, "calibration_batch_size": 4}
    found = []
    for on in (False, True):
        file = make_config(tmp_path / "a.yaml", model, tmp_path / "run", adapter=section, train={"activation_checkpointing": on})
        masks.find(file, [], tmp_path / "mask.safetensors")
        found.append(sc.SparsityMask.load(tmp_path / "mask.safetensors"))
        (tmp_path / "mask.safetensors").unlink()
    assert [calls for calls, _ in seen] == [2, 4] and not any(seen[1][1])  # two batches; each layer twice
    assert not any(getattr(m, "gradient_checkpointing", False) for m in watched_models[1].modules())
    assert all(torch.equal(found[0].indices[name], found[1].indices[name]) for name in found[0].names) and found[1].nnz == 300


def test_the_loss_during_training_is_evaluated_in_training_s_micro_batches(tmp_path: Path, model: Path) -> None:
    from speft_train import training_args
    from speft_train.ranks import Ranks

    for given, expected in (({"per_device_train_batch_size": 2}, 2), ({"per_device_eval_batch_size": 5}, 5)):
        file = make_config(tmp_path / "a.yaml", model, tmp_path / "run", train=given)
        assert training_args.build(config.load_config(file), Ranks(), tmp_path).per_device_eval_batch_size == expected

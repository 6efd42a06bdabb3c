"""`speft-train plan`: what is counted, how it is shared out, what fits; and the simulated step against a real one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, MixtralConfig, MixtralForCausalLM
from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled
from typer.testing import CliRunner

import speft_core as sc
from pico_run import SIZES, make_config, make_model
from speft_core import UserError
from speft_train import cli, config, label_rows, models, plan, planning
from speft_train.models import load_model
from speft_train.planning import ZERO_STAGES, Planner, Setting

LENGTH = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), hidden_size=64, intermediate_size=160)


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory, model: Path) -> config.RunConfig:
    folder = tmp_path_factory.mktemp("cfg")
    return config.load_config(make_config(folder / "c.yaml", model, folder / "run", adapter={"targets": "all-linear"}))


@pytest.fixture(scope="module")
def side(cfg: config.RunConfig) -> dict[str, Planner]:
    return {p.method: p for p in planning.planners(cfg, LENGTH)}


def kept_by_autograd(model: Any, loss: Any) -> int:
    """Bytes of distinct storages that forward keeps, parameters and buffers left out."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}
    held = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss()
    return sum(sizes.values())


@pytest.mark.parametrize("method", ["sparse", "full"])
def test_the_simulated_step_keeps_what_a_real_one_keeps(cfg: config.RunConfig, side: dict[str, Planner], method: str) -> None:
    """Within 5 %: a real mask keeps some columns of an input where the plan takes the whole of it."""
    model, _ = load_model(cfg)
    model.train()
    if method == "sparse":
        mask = sc.find_mask(model, metric="magnitude", budget=sc.Budget(k=side[method].k), targets="all-linear")
        sc.attach(model, mask)
    ids = torch.randint(3, model.config.vocab_size, (2, LENGTH))
    real = kept_by_autograd(model, lambda: label_rows.next_token_loss(model, model, {"input_ids": ids, "labels": ids}))
    assert side[method].step(2).kept == pytest.approx(real, rel=0.05)


def test_stages_share_out_what_they_say(side: dict[str, Planner]) -> None:
    setting = Setting(gpus=4, length=LENGTH, micro=2, accumulation=2)
    for planner in side.values():
        rows = {stage: planner.rows(stage, setting, 2) for stage in ZERO_STAGES}
        for stage, row in rows.items():
            assert row["weights"] == planner.weights // (4 if stage == 3 else 1)
            assert row["gradients"] == rows[0]["gradients"] // (4 if stage >= 2 else 1)
            assert row["kept activations"] == rows[0]["kept activations"] > 0
        assert rows[1]["optimizer"] == 12 * planner.k // 4
        assert planner.peak(2, setting, 2) <= planner.peak(1, setting, 2)
    assert side["sparse"].rows(0, setting, 2)["values"] == 4 * side["sparse"].k
    assert side["lora"].k <= side["sparse"].k < side["full"].k
    assert side["sparse"].step(2).kept < side["lora"].step(2).kept < side["full"].step(2).kept


def test_the_largest_micro_batch_is_the_last_that_fits(side: dict[str, Planner]) -> None:
    planner = side["sparse"]
    exact = planner.peak(0, Setting(length=LENGTH), 5)
    setting = Setting(length=LENGTH, memory=exact, headroom=0.0)
    assert planner.largest(0, setting) == 5
    assert planner.largest(0, replace(setting, memory=exact - 1)) == 4
    assert planner.largest(0, replace(setting, memory=1000)) == 0


def test_a_deep_model_is_planned_from_a_few_layers(cfg: config.RunConfig, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "deep", num_hidden_layers=14)
    deep = replace(cfg, model=replace(cfg.model, name=str(folder)))
    planner = Planner(deep, "sparse", LENGTH)
    quick, whole = planner.step(1), planning.simulate.step(planner.cfg, planner.what, 1, LENGTH)
    assert quick.kept == pytest.approx(whole.kept, rel=0.01) and quick.peak == pytest.approx(whole.peak, rel=0.01)


def test_the_command_prints_tables_and_touches_nothing(tmp_path: Path, model: Path) -> None:
    file = make_config(tmp_path / "c.yaml", model, tmp_path / "run")
    words = ["plan", str(file), "--gpus", "4", "--gpu-memory", "0.01", "--length", "32", "adapter.targets=all-linear"]
    found = CliRunner().invoke(cli.app, words)
    assert found.exit_code == 0, found.output
    for word in ("sparse: k =", "lora: k =", "full: k =", "kept activations", "saliency accumulators", "what fits"):
        assert word in found.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("words", "told"), [(["--gpus", "0"], "at least 1 GPU"), (["--gpu-memory", "-1"], "more than 0 GB")])
def test_mistakes_are_one_line(tmp_path: Path, model: Path, words: list[str], told: str, capsys: Any) -> None:
    file = make_config(tmp_path / "c.yaml", model, tmp_path / "run")
    assert CliRunner().invoke(cli.app, ["plan", str(file), *words]).exit_code == 2
    with pytest.raises(UserError, match=told):
        gpus, memory = (int(words[1]), 80.0) if words[0] == "--gpus" else (1, float(words[1]))
        planning.show(config.load_config(file), gpus, memory * 1e9, 32, None)  # type: ignore[arg-type]


def test_out_of_memory_names_a_smaller_micro_batch(cfg: config.RunConfig) -> None:
    assert planning.advice(cfg, 1, 1e12) == "train.per_device_train_batch_size=4 (now 8)"
    assert "activation_checkpointing" in str(planning.advice(cfg, 1, 1e3))


def test_advice_makes_no_model_in_shards(cfg: config.RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """While training at stage 3 transformers cuts up every model that it makes, with collectives that other ranks would have to join."""
    deepspeed = pytest.importorskip("deepspeed")
    monkeypatch.setattr(deepspeed.zero, "Init", lambda *args, **kwargs: pytest.fail("a model would be cut up"))
    known = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    stage3 = replace(cfg, deepspeed=replace(cfg.deepspeed, enabled=True, zero_stage=3))
    assert is_deepspeed_zero3_enabled()
    assert planning.advice(stage3, 2, 1e12) == "train.per_device_train_batch_size=2 (now 4)"
    assert known.is_zero3() and not is_deepspeed_zero3_enabled()


def test_a_planner_that_fails_is_told_as_a_model_that_cannot_be_planned(cfg: config.RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "meta_model", lambda cfg: 1 // 0)
    with pytest.raises(UserError, match="cannot be planned: ZeroDivisionError"):
        planning.advice(cfg, 1, 1e12)


def test_a_limit_on_the_accumulators_is_a_limit_in_the_plan(cfg: config.RunConfig, side: dict[str, Planner]) -> None:
    limited = Planner(replace(cfg, adapter=replace(cfg.adapter, memory_limit="1kB")), "sparse", LENGTH)
    one, own = Setting(length=LENGTH), side["sparse"]
    assert own.accumulators(0, one) == 4 * own.pool > 1000 and limited.accumulators(0, one) == 1000
    assert own.mask_peak(0, one) - limited.mask_peak(0, one) == own.accumulators(0, one) - 1000
    assert side["lora"].accumulators(0, one) == side["lora"].mask_peak(0, one) == 0
    tight = Setting(length=LENGTH, memory=own.weights + 1000)  # without a limit half of what is free
    assert own.accumulators(0, tight) == 500 and limited.accumulators(0, tight) == 1000


def test_the_mask_of_stage_3_needs_shares_and_one_layer(side: dict[str, Planner]) -> None:
    own, setting = side["sparse"], Setting(gpus=4, length=LENGTH)
    assert own.accumulators(3, setting) == own.pool and own.accumulators(2, setting) == 4 * own.pool
    saved = own.mask_peak(2, setting) - own.mask_peak(3, setting)
    assert saved == own.weights - own.weights // 4 + 3 * own.pool - (own.size + 8) * own.largest_target
    assert own.mask_peak(3, Setting(length=LENGTH)) == own.mask_peak(2, Setting(length=LENGTH))  # one rank has no shards


def test_activation_checkpointing_leaves_a_mask_more_room_but_for_a_whole_block_in_shards(cfg: config.RunConfig) -> None:
    cfg = replace(cfg, adapter=replace(cfg.adapter, calibration_batch_size=64))
    plain = Planner(replace(cfg, train={**cfg.train, "activation_checkpointing": False}), "sparse", LENGTH)
    again = Planner(replace(cfg, train={**cfg.train, "activation_checkpointing": True}), "sparse", LENGTH)
    four = Setting(gpus=4, length=LENGTH)
    saved = plain.mask_peak(2, four) - again.mask_peak(2, four)
    assert saved == plain.step(64, scores=True).peak - again.step(64, scores=True).peak > 0
    block = models.meta_model(cfg).model.layers[0]
    assert again.block == sum(p.numel() for p in block.parameters()) * again.size
    assert plain.mask_peak(3, four) - again.mask_peak(3, four) == saved - again.block


def test_the_dry_run_counts_as_the_plan_does(cfg: config.RunConfig, side: dict[str, Planner]) -> None:
    planner = side["sparse"]
    counted = dict(plan.memory_rows(cfg, models.meta_model(cfg), planner.k, planner.pool, 1))
    planned = planner.rows(0, Setting(length=LENGTH, micro=1, accumulation=2), 1)
    assert counted["indices and base entries"] == planned["indices"]
    assert all(counted[name] == planned[name] for name in ("weights", "gradients", "optimizer"))


def test_a_model_that_needs_data_is_one_line(
    tmp_path: Path, cfg: config.RunConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    """Experts are chosen by looking at the tokens, and their kernel wants bfloat16 where there is no data."""
    tree = dict(num_hidden_layers=1, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, vocab_size=260)
    MixtralForCausalLM(MixtralConfig(**{**SIZES, "num_attention_heads": 2, **tree})).save_pretrained(tmp_path / "m")
    experts = replace(cfg, model=replace(cfg.model, name=str(tmp_path / "m")))
    with pytest.raises(UserError, match="runs the model without data, which .* cannot do"):
        planning.show(experts, 1, 80e9, 32, Console(quiet=True))
    assert "Traceback" not in capfd.readouterr().err


def with_deepspeed(cfg: config.RunConfig, **fields: Any) -> config.RunConfig:
    return replace(cfg, deepspeed=replace(cfg.deepspeed, **fields))


def test_what_is_offloaded_is_not_on_the_gpu(cfg: config.RunConfig, side: dict[str, Planner]) -> None:
    four = Setting(gpus=4, length=LENGTH, accumulation=2)
    for method in planning.METHODS:
        plain = side[method]
        moved = Planner(with_deepspeed(cfg, offload_optimizer="cpu", offload_param="cpu", zero_stage=3), method, LENGTH)
        for stage in ZERO_STAGES:
            before, after = plain.rows(stage, four, 1), moved.rows(stage, four, 1)
            gone = {what for what in before if after[what] < before[what]}
            assert gone == {0: set(), 3: {"weights", "optimizer", *({"values"} if method != "full" else ())}}.get(stage, {"optimizer"})
            assert all(after[what] == 0 for what in gone) and plain.in_host_memory(stage, four) == 0
            assert plain.peak(stage, four, 1) - moved.peak(stage, four, 1) == moved.in_host_memory(stage, four)
        assert moved.rows(3, Setting(length=LENGTH), 1)["gathered weights"] > 0  # one GPU holds what it needs at the time
        if method == "sparse":
            assert plain.mask_peak(3, four) - moved.mask_peak(3, four) == plain.weights // 4
            assert plain.mask_peak(2, four) == moved.mask_peak(2, four)


def test_the_raw_deepspeed_config_sizes_the_buffers(cfg: config.RunConfig, side: dict[str, Planner]) -> None:
    raw = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 100, "stage3_max_live_parameters": 50.0}}
    planner, two = Planner(with_deepspeed(cfg, config=raw), "full", LENGTH), Setting(gpus=2, length=LENGTH)
    assert planner.rows(3, two, 1)["communication"] == 400 < side["full"].rows(3, two, 1)["communication"]
    assert planner.rows(3, two, 1)["gathered weights"] == 50 * planner.size < side["full"].rows(3, two, 1)["gathered weights"]
    auto = Planner(with_deepspeed(cfg, config={"zero_optimization": {"reduce_bucket_size": "auto"}}), "full", LENGTH)
    assert auto.rows(3, two, 1)["communication"] == 4 * 64**2


def test_the_tables_show_host_memory_where_something_is_offloaded(tmp_path: Path, model: Path) -> None:
    file = make_config(tmp_path / "c.yaml", model, tmp_path / "run")
    words = ["plan", str(file), "--gpus", "8", "--length", "32", "adapter.targets=all-linear"]
    assert "host memory" not in CliRunner().invoke(cli.app, words).output
    found = CliRunner().invoke(cli.app, [*words, "deepspeed.zero_stage=3", "deepspeed.offload_optimizer=cpu"])
    assert found.exit_code == 0 and "offloaded to host memory" in found.output


def test_the_dry_run_leaves_out_what_is_offloaded(cfg: config.RunConfig, side: dict[str, Planner]) -> None:
    planner = side["sparse"]
    moved = with_deepspeed(cfg, enabled=True, offload_optimizer="cpu", offload_param="cpu", zero_stage=3)
    counted = dict(plan.memory_rows(moved, models.meta_model(moved), planner.k, planner.pool, 2))
    assert counted["weights"] == counted["optimizer"] == 0
    assert counted["weights + saliency accumulators, before training"] == 4 * (planner.pool // 2)


def test_a_decoder_without_a_padding_token_is_planned_as_a_classifier(tmp_path: Path, cfg: config.RunConfig) -> None:
    fields = {**SIZES, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 260, "pad_token_id": None}
    LlamaConfig(**fields).save_pretrained(tmp_path / "m")
    classifier = replace(cfg, model=replace(cfg.model, name=str(tmp_path / "m"), task="sequence_classification"))
    assert models.load_model_config(classifier).pad_token_id is None
    planner = Planner(classifier, "sparse", LENGTH)
    assert planner.step(2).kept > planner.step(1).kept > 0

"""An attached model inside Transformers: Trainer, save_pretrained, best checkpoint, generate, with nothing but speft-core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import speft_core as sc

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")


def pico(tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2, vocab_size=64, tie_word_embeddings=tied))


IDS = torch.randint(0, 64, (16, 12), generator=torch.Generator().manual_seed(1))
ROWS = [{"input_ids": row, "labels": row} for row in IDS]
BATCH = {"input_ids": IDS, "labels": IDS}


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    usual: dict[str, Any] = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 5e-3, "report_to": []}
    return TrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, **{**usual, **more})


def attached(model: torch.nn.Module) -> sc.Tuner:
    return sc.attach(model, sc.find_mask(model, [BATCH], budget=sc.Budget(density=0.05, of="targets")))


def test_trainer_clips_steps_and_zeroes_the_values_as_an_own_loop_does(tmp_path: Path) -> None:
    model = pico()
    base = {k: v.clone() for k, v in model.state_dict().items()}
    tuner = attached(model)
    own = dict(lr=5e-3, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
    optimizer = torch.optim.AdamW(tuner.parameters(), **own)  # type: ignore[arg-type]
    for _ in range(6):
        model(**BATCH).loss.backward()
        torch.nn.utils.clip_grad_norm_(tuner.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    expected = {n: v.detach().clone() for n, v in tuner.values.items()}
    tuner.detach()
    tuner = attached(model)
    settings = arguments(
        tmp_path, per_device_train_batch_size=16, lr_scheduler_type="constant", max_grad_norm=0.5, save_strategy="no"
    )
    Trainer(model=model, args=settings, train_dataset=ROWS).train()
    for name, values_K in tuner.values.items():
        assert bool(values_K.any())
        torch.testing.assert_close(values_K.detach(), expected[name], rtol=1e-5, atol=1e-6)
    tuner.detach()
    assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items())


def test_save_pretrained_while_attached_writes_a_plain_merged_model(tmp_path: Path) -> None:
    model = pico()
    keys = list(model.state_dict())
    tuner = attached(model)
    Trainer(model=model, args=arguments(tmp_path / "t", save_strategy="no"), train_dataset=ROWS).train()
    adapter = tuner.adapter()
    with torch.no_grad():
        logits = model(IDS).logits
    model.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert list(plain.state_dict()) == keys
    with torch.no_grad():
        assert torch.equal(plain(IDS).logits, logits)
    tuner.detach()
    with adapter.applied(model), torch.no_grad():
        assert torch.equal(model(IDS).logits, logits)


def test_the_best_checkpoint_of_a_plain_trainer_becomes_the_values(tmp_path: Path) -> None:
    model = pico(tied=False)
    model.lm_head.weight.data *= 50  # logits that a wrong turn can spoil
    base = {k: v.clone() for k, v in model.state_dict().items()}
    tuner = attached(model)
    settings = arguments(
        tmp_path,
        learning_rate=2e-2,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the first checkpoint, not the last
    )
    trainer = Trainer(model=model, args=settings, train_dataset=ROWS, eval_dataset=ROWS)
    trainer.train()
    evaluations = [(e["eval_loss"], e["step"]) for e in trainer.state.log_history if "eval_loss" in e]
    best, _ = max(evaluations)
    assert best > evaluations[-1][0]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)
    tuner.detach()
    assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = pico().train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        tuner = attached(model)
        model(**BATCH).loss.backward()
        gradients.append({n: v.grad for n, v in tuner.values.items()})
    for name, plain in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], plain)
        assert bool(plain.any())


def test_generation_follows_the_values_after_each_step() -> None:
    model = pico(tied=False)
    tuner = attached(model)
    prompt = IDS[:2, :4]
    with torch.no_grad():
        before = model(prompt).logits
        for values_K in tuner.values.values():
            values_K.data.add_(0.5)  # as DeepSpeed writes: the version counter does not move
        assert torch.equal(model(prompt).logits, before)
        tuner.sync()
        after = model(prompt).logits
    assert not torch.equal(after, before)
    adapter = tuner.adapter()
    tuner.detach()
    with torch.no_grad():
        assert torch.equal(model(prompt).logits, before)
        with adapter.applied(model):
            assert torch.equal(model(prompt).logits, after)

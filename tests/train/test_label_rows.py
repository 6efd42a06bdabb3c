"""The loss from the labelled rows is the model's own loss, and so are its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pico
import speft_core as sc
from speft_train import label_rows

CAUSAL = ("llama", "opt", "gpt2")


def completion_batch(model: Any, rows: int = 3, length: int = 11) -> dict[str, torch.Tensor]:
    """Labels on answers of different lengths only; the last example has none."""
    batch = pico.batch(model, rows=rows, length=length)
    for row, start in enumerate([4, 7, length][:rows]):
        batch["labels"][row, :start] = -100
    return batch


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("items", [None, 17])
def test_loss_and_gradients_are_the_model_s_own(name: str, tied: bool, items: int | None) -> None:
    model = pico.MODELS[name](tied=tied)
    assert label_rows.supports(model) is None
    batch = completion_batch(model)
    extra = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    found = {}
    for way in ("whole", "rows"):
        model.zero_grad()
        if way == "whole":
            loss = model(**batch, **extra, use_cache=False).loss
        else:
            loss = label_rows.next_token_loss(model, model, batch, extra.get("num_items_in_batch"))
        loss.backward()
        found[way] = (loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert found["rows"][0] == pytest.approx(found["whole"][0], rel=1e-6)
    assert found["rows"][1].keys() == found["whole"][1].keys()
    for key, grad in found["whole"][1].items():
        assert torch.allclose(found["rows"][1][key], grad, rtol=1e-4, atol=1e-6), key


def test_the_head_sees_labelled_rows_only_and_no_hook_stays() -> None:
    model = pico.llama()
    batch = completion_batch(model)
    seen = []
    handle = model.lm_head.register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape))
    label_rows.next_token_loss(model, model, batch)
    handle.remove()
    labelled = int((batch["labels"][:, 1:] != -100).sum())
    assert [tuple(shape) for shape in seen] == [(1, labelled, pico.HIDDEN)]
    assert not model.lm_head._forward_pre_hooks
    assert model(**batch).logits.shape[:2] == batch["input_ids"].shape


def test_a_batch_without_labels_has_no_loss_and_no_error() -> None:
    model = pico.llama()
    batch = completion_batch(model)
    batch["labels"].fill_(-100)
    loss = label_rows.next_token_loss(model, model, batch, torch.tensor(5))
    assert loss.item() == 0.0
    loss.backward()


def test_it_works_on_an_attached_model_and_with_the_head_as_target() -> None:
    model = pico.llama(tied=False)
    mask = sc.find_mask(model, metric="random", budget=sc.Budget(k=60), targets=["lm_head", "q_proj"])
    tuner = sc.attach(model, mask)
    batch = completion_batch(model)
    grads = []
    for way in ("whole", "rows"):
        for p in tuner.parameters():
            p.grad = None
        loss = model(**batch, use_cache=False).loss if way == "whole" else label_rows.next_token_loss(model, model, batch)
        loss.backward()
        grads.append([p.grad.clone() for p in tuner.parameters() if p.grad is not None])
    assert len(grads[0]) == len(list(tuner.parameters()))
    for whole, rows in zip(*grads, strict=True):
        assert torch.allclose(whole, rows, rtol=1e-4, atol=1e-7)
    tuner.detach()


def test_bfloat16_models_get_a_float32_loss() -> None:
    model = pico.llama(dtype=torch.bfloat16)
    batch = completion_batch(model)
    loss = label_rows.next_token_loss(model, model, batch)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-6)


def test_models_without_a_next_token_loss_say_why() -> None:
    assert label_rows.supports(pico.bert()) is not None


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT uses the old name
def test_a_peft_model_is_looked_into() -> None:
    import peft

    model = pico.llama()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert label_rows.supports(adapted) is None
    batch = completion_batch(model)
    loss = label_rows.next_token_loss(adapted, label_rows.unwrap(adapted), batch)
    assert loss.item() == pytest.approx(adapted(**batch).loss.item(), rel=1e-6)

"""Classification and regression runs on pico models: heads, labels, methods, and what ships."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import pico
import pico_tokenizers
import speft_core as sc
from speft_core.errors import UserError
from speft_train import classification, cli, heads, models, results
from speft_train.attached import Attached
from speft_train.config import METRICS, RunConfig, from_mapping
from speft_train.config_names import METHODS as NAMES
from speft_train.data.labelled import encoder
from speft_train.data.labels import LabelSpace, label_space
from speft_train.folder import RunFolder
from speft_train.methods import METHODS

WORDS = {"good": ["fine", "great", "nice"], "bad": ["poor", "awful", "weak"]}


def sentences(count: int) -> list[dict[str, Any]]:
    """Rows whose label depends on one word."""
    rows = []
    for place in range(count):
        label = ("good", "bad")[place % 2]
        rows.append({"sentence1": f"item {place % 7}", "sentence2": WORDS[label][place % 3], "label": label})
    return rows


ROWS_OF_THREE_TO_ONE = [{"sentence1": "a", "sentence2": "b", "label": ("yes", "no")[place % 4 == 0]} for place in range(200)]
ROWS_OF_THREE_TO_ONE.sort(key=lambda row: row["label"], reverse=True)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pico encoder and pico decoders, with a tokenizer of a token a byte."""
    made = {}
    tokenizer = pico_tokenizers.byte_level()
    for name, model in (
        ("bert", pico.bert(vocab_size=len(tokenizer), max_position_embeddings=128)),
        ("llama", pico.llama(vocab_size=len(tokenizer), max_position_embeddings=128)),
        ("opt", pico.opt(vocab_size=len(tokenizer), max_position_embeddings=128)),
    ):
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    return made


def tree(model: Path, data: str, output: Path, /, **sections: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "output_dir": str(output),
        "model": {"name": str(model), "dtype": "float32", "task": "sequence_classification"},
        "data": {"train": data, "test": data, "max_length": 64},
        "adapter": {"budget": {"density": 0.1, "of": "targets"}, "calibration_examples": 8},
        "train": {
            "global_batch_size": 8, "per_device_train_batch_size": 8, "max_steps": 4, "learning_rate": 1e-2,
            "save_strategy": "no", "use_cpu": True, "report_to": "none",
        },
        "evaluate": {"batch_size": 16},
    }  # fmt: skip
    for name, section in sections.items():
        made[name] = {**made.get(name, {}), **section} if isinstance(section, dict) else section
    return made


def run(tree: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tree))
    cli.execute(config, [], dry_run=False)
    return results.read(RunFolder(tree["output_dir"]))


def loaded(tree: dict[str, Any], names: tuple[str, ...] = ("bad", "good")) -> tuple[RunConfig, Any]:
    cfg = from_mapping(tree)
    return cfg, models.load_model(cfg, LabelSpace(names))[0]


def test_the_names_of_metrics_and_methods_are_those_that_exist() -> None:
    assert set(METRICS) == set(sc.METRICS)
    assert set(NAMES) == set(METHODS)


def test_a_pair_classifier_learns_ships_its_labels_and_is_restored(folders: dict[str, Path], tmp_path: Path) -> None:
    data = write(tmp_path / "pairs.jsonl", sentences(40))
    settings = {"max_steps": 120}
    budget = {"budget": {"density": 0.5, "of": "targets"}}
    found = run(tree(folders["bert"], data, tmp_path / "run", train=settings, adapter=budget), tmp_path)
    assert found["adapted"]["accuracy"] >= 0.9 > found["base"]["accuracy"]
    assert {"accuracy", "f1", "matthews", "loss", "count"} <= set(found["adapted"])
    config = json.loads((tmp_path / "run/adapter/config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good"} and config["problem_type"] == "single_label_classification"
    model, tokenizer = classification.load_classifier(tmp_path / "run/adapter", str(folders["bert"]))
    right = 0
    for row in sentences(40):
        batch = tokenizer(f"{row['sentence1']}\n{row['sentence2']}", return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            right += model.config.id2label[int(model(**batch).logits.argmax())] == row["label"]
    assert right / 40 == pytest.approx(found["adapted"]["accuracy"])


def test_fractions_make_a_regression(folders: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"text": f"{'x' * (place % 9)}y", "score": (place % 9) / 4} for place in range(36)]
    data = write(tmp_path / "numbers.jsonl", rows)
    found = run(tree(folders["bert"], data, tmp_path / "run"), tmp_path)
    assert {"pearson", "spearman", "loss"} <= set(found["adapted"]) and "accuracy" not in found["adapted"]
    assert json.loads((tmp_path / "run/adapter/config.json").read_text())["problem_type"] == "regression"


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("train_head", [True, False])
def test_each_method_gives_the_base_back_bit_for_bit_and_ships_what_was_trained(
    folders: dict[str, Path], tmp_path: Path, method: str, train_head: bool
) -> None:
    adapter = {"method": method, "metric": "magnitude", "targets": ["query", "value"], "budget": {"like_lora_r": 3}}
    model_section = {"head": {"train": train_head}}
    cfg, model = loaded(tree(folders["bert"], "x.jsonl", tmp_path, adapter=adapter, model=model_section))
    if method == "head" and not train_head:
        with pytest.raises(UserError, match="needs a head to train"):
            METHODS[method].attach(model, cfg, None)
        return
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = {"input_ids": torch.randint(5, 200, (4, 9)), "labels": torch.tensor([0, 1, 1, 0])}
    mask = sc.find_mask(model, budget=sc.Budget(like_lora_r=3), targets=["query", "value"], metric="magnitude")
    attached: Attached = METHODS[method].attach(model, cfg, mask)
    head_before = heads.tensors(model if method not in ("lora", "pissa", "dora") else attached.model.get_base_model())
    optimizer = torch.optim.AdamW([p for p in attached.model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        attached.model(**batch).loss.backward()
        optimizer.step()
    attached.collect(True)(tmp_path / "adapter")
    attached.model.eval()
    trained = attached.model(input_ids=batch["input_ids"]).logits.detach()
    if method != "full":
        attached.detach()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not torch.allclose(model(input_ids=batch["input_ids"]).logits, trained, atol=1e-4)
    with METHODS[method].applied(model, cfg, tmp_path / "adapter", 1) as adapted:
        again = adapted(input_ids=batch["input_ids"]).logits
        assert torch.allclose(again, trained, atol=2e-5)
        moved = any(
            not torch.equal(value, head_before.get(name.replace("modules_to_save.default.", ""), value))
            for name, value in adapted.named_parameters()
            if "original_module" not in name
        )
    assert method in ("lora", "pissa", "dora") or moved == (train_head or method == "full")
    if method != "full":
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_methods_with_a_budget_train_equally_many(folders: dict[str, Path], tmp_path: Path) -> None:
    counts = {}
    for method in ("sparse", "lora", "pissa", "dora"):
        adapter = {"method": method, "targets": ["query", "value"], "budget": {"like_lora_r": 4}, "metric": "magnitude"}
        cfg, model = loaded(tree(folders["bert"], "x.jsonl", tmp_path, adapter=adapter))
        mask = sc.find_mask(model, budget=sc.Budget(like_lora_r=4), targets=["query", "value"], metric="magnitude")
        counts[method] = METHODS[method].attach(model, cfg, mask).trainable
    assert counts["sparse"] == counts["lora"] == counts["pissa"] >= counts["dora"] > counts["sparse"] // 2


def test_the_head_of_a_base_decoder_starts_with_the_papers_spread(folders: dict[str, Path], tmp_path: Path) -> None:
    names = tuple(f"class {place:02}" for place in range(60))
    _, model = loaded(tree(folders["llama"], "x.jsonl", tmp_path), names)
    assert model.score.bias is None and model.score.weight.shape == (60, 16)
    assert model.score.weight.std().item() == pytest.approx(0.06 / 16**0.5, rel=0.1)
    _, again = loaded(tree(folders["llama"], "x.jsonl", tmp_path), names)
    _, other = loaded(tree(folders["llama"], "x.jsonl", tmp_path, seed=1), names)
    assert torch.equal(model.score.weight, again.score.weight)
    assert not torch.equal(model.score.weight, other.score.weight)


def test_the_bias_of_an_encoders_head_may_start_at_the_labels(folders: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"sentence1": "a", "sentence2": "b", "label": label} for label in (1.5, 2.5, 5.0)]
    for labels, expected in ((rows, [3.0]), (ROWS_OF_THREE_TO_ONE, [0.25, 0.75])):
        section = {"head": {"bias": "labels"}}
        made = tree(folders["bert"], write(tmp_path / "rows.jsonl", labels), tmp_path)
        cfg = from_mapping({**made, "model": {**made["model"], **section}})
        space, _ = label_space(labels, "label", cfg.data, "rows.jsonl")
        model = models.load_model(cfg, space)[0]
        bias = model.classifier.bias.detach()
        assert (bias if space.is_regression else bias.softmax(0)).tolist() == pytest.approx(expected, abs=0.02)
    made = tree(folders["llama"], "x.jsonl", tmp_path)
    cfg = from_mapping({**made, "model": {**made["model"], "head": {"bias": "labels"}}})
    with pytest.raises(UserError, match="needs a head with a bias"):
        models.load_model(cfg, label_space(ROWS_OF_THREE_TO_ONE, "label", cfg.data, "rows.jsonl")[0])


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_answer_words_give_the_causal_models_own_logits_on_either_padding_side(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    section = {"head": {"words": {"bad": "N", "good": "Y"}}}
    cfg, model = loaded(tree(folders[name], "x.jsonl", tmp_path, model=section))
    causal = AutoModelForCausalLM.from_pretrained(folders[name]).eval()
    tokenizer = models.load_tokenizer(cfg)
    rows = tokenizer.convert_tokens_to_ids(["N", "Y"])
    texts = [tokenizer(text)["input_ids"] for text in ("a long text", "short")]
    wanted = torch.stack([causal(torch.tensor([ids])).logits[0, -1, rows] for ids in texts])
    assert torch.equal(model.get_input_embeddings().weight, causal.get_input_embeddings().weight)
    for left in (False, True):
        collate = classification.LabelledCollator(tokenizer.pad_token_id, left=left)
        found = classification.predict(model, [{"input_ids": ids, "labels": 0} for ids in texts], collate, 2)
        assert torch.allclose(torch.tensor(found), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"bad": "N"}, "word for every label"),
        ({"bad": "N", "good": "Yes"}, "one token"),
        ({"bad": "N", "good": "N"}, "different"),
    ],
)
def test_answer_words_that_cannot_be_used(
    folders: dict[str, Path], tmp_path: Path, words: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        loaded(tree(folders["llama"], "x.jsonl", tmp_path, model={"head": {"words": words}}))


def test_a_decoder_trains_sparsely_with_its_head(folders: dict[str, Path], tmp_path: Path) -> None:
    data = write(tmp_path / "pairs.jsonl", sentences(40))
    section = {"targets": "body", "metric": "random"}
    found = run(tree(folders["llama"], data, tmp_path / "run", adapter=section), tmp_path)
    adapter = sc.SparseAdapter.load(tmp_path / "run/adapter")
    assert set(adapter.dense) == {"score.weight"} and adapter.config.task_type == "SEQ_CLS"
    assert found["trainable_parameters"] == adapter.nnz + adapter.dense["score.weight"].numel()


@pytest.mark.parametrize(
    ("rows", "sections", "message"),
    [
        ([{"text": "a", "kind": "x"}], {}, "no column of a known name for label"),
        ([{"text": "a", "label": 1}], {"columns": {"text": "txt"}}, "no column 'txt'.*Did you mean 'text'"),
        ([{"text": "a", "label": 1}], {"columns": {"words": "text"}}, "roles text, text_pair, label; got 'words'"),
        ([{"text": "a", "label": 1}, {"text": "b", "label": 1}], {}, "at least two classes; it holds '1' alone"),
        ([{"text": "a", "label": 1}, {"text": "b", "label": None}], {}, "a label in every row; it is empty in row 2"),
        ([{"text": "a", "label": 0.5}, {"text": "b", "label": "x"}], {"labels": "numbers"}, "finite numbers; row 2 has 'x'"),
        ([{"text": "a", "label": 1}, {"text": "b", "label": 0}], {"instruction": "?"}, "must hold {text}"),
        ([{"text": ["a"], "label": 1}, {"text": "b", "label": 0}], {}, "must hold texts; row 1 has a list"),
        ([{"text": "a", "label": "y"}, {"text": "b", "label": "n"}], {"label_names": ["y", "m"]}, "row 2 has 'n'"),
    ],
)
def test_data_that_cannot_be_used_is_one_line(
    folders: dict[str, Path], tmp_path: Path, rows: list[dict[str, Any]], sections: dict[str, Any], message: str
) -> None:
    data = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=message) as caught:
        run(tree(folders["bert"], data, tmp_path / "run", data=sections), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_test_set_with_an_unseen_label_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    data = write(tmp_path / "train.jsonl", sentences(8))
    test = write(tmp_path / "test.jsonl", [*sentences(3), {"sentence1": "a", "sentence2": "b", "label": "god"}])
    with pytest.raises(UserError, match=r"test.jsonl: labels must be classes.*row 4 has 'god'. Did you mean 'good'"):
        run(tree(folders["bert"], data, tmp_path / "run", data={"test": test}), tmp_path)


def test_an_empty_text_and_a_rare_class_are_told_and_trained(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*sentences(20), {"sentence1": "", "sentence2": "fine", "label": "odd"}]
    data = write(tmp_path / "train.jsonl", rows)
    run(tree(folders["bert"], data, tmp_path / "run", train={"max_steps": 1}), tmp_path)
    shown = capsys.readouterr().out
    assert "one example alone of class odd" in shown and "an empty text in row 21" in shown
    assert "one example alone of class odd" in (tmp_path / "run/report.md").read_text()


def test_a_csv_and_json_lines_hold_the_same_classes(folders: dict[str, Path], tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [{"text": f"t {place}", "label": place % 3} for place in range(12)])
    test = tmp_path / "test.csv"
    test.write_text("text,label\na,2\nb,0\n")
    found = run(tree(folders["bert"], train, tmp_path / "run", data={"test": str(test)}), tmp_path)
    assert found["adapted"]["count"] == 2
    assert json.loads((tmp_path / "run/adapter/config.json").read_text())["id2label"] == {"0": "0", "1": "1", "2": "2"}


def test_long_training_examples_are_dropped_and_test_examples_cut(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": "x" * (100 if place == 3 else 9), "label": place % 2} for place in range(12)]
    data = write(tmp_path / "rows.jsonl", rows)
    found = run(tree(folders["bert"], data, tmp_path / "run", train={"max_steps": 1}), tmp_path)
    shown = " ".join(capsys.readouterr().out.split())
    assert "train: 11 examples" in shown and "1 dropped, longer than 64 tokens" in shown and "1 cut to 64 tokens" in shown
    assert found["adapted"]["count"] == 12


def test_a_long_text_is_cut_and_its_instruction_is_not(folders: dict[str, Path], tmp_path: Path) -> None:
    cfg, _ = loaded(tree(folders["llama"], "x.jsonl", tmp_path, data={"instruction": "Q {text} A?", "max_length": 20}))
    tokenizer = models.load_tokenizer(cfg)
    made = encoder(tokenizer, cfg.data)("w" * 50 + " {text_pair}", None)
    text = tokenizer.decode(made["input_ids"])
    assert made["overlong"] and len(made["input_ids"]) == 20 and text.startswith("Q www") and text.endswith("w A?")


def test_the_loss_of_a_step_does_not_depend_on_how_it_is_cut(folders: dict[str, Path], tmp_path: Path) -> None:
    data = write(tmp_path / "pairs.jsonl", sentences(24))
    losses = []
    for name, per_device in (("whole", 8), ("cut", 2)):
        train = {"per_device_train_batch_size": per_device, "logging_steps": 1, "max_steps": 3}
        made = tree(folders["llama"], data, tmp_path / name, train=train, evaluate={"enabled": False})
        losses.append([row["loss"] for row in run(made, tmp_path)["history"]])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) == 3


def test_more_tests_are_scored_beside_the_test_data(folders: dict[str, Path], tmp_path: Path) -> None:
    data, other = write(tmp_path / "pairs.jsonl", sentences(24)), write(tmp_path / "other.jsonl", sentences(7))
    made = tree(folders["bert"], data, tmp_path / "run", data={"more_tests": {"mismatched": other}})
    figures = run(made, tmp_path)["adapted"]
    alone = tree(folders["bert"], data, tmp_path / "alone", data={"test": other})
    expected = run(alone, tmp_path)["adapted"]
    assert figures["mismatched"]["count"] == 7 and figures["count"] != 7
    assert figures["mismatched"]["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    assert "accuracy, mismatched" in (tmp_path / "run/report.md").read_text()
    bad = tree(folders["bert"], data, tmp_path / "bad", data={"more_tests": {"validation": other, "accuracy": other}})
    with pytest.raises(UserError, match="none of the figures' and splits'; got accuracy, validation"):
        run(bad, tmp_path)


def test_early_stopping_ships_the_best_checkpoint(folders: dict[str, Path], tmp_path: Path) -> None:
    data = write(tmp_path / "pairs.jsonl", sentences(43))
    train = {
        "max_steps": 12, "learning_rate": 0.3, "eval_strategy": "steps", "eval_steps": 1,
        "save_strategy": "steps", "save_steps": 1,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "early_stopping_patience": 2, "logging_steps": 1,
    }  # fmt: skip
    made = tree(folders["bert"], data, tmp_path / "run", train=train, data={"test": None, "validation_from_train": 11})
    found = run(made, tmp_path)
    evaluated = [row["eval_loss"] for row in found["history"] if "eval_loss" in row]
    assert found["steps"] < 12 and len(evaluated) >= 3
    assert found["adapted"]["split"] == "validation" and found["adapted"]["count"] == 11
    assert found["adapted"]["loss"] == pytest.approx(min(evaluated), abs=1e-4)

"""Cards: what the Hub reads in them is right, what people wrote in them survives, nothing hostile gets through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCardData, parse_eval_result_entries

from hub.helpers import pico_adapter
from hub.loopback import LoopbackHub
from speft_core import SparseAdapter, UserError
from speft_hub import CardFields, Evaluation, parse, pull, push
from speft_hub.card import fenced, plain, render
from speft_hub.card_merge import _hash, merge_cards, take_apart
from speft_hub.combining import write_card
from speft_hub.evaluation import eval_results_yaml, model_index, read_results


def card_of(address: str, tmp_path: Path, name: str = "seen") -> str:
    return (pull(address, tmp_path / name, force=True).path / "README.md").read_text()


def edit_on_hub(address: str, change: Any) -> None:
    """What a person does in the editor of the site."""
    reference = parse(address)
    head = reference.registry.resolve(reference.repo, "main")
    old = b"".join(reference.registry.read(reference.repo, head, "README.md", 0)).decode()
    new = change(old)
    assert new != old
    reference.registry.commit(reference.repo, "main", head, {"README.md": new.encode()}, [], "edit the card")


def test_figures_of_validation_rows_are_named_so(tmp_path: Path) -> None:
    """As of a run without test data: the split, and the data where they are another source than train."""
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"base": {"loss": 2.0, "split": "validation"}, "adapted": {"loss": 1.0, "split": "validation"}}))
    for data, name in (("{train: tatsu-lab/alpaca}", "tatsu-lab/alpaca"), ("{train: a.jsonl, validation: /x/dev.jsonl}", "dev.jsonl")):
        (tmp_path / "training_config.yaml").write_text(f"data: {data}\n")
        assert read_results(path, tmp_path) == [Evaluation(dataset=name, metric="loss", value=1.0, base=2.0, split="validation")]


def test_what_the_hub_shows(hub: LoopbackHub, adapter_dir: Path, tmp_path: Path) -> None:
    (adapter_dir / "training_config.yaml").write_text("data: {test: stanfordnlp/sst2}\ntrain: {learning_rate: 4e-4}\n")
    (adapter_dir / "results.json").write_text(
        json.dumps({"base": {"accuracy": 0.5, "count": 10}, "adapted": {"accuracy": 0.9, "count": 10, "seconds": 3.0}})
    )
    fields = CardFields(license="Apache-2.0", language=("en", "no"), datasets=("stanfordnlp/sst2",), tags=("sentiment",))
    push(adapter_dir, "alice/sst2", fields=fields)
    text = card_of("alice/sst2", tmp_path)
    metadata = yaml.safe_load(text.split("---")[1])
    assert (
        metadata["library_name"] == "speft"
        and metadata["base_model"] == "acme/pico"
        and metadata["base_model_relation"] == "adapter"
    )
    assert (
        metadata["license"] == "apache-2.0"
        and metadata["language"] == ["en", "no"]
        and metadata["pipeline_tag"] == "text-classification"
    )
    assert metadata["datasets"] == ["stanfordnlp/sst2"] and metadata["metrics"] == ["accuracy"]
    assert metadata["tags"] == ["speft", "sparse", "sentiment", "base_model:adapter:acme/pico"]
    (result,) = ModelCardData(**metadata).eval_results  # the client's own reading of model-index
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("stanfordnlp/sst2", "accuracy", 0.9)
    (entry,) = parse_eval_result_entries(yaml.safe_load((tmp_path / "seen/.eval_results/speft.yaml").read_text()))
    assert (entry.dataset_id, entry.value) == ("stanfordnlp/sst2", 0.9)
    info = hub.repos["alice/sst2"].info(hub.repos["alice/sst2"].branches["main"], sizes=False)
    assert "base_model:adapter:acme/pico" in info["tags"] and "license:apache-2.0" in info["tags"]
    for piece in (
        "Base commit | " + "a" * 40,
        "learning_rate: 4e-4",
        "gradient, global scope; k = 40",
        "| Seed | 0 |",
        "density.svg",
        "| 0.5 | 0.9 |",
        "SparseAdapter.load(pull(",
        "speft-hub pull",
        "speft-hub export",
    ):
        assert piece in text, piece
    svg = (tmp_path / "seen/density.svg").read_text()
    assert svg.startswith("<svg") and svg.count("<rect") == 1 + 2


def test_figures_say_which_rows_and_task_they_are_of(adapter_dir: Path, tmp_path: Path) -> None:
    """A run without a test set is scored on validation rows, and a classifier generates no text."""
    address = f"file://{tmp_path}/registry/alice/sst2"
    (adapter_dir / "training_config.yaml").write_text("data: {train: /data/train.jsonl, validation: /data/held.jsonl}\n")
    adapted = {"accuracy": 0.9, "loss": 0.25, "count": 10, "tokens": 93, "split": "validation"}
    (adapter_dir / "results.json").write_text(json.dumps({"base": {"accuracy": 0.5, "split": "validation"}, "adapted": adapted}))
    push(adapter_dir, address)
    text = card_of(address, tmp_path)
    metadata = yaml.safe_load(text.split("---")[1])
    (result,) = metadata["model-index"][0]["results"]
    assert result["dataset"]["split"] == "validation" and result["dataset"]["name"] == "held.jsonl"
    assert result["task"] == {"type": "text-classification"} and metadata["metrics"] == ["accuracy", "loss"]
    assert "| held.jsonl | validation | accuracy | 0.5 | 0.9 |" in text and "tokens" not in text
    (adapter_dir / "training_config.yaml").write_text("data: {train: /data/train.jsonl, validation_from_train: 4}\n")
    (adapter_dir / "results.json").write_text(json.dumps({"base": {"accuracy": 0.5}, "adapted": adapted}))
    push(adapter_dir, address)
    text = card_of(address, tmp_path)
    assert "| train.jsonl | validation | accuracy |  | 0.9 |" in text, "a base scored on other rows is no comparison"


def test_a_persons_edits_survive_another_push(address: str, adapter_dir: Path, tmp_path: Path) -> None:
    push(adapter_dir, address, fields=CardFields(license="mit"))

    def change(card: str) -> str:
        card = card.replace("license: mit", "license: apache-2.0\nthumbnail: https://example.org/x.png")
        card = card.replace("# sst2: a sparse adapter for acme/pico", "# My sentiment adapter\n\nTrained on a rainy day.")
        card = card.replace("A sparse change to a frozen base model", "My own words about a frozen base model")
        start, end = card.index("<!-- speft:begin density"), card.index("<!-- speft:end density -->")
        return card[:start] + card[end + len("<!-- speft:end density -->") :] + "\n## Citation\n\nPlease cite me.\n"

    edit_on_hub(address, change)
    pico_adapter(seed=4, nnz=30).save(adapter_dir)
    for _ in range(3):
        push(adapter_dir, address)
    text = card_of(address, tmp_path)
    for kept in ("license: apache-2.0", "thumbnail:", "# My sentiment adapter", "rainy day", "My own words", "Please cite me."):
        assert text.count(kept) == 1, kept
    assert "speft:begin density" not in text and "![Density" not in text  # deleted stays deleted
    assert text.count("speft:begin load") == 1
    push(adapter_dir, address, fields=CardFields(license="cc-by-4.0"))  # said explicitly: wins
    assert "license: cc-by-4.0" in card_of(address, tmp_path)


def test_untouched_parts_are_renewed(address: str, adapter_dir: Path, tmp_path: Path) -> None:
    push(adapter_dir, address)
    assert "| Changed parameters | 40 of 288" in card_of(address, tmp_path)
    edit_on_hub(address, lambda card: card.replace("# sst2", "# SST-2"))
    pico_adapter(seed=4, nnz=30).save(adapter_dir)
    push(adapter_dir, address)
    text = card_of(address, tmp_path)
    assert "| Changed parameters | 60 of 288" in text and "40 of 288" not in text and "# SST-2" in text


def test_edits_in_the_folder_and_in_the_repository(address: str, adapter_dir: Path, tmp_path: Path) -> None:
    (adapter_dir / "README.md").write_text("---\nlicense: mit\n---\n\nHand-made card.\n")
    push(adapter_dir, address)
    text = card_of(address, tmp_path)
    assert (
        text.count("Hand-made card.") == 1
        and "license: mit" in text
        and "library_name: speft" in text
        and "speft:begin load" in text
    )
    edit_on_hub(address, lambda card: card.replace("Hand-made", "Machine-made"))
    with pytest.raises(UserError, match="--keep local or --keep hub"):
        push(adapter_dir, address)
    push(adapter_dir, address, card="hub")
    assert "Machine-made" in card_of(address, tmp_path)
    push(adapter_dir, address, card="local")
    assert "Hand-made" in card_of(address, tmp_path)
    pulled = pull(address, tmp_path / "mine").path
    (pulled / "README.md").write_text((pulled / "README.md").read_text().replace("Hand-made", "Twice-edited"))
    push(pulled, address)  # only the folder's was edited since it was generated
    assert "Twice-edited" in card_of(address, tmp_path)


def test_a_training_runs_draft_is_replaced_unless_edited(address: str, adapter_dir: Path, tmp_path: Path) -> None:
    draft = "---\nbase_model: bundled:smollm2-135m\nlicense: mit\n---\n\n# quickstart"
    (adapter_dir / "README.md").write_text(f"{draft}\n\n<!-- speft:draft {_hash(draft)} -->\n")
    push(adapter_dir, address)
    text = card_of(address, tmp_path)
    assert "quickstart" not in text and "bundled" not in text and "speft:begin summary" in text


def test_a_base_that_is_no_id_is_not_published_as_one(address: str, adapter_dir: Path, tmp_path: Path) -> None:
    text = (adapter_dir / "adapter_config.json").read_text().replace('"acme/pico"', '"bundled:smollm2-135m"')
    (adapter_dir / "adapter_config.json").write_text(text)
    (adapter_dir / "README.md").write_text("---\nbase_model: bundled:smollm2-135m\ntags: [mine]\n---\n\nHi.\n")
    push(adapter_dir, address)
    metadata = yaml.safe_load(card_of(address, tmp_path).split("---")[1])
    assert (
        "base_model" not in metadata
        and "base_model_relation" not in metadata
        and metadata["tags"] == ["mine", "speft", "sparse"]
    )


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"license": "aapche-2.0"}, "Did you mean 'apache-2.0'"),
        ({"license": "mit or gpl-3.0"}, "one SPDX id"),
        ({"license": "other"}, "--license-name"),
        ({"license": "LicenseRef-x"}, "SPDX"),
        ({"language": (False,)}, "ISO 639"),
        ({"language": ("english",)}, "ISO 639"),
        ({"pipeline_tag": "text-generator"}, "Did you mean 'text-generation'"),
        ({"datasets": ("/home/me/x.jsonl",)}, "id on the Hub"),
        ({"base_model": "../x"}, "id on the Hub"),
    ],
)
def test_metadata_that_the_hub_would_misread(adapter_dir: Path, address: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        push(adapter_dir, address, fields=CardFields(**fields))


@pytest.mark.parametrize(
    "licence", ["apache-2.0", "MIT", "gemma", "llama3.1", "openrail++", "CC-BY-NC-4.0", "GPL-3.0-only", "unknown"]
)
def test_licences_that_are_known(licence: str) -> None:
    CardFields(license=licence).check()
    CardFields(license="other", license_name="mine", license_link="LICENSE").check()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "0.9", None])
def test_figures_are_finite_numbers(value: Any) -> None:
    with pytest.raises(UserError, match="finite number"):
        Evaluation(dataset="x", metric="accuracy", value=value)


def test_figures_in_both_forms() -> None:
    figures = [
        Evaluation(dataset="a/b", metric="accuracy", value=0.5),
        Evaluation(dataset="a/b", metric="f1", value=0.25),
        Evaluation(dataset="local", metric="f1", value=1),
    ]
    (entry,) = model_index("x", figures)
    assert [len(r["metrics"]) for r in entry["results"]] == [2, 1]
    assert [e.value for e in parse_eval_result_entries(yaml.safe_load(eval_results_yaml(figures)))] == [0.5, 0.25]
    assert model_index("x", []) == [] and eval_results_yaml([]) == ""


def test_text_from_an_adapter_cannot_act_in_a_card(adapter_dir: Path) -> None:
    adapter = SparseAdapter.load(adapter_dir)
    nasty = "x |\n# y\n<script>alert(1)</script> <!-- speft:end summary --> [a](javascript:1) `"
    config = {
        **vars(adapter.config),
        "metric": nasty,
        "targets": [nasty],
        "extra": {"merge": {"method": nasty, "sources": [{"name": nasty, "nnz": 1}]}},
    }
    (adapter_dir / "training_config.yaml").write_text("x: |\n  ````\n  ```\n  <!-- speft:end training -->\n")
    hostile = SparseAdapter(adapter.deltas, adapter.dense, type(adapter.config)(**config), adapter.fingerprint)
    made = render(hostile, adapter_dir, "alice/x", CardFields())
    text = merge_cards(made, None, None)
    assert "<script>" not in text and "[a](javascript" not in text
    card = take_apart(text, "here")
    assert set(card.sections) == set(made.sections) and not card.edited()
    assert merge_cards(made, None, text) == text  # and it is stable
    assert "\n" not in plain(nasty) and fenced("````", "yaml").startswith("`````yaml")


@pytest.mark.parametrize("card", ["---\na: [\n---\n", "---\n- 1\n---\n", "---\n" + "[" * 5000 + "\n---\n"])
def test_a_card_with_broken_metadata_is_named(adapter_dir: Path, address: str, card: str) -> None:
    (adapter_dir / "README.md").write_text(card)
    with pytest.raises(UserError, match="metadata at the top of README.md"):
        push(adapter_dir, address)


def test_cards_in_a_folder(adapter_dir: Path) -> None:
    path = write_card(adapter_dir, "OWNER/adapter")
    path.write_text(path.read_text() + "\nMine.\n")
    assert "Mine." in write_card(adapter_dir, "OWNER/adapter").read_text()
    assert (adapter_dir / "density.svg").is_file()

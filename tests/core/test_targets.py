"""What `targets` means on each architecture."""

from __future__ import annotations

import pytest
from torch import nn

import pico
import speft_core as sc
from speft_core.targets import base_parameters, head_and_embedding_names, resolve_targets


def test_suffixes_names_and_regexes_agree() -> None:
    model = pico.llama()
    expected = [n for n, _ in model.named_parameters() if n.endswith(("q_proj.weight", "v_proj.weight"))]
    assert len(expected) == 4
    assert resolve_targets(model, ["v_proj", "q_proj"]) == expected
    assert resolve_targets(model, ["self_attn.q_proj", "v_proj.weight"]) == expected
    assert resolve_targets(model, r".*\.[qv]_proj\.weight") == expected
    assert resolve_targets(model, expected) == expected


def test_a_whole_name_means_that_parameter_alone() -> None:
    """Names of one model may be suffixes of its others: what attach trains is what a mask that changes chooses from."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    assert resolve_targets(model, ["0.weight"]) == ["0.weight"]
    assert resolve_targets(model, ["1.weight"]) == ["1.1.weight"], "no parameter has this name whole"


def test_a_module_means_its_weight_and_not_its_bias() -> None:
    assert all(n.endswith(".weight") for n in resolve_targets(pico.opt(), ["q_proj"]))
    assert all(n.endswith(".bias") for n in resolve_targets(pico.opt(), ["q_proj.bias"]))


def test_all_linear_leaves_out_heads_and_embeddings(pico_model) -> None:  # type: ignore[no-untyped-def]
    names = resolve_targets(pico_model, "all-linear")
    assert names
    assert not set(names) & head_and_embedding_names(pico_model)
    shapes = {n: p.dim() for n, p in base_parameters(pico_model).items()}
    assert all(shapes[n] == 2 for n in names)


def test_body_is_all_but_heads_and_embeddings(pico_model) -> None:  # type: ignore[no-untyped-def]
    body = set(resolve_targets(pico_model, "body"))
    outside = head_and_embedding_names(pico_model)
    assert outside
    assert body | outside == set(base_parameters(pico_model))
    assert not body & outside
    assert set(resolve_targets(pico_model, "all-linear")) < body


def test_order_is_the_models() -> None:
    model = pico.bert()
    assert resolve_targets(model, ["value", "query"]) == resolve_targets(model, ["query", "value"])


@pytest.mark.parametrize(
    ("targets", "rule"),
    [
        (["q_porj"], "matches no parameter"),
        ([], "at least one parameter"),
        (["("], "neither a name nor a regular"),
        (["q_proj", "zz"], "'zz'"),
    ],
)
def test_targets_that_match_nothing(targets: list[str], rule: str) -> None:
    with pytest.raises(sc.UserError, match=rule) as caught:
        resolve_targets(pico.llama(), targets)
    assert "\n" not in str(caught.value)


def test_values_of_a_tuner_are_no_targets() -> None:
    model = pico.llama()
    names = list(base_parameters(model))
    sc.attach(model, sc.find_mask(model, metric="magnitude", budget=sc.Budget(k=10)))
    assert list(base_parameters(model)) == names
    with pytest.raises(sc.UserError, match="matches no parameter"):
        resolve_targets(model, ["weight_values"])

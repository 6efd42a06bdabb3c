"""Which parameters of a model may be changed: names, suffixes, a regex, "all-linear" or "body"."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from .errors import UserError, nearest

Targets = str | Sequence[str]
WHOLE = "_speft_whole"  #: attribute of a module: which of its parameters have fp32 values for all their entries (whole_slots.py)


def parameter_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter, also where ZeRO-3 keeps only a shard of it (`ds_shape`)."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's own parameters by name, in module order, tied ones once, without the `values` that `attach` adds."""
    return {n: p for n, p in model.named_parameters() if not (n.endswith("_values") and _is_added(model, n))}


def _is_added(model: nn.Module, name: str) -> bool:
    """Whether `attach` made it: by what lies beside it, since an attribute of the parameter would not survive a deep copy."""
    module, _, attribute = name.removesuffix("_values").rpartition(".")
    owner = model.get_submodule(module)
    sparse = f"{attribute}_indices" in owner._buffers and f"{attribute}_base" in owner._buffers
    return sparse or attribute in owner.__dict__.get(WHOLE, ())


def check_reachable(model: nn.Module, names: Iterable[str]) -> None:
    """Raise UserError for a parameter of an RNN: its forward reads a list made when the module was, where nothing can stand in."""
    parameters, owners = base_parameters(model), owners_of(model)
    for name in names:
        for module, _ in owners.get(id(parameters.get(name)), ()):
            if isinstance(module, nn.RNNBase):
                raise UserError(f"{name}: the parameters of a {type(module).__name__} cannot be adapted; choose other targets")


def _is_linear(module: nn.Module) -> bool:
    # transformers.pytorch_utils.Conv1D (GPT-2) keeps `nf` and a transposed weight; core does not import transformers.
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def head_and_embedding_names(model: nn.Module) -> set[str]:
    """Names of the parameters of embeddings and of the head (the output embeddings, or a classification head).

    The head is what `get_output_embeddings()` returns, or every top-level module beside the base model
    (`base_model_prefix`) in a Transformers model with a task head.
    """
    owners: list[nn.Module] = [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None:
        owners.append(output)
    body = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    if isinstance(body, nn.Module) and body is not model:
        owners += [m for m in model.children() if m is not body]
    found = {id(p) for owner in owners for p in owner.parameters()}
    return {n for n, p in base_parameters(model).items() if id(p) in found}


def linear_weight_names(model: nn.Module) -> list[str]:
    """Weights of every Linear (and Conv1D) outside the head."""
    outside = head_and_embedding_names(model)
    linears = {id(m.weight) for m in model.modules() if _is_linear(m)}
    return [n for n, p in base_parameters(model).items() if id(p) in linears and n not in outside]


def _matches(name: str, pattern: str) -> bool:
    """Whether `pattern` is the parameter's name or its module's, a dotted suffix of either, or a regex that spans the name."""
    module = name.rpartition(".")[0]
    for full in (name, module):
        if full == pattern or full.endswith("." + pattern):
            # A module named without a parameter means its weight: "q_proj" is not its bias.
            return full == name or name.endswith(".weight") or not module
    return False


def _regex(pattern: str, names: Iterable[str]) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"targets: {pattern!r} is neither a name nor a regular expression ({error})") from None
    return [n for n in names if compiled.fullmatch(n)]


def resolve_targets(model: nn.Module, targets: Targets) -> list[str]:
    """The names of the parameters that `targets` means, in module order.

    `targets` is "all-linear" (weights of all linear layers but the head), "body" (every parameter but embeddings and head,
    as in SpaRTA), or one or several of: a parameter's whole name (that one alone), a module's name (its weight), a dotted suffix
    of either, a regex that matches whole parameter names. UserError when one of them matches nothing.
    """
    names = list(base_parameters(model))
    patterns = [targets] if isinstance(targets, str) else list(targets)
    if not patterns:
        raise UserError('targets must name at least one parameter, got none; try "all-linear" or ["q_proj", "v_proj"]')
    chosen: set[str] = set()
    for pattern in patterns:
        if pattern == "all-linear":
            found = linear_weight_names(model)
        elif pattern == "body":
            outside = head_and_embedding_names(model)
            found = [n for n in names if n not in outside]
        else:
            found = [pattern] if pattern in names else [n for n in names if _matches(n, pattern)] or _regex(pattern, names)
        if not found:
            suffixes = sorted({part for n in names for part in (n, n.rpartition(".")[0], *n.split(".")[-2:]) if part})
            some = ", ".join(
                sorted({n.split(".")[-2] for n in names if n.count(".") and not n.split(".")[-2].isdigit()})[:12]
            )
            raise UserError(
                f"targets: {pattern!r} matches no parameter.{nearest(pattern, suffixes)} The model has {some}"
            )
        chosen.update(found)
    check_reachable(model, chosen)
    return [n for n in names if n in chosen]


def owners_of(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """For each parameter (by id) the modules that hold it and under which attribute; tied parameters have several."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, attribute))
    return owners

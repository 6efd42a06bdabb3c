"""Config files and overrides, merged into one plain mapping. What the keys mean is not this file's business."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.basecontainer import get_yaml_loader  # 2.3 and 2.4 define it in different places
from omegaconf.errors import OmegaConfBaseException

from speft_core.errors import UserError

# Keys of which a layer sets one to mean "this and no other": setting it drops what the layers below set.
EXCLUSIVE = (("adapter", "budget", ("k", "density", "like_lora_r")),)


def read_layers(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The file, the files that its `base:` names below it, the overrides above it; interpolations resolved."""
    merged: Any = OmegaConf.create({})
    for layer in [*_file_layers(path, ()), _override_layer(overrides)]:
        try:
            _drop_exclusive(merged, layer)
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            raise UserError(f"{path}: layers do not fit together: {_one_line(error)}") from None
    outside = re.search(r"\$\{\s*(oc\.\w+)", OmegaConf.to_yaml(merged))
    if outside:  # the configuration is published with the adapter
        raise UserError(
            f"{path}: ${{{outside[1]}:...}} is refused, the environment stays out of a config; use ${{key}} or key=value"
        )
    try:
        tree = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: an interpolation cannot be resolved: {_one_line(error)}") from None
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def _file_layers(path: Path, above: tuple[Path, ...]) -> list[DictConfig]:
    """The layers of one file, lowest first."""
    resolved = path.resolve()
    if resolved in above:
        raise UserError(
            f"config files must not include each other in a circle: {' -> '.join(p.name for p in (*above, resolved))}"
        )
    content = _read_yaml(path)
    bases = content.pop("base", None)
    bases = [] if bases is None else [bases] if isinstance(bases, str) else bases
    if not OmegaConf.is_list(bases) and not isinstance(bases, list) or not all(isinstance(b, str) for b in bases):
        raise UserError(f"{path}: base must be a file name or a list of them; got {bases!r}")
    layers: list[DictConfig] = []
    for base in bases:
        layers += _file_layers(path.parent / base, (*above, resolved))
    return [*layers, content]


def _read_yaml(path: Path) -> DictConfig:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist") from None
    except IsADirectoryError:
        inside = path / "config.yaml"
        hint = f"; {inside} is the configuration of that run" if inside.is_file() else ", not a YAML file"
        raise UserError(f"config file {path} is a folder{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} cannot be read: {_one_line(error)}") from None
    try:
        content = read_value(text) if text.strip() else {}
        if isinstance(content, dict):
            return OmegaConf.create(content)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"config file {path} is not valid YAML: {_one_line(error)}") from None
    raise UserError(f"config file {path} must hold a mapping of keys to values; got {text.strip().splitlines()[0]!r}")


def read_value(text: str) -> Any:
    """What a piece of YAML says, by OmegaConf's rules; but 2:4 is text, and not 124 in YAML 1.1's base 60. yaml.YAMLError."""
    loader = get_yaml_loader()
    loader.add_constructor("tag:yaml.org,2002:int", _whole_number)
    return yaml.load(text, Loader=loader)


def _whole_number(loader: Any, node: yaml.ScalarNode) -> Any:
    return node.value if ":" in node.value else loader.construct_yaml_int(node)


def _override_layer(overrides: Sequence[str]) -> DictConfig:
    malformed = [item for item in overrides if "=" not in item or not item.split("=", 1)[0].strip()]
    if malformed:
        raise UserError(f"overrides must look like section.key=value; got {', '.join(map(repr, malformed))}")
    layer: Any = OmegaConf.create({})
    for item in overrides:
        name, _, value = item.partition("=")
        part: Any = OmegaConf.create({})
        try:
            OmegaConf.update(part, name, read_value(value))
            layer = OmegaConf.merge(layer, part)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"override {item!r} cannot be read: {_one_line(error)}") from None
    assert isinstance(layer, DictConfig)
    return layer


def _drop_exclusive(below: Any, layer: Any) -> None:
    for section, name, units in EXCLUSIVE:
        old, new = OmegaConf.select(below, f"{section}.{name}"), OmegaConf.select(layer, f"{section}.{name}")
        if OmegaConf.is_dict(old) and OmegaConf.is_dict(new) and any(new.get(unit) is not None for unit in units):
            for unit in units:
                old.pop(unit, None)


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return ", ".join(line for line in lines if line and not line.startswith(("full_key", "object_type")))

"""The labels of a classification: which classes there are, or that they are numbers; read from the data and checked."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from speft_core.errors import UserError, nearest

from ..config import DataConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SHOWN = 3
MANY_CLASSES = 1000  # more different labels than this are a column of another kind


@dataclass(frozen=True)
class LabelSpace:
    """The classes in the order of the head's outputs; none of them for a regression, which has one output."""

    names: tuple[str, ...] = ()
    #: an output each that predicts the training labels without looking: their mean, or the log of each class's share
    blind: tuple[float, ...] = field(default=(), compare=False)

    @property
    def is_regression(self) -> bool:
        return not self.names

    @property
    def outputs(self) -> int:
        """Outputs of the head."""
        return len(self.names) or 1

    def encode(self, value: Any) -> int | float:
        """A label of the data as the number that is learnt."""
        return as_number(value) if self.is_regression else self.names.index(label_text(value))

    def write(self, config: PretrainedConfig) -> None:
        """Put the labels into a model's configuration, from which `read` and transformers take them again."""
        config.num_labels = self.outputs
        names = self.names or ("LABEL_0",)
        config.id2label = dict(enumerate(names))
        config.label2id = {name: place for place, name in enumerate(names)}
        config.problem_type = "regression" if self.is_regression else "single_label_classification"

    @classmethod
    def read(cls, config: PretrainedConfig) -> LabelSpace:
        """What `write` wrote."""
        if config.problem_type == "regression":
            return cls()
        return cls(tuple(config.id2label[place] for place in range(config.num_labels)))


def label_text(value: Any) -> str:
    """A label as text, the same from JSON, CSV and the Hub: 1, 1.0 and "1" are one class."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def as_number(value: Any) -> float:
    """A label as a finite number; ValueError otherwise."""
    if isinstance(value, bool):
        raise ValueError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def label_space(
    rows: Sequence[Mapping[str, Any]], column: str, data: DataConfig, source: str, num_labels: int | None = None
) -> tuple[LabelSpace, list[str]]:
    """(labels of the training rows, warnings). UserError where no classification can be learnt from them."""
    values = [row.get(column) for row in rows]
    missing = [place for place, value in enumerate(values, start=1) if value is None or label_text(value) == ""]
    if missing:
        raise UserError(f"{source}: column {column} must hold a label in every row; it is empty in {_places(missing)}")
    if data.labels == "numbers" or (data.labels == "auto" and not data.label_names and _are_numbers(values)):
        if num_labels not in (None, 1):
            raise UserError(f"model.num_labels must be 1 for labels that are numbers; got {num_labels}")
        check_labels(rows, column, LabelSpace(), source)
        return LabelSpace(blind=(sum(map(as_number, values)) / len(values),)), []
    counts = Counter(map(label_text, values))
    names = tuple(data.label_names) or tuple(sorted(counts, key=_order))
    if len(set(names)) < len(names):
        raise UserError(f"data.label_names must differ from each other; got {', '.join(names)}")
    # Half an example more for each class, so that one without examples has a share too.
    total = sum(counts.values()) + len(names) / 2
    space = LabelSpace(names, tuple(math.log((counts.get(name, 0) + 0.5) / total) for name in names))
    check_labels(rows, column, space, source)
    if len(names) < 2:
        raise UserError(f"{source}: column {column} must hold at least two classes; it holds {names[0]!r} alone")
    if len(names) > MANY_CLASSES:
        raise UserError(
            f"{source}: column {column} holds {len(names):,} different labels, more than {MANY_CLASSES:,}:"
            " set data.columns.label, or data.labels=numbers"
        )
    if num_labels is not None and num_labels != len(names):
        raise UserError(f"model.num_labels must be the number of classes, {len(names)} in {source}; got {num_labels}")
    return space, _warnings(counts, names, column, source)


def check_labels(rows: Sequence[Mapping[str, Any]], column: str, space: LabelSpace, source: str) -> None:
    """Raise a UserError that names the first rows whose label cannot be used."""
    bad = []
    for place, row in enumerate(rows, start=1):
        try:
            space.encode(row.get(column))
        except (ValueError, TypeError):
            bad.append((place, row.get(column)))
    if not bad:
        return
    shown = ", ".join(f"row {place} has {value!r}" for place, value in bad[:SHOWN])
    more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    if space.is_regression:
        raise UserError(f"{source}: column {column} must hold finite numbers; {shown}{more}")
    known = ", ".join(space.names[:12]) + (", ..." if len(space.names) > 12 else "")
    hint = nearest(label_text(bad[0][1]), space.names)
    raise UserError(f"{source}: labels must be classes of the training data ({known}); {shown}{more}.{hint}".removesuffix("."))


def _warnings(counts: Mapping[str, int], names: Sequence[str], column: str, source: str) -> list[str]:
    rare = [name for name in names if counts.get(name, 0) == 1]
    absent = [name for name in names if not counts.get(name, 0)]
    said = []
    if rare:
        said.append(f"warning: {source} has one example alone of {_classes(rare)}; it will hardly be learnt")
    if absent:
        said.append(f"warning: {source} has no example of {_classes(absent)}, which data.label_names lists")
    if len(names) > 20 and 2 * len(names) > sum(counts.values()):
        said.append(f"warning: column {column} of {source} has {len(names)} classes in {sum(counts.values())} rows")
    return said


def _classes(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    return f"class{'es' * (len(names) > 1)} {shown}"


def _are_numbers(values: Sequence[Any]) -> bool:
    """Whether labels are numbers of which some are fractions; whole numbers are classes."""
    try:
        numbers = [as_number(value) for value in values]
    except (ValueError, TypeError):
        return False
    return any(not number.is_integer() for number in numbers)


def _order(name: str) -> tuple[int, float, str]:
    """Numbers by value and before words."""
    try:
        return (0, as_number(name), name)
    except ValueError:
        return (1, 0.0, name)


def _places(places: Sequence[int]) -> str:
    listed = ", ".join(map(str, places[:SHOWN]))
    more = f" and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
    return f"row{'s' * (len(places) > 1)} {listed}{more}"

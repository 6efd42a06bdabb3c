"""Publish, verify, merge and export sparse adapters: the Hugging Face Hub, a compatible endpoint, or a plain folder."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .addresses import Reference, parse
    from .card import CardFields
    from .evaluation import Evaluation
    from .pulling import Pulled, check_folder, pull
    from .pushing import Pushed, push
    from .registry import NotFound, StaleParent

__all__ = [
    "CardFields",
    "Evaluation",
    "NotFound",
    "Pulled",
    "Pushed",
    "Reference",
    "StaleParent",
    "check_folder",
    "parse",
    "pull",
    "push",
]

# Loaded when first asked for: PyTorch takes seconds, in which the command must be able to answer Ctrl-C.
_MODULES = {
    "addresses": ("Reference", "parse"),
    "card": ("CardFields",),
    "evaluation": ("Evaluation",),
    "pulling": ("Pulled", "check_folder", "pull"),
    "pushing": ("Pushed", "push"),
    "registry": ("NotFound", "StaleParent"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    if name in _MODULES:  # speft_hub.pulling after `import speft_hub`
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})

"""Evaluation of a model as it stands: exact match of generated answers, choices by likelihood, held-out loss."""

from .choices import choose
from .exact_match import generate_exact_match, references
from .generate import generate_greedy
from .loss import held_out_loss

__all__ = ["choose", "generate_exact_match", "generate_greedy", "held_out_loss", "references"]

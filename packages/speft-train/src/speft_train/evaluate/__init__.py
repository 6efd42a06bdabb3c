"""Evaluation of a model as it stands: exact match of generated answers, loss on held-out answers."""

from .exact_match import generate_exact_match
from .generate import generate_greedy
from .loss import held_out_loss

__all__ = ["generate_exact_match", "generate_greedy", "held_out_loss"]

"""Names that the configuration allows, kept apart from torch and transformers so that a misspelt one is told at once."""

from __future__ import annotations

# Rows of methods.METHODS.
METHODS = ("sparse", "lora", "pissa", "dora", "full", "head", "bitfit")
PEFT_METHODS = ("lora", "pissa", "dora")
# Rows of speft_core.METRICS.
METRICS = (
    *("gradient", "magnitude", "random", "snip", "force", "taylor_fo", "synflow", "grasp", "fisher"),
    *("absolute_gradient", "wanda"),
)
# Rows of speft_core.dynamic.POLICIES.
POLICIES = ("rescore", "grow_and_drop")
# speft_core.weight_change, which needs a second model.
WEIGHT_CHANGE = "weight_change"
# data.labels -> what a classification may measure: the loss, and rows of evaluate.metrics.
_CLASSES, _NUMBERS = ("accuracy", "f1", "matthews"), ("pearson", "spearman")
FIGURES = {
    "classes": ("loss", *_CLASSES),
    "numbers": ("loss", *_NUMBERS),
    "auto": ("loss", *_CLASSES, *_NUMBERS),
}
TASKS = ("causal_lm", "sequence_classification")
TEMPLATES = ("question_answer", "alpaca", "chat", "multiple_choice")
BUDGET_UNITS = ("k", "density", "like_lora_r")
PROBLEM_KINDS = ("add", "subtract", "multiply", "add_add", "add_subtract", "subtract_add", "multiply_add", "multiply_subtract")

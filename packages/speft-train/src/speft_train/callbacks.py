"""What happens around the Trainer's steps: progress, stopping on a signal or on a loss that is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from speft_core.errors import UserError

from .ranks import Ranks
from .signals import StopRequest

SHOWN = ("loss", "eval_loss", "learning_rate")
SHOWN_EXAMPLES = 8


class StopOnSignal(TrainerCallback):
    """Ends the loop after the step in which any rank got a signal; the Trainer then saves what is `unsaved`.

    What is due at an epoch's end is done there and nowhere else: the run that goes on comes to it.
    """

    def __init__(self, request: StopRequest, ranks: Ranks) -> None:
        self.request, self.ranks = request, ranks
        self.stopping = self.saved = False
        self.ends_here = False  #: whether the loop would have come to an epoch's end, or to its own, with this step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """All ranks agree, so that none saves alone, and that a signal which comes to one of them later changes nothing."""
        signum = self.ranks.max(self.request.signum or 0)
        if signum:
            self.request.note(signum)
            self.stopping = True
            self.ends_here = control.should_training_stop or float(state.epoch).is_integer()
            control.should_training_stop = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The loop comes here from the middle of an epoch too; the strategies have asked for what an end brings."""
        if self.stopping and not self.ends_here:
            control.should_log = control.should_evaluate = control.should_save = False

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """What the step will change is in no checkpoint."""
        self.saved = False

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Nor are its figures."""
        self.saved = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A checkpoint holds all."""
        self.saved = True

    @property
    def unsaved(self) -> bool:
        """Whether the run stops, and something of it is in no checkpoint."""
        return self.stopping and not self.saved


class FiniteLoss(TrainerCallback):
    """Ends the run at the first logged loss that is not finite, with the step and its examples: what follows would be noise.

    Looking at each step's loss would make the accelerator wait, so the steps since the last log are kept and looked at when
    the log's mean is not finite. scaled: whether the loss is scaled for fp16, where gradients that overflow now and then are part of the
    search for a scale: such a step is skipped and the scale halved.
    """

    def __init__(self, ranks: Ranks, examples_of: Callable[[int], list[int]], scaled: Callable[[], bool]) -> None:
        self.ranks, self.examples_of, self.scaled = ranks, examples_of, scaled
        self.recent: list[tuple[int, Any]] = []

    def seen(self, step: int, loss: Any) -> None:
        """The loss of one forward on this rank, as a tensor."""
        self.recent.append((step, loss))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """The Trainer has averaged the loss over ranks and over the steps since the last log: all ranks see the same.

        Figures of a validation are logged too, and the mean over all steps at the end.
        """
        told = ("loss", "train_loss") if self.scaled() else ("loss", "train_loss", "grad_norm")
        found = {name: logs[name] for name in told if logs and name in logs}
        if not found:
            return
        recent, self.recent = self.recent, []
        for name, value in found.items():
            if not isinstance(value, float) or math.isfinite(value):
                continue
            bad = min((step for step, loss in recent if not math.isfinite(float(loss.mean()))), default=None)
            steps = [step for step in self.ranks.gather(bad) if step is not None]
            step = min(steps, default=state.global_step)
            examples = self.examples_of(step)
            listed = ", ".join(map(str, examples[:SHOWN_EXAMPLES])) + (", ..." if len(examples) > SHOWN_EXAMPLES else "")
            raise UserError(
                f"{name} is {value} at step {step} of {state.max_steps} (training examples {listed}); lower train.learning_rate"
                f" (now {args.learning_rate:g}), set train.max_grad_norm, or train in float32 (model.dtype=float32)"
            )


class Lines(TrainerCallback):
    """The figures of each log as a line, where no bar can be drawn."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """The end of training is logged too, with other figures."""
        shown = [f"{name} {value:.4g}" for name, value in (logs or {}).items() if name in SHOWN]
        if shown:
            self.say(f"  step {state.global_step}/{state.max_steps}: {', '.join(shown)}")


class Progress(TrainerCallback):
    """One bar over the steps, with the loss beside it."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A resumed run starts where it was."""
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", unit="step", dynamic_ncols=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One step further."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """The newest figures."""
        shown = {name: f"{value:.4g}" for name, value in (logs or {}).items() if name in SHOWN}
        if self.bar is not None and shown:
            self.bar.set_postfix(shown)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The bar stays, full."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

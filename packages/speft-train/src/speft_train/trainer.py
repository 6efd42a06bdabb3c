"""transformers.Trainer, with the parts that sparse training on DeepSpeed needs different.

Everything else (loop, schedule, scaling of the loss by tokens over ranks and accumulation, RNG, logging) is the
Trainer's. The overridden methods whose names start with an underscore are private to transformers:
tests/train/test_canaries.py fails when they change.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerControl, TrainingArguments

import speft_core as sc

from . import callbacks, checkpoints, engine, label_rows, shards
from .ranks import Ranks
from .sampler import GlobalBatches


class RunTrainer(Trainer):
    """A Trainer whose checkpoints hold no frozen weight and whose batches do not depend on the number of processes.

    global_batch: examples of one optimizer step over all processes. lengths: tokens of each training example.
    stop: what ends the run on a signal. keep: checkpoints that stay, beside the best one; None for all.
    dynamic: what changes the mask, if it changes. own_decay: name of a parameter -> a weight decay other than the rest's.
    contents: what the files that it trains on hold, for the checkpoints.
    """

    control: TrainerControl

    def __init__(
        self,
        *,
        ranks: Ranks,
        global_batch: int,
        lengths: Sequence[int],
        stop: callbacks.StopOnSignal,
        keep: int | None = None,
        dynamic: sc.DynamicMask | None = None,
        own_decay: Mapping[str, float] | None = None,
        contents: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.ranks, self.dynamic, self.own_decay = ranks, dynamic, dict(own_decay or {})
        self.stop, self.keep, self.contents = stop, keep, dict(contents or {})
        args: TrainingArguments = self.args
        # The Trainer's own rotation knows nothing of markers; at the end of the loop it would remove the checkpoint of a stop.
        assert args.save_total_limit is None
        strategy = args.train_sampling_strategy
        self.order = GlobalBatches(
            len(lengths),
            global_batch,
            args.data_seed if args.data_seed is not None else args.seed,
            lengths if strategy == "group_by_length" else None,
            shuffle=strategy != "sequential",
        )
        self.whole_logits = self.own_loss = label_rows.supports(self.model)
        if self.label_smoother is not None or not self.model_accepts_loss_kwargs:
            self.whole_logits = "the loss is not the model's own"
        self.warm_start: str | None = None
        self.finite = callbacks.FiniteLoss(ranks, self.order.examples_of, self._scales_the_loss)
        self.held_out: list[tuple[torch.Tensor, torch.Tensor]] = []  # (mean loss, labelled tokens) of each batch of a validation
        self.add_callback(self.finite)
        self.add_callback(self.stop)  # after the Trainer's own, which asks for what the strategies say

    # Data ---------------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> GlobalBatches:
        return self.order

    def _run_epoch(self, *, epoch: int, model: Any, trial: Any, **kwargs: Any) -> None:
        self.order.set_epoch(epoch)  # a resumed loader is wrapped too deep for the Trainer to reach the sampler
        super()._run_epoch(epoch=epoch, model=model, trial=trial, **kwargs)
        if self.stop.unsaved:
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Every validation example, also those that do not fill a batch."""
        drop, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop

    def prediction_step(self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """The loss of a causal model is kept with the number of its tokens: batches do not count alike."""
        if self.compute_loss_func is not None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        labels_BT = inputs["labels"].clone()
        # The last batch of all ranks is filled up with examples that were there before.
        known = len(self.accelerator.gather_for_metrics(torch.ones(len(labels_BT), device=labels_BT.device)))
        labels_BT[max(0, known - self.ranks.rank * len(labels_BT)) :] = label_rows.IGNORED
        inputs = {**inputs, "labels": labels_BT}
        with torch.no_grad(), self.compute_loss_context_manager():
            if self.own_loss is None:
                loss = label_rows.next_token_loss(model, label_rows.unwrap(self.model), inputs)
            else:
                loss = model(**inputs)["loss"]
        self.held_out.append((loss, (labels_BT[:, 1:] != label_rows.IGNORED).sum()))
        return loss, None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Its loss of a causal model is that of evaluate.held_out_loss: the mean over all labelled tokens of all batches and ranks."""
        self.held_out.clear()
        made = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.compute_loss_func is None:
            mine = [(float(loss), int(tokens)) for loss, tokens in self.held_out]
            sums = self.ranks.gather((sum(loss * tokens for loss, tokens in mine if tokens), sum(tokens for _, tokens in mine)))
            total, tokens = (sum(part) for part in zip(*sums, strict=True))
            made.metrics[f"{metric_key_prefix}_loss"] = total / tokens if tokens else math.nan
        return made

    # Optimizer ----------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> Any:
        """The Trainer's, in which some parameters have a weight decay of their own."""
        fresh, optimizer = self.optimizer is None, super().create_optimizer(model)
        named = dict((self.model if model is None else model).named_parameters())
        for name, decay in self.own_decay.items() if fresh else ():
            for group in list(optimizer.param_groups):
                if any(p is named[name] for p in group["params"]) and group["weight_decay"] != decay:
                    group["params"] = [p for p in group["params"] if p is not named[name]]
                    rest = {key: value for key, value in group.items() if key != "params"}
                    optimizer.add_param_group({**rest, "params": [named[name]], "weight_decay": decay})
        if self.is_deepspeed_enabled and self._made_by()["zero_stage"] in (1, 2):
            _by_dtype(optimizer)
        return optimizer

    # Loss ---------------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's loss; where the model allows it, from the labelled rows alone."""
        if self.whole_logits is not None or "labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = label_rows.next_token_loss(model, label_rows.unwrap(self.model), inputs, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return (loss, {"loss": loss}) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """One forward and backward; its loss is kept until the next log."""
        loss = super().training_step(*args, **kwargs)
        self.finite.seen(self.state.global_step + 1, loss.detach())
        return loss

    def _scales_the_loss(self) -> bool:
        """Whether gradients are searched for a scale at which fp16 holds them, here or in DeepSpeed."""
        return getattr(self.accelerator, "scaler", None) is not None or self.accelerator.mixed_precision == "fp16"

    # Checkpoints --------------------------------------------------------------------------------------------------

    def _made_by(self) -> dict[str, Any]:
        """The setup that can load the optimizer's state of a checkpoint."""
        if not self.is_deepspeed_enabled:
            return {"engine": "torch"}
        return {
            "engine": "deepspeed",
            "zero_stage": self.accelerator.state.deepspeed_plugin.zero_stage,
            "world_size": self.ranks.world,
        }

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"{checkpoints.PREFIX}{self.state.global_step}"
        if self.ranks.is_main:
            checkpoints.unmark(folder)
        super()._save_checkpoint(model, trial)
        self.ranks.barrier()
        if self.ranks.is_main:
            plan = {checkpoints.BATCH: self.order.batch, checkpoints.STEPS: self.state.max_steps}
            read = {checkpoints.FILES: self.contents} if self.contents else {}
            checkpoints.mark_complete(folder, {**self._made_by(), **plan, **read})
            checkpoints.rotate(folder.parent, self.keep, self.state.best_model_checkpoint)
        self.ranks.barrier()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained, from rank 0."""
        folder = Path(output_dir or self.args.output_dir)
        state = shards.collected(checkpoints.trainable(self.model), self.args.should_save)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            checkpoints.save_trainable(state, folder)
            if self.dynamic is not None:
                checkpoints.save_dynamic(self.dynamic, folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        engine.save_optimizer(self.model_wrapped, output_dir)
        if self.args.should_save and not _is_deepspeeds(self.lr_scheduler):
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model = self.model if model is None else model
        checkpoints.load(model, Path(resume_from_checkpoint), self.dynamic)

    def _init_training_state(self, max_steps: int, *args: Any) -> Any:
        found = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)  # a checkpoint's state has the intervals of the start that wrote it
        return found

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if resume_from_checkpoint is not None and self.is_deepspeed_enabled:
            self._load_from_checkpoint(resume_from_checkpoint)  # before DeepSpeed flattens the values
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is None:
            return prepared
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        if self.warm_start is None and getattr(self.accelerator, "scaler", None) is not None:
            self._load_scaler(resume_from_checkpoint)
        return prepared

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        assert checkpoint is not None
        folder = Path(checkpoint)
        theirs, ours = checkpoints.made_by(folder), self._made_by()
        if theirs == ours and self.is_deepspeed_enabled:
            engine.load_optimizer(self.model_wrapped, checkpoint)
        elif theirs == ours:
            state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
            self.optimizer.load_state_dict(state)
        else:
            self.warm_start = f"{folder.name} was made by {_words(theirs)}, this run is {_words(ours)}"
        if _is_deepspeeds(self.lr_scheduler):
            return  # DeepSpeed keeps the state of its own ones
        state = torch.load(folder / "scheduler.pt", weights_only=True)
        if self.warm_start is None or not isinstance(self.lr_scheduler, torch.optim.lr_scheduler.LambdaLR):
            self.lr_scheduler.load_state_dict(state)
            return
        with warnings.catch_warnings():  # the state counts the parameter groups of its own setup; walk there instead
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
            for _ in range(state["last_epoch"]):
                self.lr_scheduler.step()

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def _by_dtype(optimizer: Any) -> None:
    """No group of parameters has two dtypes, and the widest comes first.

    Stages 1 and 2 lay the parameters of a group into one buffer, which would make them all float32, and reduce all gradients
    in the dtype of the first group.
    """
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        for dtype in dict.fromkeys(p.dtype for p in group["params"]):
            groups.append({**group, "params": [p for p in group["params"] if p.dtype == dtype]})
    optimizer.param_groups[:] = sorted(groups, key=lambda group: -group["params"][0].element_size())


def _words(made_by: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in made_by.items()) or "an unknown setup"


def _is_deepspeeds(scheduler: Any) -> bool:
    """Whether DeepSpeed made this scheduler. By name: accelerate has the class only where DeepSpeed is installed."""
    return any(kind.__name__ == "DeepSpeedSchedulerWrapper" for kind in type(scheduler).__mro__)

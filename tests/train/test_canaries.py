"""What the run side relies on inside transformers, accelerate and DeepSpeed, and no documentation promises.

When one of these fails after an upgrade, read trainer.py and engine.py beside the new source before touching the canary.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
from transformers import Trainer

from speft_train.trainer import RunTrainer

# Private methods of Trainer that RunTrainer overrides -> parameters with which the Trainer calls them.
OVERRIDDEN = {
    "_get_train_sampler": ["self", "train_dataset"],
    "_run_epoch": [
        *("self", "model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch", "trial"),
        *("ignore_keys_for_eval", "start_time", "resume_from_checkpoint", "epochs_trained"),
        "steps_trained_in_current_epoch",
    ],
    "_save_checkpoint": ["self", "model", "trial"],
    "_save_optimizer_and_scheduler": ["self", "output_dir"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_prepare_for_training": ["self", "max_steps", "train_dataloader", "resume_from_checkpoint"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_load_best_model": ["self"],
    "_init_training_state": [
        *("self", "max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial")
    ],
}
# Method -> what its source must say for our override to be enough.
SAYS = {
    "train": [r"self\._load_from_checkpoint\(resume_from_checkpoint\)", r"not self\.is_deepspeed_enabled"],
    "_inner_training_loop": [
        r"self\._prepare_for_training\(max_steps, train_dataloader, resume_from_checkpoint\)",
        r"self\._run_epoch\(\s*model=model,\s*epoch=epoch,",
    ],
    "_prepare_for_training": [
        r"if resume_from_checkpoint is not None:\s+if self\.is_deepspeed_enabled:\s+deepspeed_load_checkpoint\(",
        r"self\._load_optimizer_and_scheduler\(resume_from_checkpoint\)",
        r"self\._load_scaler\(resume_from_checkpoint\)",
    ],
    "_init_training_state": [r"self\._load_callback_state\(\)"],
    "_load_callback_state": [r"if not self\.args\.restore_callback_states_from_checkpoint:\s+return"],
    "_finalize_training": [r"self\.state\.best_model_checkpoint is not None and self\.args\.save_total_limit == 1:"],
    "evaluate": [r"output = self\.evaluation_loop\("],
    "evaluation_loop": [
        r"= self\.prediction_step\(model, inputs, prediction_loss_only, ignore_keys=ignore_keys\)",
        r"metrics\[f\"\{metric_key_prefix\}_loss\"\] = losses\.mean\(\)",
    ],
    "_wrap_model": [r"self\.args\.n_gpu > 1\s.*?\):\s+model = nn\.DataParallel\(model\)"],
    "__init__": [r"self\.args\._n_gpu = 1"],
    "_save_checkpoint": [
        r"self\.save_model\(output_dir, _internal_call=True\)",
        r"self\._save_optimizer_and_scheduler\(output_dir\)",
        r"self\._save_rng_state\(output_dir\)",
        r"rotate_checkpoints\([^)]*save_total_limit=self\.args\.save_total_limit",
    ],
    "compute_loss": [r"loss_scale = self\.accelerator\.num_processes // self\.get_tp_size\(\)"],
    "training_step": [r"self\.model_accepts_loss_kwargs and num_items_in_batch is not None", r'"scale_wrt_gas"\] = False'],
}


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_overridden_methods_keep_their_parameters(name: str) -> None:
    theirs: Callable[..., Any] = getattr(Trainer, name)
    assert list(inspect.signature(theirs).parameters) == OVERRIDDEN[name]
    assert name in vars(RunTrainer)


def test_every_private_override_has_a_canary() -> None:
    private = {n for n in vars(RunTrainer) if n.startswith("_") and not n.startswith("__") and hasattr(Trainer, n)}
    assert private == set(OVERRIDDEN)


@pytest.mark.parametrize(("name", "pattern"), [(n, p) for n, patterns in SAYS.items() for p in patterns])
def test_the_trainer_still_calls_what_is_overridden(name: str, pattern: str) -> None:
    assert re.search(pattern, inspect.getsource(getattr(Trainer, name)), re.DOTALL), pattern


def test_training_arguments_are_checked_before_they_start_anything() -> None:
    """training_args.check stops there: nothing that reaches for a device or for DeepSpeed has run."""
    from transformers import TrainingArguments

    before, call, after = inspect.getsource(TrainingArguments.__post_init__).partition("self._validate_args()")
    assert call and "self._validate_args()" not in after
    for sign in ("self.device", "HfTrainerDeepSpeedConfig", "self.mixed_precision ="):
        assert sign in after and sign not in before


def test_deepspeed_saves_what_module_state_dict_gives() -> None:
    """Its absence from the checkpoint is what keeps frozen weights out of it."""
    runtime = pytest.importorskip("deepspeed.runtime.engine")
    source = inspect.getsource(runtime.DeepSpeedEngine._save_checkpoint)
    assert "self.module_state_dict(exclude_frozen_parameters=exclude_frozen_parameters)" in source


def test_the_switch_that_keeps_deepspeed_from_compiling_on_a_cpu_exists() -> None:
    ops = pytest.importorskip("deepspeed.ops")
    assert "deepspeed_shm_comm" in ops.__compatible_ops__


def test_loading_puts_each_tensor_into_the_model_as_shards_py_expects() -> None:
    """One after the other where asked, marked as loaded, by setattr; files opened by a name that can be replaced."""
    from transformers import core_model_loading as loading
    from transformers import modeling_utils

    convert = inspect.getsource(loading.convert_and_load_state_dict_in_model)
    assert 'is_env_variable_true("HF_DEACTIVATE_ASYNC_LOAD")' in convert
    put = inspect.getsource(loading.set_param_for_module)
    assert re.search(r"param_value\._is_hf_initialized = True\s+setattr\(module_obj, param_name, param_value\)", put)
    reads = inspect.getsource(modeling_utils.PreTrainedModel._load_pretrained_model)
    assert re.search(r"= safe_open\(file, framework=\"pt\", device=device, backend=backend\)", reads)
    assert "get_slice(k)" in reads


def test_partitioned_parameters_have_what_core_asks_of_them() -> None:
    from deepspeed.runtime.zero import partition_parameters

    made = inspect.getsource(partition_parameters.Init)
    for name in ("ds_id", "ds_shape", "ds_status", "ds_zero_partition_world_size", "all_gather", "partition"):
        assert f"param.{name} = " in made
    assert "start = partition_size * self._partition_rank(param)" in made and "param.ds_tensor = partitioned_tensor" in made
    assert [status.name for status in partition_parameters.ZeroParamStatus] == ["AVAILABLE", "NOT_AVAILABLE", "INFLIGHT"]

"""Models and tokenizers by name: the Hugging Face Hub, a folder, or one of the two that come inside Python packages.

Code that comes with a model is never run: `trust_remote_code` is not an option here.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from speft_core.errors import UserError, nearest

from . import bundled, shards
from .architectures import KNOWN
from .config import ModelConfig, RunConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from .data.labels import LabelSpace

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# model.task -> (auto class of transformers, what it needs of the checkpoint)
TASKS = {"causal_lm": "AutoModelForCausalLM", "sequence_classification": "AutoModelForSequenceClassification"}


def load_model(
    cfg: RunConfig, labels: LabelSpace | None = None, tokenizer: PreTrainedTokenizerBase | None = None, world: int = 1
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of `cfg.model`, in eval mode on the CPU, and its tokenizer with a padding token.

    labels: of a classification; the head gets as many outputs, and where the checkpoint has none it starts as heads.py says.
    Of a run whose `world` ranks keep the weights in shards no rank ever holds them all.
    """
    import transformers

    from . import heads

    where = locate(cfg.model)
    tokenizer = tokenizer or load_tokenizer(cfg)
    config = load_model_config(cfg)
    own = [name for _, name in sorted((config.id2label or {}).items())]  # what the checkpoint calls its outputs
    if labels is not None:
        labels.write(config)
        config.pad_token_id = tokenizer.pad_token_id  # decoders find the last real token by it
    auto = getattr(transformers, TASKS[cfg.model.task])
    torch.manual_seed(cfg.seed)  # a fresh head starts the same in every run
    with one_line_errors(cfg.model), shards.loading(cfg.deepspeed, world) as finish:
        # A checkpoint that was a classifier of other classes gets a new head.
        options = {**_source(cfg.model), "ignore_mismatched_sizes": labels is not None}
        model, info = auto.from_pretrained(where, config=config, dtype=_dtype(cfg.model), output_loading_info=True, **options)
    if cfg.model.name.startswith(bundled.PREFIX):
        model.config._name_or_path = cfg.model.name  # not the cache folder of this machine
    if tokenizer.pad_token_id is not None and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if labels is not None:
        new = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
        is_loaded = not new & set(heads.parameter_names(model))
        heads.start(model, tokenizer, cfg, labels, world, is_loaded, heads.places(own, labels.names))
    finish(model)
    return model.eval(), tokenizer


def load_tokenizer(cfg: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of `cfg.model`. Without a padding token it pads with its end-of-text token: no row is added to
    the model.
    """
    import transformers

    with one_line_errors(cfg.model):
        tokenizer = transformers.AutoTokenizer.from_pretrained(locate(cfg.model), **_source(cfg.model))
    if tokenizer.pad_token_id is None:
        substitute = tokenizer.eos_token or tokenizer.unk_token
        if substitute is None:
            raise UserError(f"model {cfg.model.name}: its tokenizer needs a padding, end-of-text or unknown token; it has none")
        tokenizer.pad_token = substitute
    return tokenizer


def load_model_config(cfg: RunConfig, known: bool = False) -> PretrainedConfig:
    """The model's configuration. With `known`, that of a few published models is at hand without the Hub."""
    import transformers

    here = known and cfg.model.name in KNOWN and cfg.model.revision is None
    try:
        with one_line_errors(cfg.model):
            options = {**_source(cfg.model), "local_files_only": here}
            config = transformers.AutoConfig.from_pretrained(locate(cfg.model), **options)
    except UserError:
        if not here:
            raise
        settings = dict(KNOWN[cfg.model.name])
        config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    _check_task(cfg.model, config)
    if cfg.model.task == "sequence_classification":
        config.num_labels = cfg.model.num_labels or config.num_labels or 2  # 2 of a model that is no classifier
    if cfg.model.attn_implementation is not None:
        config._attn_implementation = cfg.model.attn_implementation
    return config


def meta_model(cfg: RunConfig) -> PreTrainedModel:
    """The model without its weights, on the meta device: names and shapes for a plan, whatever its size."""
    import transformers

    config = load_model_config(cfg, known=True)
    auto = getattr(transformers, TASKS[cfg.model.task])
    with torch.device("meta"), one_line_errors(cfg.model):
        model = auto.from_config(config, dtype=DTYPES.get(cfg.model.dtype, config.dtype))
    model.tie_weights()
    return model


def locate(cfg: ModelConfig) -> str:
    """What transformers is given: a folder, or a Hub id."""
    if cfg.name.startswith(bundled.PREFIX):
        return str(bundled.folder(cfg.name, cfg.cache_dir))
    path = Path(cfg.name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model folder {cfg.name} must hold a config.json; it has none")
        return str(path)
    if path.exists():
        raise UserError(f"model must be a folder, a Hub id or {bundled.PREFIX}NAME; got the file {cfg.name}")
    if cfg.name.startswith((".", "/", "~")) or cfg.name.count("/") > 1:
        raise UserError(f"model folder {cfg.name} does not exist")
    return cfg.name


def _source(cfg: ModelConfig) -> dict[str, Any]:
    options: dict[str, Any] = {"trust_remote_code": False}
    if not cfg.name.startswith(bundled.PREFIX):
        options |= {"revision": cfg.revision or "main", "cache_dir": cfg.cache_dir}
    return options


def _dtype(cfg: ModelConfig) -> torch.dtype | str:
    return DTYPES.get(cfg.dtype, "auto")


def _check_task(cfg: ModelConfig, config: PretrainedConfig) -> None:
    """Encoders load as causal models without complaint, and then generate noise."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    if cfg.task == "causal_lm" and (config.model_type not in CAUSAL or is_encoder(config)):
        raise UserError(
            f"model.task causal_lm needs a decoder; {cfg.name} is of type {config.model_type}:"
            " use model.task=sequence_classification"
        )


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether every token sees every other, as in BERT."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    decodes = getattr(config, "is_decoder", False) or "CausalLM" in str(config.architectures)
    return config.model_type in MASKED and not decodes


@contextmanager
def one_line_errors(cfg: ModelConfig) -> Iterator[None]:
    """What transformers and the Hub say over many lines about a missing or unusable model, in one."""
    try:
        yield
    except UserError:
        raise
    except SafetensorError as error:
        raise UserError(f"model {cfg.name} cannot be loaded: a weight file is damaged: {error}") from None
    except (OSError, ValueError, ImportError, KeyError) as error:
        text = str(error)
        reasons = (
            ("trust_remote_code", "it needs code of its own to run, which is never done here"),
            ("gated repo", "it is gated: accept its licence on its page, and log in with `hf auth login`"),
            ("401 Client Error", "it is private or does not exist: check the name, or log in with `hf auth login`"),
            ("is not a local folder", "it is neither a folder nor a model on the Hub; check the name"),
            ("couldn't connect", "the Hub cannot be reached, and it is not in the local cache"),
            ("offline", "the Hub is switched off (HF_HUB_OFFLINE), and it is not in the local cache"),
            ("not a valid git identifier", f"it has no revision {cfg.revision!r}"),
        )
        reason = next((words for sign, words in reasons if sign.lower() in text.lower()), None)
        if reason is None:
            if not isinstance(error, OSError) and "Unrecognized" not in text and "not supported" not in text:
                raise
            reason = text.strip().splitlines()[0] if text.strip() else type(error).__name__
        hint = nearest(cfg.name, bundled.NAMES)
        raise UserError(f"model {cfg.name} cannot be loaded: {reason}{hint and '.' + hint}") from None

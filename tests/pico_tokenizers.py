"""Tokenizers made on the fly: one token a byte or a character, with or without start tokens, for tests without downloads."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}<u>{{ m['role'] }}: {{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<u>assistant: {% endif %}"
)


def byte_level(start: bool = False, end: bool = False, chat: bool = True, **special: Any) -> PreTrainedTokenizerFast:
    """A token a byte. `start` and `end` put <s> before and </s> after every text, as some published tokenizers do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<pad>", "<s>", "</s>", "<unk>", "<u>"]
    vocabulary = {token: place for place, token in enumerate([*names, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if start or end:
        single = f"{'<s> ' * start}$A{' </s>' * end}"
        core.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    roles = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **special}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, **{role: token for role, token in roles.items() if token is not None}
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<u>"]})
    if chat:
        tokenizer.chat_template = CHAT
    return tokenizer


def with_dummy_space() -> PreTrainedTokenizerFast:
    """A token a character, and a space put before every text, as SentencePiece does."""
    characters = ["▁", *map(chr, range(33, 127)), "\n"]
    vocabulary = {token: place for place, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *characters])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )

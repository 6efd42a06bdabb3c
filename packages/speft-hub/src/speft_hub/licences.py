"""Checks of card metadata that the Hub's client lets pass: licences, languages, numbers, ids."""

from __future__ import annotations

import math
import re
from typing import Any

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from speft_core import UserError
from speft_core.errors import nearest

# Ids of the Hub that are no SPDX ids (huggingface.co/docs/hub/repositories-licenses).
HUB_LICENCES = frozenset(
    """openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m bsd c-uda cc
    etalab-2.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 agpl-3.0 odc-by odbl openrail++ pddl lgpl-lr
    deepfloyd-if-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma apple-ascl apple-amlr
    fair-noncommercial-research-license
    grok2-community h-research intel-research open-mdw unknown other""".split()
)
COMMON = (
    "apache-2.0",
    "mit",
    "bsd-3-clause",
    "cc-by-4.0",
    "cc-by-sa-4.0",
    "cc0-1.0",
    "gpl-3.0",
    "mpl-2.0",
    "gemma",
    "llama3.1",
    "other",
)
PIPELINES = frozenset(
    """text-generation text-classification token-classification question-answering fill-mask summarization translation
    feature-extraction sentence-similarity text-ranking zero-shot-classification table-question-answering
    multiple-choice image-classification image-text-to-text automatic-speech-recognition audio-classification""".split()
)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?")


def check_licence(licence: str, name: str | None = None, link: str | None = None) -> str:
    """The id in the Hub's (lower-case) spelling; UserError for what is neither an SPDX id nor one of the Hub's."""
    if not isinstance(licence, str):
        raise UserError(f"license must be one SPDX id or Hub id, got {licence!r}")
    lower = licence.strip().lower()
    if lower == "other" and not (name and link):
        raise UserError("license 'other' needs --license-name and --license-link (a file of the repository or a URL)")
    if lower in HUB_LICENCES:
        return lower
    try:
        expression = str(canonicalize_license_expression(licence))
    except InvalidLicenseExpression:
        expression = ""
    if not expression or " " in expression or expression.startswith("LicenseRef-"):
        raise UserError(
            f"license must be one SPDX id or Hub id, got {licence!r}.{nearest(lower, COMMON)} Common: {', '.join(COMMON)}"
        )
    return lower


def check_language(language: Any) -> str:
    """An ISO 639 code of two or three letters, "code" or "multilingual"; note that YAML reads a bare `no` as false."""
    if isinstance(language, str) and (re.fullmatch("[a-z]{2,3}", language) or language in ("code", "multilingual")):
        return language
    raise UserError(f"language must be an ISO 639 code such as 'en' (write 'no' in quotes in YAML), got {language!r}")


def check_pipeline(tag: str) -> str:
    """A task that the Hub knows."""
    if tag not in PIPELINES:
        raise UserError(f"pipeline_tag must be a task of the Hub, got {tag!r}.{nearest(tag, PIPELINES)}")
    return tag


def check_hub_id(what: str, value: str) -> str:
    """The id of a model or data set on the Hub."""
    if not isinstance(value, str) or not HUB_ID.fullmatch(value) or ".." in value:
        raise UserError(f"{what} must be an id on the Hub such as owner/name, got {value!r}")
    return value


def check_number(what: str, value: Any) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{what} must be a finite number, got {value!r}")
    return value

"""The number of an answer, in the one form in which two answers are compared."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

MARKER = "####"
# A number as people write it: sign, currency, groups of three, decimals.
NUMBER = r"[-−]?\s?[$€£]?\s?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|[-−]?[$€£]?\.\d+"
STRICT = re.compile(rf"{MARKER}\s*([$€£]?\s?(?:{NUMBER}))")
FLEXIBLE = re.compile(NUMBER)


def strict_number(text: str) -> str | None:
    """The number right after the first `####`; None if there is none."""
    found = STRICT.search(text)
    return None if found is None else normal(found.group(1))


def last_number(text: str) -> str | None:
    """The last number of a text; None if it has none."""
    found = list(FLEXIBLE.finditer(text))
    if not found:
        return None
    match = found[-1]
    written = match.group()
    if written[0] in "-−" and text[: match.start()].rstrip()[-1:].isdigit():
        written = written[1:]  # "40 - 5" and "3-5" end in 5, not in -5
    return normal(written)


def reference_number(answer: str) -> str | None:
    """The number of a correct answer: after the marker if it has one, else the last."""
    return strict_number(answer) if MARKER in answer else last_number(answer)


def normal(number: str) -> str | None:
    """ "$1,200.50" -> "1200.5", "7.0" -> "7", "- 3" -> "-3", "-0" -> "0"."""
    plain = re.sub(r"[$€£,\s]", "", number).replace("−", "-")
    try:
        value = Decimal(plain)
    except InvalidOperation:
        return None
    text = f"{value:f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text

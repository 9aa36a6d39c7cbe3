"""How an id is spelt: one rule for every reader of logs and every face of a request.

A log's text file has texts, Parquet and JSON have numbers and booleans too, and pandas writes
integers beside a missing value as floats. All of them mean the same id.
"""

import re
from collections.abc import Iterable

from torchrec_kvshare.features.limits import MAX_ID_CHARACTERS

MAX_DIGITS = 4300  # of an integer that Python reads from text

_INTEGER = re.compile(r"0|-?[1-9][0-9]*")
_INTEGRAL = re.compile(r"(-?(?:0|[1-9][0-9]*))\.0+|-0")
_FLOAT_REPR = re.compile(r"-?[1-9](?:\.[0-9]+)?e\+[0-9]{2,3}")  # as floats from 1e16 on are printed
_BOOLEAN_BY_TEXT = {"True": "true", "False": "false"}


def canonical_id(raw: str | int | float | bool) -> str:
    """Spell an id the one way it is compared.

    Args:
        raw: an id as it stands in a file or a request; a number is finite.

    Returns:
        A text without space around it; of a whole number its digits, with a minus before them where
        it is negative; of a boolean ``true`` or ``false``, as JSON has it. ``007`` and ``85123A``
        are not spellings of numbers and stay. Empty where there is no id.

    Raises:
        ValueError: for an integer of more than ``MAX_DIGITS`` digits.

    Example:
        >>> [canonical_id(raw) for raw in (17850, 17850.0, "17850.0", " 17850 ")]
        ['17850', '17850', '17850', '17850']
        >>> [canonical_id(raw) for raw in (-1, "-1.0", True, "True", "007", "1e+16", 3.5)]
        ['-1', '-1', 'true', 'true', '007', '10000000000000000', '3.5']
    """
    if isinstance(raw, bool):
        return "true" if raw else "false"
    if isinstance(raw, float):
        return str(int(raw)) if raw.is_integer() else repr(raw)
    if isinstance(raw, int):
        return str(raw)
    text = raw.strip()
    if match := _INTEGRAL.fullmatch(text):
        digits = match[1]
        return "0" if digits in (None, "-0") else digits
    if _FLOAT_REPR.fullmatch(text):
        return canonical_id(float(text))
    return _BOOLEAN_BY_TEXT.get(text, text)


def is_long_id(text: str) -> bool:
    """Whether the id that a text spells has more than ``MAX_ID_CHARACTERS``.

    Example:
        >>> [is_long_id(text) for text in ("7", "x" * 257, "7." + "0" * 257, "1e+300")]
        [False, True, False, True]
    """
    # Only a float with a large exponent is longer as it is compared than as it is written.
    may_be_long = len(text) > MAX_ID_CHARACTERS or "e+" in text
    return may_be_long and len(canonical_id(text)) > MAX_ID_CHARACTERS


def is_integer_id(spelt: str) -> bool:
    """Whether a canonical id is that of some integer.

    Example:
        >>> [is_integer_id(spelt) for spelt in ("7", "-7", "007", "7.5", "a", "٣")]
        [True, True, False, False, False, False]
    """
    return _INTEGER.fullmatch(spelt) is not None and len(spelt) <= MAX_DIGITS


def sorted_ids(ids: Iterable[str]) -> list[str]:
    """Canonical ids in the one order that no file decides: integers by value, then texts.

    Example:
        >>> sorted_ids(["b", "10", "9", "a", "007"])
        ['9', '10', '007', 'a', 'b']
    """
    integers: list[str] = []
    texts: list[str] = []
    for spelt in ids:
        (integers if is_integer_id(spelt) else texts).append(spelt)
    return sorted(integers, key=int) + sorted(texts)

"""The canonical spelling of an id: one rule for every log reader and every request format.

Text files hold texts, Parquet and JSON also numbers and booleans, and pandas writes integers as
floats in a column with missing values. All of them mean the same id.
"""

import re
from collections.abc import Iterable, Sequence

from torchrec_kvshare.features.limits import MAX_ID_CHARACTERS

MAX_DIGITS = 4300  # the longest integer that Python reads from text

_INTEGER = re.compile(r"0|-?[1-9][0-9]*")
_INTEGRAL = re.compile(r"(-?(?:0|[1-9][0-9]*))\.0+|-0")
_FLOAT_REPR = re.compile(r"-?[1-9](?:\.[0-9]+)?e\+[0-9]{2,3}")  # printed floats from 1e16 on
_BOOLEAN_BY_TEXT = {"True": "true", "False": "false"}
# What a text has that ``canonical_id`` changes; other texts may have it too.
_UNUSUAL = re.compile(r"\s|\.0|e\+|-0|True|False")


def canonical_id(raw: str | int | float | bool) -> str:
    """Return the canonical spelling of an id, by which ids are compared.

    Args:
        raw: an id as a file or a request holds it; numbers must be finite.

    Returns:
        The text without surrounding space; the digits of a whole number, with a minus if it is
        negative; ``true`` or ``false`` for a boolean, as in JSON. ``007`` and ``85123A`` do not
        spell numbers and stay as they are. Empty for no id.

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


def canonical_ids(raws: Sequence[str | int | float | bool]) -> list[str]:
    """Return the canonical spellings of many ids, fast where they are spelt so already.

    Example:
        >>> canonical_ids(["85123A", "17850.0", 7])
        ['85123A', '17850', '7']
    """
    if set(map(type, raws)) == {str} and not _UNUSUAL.search("\0".join(raws)):  # type: ignore[arg-type]
        return [*raws]  # type: ignore[list-item]
    return [*map(canonical_id, raws)]


def is_long_id(text: str) -> bool:
    """Return whether a text's canonical id has more than ``MAX_ID_CHARACTERS``.

    Example:
        >>> [is_long_id(text) for text in ("7", "x" * 257, "7." + "0" * 257, "1e+300")]
        [False, True, False, True]
    """
    # Only a float with a large exponent has a canonical id longer than its text.
    may_be_long = len(text) > MAX_ID_CHARACTERS or "e+" in text
    return may_be_long and len(canonical_id(text)) > MAX_ID_CHARACTERS


def is_integer_id(spelt: str) -> bool:
    """Return whether a canonical id spells an integer.

    Example:
        >>> [is_integer_id(spelt) for spelt in ("7", "-7", "007", "7.5", "a", "٣")]
        [True, True, False, False, False, False]
    """
    return _INTEGER.fullmatch(spelt) is not None and len(spelt) <= MAX_DIGITS


def sorted_ids(ids: Iterable[str]) -> list[str]:
    """Sort canonical ids, independent of file order: integers by value, then texts.

    Example:
        >>> sorted_ids(["b", "10", "9", "a", "007"])
        ['9', '10', '007', 'a', 'b']
    """
    integers: list[str] = []
    texts: list[str] = []
    for spelt in ids:
        (integers if is_integer_id(spelt) else texts).append(spelt)
    return sorted(integers, key=int) + sorted(texts)

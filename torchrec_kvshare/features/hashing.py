"""A stable code of every id, and a row from it by hashing: the same in every process and language.

An id that spells a 64-bit integer is mixed by SplitMix64; any other is hashed by FNV-1a over its
UTF-8 bytes and mixed. ``examples/cpp/ids.cpp`` computes the same codes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
MULTIPLIERS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
FNV_OFFSET, FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)

# Codes are below 2**62: reserved rows, added to a code, still give an int64.
CODE_SHIFT = np.uint64(2)
MAX_CODE = 2**62 - 1

MINUS, ZERO = np.uint64(ord("-")), np.uint64(ord("0"))
MAX_INT64, MAX_INT64_DIGITS = 2**63 - 1, 19
IDS_AT_A_TIME = 2**16  # so that the arrays of a chunk stay in the processor's cache


class Coded(NamedTuple):
    """Codes of ids, and which of the ids spell integers of 64 bits."""

    codes: IntArray
    is_integer: npt.NDArray[np.bool_]


def mixed(state: npt.NDArray[np.uint64], key: IntArray) -> npt.NDArray[np.uint64]:
    """Mix a key into a state.

    Source:
        SplitMix64: Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators".
    """
    state = (state ^ key.astype(np.uint64)) + GOLDEN_GAMMA
    for shift, multiplier in zip(SHIFTS, MULTIPLIERS, strict=False):
        state = (state ^ (state >> shift)) * multiplier
    result: npt.NDArray[np.uint64] = state ^ (state >> SHIFTS[2])
    return result


def codes_of_integers(integers: IntArray) -> IntArray:
    """Return the codes of integer ids, from 0 to ``MAX_CODE``."""
    return (mixed(np.zeros(1, np.uint64), integers) >> CODE_SHIFT).astype(np.int64)


def codes_of_ids(ids: Sequence[str]) -> Coded:
    """Return the codes of ids, from 0 to ``MAX_CODE``.

    Args:
        ids: spelt as ``canonical_id`` does.

    Source:
        FNV-1a: Fowler, Noll and Vo, RFC 9923.

    Example:
        >>> codes_of_ids(["17850", "85123A"]).codes.tolist()
        [3958970580470684005, 1074313396730006891]
        >>> codes_of_integers(np.array([17850])).tolist()
        [3958970580470684005]
    """
    coded = Coded(np.empty(len(ids), np.int64), np.empty(len(ids), np.bool_))
    for first in range(0, len(ids), IDS_AT_A_TIME):
        part = ids[first : first + IDS_AT_A_TIME]
        for whole, of_part in zip(coded, _coded(part), strict=True):
            whole[first : first + len(part)] = of_part
    return coded


def _coded(ids: Sequence[str]) -> Coded:
    """Hash all ids together, one byte of each at a time."""
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    encoded = _utf8("".join(ids))
    if len(encoded) > lengths.sum():
        lengths = np.fromiter((len(_utf8(one)) for one in ids), np.int64, len(ids))
    text = np.frombuffer(encoded, np.uint8)
    # The longest first: those that have a byte at an index are the first ones.
    order = np.argsort(-lengths, kind="stable")
    starts, sizes = (lengths.cumsum() - lengths)[order], lengths[order]
    num_longer = np.searchsorted(-sizes, -np.arange(sizes.max(initial=0)))
    hashes = np.full(len(ids), FNV_OFFSET)
    values = np.zeros(len(ids), np.uint64)
    num_digits = np.zeros(len(ids), np.int64)
    is_negative = np.zeros(len(ids), np.bool_)
    has_zero_first = np.zeros(len(ids), np.bool_)
    for index, count in enumerate(num_longer.tolist()):
        characters = text[starts[:count] + index].astype(np.uint64)
        hashes[:count] = (hashes[:count] ^ characters) * FNV_PRIME
        if index == 0:
            is_negative[:count] = characters == MINUS
        if index <= MAX_INT64_DIGITS:
            digits = characters - ZERO  # beyond 9, also by wrapping around, for other characters
            is_digit = digits <= 9
            has_zero_first[:count] |= (digits == 0) & (num_digits[:count] == 0)
            num_digits[:count] += is_digit
            values[:count] = np.where(
                is_digit, values[:count] * np.uint64(10) + digits, values[:count]
            )
    is_integer = (num_digits + is_negative == sizes) & (num_digits > 0)
    is_integer &= (num_digits <= MAX_INT64_DIGITS) & (~has_zero_first | (sizes == 1))
    is_integer &= values <= np.uint64(MAX_INT64) + is_negative.astype(np.uint64)
    signed = values.astype(np.int64)  # 2**63 becomes the least integer, which is its own negative.
    integers = np.where(is_negative, -signed, signed)
    keys = np.where(is_integer, integers, hashes.astype(np.int64))
    coded = Coded(np.empty(len(ids), np.int64), np.empty(len(ids), np.bool_))
    coded.codes[order] = codes_of_integers(keys)
    coded.is_integer[order] = is_integer
    return coded


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")

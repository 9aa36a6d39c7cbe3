"""JSON text into Python values, refusing what JSON readers accept silently."""

import json
from typing import Any

import numpy as np

from torchrec_kvshare.errors import RequestError

MAX_KEYS = 4096  # of one JSON object; a request has a few per column of the model
MAX_DEPTH = 16  # of lists and objects; a list of requests with multi-valued columns needs 5
MAX_SHOWN = 200  # characters of a value or of a list of names in a message
DEPTH_CHUNK = 2**16  # bytes searched for brackets at once
NO_MARKS = bytes({*range(256)} - {*b'[]{}"'})
DEPTH_CHANGE_BY_MARK = np.zeros(256, np.int64)
DEPTH_CHANGE_BY_MARK[[*b"[{"]], DEPTH_CHANGE_BY_MARK[[*b"]}"]] = 1, -1


def decode_request(line: str | bytes, max_values: int | None = None) -> dict[str, Any]:
    """Decode one JSON object.

    Args:
        line: the text.
        max_values: see ``decode_json``.

    Raises:
        RequestError: as ``decode_json``, and if the JSON is not an object.
    """
    decoded = decode_json(line, max_values)
    if not isinstance(decoded, dict):
        raise RequestError(f"a request is a JSON object; got {type(decoded).__name__}")
    return decoded


def decode_json(text: str | bytes, max_values: int | None = None) -> Any:
    """Decode a JSON value.

    Args:
        text: the JSON text.
        max_values: limit on the values of all lists and objects together, checked before any is
            decoded by counting commas and opening brackets, also those inside strings.

    Raises:
        RequestError: if the text is not JSON in UTF-8, holds too many values, is nested deeper than
            ``MAX_DEPTH``, or an object in it has more than ``MAX_KEYS`` keys or the same key twice.
    """
    try:
        encoded = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        if max_values is not None:
            _check_values(encoded, max_values)
        _check_depth(encoded)
        decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        return json.loads(decoded, object_pairs_hook=_checked_object)
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError(f"the line is not JSON: {cut(str(error))}") from error


def _check_values(text: bytes, max_values: int) -> None:
    num_values = sum(map(text.count, (b",", b"[", b"{")))
    if num_values > max_values:
        raise RequestError(f"the JSON holds {num_values} values; at most {max_values} are allowed")


def _check_depth(text: bytes) -> None:
    """Refuse deep nesting before the recursive JSON reader meets it."""
    if text.count(b"[") + text.count(b"{") <= MAX_DEPTH:
        return
    # Without escapes every quote begins or ends a string; strings without brackets are dropped.
    bare = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    bare = bare.translate(None, NO_MARKS).replace(b'""', b"")
    is_inside, depth = np.False_, 0
    for start in range(0, len(bare), DEPTH_CHUNK):
        marks = np.frombuffer(bare[start : start + DEPTH_CHUNK], np.uint8)
        is_in_string = np.bitwise_xor.accumulate(marks == ord('"')) ^ is_inside
        depths = depth + DEPTH_CHANGE_BY_MARK[marks[~is_in_string]].cumsum()
        if depths.max(initial=0) > MAX_DEPTH:
            raise RequestError(f"the JSON is nested deeper than {MAX_DEPTH} levels")
        is_inside, depth = is_in_string[-1], depths[-1] if depths.size else depth


def _checked_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:
        raise RequestError(f"an object has {len(pairs)} keys; at most {MAX_KEYS} are allowed")
    decoded: dict[str, Any] = {}
    for name, value in pairs:
        if name in decoded:
            raise RequestError(f"the key {shown(name)} appears twice in one object")
        decoded[name] = value
    return decoded


def shown(value: Any) -> str:
    """Return a value for a message: short, whatever its size and depth."""
    if isinstance(value, list | dict):
        return f"a {type(value).__name__} of {len(value)}"
    try:
        return cut(repr(value))
    except ValueError:
        return "an integer that Python does not print"  # It has more than 4300 digits.


def cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."

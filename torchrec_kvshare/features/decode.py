"""JSON text into Python values; refuses what JSON readers accept silently."""

import json
from typing import Any

import numpy as np

from torchrec_kvshare.errors import RequestError

MAX_KEYS = 4096  # of one JSON object; a request has a few for each of the model's columns
MAX_DEPTH = 16  # of nested lists and objects; a list of requests with multi-valued columns needs 5
MAX_SHOWN = 200  # characters of a value or of a list of names in a message
DEPTH_CHUNK = 2**16  # bytes that are searched for brackets together
NO_MARKS = bytes({*range(256)} - {*b'[]{}"'})
STEP_BY_MARK = np.zeros(256, np.int64)  # into a list or an object, or out of it
STEP_BY_MARK[[*b"[{"]], STEP_BY_MARK[[*b"]}"]] = 1, -1


def decode_request(line: str | bytes, most_values: int | None = None) -> dict[str, Any]:
    """One JSON object, refusing what JSON readers let pass in silence.

    Args:
        line: the text.
        most_values: see ``decode_json``.

    Raises:
        RequestError: as ``decode_json``, and if the text is no JSON object.
    """
    decoded = decode_json(line, most_values)
    if not isinstance(decoded, dict):
        raise RequestError(f"a request is a JSON object; got {type(decoded).__name__}")
    return decoded


def decode_json(text: str | bytes, most_values: int | None = None) -> Any:
    """A JSON value.

    Args:
        text: of it.
        most_values: that it may hold, all its lists' and objects' together, for a reader to make
            objects of; commas and opening brackets are counted, those in strings too.

    Raises:
        RequestError: if the text is not JSON in UTF-8, holds more values, is nested deeper than
            ``MAX_DEPTH``, or an object in it has more than ``MAX_KEYS`` keys or the same key twice.
    """
    try:
        encoded = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        if most_values is not None:
            _check_values(encoded, most_values)
        _check_depth(encoded)
        decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        return json.loads(decoded, object_pairs_hook=_checked_object)
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError(f"the line is not JSON: {cut(str(error))}") from error


def _check_values(text: bytes, most: int) -> None:
    num_values = sum(map(text.count, (b",", b"[", b"{")))
    if num_values > most:
        raise RequestError(f"the JSON holds {num_values} values; at most {most} are allowed")


def _check_depth(text: bytes) -> None:
    """Refuse what is nested too deep, before a reader that recurses meets it."""
    if text.count(b"[") + text.count(b"{") <= MAX_DEPTH:
        return
    # Without escapes every quote begins or ends a string; strings without brackets are left out.
    bare = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    bare = bare.translate(None, NO_MARKS).replace(b'""', b"")
    is_inside, depth = np.False_, 0
    for start in range(0, len(bare), DEPTH_CHUNK):
        marks = np.frombuffer(bare[start : start + DEPTH_CHUNK], np.uint8)
        is_in_string = np.bitwise_xor.accumulate(marks == ord('"')) ^ is_inside
        depths = depth + STEP_BY_MARK[marks[~is_in_string]].cumsum()
        if depths.max(initial=0) > MAX_DEPTH:
            raise RequestError(f"the JSON is nested deeper than {MAX_DEPTH} levels")
        is_inside, depth = is_in_string[-1], depths[-1] if depths.size else depth


def _checked_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:
        raise RequestError(f"an object has {len(pairs)} keys; at most {MAX_KEYS} are allowed")
    decoded: dict[str, Any] = {}
    for name, value in pairs:
        if name in decoded:
            raise RequestError(f"the key {shown(name)} stands twice in one object")
        decoded[name] = value
    return decoded


def shown(value: Any) -> str:
    """A value as a message may hold it: short, whatever its size and depth."""
    if isinstance(value, list | dict):
        return f"a {type(value).__name__} of {len(value)}"
    try:
        return cut(repr(value))
    except ValueError:
        return "an integer that Python does not print"  # It has more than 4300 digits.


def cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."

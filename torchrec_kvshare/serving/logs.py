"""Logs as JSON, one object a line, on standard error."""

import asyncio
import json
import logging
import math
from typing import Any

from grpc._cython.cygrpc import ExecuteBatchError
from pythonjsonlogger.json import JsonFormatter


def log_as_json() -> None:
    """Have all loggers write JSON: time, level, logger, message, and a call's ``extra``."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        JsonFormatter(
            "{asctime}{levelname}{name}{message}",
            style="{",
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            json_serializer=_dumps,
        )
    )
    logging.getLogger().handlers[:] = [handler]
    # It tells with a traceback what of a client's bytes is not HTTP; the client is told as well.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
    # So it is with a call whose client has gone: no status can be sent, or nothing had begun.
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_ours)


def _is_ours(record: logging.LogRecord) -> bool:
    kind = record.exc_info[0] if record.exc_info else None
    return kind is None or not issubclass(kind, asyncio.CancelledError | ExecuteBatchError)


def _dumps(fields: Any, **options: Any) -> str:
    """JSON, with null for what would be NaN: a line is for readers of JSON, whoever logged it."""
    try:
        return json.dumps(fields, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_without_nan(fields), allow_nan=False, **options)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(inside) for name, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inside) for inside in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

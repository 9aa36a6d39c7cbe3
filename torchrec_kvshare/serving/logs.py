"""Logs as JSON, one object a line, on standard error."""

import asyncio
import json
import logging
import math
from typing import Any

from grpc._cython.cygrpc import ExecuteBatchError
from pythonjsonlogger.json import JsonFormatter


def log_as_json() -> None:
    """Make all loggers write JSON: time, level, logger, message, and a call's ``extra``."""
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
    # It logs a traceback for bytes that are not HTTP; the client gets an error as well.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
    # It logs a traceback for a call whose client has gone.
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_server_error)


def _is_server_error(record: logging.LogRecord) -> bool:
    kind = record.exc_info[0] if record.exc_info else None
    return kind is None or not issubclass(kind, asyncio.CancelledError | ExecuteBatchError)


def _dumps(fields: Any, **options: Any) -> str:
    """Return JSON, with null for NaN and infinity."""
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

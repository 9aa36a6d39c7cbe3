"""Logs as JSON, one object a line, on standard error."""

import logging
import sys

from pythonjsonlogger.json import JsonFormatter


def log_as_json(stream: object = None) -> None:
    """Have all loggers write JSON: time, level, logger, message, and what a call adds as ``extra``.

    Args:
        stream: a text file; standard error by default, so that standard output stays readable.
    """
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)  # type: ignore[arg-type]
    handler.setFormatter(
        JsonFormatter(
            "{asctime}{levelname}{name}{message}",
            style="{",
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
        )
    )
    logging.getLogger().handlers[:] = [handler]
    # It tells with a traceback what of a client's bytes is not HTTP; the client is told as well.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
    # So it is with a status for who has gone, or whose own deadline was earlier.
    logging.getLogger("grpc._cython.cygrpc").addFilter(
        lambda record: not record.getMessage().startswith("ExecuteBatchError")
    )

"""Logs as JSON, one object a line, on standard error."""

import logging

from pythonjsonlogger.json import JsonFormatter


def log_as_json() -> None:
    """Have all loggers write JSON: time, level, logger, message, and a call's ``extra``."""
    handler = logging.StreamHandler()
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

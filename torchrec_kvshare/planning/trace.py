"""The traffic that advice is for: a file of requests, or the last fourth of a data set's log."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrec_kvshare.config import AdviseConfig
from torchrec_kvshare.data.load import load_shards
from torchrec_kvshare.data.requests import make_late_requests
from torchrec_kvshare.errors import ConfigError, RequestError
from torchrec_kvshare.features.decode import decode_request
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.features.schema import HISTORY, FeatureSchema, History, Window


@dataclass(frozen=True)
class Trace:
    """Requests in the order of their times.

    Attributes:
        name: of the file or the data.
        requests: at least one.
        num_refused: requests that the model's columns do not allow.
        why_refused: the first one's error; empty if there is none.
    """

    name: str
    requests: list[Request]
    num_refused: int
    why_refused: str


def read_trace(config: AdviseConfig, schema: FeatureSchema) -> Trace:
    """Read the traffic that a config names.

    Args:
        config: with ``requests`` or ``data``.
        schema: the model's columns.

    Raises:
        ConfigError: if there is no traffic, or both are given.
        DataError: if the data cannot be read.
    """
    if (config.requests is None) == (config.data is None):
        given = "both" if config.data is not None else "none"
        raise ConfigError(f"requests=FILE or data=NAME is needed, one of them; {given} is given")
    if config.requests is None:
        # Requests have whole histories; the model's schema cuts them to its windows.
        shards = load_shards(config.data, [History(HISTORY, Window(1, 1))])
        name = config.data.name
        raws: Iterable[Any] = make_late_requests(
            shards, config.count, config.candidates, config.seed, name
        )
        return _parsed(name, raws, schema, config.count)
    path = Path(config.requests)
    if not path.is_file():
        raise ConfigError(f"requests is {str(path)!r}; there is no such file")
    with path.open("rb") as lines:
        return _parsed(str(path), (one for one in lines if one.strip()), schema, config.count)


def _parsed(name: str, raws: Iterable[Any], schema: FeatureSchema, count: int) -> Trace:
    requests: list[Request] = []
    errors: list[str] = []
    for raw in raws:
        if len(requests) == count:
            break
        try:
            given = decode_request(raw) if isinstance(raw, bytes) else raw
            requests.append(parse_request(given, schema))
        except RequestError as error:
            errors.append(str(error))
    if not requests:
        why = f"the first of {len(errors)} fails: {errors[0]}" if errors else "it is empty"
        raise ConfigError(f"{name} has no request that the model can score; {why}")
    requests.sort(key=lambda request: request.time)
    return Trace(name, requests, len(errors), errors[0] if errors else "")

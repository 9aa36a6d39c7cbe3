"""Score a file of requests: one JSON object a line in, one a line out, in order.

A line that cannot be scored gets its error in its place and the rest goes on. The file of answers
appears when it is whole.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrec_kvshare.data.schema import FeatureSchema
from torchrec_kvshare.engine import Engine
from torchrec_kvshare.errors import ConfigError, RequestError
from torchrec_kvshare.features import Request, decode_request, parse_request

MAX_CANDIDATES_AT_A_TIME = 4096  # of one batch; a longer request is a batch of its own


@dataclass(frozen=True)
class Counts:
    """What became of a file of requests.

    Attributes:
        scored: lines answered with scores.
        refused: lines answered with an error.
        by_status: scored lines by what the cache did.
    """

    scored: int
    refused: int
    by_status: dict[str, int]


@dataclass(frozen=True)
class Refusal:
    """What stands in the place of an answer."""

    request_id: Any
    message: str

    def to_json(self) -> dict[str, Any]:
        """The project's one error format."""
        error = {"type": RequestError.__name__, "message": self.message}
        return {"request_id": self.request_id, "error": error}


def score_file(engine: Engine, requests: Path, output: Path, batch_requests: int) -> Counts:
    """Answer a file of requests with a file of answers.

    Args:
        engine: scores what can be scored.
        requests: one JSON object a line.
        output: gets one JSON object a line, in the same order; replaced as a whole.
        batch_requests: most requests scored together; at least 1.

    Returns:
        How many lines were scored and refused.

    Raises:
        ConfigError: if ``requests`` cannot be read or ``batch_requests`` is below 1.
    """
    if batch_requests < 1:
        raise ConfigError(f"batch_requests is {batch_requests}; it must be at least 1")
    if not requests.is_file():
        raise ConfigError(f"requests is {str(requests)!r}; there is no such file")
    by_status: Counter[str] = Counter()
    refused = 0
    output.parent.mkdir(parents=True, exist_ok=True)
    written = output.with_name(f".{output.name}.new")
    with requests.open("rb") as lines, written.open("w") as answers:
        for answer in score_lines(engine, lines, batch_requests):
            answers.write(json.dumps(answer, allow_nan=False) + "\n")
            if "error" in answer:
                refused += 1
            else:
                by_status[answer["cache"]["status"]] += 1
    os.replace(written, output)
    return Counts(by_status.total(), refused, dict(by_status))


def score_lines(
    engine: Engine, lines: Iterable[str | bytes], batch_requests: int
) -> Iterator[dict[str, Any]]:
    """Answer every line, a few requests at a time.

    Args:
        engine: scores what can be scored.
        lines: requests, each a JSON object; blank lines are no requests.
        batch_requests: most requests scored together.

    Yields:
        An answer or a refusal for each line, as JSON values, in order.
    """
    waiting: list[Request | Refusal] = []
    for line in lines:
        if not line.strip():
            continue
        waiting.append(_read(line, engine.schema))
        good = [one for one in waiting if isinstance(one, Request)]
        if (
            len(waiting) >= batch_requests
            or sum(request.num_candidates for request in good) >= MAX_CANDIDATES_AT_A_TIME
        ):
            yield from _answer(engine, waiting)
            waiting = []
    yield from _answer(engine, waiting)


def _answer(engine: Engine, waiting: list[Request | Refusal]) -> Iterator[dict[str, Any]]:
    answers = iter(engine.rank([one for one in waiting if isinstance(one, Request)]))
    for one in waiting:
        yield one.to_json() if isinstance(one, Refusal) else next(answers).to_json()


def _read(line: str | bytes, schema: FeatureSchema) -> Request | Refusal:
    request_id = None
    try:
        raw = decode_request(line)
        request_id = raw.get("request_id")
        return parse_request(raw, schema)
    except RequestError as error:
        # An answer must be JSON again: an id that is none of ours, NaN say, is not given back.
        sendable = isinstance(request_id, str | int) and not isinstance(request_id, bool)
        return Refusal(request_id if sendable else None, str(error))

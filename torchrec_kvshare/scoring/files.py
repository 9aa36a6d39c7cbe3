"""Score files of requests: one JSON object a line, or one row of Parquet, in; one out, in order.

A request that cannot be scored gets its error in its place and the rest goes on. A file of answers
appears when it is whole.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchrec_kvshare.config import REFUSE, SORT
from torchrec_kvshare.errors import ConfigError, KVShareError, RequestError
from torchrec_kvshare.features.batches import RequestBatch
from torchrec_kvshare.features.decode import decode_request
from torchrec_kvshare.features.parse import parse_request, request_id_of, sort_history
from torchrec_kvshare.features.request import IdCount, Request, count_ids
from torchrec_kvshare.features.schema import FeatureSchema
from torchrec_kvshare.scoring.engine import Answer, Engine, Unscored

MAX_CANDIDATES_AT_A_TIME = 4096  # of one batch; a longer request is a batch of its own


@dataclass
class Counts:
    """What became of a file of requests, counted as its answers are made.

    Attributes:
        refused: lines answered with an error.
        sorted_histories: lines whose history came out of order and was sorted.
        by_status: scored lines by what the cache did.
        ids: of scored lines, by column.
    """

    refused: int = 0
    sorted_histories: int = 0
    by_status: Counter[str] = field(default_factory=Counter)
    ids: dict[str, IdCount] = field(default_factory=dict)

    @property
    def scored(self) -> int:
        """Lines answered with scores."""
        return self.by_status.total()

    def add(self, other: "Counts") -> None:
        """Add what was counted in another file."""
        self.refused += other.refused
        self.sorted_histories += other.sorted_histories
        self.by_status.update(other.by_status)
        self.add_ids(other.ids)

    def to_json(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        return vars(self) | {"by_status": dict(self.by_status)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Counts":
        """Return the counts that ``to_json`` returned."""
        ids = {column: IdCount(*counts) for column, counts in values["ids"].items()}
        by_status = Counter(values["by_status"])
        return cls(values["refused"], values["sorted_histories"], by_status, ids)

    def summary(self, history_order: str) -> str:
        """What to tell the user, some lines."""
        lines = [
            f"scored {self.scored}, refused {self.refused}; cache: {dict(self.by_status)}",
            f"unknown ids: {self.unknown_text() or 'none'}",
        ]
        if history_order == SORT:
            lines.append(f"sorted histories: {self.sorted_histories}")
        return "\n".join(lines)

    def add_ids(self, count_by_column: dict[str, IdCount]) -> None:
        """Count the ids of a request."""
        for column, (given, unknown) in count_by_column.items():
            before = self.ids.get(column, IdCount(0, 0))
            self.ids[column] = IdCount(before.given + given, before.unknown + unknown)

    def unknown_text(self) -> str:
        """The columns that have unknown ids, with their number and share.

        Example:
            >>> counts = Counts()
            >>> counts.add_ids({"user_id": IdCount(4, 0), "candidates.item_id": IdCount(200, 3)})
            >>> counts.unknown_text()
            'candidates.item_id 3 of 200 (1.5 %)'
        """
        return ", ".join(
            f"{column} {unknown} of {given} ({100 * unknown / given:.1f} %)"
            for column, (given, unknown) in self.ids.items()
            if unknown
        )


@dataclass(frozen=True)
class Refusal:
    """What stands in the place of an answer."""

    request_id: Any
    cause: KVShareError

    def to_json(self) -> dict[str, Any]:
        """The project's one error format."""
        error = {"type": type(self.cause).__name__, "message": str(self.cause)}
        return {"request_id": self.request_id, "error": error}


def score_file(
    engine: Engine, requests: Path, output: Path, batch_requests: int, history_order: str = REFUSE
) -> Counts:
    """Answer a file of requests with a file of answers.

    Args:
        engine: scores what can be scored.
        requests: one JSON object a line.
        output: gets one JSON object a line, in the same order; replaced as a whole.
        batch_requests: most requests scored together; at least 1.
        history_order: ``refuse`` a history that is not oldest first, or ``sort`` it.

    Returns:
        How many lines were scored and refused, and what was odd about them.

    Raises:
        ConfigError: if ``requests`` cannot be read or ``batch_requests`` is below 1.
    """
    if batch_requests < 1:
        raise ConfigError(f"batch_requests is {batch_requests}; it must be at least 1")
    if not requests.is_file():
        raise ConfigError(f"requests is {str(requests)!r}; there is no such file")
    counts = Counts()
    output.parent.mkdir(parents=True, exist_ok=True)
    written = output.with_name(f".{output.name}.new")
    with requests.open("rb") as lines, written.open("w") as answers:
        for answer in score_lines(engine, lines, batch_requests, history_order, counts):
            answers.write(json.dumps(answer, allow_nan=False) + "\n")
    os.replace(written, output)
    return counts


def score_lines(
    engine: Engine,
    lines: Iterable[str | bytes | Mapping[str, Any]],
    batch_requests: int,
    history_order: str = REFUSE,
    counts: Counts | None = None,
) -> Iterator[dict[str, Any]]:
    """Answer every line, a few requests at a time.

    Args:
        engine: scores what can be scored.
        lines: requests, each a JSON object or decoded; blank lines are no requests.
        batch_requests: most requests scored together.
        history_order: as in ``score_file``.
        counts: where what becomes of the lines is counted.

    Yields:
        An answer or a refusal for each line, as JSON values, in order.
    """
    counts = Counts() if counts is None else counts
    waiting: list[Request | Refusal] = []
    num_candidates = 0
    for line in lines:
        if isinstance(line, str | bytes) and not line.strip():
            continue
        one = _read(line, engine.schema, history_order, counts)
        waiting.append(one)
        num_candidates += one.num_candidates if isinstance(one, Request) else 0
        if len(waiting) >= batch_requests or num_candidates >= MAX_CANDIDATES_AT_A_TIME:
            yield from _answer(engine, waiting, counts)
            waiting, num_candidates = [], 0
    yield from _answer(engine, waiting, counts)


def _answer(
    engine: Engine, waiting: list[Request | Refusal], counts: Counts
) -> Iterator[dict[str, Any]]:
    answers = iter(_rank(engine, [one for one in waiting if isinstance(one, Request)]))
    for one in waiting:
        if isinstance(one, Refusal):
            counts.refused += 1
            yield one.to_json()
            continue
        answer = next(answers)
        if isinstance(answer, Unscored):
            counts.refused += 1
            yield Refusal(one.request_id, answer.error).to_json()
        else:
            counts.by_status[answer.cache.status] += 1
            counts.add_ids(count_ids(one))
            yield answer.to_json()


def _rank(engine: Engine, requests: list[Request]) -> list[Answer | Unscored]:
    """Score requests together; with a store, a history that grows among them is extended.

    The engine encodes the distinct histories of a batch in one go. So the second history of a user
    is scored after the batch that encodes the first, the third after that.
    """
    if engine.store is None:
        return engine.rank_each(requests)
    batch = RequestBatch(requests)
    num_before = Counter[str]()
    turn_of_history = []
    for user in batch.users:
        turn_of_history.append(num_before[user.user_id])
        num_before[user.user_id] += 1
    turns = [turn_of_history[history] for history in batch.user_of_request]
    answer_by_row: dict[int, Answer | Unscored] = {}
    for turn in range(max(turns, default=-1) + 1):
        rows = [row for row, its_turn in enumerate(turns) if its_turn == turn]
        answer_by_row |= zip(rows, engine.rank_each(batch.select(rows)), strict=True)
    return [answer_by_row[row] for row in range(len(requests))]


def _read(
    line: str | bytes | Mapping[str, Any], schema: FeatureSchema, history_order: str, counts: Counts
) -> Request | Refusal:
    request_id = None
    try:
        given = decode_request(line) if isinstance(line, str | bytes) else line
        request_id = request_id_of(given)
        raw = sort_history(given) if history_order == SORT else given
        request = parse_request(raw, schema)
        counts.sorted_histories += raw is not given
        return request
    except RequestError as error:
        return Refusal(request_id, error)

"""Files of answers, as JSON lines or as Parquet, the same bytes whenever the answers are the same.

So they hold nothing that depends on when a request was scored, as the answers' ``cache`` does.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from torchrec_kvshare.data.parquet import import_pyarrow
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.features.schema import UNNAMED_TASK

JSONL, PARQUET = ".jsonl", ".parquet"  # endings of files of requests, and of their answers
NOT_WRITTEN = "cache"
# Answers in one group of rows: they wait in memory.
GROUP_ANSWERS, GROUP_SCORES = 8192, 2**20


class AnswerWriter(Protocol):
    """Writes answers and refusals to a file, in order."""

    def write(self, answer: Mapping[str, Any]) -> None:
        """Write one, as ``score_lines`` yields it."""

    def finish(self) -> None:
        """Write what is left; the file stays open."""


@contextmanager
def answer_writer(path: Path, file: BinaryIO, tasks: Sequence[str]) -> Iterator[AnswerWriter]:
    """Write a file of answers; all of them are in it at the end of the ``with`` block.

    Args:
        path: its name says whether they are JSON lines or Parquet.
        file: opened for writing, empty.
        tasks: of the model.

    Raises:
        ConfigError: if the file is of another kind.
        MissingExtraError: for Parquet without pyarrow.
    """
    writer = _JsonLines(file) if kind_of(path) == JSONL else _Parquet(file, tasks)
    try:
        yield writer
    finally:
        writer.finish()


class _JsonLines:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, answer: Mapping[str, Any]) -> None:
        kept = {key: value for key, value in answer.items() if key != NOT_WRITTEN}
        self._file.write(json.dumps(kept, allow_nan=False).encode() + b"\n")

    def finish(self) -> None:
        self._file.flush()


class _Parquet:
    """Columns request_id (text), scores, model_version and error; null is what an answer lacks.

    Scores by task are a struct with a list for each task.
    """

    def __init__(self, file: BinaryIO, tasks: Sequence[str]) -> None:
        self._arrow, parquet = import_pyarrow("writing Parquet")
        text, scores = self._arrow.string(), self._arrow.list_(self._arrow.float64())
        if UNNAMED_TASK not in tasks:
            scores = self._arrow.struct([(task, scores) for task in tasks])
        self._schema = self._arrow.schema(
            [
                ("request_id", text),
                ("scores", scores),
                ("model_version", text),
                ("error", self._arrow.struct([("type", text), ("message", text)])),
            ]
        )
        self._writer = parquet.ParquetWriter(file, self._schema)
        self._waiting: list[dict[str, Any]] = []
        self._num_scores = 0

    def write(self, answer: Mapping[str, Any]) -> None:
        row = {name: answer.get(name) for name in self._schema.names}
        if row["request_id"] is not None:
            row["request_id"] = str(row["request_id"])
        self._waiting.append(row)
        scores = row["scores"] or ()
        self._num_scores += sum(map(len, scores.values() if isinstance(scores, dict) else [scores]))
        if len(self._waiting) >= GROUP_ANSWERS or self._num_scores >= GROUP_SCORES:
            self._write_group()

    def finish(self) -> None:
        if self._waiting:
            self._write_group()
        self._writer.close()

    def _write_group(self) -> None:
        self._writer.write_table(self._arrow.Table.from_pylist(self._waiting, self._schema))
        self._waiting, self._num_scores = [], 0


def kind_of(path: Path) -> str:
    """Return the ending of a file of requests, which its answers have too.

    Raises:
        ConfigError: if it is of another kind.
    """
    if path.suffix not in (JSONL, PARQUET):
        raise ConfigError(f"requests has {str(path)!r}; {JSONL} and {PARQUET} are allowed")
    return path.suffix

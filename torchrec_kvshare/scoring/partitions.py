"""Score a data set of requests in partitions: files that hold all requests of some users each.

The answers of a partition are a file of their own, which appears when it is complete. A process
takes a partition by locking the file that it writes, and the system frees the lock of a process
that dies. So any number of processes share the partitions without talking to each other, and those
that are started after a kill score what is left, to the same bytes.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from torchrec_kvshare.data.files import file_sha256
from torchrec_kvshare.data.parquet import parquet_requests
from torchrec_kvshare.data.sources import source_files
from torchrec_kvshare.errors import ConfigError, DataError
from torchrec_kvshare.scoring.answer_files import PARQUET, answer_writer, kind_of
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.scoring.files import Counts, score_lines

# Hidden from readers of the folder, as Spark and Arrow hide names that begin so.
BEGUN = "_begun.json"
COUNTS = "_counts"


class Partition(NamedTuple):
    """A file of requests, and the files that answer it.

    Attributes:
        requests: all requests of some users, those of a user one after the other.
        answers: there once the partition is finished.
        counts: what became of the requests, and the digest of their file; there before ``answers``.
    """

    requests: Path
    answers: Path
    counts: Path

    @property
    def is_finished(self) -> bool:
        """Whether its answers are there."""
        return self.answers.exists()


@dataclass(frozen=True)
class ScoringSettings:
    """What answers depend on beside the model and the requests.

    Attributes:
        batch_requests: most requests scored together; at least 1.
        history_order: ``refuse`` a history that is not oldest first, or ``sort`` it.
        capacity_bytes: of K/V, for users that have several requests.
        deterministic: whether scores must be bit-equal whatever else is scored.
    """

    batch_requests: int
    history_order: str
    capacity_bytes: int
    deterministic: bool


def partitions_of(requests: str | list[str], output: Path) -> list[Partition]:
    """Find the files of requests, and say where each is answered.

    Args:
        requests: a file, a folder, a glob, or a list of these.
        output: the folder of the answers; below it they have the names of the requests.

    Raises:
        ConfigError: if a file is missing or of another kind, two would be answered in one file, or
            answers would be among the requests.
        DataError: if there are none.
    """
    partitions: dict[Path, Partition] = {}
    output = output.resolve()  # Other processes may have another working directory.
    files = source_files(requests, "requests")
    for named in requests if isinstance(requests, list) else [requests]:
        if Path(named).is_dir() and output.is_relative_to(Path(named).resolve()):
            raise ConfigError(f"output is {str(output)!r}, inside requests={named}")
    for path, _, name in files:
        kind_of(path)
        if not path.is_file():
            raise ConfigError(f"requests has {str(path)!r}; there is no such file")
        answers = output / name
        if answers in partitions:
            raise ConfigError(
                f"requests has {partitions[answers].requests} and {path}; both would be answered "
                f"in {answers}"
            )
        counts = output / COUNTS / f"{name}.json"
        partitions[answers] = Partition(path.resolve(), answers, counts)
    return list(partitions.values())


def begin(
    output: Path, model_version: str, settings: ScoringSettings, partitions: Iterable[Partition]
) -> None:
    """Begin a folder of answers, or check that what it holds are answers of the same.

    Args:
        output: the folder.
        model_version: of the engine.
        settings: of the scoring.
        partitions: those that are finished are checked.

    Raises:
        ConfigError: naming what the folder was begun with instead.
        DataError: if requests have changed since they were answered.
    """
    values = {"model_version": model_version, **asdict(settings)}
    path = output / BEGUN
    if path.is_file():
        before = json.loads(path.read_text())
        for key, value in values.items():
            if before.get(key) != value:
                raise ConfigError(
                    f"{output} was begun with {key} {before.get(key)}; it is {value} now: set "
                    "another output"
                )
    elif output.exists() and any(output.iterdir()):
        raise ConfigError(f"output is {str(output)!r}, which holds other files: it has no {BEGUN}")
    else:
        _write(path, values)
    for partition in partitions:
        if partition.is_finished:
            answered = _read_counts(partition)["requests_sha256"]
            if file_sha256(partition.requests) != answered:
                raise DataError(
                    f"{partition.requests} has changed since it was answered: remove "
                    f"{partition.answers}, or set another output"
                )


def score_partitions(
    engine: Engine, partitions: Sequence[Partition], settings: ScoringSettings
) -> Iterator[Partition]:
    """Score all partitions that no other process scores, then wait for the others.

    Args:
        engine: scores what can be scored.
        partitions: as ``partitions_of`` returns them.
        settings: as they were begun with.

    Yields:
        Each partition when its answers are there, whichever process made them.
    """
    taken: list[Partition] = []  # by other processes
    for partition in partitions:
        if score_partition(engine, partition, settings, waits=False):
            yield partition
        else:
            taken.append(partition)
        for other in [one for one in taken if one.is_finished]:
            taken.remove(other)
            yield other
    for partition in taken:
        score_partition(engine, partition, settings, waits=True)
        yield partition


def score_partition(
    engine: Engine, partition: Partition, settings: ScoringSettings, *, waits: bool
) -> bool:
    """Score a partition, unless it is finished.

    Args:
        engine: scores what can be scored.
        partition: its requests.
        settings: as they were begun with.
        waits: whether to wait for another process that scores it, and score it if that one dies.

    Returns:
        Whether the partition is finished; False if another process scores it.
    """
    with _taken(partition, waits=waits) as file:
        if file is None:
            return partition.is_finished
        counts = Counts()
        if engine.store is not None:
            # Scores may depend in their last bits on what is cached, so nothing is at first.
            for kv_version in engine.version.kv_versions:
                engine.store.clear(kv_version)
        with (
            _requests(partition.requests) as requests,
            answer_writer(partition.answers, file, engine.schema.tasks) as writer,
        ):
            for answer in score_lines(
                engine, requests, settings.batch_requests, settings.history_order, counts
            ):
                writer.write(answer)
        file.flush()
        os.fsync(file.fileno())
        _write(
            partition.counts,
            {"requests_sha256": file_sha256(partition.requests), "counts": counts.to_json()},
        )
        os.replace(_unfinished(partition), partition.answers)
    return True


def total(partitions: Iterable[Partition]) -> Counts:
    """Add up what became of the requests of finished partitions."""
    counts = Counts()
    for partition in partitions:
        counts.add(Counts.from_json(_read_counts(partition)["counts"]))
    return counts


@contextmanager
def _taken(partition: Partition, *, waits: bool) -> Iterator[BinaryIO | None]:
    """Lock the empty file for the answers; None if they are there or another process has it."""
    path = _unfinished(partition)
    path.parent.mkdir(parents=True, exist_ok=True)
    while not partition.is_finished:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                break
            if not _is_at(file, path):
                continue  # The process that had the lock has renamed the file.
            if partition.is_finished:
                path.unlink()
                break
            file.truncate()
            try:
                yield file
            except BaseException:
                path.unlink()
                raise
            return
    yield None


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _unfinished(partition: Partition) -> Path:
    return partition.answers.with_name(f".{partition.answers.name}.new")


@contextmanager
def _requests(path: Path) -> Iterator[Iterable[Any]]:
    """Open a file of requests: its lines, or its rows."""
    if kind_of(path) == PARQUET:
        yield parquet_requests(path)
    else:
        with path.open("rb") as lines:
            yield lines


def _read_counts(partition: Partition) -> dict[str, Any]:
    try:
        read: dict[str, Any] = json.loads(partition.counts.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{partition.counts} cannot be read ({error}): remove {partition.answers}, which it "
            "describes"
        ) from error
    return read


def _write(path: Path, values: dict[str, Any]) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".{path.name}.{os.getpid()}")
    written.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(written, path)

"""The columns that a model reads, and the table row of each raw id.

The schema is built from the training split, stored with the model, and used by training and serving
alike, so that a raw id maps to the same row everywhere. Two rows of every table are reserved.
"""

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchrec_kvshare.errors import ConfigError, DataError
from torchrec_kvshare.features.hashing import (
    IntArray,
    codes_of_ids,
    codes_of_integers,
)
from torchrec_kvshare.features.ids import canonical_id, canonical_ids

MISSING_ROW = 0  # the event or candidate has no value in this column
UNKNOWN_ROW = 1  # a value not seen in training: out of vocabulary
NUM_RESERVED_ROWS = 2

SCHEMA, IDS = "schema.json", "ids.npy"  # files of a run and of an artifact
VOCABULARY, HASHED, MANAGED = "vocabulary", "hashed", "managed"
MAX_EXAMPLES = 256
MAX_REMEMBERED = 2**16  # raw ids by column, with their rows

USER = "user_id"
ITEM = "item_id"
ACTION = "action"
TIME = "time"

HISTORY = "history"  # the usual name of a single history of all events

UNNAMED_TASK = ""  # the only task of a log with one rule for its labels
SCORES = "scores"
# Names of tasks are parts of names of tensors, such as ``scores.like`` beside ``scores.lengths``.
RESERVED_TASK = "lengths"
_TASK = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")

# Columns of a request's history that are not item attributes.
FIRST_EVENT = "first_event"
RESERVED_COLUMNS = (ITEM, ACTION, TIME, FIRST_EVENT)

# Further keys of the KeyedJaggedTensor, in groups of their own because a column may have any name.
REQUEST_TIME = "request.time"
REQUEST_HISTORY = "request.history"  # row of each request's histories; requests may share one
CANDIDATE_TIME = "targets.time"
# Of a training batch: the probability, as ``bits_of``, with which each shared item was drawn, and
# with which each candidate's target would have been.
SHARED_PROBABILITY = "request.shared_probability"
TARGET_PROBABILITY = "targets.shared_probability"
# Likewise of each candidate: log of how often it is drawn, over how often if all items were alike.
DRAW_RATIO = "targets.draw_ratio"
RESERVED_GROUPS = ("context", "candidates", "shared", "vectors", "request", "targets")

VECTOR = "candidates.vector"  # the pooled feature that has a candidate's own vector

# Sine and cosine of the hour of day and the day of week of the request.
CLOCK_FEATURES = ("hour_sin", "hour_cos", "weekday_sin", "weekday_cos")

RawId = str | int | float | bool


class IdMap(ABC):
    """Table rows of a column's raw ids: one map for all tables of the column.

    Attributes:
        kind: name of its kind, in configs and files.
        num_table_rows: rows of a table, including the reserved ones.
        examples: some ids that have a row of their own, to draw requests from.
        has_text: whether an id may be anything but an integer of 64 bits.
    """

    kind: str
    num_table_rows: int
    examples: tuple[str, ...]
    has_text: bool

    def __init__(self) -> None:
        # Most raw ids of a request came before: a dictionary is several times faster than hashing.
        self._row_by_raw: dict[RawId | None, int] = {None: MISSING_ROW}

    @abstractmethod
    def rows_of_codes(self, codes: IntArray) -> IntArray:
        """Return the rows of ids by their codes, see ``hashing``."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return the map as JSON values; a map in arrays is described by their digest."""

    def row(self, raw: RawId | None) -> int:
        """Return the row of one raw id."""
        return self.rows([raw])[0]

    def rows(
        self, raws: Iterable[RawId | None], check: Callable[[list[Any]], None] | None = None
    ) -> list[int]:
        """Return the rows of raw ids.

        Args:
            raws: in any spelling.
            check: called with those that were not checked before, to refuse them.

        Returns:
            The rows, in the order of the ids.
        """
        raws = list(raws)
        if bool in set(map(type, raws)):  # A dictionary takes True for 1.
            raws = [canonical_id(raw) if isinstance(raw, bool) else raw for raw in raws]
        found = list(map(self._row_by_raw.get, raws))
        if None not in found:
            return found  # type: ignore[return-value]
        new = [raw for raw, row in zip(raws, found, strict=True) if row is None]
        if check is not None:
            check(new)
        new_rows = self._new_rows(new).tolist()
        self._remember(new, new_rows)
        rest = iter(new_rows)
        return [next(rest) if row is None else row for row in found]

    def rows_of_ids(self, ids: Sequence[str]) -> IntArray:
        """Return the rows of ids that are spelt as ``canonical_id`` does."""
        return self.rows_of_codes(codes_of_ids(ids).codes)

    def rows_of_array(self, raws: IntArray) -> IntArray:
        """Return the rows of an int64 array of raw ids, without a Python object per id."""
        return self.rows_of_codes(codes_of_integers(raws))

    def _new_rows(self, raws: list[Any]) -> IntArray:
        if set(map(type, raws)) == {int}:
            try:
                return self.rows_of_array(np.array(raws, np.int64))
            except OverflowError:
                pass  # An integer beyond 64 bits is a text.
        return self.rows_of_ids(canonical_ids(raws))

    def _remember(self, raws: list[Any], rows: list[int]) -> None:
        """Keep the rows of known ids for ``rows``; unknown ids have no limit."""
        known = {raw: row for raw, row in zip(raws, rows, strict=True) if row != UNKNOWN_ROW}
        if len(known) > MAX_REMEMBERED:
            return
        if len(self._row_by_raw) + len(known) > MAX_REMEMBERED:
            self._row_by_raw = {None: MISSING_ROW}
        self._row_by_raw |= known


class Vocabulary(IdMap):
    """Rows of the ids of the training split; all other ids share ``UNKNOWN_ROW``.

    Ids are kept as codes only: another id is taken for one of n known ones with a probability of
    n / 2**62.

    Args:
        ids: the known ids, spelt as ``canonical_id`` does; the first gets row
            ``NUM_RESERVED_ROWS``.

    Attributes:
        codes: of the known ids, ascending.
        known_rows: the row of each code.

    Raises:
        DataError: if two of the ids have one code; the message names both.

    Example:
        >>> Vocabulary(["85123A", "71053"]).rows([71053, " 71053.0", "new", None])
        [3, 3, 1, 0]
    """

    kind = VOCABULARY

    def __init__(self, ids: Sequence[str]) -> None:
        super().__init__()
        codes, is_integer = codes_of_ids(ids)
        order = np.argsort(codes, kind="stable")
        self.codes, self.known_rows = codes[order], order + NUM_RESERVED_ROWS
        if (repeated := np.flatnonzero(self.codes[1:] == self.codes[:-1])).size:
            one, other = (ids[order[index]] for index in (repeated[0], repeated[0] + 1))
            raise DataError(
                f"the ids {one!r} and {other!r} of one column have one code; distinct ones are "
                "needed: rename one of them"
            )
        self.num_table_rows = len(ids) + NUM_RESERVED_ROWS
        self.examples = tuple(ids[:: -(-len(ids) // MAX_EXAMPLES) or 1])
        self.has_text = not is_integer.all()

    @classmethod
    def of_arrays(cls, arrays: IntArray, values: Mapping[str, Any]) -> "Vocabulary":
        """Return a vocabulary that was kept as arrays.

        Args:
            arrays: [2, ids], codes in ascending order and their rows.
            values: its other attributes, as ``to_json`` returns them.
        """
        vocabulary = cls([])
        vocabulary.codes, vocabulary.known_rows = arrays
        vocabulary.num_table_rows = values["num_table_rows"]
        vocabulary.examples = tuple(values["examples"])
        vocabulary.has_text = values["has_text"]
        return vocabulary

    @property
    def arrays(self) -> IntArray:
        """[2, ids], for ``of_arrays``."""
        return np.stack([self.codes, self.known_rows])

    def rows_of_codes(self, codes: IntArray) -> IntArray:
        """Return the rows of ids by their codes."""
        if not self.codes.size:
            return np.full(codes.shape, UNKNOWN_ROW)
        indices = np.searchsorted(self.codes, codes)
        indices[indices == self.codes.size] = 0
        return np.where(self.codes[indices] == codes, self.known_rows[indices], UNKNOWN_ROW)

    def to_json(self) -> dict[str, Any]:
        """Return everything but the arrays, which a digest stands for."""
        digest = hashlib.sha256(self.codes.data)
        digest.update(self.known_rows.data)
        return {
            "kind": self.kind,
            "num_ids": self.codes.size,
            "num_table_rows": self.num_table_rows,
            "has_text": self.has_text,
            "examples": list(self.examples),
            "sha256": digest.hexdigest(),
        }


class Hashed(IdMap):
    """Rows by a hash of the id: no id is listed or unknown, and ids may share a row.

    Args:
        num_rows: of a table, without the reserved ones.
        salt: another salt makes other ids share rows.

    Example:
        >>> Hashed(1000, salt=0).rows([71053, " 71053.0", "new", None])
        [861, 861, 848, 0]
    """

    kind = HASHED
    has_text = True

    def __init__(self, num_rows: int, salt: int = 0) -> None:
        super().__init__()
        self.num_rows, self.salt = num_rows, salt
        self.num_table_rows = num_rows + NUM_RESERVED_ROWS
        self.examples = tuple(map(str, range(MAX_EXAMPLES)))

    def rows_of_codes(self, codes: IntArray) -> IntArray:
        """Return the rows of ids by their codes."""
        # Imported here: reading a log needs no torch.
        import torch

        from torchrec_kvshare.features.hashed_rows import hashed_rows

        hashed = hashed_rows(torch.from_numpy(codes), self.num_rows, self.salt)
        rows: IntArray = (hashed + NUM_RESERVED_ROWS).numpy()
        return rows

    def to_json(self) -> dict[str, Any]:
        """Return the map as JSON values."""
        return {"kind": self.kind, "num_rows": self.num_rows, "salt": self.salt}


class Managed(IdMap):
    """Rows that ids are given while the model trains; a ``Vocabulary`` afterwards.

    In batches an id's code, behind the reserved rows, stands for its row until it is remapped.

    Args:
        num_rows: of a table, without the reserved ones.
        eviction_steps: training steps before rows change hands again.
    """

    kind = MANAGED
    has_text = True
    examples = ()

    def __init__(self, num_rows: int, eviction_steps: int = 1) -> None:
        super().__init__()
        self.num_rows, self.eviction_steps = num_rows, eviction_steps
        self.num_table_rows = num_rows + NUM_RESERVED_ROWS

    def rows_of_codes(self, codes: IntArray) -> IntArray:
        """Return what stands for the rows of ids in batches that are not remapped."""
        return codes + NUM_RESERVED_ROWS

    def to_json(self) -> dict[str, Any]:
        """Return the map as JSON values."""
        return {
            "kind": self.kind,
            "num_rows": self.num_rows,
            "eviction_steps": self.eviction_steps,
        }


@dataclass(frozen=True)
class Window:
    """How much of a history the model reads: the last events, starting on a block boundary.

    Attributes:
        max_history: maximum number of events the model reads.
        block: events between possible window starts; divides ``max_history``.
    """

    max_history: int
    block: int

    def __post_init__(self) -> None:
        if self.max_history < 1:
            raise ConfigError(f"max_history is {self.max_history}; it must be at least 1 event")
        if not 1 <= self.block <= self.max_history or self.max_history % self.block:
            raise ConfigError(
                f"block is {self.block}; it must divide max_history = {self.max_history} events"
            )

    def start(self, num_events: Any) -> Any:
        """Return the index of the first event that the model reads.

        Args:
            num_events: length of the history, an int or an array.

        Example:
            >>> window = Window(max_history=8, block=4)
            >>> [window.start(n) for n in (0, 8, 9, 12, 13)]
            [0, 0, 4, 4, 8]
        """
        # The surplus over max_history, rounded up to whole blocks; a negative surplus counts as 0.
        blocks = -((self.max_history - num_events) // self.block)
        return blocks * self.block * (blocks > 0)

    def start_among(self, first_event: int, num_given: int) -> int:
        """Return the index of the first event that the model reads of a partial history.

        Where the window starts before the given events, it starts with the first whole block
        given instead, so that it does not move while events are appended.

        Args:
            first_event: index of the first event given, among all of the user's.
            num_given: number of events given, the user's last ones.

        Example:
            >>> window = Window(max_history=8, block=4)
            >>> [window.start_among(first, 13 - first) for first in (0, 7, 8, 9, 12)]
            [8, 8, 8, 12, 12]
            >>> window.start_among(5, 2)
            5
        """
        end = first_event + num_given
        start: int = self.start(end)
        if start >= first_event:
            return start
        boundary = -(-first_event // self.block) * self.block
        return boundary if boundary < end else first_event


@dataclass(frozen=True)
class History:
    """One history of a user, with its own tower.

    Attributes:
        name: first part of its keys, and the name of its pooled feature.
        window: how much of it the model reads.
        actions: the actions whose events it keeps, such as ``("buy",)``, spelt as ``canonical_id``
            does; empty for all events.
    """

    name: str
    window: Window
    actions: tuple[str, ...] = ()


@dataclass(frozen=True)
class FeatureSchema:
    """The columns that a model reads, and the rows of their ids.

    Attributes:
        vocabulary_by_column: for ``user_id``, ``item_id``, every ``context_key``, ``item_key`` and
            ``event_key``.
        context: id columns of the user or the request, multi-valued.
        context_floats: float columns of the user or the request.
        event_attributes: id columns of events with one value each, such as ``action``; candidates
            do not have them.
        event_floats: float columns of events.
        item_attributes: id columns of an item, multi-valued, of events and candidates alike.
        item_floats: float columns of a candidate.
        histories: the histories that the model reads, at least one.
        tasks: what the model predicts, in the order of its logits; candidates are ranked by the
            first. ``(UNNAMED_TASK,)``: one task, whose scores have no name.

    Raises:
        ConfigError: if names of columns, histories or tasks clash, or a history needs actions that
            events do not have.
    """

    vocabulary_by_column: dict[str, IdMap]
    _: KW_ONLY
    context: tuple[str, ...] = ()
    context_floats: tuple[str, ...] = ()
    event_attributes: tuple[str, ...] = ()
    event_floats: tuple[str, ...] = ()
    item_attributes: tuple[str, ...] = ()
    item_floats: tuple[str, ...] = ()
    histories: tuple[History, ...]
    tasks: tuple[str, ...] = (UNNAMED_TASK,)

    def __post_init__(self) -> None:
        if self.tasks != (UNNAMED_TASK,):
            check_tasks(self.tasks)
        check_columns(
            self.item_attributes,
            self.item_floats,
            (*self.context, *self.context_floats),
            self.event_attributes,
            self.event_floats,
        )
        names = [history.name for history in self.histories]
        reserved = {*RESERVED_GROUPS, USER, ""}
        if not names or len(set(names)) < len(names) or reserved & set(names):
            raise ConfigError(
                f"histories are {names}; at least one, with distinct names other than {reserved}"
            )
        for history in self.histories:
            if "." in history.name:
                raise ConfigError(f"history {history.name!r}: no dot is allowed in its name")
            if history.actions and ACTION not in self.event_attributes:
                raise ConfigError(
                    f"history {history.name} keeps actions {history.actions}; events have no action"
                )

    @property
    def event_columns(self) -> tuple[str, ...]:
        """Id columns with one value per event, ``item_id`` first."""
        return (ITEM, *self.event_attributes)

    @property
    def num_dense(self) -> int:
        """Width of the dense features of a candidate."""
        return len(CLOCK_FEATURES) + len(self.context_floats) + len(self.item_floats)

    def num_table_rows(self, column: str) -> int:
        """Return the rows of a column's table; ``column`` is a key of the vocabularies."""
        return self.vocabulary_by_column[column].num_table_rows

    def to_json(self) -> dict[str, Any]:
        """Return the schema as JSON values; maps in arrays are described by their digests."""
        return {
            "vocabulary_by_column": {
                column: ids.to_json() for column, ids in self.vocabulary_by_column.items()
            },
            "context": list(self.context),
            "context_floats": list(self.context_floats),
            "event_attributes": list(self.event_attributes),
            "event_floats": list(self.event_floats),
            "item_attributes": list(self.item_attributes),
            "item_floats": list(self.item_floats),
            "histories": [
                {"name": h.name, "window": asdict(h.window), "actions": list(h.actions)}
                for h in self.histories
            ],
            "tasks": list(self.tasks),
        }


def save_schema(folder: Path, schema: FeatureSchema) -> None:
    """Write ``schema.json``, and the vocabularies' codes and rows to ``ids.npy`` beside it.

    ::

        # ids.npy: [2, ids of all vocabularies] int64, one vocabulary after the other
        # first row: codes in ascending order; second row: their table rows

    Each file is written atomically.
    """
    values = schema.to_json()
    parts, num_ids = [np.zeros((2, 0), np.int64)], 0
    for column, ids in schema.vocabulary_by_column.items():
        if isinstance(ids, Vocabulary):
            values["vocabulary_by_column"][column]["first_id"] = num_ids
            parts.append(ids.arrays)
            num_ids += ids.codes.size
    with _replaced(folder / IDS) as path, path.open("wb") as file:
        np.save(file, np.concatenate(parts, axis=1))
    with _replaced(folder / SCHEMA) as path:
        path.write_text(json.dumps(values, allow_nan=False))


def load_schema(folder: Path) -> FeatureSchema:
    """Read the schema that ``save_schema`` wrote.

    Raises:
        ConfigError: if the two files do not belong together.
    """
    values = json.loads((folder / SCHEMA).read_text())
    arrays = np.load(folder / IDS, allow_pickle=False)
    return FeatureSchema(
        {
            column: _id_map(folder, arrays, of_column)
            for column, of_column in values["vocabulary_by_column"].items()
        },
        context=tuple(values["context"]),
        context_floats=tuple(values["context_floats"]),
        event_attributes=tuple(values["event_attributes"]),
        event_floats=tuple(values["event_floats"]),
        item_attributes=tuple(values["item_attributes"]),
        item_floats=tuple(values["item_floats"]),
        histories=tuple(
            History(h["name"], Window(**h["window"]), tuple(h["actions"]))
            for h in values["histories"]
        ),
        tasks=tuple(values["tasks"]),
    )


def _id_map(folder: Path, arrays: IntArray, values: dict[str, Any]) -> IdMap:
    if values["kind"] == MANAGED:
        raise ConfigError(f"{folder / SCHEMA} has managed ids: its training has not ended")
    if values["kind"] == HASHED:
        return Hashed(values["num_rows"], values["salt"])
    first = values["first_id"]
    vocabulary = Vocabulary.of_arrays(arrays[:, first : first + values["num_ids"]], values)
    if vocabulary.to_json()["sha256"] != values["sha256"]:
        raise ConfigError(f"{folder / IDS} does not belong to {folder / SCHEMA} beside it")
    return vocabulary


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """Yield the name of a new file that replaces ``path`` at the end of the block."""
    written = path.with_name(f"{path.name}.new")
    yield written
    os.replace(written, path)


def check_tasks(tasks: Sequence[Any]) -> None:
    """Refuse names of tasks that cannot be told apart, or that tensors and metrics cannot have.

    Raises:
        ConfigError: naming the tasks and what is allowed.
    """
    for task in tasks:
        is_name = isinstance(task, str) and _TASK.fullmatch(task)
        if not is_name or task == RESERVED_TASK or list(tasks).count(task) > 1:
            raise ConfigError(
                f"the tasks are {list(tasks)}; {task!r} is not allowed: distinct names of letters, "
                f"digits, _ and - that begin with a letter, other than {RESERVED_TASK!r}"
            )
    if not tasks:
        raise ConfigError("there is no task; at least one is needed")


def check_columns(
    item_attributes: Sequence[str],
    item_floats: Sequence[str],
    context: Sequence[str],
    event_attributes: Sequence[str],
    event_floats: Sequence[str],
) -> None:
    """Refuse column names that clash in a request.

    Raises:
        ConfigError: naming the column and the names that are taken.
    """
    item_columns = (*item_attributes, *item_floats)
    event_columns = (*item_attributes, *event_attributes, *event_floats)
    others = (*(name for name in event_attributes if name != ACTION), *event_floats)
    for kind, names in (("item", item_columns), ("event", others)):
        if taken := [name for name in names if name in RESERVED_COLUMNS]:
            raise ConfigError(
                f"{kind} columns are named {taken}; requests reserve {list(RESERVED_COLUMNS)} for "
                "events: rename the columns in the data"
            )
    for kind, names in (("item", item_columns), ("user", tuple(context)), ("event", event_columns)):
        for name in names:
            if not name or names.count(name) > 1:
                came = "empty" if not name else "there twice"
                raise ConfigError(f"the {kind} columns are {list(names)}; {name!r} is {came}")


def context_key(column: str) -> str:
    """Return the key of a context column in the batch, and of its vocabulary."""
    return f"context.{column}"


def item_key(column: str) -> str:
    """Return the key of an item attribute's vocabulary, shared by histories and candidates."""
    return f"items.{column}"


def event_key(column: str) -> str:
    """Return the key of the vocabulary of an event column: the item's own, or the attribute's."""
    return column if column == ITEM else f"events.{column}"


def score_name(task: str) -> str:
    """Return the name of the tensor that has a task's scores.

    Example:
        >>> score_name("like"), score_name(UNNAMED_TASK)
        ('scores.like', 'scores')
    """
    return f"{SCORES}.{task}" if task else SCORES


def table_name(key: str) -> str:
    """Return a vocabulary's key, or a history's name, as a valid module name.

    Example:
        >>> [table_name(key) for key in ("item_id", "items.price band", "context.a.b")]
        ['item_id', 'items_price_x20_band', 'context_a_x2e_b']
    """
    return re.sub(r"\W", lambda odd: f"_x{ord(odd[0]):x}_", key.replace(".", "_", 1), flags=re.A)


def history_key(history: str, column: str) -> str:
    """Return the key of an event column of a history in the batch."""
    return f"{history}.{column}"


def pages_key(history: str) -> str:
    """Return the key of the page ids of a history's K/V."""
    return f"request.pages.{history}"


def position_key(history: str) -> str:
    """Return the key of the positions of a history's events."""
    return f"request.position.{history}"


def first_index_key(history: str) -> str:
    """Return the key of the first given event's index in the window; a batch without it means 0."""
    return f"request.first_index.{history}"


def visible_key(history: str) -> str:
    """Return the key of how many events of a history each candidate may see."""
    return f"targets.visible_events.{history}"


def shared_key(column: str) -> str:
    """Return the key of a column of the items that all targets of a training batch share."""
    return f"shared.{column}"


def state_feature(history: str) -> str:
    """Return the pooled feature that has the state of a candidate's user."""
    return f"{history}.state"


def vector_key(column: str) -> str:
    """Return the key of an item's column for its vector, of candidates and shared items."""
    return f"vectors.{column}"


def has_candidate_rows(key: str) -> bool:
    """Return whether a key has one row per candidate, not per user or event."""
    return key.startswith(("candidates.", "targets."))


def candidate_key(column: str) -> str:
    """Return the key of a candidate column in the batch."""
    return f"candidates.{column}"

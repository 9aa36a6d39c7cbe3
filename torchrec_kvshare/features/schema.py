"""The columns that a model reads, and the table row of each raw id.

The schema is built from the training split, stored with the model, and used by training and serving
alike, so that a raw id maps to the same row everywhere. Two rows of every table are reserved.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from functools import cached_property
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt

from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.features.ids import canonical_id, is_integer_id

MISSING_ROW = 0  # the event or candidate has no value in this column
UNKNOWN_ROW = 1  # a value not seen in training: out of vocabulary
NUM_RESERVED_ROWS = 2
MAX_INT64 = 2**63 - 1

USER = "user_id"
ITEM = "item_id"
ACTION = "action"
TIME = "time"

HISTORY = "history"  # the usual name of a single history of all events

# Columns of a request's history that are not item attributes.
FIRST_EVENT = "first_event"
RESERVED_COLUMNS = (ITEM, ACTION, TIME, FIRST_EVENT)

# Further keys of the KeyedJaggedTensor, in groups of their own because a column may have any name.
REQUEST_TIME = "request.time"
REQUEST_HISTORY = "request.history"  # row of each request's histories; requests may share one
CANDIDATE_TIME = "targets.time"
RESERVED_GROUPS = ("context", "candidates", "request", "targets")

# Sine and cosine of the hour of day and the day of week of the request.
CLOCK_FEATURES = ("hour_sin", "hour_cos", "weekday_sin", "weekday_cos")

RawId = str | int | float | bool
IntArray = npt.NDArray[np.int64]


class Vocabulary:
    """Rows of an embedding table by raw id.

    Args:
        ids: the known ids, spelt as ``canonical_id`` does; the first gets row
            ``NUM_RESERVED_ROWS``.

    Example:
        >>> Vocabulary(["85123A", "71053"]).rows([71053, " 71053.0", "new", None])
        [3, 3, 1, 0]
    """

    def __init__(self, ids: Sequence[str]) -> None:
        self.ids = tuple(ids)
        # An integer id is a key as text and as int, so that usual spellings need no conversion.
        self._row_by_id: dict[RawId | None, int] = {None: MISSING_ROW}
        for row, spelt in enumerate(self.ids, NUM_RESERVED_ROWS):
            self._row_by_id[spelt] = row
            if is_integer_id(spelt):
                self._row_by_id[int(spelt)] = row

    @property
    def num_table_rows(self) -> int:
        """Rows of the table, including the reserved ones."""
        return len(self.ids) + NUM_RESERVED_ROWS

    def row(self, raw: RawId | None) -> int:
        """Return the row of one raw id."""
        return self.rows([raw])[0]

    def rows(self, raws: Iterable[RawId | None]) -> list[int]:
        """Return the rows of raw ids, in their order."""
        raws = list(raws)
        kinds = set(map(type, raws))
        if bool in kinds:  # A dictionary takes True for 1.
            raws = [canonical_id(raw) if isinstance(raw, bool) else raw for raw in raws]
        rows = list(map(self._row_by_id.get, raws, repeat(UNKNOWN_ROW)))
        if UNKNOWN_ROW in rows and kinds & {str, float}:
            for index, row in enumerate(rows):
                raw = raws[index]
                if row == UNKNOWN_ROW and isinstance(raw, str | float):
                    rows[index] = self._row_by_id.get(canonical_id(raw), UNKNOWN_ROW)
        return rows

    def rows_of_array(self, raws: IntArray) -> IntArray:
        """Return the rows of an int64 array of raw ids, without a Python object per id."""
        integers, rows = self._sorted_integers
        indices = np.searchsorted(integers, raws)
        indices[indices == integers.size] = 0
        return np.where(integers[indices] == raws, rows[indices], UNKNOWN_ROW)

    @cached_property
    def _sorted_integers(self) -> tuple[IntArray, IntArray]:
        """The int64 ids in ascending order and their rows; never empty."""
        row_by_integer = {
            raw: row
            for raw, row in self._row_by_id.items()
            if isinstance(raw, int) and abs(raw) <= MAX_INT64
        } or {-1: UNKNOWN_ROW}
        integers = np.array(sorted(row_by_integer))
        return integers, np.array([row_by_integer[raw] for raw in integers.tolist()])


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
    """The columns that a model reads, and their vocabularies.

    Attributes:
        vocabulary_by_column: for ``user_id``, ``item_id``, ``action``, every ``context_key`` and
            every ``item_key``.
        context: id columns of the user or the request, multi-valued.
        has_action: whether events carry an ``action`` column.
        item_attributes: id columns of an item, multi-valued, of events and candidates alike.
        item_floats: float columns of a candidate.
        histories: the histories that the model reads, at least one.

    Raises:
        ConfigError: if names of columns or histories clash, or a history needs actions that events
            do not have.
    """

    vocabulary_by_column: dict[str, Vocabulary]
    _: KW_ONLY
    context: tuple[str, ...] = ()
    has_action: bool = False
    item_attributes: tuple[str, ...] = ()
    item_floats: tuple[str, ...] = ()
    histories: tuple[History, ...]

    def __post_init__(self) -> None:
        check_columns(self.item_attributes, self.item_floats, self.context)
        names = [history.name for history in self.histories]
        reserved = {*RESERVED_GROUPS, USER, ""}
        if not names or len(set(names)) < len(names) or reserved & set(names):
            raise ConfigError(
                f"histories are {names}; at least one, with distinct names other than {reserved}"
            )
        for history in self.histories:
            if "." in history.name:
                raise ConfigError(f"history {history.name!r}: no dot is allowed in its name")
            if history.actions and not self.has_action:
                raise ConfigError(
                    f"history {history.name} keeps actions {history.actions}; events have no action"
                )

    @property
    def event_columns(self) -> tuple[str, ...]:
        """Id columns with one value per event, ``item_id`` first."""
        return (ITEM, ACTION) if self.has_action else (ITEM,)

    @property
    def num_dense(self) -> int:
        """Width of the dense features of a candidate."""
        return len(CLOCK_FEATURES) + len(self.item_floats)

    def num_table_rows(self, column: str) -> int:
        """Return the rows of a column's table; ``column`` is a key of the vocabularies."""
        return self.vocabulary_by_column[column].num_table_rows

    def to_json(self) -> dict[str, Any]:
        """Return the schema as JSON values, for ``from_json``."""
        return {
            "vocabulary_by_column": {c: list(v.ids) for c, v in self.vocabulary_by_column.items()},
            "context": list(self.context),
            "has_action": self.has_action,
            "item_attributes": list(self.item_attributes),
            "item_floats": list(self.item_floats),
            "histories": [
                {"name": h.name, "window": asdict(h.window), "actions": list(h.actions)}
                for h in self.histories
            ],
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "FeatureSchema":
        """Return the schema that ``to_json`` wrote."""
        return cls(
            vocabulary_by_column={
                c: Vocabulary(ids) for c, ids in values["vocabulary_by_column"].items()
            },
            context=tuple(values["context"]),
            has_action=values["has_action"],
            item_attributes=tuple(values["item_attributes"]),
            item_floats=tuple(values["item_floats"]),
            histories=tuple(
                History(h["name"], Window(**h["window"]), tuple(h["actions"]))
                for h in values["histories"]
            ),
        )


def check_columns(
    item_attributes: Sequence[str], item_floats: Sequence[str], context: Sequence[str]
) -> None:
    """Refuse column names that clash in a request.

    Raises:
        ConfigError: naming the column and the names that are taken.
    """
    item_columns = (*item_attributes, *item_floats)
    for kind, names in (("item", item_columns), ("user", context)):
        for name in names:
            if not name or names.count(name) > 1:
                came = "empty" if not name else "there twice"
                raise ConfigError(f"the {kind} columns are {list(names)}; {name!r} is {came}")
    if taken := [name for name in item_columns if name in RESERVED_COLUMNS]:
        raise ConfigError(
            f"item columns are named {taken}; requests reserve {list(RESERVED_COLUMNS)} for "
            "events: rename the columns in the data"
        )


def context_key(column: str) -> str:
    """Return the key of a context column in the batch, and of its vocabulary."""
    return f"context.{column}"


def item_key(column: str) -> str:
    """Return the key of an item attribute's vocabulary, shared by histories and candidates."""
    return f"items.{column}"


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


def has_candidate_rows(key: str) -> bool:
    """Return whether a key has one row per candidate, not per user or event."""
    return key.startswith(("candidates.", "targets."))


def candidate_key(column: str) -> str:
    """Return the key of a candidate column in the batch."""
    return f"candidates.{column}"

"""Which columns a model reads, and which row of a table each raw id has.

One schema is made from the training split, stored with the model, and used by training and serving
alike, so that a raw id means the same row everywhere. Two rows of every table are reserved.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt

from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.features.ids import canonical_id, is_integer_id

MISSING_ROW = 0  # the event or candidate has no value in this column
UNKNOWN_ROW = 1  # a value never seen in training: out of vocabulary, or cold
NUM_RESERVED_ROWS = 2
MAX_INT64 = 2**63 - 1

USER = "user_id"
ITEM = "item_id"
ACTION = "action"
TIME = "time"

HISTORY = "history"  # the usual name of the one history that has all events

# Columns of a request's history that are none of the model's item attributes.
FIRST_EVENT = "first_event"
RESERVED_COLUMNS = (ITEM, ACTION, TIME, FIRST_EVENT)

# Keys of the KeyedJaggedTensor beside the columns' own, in groups of theirs: a column has any name.
REQUEST_TIME = "request.time"
REQUEST_HISTORY = "request.history"  # row of each request's histories: two may share one
CANDIDATE_TIME = "targets.time"
RESERVED_GROUPS = ("context", "candidates", "request", "targets")

# Sine and cosine of the hour of day and of the day of week, known of every request.
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
        # An integer is a key beside its text, so that the usual spellings are found at once.
        self._row_by_id: dict[RawId | None, int] = {None: MISSING_ROW}
        for row, spelt in enumerate(self.ids, NUM_RESERVED_ROWS):
            self._row_by_id[spelt] = row
            if is_integer_id(spelt):
                self._row_by_id[int(spelt)] = row

    @property
    def num_rows(self) -> int:
        """Rows that a table needs, reserved ones included."""
        return len(self.ids) + NUM_RESERVED_ROWS

    def row(self, raw: RawId | None) -> int:
        """Row of one raw id."""
        return self.rows([raw])[0]

    def rows(self, raws: Iterable[RawId | None]) -> list[int]:
        """Rows of many raw ids, in their order."""
        raws = list(raws)
        kinds = set(map(type, raws))
        if bool in kinds:  # To a dictionary True is 1.
            raws = [canonical_id(raw) if isinstance(raw, bool) else raw for raw in raws]
        rows = list(map(self._row_by_id.get, raws, repeat(UNKNOWN_ROW)))
        if UNKNOWN_ROW in rows and kinds & {str, float}:
            for place, row in enumerate(rows):
                raw = raws[place]
                if row == UNKNOWN_ROW and isinstance(raw, str | float):
                    rows[place] = self._row_by_id.get(canonical_id(raw), UNKNOWN_ROW)
        return rows

    def rows_of_array(self, raws: IntArray) -> IntArray:
        """Rows of an int64 array of raw ids: ``rows``, without a Python object for each."""
        integers, rows = self._sorted_integers
        places = np.searchsorted(integers, raws)
        places[places == integers.size] = 0
        return np.where(integers[places] == raws, rows[places], UNKNOWN_ROW)

    @cached_property
    def _sorted_integers(self) -> tuple[IntArray, IntArray]:
        """The ids that are int64 in ascending order, and their rows; at least one."""
        row_by_integer = {
            raw: row
            for raw, row in self._row_by_id.items()
            if isinstance(raw, int) and abs(raw) <= MAX_INT64
        } or {-1: UNKNOWN_ROW}
        integers = np.array(sorted(row_by_integer))
        return integers, np.array([row_by_integer[raw] for raw in integers.tolist()])


@dataclass(frozen=True)
class Window:
    """How much of a history the model reads: the last events, from a block boundary on.

    Attributes:
        max_history: most events the model reads.
        block: events between two places where a window may start; divides ``max_history``.
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
        """First event that the model reads of a history of ``num_events`` (an int, or an array).

        Example:
            >>> window = Window(max_history=8, block=4)
            >>> [window.start(n) for n in (0, 8, 9, 12, 13)]
            [0, 0, 4, 4, 8]
        """
        # The surplus over max_history, rounded up to whole blocks; negative surpluses vanish.
        blocks = -((self.max_history - num_events) // self.block)
        return blocks * self.block * (blocks > 0)

    def start_among(self, first_event: int, num_given: int) -> int:
        """First event that the model reads where a request gives only the last of a user's.

        Where too few are given, the window starts with the first block that is there whole, so
        that it stays where it is while more events come.

        Args:
            first_event: place of the first event given.
            num_given: events given.

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
    """One history of a user, which a tower of its own reads.

    Attributes:
        name: first part of its keys, and the name of the feature that it is pooled to.
        window: how much of it the model reads.
        actions: actions of its events, such as ``("buy",)``, spelt as ``canonical_id`` does; empty
            for all events.
    """

    name: str
    window: Window
    actions: tuple[str, ...] = ()


@dataclass(frozen=True)
class FeatureSchema:
    """The columns that a model reads and the vocabulary of each.

    Attributes:
        vocabulary_by_column: for ``user_id``, ``item_id``, ``action``, every ``context_key`` and
            every ``item_key``.
        context: id columns of the user or the request, multi-valued.
        has_action: whether events carry an ``action`` column.
        item_attributes: id columns of an item, multi-valued, on events and candidates alike.
        item_floats: float columns of a candidate.
        histories: what the model reads of a user's events, at least one.

    Raises:
        ConfigError: if columns or histories cannot be told apart, or histories need actions that
            events do not have.
    """

    vocabulary_by_column: dict[str, Vocabulary]
    context: tuple[str, ...]
    has_action: bool
    item_attributes: tuple[str, ...]
    item_floats: tuple[str, ...]
    histories: tuple[History, ...]

    def __post_init__(self) -> None:
        check_columns(self.item_attributes, self.item_floats, self.context)
        names = [history.name for history in self.histories]
        reserved = {*RESERVED_GROUPS, USER, ""}
        if not names or len(set(names)) < len(names) or reserved & set(names):
            raise ConfigError(
                f"histories are {names}; names that differ and are none of {reserved}"
            )
        for history in self.histories:
            if "." in history.name:
                raise ConfigError(f"histories has {history.name!r}; a name has no dot")
            if history.actions and not self.has_action:
                raise ConfigError(
                    f"history {history.name} is of actions {history.actions}; events have no action"
                )

    @property
    def event_columns(self) -> tuple[str, ...]:
        """Id columns with one value per event, the item first."""
        return (ITEM, ACTION) if self.has_action else (ITEM,)

    @property
    def num_dense(self) -> int:
        """Width of the dense features of a candidate."""
        return len(CLOCK_FEATURES) + len(self.item_floats)

    def num_rows(self, column: str) -> int:
        """Rows that the table of a column needs, a key of ``vocabulary_by_column``."""
        return self.vocabulary_by_column[column].num_rows

    def to_json(self) -> dict[str, Any]:
        """Everything needed to build the schema again, as JSON values."""
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
        """The schema that ``to_json`` wrote."""
        return cls(
            {c: Vocabulary(ids) for c, ids in values["vocabulary_by_column"].items()},
            tuple(values["context"]),
            values["has_action"],
            tuple(values["item_attributes"]),
            tuple(values["item_floats"]),
            tuple(
                History(h["name"], Window(**h["window"]), tuple(h["actions"]))
                for h in values["histories"]
            ),
        )


def check_columns(
    item_attributes: Sequence[str], item_floats: Sequence[str], context: Sequence[str]
) -> None:
    """Refuse columns that requests could not tell apart.

    Raises:
        ConfigError: naming the column and the names that are taken.
    """
    of_items = (*item_attributes, *item_floats)
    for kind, names in (("an item", of_items), ("a user", context)):
        for name in names:
            if not name or names.count(name) > 1:
                came = "empty" if not name else "there twice"
                raise ConfigError(f"the columns of {kind} are {list(names)}; {name!r} is {came}")
    if taken := [name for name in of_items if name in RESERVED_COLUMNS]:
        raise ConfigError(
            f"columns of an item are called {taken}; in a request {list(RESERVED_COLUMNS)} are an "
            "event's own: rename them in the data"
        )


def context_key(column: str) -> str:
    """Key of a context column in the batch, and of its vocabulary."""
    return f"context.{column}"


def item_key(column: str) -> str:
    """Key of the vocabulary of an item attribute, which histories and candidates share."""
    return f"items.{column}"


def table_name(key: str) -> str:
    """The key of a vocabulary, or the name of a history, as a module may be called.

    Example:
        >>> [table_name(key) for key in ("item_id", "items.price band", "context.a.b")]
        ['item_id', 'items_price_x20_band', 'context_a_x2e_b']
    """
    return re.sub(r"\W", lambda odd: f"_x{ord(odd[0]):x}_", key.replace(".", "_", 1), flags=re.A)


def history_key(history: str, column: str) -> str:
    """Key of an event column of a history in the batch."""
    return f"{history}.{column}"


def pages_key(history: str) -> str:
    """Key of the page ids of a history's K/V."""
    return f"request.pages.{history}"


def position_key(history: str) -> str:
    """Key of the positions of a history's events."""
    return f"request.position.{history}"


def first_place_key(history: str) -> str:
    """Key of the place in the window of the first event given; 0 where the batch has none."""
    return f"request.first_place.{history}"


def visible_key(history: str) -> str:
    """Key of how many events of a history each candidate may see."""
    return f"targets.visible_events.{history}"


def has_candidate_rows(key: str) -> bool:
    """Whether a key has a row for each candidate, and not one for each user or event."""
    return key.startswith(("candidates.", "targets."))


def candidate_key(column: str) -> str:
    """Key of a candidate column in the batch."""
    return f"candidates.{column}"

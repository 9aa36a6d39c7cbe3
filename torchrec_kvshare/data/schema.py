"""Which columns a model reads, and which row of a table each raw id has.

One schema is made from the training split, stored with the model, and used by training and serving
alike, so that a raw id means the same row everywhere. Two rows of every table are reserved.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt

from torchrec_kvshare.errors import ConfigError

MISSING_ROW = 0  # the event or candidate has no value in this column
UNKNOWN_ROW = 1  # a value never seen in training: out of vocabulary, or cold
NUM_RESERVED_ROWS = 2
MAX_INT64 = 2**63 - 1
MAX_DIGITS = 4300  # of an integer that Python reads from text

USER = "user_id"
ITEM = "item_id"
ACTION = "action"
TIME = "time"

HISTORY = "history"  # the usual name of the one history that has all events

# Keys of the KeyedJaggedTensor beside the columns' own: requests' and candidates'.
REQUEST_TIME = "request.time"
REQUEST_HISTORY = "request.history"  # row of each request's histories: two may share one
CANDIDATE_TIME = "candidates.time"
# Columns of a history beside those of the schema.
PAGES = "pages"
POSITION = "position"
FIRST_PLACE = "first_place"  # place in the window of the first event given; 0 if not said

# Sine and cosine of the hour of day and of the day of week, known of every request.
CLOCK_FEATURES = ("hour_sin", "hour_cos", "weekday_sin", "weekday_cos")

IntArray = npt.NDArray[np.int64]


class Vocabulary:
    """Rows of an embedding table by raw id.

    Args:
        ids: the known raw ids as text; the first gets row ``NUM_RESERVED_ROWS``.

    Example:
        >>> Vocabulary(["85123A", "71053"]).rows([71053, "71053", "new", None])
        [3, 3, 1, 0]
    """

    def __init__(self, ids: Sequence[str]) -> None:
        self.ids = tuple(ids)
        # An integer and its text are the same id; both are keys, so that looking one up is enough.
        self._row_by_id: dict[str | int | None, int] = {None: MISSING_ROW}
        for row, raw in enumerate(self.ids, NUM_RESERVED_ROWS):
            self._row_by_id[raw] = row
            if _is_integer(raw):
                self._row_by_id[int(raw)] = row

    @property
    def num_rows(self) -> int:
        """Rows that a table needs, reserved ones included."""
        return len(self.ids) + NUM_RESERVED_ROWS

    def row(self, raw: str | int | None) -> int:
        """Row of one raw id."""
        return self._row_by_id.get(raw, UNKNOWN_ROW)

    def rows(self, raws: Iterable[str | int | None]) -> list[int]:
        """Rows of many raw ids, in their order."""
        return list(map(self._row_by_id.get, raws, repeat(UNKNOWN_ROW)))

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
            if isinstance(raw, int) and raw <= MAX_INT64
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


@dataclass(frozen=True)
class History:
    """One history of a user, which a tower of its own reads.

    Attributes:
        name: first part of its keys, and the name of the feature that it is pooled to.
        window: how much of it the model reads.
        actions: the raw actions of its events, such as ``("buy",)``; empty for all events.
    """

    name: str
    window: Window
    actions: tuple[str, ...] = ()

    def places(self, actions: Sequence[Any]) -> list[int]:
        """Which of a user's events the model reads as this history, oldest first.

        Args:
            actions: the raw action of each event; their number alone matters where all events are
                meant.

        Example:
            >>> History("buys", Window(2, 1), ("buy",)).places(["buy", "view", "buy", "buy"])
            [2, 3]
        """
        if not self.actions:
            return list(range(self.window.start(len(actions)), len(actions)))
        places = [place for place, action in enumerate(actions) if str(action) in self.actions]
        return places[self.window.start(len(places)) :]

    def num_events(self, actions: Sequence[Any]) -> int:
        """How many of a user's events are this history's, before it is cut to the window."""
        if not self.actions:
            return len(actions)
        return sum(str(action) in self.actions for action in actions)


@dataclass(frozen=True)
class FeatureSchema:
    """The columns that a model reads and the vocabulary of each.

    Attributes:
        vocabulary_by_column: for ``user_id``, ``item_id`` and every id column below.
        context: id columns of the user or the request, multi-valued.
        has_action: whether events carry an ``action`` column.
        item_attributes: id columns of an item, multi-valued, on events and candidates alike.
        item_floats: float columns of a candidate.
        histories: what the model reads of a user's events, at least one.

    Raises:
        ConfigError: if the histories cannot be told apart or need actions that events do not have.
    """

    vocabulary_by_column: dict[str, Vocabulary]
    context: tuple[str, ...]
    has_action: bool
    item_attributes: tuple[str, ...]
    item_floats: tuple[str, ...]
    histories: tuple[History, ...]

    def __post_init__(self) -> None:
        names = [history.name for history in self.histories]
        reserved = {"context", "request", "candidates", USER, ""}
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
        """Rows that the table of a column needs."""
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


def _is_integer(raw: str) -> bool:
    """Whether a text is how Python writes some integer."""
    return raw.isdecimal() and len(raw) <= MAX_DIGITS and str(int(raw)) == raw


def context_key(column: str) -> str:
    """Key of a context column in the batch."""
    return f"context.{column}"


def history_key(history: str, column: str) -> str:
    """Key of an event column of a history in the batch."""
    return f"{history}.{column}"


def visible_key(history: str) -> str:
    """Key of how many events of a history each candidate may see."""
    return f"candidates.visible_events.{history}"


def candidate_key(column: str) -> str:
    """Key of a candidate column in the batch."""
    return f"candidates.{column}"

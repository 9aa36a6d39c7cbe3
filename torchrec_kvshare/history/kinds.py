"""The kinds of history encoders, each registered once, and what a tower of a kind is built from.

A new kind is a file of its own, a row of ``KIND_BY_NAME`` and its meaning in ``reference.py``;
benchmarks ask ``profiling/cost_model.py`` for what it computes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.history.bidirectional import BidirectionalEncoder
from torchrec_kvshare.history.causal import CausalEncoder
from torchrec_kvshare.history.hstu import HSTUEncoder
from torchrec_kvshare.history.longer import LongerEncoder
from torchrec_kvshare.history.target_only import TargetOnlyEncoder

CAUSAL = "causal"
BIDIRECTIONAL = "bidirectional"
TARGET_ONLY = "target_only"
HSTU = "hstu"
LONGER = "longer"
HistoryEncoder = (
    CausalEncoder | BidirectionalEncoder | TargetOnlyEncoder | HSTUEncoder | LongerEncoder
)


@dataclass(frozen=True)
class TowerSpec:
    """What a tower is, whatever history it reads.

    Attributes:
        kind: one of ``KINDS``.
        dim: width E.
        num_layers: layers in the stack.
        num_heads: H; must divide ``dim``.
        dropout: share of activations dropped in training.
        num_tokens: M, tokens of one candidate.
        window: events that a row and a candidate see at every layer; 0 for all.
        merge: ``longer``: events in a group.
        recent: ``longer``: newest events whose groups go on to deeper layers.
        num_globals: ``longer``: learned rows that see the whole history.

    Raises:
        ConfigError: naming the field, if a value or the combination cannot work.
    """

    kind: str
    dim: int
    num_layers: int
    num_heads: int
    dropout: float = 0.0
    num_tokens: int = 1
    window: int = 0
    merge: int = 8
    recent: int = 128
    num_globals: int = 4

    def __post_init__(self) -> None:
        if self.kind not in KIND_BY_NAME:
            raise ConfigError(f"history is {self.kind!r}; one of {KINDS} is allowed")
        if self.num_tokens < 1:
            raise ConfigError(f"num_tokens is {self.num_tokens}; a candidate has at least 1 token")
        if self.window < 0:
            raise ConfigError(
                f"window is {self.window} events; it must be at least 1, or 0 for all"
            )
        if self.window and not KIND_BY_NAME[self.kind].slides:
            raise ConfigError(f"window is {self.window}; {self.kind} has no sliding windows")

    @property
    def has_positions(self) -> bool:
        """Whether event tokens say how far from the oldest event they are."""
        return KIND_BY_NAME[self.kind].mixes_events and self.window == 0

    @property
    def extends(self) -> bool:
        """Whether new events can be encoded behind cached ones."""
        return KIND_BY_NAME[self.kind].extends

    @property
    def events_read(self) -> int:
        """Events back that a candidate's vector depends on under a sliding window."""
        depth = self.num_layers if KIND_BY_NAME[self.kind].mixes_events else 1
        return depth * (self.window - 1) + 1


class Kind(NamedTuple):
    """One kind of encoder.

    Attributes:
        new: an encoder of a spec, for ``max_history`` events in a window and blocks of so many.
        slides: whether it can have a sliding window.
        extends: whether new events can be encoded behind cached ones.
        mixes_events: whether an event's K/V depends on other events, and on its own place.
    """

    new: Callable[[TowerSpec, int, int], HistoryEncoder]
    slides: bool = False
    extends: bool = True
    mixes_events: bool = True


def _sizes(spec: TowerSpec) -> tuple[int, int, int, float]:
    return spec.dim, spec.num_layers, spec.num_heads, spec.dropout


KIND_BY_NAME = {
    CAUSAL: Kind(lambda spec, *_: CausalEncoder(*_sizes(spec), spec.window), slides=True),
    BIDIRECTIONAL: Kind(lambda spec, *_: BidirectionalEncoder(*_sizes(spec)), extends=False),
    TARGET_ONLY: Kind(
        lambda spec, *_: TargetOnlyEncoder(*_sizes(spec), spec.window),
        slides=True,
        mixes_events=False,
    ),
    HSTU: Kind(
        lambda spec, max_history, _: HSTUEncoder(
            *_sizes(spec), spec.window or max_history, spec.window
        ),
        slides=True,
    ),
    LONGER: Kind(
        lambda spec, _, block: LongerEncoder(
            *_sizes(spec), spec.merge, spec.recent, block, spec.num_globals
        )
    ),
}
KINDS = tuple(KIND_BY_NAME)


def new_encoder(spec: TowerSpec, max_history: int, block: int) -> HistoryEncoder:
    """A freshly drawn encoder.

    Args:
        spec: what it is.
        max_history: most events of its history that it reads.
        block: events between two places where that may start.

    Returns:
        The encoder.

    Raises:
        ConfigError: naming the field, if the sizes do not fit each other.

    Example:
        >>> new_encoder(TowerSpec("longer", 16, 2, 4, merge=4), 256, 64).num_rows(30)
        12
    """
    return KIND_BY_NAME[spec.kind].new(spec, max_history, block)

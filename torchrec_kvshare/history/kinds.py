"""The registry of history encoders, and the spec that a tower is built from.

A new kind takes a file of its own, a row of ``KIND_BY_NAME`` and its definition in
``reference.py``. If it has options of its own, its file declares and checks them, as
``longer.LongerOptions``, and ``TowerSpec`` inherits them. Benchmarks need its operation count in
``benchmark/cost_model.py``.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.history.bidirectional import BidirectionalEncoder
from torchrec_kvshare.history.causal import CausalEncoder
from torchrec_kvshare.history.hstu import HSTUEncoder
from torchrec_kvshare.history.longer import LongerEncoder, LongerOptions
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
class TowerSpec(LongerOptions):
    """Kind and sizes of a tower, and the options of single kinds.

    The options are flat fields, as in configs and manifests; other kinds ignore them.

    Attributes:
        kind: one of ``KINDS``.
        dim: width E of rows and K/V.
        num_layers: layers in the stack.
        num_heads: H; must divide ``dim``.
        dropout: share of activations dropped in training.
        num_tokens: M, tokens of one candidate.
        window: events that a row and a candidate see at every layer; 0 for all.
        has_state: whether candidates get the state of their user beside the pooled history, see
            ``HistoryTower.state``, and a vector of their own to multiply it with.
        token_dim: width of tokens, which is that of their tables; 0 for ``dim``.
        output_dim: width of pooled histories, states and vectors, which is that of the ranking
            stage; 0 for ``dim``.

    Raises:
        ConfigError: naming the field, if a value is not allowed or not for this kind.
    """

    kind: str
    dim: int
    num_layers: int
    num_heads: int
    _: KW_ONLY
    dropout: float = 0.0
    num_tokens: int = 1
    window: int = 0
    has_state: bool = False
    token_dim: int = 0
    output_dim: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KIND_BY_NAME:
            raise ConfigError(f"history is {self.kind!r}; one of {KINDS} is allowed")
        if self.num_tokens < 1:
            raise ConfigError(f"num_tokens is {self.num_tokens}; a candidate has at least 1 token")
        if self.window < 0:
            raise ConfigError(
                f"window is {self.window} events; it must be at least 1, or 0 for all"
            )
        for name, width in (("token_dim", self.token_dim), ("output_dim", self.output_dim)):
            if width < 0:
                raise ConfigError(f"{name} is {width}; it must be at least 1, or 0 for dim")
        if self.window and not KIND_BY_NAME[self.kind].slides:
            raise ConfigError(f"window is {self.window}; {self.kind} has no sliding windows")

    @property
    def token_width(self) -> int:
        """Width of tokens."""
        return self.token_dim or self.dim

    @property
    def output_width(self) -> int:
        """Width of what the ranking stage gets."""
        return self.output_dim or self.dim

    @property
    def has_positions(self) -> bool:
        """Whether event tokens have a position, counted from the oldest event."""
        return KIND_BY_NAME[self.kind].mixes_events and self.window == 0

    @property
    def extends(self) -> bool:
        """Whether new events can be encoded on top of cached ones."""
        return KIND_BY_NAME[self.kind].extends

    @property
    def events_read(self) -> int:
        """How many newest events a candidate depends on with a sliding window, over all layers."""
        depth = self.num_layers if KIND_BY_NAME[self.kind].mixes_events else 1
        return depth * (self.window - 1) + 1


class Kind(NamedTuple):
    """One kind of encoder.

    Attributes:
        new: makes an encoder from spec, ``max_history`` and ``block``; see ``new_encoder``.
        slides: whether it can have a sliding window.
        extends: whether new events can be encoded on top of cached ones.
        mixes_events: whether an event's K/V depends on other events, and on its own position.
    """

    new: Callable[[TowerSpec, int, int], HistoryEncoder]
    slides: bool = False
    extends: bool = True
    mixes_events: bool = True


def _sizes(spec: TowerSpec) -> tuple[int, int, int, float]:
    return spec.dim, spec.num_layers, spec.num_heads, spec.dropout


KIND_BY_NAME = {
    CAUSAL: Kind(lambda spec, *_: CausalEncoder(*_sizes(spec), window=spec.window), slides=True),
    BIDIRECTIONAL: Kind(lambda spec, *_: BidirectionalEncoder(*_sizes(spec)), extends=False),
    TARGET_ONLY: Kind(
        lambda spec, *_: TargetOnlyEncoder(*_sizes(spec), window=spec.window),
        slides=True,
        mixes_events=False,
    ),
    HSTU: Kind(
        lambda spec, max_history, _: HSTUEncoder(
            *_sizes(spec), max_history=spec.window or max_history, window=spec.window
        ),
        slides=True,
    ),
    LONGER: Kind(lambda spec, _, block: LongerEncoder(*_sizes(spec), options=spec, block=block)),
}
KINDS = tuple(KIND_BY_NAME)


def new_encoder(spec: TowerSpec, max_history: int, block: int) -> HistoryEncoder:
    """Make an encoder with freshly drawn weights.

    Args:
        spec: kind and sizes.
        max_history: maximum events of a history that it reads.
        block: what it reads starts at a multiple of this many events.

    Returns:
        The encoder.

    Raises:
        ConfigError: naming the field, if the sizes do not fit each other.

    Example:
        >>> new_encoder(TowerSpec("longer", 16, 2, 4, merge=4), 256, 64).num_kv_rows(30)
        12
    """
    return KIND_BY_NAME[spec.kind].new(spec, max_history, block)

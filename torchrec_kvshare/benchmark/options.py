"""Options that scenarios share.

Each scenario declares a dataclass of the options that it reads. It is the schema of the scenario's
config and the argument of its ``measure_…``, and it inherits from the classes here what it has in
common with other scenarios.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from torchrec_kvshare.benchmark.results import Case
from torchrec_kvshare.benchmark.timing import MIN_REPEATS
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.history.kinds import CAUSAL, KINDS, TowerSpec

MERGE = 8  # events in a group of ``longer``
RECENT_SHARE = 4  # a fourth of a history: the part whose groups enter deeper layers
NEVER_EMPTY = ("candidates", "merged_chunk_rows")


@dataclass
class Options:
    """Options of every scenario.

    Raises:
        ConfigError: if a list that needs a number has none.
    """

    output: str = MISSING
    scenario: str = MISSING
    seed: int = 0  # of weights and requests
    threads: int | None = None  # None: one per granted core

    def __post_init__(self) -> None:
        for key in NEVER_EMPTY:
            if getattr(self, key, None) == []:
                raise ConfigError(f"{key} is []; at least one number is needed")


@dataclass
class TimedOptions(Options):
    """Options of a scenario that times paths.

    Raises:
        ConfigError: if there are too few repeats for a median.
    """

    repeats: int = 5  # turns of each path

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.repeats < MIN_REPEATS:
            raise ConfigError(f"repeats is {self.repeats}; a median needs at least {MIN_REPEATS}")


@dataclass
class EncoderOptions(Options):
    """Options of a scenario that compares kinds of history encoders.

    Raises:
        ConfigError: if there is no such kind.
    """

    encoders: list[str] = field(default_factory=lambda: [CAUSAL])

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := sorted(set(self.encoders) - set(KINDS)):
            raise ConfigError(f"encoders has {unknown}; {KINDS} are allowed")


@dataclass
class Layers:
    """Sizes of a tower whose width is fixed."""

    num_layers: int = 2
    num_heads: int = 4


@dataclass
class ModelSizes(Layers):
    """Sizes of a model that is drawn."""

    dim: int = 128  # width E of tables and tower
    num_tokens: int = 1  # M of one candidate; 2: its category is a token too

    def spec(self, encoder: str = CAUSAL, history: int = 0) -> TowerSpec:
        """Return a tower of these sizes for histories of up to ``history`` events."""
        recent = max(1, history // RECENT_SHARE // MERGE) * MERGE
        return TowerSpec(
            encoder,
            self.dim,
            self.num_layers,
            self.num_heads,
            num_tokens=self.num_tokens,
            merge=MERGE,
            recent=recent,
        )

    def case(self, encoder: str) -> Case:
        """Return these sizes as they stand in a record."""
        return {
            "encoder": encoder,
            "dim": self.dim,
            "heads": self.num_heads,
            "layers": self.num_layers,
            "tokens": self.num_tokens,
        }


@dataclass
class PageSize:
    """Option of a scenario whose K/V lies in pages."""

    page_size: int = 32  # rows of K/V per page


@dataclass
class MergedOptions:
    """Options of a scenario with a baseline that encodes the history once per candidate."""

    merged_max_candidates: int = 1000  # the baseline is measured up to here
    # Rows that the baseline computes at once; the fastest choice is used.
    merged_chunk_rows: list[int] = field(default_factory=lambda: [2048, 8192, 32768])


@dataclass
class DataOptions:
    """Options of a scenario whose requests are made of a data set."""

    data: Any = MISSING
    requests: int = 500

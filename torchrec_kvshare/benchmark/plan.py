"""What a benchmark measures, and at which sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchrec_kvshare.benchmark.results import Case
from torchrec_kvshare.benchmark.timing import MIN_REPEATS
from torchrec_kvshare.config import DataConfig
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.history.kinds import CAUSAL, KINDS, TowerSpec

MERGE = 8  # events in a group of ``longer``
RECENT_SHARE = 4  # of a history, the part whose groups go on to deeper layers: a fourth


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        histories: events; all paths.
        long_histories: events; without ``uncached_merged``.
        candidates: queue lengths N.
        merged_max_candidates: greatest N that ``uncached_merged`` is measured at.
        merged_chunk_rows: rows that it computes at once; the fastest for a history is used.
        encoders: kinds of history encoders, where a scenario compares them.
        repeats: turns of each path.
        seed: of weights and requests.
        artifact: a trained model, where a scenario measures one.
        run: likewise, before it was exported.
        data: what its requests are made of.
        requests: how many, where a scenario makes them of data.
        artifact_key: that the artifact must be signed with.
    """

    histories: Sequence[int]
    long_histories: Sequence[int]
    candidates: Sequence[int]
    merged_max_candidates: int
    merged_chunk_rows: Sequence[int]
    encoders: Sequence[str]
    repeats: int
    seed: int
    artifact: Path | None = None
    run: Path | None = None
    data: DataConfig | None = None
    requests: int = 500
    artifact_key: bytes | None = None

    def __post_init__(self) -> None:
        if self.repeats < MIN_REPEATS:
            raise ConfigError(f"repeats is {self.repeats}; a median needs at least {MIN_REPEATS}")
        for name in ("histories", "long_histories", "candidates", "merged_chunk_rows"):
            if any(number < 1 for number in getattr(self, name)):
                raise ConfigError(f"{name} is {list(getattr(self, name))}; each must be at least 1")
        if not self.candidates or not self.merged_chunk_rows:
            raise ConfigError("candidates and merged_chunk_rows must not be empty")
        if unknown := sorted(set(self.encoders) - set(KINDS)):
            raise ConfigError(f"encoders has {unknown}; {KINDS} are allowed")


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model that is measured.

    Attributes:
        dim: width E of tables and tower.
        num_layers: layers of the tower.
        num_heads: heads of each layer.
        page_size: rows per page of K/V.
        num_tokens: M, tokens of one candidate.
    """

    dim: int
    num_layers: int
    num_heads: int
    page_size: int
    num_tokens: int = 1

    def spec(self, encoder: str = CAUSAL, history: int = 0) -> TowerSpec:
        """A tower of these sizes for histories of so many events."""
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
        """These sizes, as they stand in a record."""
        return {
            "encoder": encoder,
            "dim": self.dim,
            "heads": self.num_heads,
            "layers": self.num_layers,
            "tokens": self.num_tokens,
        }

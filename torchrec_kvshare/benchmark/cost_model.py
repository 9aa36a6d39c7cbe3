"""Operations of attention over a history, and how fast this machine does them.

The roofline of a path is the time of its matrix products at the measured peak, plus the time of its
exponentials at their measured rate, plus the time of reading its inputs and writing its results
once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from torchrec_kvshare.benchmark.timing import timed
from torchrec_kvshare.history.kinds import BIDIRECTIONAL, HSTU, LONGER, TARGET_ONLY, TowerSpec

GEMM_SIZES = ((1024, 1024, 1024), (4096, 512, 512))  # large enough to run at the peak
EXPONENTIALS = 1 << 17  # of float32: 512 KiB, which stay in the processor's cache
COPIED_BYTES = 1 << 27  # more than the processor's cache
RATE_REPEATS = 7


@dataclass(frozen=True)
class Cost:
    """Operations and memory traffic of a computation.

    Attributes:
        flop: multiplications and additions of matrix products.
        exponentials: of softmax or SiLU.
        bytes_moved: inputs, results, weights and K/V, once each.
    """

    flop: float
    exponentials: float
    bytes_moved: float


@dataclass(frozen=True)
class Rates:
    """What the machine does per second.

    Attributes:
        flop_per_s: float32 matrix products, all threads.
        exponentials_per_s: float32, in cache.
        bytes_per_s: copied, reading and writing counted.
    """

    flop_per_s: float
    exponentials_per_s: float
    bytes_per_s: float

    def roofline_ms(self, cost: Cost) -> float:
        """Return the shortest time that a computation of this cost can take."""
        seconds = (
            cost.flop / self.flop_per_s
            + cost.exponentials / self.exponentials_per_s
            + cost.bytes_moved / self.bytes_per_s
        )
        return 1e3 * seconds


def attend_cost(spec: TowerSpec, num_events: int, num_candidates: int) -> Cost:
    """Return the cost of candidates through all layers over one history.

    Args:
        spec: of the tower.
        num_events: L.
        num_candidates: N.

    Returns:
        The cost of the layers as defined: padded or masked elements are not counted.
    """
    dim, rows = spec.dim, num_candidates * spec.num_tokens
    projection = _token_weights(spec)
    flop = float(spec.num_layers * rows * _row_flop(spec) + 2 * projection * rows)
    exponentials = 0.0
    kv = 0
    for seen in _rows_seen(spec, num_events):
        flop += 4 * dim * rows * (seen + spec.num_tokens)
        exponentials += spec.num_heads * rows * (seen + spec.num_tokens)
        if spec.kind == TARGET_ONLY:
            flop += 4 * dim * dim * num_events
            kv = num_events * dim  # the same plane for all layers
        else:
            kv += 2 * seen * dim
    weights = spec.num_layers * _row_flop(spec) / 2 + projection
    return Cost(flop, exponentials, 4 * (kv + weights + rows * (spec.token_width + dim)))


def prefill_cost(spec: TowerSpec, num_events: int) -> Cost:
    """Return the cost of encoding one history into K/V; arguments as in ``attend_cost``."""
    layers, projection = _layers_prefill_cost(spec, num_events), _token_weights(spec)
    narrower = num_events * (spec.token_width - spec.dim)
    return Cost(
        layers.flop + 2 * projection * num_events,
        layers.exponentials,
        layers.bytes_moved + 4 * (narrower + projection),
    )


def _layers_prefill_cost(spec: TowerSpec, num_events: int) -> Cost:
    """Return the cost of a prefill of tokens of the tower's width."""
    dim, deep = spec.dim, spec.num_layers - 1
    if spec.kind == TARGET_ONLY:
        return Cost(0.0, 0.0, 8 * num_events * dim)
    if spec.kind == LONGER:
        return _longer_prefill_cost(spec, num_events)
    pairs = num_events * (num_events + 1) / 2.0
    if spec.kind == BIDIRECTIONAL:
        pairs = float(num_events * num_events)
    elif spec.window and spec.window < num_events:
        pairs -= (num_events - spec.window) * (num_events - spec.window + 1) / 2
    flop = deep * (_row_flop(spec) * num_events + 4 * dim * pairs) + 4 * dim * dim * num_events
    weights = (deep * _row_flop(spec) + 4 * dim * dim) / 2
    moved = 4 * (num_events * dim * (1 + 2 * spec.num_layers) + weights)
    return Cost(flop, deep * spec.num_heads * pairs, moved)


def measure_rates() -> Rates:
    """Measure the machine now: medians of a few turns, at the fastest of the sizes tried."""
    gemm = 0.0
    for rows, inner, columns in GEMM_SIZES:
        left, right = torch.randn(rows, inner), torch.randn(inner, columns)
        out = torch.empty(rows, columns)
        seconds = _median_seconds(partial(torch.mm, left, right, out=out))
        gemm = max(gemm, 2 * rows * inner * columns / seconds)
    values = torch.rand(EXPONENTIALS)
    result = torch.empty_like(values)
    exponentials = EXPONENTIALS / _median_seconds(lambda: torch.exp(values, out=result))
    source = torch.ones(COPIED_BYTES // 4)
    target = torch.empty_like(source)
    copied = 2 * COPIED_BYTES / _median_seconds(lambda: target.copy_(source))
    return Rates(gemm, exponentials, copied)


def _row_flop(spec: TowerSpec) -> int:
    """Return the operations of one row through one layer without attention itself."""
    return (10 if spec.kind == HSTU else 24) * spec.dim * spec.dim


def _token_weights(spec: TowerSpec) -> int:
    """Return the size of the matrix that gives tokens the tower's width, if they have another."""
    return spec.token_width * spec.dim if spec.token_width != spec.dim else 0


def _rows_seen(spec: TowerSpec, num_events: int) -> list[int]:
    """Return the rows of history that a candidate sees, layer by layer."""
    if spec.kind == LONGER:
        groups = -(-num_events // spec.merge)
        recent = min(groups, spec.recent // spec.merge)
        return [groups + spec.num_globals] + [recent + spec.num_globals] * (spec.num_layers - 1)
    seen = min(num_events, spec.window) if spec.window else num_events
    return [seen] * spec.num_layers


def _longer_prefill_cost(spec: TowerSpec, num_events: int) -> Cost:
    dim, num_globals = spec.dim, spec.num_globals
    full, left = divmod(num_events, spec.merge)
    pairs = float(full * spec.merge**2 + left**2)  # in the inner layer a group sees itself
    flop = 26.0 * dim * dim * num_events
    entering, *deeper = _rows_seen(spec, num_events)
    weights = (12 + spec.merge + 12 * len(deeper) + 3) * dim * dim
    moved = 4.0 * (num_events * dim + 2 * spec.num_layers * entering * dim + weights)
    for kept in deeper:
        # All rows that enter a layer are projected; the rows it keeps attend and are finished.
        flop += 6 * dim * dim * entering + 18 * dim * dim * kept
        # Groups see the groups up to their own, globals see everything.
        groups, recent = entering - num_globals, kept - num_globals
        pairs += recent * groups - recent * (recent - 1) / 2 + num_globals * entering
        entering = kept
    flop += 6 * dim * dim * entering + 4 * dim * pairs
    return Cost(flop, spec.num_heads * pairs, moved)


def _median_seconds(call: Callable[[], object]) -> float:
    call()
    return median(timed(call)[1] for _ in range(RATE_REPEATS)) / 1e3

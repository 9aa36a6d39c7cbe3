"""Shared-history attention alone: against this machine's peak, and against other ways to do it.

All paths start from tokens and end with one vector per candidate, so that no embedding table and no
ranking stage is timed with them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from torchrec_kvshare.attention.operators import Visibility
from torchrec_kvshare.benchmark.baselines.attention_forms import (
    compiled_flex,
    one_sequence,
    repeat_kv,
    sdpa_with_mask,
)
from torchrec_kvshare.benchmark.baselines.merged import pool_without_sharing
from torchrec_kvshare.benchmark.cost_model import (
    Cost,
    Rates,
    attend_cost,
    measure_rates,
    prefill_cost,
)
from torchrec_kvshare.benchmark.options import (
    EncoderOptions,
    MergedOptions,
    ModelSizes,
    TimedOptions,
)
from torchrec_kvshare.benchmark.paths import UNCACHED_MERGED
from torchrec_kvshare.benchmark.results import PREFILL_PATH, Case, Record
from torchrec_kvshare.benchmark.timing import interleaved_medians
from torchrec_kvshare.benchmark.workload import fill_zeros
from torchrec_kvshare.errors import ParityError
from torchrec_kvshare.history.kinds import CAUSAL, KINDS, TowerSpec
from torchrec_kvshare.history.pages import flat_pages, offsets_of, split_users
from torchrec_kvshare.history.tower import HistoryTower

ATTENTION = "attention"
GEMM_PEAK = "gemm_peak"
ATTEND_PATH = "attend"
SHARED = "shared"  # prefill, then attend
KV_REPEATED = "kv_repeated"
ONE_SEQUENCE_MASK = "one_sequence_mask"
FLEX_ATTENTION = "flex_attention"
RAGGED = "ragged"
ALONE = "alone"

# Vectors of a float32 tower, computed two ways; worst of 42 draws of 64 to 1000 events: 3.2e-6.
TOLERANCE = 2e-5
# Users of unequal size in one batch: events and candidates of each.
RAGGED_USERS = (
    *((50, 800), (120, 10), (300, 500), (500, 60)),
    *((800, 250), (1000, 120), (1500, 30), (2000, 400)),
)

NOW = 1_700_000_000  # Unix seconds

Call = Callable[[], Tensor]


@dataclass
class AttentionOptions(TimedOptions, EncoderOptions, ModelSizes, MergedOptions):
    """Options of ``scenario=attention``.

    Paths beside prefill, attend and both together are measured for ``causal`` only, and with one
    token per candidate.
    """

    histories: list[int] = field(default_factory=lambda: [256, 1000])  # events; all paths
    long_histories: list[int] = field(  # events; without ``uncached_merged``
        default_factory=lambda: [4096]
    )
    candidates: list[int] = field(default_factory=lambda: [500, 1000])
    encoders: list[str] = field(default_factory=lambda: [*KINDS])
    merged_max_candidates: int = 500
    merged_chunk_rows: list[int] = field(default_factory=lambda: [2048])  # the smallest is used


@dataclass(frozen=True)
class _Tokens:
    """One batch of users: tokens, ages of the events, events and candidates of each user."""

    events: Tensor
    candidates: Tensor
    elapsed: list[Tensor]
    lengths: list[int]
    counts: list[int]

    @property
    def event_offsets(self) -> Tensor:
        """Offsets [B + 1] in events."""
        return offsets_of(torch.tensor(self.lengths))

    @property
    def candidate_offsets(self) -> Tensor:
        """Offsets [B + 1] in candidates."""
        return offsets_of(torch.tensor(self.counts))

    @property
    def visibility(self) -> Visibility:
        """One time for all candidates, after every event; each sees all events of its user."""
        counts = torch.tensor(self.counts)
        visible = torch.tensor(self.lengths).repeat_interleave(counts)
        return Visibility(NOW - torch.cat(self.elapsed), torch.full_like(visible, NOW), visible)


@torch.no_grad()
def measure_attention(options: AttentionOptions) -> list[Record]:
    """Measure prefill and attend of every encoder, and for ``causal`` other ways to the result.

    Returns:
        Records of ``latency_ms``, ``fraction_of_gemm_peak`` and ``fraction_of_roofline``; of the
        other ways ``latency_ms`` and ``speedup``, their time over that of ``shared``; of the
        ``ragged`` batch its ``time_over_alone``; of ``gemm_peak`` the ``gflop_per_s``.

    Raises:
        ParityError: if two ways give other vectors.
    """
    rates = measure_rates()
    records = [
        Record(ATTENTION, {"path": GEMM_PEAK}, metric, value, unit=unit)
        for metric, value, unit in (
            ("gflop_per_s", rates.flop_per_s / 1e9, "GFLOP/s"),
            ("gexp_per_s", rates.exponentials_per_s / 1e9, "1e9/s"),
            ("gbyte_per_s", rates.bytes_per_s / 1e9, "GB/s"),
        )
    ]
    for encoder in options.encoders:
        for history in (*options.histories, *options.long_histories):
            records += _encoder_records(options, encoder, history)
        records += _ragged_records(options, encoder)
    return records


def _encoder_records(options: AttentionOptions, encoder: str, history: int) -> Iterator[Record]:
    spec = options.spec(encoder, history)
    tower = make_tower(spec, history, options.seed)
    for count in options.candidates:
        tokens = draw_tokens(spec, [history], [count], options.seed)
        kv = tower.prefill(tokens.events, tokens.event_offsets)
        calls: dict[str, Call] = {
            PREFILL_PATH: partial(tower.prefill, tokens.events, tokens.event_offsets),
            ATTEND_PATH: partial(attend, tower, tokens, kv),
            SHARED: partial(shared, tower, tokens),
        }
        expected = calls[SHARED]()
        _assert_close(ATTEND_PATH, calls[ATTEND_PATH](), expected)
        if encoder == CAUSAL and spec.num_tokens == 1:
            others = other_ways(tower, tokens)
            if history in options.histories and count <= options.merged_max_candidates:
                others[UNCACHED_MERGED] = merged_way(tower, tokens, min(options.merged_chunk_rows))
            for path, call in others.items():
                _assert_close(path, call(), expected)
                calls[path] = call
        # The peak changes from minute to minute, so it is measured before and after the paths.
        rates = measure_rates()
        latency_ms = interleaved_medians(calls, options.repeats)
        rates = _mean_rates(rates, measure_rates())
        case: Case = options.case(encoder) | {"history": history, "candidates": count, "users": 1}
        cost_by_path = {
            PREFILL_PATH: prefill_cost(spec, history),
            ATTEND_PATH: attend_cost(spec, history, count),
        }
        yield from _records(case, latency_ms, rates, cost_by_path)


def _records(
    case: Case, latency_ms: Mapping[str, float], rates: Rates, cost_by_path: Mapping[str, Cost]
) -> Iterator[Record]:
    for path, value in latency_ms.items():
        here: Case = case | {"path": path}
        yield Record(ATTENTION, here, "latency_ms", value, unit="ms")
        if path in cost_by_path:
            cost = cost_by_path[path]
            peak = fraction_of_peak(cost, rates, value)
            yield Record(ATTENTION, here, "fraction_of_gemm_peak", peak, unit="x")
            roofline = rates.roofline_ms(cost) / value
            yield Record(ATTENTION, here, "fraction_of_roofline", roofline, unit="x")
        elif path != SHARED:
            yield Record(ATTENTION, here, "speedup", value / latency_ms[SHARED], unit="x")


def _ragged_records(options: AttentionOptions, encoder: str) -> Iterator[Record]:
    """Measure attend of eight unequal users in one batch, and of the same users one at a time."""
    longest = max(length for length, _ in RAGGED_USERS)
    spec = options.spec(encoder, longest)
    tower = make_tower(spec, longest, options.seed)
    calls: dict[str, Call] = {}
    alone = []
    for user, (length, count) in enumerate(RAGGED_USERS):
        tokens = draw_tokens(spec, [length], [count], options.seed + user)
        planes = tower.prefill(tokens.events, tokens.event_offsets)
        [kv] = split_users(planes, [tower.encoder.num_kv_rows(length)])
        calls[f"{ALONE} {user}"] = partial(attend, tower, tokens, kv)
        alone.append((tokens, kv))
    together = _Tokens(
        torch.cat([tokens.events for tokens, _ in alone]),
        torch.cat([tokens.candidates for tokens, _ in alone]),
        [tokens.elapsed[0] for tokens, _ in alone],
        lengths=[length for length, _ in RAGGED_USERS],
        counts=[count for _, count in RAGGED_USERS],
    )
    calls[RAGGED] = partial(attend, tower, together, torch.cat([kv for _, kv in alone], dim=1))
    one_by_one = torch.cat([call() for path, call in calls.items() if path != RAGGED])
    _assert_close(RAGGED, calls[RAGGED](), one_by_one)
    latency_ms = interleaved_medians(calls, options.repeats)
    sum_ms = sum(value for path, value in latency_ms.items() if path != RAGGED)
    case: Case = options.case(encoder) | {
        "path": RAGGED,
        "history": sum(together.lengths),
        "candidates": sum(together.counts),
        "users": len(RAGGED_USERS),
    }
    yield Record(ATTENTION, case, "latency_ms", latency_ms[RAGGED], unit="ms")
    yield Record(ATTENTION, case, "time_over_alone", latency_ms[RAGGED] / sum_ms, unit="x")


def make_tower(spec: TowerSpec, history: int, seed: int) -> HistoryTower:
    """Draw a tower; see ``fill_zeros``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return fill_zeros(HistoryTower(spec, history, spec.merge))


def draw_tokens(spec: TowerSpec, lengths: list[int], counts: list[int], seed: int) -> _Tokens:
    """Draw the tokens of some users, at the scale of embeddings, and the age of each event."""
    generator = torch.Generator().manual_seed(seed)
    scale = spec.dim**-0.5
    events = torch.randn(sum(lengths), spec.dim, generator=generator) * scale
    shape = (sum(counts), spec.num_tokens, spec.dim)
    candidates = torch.randn(shape, generator=generator) * scale
    ages = [
        torch.randint(0, 10_000_000, (length,), generator=generator).sort(descending=True).values
        for length in lengths
    ]
    return _Tokens(events, candidates, ages, lengths=lengths, counts=counts)


def attend(tower: HistoryTower, tokens: _Tokens, kv: Tensor) -> Tensor:
    """Attend from the candidates to K/V that exists: the cost of a hit."""
    rows, entered = tower.enter(tokens.candidates)
    pages = flat_pages(kv, tower.encoder.row_offsets(tokens.event_offsets))
    return tower.attend(
        rows, entered, tokens.candidate_offsets, pages, tokens.visibility, tokens.event_offsets
    )


def shared(tower: HistoryTower, tokens: _Tokens) -> Tensor:
    """Prefill, then attend: the cost of a miss."""
    kv = tower.prefill(tokens.events, tokens.event_offsets)
    return attend(tower, tokens, kv)


def other_ways(tower: HistoryTower, tokens: _Tokens) -> dict[str, Call]:
    """Return other ways to compute the vectors of one user after one prefill."""
    events, [elapsed] = tokens.events, tokens.elapsed
    candidates = tokens.candidates.squeeze(1)
    count = candidates.size(0)
    masked = sdpa_with_mask(tower, elapsed, count)
    flex = compiled_flex(tower, elapsed, count)
    return {
        KV_REPEATED: partial(repeat_kv, tower, events, candidates, elapsed),
        ONE_SEQUENCE_MASK: partial(one_sequence, tower, events, candidates, masked),
        FLEX_ATTENTION: partial(one_sequence, tower, events, candidates, flex),
    }


def merged_way(tower: HistoryTower, tokens: _Tokens, chunk_rows: int) -> Call:
    """Return the way that encodes the history of one user again for every candidate."""
    [elapsed] = tokens.elapsed
    return partial(
        pool_without_sharing,
        tower,
        tokens.events,
        elapsed,
        tokens.candidates,
        chunk_rows=chunk_rows,
    )


def fraction_of_peak(cost: Cost, rates: Rates, latency_ms: float) -> float:
    """Return the share of the time that the matrix products would take at the measured peak."""
    return cost.flop / rates.flop_per_s * 1e3 / latency_ms


def _mean_rates(one: Rates, other: Rates) -> Rates:
    return Rates(
        (one.flop_per_s + other.flop_per_s) / 2,
        (one.exponentials_per_s + other.exponentials_per_s) / 2,
        (one.bytes_per_s + other.bytes_per_s) / 2,
    )


def _assert_close(path: str, got: Tensor, expected: Tensor) -> None:
    difference = float((got - expected).abs().max())
    if not difference <= TOLERANCE:
        raise ParityError(
            f"{path} differs by {difference} from {SHARED}; at most {TOLERANCE} is allowed"
        )

"""Shared-history attention by itself: against this machine's peak, and against other ways to do it.

Everything starts from tokens and ends with one vector per candidate, so that no embedding table and
no ranking stage stands between the figure and what it is about.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from torchrec_kvshare.attention.operators import Sights
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
from torchrec_kvshare.benchmark.plan import Plan, Sizes
from torchrec_kvshare.benchmark.results import Case, Record
from torchrec_kvshare.benchmark.timing import interleaved_medians
from torchrec_kvshare.benchmark.workload import fill_zeros
from torchrec_kvshare.errors import ParityError
from torchrec_kvshare.history.kinds import CAUSAL, TowerSpec
from torchrec_kvshare.history.pages import flat_pages, offsets_of, split_users
from torchrec_kvshare.history.tower import HistoryTower

ATTENTION = "attention"
GEMM_PEAK = "gemm_peak"
PREFILL = "prefill"
ATTEND = "attend"
SHARED = "shared"  # prefill, then attend
KV_REPEATED = "kv_repeated"
ONE_SEQUENCE_MASK = "one_sequence_mask"
FLEX_ATTENTION = "flex_attention"
UNCACHED_MERGED = "uncached_merged"
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


@dataclass(frozen=True)
class _Tokens:
    """What one batch of users is made of: tokens, times, whose they are."""

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
    def sights(self) -> Sights:
        """All candidates look when the last event of all may have been, and see all."""
        counts = torch.tensor(self.counts)
        visible = torch.tensor(self.lengths).repeat_interleave(counts)
        return Sights(NOW - torch.cat(self.elapsed), torch.full_like(visible, NOW), visible)


@torch.no_grad()
def measure_attention(plan: Plan, sizes: Sizes) -> list[Record]:
    """Prefill and attend of every encoder, and for ``causal`` every other way to the same result.

    Args:
        plan: ``encoders``, ``histories`` (all paths), ``long_histories`` (without
            ``uncached_merged``), ``candidates``, ``repeats``, ``seed``.
        sizes: of the tower; ``num_tokens`` above one leaves the other ways out.

    Returns:
        Records of ``latency_ms``, ``fraction_of_gemm_peak`` and ``fraction_of_roofline``; of the
        other ways ``latency_ms`` and ``speedup``, theirs over the time of ``shared``; of the
        ``ragged`` batch its ``time_over_alone``; of ``gemm_peak`` the ``gflop_per_s``.

    Raises:
        ParityError: if two ways differ.
    """
    rates = measure_rates()
    records = [
        Record(ATTENTION, {"path": GEMM_PEAK}, metric, value, unit)
        for metric, value, unit in (
            ("gflop_per_s", rates.flop_per_s / 1e9, "GFLOP/s"),
            ("gexp_per_s", rates.exponentials_per_s / 1e9, "1e9/s"),
            ("gbyte_per_s", rates.bytes_per_s / 1e9, "GB/s"),
        )
    ]
    for encoder in plan.encoders:
        for history in (*plan.histories, *plan.long_histories):
            records += _encoder_records(plan, sizes, encoder, history)
        records += _ragged_records(plan, sizes, encoder)
    return records


def _encoder_records(plan: Plan, sizes: Sizes, encoder: str, history: int) -> Iterator[Record]:
    spec = sizes.spec(encoder, history)
    tower = make_tower(spec, history, plan.seed)
    for count in plan.candidates:
        tokens = draw_tokens(spec, [history], [count], plan.seed)
        kv = tower.prefill(tokens.events, tokens.event_offsets)
        calls: dict[str, Call] = {
            PREFILL: partial(tower.prefill, tokens.events, tokens.event_offsets),
            ATTEND: partial(attend, tower, tokens, kv),
            SHARED: partial(shared, tower, tokens),
        }
        expected = calls[SHARED]()
        _assert_close(ATTEND, calls[ATTEND](), expected)
        if encoder == CAUSAL and spec.num_tokens == 1:
            with_merged = history in plan.histories and count <= plan.merged_max_candidates
            for path, call in other_ways(tower, tokens, plan, with_merged).items():
                _assert_close(path, call(), expected)
                calls[path] = call
        # The peak moves from minute to minute: it is measured among the others.
        rates = measure_rates()
        latency_ms = interleaved_medians(calls, plan.repeats)
        rates = _mean_rates(rates, measure_rates())
        case: Case = sizes.case(encoder) | {"history": history, "candidates": count, "users": 1}
        yield from _records(case, spec, latency_ms, rates, history, count)


def _records(
    case: Case,
    spec: TowerSpec,
    latency_ms: Mapping[str, float],
    rates: Rates,
    history: int,
    count: int,
) -> Iterator[Record]:
    cost_by_path = {PREFILL: prefill_cost(spec, history), ATTEND: attend_cost(spec, history, count)}
    for path, value in latency_ms.items():
        here: Case = case | {"path": path}
        yield Record(ATTENTION, here, "latency_ms", value, "ms")
        if path in cost_by_path:
            cost = cost_by_path[path]
            peak = fraction_of_peak(cost, rates, value)
            yield Record(ATTENTION, here, "fraction_of_gemm_peak", peak, "x")
            roofline = rates.roofline_ms(cost) / value
            yield Record(ATTENTION, here, "fraction_of_roofline", roofline, "x")
        elif path != SHARED:
            yield Record(ATTENTION, here, "speedup", value / latency_ms[SHARED], "x")


def _ragged_records(plan: Plan, sizes: Sizes, encoder: str) -> Iterator[Record]:
    """Attend of eight unequal users in one batch, and of the same users one at a time."""
    longest = max(length for length, _ in RAGGED_USERS)
    spec = sizes.spec(encoder, longest)
    tower = make_tower(spec, longest, plan.seed)
    calls: dict[str, Call] = {}
    alone = []
    for place, (length, count) in enumerate(RAGGED_USERS):
        tokens = draw_tokens(spec, [length], [count], plan.seed + place)
        planes = tower.prefill(tokens.events, tokens.event_offsets)
        [kv] = split_users(planes, [tower.encoder.num_rows(length)])
        calls[f"{ALONE} {place}"] = partial(attend, tower, tokens, kv)
        alone.append((tokens, kv))
    together = _Tokens(
        torch.cat([tokens.events for tokens, _ in alone]),
        torch.cat([tokens.candidates for tokens, _ in alone]),
        [tokens.elapsed[0] for tokens, _ in alone],
        [length for length, _ in RAGGED_USERS],
        [count for _, count in RAGGED_USERS],
    )
    calls[RAGGED] = partial(attend, tower, together, torch.cat([kv for _, kv in alone], dim=1))
    one_by_one = torch.cat([call() for path, call in calls.items() if path != RAGGED])
    _assert_close(RAGGED, calls[RAGGED](), one_by_one)
    latency_ms = interleaved_medians(calls, plan.repeats)
    sum_ms = sum(value for path, value in latency_ms.items() if path != RAGGED)
    case: Case = sizes.case(encoder) | {
        "path": RAGGED,
        "history": sum(together.lengths),
        "candidates": sum(together.counts),
        "users": len(RAGGED_USERS),
    }
    yield Record(ATTENTION, case, "latency_ms", latency_ms[RAGGED], "ms")
    yield Record(ATTENTION, case, "time_over_alone", latency_ms[RAGGED] / sum_ms, "x")


def make_tower(spec: TowerSpec, history: int, seed: int) -> HistoryTower:
    """A tower whose weights are drawn, none of them left at zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return fill_zeros(HistoryTower(spec, history, spec.merge))


def draw_tokens(spec: TowerSpec, lengths: list[int], counts: list[int], seed: int) -> _Tokens:
    """Tokens of some users, as wide as embeddings are, and the age of each event."""
    generator = torch.Generator().manual_seed(seed)
    scale = spec.dim**-0.5
    events = torch.randn(sum(lengths), spec.dim, generator=generator) * scale
    shape = (sum(counts), spec.num_tokens, spec.dim)
    candidates = torch.randn(shape, generator=generator) * scale
    ages = [
        torch.randint(0, 10_000_000, (length,), generator=generator).sort(descending=True).values
        for length in lengths
    ]
    return _Tokens(events, candidates, ages, lengths, counts)


def attend(tower: HistoryTower, tokens: _Tokens, kv: Tensor) -> Tensor:
    """Candidates over K/V that is there: what a hit costs."""
    rows, entered = tower.enter(tokens.candidates)
    pages = flat_pages(kv, tower.encoder.row_offsets(tokens.event_offsets))
    return tower.attend(
        rows, entered, tokens.candidate_offsets, pages, tokens.sights, tokens.event_offsets
    )


def shared(tower: HistoryTower, tokens: _Tokens) -> Tensor:
    """Prefill, then attend: what a miss costs."""
    kv = tower.prefill(tokens.events, tokens.event_offsets)
    return attend(tower, tokens, kv)


def other_ways(
    tower: HistoryTower, tokens: _Tokens, plan: Plan, with_merged: bool
) -> dict[str, Call]:
    """The same vectors of one user, computed otherwise."""
    events, [elapsed] = tokens.events, tokens.elapsed
    candidates = tokens.candidates.squeeze(1)
    count = candidates.size(0)
    masked = sdpa_with_mask(tower, elapsed, count)
    flex = compiled_flex(tower, elapsed, count)
    calls: dict[str, Call] = {
        KV_REPEATED: partial(repeat_kv, tower, events, candidates, elapsed),
        ONE_SEQUENCE_MASK: partial(one_sequence, tower, events, candidates, masked),
        FLEX_ATTENTION: partial(one_sequence, tower, events, candidates, flex),
    }
    if with_merged:
        chunk_rows = min(plan.merged_chunk_rows)
        calls[UNCACHED_MERGED] = partial(
            pool_without_sharing, tower, events, elapsed, tokens.candidates, chunk_rows
        )
    return calls


def fraction_of_peak(cost: Cost, rates: Rates, latency_ms: float) -> float:
    """Share of the time that the matrix products would take at the measured peak."""
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

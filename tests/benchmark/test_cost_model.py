"""The cost model against counting: FLOPs as torch does, pairs one by one, bytes by tensor."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from torchrec_kvshare.attention.operators import Visibility
from torchrec_kvshare.benchmark import cost_model
from torchrec_kvshare.benchmark.cost_model import (
    Cost,
    Rates,
    attend_cost,
    measure_rates,
    prefill_cost,
)
from torchrec_kvshare.history.hstu import HSTULayer
from torchrec_kvshare.history.kinds import (
    BIDIRECTIONAL,
    CAUSAL,
    HSTU,
    KIND_BY_NAME,
    KINDS,
    LONGER,
    TARGET_ONLY,
    TowerSpec,
)
from torchrec_kvshare.history.longer import LongerEncoder
from torchrec_kvshare.history.pages import flat_pages, split_users
from torchrec_kvshare.history.tower import HistoryTower
from torchrec_kvshare.history.transformer import TransformerLayer

DIM, NUM_HEADS, MERGE, RECENT, NUM_GLOBALS = 12, 3, 4, 16, 2
NUM_EVENTS = (38, 24, 5)  # with an open group, with closed ones only, fewer than are recent
NUM_CANDIDATES = 35
WINDOW = 7
PROJECTIONS = (torch.ops.aten.mm, torch.ops.aten.addmm)


def specs() -> Iterator[TowerSpec]:
    for kind in KINDS:
        for num_layers in (1, 3):
            for num_tokens in (1, 2):
                yield TowerSpec(
                    kind,
                    DIM,
                    num_layers,
                    NUM_HEADS,
                    num_tokens=num_tokens,
                    merge=MERGE,
                    recent=RECENT,
                    num_globals=NUM_GLOBALS,
                )
    for kind in (name for name, kind in KIND_BY_NAME.items() if kind.slides):
        yield TowerSpec(kind, DIM, 2, NUM_HEADS, window=WINDOW)
    for kind, token_dim in zip(KINDS, (5, 20, 6, 7, 18), strict=True):
        yield TowerSpec(
            kind,
            DIM,
            2,
            NUM_HEADS,
            token_dim=token_dim,
            output_dim=9,
            merge=MERGE,
            recent=RECENT,
            num_globals=NUM_GLOBALS,
        )


SPECS = list(specs())


def name_of(spec: TowerSpec) -> str:
    window = " sliding" if spec.window else ""
    width = f" of width {spec.token_dim}" if spec.token_dim else ""
    return f"{spec.kind} of {spec.num_layers} layers, {spec.num_tokens} tokens{width}{window}"


def tower_of(spec: TowerSpec) -> HistoryTower:
    return HistoryTower(spec, 40, 4).eval().requires_grad_(False)


def flop_of(call: Callable[[], Tensor], operators: tuple[object, ...] = ()) -> int:
    """Count the operations of all operators that torch can count, or of the named ones."""
    with FlopCounterMode(display=False) as counter:
        call()
    counts = counter.get_flop_counts().get("Global", {})
    return sum(
        count for operator, count in counts.items() if not operators or operator in operators
    )


def attend_of(tower: HistoryTower, num_events: int) -> Callable[[], Tensor]:
    ends, candidate_ends = torch.tensor([0, num_events]), torch.tensor([0, NUM_CANDIDATES])
    kv = flat_pages(
        tower.prefill(torch.randn(num_events, tower.spec.token_width), ends),
        tower.encoder.row_offsets(ends),
    )
    candidates = torch.randn(NUM_CANDIDATES, tower.num_tokens, tower.spec.token_width)
    now = torch.full([NUM_CANDIDATES], num_events)
    visibility = Visibility(torch.arange(num_events), now, now)

    def attend() -> Tensor:
        return tower.attend(*tower.enter(candidates), candidate_ends, kv, visibility, ends)

    return attend


def weights_of(*modules: nn.Module) -> int:
    """Count the elements of all matrices."""
    return sum(p.numel() for module in modules for p in module.parameters() if p.dim() == 2)


def pairs_of_prefill(spec: TowerSpec, num_events: int) -> int:
    """Count pairs of a query and a key it sees, one by one."""
    deep = range(spec.num_layers - 1)
    if spec.kind == TARGET_ONLY:
        return 0
    if spec.kind == LONGER:
        events = range(num_events)
        pairs = sum(one // MERGE == other // MERGE for one in events for other in events)
        groups = list(range(-(-num_events // MERGE)))
        recent = groups[-(RECENT // MERGE) :]
        for _ in deep:
            pairs += sum(key <= query for query in recent for key in groups)
            pairs += NUM_GLOBALS * (len(groups) + NUM_GLOBALS)
            groups = recent
        return pairs
    sees = {
        BIDIRECTIONAL: lambda query, key: True,
        CAUSAL: lambda query, key: key <= query,
        HSTU: lambda query, key: key <= query,
    }[spec.kind]
    return len(deep) * sum(
        sees(query, key) and (not spec.window or query - key < spec.window)
        for query in range(num_events)
        for key in range(num_events)
    )


def flop_of_padding(tower: HistoryTower, num_events: int) -> int:
    """Count operations on rows that ``longer`` pads, as the host knows only their maximum."""
    spec, encoder = tower.spec, tower.encoder
    if not isinstance(encoder, LongerEncoder):
        return 0
    events = -num_events % MERGE
    groups = encoder.max_groups(num_events, 1) - encoder.num_groups(num_events)
    recent = encoder.max_recent_rows(1) - rows_seen(tower, num_events)[-1]
    of_recent = 24 * recent * (spec.num_layers - 1) if spec.num_layers > 1 else 0
    return DIM * DIM * (26 * (events + MERGE * groups) + 6 * groups + of_recent)


def rows_seen(tower: HistoryTower, num_events: int) -> list[int]:
    """Return the rows of the history that a candidate sees at each layer."""
    spec, encoder = tower.spec, tower.encoder
    if isinstance(encoder, LongerEncoder):
        num_rows = encoder.num_kv_rows(num_events)
        recent = num_rows - encoder.first_recent(num_events)
        return [num_rows] + [recent] * (spec.num_layers - 1)
    return [min(num_events, spec.window or num_events)] * spec.num_layers


@torch.no_grad()
@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_attend_is_what_torch_counts_and_the_candidates_own_tokens(spec: TowerSpec) -> None:
    tower = tower_of(spec)
    rows = NUM_CANDIDATES * spec.num_tokens
    for num_events in NUM_EVENTS:
        projected = flop_of(attend_of(tower, num_events))
        seen = rows_seen(tower, num_events)
        # torch does not count inside the operator; the head is not a layer.
        attended = 4 * DIM * rows * sum(s + spec.num_tokens for s in seen)
        head = 2 * DIM * spec.output_width * NUM_CANDIDATES
        cost = attend_cost(spec, num_events, NUM_CANDIDATES)
        assert cost.flop == projected + attended - head
        assert cost.exponentials == sum(NUM_HEADS * rows * (s + spec.num_tokens) for s in seen)


@torch.no_grad()
@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_prefill_is_its_projections_and_every_pair_that_is_seen(spec: TowerSpec) -> None:
    tower = tower_of(spec)
    for num_events in NUM_EVENTS:
        events = torch.randn(num_events, spec.token_width)
        prefill = partial(tower.prefill, events, torch.tensor([0, num_events]))
        pairs = pairs_of_prefill(spec, num_events)
        projected = flop_of(prefill, PROJECTIONS) - flop_of_padding(tower, num_events)
        cost = prefill_cost(spec, num_events)
        assert cost.flop == projected + 4 * DIM * pairs
        assert cost.exponentials == NUM_HEADS * pairs


@pytest.mark.parametrize(("num_events", "pairs"), [(1, 1), (4, 10), (1000, 500_500)])
def test_a_causal_history_has_half_the_pairs(num_events: int, pairs: int) -> None:
    spec = TowerSpec(CAUSAL, DIM, 2, NUM_HEADS)
    assert prefill_cost(spec, num_events).exponentials == NUM_HEADS * pairs
    square = prefill_cost(replace(spec, kind=BIDIRECTIONAL), num_events)
    assert square.exponentials == NUM_HEADS * num_events**2


@torch.no_grad()
@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_bytes_are_those_of_tokens_weights_and_kv(spec: TowerSpec) -> None:
    tower = tower_of(spec)
    encoder = tower.encoder
    layers = [m for m in encoder.layers if isinstance(m, TransformerLayer | HSTULayer)]
    assert len(layers) == spec.num_layers
    for num_events in NUM_EVENTS:
        events = torch.randn(num_events, spec.token_width)
        planes = tower.prefill(events, torch.tensor([0, num_events]))
        [kv] = split_users(planes, [encoder.num_kv_rows(num_events)])
        # The last layer needs its projections only, and queries only for longer.
        last = {LONGER: 3, TARGET_ONLY: 0}.get(spec.kind, 2) * DIM * DIM
        weights = weights_of(*layers[:-1]) + last
        if spec.kind == LONGER:
            weights += weights_of(encoder.inner, encoder.merge_group)
        if spec.kind == TARGET_ONLY:
            weights = 0
        weights += weights_of(tower.token_in)
        moved = prefill_cost(spec, num_events).bytes_moved
        assert moved == 4 * (num_events * spec.token_width + kv.numel() + weights)
        # Candidates read the rows they see; as many rows go in as come out.
        seen = rows_seen(tower, num_events)
        read = num_events * DIM if spec.kind == TARGET_ONLY else 2 * DIM * sum(seen)
        rows = NUM_CANDIDATES * spec.num_tokens
        moved = attend_cost(spec, num_events, NUM_CANDIDATES).bytes_moved
        assert moved == 4 * (
            read + weights_of(*layers, tower.token_in) + rows * (spec.token_width + DIM)
        )


def test_the_roofline_adds_up() -> None:
    rates = Rates(flop_per_s=2e9, exponentials_per_s=1e8, bytes_per_s=4e9)
    assert rates.roofline_ms(Cost(2e6, 0, 0)) == pytest.approx(1.0)
    assert rates.roofline_ms(Cost(0, 3e5, 0)) == pytest.approx(3.0)
    assert rates.roofline_ms(Cost(0, 0, 2e7)) == pytest.approx(5.0)
    assert rates.roofline_ms(Cost(2e6, 3e5, 2e7)) == pytest.approx(9.0)


def test_rates_are_those_of_the_fastest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_model, "GEMM_SIZES", ((2, 3, 4), (5, 6, 7)))
    monkeypatch.setattr(cost_model, "EXPONENTIALS", 100)
    monkeypatch.setattr(cost_model, "COPIED_BYTES", 1000)
    seconds = iter([1e-6, 2e-6, 4e-6, 5e-6])

    def timed(call: Callable[[], object]) -> float:
        call()
        return next(seconds)

    monkeypatch.setattr(cost_model, "_median_seconds", timed)
    rates = measure_rates()
    assert rates.flop_per_s == pytest.approx(2 * 5 * 6 * 7 / 2e-6)
    assert rates.exponentials_per_s == pytest.approx(100 / 4e-6)
    # Read and written.
    assert rates.bytes_per_s == pytest.approx(2 * 1000 / 5e-6)


def test_rates_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_model, "GEMM_SIZES", ((16, 17, 18),))
    monkeypatch.setattr(cost_model, "COPIED_BYTES", 1 << 10)
    assert min(vars(measure_rates()).values()) > 0

"""Capacity of a cache before it is built: bytes, machines and money for a wanted hit rate.

A plan asks one tier to hold the K/V that the wanted hit rate needs, with the pages above it for
requests in flight. A request whose history has grown counts as a hit: only its new events are
encoded.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from torchrec_kvshare.benchmark.cost_model import attend_cost, measure_rates, prefill_cost
from torchrec_kvshare.benchmark.plots import BLUE, GREEN, GREY, RED, Axis, Line, Picture
from torchrec_kvshare.benchmark.results import Case, Record
from torchrec_kvshare.cache.disk import DiskTier
from torchrec_kvshare.cache.keys import read_key
from torchrec_kvshare.cache.kv_cache import PAGES
from torchrec_kvshare.cache.remote import RemoteTier
from torchrec_kvshare.cache.tiers import HostTier
from torchrec_kvshare.config import PlanConfig, PlannedTier
from torchrec_kvshare.planning.hit_rate import (
    FOREVER_S,
    Lives,
    hit_rate,
    kept_seconds,
    simulated_hit_rate,
    users_held,
)
from torchrec_kvshare.planning.sizes import ModelShape, given_shape, shape_of
from torchrec_kvshare.planning.traffic import (
    DAY_S,
    Traffic,
    Users,
    users_by_rank,
)

PLAN = "plan"
CHE, SIMULATION = "che", "simulation"
GIB, MIB = 2**30, 2**20
IN_PROCESS = (PAGES, HostTier.name)  # tiers whose bytes are a machine's memory
NUM_CURVE_POINTS = 16
NUM_BISECTIONS = 20

PICTURE_BY_NAME = {
    "hit_rate": Picture(
        metrics=("hit_rate",),
        label="requests that hit [share]",
        panels=Axis("population", "{} users"),
        across=Axis("mib", "K/V in pages [MiB]"),
        line_by_path={
            CHE: Line("Che's approximation", BLUE),
            SIMULATION: Line("simulated", RED),
        },
        case={},
        is_logarithmic=False,
    ),
    "requests_per_core_s": Picture(
        metrics=("requests_per_core_s",),
        label="requests per second and core",
        panels=Axis("population", "{} users"),
        across=Axis("hit_percent", "wanted hit rate [%]"),
        line_by_path={
            PAGES: Line("pages", BLUE),
            HostTier.name: Line("host", GREEN),
            DiskTier.name: Line("disk", GREY),
            RemoteTier.name: Line("remote", RED),
        },
        case={},
        is_logarithmic=False,
    ),
}


@dataclass(frozen=True)
class Point:
    """A hit rate and what it needs.

    Attributes:
        wanted: hit rate.
        kept_s: seconds after its last use for which K/V must be kept; infinite if no time is long
            enough, because K/V expires.
        num_held: users whose K/V is held then.
        che: hit rate of a cache for that many users by Che's approximation; of one for all users
            where the wanted one is out of reach.
        simulated: by simulation.
    """

    wanted: float
    kept_s: float
    num_held: float
    che: float
    simulated: float

    @property
    def is_reachable(self) -> bool:
        """Whether K/V lives long enough."""
        return self.kept_s < math.inf


@dataclass(frozen=True)
class Need:
    """What a hit rate needs in one tier.

    Attributes:
        tier: that holds the K/V.
        wanted: hit rate.
        population: users.
        num_bytes: of K/V in the tier.
        ms_per_request: of one core.
        cores: at the peak.
        machines: by cores and, for tiers in a process, by memory.
        price_per_hour: of cores and bytes.
    """

    tier: str
    wanted: float
    population: int
    num_bytes: float
    ms_per_request: float
    cores: float
    machines: int
    price_per_hour: float


@dataclass(frozen=True)
class Plan:
    """Everything a plan says.

    Attributes:
        curve: hit rate of pages by the users whose K/V they hold, as (users, share).
        points: of the wanted hit rates.
        needs: of each reachable point and tier, and of ``wanted = 0``: no cache.
        growth: for other numbers of users, the tiers at the cheapest hit rate.
        prefill_ms: of a full history on one core.
        score_ms: of all candidates on one core.
        rule: what the rule of thumb says, in one sentence.
        bytes_by_tier: of one user's K/V.
    """

    curve: Sequence[tuple[float, float]]
    points: Sequence[Point]
    needs: Sequence[Need]
    growth: Sequence[Need]
    prefill_ms: float
    score_ms: float
    rule: str
    bytes_by_tier: dict[str, float]


def make_plan(config: PlanConfig) -> Plan:
    """Plan the capacity of a cache.

    Raises:
        ArtifactError: if the artifact is broken.
        ConfigError: if the sizes or the traffic cannot be.
    """
    planner = _Planner(config)
    traffic = planner.traffic(config.traffic.users)
    users = users_by_rank(traffic)
    points = [planner.point(traffic, users, wanted) for wanted in sorted(config.hit_rates)]
    needs = [planner.need(traffic, PAGES, 0.0, 0.0)]
    for point in points:
        if point.is_reachable:
            for tier in planner.tiers:
                needs.append(planner.need(traffic, tier, point.wanted, point.num_held))
    best = min(needs, key=lambda need: need.price_per_hour)
    growth = []
    for population in config.growth:
        grown = planner.traffic(population)
        num_held = 0.0
        if best.wanted:
            grown_users = users_by_rank(grown)
            num_held = users_held(grown, grown_users, planner.kept(grown, grown_users, best.wanted))
        growth += [planner.need(grown, tier, best.wanted, num_held) for tier in planner.tiers]
    return Plan(
        planner.curve(traffic, users),
        points,
        needs,
        growth,
        planner.prefill_ms,
        planner.score_ms,
        planner.rule(traffic, users, best),
        planner.bytes_by_tier,
    )


class _Planner:
    """What all points of a plan share."""

    def __init__(self, config: PlanConfig) -> None:
        self.config = config
        self.lives = Lives(config.ttl_s, config.idle_ttl_s)
        shape = _shape(config)
        num_events = config.events or shape.max_history
        self.tiers: dict[str, PlannedTier] = {
            PAGES: config.pages,
            HostTier.name: config.host,
            DiskTier.name: config.disk,
            RemoteTier.name: config.remote,
        }
        self.bytes_by_tier: dict[str, float] = {
            name: float(shape.user_bytes(name, tier.codec, num_events, config.page_size))
            for name, tier in self.tiers.items()
        }
        self.bytes_by_tier[PAGES] /= config.watermark
        self.prefill_ms, self.score_ms = _times_ms(config, shape, num_events)

    def traffic(self, num_users: int) -> Traffic:
        """The same traffic of another number of users."""
        given = self.config.traffic
        return Traffic(
            num_users, given.sessions_per_day, given.zipf, given.session_requests, given.think_s
        )

    def kept(self, traffic: Traffic, users: Users, wanted: float) -> float:
        """Return the seconds for which K/V must be kept; infinite if none are enough."""
        if hit_rate(traffic, users, FOREVER_S, self.lives) < wanted:
            return math.inf
        longest = min(self.lives.ttl_s, self.lives.idle_ttl_s)
        low, high = math.log(1e-3), math.log(longest)
        for _ in range(NUM_BISECTIONS):
            middle = (low + high) / 2
            if hit_rate(traffic, users, math.exp(middle), self.lives) < wanted:
                low = middle
            else:
                high = middle
        return math.exp(high)

    def point(self, traffic: Traffic, users: Users, wanted: float) -> Point:
        """Find what a hit rate needs, and simulate a cache of that size."""
        kept_s = self.kept(traffic, users, wanted)
        longest = min(kept_s, self.lives.ttl_s, self.lives.idle_ttl_s)
        num_held = users_held(traffic, users, longest)
        che = hit_rate(traffic, users, kept_seconds(traffic, users, num_held), self.lives)
        simulated = simulated_hit_rate(
            traffic, num_held, longest, self.lives, self.config.requests, self.config.seed
        )
        return Point(wanted, kept_s, num_held, che, simulated)

    def need(self, traffic: Traffic, tier: str, wanted: float, num_held: float) -> Need:
        """Return what a hit rate needs in a tier; ``wanted = 0`` is no cache at all."""
        config, planned = self.config, self.tiers[tier]
        num_bytes = num_held * self.bytes_by_tier[tier]
        ms = self.score_ms + wanted * planned.fetch_ms + (1.0 - wanted) * self.prefill_ms
        cores = traffic.requests_per_s * config.traffic.peak * ms / 1e3
        machines = math.ceil(cores / config.machine.cores)
        if tier in IN_PROCESS:
            machines = max(machines, math.ceil(num_bytes / GIB / config.machine.memory_gib))
        price = cores * config.core_hour + num_bytes / GIB * planned.gib_hour
        return Need(tier, wanted, traffic.num_users, num_bytes, ms, cores, max(1, machines), price)

    def curve(self, traffic: Traffic, users: Users) -> list[tuple[float, float]]:
        """Return hit rates of pages by the number of users that they hold."""
        longest = min(self.lives.ttl_s, self.lives.idle_ttl_s)
        shortest = min(self.config.traffic.think_s, longest) / 4
        ratio = (longest / shortest) ** (1.0 / (NUM_CURVE_POINTS - 1))
        times = [shortest * ratio**index for index in range(NUM_CURVE_POINTS)]
        return [
            (users_held(traffic, users, one), hit_rate(traffic, users, one, self.lives))
            for one in times
        ]

    def rule(self, traffic: Traffic, users: Users, best: Need) -> str:
        """Return the rule of thumb's answer, and what is to be said of it."""
        fetch_ms = max(self.config.host.fetch_ms, 1e-6)
        capacity = traffic.num_users * self.prefill_ms / (best.machines * fetch_ms)
        between_s = traffic.num_users / traffic.requests_per_s
        reuses = capacity * self.lives.ttl_s / between_s
        held = min(capacity * best.machines, float(traffic.num_users))
        che = hit_rate(traffic, users, kept_seconds(traffic, users, held), self.lives)
        return (
            f"The rule of thumb C = N t_calc / (M t_cache) asks for {capacity:,.0f} users' K/V on "
            f"each of {best.machines} machines ({held / traffic.num_users:.0%} of all users fit), "
            f"k = C T / t = {reuses:.3g}: it knows neither a wanted hit rate nor how unevenly "
            f"users come nor bytes, and Che's hit rate there is {che:.3f}."
        )


def _shape(config: PlanConfig) -> ModelShape:
    if config.artifact is not None:
        key = read_key(config.artifact_key_file, "artifact_key_file")
        return shape_of(Path(config.artifact), key)
    model = config.model
    return given_shape(model.dim, model.num_layers, model.num_heads, model.max_history)


def _times_ms(config: PlanConfig, shape: ModelShape, num_events: int) -> tuple[float, float]:
    """Return the times of prefill and score: given, or this machine's roofline."""
    given = config.prefill_ms, config.score_ms
    if given[0] is not None and given[1] is not None:
        return given[0], given[1]
    rates = measure_rates()
    prefill = score = 0.0
    for history in shape.histories:
        read = min(num_events, history.window.max_history)
        prefill += rates.roofline_ms(prefill_cost(shape.spec, read))
        score += rates.roofline_ms(attend_cost(shape.spec, read, config.candidates))
    threads = torch.get_num_threads()  # The rates are those of all threads together.
    return (
        prefill * threads if given[0] is None else given[0],
        score * threads if given[1] is None else given[1],
    )


# --- what is written


def plan_records(plan: Plan, population: int) -> list[Record]:
    """Return a plan's figures.

    Args:
        plan: the plan.
        population: users of the traffic that it was made for.
    """
    return [*_hit_rate_records(plan, population), *_need_records(plan.needs, plan.growth)]


def _hit_rate_records(plan: Plan, population: int) -> Iterator[Record]:
    page_mib = plan.bytes_by_tier[PAGES] / MIB
    for num_held, share in plan.curve:
        case: Case = {"path": CHE, "population": population, "mib": round(num_held * page_mib)}
        yield Record(PLAN, case, "hit_rate", share, unit="x")
    for point in plan.points:
        if point.is_reachable:
            mib = round(point.num_held * page_mib)
            for path, share in ((CHE, point.che), (SIMULATION, point.simulated)):
                case = {"path": path, "population": population, "mib": mib}
                yield Record(PLAN, case, "hit_rate", share, unit="x")


def _need_records(needs: Sequence[Need], growth: Sequence[Need]) -> Iterator[Record]:
    done: set[tuple[str, float, int]] = set()
    for need in (*needs, *growth):
        key = (need.tier, need.wanted, need.population)
        if key in done:
            continue
        done.add(key)
        case: Case = {
            "path": need.tier,
            "tier": need.tier,
            "population": need.population,
            "hit_percent": round(100 * need.wanted),
        }
        yield Record(PLAN, case, "bytes", need.num_bytes, unit="bytes")
        yield Record(PLAN, case, "requests_per_core_s", 1e3 / need.ms_per_request, unit="1/s")
        yield Record(PLAN, case, "cores", need.cores, unit="cores")
        yield Record(PLAN, case, "machines", need.machines, unit="machines")
        yield Record(PLAN, case, "price_per_hour", need.price_per_hour, unit="money/h")


def plan_text(plan: Plan, config: PlanConfig) -> str:
    """Return a plan as text for people: tables, and what was assumed."""
    traffic = config.traffic
    per_user = ", ".join(
        f"{tier} {num_bytes / 1024:,.0f} KiB" for tier, num_bytes in plan.bytes_by_tier.items()
    )
    best = min(plan.needs, key=lambda need: need.price_per_hour)
    if best.wanted:
        cheapest = f"Cheapest: hit rate {best.wanted:.2f} from {best.tier}"
    else:
        cheapest = "Cheapest: no K/V between requests"
    lines = [
        f"{traffic.users:,} users, {traffic.sessions_per_day:g} sessions a day of "
        f"{traffic.session_requests:g} requests, {traffic.think_s:g} s apart; "
        f"Zipf {traffic.zipf:g}",
        f"K/V of a user: {per_user} (pages at watermark {config.watermark:g})",
        f"one core: prefill {plan.prefill_ms:.3g} ms, {config.candidates} candidates "
        f"{plan.score_ms:.3g} ms{_origin(config)}",
        "",
        *_table(_point_rows(plan)),
        "",
        *_table(_need_rows(plan.needs)),
        f"{cheapest}, at the prices given.",
        "",
        *_table(_need_rows(plan.growth)),
        "",
        plan.rule,
    ]
    return "\n".join(lines)


def _origin(config: PlanConfig) -> str:
    if config.prefill_ms is not None and config.score_ms is not None:
        return ""
    return " (this machine's roofline, a lower bound: pipelines.advise measures)"


def _point_rows(plan: Plan) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [
        ("wanted", "kept for", "users held", "Che", "simulated", "K/V in pages")
    ]
    for point in plan.points:
        if point.is_reachable:
            rows.append(
                (
                    f"{point.wanted:.2f}",
                    _duration(point.kept_s),
                    f"{point.num_held:,.0f}",
                    f"{point.che:.3f}",
                    f"{point.simulated:.3f}",
                    _bytes(point.num_held * plan.bytes_by_tier[PAGES]),
                )
            )
        else:
            most = f"out of reach: at most {point.che:.3f} before K/V expires"
            rows.append((f"{point.wanted:.2f}", most, "", "", "", ""))
    return rows


def _need_rows(needs: Sequence[Need]) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [
        ("users", "hit rate", "tier", "K/V", "requests/s, core", "cores", "machines", "price/h")
    ]
    for need in needs:
        rows.append(
            (
                f"{need.population:,}",
                f"{need.wanted:.2f}",
                need.tier if need.wanted else "none",
                _bytes(need.num_bytes),
                f"{1e3 / need.ms_per_request:,.0f}",
                f"{need.cores:,.1f}",
                f"{need.machines:,}",
                f"{need.price_per_hour:,.2f}",
            )
        )
    return rows


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines with right-aligned columns; a row's long second cell may stand in the others."""
    plain = [row for row in rows if all(row)]
    widths = [max(len(row[column]) for row in plain) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _bytes(num_bytes: float) -> str:
    for unit, size in (("TiB", 2**40), ("GiB", GIB), ("MiB", MIB)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 1024:,.0f} KiB"


def _duration(seconds: float) -> str:
    for unit, size in (("d", DAY_S), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"

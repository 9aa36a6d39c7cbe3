"""Advice as text, as records, and as a config that other pipelines take."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf

from torchrec_kvshare.benchmark.results import Case, Record
from torchrec_kvshare.planning.advice import ADVISE, MERGED, SHARED, Advice
from torchrec_kvshare.planning.times import NEW_EVENTS, Times
from torchrec_kvshare.planning.trace import Trace
from torchrec_kvshare.planning.validation import Measured

ADVISED = "advised"  # the option of the config group ``cache``
ADVICE_FILE = "advice.md"
MIB = 2**20
# Times as fast: what is worth it, and what is a large gain.
GAIN, LARGE_GAIN = 1.05, 2.0
# The rules of thumb that the table of scenes stands beside.
RULE_EVENTS, RULE_CANDIDATES = 512, 50


def write_cache(folder: Path, advice: Advice, trace: Trace) -> Path:
    """Write the advised cache as option ``advised`` of the config group ``cache``."""
    path = folder / "cache" / f"{ADVISED}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = (
        f"# Advised for the traffic of {trace.name}: {len(trace.requests)} requests.\n"
        "# Units and meanings of all keys: kvshare serve --help cache=tiered\n"
    )
    path.write_text(head + OmegaConf.to_yaml(OmegaConf.create(asdict(advice.cache))))
    return path


def advice_text(
    advice: Advice,
    trace: Trace,
    times: Times,
    *,
    threads: int,
    budget_ms: float,
    measured: Measured | None,
) -> str:
    """Return the advice in Markdown.

    Args:
        advice: the advice.
        trace: the traffic it is for.
        times: of the model on this machine.
        threads: that a request is computed with.
        budget_ms: longest time that a request may take.
        measured: what an engine with the advised cache did; None if none was run.
    """
    predicted = advice.predicted
    users = len({request.user_id for request in trace.requests})
    lines = [
        f"{len(trace.requests):,} requests of {users:,} users ({trace.name})"
        + (f", {trace.num_refused} refused: {trace.why_refused}" if trace.num_refused else ""),
        "",
        f"Predicted with the advised cache ({advice.scope}): hit rate {predicted.hit_rate:.3f}, "
        f"{predicted.event_hit_rate:.3f} of events found, p50 {predicted.p50_ms:.2f} ms, "
        f"p99 {predicted.p99_ms:.2f} ms, "
        f"{1e3 / predicted.mean_ms / threads:,.0f} requests per second and core, "
        f"{advice.cache.capacity_bytes / MIB:,.1f} MiB of pages. The replay started with an empty "
        "cache.",
    ]
    if measured is not None:
        lines += ["", _validation(advice, measured)]
    rows = [("setting", "advice", "why", "instead", "why not"), *map(tuple, advice.choices)]
    lines += ["", *markdown_table(rows), "", *_times_lines(times), ""]
    lines += [*markdown_table(_scene_rows(times, budget_ms)), ""]
    lines.append(
        f"Rules of thumb say: L > {RULE_EVENTS} events: large gain; N > {RULE_CANDIDATES} "
        "candidates: recommended; offline generation: not needed. Offline, each user comes once: "
        "nothing is hit, and sharing within the request is all there is to gain."
    )
    return "\n".join(lines)


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table; the first row is its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in lines]


def advice_records(
    advice: Advice, trace: Trace, times: Times, *, threads: int, measured: Measured | None
) -> list[Record]:
    """Return the figures of the advice; the arguments are those of ``advice_text``."""
    curve = []
    for policy, at_rest, share in advice.curve:
        case: Case = {"path": policy, "data": _label(trace), "mib": round(at_rest / MIB)}
        curve.append(Record(ADVISE, case, "event_hit_rate", share, unit="x"))
    return [*_time_records(times), *_traffic_records(advice, trace, threads, measured), *curve]


def _time_records(times: Times) -> Iterator[Record]:
    tables = {
        "shared_ms": times.shared_ms,
        "miss_ms": times.miss_ms,
        "hit_ms": times.hit_ms,
        "grown_ms": times.grown_ms,
    }
    for row, length in enumerate(times.lengths.astype(int).tolist()):
        sizes: Case = {"path": "model", "history": length}
        for metric, table in tables.items():
            for column, number in enumerate(times.candidates.astype(int).tolist()):
                case = sizes | {"candidates": number}
                yield Record(ADVISE, case, metric, float(table[row, column]), unit="ms")
        one = sizes | {"candidates": 1}
        yield Record(ADVISE, one, "merged_ms", float(times.merged_ms[row]), unit="ms")
        yield Record(ADVISE, sizes, "lookup_ms", float(times.lookup_ms[row]), unit="ms")
        for (tier, codec), values in times.fetch_ms.items():
            shelf: Case = {"path": f"{tier}_{codec}", "tier": tier, "codec": codec}
            shelf |= {"history": length}
            num_bytes = float(times.packet_bytes[tier, codec][row])
            yield Record(ADVISE, shelf, "fetch_ms", float(values[row]), unit="ms")
            yield Record(ADVISE, shelf, "bytes", num_bytes, unit="bytes")


def _traffic_records(
    advice: Advice, trace: Trace, threads: int, measured: Measured | None
) -> Iterator[Record]:
    for path, one in (("predicted", advice.predicted), ("measured", measured)):
        if one is not None:
            case: Case = {"path": path, "data": _label(trace)}
            yield Record(ADVISE, case, "traffic_hit_rate", one.hit_rate, unit="x")
            share = one.event_hit_rate
            yield Record(ADVISE, case, "traffic_event_hit_rate", share, unit="x")
            yield Record(ADVISE, case, "p50_ms", one.p50_ms, unit="ms")
            yield Record(ADVISE, case, "p99_ms", one.p99_ms, unit="ms")
            rate = 1e3 / one.mean_ms / threads
            yield Record(ADVISE, case, "requests_per_core_s", rate, unit="1/s")
    for scope, mean_ms in advice.mean_ms_by_scope.items():
        case = {"path": scope, "data": _label(trace)}
        yield Record(ADVISE, case, "mean_ms", mean_ms, unit="ms")


def _label(trace: Trace) -> str:
    return Path(trace.name).name


def _validation(advice: Advice, measured: Measured) -> str:
    predicted = advice.predicted
    p50_error, p99_error = (
        one / other - 1.0
        for one, other in (
            (predicted.p50_ms, measured.p50_ms),
            (predicted.p99_ms, measured.p99_ms),
        )
    )
    return (
        f"Measured with an engine on the same requests: hit rate {measured.hit_rate:.3f}, "
        f"{measured.event_hit_rate:.3f} of events found, "
        f"p50 {measured.p50_ms:.2f} ms (predicted {p50_error:+.0%}), "
        f"p99 {measured.p99_ms:.2f} ms (predicted {p99_error:+.0%})."
    )


def _times_lines(times: Times) -> list[str]:
    names = ("events", "look-up", "prefill", f"extend by {NEW_EVENTS} events")
    shelves = [*times.fetch_ms]
    rows: list[Sequence[str]] = [(*names, *(f"fetch {tier} {codec}" for tier, codec in shelves))]
    for row, length in enumerate(times.lengths.astype(int).tolist()):
        prefill = float((times.miss_ms - times.hit_ms)[row].mean())
        extend = float((times.grown_ms - times.hit_ms)[row].mean())
        fetches = [times.fetch_ms[shelf][row] for shelf in shelves]
        values = (times.lookup_ms[row], prefill, extend, *fetches)
        rows.append((str(length), *(f"{value:.2f} ms" for value in values)))
    return markdown_table(rows)


def _scene_rows(times: Times, budget_ms: float) -> list[Sequence[str]]:
    """Every measured length and queue: what each scope takes, and what is worth it."""
    rows: list[Sequence[str]] = [
        ("L", "N", MERGED, SHARED, "hit", f"within {budget_ms:g} ms", "a hit gains", "so")
    ]
    for row, length in enumerate(times.lengths.astype(int).tolist()):
        for column, number in enumerate(times.candidates.astype(int).tolist()):
            merged = float(times.merged_ms[row] * number)
            shared, hit = (float(t[row, column]) for t in (times.shared_ms, times.hit_ms))
            found = {MERGED: merged, SHARED: shared, "hit": hit}
            within = [name for name, value in found.items() if value <= budget_ms]
            rows.append(
                (
                    *(str(length), str(number)),
                    *(f"{value:.1f} ms" for value in found.values()),
                    ", ".join(within) or "none",
                    f"{shared / hit:.2f} ×",
                    _verdict(merged / shared, shared / hit),
                )
            )
    return rows


def _verdict(sharing: float, caching: float) -> str:
    gain_by_verb = {"share": sharing, "cache": caching}
    parts = [
        f"{verb}: large gain" if gain >= LARGE_GAIN else verb
        for verb, gain in gain_by_verb.items()
        if gain >= GAIN
    ]
    return ", ".join(parts) or "neither pays"

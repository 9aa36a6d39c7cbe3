"""One user's queue of N candidates, scored on every path: for scenarios that vary N."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torchrec_kvshare.benchmark.options import MergedOptions, ModelSizes, Options, PageSize
from torchrec_kvshare.benchmark.paths import (
    CROSS_REQUEST_HIT,
    REQUEST_SHARED,
    UNCACHED_MERGED,
    Paths,
    Score,
    assert_parity,
    fastest_chunk_rows,
)
from torchrec_kvshare.benchmark.plots import BLUE, GREEN, RED, Axis, Line, Picture
from torchrec_kvshare.benchmark.results import Case, Record
from torchrec_kvshare.benchmark.workload import draw_requests, make_dlrm, make_schema
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.history.kinds import CAUSAL

LINE_BY_PATH = {
    UNCACHED_MERGED: Line("uncached, history repeated per candidate", RED),
    REQUEST_SHARED: Line("one prefill per request", BLUE),
    CROSS_REQUEST_HIT: Line("K/V from the cache", GREEN),
}


@dataclass
class QueueOptions(Options, ModelSizes, PageSize, MergedOptions):
    """Options of a scenario that scores queues of several lengths on every path."""

    histories: list[int] = field(default_factory=lambda: [256, 1000])  # events; all paths
    long_histories: list[int] = field(  # events; without ``uncached_merged``
        default_factory=lambda: [4096]
    )
    candidates: list[int] = field(default_factory=lambda: [1, 5, 10, 50, 100, 256, 500, 1000])


class Queues:
    """One user's queues of candidates after one history, and the records about them.

    Args:
        scenario: name of the scenario in the records.
        options: which queues, and the sizes of the model.
        history: events of the user.
    """

    def __init__(self, scenario: str, options: QueueOptions, history: int) -> None:
        self.scenario = scenario
        self.options = options
        self.history = history
        schema = make_schema(history, num_users=1)
        self.paths = Paths(schema, make_dlrm(schema, options, options.seed), options.page_size)
        self.requests = draw_requests(schema, options.candidates, user=0, seed=options.seed)
        self.paths.put(self.requests[0])
        self.chunk_rows: int | None = None
        if history in options.histories:
            self.chunk_rows = fastest_chunk_rows(
                self.paths, options.candidates, options.seed, options.merged_chunk_rows
            )

    def cases(self) -> Iterator[tuple[Request, dict[str, Score]]]:
        """Yield each request with the paths that score it, called once and found to agree."""
        merged = None if self.chunk_rows is None else self.paths.merged(self.chunk_rows)
        for request in self.requests:
            is_short = request.num_candidates <= self.options.merged_max_candidates
            score_by_path = self.paths.calls(request, merged if is_short else None)
            assert_parity({path: score() for path, score in score_by_path.items()})
            yield request, score_by_path

    def chunk_records(self) -> list[Record]:
        """Return the rows that ``uncached_merged`` computed at once, if it was measured."""
        if self.chunk_rows is None:
            return []
        return [self.record(UNCACHED_MERGED, "chunk_rows", self.chunk_rows, "rows")]

    def record(
        self, path: str, metric: str, value: float, unit: str, num_candidates: int | None = None
    ) -> Record:
        """Return a record of this history; without ``num_candidates`` it is about all queues."""
        case: Case = self.options.case(CAUSAL) | {
            "path": path,
            "history": self.history,
            "users": 1,
        }
        if num_candidates is not None:
            case["candidates"] = num_candidates
        return Record(self.scenario, case, metric, value, unit=unit)


def queue_picture(metrics: tuple[str, ...], label: str, path: str, line: Line) -> Picture:
    """Return a picture over the number of candidates, one panel per history.

    Args:
        metrics: the figures that it shows.
        label: of their axis.
        path: a path of the scenario beside those of ``LINE_BY_PATH``.
        line: how that path is drawn.
    """
    return Picture(
        metrics=metrics,
        label=label,
        panels=Axis("history", "history of {} events"),
        across=Axis("candidates", "candidates N"),
        line_by_path=LINE_BY_PATH | {path: line},
        case={},
        is_logarithmic=True,
    )

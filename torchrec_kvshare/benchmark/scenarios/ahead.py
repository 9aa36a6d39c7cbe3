"""First requests of users at a server, with a prefetch ahead of each and without.

Every user asks once, so without a prefetch every request encodes its history. The prefetch is what
a retrieval stage would send; see ``serving/prefetch.py``. Requests come at random times, one after
the other and together, as under ``scenario=serving``.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from torchrec_kvshare.benchmark.load import (
    CALL_TIMEOUT_S,
    LoadResult,
    ask_each,
    check_installed,
    measure_ahead,
)
from torchrec_kvshare.benchmark.options import ModelSizes, PageSize, TimedOptions
from torchrec_kvshare.benchmark.results import Record
from torchrec_kvshare.benchmark.servers import message_of, running
from torchrec_kvshare.benchmark.workload import make_cache, make_dlrm, make_schema
from torchrec_kvshare.commands.layout import process_command
from torchrec_kvshare.errors import ParityError
from torchrec_kvshare.export.exporter import export_model
from torchrec_kvshare.history.kinds import CAUSAL
from torchrec_kvshare.model.ranking import RankingModel

AHEAD = "ahead"
WITHOUT, WITH = "without", "with"
TOLERANCE = 2e-6  # of a probability, between a history that is encoded and one that was cached


@dataclass
class AheadOptions(TimedOptions, ModelSizes, PageSize):
    """Options of ``scenario=ahead``; ``repeats`` are turns of each path."""

    histories: list[int] = field(default_factory=lambda: [1000])  # events
    candidates: list[int] = field(default_factory=lambda: [100])  # the first is used
    requests: int = 100  # users of a turn, each of whom asks once
    qps: int = 5  # requests per second, on average
    lead_ms: int = 50  # from a prefetch to its request


def measure_ahead_of_requests(options: AheadOptions) -> list[Record]:
    """Measure first requests with a prefetch and without, in turns, at servers of their own.

    Returns:
        Medians over the turns of ``hit_rate``, ``p50_ms`` and ``p99_ms``, and ``p99_ratio`` of
        prefetched requests to others.

    Raises:
        ConfigError: if a server does not start, or refuses a request.
        MissingExtraError: if a package of the client is not installed.
        ParityError: if the scores of a prefetched user differ from those of others.
    """
    check_installed()
    return [record for history in options.histories for record in _measure(history, options)]


def _measure(history: int, options: AheadOptions) -> Iterator[Record]:
    schema = make_schema(history, options.requests)
    model = RankingModel(make_dlrm(schema, options, options.seed)).eval()
    [tower] = model.collection.towers()
    # Twice the K/V of all users: a tenth of the pool is for requests in flight.
    pool = make_cache(tower, history, 2 * options.requests, options.page_size).pool
    messages = [
        message_of(schema, user, options.candidates[0], options.seed)
        for user in range(options.requests)
    ]
    turns: dict[str, list[LoadResult]] = {WITHOUT: [], WITH: []}
    with TemporaryDirectory() as name:
        folder = Path(name)
        export_model(model, schema, folder / "artifact")
        command = [
            *process_command("serve"),
            f"artifact={folder / 'artifact'}",
            f"threads={torch.get_num_threads()}",
            *("server.http_port=0", "server.grpc_port=0", "server.log_requests=false"),
            f"server.timeout_ms={CALL_TIMEOUT_S * 1e3}",
            f"cache.page_size={options.page_size}",
            f"cache.capacity_bytes={pool.capacity_bytes}",
        ]
        scores = []
        for turn in range(options.repeats):
            for path, lead_ms in ((WITHOUT, None), (WITH, options.lead_ms)):
                with running(command, folder) as server:
                    result = measure_ahead(
                        server.grpc, messages, options.qps, lead_ms, options.seed + turn
                    )
                    turns[path].append(result)
                    if turn == 0:
                        scores.append([reply.scores for reply in ask_each(server.grpc, messages)])
    worst = max(
        abs(one - other)
        for pair in zip(*scores, strict=True)
        for one, other in zip(*pair, strict=True)
    )
    if worst > TOLERANCE:
        raise ParityError(f"scores of prefetched users differ by {worst:.1e}; {TOLERANCE} allowed")
    case = options.case(CAUSAL) | {"history": history, "candidates": options.candidates[0]}
    case |= {"users": options.requests, "qps": options.qps, "lead_ms": options.lead_ms}
    for path, results in turns.items():
        for metric, unit in (("hit_rate", "x"), ("p50_ms", "ms"), ("p99_ms", "ms")):
            value = median(getattr(result, metric) for result in results)
            yield Record(AHEAD, case | {"path": path}, metric, value, unit=unit)
    ratio = median(
        one.p99_ms / other.p99_ms for one, other in zip(turns[WITH], turns[WITHOUT], strict=True)
    )
    yield Record(AHEAD, case | {"path": WITH}, "p99_ratio", ratio, unit="x")

"""Throughput of servers under Poisson load, with K/V kept between requests and without.

``cached`` and ``uncached`` are ``pipelines.serve`` on one artifact; ``merged`` is the same server
around a model that encodes the history again for every candidate. Each server is a process of its
own, and so is the client, which asks over gRPC. Users come by Zipf's law, each with a full window,
so that law decides the hit rate of a cache with room for a part of them.
"""

import asyncio
import json
import signal
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import count
from math import ceil
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_kvshare.benchmark.baselines.merged import merged_ranker
from torchrec_kvshare.benchmark.load import (
    CALL_TIMEOUT_S,
    LEAST_QPS,
    LoadResult,
    Reply,
    Saturation,
    ask_each,
    check_installed,
    highest_qps,
    measure_server,
    saturated_qps,
)
from torchrec_kvshare.benchmark.options import (
    MergedOptions,
    ModelSizes,
    PageSize,
    TimedOptions,
)
from torchrec_kvshare.benchmark.paths import Paths, fastest_chunk_rows
from torchrec_kvshare.benchmark.results import Case, Record
from torchrec_kvshare.benchmark.servers import Server, message_of, running
from torchrec_kvshare.benchmark.workload import draw_users, make_dlrm, make_schema
from torchrec_kvshare.cache.metrics import CacheMetrics
from torchrec_kvshare.cache.open import MEMORY, OFF
from torchrec_kvshare.cache.reasons import HIT
from torchrec_kvshare.commands.layout import process_command
from torchrec_kvshare.config import ServeConfig, ServerConfig
from torchrec_kvshare.errors import ParityError
from torchrec_kvshare.export.artifact import read_artifact
from torchrec_kvshare.export.exporter import export_model
from torchrec_kvshare.history.kinds import CAUSAL
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.verify.parity import LOGIT_TOLERANCE

SERVING = "serving"
CACHED, UNCACHED, MERGED = "cached", "uncached", "merged"

NUM_USERS = 128
NUM_SAMPLES = 4096  # draws of users
NUM_COMPARED = 16  # most frequent users, whose scores are compared between servers
CAPACITY_PERCENTS = (100, 25)  # of the K/V of all users: room of a cache at rest
NUM_ENCODED = 16  # more users whose K/V fits, while their requests are answered
TTL_S = 3600.0  # longer than any run

RUN_S = 8.0  # for each rate that is tried
SATURATED_S = 5.0
SEEDS_PER_TURN = 1000  # more than a search has runs
IN_FLIGHT = 4
HTTP_TIMEOUT_S = 10.0

# A sigmoid is at most a fourth as steep as its logit.
TOLERANCE = LOGIT_TOLERANCE / 4


class Setup(NamedTuple):
    """A way to serve.

    Attributes:
        path: name of the server.
        capacity_percent: of the K/V of all users: what it keeps between requests.
    """

    path: str
    capacity_percent: int = 0

    def case(self) -> Case:
        """Return the setup as it stands in a record."""
        if self.path == CACHED:
            return {"path": self.path, "capacity_percent": self.capacity_percent}
        return {"path": self.path}


BASELINES = (Setup(UNCACHED), Setup(MERGED))


class Spent(NamedTuple):
    """Seconds that a server has spent on all its requests since it started."""

    scoring_s: float
    requests_s: float


@dataclass
class Turns:
    """Figures of one server, turn by turn.

    Attributes:
        highest: at the highest rate that met the target; None where no rate did.
        saturations: at saturation.
        engine_shares: share of scoring in the time of requests that come one at a time.
    """

    highest: list[LoadResult | None] = field(default_factory=list)
    saturations: list[Saturation] = field(default_factory=list)
    engine_shares: list[float] = field(default_factory=list)

    @property
    def met(self) -> list[LoadResult]:
        """The highest rates of the turns that have one."""
        return [result for result in self.highest if result is not None]

    @property
    def qps_at_50ms(self) -> float:
        """Median of the highest rates, 0 for a turn without one."""
        return median(0.0 if result is None else result.qps for result in self.highest)

    @property
    def saturated_qps(self) -> float:
        """Median of the saturation throughput."""
        return median(saturation.qps for saturation in self.saturations)

    @property
    def hit_rate(self) -> float:
        """Median at the highest rates; without one, at saturation."""
        return median(each.hit_rate for each in self.met or self.saturations)

    def first_qps(self) -> float:
        """Return where the next search for the highest rate starts; saturation is known."""
        if not self.highest:
            return self.saturations[-1].qps / 2
        last = self.highest[-1]
        return LEAST_QPS if last is None else last.qps


@dataclass
class ServingOptions(TimedOptions, ModelSizes, PageSize, MergedOptions):
    """Options of ``scenario=serving``; ``repeats`` are turns of each server."""

    histories: list[int] = field(default_factory=lambda: [1000])  # events; all servers
    long_histories: list[int] = field(  # events; without the merged server
        default_factory=lambda: [4096]
    )
    candidates: list[int] = field(default_factory=lambda: [100, 500])
    merged_max_candidates: int = 100


def measure_serving(options: ServingOptions) -> list[Record]:
    """Measure the rates that servers keep up with, with K/V kept and without.

    All servers of a case run at once, and are asked in turns.

    Returns:
        Medians over the turns. ``qps_at_50ms``: the highest Poisson rate whose 99th percentile is
        within 50 ms without a failure, 0 if there is none; ``p99_ms`` at that rate, if there is
        one; ``hit_rate``; ``saturated_qps``, with 4 requests always in flight; ``engine_share``,
        the share of scoring in the time of requests that come one at a time; and
        ``qps_vs_uncached``, ``saturated_vs_uncached``, ``qps_vs_merged``, ``saturated_vs_merged``
        where the other server has such a rate.

    Raises:
        ConfigError: if a server does not start, or refuses a request.
        MissingExtraError: if a package of the client is not installed.
        ParityError: if scores of two servers differ.
    """
    check_installed()
    histories = (*options.histories, *options.long_histories)
    return [record for history in histories for record in _measure_history(history, options)]


def _measure_history(history: int, options: ServingOptions) -> Iterator[Record]:
    schema = make_schema(history, NUM_USERS)
    paths = Paths(schema, make_dlrm(schema, options, options.seed), options.page_size)
    with TemporaryDirectory() as name:
        folder = Path(name)
        artifact = folder / "artifact"
        export_model(paths.model, schema, artifact)
        # The cache of the paths has room for one user.
        user_bytes = paths.cache.pool.capacity_bytes
        commands = serve_commands(artifact, user_bytes, options.page_size)
        merged = {}
        if history in options.histories:
            chunk_rows = fastest_chunk_rows(
                paths, options.candidates, options.seed, options.merged_chunk_rows
            )
            merged[Setup(MERGED)] = merged_command(artifact, options, options.seed, chunk_rows)
        for num_candidates in options.candidates:
            is_short = num_candidates <= options.merged_max_candidates
            messages = [
                message_of(schema, user, num_candidates, options.seed) for user in range(NUM_USERS)
            ]
            turns = _measure_case(
                commands | merged if is_short else commands, messages, options, folder
            )
            case = options.case(CAUSAL) | {"history": history, "candidates": num_candidates}
            yield from _records(case | {"users": NUM_USERS}, turns)


def _measure_case(
    commands: Mapping[Setup, Sequence[str]],
    message_by_user: Sequence[bytes],
    options: ServingOptions,
    folder: Path,
) -> dict[Setup, Turns]:
    with ExitStack() as stack:
        server_by_setup = {
            setup: stack.enter_context(running(command, folder))
            for setup, command in commands.items()
        }
        check_parity(server_by_setup, message_by_user)
        return _take_turns(server_by_setup, message_by_user, options, folder)


# --- servers


def serve_commands(artifact: Path, user_bytes: int, page_size: int) -> dict[Setup, list[str]]:
    """Return command lines of ``pipelines.serve`` with each cache and without one.

    Args:
        artifact: the artifact to serve.
        user_bytes: bytes of the K/V of one user.
        page_size: rows per page.
    """
    ports = ["server.http_port=0", "server.grpc_port=0"]
    shared = [f"artifact={artifact}", f"threads={torch.get_num_threads()}", *ports]
    # A late answer shows in the latencies; refused by the server, it would count as a failure.
    shared.append(f"server.timeout_ms={CALL_TIMEOUT_S * 1e3}")
    start = [*process_command("serve"), *shared]
    commands = {Setup(UNCACHED): [*start, f"cache={OFF}"]}
    for percent in CAPACITY_PERCENTS:
        num_at_rest = ceil(NUM_USERS * percent / 100)
        num_users = num_at_rest + NUM_ENCODED
        commands[Setup(CACHED, percent)] = [
            *start,
            f"cache={MEMORY}",
            f"cache.page_size={page_size}",
            f"cache.capacity_bytes={num_users * user_bytes}",
            # A bit more than the users at rest take, so that rounding evicts none of them.
            f"++cache.watermark={(num_at_rest + 0.01) / num_users}",
            f"cache.ttl_s={TTL_S}",
            f"cache.idle_ttl_s={TTL_S}",
        ]
    return commands


def merged_command(artifact: Path, sizes: ModelSizes, seed: int, chunk_rows: int) -> list[str]:
    """Return the command line of ``serve_merged`` in a process of its own.

    Args:
        artifact: artifact of the model that ``make_dlrm`` draws.
        sizes: of that model.
        seed: of that model.
        chunk_rows: rows that are computed at once.
    """
    arguments = {
        "artifact": str(artifact),
        "sizes": {size.name: getattr(sizes, size.name) for size in fields(ModelSizes)},
        "seed": seed,
        "chunk_rows": chunk_rows,
        "num_threads": torch.get_num_threads(),
    }
    return [sys.executable, "-m", __name__, json.dumps(arguments)]


# --- what is asked


def draw_samples(message_by_user: Sequence[bytes], seed: int) -> list[bytes]:
    """Draw messages by Zipf's law, that of the first user most often.

    Args:
        message_by_user: one message per user.
        seed: same seed, same samples.
    """
    users = draw_users(np.random.default_rng(seed), len(message_by_user), NUM_SAMPLES)
    return [message_by_user[user] for user in users]


def check_parity(server_by_setup: Mapping[Setup, Server], message_by_user: Sequence[bytes]) -> None:
    """Check that all servers give the uncached scores; the caches are full afterwards.

    Args:
        server_by_setup: the servers, one of them uncached.
        message_by_user: one message per user, the most frequent user first.

    Raises:
        ParityError: naming the server and by how much a probability differs, or the user whose K/V
            was not kept, so that there is nothing to compare.
    """
    compared = message_by_user[:NUM_COMPARED]
    expected = ask_each(server_by_setup[Setup(UNCACHED)].grpc, compared)
    for setup, server in server_by_setup.items():
        if setup.path == CACHED:
            # The most frequent users last, so that their K/V stays.
            ask_each(server.grpc, message_by_user[::-1])
        replies = ask_each(server.grpc, compared)
        for user, (reply, uncached) in enumerate(zip(replies, expected, strict=True)):
            if setup.path == CACHED and reply.status != HIT:
                raise ParityError(f"{setup} kept no K/V of user {user}: {reply.status}")
            difference = _worst_difference(reply, uncached)
            if not difference <= TOLERANCE:
                raise ParityError(
                    f"a score of {setup} differs by {difference} from the uncached one of user "
                    f"{user}; at most {TOLERANCE} is allowed"
                )


def _worst_difference(reply: Reply, expected: Reply) -> float:
    return float(np.abs(np.subtract(reply.scores, expected.scores)).max())


# --- turns


def _take_turns(
    server_by_setup: Mapping[Setup, Server],
    message_by_user: Sequence[bytes],
    options: ServingOptions,
    folder: Path,
) -> dict[Setup, Turns]:
    samples = draw_samples(message_by_user, options.seed)
    turns_by_setup = {setup: Turns() for setup in server_by_setup}
    for turn in range(options.repeats):
        seed = options.seed + turn
        for setup, server in server_by_setup.items():
            turns = turns_by_setup[setup]
            saturated = saturated_qps(
                server.grpc, samples, in_flight=IN_FLIGHT, duration_s=SATURATED_S, seed=seed
            )
            turns.saturations.append(saturated)
            turns.engine_shares.append(engine_share(server, samples, seed))
            # Other users in each run: a cache still has those of the run before.
            seeds = count(seed * SEEDS_PER_TURN)
            measure_at = partial(_measure_at, server, samples, seeds, folder)
            turns.highest.append(highest_qps(measure_at, turns.first_qps()))
    return turns_by_setup


def _measure_at(
    server: Server, samples: Sequence[bytes], seeds: Iterator[int], folder: Path, qps: float
) -> LoadResult:
    with TemporaryDirectory(dir=folder) as logs:
        return measure_server(
            server.grpc, samples, qps=qps, duration_s=RUN_S, seed=next(seeds), log_folder=Path(logs)
        )


def engine_share(server: Server, samples: Sequence[bytes], seed: int) -> float:
    """Return the share of scoring in the time of requests that come one at a time.

    Args:
        server: a server without other clients.
        samples: messages.
        seed: of the order of the messages.
    """
    before = read_spent(server)
    saturated_qps(server.grpc, samples, in_flight=1, duration_s=SATURATED_S, seed=seed)
    after = read_spent(server)
    return (after.scoring_s - before.scoring_s) / (after.requests_s - before.requests_s)


def read_spent(server: Server) -> Spent:
    """Read the time a server has spent from its metrics."""
    from prometheus_client.parser import text_string_to_metric_families

    url = f"http://{server.http}/metrics"
    with urllib.request.urlopen(url, timeout=HTTP_TIMEOUT_S) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = [sample for family in families for sample in family.samples]
    scoring = (
        sample.value
        for sample in samples
        if sample.name == "kvshare_stage_seconds_sum" and sample.labels["stage"] == "score"
    )
    requests = (s.value for s in samples if s.name == "kvshare_request_seconds_sum")
    return Spent(sum(scoring), sum(requests))


# --- records


def _records(case: Case, turns_by_setup: Mapping[Setup, Turns]) -> Iterator[Record]:
    for setup, turns in turns_by_setup.items():
        figures = [
            ("qps_at_50ms", turns.qps_at_50ms, "1/s"),
            ("saturated_qps", turns.saturated_qps, "1/s"),
            ("hit_rate", turns.hit_rate, "x"),
            ("engine_share", median(turns.engine_shares), "x"),
        ]
        if turns.met:
            figures.append(("p99_ms", median(result.p99_ms for result in turns.met), "ms"))
        for baseline in BASELINES:
            if baseline in turns_by_setup and setup.path not in (baseline.path, MERGED):
                figures += _ratios(turns, turns_by_setup[baseline], baseline.path)
        for metric, value, unit in figures:
            yield Record(SERVING, case | setup.case(), metric, value, unit=unit)


def _ratios(turns: Turns, baseline: Turns, name: str) -> Iterator[tuple[str, float, str]]:
    if baseline.qps_at_50ms > 0:
        yield f"qps_vs_{name}", turns.qps_at_50ms / baseline.qps_at_50ms, "x"
    if baseline.saturated_qps > 0:
        yield f"saturated_vs_{name}", turns.saturated_qps / baseline.saturated_qps, "x"


# --- the merged server, in a process of its own


class MergedModel(RankingModel):
    """A ranking model that encodes the history again for every candidate.

    Args:
        model: as ``RankingModel`` takes it, with one history.
        chunk_rows: rows that are computed at once.
    """

    def __init__(self, model: nn.Module, chunk_rows: int) -> None:
        super().__init__(model)
        self.merged = merged_ranker(model, chunk_rows)

    def forward(self, dense: Tensor, features: KeyedJaggedTensor) -> Tensor:
        """Return logits [C, tasks]; the history is encoded once per candidate."""
        return self.merged(dense, features)


class MergedLoader:
    """Makes the merged engine of an artifact whose model was drawn; see ``serving.models.Loader``.

    Args:
        sizes: of the model.
        seed: of the model.
        chunk_rows: rows that are computed at once.
    """

    def __init__(self, sizes: ModelSizes, seed: int, chunk_rows: int) -> None:
        self._sizes = sizes
        self._seed = seed
        self._chunk_rows = chunk_rows
        self.metrics = CacheMetrics()

    def load(self, folder: Path) -> Engine:
        """Return an engine with the artifact's columns and version."""
        manifest, schema = read_artifact(folder)
        ranker = make_dlrm(schema, self._sizes, self._seed)
        model = MergedModel(ranker, self._chunk_rows).eval()
        return Engine(model, schema, None, version=manifest.version)

    def close(self) -> None:
        """Do nothing: no resource is held."""


def serve_merged(
    artifact: str, sizes: dict[str, Any], seed: int, chunk_rows: int, num_threads: int
) -> None:
    """Serve a drawn model that shares nothing until SIGTERM; print the addresses first.

    Args:
        artifact: artifact of the same model.
        sizes: fields of ``ModelSizes``.
        seed: of the model.
        chunk_rows: rows that are computed at once.
        num_threads: of torch.
    """
    torch.set_num_threads(num_threads)
    limits = ServerConfig(http_port=0, grpc_port=0, timeout_ms=CALL_TIMEOUT_S * 1e3)
    loader = MergedLoader(ModelSizes(**sizes), seed, chunk_rows)
    asyncio.run(_serve(ServeConfig(artifact=artifact, server=limits), loader))


async def _serve(config: ServeConfig, loader: MergedLoader) -> None:
    # Its packages come with the extra [server].
    from torchrec_kvshare.serving.server import Ports, serve

    def show(ports: Ports) -> None:
        host = config.server.host
        print(f"serving on http://{host}:{ports.http} and grpc://{host}:{ports.grpc}", flush=True)

    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await serve(config, loader, stop, show)


if __name__ == "__main__":
    serve_merged(**json.loads(sys.argv[1]))

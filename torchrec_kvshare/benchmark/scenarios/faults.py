"""Latency under load while the remote tier is healthy, frozen and dead; every answer is checked.

Clients ask for users at random, one request at a time each, and the pages have room for a part of
the users only, so that most requests go to the tier below.
"""

import random
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from torchrec_kvshare.benchmark.options import ModelSizes, PageSize, TimedOptions
from torchrec_kvshare.benchmark.results import Case, Record
from torchrec_kvshare.benchmark.timing import timed
from torchrec_kvshare.benchmark.workload import make_cache, make_dlrm, make_schema
from torchrec_kvshare.cache.codecs import get_codec
from torchrec_kvshare.cache.identity import UNNAMED
from torchrec_kvshare.cache.kv_cache import KVCache
from torchrec_kvshare.cache.policies import LruPolicy
from torchrec_kvshare.cache.remote import RemoteTier
from torchrec_kvshare.cache.stack import Level, TierStack
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.deploy.redis_server import RedisProcess, redis_server
from torchrec_kvshare.errors import ConfigError, ParityError
from torchrec_kvshare.export.torchscript import script_model
from torchrec_kvshare.features.draw import draw_raw_request
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.features.schema import USER
from torchrec_kvshare.features.tensors import FLOAT32
from torchrec_kvshare.history.kinds import CAUSAL
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Answer, Engine

FAULTS = "faults"
HEALTHY, FROZEN, DEAD = "healthy", "frozen", "dead"
NUM_CLIENTS = 16
NUM_USERS = 48
NUM_IN_PAGES = 16  # users whose K/V fits at rest; as many more are in flight
DEADLINE_S = 0.05
TURN_S = 2.0  # of one state, before the next
TTL_S = 3600.0  # longer than any run
# Two float32 paths to the same probability, as in the tests.
TOLERANCE = 2e-6


class Turn(NamedTuple):
    """All answers during one turn of one state of the tier."""

    latencies_ms: list[float]
    worst_difference: float


@dataclass
class FaultsOptions(TimedOptions, ModelSizes, PageSize):
    """Options of ``scenario=faults``; the model is drawn and scripted."""

    histories: list[int] = field(default_factory=lambda: [256])  # events
    candidates: list[int] = field(default_factory=lambda: [100])  # the first is used


def measure_faults(options: FaultsOptions) -> list[Record]:
    """Measure the latency of requests by the state of the remote tier.

    Returns:
        For each history and state ``p50_ms``, ``p99_ms``, ``requests``, ``max_score_difference``,
        and ``p99_to_bound``: against the tier's deadline and twice the healthy p99.

    Raises:
        ConfigError: if redis-server is not on PATH.
        ParityError: if an answer is not the uncached one.
    """
    return [record for history in options.histories for record in _measure(history, options)]


def _measure(history: int, options: FaultsOptions) -> list[Record]:
    schema = make_schema(history, num_users=NUM_USERS)
    model = RankingModel(make_dlrm(schema, options, options.seed)).eval()
    [tower] = model.collection.towers()
    program = script_model(model)
    num_candidates = options.candidates[0]
    requests = []
    for user in range(NUM_USERS):
        raw = draw_raw_request(schema, history, num_candidates, options.seed + user)
        requests.append(parse_request(raw | {USER: str(user)}, schema))
    expected = [
        answer
        for request in requests
        for answer in Engine(program, schema, None, version=UNNAMED).rank([request])
    ]
    with TemporaryDirectory() as folder, redis_server(Path(folder)) as server:
        if server is None:
            raise ConfigError(f"scenario {FAULTS} needs redis-server on PATH")
        tier = RemoteTier(server.url, TTL_S, DEADLINE_S)
        level = Level(tier, get_codec(FLOAT32), deadline_s=DEADLINE_S)
        stack = TierStack([level], TTL_S)
        pool = make_cache(tower, history, 2 * NUM_IN_PAGES, options.page_size).pool
        at_rest = LruPolicy(pool.capacity_bytes // 2)
        cache = KVCache(pool, policy=at_rest, metrics=stack.metrics)
        engine = Engine(program, schema, KVStore([cache], stack), version=UNNAMED)
        turns = _take_turns(engine, requests, expected, server=server, repeats=options.repeats)
        engine.close()
    case = options.case(CAUSAL) | {"history": history, "candidates": num_candidates}
    return _records(case, turns)


def _take_turns(
    engine: Engine,
    requests: Sequence[Request],
    expected: Sequence[Answer],
    server: RedisProcess,
    repeats: int,
) -> dict[str, list[Turn]]:
    """Measure the tier healthy and frozen by turns, and dead at the end."""
    turns: dict[str, list[Turn]] = {HEALTHY: [], FROZEN: [], DEAD: []}
    _turn(engine, requests, expected)  # Warm up, and fill the tier.
    for _ in range(repeats):
        turns[HEALTHY].append(_turn(engine, requests, expected))
        server.process.send_signal(signal.SIGSTOP)
        turns[FROZEN].append(_turn(engine, requests, expected))
        server.process.send_signal(signal.SIGCONT)
        _turn(engine, requests, expected)  # The breaker closes.
    server.process.kill()
    turns[DEAD] += [_turn(engine, requests, expected) for _ in range(repeats)]
    return turns


def _turn(engine: Engine, requests: Sequence[Request], expected: Sequence[Answer]) -> Turn:
    stop = threading.Event()

    def ask(seed: int) -> Turn:
        rng = random.Random(seed)
        latencies_ms, worst = [], 0.0
        while not stop.is_set():
            user = rng.randrange(len(requests))
            [answer], latency_ms = timed(partial(engine.rank, [requests[user]]))
            latencies_ms.append(latency_ms)
            differences = np.subtract(answer.ranking_scores, expected[user].ranking_scores)
            worst = max(worst, float(np.abs(differences).max()))
        return Turn(latencies_ms, worst)

    with ThreadPoolExecutor(NUM_CLIENTS) as clients:
        asking = [clients.submit(ask, seed) for seed in range(NUM_CLIENTS)]
        time.sleep(TURN_S)
        stop.set()
        answered = [one.result() for one in asking]
    worst = max(turn.worst_difference for turn in answered)
    if not worst <= TOLERANCE:
        raise ParityError(f"a score differs by {worst} from the uncached one")
    return Turn([latency for turn in answered for latency in turn.latencies_ms], worst)


def _records(case: Case, turns: dict[str, list[Turn]]) -> list[Record]:
    records = []
    bound_ms = 0.0
    for state, state_turns in turns.items():
        own: Case = case | {"path": state, "tier": "remote"}
        latencies_ms = [latency for turn in state_turns for latency in turn.latencies_ms]
        p50_ms, p99_ms = np.quantile(latencies_ms, [0.5, 0.99])
        bound_ms = bound_ms or DEADLINE_S * 1e3 + 2 * p99_ms
        for metric, value, unit in (
            ("p50_ms", p50_ms, "ms"),
            ("p99_ms", p99_ms, "ms"),
            ("p99_to_bound", p99_ms / bound_ms, "x"),
            ("requests", len(latencies_ms), "requests"),
            ("max_score_difference", max(turn.worst_difference for turn in state_turns), ""),
        ):
            records.append(Record(FAULTS, own, metric, float(value), unit=unit))
    return records

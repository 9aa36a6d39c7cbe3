"""Whatever happens to a store, every request gets the scores that it has without a store.

Sixteen clients send requests while real servers are killed, frozen, emptied and corrupted.
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cache.servers import RedisServer, redis_cluster, wait_until
from tests.worlds import (
    HEAD_DIM,
    NUM_HEADS,
    NUM_PLANES,
    PAGE_BYTES,
    PAGE_SIZE,
    SCHEMA,
    assert_same_scores,
    draw_raw,
    make_dlrm,
    parse_all,
    version_called,
)
from torchrec_kvshare.cache.codecs import get_codec
from torchrec_kvshare.cache.disk import DiskTier
from torchrec_kvshare.cache.identity import text_digest
from torchrec_kvshare.cache.kv_cache import KVCache
from torchrec_kvshare.cache.pages import PagePool
from torchrec_kvshare.cache.remote import RemoteTier
from torchrec_kvshare.cache.stack import Level, TierLimits, TierStack
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.cache.tiers import Tier
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Answer, Engine

NUM_CLIENTS = 16
NUM_USERS = 24
NUM_PAGES = 9  # for three users, so that most K/V comes from lower tiers
DEADLINE_S = 0.25  # of a look-up, on a machine with two cores and sixteen clients
TTL_S = 300.0
PATIENCE_S = 30.0  # until a recovered tier is used again
VERSION = f"{'5e' * 8}-{'0f' * 8}"

REQUESTS = parse_all(
    [
        draw_raw(9 + user % 6, 1 + user % 3, user) | {"user_id": str(user)}
        for user in range(NUM_USERS)
    ]
)


@pytest.fixture(scope="module")
def model() -> RankingModel:
    return RankingModel(make_dlrm(seed=5)).eval()


@pytest.fixture(scope="module")
def expected(model: RankingModel) -> list[Answer]:
    return Engine(model, SCHEMA, None, version=version_called(VERSION)).rank(REQUESTS)


class Load:
    """Clients that send random requests until the block ends, and check their answers."""

    def __init__(self, engine: Engine, expected: list[Answer]) -> None:
        self.engine = engine
        self.uses: Counter[tuple[str, str]] = Counter()  # by tier and reason
        self._expected = expected
        self._stop = threading.Event()
        self._lock = threading.Lock()

    def saw(self, tier: str | None = None, reason: str | None = None) -> int:
        with self._lock:
            return sum(
                count
                for (of_tier, of_reason), count in self.uses.items()
                if tier in (None, of_tier) and reason in (None, of_reason)
            )

    def sees_again(self, tier: str) -> bool:
        """Wait until K/V of a tier is used from now on."""
        before = self.saw(tier)
        wait_until(lambda: self.saw(tier) > before, PATIENCE_S)
        return True

    def client(self, seed: int) -> int:
        rng = random.Random(seed)
        num_answered = 0
        while not self._stop.is_set():
            user = rng.randrange(NUM_USERS)
            [answer] = self.engine.rank([REQUESTS[user]])
            assert_same_scores([answer], [self._expected[user]])
            with self._lock:
                self.uses[answer.cache.tier, answer.cache.reason] += 1
            num_answered += 1
        return num_answered

    def stop(self) -> None:
        self._stop.set()


@contextmanager
def load_on(engine: Engine, expected: list[Answer]) -> Iterator[Load]:
    load = Load(engine, expected)
    with ThreadPoolExecutor(NUM_CLIENTS) as threads:
        clients = [threads.submit(load.client, seed) for seed in range(NUM_CLIENTS)]
        try:
            yield load
        finally:
            load.stop()
        assert min(client.result() for client in clients) > 0
    engine.close()
    [cache] = engine.store.caches if engine.store else []
    assert all(entry.num_leases == 0 for entry in cache._entry_by_user.values())


def engine_on(model: RankingModel, tier: Tier, key: bytes | None = None) -> Engine:
    level = Level(tier, get_codec("float32"), min_events=1, deadline_s=DEADLINE_S)
    stack = TierStack([level], TTL_S, key, TierLimits(max_failures=2, pause_s=0.3))
    pool = PagePool(
        NUM_PAGES * PAGE_BYTES,
        PAGE_SIZE,
        num_planes=NUM_PLANES,
        num_heads=NUM_HEADS,
        head_dim=HEAD_DIM,
    )
    cache = KVCache(pool, on_evict=stack.demote, metrics=stack.metrics)
    return Engine(model, SCHEMA, KVStore([cache], stack), version=version_called(VERSION))


def failures(engine: Engine, kind: str) -> float:
    assert engine.store is not None
    return engine.store.metrics.snapshot().value("tier_failures", kind=kind)


def remote(server: RedisServer, cluster: bool = False) -> RemoteTier:
    return RemoteTier(server.url, TTL_S, DEADLINE_S, cluster=cluster)


@pytest.mark.parametrize(
    ("harm", "heal", "kind"),
    [
        (RedisServer.stop, RedisServer.start, "error"),
        (RedisServer.pause, RedisServer.resume, "deadline"),
    ],
)
def test_a_server_that_is_killed_or_frozen_costs_nobody_an_answer(
    model: RankingModel,
    expected: list[Answer],
    tmp_path: Path,
    harm: Callable[[RedisServer], None],
    heal: Callable[[RedisServer], None],
    kind: str,
) -> None:
    with RedisServer(tmp_path) as server:
        engine = engine_on(model, remote(server))
        with load_on(engine, expected) as load:
            assert load.sees_again("remote")
            harm(server)
            kinds = {kind, "error"}  # A frozen server exceeds the deadline or the socket's timeout.
            wait_until(lambda: sum(failures(engine, one) for one in kinds) > 2, PATIENCE_S)
            wait_until(lambda: failures(engine, "breaker_open") > 20, PATIENCE_S)
            heal(server)
            assert load.sees_again("remote")


def test_a_server_that_comes_back_empty_is_filled_again(
    model: RankingModel, expected: list[Answer], tmp_path: Path
) -> None:
    with RedisServer(tmp_path) as server:
        engine = engine_on(model, remote(server))
        with load_on(engine, expected) as load:
            assert load.sees_again("remote")
            with server.client() as client:
                client.flushall()
            assert load.sees_again("remote")
            assert failures(engine, "error") == 0


def test_a_cluster_that_loses_a_primary_goes_on(
    model: RankingModel, expected: list[Answer], tmp_path: Path
) -> None:
    with redis_cluster(tmp_path) as servers:
        users = users_of(servers[0])
        engine = engine_on(model, remote(servers[5], cluster=True))
        with load_on(engine, expected) as load:
            assert load.sees_again("remote")
            servers[0].stop()
            wait_until(lambda: failures(engine, "error") + failures(engine, "deadline") > 0, 30.0)
            assert load.sees_again("remote")
            # In time a replica takes over its slots. The test does not wait for all its users: with
            # so few pages most K/V is not kept, and K/V that is not kept is not written either.
            wait_until(lambda: any(is_found(engine, user) for user in users), PATIENCE_S)


def users_of(server: RedisServer) -> list[str]:
    """Users whose K/V is on one server of a cluster."""
    with server.client() as client:
        ranges: Any = client.execute_command("CLUSTER SLOTS")
        [(first, last)] = [
            (first, last) for first, last, (_, port, *_), *_ in ranges if port == server.port
        ]
        slots: Any = {
            user: client.execute_command("CLUSTER KEYSLOT", text_digest(user))
            for user in map(str, range(NUM_USERS))
        }
    return [user for user, slot in slots.items() if first <= slot <= last]


def is_found(engine: Engine, user: str) -> bool:
    """Whether the tier has K/V of a user."""
    assert engine.store is not None
    assert engine.store.stack is not None
    [level] = engine.store.stack.levels
    try:
        [found] = level.tier.get([(text_digest(user), "")])
    except OSError:
        return False
    return bool(found.scopes)


@pytest.mark.parametrize("key", [None, b"a secret of this test"])
def test_values_that_are_cut_or_changed_in_the_server_are_refused(
    model: RankingModel, expected: list[Answer], tmp_path: Path, key: bytes | None
) -> None:
    with RedisServer(tmp_path) as server:
        engine = engine_on(model, remote(server), key)
        rng = random.Random(3)
        with load_on(engine, expected) as load, server.client() as client:
            assert load.sees_again("remote")
            stop = time.monotonic() + 2.0
            while time.monotonic() < stop or failures(engine, "corrupt") < 5:
                for name in client.scan_iter("kvshare:*"):
                    if client.type(name) == b"string" and (value := client.get(name)):
                        index = rng.randrange(len(value))
                        changed = bytes([value[index] ^ (1 << rng.randrange(8))])
                        forged = rng.choice(
                            [value[:index], value[:index] + changed + value[index + 1 :], b""]
                        )
                        client.set(name, forged, px=60_000)
            assert load.sees_again("remote")
            assert failures(engine, "error") == 0


def test_kv_of_another_user_in_the_place_of_ones_own_is_refused(
    model: RankingModel, expected: list[Answer], tmp_path: Path
) -> None:
    with RedisServer(tmp_path) as server:
        engine = engine_on(model, remote(server))
        with load_on(engine, expected) as load, server.client() as client:
            assert load.sees_again("remote")
            for _ in range(20):
                names = [
                    name for name in client.scan_iter("kvshare:*") if client.type(name) == b"string"
                ]
                values = [client.get(name) for name in names]
                for name, value in zip(names, values[1:] + values[:1], strict=True):
                    if value:
                        client.set(name, value, px=60_000)
                time.sleep(0.05)
            wait_until(lambda: failures(engine, "corrupt") > 5, PATIENCE_S)


def test_a_disk_whose_files_are_overwritten_is_refused_and_used_again(
    model: RankingModel, expected: list[Answer], tmp_path: Path
) -> None:
    folder = tmp_path / "tier"
    engine = engine_on(model, DiskTier(folder, 64 * 2**20, TTL_S))
    rng = random.Random(3)
    with load_on(engine, expected) as load:
        assert load.sees_again("disk")
        stop = time.monotonic() + 2.0
        while time.monotonic() < stop:
            for path in folder.rglob("*"):
                if path.suffix in (".sst", ".log") and path.is_file() and path.stat().st_size > 64:
                    with path.open("r+b") as file:
                        file.seek(rng.randrange(path.stat().st_size - 16))
                        file.write(rng.randbytes(16))
            time.sleep(0.05)
        assert load.sees_again("disk")

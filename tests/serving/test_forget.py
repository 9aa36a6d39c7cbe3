"""A forgotten user is in no cache, list or queue, and nothing of requests in flight is kept."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from tests.cache.servers import RedisServer, closed_port, free_port, wait_until
from tests.encoder_worlds import make_caches
from tests.serving.servers import Asked, EagerLoader, local_server
from tests.worlds import ROOT, SCHEMA, draw_raw, make_dlrm, version_called
from torchrec_kvshare.cache.clock import steady_clock
from torchrec_kvshare.cache.codecs import get_codec
from torchrec_kvshare.cache.leases import CacheUse
from torchrec_kvshare.cache.metrics import CacheMetrics
from torchrec_kvshare.cache.remote import RemoteTier
from torchrec_kvshare.cache.stack import Level, TierStack
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.config import ServerConfig
from torchrec_kvshare.errors import ConfigError, UnavailableError
from torchrec_kvshare.features.parse import parse_request, user_columns
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Answer, Engine, Unscored
from torchrec_kvshare.serving.metrics import ServerMetrics
from torchrec_kvshare.serving.models import Models
from torchrec_kvshare.serving.peers import Peers
from torchrec_kvshare.serving.shadow import ShadowParity

RawRequest = dict[str, Any]

TOKEN = "open sesame"
SAID = {"Authorization": f"Bearer {TOKEN}"}
PATIENCE_S = 60.0  # a busy machine
START_S = 180.0
READY = re.compile(r"serving on http://(\S+) and grpc://(\S+)\n")


def asks(user: str | int) -> RawRequest:
    return draw_raw(8, 2, seed=5) | {"user_id": user}


def parsed(user: str, came_at: float | None = None) -> Request:
    return replace(parse_request(asks(user), SCHEMA), came_at=came_at)


def status_of(answer: tuple[int, Any]) -> tuple[str, str]:
    """What the cache did for an answer."""
    status, body = answer
    assert status == 200, body
    return body["cache"]["status"], body["cache"]["reason"]


@pytest.fixture
def token_file(tmp_path: Path) -> str:
    file = tmp_path / "token"
    file.write_text(TOKEN)
    return str(file)


@pytest.fixture
def serve(token_file: str) -> Callable[..., Any]:
    """A server that asks for the token."""

    def start(loader: EagerLoader | None = None, **settings: Any) -> Any:
        own = {"token_file": token_file, "timeout_ms": 60_000.0}
        return local_server(loader or EagerLoader(), **own | settings)

    return start


def forget(server: Asked, user: Any, path: str = "/v1/forget") -> tuple[int, Any]:
    return server.ask("POST", path, {"user_id": user}, SAID)


# --------------------------------------------------------------------------------- what is asked


def test_a_forgotten_user_is_cold_in_every_spelling_of_the_id(serve: Callable[..., Any]) -> None:
    with serve() as server:
        for user in (17850, "b"):
            server.rank(asks(user), **SAID)
        status, body = forget(server, "17850.0")
        assert (status, list(body)) == (200, ["forgotten_bytes"])
        assert body["forgotten_bytes"]["pages"] > 0
        assert forget(server, 17850) == (200, {"forgotten_bytes": {"pages": 0}})
        assert status_of(server.rank(asks(17850), **SAID)) == ("miss", "cold")
        assert status_of(server.rank(asks("b"), **SAID)) == ("hit", "")


def test_without_a_token_nobody_is_forgotten() -> None:
    with local_server(EagerLoader()) as server:
        server.rank(asks("a"))
        status, body = server.ask("POST", "/v1/forget", {"user_id": "a"})
        assert status == 403
        assert "server.token_file is not set" in body["error"]["message"]
        assert status_of(server.rank(asks("a"))) == ("hit", "")


def test_with_another_token_nobody_is_forgotten(serve: Callable[..., Any]) -> None:
    with serve() as server:
        server.rank(asks("a"), **SAID)
        for path in ("/v1/forget", "/v1/forget?local=1"):
            wrong = {"Authorization": "Bearer open"}
            assert server.ask("POST", path, {"user_id": "a"}, wrong)[0] == 401
        assert status_of(server.rank(asks("a"), **SAID)) == ("hit", "")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "has no 'user_id'"),
        ({"user_id": " "}, "user_id holds ' '"),
        ({"user_id": None}, "user_id holds None"),
        ({"user_id": ["a"]}, "user_id holds a list of 1"),
        ({"user_id": "x" * 257}, "has 257 characters; at most 256"),
        ({"user_id": "a", "model": "b"}, "['model', 'user_id']; 'user_id' alone is allowed"),
        ([], "a request is a JSON object; got list"),
    ],
)
def test_a_body_that_names_no_user_is_refused(
    serve: Callable[..., Any], body: Any, message: str
) -> None:
    with serve() as server:
        status, refusal = server.ask("POST", "/v1/forget", body, SAID)
        assert status == 400
        assert message in refusal["error"]["message"]


def test_no_id_of_a_forgotten_user_is_in_the_log(
    serve: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG"), serve() as server:
        server.rank(asks("somebody"), **SAID)
        assert forget(server, "somebody")[0] == 200
    assert "a user is forgotten" in caplog.text
    assert "somebody" not in caplog.text


# ---------------------------------------------------------------------------- what is under way


def test_a_request_that_came_before_does_not_bring_its_user_back(
    serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """K/V was kept if a request came before its user was forgotten and was looked up after."""
    is_there, may_go_on = threading.Event(), threading.Event()
    rank_each = Engine.rank_each

    def rank_later(self: Engine, requests: Sequence[Request]) -> list[Answer | Unscored]:
        is_there.set()
        assert may_go_on.wait(PATIENCE_S)
        return rank_each(self, requests)

    with serve() as server, ThreadPoolExecutor(1) as threads:
        monkeypatch.setattr(Engine, "rank_each", rank_later)
        asking = threads.submit(lambda: server.rank(asks("a"), **SAID))
        assert is_there.wait(PATIENCE_S)
        assert forget(server, "a")[0] == 200
        may_go_on.set()
        assert status_of(asking.result(PATIENCE_S)) == ("bypass", "not_admitted")
        assert status_of(server.rank(asks("a"), **SAID)) == ("miss", "cold")
        assert status_of(server.rank(asks("a"), **SAID)) == ("hit", "")


def test_a_stream_that_began_before_does_not_bring_its_user_back(
    serve: Callable[..., Any],
) -> None:
    with serve(stream_timeout_s=PATIENCE_S) as server:
        connection = HTTPConnection(server.http_address, timeout=PATIENCE_S)
        connection.putrequest("POST", "/v1/rank?stream=1")
        for name, value in (SAID | {"Transfer-Encoding": "chunked"}).items():
            connection.putheader(name, value)
        connection.endheaders()
        raw = asks("a")
        # The stream is open, and nothing of its user is encoded yet.
        none = {name: [] for name in raw["candidates"]}
        send(connection, raw | {"candidates": none})
        wait_until(lambda: "streams_open 1.0" in metrics_of(server), PATIENCE_S)
        assert forget(server, "a")[0] == 200
        send(connection, {"candidates": raw["candidates"]})
        connection.send(b"0\r\n\r\n")
        assert '"scores"' in connection.getresponse().read().decode()
        connection.close()
        assert status_of(server.rank(raw, **SAID)) == ("miss", "cold")


def send(connection: HTTPConnection, line: RawRequest) -> None:
    data = json.dumps(line).encode() + b"\n"
    connection.send(f"{len(data):x}\r\n".encode() + data + b"\r\n")


def metrics_of(server: Asked) -> str:
    text = server.ask("GET", "/metrics", headers=SAID)[1]
    assert isinstance(text, str)
    return text


def test_earlier_kv_is_not_extended_by_later_events() -> None:
    """K/V of new events took the age of the K/V that they extended."""
    model = RankingModel(make_dlrm(1)).eval()
    engine = Engine(model, SCHEMA, KVStore(make_caches(model, [30])), version=version_called("v"))
    came_at = steady_clock()()
    engine.forget("a")
    raw = asks("a")
    shorter = raw | {"history": {name: cells[:4] for name, cells in raw["history"].items()}}
    engine.rank([parse_request(shorter, SCHEMA)])
    [answer] = engine.rank([parsed("a", came_at)])
    assert (answer.cache.status, answer.cache.cached_events) == ("bypass", 4)
    [again] = engine.rank([parsed("a")])
    assert (again.cache.status, again.cache.cached_events) == ("partial", 4)


# ------------------------------------------------------------------------------ what is remembered


def make_models(loader: EagerLoader, num_hot: int = 8) -> Models:
    return Models(loader.load, ServerMetrics(loader.metrics), num_hot, 2**20)


def remember(models: Models, user: str, came_at: float | None = None) -> None:
    models.remember("shop", parsed(user, came_at), user_columns(asks(user), SCHEMA))


def use_of(engine: Engine, user: str) -> CacheUse:
    return engine.rank([parsed(user)])[0].cache


def test_a_new_version_does_not_start_with_a_forgotten_user() -> None:
    loader = EagerLoader()
    models = make_models(loader)
    models.publish("shop", "1", Path("1"))
    for user in "abab":
        remember(models, user)
    models.forget("a")
    models.publish("shop", "2", Path("2"))
    assert [use_of(models.get().engine, user).status for user in "ab"] == ["miss", "hit"]


def test_a_request_that_came_before_is_not_remembered() -> None:
    loader = EagerLoader()
    models = make_models(loader)
    models.publish("shop", "1", Path("1"))
    came_at = steady_clock()()
    models.forget("a")
    remember(models, "a", came_at)
    assert models.hot("shop").hottest() == []
    remember(models, "a", steady_clock()())
    assert [raw["user_id"] for raw in models.hot("shop").hottest()] == ["a"]


def test_a_user_who_is_forgotten_while_a_version_warms_up_is_not_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The version that was being warmed up was in no list yet."""
    loader = EagerLoader()
    models = make_models(loader)
    models.publish("shop", "1", Path("1"))
    for user in "ab":
        remember(models, user)
    prefetch = Engine.prefetch

    def prefetch_later(self: Engine, users: Sequence[Request]) -> None:
        models.forget("a")
        prefetch(self, users)
        models.forget("b")

    monkeypatch.setattr(Engine, "prefetch", prefetch_later)
    models.publish("shop", "2", Path("2"))
    assert [use_of(models.get().engine, user).status for user in "ab"] == ["miss", "miss"]


def test_a_version_that_drains_and_one_without_its_cache_forget_too() -> None:
    loader = EagerLoader()
    models = make_models(loader)
    models.publish("shop", "1", Path("1"))
    old = models.get()
    use_of(old.engine, "a")
    with old.open():
        models.publish("shop", "2", Path("2"))
        assert models.forget("a")["pages"]
        assert use_of(old.engine, "a").reason == "cold"
    new = models.get()
    with_cache = new.engine
    use_of(with_cache, "a")
    models.bypass(with_cache)
    assert models.get().engine.store is None
    assert models.forget("a")["pages"]
    assert use_of(with_cache, "a").reason == "cold"


def test_where_no_model_is_loaded_nobody_is_forgotten() -> None:
    with pytest.raises(UnavailableError, match="no model is loaded: what its tiers hold"):
        make_models(EagerLoader()).forget("a")


def test_no_answer_of_a_forgotten_user_waits_to_be_checked() -> None:
    shadow = ShadowParity(share=1.0, part_candidates=1000)
    engine = Engine(RankingModel(make_dlrm(1)).eval(), SCHEMA, None)
    use = CacheUse("hit", "", 8, 0, "pages")
    for user in "abba":
        answer = engine.rank([parsed(user)])[0]
        shadow.offer(engine, parsed(user), replace(answer, cache=use))
    shadow.forget("a")
    checked = []
    while shadow.has_more:
        sample = shadow.check()
        assert sample is not None
        checked.append(sample[0].request.user_id)
    assert checked == ["b", "b"]
    assert shadow.check() is None


def test_a_pinned_user_who_is_forgotten_is_pinned_no_more() -> None:
    model = RankingModel(make_dlrm(1)).eval()
    store = KVStore(make_caches(model, [30]))
    store.pin(["a", "b"])
    store.forget("a")
    assert store.caches[0]._pinned_users == {"b"}


# --------------------------------------------------------------------------------------- the tiers


class RemoteLoader(EagerLoader):
    """Engines over a tier in Redis."""

    def __init__(self, url: str) -> None:
        super().__init__()
        tier = RemoteTier(url, ttl_s=600.0, timeout_s=5.0)
        level = Level(tier, get_codec("float32"), deadline_s=5.0)
        self.stack = TierStack([level], ttl_s=600.0, metrics=CacheMetrics())

    def load(self, folder: Path) -> Engine:
        model = RankingModel(make_dlrm(int(folder.name))).eval()
        store = KVStore(make_caches(model, [self.num_pages]), self.stack)
        return Engine(model, SCHEMA, store, version=version_called(f"v{folder.name}"))

    def close(self) -> None:
        self.stack.close()


def test_a_tier_that_cannot_be_reached_is_named_and_asked_again(
    serve: Callable[..., Any], tmp_path: Path
) -> None:
    with RedisServer(tmp_path / "redis") as redis, serve(RemoteLoader(redis.url)) as server:
        server.rank(asks("a"), **SAID)
        with redis.client() as client:
            wait_until(lambda: client.dbsize() > 0, PATIENCE_S)
            redis.pause()
            status, refusal = forget(server, "a")
            assert status == 503
            assert "tier remote could not be reached; ask again" in refusal["error"]["message"]
            redis.resume()
            status, body = forget(server, "a")
            assert status == 200, body
            assert body["forgotten_bytes"]["remote"] > 0
            names = client.scan_iter(match="kvshare:*")
            assert [name for name in names if not name.endswith(b":forgotten")] == []
        assert status_of(server.rank(asks("a"), **SAID)) == ("miss", "cold")


# ---------------------------------------------------------------------------------- many replicas


@contextmanager
def replicas(serve: Callable[..., Any], count: int) -> Iterator[tuple[list[Asked], list[str]]]:
    """Servers that know of each other, and where they are."""
    ports = [free_port() for _ in range(count)]
    peers = [f"127.0.0.1:{port}" for port in ports]
    with ExitStack() as stack:
        yield [stack.enter_context(serve(http_port=port, peers=peers)) for port in ports], peers


def test_all_replicas_forget_whichever_is_asked(serve: Callable[..., Any]) -> None:
    with replicas(serve, 3) as (servers, peers):
        for server in servers:
            server.rank(asks("a"), **SAID)
        status, body = forget(servers[1], "a")
        assert status == 200, body
        assert list(body["replicas"]) == peers
        for answer in body["replicas"].values():
            assert answer["forgotten_bytes"]["pages"] > 0
        for server in servers:
            assert status_of(server.rank(asks("a"), **SAID)) == ("miss", "cold")
        assert forget(servers[0], "a", "/v1/forget?local=1")[0] == 200
        assert status_of(servers[2].rank(asks("a"), **SAID)) == ("hit", "")


def test_a_replica_that_does_not_answer_is_named(serve: Callable[..., Any]) -> None:
    with replicas(serve, 1) as ([server], [here]), closed_port() as port:
        server.rank(asks("a"), **SAID)
        closed = f"127.0.0.1:{port}"
        with serve(peers=[here, closed]) as other:
            status, body = forget(other, "a")
        assert status == 503, body
        assert body["error"]["type"] == "UnavailableError"
        assert f"ask again. {closed}: ClientConnectorError" in body["error"]["message"]
        assert list(body["replicas"]) == [here]
        assert status_of(server.rank(asks("a"), **SAID)) == ("miss", "cold")


def test_a_replica_with_another_token_is_named(serve: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "other").write_text("another")
    with serve(token_file=str(tmp_path / "other")) as stranger:
        address = stranger.http_address
        with serve(peers=[address]) as server:
            status, body = forget(server, "a")
    assert status == 503
    assert f"{address}: status 401" in body["error"]["message"]


@pytest.mark.parametrize("address", ["", "kvshare-0", "http://a:1", "a:1/x", "u@a:1", "a:123456"])
def test_a_peer_that_is_no_address_is_an_error(address: str) -> None:
    with pytest.raises(ConfigError, match=r"server\.peers holds .*; host:port is allowed"):
        Peers(ServerConfig(peers=["127.0.0.1:80", "[::1]:80", address]))


def test_peers_are_behind_the_proxy_s_tls() -> None:
    with pytest.raises(ConfigError, match=r"server\.tls_cert_file is set"):
        Peers(ServerConfig(peers=["a:1"], tls_cert_file="c", tls_key_file="k"))


# --------------------------------------------------------------------------------- a real cluster


def test_a_cluster_forgets_a_user_at_every_replica(
    artifact: Path, tmp_path: Path, token_file: str
) -> None:
    """nginx sends a user's requests to one replica; forgetting asks all replicas."""
    output = tmp_path / "cluster"
    overrides = [f"artifact={artifact}", f"output={output}", f"server.token_file={token_file}"]
    overrides += ["replicas=2", "threads=1", "server.http_port=0", "server.grpc_port=0"]
    overrides += ["server.timeout_ms=4000", "cache.remote.deadline_ms=4000"]
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        [*(sys.executable, "-W", "ignore", "-m", "pipelines.serve_cluster"), *overrides],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    log.close()
    try:
        assert process.stdout is not None
        ready = next(filter(None, map(READY.fullmatch, process.stdout)))
        front = Asked(f"http://{ready[1]}", ready[2])
        addresses = peers_in(output)
        direct = [Asked(f"http://{address}", "") for address in addresses]
        assert len(direct) == 2
        for server in (*direct, *direct):
            server.rank(asks("a"), **SAID)
        assert front.ask("POST", "/v1/forget", {"user_id": "a"})[0] == 401
        status, body = forget(front, "a")
        assert status == 200, body
        assert set(body["replicas"]) == set(addresses)
        for answer in body["replicas"].values():
            assert answer["forgotten_bytes"]["pages"] > 0
        # Not even Redis has it: the first replica would find it there.
        assert status_of(direct[0].rank(asks("a"), **SAID)) == ("miss", "cold")
        frozen = process_at(tmp_path / "log", addresses[1])
        os.kill(frozen, signal.SIGSTOP)
        try:
            status, body = forget_when_routed_to(front, direct[0])
        finally:
            os.kill(frozen, signal.SIGCONT)
        assert status == 503
        assert f"ask again. {addresses[1]}: TimeoutError" in body["error"]["message"]
        assert list(body["replicas"]) == [addresses[0]]
        wait_until(lambda: forget(front, "a")[0] == 200, PATIENCE_S)
    finally:
        process.terminate()
        assert process.wait(START_S) == 0
        process.stdout.close()


def peers_in(output: Path) -> list[str]:
    """Where the replicas' HTTP is, in their order."""
    text = (output / "nginx" / "nginx.conf").read_text()
    upstream = text.partition("upstream http_replicas")[2].partition("}")[0]
    return re.findall(r"server (\S+) max_fails", upstream)


def process_at(log: Path, address: str) -> int:
    """The replica that listens there."""
    port = address.rpartition(":")[2]
    for started in re.findall(r"replica-\d runs as process (\d+)", log.read_text()):
        if f"server.http_port={port}" in Path(f"/proc/{started}/cmdline").read_text():
            return int(started)
    raise AssertionError(address)


def forget_when_routed_to(front: Asked, server: Asked) -> tuple[int, Any]:
    """Forget through nginx, as soon as it picks a running replica."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        status, body = forget(front, "a")
        if "replicas" in body:
            return status, body
    raise AssertionError(f"{server.http_address} was never asked")

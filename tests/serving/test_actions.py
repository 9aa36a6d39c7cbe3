"""Pinning users and clearing a version of K/V, at every replica, with a token only."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cache.servers import closed_port, free_port
from tests.encoder_worlds import make_caches
from tests.serving.servers import Asked, EagerLoader, local_server
from tests.worlds import PAGE_BYTES, SCHEMA, draw_raw, make_dlrm, version_called
from torchrec_kvshare.cache.kv_cache import KVCache, Rules
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.errors import UnavailableError
from torchrec_kvshare.features.parse import parse_user
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.serving.metrics import ServerMetrics
from torchrec_kvshare.serving.models import Models

RawRequest = dict[str, Any]

TOKEN = "open sesame"
SAID = {"Authorization": f"Bearer {TOKEN}"}
ACTIONS = ("clear", "pin", "unpin")
BODIES = {
    "clear": {"kv_version": str(version_called("v1"))},
    "pin": {"user_ids": ["a"]},
    "unpin": {"user_ids": ["a"]},
}
OF_USER = 2 * PAGE_BYTES  # 8 events take two pages


def asks(user: str | int) -> RawRequest:
    return draw_raw(8, 2, seed=5) | {"user_id": user}


class PinningLoader(EagerLoader):
    """Engines with room for two users, and for one that is pinned."""

    def load(self, folder: Path) -> Engine:
        model = RankingModel(make_dlrm(int(folder.name))).eval()
        [cache] = make_caches(model, [6])
        pinning = KVCache(cache.pool, Rules(pinned_bytes=OF_USER), metrics=self.metrics)
        version = version_called(f"v{folder.name}")
        self.engines.append(Engine(model, SCHEMA, KVStore([pinning]), version=version))
        return self.engines[-1]


@pytest.fixture
def serve(tmp_path: Path) -> Callable[..., Any]:
    """A server that asks for the token."""
    (tmp_path / "token").write_text(TOKEN)

    def start(loader: EagerLoader | None = None, **settings: Any) -> Any:
        own = {"token_file": str(tmp_path / "token"), "timeout_ms": 60_000.0}
        return local_server(loader or PinningLoader(), **own | settings)

    return start


def act(server: Asked, name: str, body: Any) -> tuple[int, Any]:
    return server.ask("POST", f"/v1/{name}", body, SAID)


def status_of(server: Asked, user: str | int) -> str:
    status, body = server.rank(asks(user), **SAID)
    assert status == 200, body
    found: str = body["cache"]["status"]
    return found


@pytest.mark.parametrize("name", ACTIONS)
def test_nothing_is_done_without_the_token(name: str, serve: Callable[..., Any]) -> None:
    with local_server(PinningLoader()) as server:
        status, body = server.ask("POST", f"/v1/{name}", BODIES[name])
        assert status == 403
        assert f"/v1/{name} needs a token: server.token_file" in body["error"]["message"]
    with serve() as server:
        assert server.ask("POST", f"/v1/{name}", BODIES[name])[0] == 401
        assert act(server, name, BODIES[name])[0] == 200


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("clear", {}, "has no 'kv_version'"),
        ("clear", {"kv_version": "v1"}, "kv_version holds 'v1'; two digests"),
        ("clear", {"kv_version": 7}, "kv_version holds 7"),
        ("clear", {"kv_version": "0" * 33}, "two digests"),
        ("clear", BODIES["clear"] | {"model": "a"}, "'kv_version' alone is allowed"),
        ("pin", {}, "has no 'user_ids'"),
        ("pin", {"user_ids": "a"}, "user_ids holds 'a'; a list of ids"),
        ("pin", {"user_ids": ["a", None]}, "user_ids holds None"),
        ("unpin", {"user_ids": ["a"], "x": 1}, "'user_ids' alone is allowed"),
    ],
)
def test_a_wrong_body_is_refused(
    serve: Callable[..., Any], name: str, body: Any, message: str
) -> None:
    with serve() as server:
        status, refusal = act(server, name, body)
        assert status == 400
        assert message in refusal["error"]["message"]


def test_a_cleared_version_is_encoded_anew(serve: Callable[..., Any]) -> None:
    with serve() as server:
        status_of(server, "a")
        other = {"kv_version": str(version_called("v2"))}
        assert act(server, "clear", other) == (200, {"cleared_bytes": {"pages": 0}})
        assert status_of(server, "a") == "hit"
        body = {"cleared_bytes": {"pages": OF_USER}}
        assert act(server, "clear", BODIES["clear"]) == (200, body)
        assert status_of(server, "a") == "miss"
        shown = server.ask("GET", "/v1/state", headers=SAID)[1]["models"][0]["kv_versions"]
        assert shown == [BODIES["clear"]["kv_version"]]


def test_a_pinned_user_outlives_others_until_it_is_unpinned(serve: Callable[..., Any]) -> None:
    with serve() as server:
        assert status_of(server, 17850) == "miss"
        assert act(server, "pin", {"user_ids": ["17850.0"]}) == (200, {"pinned_users": 1})
        for user in "bcde":
            status_of(server, user)
        assert status_of(server, 17850) == "hit"
        text = server.ask("GET", "/metrics", headers=SAID)[1]
        assert "kvshare_pinned_users 1.0" in text
        assert act(server, "unpin", {"user_ids": [17850]}) == (200, {"pinned_users": 0})
        for user in "bcde":
            status_of(server, user)
        assert status_of(server, 17850) == "miss"


def test_a_later_version_pins_the_same_users() -> None:
    loader = PinningLoader()
    models = Models(loader.load, ServerMetrics(loader.metrics), 8, 2**20)
    with pytest.raises(UnavailableError):
        models.pin(["a"])
    models.publish("shop", "1", Path("1"))
    models.pin(["a"])
    models.publish("shop", "2", Path("2"))
    for user in "abcd":
        models.get().engine.prefetch([parse_user(asks(user), SCHEMA)])
    [use] = models.get().engine.prefetch([parse_user(asks("a"), SCHEMA)])
    assert use.status == "hit"
    models.forget("a")
    assert models.pinned == frozenset()


def test_more_users_than_allowed_are_not_pinned(serve: Callable[..., Any]) -> None:
    with serve(pinned_users=2) as server:
        assert act(server, "pin", {"user_ids": ["a", "b", "a"]}) == (200, {"pinned_users": 2})
        status, body = act(server, "pin", {"user_ids": ["c"]})
        assert status == 400
        assert "3 users would be pinned; 2 are allowed by" in body["error"]["message"]
        assert act(server, "pin", {"user_ids": ["b"]}) == (200, {"pinned_users": 2})


def test_nobody_is_pinned_where_nothing_is_reserved(serve: Callable[..., Any]) -> None:
    with serve(EagerLoader()) as server:
        status, body = act(server, "pin", {"user_ids": ["a"]})
        assert (status, body["error"]["message"]) == (
            400,
            "cache.pinned_bytes is 0; no user can be pinned",
        )


@pytest.mark.parametrize("name", ACTIONS)
def test_it_is_done_at_every_replica_and_one_that_fails_is_named(
    name: str, serve: Callable[..., Any]
) -> None:
    with serve() as other, closed_port() as closed:
        dead, port = f"127.0.0.1:{closed}", free_port()
        here, there = f"127.0.0.1:{port}", other.http_address
        for user in "ab":
            status_of(other, user)
        with serve(http_port=port, peers=[here, there]) as server:
            status, body = act(server, name, BODIES[name])
            assert status == 200
            assert set(body["replicas"]) == {here, there}
        with serve(http_port=port, peers=[here, dead]) as server:
            status, body = act(server, name, BODIES[name])
            assert status == 503
            assert f"{name} is not done at all replicas; ask again. {dead}" in str(body["error"])
            assert list(body["replicas"]) == [here]

"""New versions take over with warm caches, broken ones are refused, removing one goes back."""

import shutil
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cache.servers import wait_until
from tests.encoder_worlds import make_caches
from tests.serving.servers import BreakingLoader, running_server
from tests.worlds import SCHEMA, draw_raw, make_dlrm, parse_all, version_called
from torchrec_kvshare.cache.metrics import CacheMetrics
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.config import CacheConfig, ServerConfig
from torchrec_kvshare.errors import ArtifactError, UnavailableError, UnknownModelError
from torchrec_kvshare.export.artifact import MANIFEST, read_artifact, write_manifest
from torchrec_kvshare.export.exporter import export_model
from torchrec_kvshare.features.batches import RequestBatch
from torchrec_kvshare.features.parse import parse_user, user_columns
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.features.schema import FeatureSchema, Vocabulary
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.serving.metrics import ServerMetrics
from torchrec_kvshare.serving.models import (
    DRAINING,
    REFUSED,
    SERVING,
    EngineLoader,
    HotUsers,
    Models,
    Served,
    versions_in,
)

RawRequest = dict[str, Any]

HOT_BYTES = 2**20
WAIT_S = 90.0  # a busy machine


def make_models(num_hot: int = 8) -> Models:
    loader = BreakingLoader()
    return Models(loader.load, ServerMetrics(loader.metrics), num_hot, HOT_BYTES)


def add(folder: Path, name: str, version: str) -> Path:
    """A version whose artifact is only a manifest, which the loader does not read."""
    artifact = folder / name / version
    artifact.mkdir(parents=True)
    (artifact / MANIFEST).write_text("{}")
    return artifact


def asks(user: str) -> RawRequest:
    return draw_raw(6, 2, ord(user)) | {"user_id": user}


def states(models: Models) -> dict[tuple[str, str], str]:
    return {(one.name, one.version): one.state for one in models.standings()}


def test_the_highest_version_answers_and_removing_it_goes_back(tmp_path: Path) -> None:
    models = make_models()
    with pytest.raises(UnavailableError, match="no model is loaded"):
        models.get()
    for version in ("2", "10"):
        add(tmp_path, "shop", version)
    models.refresh(tmp_path)
    assert models.get().version == "10"
    assert models.get("shop", "10").engine.version == version_called("v10")
    shutil.rmtree(tmp_path / "shop" / "10")
    models.refresh(tmp_path)
    assert models.get("shop").version == "2"
    shutil.rmtree(tmp_path / "shop")
    models.refresh(tmp_path)
    with pytest.raises(UnavailableError):
        models.get("shop")


def test_a_broken_version_is_refused_and_the_old_one_stays(tmp_path: Path) -> None:
    models = make_models()
    add(tmp_path, "shop", "1")
    models.refresh(tmp_path)
    broken = add(tmp_path, "shop", "99")
    for _ in range(2):  # It is tried once, and not again until something changes.
        models.refresh(tmp_path)
    assert models.get().version == "1"
    assert states(models) == {("shop", "1"): SERVING, ("shop", "99"): REFUSED}
    assert [one.message for one in models.standings()][1] == "99 is broken"
    shutil.rmtree(broken)
    models.refresh(tmp_path)
    assert states(models) == {("shop", "1"): SERVING}


class Ending(Served):
    """A version whose last request ends right after num_open is read."""

    num_asked = 0

    @property
    def num_open(self) -> int:  # type: ignore[override]
        self.num_asked += 1
        return int(self.num_asked == 1)

    @num_open.setter
    def num_open(self, value: int) -> None:
        pass


def test_a_version_whose_last_request_ends_while_it_is_counted_does_not_drain_for_ever(
    tmp_path: Path,
) -> None:
    """num_open was read twice: a version left the list in between and was shown for ever."""
    models = make_models()
    add(tmp_path, "shop", "1")
    models.refresh(tmp_path)
    models._served = {"shop": Ending("shop", "1", models.get().engine)}
    add(tmp_path, "shop", "2")
    models.refresh(tmp_path)
    assert states(models) == {("shop", "1"): DRAINING, ("shop", "2"): SERVING}
    assert states(models) == {("shop", "2"): SERVING}


def test_an_alarm_stands_until_another_version_takes_over(tmp_path: Path) -> None:
    """The page kept the drift of a removed version, and the metrics its alarm."""
    loader = BreakingLoader()
    metrics = ServerMetrics(loader.metrics)
    models = Models(loader.load, metrics, 8, HOT_BYTES)

    def alarms() -> list[str]:
        lines = metrics.text().decode().splitlines()
        return [
            line for line in lines if line.startswith(("kvshare_parity_al", "kvshare_parity_d"))
        ]

    add(tmp_path, "shop", "1")
    models.refresh(tmp_path)
    models.get().drift = 0.25
    models.bypass(models.get().engine)
    assert models.names_without_cache == ["shop"]
    assert alarms() == [
        'kvshare_parity_drift{model="shop"} 0.25',
        'kvshare_parity_alarm{model="shop"} 1.0',
    ]
    add(tmp_path, "shop", "2")
    models.refresh(tmp_path)
    assert alarms() == [
        'kvshare_parity_drift{model="shop"} 0.0',
        'kvshare_parity_alarm{model="shop"} 0.0',
    ]
    shutil.rmtree(tmp_path / "shop")
    models.refresh(tmp_path)
    assert alarms() == []


def test_models_side_by_side_go_by_their_names(tmp_path: Path) -> None:
    models = make_models()
    add(tmp_path, "shop", "1")
    add(tmp_path, "news", "7")
    models.refresh(tmp_path)
    assert models.get("shop").engine.version == version_called("v1")
    assert models.get("news").engine.version == version_called("v7")
    with pytest.raises(UnknownModelError, match="no model was asked for"):
        models.get()
    with pytest.raises(UnknownModelError, match=r"shop/2 was asked for; \['news/7', 'shop/1'\]"):
        models.get("shop", "2")


def test_an_old_version_drains_until_its_last_answer(tmp_path: Path) -> None:
    models = make_models()
    add(tmp_path, "shop", "1")
    models.refresh(tmp_path)
    with models.get().open():
        add(tmp_path, "shop", "2")
        models.refresh(tmp_path)
        assert states(models) == {("shop", "1"): DRAINING, ("shop", "2"): SERVING}
    assert states(models) == {("shop", "2"): SERVING}


def test_folders_that_are_no_versions_are_ignored(tmp_path: Path) -> None:
    add(tmp_path, "shop", "latest")
    (tmp_path / "shop" / "3").mkdir()
    (tmp_path / "notes.txt").write_text("")
    assert versions_in(tmp_path) == {}
    with pytest.raises(ArtifactError, match="nowhere"):
        versions_in(tmp_path / "nowhere")


def test_the_new_version_hits_for_the_users_that_asked_most(tmp_path: Path) -> None:
    models = make_models(num_hot=3)
    add(tmp_path, "shop", "1")
    models.refresh(tmp_path)
    for user in "dabcabcab":
        models.hot("shop").remember(user, asks(user))
    models.hot("shop").remember("b", {"user_id": "b"})  # which no model can read
    add(tmp_path, "shop", "2")
    models.refresh(tmp_path)
    answers = models.get().engine.rank(parse_all([*map(asks, "acz")]))
    assert [answer.cache.status for answer in answers] == ["hit", "hit", "miss"]


def test_a_newcomer_can_become_hot() -> None:
    hot = HotUsers(4, HOT_BYTES)
    for user in "aaaabbbbccccddddeeeee":
        hot.remember(user, {"user_id": user})
    assert hot.hottest()[0]["user_id"] == "e"
    assert len(hot.hottest()) == 4


def test_remembered_requests_are_bounded_in_bytes() -> None:
    """Whole requests were remembered, as large as a message may be."""
    hot = HotUsers(num_users=4, capacity_bytes=4_000)
    for user in "abcdef":
        hot.remember(user, {"user_id": user, "history": {"item_id": ["x" * 900]}})
        hot.remember(user.upper(), {"user_id": user.upper(), "history": {"item_id": ["x" * 1_100]}})
    users = [raw["user_id"] for raw in hot.hottest()]
    assert len(users) == 4
    assert all(user.islower() for user in users)
    # What is known of a user whose last request is too long is old.
    hot.remember(users[0], {"user_id": users[0], "history": {"item_id": ["x" * 1_100]}})
    assert users[0] not in [raw["user_id"] for raw in hot.hottest()]


def test_no_user_is_remembered_if_the_limit_is_zero() -> None:
    hot = HotUsers(num_users=0, capacity_bytes=0)
    hot.remember("a", {"user_id": "a"})
    assert hot.hottest() == []


def test_remembered_requests_keep_no_message_alive() -> None:
    """gRPC columns are views of their message: one column kept the whole message alive."""
    hot = HotUsers(num_users=4, capacity_bytes=HOT_BYTES)
    message = np.arange(100_000)
    hot.remember("a", {"user_id": "a", "history": {"item_id": message[5:8]}})
    is_there = weakref.ref(message)
    del message
    assert is_there() is None
    assert hot.hottest()[0]["history"]["item_id"].tolist() == [5, 6, 7]


def test_users_of_one_schema_warm_up_a_version_with_another() -> None:
    hot = HotUsers(num_users=4, capacity_bytes=HOT_BYTES)
    hot.remember("a", user_columns(asks("a"), SCHEMA))
    other = Vocabulary(["110", "109", "108", "107", "106", "105", "104", "103", "102", "101"])
    vocabularies = SCHEMA.vocabulary_by_column | {"item_id": other}
    fewer = FeatureSchema(vocabularies, histories=SCHEMA.histories)
    [raw] = hot.hottest()
    assert_same_user(parse_user(raw, fewer), parse_user(asks("a"), fewer))
    assert_same_user(parse_user(raw, SCHEMA), parse_user(asks("a"), SCHEMA))


def assert_same_user(one: Request, other: Request) -> None:
    assert one.user_id == other.user_id
    assert one.num_events > 0
    assert RequestBatch([one, other]).users == [one]


def test_an_engine_is_loaded_only_if_its_cached_scores_are_the_golden_ones(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache whose pages are wrong is found before the first request."""
    loader = EngineLoader(CacheConfig(), ServerConfig())
    assert loader.load(artifact).store is not None
    read = Engine._score_pages

    def read_wrong(self: Engine, requests: Any, pages: Any, tables: Any) -> Any:
        return read(self, requests, pages, [table + 0.1 for table in tables])

    monkeypatch.setattr(Engine, "_score_pages", read_wrong)
    with pytest.raises(ArtifactError, match="golden request"):
        loader.load(artifact)


def test_a_version_that_is_not_signed_is_refused_until_it_is(
    artifact: Path, tmp_path: Path
) -> None:
    loader = EngineLoader(CacheConfig(), ServerConfig(), key=b"a secret")
    models = Models(loader.load, ServerMetrics(loader.metrics), 4, HOT_BYTES)
    folder = tmp_path / "shop" / "1"
    shutil.copytree(artifact, folder)
    models.refresh(tmp_path)
    assert states(models) == {("shop", "1"): REFUSED}
    assert "is not signed: it has no manifest.mac" in models.standings()[0].message
    write_manifest(folder, read_artifact(folder)[0], b"a secret")
    models.refresh(tmp_path)
    assert states(models) == {("shop", "1"): SERVING}


def test_requests_during_a_switch_are_answered_by_one_model_or_the_other() -> None:
    engines = {}
    for seed in (1, 2):
        model = RankingModel(make_dlrm(seed)).eval()
        engines[f"{seed}"] = Engine(
            model, SCHEMA, KVStore(make_caches(model, [30])), version=version_called(f"v{seed}")
        )
    models = Models(
        lambda folder: engines[folder.name], ServerMetrics(CacheMetrics()), 4, HOT_BYTES
    )
    models.publish("shop", "1", Path("1"))
    requests = parse_all([asks("a"), asks("b")])
    expected = {
        version: Engine(engine.model, SCHEMA, None).rank(requests)
        for version, engine in engines.items()
    }
    seen: set[str] = set()
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            served = models.get()
            with served.open():
                answers = served.engine.rank(requests)
            for answer, other in zip(answers, expected[served.version], strict=True):
                assert answer.scores == pytest.approx(other.scores, rel=0, abs=2e-6)
            seen.add(served.version)

    with ThreadPoolExecutor(3) as threads:
        asking = [threads.submit(ask) for _ in range(3)]
        wait_until(lambda: "1" in seen or any(one.done() for one in asking), WAIT_S)
        models.publish("shop", "2", Path("2"))
        wait_until(lambda: "2" in seen or any(one.done() for one in asking), WAIT_S)
        stop.set()
        for one in asking:
            one.result()
    assert seen == {"1", "2"}


def test_a_real_server_switches_under_load_and_refuses_what_is_corrupt(
    artifact: Path, tmp_path: Path
) -> None:
    """No request is lost or scored by a mix of two models, whatever is in the folder."""
    versions = tmp_path / "models" / "shop"
    versions.mkdir(parents=True)
    shutil.copytree(artifact, versions / "1")
    export_model(RankingModel(make_dlrm(2)).eval(), SCHEMA, tmp_path / "second")
    raws = [asks(user) for user in "abcdef"]
    expected = {}
    for seed in (1, 2):
        engine = Engine(RankingModel(make_dlrm(seed)).eval(), SCHEMA, None)
        expected[str(seed)] = [answer.scores for answer in engine.rank(parse_all(raws))]
    models = f"models={tmp_path / 'models'}"
    settings = ["server.poll_s=0.1", "server.timeout_ms=60000", "server.log_requests=false"]
    with running_server(models, *settings) as server:
        versions_by_name = {server.rank(raws[0])[1]["model_version"]: "1"}
        stop = threading.Event()
        seen: list[str] = []

        def ask() -> None:
            while not stop.is_set():
                for place, raw in enumerate(raws):
                    status, answer = server.rank(raw)
                    assert status == 200, answer
                    version = versions_by_name.setdefault(answer["model_version"], "2")
                    assert answer["scores"] == pytest.approx(expected[version][place], abs=2e-6)
                    seen.append(version)

        def state_of(version: str) -> str:
            listed = server.ask("GET", "/v1/state")[1]["models"]
            return next((one["state"] for one in listed if one["version"] == version), "gone")

        with ThreadPoolExecutor(2) as threads:
            asking = [threads.submit(ask) for _ in range(2)]
            try:
                corrupt = tmp_path / "corrupt"
                shutil.copytree(artifact, corrupt)
                program = bytearray((corrupt / "model.pt").read_bytes())
                program[len(program) // 2] ^= 1
                (corrupt / "model.pt").write_bytes(program)
                corrupt.rename(versions / "3")
                wait_until(lambda: state_of("3") == "refused", WAIT_S)
                assert state_of("1") == "serving"
                (tmp_path / "second").rename(versions / "2")
                wait_until(lambda: state_of("2") == "serving" and "2" in seen, WAIT_S)
                shutil.rmtree(versions / "2")
                wait_until(lambda: state_of("1") == "serving" and seen[-1] == "1", WAIT_S)
            finally:
                stop.set()
            for one in asking:
                one.result()
        text = server.ask("GET", "/metrics")[1]
        assert 'kvshare_model_refused{model="shop",version="3"} 1.0' in text
        assert 'kvshare_model_loads_total{model="shop",outcome="refused"} 1.0' in text
        assert 'kvshare_model_version_info{model="shop"' in text

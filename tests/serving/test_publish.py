"""A new ranking stage is published: K/V of the version before it is a hit, in every tier."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cache.servers import RedisServer
from tests.once import make_once, shared_folder
from tests.serving.servers import running_server
from tests.worlds import PAGE_BYTES, SCHEMA, assert_same_scores, draw_raw, make_dlrm, parse_all
from torchrec_kvshare.config import CacheConfig, DiskConfig, HostConfig, RemoteConfig, ServerConfig
from torchrec_kvshare.export.artifact import read_artifact
from torchrec_kvshare.export.exporter import export_model
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Answer, Engine
from torchrec_kvshare.serving.metrics import ServerMetrics
from torchrec_kvshare.serving.models import EngineLoader, Models

STAGE, TOWER, ITEMS = "stage", "tower", "items"
CHANGED = {
    STAGE: ("ranker.dense_arch", "ranker.over_arch", ".bag_", "time_bias", "tower.head"),
    TOWER: ("encoder.layers.0",),
    ITEMS: ("token_item_id",),
}
PATIENCE_S = 30.0
REQUESTS = parse_all([draw_raw(9, 3, seed) | {"user_id": f"user {seed}"} for seed in (1, 2, 3)])


def changed(change: str) -> RankingModel:
    """The model of the fixture ``artifact`` with other weights in one of its parts."""
    model = RankingModel(make_dlrm(1)).eval()
    for name, weight in model.ranker.state_dict(prefix="ranker.").items():
        if any(part in name for part in CHANGED[change]):
            weight.mul_(-0.5)
    return model


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory, artifact: Path) -> Path:
    """A folder with the artifact as version 1, and three that differ from it in one part each."""
    folder = shared_folder(tmp_path_factory, "published")
    for change in CHANGED:
        make_once(folder / change, lambda made, c=change: export_model(changed(c), SCHEMA, made))
    return folder


@contextmanager
def serving(cache: CacheConfig) -> Iterator[Models]:
    """Models over a loader of its own, as a process has them."""
    loader = EngineLoader(cache, ServerConfig())
    yield Models(loader.load, ServerMetrics(loader.metrics), num_hot=0, hot_bytes=0)
    loader.close()


def uses(answers: list[Answer]) -> set[tuple[str, str, str]]:
    return {(one.cache.status, one.cache.reason, one.cache.tier) for one in answers}


def held_bytes(models: Models) -> int:
    store = models.get().store
    assert store is not None
    return store.caches[0].held_bytes


def test_a_new_ranking_stage_answers_from_the_pages_of_the_version_before(
    artifact: Path, published: Path
) -> None:
    """Pages belonged to one version, so that each new one began with none."""
    with serving(CacheConfig()) as models:
        models.publish("shop", "1", artifact)
        models.get().engine.rank(REQUESTS)
        before = held_bytes(models)
        for version, (change, expected) in enumerate(
            [
                (STAGE, ("hit", "", "pages")),
                (TOWER, ("miss", "cold", "none")),  # In pages of its own.
                (ITEMS, ("miss", "cold", "none")),
            ]
        ):
            models.publish("shop", f"{version}", published / change)
            engine = models.get().engine
            assert held_bytes(models) == (before if change == STAGE else 0)
            answers = engine.rank(REQUESTS)
            assert uses(answers) == {expected}
            assert answers[0].model_version == read_artifact(published / change)[0].model_version
            assert_same_scores(answers, Engine(changed(change), SCHEMA, None).rank(REQUESTS))


def open_tier(tier: str, folder: Path, url: str) -> CacheConfig:
    """A cache of which one tier has room; the pages hold one user if it is the host."""
    one_user = 3 * PAGE_BYTES
    return CacheConfig(
        name="tiered",
        page_size=5,
        capacity_bytes=one_user if tier == "host" else 2**20,
        watermark=1.0,
        host=HostConfig(capacity_bytes=2**20 if tier == "host" else 0),
        disk=DiskConfig(folder=str(folder / "disk") if tier == "disk" else None),
        remote=RemoteConfig(url=url if tier == "remote" else None),
    )


@pytest.mark.filterwarnings("ignore:.*key_file")
@pytest.mark.parametrize("tier", ["host", "disk", "remote"])
def test_it_finds_them_in_every_other_tier_and_another_process_s(
    tier: str, artifact: Path, published: Path, tmp_path: Path
) -> None:
    with RedisServer(tmp_path / "redis") as redis:
        cache = open_tier(tier, tmp_path, redis.url)
        with serving(cache) as models:
            models.publish("shop", "1", artifact)
            store = models.get().store
            assert store is not None
            assert store.stack is not None
            for request in REQUESTS:
                models.get().engine.rank([request])
            assert store.stack.drain(PATIENCE_S)
            if tier == "host":
                models.publish("shop", "2", published / STAGE)
                [answer] = models.get().engine.rank(REQUESTS[:1])
                assert uses([answer]) == {("hit", "", tier)}
                return
        with serving(cache) as models:
            models.publish("shop", "2", published / STAGE)
            answers = models.get().engine.rank(REQUESTS)
            assert uses(answers) == {("hit", "", tier)}
            assert_same_scores(answers, Engine(changed(STAGE), SCHEMA, None).rank(REQUESTS))
            for change, reason in ((TOWER, "model"), (ITEMS, "tables")):
                models.publish("shop", change, published / change)
                assert uses(models.get().engine.rank(REQUESTS)) == {("miss", reason, "none")}


def test_kv_that_was_found_wrong_is_dropped_before_a_version_that_would_read_it(
    artifact: Path, published: Path
) -> None:
    with serving(CacheConfig()) as models:
        models.publish("shop", "1", artifact)
        old = models.get()
        old.engine.rank(REQUESTS)
        models.bypass(old.engine)
        models.publish("shop", "2", published / STAGE)
        assert models.get().store is old.store
        answers = models.get().engine.rank(REQUESTS)
        assert uses(answers) == {("miss", "cold", "none")}
        assert_same_scores(answers, Engine(changed(STAGE), SCHEMA, None).rank(REQUESTS))


def test_a_running_server_answers_from_the_kv_of_the_version_before(
    artifact: Path, published: Path, tmp_path: Path
) -> None:
    versions = tmp_path / "models" / "shop"
    versions.mkdir(parents=True)
    (versions / "1").symlink_to(artifact)
    settings = ["server.poll_s=0.1", "server.timeout_ms=60000"]
    raw = draw_raw(9, 3, 1)
    with running_server(f"models={tmp_path / 'models'}", *settings) as server:
        first = server.rank(raw)[1]
        assert first["cache"]["reason"] == "cold"
        (versions / "2").symlink_to(published / STAGE)
        expected = read_artifact(published / STAGE)[0].model_version
        deadline = 600
        while (answer := server.rank(raw)[1])["model_version"] != expected:
            deadline -= 1
            assert deadline, answer
        assert (answer["cache"]["status"], answer["cache"]["tier"]) == ("hit", "pages")
        text = server.ask("GET", "/metrics")[1]
        state = server.ask("GET", "/v1/state")[1]
    [scored] = Engine(changed(STAGE), SCHEMA, None).rank(parse_all([raw]))
    standing = [one for one in state["models"] if one["version"] == "2"]
    manifest = read_artifact(published / STAGE)[0]
    assert standing[0]["kv_versions"] == list(map(str, manifest.kv.values()))
    assert answer["scores"] == pytest.approx(scored.scores, abs=2e-6)
    assert 'kvshare_model_loads_total{model="shop",outcome="served"} 2.0' in text

"""A model is called by its weights: whatever changes them, K/V of what they were is not used."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.encoder_worlds import make_caches
from tests.worlds import (
    SCHEMA,
    assert_same_scores,
    draw_raw,
    make_dlrm,
    parse_all,
    version_called,
)
from torchrec_kvshare.cache.codecs import get_codec
from torchrec_kvshare.cache.disk import DiskTier
from torchrec_kvshare.cache.identity import ModelVersion, version_of
from torchrec_kvshare.cache.items import ItemCache
from torchrec_kvshare.cache.stack import Level, TierStack
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.export.exporter import export_model, load_artifact
from torchrec_kvshare.model.ranking import RankingModel, split_tables
from torchrec_kvshare.scoring.encoded_user import encode_user
from torchrec_kvshare.scoring.engine import Answer, Engine

TTL_S = 300.0
PATIENCE_S = 30.0
RAW = draw_raw(9, 4, 3)
REQUESTS = parse_all([RAW])


def ranking_model(seed: int) -> RankingModel:
    return RankingModel(make_dlrm(seed)).eval()


def cached_engine(model: RankingModel, items: ItemCache | None = None) -> Engine:
    return Engine(model, SCHEMA, KVStore(make_caches(model, [30])), items)


def use_of(answers: list[Answer]) -> tuple[str, str]:
    [answer] = answers
    return answer.cache.status, answer.cache.reason


def test_other_weights_in_a_live_model_are_another_model() -> None:
    """K/V of the old weights was a hit after ``load_state_dict``, and its scores were wrong."""
    model = ranking_model(1)
    engine = cached_engine(model, ItemCache(100, SCHEMA))
    engine.rank(REQUESTS)
    before = engine.model_version
    model.ranker.load_state_dict(ranking_model(2).ranker.state_dict())
    after = engine.rank(REQUESTS)
    assert use_of(after) == ("miss", "model")
    assert after[0].model_version == engine.model_version != before
    assert engine.version == version_of(ranking_model(2), SCHEMA)
    assert_same_scores(after, Engine(ranking_model(2), SCHEMA, None).rank(REQUESTS))
    assert use_of(engine.rank(REQUESTS)) == ("hit", "")


def test_a_step_of_an_optimizer_is_noticed() -> None:
    model = ranking_model(1)
    engine = cached_engine(model)
    engine.rank(REQUESTS)
    tables = {table.data_ptr() for table in split_tables(model)[1].values()}
    weights = [weight for weight in model.parameters() if weight.data_ptr() in tables]
    assert len(weights) == len(tables) > 0
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    torch.optim.SGD(weights, lr=0.1).step()
    after = engine.rank(REQUESTS)
    assert use_of(after) == ("miss", "tables")
    assert_same_scores(after, Engine(copy.deepcopy(model), SCHEMA, None).rank(REQUESTS))


def test_weights_that_were_put_in_place_of_others_are_read_when_asked_to() -> None:
    model = ranking_model(1)
    engine = cached_engine(model)
    engine.rank(REQUESTS)
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(0.5 * weight.detach()))
    engine.renew()
    after = engine.rank(REQUESTS)
    assert use_of(after) == ("miss", "model")
    assert_same_scores(after, Engine(model, SCHEMA, None).rank(REQUESTS))
    with torch.no_grad():  # What stands there now is watched, too.
        next(model.parameters()).add_(1.0)
    assert engine.rank(REQUESTS)[0].model_version != after[0].model_version


def test_a_user_that_is_held_in_hands_is_encoded_anew() -> None:
    model = ranking_model(1)
    engine = Engine(model, SCHEMA, None)
    user = encode_user(engine, RAW)
    user.predict(RAW["candidates"])
    model.ranker.load_state_dict(ranking_model(2).ranker.state_dict())
    [expected] = Engine(ranking_model(2), SCHEMA, None).rank(REQUESTS)
    assert user.predict(RAW["candidates"]) == pytest.approx(expected.scores, rel=0.0, abs=2e-6)


def test_two_models_on_one_disk_do_not_read_each_other_s_kv(tmp_path: Path) -> None:
    """Given the same word for a version, each took the other's K/V for its own."""
    stack = TierStack([Level(DiskTier(tmp_path, 2**26, TTL_S), get_codec("float32"))], TTL_S)
    engines: list[Any] = []
    for seed in (1, 2, 1):
        model = ranking_model(seed)
        engines.append(Engine(model, SCHEMA, KVStore(make_caches(model, [30]), stack)))
    answers = []
    for engine in engines:
        answers.append(engine.rank(REQUESTS))
        assert stack.drain(PATIENCE_S)
    assert [use_of(one) for one in answers] == [("miss", "cold"), ("miss", "model"), ("hit", "")]
    stack.close()
    assert_same_scores(answers[0], answers[2])
    assert_same_scores(answers[1], Engine(ranking_model(2), SCHEMA, None).rank(REQUESTS))


@pytest.mark.parametrize("version", ["v1", "", 7])
def test_a_word_is_no_version(version: Any) -> None:
    with pytest.raises(ConfigError, match=f"version is {version!r}; a word"):
        Engine(ranking_model(1), SCHEMA, None, version=version)


@pytest.mark.parametrize("digest", ["v1", "", "0" * 15, "G" * 16, "0" * 65])
def test_a_version_is_made_of_digests(digest: str) -> None:
    good = version_called("a").tables
    with pytest.raises(ConfigError, match="hexadecimal digest"):
        ModelVersion(digest, good)
    with pytest.raises(ConfigError, match="hexadecimal digest"):
        ModelVersion(good, digest)


def test_a_model_and_its_artifact_have_one_version(tmp_path: Path) -> None:
    model = ranking_model(1)
    manifest = export_model(model, SCHEMA, tmp_path / "a")
    assert Engine(model, SCHEMA, None).version == manifest.version


def test_weights_of_an_artifact_are_not_changed_under_its_name(tmp_path: Path) -> None:
    export_model(ranking_model(1), SCHEMA, tmp_path / "a")
    artifact = load_artifact(tmp_path / "a")
    engine = Engine(artifact.model, SCHEMA, None, version=artifact.manifest.version)
    with pytest.raises(ConfigError, match="has no version"):
        Engine(artifact.model, SCHEMA, None)
    engine.rank(REQUESTS)
    assert isinstance(artifact.model, torch.nn.Module)
    with torch.no_grad():
        next(artifact.model.parameters()).add_(1.0)
    with pytest.raises(ConfigError, match="has no version"):
        engine.rank(REQUESTS)

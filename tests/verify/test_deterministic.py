"""Deterministic mode: scores are bit-equal whatever else is scored, or the model is refused."""

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.encoder_worlds import NAMES, TASKS, World, cut, make_caches, raws_of, world_of
from torchrec_kvshare.cache.identity import version_of
from torchrec_kvshare.cache.items import ItemCache
from torchrec_kvshare.cache.kv_cache import KVCache
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.export.torchscript import script_model
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.features.schema import FeatureSchema
from torchrec_kvshare.history.kinds import CAUSAL, KINDS
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.verify import deterministic
from torchrec_kvshare.verify.deterministic import (
    RowsLinear,
    compute_rows_alone,
    require_determinism,
)

pytestmark = pytest.mark.optimised

RawRequest = dict[str, Any]

NUM_CANDIDATES = 131
NUM_EVENTS = (14, 4, 1)  # a short history is a small matrix, which has other kernels
NUM_TRIES = 2  # per history: a few of its candidates, then many, each time with batchmates


def what_moves_scores(world: World, model: RankingModel, caches: list[KVCache]) -> set[str]:
    """Return the ways to score the same candidates that change a bit of a score."""
    schema, rng = world.schema, random.Random(7)
    engines = {
        "off": Engine(model, schema, None),
        "cached": Engine(model, schema, KVStore(caches)),
        "items": Engine(model, schema, KVStore(caches), ItemCache(300, schema)),
    }
    moved = set()
    for num_events in NUM_EVENTS:
        [raw] = raws_of(world, [(num_events, NUM_CANDIDATES, 3)])
        raw["user_id"] = f"asks after {num_events}"
        expected = scores_of(engines["off"], [raw])
        for turn in range(NUM_TRIES):
            num_chosen = rng.randint(1, 3) if turn == 0 else rng.randint(4, NUM_CANDIDATES)
            chosen = rng.sample(range(NUM_CANDIDATES), num_chosen)
            mates = raws_of(world, [(rng.randint(0, 20), rng.randint(0, 40), 9 + turn)])
            asked = with_candidates(raw, chosen)
            for what, engine in engines.items():
                scores_of(engine, [cut(raw, 0, num_events // 2)])  # The history grows after this.
                tried = {
                    "whole": (scores_of(engine, [raw]), expected),
                    "part": (scores_of(engine, [asked]), [expected[index] for index in chosen]),
                    "mates": (scores_of(engine, [asked, *mates]), [expected[i] for i in chosen]),
                    "after": (scores_of(engine, [*mates, raw], len(mates)), expected),
                }
                moved |= {
                    f"{way}, {what}, {num_events} events"
                    for way, (scores, unmoved) in tried.items()
                    if scores != unmoved
                }
    return moved


def scores_of(engine: Engine, raws: list[RawRequest], index: int = 0) -> list[Any]:
    answer = engine.rank([parse_request(raw, engine.schema) for raw in raws])[index]
    return [*zip(*answer.scores_by_task.values(), strict=True)]


def with_candidates(raw: RawRequest, chosen: list[int]) -> RawRequest:
    candidates = {name: [cells[i] for i in chosen] for name, cells in raw["candidates"].items()}
    return raw | {"candidates": candidates}


def alone(name: str) -> RankingModel:
    return compute_rows_alone(RankingModel(copy.deepcopy(world_of(name).dlrm)).eval())


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", NAMES)
def test_rows_computed_alone_give_bit_equal_scores(name: str) -> None:
    """Determinism once needed MKL's strict mode, which only Intel CPUs with AVX-512 have."""
    model, world = alone(name), world_of(name)
    require_determinism(model, world.schema)
    assert what_moves_scores(world, model, make_caches(model, [60])) == set()


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", KINDS)
def test_scripted_and_on_two_threads_they_are_bit_equal_too(name: str) -> None:
    require_determinism(script_model(alone(name)), world_of(name).schema)


def test_the_given_model_is_unchanged_and_weights_are_shared() -> None:
    model = RankingModel(copy.deepcopy(world_of(CAUSAL).dlrm)).eval()
    other = compute_rows_alone(model)
    linear = [one for one in model.modules() if isinstance(one, nn.Linear)]
    assert not any(isinstance(one, RowsLinear) for one in linear)
    changed = [one for one in other.modules() if isinstance(one, RowsLinear)]
    assert len(changed) == len(linear)
    weights = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(one.data_ptr() == two.data_ptr() for one, two in weights)
    assert version_of(other, world_of(CAUSAL).schema) != version_of(model, world_of(CAUSAL).schema)


class OwnLinear(nn.Linear):
    """A class of linear layer that the package does not know."""


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (OwnLinear(10, 10), r"head is a OwnLinear; plain linear layers"),
        (nn.Linear(10, 10, bias=False), "head is a Linear without bias; plain"),
    ],
)
def test_a_layer_of_its_own_is_refused_by_name(layer: nn.Linear, message: str) -> None:
    dlrm = copy.deepcopy(world_of(CAUSAL).dlrm)
    [tower] = dlrm.sparse_arch.embedding_bag_collection.towers()
    tower.head = layer
    with pytest.raises(ConfigError, match=message):
        compute_rows_alone(RankingModel(dlrm).eval())


def test_a_fault_that_only_short_histories_show_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch has another kernel for small matrices. Only a long history was tried, and with HSTU a
    score over four events moved with the number of candidates."""
    model = RankingModel(copy.deepcopy(world_of(CAUSAL).dlrm)).eval()
    tried = []

    def logits(dense: Tensor, features: KeyedJaggedTensor) -> Tensor:
        num_events = features["history.time"].values().numel()
        tried.append(num_events)
        moved = 1e-6 if num_events == 3 and len(dense) == 16 else 0.0
        return torch.zeros(len(dense), len(TASKS)) + moved

    monkeypatch.setattr(model, "forward", logits)
    monkeypatch.setattr(deterministic, "score_through_pages", zero_logits)
    monkeypatch.setattr(deterministic, "score_extended", zero_logits)
    message = (
        r"1 of 39 ways .* a score, most of all scoring it among 16 over 3 events, by 1\.0e-06;"
    )
    with pytest.raises(ConfigError, match=message):
        require_determinism(model, world_of(CAUSAL).schema)
    assert 3 in tried


def zero_logits(_: Any, requests: list[Request], __: FeatureSchema) -> Tensor:
    return torch.zeros(sum(request.num_candidates for request in requests), len(TASKS))

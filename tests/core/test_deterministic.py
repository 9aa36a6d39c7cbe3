"""Deterministic mode: scores bit-equal whatever else is scored, or a refusal that says what to do.

MKL reads its environment once, so every verdict here is that of a fresh process.
"""

import copy
import json
import random
from pathlib import Path
from subprocess import Popen
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.core.encoder_worlds import World, cut, make_caches, raws_of, world_of
from tests.core.worlds import fresh_process
from torchrec_kvshare import deterministic
from torchrec_kvshare.cache.items import ItemCache
from torchrec_kvshare.cache.kv_cache import KVCache
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.data.schema import FeatureSchema
from torchrec_kvshare.deterministic import STRICT_MKL, require_determinism
from torchrec_kvshare.engine import Engine
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.features import Request, parse_request
from torchrec_kvshare.history.kinds import CAUSAL, KINDS
from torchrec_kvshare.ranking import RankingModel

RawRequest = dict[str, Any]

STRICT_VALUE = STRICT_MKL.partition("=")[2]
NUM_CANDIDATES = 131
NUM_EVENTS = (14, 4, 1)  # a short history is a small matrix, and has other kernels
NUM_TRIES = 2  # of each history: a few of its candidates, then many, each time with batchmates
DENSE, NATIVE = " dense", " native"
TRIED = (*KINDS, *(kind + NATIVE for kind in KINDS), CAUSAL + DENSE)

PROGRAM = """
import json, sys
import torch
torch.set_num_threads(1)
from tests.core.test_deterministic import findings_of
print(json.dumps({name: findings_of(name) for name in sys.argv[1:]}))
"""


class Findings(NamedTuple):
    """Of one process and one model.

    Attributes:
        refusal: what ``require_determinism`` says, if it refuses.
        moved: what does move scores, tried where it does not refuse.
    """

    refusal: str | None
    moved: list[str]


def findings_of(name: str) -> Findings:
    """In the process that asks."""
    kind, _, body = name.partition(" ")
    world = world_of(kind)
    model = RankingModel(copy.deepcopy(world.dlrm), body or "auto").eval()
    caches = make_caches(model, [60])
    try:
        require_determinism(model, world.schema)
    except ConfigError as error:
        return Findings(str(error), [])
    return Findings(None, sorted(what_moves_scores(world, model, caches)))


def what_moves_scores(world: World, model: RankingModel, caches: list[KVCache]) -> set[str]:
    """Ways to ask for the same candidates that give them other bits."""
    schema, rng = world.schema, random.Random(7)
    engines = {
        "off": Engine(model, schema, "v1", None),
        "cached": Engine(model, schema, "v1", KVStore(caches, extends=False)),
        "items": Engine(
            model, schema, "v1", KVStore(caches, extends=False), ItemCache(300, schema)
        ),
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
                scores_of(engine, [cut(raw, 0, num_events // 2)])  # It has grown since.
                tried = {
                    "whole": (scores_of(engine, [raw]), expected),
                    "part": (scores_of(engine, [asked]), [expected[place] for place in chosen]),
                    "mates": (scores_of(engine, [asked, *mates]), [expected[p] for p in chosen]),
                    "after": (scores_of(engine, [*mates, raw], len(mates)), expected),
                }
                moved |= {
                    f"{way}, {what}, {num_events} events"
                    for way, (scores, unmoved) in tried.items()
                    if scores != unmoved
                }
    return moved


def scores_of(engine: Engine, raws: list[RawRequest], place: int = 0) -> list[float]:
    return engine.rank([parse_request(raw, engine.schema) for raw in raws])[place].scores


def with_candidates(raw: RawRequest, chosen: list[int]) -> RawRequest:
    candidates = {name: [cells[p] for p in chosen] for name, cells in raw["candidates"].items()}
    return raw | {"candidates": candidates}


# What a process finds.


def runs_avx512() -> bool:
    """Whether MKL's strict mode is to be had: it is Intel's, and for these instructions."""
    cpu = Path("/proc/cpuinfo").read_text()
    return "GenuineIntel" in cpu and "avx512f" in cpu


def start(*names: str, **environment: str) -> Popen[str]:
    return fresh_process(PROGRAM, *names, **environment)


def findings(process: Popen[str]) -> dict[str, Findings]:
    output, errors = process.communicate()
    assert output, errors
    return {name: Findings(*found) for name, found in json.loads(output).items()}


def test_in_strict_mode_scores_are_bit_equal_and_without_it_a_model_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On another CPU a refusal is as right as a pass, as long as the pass holds."""
    monkeypatch.delenv("MKL_CBWR", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    processes = [start(*TRIED, MKL_CBWR=STRICT_VALUE), start(*KINDS)]
    strict, loose = (findings(process) for process in processes)
    for found in (strict, loose):
        for name, (refusal, moved) in found.items():
            assert moved == [], name
            assert refusal is None or STRICT_MKL in refusal
    if runs_avx512():
        passed = [name for name, (refusal, _) in strict.items() if refusal is None]
        assert passed == [name for name in TRIED if not name.endswith(DENSE)]
        assert [name for name, (refusal, _) in loose.items() if refusal is None] == []


def test_a_fault_that_only_short_histories_show_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch multiplies small matrices by a kernel of its own. Only a long history was tried, and
    with HSTU a score over four events moved by how many candidates there were."""
    model = RankingModel(copy.deepcopy(world_of(CAUSAL).dlrm)).eval()
    tried = []

    def logits(dense: Tensor, features: KeyedJaggedTensor) -> Tensor:
        num_events = features["history.time"].values().numel()
        tried.append(num_events)
        moved = 1e-6 if num_events == 3 and len(dense) == 16 else 0.0
        return torch.zeros(len(dense)) + moved

    monkeypatch.setattr(model, "forward", logits)
    monkeypatch.setattr(deterministic, "score_through_pages", zero_logits)
    message = (
        r"scoring it among 16 over 3 events moves a score by 1\.0e-06; .*MKL_CBWR=AVX512,STRICT"
    )
    with pytest.raises(ConfigError, match=message):
        require_determinism(model, world_of(CAUSAL).schema)
    assert tried[-1] == 3


def zero_logits(_: Any, requests: list[Request], __: FeatureSchema) -> Tensor:
    return torch.zeros(sum(request.num_candidates for request in requests))

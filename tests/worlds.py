"""A small world whose sizes are all different, so that a swapped axis fails.

The tolerances of the core's tests are here too, in one table.
"""

import os
import subprocess
import sys
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRM

from tests.processes import ROOT, ForkedPython
from torchrec_kvshare.cache.identity import ModelVersion, text_digest
from torchrec_kvshare.features.bags import Bags, single
from torchrec_kvshare.features.batches import assemble
from torchrec_kvshare.features.draw import draw_raw_request
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.features.schema import (
    CANDIDATE_TIME,
    HISTORY,
    ITEM,
    TIME,
    FeatureSchema,
    History,
    Vocabulary,
    Window,
    has_candidate_rows,
    visible_key,
)
from torchrec_kvshare.history.kinds import CAUSAL, TowerSpec
from torchrec_kvshare.model.ranking import dlrm_with_history
from torchrec_kvshare.scoring.engine import Answer

P = TypeVar("P", bound="subprocess.Popen[str]")

MAX_HISTORY, BLOCK = 14, 7
DIM, NUM_LAYERS, NUM_HEADS, HEAD_DIM = 12, 2, 3, 4
NUM_PLANES = 2 * NUM_LAYERS  # keys and values of each layer
PAGE_SIZE = 5
PAGE_BYTES = NUM_PLANES * PAGE_SIZE * NUM_HEADS * HEAD_DIM * 4

CAUSAL_SPEC = TowerSpec(CAUSAL, DIM, NUM_LAYERS, NUM_HEADS, dropout=0.1)

# Largest absolute errors allowed, each with the worst found, on a CPU with AVX512 and torch 2.13.
# Attention against the float64 reference: worst of 2000 draws 1.2e-6 and 2.2e-15.
ATTENTION_TOLERANCE = {torch.float32: 4e-6, torch.float64: 1e-13}
# Logits against the float64 reference; worst of 800 batches 1.0e-6.
LOGIT_TOLERANCE = 2e-5
# Two float32 paths to the same logits or K/V that batch rows differently: worst of 2000 draws
# 2.1e-6 between training and serving, 1.1e-6 between one batch and another.
PATH_TOLERANCE = 5e-6
# Probabilities with the cache and without: a sigmoid is at most a quarter as steep as its logit.
PROBABILITY_TOLERANCE = 2e-6

SCHEMA = FeatureSchema(
    {
        "user_id": Vocabulary([f"user {number}" for number in range(5)]),
        "item_id": Vocabulary([str(number) for number in range(100, 111)]),
        "events.action": Vocabulary(["view", "buy", "rate"]),
        "items.genres": Vocabulary([f"genre {number}" for number in range(7)]),
        "context.country": Vocabulary(["AT", "BR", "GB", "ZA"]),
    },
    context=("country",),
    event_attributes=("action",),
    item_attributes=("genres",),
    item_floats=("price",),
    histories=(History(HISTORY, Window(MAX_HISTORY, BLOCK)),),
)

# A user of a batch: events (sometimes more than the window holds), candidates, seed.
ragged_users = st.lists(
    st.tuples(
        st.sampled_from([0, 1]) | st.integers(0, MAX_HISTORY + 2 * BLOCK),
        st.integers(1, 4),
        st.integers(0, 2**32 - 1),
    ),
    min_size=1,
    max_size=4,
)


def examples(share: float) -> settings:
    """Return settings with a share of the examples of the loaded hypothesis profile."""
    return settings(max_examples=max(1, int(settings().max_examples * share)))


def random_weights(model: nn.Module, seed: int) -> None:
    """Set weights large enough that leaving any of them out shows in the scores."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3, generator=generator)
            if name.endswith("norm.weight"):
                parameter.add_(1.0)


def make_dlrm(seed: int, schema: FeatureSchema = SCHEMA, spec: TowerSpec = CAUSAL_SPEC) -> DLRM:
    """Make a DLRM with history in eval mode."""
    model = dlrm_with_history(schema, spec, [9, 1])
    random_weights(model, seed)
    return model.eval()


def draw_raw(
    num_events: int, num_candidates: int, seed: int, schema: FeatureSchema = SCHEMA
) -> dict[str, Any]:
    """Draw a request with some missing cells and some events at equal times."""
    raw = draw_raw_request(schema, num_events, num_candidates, seed)
    rng = np.random.default_rng([seed, 1])
    history = raw["history"]
    for column in schema.event_columns:
        history[column] = [None if rng.random() < 0.1 else cell for cell in history[column]]
    for event in range(1, num_events):
        if rng.random() < 0.2:
            history[TIME][event] = history[TIME][event - 1]
    if num_events:
        history[TIME][-1] = raw[TIME] - int(rng.integers(1, 4))
    if num_candidates and rng.random() < 0.2:
        raw["candidates"][ITEM][0] = None
    return raw


def draw_raws(users: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """Draw one raw request for each user."""
    return [draw_raw(*sizes) for sizes in users]


def oldest_first(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the request with event times that never decrease, and its own time after them."""
    times = np.maximum.accumulate(np.array(raw["history"][TIME], dtype=np.int64)).tolist()
    later = {TIME: max([raw[TIME], *(time + 1 for time in times[-1:])])}
    return raw | later | {"history": raw["history"] | {TIME: times}}


def parse_all(raws: list[dict[str, Any]], schema: FeatureSchema = SCHEMA) -> list[Request]:
    """Parse the raw requests."""
    return [parse_request(raw, schema) for raw in raws]


def take_candidates(batch: Batch, chosen: Tensor) -> Batch:
    """Return the batch with only the chosen candidates, in this order, and the same users."""
    features = batch.sparse_features
    keys, inverse = features.inverse_indices()
    bags_by_key = {}
    for key, jagged in features.to_dict().items():
        bags_by_key[key] = Bags(jagged.values(), jagged.lengths())
        if has_candidate_rows(key):
            rows = jagged.to_dense()
            picked = [rows[candidate] for candidate in chosen.tolist()]
            bags_by_key[key] = Bags(
                torch.cat([*picked, jagged.values()[:0]]), jagged.lengths()[chosen]
            )
    candidate_user = inverse[keys.index("user_id")]
    return assemble(
        bags_by_key, candidate_user[chosen], batch.dense_features[chosen], batch.labels[chosen]
    )


def see_prefixes(batch: Batch, visible: list[int], times: list[int]) -> Batch:
    """Return the batch as in training: each candidate with its own time and visible events."""
    features = batch.sparse_features
    keys, inverse = features.inverse_indices()
    bags_by_key = {
        key: Bags(jagged.values(), jagged.lengths()) for key, jagged in features.to_dict().items()
    }
    bags_by_key[CANDIDATE_TIME] = single(torch.tensor(times))
    bags_by_key[visible_key(HISTORY)] = single(torch.tensor(visible))
    candidate_user = inverse[keys.index("user_id")]
    return assemble(bags_by_key, candidate_user, batch.dense_features, batch.labels)


def assert_same_scores(answers: list[Answer], expected: list[Answer]) -> None:
    """Compare the answers of two engines, usually one with and one without a cache."""
    for answer, other in zip(answers, expected, strict=True):
        assert [*answer.scores_by_task] == [*other.scores_by_task]
        for task, scores in other.scores_by_task.items():
            near = pytest.approx(scores, rel=0.0, abs=PROBABILITY_TOLERANCE)
            assert answer.scores_by_task[task] == near


def fresh_process(program: str, *arguments: str, **environment: str) -> ForkedPython:
    """Start Python on ``program`` in the repository's root, with its output piped as text."""
    return _start(ForkedPython, program, arguments, {"OMP_NUM_THREADS": "1"} | environment)


def new_interpreter(program: str, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
    """As ``fresh_process``, where imports or memory are tested: nothing is imported before."""
    return _start(subprocess.Popen, program, arguments, environment)


def _start(
    popen: type[P], program: str, arguments: tuple[str, ...], environment: dict[str, str]
) -> P:
    return popen(
        [sys.executable, "-W", "ignore", "-c", program, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def version_called(name: str) -> ModelVersion:
    """Return the version of a model named ``<model>-<tables>``, for tests that choose it."""
    model, _, tables = name.partition("-")
    return ModelVersion(text_digest(model), text_digest(tables))

"""What a history costs an established ranking stage: MLPerf's DLRM-DCNv2 with and without one.

The dense part has MLPerf's sizes; tables are small, so that its matrix products are what a history
is compared with. The model alone scores the same requests without the history's columns.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torchrec.models.dlrm import DLRM_DCN
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingBagCollectionInterface,
)

from torchrec_kvshare.bags import user_candidate_bags
from torchrec_kvshare.collection import kvshare_collection
from torchrec_kvshare.data.schema import (
    HISTORY,
    ITEM,
    USER,
    FeatureSchema,
    History,
    Vocabulary,
    Window,
    context_key,
)
from torchrec_kvshare.features import Request, collate_candidates
from torchrec_kvshare.history.kinds import CAUSAL, LONGER
from torchrec_kvshare.profiling.benchmarks import Paths, assert_parity
from torchrec_kvshare.profiling.plan import MERGE, Plan, Sizes
from torchrec_kvshare.profiling.results import Case, Record
from torchrec_kvshare.profiling.timing import interleaved_medians
from torchrec_kvshare.profiling.workload import draw_requests, fill_zeros

THROUGHPUT_DROP = "throughput_drop"
WITHOUT_HISTORY = "without_history"

# DLRM-DCNv2 as MLPerf trains it (Criteo 1TB): 26 sparse features, 13 dense ones.
DIM = 128
NUM_SPARSE = 26
NUM_FLOATS = 9  # beside the clock's four
DENSE_ARCH = [512, 256, DIM]
OVER_ARCH = [1024, 1024, 512, 256, 1]
DCN_LAYERS = 3
DCN_RANK = 512
NUM_IDS = 1000  # of each sparse feature

# Encoder and raw events of each case.
CASES = ((LONGER, 2000), (CAUSAL, 256), (CAUSAL, 1000))


@torch.no_grad()
def measure_throughput_drop(plan: Plan, sizes: Sizes) -> list[Record]:
    """Throughput lost by adding a history, by the path that scores it.

    Args:
        plan: ``candidates``, ``repeats``, ``seed``; encoders and histories are fixed.
        sizes: ``num_layers``, ``num_heads``, ``page_size``; the width is MLPerf's.

    Returns:
        Records of ``latency_ms`` and ``throughput_drop_percent`` against ``without_history``.

    Raises:
        ParityError: if two paths differ.
    """
    sizes = replace(sizes, dim=DIM, num_tokens=1)
    return [
        record
        for encoder, history in CASES
        for record in _case_records(plan, sizes, encoder, history)
    ]


def _case_records(plan: Plan, sizes: Sizes, encoder: str, history: int) -> Iterator[Record]:
    schema = mlperf_schema(history)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        plain = fill_zeros(dlrm_dcn(user_candidate_bags(schema, DIM), schema))
        spec = sizes.spec(encoder, history)
        ranker = fill_zeros(dlrm_dcn(kvshare_collection(schema, spec), schema))
    paths = Paths(schema, ranker, sizes)
    for request in draw_requests(schema, plan.candidates, user=0, seed=plan.seed):
        paths.put(request)
        calls = dict(paths.calls(request, paths.merged(min(plan.merged_chunk_rows))))
        assert_parity({path: call() for path, call in calls.items()})
        calls[WITHOUT_HISTORY] = partial(score_plain, plain, request, schema)
        latency_ms = interleaved_medians(calls, plan.repeats)
        case: Case = sizes.case(encoder) | {
            "history": history,
            "candidates": request.num_candidates,
            "users": 1,
        }
        for path, value in latency_ms.items():
            yield Record(THROUGHPUT_DROP, case | {"path": path}, "latency_ms", value, "ms")
            if path != WITHOUT_HISTORY:
                drop = 100 * (1 - latency_ms[WITHOUT_HISTORY] / value)
                yield Record(
                    THROUGHPUT_DROP, case | {"path": path}, "throughput_drop_percent", drop, "%"
                )


@torch.no_grad()
def score_plain(model: DLRM_DCN, request: Request, schema: FeatureSchema) -> Tensor:
    """Logits [N] of the model that has no history."""
    batch = collate_candidates([request], schema)
    return model(batch.dense_features, batch.sparse_features).squeeze(1)


def dlrm_dcn(bags: EmbeddingBagCollectionInterface, schema: FeatureSchema) -> DLRM_DCN:
    """TorchRec's DLRM_DCN at MLPerf's sizes."""
    return DLRM_DCN(
        cast(EmbeddingBagCollection, bags),
        schema.num_dense,
        DENSE_ARCH,
        OVER_ARCH,
        DCN_LAYERS,
        DCN_RANK,
    )


def mlperf_schema(history: int) -> FeatureSchema:
    """As many sparse and dense features as DLRM-DCNv2 has: of the user, of the item, of context."""
    context = tuple(f"context_{place}" for place in range(NUM_SPARSE - 2))
    vocabulary = Vocabulary([str(i) for i in range(NUM_IDS)])
    return FeatureSchema(
        dict.fromkeys((USER, ITEM, *map(context_key, context)), vocabulary),
        context=context,
        has_action=False,
        item_attributes=(),
        item_floats=tuple(f"float_{place}" for place in range(NUM_FLOATS)),
        histories=(History(HISTORY, Window(history, MERGE)),),
    )

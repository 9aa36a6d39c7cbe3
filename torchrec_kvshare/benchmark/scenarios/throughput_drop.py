"""The cost of a history in an established ranking stage: MLPerf's DLRM-DCNv2 with and without one.

The dense part has MLPerf's sizes; tables are small, so that a history is compared with the matrix
products. Two baselines score the same requests: the model alone, and with one more plain feature,
the history's items pooled into one vector, as a DLRM reads them today. All three are measured eager
and as compiled graphs.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torchrec.models.dlrm import DLRM_DCN
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingBagCollectionInterface,
)

from torchrec_kvshare.benchmark.options import (
    MERGE,
    Layers,
    ModelSizes,
    PageSize,
    TimedOptions,
)
from torchrec_kvshare.benchmark.paths import CROSS_REQUEST_HIT, Paths, assert_parity
from torchrec_kvshare.benchmark.results import Case, Record
from torchrec_kvshare.benchmark.timing import interleaved_medians
from torchrec_kvshare.benchmark.workload import draw_requests, fill_zeros
from torchrec_kvshare.export.program import batch_of
from torchrec_kvshare.export.pt2 import (
    CANDIDATE_REQUEST,
    SCORE,
    CompiledRanking,
    Graph,
    GraphInput,
    Inputs,
    compile_graph,
    export_graph,
    graph_inputs,
    graphs_of,
    load_graph,
)
from torchrec_kvshare.features.batches import collate_candidates
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.features.schema import (
    HISTORY,
    ITEM,
    USER,
    FeatureSchema,
    History,
    Vocabulary,
    Window,
    candidate_key,
    context_key,
)
from torchrec_kvshare.features.tensors import DENSE
from torchrec_kvshare.history.kinds import CAUSAL, LONGER
from torchrec_kvshare.model.bags import user_candidate_bags
from torchrec_kvshare.model.collection import kvshare_collection

THROUGHPUT_DROP = "throughput_drop"
WITHOUT_HISTORY, POOLED_HISTORY = "without_history", "pooled_history"
EAGER, PT2 = "eager", "pt2"
# Metric of the throughput that is lost against each baseline.
DROP_BY_BASELINE = {
    WITHOUT_HISTORY: "throughput_drop_percent",
    POOLED_HISTORY: "drop_to_pooled_percent",
}

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


@dataclass
class ThroughputDropOptions(TimedOptions, Layers, PageSize):
    """Options of ``scenario=throughput_drop``; encoders, histories and the width are fixed."""

    candidates: list[int] = field(default_factory=lambda: [500])
    merged_chunk_rows: list[int] = field(default_factory=lambda: [16384])  # the smallest is used


@torch.no_grad()
def measure_throughput_drop(options: ThroughputDropOptions) -> list[Record]:
    """Measure the throughput lost by adding a history, by the path that scores it.

    Returns:
        Records of ``latency_ms``, and by runtime of ``throughput_drop_percent`` against
        ``without_history`` and of ``drop_to_pooled_percent`` against ``pooled_history``.

    Raises:
        ParityError: if two paths differ.
    """
    return [
        record for encoder, history in CASES for record in _case_records(options, encoder, history)
    ]


def _case_records(options: ThroughputDropOptions, encoder: str, history: int) -> Iterator[Record]:
    sizes = ModelSizes(dim=DIM, num_layers=options.num_layers, num_heads=options.num_heads)
    schema = mlperf_schema(history)
    pooled_schema = mlperf_schema(history, POOLED_HISTORY)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        plain, pooled = (
            fill_zeros(dlrm_dcn(user_candidate_bags(one, DIM), one)).eval()
            for one in (schema, pooled_schema)
        )
        spec = sizes.spec(encoder, history)
        ranker = fill_zeros(dlrm_dcn(kvshare_collection(schema, spec), schema))
    paths = Paths(schema, ranker, options.page_size)
    graph = compiled(
        graphs_of(paths.model, schema)[SCORE], graph_inputs(paths.model, schema)[SCORE], schema
    )
    compiled_hit = CompiledRanking({SCORE: graph}, schema, spec, paths.model.state_dict())
    compiled_plain, compiled_pooled = (
        compiled_baseline(model, paths, one)
        for model, one in ((plain, schema), (pooled, pooled_schema))
    )
    for request in draw_requests(schema, options.candidates, user=0, seed=options.seed):
        paths.put(request)
        hits = paths.calls(request, paths.merged(min(options.merged_chunk_rows)))
        hits[PT2] = partial(paths.cross_request_hit, request, compiled_hit)
        assert_parity({path: call() for path, call in hits.items()})
        pools = with_pooled_history(request)
        calls: dict[tuple[str, str], Callable[[], Tensor]] = {
            (EAGER, WITHOUT_HISTORY): partial(score_plain, plain, request, schema),
            (EAGER, POOLED_HISTORY): partial(score_plain, pooled, pools, pooled_schema),
            (PT2, WITHOUT_HISTORY): partial(score_compiled, compiled_plain, request, schema),
            (PT2, POOLED_HISTORY): partial(score_compiled, compiled_pooled, pools, pooled_schema),
            (PT2, CROSS_REQUEST_HIT): hits.pop(PT2),
        }
        calls |= {(EAGER, path): call for path, call in hits.items()}
        for call in calls.values():
            call()
        case: Case = sizes.case(encoder) | {
            "history": history,
            "candidates": request.num_candidates,
            "users": 1,
        }
        yield from _records(case, interleaved_medians(calls, options.repeats))


def _records(case: Case, latency_ms: dict[tuple[str, str], float]) -> Iterator[Record]:
    for (runtime, path), value in latency_ms.items():
        own: Case = case | {"path": path, "runtime": runtime}
        yield Record(THROUGHPUT_DROP, own, "latency_ms", value, unit="ms")
        if path in DROP_BY_BASELINE:
            continue
        for baseline, metric in DROP_BY_BASELINE.items():
            drop = 100 * (1 - latency_ms[runtime, baseline] / value)
            yield Record(THROUGHPUT_DROP, own, metric, drop, unit="%")


@torch.no_grad()
def score_plain(model: nn.Module, request: Request, schema: FeatureSchema) -> Tensor:
    """Return logits [N, 1] of a model without a history."""
    batch = collate_candidates([request], schema)
    logits: Tensor = model(batch.dense_features, batch.sparse_features)
    return logits


def score_compiled(graph: Graph, request: Request, schema: FeatureSchema) -> Tensor:
    """Return logits [N, 1] of a compiled graph without a history."""
    batch = collate_candidates([request], schema)
    features = batch.sparse_features
    keys, inverse_indices = features.inverse_indices()
    inputs = {CANDIDATE_REQUEST: inverse_indices[keys.index(USER)], DENSE: batch.dense_features}
    for key, bags in features.to_dict(compute_offsets=False).items():
        inputs[f"{key}.values"], inputs[f"{key}.lengths"] = bags.values(), bags.lengths()
    [logits] = graph(inputs)
    return logits


class PlainGraph(nn.Module):
    """A model without a history over the inputs of a graph: logits [C, 1].

    Args:
        model: a ranking model over features.
        keys: the features.
    """

    def __init__(self, model: nn.Module, keys: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.keys = keys

    def forward(self, inputs: Inputs) -> list[Tensor]:
        parts = [(key, inputs[f"{key}.values"], inputs[f"{key}.lengths"]) for key in self.keys]
        batch = batch_of(parts, inputs[CANDIDATE_REQUEST])
        return [self.model(inputs[DENSE], batch)]


def compiled_baseline(model: nn.Module, paths: Paths, schema: FeatureSchema) -> Graph:
    """Compile a model without a history, over the inputs that are not the history's."""
    groups = (USER, *(key.split(".")[0] for key in (context_key(""), candidate_key(""))))
    inputs = [
        one for one in graph_inputs(paths.model, schema)[SCORE] if one.name.split(".")[0] in groups
    ]
    names = [one.name for one in inputs if one.name.endswith(".values")]
    graph = PlainGraph(model, [name.removesuffix(".values") for name in names])
    return compiled(graph, inputs, schema)


def compiled(graph: nn.Module, inputs: Sequence[GraphInput], schema: FeatureSchema) -> Graph:
    """Compile a module of tensors with AOTInductor."""
    program = export_graph(graph, inputs, schema)
    weights = {name: tensor.detach() for name, tensor in program.state_dict.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.pt2"
        compile_graph(program, path)
        return load_graph(path, [one.name for one in inputs], weights)


def with_pooled_history(request: Request) -> Request:
    """Return the request with its history's items as a column of context."""
    items = request.events_by_history[HISTORY].columns[ITEM]
    return replace(request, context=request.context | {POOLED_HISTORY: items})


def dlrm_dcn(bags: EmbeddingBagCollectionInterface, schema: FeatureSchema) -> DLRM_DCN:
    """Return TorchRec's DLRM_DCN at MLPerf's sizes."""
    return DLRM_DCN(
        embedding_bag_collection=cast(EmbeddingBagCollection, bags),
        dense_in_features=schema.num_dense,
        dense_arch_layer_sizes=DENSE_ARCH,
        over_arch_layer_sizes=OVER_ARCH,
        dcn_num_layers=DCN_LAYERS,
        dcn_low_rank_dim=DCN_RANK,
    )


def mlperf_schema(history: int, *more: str) -> FeatureSchema:
    """Return a schema with the sparse and dense features of DLRM-DCNv2: user, item, context.

    Args:
        history: events of its window.
        more: more columns of context.
    """
    context = (*(f"context_{index}" for index in range(NUM_SPARSE - 2)), *more)
    vocabulary = Vocabulary([str(i) for i in range(NUM_IDS)])
    return FeatureSchema(
        dict.fromkeys((USER, ITEM, *map(context_key, context)), vocabulary),
        context=context,
        item_attributes=(),
        item_floats=tuple(f"float_{index}" for index in range(NUM_FLOATS)),
        histories=(History(HISTORY, Window(history, MERGE)),),
    )

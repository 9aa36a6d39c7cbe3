"""The uncached baseline computes the same scores; otherwise its time would mean nothing."""

import pytest
import torch
from torch import Tensor

from torchrec_kvshare.attention.operators import Visibility
from torchrec_kvshare.benchmark.baselines.merged import pool_without_sharing
from torchrec_kvshare.benchmark.options import MERGE, ModelSizes
from torchrec_kvshare.benchmark.paths import Paths
from torchrec_kvshare.benchmark.workload import make_dlrm, make_schema
from torchrec_kvshare.features.batches import collate
from torchrec_kvshare.features.draw import draw_ragged_requests, draw_raw_request
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.history.kinds import CAUSAL, KINDS, TowerSpec
from torchrec_kvshare.history.pages import flat_pages
from torchrec_kvshare.history.reference import ReferenceOptions, reference_tower
from torchrec_kvshare.history.tower import HistoryTower
from torchrec_kvshare.verify.parity import LOGIT_TOLERANCE

HISTORY = 14  # events
SCHEMA = make_schema(HISTORY, num_users=5)
DIM, NUM_LAYERS, NUM_HEADS = 12, 3, 2
# Float32 against float64 loops: worst of 200 draws 2.9e-7; two float32 paths: of 900, 6.0e-7.
VECTOR_TOLERANCE = 1.5e-6


@pytest.fixture(scope="module")
def paths() -> Paths:
    sizes = ModelSizes(dim=DIM, num_layers=NUM_LAYERS, num_heads=NUM_HEADS)
    return Paths(SCHEMA, make_dlrm(SCHEMA, sizes, seed=2), page_size=5)


def merged_logits(paths: Paths, requests: list[Request], chunk_rows: int) -> Tensor:
    batch = collate(requests, paths.schema)
    merged = paths.merged(chunk_rows)
    with torch.no_grad():
        return merged(batch.dense_features, batch.sparse_features)


def shared_logits(paths: Paths, requests: list[Request]) -> Tensor:
    batch = collate(requests, paths.schema)
    with torch.no_grad():
        return paths.model(batch.dense_features, batch.sparse_features)


def largest_difference(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max())


@pytest.mark.parametrize("num_events", [0, 1, 2, 9, HISTORY])
@pytest.mark.parametrize("num_candidates", [1, 4, 11])
def test_merged_scores_equal_shared_ones(
    paths: Paths, num_events: int, num_candidates: int
) -> None:
    seed = 100 * num_events + num_candidates
    requests = [parse_request(draw_raw_request(SCHEMA, num_events, num_candidates, seed), SCHEMA)]
    merged = merged_logits(paths, requests, chunk_rows=40)
    assert largest_difference(merged, shared_logits(paths, requests)) <= LOGIT_TOLERANCE


@pytest.mark.parametrize("chunk_rows", [1, 17, 10_000])
def test_merged_scores_of_ragged_users_do_not_depend_on_the_chunk(
    paths: Paths, chunk_rows: int
) -> None:
    requests = draw_ragged_requests(SCHEMA, seed=7)
    merged = merged_logits(paths, requests, chunk_rows)
    assert largest_difference(merged, shared_logits(paths, requests)) <= LOGIT_TOLERANCE


@pytest.mark.parametrize(("token_dim", "output_dim"), [(DIM, DIM), (DIM + 3, DIM + 5)])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("num_events", [1, 6])
def test_merged_vectors_equal_the_reference(
    num_layers: int, num_events: int, token_dim: int, output_dim: int
) -> None:
    torch.manual_seed(10 * num_layers + num_events)
    widths = {"token_dim": token_dim, "output_dim": output_dim}
    spec = TowerSpec(CAUSAL, DIM, num_layers, NUM_HEADS, **widths)
    tower = HistoryTower(spec, HISTORY, HISTORY).eval()
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    events, candidates = torch.randn(num_events, token_dim), torch.randn(3, 1, token_dim)
    times = torch.randint(0, 1000, (num_events,)).sort().values
    with torch.no_grad():
        pooled = pool_without_sharing(tower, events, 1000 - times, candidates, chunk_rows=40)
        expected = torch.stack(
            [
                reference_tower(
                    tower.state_dict(),
                    ReferenceOptions(CAUSAL, NUM_HEADS),
                    events,
                    times.tolist(),
                    candidate,
                    1000,
                )
                for candidate in candidates
            ]
        )
    assert largest_difference(pooled.double(), expected) <= VECTOR_TOLERANCE


def paths_of(encoder: str, num_tokens: int, longest: int) -> Paths:
    """Return a model of any kind with no weights at zero."""
    sizes = ModelSizes(dim=DIM, num_layers=NUM_LAYERS, num_heads=NUM_HEADS, num_tokens=num_tokens)
    schema = make_schema(longest, num_users=5, block=MERGE)
    return Paths(schema, make_dlrm(schema, sizes, seed=4, encoder=encoder), page_size=5)


@pytest.mark.parametrize("num_tokens", [1, 2])
@pytest.mark.parametrize("encoder", KINDS)
def test_merged_scores_equal_shared_ones_for_every_kind(encoder: str, num_tokens: int) -> None:
    """Some of these histories of ``longer`` have an open group, or groups that stop early."""
    paths = paths_of(encoder, num_tokens, longest=48)
    for seed, num_events in enumerate((1, 7, 33, 48)):
        raw = draw_raw_request(paths.schema, num_events, 6, seed)
        requests = [parse_request(raw, paths.schema)]
        shared = shared_logits(paths, requests)
        for chunk_rows in (1, 3 * num_events):
            merged = merged_logits(paths, requests, chunk_rows)
            assert largest_difference(merged, shared) <= LOGIT_TOLERANCE
        # The history changes the scores; otherwise the two would agree without reading it.
        without = parse_request(raw | {"history": {c: [] for c in raw["history"]}}, paths.schema)
        assert largest_difference(shared, shared_logits(paths, [without])) > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("encoder", KINDS)
def test_merged_vectors_of_two_tokens_equal_shared_ones(encoder: str) -> None:
    paths = paths_of(encoder, num_tokens=2, longest=40)
    [tower] = paths.model.collection.towers()
    events, candidates = torch.randn(38, DIM), torch.randn(5, 2, DIM)
    elapsed = torch.randint(0, 10_000, (38,)).sort(descending=True).values
    ends = torch.tensor([0, 38])
    kv = flat_pages(tower.prefill(events, ends), tower.encoder.row_offsets(ends))
    visibility = Visibility(-elapsed, torch.zeros(5).long(), torch.full([5], 38))
    shared = tower.attend(*tower.enter(candidates), torch.tensor([0, 5]), kv, visibility, ends)
    for chunk_rows in (1, 80, 1000):
        merged = pool_without_sharing(tower, events, elapsed, candidates, chunk_rows)
        assert largest_difference(merged, shared) <= VECTOR_TOLERANCE


def test_the_merged_model_owns_no_weights(paths: Paths) -> None:
    merged = paths.merged(chunk_rows=40)
    owned = {tensor.data_ptr() for tensor in (*paths.ranker.parameters(), *paths.ranker.buffers())}
    assert {tensor.data_ptr() for tensor in (*merged.parameters(), *merged.buffers())} == owned


def test_the_model_keeps_its_own_collection(paths: Paths) -> None:
    before = paths.ranker.sparse_arch.embedding_bag_collection
    paths.merged(chunk_rows=40)
    assert paths.ranker.sparse_arch.embedding_bag_collection is before

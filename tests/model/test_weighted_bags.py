"""A DLRM of one's own whose bags have weights beside their ids: TorchRec's ``is_weighted``."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from tests.oracle import reference_logits
from tests.worlds import (
    CAUSAL_SPEC,
    DIM,
    LOGIT_TOLERANCE,
    SCHEMA,
    draw_raws,
    parse_all,
    random_weights,
)
from torchrec_kvshare.errors import ConfigError, ShapeError
from torchrec_kvshare.export.exporter import export_model
from torchrec_kvshare.export.torchscript import script_model
from torchrec_kvshare.features.batches import (
    RequestBatch,
    collate,
    collate_candidates,
    collate_history,
    with_pages,
    with_weights,
)
from torchrec_kvshare.features.schema import HISTORY
from torchrec_kvshare.model.bags import UserCandidateBags
from torchrec_kvshare.model.collection import KVShareEmbeddingBagCollection, kvshare_collection
from torchrec_kvshare.model.ranking import RankingFunctions, RankingModel
from torchrec_kvshare.scoring.engine import Engine

GENRES = "candidates.genres"
USERS = [(9, 3, 1), (0, 2, 2), (1, 4, 3)]  # events, candidates, seed


def new_dlrm(*, is_weighted: bool) -> DLRM:
    """Make a DLRM over TorchRec's own collection; its weights do not depend on ``is_weighted``."""
    ours = kvshare_collection(SCHEMA, CAUSAL_SPEC)
    tables = ours.bags.embedding_bag_configs()
    bags = EmbeddingBagCollection(tables=tables, is_weighted=is_weighted)
    towers = {HISTORY: ours.towers()[0]}
    collection = KVShareEmbeddingBagCollection(bags, ours.token_embeddings, towers, SCHEMA)
    model = DLRM(collection, SCHEMA.num_dense, [9, DIM], [9, 1])
    random_weights(model, 17)
    return model.eval()


@pytest.fixture(scope="module")
def dlrm() -> DLRM:
    return new_dlrm(is_weighted=True)


@pytest.fixture(scope="module")
def model(dlrm: DLRM) -> RankingModel:
    return RankingModel(dlrm).eval()


def drawn_weights(raws: list[dict[str, Any]], seed: int = 5) -> list[list[list[float]]]:
    """Draw a weight for each genre of each candidate of each request; some are negative."""
    rng = np.random.default_rng(seed)
    return [
        [rng.normal(1.0, 0.7, len(genres)).round(2).tolist() for genres in of_candidates]
        for of_candidates in (raw["candidates"]["genres"] for raw in raws)
    ]


def flat(weights: list[list[list[float]]]) -> dict[str, Tensor]:
    return {GENRES: torch.tensor([w for raw in weights for bag in raw for w in bag])}


def score(model: RankingFunctions, batch: Batch, weights: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(batch.dense_features, with_weights(batch.sparse_features, weights))


def score_over_pages(
    model: RankingFunctions, raws: list[dict[str, Any]], weights: dict[str, Tensor]
) -> Tensor:
    """Score over K/V in pages of one row, and over projected candidates."""
    batch = RequestBatch(parse_all(raws))
    with torch.no_grad():
        [kv] = model.prefill(collate_history(batch, SCHEMA).sparse_features)
        asked = collate_candidates(batch, SCHEMA)
        ends = np.cumsum([user.num_events for user in batch.users]).tolist()
        pages = [
            list(range(end - user.num_events, end))
            for user, end in zip(batch.users, ends, strict=True)
        ]
        features = with_weights(asked.sparse_features, weights)
        features = with_pages(features, SCHEMA, [pages])
        items = model.project_candidates(features)
        return model.score(asked.dense_features, features, [kv.unsqueeze(2)], items)


def test_weights_scale_the_rows_of_their_ids_on_every_path(dlrm: DLRM, model: RankingModel) -> None:
    """Page ids were added to a batch by a new batch, which had no weights any more."""
    raws = draw_raws(USERS)
    weights = drawn_weights(raws)
    expected = torch.cat(
        [
            reference_logits(dlrm, SCHEMA, raw, {GENRES: of_raw})
            for raw, of_raw in zip(raws, weights, strict=True)
        ]
    )
    unweighted = torch.cat([reference_logits(dlrm, SCHEMA, raw) for raw in raws])
    assert (expected - unweighted).abs().max() > 100 * LOGIT_TOLERANCE
    program = script_model(model)
    for scored_by in (model, program):
        for logits in (
            score(scored_by, collate(parse_all(raws), SCHEMA), flat(weights)),
            score_over_pages(scored_by, raws, flat(weights)),
        ):
            torch.testing.assert_close(logits.double(), expected, rtol=0.0, atol=LOGIT_TOLERANCE)


def test_weights_of_one_are_no_weights(model: RankingModel) -> None:
    batch = collate(parse_all(draw_raws(USERS)), SCHEMA)
    plain = RankingModel(new_dlrm(is_weighted=False)).eval()
    with torch.no_grad():
        expected = plain(batch.dense_features, batch.sparse_features)
    assert torch.equal(score(model, batch, {}), expected)


def test_history_rows_do_not_read_weights(model: RankingModel) -> None:
    """So K/V needs no weights in its identity."""
    features = collate(parse_all(draw_raws(USERS)), SCHEMA).sparse_features
    ids = features[f"{HISTORY}.genres"].values().size(0)
    weighted = with_weights(features, {f"{HISTORY}.genres": torch.full((ids,), 9.0)})
    assert torch.equal(model.prefill(weighted)[0], model.prefill(features)[0])


def test_a_weighted_table_learns_by_its_weights() -> None:
    dlrm = new_dlrm(is_weighted=True).train()
    raws = draw_raws(USERS)
    batch = collate(parse_all(raws), SCHEMA)
    no_weight = {key: torch.zeros_like(one) for key, one in flat(drawn_weights(raws)).items()}
    dlrm(batch.dense_features, with_weights(batch.sparse_features, no_weight)).sum().backward()
    bags = dlrm.sparse_arch.embedding_bag_collection.bags.embedding_bags
    assert not bags["bag_items_genres"].weight.grad.any()
    assert bags["bag_item_id"].weight.grad.any()


def test_weights_of_another_number_or_key_are_refused() -> None:
    features = collate(parse_all(draw_raws(USERS)), SCHEMA).sparse_features
    with pytest.raises(ShapeError, match=r"weights of shape \[2\]; its \d+ ids have one each"):
        with_weights(features, {GENRES: torch.ones(2)})
    with pytest.raises(ShapeError, match=r"weights for \['genre'\]; the batch has \['user_id'"):
        with_weights(features, {"genre": torch.ones(2)})


def test_what_scores_requests_refuses_weighted_bags(model: RankingModel, tmp_path: Path) -> None:
    """Requests have no weights: the first one failed inside TorchRec, which found none."""
    with pytest.raises(ConfigError, match="requests have no weights"):
        Engine(model, SCHEMA, None)
    with pytest.raises(ConfigError, match="requests have no weights"):
        export_model(model, SCHEMA, tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()


def test_bags_of_one_stride_refuse_weights() -> None:
    ours = kvshare_collection(SCHEMA, CAUSAL_SPEC).bags
    assert isinstance(ours, UserCandidateBags)
    tables = ours.candidate_bags.embedding_bag_configs()
    with pytest.raises(ConfigError, match="selects ids without their weights"):
        UserCandidateBags(ours.user_bags, EmbeddingBagCollection(tables=tables, is_weighted=True))

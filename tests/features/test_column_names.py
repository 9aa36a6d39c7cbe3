"""Columns may have any name, also names that the package uses itself."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.oracle import reference_logits
from tests.worlds import (
    CAUSAL_SPEC,
    LOGIT_TOLERANCE,
    PROBABILITY_TOLERANCE,
    make_dlrm,
    parse_all,
)
from torchrec_kvshare.config import CacheConfig
from torchrec_kvshare.data.dataset import build_dataset
from torchrec_kvshare.data.draws import Draws
from torchrec_kvshare.data.interactions import InteractionLog, ReadReport
from torchrec_kvshare.data.splits import TRAIN
from torchrec_kvshare.data.tables import encode
from torchrec_kvshare.data.targets import build_batch, sample_negatives, windows_of
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.export.exporter import export_model, load_artifact
from torchrec_kvshare.export.open import new_engine
from torchrec_kvshare.features.batches import collate
from torchrec_kvshare.features.draw import draw_raw_request
from torchrec_kvshare.features.schema import (
    UNNAMED_TASK,
    FeatureSchema,
    History,
    Vocabulary,
    Window,
    context_key,
    event_key,
    item_key,
    table_name,
)
from torchrec_kvshare.model.ranking import RankingModel, dlrm_with_history
from torchrec_kvshare.serving.columns import column_tensors, raw_requests

# Names of our own, names that modules and TorchScript refuse, and one on both sides.
CONTEXT = ("user_id", "item_id", "time", "first_event", "a.b", "Customer ID", "kind")
ATTRIBUTES = ("user_id", "position", "pages", "first_index", "a.b", "items", "größe %", "kind")
EVENT_ATTRIBUTES = ("action", "context", "events", "x.y", "item id")
FLOATS = ("dense", "values", "visible_events.history", "class")
NAMES = ("user id", "1st")  # of histories


def odd_schema() -> FeatureSchema:
    keys = ["user_id", "item_id", *map(context_key, CONTEXT), *map(item_key, ATTRIBUTES)]
    keys += map(event_key, EVENT_ATTRIBUTES)
    # Vocabularies differ in size, so that a mix-up gives wrong rows.
    vocabularies = {
        key: Vocabulary([f"{key} {index}" for index in range(3 + number)])
        for number, key in enumerate(keys)
    }
    histories = tuple(History(name, Window(8, 4)) for name in NAMES)
    return FeatureSchema(
        vocabulary_by_column=vocabularies,
        context=CONTEXT,
        event_attributes=EVENT_ATTRIBUTES,
        item_attributes=ATTRIBUTES,
        item_floats=FLOATS,
        histories=histories,
    )


SCHEMA = odd_schema()
RAWS = [
    draw_raw_request(SCHEMA, events, 3, 50 + events) | {"user_id": f"user_id {events}"}
    for events in (0, 5, 11)
]


def test_scores_of_odd_columns_equal_the_reference() -> None:
    """An attribute named ``user_id`` took the users' vocabulary, ``position`` the positions."""
    model = make_dlrm(seed=3, schema=SCHEMA)
    expected = torch.cat([reference_logits(model, SCHEMA, raw) for raw in RAWS])
    batch = collate(parse_all(RAWS, SCHEMA), SCHEMA)
    with torch.no_grad():
        got = model(batch.dense_features, batch.sparse_features)
    torch.testing.assert_close(got.double(), expected, rtol=0.0, atol=LOGIT_TOLERANCE)


def test_an_artifact_of_odd_columns_scores_cached_as_uncached(tmp_path: Path) -> None:
    model = make_dlrm(seed=3, schema=SCHEMA)
    export_model(RankingModel(model).eval(), SCHEMA, tmp_path / "a")
    artifact = load_artifact(tmp_path / "a")
    engine = new_engine(artifact, CacheConfig(capacity_bytes=2**22))
    raws = RAWS[1:]  # A user without events has nothing to cache.
    requests = parse_all(raws, artifact.schema)
    expected = torch.cat([reference_logits(model, SCHEMA, raw) for raw in raws]).sigmoid()
    for status in ("miss", "hit"):
        answers = engine.rank(requests)
        assert [answer.cache.status for answer in answers] == [status] * 2
        scores = [score for answer in answers for score in answer.scores]
        assert scores == pytest.approx(expected.flatten().tolist(), abs=PROBABILITY_TOLERANCE)


def test_tensors_of_odd_columns_come_back_as_they_went() -> None:
    tensors = column_tensors(RAWS, SCHEMA)
    back = raw_requests(tensors, SCHEMA, len(RAWS))
    for raw, other in zip(parse_all(RAWS, SCHEMA), parse_all(back, SCHEMA), strict=True):
        assert raw.user_row == other.user_row
        for column in CONTEXT:
            assert torch.equal(raw.context[column], other.context[column])
        for column in EVENT_ATTRIBUTES:
            for name in NAMES:
                ours, theirs = raw.events_by_history[name], other.events_by_history[name]
                assert torch.equal(ours.columns[column], theirs.columns[column])
        for column in ATTRIBUTES:
            assert torch.equal(raw.candidate_bags[column][0], other.candidate_bags[column][0])
        assert torch.equal(raw.dense, other.dense)


def test_a_log_of_odd_columns_trains_on_each_column_s_own_ids() -> None:
    num_events, num_items = 24, 4
    log = InteractionLog(
        users=encode(["u", "v"] * (num_events // 2)),
        items=encode([f"item {index % num_items}" for index in range(num_events)]),
        time=np.arange(num_events),
        labels={UNNAMED_TASK: np.ones(num_events, np.float32)},
        event_attributes={
            name: encode([f"{name} of event"] * num_events) for name in EVENT_ATTRIBUTES
        },
        item_attributes={name: [(f"{name} of item",)] * num_items for name in ATTRIBUTES},
        item_floats={name: np.ones(num_items, np.float32) for name in FLOATS},
        user_attributes={name: [(f"{name} of user",)] * 2 for name in CONTEXT},
        report=ReadReport(num_events, num_events, {}, []),
    )
    dataset = build_dataset(log, [History(name, Window(8, 4)) for name in NAMES])
    vocabularies = dataset.schema.vocabulary_by_column
    for name in CONTEXT:
        assert vocabularies[context_key(name)].examples == (f"{name} of user",)
    for name in EVENT_ATTRIBUTES:
        assert vocabularies[event_key(name)].examples == (f"{name} of event",)
    for name in ATTRIBUTES:
        assert vocabularies[item_key(name)].examples == (f"{name} of item",)
    windows = windows_of(dataset, np.flatnonzero(dataset.split == TRAIN))
    draws = Draws(0)
    negatives = sample_negatives(dataset, windows.targets, 1, draws)
    candidates = np.concatenate([dataset.item[windows.targets][:, None], negatives], axis=1)
    batch = build_batch(dataset, windows, candidates, draws)
    model = dlrm_with_history(dataset.schema, CAUSAL_SPEC, [9, 1])
    logits = model(batch.dense_features, batch.sparse_features)
    assert logits.shape == (candidates.size, 1)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", ["item_id", "action", "time", "first_event"])
@pytest.mark.parametrize("kind", ["attribute", "float"])
def test_an_item_column_has_no_reserved_name_of_events(name: str, kind: str) -> None:
    attributes, floats = ((name,), ()) if kind == "attribute" else ((), (name,))
    with pytest.raises(ConfigError, match=rf"\['{name}'\].*'item_id', 'action', 'time'"):
        replace(SCHEMA, item_attributes=attributes, item_floats=floats)


def test_two_columns_do_not_have_one_name() -> None:
    with pytest.raises(ConfigError, match="'price'"):
        replace(SCHEMA, item_attributes=("price",), item_floats=("price",))
    with pytest.raises(ConfigError, match="'a'"):
        replace(SCHEMA, context=("a", "b", "a"))


def test_a_history_has_no_name_of_a_group_of_keys() -> None:
    for name in ("context", "candidates", "request", "targets", "user_id", ""):
        with pytest.raises(ConfigError, match="histories"):
            replace(SCHEMA, histories=(History(name, Window(8, 4)),))


def test_names_of_tables_differ_where_columns_do() -> None:
    keys = [*map(context_key, CONTEXT), *map(item_key, ATTRIBUTES), "user_id", "item_id"]
    keys += map(event_key, EVENT_ATTRIBUTES)
    names = [table_name(key) for key in keys]
    assert len(set(names)) == len(keys)
    assert all(f"t_{name}".isidentifier() and name.isascii() for name in names)

"""Tensors of requests match their specifications, row for row."""

from typing import Any

import pytest
import torch

from tests.encoder_worlds import TWO_HISTORIES, draw_buyer
from tests.worlds import MAX_HISTORY, SCHEMA, draw_raw, parse_all
from torchrec_kvshare.features.schema import FeatureSchema
from torchrec_kvshare.features.tensors import INT64, input_specs, request_tensors, user_key

SIZES = [(9, 4, 1), (0, 3, 2), (20, 2, 3)]


@pytest.mark.parametrize("schema", [SCHEMA, TWO_HISTORIES], ids=["one history", "two histories"])
def test_tensors_are_those_that_the_specifications_name(schema: FeatureSchema) -> None:
    raws = [draw_buyer(f"user {n}", events, candidates, n) for events, candidates, n in SIZES]
    tensors = request_tensors(parse_all(raws, schema), schema)
    specs = input_specs(schema)
    assert list(tensors) == [spec.name for spec in specs]
    for spec in specs:
        tensor = tensors[spec.name]
        assert tensor.dtype == (torch.int64 if spec.dtype == INT64 else torch.float32)
        assert [size if size >= 0 else -1 for size in spec.shape[1:]] == list(tensor.shape[1:])
        if tensor.numel():
            assert spec.least is None or int(tensor.min()) >= spec.least
            assert spec.most is None or int(tensor.max()) <= spec.most


def test_bounds_are_those_of_tables_and_windows() -> None:
    most = {spec.name: spec.most for spec in input_specs(SCHEMA)}
    assert most["history.item_id.values"] == SCHEMA.num_table_rows("item_id") - 1
    assert most["history.time.lengths"] == MAX_HISTORY
    assert most["candidates.item_id.lengths"] == 100_000
    assert most["candidates.genres.lengths"] == most["context.country.lengths"] == 10_000
    assert most["user_key"] is None


def test_requests_lie_one_after_the_other() -> None:
    raws: list[dict[str, Any]] = [draw_raw(*sizes) for sizes in SIZES]
    requests = parse_all(raws)
    together = request_tensors(requests, SCHEMA)
    alone = [request_tensors([request], SCHEMA) for request in requests]
    for name, tensor in together.items():
        assert torch.equal(tensor, torch.cat([one[name] for one in alone]))
    assert together["history.item_id.lengths"].tolist() == [9, 0, 13]
    assert together["history.first_event"].tolist() == [0, 0, 7]
    assert together["candidates.item_id.lengths"].tolist() == [4, 3, 2]
    assert together["user_id"].tolist() == [request.user_row for request in requests]


def test_a_users_key_is_the_same_in_every_process() -> None:
    assert user_key("7") == -9038873097560174361
    assert user_key("7") != user_key("07")
    assert -(2**63) <= user_key("\ud800") < 2**63

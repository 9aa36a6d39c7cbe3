"""Whatever changes K/V changes its identity, and nothing else does."""

import copy
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torchrec.models.dlrm import DLRM

from tests.worlds import CAUSAL_SPEC, SCHEMA, draw_raw, make_dlrm, new_interpreter
from torchrec_kvshare.cache.identity import NO_CONTEXT, Identity, PrefixDigests, model_digest
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.features.schema import (
    HISTORY,
    MAX_EXAMPLES,
    FeatureSchema,
    Hashed,
    Vocabulary,
)

RawRequest = dict[str, Any]

BLOCK = 3  # events
IDENTITY = Identity("model", "tables", NO_CONTEXT, tower=HISTORY, block=BLOCK)


def digests_of(raw: RawRequest) -> PrefixDigests:
    return PrefixDigests(parse_request(raw, SCHEMA).events_by_history[HISTORY], SCHEMA, IDENTITY)


def digest_of(raw: RawRequest) -> bytes:
    return digests_of(raw).whole


def events(**columns: list[Any]) -> RawRequest:
    """A request with a history of two known events, except for the given columns."""
    history = {
        "item_id": [101, 104],
        "action": ["view", "buy"],
        "genres": [["genre 1"], ["genre 2", "genre 3"]],
        "time": [1_600_000_000, 1_600_000_500],
    }
    return draw_raw(0, 2, 1) | {"time": 1_700_000_000, "history": history | columns}


def test_a_digest_is_of_sixteen_bytes() -> None:
    assert len(digest_of(events())) == 16


@pytest.mark.parametrize(
    "other",
    [
        events(item_id=[101, 105]),
        events(item_id=[104, 101]),
        events(item_id=[101, None]),
        events(item_id=[101, "never seen"]),
        events(action=["view", "rate"]),
        events(action=["buy", "view"]),
        events(time=[1_600_000_000, 1_600_000_501]),
        events(time=[1_600_000_500, 1_600_000_500]),
        events(genres=[["genre 1", "genre 2"], ["genre 3"]]),
        events(genres=[["genre 1"], ["genre 3", "genre 2"]]),
        events(genres=[["genre 1"], ["genre 2"]]),
        events(genres=[[], []]),
        events(item_id=[101], action=["view"], genres=[["genre 1"]], time=[1_600_000_000]),
        events(item_id=[104], action=["buy"], genres=[["genre 2", "genre 3"]], time=[16 * 10**8]),
        events(item_id=[], action=[], genres=[], time=[]),
        events(
            item_id=[101, 104, 104],
            action=["view", "buy", "buy"],
            genres=[["genre 1"], ["genre 2", "genre 3"], []],
            time=[1_600_000_000, 1_600_000_500, 1_600_000_600],
        ),
    ],
)
def test_any_edit_of_an_event_is_another_history(other: RawRequest) -> None:
    assert digest_of(other) != digest_of(events())


histories = st.lists(
    st.tuples(
        st.none() | st.integers(99, 112),
        st.sampled_from([None, "view", "buy", "rate", "new"]),
        st.lists(st.sampled_from([f"genre {index}" for index in range(8)]), max_size=3),
        st.integers(0, 9),  # Small times, which could be mistaken for table rows.
    ),
    max_size=5,
).map(lambda drawn: sorted(drawn, key=lambda event: event[-1]))


def history_of(drawn: list[tuple[Any, ...]]) -> RawRequest:
    names = ("item_id", "action", "genres", "time")
    return events(**{name: [event[index] for event in drawn] for index, name in enumerate(names)})


@given(histories, histories)
def test_histories_have_one_digest_if_and_only_if_the_model_reads_the_same(
    one: list[tuple[Any, ...]], other: list[tuple[Any, ...]]
) -> None:
    def rows(drawn: list[tuple[Any, ...]]) -> list[Any]:
        read = parse_request(history_of(drawn), SCHEMA).events_by_history[HISTORY]
        return [
            *(read.columns[column].tolist() for column in ("item_id", "action", "time")),
            *(bags.tolist() for bags in read.bags["genres"]),
        ]

    same = rows(one) == rows(other)
    assert (digest_of(history_of(one)) == digest_of(history_of(other))) == same


def test_two_events_are_not_taken_for_one_with_many_genres() -> None:
    """The digest did not cover the number of events: two events without genres and with tiny times
    had the same bytes as one event with those times as genres, so its K/V would have been used."""
    genres = SCHEMA.vocabulary_by_column["items.genres"].row
    items = SCHEMA.vocabulary_by_column["item_id"].row
    actions = SCHEMA.vocabulary_by_column["events.action"].row
    # The bytes, as rows: actions 2 3 | items 3 4 | times 2 5 | genres per event 0 0.
    two = events(item_id=[101, 102], action=["view", "buy"], time=[2, 5], genres=[[], []])
    assert [actions("view"), actions("buy"), items("101"), items("102")] == [2, 3, 3, 4]
    # Action 2 | item 3 | time 3 | 4 genres: rows 2 5 0 0.
    one = events(
        item_id=["101"], action=["view"], time=[3], genres=[["genre 0", "genre 3", None, None]]
    )
    assert [genres("genre 0"), genres("genre 3"), genres(None)] == [2, 5, 0]
    assert digest_of(two) != digest_of(one)


@given(st.integers(0, 30), st.integers(0, 2**32 - 1))
def test_only_the_history_is_in_its_digest(num_events: int, seed: int) -> None:
    raw = draw_raw(num_events, 3, seed)
    other = draw_raw(2, 4, seed + 1) | {"history": raw["history"], "time": raw["time"] + 9}
    assert digest_of(other) == digest_of(raw)


@given(histories)
def test_a_prefix_has_the_digest_of_the_history_that_ends_there(
    drawn: list[tuple[Any, ...]],
) -> None:
    digests = digests_of(history_of(drawn))
    for length in range(len(drawn) + 1):
        assert digests.at(length) == digest_of(history_of(drawn[:length]))
    multiples = range(BLOCK, len(drawn) + 1, BLOCK)
    assert digests.blocks == tuple(digests.at(length) for length in multiples)


def test_events_before_the_window_are_not_in_the_digest() -> None:
    raw = draw_raw(20, 1, 6)  # The window starts at event 7.
    edited = copy.deepcopy(raw)
    edited["history"]["item_id"][6] = "108"
    assert digest_of(edited) == digest_of(raw)
    edited["history"]["item_id"][7] = "108"
    assert digest_of(edited) != digest_of(raw)


def test_an_id_as_integer_and_as_text_is_the_same_id() -> None:
    assert digest_of(events(item_id=["101", "104"])) == digest_of(events())


def test_digests_are_the_same_in_every_process() -> None:
    program = """
from tests.worlds import SCHEMA, draw_raw, make_dlrm
from tests.cache.test_identity import digests_of
from torchrec_kvshare.cache.identity import model_digest
print(digests_of(draw_raw(9, 2, 5)).whole.hex())
print(model_digest(make_dlrm(4).state_dict(), {"schema": SCHEMA.to_json(), "encoder": "x"}))
"""
    # Not the seed of this process, unless it was given.
    output, errors = new_interpreter(program, PYTHONHASHSEED="1").communicate()
    described = {"schema": SCHEMA.to_json(), "encoder": "x"}
    model = model_digest(make_dlrm(4).state_dict(), described)
    assert output.split() == [digest_of(draw_raw(9, 2, 5)).hex(), str(model)], errors


def description(schema: FeatureSchema = SCHEMA) -> dict[str, Any]:
    return {"encoder": asdict(CAUSAL_SPEC), "schema": schema.to_json()}


@pytest.mark.parametrize(
    "name", ["encoder.time_bias", "token_item_id.weight", "bag_user_id.weight", "model.1.bias"]
)
def test_another_weight_or_row_is_another_model(dlrm: DLRM, name: str) -> None:
    state = copy.deepcopy(dlrm.state_dict())
    before = model_digest(state, description())
    assert before == model_digest(dlrm.state_dict(), description())
    edited = [weight for full_name, weight in state.items() if full_name.endswith(name)]
    assert edited
    edited[0].flatten()[-1] += 1e-6
    assert model_digest(state, description()) != before


def test_another_window_is_another_model(dlrm: DLRM) -> None:
    other = description()
    other["schema"]["histories"][0]["window"]["block"] = 2
    state = dlrm.state_dict()
    assert model_digest(state, other) != model_digest(state, description())


def test_another_map_from_ids_to_rows_is_another_model(dlrm: DLRM) -> None:
    """Each of these has the weights of the others; only the rows of some ids differ."""
    known = [f"item {number}" for number in range(MAX_EXAMPLES + 50)]
    one, two = known[1:3]  # only one of them is among the examples
    maps = [
        Vocabulary(known),
        Vocabulary([known[0], two, one, *known[3:]]),
        Vocabulary([*known[:-1], "another"]),
        Hashed(7, salt=0),
        Hashed(7, salt=1),
        Hashed(8, salt=0),
    ]
    vocabularies = SCHEMA.vocabulary_by_column
    digests = [
        model_digest(
            dlrm.state_dict(),
            description(
                replace(SCHEMA, vocabulary_by_column=vocabularies | {"item_id": map_of_ids})
            ),
        )
        for map_of_ids in maps
    ]
    assert len(set(digests)) == len(maps)
    assert digests[0] == model_digest(
        dlrm.state_dict(),
        description(
            replace(SCHEMA, vocabulary_by_column=vocabularies | {"item_id": Vocabulary(known)})
        ),
    )


def test_the_same_bytes_under_another_shape_type_or_name_are_another_model() -> None:
    weight = torch.arange(6.0)
    digests = [
        model_digest(state, {})
        for state in (
            {"a": weight},
            {"b": weight},
            {"a": weight.view(2, 3)},
            {"a": weight.view(torch.int32)},
            {"a": weight[:3], "b": weight[3:]},
        )
    ]
    assert len(set(digests)) == 5


@given(st.permutations(["layer", "table", "bias"]))
def test_the_order_of_a_state_dict_does_not_matter(names: list[str]) -> None:
    assume(names != sorted(names))
    state = {name: torch.full((2, 3), float(len(name))) for name in names}
    assert model_digest(state, {}) == model_digest(dict(sorted(state.items())), {})

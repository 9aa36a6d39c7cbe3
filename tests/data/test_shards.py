"""A log cut into shards is the log: its users, splits, windows, draws and requests are the same."""

import json
import shutil
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.folders import write_folder
from tests.data.logs import (
    ITEMS,
    START_TIME,
    SURFACES,
    Event,
    all_events,
    drawn_events,
    event_lists,
    log_of,
)
from tests.worlds import examples
from torchrec_kvshare.config import PreparedData
from torchrec_kvshare.data.dataset import (
    NO_MAPS,
    Dataset,
    Ints,
    JaggedRows,
    build_dataset,
    keep_users,
)
from torchrec_kvshare.data.digest import data_digest
from torchrec_kvshare.data.draws import Draws
from torchrec_kvshare.data.load import load_log, load_shards
from torchrec_kvshare.data.requests import make_requests
from torchrec_kvshare.data.shards import Shards, in_memory, open_prepared
from torchrec_kvshare.data.split_report import split_report
from torchrec_kvshare.data.splits import BY_TIME_SHARE, TEST, TRAIN, SplitRule, split_rule
from torchrec_kvshare.data.targets import build_batch, sample_negatives, windows_of
from torchrec_kvshare.errors import ConfigError, DataError, MissingExtraError
from torchrec_kvshare.features.schema import History, Window

HISTORIES = [*all_events(8, 4), History("bought", Window(6, 2), ("buy",))]
NUM_SHARDS = (1, 3, 4)
RULES = (
    BY_TIME_SHARE,
    split_rule("leave_one_out"),
    split_rule("time", [START_TIME + 2, START_TIME + 30_000]),
)


def events() -> list[Event]:
    """Users of 1 to 40 events, among them some that are spelt as numbers and one that is short."""
    rng = np.random.default_rng(5)
    users = ["7", "12", "007", "u", "vv", "www", "-3", "éa", "short"]
    lengths = [23, 4, 40, 17, 9, 31, 12, 26, 1]
    return [
        Event(
            user,
            str(rng.choice(ITEMS)),
            START_TIME + 3_000 * int(rng.integers(25)),
            str(rng.choice(["view", "buy", "rate"])),
            int(rng.integers(2)),
            SURFACES[int(rng.integers(3))],
        )
        for user, length in zip(users, lengths, strict=True)
        for _ in range(length)
    ]


@pytest.fixture(scope="module")
def whole() -> Dataset:
    return build_dataset(log_of(events()), HISTORIES)


@pytest.fixture(scope="module", params=NUM_SHARDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prepared") / "folder"
    return write_folder(log_of(events()), path, request.param)


@pytest.fixture(scope="module")
def shards(folder: Path) -> Shards:
    return open_prepared(folder, HISTORIES)


def assert_same_items(found: Dataset, expected: Dataset) -> None:
    """Compare what all shards share."""
    assert found.schema.to_json() == expected.schema.to_json()
    assert found.known_ids == expected.known_ids
    assert found.num_colliding_ids == expected.num_colliding_ids
    for name in ("item_row", "known_items", "item_floats"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
    for name, rows in expected.item_attributes.items():
        assert_same_rows(found.item_attributes[name], rows)
    for name, column in expected.log.event_attributes.items():
        assert found.log.event_attributes[name].ids == column.ids
        ours, theirs = found.event_attributes[name], expected.event_attributes[name]
        assert ours.row_by_code.tolist() == theirs.row_by_code.tolist()
    for name in ("item_attributes", "item_floats", "items"):
        ours, theirs = getattr(found.log, name), getattr(expected.log, name)
        if name == "items":
            assert ours.ids == theirs.ids
        elif name == "item_floats":
            assert {key: column.tolist() for key, column in ours.items()} == {
                key: column.tolist() for key, column in theirs.items()
            }
        else:
            assert ours == theirs


def assert_same_rows(found: JaggedRows, expected: JaggedRows) -> None:
    assert found.values.tolist() == expected.values.tolist()
    assert found.offsets.tolist() == expected.offsets.tolist()


def assert_same_users(part: Dataset, whole: Dataset) -> None:
    """Compare users and events of a part with those of the whole log."""
    for user, code in enumerate(part.user_code.tolist()):
        ours = slice(*part.user_offsets[user : user + 2].tolist())
        theirs = slice(*whole.user_offsets[code : code + 2].tolist())
        for name in ("item", "time", "labels", "num_earlier", "split"):
            assert np.array_equal(getattr(part, name)[ours], getattr(whole, name)[theirs]), name
        assert part.keys_of(np.arange(ours.start, ours.stop)).tolist() == list(
            range(theirs.start, theirs.stop)
        )
        assert part.log.users.ids[user] == whole.log.users.ids[code]
        assert part.user_row[user] == whole.user_row[code]
        for name, values in whole.log.user_attributes.items():
            assert part.log.user_attributes[name][user] == values[code]
        assert part.user_floats[user].tolist() == whole.user_floats[code].tolist()
        for name in ("request_floats", "event_floats"):
            assert getattr(part, name)[ours].tolist() == getattr(whole, name)[theirs].tolist()
        for name, rows in whole.context.items():
            one, other = np.array([user]), np.array([code])
            assert part.context[name].take(one)[0].tolist() == rows.take(other)[0].tolist()
        for name, column in whole.event_attributes.items():
            found_rows = part.event_attributes[name].take(ours)
            assert found_rows.tolist() == column.take(theirs).tolist()
        for name, of_events in whole.request_context.items():
            found = part.request_context[name].take(np.arange(ours.start, ours.stop))
            expected = of_events.take(np.arange(theirs.start, theirs.stop))
            assert [one.tolist() for one in found] == [one.tolist() for one in expected]


def test_the_columns_of_a_data_set_are_all_compared() -> None:
    """A column that is added later must be compared here too."""
    assert {field.name for field in fields(Dataset)} == {
        *("log", "schema", "user_code", "first_event", "user_offsets", "item", "time"),
        *(
            "labels",
            "num_earlier",
            "split",
            "user_row",
            "item_row",
            "known_items",
            "event_attributes",
        ),
        *("item_attributes", "item_floats", "context", "request_context", "indices_by_history"),
        *("user_floats", "request_floats", "event_floats"),
        *("num_before_by_history", "known_ids", "num_colliding_ids", "num_unknown_ids"),
    }


def test_shards_have_the_users_of_the_log_each_once(shards: Shards, whole: Dataset) -> None:
    met = []
    for number, part in enumerate(shards):
        assert (part.user_code % shards.num_shards == number).all()
        assert_same_users(part, whole)
        assert_same_items(part, whole)
        assert part.item_row is shards.shared.item_row
        assert part.item_attributes is shards.shared.item_attributes
        surfaces = [one.request_context["surface"].rows for one in (part, shards.shared)]
        assert surfaces[0] is surfaces[1]
        met += part.user_code.tolist()
    assert sorted(met) == list(range(whole.num_users))


def test_several_shards_are_read_as_one(shards: Shards, whole: Dataset) -> None:
    numbers = list(range(shards.num_shards))[::-1]
    part = shards.read(numbers)
    assert_same_users(part, whole)
    assert part.num_users == whole.num_users
    assert (np.diff(part.user_code % shards.num_shards) <= 0).all()


@given(event_lists, st.integers(1, 4), st.sampled_from(RULES))
@examples(0.2)
def test_any_log_is_the_same_in_shards(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[Event], num_shards: int, rule: SplitRule
) -> None:
    folder = tmp_path_factory.mktemp("any") / "folder"
    histories = all_events(6, 2)
    try:
        shards = open_prepared(write_folder(log_of(drawn), folder, num_shards, rule), histories)
        whole = build_dataset(log_of(drawn), histories, NO_MAPS, rule)
        assert_same_items(shards.shared, whole)
        for part in shards:
            assert_same_users(part, whole)
    finally:
        shutil.rmtree(folder)


Targets = dict[int, Any]


def windows_by_first_target(dataset: Dataset) -> Targets:
    """Return what each training window holds, by the index of its first target in the whole log."""
    windows = windows_of(dataset, np.flatnonzero(dataset.split == TRAIN))
    found = {}
    for window in range(len(windows.user)):
        one = windows.take(np.array([window]))
        keys = dataset.keys_of(one.targets).tolist()
        draws = Draws(3, 1)
        negatives = sample_negatives(dataset, one.targets, 4, draws)
        candidates = np.concatenate([dataset.item[one.targets][:, None], negatives], axis=1)
        features = build_batch(dataset, one, candidates, draws).sparse_features
        found[keys[0]] = (
            dataset.user_code[one.user].tolist(),
            keys,
            {name: count.tolist() for name, count in one.num_events.items()},
            # With the ids that training shows as unknown.
            {key: jagged.values().tolist() for key, jagged in features.to_dict().items()},
        )
    return found


def test_windows_and_draws_are_those_of_the_whole_log(shards: Shards, whole: Dataset) -> None:
    expected = windows_by_first_target(whole)
    assert len(expected) > 20
    found: Targets = {}
    for part in shards:
        found |= windows_by_first_target(part)
    assert found == expected
    assert windows_by_first_target(shards.read(range(shards.num_shards))) == expected


def test_what_is_counted_is_the_same(shards: Shards, whole: Dataset) -> None:
    expected = in_memory(whole)
    assert shards.num_training.tolist() == expected.num_training.tolist()
    assert shards.num_positive.tolist() == expected.num_positive.tolist()
    assert 0 < shards.num_positive.sum() < shards.num_training.sum() < len(whole.time)
    assert split_report(shards, 5) == split_report(expected, 5)
    found = data_digest(shards.digest(), shards.schema)
    assert found == data_digest(expected.digest(), expected.schema)
    assert shards.report == expected.report


@pytest.mark.parametrize(("others", "sentence"), [(8, "10 of 17 events of the log"), (20, None)])
def test_a_moment_with_half_of_a_shard_is_told_if_it_has_half_of_the_log(
    tmp_path: Path, others: int, sentence: str | None
) -> None:
    rows = [Event("u", "100", START_TIME) for _ in range(9)]
    rows += [Event("vv", str(100 + index % 9), START_TIME + index) for index in range(others)]
    expected = split_report(in_memory(build_dataset(log_of(rows), all_events(8, 4))))
    shards = open_prepared(write_folder(log_of(rows), tmp_path / "folder", 2), all_events(8, 4))
    assert split_report(shards) == expected
    told = [text for text in expected.crowded_moments if "events of the log" in text]
    assert [text.partition(" are at")[0] for text in told] == ([sentence] if sentence else [])


def test_requests_are_those_of_the_whole_log(shards: Shards, whole: Dataset) -> None:
    expected = list(make_requests(in_memory(whole), 40, 7, seed=2))
    assert list(make_requests(shards, 40, 7, seed=2)) == expected


@pytest.mark.parametrize("max_users", [1, 6, 8])
def test_fewer_users_are_those_of_the_log_in_memory(
    folder: Path, whole: Dataset, max_users: int
) -> None:
    found = load_shards(PreparedData(path=str(folder)), HISTORIES, max_users)
    expected = build_dataset(keep_users(whole.log, max_users), HISTORIES)
    assert found.num_shards == 1
    assert_same_items(found.shared, expected)
    assert_same_users(found.read([0]), expected)
    assert found.read([0]).num_users == max_users
    assert np.unique(expected.event_user[expected.split == TEST]).tolist() == list(range(max_users))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_folder_is_read_with_the_split_that_it_was_prepared_with(
    tmp_path: Path, rule: SplitRule
) -> None:
    folder = write_folder(log_of(events()), tmp_path / "folder", 2, rule)
    data = PreparedData(path=str(folder))
    for max_users in (None, 4):
        log = log_of(events()) if max_users is None else keep_users(log_of(events()), 4, rule)
        expected = in_memory(build_dataset(log, HISTORIES, NO_MAPS, rule))
        for wanted in (None, rule):
            found = load_shards(data, HISTORIES, max_users, rule=wanted)
            assert_same_items(found.shared, expected.shared)
            assert split_report(found) == split_report(expected)
            assert found.num_positive.tolist() == expected.num_positive.tolist()
    for other in set(RULES) - {rule}:
        with pytest.raises(ConfigError) as error:
            load_shards(data, HISTORIES, rule=other)
        message = f"{folder} was prepared with {rule}, and {other} is asked for; set {rule}, or "
        assert str(error.value).startswith(message)


@pytest.mark.parametrize("max_users", [None, 9, 10])
def test_all_users_are_read_shard_by_shard(folder: Path, max_users: int | None) -> None:
    shards = load_shards(PreparedData(path=str(folder)), HISTORIES, max_users)
    assert shards.num_shards == json.loads((folder / "prepared.json").read_text())["num_shards"]
    assert shards.shared.num_users == 0


def test_a_prepared_log_is_read_whole_where_its_events_are_needed_in_order_of_time(
    folder: Path, whole: Dataset
) -> None:
    found = build_dataset(load_log(PreparedData(path=str(folder))), HISTORIES)
    assert_same_items(found, whole)
    assert_same_users(found, whole)


def test_attributes_may_have_the_names_of_our_columns(tmp_path: Path) -> None:
    log = log_of(events())
    log = replace(
        log,
        item_attributes={"id": log.item_attributes["genres"]},
        item_floats={"num_training": log.item_floats["price"]},
        user_attributes={"code": log.user_attributes["country"]},
        user_floats={"first_event": log.user_floats["age"]},
        event_attributes={},
    )
    whole = build_dataset(log, all_events(8, 4))
    shards = open_prepared(write_folder(log, tmp_path / "folder", 3), all_events(8, 4))
    for part in shards:
        assert part.log.event_attributes == {}
        assert_same_users(part, whole)
        assert part.item_floats.tolist() == whole.item_floats.tolist()
        assert_same_rows(part.item_attributes["id"], whole.item_attributes["id"])


# --- folders that cannot be read


def test_a_folder_that_is_not_finished_is_refused(tmp_path: Path) -> None:
    folder = write_folder(log_of(events()), tmp_path / "folder", 2)
    (folder / "prepared.json").unlink()
    with pytest.raises(DataError, match=r"has no prepared\.json; a folder that pipelines\.prepare"):
        open_prepared(folder, HISTORIES)


def test_a_folder_of_another_format_is_refused(tmp_path: Path) -> None:
    folder = write_folder(log_of(events()), tmp_path / "folder", 2)
    manifest = json.loads((folder / "prepared.json").read_text())
    (folder / "prepared.json").write_text(json.dumps(manifest | {"format": 7}))
    with pytest.raises(DataError, match="has format 7; format 4 can be read: prepare it again"):
        open_prepared(folder, HISTORIES)


def test_an_action_that_the_log_does_not_have_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"keeps actions \['sell'\]; the log has \['buy', 'rate"):
        open_prepared(folder, [History("sold", Window(4, 2), ("sell",))])


@pytest.mark.parametrize("name", ["users", "events"])
def test_a_shard_that_is_missing_or_torn_is_named(tmp_path: Path, name: str) -> None:
    folder = write_folder(log_of(events()), tmp_path / "folder", 2)
    shards = open_prepared(folder, HISTORIES)
    file = folder / f"shards/00001.{name}.parquet"
    content = file.read_bytes()
    for left in (None, content[:-9]):
        file.unlink(missing_ok=True)
        if left is not None:
            file.write_bytes(left)
        shards.read([0])
        with pytest.raises(DataError, match=rf"00001\.{name}\.parquet cannot be read: "):
            shards.read([1])


def test_files_of_two_logs_are_refused(tmp_path: Path) -> None:
    folder = write_folder(log_of(events()), tmp_path / "folder", 2)
    other_events = [event._replace(surfaces=("home",)) for event in drawn_events([30, 20], 1)]
    other = write_folder(log_of(other_events), tmp_path / "other", 2)
    shutil.copy(other / "shards/00001.events.parquet", folder / "shards/00001.events.parquet")
    with pytest.raises(DataError, match=r"shards \[1\] of .* have 20 events .* not of one log"):
        open_prepared(folder, HISTORIES).read([1])
    shutil.copy(other / "shards/00001.events.parquet", folder / "items.parquet")
    with pytest.raises(DataError, match=r"items\.parquet has columns \['item', 'time', .* needed"):
        open_prepared(folder, HISTORIES)


def test_without_pyarrow_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"reading a prepared folder needs .*\[parquet\]"):
        open_prepared(folder, HISTORIES)


def test_keys_of_events_are_indices_of_the_whole_log(whole: Dataset) -> None:
    every: Ints = np.arange(len(whole.time))
    assert whole.keys_of(every).tolist() == every.tolist()
    assert whole.user_code.tolist() == list(range(whole.num_users))

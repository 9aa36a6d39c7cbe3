"""How the ids of a log's columns get their rows: by vocabulary, or hashed."""

from collections import Counter

import numpy as np
import pytest

from tests.data.logs import Event, log_of
from torchrec_kvshare.data.dataset import Dataset, build_dataset
from torchrec_kvshare.data.digest import DataDigest, data_digest, log_digest
from torchrec_kvshare.data.shards import in_memory
from torchrec_kvshare.data.split_report import split_report
from torchrec_kvshare.data.splits import TEST
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.features.schema import (
    ITEM,
    UNKNOWN_ROW,
    USER,
    Hashed,
    History,
    IdMap,
    Vocabulary,
    Window,
)

HISTORIES = [History("history", Window(8, 4))]
# 30 items in training; the last two events of each user test and validate with others.
EVENTS = [
    Event(user, str(100 + (offset + time) % 30 + 50 * (time > 12)), time)
    for offset, user in enumerate(("u", "vv", "www"), 7)
    for time in range(15)
]


def dataset_with(**id_maps: IdMap) -> Dataset:
    return build_dataset(log_of(EVENTS), HISTORIES, id_maps)


def unknown_shares_with(**id_maps: IdMap) -> dict[str, float]:
    return split_report(in_memory(dataset_with(**id_maps))).unknown_shares


def digest_with(**id_maps: IdMap) -> DataDigest:
    dataset = dataset_with(**id_maps)
    return data_digest(log_digest(dataset.log), dataset.schema)


def test_a_hashed_column_has_the_rows_of_its_hash_everywhere() -> None:
    hashed, genres = Hashed(11, salt=5), Hashed(6)
    dataset = dataset_with(item_id=hashed, genres=genres)
    items = dataset.log.items.ids
    assert dataset.item_row.tolist() == hashed.rows(items)
    values, _ = dataset.item_attributes["genres"].take(np.arange(len(items)))
    flat = [genre for genres in dataset.log.item_attributes["genres"] for genre in genres]
    assert values.tolist() == genres.rows(flat)
    assert dataset.schema.num_table_rows(ITEM) == 13
    others = {USER, "events.action", "context.country"}
    vocabularies = dataset.schema.vocabulary_by_column
    assert all(isinstance(vocabularies[column], Vocabulary) for column in others)
    assert UNKNOWN_ROW not in dataset.item_row


def test_known_ids_that_share_a_row_are_counted() -> None:
    dataset = dataset_with(item_id=Hashed(11))
    known = [dataset.log.items.ids[code] for code in dataset.known_items]
    ids_by_row = Counter(Hashed(11).rows(known))
    expected = sum(count for count in ids_by_row.values() if count > 1)
    assert expected > 5
    assert dataset.num_colliding_ids == {ITEM: expected}
    [sentence] = split_report(in_memory(dataset)).collisions
    assert sentence == (
        f"item_id is hashed, so no id of it is unknown: {expected} of the {len(known)} ids of the "
        "training split share one of 11 rows with another"
    )


def test_a_table_of_many_rows_has_no_collisions() -> None:
    assert dataset_with(item_id=Hashed(10**9)).num_colliding_ids == {ITEM: 0}


def test_shares_of_unknown_ids_are_those_of_columns_with_a_vocabulary() -> None:
    """A hashed column seemed to have no id that training never met."""
    shares = unknown_shares_with()
    assert shares[ITEM] == 1.0
    hashed = unknown_shares_with(item_id=Hashed(11), country=Hashed(3))
    assert hashed == {
        name: share for name, share in shares.items() if name not in (ITEM, "context.country")
    }


def test_missing_attributes_of_events_are_no_unknown_ids() -> None:
    moods = ["calm"] * 16 + ["", "", "", "new"]
    events = [Event("u", "100", time, mood=mood) for time, mood in enumerate(moods)]
    dataset = build_dataset(log_of(events), HISTORIES)
    assert (dataset.split == TEST).sum() == 2
    assert split_report(in_memory(dataset)).unknown_shares["events.mood"] == 1.0


def test_a_column_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ids has the columns \['brand', 'items.genres'\]; \["):
        dataset_with(**{"brand": Hashed(3), "items.genres": Hashed(3)})
    allowed = r"\['action', 'country', 'genres', 'item_id', 'mood', 'user_id'\] are allowed"
    with pytest.raises(ConfigError, match=allowed):
        dataset_with(brand=Hashed(3))


def test_other_rows_or_another_salt_is_other_data() -> None:
    maps = [Hashed(11), Hashed(12), Hashed(11, salt=1)]
    digests = [digest_with(item_id=one) for one in maps]
    for other in digests[1:]:
        assert digests[0].changes(other) == ["other schema"]
    assert digests[0].changes(digest_with(item_id=Hashed(11))) == []

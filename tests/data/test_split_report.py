"""The report of a data set's splits, against plain loops."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.logs import Event, all_events, event_lists, in_order, log_of
from tests.worlds import examples
from torchrec_kvshare.data import split_report as module
from torchrec_kvshare.data.dataset import Dataset, build_dataset
from torchrec_kvshare.data.draws import EVALUATION_SEED, Draws
from torchrec_kvshare.data.shards import in_memory
from torchrec_kvshare.data.split_report import SplitReport, split_report
from torchrec_kvshare.data.splits import TEST
from torchrec_kvshare.data.targets import sample_negatives


def dataset_of(events: list[Event]) -> Dataset:
    return build_dataset(log_of(events), all_events(8, 4))


@given(event_lists)
@examples(0.3)
def test_ties_are_events_at_the_time_of_another_of_their_user(events: list[Event]) -> None:
    moments = [(event.user, event.time) for event in events]
    expected = sum(moments.count(moment) > 1 for moment in moments) / len(events)
    assert split_report(in_memory(dataset_of(events))).tied_share == pytest.approx(expected)


@given(event_lists, st.integers(1, 3))
@examples(0.5)
def test_own_positives_are_negatives_that_their_user_likes_anywhere_in_the_log(
    events: list[Event], num_negatives: int
) -> None:
    dataset = dataset_of(events)
    report = split_report(in_memory(dataset), num_negatives)
    ordered, ids = in_order(events), dataset.log.items.ids
    liked = {(event.user, event.item) for event in events if event.label}
    targets = (dataset.split == TEST).nonzero()[0]
    if not len(targets) or len(dataset.known_items) < 2:
        assert report.own_positive_share is None
        return
    drawn = sample_negatives(dataset, targets, num_negatives, Draws(EVALUATION_SEED)).tolist()
    pairs = [
        (ordered[target].user, ids[item])
        for target, items in zip(targets.tolist(), drawn, strict=True)
        for item in items
    ]
    expected = sum(pair in liked for pair in pairs) / len(pairs)
    assert report.own_positive_share == pytest.approx(expected)


def report_of(num_negatives: int) -> SplitReport:
    """Of a user who likes every item, and one who likes none."""
    events = [Event("all", f"{100 + time % 7}", time) for time in range(30)]
    events += [Event("none", f"{100 + time % 7}", time // 2, label=0) for time in range(30)]
    return split_report(in_memory(dataset_of(events)), num_negatives)


def test_a_user_who_likes_everything_makes_every_negative_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report = report_of(4)
    assert report.num_events["test split"] == 3 + 2
    assert report.own_positive_share == 3 / 5
    assert report.tied_share == 1 / 2
    monkeypatch.setattr(module, "TARGETS_AT_A_TIME", 2)
    assert report_of(4) == report


def test_a_share_of_nothing_is_named() -> None:
    assert "undefined" not in report_of(2).to_json()
    found = report_of(0).to_json()
    assert found["own_positive_share"] is None
    assert found["undefined"] == {"own_positive_share": "no negatives are sampled"}
    assert found["unknown_shares"]["item_id"] == 0

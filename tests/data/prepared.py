"""A prepared folder against the data set that ``build_dataset`` makes of the same log in memory."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from tests.data.logs import all_events
from torchrec_kvshare.data.dataset import NO_MAPS, build_dataset
from torchrec_kvshare.data.digest import log_digest
from torchrec_kvshare.data.interactions import InteractionLog
from torchrec_kvshare.data.splits import BY_TIME_SHARE, SplitRule, split_events
from torchrec_kvshare.features.schema import table_name


def rows_of(path: Path) -> dict[str, list[Any]]:
    """The columns of a Parquet file."""
    with pq.ParquetFile(path) as file:
        return dict(file.read().to_pydict())


def assert_equals(folder: Path, log: InteractionLog, rule: SplitRule = BY_TIME_SHARE) -> None:
    """Every array, vocabulary, count, the report and the digest are those in memory."""
    dataset = build_dataset(log, all_events(64, 8), NO_MAPS, rule)
    log, counts = dataset.log, np.diff(dataset.user_offsets)
    manifest = json.loads((folder / "prepared.json").read_text())

    assert manifest["digest"] == log_digest(log).to_json()
    assert manifest["report"] == str(log.report)
    assert manifest["split_rule"] == rule.to_json()
    assert manifest["event_attributes"] == list(log.event_attributes)
    numbers = [manifest[f"num_{what}"] for what in ("users", "items", "events", "positive")]
    assert numbers == [
        *(len(log.users.ids), len(log.items.ids), len(log.time)),
        int(dataset.is_positive.sum()),
    ]
    assert manifest["tasks"] == list(log.labels)

    items = rows_of(folder / "items.parquet")
    in_training = dataset.split == 0
    by_label = {
        f"num_{name}{task}": dataset.item[in_training & (labels == label)]
        for label, name in ((1, "positive"), (0, "negative"))
        for task, labels in enumerate(log.labels.values())
    }
    assert items == {
        "id": log.items.ids,
        "num_training": np.bincount(dataset.item[in_training], minlength=numbers[1]).tolist(),
        **{
            name: np.bincount(found, minlength=numbers[1]).tolist()
            for name, found in by_label.items()
        },
        **{name: list(map(list, values)) for name, values in log.item_attributes.items()},
        **{name: values.tolist() for name, values in log.item_floats.items()},
    }
    for number, ids in enumerate(log.event_attributes.values()):
        assert rows_of(folder / f"events/{number}.parquet") == {"id": ids.ids}

    vocabularies = {table_name(key): ids for key, ids in dataset.known_ids.items()}
    found = {path.stem: rows_of(path)["id"] for path in (folder / "vocabulary").iterdir()}
    assert found == vocabularies

    for name in ("user_floats", "request_floats", "event_floats"):
        assert manifest[name] == list(getattr(log, name))
    assert manifest["request_attributes"] == list(log.request_attributes)
    for number, column in enumerate(log.request_attributes.values()):
        values = list(map(list, column.values))
        assert rows_of(folder / f"requests/{number}.parquet") == {"value": values}

    num_shards = manifest["num_shards"]
    names = [f"{shard:05d}.{what}.parquet" for shard in range(num_shards)
             for what in ("events", "users")]  # fmt: skip
    assert sorted(path.name for path in (folder / "shards").iterdir()) == names
    for shard in range(num_shards):
        codes = list(range(shard, numbers[0], num_shards))
        users = rows_of(folder / "shards" / f"{shard:05d}.users.parquet")
        assert users == {
            "code": codes,
            "id": [log.users.ids[code] for code in codes],
            "first_event": dataset.user_offsets[codes].tolist(),
            "num_events": counts[codes].tolist(),
            **{
                name: [list(values[code]) for code in codes]
                for name, values in log.user_attributes.items()
            },
            **{name: floats[codes].tolist() for name, floats in log.user_floats.items()},
        }
        chosen = np.isin(dataset.event_user, codes)
        columns = {"item": dataset.item, "time": dataset.time}
        for task, labels in enumerate(log.labels.values()):
            columns[f"label{task}"] = np.nan_to_num(labels, nan=2).astype(int)
        for number, ids in enumerate(log.event_attributes.values()):
            columns[f"event{number}"] = ids.codes
        for number, column in enumerate(log.request_attributes.values()):
            columns[f"request{number}"] = column.codes
        for number, floats in enumerate(log.request_floats.values()):
            columns[f"request_float{number}"] = floats
        for number, floats in enumerate(log.event_floats.values()):
            columns[f"event_float{number}"] = floats
        events = pq.read_table(folder / "shards" / f"{shard:05d}.events.parquet")
        assert events.to_pydict() == {k: v[chosen].tolist() for k, v in columns.items()}
        types = {field.name: str(field.type) for field in events.schema}
        kinds = {"time": "int64"} | {f"label{task}": "uint8" for task in range(len(log.labels))}
        kinds |= {name: "float" for name in columns if "float" in name}
        assert types == {name: kinds.get(name, "int32") for name in columns}

        user = np.repeat(np.arange(len(codes)), users["num_events"])
        splits = split_events(user, events["time"].to_numpy(), np.array(counts[codes]), rule)
        assert splits.split.tolist() == dataset.split[chosen].tolist()

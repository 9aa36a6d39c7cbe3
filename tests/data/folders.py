"""Prepared folders written from logs in memory, as ``pipelines.prepare`` writes them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from torchrec_kvshare.data.dataset import NO_MAPS, Dataset, Ints, build_dataset, ranges
from torchrec_kvshare.data.digest import log_digest
from torchrec_kvshare.data.interactions import InteractionLog
from torchrec_kvshare.data.splits import BY_TIME_SHARE, TRAIN, SplitRule
from torchrec_kvshare.features.schema import HISTORY, History, Window, table_name

TEXT, LIST = pa.string(), pa.list_(pa.string())
Column = tuple[str, Sequence[Any], pa.DataType]


def write_folder(
    log: InteractionLog, folder: Path, num_shards: int, rule: SplitRule = BY_TIME_SHARE
) -> Path:
    """Write a log as a finished prepared folder of so many shards."""
    dataset = build_dataset(log, [History(HISTORY, Window(1, 1))], NO_MAPS, rule)
    (folder / "shards").mkdir(parents=True)
    (folder / "vocabulary").mkdir()
    (folder / "requests").mkdir()
    (folder / "events").mkdir()
    for key, ids in dataset.known_ids.items():
        _write(folder / f"vocabulary/{table_name(key)}.parquet", ("id", ids, TEXT))
    log = dataset.log
    for number, ids in enumerate(log.event_attributes.values()):
        _write(folder / f"events/{number}.parquet", ("id", ids.ids, TEXT))
    in_training = dataset.split == TRAIN
    _write(
        folder / "items.parquet",
        ("id", log.items.ids, TEXT),
        ("num_training", _counts(dataset, in_training), pa.int64()),
        *(
            (f"num_{name}{task}", _counts(dataset, in_training & (labels == label)), pa.int64())
            for label, name in ((1, "positive"), (0, "negative"))
            for task, labels in enumerate(dataset.labels.T)
        ),
        *((name, values, LIST) for name, values in log.item_attributes.items()),
        *((name, values, pa.float32()) for name, values in log.item_floats.items()),
    )
    for number, column in enumerate(log.request_attributes.values()):
        _write(folder / f"requests/{number}.parquet", ("value", column.values, LIST))
    for shard in range(num_shards):
        users = np.arange(shard, dataset.num_users, num_shards)
        _write_shard(dataset, folder / f"shards/{shard:05}", users)
    manifest = {
        "format": 4,
        "num_users": dataset.num_users,
        "num_items": len(log.items.ids),
        "num_events": len(dataset.time),
        "num_positive": int(dataset.is_positive.sum()),
        "num_shards": num_shards,
        "split_rule": rule.to_json(),
        "tasks": list(log.labels),
        "item_attributes": list(log.item_attributes),
        "item_floats": list(log.item_floats),
        "user_attributes": list(log.user_attributes),
        "request_attributes": list(log.request_attributes),
        "user_floats": list(log.user_floats),
        "request_floats": list(log.request_floats),
        "event_floats": list(log.event_floats),
        "event_attributes": list(log.event_attributes),
        "source": {},
        "report": str(log.report),
        "digest": log_digest(log).to_json(),
    }
    (folder / "prepared.json").write_text(json.dumps(manifest))
    return folder


def _write_shard(dataset: Dataset, path: Path, users: Ints) -> None:
    log = dataset.log
    first, lengths = dataset.user_offsets[users], np.diff(dataset.user_offsets)[users]
    events = ranges(first, lengths)
    _write(
        path.with_suffix(".users.parquet"),
        ("code", users, pa.int64()),
        ("id", [log.users.ids[user] for user in users], TEXT),
        ("first_event", first, pa.int64()),
        ("num_events", lengths, pa.int64()),
        *(
            (name, [values[user] for user in users], LIST)
            for name, values in log.user_attributes.items()
        ),
        *((name, floats[users], pa.float32()) for name, floats in log.user_floats.items()),
    )
    _write(
        path.with_suffix(".events.parquet"),
        ("item", dataset.item[events], pa.int32()),
        ("time", dataset.time[events], pa.int64()),
        *(
            (f"label{task}", _codes(labels[events]), pa.uint8())
            for task, labels in enumerate(dataset.labels.T)
        ),
        *(
            (f"event{number}", ids.codes[events], pa.int32())
            for number, ids in enumerate(log.event_attributes.values())
        ),
        *(
            (f"request{number}", column.codes[events], pa.int32())
            for number, column in enumerate(log.request_attributes.values())
        ),
        *(
            (f"request_float{number}", floats[events], pa.float32())
            for number, floats in enumerate(log.request_floats.values())
        ),
        *(
            (f"event_float{number}", floats[events], pa.float32())
            for number, floats in enumerate(log.event_floats.values())
        ),
    )


def _counts(dataset: Dataset, chosen: np.ndarray) -> Ints:
    return np.bincount(dataset.item[chosen], minlength=len(dataset.item_row))


def _write(path: Path, *columns: Column) -> None:
    arrays = [pa.array(list(values), kind) for _, values, kind in columns]
    pq.write_table(pa.Table.from_arrays(arrays, [name for name, *_ in columns]), path)


def _codes(labels: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.nan_to_num(labels, nan=2).astype(np.uint8)

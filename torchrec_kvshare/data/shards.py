"""A log as shards of users: whole in memory, or a prepared folder that is read as it is needed.

Whatever reads a whole log reads it shard by shard, so that memory holds a few shards and what is
counted from them. A log in memory is one shard.

A user is in shard ``code % num_shards``. Splits, histories and random draws depend on a user's
events and on their indices in the whole log alone, so that they are the same whatever the shards.
"""

import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchrec_kvshare.data.dataset import (
    NO_MAPS,
    CodedColumn,
    Dataset,
    Ints,
    first_users,
    rows_of_columns,
    rows_of_floats,
    with_users,
    without_users,
)
from torchrec_kvshare.data.digest import DataDigest, log_digest
from torchrec_kvshare.data.interactions import InteractionLog, ReadReport, labels_of_codes
from torchrec_kvshare.data.splits import (
    TRAIN,
    SplitRule,
    have_all_splits,
    split_rule,
    splits_of,
)
from torchrec_kvshare.data.tables import IdColumn, ValueColumn
from torchrec_kvshare.errors import DataError, MissingExtraError
from torchrec_kvshare.features.schema import (
    ITEM,
    USER,
    FeatureSchema,
    History,
    IdMap,
    context_key,
    event_key,
    item_key,
    table_name,
)

FORMAT = 4
MANIFEST = "prepared.json"
# Then the numbers of positive and of negative events by task, attributes and floats.
ITEM_COLUMNS = ("id", "num_training")
USER_COLUMNS = ("code", "id", "first_event", "num_events")  # then attributes and floats
# Then labels by task, codes of attributes of events and of requests, and floats.
EVENT_COLUMNS = ("item", "time")


@dataclass(frozen=True, eq=False)
class Shards:
    """A log as shards of users.

    Attributes:
        shared: what all shards share: the schema, items and attributes; its users are not used.
        num_shards: their number.
        num_training: [I] events of the training split, by item code.
        num_positive: [I, tasks] those of them that are positive.
        num_negative: [I, tasks] those that are negative; others have no label for the task.
        report: what was read and dropped.
        digest: computes the digest of the log.
        read: reads shards by number into one data set, in their order.
    """

    shared: Dataset
    num_shards: int
    num_training: Ints
    num_positive: Ints
    num_negative: Ints
    report: str
    digest: Callable[[], DataDigest]
    read: Callable[[Sequence[int]], Dataset]

    @property
    def schema(self) -> FeatureSchema:
        """Columns and vocabularies."""
        return self.shared.schema

    def __iter__(self) -> Iterator[Dataset]:
        """Read one shard after the other."""
        for shard in range(self.num_shards):
            yield self.read([shard])


def in_memory(dataset: Dataset) -> Shards:
    """Return a whole log in memory as one shard.

    Args:
        dataset: as ``build_dataset`` returns it.
    """

    def counts(chosen: NDArray[np.bool_]) -> Ints:
        return np.bincount(dataset.item[chosen], minlength=len(dataset.item_row))

    in_training = dataset.split == TRAIN
    positive = [counts(in_training & (labels == 1)) for labels in dataset.labels.T]
    negative = [counts(in_training & (labels == 0)) for labels in dataset.labels.T]
    return Shards(
        shared=dataset,
        num_shards=1,
        num_training=counts(in_training),
        num_positive=np.stack(positive, axis=1),
        num_negative=np.stack(negative, axis=1),
        report=str(dataset.log.report),
        digest=partial(log_digest, dataset.log),
        read=lambda shards: dataset,
    )


def open_prepared(
    path: Path,
    histories: Sequence[History],
    id_maps: Mapping[str, IdMap] = NO_MAPS,
    schema: FeatureSchema | None = None,
) -> Shards:
    """Open a folder that ``pipelines.prepare`` wrote; its shards are read when they are needed.

    Args:
        path: the folder.
        histories: the histories that the model reads.
        id_maps: as in ``build_dataset``.
        schema: as in ``build_dataset``.

    Raises:
        ConfigError: if a history keeps an action that the log does not have, or there is no such
            column to map.
        DataError: if the folder is not a finished one, a file cannot be read, or the log has other
            columns than the schema.
        MissingExtraError: without pyarrow.
    """
    folder = _Folder(path)
    log, num_training, num_positive, num_negative = folder.items()
    keys = [USER, ITEM, *map(event_key, log.event_attributes)]
    keys += [item_key(name) for name in log.item_attributes]
    keys += [context_key(name) for name in (*log.user_attributes, *log.request_attributes)]
    known_ids = {key: folder.ids(f"vocabulary/{table_name(key)}.parquet") for key in keys}
    known_items = np.flatnonzero(num_training)
    shared = without_users(log, known_ids, known_items, histories, id_maps, schema)

    def read(shards: Sequence[int]) -> Dataset:
        part, user_code, first_event = folder.users_of(log, shards)
        return with_users(shared, part, splits_of(part, folder.rule), user_code, first_event)

    return Shards(
        shared=shared,
        num_shards=folder.manifest["num_shards"],
        num_training=num_training,
        num_positive=num_positive,
        num_negative=num_negative,
        report=folder.manifest["report"],
        digest=lambda: DataDigest(**folder.manifest["digest"]),
        read=read,
    )


def num_prepared_users(path: Path) -> int:
    """Return the number of users of a prepared folder."""
    return int(_Folder(path).manifest["num_users"])


def prepared_rule(path: Path) -> SplitRule:
    """Return how a prepared folder's events are split."""
    return _Folder(path).rule


def read_prepared_log(path: Path, max_users: int | None) -> InteractionLog:
    """Read users of a prepared folder into memory.

    Args:
        path: the folder.
        max_users: number of users, as ``first_users`` chooses them; None for all.

    Raises:
        DataError: if the folder is not a finished one, or a file cannot be read.
        MissingExtraError: without pyarrow.
    """
    folder = _Folder(path)
    bare, *_ = folder.items()
    num_users, all_shards = folder.manifest["num_users"], range(folder.manifest["num_shards"])
    chosen = np.arange(num_users)
    if max_users is not None:
        can_test = np.zeros(num_users, bool)
        for shard in all_shards:
            log, user_code, _ = folder.users_of(bare, [shard])
            splits = splits_of(log, folder.rule)
            can_test[user_code] = have_all_splits(log.users.codes, splits)
        chosen = first_users(can_test, max_users)
    parts = []
    for shard in all_shards:
        log, user_code, _ = folder.users_of(bare, [shard])
        parts.append(_events_of(log, np.isin(user_code, chosen)))
    return _joined(parts)


def event_file(number: int) -> str:
    """Return the file with the ids of an attribute of events, in the order of their codes."""
    return f"events/{number}.parquet"


def label_column(number: int) -> str:
    """Return the column of events with the labels of a task."""
    return f"label{number}"


def positive_column(number: int) -> str:
    """Return the column of items with the number of events that are positive for a task."""
    return f"num_positive{number}"


def negative_column(number: int) -> str:
    """Return the column of items with the number of events that are negative for a task."""
    return f"num_negative{number}"


def event_column(number: int) -> str:
    """Return the column of events with the codes of one of their attributes."""
    return f"event{number}"


def request_file(number: int) -> str:
    """Return the file with the values of an attribute of requests, in the order of their codes."""
    return f"requests/{number}.parquet"


def request_column(number: int) -> str:
    """Return the column of events with the codes of an attribute of requests."""
    return f"request{number}"


def request_float_column(number: int) -> str:
    """Return the column of events with a float of their requests."""
    return f"request_float{number}"


def event_float_column(number: int) -> str:
    """Return the column of events with a float of their own."""
    return f"event_float{number}"


class _Folder:
    """The files of a prepared folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / MANIFEST).is_file():
            raise DataError(
                f"{path} has no {MANIFEST}; a folder that pipelines.prepare has finished has one"
            )
        self.manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
        if self.manifest.get("format") != FORMAT:
            raise DataError(
                f"{path} has format {self.manifest.get('format')}; format {FORMAT} can be read: "
                "prepare it again"
            )
        self.rule = split_rule(**self.manifest["split_rule"])

    def columns(self, names: Sequence[str], wanted: Sequence[str]) -> list[Any]:
        """Read the columns of Parquet files that follow each other, in this thread.

        Columns go by their order: an attribute may have the name of a column of ours.
        """
        try:
            pyarrow = importlib.import_module("pyarrow")
            parquet = importlib.import_module("pyarrow.parquet")
        except ImportError as error:
            raise MissingExtraError("parquet", "reading a prepared folder") from error
        tables = []
        for name in names:
            try:
                with parquet.ParquetFile(self.path / name) as opened:
                    tables.append(opened.read(use_threads=False))
            except (OSError, pyarrow.ArrowException) as error:
                raise DataError(f"{self.path / name} cannot be read: {error}") from error
            if tables[-1].column_names != list(wanted):
                raise DataError(
                    f"{self.path / name} has columns {tables[-1].column_names}; {list(wanted)} "
                    "are needed"
                )
        columns: list[Any] = pyarrow.concat_tables(tables).columns
        return columns

    def ids(self, name: str) -> list[str]:
        """Read a file of ids."""
        return _texts(self.columns([name], ["id"])[0])

    def items(self) -> tuple[InteractionLog, Ints, Ints, Ints]:
        """Read all items and attributes, without events; count each item's training events.

        Returns:
            The log, by item code the number of training events, and [I, tasks] of those that are
            positive and negative.
        """
        none, no_floats, manifest = np.zeros(0, np.int64), np.zeros(0, np.float32), self.manifest
        attributes, floats = manifest["item_attributes"], manifest["item_floats"]
        tasks = manifest["tasks"]
        counts = [positive_column(number) for number in range(len(tasks))]
        counts += [negative_column(number) for number in range(len(tasks))]
        wanted = [*ITEM_COLUMNS, *counts, *attributes, *floats]
        ids, num_training, *rest = self.columns(["items.parquet"], wanted)
        of_labels, rest = np.stack([*map(_ints, rest[: len(counts)])], axis=1), rest[len(counts) :]
        num_positive, num_negative = of_labels[:, : len(tasks)], of_labels[:, len(tasks) :]
        log = InteractionLog(
            users=IdColumn(none, []),
            items=IdColumn(none, _texts(ids)),
            time=none,
            labels=dict.fromkeys(tasks, no_floats),
            event_attributes={
                name: IdColumn(none, self.ids(event_file(number)))
                for number, name in enumerate(manifest["event_attributes"])
            },
            item_attributes=dict(zip(attributes, map(_lists, rest), strict=False)),
            item_floats=_floats_of(floats, rest[len(attributes) :]),
            user_attributes={name: [] for name in manifest["user_attributes"]},
            report=ReadReport(0, 0, {}, []),
            request_attributes={
                name: ValueColumn(none, _lists(self.columns([request_file(number)], ["value"])[0]))
                for number, name in enumerate(manifest["request_attributes"])
            },
            user_floats=dict.fromkeys(manifest["user_floats"], no_floats),
            request_floats=dict.fromkeys(manifest["request_floats"], no_floats),
            event_floats=dict.fromkeys(manifest["event_floats"], no_floats),
        )
        return log, _ints(num_training), num_positive, num_negative

    def users_of(
        self, bare: InteractionLog, shards: Sequence[int]
    ) -> tuple[InteractionLog, Ints, Ints]:
        """Read the users of shards.

        Args:
            bare: the log without events that ``items`` returns.
            shards: their numbers; the first one's users come first.

        Returns:
            Their events in canonical order, and code and first event of each user.
        """
        codes, ids, first_events, lengths, *of_users = self.columns(
            [f"shards/{shard:05}.users.parquet" for shard in shards],
            [*USER_COLUMNS, *bare.user_attributes, *bare.user_floats],
        )
        num_attributes = len(bare.user_attributes)
        labels = [label_column(number) for number in range(len(bare.labels))]
        events = [event_column(number) for number in range(len(bare.event_attributes))]
        requests = [request_column(number) for number in range(len(bare.request_attributes))]
        floats = [request_float_column(number) for number in range(len(bare.request_floats))]
        floats += [event_float_column(number) for number in range(len(bare.event_floats))]
        item, time, *rest = self.columns(
            [f"shards/{shard:05}.events.parquet" for shard in shards],
            [*EVENT_COLUMNS, *labels, *events, *requests, *floats],
        )
        of_tasks, rest = rest[: len(labels)], rest[len(labels) :]
        num_coded = len(events) + len(requests)
        num_before = num_coded + len(bare.request_floats)
        counts, items = _ints(lengths), _ints(item)
        if counts.sum() != len(items) or items.max(initial=-1) >= len(bare.items.ids):
            raise DataError(
                f"shards {list(shards)} of {self.path} have {len(items)} events with item codes up "
                f"to {items.max(initial=-1)}; {counts.sum()} events of {len(bare.items.ids)} items "
                "are expected: the files are not of one log"
            )
        log = replace(
            bare,
            users=IdColumn(np.repeat(np.arange(len(counts)), counts), _texts(ids)),
            items=bare.items._replace(codes=items),
            time=_ints(time),
            labels={
                task: labels_of_codes(codes.to_numpy())
                for task, codes in zip(bare.labels, of_tasks, strict=True)
            },
            event_attributes=_with_codes(bare.event_attributes, rest[: len(events)]),
            user_attributes=dict(zip(bare.user_attributes, map(_lists, of_users), strict=False)),
            report=ReadReport(len(items), len(items), {}, []),
            request_attributes=_with_codes(bare.request_attributes, rest[len(events) : num_coded]),
            user_floats=_floats_of(bare.user_floats, of_users[num_attributes:]),
            request_floats=_floats_of(bare.request_floats, rest[num_coded:num_before]),
            event_floats=_floats_of(bare.event_floats, rest[num_before:]),
        )
        return log, _ints(codes), _ints(first_events)


def _events_of(log: InteractionLog, is_chosen: NDArray[np.bool_]) -> InteractionLog:
    """Return a log with the events of chosen users only."""
    kept = is_chosen[log.users.codes]
    chosen = np.flatnonzero(is_chosen).tolist()
    new_code = np.cumsum(is_chosen) - 1
    return replace(
        log,
        users=IdColumn(new_code[log.users.codes[kept]], [log.users.ids[user] for user in chosen]),
        items=log.items._replace(codes=log.items.codes[kept]),
        time=log.time[kept],
        labels=rows_of_floats(log.labels, kept),
        event_attributes=rows_of_columns(log.event_attributes, kept),
        user_attributes={
            name: [ids_by_user[user] for user in chosen]
            for name, ids_by_user in log.user_attributes.items()
        },
        request_attributes=rows_of_columns(log.request_attributes, kept),
        user_floats=rows_of_floats(log.user_floats, is_chosen),
        request_floats=rows_of_floats(log.request_floats, kept),
        event_floats=rows_of_floats(log.event_floats, kept),
    )


def _joined(parts: Sequence[InteractionLog]) -> InteractionLog:
    """Return one log of parts that have the same items and actions, and distinct users."""
    num_users = np.cumsum([0] + [len(part.users.ids) for part in parts]).tolist()
    users = [part.users.codes + before for part, before in zip(parts, num_users, strict=False)]
    first = parts[0]
    num_events = sum(len(part.time) for part in parts)
    return replace(
        first,
        users=IdColumn(np.concatenate(users), [raw for part in parts for raw in part.users.ids]),
        items=first.items._replace(codes=np.concatenate([part.items.codes for part in parts])),
        time=np.concatenate([part.time for part in parts]),
        labels=_joined_floats([part.labels for part in parts]),
        event_attributes=_joined_columns([part.event_attributes for part in parts]),
        user_attributes={
            name: [ids for part in parts for ids in part.user_attributes[name]]
            for name in first.user_attributes
        },
        report=ReadReport(num_events, num_events, {}, []),
        request_attributes=_joined_columns([part.request_attributes for part in parts]),
        user_floats=_joined_floats([part.user_floats for part in parts]),
        request_floats=_joined_floats([part.request_floats for part in parts]),
        event_floats=_joined_floats([part.event_floats for part in parts]),
    )


def _joined_columns(parts: Sequence[Mapping[str, CodedColumn]]) -> dict[str, CodedColumn]:
    return {
        name: column._replace(codes=np.concatenate([part[name].codes for part in parts]))
        for name, column in parts[0].items()
    }


def _joined_floats(
    parts: Sequence[Mapping[str, NDArray[np.float32]]],
) -> dict[str, NDArray[np.float32]]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _floats_of(names: Iterable[str], columns: Sequence[Any]) -> dict[str, NDArray[np.float32]]:
    pairs = zip(names, columns, strict=True)
    return {name: column.to_numpy().astype(np.float32) for name, column in pairs}


def _with_codes(bare: Mapping[str, CodedColumn], codes: Sequence[Any]) -> dict[str, CodedColumn]:
    pairs = zip(bare.items(), codes, strict=True)
    return {name: column._replace(codes=_ints(of_events)) for (name, column), of_events in pairs}


def _ints(column: Any) -> Ints:
    return np.asarray(column.to_numpy().astype(np.int64))


def _texts(column: Any) -> list[str]:
    texts: list[str] = column.to_pylist()
    return texts


def _lists(column: Any) -> list[tuple[str, ...]]:
    """Return a column of lists of ids; equal ids are one object."""
    known: dict[str, str] = {}
    return [tuple(known.setdefault(raw, raw) for raw in ids) for ids in column.to_pylist()]

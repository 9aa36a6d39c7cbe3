"""Cut a coded log into shards by user, count its training split and digest it.

Splits are not written: ``split_events`` gives them from a shard's events, here to count what the
training split knows, and again where shards are read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from torchrec_kvshare.data.coding import ORDER_OF_IDS, CodedLog
from torchrec_kvshare.data.digest import DataDigest, digest_of_events, digest_of_values
from torchrec_kvshare.data.interactions import LogSummary, num_tied, positive_share
from torchrec_kvshare.data.shards import (
    FORMAT,
    event_column,
    event_file,
    event_float_column,
    label_column,
    negative_column,
    positive_column,
    request_column,
    request_file,
    request_float_column,
)
from torchrec_kvshare.data.splits import TRAIN, SplitRule, split_events
from torchrec_kvshare.data.staging import ROWS, Work, identifier, table
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.features.schema import (
    ITEM,
    USER,
    context_key,
    event_key,
    item_key,
    table_name,
)

SHARDS = "shards"
EVENTS_PER_SHARD = 1_000_000
LABEL_COUNTS = (positive_column, negative_column)

Ints = NDArray[np.int64]


class _Tally(NamedTuple):
    """Counts over all shards; the split is that of ``build_dataset``."""

    known_users: NDArray[np.bool_]
    known_by_column: dict[str, NDArray[np.bool_]]  # codes of attributes of events and requests
    num_training: Ints  # by item
    num_by_label: Ints  # [label 1 and label 0, tasks, items], of the training split


@dataclass
class Cutter:
    """Writes the folder of a coded log.

    Args:
        work: where stages are made.
        log: the coded log.
        folder: the prepared folder.
        wanted_shards: number of shards; None: a million events each.
        rule: how the events are split.

    Raises:
        ConfigError: if there are more shards than users.
    """

    work: Work
    log: CodedLog
    folder: Path
    wanted_shards: int | None
    rule: SplitRule

    def __post_init__(self) -> None:
        stages = self.work.folder
        self.ids = {
            role: table(stages / f"ids/{role}.parquet", ", file_row_number = true")
            for role in self.key_by_role
        }
        self.num_by_role = {
            role: self.work.one(f"SELECT count(*) FROM {ids}")[0] for role, ids in self.ids.items()
        }
        # Counted by user, so that the events of a shard need no count of their own.
        counts = self.work.copy(
            "counts.parquet",
            f"SELECT user AS code, count(*) AS num_events FROM ({self.log.events}) "
            "GROUP BY 1 ORDER BY 1",
        )
        self.num_events = self.work.parquet.read_table(counts)["num_events"].to_numpy()  # [users]
        self.total = int(self.num_events.sum())
        self.num_shards = self._num_shards()

    @property
    def key_by_role(self) -> dict[str, str]:
        """The id columns of the log, with the keys of their vocabularies."""
        return {"user": USER, "item": ITEM} | self.event_keys

    @property
    def event_keys(self) -> dict[str, str]:
        """The columns of events with codes of their attributes, and the vocabularies' keys."""
        names = enumerate(self.log.event_attributes)
        return {event_column(number): event_key(name) for number, name in names}

    @property
    def requests(self) -> dict[str, str]:
        """The columns of events with codes of requests' values, and the values as a table."""
        return {
            request_column(number): table(
                self.work.folder / request_file(number), ", file_row_number = true"
            )
            for number in range(len(self.log.request_attributes))
        }

    @property
    def coded(self) -> list[str]:
        """The columns of events beside item, time and labels, all of them codes."""
        return [*self.event_keys, *self.requests]

    @property
    def labels(self) -> list[str]:
        """The columns of events with the labels of each task."""
        return [*map(label_column, range(len(self.log.tasks)))]

    @property
    def floats(self) -> list[str]:
        """The columns of events with floats, those of their requests first."""
        of_requests = map(request_float_column, range(len(self.log.request_floats)))
        return [*of_requests, *map(event_float_column, range(len(self.log.event_floats)))]

    def _num_shards(self) -> int:
        num_users = self.num_by_role["user"]
        if self.wanted_shards is None:
            return min(max(1, round(self.total / EVENTS_PER_SHARD)), num_users)
        if self.wanted_shards > num_users:
            raise ConfigError(
                f"num_shards is {self.wanted_shards}; the log has {num_users} users, and a shard "
                "needs one"
            )
        return self.wanted_shards

    def write(self) -> dict[str, Any]:
        """Write all files but the manifest, and return it."""
        self._cut()
        self._write_users()
        for shard in range(self.num_shards):
            self._write_shard(shard)
        tally, summary = self._count()
        self._write_items()
        self._write_vocabularies(tally)
        text = str(replace(self.log.report, summary=summary))
        num_positive = int(self._num_by_label[0, 0])
        counts = {
            "users": self.num_by_role["user"],
            "items": self.num_by_role["item"],
            "events": self.total,
            "positive events": num_positive,
        }
        return {
            "format": FORMAT,
            "num_users": counts["users"],
            "num_items": counts["items"],
            "num_events": self.total,
            "num_positive": num_positive,
            "num_shards": self.num_shards,
            "split_rule": self.rule.to_json(),
            "tasks": list(self.log.tasks),
            "item_attributes": list(self.log.item_attributes),
            "item_floats": list(self.log.item_floats),
            "user_attributes": list(self.log.user_attributes),
            "request_attributes": list(self.log.request_attributes),
            "user_floats": list(self.log.user_floats),
            "request_floats": list(self.log.request_floats),
            "event_floats": list(self.log.event_floats),
            "event_attributes": list(self.log.event_attributes),
            "report": text,
            "digest": DataDigest(counts, self._digests()).to_json(),
        }

    def _cut(self) -> None:
        self.work.copy(
            "cut",
            f"SELECT *, user % {self.num_shards} AS shard FROM ({self.log.events})",
            f"{ROWS}, PARTITION_BY (shard)",
        )

    def _write_users(self) -> None:
        firsts = np.cumsum(self.num_events) - self.num_events
        self.work.write_columns(
            "firsts.parquet", {"first_event": firsts, "num_events": self.num_events}
        )
        counts = table(self.work.folder / "firsts.parquet", ", file_row_number = true")
        attributes, joins = self._values("user", self.log.user_attributes, "attributes")
        floats, more_joins = self._values("user", self.log.user_floats, "floats")
        self.work.copy(
            "users.parquet",
            f"SELECT i.file_row_number AS code, id, first_event, num_events{attributes}{floats} "
            f"FROM {self.ids['user']} AS i JOIN {counts} AS c USING (file_row_number) {joins} "
            f"{more_joins} ORDER BY code",
        )

    def _values(self, role: str, names: Sequence[str], kind: str) -> tuple[str, str]:
        """Return the columns of an owner's values, and the joins that they take, as SQL."""
        selected, joins = [], []
        empty = "[]::VARCHAR[]" if kind == "attributes" else "0::FLOAT"
        for number, name in enumerate(names):
            value = f"{kind}{number}"
            path = self.work.folder / f"{role}_{kind}/{number}.parquet"
            selected.append(f", coalesce({value}.value, {empty}) AS {identifier(name)}")
            joins.append(f"LEFT JOIN {table(path)} AS {value} ON i.file_row_number = {value}.code")
        return "".join(selected), " ".join(joins)

    def _write_shard(self, shard: int) -> None:
        name = f"../{SHARDS}/{shard:05d}"
        self.work.copy(
            f"{name}.users.parquet",
            f"SELECT * FROM {table(self.work.folder / 'users.parquet')} "
            f"WHERE code % {self.num_shards} = {shard} ORDER BY code",
        )
        others = [*self.coded, *self.floats]
        num_first = len(self.event_keys)
        # As ``in_canonical_order`` does.
        order = ["user", "time", "item", *others[:num_first], *self.labels, *others[num_first:]]
        cut = table(self.work.folder / f"cut/shard={shard}", ", hive_partitioning = false")
        self.work.copy(
            f"{name}.events.parquet",
            f"SELECT {', '.join(['item', 'time', *self.labels, *others])} FROM {cut} "
            f"ORDER BY {', '.join(order)}",
        )

    def _events(self, shard: int, columns: Sequence[str]) -> list[NDArray[Any]]:
        path = self.folder / SHARDS / f"{shard:05d}.events.parquet"
        read = self.work.parquet.read_table(path, columns=list(columns))
        return [read[name].to_numpy() for name in columns]

    # --- what is counted over shards

    def _count(self) -> tuple[_Tally, LogSummary | None]:
        tally = _Tally(
            known_users=np.zeros(self.num_by_role["user"], np.bool_),
            known_by_column={
                column: np.zeros(self._num_codes(column), np.bool_) for column in self.coded
            },
            num_training=np.zeros(self.num_by_role["item"], np.int64),
            num_by_label=np.zeros((2, len(self.labels), self.num_by_role["item"]), np.int64),
        )
        tied, self._num_by_label = 0, np.zeros((2, len(self.labels)), np.int64)
        times: list[int] = []
        for shard in range(self.num_shards):
            tied += self._count_shard(shard, tally, times)
            self.work.finished(f"count {shard}")
        columns = {"num_training": tally.num_training}
        for name_of, by_task in zip(LABEL_COUNTS, tally.num_by_label, strict=True):
            columns |= {name_of(task): counts for task, counts in enumerate(by_task)}
        self.work.write_columns("training.parquet", columns)
        if self.log.time_form is None:
            return tally, None
        summary = LogSummary(
            time_form=self.log.time_form,
            first_time=min(times),
            last_time=max(times),
            tied_share=tied / self.total,
            positive_shares={
                task: positive_share(int(positive), int(negative))
                for task, positive, negative in zip(
                    self.log.tasks, *self._num_by_label, strict=True
                )
            },
        )
        return tally, summary

    def _num_codes(self, column: str) -> int:
        values = self.requests.get(column, self.ids.get(column))
        return int(self.work.one(f"SELECT count(*) FROM {values}")[0])

    def _count_shard(self, shard: int, tally: _Tally, times: list[int]) -> int:
        """Add a shard's counts, and return its number of tied events."""
        names = ("item", "time", *self.labels, *self.coded)
        item, time, *others = self._events(shard, names)
        labels, coded = others[: len(self.labels)], others[len(self.labels) :]
        counts = self.num_events[shard :: self.num_shards]
        user = np.repeat(np.arange(len(counts)), counts)
        in_training = split_events(user, time, counts, self.rule).split == TRAIN
        tally.num_training[:] += np.bincount(item[in_training], minlength=len(tally.num_training))
        for index, wanted in enumerate((1, 0)):
            for task, label in enumerate(labels):
                of_training = item[in_training & (label == wanted)]
                counted = np.bincount(of_training, minlength=len(tally.num_training))
                tally.num_by_label[index, task] += counted
                self._num_by_label[index, task] += (label == wanted).sum()
        tally.known_users[shard + self.num_shards * np.unique(user[in_training])] = True
        for known, codes in zip(tally.known_by_column.values(), coded, strict=True):
            known[codes[in_training]] = True
        times += [int(time.min()), int(time.max())]
        return num_tied(user, time)

    # --- items and vocabularies

    def _write_items(self) -> None:
        attributes, joins = self._values("item", self.log.item_attributes, "attributes")
        floats, more_joins = self._values("item", self.log.item_floats, "floats")
        training = table(self.work.folder / "training.parquet", ", file_row_number = true")
        counts = ", ".join(of(task) for of in LABEL_COUNTS for task in range(len(self.labels)))
        self.work.copy(
            "../items.parquet",
            f"SELECT id, num_training, {counts}{attributes}{floats} "
            f"FROM {self.ids['item']} AS i JOIN {training} AS t USING (file_row_number) "
            f"{joins} {more_joins} ORDER BY i.file_row_number",
        )
        for number, role in enumerate(self.event_keys):
            self.work.copy(
                f"../{event_file(number)}",
                f"SELECT id FROM {self.ids[role]} ORDER BY file_row_number",
            )
        for number, values in enumerate(self.requests.values()):
            self.work.copy(
                f"../{request_file(number)}", f"SELECT value FROM {values} ORDER BY file_row_number"
            )

    def _write_vocabularies(self, tally: _Tally) -> None:
        known_by_role = {
            "user": np.flatnonzero(tally.known_users),
            "item": np.flatnonzero(tally.num_training),
            **{name: np.flatnonzero(known) for name, known in tally.known_by_column.items()},
        }
        for role, codes in known_by_role.items():
            self.work.write_columns(f"known/{role}.parquet", {"code": codes})
        for role, key in self.key_by_role.items():
            self.work.copy(
                f"../vocabulary/{table_name(key)}.parquet",
                f"SELECT id FROM {self.ids[role]} WHERE file_row_number IN {self._known(role)} "
                "AND id <> '' ORDER BY file_row_number",
            )
        for role, names, key_of in (
            ("item", self.log.item_attributes, item_key),
            ("user", self.log.user_attributes, context_key),
        ):
            for number, name in enumerate(names):
                values = table(self.work.folder / f"{role}_attributes/{number}.parquet")
                self._write_vocabulary(key_of(name), f"{values} WHERE code IN {self._known(role)}")
        requests = zip(self.log.request_attributes, self.requests.items(), strict=True)
        for name, (column, values) in requests:
            known = f"{values} WHERE file_row_number IN {self._known(column)}"
            self._write_vocabulary(context_key(name), known)

    def _known(self, role: str) -> str:
        return f"(SELECT code FROM {table(self.work.folder / f'known/{role}.parquet')})"

    def _write_vocabulary(self, key: str, values: str) -> None:
        self.work.copy(
            f"../vocabulary/{table_name(key)}.parquet",
            f"SELECT DISTINCT id FROM (SELECT unnest(value) AS id FROM {values}) "
            f"ORDER BY {ORDER_OF_IDS}",
        )

    # --- the digest

    def _digests(self) -> dict[str, str]:
        """Return the digest by part that ``data_digest`` gives the same log."""
        users, items = self.work.folder / "users.parquet", self.folder / "items.parquet"
        digests = {
            "user ids": digest_of_values(self._column(users, "id")),
            "item ids": digest_of_values(self._column(items, "id")),
        }
        columns: list[Iterator[NDArray[Any]]] = [
            self._user_codes(),
            *(self._in_order(name) for name in ("item", "time", *self.labels, *self.coded)),
        ]
        for number, name in enumerate(self.log.event_attributes):
            ids = self._column(self.folder / event_file(number), "id")
            digests[f"{name} of events"] = digest_of_values(ids)
        digests["events"] = digest_of_events(columns)
        for name in (*self.log.item_attributes, *self.log.item_floats):
            is_float = name in self.log.item_floats
            digests[f"{name} of items"] = (
                digest_of_events([self._arrays(items, name)], "<f4")
                if is_float
                else digest_of_values(self._column(items, name))
            )
        for name in self.log.user_attributes:
            digests[f"{name} of users"] = digest_of_values(self._column(users, name))
        for number, name in enumerate(self.log.request_attributes):
            values = self._column(self.folder / request_file(number), "value")
            digests[f"{name} of requests"] = digest_of_values(values)
        for name in self.log.user_floats:
            digests[f"{name} of users"] = digest_of_events([self._arrays(users, name)], "<f4")
        parts = [f"{name} of requests" for name in self.log.request_floats]
        parts += [f"{name} of events" for name in self.log.event_floats]
        for part, column in zip(parts, self.floats, strict=True):
            digests[part] = digest_of_events([self._in_order(column)], "<f4")
        return digests

    def _column(self, path: Path, name: str) -> Iterator[list[Any]]:
        for batch in self.work.batches(path, [name]):
            yield batch.column(0).to_pylist()

    def _arrays(self, path: Path, name: str) -> Iterator[NDArray[Any]]:
        for batch in self.work.batches(path, [name]):
            yield batch.column(0).to_numpy()

    def _user_codes(self) -> Iterator[NDArray[Any]]:
        for first, last in self._blocks():
            yield np.repeat(np.arange(first, last), self.num_events[first:last])

    def _in_order(self, name: str) -> Iterator[NDArray[Any]]:
        """Yield a column of the events of all shards, by user code."""
        readers = [
            _Column(self._arrays(self.folder / SHARDS / f"{shard:05d}.events.parquet", name))
            for shard in range(self.num_shards)
        ]
        for first, last in self._blocks():
            users, pieces = [], []
            for shard, reader in enumerate(readers):
                codes = np.arange(first, last)
                codes = codes[codes % self.num_shards == shard]
                counts = self.num_events[codes]
                users.append(np.repeat(codes, counts))
                pieces.append(reader.take(int(counts.sum())))
            order = np.argsort(np.concatenate(users), kind="stable")
            yield np.concatenate(pieces)[order]

    def _blocks(self) -> Iterator[tuple[int, int]]:
        """Yield ranges of users with about as many events as a batch has rows, or one user."""
        ends = np.cumsum(self.num_events)
        first = 0
        while first < len(ends):
            before = int(ends[first - 1]) if first else 0
            last = int(np.searchsorted(ends, before + EVENTS_PER_SHARD, side="right"))
            last = max(last, first + 1)
            yield first, last
            first = last


class _Column:
    """Takes the next values of a column that is read in batches."""

    def __init__(self, batches: Iterator[NDArray[Any]]) -> None:
        self.batches = batches
        self.rest: NDArray[Any] = np.zeros(0, np.int64)

    def take(self, count: int) -> NDArray[Any]:
        pieces, num_taken = [self.rest], len(self.rest)
        while num_taken < count:
            pieces.append(next(self.batches))
            num_taken += len(pieces[-1])
        joined = np.concatenate(pieces[1:] if not len(self.rest) and len(pieces) > 1 else pieces)
        self.rest = joined[count:]
        return joined[:count]

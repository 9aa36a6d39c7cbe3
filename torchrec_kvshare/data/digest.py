"""A digest of the data that a run was trained on, which names what differs in other data.

The log is digested in its canonical order: the same rows in another order are the same data.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchrec_kvshare.data.interactions import InteractionLog, codes_of_labels
from torchrec_kvshare.features.schema import FeatureSchema


@dataclass(frozen=True)
class DataDigest:
    """Readable counts, and a digest of each part that affects training.

    Attributes:
        count_by_name: users, items, events, events that are positive for the first task.
        sha256_by_part: of ids, events, each attribute, and the schema built from them.
    """

    count_by_name: dict[str, int]
    sha256_by_part: dict[str, str]

    def changes(self, now: "DataDigest") -> list[str]:
        """Describe the differences of another digest; empty for the same data.

        Example:
            >>> before = DataDigest({"users": 3, "events": 9}, {"events": "a1"})
            >>> before.changes(DataDigest({"users": 4, "events": 9}, {"events": "b2"}))
            ['1 user more', 'other events']
            >>> before.changes(before)
            []
        """
        found = []
        for name, count in now.count_by_name.items():
            change = count - self.count_by_name.get(name, 0)
            if change:
                noun = name.removesuffix("s") if abs(change) == 1 else name
                found.append(f"{abs(change)} {noun} {'more' if change > 0 else 'fewer'}")
        parts = {**self.sha256_by_part, **now.sha256_by_part}
        return found + [
            f"other {part}"
            for part in parts
            if self.sha256_by_part.get(part) != now.sha256_by_part.get(part)
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the digest as JSON values."""
        return asdict(self)


def log_digest(log: InteractionLog) -> DataDigest:
    """Return the digest of a log in canonical order, without a schema."""
    counts = {
        "users": len(log.users.ids),
        "items": len(log.items.ids),
        "events": len(log.time),
        "positive events": int((next(iter(log.labels.values())) == 1).sum()),
    }
    return DataDigest(counts, _parts(log))


def data_digest(log: DataDigest, schema: FeatureSchema) -> DataDigest:
    """Return the digest of a log together with that of the schema built from it."""
    written = json.dumps(schema.to_json()).encode()
    parts = log.sha256_by_part | {"schema": hashlib.sha256(written).hexdigest()}
    return DataDigest(log.count_by_name, parts)


def _parts(log: InteractionLog) -> dict[str, str]:
    columns = [log.users.codes, log.items.codes, log.time]
    columns += [codes_of_labels(labels).astype(np.int64) for labels in log.labels.values()]
    digest_by_part = {"user ids": _digest(log.users.ids), "item ids": _digest(log.items.ids)}
    for name, ids in log.event_attributes.items():
        columns.append(ids.codes)
        digest_by_part[f"{name} of events"] = _digest(ids.ids)
    columns += [column.codes for column in log.request_attributes.values()]
    digest_by_part["events"] = digest_of_events([column] for column in columns)
    for name, values in log.item_attributes.items():
        digest_by_part[f"{name} of items"] = _digest(values)
    for name, floats in log.item_floats.items():
        digest_by_part[f"{name} of items"] = digest_of_events([[floats]], "<f4")
    for name, values in log.user_attributes.items():
        digest_by_part[f"{name} of users"] = _digest(values)
    for name, column in log.request_attributes.items():
        digest_by_part[f"{name} of requests"] = _digest(column.values)
    for name, floats in log.user_floats.items():
        digest_by_part[f"{name} of users"] = digest_of_events([[floats]], "<f4")
    for name, floats in log.request_floats.items():
        digest_by_part[f"{name} of requests"] = digest_of_events([[floats]], "<f4")
    for name, floats in log.event_floats.items():
        digest_by_part[f"{name} of events"] = digest_of_events([[floats]], "<f4")
    return digest_by_part


def _digest(values: Sequence[Any]) -> str:
    return digest_of_values([values])


def digest_of_values(chunks: Iterable[Sequence[Any]]) -> str:
    """Return the digest of a column of ids, or of lists of ids, that comes in chunks.

    Example:
        >>> digest_of_values([["a"], ["b", "c"]]) == digest_of_values([["a", "b"], [], ["c"]])
        True
    """
    digest = hashlib.sha256(b"[")
    between = b""
    for chunk in chunks:
        if chunk:
            digest.update(between + json.dumps(chunk)[1:-1].encode())
            between = b", "
    digest.update(b"]")
    return digest.hexdigest()


def digest_of_events(columns: Iterable[Iterable[NDArray[Any]]], dtype: str = "<i8") -> str:
    """Return the digest of columns of numbers, one after the other, each in chunks."""
    digest = hashlib.sha256()
    for column in columns:
        for chunk in column:
            digest.update(np.ascontiguousarray(chunk, dtype=dtype).tobytes())
    return digest.hexdigest()

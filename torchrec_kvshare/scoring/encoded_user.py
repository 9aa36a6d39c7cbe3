"""A user encoded once and scored piece by piece: candidates come one at a time, in groups, or all.

For callers that hold a user's K/V themselves: as each candidate's features become ready it is
scored, here or in another process that loads what this one saved.
"""

import json
import os
from collections.abc import Mapping, Sequence
from operator import index
from pathlib import Path
from typing import Any

from torch import Tensor

from torchrec_kvshare.cache.clock import steady_clock
from torchrec_kvshare.cache.codecs import get_codec
from torchrec_kvshare.cache.identity import NO_CONTEXT, PrefixDigests, identity_of
from torchrec_kvshare.cache.record import KVRecord, pack, unpack
from torchrec_kvshare.errors import RecordError
from torchrec_kvshare.features.parse import parse_candidates, parse_user
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.scoring.engine import Engine

BLOCK = 32  # events between two digests of a saved history
CODEC = get_codec("float32")


class EncodedUser:
    """K/V of a user's histories, and what else of the user its candidates are scored with.

    Args:
        engine: of the model that the K/V is of.
        raw: the user's request; its candidates are not read.
        kv_by_history: as ``Engine.encode`` gives them.

    Raises:
        RequestError: if the user cannot be read.
    """

    def __init__(
        self, engine: Engine, raw: Mapping[str, Any], kv_by_history: Sequence[Tensor]
    ) -> None:
        self._engine = engine
        self._raw = dict(raw)
        self._user = parse_user(raw, engine.schema)
        self._kv_by_history = kv_by_history
        self._version = engine.version

    def predict(self, candidates: Mapping[str, Any], time: int | None = None) -> list[float]:
        """Score some candidates.

        Args:
            candidates: columns as in a request.
            time: Unix seconds of the request; that of the user's request by default.

        Returns:
            Probabilities, in the order of the candidates.

        Raises:
            RequestError: naming the column, what came and what was allowed.
            ScoreError: naming the candidates whose scores are not finite.
        """
        raw = {"candidates": candidates} | ({} if time is None else {"time": time})
        request = parse_candidates(raw, self._user, self._engine.schema)
        self._encode_anew_if_changed()
        return self._engine.score_with(request, self._kv_by_history)

    def save(self, path: Path) -> None:
        """Write the user and its K/V to a file, whole or not at all.

        Raises:
            RecordError: if the K/V is not finite.
        """
        self._encode_anew_if_changed()
        packets = [
            pack(KVRecord(digests.content, steady_clock()(), kv), self._user.user_id, CODEC, None)
            for digests, kv in zip(
                _digests(self._engine, self._user), self._kv_by_history, strict=True
            )
        ]
        raw = {name: value for name, value in self._raw.items() if name != "candidates"}
        head = json.dumps(
            {"user": raw, "lengths": [len(packet) for packet in packets]}, allow_nan=False
        )
        written = path.with_name(f".{path.name}.new")
        written.write_bytes(b"".join([head.encode(), b"\n", *packets]))
        os.replace(written, path)

    def _encode_anew_if_changed(self) -> None:
        """K/V of weights that the model no longer has is of no use."""
        self._engine.renew_if_changed()
        if self._engine.version != self._version:
            self._kv_by_history = self._engine.encode(self._user).kv_by_history
            self._version = self._engine.version


def encode_user(engine: Engine, raw: Mapping[str, Any]) -> EncodedUser:
    """Encode a user's histories, or find them in the engine's store.

    Args:
        engine: with a store or without.
        raw: a request; its candidates are not read.

    Raises:
        RequestError: naming the column, what came and what was allowed.
    """
    return EncodedUser(engine, raw, engine.encode(parse_user(raw, engine.schema)).kv_by_history)


def load_user(engine: Engine, path: Path) -> EncodedUser:
    """Read a user that ``EncodedUser.save`` wrote.

    Args:
        engine: of the same model version.
        path: the file.

    Raises:
        RecordError: if the file is broken, or of another model.
    """
    head, _, packets = path.read_bytes().partition(b"\n")
    try:
        described = json.loads(head)
        raw, lengths = described["user"], [index(length) for length in described["lengths"]]
        user = parse_user(raw, engine.schema)
    except (LookupError, TypeError, ValueError) as error:
        raise RecordError(f"{path} does not read as an encoded user: {error}") from error
    kv_by_history = []
    first = 0
    digests_by_history = _digests(engine, user)
    rows = engine.model.num_rows([digests.num_events for digests in digests_by_history])
    for digests, num_rows, length in zip(digests_by_history, rows, lengths, strict=False):
        packet = packets[first : first + length]
        record = unpack(packet, user.user_id, digests.identity, CODEC, None)
        if record.content != digests.content or record.kv.size(1) != num_rows:
            raise RecordError(f"{path} holds K/V that is not of the history beside it")
        kv_by_history.append(record.kv)
        first += length
    if first != len(packets) or len(kv_by_history) != len(engine.schema.histories):
        raise RecordError(f"{path} is {len(packets)} bytes of K/V; {first} are those of a user")
    return EncodedUser(engine, raw, kv_by_history)


def _digests(engine: Engine, user: Request) -> list[PrefixDigests]:
    """What the K/V of each history is of."""
    return [
        PrefixDigests(
            user.events_by_history[history.name],
            engine.schema,
            identity_of(engine.version, NO_CONTEXT, history.name, BLOCK),
        )
        for history in engine.schema.histories
    ]

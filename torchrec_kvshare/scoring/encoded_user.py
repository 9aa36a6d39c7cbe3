"""A user encoded once and scored piece by piece: candidates come one at a time, in groups, or all.

For callers that hold a user's K/V themselves: the server scores long requests and streams this way,
and a process may load what another one saved.
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
from torchrec_kvshare.cache.leases import CacheUse
from torchrec_kvshare.cache.record import KVRecord, pack, unpack
from torchrec_kvshare.errors import RecordError
from torchrec_kvshare.features.parse import parse_candidates, parse_user
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.scoring.engine import Engine, Scores, answered_scores

BLOCK = 32  # events between two digests of a saved history
CODEC = get_codec("float32")


class EncodedUser:
    """K/V of one user's histories, held by the caller.

    The histories are encoded (or copied out of the engine's store) at the first score, and again
    after weights changed that the K/V depends on.

    Args:
        engine: of the model.
        user: as ``parse_user`` or ``parse_request`` returns it; its candidates are not read.
    """

    def __init__(self, engine: Engine, user: Request) -> None:
        self.engine = engine
        self.user = user
        self._kv_versions: tuple[str, ...] = ()
        self._kv_by_history: Sequence[Tensor] = ()
        self._use: CacheUse | None = None

    @property
    def use(self) -> CacheUse:
        """What the cache did when the user was encoded; not before the first score."""
        assert self._use is not None
        return self._use

    def kv_by_history(self) -> Sequence[Tensor]:
        """K/V [planes, R, H, D] of each history, of the model's present weights."""
        self.engine.renew_if_changed()
        if self._kv_versions != self.engine.version.kv_versions:
            self._kv_by_history, self._use = self.engine.encode(self.user)
            self._kv_versions = self.engine.version.kv_versions
        return self._kv_by_history

    def score(self, request: Request, first_candidate: int = 0) -> Tensor:
        """Score candidates of a parsed request.

        Args:
            request: the user's request with some of its candidates.
            first_candidate: index of the first of them among all.

        Returns:
            Probabilities [N, tasks] float64, in the order of the candidates.

        Raises:
            ScoreError: listing the candidates whose scores are not finite.
        """
        return self.engine.score_with(request, self.kv_by_history(), first_candidate)

    def predict(self, candidates: Mapping[str, Any], time: int | None = None) -> Scores:
        """Score raw candidates.

        Args:
            candidates: columns as in a request.
            time: Unix seconds of the request; by default that of the user's request.

        Returns:
            Probabilities as an answer has them, in the order of the candidates.

        Raises:
            RequestError: naming the column, what came and what was allowed.
            ScoreError: listing the candidates whose scores are not finite.
        """
        raw = {"candidates": candidates} | ({} if time is None else {"time": time})
        schema = self.engine.schema
        return answered_scores(self.score(parse_candidates(raw, self.user, schema)), schema.tasks)


def encode_user(engine: Engine, raw: Mapping[str, Any]) -> EncodedUser:
    """Encode a user's histories, or copy their K/V out of the engine's store.

    Args:
        engine: with a store or without.
        raw: a request; its candidates are not read.

    Raises:
        RequestError: naming the column, what came and what was allowed.
    """
    user = EncodedUser(engine, parse_user(raw, engine.schema))
    user.kv_by_history()
    return user


def save_user(user: EncodedUser, raw: Mapping[str, Any], path: Path) -> None:
    """Write a user and its K/V to a file, whole or not at all.

    Args:
        user: encoded.
        raw: the request that it was parsed from; candidates are left out.
        path: the file; replaced if it exists.

    Raises:
        RecordError: if the K/V is not finite.
    """
    kv_by_history = user.kv_by_history()
    packets = [
        pack(KVRecord(digests.content, steady_clock()(), kv), user.user.user_id, CODEC, None)
        for digests, kv in zip(_digests(user.engine, user.user), kv_by_history, strict=True)
    ]
    without_candidates = {name: value for name, value in raw.items() if name != "candidates"}
    head = json.dumps(
        {"user": without_candidates, "lengths": [len(packet) for packet in packets]},
        allow_nan=False,
    )
    written = path.with_name(f".{path.name}.new")
    written.write_bytes(b"".join([head.encode(), b"\n", *packets]))
    os.replace(written, path)


def load_user(engine: Engine, path: Path) -> EncodedUser:
    """Read a user that ``save_user`` wrote.

    Args:
        engine: of a model version with the same K/V.
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
    start = 0
    digests_by_history = _digests(engine, user)
    rows = engine.model.num_kv_rows([digests.num_events for digests in digests_by_history])
    for digests, num_rows, length in zip(digests_by_history, rows, lengths, strict=False):
        packet = packets[start : start + length]
        record = unpack(packet, user.user_id, digests.identity, CODEC, None)
        if record.content != digests.content or record.kv.size(1) != num_rows:
            raise RecordError(f"{path} holds K/V that is not of the history beside it")
        kv_by_history.append(record.kv)
        start += length
    if start != len(packets) or len(kv_by_history) != len(engine.schema.histories):
        raise RecordError(f"{path} is {len(packets)} bytes of K/V; {start} are those of a user")
    loaded = EncodedUser(engine, user)
    loaded._kv_by_history, loaded._kv_versions = kv_by_history, engine.version.kv_versions
    return loaded


def _digests(engine: Engine, user: Request) -> list[PrefixDigests]:
    """Identity and content of each history's K/V."""
    return [
        PrefixDigests(
            user.events_by_history[history.name],
            engine.schema,
            identity_of(engine.version, NO_CONTEXT, history.name, BLOCK),
        )
        for history in engine.schema.histories
    ]

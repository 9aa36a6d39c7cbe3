"""Identity of cached K/V: the part of the model that computes it, the user and every event.

All of it must match before K/V is reused. The ranking stage is no part of it, nor is what only
candidates read: K/V survives a new version that changed nothing else. Digests depend on bytes only,
so they are the same in every process and on all machines of one byte order.
"""

import hashlib
import json
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from torchrec_kvshare.cache.reasons import COLD, EDITED, HIT, SHRUNK, SLID
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.features.request import Events
from torchrec_kvshare.features.schema import TIME, FeatureSchema
from torchrec_kvshare.model.ranking import RankingModel, split_tables

DIGEST_BYTES = 16
VERSION_DIGITS = 16  # of each digest in the model version of an answer
NO_CONTEXT = ""

_DIGEST = re.compile(rf"[0-9a-f]{{{VERSION_DIGITS},64}}")


class KVVersion(NamedTuple):
    """The version of one history's K/V: digests of what the model computes it from.

    Attributes:
        model: digest of the tower's weights, except those that only candidates read, its
            architecture, its window and the columns of its events.
        tables: digest of the embedding tables that its events read.
    """

    model: str
    tables: str

    def __str__(self) -> str:
        """``<model>-<tables>``, cut to 16 digits each."""
        return f"{self.model[:VERSION_DIGITS]}-{self.tables[:VERSION_DIGITS]}"


@dataclass(frozen=True)
class ModelVersion:
    """The version of a model: digests of what it computes, never a name.

    Attributes:
        model: digest of all dense weights, architecture and windows.
        tables: digest of all embedding tables.
        kv: by history, digests of the part that its K/V depends on. K/V of a history that is not
            listed depends on the whole model.

    Raises:
        ConfigError: if one of them is not a digest.
    """

    model: str
    tables: str
    kv: Mapping[str, KVVersion] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        of_kv = (digest for version in self.kv.values() for digest in version)
        for digest in (self.model, self.tables, *of_kv):
            if not _DIGEST.fullmatch(digest):
                raise ConfigError(
                    f"a model's version has {digest!r}; a hexadecimal digest is allowed, of at "
                    f"least {VERSION_DIGITS} digits: version_of makes both"
                )

    def __str__(self) -> str:
        """The model version in answers: ``<model>-<tables>``, cut to 16 digits each."""
        return str(KVVersion(self.model, self.tables))

    @property
    def kv_versions(self) -> tuple[str, ...]:
        """Versions of the K/V of all histories: models with the same ones share their K/V."""
        return tuple(map(str, self.kv.values())) or (str(self),)


# For a model that is only tried out: its K/V must stay in this process, in a store of its own.
UNNAMED = ModelVersion("0" * VERSION_DIGITS, "0" * VERSION_DIGITS)


class Identity(NamedTuple):
    """Everything except the user's events that K/V depends on.

    Attributes:
        model: digest of what computes it, see ``KVVersion``.
        tables: digest of the embedding tables that it is computed from.
        context: digest of the context columns that history rows read; ``NO_CONTEXT`` for none.
        tower: the history's name.
        block: events per block; the history has a digest at the end of each block.
    """

    model: str
    tables: str
    context: str
    tower: str
    block: int

    @property
    def kv_version(self) -> str:
        """The version of the K/V: ``<model>-<tables>``, see ``KVVersion``."""
        return f"{self.model}-{self.tables}"


def identity_of(version: ModelVersion, context: str, tower: str, block: int) -> Identity:
    """Return the identity of a model's K/V of one history, ``tower``."""
    of_history = version.kv.get(tower) or KVVersion(version.model, version.tables)
    model, _, tables = str(of_history).partition("-")
    return Identity(model=model, tables=tables, context=context, tower=tower, block=block)


class Content(NamedTuple):
    """The identity and events that K/V was encoded from.

    Attributes:
        identity: everything else that the K/V depends on.
        blocks: digests of the first block of events, of the first two, and so on.
        whole: digest of all events.
        first_event: index of the first event in the user's full history.
        first_time: Unix seconds of the first event; 0 if there is none.
        num_events: number of events in the window.
    """

    identity: Identity
    blocks: tuple[bytes, ...]
    whole: bytes
    first_event: int
    first_time: int
    num_events: int


def text_digest(text: str) -> str:
    """Return a digest of any text that is safe in every key: 32 hexadecimal digits."""
    encoded = text.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(encoded, digest_size=DIGEST_BYTES).hexdigest()


def model_digest(
    state: Mapping[str, Tensor],
    description: Mapping[str, Any],
    known: dict[Hashable, bytes] | None = None,
) -> str:
    """Return a digest of weights, tables, architecture and window.

    Args:
        state: the model's state dict, or a part of it.
        description: sizes, encoder and schema, as JSON values.
        known: digests of tensors that were read before, by their place in memory; none by default.

    Returns:
        Hexadecimal text.
    """
    known = {} if known is None else known
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # A model's state has its tables under two names, and tables take long to read.
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if place not in known:
            content = tensor.detach().cpu().contiguous().numpy().tobytes()
            known[place] = hashlib.sha256(content).digest()
        digest.update(known[place])
    return digest.hexdigest()


def version_of(
    model: RankingModel, schema: FeatureSchema, runtime: str = "", table_dtype: str = ""
) -> ModelVersion:
    """Return the version of a model with its present weights.

    Args:
        model: the model; its whole state is read.
        schema: its columns.
        runtime: name of a runtime whose K/V differs from the eager model's in the last bits.
        table_dtype: dtype that the tables will be quantised to.
    """
    encoder = asdict(model.collection.towers()[0].spec)
    of_runtime = {"runtime": runtime} if runtime else {}
    of_tables = {"dtype": table_dtype} if table_dtype else {}
    dense, tables = split_tables(model)
    known: dict[Hashable, bytes] = {}
    kv = {}
    for history, weights in zip(schema.histories, model.collection.kv_weights(), strict=True):
        # Ids are not described: the digests of events are of table rows.
        described: dict[str, Any] = {
            "encoder": encoder,
            "history": asdict(history),
            "columns": [schema.event_columns, schema.event_floats, schema.item_attributes],
        }
        described |= _linear_layers(weights.modules) | of_runtime
        names = {f"collection.{name}" for name in weights.names}
        kv[history.name] = KVVersion(
            model_digest({n: dense[n] for n in dense.keys() & names}, described, known),
            model_digest({n: tables[n] for n in tables.keys() & names}, of_tables, known),
        )
    described = {"encoder": encoder, "schema": schema.to_json()}
    described |= _linear_layers(model.modules()) | of_runtime
    return ModelVersion(
        model_digest(dense, described, known), model_digest(tables, of_tables, known), kv
    )


def _linear_layers(modules: Iterable[nn.Module]) -> dict[str, list[str]]:
    """Describe unusual kinds of linear layer: they change the last bits of K/V."""
    kinds = {type(module).__name__ for module in modules if isinstance(module, nn.Linear)}
    others = sorted(kinds - {"Linear", "Projection"})
    return {"linear": others} if others else {}


class PrefixDigests:
    """Digests of a history's prefixes, to find the longest cached prefix.

    Args:
        events: the history, already cut to its window.
        schema: the model's columns; their order is the order in the digests.
        identity: everything else that the K/V depends on.

    Attributes:
        num_events: of the whole history.
        first_event: index of its first event in the user's full history.
        first_time: Unix seconds of its first event; 0 if there is none.

    Example:
        >>> import torch
        >>> from torchrec_kvshare.features.schema import FeatureSchema, History, Vocabulary, Window
        >>> histories = (History("history", Window(8, 4)),)
        >>> schema = FeatureSchema({}, histories=histories)
        >>> times = torch.arange(5)
        >>> identity = identity_of(UNNAMED, NO_CONTEXT, "history", 2)
        >>> five = PrefixDigests(Events({"time": times}, {}, 0), schema, identity)
        >>> three = PrefixDigests(Events({"time": times[:3]}, {}, 0), schema, identity)
        >>> five.at(3) == three.at(3), len(five.blocks)
        (True, 2)
    """

    def __init__(self, events: Events, schema: FeatureSchema, identity: Identity) -> None:
        self.identity = identity
        self.num_events = events.num_events
        self.first_event = events.first_event
        self.first_time = int(events.columns[TIME][0]) if events.num_events else 0
        bags = [events.bags[column] for column in schema.item_attributes]
        columns = [events.columns[column].numpy() for column in sorted(events.columns)]
        columns += [events.floats[column].numpy().view(np.uint32) for column in schema.event_floats]
        columns += [bag.lengths.numpy() for bag in bags]
        # Row by row: a prefix of events is a prefix of bytes. Rows and times are below 2**32.
        rows = np.empty((events.num_events, len(columns)), dtype=np.uint32)
        for index, column in enumerate(columns):
            rows[:, index] = column
        self._parts = [rows, *(bag.values.numpy().astype(np.uint32) for bag in bags)]

    @property
    def content(self) -> Content:
        """Identity and digests, as a cache keeps them beside the K/V."""
        return Content(
            identity=self.identity,
            blocks=self.blocks,
            whole=self.whole,
            first_event=self.first_event,
            first_time=self.first_time,
            num_events=self.num_events,
        )

    @cached_property
    def whole(self) -> bytes:
        """Digest of all events."""
        return self.at(self.num_events)

    @cached_property
    def blocks(self) -> tuple[bytes, ...]:
        """Digests of the first block of events, of the first two, and so on."""
        block = self.identity.block
        states = [hashlib.blake2b(digest_size=DIGEST_BYTES) for _ in self._parts]
        digests = []
        for last in range(block, self.num_events + 1, block):
            for state, part, ends in zip(states, self._parts, self._ends, strict=True):
                state.update(part[ends[last - block] : ends[last]].data)
            digests.append(_joined(states, last))
        return tuple(digests)

    def at(self, num_events: int) -> bytes:
        """Return the digest of the first ``num_events`` events: 16 bytes."""
        parts = self._parts
        if num_events < self.num_events:
            parts = [part[: ends[num_events]] for part, ends in zip(parts, self._ends, strict=True)]
        states = [hashlib.blake2b(part.data, digest_size=DIGEST_BYTES) for part in parts]
        return _joined(states, num_events)

    @cached_property
    def _ends(self) -> list[Sequence[int]]:
        """For each part and number of events, the end of these events in the part."""
        rows = self._parts[0]
        num_bags = len(self._parts) - 1
        lengths = rows[:, rows.shape[1] - num_bags :].T
        return [range(self.num_events + 1), *([0, *each.cumsum().tolist()] for each in lengths)]


def why_different(cached: Identity, wanted: Identity) -> str:
    """Return the reason why K/V of another identity is not used: the first field that differs."""
    return next(
        name
        for name, has, needs in zip(Identity._fields, cached, wanted, strict=True)
        if has != needs
    )


def compare(cached: Content, history: PrefixDigests) -> tuple[str, int]:
    """Return how many first events of a history cached K/V is valid for, and why not for all.

    Args:
        cached: identity and events of the cached K/V.
        history: the history to score.

    Returns:
        ``hit`` or a reason, and the number of events in the common prefix.
    """
    if cached.identity != history.identity:
        return why_different(cached.identity, history.identity), 0
    num_events = cached.num_events
    if num_events <= history.num_events and cached.whole == history.at(num_events):
        return (HIT if num_events == history.num_events else COLD), num_events
    num_blocks = 0
    for ours, theirs in zip(history.blocks, cached.blocks, strict=False):
        if ours != theirs:
            break
        num_blocks += 1
    # If a client does not send first_event, a later first time shows that the oldest events left.
    has_slid = cached.first_time < history.first_time
    if num_blocks == 0 and (has_slid or cached.first_event != history.first_event):
        return SLID, 0
    reason = SHRUNK if history.num_events < num_events else EDITED
    return reason, num_blocks * history.identity.block


def _joined(states: Sequence["hashlib.blake2b"], num_events: int) -> bytes:
    """Digest the parts and the number of events, which tells where each part ends."""
    joined = hashlib.blake2b(num_events.to_bytes(8, "little"), digest_size=DIGEST_BYTES)
    for state in states:
        joined.update(state.digest())
    return joined.digest()

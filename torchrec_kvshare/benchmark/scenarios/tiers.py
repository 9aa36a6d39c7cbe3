"""Fetching K/V from a tier against encoding it, and from how many events on fetching pays.

Fetching is the tier's ``get``, reading the packet, and writing the K/V into pages.
Putting is writing the packet and the tier's ``put``. Encoding is the model's prefill alone, though
its K/V has to be written into pages too. Files of the disk tier are in the page cache, like all
files that were just written; the remote tier is a Redis on this machine.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_kvshare.benchmark.options import (
    MERGE,
    EncoderOptions,
    ModelSizes,
    PageSize,
    TimedOptions,
)
from torchrec_kvshare.benchmark.results import PREFILL_PATH, Case, Record
from torchrec_kvshare.benchmark.timing import interleaved_medians
from torchrec_kvshare.benchmark.workload import BYTES, make_dlrm, make_schema
from torchrec_kvshare.cache.break_even import break_even_events
from torchrec_kvshare.cache.codecs import Codec, get_codec
from torchrec_kvshare.cache.disk import MIN_CAPACITY_BYTES, DiskTier
from torchrec_kvshare.cache.identity import (
    NO_CONTEXT,
    UNNAMED,
    ModelVersion,
    PrefixDigests,
    identity_of,
    text_digest,
)
from torchrec_kvshare.cache.keys import read_key
from torchrec_kvshare.cache.kv_cache import KVCache
from torchrec_kvshare.cache.pages import PagePool
from torchrec_kvshare.cache.policies import LruPolicy
from torchrec_kvshare.cache.record import KVRecord, pack, scope_of, unpack
from torchrec_kvshare.cache.remote import RemoteTier
from torchrec_kvshare.cache.tiers import HostTier, Tier
from torchrec_kvshare.deploy.redis_server import redis_server
from torchrec_kvshare.errors import ConfigError, ParityError, TierError
from torchrec_kvshare.export.artifact import add_measured
from torchrec_kvshare.export.exporter import load_artifact
from torchrec_kvshare.features.batches import collate_history
from torchrec_kvshare.features.draw import draw_raw_request
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.features.schema import FeatureSchema
from torchrec_kvshare.features.tensors import FLOAT32
from torchrec_kvshare.history.kinds import LONGER, TowerSpec
from torchrec_kvshare.history.pages import split_histories
from torchrec_kvshare.model.ranking import RankingFunctions, RankingModel
from torchrec_kvshare.verify.codecs import is_within_error

logger = logging.getLogger(__name__)

TIERS = "tiers"
BREAK_EVEN = "break_even_events"
MEASURED_CODECS = (FLOAT32, "int8")
SHORTEST = 16  # events; the ladder of lengths doubles from there
TTL_S = 3600.0  # longer than any run
NUM_WARM_UP = 3  # prefills: TorchScript rewrites a program during its first calls
# Host and disk have room for that many values of the largest size. About thirty are put (lengths
# times codecs), but a value on disk may take at most a 512th of the budget.
NUM_VALUES = 1024
FETCHED = "fetched"  # user of the K/V in the pages, which every fetch replaces

REDIS_TIMEOUT_S = 15.0  # until it answers: the machine may be busy


@dataclass
class TiersOptions(TimedOptions, EncoderOptions, ModelSizes, PageSize):
    """Options of ``scenario=tiers``; with an artifact its model is measured, and none is drawn."""

    histories: list[int] = field(default_factory=lambda: [256, 1000])  # events
    long_histories: list[int] = field(default_factory=lambda: [4096])  # events, likewise
    artifact: str | None = None  # output of pipelines.export; its manifest gets the break-even
    artifact_key_file: str | None = None  # secret the artifact must be signed with

    @property
    def lengths(self) -> list[int]:
        """All histories, in events."""
        return [*self.histories, *self.long_histories]


@dataclass(frozen=True, eq=False)
class Subject:
    """A model to measure.

    Attributes:
        model: the model.
        schema: its columns.
        version: of the model.
        case: its sizes, as they stand in records.
        lengths: of the histories, in events.
    """

    model: RankingFunctions
    schema: FeatureSchema
    version: ModelVersion
    case: Case
    lengths: Sequence[int]


@dataclass(frozen=True, eq=False)
class EncodedUser:
    """The K/V of a user.

    Attributes:
        key: of the user, in tiers.
        num_events: of the user's longest history.
        prefill: encodes all histories.
        records: one for each history that has events.
    """

    key: str
    num_events: int
    prefill: Callable[[], list[Tensor]]
    records: Sequence[KVRecord]


class Shelf(NamedTuple):
    """A tier and a codec that K/V is written in."""

    tier: Tier
    codec: Codec

    @property
    def name(self) -> str:
        """The ``path`` in records."""
        return f"{self.tier.name}_{self.codec.name}"

    def put(self, user: EncodedUser) -> int:
        """Write a user's K/V and return its bytes."""
        num_bytes = 0
        for record in user.records:
            packet = pack(record, user.key, self.codec, key=None)
            scope = scope_of(record.content.identity, self.codec.name)
            self.tier.put(user.key, scope, packet, record.encoded_at)
            num_bytes += len(packet)
        return num_bytes

    def fetch(self, user: EncodedUser, cache_by_history: Mapping[str, KVCache]) -> list[Tensor]:
        """Bring a user's K/V into pages.

        Args:
            user: a user whose K/V was put.
            cache_by_history: the pages, by the history's name.

        Returns:
            The rows [planes, R, H, D] of each record; the next fetch overwrites them.

        Raises:
            TierError: if the tier no longer has the K/V.
        """
        identities = [record.content.identity for record in user.records]
        scopes = [scope_of(identity, self.codec.name) for identity in identities]
        rows = []
        answers = self.tier.get([(user.key, scope) for scope in scopes])
        for identity, found in zip(identities, answers, strict=True):
            if found.value is None:
                raise TierError(f"tier {self.tier.name} lost K/V of {user.num_events} events")
            record = unpack(found.value, user.key, identity, self.codec, key=None)
            cache = cache_by_history[identity.tower]
            entry = cache.put(FETCHED, record.content, record.kv, encoded_at=record.encoded_at)
            assert entry is not None  # The pages have room for the longest.
            cache.release(entry)
            rows.append(cache.pool.read(entry.pages, entry.num_rows))
        return rows


class Cell(NamedTuple):
    """Figures of one length of history in one tier and codec."""

    tier: str
    codec: str
    num_events: int
    prefill_ms: float
    fetch_ms: float
    put_ms: float
    num_bytes: int

    @property
    def fetch_to_prefill(self) -> float:
        return self.fetch_ms / self.prefill_ms


@torch.no_grad()
def measure_tiers(options: TiersOptions) -> list[Record]:
    """Measure fetching and putting K/V by tier, codec and length of the history.

    Lengths are 16 events, 32, 64 and so on up to the longest, and those of the options; an
    artifact's window is the longest. Its manifest gets the break-even lengths of float32. The disk
    tier is in a temporary folder. The remote tier is a redis-server that is started and stopped
    here; if there is none on PATH, the log says so and there are no records of it.

    Returns:
        By tier and codec ``fetch_ms``, ``put_ms``, ``fetch_to_prefill`` and ``bytes`` of each
        length, and ``break_even_events``; of each length ``prefill_ms``.

    Raises:
        ArtifactError: if the artifact is broken.
        ConfigError: if there is no history to measure.
        MissingExtraError: if a tier's packages are not installed.
        ParityError: if K/V that is fetched is not what was put.
        TierError: if a tier or its server fails.
    """
    key = read_key(options.artifact_key_file, "artifact_key_file")
    folder = None if options.artifact is None else Path(options.artifact)
    if folder is None:
        subjects = [_drawn(options, encoder) for encoder in options.encoders]
    else:
        subjects = [_exported(options, folder, key)]
    records = [
        record for subject in subjects for record in _records(subject, _measured(subject, options))
    ]
    if folder is not None:
        least_by_tier = {
            str(record.case["tier"]): int(record.value)
            for record in records
            if record.metric == BREAK_EVEN and record.case["codec"] == FLOAT32
        }
        add_measured(folder, key, break_even_events=least_by_tier)
    return records


# --- subjects


def _drawn(options: TiersOptions, encoder: str) -> Subject:
    """Draw a model of this kind."""
    if not options.lengths:
        raise ConfigError("histories and long_histories are empty; one history is needed")
    longest = max(options.lengths)
    # The recent events of ``longer`` are a part of the window, in whole blocks.
    schema = make_schema(longest, num_users=1, block=MERGE if encoder == LONGER else None)
    model = RankingModel(make_dlrm(schema, options, options.seed, encoder)).eval()
    lengths = _ladder(options.lengths, longest)
    return Subject(model, schema, UNNAMED, case=options.case(encoder), lengths=lengths)


def _exported(options: TiersOptions, folder: Path, key: bytes | None) -> Subject:
    """Load the model of an artifact."""
    artifact = load_artifact(folder, key)
    longest = max(history.window.max_history for history in artifact.schema.histories)
    if beyond := [length for length in options.lengths if length > longest]:
        logger.info("histories of %s events are not measured: %s reads %s", beyond, folder, longest)
    spec = TowerSpec(**artifact.manifest.encoder)
    sizes = ModelSizes(
        dim=spec.dim,
        num_layers=spec.num_layers,
        num_heads=spec.num_heads,
        num_tokens=spec.num_tokens,
    )
    return Subject(
        artifact.model,
        artifact.schema,
        artifact.manifest.version,
        case=sizes.case(spec.kind),
        lengths=_ladder(options.lengths, longest),
    )


def _ladder(wanted: Sequence[int], longest: int) -> list[int]:
    """Return lengths that double up to the longest, and the wanted ones up to there."""
    lengths = {longest, *(length for length in wanted if length <= longest)}
    rung = SHORTEST
    while rung < longest:
        lengths.add(rung)
        rung *= 2
    return sorted(lengths)


def encoded_user(subject: Subject, length: int, page_size: int, seed: int) -> EncodedUser:
    """Encode a user with ``length`` drawn events; their actions decide which history has them."""
    schema = subject.schema
    request = parse_request(draw_raw_request(schema, length, 1, seed), schema)
    features = collate_history([request], schema).sparse_features
    prefill = partial(subject.model.prefill, features)
    for _ in range(NUM_WARM_UP):
        kv_by_history = prefill()
    rows = subject.model.num_kv_rows(request.num_events_by_history)
    [kv_of_user] = split_histories(kv_by_history, [rows])
    records = []
    for history, kv in zip(schema.histories, kv_of_user, strict=True):
        identity = identity_of(subject.version, NO_CONTEXT, history.name, page_size)
        events = request.events_by_history[history.name]
        if events.num_events:
            content = PrefixDigests(events, schema, identity).content
            records.append(KVRecord(content, time.time(), kv))
    longest = max((record.content.num_events for record in records), default=0)
    return EncodedUser(text_digest(f"{length} events"), longest, prefill, records)


# --- measuring


def _measured(subject: Subject, options: TiersOptions) -> list[Cell]:
    page_size = options.page_size
    drawn = [encoded_user(subject, length, page_size, options.seed) for length in subject.lengths]
    users = [user for user in drawn if user.records]
    if not users:
        raise ConfigError(
            f"histories of {subject.lengths} drawn events have no action that a tower reads"
        )
    cache_by_history = caches_for(users, page_size)
    cells = []
    with TemporaryDirectory() as name, redis_server(Path(name)) as server:
        url = None if server is None else server.url
        fetched, written = Path(name) / "fetched", Path(name) / "written"
        with _filled(fetched, url, users) as full, _shelves(written, url, users) as others:
            for user in users:
                cells += _cells(
                    user, cache_by_history, full=full, others=others, repeats=options.repeats
                )
    return cells


def caches_for(users: Sequence[EncodedUser], page_size: int) -> dict[str, KVCache]:
    """Return, by the history's name, a cache with room for the longest user."""
    longest_by_name: dict[str, Tensor] = {}
    for record in (record for user in users for record in user.records):
        name = record.content.identity.tower
        if name not in longest_by_name or record.kv.size(1) > longest_by_name[name].size(1):
            longest_by_name[name] = record.kv
    caches = {}
    for name, kv in longest_by_name.items():
        num_planes, num_rows, *head_shape = kv.shape
        num_pages = -(-num_rows // page_size)
        capacity_bytes = num_pages * page_size * num_planes * prod(head_shape) * BYTES
        caches[name] = KVCache(PagePool(capacity_bytes, page_size, num_planes, *head_shape))
    return caches


@contextmanager
def _shelves(folder: Path, url: str | None, users: Sequence[EncodedUser]) -> Iterator[list[Shelf]]:
    """Open every tier, in every codec, with room for all users; without a url no remote tier."""
    largest_bytes = max(record.kv.numel() * BYTES for user in users for record in user.records)
    capacity_bytes = max(MIN_CAPACITY_BYTES, NUM_VALUES * largest_bytes)
    with ExitStack() as stack:
        tiers: list[Tier] = [HostTier(LruPolicy(capacity_bytes), TTL_S)]
        tiers.append(DiskTier(folder, capacity_bytes, TTL_S))
        stack.callback(tiers[-1].close)
        if url is not None:
            tiers.append(RemoteTier(url, TTL_S, REDIS_TIMEOUT_S))
            stack.callback(tiers[-1].close)
        yield [Shelf(tier, get_codec(codec)) for tier in tiers for codec in MEASURED_CODECS]


@contextmanager
def _filled(folder: Path, url: str | None, users: Sequence[EncodedUser]) -> Iterator[list[Shelf]]:
    """Open the tiers with the K/V of all users; the disk tier is reopened, so it is in files."""
    with _shelves(folder, url, users) as shelves:
        for shelf in shelves:
            for user in users:
                shelf.put(user)
    with _shelves(folder, url, users) as shelves:
        for shelf in shelves:
            if shelf.tier.name == HostTier.name:
                for user in users:
                    shelf.put(user)
        yield shelves


def _cells(
    user: EncodedUser,
    cache_by_history: Mapping[str, KVCache],
    full: Sequence[Shelf],
    others: Sequence[Shelf],
    repeats: int,
) -> list[Cell]:
    """Measure one user: K/V is fetched from the full shelves and put into the others."""
    calls: dict[str, Callable[[], object]] = {PREFILL_PATH: user.prefill}
    num_bytes = []
    for shelf, other in zip(full, others, strict=True):
        for record, read in zip(user.records, shelf.fetch(user, cache_by_history), strict=True):
            if not is_within_error(shelf.codec, record.kv, read):
                raise ParityError(
                    f"K/V of {user.num_events} events from {shelf.name} is not what was put there"
                )
        num_bytes.append(other.put(user))
        calls[f"fetch {shelf.name}"] = partial(shelf.fetch, user, cache_by_history)
        calls[f"put {shelf.name}"] = partial(other.put, user)
    latency_ms = interleaved_medians(calls, repeats)
    return [
        Cell(
            tier=shelf.tier.name,
            codec=shelf.codec.name,
            num_events=user.num_events,
            prefill_ms=latency_ms[PREFILL_PATH],
            fetch_ms=latency_ms[f"fetch {shelf.name}"],
            put_ms=latency_ms[f"put {shelf.name}"],
            num_bytes=packed_bytes,
        )
        for shelf, packed_bytes in zip(full, num_bytes, strict=True)
    ]


# --- records


def _records(subject: Subject, cells: Sequence[Cell]) -> Iterator[Record]:
    prefill_ms_by_length = {cell.num_events: cell.prefill_ms for cell in cells}
    for num_events, prefill_ms in prefill_ms_by_length.items():
        case = subject.case | {"path": PREFILL_PATH, "history": num_events, "users": 1}
        yield Record(TIERS, case, "prefill_ms", prefill_ms, unit="ms")
    ratios_by_shelf: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for cell in cells:
        case = subject.case | _shelf_case(cell.tier, cell.codec)
        case |= {"history": cell.num_events, "users": 1}
        yield Record(TIERS, case, "fetch_ms", cell.fetch_ms, unit="ms")
        yield Record(TIERS, case, "put_ms", cell.put_ms, unit="ms")
        yield Record(TIERS, case, "fetch_to_prefill", cell.fetch_to_prefill, unit="x")
        yield Record(TIERS, case, "bytes", cell.num_bytes, unit="bytes")
        ratios_by_shelf[cell.tier, cell.codec][cell.num_events] = cell.fetch_to_prefill
    for (tier, codec), ratios in ratios_by_shelf.items():
        case = subject.case | _shelf_case(tier, codec)
        yield Record(TIERS, case, BREAK_EVEN, break_even_events(ratios), unit="events")


def _shelf_case(tier: str, codec: str) -> Case:
    return {"path": f"{tier}_{codec}", "tier": tier, "codec": codec}

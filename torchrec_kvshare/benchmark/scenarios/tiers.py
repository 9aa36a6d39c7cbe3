"""What fetching K/V from a tier costs against encoding it, and from how many events on it pays.

Fetching is the tier's ``get``, reading the packet, and writing the K/V into the device's pages.
Putting is writing the packet and the tier's ``put``. Encoding is the model's prefill alone, though
its K/V has to be written into pages too. Files of the disk tier are in the page cache, as files are
that were written lately; the remote tier is a Redis on this machine.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrec_kvshare.benchmark.plan import MERGE, Plan, Sizes
from torchrec_kvshare.benchmark.results import Case, Record
from torchrec_kvshare.benchmark.timing import interleaved_medians
from torchrec_kvshare.benchmark.workload import BYTES, fill_zeros, make_schema
from torchrec_kvshare.cache.codecs import CHANNELS, ROW_BLOCK, Codec, get_codec
from torchrec_kvshare.cache.disk import MIN_CAPACITY_BYTES, DiskTier
from torchrec_kvshare.cache.identity import (
    NO_CONTEXT,
    UNNAMED,
    ModelVersion,
    PrefixDigests,
    identity_of,
    text_digest,
)
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
from torchrec_kvshare.history.kinds import LONGER, TowerSpec
from torchrec_kvshare.history.pages import split_histories
from torchrec_kvshare.model.ranking import RankingFunctions, RankingModel, dlrm_with_history

logger = logging.getLogger(__name__)

TIERS = "tiers"
PREFILL = "prefill"
BREAK_EVEN = "break_even_events"
FLOAT32 = "float32"
CODECS = (FLOAT32, "int8")
SHORTEST = 16  # events; the ladder of lengths doubles from there
TTL_S = 3600.0  # longer than any run
NUM_WARM_UP = 3  # prefills: TorchScript rewrites a program in its first calls
# Values of the largest size that host and disk hold: all lengths in all codecs are some thirty, and
# a value on disk is at most a 512th of the budget.
NUM_VALUES = 1024
ON_DEVICE = "fetched"  # whose K/V is replaced by every fetch

REDIS_TIMEOUT_S = 15.0  # until it answers: the machine may be busy


@dataclass(frozen=True, eq=False)
class Subject:
    """A model that is measured.

    Attributes:
        model: what it computes.
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
    """A user's K/V.

    Attributes:
        key: who it is, as tiers have it.
        num_events: of the longest of its histories.
        prefill: encodes them anew.
        records: of each history that has events.
    """

    key: str
    num_events: int
    prefill: Callable[[], list[Tensor]]
    records: Sequence[KVRecord]


class Shelf(NamedTuple):
    """A tier and the codec that K/V is written in there."""

    tier: Tier
    codec: Codec

    @property
    def name(self) -> str:
        """As ``path`` in records."""
        return f"{self.tier.name}_{self.codec.name}"

    def put(self, user: EncodedUser) -> int:
        """Write a user's K/V; returns its bytes."""
        num_bytes = 0
        for record in user.records:
            packet = pack(record, user.key, self.codec, key=None)
            scope = scope_of(record.content.identity, self.codec.name)
            self.tier.put(user.key, scope, packet, record.encoded_at)
            num_bytes += len(packet)
        return num_bytes

    def fetch(self, user: EncodedUser, device: Mapping[str, KVCache]) -> list[Tensor]:
        """Bring a user's K/V to the device, by the history's name.

        Returns:
            The rows [planes, R, H, D] of each record, which the next fetch overwrites.

        Raises:
            TierError: if the tier has not what was put there.
        """
        identities = [record.content.identity for record in user.records]
        scopes = [scope_of(identity, self.codec.name) for identity in identities]
        rows = []
        answers = self.tier.get([(user.key, scope) for scope in scopes])
        for identity, found in zip(identities, answers, strict=True):
            if found.value is None:
                raise TierError(f"tier {self.tier.name} lost K/V of {user.num_events} events")
            record = unpack(found.value, user.key, identity, self.codec, key=None)
            cache = device[identity.tower]
            entry = cache.put(ON_DEVICE, record.content, record.kv, encoded_at=record.encoded_at)
            assert entry is not None  # The device has room for the longest.
            cache.release(entry)
            rows.append(cache.pool.read(entry.pages, entry.num_rows))
        return rows


class Cell(NamedTuple):
    """What one length of history cost in one tier and codec."""

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
def measure_tiers(plan: Plan, sizes: Sizes) -> list[Record]:
    """Fetching and putting K/V by tier, codec and length of the history, against its prefill.

    Lengths are 16 events, 32, 64 and so on up to the longest, and those of the plan. The disk tier
    lies in a temporary folder. The remote tier is a redis-server that is started here and ended; if
    there is none on PATH, the log says so and there are no records of it.

    Args:
        plan: ``histories`` and ``long_histories``; ``encoders``, drawn untrained, or ``artifact``,
            whose window is the longest then and whose manifest gets the break-even lengths of
            float32; ``repeats``, ``seed``.
        sizes: of the towers that are drawn; ``page_size``.

    Returns:
        By tier and codec ``fetch_ms``, ``put_ms``, ``fetch_to_prefill`` and ``bytes`` of each
        length, and ``break_even_events``, see there; of each length ``prefill_ms``.

    Raises:
        ArtifactError: if the artifact is broken.
        ConfigError: if there is no history to measure.
        MissingExtraError: if a tier's packages are not installed.
        ParityError: if K/V that is fetched is not what was put.
        TierError: if a tier or its server fails.
    """
    if plan.artifact is None:
        subjects = [_drawn(plan, sizes, encoder) for encoder in plan.encoders]
    else:
        subjects = [_exported(plan, plan.artifact, sizes)]
    records = [
        record
        for subject in subjects
        for record in _records(subject, _measured(subject, plan, sizes.page_size))
    ]
    if plan.artifact is not None:
        least_by_tier = {
            str(record.case["tier"]): int(record.value)
            for record in records
            if record.metric == BREAK_EVEN and record.case["codec"] == FLOAT32
        }
        add_measured(plan.artifact, plan.artifact_key, break_even_events=least_by_tier)
    return records


def break_even_events(fetch_to_prefill: Mapping[int, float]) -> int:
    """The shortest history from which on fetching is the cheaper one at all lengths measured.

    Args:
        fetch_to_prefill: time of the one over that of the other, by events.

    Returns:
        Its events; one more than the longest if fetching that is not cheaper.

    Example:
        >>> break_even_events({16: 1.5, 32: 0.9, 64: 1.1, 128: 0.6, 256: 0.4})
        128
        >>> break_even_events({16: 0.5, 32: 1.2})
        33
    """
    least = max(fetch_to_prefill) + 1
    for num_events in sorted(fetch_to_prefill, reverse=True):
        if not fetch_to_prefill[num_events] < 1.0:
            break
        least = num_events
    return least


def is_within_error(codec: Codec, kv: Tensor, read: Tensor) -> bool:
    """Whether K/V [planes, R, H, D] was read as a codec promises: bit for bit, or within its error.

    Args:
        codec: exact, or one that scales blocks.
        kv: what was written.
        read: what was read.
    """
    if codec.is_exact:
        return torch.equal(*(each.contiguous().view(torch.int32) for each in (kv, read)))
    sizes = kv.double().abs().transpose(1, 2)  # [planes, H, R, D]
    blocks = F.max_pool2d(sizes, (ROW_BLOCK, CHANNELS), ceil_mode=True)
    by_row = blocks.repeat_interleave(ROW_BLOCK, 2).repeat_interleave(CHANNELS, 3)
    greatest = by_row[:, :, : kv.size(1), : kv.size(3)].transpose(1, 2)
    allowed = (greatest * codec.relative_error).clamp_min(codec.absolute_error)
    return bool(((read.double() - kv.double()).abs() <= allowed).all())


# --- what is measured


def _drawn(plan: Plan, sizes: Sizes, encoder: str) -> Subject:
    wanted = [*plan.histories, *plan.long_histories]
    if not wanted:
        raise ConfigError("histories and long_histories are empty; one history is needed")
    longest = max(wanted)
    # Recent events of ``longer`` are a part of the window, in whole blocks.
    schema = make_schema(longest, num_users=1, block=MERGE if encoder == LONGER else None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        ranker = dlrm_with_history(schema, sizes.spec(encoder, longest), [sizes.dim, 1])
    model = RankingModel(fill_zeros(ranker)).eval()
    return Subject(model, schema, UNNAMED, sizes.case(encoder), _lengths(wanted, longest))


def _exported(plan: Plan, folder: Path, sizes: Sizes) -> Subject:
    artifact = load_artifact(folder, plan.artifact_key)
    longest = max(history.window.max_history for history in artifact.schema.histories)
    wanted = [*plan.histories, *plan.long_histories]
    if beyond := [length for length in wanted if length > longest]:
        logger.info("histories of %s events are not measured: %s reads %s", beyond, folder, longest)
    spec = TowerSpec(**artifact.manifest.encoder)
    of_artifact = Sizes(
        spec.dim,
        spec.num_layers,
        spec.num_heads,
        sizes.page_size,
        spec.num_tokens,
    )
    return Subject(
        artifact.model,
        artifact.schema,
        artifact.manifest.version,
        of_artifact.case(spec.kind),
        _lengths(wanted, longest),
    )


def _lengths(wanted: Sequence[int], longest: int) -> list[int]:
    """The ladder, and what of the plan is no longer than its end."""
    lengths = {longest, *(length for length in wanted if length <= longest)}
    rung = SHORTEST
    while rung < longest:
        lengths.add(rung)
        rung *= 2
    return sorted(lengths)


def _encoded(subject: Subject, length: int, page_size: int, seed: int) -> EncodedUser:
    """A user with a drawn history of so many events; its actions say which history has them."""
    schema = subject.schema
    request = parse_request(draw_raw_request(schema, length, 1, seed), schema)
    features = collate_history([request], schema).sparse_features
    prefill = partial(subject.model.prefill, features)
    for _ in range(NUM_WARM_UP):
        kv_by_history = prefill()
    rows = subject.model.num_rows(request.num_events_by_history)
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


def _measured(subject: Subject, plan: Plan, page_size: int) -> list[Cell]:
    drawn = [_encoded(subject, length, page_size, plan.seed) for length in subject.lengths]
    users = [user for user in drawn if user.records]
    if not users:
        raise ConfigError(f"no history has an event of those drawn: {subject.lengths}")
    device = _device(users, page_size)
    cells = []
    with TemporaryDirectory() as name, redis_server(Path(name)) as server:
        url = None if server is None else server.url
        fetched, written = Path(name) / "fetched", Path(name) / "written"
        with _filled(fetched, url, users) as full, _shelves(written, url, users) as others:
            for user in users:
                cells += _cells(user, device, full, others, plan.repeats)
    return cells


def _device(users: Sequence[EncodedUser], page_size: int) -> dict[str, KVCache]:
    """By the history's name a cache with room for the longest user."""
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
    """Every tier that there is in every codec, each tier with room for all users."""
    largest_bytes = max(record.kv.numel() * BYTES for user in users for record in user.records)
    capacity_bytes = max(MIN_CAPACITY_BYTES, NUM_VALUES * largest_bytes)
    with ExitStack() as stack:
        tiers: list[Tier] = [HostTier(LruPolicy(capacity_bytes), TTL_S)]
        tiers.append(DiskTier(folder, capacity_bytes, TTL_S))
        stack.callback(tiers[-1].close)
        if url is not None:
            tiers.append(RemoteTier(url, TTL_S, REDIS_TIMEOUT_S))
            stack.callback(tiers[-1].close)
        yield [Shelf(tier, get_codec(codec)) for tier in tiers for codec in CODECS]


@contextmanager
def _filled(folder: Path, url: str | None, users: Sequence[EncodedUser]) -> Iterator[list[Shelf]]:
    """The tiers with everybody's K/V; on disk it lies in files, for the tier was closed since."""
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
    device: Mapping[str, KVCache],
    full: Sequence[Shelf],
    others: Sequence[Shelf],
    repeats: int,
) -> list[Cell]:
    """One user's figures, fetched from some shelves and put into others."""
    calls: dict[str, Callable[[], object]] = {PREFILL: user.prefill}
    num_bytes = []
    for shelf, other in zip(full, others, strict=True):
        for record, read in zip(user.records, shelf.fetch(user, device), strict=True):
            if not is_within_error(shelf.codec, record.kv, read):
                raise ParityError(
                    f"K/V of {user.num_events} events from {shelf.name} is not what was put there"
                )
        num_bytes.append(other.put(user))
        calls[f"fetch {shelf.name}"] = partial(shelf.fetch, user, device)
        calls[f"put {shelf.name}"] = partial(other.put, user)
    latency_ms = interleaved_medians(calls, repeats)
    return [
        Cell(
            shelf.tier.name,
            shelf.codec.name,
            user.num_events,
            latency_ms[PREFILL],
            latency_ms[f"fetch {shelf.name}"],
            latency_ms[f"put {shelf.name}"],
            packed_bytes,
        )
        for shelf, packed_bytes in zip(full, num_bytes, strict=True)
    ]


# --- records


def _records(subject: Subject, cells: Sequence[Cell]) -> Iterator[Record]:
    prefill_ms_by_length = {cell.num_events: cell.prefill_ms for cell in cells}
    for num_events, prefill_ms in prefill_ms_by_length.items():
        case = subject.case | {"path": PREFILL, "history": num_events, "users": 1}
        yield Record(TIERS, case, "prefill_ms", prefill_ms, "ms")
    ratios_by_shelf: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for cell in cells:
        case = subject.case | _shelf_case(cell.tier, cell.codec)
        case |= {"history": cell.num_events, "users": 1}
        yield Record(TIERS, case, "fetch_ms", cell.fetch_ms, "ms")
        yield Record(TIERS, case, "put_ms", cell.put_ms, "ms")
        yield Record(TIERS, case, "fetch_to_prefill", cell.fetch_to_prefill, "x")
        yield Record(TIERS, case, "bytes", cell.num_bytes, "bytes")
        ratios_by_shelf[cell.tier, cell.codec][cell.num_events] = cell.fetch_to_prefill
    for (tier, codec), ratios in ratios_by_shelf.items():
        case = subject.case | _shelf_case(tier, codec)
        yield Record(TIERS, case, BREAK_EVEN, break_even_events(ratios), "events")


def _shelf_case(tier: str, codec: str) -> Case:
    return {"path": f"{tier}_{codec}", "tier": tier, "codec": codec}

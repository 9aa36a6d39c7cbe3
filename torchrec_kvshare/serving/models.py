"""Served models by name, and how a new version takes over from an old one.

A new version is loaded beside the old one, scores its golden requests without and with the cache,
gets the K/V of the users that ask most, and takes over between two requests. A version that fails
at any of this is refused, and the old one stays.
"""

import logging
import pickle
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias
from weakref import WeakValueDictionary

from torchrec_kvshare.cache.clock import steady_clock
from torchrec_kvshare.cache.kv_cache import PAGES, remember
from torchrec_kvshare.cache.metrics import CacheMetrics
from torchrec_kvshare.cache.open import MEMORY, OFF, TIERED, new_stack
from torchrec_kvshare.cache.reasons import DRIFT
from torchrec_kvshare.cache.stack import TierStack
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.commands.machine import resident_bytes
from torchrec_kvshare.config import CacheConfig, ServerConfig
from torchrec_kvshare.errors import (
    ArtifactError,
    KVShareError,
    RequestError,
    UnavailableError,
    UnknownModelError,
)
from torchrec_kvshare.export.artifact import MANIFEST
from torchrec_kvshare.export.exporter import load_artifact
from torchrec_kvshare.export.open import kv_sharing_key, new_engine
from torchrec_kvshare.features.decode import cut
from torchrec_kvshare.features.draw import draw_raw_request
from torchrec_kvshare.features.parse import parse_user
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.serving.footprint import batch_bytes, check_memory
from torchrec_kvshare.serving.metrics import ServerMetrics
from torchrec_kvshare.serving.scheduler import batch_limits
from torchrec_kvshare.verify.golden import check_golden

logger = logging.getLogger(__name__)

DEFAULT_NAME, DEFAULT_VERSION = "kvshare", "1"
EXAMPLE_EVENTS, EXAMPLE_CANDIDATES = 6, 5
WARM_SHARE = 0.25  # of the time of a warm-up, spent encoding while an older version answers
WARM_ROUNDS = 3  # of golden requests: TorchScript compiles a program in its first two calls
WARM_CAPACITY_BYTES = 64 * 2**20  # for the K/V of golden requests while they are scored
LOADING, SERVING, DRAINING, REFUSED = "loading", "serving", "draining", "refused"
Content: TypeAlias = list[tuple[str, int, int]]  # of a folder: names, bytes, modification times


class HotUsers:
    """Last requests of the users that ask most often.

    A request is kept as bytes: arrays would keep the whole message alive that they are views of,
    and the size of bytes is known. It is kept raw, as another version has other table rows.

    Args:
        num_users: remembered at most.
        capacity_bytes: for all users; a request beyond its user's share is not remembered.

    Example:
        >>> hot = HotUsers(num_users=2, capacity_bytes=1000)
        >>> for user in "abcbcc":
        ...     hot.remember(user, {"user_id": user})
        >>> [raw["user_id"] for raw in hot.hottest()]
        ['c', 'b']
    """

    def __init__(self, num_users: int, capacity_bytes: int) -> None:
        self._num_users = num_users
        self._bytes_by_user = capacity_bytes // max(num_users, 1)
        self._recent: OrderedDict[str, tuple[int, bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def remember(self, user_id: str, raw: Mapping[str, Any]) -> None:
        """Remember a user's last request."""
        packed = pickle.dumps(raw, pickle.HIGHEST_PROTOCOL)
        with self._lock:
            times, _ = self._recent.pop(user_id, (0, b""))
            if len(packed) > self._bytes_by_user:
                return
            self._recent[user_id] = (times + 1, packed)
            if len(self._recent) > self._num_users:
                # Drop from the older half only, so that a new user has a chance to become hot.
                older = list(self._recent)[: (len(self._recent) + 1) // 2]
                del self._recent[min(older, key=lambda user_id: self._recent[user_id][0])]

    def last(self, user_id: str) -> Mapping[str, Any] | None:
        """Return a user's last request; None if it is not remembered."""
        with self._lock:
            _, packed = self._recent.get(user_id, (0, None))
        return None if packed is None else pickle.loads(packed)

    def replace(self, user_id: str, raw: Mapping[str, Any]) -> None:
        """Put events of a user behind its last request, unless it was forgotten meanwhile.

        It is no request: the user does not become hotter. One that is too long now is dropped.
        """
        packed = pickle.dumps(raw, pickle.HIGHEST_PROTOCOL)
        with self._lock:
            if user_id not in self._recent:
                return
            if len(packed) > self._bytes_by_user:
                del self._recent[user_id]
            else:
                self._recent[user_id] = (self._recent[user_id][0], packed)

    def forget(self, user_id: str) -> None:
        """Drop a user's request."""
        with self._lock:
            self._recent.pop(user_id, None)

    def hottest(self) -> list[Mapping[str, Any]]:
        """Return the last requests, most frequent user first."""
        with self._lock:
            ranked = sorted(self._recent.values(), key=lambda one: one[0], reverse=True)
        return [pickle.loads(packed) for _, packed in ranked]


@dataclass(eq=False)
class Served:
    """A loaded version of a model.

    Attributes:
        name: of the model.
        version: of the model.
        engine: that answers; replaced by one without a cache if the cache is found wrong.
        num_open: requests in flight.
        drift: greatest difference found between a probability with and without the cache.
        store: of the first engine, also after that engine is replaced.
    """

    name: str
    version: str
    engine: Engine
    num_open: int = 0
    drift: float = 0.0
    store: KVStore | None = field(init=False)

    def __post_init__(self) -> None:
        self.store = self.engine.store

    @contextmanager
    def open(self) -> Iterator[None]:
        """Count a request in flight until the block ends."""
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1

    def example(self) -> dict[str, Any]:
        """Return a request that the model can score."""
        drawn = draw_raw_request(self.engine.schema, EXAMPLE_EVENTS, EXAMPLE_CANDIDATES, seed=0)
        return drawn | {"request_id": "example"}


class Standing(NamedTuple):
    """State of a version that is, or was, in the folder."""

    name: str
    version: str
    model_version: str = ""
    state: str = LOADING
    message: str = ""
    kv_versions: tuple[str, ...] = ()


class Loader(Protocol):
    """Loads artifacts as engines whose caches share one ``CacheMetrics``."""

    metrics: CacheMetrics

    def load(self, folder: Path) -> Engine:
        """Return an engine that is ready to answer, or raise."""

    def close(self) -> None:
        """Close the loader when no engine is in use."""


class EngineLoader:
    """Loads artifacts as engines over shared tiers, and over shared pages if their K/V is the same.

    Args:
        cache: config of the cache.
        server: its limits; the memory that they can take must be granted.
        deterministic: make scores bit-equal in any batch, or refuse to load.
        key: that artifacts must be signed with; None loads any.
    """

    def __init__(
        self,
        cache: CacheConfig,
        server: ServerConfig,
        deterministic: bool = False,
        key: bytes | None = None,
    ) -> None:
        self._cache = cache
        self._server = server
        self._deterministic = deterministic
        self._key = key
        self._stack: TierStack | None = None
        self._stores: WeakValueDictionary[Hashable, KVStore] = WeakValueDictionary()
        self.metrics = CacheMetrics()

    def load(self, folder: Path) -> Engine:
        """Load an engine and check it against the golden requests, without and with the cache.

        Raises:
            KVShareError: naming what is broken, missing or wrong, or takes more memory than is
                granted.
        """
        artifact = load_artifact(folder, self._key)
        limits = batch_limits(self._server)
        scoring_bytes = batch_bytes(artifact.manifest, artifact.schema, limits)
        check_memory(self._cache, self._server, resident_bytes(), scoring_bytes)
        name = OFF if self._cache.name == OFF else MEMORY
        trial = replace(self._cache, name=name, capacity_bytes=WARM_CAPACITY_BYTES, pinned_bytes=0)
        engine = new_engine(artifact, trial)
        for _ in range(WARM_ROUNDS):
            check_golden(artifact.golden, engine, folder)
        if self._cache.name == TIERED and self._stack is None:
            measured = artifact.manifest.break_even_events
            self._stack = new_stack(self._cache, measured, self.metrics)
        key = kv_sharing_key(artifact.manifest)
        engine = new_engine(
            artifact,
            self._cache,
            deterministic=self._deterministic,
            stack=self._stack,
            store=self._stores.get(key),
            metrics=self.metrics,
        )
        if engine.store is not None:
            self._stores[key] = engine.store
        return engine

    def close(self) -> None:
        """Flush pending writes and close the tiers."""
        if self._stack is not None:
            self._stack.close()


class Models:
    """The served models.

    Args:
        load: returns the engine of an artifact, or raises.
        metrics: of the server.
        num_hot: users whose K/V a new version starts with.
        hot_bytes: of each model, for the last requests of those users.
    """

    def __init__(
        self,
        load: Callable[[Path], Engine],
        metrics: ServerMetrics,
        num_hot: int,
        hot_bytes: int,
    ) -> None:
        self._load = load
        self._metrics = metrics
        self._num_hot = num_hot
        self._hot_bytes = hot_bytes
        self._served: dict[str, Served] = {}
        self._warming: list[Served] = []
        self._draining: list[Served] = []
        self._hot_by_name: dict[str, HotUsers] = {}
        self._standing: dict[tuple[str, str], Standing] = {}
        self._refused: dict[tuple[str, str], Content] = {}
        self._forgotten_at: OrderedDict[int, float] = OrderedDict()
        self.pinned: frozenset[str] = frozenset()
        # Guards the loaded versions and their standings: the watching thread changes them, and a
        # reader of the standings drops versions that have drained.
        self._lock = threading.RLock()

    def get(self, name: str | None = None, version: str | None = None) -> Served:
        """Return the version that answers.

        Args:
            name: of the model; None if there is only one.
            version: None for the one that answers now; no other version is available.

        Raises:
            UnavailableError: if no model is loaded yet.
            UnknownModelError: naming what is served.
        """
        served = self._served
        if not served:
            raise UnavailableError("no model is loaded")
        if name is None and len(served) == 1:
            name = next(iter(served))
        one = served.get(name or "")
        if one is None or version not in (None, "", one.version):
            known = [f"{known.name}/{known.version}" for known in served.values()]
            asked = "no model" if name is None else f"{name}/{version}" if version else name
            raise UnknownModelError(f"{cut(asked)} was asked for; {known} are served")
        return one

    def has(self, name: str | None, version: str | None) -> bool:
        """Whether ``get`` returns a version."""
        try:
            self.get(name, version)
        except (UnavailableError, UnknownModelError):
            return False
        return True

    def answers(self, name: str, engine: Engine) -> bool:
        """Whether an engine is the one of a model that answers now."""
        served = self._served.get(name)
        return served is not None and served.engine is engine

    def all(self) -> list[Served]:
        """Return the versions that answer now."""
        return list(self._served.values())

    def hot(self, name: str) -> HotUsers:
        """Return the hot users of a model."""
        return self._hot_by_name.setdefault(name, HotUsers(self._num_hot, self._hot_bytes))

    def remember(self, name: str, request: Request, raw: Mapping[str, Any]) -> None:
        """Remember a user's request, unless it came before the user was forgotten."""
        with self._lock:
            if not self.has_forgotten(request):
                self.hot(name).remember(request.user_id, raw)

    def has_forgotten(self, request: Request) -> bool:
        """Whether the user of a request was forgotten after the request came."""
        forgotten_at = self._forgotten_at.get(hash(request.user_id))
        came_at = request.came_at
        return forgotten_at is not None and came_at is not None and came_at <= forgotten_at

    def forget(self, user_id: str) -> dict[str, int | None]:
        """Forget a user: its last requests, and its K/V of every loaded version.

        Earlier requests are answered, and nothing of them is kept.

        Args:
            user_id: as ``canonical_id`` spells it.

        Returns:
            Bytes dropped by tier; None for a tier that could not be reached.

        Raises:
            UnavailableError: if no model is loaded, so that no tier is open.
        """
        with self._lock:
            remember(self._forgotten_at, user_id, steady_clock()())
            self.pinned -= {user_id}
            for hot in [*self._hot_by_name.values()]:
                hot.forget(user_id)
            stores = self._loaded_stores()
        return _sums([store.forget(user_id) for store in stores])

    def clear(self, kv_version: str) -> dict[str, int | None]:
        """Drop one version of K/V, see ``KVVersion``; bytes as in ``forget``.

        Raises:
            UnavailableError: if no model is loaded, so that no tier is open.
        """
        with self._lock:
            stores = self._loaded_stores()
        return _sums([store.clear(kv_version) for store in stores])

    def pin(self, user_ids: Iterable[str]) -> None:
        """Keep these users' K/V of all versions, also of later ones, in the pinned reserve."""
        with self._lock:
            self.pinned |= {*user_ids}
            for store in self._loaded_stores():
                store.pin(self.pinned)

    def unpin(self, user_ids: Iterable[str]) -> None:
        """Make these users' K/V evictable again."""
        with self._lock:
            self.pinned -= {*user_ids}
            for store in self._loaded_stores():
                store.unpin([*user_ids])

    def _loaded_stores(self) -> list[KVStore]:
        """Stores of all loaded versions.

        Raises:
            UnavailableError: if no model is loaded.
        """
        loaded = [*self._served.values(), *self._warming, *self._draining]
        if not loaded:
            raise UnavailableError("no model is loaded: what its tiers hold cannot be reached")
        return _stores_of(loaded)

    def standings(self) -> list[Standing]:
        """Return all known versions, sorted by name and version."""
        with self._lock:
            self._drop_drained()
            return sorted(self._standing.values())

    def bypass(self, engine: Engine) -> None:
        """Score without the cache from now on, if this engine still answers."""
        for served in self.all():
            if served.engine is engine:
                served.engine = Engine(
                    engine.model, engine.schema, None, version=engine.version, no_store=DRIFT
                )
                self._show()

    @property
    def names_without_cache(self) -> list[str]:
        """Names of models whose cache was found wrong."""
        return [served.name for served in self.all() if served.engine.no_store == DRIFT]

    def publish(self, name: str, version: str, folder: Path) -> None:
        """Load a version and let it take over.

        Raises:
            Exception: whatever loading raises; then nothing has changed.
        """
        self._set_standing(Standing(name, version, state=LOADING))
        engine = self._load(folder)
        new = Served(name, version, engine)
        with self._lock:
            self._warming.append(new)
            if new.store is not None:
                new.store.pin(self.pinned)
        try:
            self._drop_wrong_kv(name)
            self._warm(name, engine)
            self._take_over(name, new)
        finally:
            with self._lock:
                self._warming.remove(new)
        kv_versions = engine.version.kv_versions
        self._set_standing(
            Standing(name, version, engine.model_version, SERVING, kv_versions=kv_versions)
        )
        self._show()
        self._metrics.count("model_loads", name, "served")
        logger.info("model %s version %s answers: %s", name, version, engine.model_version)

    def refresh(self, folder: Path) -> None:
        """Serve the newest version of each model in a folder that is not broken."""
        self._drop_drained()
        found = versions_in(folder)
        for key in [*self._refused]:
            if key[1] not in found.get(key[0], {}):
                del self._refused[key]
                self._drop_standing(key, REFUSED)
        for name, folder_by_version in found.items():
            self._refresh(name, folder_by_version)
        for name in self._served.keys() - found.keys():
            self._take_over(name, None)
            self._show()
            logger.info("model %s is gone", name)

    def _refresh(self, name: str, folder_by_version: dict[str, Path]) -> None:
        """Try the versions of a model, newest first, until one answers."""
        for version in sorted(folder_by_version, key=int, reverse=True):
            current = self._served.get(name)
            if current is not None and current.version == version:
                return
            folder = folder_by_version[version]
            content = _content(folder)
            if self._refused.get((name, version)) == content:
                continue
            try:
                self.publish(name, version, folder)
                self._refused.pop((name, version), None)
                return
            except Exception as error:
                # Any exception: torch may raise anything on a broken program.
                is_ours = isinstance(error, KVShareError)
                message = str(error) if is_ours else f"{type(error).__name__}: {error}"
                self._refused[name, version] = content
                self._metrics.count("model_loads", name, REFUSED)
                self._set_standing(Standing(name, version, state=REFUSED, message=message))
                logger.error("model %s version %s is refused: %s", name, version, message)

    def _drop_wrong_kv(self, name: str) -> None:
        """Drop the K/V of a version whose cache was found wrong: the next one may read it too."""
        old = self._served.get(name)
        if old is not None and old.store is not None and old.engine.no_store == DRIFT:
            for kv_version in old.engine.version.kv_versions:
                old.store.clear(kv_version)

    def _warm(self, name: str, engine: Engine) -> None:
        users = []
        came_at = steady_clock()()  # A user who is forgotten from now on is not warmed up.
        for raw in self.hot(name).hottest():
            try:
                users.append(replace(parse_user(raw, engine.schema), came_at=came_at))
            except RequestError:
                continue  # The new version will refuse this user's requests as well.
        warm_up(engine, users, WARM_SHARE if name in self._served else 1.0)

    def _take_over(self, name: str, new: Served | None) -> None:
        """Let a version, or none, take over; a concurrent ``forget`` sees the old and the new."""
        with self._lock:
            old = self._served.get(name)
            others = {one: served for one, served in self._served.items() if one != name}
            self._served = others if new is None else others | {name: new}
            if old is not None:
                self._draining.append(old)
                model_version = old.engine.model_version
                kv_versions = old.engine.version.kv_versions
                self._set_standing(
                    Standing(name, old.version, model_version, DRAINING, kv_versions=kv_versions)
                )

    def _drop_drained(self) -> None:
        """Drop old versions without requests in flight."""
        with self._lock:
            for old in [*self._draining]:
                if not old.num_open:  # Read once: requests end while this runs.
                    self._draining.remove(old)
                    self._drop_standing((old.name, old.version), DRAINING)

    def _show(self) -> None:
        """Update the metrics: which versions answer, and the sizes of all their caches."""
        metrics = self._metrics
        for gauge in ("model_version_info", "parity_alarm", "parity_drift"):
            metrics.remove(gauge)
        for served in self.all():
            name, model_version = served.name, served.engine.model_version
            metrics.set("model_version_info", 1, name, served.version, model_version)
            metrics.set("parity_alarm", name in self.names_without_cache, name)
            metrics.set("parity_drift", served.drift, name)
        caches = [cache for store in _stores_of(self.all()) for cache in store.caches]
        show = metrics.cache.gauge
        show("held_bytes", lambda: sum(one.held_bytes for one in caches), tier=PAGES)
        show("pinned_entries", lambda: sum(one.num_leased for one in caches))
        capacity_bytes = sum(one.pool.capacity_bytes for one in caches)
        show("capacity_bytes", lambda: capacity_bytes, tier=PAGES)

    def _set_standing(self, standing: Standing) -> None:
        key, is_refused = (standing.name, standing.version), standing.state == REFUSED
        with self._lock:
            self._standing[key] = standing
            self._metrics.set("model_refused", is_refused, *key)

    def _drop_standing(self, key: tuple[str, str], state: str) -> None:
        with self._lock:
            standing = self._standing.get(key)
            if standing is not None and standing.state == state:
                del self._standing[key]
                self._metrics.remove("model_refused", *key)


def warm_up(engine: Engine, users: Sequence[Request], share: float) -> float:
    """Bring users' K/V into an engine's pages, beside another engine that scores.

    One user at a time, so that a request waits for one encoding at most, with pauses between them.

    Args:
        engine: of the new version.
        users: in this order.
        share: of the time that may be spent encoding.

    Returns:
        Seconds that encoding took.
    """
    encoding_s = 0.0
    for user in users:
        start = time.monotonic()
        engine.prefetch([user])
        taken_s = time.monotonic() - start
        encoding_s += taken_s
        time.sleep(taken_s * (1.0 / share - 1.0))
    return encoding_s


def _stores_of(loaded: Iterable[Served]) -> list[KVStore]:
    """Return the stores of some versions, each once: versions with the same K/V share theirs."""
    stores = (served.store for served in loaded if served.store is not None)
    return list({id(store): store for store in stores}.values())


def _sums(bytes_by_tier: Iterable[Mapping[str, int | None]]) -> dict[str, int | None]:
    """Add up bytes by tier; None for a tier that any of them could not reach."""
    sums: dict[str, int | None] = {}
    for one in bytes_by_tier:
        for tier, num_bytes in one.items():
            before = sums.get(tier, 0)
            sums[tier] = None if before is None or num_bytes is None else before + num_bytes
    return sums


def versions_in(folder: Path) -> dict[str, dict[str, Path]]:
    """Return the artifacts in a folder of models, ``<name>/<version>``, by name and version.

    A version is an integer; a folder without a manifest is not a version yet.

    Raises:
        ArtifactError: if the folder cannot be read.
    """
    try:
        manifests = sorted(folder.glob(f"*/*/{MANIFEST}"))
        if not folder.is_dir():
            raise NotADirectoryError(f"{str(folder)!r} is not a folder")
    except OSError as error:
        raise ArtifactError(f"models cannot be read: {error}") from error
    found: dict[str, dict[str, Path]] = {}
    for manifest in manifests:
        version = manifest.parent
        if version.name.isdecimal():
            found.setdefault(version.parent.name, {})[version.name] = version
    return found


def _content(folder: Path) -> Content:
    """Return names, sizes and times of files; a refused version is tried again if they change."""
    try:
        files = [path for path in sorted(folder.iterdir()) if path.is_file()]
        return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    except OSError:
        return []  # It is being removed.

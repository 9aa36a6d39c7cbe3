"""Models by name, each in the version that answers now, and how another version takes over.

A new version is loaded beside the old one, scores its golden requests, with the cache too, is given
the K/V of the users that ask most, and answers from one request to the next. One that fails at any
of this is refused, and the old one stays.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

from torchrec_kvshare.assembly import MEMORY, OFF, TIERED, new_engine, new_stack
from torchrec_kvshare.cache.kv_cache import DEVICE
from torchrec_kvshare.cache.metrics import CacheMetrics
from torchrec_kvshare.cache.reasons import DRIFT
from torchrec_kvshare.cache.stack import TierStack
from torchrec_kvshare.config import CacheConfig
from torchrec_kvshare.draw import draw_raw_request
from torchrec_kvshare.engine import Engine
from torchrec_kvshare.errors import (
    ArtifactError,
    KVShareError,
    RequestError,
    UnavailableError,
    UnknownModelError,
)
from torchrec_kvshare.export.artifact import MANIFEST
from torchrec_kvshare.export.exporter import load_artifact
from torchrec_kvshare.export.golden import check_golden
from torchrec_kvshare.features import parse_user
from torchrec_kvshare.serving.metrics import ServerMetrics

logger = logging.getLogger(__name__)

DEFAULT_NAME, DEFAULT_VERSION = "kvshare", "1"
EXAMPLE_EVENTS, EXAMPLE_CANDIDATES = 6, 5
WARM_BATCH = 8  # users encoded together
WARM_ROUNDS = 3  # of the golden requests: a program is compiled in its first two calls
WARM_CAPACITY_BYTES = 64 * 2**20  # for the K/V of golden requests, while they are scored
LOADING, SERVING, DRAINING, REFUSED = "loading", "serving", "draining", "refused"
Content: TypeAlias = list[tuple[str, int, int]]  # of a folder: names, bytes, times of change


class HotUsers:
    """Last requests of the users that ask most often.

    Args:
        num_users: that are remembered.

    Example:
        >>> hot = HotUsers(num_users=2)
        >>> for user in "abcbcc":
        ...     hot.remember(user, {"user_id": user})
        >>> [raw["user_id"] for raw in hot.hottest()]
        ['c', 'b']
    """

    def __init__(self, num_users: int) -> None:
        self._num_users = num_users
        self._recent: OrderedDict[str, tuple[int, Mapping[str, Any]]] = OrderedDict()
        self._lock = threading.Lock()

    def remember(self, user_id: str, raw: Mapping[str, Any]) -> None:
        """A user has asked."""
        with self._lock:
            times, _ = self._recent.pop(user_id, (0, raw))
            self._recent[user_id] = (times + 1, raw)
            if len(self._recent) > self._num_users:
                # Of the older half, who asked least: a newcomer has a chance to become hot.
                older = list(self._recent)[: (len(self._recent) + 1) // 2]
                del self._recent[min(older, key=lambda user_id: self._recent[user_id][0])]

    def hottest(self) -> list[Mapping[str, Any]]:
        """Last requests, of whom asked most often first."""
        with self._lock:
            ranked = sorted(self._recent.values(), key=lambda one: one[0], reverse=True)
        return [raw for _, raw in ranked]


@dataclass(eq=False)
class Served:
    """A version of a model that is loaded.

    Attributes:
        name: of the model.
        version: of it.
        engine: that answers; another one without a cache once that was found wrong.
        num_open: requests that it is answering.
        drift: the greatest difference that was found of a probability with and without the cache.
    """

    name: str
    version: str
    engine: Engine
    num_open: int = 0
    drift: float = 0.0

    @contextmanager
    def open(self) -> Iterator[None]:
        """Answer a request."""
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1

    def example(self) -> dict[str, Any]:
        """A request that it can score."""
        drawn = draw_raw_request(self.engine.schema, EXAMPLE_EVENTS, EXAMPLE_CANDIDATES, seed=0)
        return drawn | {"request_id": "example"}


class Standing(NamedTuple):
    """What became of a version that is, or was, in the folder."""

    name: str
    version: str
    model_version: str
    state: str
    message: str


class Loader(Protocol):
    """Makes engines of artifacts; what their caches count is counted together."""

    metrics: CacheMetrics

    def load(self, folder: Path) -> Engine:
        """An engine that is ready to answer, or an error."""

    def close(self) -> None:
        """No engine answers any more."""


class EngineLoader:
    """Makes engines of artifacts, over tiers that all of them share.

    Args:
        cache: where K/V is kept.
        deterministic: scores bit-equal whatever else is scored, or no start.
    """

    def __init__(self, cache: CacheConfig, deterministic: bool = False) -> None:
        self._cache = cache
        self._deterministic = deterministic
        self._stack: TierStack | None = None
        self.metrics = CacheMetrics()

    def load(self, folder: Path) -> Engine:
        """An engine whose scores are those of the golden requests, with the cache and without.

        Raises:
            KVShareError: naming what is broken, missing or wrong.
        """
        artifact = load_artifact(folder)
        name = OFF if self._cache.name == OFF else MEMORY
        trial = replace(self._cache, name=name, capacity_bytes=WARM_CAPACITY_BYTES, pinned_bytes=0)
        engine = new_engine(artifact, trial)
        for _ in range(WARM_ROUNDS):
            check_golden(folder, engine)
        if self._cache.name == TIERED and self._stack is None:
            measured = artifact.manifest.break_even_events
            self._stack = new_stack(self._cache, measured, self.metrics)
        return new_engine(artifact, self._cache, self._deterministic, self._stack, self.metrics)

    def close(self) -> None:
        """Write what waits, and let go of the tiers."""
        if self._stack is not None:
            self._stack.close()


class Models:
    """What is served.

    Args:
        load: an engine of an artifact that is ready to answer, or an error.
        metrics: where versions are shown.
        num_hot: users whose K/V a new version starts with.
    """

    def __init__(
        self, load: Callable[[Path], Engine], metrics: ServerMetrics, num_hot: int
    ) -> None:
        self._load = load
        self._metrics = metrics
        self._num_hot = num_hot
        self._served: dict[str, Served] = {}
        self._draining: list[Served] = []
        self._hot_by_name: dict[str, HotUsers] = {}
        self._standing: dict[tuple[str, str], Standing] = {}
        self._refused: dict[tuple[str, str], Content] = {}

    def get(self, name: str | None = None, version: str | None = None) -> Served:
        """The version that answers.

        Args:
            name: of the model; None where there is only one.
            version: None for the one that answers now; another is not there.

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
            raise UnknownModelError(f"{asked} was asked for; {known} are served")
        return one

    def all(self) -> list[Served]:
        """Those that answer now."""
        return list(self._served.values())

    def hot(self, name: str) -> HotUsers:
        """Who asks a model."""
        return self._hot_by_name.setdefault(name, HotUsers(self._num_hot))

    def standings(self) -> list[Standing]:
        """Every version that is known, by name and version."""
        self._let_go()
        return sorted(self._standing.values())

    def bypass(self, engine: Engine) -> None:
        """Score without the cache from now on, if it is this engine that answers."""
        for served in self.all():
            if served.engine is engine:
                served.engine = Engine(
                    engine.model, engine.schema, engine.model_version, None, no_store=DRIFT
                )
                self._show()

    @property
    def names_without_cache(self) -> list[str]:
        """Models whose cache was found wrong."""
        return [served.name for served in self.all() if served.engine.no_store == DRIFT]

    def publish(self, name: str, version: str, folder: Path) -> None:
        """Load a version and let it answer in place of another.

        Raises:
            Exception: whatever loading raised; nothing has changed then.
        """
        self._stand(Standing(name, version, "", LOADING, ""))
        engine = self._load(folder)
        self._warm(name, engine)
        old = self._served.get(name)
        self._served = self._served | {name: Served(name, version, engine)}
        if old is not None:
            self._retire(old)
        self._stand(Standing(name, version, engine.model_version, SERVING, ""))
        self._show()
        self._metrics.loads.labels(name, "served").inc()
        logger.info("model %s version %s answers: %s", name, version, engine.model_version)

    def refresh(self, folder: Path) -> None:
        """Serve of each model in a folder the newest version that is not broken."""
        self._let_go()
        found = versions_in(folder)
        for key in [*self._refused]:
            if key[1] not in found.get(key[0], {}):
                del self._refused[key]
                self._drop_standing(key, REFUSED)
        for name, folder_by_version in found.items():
            self._refresh(name, folder_by_version)
        for name in self._served.keys() - found.keys():
            old = self._served[name]
            self._served = {one: s for one, s in self._served.items() if one != name}
            self._retire(old)
            self._show()
            logger.info("model %s is gone", name)

    def _refresh(self, name: str, folder_by_version: dict[str, Path]) -> None:
        """Try a model's versions, the newest first, until one answers."""
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
                # Not of ours alone: what a broken program makes torch raise can be anything.
                is_ours = isinstance(error, KVShareError)
                message = str(error) if is_ours else f"{type(error).__name__}: {error}"
                self._refused[name, version] = content
                self._metrics.loads.labels(name, REFUSED).inc()
                self._stand(Standing(name, version, "", REFUSED, message))
                logger.error("model %s version %s is refused: %s", name, version, message)

    def _warm(self, name: str, engine: Engine) -> None:
        users = []
        for raw in self.hot(name).hottest():
            try:
                users.append(parse_user(raw, engine.schema))
            except RequestError:
                continue  # It is of a user whom the new model will refuse as well.
        for first in range(0, len(users), WARM_BATCH):
            engine.prefetch(users[first : first + WARM_BATCH])

    def _retire(self, old: Served) -> None:
        self._draining.append(old)
        self._stand(Standing(old.name, old.version, old.engine.model_version, DRAINING, ""))

    def _let_go(self) -> None:
        """Of old versions those that have answered their last request."""
        drained = [old for old in self._draining if not old.num_open]
        self._draining = [old for old in self._draining if old.num_open]
        for old in drained:
            self._drop_standing((old.name, old.version), DRAINING)

    def _show(self) -> None:
        """Tell the metrics what answers now, and what the engines that answer hold together."""
        metrics = self._metrics
        for gauge in (metrics.version_info, metrics.parity_alarm, metrics.parity_drift):
            gauge.clear()
        for served in self.all():
            labels = (served.name, served.version, served.engine.model_version)
            metrics.version_info.labels(*labels).set(1)
            is_alarming = served.name in self.names_without_cache
            metrics.parity_alarm.labels(served.name).set(is_alarming)
            metrics.parity_drift.labels(served.name).set(served.drift)
        stores = [served.engine.store for served in self.all() if served.engine.store is not None]
        caches = [cache for store in stores for cache in store.caches]
        show = metrics.cache.gauge
        show("held_bytes", lambda: sum(one.held_bytes for one in caches), tier=DEVICE)
        show("pinned_entries", lambda: sum(one.num_held for one in caches))
        capacity_bytes = sum(one.pool.capacity_bytes for one in caches)
        show("capacity_bytes", lambda: capacity_bytes, tier=DEVICE)

    def _stand(self, standing: Standing) -> None:
        self._standing[standing.name, standing.version] = standing
        is_refused = standing.state == REFUSED
        self._metrics.refused.labels(standing.name, standing.version).set(is_refused)

    def _drop_standing(self, key: tuple[str, str], state: str) -> None:
        standing = self._standing.get(key)
        if standing is not None and standing.state == state:
            del self._standing[key]
            self._metrics.refused.remove(*key)


def versions_in(folder: Path) -> dict[str, dict[str, Path]]:
    """Artifacts in a folder of models, ``<name>/<version>``, by name and version.

    A version is an integer; a folder without a manifest is not a version yet.

    Raises:
        ArtifactError: if the folder cannot be read.
    """
    try:
        manifests = sorted(folder.glob(f"*/*/{MANIFEST}"))
        if not folder.is_dir():
            raise NotADirectoryError(f"{str(folder)!r} is no folder")
    except OSError as error:
        raise ArtifactError(f"models cannot be read: {error}") from error
    found: dict[str, dict[str, Path]] = {}
    for manifest in manifests:
        version = manifest.parent
        if version.name.isdecimal():
            found.setdefault(version.parent.name, {})[version.name] = version
    return found


def _content(folder: Path) -> Content:
    """What tells its content from another: a version that was refused is tried again then."""
    try:
        files = [path for path in sorted(folder.iterdir()) if path.is_file()]
        return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    except OSError:
        return []  # It is being removed.

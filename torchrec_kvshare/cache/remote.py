"""The tier that processes and machines share: a Redis server, or a cluster of them.

All keys of a user lie in one hash slot, so that what must not fall apart is one script there. A
cluster's slots are looked up here, and each server has a client of its own: redis-py's cluster
pipeline sends every command of a silent server again, one after the other, and waits a timeout for
each (measured with redis-py 8.1, 16 commands and 0.3 s: 4.1 s; here 0.3 s).
"""

import random
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torchrec_kvshare.cache.tiers import Found, check_ttl
from torchrec_kvshare.errors import ConfigError, MissingExtraError, TierError

if TYPE_CHECKING:
    from redis import Redis

T = TypeVar("T")
Address = tuple[str, int]

DEFAULT_PORT = 6379
NUM_SLOTS = 16384
KEYS_PER_SCAN = 1000
URL = re.compile(
    r"redis(?P<tls>s?)://(?P<host>[^/@:?#\[\]]+|\[[0-9a-fA-F:.]+\])"
    r"(:(?P<port>\d{1,5}))?(/(?P<database>\d*))?"
)
MAX_PORT = 65535

# A server without memory refuses a script's first write, and none after it: SET comes first in PUT,
# for nothing is written then, and last in FORGET, which has made room and must not fail.

# KEYS: value, scopes, fence. ARGV: value, encoded at, milliseconds left, scope, start of all keys.
# Scopes of values that are gone are taken out here: users outlive many models.
PUT = """
local forgotten = redis.call('GET', KEYS[3])
if forgotten and tonumber(forgotten) >= tonumber(ARGV[2]) then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3])
redis.call('SADD', KEYS[2], ARGV[4])
if redis.call('PTTL', KEYS[2]) < tonumber(ARGV[3]) then
  redis.call('PEXPIRE', KEYS[2], ARGV[3])
end
for _, scope in ipairs(redis.call('SMEMBERS', KEYS[2])) do
  if redis.call('EXISTS', ARGV[5] .. scope) == 0 then redis.call('SREM', KEYS[2], scope) end
end
return 1
"""
# KEYS: scopes, fence. ARGV: forgotten at, milliseconds that it holds, start of all keys.
FORGET = """
local bytes = 0
for _, scope in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  bytes = bytes + redis.call('STRLEN', ARGV[3] .. scope)
  redis.call('UNLINK', ARGV[3] .. scope)
end
redis.call('UNLINK', KEYS[1])
local forgotten = redis.call('GET', KEYS[2])
if not forgotten or tonumber(forgotten) < tonumber(ARGV[1]) then
  redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
end
return bytes
"""
# KEYS: value, scopes. ARGV: scope. One script, or a put between would leave a value without scope.
DROP = """
local bytes = redis.call('STRLEN', KEYS[1])
redis.call('UNLINK', KEYS[1])
redis.call('SREM', KEYS[2], ARGV[1])
return bytes
"""


class RemoteTier:
    """Values in Redis; each leaves by itself at the end of its time to live.

    Nothing is connected before the first call, and no call is made twice, but for one that a
    cluster's server says is another's. A value is given only if its user's set of scopes has it, so
    nothing that the server has evicted half of escapes ``forget``.

    Args:
        url: ``redis://host:port/db``, or ``rediss://`` for TLS; without user and password, for it
            stands in messages. Of a cluster any server.
        ttl_s: seconds for which a value is used.
        timeout_s: for connecting, and again for each answer.
        cluster: whether the server is one of a cluster.
        username: None for Redis' own default.
        password: None for none.
        tls_ca_file: certificates that sign the servers'; None for the system's.
        tls_cert_file: our own certificate, if the servers ask for it.
        tls_key_file: its key.

    Raises:
        ConfigError: if the url, a time or a file cannot be used.
        MissingExtraError: if redis is not installed.
    """

    name = "remote"

    def __init__(
        self,
        url: str,
        ttl_s: float,
        timeout_s: float,
        cluster: bool = False,
        username: str | None = None,
        password: str | None = None,
        tls_ca_file: Path | None = None,
        tls_cert_file: Path | None = None,
        tls_key_file: Path | None = None,
    ) -> None:
        try:
            from redis import Redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError as error:
            raise MissingExtraError("tiers", "the remote tier") from error
        check_ttl(ttl_s)
        if not timeout_s > 0.0:
            raise ConfigError(f"timeout_s is {timeout_s}; it must be above 0 seconds")
        self._seed, database, is_tls = _parse(url)
        if cluster and database != 0:
            raise ConfigError(f"the remote tier's url names database {database}; a cluster has 0")
        options: dict[str, Any] = {
            "db": database,
            "username": username,
            "password": password,
            "ssl": is_tls,
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            "retry": Retry(NoBackoff(), retries=0),
            "protocol": 2,  # 3 has a handshake, and notifications that lengthen timeouts.
            "driver_info": None,
        }
        for option, file in (
            ("ssl_ca_certs", tls_ca_file),
            ("ssl_certfile", tls_cert_file),
            ("ssl_keyfile", tls_key_file),
        ):
            if file is not None:
                _check_file(file, is_tls)
                options[option] = str(file)
        self._connect: Callable[[str, int], Redis] = lambda host, port: Redis(host, port, **options)
        self._is_cluster = cluster
        self._is_stale = cluster  # whether it may be another server that has a slot
        self._ttl_s = ttl_s
        self._timeout_s = timeout_s
        self._is_closed = False
        self._client_by_address = {self._seed: self._connect(*self._seed)}
        self._client_by_slot = [self._client_by_address[self._seed]] * NUM_SLOTS
        self._refreshing = threading.Lock()

    def get(self, keys: Sequence[tuple[str, str]]) -> list[Found]:
        return self._call(partial(self._get, keys))

    def put(self, user: str, scope: str, value: bytes, encoded_at: float) -> bool:
        left_ms = int(min(encoded_at + self._ttl_s - time.time(), self._ttl_s) * 1000)
        if left_ms < 1:
            return True
        start = _start(user)
        keys = f"{start}{scope}", f"{start}scopes", f"{start}forgotten"
        return bool(self._run(user, PUT, keys, value, encoded_at, left_ms, scope, start))

    def forget(self, user: str, at: float) -> int:
        start = _start(user)
        keys = f"{start}scopes", f"{start}forgotten"
        return self._run(user, FORGET, keys, at, int(self._ttl_s * 1000), start)

    def clear(self, version: str) -> int:
        return self._call(lambda: sum(_clear(client, version) for client in self._primaries()))

    def held_bytes(self) -> int:
        return self._call(lambda: sum(_held_bytes(client) for client in self._primaries()))

    def close(self) -> None:
        self._is_closed = True
        for client in list(self._client_by_address.values()):
            client.close()

    def _get(self, keys: Sequence[tuple[str, str]]) -> list[Found]:
        places_by_client: dict[Redis, list[int]] = defaultdict(list)
        for place, (user, _) in enumerate(keys):
            places_by_client[self._client(user)].append(place)
        found_by_place = {}
        for client, places in places_by_client.items():
            with client.pipeline(transaction=False) as pipeline:
                for place in places:
                    user, scope = keys[place]
                    pipeline.get(f"{_start(user)}{scope}")
                    pipeline.smembers(f"{_start(user)}scopes")
                answers = pipeline.execute()
            for place, value, scopes in zip(places, answers[::2], answers[1::2], strict=True):
                found_by_place[place] = _found(keys[place][1], value, scopes)
        return [found_by_place[place] for place in range(len(keys))]

    def _run(self, user: str, script: str, keys: Sequence[str], *arguments: Any) -> int:
        # EVAL sends the script each time: some hundred bytes, and no server can be without it.
        return self._call(lambda: self._client(user).eval(script, len(keys), *keys, *arguments))

    def _call(self, call: Callable[[], T]) -> T:
        """Do something with the servers, again if it was asked of the wrong one."""
        from redis.exceptions import MovedError, RedisError

        if self._is_closed:
            raise TierError(f"remote tier at {_text(self._seed)} is closed")
        try:
            self._refresh()
            try:
                return call()
            except MovedError as error:
                self._is_stale = True
                self._refresh((error.host, error.port))
                return call()
        except (RedisError, OSError) as error:
            self._is_stale = self._is_cluster
            raise TierError(f"remote tier at {_text(self._seed)}: {error}") from error

    def _client(self, user: str) -> "Redis":
        from redis.crc import key_slot

        return self._client_by_slot[key_slot(_start(user).encode())]

    def _primaries(self) -> set["Redis"]:
        return {*self._client_by_slot}

    def _refresh(self, moved_to: Address | None = None) -> None:
        """Look up which server has which slots, if that may have changed."""
        with self._refreshing:
            if not self._is_stale:
                return
            host, ranges = self._ask_ranges(moved_to)
            clients = {self._seed: self._client_by_address[self._seed]}
            client_by_slot = self._client_by_slot.copy()
            for first, last, *servers in ranges:
                # A server that knows no name of itself is called as it was asked.
                addresses = [(str(name or host, "utf-8"), port) for name, port, *_ in servers]
                for address in addresses:
                    known = self._client_by_address.get(address)
                    clients.setdefault(address, known or self._connect(*address))
                client_by_slot[first : last + 1] = [clients[addresses[0]]] * (last + 1 - first)
            self._client_by_address, self._client_by_slot = clients, client_by_slot
            self._is_stale = False

    def _ask_ranges(self, moved_to: Address | None) -> tuple[bytes, list[Any]]:
        """Ranges of slots with their servers, and the name of the server that answered.

        Servers are asked until one answers, or the second is silent: first the one that got a slot,
        for others hear of that later, then in a random order.
        """
        from redis.exceptions import RedisError

        deadline = time.monotonic() + 1.5 * self._timeout_s
        clients: list[tuple[Address, Any]] = list(self._client_by_address.items())
        random.shuffle(clients)
        if moved_to is not None:
            known = self._client_by_address.get(moved_to)
            clients.insert(0, (moved_to, known or self._connect(*moved_to)))
        for number, (address, client) in enumerate(clients, start=1):
            try:
                return address[0].encode(), client.execute_command("CLUSTER SLOTS")
            except (RedisError, OSError):
                if number == len(clients) or time.monotonic() > deadline:
                    raise
        raise AssertionError("there is a server to ask")


def _parse(url: str) -> tuple[Address, int, bool]:
    """Address, database and whether it is TLS."""
    match = URL.fullmatch(url)
    if match is None or int(match["port"] or 0) > MAX_PORT:
        raise ConfigError(
            "the remote tier's url cannot be read, or holds a user or a password, which have "
            "settings of their own; redis://host:port/database and rediss://… are allowed"
        )
    host = match["host"].strip("[]")
    return (
        (host, int(match["port"] or DEFAULT_PORT)),
        int(match["database"] or 0),
        bool(match["tls"]),
    )


def _check_file(file: Path, is_tls: bool) -> None:
    if not is_tls:
        raise ConfigError(f"{file} is for TLS; the remote tier's url must begin with rediss://")
    if not file.is_file():
        raise ConfigError(f"{file}, which the remote tier needs for TLS, is not a file")


def _start(user: str) -> str:
    """What all keys of a user begin with; the braces make it one hash slot."""
    return f"kvshare:{{{user}}}:"


def _found(scope: str, value: bytes | None, scopes: Iterable[bytes]) -> Found:
    kept = {other.decode() for other in scopes}
    return Found(value if scope in kept else None, tuple(sorted(kept - {scope})))


def _clear(client: "Redis", version: str) -> int:
    """Drop a version's values from one server."""
    # Backslashes keep Redis from reading a version as a pattern.
    literal = re.sub(r"([*?\[\]\\])", r"\\\1", version)
    pattern = f"kvshare:{{*}}:{literal}.*"
    dropped_bytes, cursor, is_done = 0, 0, False
    while not is_done:
        page: Any = client.scan(cursor, match=pattern, count=KEYS_PER_SCAN)
        cursor, names = page
        with client.pipeline(transaction=False) as pipeline:
            for name in names:
                start, _, scope = name.decode().rpartition(":")
                pipeline.eval(DROP, 2, name, f"{start}:scopes", scope)
            dropped_bytes += sum(pipeline.execute())
        is_done = cursor == 0
    return dropped_bytes


def _held_bytes(client: "Redis") -> int:
    return client.info("memory")["used_memory"]


def _text(address: Address) -> str:
    return f"{address[0]}:{address[1]}"

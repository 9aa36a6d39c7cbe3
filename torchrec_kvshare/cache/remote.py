"""The tier shared by processes and machines: a Redis server or a Redis cluster.

All keys of a user are in one hash slot, so a script there is atomic. This file looks up a cluster's
slots itself and has a client per server: if a server is silent, redis-py's cluster pipeline sends
its commands again one by one and waits a timeout for each (measured with redis-py 8.1, 16 commands
and 0.3 s: 4.1 s; here 0.3 s).

Machines' clocks differ, so only the server's clock decides whether K/V was encoded before its user
was forgotten. Each write asks for the server's time first and converts its own times to it:
encoding times err to the early side and ``forget`` times to the late side, by at most the round
trip.
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

from torchrec_kvshare.cache.clock import steady_clock
from torchrec_kvshare.cache.resolver import Resolver
from torchrec_kvshare.cache.tiers import Found, check_ttl
from torchrec_kvshare.errors import ConfigError, MissingExtraError, TierError

if TYPE_CHECKING:
    from redis import Redis
    from redis.connection import Connection

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
PROBE, PROBE_SCOPE, PROBE_MS = "probe", "probe", 1000  # user, scope, time to live of a probe

# What an error of the server or the connection means for the configuration.
MEANING_BY_ERROR = {
    "Authentication required": "it asks for a password: cache.remote.password_file",
    "without any password configured": "it asks for no password; cache.remote.password_file is set",
    "invalid username-password pair": (
        "it refuses cache.remote.username or the password in cache.remote.password_file"
    ),
    "no permissions": "its ACL refuses what the tier needs, see docs/caching.md",
    "can't run this command": "its ACL refuses what the tier needs, see docs/caching.md",
    "DB index is out of range": "it has no database with the number in cache.remote.url",
    "cluster support disabled": "it is not part of a cluster: cache.remote.cluster=false",
    "CERTIFICATE_VERIFY_FAILED": (
        "its certificate is not signed by cache.remote.tls_ca_file, or not for this host"
    ),
    "CERTIFICATE_REQUIRED": (
        "it asks for a certificate: cache.remote.tls_cert_file and cache.remote.tls_key_file"
    ),
    "WRONG_VERSION_NUMBER": "it speaks no TLS: cache.remote.url must begin with redis://",
    "Protocol Error": "it is not Redis: another server listens on this port",
    "'maxmemory'": "it is full, and its maxmemory-policy evicts nothing",
    "read only replica": "it is a read-only replica",
}
# Errors that point to the configuration only if no call has succeeded yet.
ENDED = (
    *("Connection reset", "Connection closed", "Connection not ready", "Broken pipe"),
    "EOF occurred",
)

# A server that is out of memory refuses only the first write of a script. In PUT that is SET, so
# nothing is written. In FORGET it comes last, after UNLINK has freed memory, so it does not fail.

# KEYS: value, scopes, fence. ARGV: value, encoded at, milliseconds to live, scope, key prefix.
# Scopes whose values have expired are removed here, because users outlive many models.
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
# KEYS: scopes, fence. ARGV: forgotten at, milliseconds to live, key prefix.
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
# KEYS: value, scopes. ARGV: scope. A script, so that a concurrent put cannot lose its scope.
DROP = """
local bytes = redis.call('STRLEN', KEYS[1])
redis.call('UNLINK', KEYS[1])
redis.call('SREM', KEYS[2], ARGV[1])
return bytes
"""


class RemoteTier:
    """Values in Redis, which deletes each at the end of its time to live.

    It connects at the first call. Calls are not retried, except after a cluster's MOVED error. A
    value is returned only if its user's set of scopes has its scope: if the server evicted the set,
    ``forget`` could not find the value.

    Args:
        url: ``redis://host:port/db``, or ``rediss://`` for TLS; without user and password, because
            messages show it. For a cluster any server.
        ttl_s: seconds from encoding until a value expires.
        timeout_s: for the DNS look-up, again for connecting, and again for each answer.
        cluster: whether the server is part of a cluster.
        username: None for Redis' default user.
        password: None for no password.
        tls_ca_file: certificates that sign the servers' certificates; None for the system's.
        tls_cert_file: client certificate, if the servers ask for one.
        tls_key_file: key of the client certificate.

    Raises:
        ConfigError: if the url, a time or a file is not usable.
        MissingExtraError: if redis is not installed.
    """

    name = "remote"

    def __init__(
        self,
        url: str,
        ttl_s: float,
        timeout_s: float,
        *,
        cluster: bool = False,
        username: str | None = None,
        password: str | None = None,
        tls_ca_file: Path | None = None,
        tls_cert_file: Path | None = None,
        tls_key_file: Path | None = None,
    ) -> None:
        try:
            import redis  # noqa: F401
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError as error:
            raise MissingExtraError("tiers", "the remote tier") from error
        check_ttl(ttl_s)
        if not timeout_s > 0.0:
            raise ConfigError(f"timeout_s is {timeout_s}; it must be above 0 seconds")
        self._seed, database, self._is_tls = _parse(url)
        if cluster and database != 0:
            raise ConfigError(f"the remote tier's url names database {database}; a cluster has 0")
        options: dict[str, Any] = {
            "db": database,
            "username": username,
            "password": password,
            "ssl": self._is_tls,
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            "retry": Retry(NoBackoff(), retries=0),
            "protocol": 2,  # Version 3 adds a handshake, and notifications that extend timeouts.
            "driver_info": None,
        }
        for option, file in (
            ("ssl_ca_certs", tls_ca_file),
            ("ssl_certfile", tls_cert_file),
            ("ssl_keyfile", tls_key_file),
        ):
            if file is not None:
                _check_file(file, is_tls=self._is_tls)
                options[option] = str(file)
        self._options = options
        self._resolver = Resolver(timeout_s)
        self._is_cluster = cluster
        self._is_stale = cluster  # whether slots may have moved to other servers
        self._ttl_s = ttl_s
        self._clock = steady_clock()
        self._timeout_s = timeout_s
        self._is_closed = False
        self._has_worked = False
        self._client_by_address = {self._seed: self._connect(*self._seed)}
        self._client_by_slot = [self._client_by_address[self._seed]] * NUM_SLOTS
        self._refreshing = threading.Lock()

    def _connect(self, host: str, port: int) -> "Redis":
        """Return a client of one server; it connects at its first use."""
        from redis import Redis

        client = Redis(host, port, **self._options)
        client.connection_pool.connection_class = _connection_class(
            self._resolver, is_tls=self._is_tls
        )
        return client

    def check(self) -> None:
        """Read and write a probe value, which expires after ``PROBE_MS``.

        Raises:
            TierError: saying what is wrong with the server or the configuration.
        """
        self.get([(PROBE, PROBE_SCOPE)])
        self._put(PROBE, PROBE_SCOPE, b"", encoded_at=self._clock(), left_ms=PROBE_MS)

    def get(self, keys: Sequence[tuple[str, str]]) -> list[Found]:
        return self._call(partial(self._get, keys))

    def put(self, user: str, scope: str, value: bytes, encoded_at: float) -> bool:
        left_s = min(encoded_at + self._ttl_s - self._clock(), self._ttl_s)
        left_ms = int(left_s * 1000)
        return left_ms < 1 or self._put(user, scope, value, encoded_at=encoded_at, left_ms=left_ms)

    def forget(self, user: str, at: float) -> int:
        prefix = _prefix(user)
        keys = f"{prefix}scopes", f"{prefix}forgotten"

        def forget() -> int:
            client = self._client(user)
            _, latest = self._on_server_clock(client, at)
            return client.eval(FORGET, len(keys), *keys, latest, int(self._ttl_s * 1000), prefix)

        return self._call(forget)

    def clear(self, version: str) -> int:
        return self._call(lambda: sum(_clear(client, version) for client in self._primaries()))

    def held_bytes(self) -> int:
        return self._call(lambda: sum(_held_bytes(client) for client in self._primaries()))

    def close(self) -> None:
        self._is_closed = True
        for client in list(self._client_by_address.values()):
            client.close()

    def _get(self, keys: Sequence[tuple[str, str]]) -> list[Found]:
        indices_by_client: dict[Redis, list[int]] = defaultdict(list)
        for index, (user, _) in enumerate(keys):
            indices_by_client[self._client(user)].append(index)
        found_by_index = {}
        for client, indices in indices_by_client.items():
            with client.pipeline(transaction=False) as pipeline:
                for index in indices:
                    user, scope = keys[index]
                    pipeline.get(f"{_prefix(user)}{scope}")
                    pipeline.smembers(f"{_prefix(user)}scopes")
                answers = pipeline.execute()
            for index, value, scopes in zip(indices, answers[::2], answers[1::2], strict=True):
                found_by_index[index] = _found(keys[index][1], value, scopes)
        return [found_by_index[index] for index in range(len(keys))]

    def _put(self, user: str, scope: str, value: bytes, encoded_at: float, left_ms: int) -> bool:
        prefix = _prefix(user)
        keys = f"{prefix}{scope}", f"{prefix}scopes", f"{prefix}forgotten"

        def put() -> int:
            client = self._client(user)
            earliest, _ = self._on_server_clock(client, encoded_at)
            # EVAL sends the script each time: a few hundred bytes, and a server never lacks it.
            return client.eval(PUT, len(keys), *keys, value, earliest, left_ms, scope, prefix)

        return bool(self._call(put))

    def _on_server_clock(self, client: "Redis", at: float) -> tuple[float, float]:
        """Convert a time of our clock to a server's; return the earliest and latest it can be."""
        sent_at = self._clock()
        seconds, microseconds = client.time()
        server_time = seconds + microseconds / 1e6
        return at + server_time - self._clock(), at + server_time - sent_at

    def _call(self, call: Callable[[], T]) -> T:
        """Call the servers; after a MOVED error refresh the slots and call again."""
        from redis.exceptions import MovedError, RedisError

        if self._is_closed:
            raise TierError(f"remote tier at {_text(self._seed)} is closed")
        try:
            self._refresh()
            try:
                answer = call()
            except MovedError as error:
                self._is_stale = True
                self._refresh((error.host, error.port))
                answer = call()
        except (RedisError, OSError) as error:
            self._is_stale = self._is_cluster
            meaning = self._meaning(str(error))
            raise TierError(f"remote tier at {_text(self._seed)}: {meaning}{error}") from error
        self._has_worked = True
        return answer

    def _meaning(self, error: str) -> str:
        """Return a hint to put before an error message; empty if there is none."""
        for mark, meaning in MEANING_BY_ERROR.items():
            if mark in error:
                return f"{meaning}: "
        if self._has_worked:
            return ""
        if self._is_tls and error.startswith("Timeout"):
            return "it may speak no TLS; then cache.remote.url must begin with redis://: "
        if self._is_tls and any(mark in error for mark in ENDED):
            return (
                "it asks for a certificate (cache.remote.tls_cert_file and "
                "cache.remote.tls_key_file), or ended the handshake for another reason: "
            )
        if any(mark in error for mark in ENDED):
            return (
                "it asks for a password (cache.remote.password_file), speaks TLS (rediss:// in "
                "cache.remote.url) or is not Redis: "
            )
        return ""

    def _client(self, user: str) -> "Redis":
        from redis.crc import key_slot

        return self._client_by_slot[key_slot(_prefix(user).encode())]

    def _primaries(self) -> set["Redis"]:
        return {*self._client_by_slot}

    def _refresh(self, moved_to: Address | None = None) -> None:
        """Look up which server has which slots, if they may have moved."""
        with self._refreshing:
            if not self._is_stale:
                return
            host, ranges = self._ask_ranges(moved_to)
            clients = {self._seed: self._client_by_address[self._seed]}
            client_by_slot = self._client_by_slot.copy()
            for first, last, *servers in ranges:
                # A server may return no host name; then it has the one that it was asked under.
                addresses = [(str(name or host, "utf-8"), port) for name, port, *_ in servers]
                for address in addresses:
                    known = self._client_by_address.get(address)
                    clients.setdefault(address, known or self._connect(*address))
                client_by_slot[first : last + 1] = [clients[addresses[0]]] * (last + 1 - first)
            self._client_by_address, self._client_by_slot = clients, client_by_slot
            self._is_stale = False

    def _ask_ranges(self, moved_to: Address | None) -> tuple[bytes, list[Any]]:
        """Return the host name of the server that answered, and ranges of slots with their servers.

        Servers are asked until one answers or the deadline, 1.5 timeouts, has passed: first the one
        that a slot moved to, because the others learn of that later, then in random order.
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
        raise AssertionError("there is always a server to ask")


def _parse(url: str) -> tuple[Address, int, bool]:
    """Return address, database number and whether the url is for TLS."""
    match = URL.fullmatch(url)
    if match is None or int(match["port"] or 0) > MAX_PORT:
        raise ConfigError(
            "the remote tier's url cannot be read, or has a user or a password, which have "
            "settings of their own; redis://host:port/database and rediss://… are allowed"
        )
    host = match["host"].strip("[]")
    return (
        (host, int(match["port"] or DEFAULT_PORT)),
        int(match["database"] or 0),
        bool(match["tls"]),
    )


def _connection_class(resolver: Resolver, *, is_tls: bool) -> type["Connection"]:
    """Return a class of connections that resolve their host name within a deadline."""
    from redis.connection import Connection, SSLConnection

    class Resolving(Connection):
        def _connect(self) -> Any:
            name, failure = self.host, OSError("it has no address")
            connect: Callable[[], Any] = super()._connect
            try:
                for self.host in resolver.addresses(name):
                    try:
                        return connect()
                    except OSError as error:
                        failure = error
                raise failure
            finally:
                self.host = name  # TLS checks the certificate against the name.

    # SSLConnection wraps the socket that the next class, Resolving, has connected.
    return type("ResolvingTls", (SSLConnection, Resolving), {}) if is_tls else Resolving


def _check_file(file: Path, *, is_tls: bool) -> None:
    if not is_tls:
        raise ConfigError(f"{file} is for TLS; the remote tier's url must begin with rediss://")
    if not file.is_file():
        raise ConfigError(f"{file}, which the remote tier needs for TLS, is not a file")


def _prefix(user: str) -> str:
    """Return the prefix of a user's keys; the braces put them into one hash slot."""
    return f"kvshare:{{{user}}}:"


def _found(scope: str, value: bytes | None, scopes: Iterable[bytes]) -> Found:
    kept = {other.decode() for other in scopes}
    return Found(value if scope in kept else None, tuple(sorted(kept - {scope})))


def _clear(client: "Redis", version: str) -> int:
    """Drop a version's values from one server; return their bytes."""
    # Escaped, because Redis would read special characters of a version as a pattern.
    literal = re.sub(r"([*?\[\]\\])", r"\\\1", version)
    pattern = f"kvshare:{{*}}:{literal}.*"
    dropped_bytes, cursor, is_done = 0, 0, False
    while not is_done:
        page: Any = client.scan(cursor, match=pattern, count=KEYS_PER_SCAN)
        cursor, names = page
        with client.pipeline(transaction=False) as pipeline:
            for name in names:
                prefix, _, scope = name.decode().rpartition(":")
                pipeline.eval(DROP, 2, name, f"{prefix}:scopes", scope)
            dropped_bytes += sum(pipeline.execute())
        is_done = cursor == 0
    return dropped_bytes


def _held_bytes(client: "Redis") -> int:
    return client.info("memory")["used_memory"]


def _text(address: Address) -> str:
    return f"{address[0]}:{address[1]}"

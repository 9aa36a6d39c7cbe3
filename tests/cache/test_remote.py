"""The remote tier with servers that are dead, slow, empty, full, locked or not Redis."""

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ConnectionError, OutOfMemoryError, RedisError, TimeoutError

from tests.cache.servers import (
    Certificates,
    RedisServer,
    closed_port,
    make_certificates,
    redis_cluster,
    wait_until,
)
from torchrec_kvshare.cache.open import new_stack
from torchrec_kvshare.cache.remote import RemoteTier
from torchrec_kvshare.cache.tiers import Found
from torchrec_kvshare.config import CacheConfig, RemoteConfig
from torchrec_kvshare.errors import ConfigError, MissingExtraError, TierError

TTL_S = 600.0
TIMEOUT_S = 0.5
# A busy machine adds this to a call that times out; less than another timeout.
SLACK_S = 0.4
USER = "7e" * 16
KEYS = f"kvshare:{{{USER}}}:"
SCOPE_A, SCOPE_B = "m-t.none.history.8.int8", "m-u.none.history.8.raw"


@contextmanager
def remote_tier(url: str, **options: Any) -> Iterator[RemoteTier]:
    tier = RemoteTier(url, **{"ttl_s": TTL_S, "timeout_s": TIMEOUT_S, **options})
    try:
        yield tier
    finally:
        tier.close()


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def server(shared_server: RedisServer) -> RedisServer:
    """An empty, running server; tests that stop or freeze a server start their own."""
    with shared_server.client() as client:
        client.flushall()
    return shared_server


def works(tier: RemoteTier, user: str = USER) -> bool:
    """Return whether a value can be written and read; other values are not touched."""
    value = str(time.time()).encode()
    try:
        tier.put(user, SCOPE_B, value, time.time())
        return tier.get([(user, SCOPE_B)])[0].value == value
    except TierError:
        return False


def uses(tier: RemoteTier) -> list[Callable[[], object]]:
    return [
        lambda: tier.get([(USER, SCOPE_A), (USER, SCOPE_B)]),
        lambda: tier.put(USER, SCOPE_A, b"value", time.time()),
        lambda: tier.forget(USER, 0.0),
        lambda: tier.clear("m-t"),
        tier.held_bytes,
    ]


# Keys.


def test_all_keys_of_a_user_are_in_one_slot_and_expire_by_themselves(server: RedisServer) -> None:
    with remote_tier(server.url) as tier, server.client() as client:
        encoded_at = time.time() - 400.0
        tier.put(USER, SCOPE_A, b"older", encoded_at)
        assert 198_000 < client.pttl(f"{KEYS}{SCOPE_A}") <= 200_000
        assert 198_000 < client.pttl(f"{KEYS}scopes") <= 200_000
        tier.put(USER, SCOPE_B, b"newer", time.time() - 100.0)
        tier.put(USER, SCOPE_A, b"older", encoded_at)
        assert 198_000 < client.pttl(f"{KEYS}{SCOPE_A}") <= 200_000
        # As long as the youngest value in it.
        assert 498_000 < client.pttl(f"{KEYS}scopes") <= 500_000
        names = {f"{KEYS}{name}".encode() for name in (SCOPE_A, SCOPE_B, "scopes")}
        assert set(client.keys()) == names
        tier.forget(USER, encoded_at)
        assert client.keys() == [f"{KEYS}forgotten".encode()]
        assert 598_000 < client.pttl(f"{KEYS}forgotten") <= 600_000


def test_a_clock_that_runs_ahead_gives_no_longer_life(server: RedisServer) -> None:
    with remote_tier(server.url) as tier, server.client() as client:
        tier.put(USER, SCOPE_A, b"value", time.time() + 3600.0)
        assert client.pttl(f"{KEYS}{SCOPE_A}") <= 600_000


@pytest.mark.parametrize("writer_s", [-40.0, 0.0, 40.0])
@pytest.mark.parametrize("forgetter_s", [-40.0, 0.0, 40.0])
def test_a_forgotten_user_stays_so_whatever_the_machines_clocks_say(
    server: RedisServer, writer_s: float, forgetter_s: float
) -> None:
    """K/V of a machine with a clock ahead of the forgetting machine's was accepted later."""
    with remote_tier(server.url) as writer, remote_tier(server.url) as forgetter:
        writer._clock = lambda: time.time() + writer_s
        forgetter._clock = lambda: time.time() + forgetter_s
        assert writer.put(USER, SCOPE_A, b"early", writer._clock())
        encoded_at = writer._clock()
        assert forgetter.forget(USER, forgetter._clock()) == len(b"early")
        assert not writer.put(USER, SCOPE_A, b"late", encoded_at)
        assert forgetter.get([(USER, SCOPE_A)]) == [Found(None, ())]
        time.sleep(0.5)  # longer than it takes to ask for the server's time
        assert writer.put(USER, SCOPE_A, b"new", writer._clock())


def test_a_write_that_hangs_on_its_way_is_no_younger_for_it(tmp_path: Path) -> None:
    """The server's time at its arrival does not say when its K/V was encoded."""
    with RedisServer(tmp_path) as server, remote_tier(server.url, timeout_s=20.0) as tier:
        encoded_at = tier._clock()
        on_server_clock = tier._on_server_clock

        def hang(client: Any, at: float) -> tuple[float, float]:
            times = on_server_clock(client, at)
            tier._on_server_clock = on_server_clock  # type: ignore[method-assign]
            tier.forget(USER, tier._clock())
            time.sleep(0.2)
            return times

        tier._on_server_clock = hang  # type: ignore[method-assign]
        assert not tier.put(USER, SCOPE_A, b"late", encoded_at)


def test_values_and_fences_end_with_the_time_to_live(server: RedisServer) -> None:
    with remote_tier(server.url, ttl_s=0.3) as tier, server.client() as client:
        assert tier.put(USER, SCOPE_A, b"value", time.time())
        tier.forget("8", time.time())
        wait_until(lambda: client.keys() == [], timeout_s=5.0)
        assert tier.get([(USER, SCOPE_A)]) == [Found(None, ())]


def test_scopes_whose_values_are_gone_do_not_pile_up(server: RedisServer) -> None:
    with remote_tier(server.url) as tier, server.client() as client:
        for number in range(5):
            tier.put(USER, f"m{number}-t.none", b"value", time.time())
            client.delete(f"{KEYS}m{number}-t.none")
        tier.put(USER, SCOPE_A, b"value", time.time())
        assert client.smembers(f"{KEYS}scopes") == {SCOPE_A.encode()}


def test_a_value_whose_set_was_evicted_is_not_returned(server: RedisServer) -> None:
    """``forget`` would not find it, so ``get`` does not return it."""
    with remote_tier(server.url) as tier, server.client() as client:
        tier.put(USER, SCOPE_A, b"value", time.time())
        client.delete(f"{KEYS}scopes")
        tier.put(USER, SCOPE_B, b"value", time.time())
        assert tier.get([(USER, SCOPE_A)]) == [Found(None, (SCOPE_B,))]


def test_what_is_not_ours_stays(server: RedisServer) -> None:
    with remote_tier(server.url) as tier, server.client() as client:
        theirs = ["kvshare", "other", "kvshare:m-t.none", "x:{7}:m-t.none"]
        for key in theirs:
            client.set(key, "theirs")
        tier.put(USER, SCOPE_A, b"value", time.time())
        assert tier.clear("m-t") == len(b"value")
        assert {key.decode() for key in client.scan_iter()} == set(theirs)


def test_clearing_goes_on_over_many_keys(server: RedisServer) -> None:
    with remote_tier(server.url) as tier:
        for user in range(2500):
            tier.put(f"{user:032x}", SCOPE_A if user % 5 else SCOPE_B, b"12", time.time())
        assert tier.clear("m-t") == 2 * 2000
        assert tier.clear("m-u") == 2 * 500


def test_another_database_is_another_store(server: RedisServer) -> None:
    with remote_tier(server.url) as tier, remote_tier(f"{server.url}/3") as other:
        tier.put(USER, SCOPE_A, b"value", time.time())
        assert other.get([(USER, SCOPE_A)]) == [Found(None, ())]


# Servers that fail.


def test_a_server_may_come_later_than_the_tier(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    with remote_tier(server.url) as tier:
        for use in uses(tier):
            with pytest.raises(
                TierError, match=f"remote tier at 127.0.0.1:{server.port}"
            ) as caught:
                use()
            assert isinstance(caught.value.__cause__, ConnectionError)
        with server:
            assert works(tier)


def test_a_server_that_was_killed_is_empty_and_used_when_it_is_back(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server, remote_tier(server.url) as tier:
        assert works(tier)
        server.stop()
        for use in uses(tier):
            with pytest.raises(TierError):
                use()
        server.start()
        assert tier.get([(USER, SCOPE_A)]) == [Found(None, ())]
        assert works(tier)


def test_a_server_that_does_not_answer_costs_one_timeout(tmp_path: Path) -> None:
    """Over an old and a new connection; and no answer is taken for that of another call."""
    with RedisServer(tmp_path) as server, remote_tier(server.url) as tier:
        tier.put(USER, SCOPE_A, b"value", time.time())
        server.pause()
        for use in uses(tier) * 2:
            start = time.monotonic()
            with pytest.raises(TierError) as caught:
                use()
            assert TIMEOUT_S * 0.9 <= time.monotonic() - start <= TIMEOUT_S + SLACK_S
            assert isinstance(caught.value.__cause__, TimeoutError)
        server.resume()
        assert tier.get([(USER, SCOPE_A), (USER, SCOPE_B)])[1].value is None
        assert works(tier)


def test_a_server_that_is_not_there_costs_one_timeout() -> None:
    """Packets to 192.0.2.0/24, reserved for documentation, are lost or refused."""
    with remote_tier("redis://192.0.2.1") as tier:
        start = time.monotonic()
        with pytest.raises(TierError) as caught:
            tier.get([(USER, SCOPE_A)])
        assert time.monotonic() - start <= TIMEOUT_S + SLACK_S
        assert isinstance(caught.value.__cause__, RedisError)


@contextmanager
def hanging_resolver(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names under ``slow.test`` resolve to 127.0.0.1, but only at the end of the block."""
    asked: list[str] = []
    is_over = threading.Event()
    real = socket.getaddrinfo

    def look_up(host: str, *arguments: Any, **options: Any) -> Any:
        if not host.endswith("slow.test"):
            return real(host, *arguments, **options)
        asked.append(host)
        is_over.wait(60.0)
        return real("127.0.0.1", *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    try:
        yield asked
    finally:
        is_over.set()


def test_a_resolver_that_hangs_costs_one_timeout_and_one_thread(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS look-ups had no deadline: a resolver that took 2 s delayed every call by 2 s."""
    with remote_tier(f"redis://a.slow.test:{server.port}") as tier:
        with hanging_resolver(monkeypatch) as asked:
            for use in uses(tier):
                start = time.monotonic()
                with pytest.raises(TierError, match=r"a\.slow\.test has no address after 0\.5 s"):
                    use()
                assert TIMEOUT_S * 0.9 <= time.monotonic() - start <= TIMEOUT_S + SLACK_S
            assert asked == ["a.slow.test"]  # All waited for the same look-up.
        wait_until(lambda: works(tier), 20.0)
        # If the resolver hangs again, the known address is used.
        for client in tier._primaries():
            client.connection_pool.disconnect()
        with hanging_resolver(monkeypatch):
            assert works(tier)


def test_every_address_of_a_name_is_tried(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as ``localhost``, whose first address is often IPv6, where no server listens."""
    real = socket.getaddrinfo

    def look_up(host: str, *arguments: Any, **options: Any) -> Any:
        if host != "two.test":
            return real(host, *arguments, **options)
        return [*real("127.0.0.2", *arguments, **options), *real("127.0.0.1", *arguments)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with remote_tier(f"redis://two.test:{server.port}") as tier:
        assert works(tier)


def put_much(tier: RemoteTier) -> None:
    for number in range(10):
        tier.put(USER, f"m{number}-t.none", bytes(1_000_000), time.time())


def test_a_server_that_is_full_is_an_error_and_nothing_is_half_written(tmp_path: Path) -> None:
    """``forget`` works there all the same, also for a user without values."""
    with (
        RedisServer(tmp_path) as server,
        remote_tier(server.url, timeout_s=5.0) as tier,
        server.client() as client,
    ):
        assert works(tier)
        client.config_set("maxmemory", "4mb")
        with pytest.raises(TierError) as caught:
            put_much(tier)
        assert isinstance(caught.value.__cause__, OutOfMemoryError)
        scopes = {scope.decode() for scope in client.smembers(f"{KEYS}scopes")}
        kept = {key.decode().removeprefix(KEYS) for key in client.keys(f"{KEYS}m*")}
        assert scopes == kept
        client.config_set("maxmemory", "1mb")
        at = time.time()
        assert tier.forget("8", at) == 0
        assert tier.forget(USER, at) >= 1_000_000
        assert not tier.put("8", SCOPE_A, b"late", at)
        assert not tier.put(USER, SCOPE_A, b"late", at)
        client.config_set("maxmemory", "0")
        assert works(tier)


def test_a_server_that_is_no_clusters_is_an_error(tmp_path: Path) -> None:
    with (
        RedisServer(tmp_path) as server,
        remote_tier(server.url, cluster=True) as tier,
        pytest.raises(TierError, match="cluster support disabled"),
    ):
        tier.get([(USER, SCOPE_A)])


def test_threads_share_a_tier_whose_server_comes_and_goes(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server, remote_tier(server.url) as tier:
        is_over = threading.Event()
        wrong: list[object] = []

        def use(user: str) -> None:
            while not is_over.is_set():
                try:
                    [found] = tier.get([(user, SCOPE_A)])
                    if found.value not in (None, user.encode()):
                        wrong.append(found)
                    tier.put(user, SCOPE_A, user.encode(), time.time())
                except TierError:
                    continue
                except BaseException as error:
                    wrong.append(error)
                    raise

        threads = [threading.Thread(target=use, args=(str(user),)) for user in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(3):
            server.stop()
            server.start()
            wait_until(lambda: works(tier), timeout_s=5.0)
        is_over.set()
        for thread in threads:
            thread.join()
        assert wrong == []


# Passwords and certificates.


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


def test_a_password_is_sent_and_never_shown(tmp_path: Path) -> None:
    with RedisServer(tmp_path, password="s3cret") as server:
        with remote_tier(server.url, password="s3cret") as tier:
            assert works(tier)
        for password in (None, "wr0ng"):
            with remote_tier(server.url, password=password) as tier:
                with pytest.raises(TierError) as caught:
                    tier.get([(USER, SCOPE_A)])
                assert isinstance(caught.value.__cause__, RedisError)
                assert "wr0ng" not in str(caught.value)


def complaint(url: str, **options: Any) -> str:
    """Return the error of a tier's check; empty if it works."""
    with remote_tier(url, timeout_s=2.0, **options) as tier:
        try:
            tier.check()
        except TierError as error:
            return str(error)
        return ""


def test_a_password_that_is_missing_wrong_or_too_much_is_told_by_its_setting(
    server: RedisServer, tmp_path: Path
) -> None:
    """A write of K/V failed with 'Broken pipe': Redis closes the connection on a large command of a
    client that has not authenticated."""
    with RedisServer(tmp_path, password="s3cret") as locked:
        assert complaint(locked.url, password="s3cret") == ""
        assert complaint(locked.url) == (
            f"remote tier at 127.0.0.1:{locked.port}: it asks for a password: "
            "cache.remote.password_file: Authentication required."
        )
        wrong = complaint(locked.url, password="wr0ng")
        assert "it refuses cache.remote.username or the password in" in wrong
        assert "cache.remote.username" in complaint(locked.url, username="me", password="s3cret")
        with remote_tier(locked.url, timeout_s=2.0) as tier, pytest.raises(TierError) as broken:
            tier.put(USER, SCOPE_A, b"x" * 2_000_000, time.time())
        assert "it asks for a password: cache.remote.password_file: " in str(broken.value)
    assert complaint(server.url) == ""
    assert "it asks for no password" in complaint(server.url, password="needless")


def test_what_an_acl_refuses_is_told_with_where_to_look(server: RedisServer) -> None:
    reads, all_commands = ["+get", "+smembers"], ["+@all"]
    users = {
        "reads": (reads, "kvshare:*"),
        "scripts": ([*reads, "+eval"], "kvshare:*"),
        "elsewhere": (all_commands, "other:*"),
    }
    with server.client() as client:
        for user, (commands, keys) in users.items():
            client.acl_setuser(user, True, passwords=["+pw"], keys=[keys], commands=commands)
        for user in users:
            said = complaint(server.url, username=user, password="pw")
            assert "its ACL refuses what the tier needs, see docs/caching.md" in said
            client.acl_deluser(user)


def test_one_side_that_speaks_tls_alone_is_told(
    server: RedisServer, tmp_path: Path, certificates: Certificates
) -> None:
    ca, cert, key = certificates
    files = {"tls_ca_file": ca, "tls_cert_file": cert, "tls_key_file": key}
    with RedisServer(tmp_path, certificates=certificates) as secured:
        assert complaint(secured.url, **files) == ""
        plain = secured.url.replace("rediss", "redis")
        assert "speaks TLS (rediss:// in cache.remote.url)" in complaint(plain)
        assert "not signed by cache.remote.tls_ca_file" in complaint(secured.url)
        assert "it asks for a certificate" in complaint(secured.url, tls_ca_file=ca)
    assert "it may speak no TLS" in complaint(server.url.replace("redis", "rediss"), **files)


def test_what_is_no_redis_or_another_one_is_told(server: RedisServer, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port, is_done = other.getsockname()[1], threading.Event()
        greeting = threading.Thread(target=greet, args=(other, is_done))
        greeting.start()
        told = complaint(f"redis://127.0.0.1:{port}")
        is_done.set()
        greeting.join()
    # Which of two hints it gives depends on whether the greeting comes before the first command.
    assert "is not Redis" in told
    with closed_port() as port:
        assert "Connection refused" in complaint(f"redis://127.0.0.1:{port}")
    assert "no database with the number" in complaint(f"{server.url}/99")
    assert "cache.remote.cluster=false" in complaint(server.url, cluster=True)
    with RedisServer(tmp_path / "full", "--maxmemory", "1") as full:
        assert "it is full" in complaint(full.url)
    address = "127.0.0.1", str(server.port)
    with RedisServer(tmp_path / "replica", "--replicaof", " ".join(address)) as replica:
        assert "it is a read-only replica" in complaint(replica.url)


def greet(listener: socket.socket, is_done: threading.Event) -> None:
    """Answer as an SSH server does, also to a client that retries."""
    listener.settimeout(0.05)
    connections = []  # Open until the end: closing one with unread bytes would reset it.
    while not is_done.is_set():
        with suppress(OSError):
            connections.append(listener.accept()[0])
            connections[-1].sendall(b"SSH-2.0-OpenSSH_9\r\n")
    for connection in connections:
        connection.close()


def test_a_server_that_worked_and_went_is_not_called_another(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server, remote_tier(server.url) as tier:
        tier.check()
        with server.client() as client:
            client.execute_command("CLIENT KILL TYPE normal SKIPME yes")
        server.stop()
        with pytest.raises(TierError) as gone:
            tier.get([(USER, SCOPE_A)])
    assert "TLS" not in str(gone.value)


def test_opening_a_tier_logs_what_is_wrong_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with RedisServer(tmp_path, password="s3cret") as server:
        config = CacheConfig(name="tiered", remote=RemoteConfig(url=server.url, deadline_ms=2000))
        (tmp_path / "key").write_text("packets")
        config = replace(config, key_file=str(tmp_path / "key"))
        new_stack(config, {}).close()
        [logged] = [record.getMessage() for record in caplog.records]
        assert "it asks for a password: cache.remote.password_file" in logged
        assert "\n" not in logged
        (tmp_path / "password").write_text("s3cret\n")
        remote = replace(config.remote, password_file=str(tmp_path / "password"))
        caplog.clear()
        new_stack(replace(config, remote=remote), {}).close()
        assert caplog.records == []
        with server.client() as client:
            wait_until(lambda: client.dbsize() == 0, 10.0)  # The probe expires.


def test_a_remote_tier_without_a_key_for_its_packets_is_said_once(
    server: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By default anyone who can write to Redis can forge K/V, and nothing said so."""
    config = CacheConfig(name="tiered", remote=RemoteConfig(url=server.url, deadline_ms=2000))
    new_stack(config, {}).close()
    [logged] = [record.getMessage() for record in caplog.records]
    assert logged.startswith("cache.key_file is null: ")
    caplog.clear()
    for quiet in (replace(config, key_file=str(tmp_path / "key")), CacheConfig(name="tiered")):
        (tmp_path / "key").write_text("packets")
        new_stack(quiet, {}).close()
    assert caplog.records == []


def test_a_user_may_be_allowed_no_more_than_a_tier_needs(server: RedisServer) -> None:
    """The rule that the documentation gives."""
    commands = "get smembers eval exists set sadd srem pttl pexpire strlen unlink scan time info"
    with server.client() as client:
        client.acl_setuser(
            "kvshare",
            enabled=True,
            passwords=["+pw"],
            keys=["kvshare:*"],
            commands=[f"+{command}" for command in commands.split()],
        )
        with remote_tier(server.url, username="kvshare", password="pw") as tier:
            tier.check()
            assert works(tier)
            assert tier.put(USER, SCOPE_A, b"value", time.time())
            assert tier.clear("m-t") == len(b"value")
            assert tier.forget(USER, time.time()) > 0
            assert tier.held_bytes() > 0
        client.acl_deluser("kvshare")


def test_tls_with_certificates_on_both_sides(tmp_path: Path, certificates: Certificates) -> None:
    ca, cert, key = certificates
    with RedisServer(tmp_path, certificates=certificates, password="s3cret") as server:
        files = {"tls_ca_file": ca, "tls_cert_file": cert, "tls_key_file": key}
        with remote_tier(server.url, password="s3cret", timeout_s=5.0, **files) as tier:
            assert works(tier)
        without = [
            {**files, "tls_ca_file": None},  # the system's authorities do not know it
            {**files, "tls_cert_file": None, "tls_key_file": None},
        ]
        for some in without:
            with remote_tier(server.url, password="s3cret", timeout_s=5.0, **some) as tier:
                with pytest.raises(TierError) as caught:
                    tier.get([(USER, SCOPE_A)])
                assert isinstance(caught.value.__cause__, RedisError | OSError)
        plain = server.url.replace("rediss", "redis")
        with remote_tier(plain, password="s3cret") as tier, pytest.raises(TierError):
            tier.get([(USER, SCOPE_A)])


def test_a_certificate_of_another_host_is_refused(
    tmp_path: Path, certificates: Certificates
) -> None:
    """It is signed by the right authority, for 127.0.0.1 and not for localhost."""
    ca, cert, key = certificates
    with RedisServer(tmp_path, certificates=certificates) as server:
        url = server.url.replace("127.0.0.1", "localhost")
        files = {"tls_ca_file": ca, "tls_cert_file": cert, "tls_key_file": key}
        with (
            remote_tier(url, timeout_s=5.0, **files) as tier,
            pytest.raises(TierError, match="localhost"),
        ):
            tier.get([(USER, SCOPE_A)])


# Mistakes.


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:6379",
        "http://127.0.0.1",
        "unix:///run/redis.sock",
        "redis://",
        "redis://:6379",
        "redis://host:99999",
        "redis://host:port",
        "redis://host/name",
        "redis://host?socket_timeout=99",
        "redis://:s3cret@host",
        "redis://user:s3cret@host",
    ],
)
def test_an_url_that_cannot_be_used_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ConfigError, match="the remote tier's url cannot be read") as caught:
        RemoteTier(url, TTL_S, TIMEOUT_S)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout_s": 0.0}, r"timeout_s is 0.0; it must be above 0 seconds"),
        ({"url": "redis://host/3", "cluster": True}, r"names database 3; a cluster has 0"),
        ({"tls_ca_file": Path(__file__)}, r"the remote tier's url must begin with rediss://"),
        ({"url": "rediss://host", "tls_ca_file": Path("/no/ca")}, r"/no/ca, .* is not a file"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RemoteTier(**{"url": "redis://host", "ttl_s": TTL_S, "timeout_s": TIMEOUT_S, **options})


def test_a_closed_tier_is_an_error(server: RedisServer) -> None:
    with remote_tier(server.url) as tier:
        assert works(tier)
        tier.close()
        for use in uses(tier):
            with pytest.raises(TierError, match="is closed"):
                use()


def test_without_redis_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(MissingExtraError, match=r"the remote tier needs the extra \[tiers\]"):
        RemoteTier("redis://host", TTL_S, TIMEOUT_S)


# A cluster, one for all of these tests; each leaves it healthy.

USERS = [f"{number:032x}" for number in range(40)]  # in all three servers' slots
FAILOVER_S = 20.0  # 2 s until a server counts as dead, about 1 s for the election of its replica


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RedisServer]]:
    with redis_cluster(tmp_path_factory.mktemp("cluster")) as servers:
        yield servers


def servers_by_role(servers: list[RedisServer], role: str) -> list[RedisServer]:
    found = []
    for server in servers:
        with server.client() as client:
            if client.info("replication")["role"] == role:
                found.append(server)
    return found


def is_replicated(primary: RedisServer) -> bool:
    with primary.client() as client:
        replication = client.info("replication")
    return replication["slave0"]["offset"] == replication["master_repl_offset"]


def put_all(tier: RemoteTier) -> None:
    for user in USERS:
        assert tier.put(user, SCOPE_A, user.encode(), time.time())


def has_all(tier: RemoteTier) -> bool:
    values = [found.value for found in tier.get([(user, SCOPE_A) for user in USERS])]
    return values == [user.encode() for user in USERS]


def test_a_cluster_is_used_as_one_server(cluster: list[RedisServer]) -> None:
    with remote_tier(cluster[0].url, cluster=True) as tier:
        put_all(tier)
        assert has_all(tier)
        primaries = servers_by_role(cluster, "master")
        for server in primaries:
            with server.client() as client:
                assert client.dbsize() > 0
        assert tier.held_bytes() > 3_000_000  # of three servers; an empty one uses 1.5 MB
        assert tier.forget(USERS[3], time.time()) == 32
        assert not tier.put(USERS[3], SCOPE_A, b"late", time.time() - 1.0)
        assert tier.clear("m-t") == 39 * 32
        assert not any(found.value for found in tier.get([(user, SCOPE_A) for user in USERS]))


def test_a_slot_that_has_moved_is_followed_within_a_call(cluster: list[RedisServer]) -> None:
    with remote_tier(cluster[0].url, cluster=True, timeout_s=5.0) as tier:
        put_all(tier)
        replica = servers_by_role(cluster, "slave")[0]
        with replica.client() as client:
            client.execute_command("CLUSTER FAILOVER")
            wait_until(lambda: client.info("replication")["role"] == "master", timeout_s=10.0)
        wait_until(lambda: all(map(is_cluster_ok, cluster)), timeout_s=10.0)
        assert has_all(tier)
        put_all(tier)
        assert tier.clear("m-t") == 40 * 32


def is_cluster_ok(server: RedisServer) -> bool:
    """Whether a server thinks that every slot is served: a busy one may miss a failover first."""
    with server.client() as client:
        return "'cluster_state': 'ok'" in str(client.cluster("INFO"))


def test_a_silent_server_of_a_cluster_costs_few_timeouts(cluster: list[RedisServer]) -> None:
    with remote_tier(cluster[0].url, cluster=True) as tier:
        put_all(tier)
        [silent, *_] = servers_by_role(cluster, "master")
        silent.pause()
        # For less time than the others need to call it dead.
        start = time.monotonic()
        with pytest.raises(TierError):
            has_all(tier)
        assert time.monotonic() - start <= 2 * TIMEOUT_S + SLACK_S
        silent.resume()
        wait_until(lambda: works(tier), timeout_s=5.0)
        assert has_all(tier)


def test_a_cluster_heals_when_a_primary_is_killed(cluster: list[RedisServer]) -> None:
    """It is the server in the url; the tier knows the others."""
    [killed, *_] = servers_by_role(cluster, "master")
    with remote_tier(killed.url, cluster=True) as tier:
        put_all(tier)
        wait_until(lambda: is_replicated(killed), timeout_s=5.0)
        killed.stop()
        with pytest.raises(TierError):
            has_all(tier)
        wait_until(lambda: all(works(tier, user) for user in USERS), FAILOVER_S)
        assert has_all(tier)
        killed.start()


def test_a_cluster_that_is_not_there_is_an_error_and_costs_two_timeouts() -> None:
    with closed_port() as port, remote_tier(f"redis://127.0.0.1:{port}", cluster=True) as tier:
        for use in uses(tier):
            start = time.monotonic()
            with pytest.raises(TierError) as caught:
                use()
            assert time.monotonic() - start <= 2 * TIMEOUT_S + SLACK_S
            assert isinstance(caught.value.__cause__, ConnectionError)

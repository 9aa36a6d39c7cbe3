"""Replicas, nginx and Redis as one server: a death costs time, and a stop drains requests first."""

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from hashlib import blake2b
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import IO, Any, NamedTuple

import kubernetes_validate
import pytest
import yaml
from redis import Redis
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from tests.cache.servers import free_port, make_certificates, wait_until
from tests.pipelines.commands import composed, spawn_pipeline
from tests.worlds import PROBABILITY_TOLERANCE, ROOT, SCHEMA, draw_raw
from torchrec_kvshare.cache.open import OFF
from torchrec_kvshare.cache.remote import RemoteTier
from torchrec_kvshare.commands.machine import granted_cores
from torchrec_kvshare.config import (
    CacheConfig,
    DiskConfig,
    RemoteConfig,
    ServeClusterConfig,
    ServeConfig,
    ServerConfig,
    checked,
)
from torchrec_kvshare.deploy import cluster as library
from torchrec_kvshare.deploy.cluster import Layout, ProcessSpec, run_cluster, write_layout
from torchrec_kvshare.deploy.nginx import Address, Tls, nginx_config, token_config
from torchrec_kvshare.errors import ConfigError, UnavailableError
from torchrec_kvshare.export.exporter import load_artifact
from torchrec_kvshare.export.open import new_engine
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.serving.columns import column_tensors, datatype_of

READY = re.compile(r"serving on http://(\S+) and grpc://(\S+)\n")
STARTED = re.compile(r"(\S+) runs as process (\d+)")
NUM_REPLICAS = 3
START_S, STOP_S = 180.0, 90.0  # a busy machine
HTTP, GRPC = "http", "grpc"
# One request for each user.
RAWS = [draw_raw(8 + seed % 5, 3 + seed % 4, seed) for seed in range(12)]
for _index, _raw in enumerate(RAWS):
    _raw["user_id"] = f"visitor {_index}"


class Answer(NamedTuple):
    """What a client got: scores, or an error."""

    protocol: str
    index: int  # in RAWS
    at: float
    scores: list[float]
    error: str
    was_cut: bool  # no answer began: the connection was refused, or closed before that


class Running:
    """A process that runs ``pipelines.serve_cluster``."""

    def __init__(self, artifact: Path, output: Path) -> None:
        self.output = output
        overrides = [f"replicas={NUM_REPLICAS}", "access_log=true", "threads=1"]
        overrides += ["server.http_port=0", "server.grpc_port=0", "server.timeout_ms=60000"]
        # These tests check that K/V is found, not how fast.
        overrides += ["cache.remote.deadline_ms=5000"]
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-W", "ignore", "-m", "pipelines.serve_cluster"),
                *(f"artifact={artifact}", f"output={output}", *overrides),
            ],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, args=(self.process.stderr,))
        self._reader.start()
        assert self.process.stdout is not None
        ready = None
        for line in self.process.stdout:
            ready = READY.fullmatch(line)
            if ready:
                break
        assert ready is not None, self.lines
        self.http, self.grpc = ready.groups()

    def _read(self, lines: IO[str]) -> None:
        self.lines.extend(lines)

    @property
    def messages(self) -> list[str]:
        return [json.loads(line)["message"] for line in self.lines if line.startswith("{")]

    def process_of(self, name: str) -> int:
        """Id of the last process that was started under that name."""
        started = filter(None, map(STARTED.match, self.messages))
        return [int(one[2]) for one in started if one[1] == name][-1]

    def access(self) -> list[dict[str, str]]:
        """Lines of nginx's log that are requests for scores."""
        lines = (self.output / "nginx" / "access.log").read_text().splitlines()
        logged = [json.loads(line) for line in lines]
        return [one for one in logged if one["path"].endswith(("/v1/rank", "/ModelInfer"))]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(STOP_S)
        self._reader.join(STOP_S)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


def rank(running: Running, index: int) -> dict[str, Any]:
    """Answer over HTTP, on a connection of its own."""
    with closing(HTTPConnection(running.http, timeout=STOP_S)) as connection:
        headers = {"X-User-Id": RAWS[index]["user_id"]}
        connection.request("POST", "/v1/rank", json.dumps(RAWS[index]).encode(), headers)
        with connection.getresponse() as response:
            answer = json.loads(response.read())
            assert response.status == 200, answer
            assert isinstance(answer, dict)
            return answer


def ask_http(running: Running, index: int) -> Answer:
    scores, error, was_cut = [], "", False
    try:
        scores = rank(running, index)["scores"]
    except (OSError, HTTPException) as cut:
        error, was_cut = repr(cut), True
    except AssertionError as refused:
        error = str(refused)
    at = time.monotonic()
    return Answer(HTTP, index, at=at, scores=scores, error=error, was_cut=was_cut)


def ask_grpc(client: InferenceServerClient, index: int) -> Answer:
    scores, error, was_cut = [], "", False
    inputs = []
    for name, tensor in column_tensors([RAWS[index]], SCHEMA).items():
        inputs.append(InferInput(name, list(tensor.shape), datatype_of(tensor)))
        inputs[-1].set_data_from_numpy(tensor)
    headers = {"x-user-id": RAWS[index]["user_id"]}
    try:
        answer = client.infer("kvshare", inputs, headers=headers, client_timeout=STOP_S)
        scores = answer.as_numpy("scores").tolist()
    except InferenceServerException as refused:
        error = str(refused)
        # nginx's own answers have an HTTP status; a lost connection has none.
        was_cut = "UNAVAILABLE" in error and "http2 header" not in error
    at = time.monotonic()
    return Answer(GRPC, index, at=at, scores=scores, error=error, was_cut=was_cut)


class Load:
    """Clients that send one request after the other, two per protocol, until they are stopped."""

    def __init__(self, running: Running) -> None:
        self.answers: list[Answer] = []
        self._is_stopped = threading.Event()
        work = [(self._over_http, running, first) for first in (0, 6)]
        work += [(self._over_grpc, running, first) for first in (3, 9)]
        self._threads = [threading.Thread(target=target, args=rest) for target, *rest in work]
        for thread in self._threads:
            thread.start()

    def _over_http(self, running: Running, first: int) -> None:
        self._ask(lambda index: ask_http(running, index), first)

    def _over_grpc(self, running: Running, first: int) -> None:
        # A connection for each client: by default all clients of a process share one.
        own = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        with closing(InferenceServerClient(running.grpc, channel_args=own)) as client:
            self._ask(lambda index: ask_grpc(client, index), first)

    def _ask(self, ask: Callable[[int], Answer], index: int) -> None:
        while not self._is_stopped.is_set():
            index = index % (len(RAWS) - 1) + 1  # The first user is reserved for the story.
            self.answers.append(ask(index))
            # Leave the test's two cores time to start a replica.
            time.sleep(0.1)

    def close(self) -> None:
        self._is_stopped.set()
        for thread in self._threads:
            thread.join(STOP_S)


class Story(NamedTuple):
    """What happened to one cluster, from its start to its end."""

    load: list[Answer]  # while a replica was killed and came back
    killed_at: float
    messages: list[str]
    homes: tuple[dict[str, Any], ...]  # answers to one user: at home, after the kill
    moved: list[dict[str, str]]
    returned: list[dict[str, str]]
    last_load: list[Answer]  # while all processes were stopped
    last_access: list[dict[str, str]]
    status: int
    left: list[str]  # logs of processes that still run
    fronts: tuple[str, str]
    health: dict[str, int]  # status by path
    found: "Found"


class Found(NamedTuple):
    """What another user of the machine could see of a running cluster."""

    to_strangers: bytes  # what Redis answers without the password
    packets: list[bytes]
    password: bytes
    key: bytes
    command_lines: bytes
    logs: bytes
    nginx_users: list[set[str]]  # of the master and its workers


@pytest.fixture(scope="module")
def story(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """One cluster for all tests: a replica takes seconds to start."""
    with closing(Running(artifact, tmp_path_factory.mktemp("cluster"))) as running:
        yield tell(running)


def tell(running: Running) -> Story:
    health = {path: status_of(running, path) for path in ("/v2/health/live", "/v2/health/ready")}
    at_home = [rank(running, 0) for _ in range(2)][1]
    home = running.access()[-1]["replicas"]
    name = replica_at(running, home)
    with closing(Load(running)) as load:
        wait_until(lambda: len(load.answers) > 40, START_S)
        killed_at = time.monotonic()
        os.kill(running.process_of(name), signal.SIGKILL)
        elsewhere = rank(running, 0)
        moved = running.access()
        wait_until(lambda: f"{name} is back" in running.messages, START_S)
        wait_until(lambda: is_at(running, home), START_S)
    returned = running.access()
    found = look_into(running)
    num_before = len(running.access())
    with closing(Load(running)) as last_load:
        wait_until(lambda: len(last_load.answers) > 40, START_S)
        running.process.terminate()
        status = running.process.wait(STOP_S)
    return Story(
        load=load.answers,
        killed_at=killed_at,
        messages=running.messages,
        homes=(at_home, elsewhere),
        moved=moved,
        returned=returned,
        last_load=last_load.answers,
        last_access=running.access()[num_before:],
        status=status,
        left=running_in(running.output),
        fronts=(running.http, running.grpc),
        health=health,
        found=found,
    )


def look_into(running: Running) -> Found:
    password, key = (
        (running.output / name).read_bytes() for name in ("redis_password", "packet_key")
    )
    command = Path(f"/proc/{running.process_of('redis')}/cmdline").read_bytes().split(b"\0")
    port = int(command[0].rpartition(b":")[2])  # Redis puts its address into its command line.
    with socket.create_connection(("127.0.0.1", port), STOP_S) as connection:
        connection.sendall(b"KEYS *\r\n")
        to_strangers = connection.recv(100)
    with closing(Redis("127.0.0.1", port, password=password.decode())) as client:
        names = [name for name in client.scan_iter("kvshare:*") if client.type(name) == b"string"]
        packets = [value for value in map(client.get, names) if value]
    master = running.process_of("nginx")
    children = Path(f"/proc/{master}/task/{master}/children").read_text().split()
    return Found(
        to_strangers=to_strangers,
        packets=packets,
        password=password,
        key=key,
        command_lines=b"".join(file.read_bytes() for file in process_files("cmdline")),
        logs=b"".join(file.read_bytes() for file in running.output.rglob("*.log")),
        nginx_users=[user_of(process) for process in (master, *children)],
    )


def process_files(name: str) -> Iterator[Path]:
    for file in Path("/proc").glob(f"[0-9]*/{name}"):
        with suppress(OSError):
            file.read_bytes()
            yield file


def user_of(process: int | str) -> set[str]:
    """User ids of a process: real, effective, saved and of files."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    (line,) = (one for one in lines if one.startswith("Uid:"))
    return set(line.split()[1:])


def status_of(running: Running, path: str) -> int:
    with closing(HTTPConnection(running.http, timeout=STOP_S)) as connection:
        connection.request("GET", path)
        with connection.getresponse() as response:
            return response.status


def replica_at(running: Running, address: str) -> str:
    """The name of the replica that listens there."""
    port = address.rpartition(":")[2]
    for index in range(NUM_REPLICAS):
        with open(f"/proc/{running.process_of(f'replica-{index}')}/cmdline") as command:
            if f"server.http_port={port}" in command.read():
                return f"replica-{index}"
    raise AssertionError(address)


def is_at(running: Running, address: str) -> bool:
    rank(running, 0)
    last = [one for one in running.access() if one["path"] == "/v1/rank"]
    return any(one["replicas"] == address for one in last[-8:])


@pytest.fixture(scope="module")
def expected(artifact: Path) -> list[list[float]]:
    """Scores without any cache, one request at a time."""
    loaded = load_artifact(artifact)
    with closing(new_engine(loaded, CacheConfig(OFF))) as engine:
        return [engine.rank([parse_request(raw, loaded.schema)])[0].scores for raw in RAWS]


def assert_right(answers: Sequence[Answer], expected: list[list[float]]) -> None:
    for answer in answers:
        assert answer.scores == pytest.approx(
            expected[answer.index], rel=0, abs=PROBABILITY_TOLERANCE
        ), answer


# --------------------------------------------------------------------------- the whole cluster


def test_every_request_is_answered_right_while_a_replica_dies_and_comes_back(
    story: Story, expected: list[list[float]]
) -> None:
    assert [answer for answer in story.load if answer.error] == []
    assert_right(story.load, expected)
    for protocol in (HTTP, GRPC):
        assert sum(one.protocol == protocol and one.at > story.killed_at for one in story.load) > 10


def test_who_died_is_said_and_is_started_again(story: Story) -> None:
    died = [message for message in story.messages if "starts again" in message]
    assert len(died) == 1
    assert re.fullmatch(r"replica-\d ended with -9 and starts again in 0\.5 s", died[0])
    assert f"{died[0].split()[0]} is back" in story.messages


def test_another_replica_has_the_kv_of_a_user_whose_replica_died(
    story: Story, expected: list[list[float]]
) -> None:
    at_home, elsewhere = story.homes
    assert (at_home["cache"]["status"], at_home["cache"]["tier"]) == ("hit", "pages")
    assert elsewhere["cache"]["status"] == "hit"
    assert elsewhere["cache"]["tier"] == "remote"
    for answer in story.homes:
        assert answer["scores"] == pytest.approx(expected[0], rel=0, abs=PROBABILITY_TOLERANCE)


def test_a_request_that_met_the_dead_replica_was_asked_of_another(story: Story) -> None:
    again = [one for one in story.moved + story.returned if "," in one["replicas"]]
    assert again
    assert {one["status"] for one in again} == {"200"}


def test_what_was_accepted_is_answered_when_all_are_told_to_end(
    story: Story, expected: list[list[float]]
) -> None:
    answered = [answer for answer in story.last_load if not answer.error]
    assert_right(answered, expected)
    # The others were never accepted: their connection was refused or closed before an answer.
    assert [answer for answer in story.last_load if answer.error and not answer.was_cut] == []
    assert {one["status"] for one in story.last_access} == {"200"}
    assert len(story.last_access) == len(answered)


def test_all_end_well_and_leave_nothing_running(story: Story) -> None:
    assert story.status == 0
    assert story.left == []
    assert story.messages[-1] == "drained"
    ended = [message for message in story.messages if " ended (" in message]
    assert ended[0] == "nginx ended (0)"
    assert sorted(ended[1:]) == sorted(
        ["redis ended (0)", *(f"replica-{index} ended (0)" for index in range(NUM_REPLICAS))]
    )
    for address in story.fronts:
        host, port = address.split(":")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, int(port)))


def test_redis_answers_nobody_without_the_password(story: Story) -> None:
    assert story.found.to_strangers.startswith(b"-NOAUTH")


def test_what_lies_in_redis_is_signed_with_the_cluster_s_key(story: Story) -> None:
    assert story.found.packets
    for packet in story.found.packets:
        digest = blake2b(packet[:-32], key=story.found.key, digest_size=32).digest()
        assert packet[-32:] == digest


def test_no_secret_stands_on_a_command_line_or_in_a_log(story: Story) -> None:
    assert b"redis_password" in story.found.command_lines
    for secret in (story.found.password, story.found.key):
        assert secret not in story.found.command_lines
        assert secret not in story.found.logs
        assert not any(secret.decode() in message for message in story.messages)


def test_nginx_works_as_no_root(story: Story) -> None:
    """If root started it, all of its workers were root."""
    master, *workers = story.found.nginx_users
    assert master == {str(os.geteuid())}
    assert workers
    assert {"0"} not in workers


# ---------------------------------------------------------------------------- the processes


def cluster_config(output: Path, **fields: Any) -> ServeClusterConfig:
    return ServeClusterConfig(
        **{"artifact": "a", "cache": CacheConfig("tiered"), "output": str(output)} | fields
    )


def layout_of(output: Path, *overrides: str, **fields: Any) -> dict[str, ProcessSpec]:
    """Processes by name; none is started."""
    layout = write_layout(cluster_config(output, **fields), overrides)
    return {spec.name: spec for spec in layout.processes}


def replica_config(spec: ProcessSpec) -> ServeConfig:
    """The config that a replica composes from its command line."""
    python, m, module, pipeline, *overrides = spec.command
    assert (python, m, module, pipeline) == (sys.executable, "-m", "torchrec_kvshare", "serve")
    return checked(composed("serve", *overrides), ServeConfig)


def without_programs(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    found = library.shutil.which
    monkeypatch.setattr(
        library.shutil, "which", lambda name: None if name in missing else found(name)
    )


def test_a_replica_takes_what_the_command_line_says_of_it(tmp_path: Path) -> None:
    overrides = ("replicas=2", "artifact=a", "cache=tiered", "server.queue_requests=7")
    specs = layout_of(
        tmp_path / "a, b", *overrides, "output=x", "cache.remote.codec=int8", replicas=2, threads=5
    )
    assert list(specs) == ["redis", "replica-0", "replica-1", "nginx"]
    configs = [replica_config(specs[f"replica-{index}"]) for index in range(2)]
    ports = {port for one in configs for port in (one.server.http_port, one.server.grpc_port)}
    assert len(ports) == 4
    peers = [f"127.0.0.1:{one.server.http_port}" for one in configs]
    for config in configs:
        assert config.server.peers == peers
        assert (config.artifact, config.threads) == ("a", 5)
        assert config.server.queue_requests == 7
        assert config.server.host == "127.0.0.1"
        assert config.cache.name == "tiered"
        assert config.cache.remote.codec == "int8"
    assert {one.cache.remote.url for one in configs} == {
        f"redis://127.0.0.1:{specs['redis'].command[5]}"
    }


def test_redis_gets_a_password_and_packets_a_key_that_no_command_line_shows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every user of the machine could read and write K/V through the port."""
    caplog.set_level("INFO")
    specs = layout_of(tmp_path)
    cache = replica_config(specs["replica-0"]).cache
    assert cache.remote.password_file is not None
    assert cache.key_file is not None
    password, key = (
        Path(file).read_text() for file in (cache.remote.password_file, cache.key_file)
    )
    assert (len(password), len(key)) == (64, 64)
    assert password != key
    config_file = specs["redis"].command[1]
    assert Path(config_file).read_text() == f"requirepass {password}\n"
    for file in (cache.remote.password_file, cache.key_file, config_file):
        assert stat.S_IMODE(os.stat(file).st_mode) == 0o600
    told = " ".join(word for spec in specs.values() for word in spec.command) + caplog.text
    assert password not in told
    assert key not in told
    # The key stays: the next run in this folder can read K/V on disk.
    layout_of(tmp_path)
    assert Path(cache.key_file).read_text() == key


def test_a_key_of_the_config_is_used_in_place_of_an_own_one(tmp_path: Path) -> None:
    overrides = ("cache=tiered", "cache.key_file=mine")
    cache = CacheConfig("tiered", key_file="mine")
    specs = layout_of(tmp_path, *overrides, cache=cache)
    assert replica_config(specs["replica-0"]).cache.key_file == "mine"
    assert not (tmp_path / "packet_key").exists()


def test_a_secret_of_the_folder_that_others_can_read_is_refused(tmp_path: Path) -> None:
    layout_of(tmp_path)
    (tmp_path / "redis_password").chmod(0o644)
    with pytest.raises(ConfigError, match="redis_password has mode 0644; the password of Redis"):
        layout_of(tmp_path)


def test_nginx_asks_for_the_token_of_the_replicas(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    server = ServerConfig(token_file=str(tmp_path / "token"))
    layout_of(tmp_path / "a", server=server)
    assert 'include "token.conf";' in (tmp_path / "a" / "nginx" / "nginx.conf").read_text()
    written = tmp_path / "a" / "nginx" / "token.conf"
    assert written.read_text() == token_config(b"s3cret")
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    layout_of(tmp_path / "b")
    assert "include" not in (tmp_path / "b" / "nginx" / "nginx.conf").read_text()
    missing = ServerConfig(token_file="missing")
    with pytest.raises(ConfigError, match=r"server\.token_file is 'missing', which cannot be read"):
        layout_of(tmp_path / "c", server=missing)
    assert not (tmp_path / "c").exists()


def test_what_two_processes_cannot_share_is_one_for_each(tmp_path: Path) -> None:
    cache = CacheConfig("tiered", disk=DiskConfig(folder=str(tmp_path / "kv, it's")))
    server = ServerConfig(tensorboard=str(tmp_path / "board"))
    specs = layout_of(tmp_path, cache=cache, server=server, replicas=2)
    for index in range(2):
        config = replica_config(specs[f"replica-{index}"])
        assert config.cache.disk.folder == str(tmp_path / "kv, it's" / f"replica-{index}")
        assert config.server.tensorboard == str(tmp_path / "board" / f"replica-{index}")
        # The machine's cores are divided.
        assert config.threads == max(1, granted_cores() // 2)


def test_tls_ends_before_the_replicas(tmp_path: Path) -> None:
    server = ServerConfig(tls_cert_file="cert", tls_key_file="key", tls_client_ca_file="ca")
    layout = write_layout(cluster_config(tmp_path, server=server), ["server.tls_cert_file=cert"])
    assert layout.url == "https://127.0.0.1:8000 and grpcs://127.0.0.1:8001"
    config = replica_config(layout.processes[1])
    assert config.server.tls_cert_file is None
    text = (tmp_path / "nginx" / "nginx.conf").read_text()
    assert f'ssl_certificate_key "{Path("key").resolve()}";' in text
    assert f'ssl_client_certificate "{Path("ca").resolve()}";' in text


def test_limits_of_a_request_are_nginx_s_too(tmp_path: Path) -> None:
    server = ServerConfig(max_request_bytes=12345, timeout_ms=4000, drain_s=7)
    layout = write_layout(cluster_config(tmp_path, server=server), [])
    text = (tmp_path / "nginx" / "nginx.conf").read_text()
    assert "client_max_body_size 12345;" in text
    # Three replicas have room for their queues, batches and streams.
    assert f"limit_conn all {3 * (256 + 16 + 64)};" in text
    assert f"limit_conn clients {3 * (256 + 16 + 64) // 2};" in text
    # A replica that takes 2 s longer than the request's 4 s hangs.
    assert "proxy_read_timeout 6000ms;" in text
    assert "worker_shutdown_timeout 7000ms;" in text
    assert layout.drain_s == 7


def test_ports_of_replicas_can_be_named(tmp_path: Path) -> None:
    specs = layout_of(tmp_path, replica_port=9100, replicas=3)
    servers = [replica_config(specs[f"replica-{index}"]).server for index in range(3)]
    ports = [(server.http_port, server.grpc_port) for server in servers]
    assert ports == [(9100, 9101), (9102, 9103), (9104, 9105)]
    with pytest.raises(ConfigError, match="replica_port is 65530; 4 replicas take two ports"):
        layout_of(tmp_path, replica_port=65530, replicas=4)


@pytest.mark.parametrize("files", [{"tls_cert_file": "c"}, {"tls_key_file": "k"}])
def test_half_a_certificate_is_refused(tmp_path: Path, files: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="both or none are needed"):
        layout_of(tmp_path / "never", server=ServerConfig(**files))
    assert not (tmp_path / "never").exists()


def test_a_redis_that_is_there_is_used(tmp_path: Path) -> None:
    remote = RemoteConfig(url="redis://elsewhere:6379")
    specs = layout_of(tmp_path, cache=CacheConfig("tiered", remote=remote))
    assert "redis" not in specs
    cache = replica_config(specs["replica-0"]).cache
    assert cache.remote.url == "redis://elsewhere:6379"
    # Other users of that Redis would not have our key or password.
    assert (cache.key_file, cache.remote.password_file) == (None, None)
    assert files_in(tmp_path) == ["nginx/nginx.conf"]


def test_without_redis_server_the_replicas_share_nothing_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_programs(monkeypatch, "redis-server")
    specs = layout_of(tmp_path)
    assert replica_config(specs["replica-0"]).cache.remote.url is None
    assert "redis-server is not on PATH: the replicas run without a remote tier" in caplog.text


@pytest.mark.parametrize("cache", ["memory", "off"])
def test_a_cache_without_a_remote_tier_gets_no_redis(
    tmp_path: Path, cache: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    specs = layout_of(tmp_path, f"cache={cache}", cache=CacheConfig(cache))
    assert "redis" not in specs
    assert replica_config(specs["replica-0"]).cache.name == cache
    assert f"cache={cache}: the replicas share no K/V" in caplog.text


WRITTEN = ["nginx/nginx.conf", "packet_key", "redis.conf", "redis_password"]


def files_in(folder: Path) -> list[str]:
    return sorted(str(one.relative_to(folder)) for one in folder.rglob("*") if one.is_file())


def test_without_nginx_nothing_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_programs(monkeypatch, "nginx")
    layout = write_layout(cluster_config(tmp_path), [])
    with pytest.raises(ConfigError, match="nginx is not on PATH"):
        run_cluster(layout, lambda: False, pytest.fail)
    assert files_in(tmp_path) == WRITTEN


def test_a_config_is_written_and_nothing_run(tmp_path: Path) -> None:
    output = tmp_path / "a folder"
    overrides = ("artifact=a", f"output={output}", "run=false", "replicas=2", "cache.ttl_s=7")
    ended = spawn_pipeline("serve_cluster", *overrides)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[0] == f"wrote {output}/nginx/nginx.conf"
    command_by_name = dict(line.split(": ", 1) for line in lines[1:])
    assert list(command_by_name) == ["redis", "replica-0", "replica-1", "nginx"]
    assert " artifact=a cache.ttl_s=7 cache=tiered " in command_by_name["replica-1"]
    assert command_by_name["nginx"].startswith(f"cd '{output}/nginx' && nginx -p ./ ")
    assert files_in(output) == WRITTEN


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("server.queue=1", "server.queue"),
        ("replicas=0", "replicas is 0; it must be at least 1"),
        ("redis_bytes=0", "redis_bytes is 0; it must be at least 1"),
    ],
)
def test_a_value_that_cannot_work_is_named_before_anything_starts(
    tmp_path: Path, override: str, message: str
) -> None:
    ended = spawn_pipeline("serve_cluster", "artifact=a", f"output={tmp_path / 'never'}", override)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert not (tmp_path / "never").exists()


# ----------------------------------------------------------------------------------- Kubernetes

MANIFESTS = ROOT / "docs" / "kubernetes"
Manifest = dict[str, Any]


def manifests() -> list[Manifest]:
    files = sorted(MANIFESTS.glob("*.yaml"))
    return [one for file in files for one in yaml.safe_load_all(file.read_text())]


def manifest(kind: str, name: str) -> Manifest:
    (found,) = (
        one for one in manifests() if (one["kind"], one["metadata"]["name"]) == (kind, name)
    )
    return found


def pods() -> list[Manifest]:
    return [one["spec"]["template"]["spec"] for one in workloads()]


def workloads() -> list[Manifest]:
    return [one for one in manifests() if one["kind"] in ("Deployment", "StatefulSet")]


def container_of(kind: str, name: str) -> Manifest:
    (container,) = manifest(kind, name)["spec"]["template"]["spec"]["containers"]
    return dict(container)


def served_config() -> ServeConfig:
    container = container_of("StatefulSet", "kvshare")
    assert container["command"] == ["kvshare", "serve"]
    return checked(composed("serve", *container["args"]), ServeConfig)


def port_by_name(container: Manifest) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container["ports"]}


def test_every_manifest_has_a_name_of_its_own_and_its_pods_a_fixed_image() -> None:
    names = [(one["kind"], one["metadata"]["name"]) for one in manifests()]
    assert len(set(names)) == len(names) == 15
    images = [container["image"] for pod in pods() for container in pod["containers"]]
    assert len(images) == 3
    assert all(re.search(r":\d+\.\d+\.\d+$", image) for image in images)


def test_no_pod_may_do_more_than_it_needs() -> None:
    for pod in pods():
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        (container,) = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert set(container["resources"]["requests"]) == {"cpu", "memory"}
        assert "memory" in container["resources"]["limits"]
        # Every mount has a volume.
        assert {mount["name"] for mount in container["volumeMounts"]} == {
            volume["name"] for volume in pod["volumes"]
        }
        # Only volumes can be written to, and each of these has a size limit.
        for volume in pod["volumes"]:
            assert volume.get("emptyDir", {"sizeLimit": ""}).keys() >= {"sizeLimit"}


def referenced(kind: str) -> Iterator[Manifest]:
    for pod in pods():
        yield from (volume[kind] for volume in pod["volumes"] if kind in volume)


def keys_by_secret() -> dict[str, set[str]]:
    """Keys of the secrets that the README's commands create, by the secret's name."""
    found = {}
    for line in (MANIFESTS / "README.md").read_text().splitlines():
        if line.startswith("kubectl create secret "):
            _, _, _, kind, name, *options = line.split()
            keys = {"tls.crt", "tls.key"} if kind == "tls" else set()
            named = (option for option in options if option.startswith("--from-file="))
            found[name] = keys | {option.split("=")[1] for option in named}
    return found


def test_every_secret_is_a_volume_that_the_readme_says_how_to_make() -> None:
    made = keys_by_secret()
    used = {one["secretName"] for one in referenced("secret")}
    assert used == set(made)
    for secret in referenced("secret"):
        assert {item["key"] for item in secret.get("items", [])} <= made[secret["secretName"]]
        assert secret["defaultMode"] == 0o440  # the pod's group reads it, and no other
    for container in (container for pod in pods() for container in pod["containers"]):
        assert not any("valueFrom" in variable for variable in container.get("env", []))
        assert "envFrom" not in container
    maps = {one["metadata"]["name"] for one in manifests() if one["kind"] == "ConfigMap"}
    assert {one["name"] for one in referenced("configMap")} == maps


def test_files_that_a_pod_is_told_of_are_those_that_are_mounted() -> None:
    made = keys_by_secret()
    for pod in pods():
        (container,) = pod["containers"]
        volume_by_name = {volume["name"]: volume for volume in pod["volumes"]}
        there = set()
        for mount in container["volumeMounts"]:
            secret = volume_by_name[mount["name"]].get("secret")
            if secret is not None:
                items = secret.get("items")
                keys = made[secret["secretName"]] if items is None else {i["path"] for i in items}
                there |= {f"{mount['mountPath']}/{key}" for key in keys}
        told = "\n".join(container["args"])
        if container["name"] == "nginx":
            told = manifest("ConfigMap", "kvshare-nginx")["data"]["nginx.conf"]
        assert set(re.findall(r"/secrets/[\w/.-]+", told)) == there


def test_a_pod_is_reached_by_those_alone_that_need_it() -> None:
    """Replicas answered any pod of the cluster."""
    policies = [one for one in manifests() if one["kind"] == "NetworkPolicy"]
    apps = {one["spec"]["podSelector"]["matchLabels"]["app"]: one["spec"] for one in policies}
    assert set(apps) == {
        one["spec"]["template"]["metadata"]["labels"]["app"] for one in workloads()
    }
    names = {
        one["metadata"]["name"]: set(
            port_by_name(container_of(one["kind"], one["metadata"]["name"]))
        )
        for one in workloads()
    }
    reached = {}
    for app, spec in apps.items():
        assert spec["policyTypes"] == ["Ingress", "Egress"]
        callers = set()
        for rule in spec["ingress"]:
            assert {port["port"] for port in rule["ports"]} <= names[app]
            callers |= {caller_of(source) for source in rule.get("from", [{}])}
        reached[app] = callers
        for rule in spec["egress"]:
            for target in (one["podSelector"]["matchLabels"]["app"] for one in rule.get("to", [])):
                assert {port["port"] for port in rule["ports"]} <= names[target]
                assert app in callers_of(apps[target])
    assert reached == {
        "kvshare-nginx": {"anyone"},
        "kvshare": {"kvshare", "kvshare-nginx", "monitoring"},
        "kvshare-valkey": {"kvshare"},
    }


def callers_of(spec: Manifest) -> set[str]:
    return {caller_of(source) for rule in spec["ingress"] for source in rule.get("from", [{}])}


def caller_of(source: Manifest) -> str:
    if "podSelector" in source:
        return str(source["podSelector"]["matchLabels"]["app"])
    if "namespaceSelector" in source:
        labels = source["namespaceSelector"]["matchLabels"]
        return str(labels["kubernetes.io/metadata.name"])
    return "anyone"


def test_kubernetes_own_schemas_know_every_field() -> None:
    for one in manifests():
        kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)


def test_valkey_and_the_remote_tier_of_the_pods_speak_tls_with_that_user(tmp_path: Path) -> None:
    """A real server with the manifest's options; only the paths of its files differ."""
    readme = (MANIFESTS / "README.md").read_text()
    acl = re.findall(r"^user .*$", readme, re.MULTILINE)
    (tmp_path / "users.acl").write_text("\n".join(acl).replace("PASSWORD", "s3cret") + "\n")
    (tmp_path / "password").write_text("s3cret\n")
    files = make_certificates(tmp_path)
    port = free_port()
    local_by_path = {
        "/secrets/tls/tls.crt": str(files.cert),
        "/secrets/tls/tls.key": str(files.key),
        "/secrets/valkey/users.acl": str(tmp_path / "users.acl"),
        "6379": str(port),
    }
    args = container_of("StatefulSet", "kvshare-valkey")["args"]
    command = [
        "redis-server",
        *(local_by_path.get(arg, arg) for arg in args),
        "--bind",
        "127.0.0.1",
    ]
    assert set(local_by_path) <= set(args)
    remote = served_config().cache.remote
    tier = RemoteTier(
        str(remote.url).replace("kvshare-valkey:6379", f"127.0.0.1:{port}"),
        ttl_s=60.0,
        timeout_s=START_S,
        username=remote.username,
        password=(tmp_path / "password").read_text().strip(),
        tls_ca_file=files.ca,
    )
    assert (remote.password_file, remote.tls_ca_file) == (
        *("/secrets/valkey/password", "/secrets/valkey-ca/ca.crt"),
    )
    with (
        closing(tier),
        subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as server,
    ):
        try:
            wait_until(lambda: listens(port), START_S)
            tier.check()
        finally:
            server.kill()


def listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
        return True
    return False


def test_nginx_reads_the_config_of_the_pods(tmp_path: Path) -> None:
    """A real nginx reads it; only names and files differ."""
    files = make_certificates(tmp_path)
    (tmp_path / "token.conf").write_text(token_config(b"s3cret"))
    text = manifest("ConfigMap", "kvshare-nginx")["data"]["nginx.conf"]
    text = re.sub(r"server kvshare-\d:", "server 127.0.0.1:", text)
    for path, local in (
        ("/secrets/tls/tls.crt", files.cert),
        ("/secrets/tls/tls.key", files.key),
        ("/secrets/token/token.conf", tmp_path / "token.conf"),
    ):
        assert path in text
        text = text.replace(path, str(local))
    (tmp_path / "nginx.conf").write_text(text)
    args = container_of("Deployment", "kvshare-nginx")["args"]
    local_by_path = {"/run/kvshare": str(tmp_path), "/etc/kvshare/nginx.conf": "nginx.conf"}
    command = ["nginx", *(local_by_path.get(arg, arg) for arg in args), "-t"]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_pods_and_services_find_each_other() -> None:
    ports_by_app = {}
    for workload in workloads():
        labels = workload["spec"]["template"]["metadata"]["labels"]
        assert workload["spec"]["selector"]["matchLabels"] == labels
        (container,) = workload["spec"]["template"]["spec"]["containers"]
        ports_by_app[labels["app"]] = port_by_name(container)
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            asked = container.get(probe, {})
            asked = asked.get("httpGet") or asked.get("tcpSocket") or {"port": None}
            assert asked["port"] in {*ports_by_app[labels["app"]], None}
    for service in (one for one in manifests() if one["kind"] == "Service"):
        known = ports_by_app[service["metadata"]["labels"]["app"]]
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= set(known)


def test_settings_of_the_pods_are_the_server_s() -> None:
    container = container_of("StatefulSet", "kvshare")
    config = served_config()
    ports = {"http": config.server.http_port, "grpc": config.server.grpc_port}
    assert port_by_name(container) == ports
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    cache = config.cache
    assert config.models in mounted
    valkey = manifest("Service", "kvshare-valkey")
    (port,) = valkey["spec"]["ports"]
    assert cache.remote.url == f"rediss://kvshare-valkey:{port['port']}"
    # The README's ACL has this user.
    assert f"user {cache.remote.username} on" in (MANIFESTS / "README.md").read_text()


def test_a_pod_has_time_to_drain() -> None:
    text = manifest("ConfigMap", "kvshare-nginx")["data"]["nginx.conf"]
    (quit_ms,) = re.findall(r"worker_shutdown_timeout (\d+)ms", text)
    drain_s = {"server": served_config().server.drain_s, "nginx": int(quit_ms) / 1000}
    for pod in pods():
        (container,) = pod["containers"]
        if container["name"] in drain_s:
            command, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
            assert command == "sleep"
            longest = int(seconds) + drain_s[container["name"]]
            assert pod["terminationGracePeriodSeconds"] >= longest + 5


def test_nginx_has_the_config_that_is_written_for_the_pods() -> None:
    replicas = manifest("StatefulSet", "kvshare")["spec"]["replicas"]
    server = served_config().server
    names = [f"kvshare-{index}" for index in range(replicas)]
    for name in names:
        selector = manifest("Service", name)["spec"]["selector"]
        assert selector == {"statefulset.kubernetes.io/pod-name": name}
    assert server.peers == [f"{name}:{server.http_port}" for name in names]
    ports = port_by_name(container_of("Deployment", "kvshare-nginx"))
    text = nginx_config(
        Address("0.0.0.0", ports["https"], ports["grpcs"]),
        [Address(name, server.http_port, server.grpc_port) for name in names],
        library.limits_of(server, replicas),
        tls=Tls("/secrets/tls/tls.crt", "/secrets/tls/tls.key"),
        token_file="/secrets/token/token.conf",
    )
    text = text.replace("error_log nginx.log", "error_log stderr")
    text = text.replace("worker_processes auto", "worker_processes 2")
    assert manifest("ConfigMap", "kvshare-nginx")["data"]["nginx.conf"] == text


def test_probes_ask_what_the_server_answers(story: Story) -> None:
    container = container_of("StatefulSet", "kvshare")
    probes = ("startupProbe", "livenessProbe", "readinessProbe")
    paths = {container[probe]["httpGet"]["path"] for probe in probes}
    assert paths == set(story.health)
    assert set(story.health.values()) == {200}


# ------------------------------------------------------------------ supervision, with small scripts


def scripted(folder: Path, name: str, script: str, is_ready: Callable[[], bool]) -> ProcessSpec:
    return ProcessSpec(name, ["sh", "-c", script], is_ready, folder / f"{name}.log")


def always() -> bool:
    return True


def run_for(layout: Layout, is_over: Callable[[], bool]) -> None:
    """Run a cluster until it is over, at most for START_S."""
    deadline = time.monotonic() + START_S
    run_cluster(layout, lambda: is_over() or time.monotonic() > deadline, lambda: None)
    assert time.monotonic() < deadline


def test_who_ends_before_it_was_ready_ends_all_with_its_last_words(tmp_path: Path) -> None:
    ended = scripted(tmp_path, "replica-0", "echo no such artifact; exit 3", lambda: False)
    other = scripted(tmp_path, "replica-1", f"exec sleep {START_S}", always)
    nginx = scripted(tmp_path, "nginx", "exit 1", always)
    words = "replica-0 ended with 3 before it was ready"
    with pytest.raises(UnavailableError, match=words) as error:
        run_cluster(Layout([ended, other, nginx], "", 1.0, tmp_path), lambda: False, pytest.fail)
    assert str(error.value).endswith("no such artifact")
    assert not nginx.log_file.exists()
    wait_until(lambda: running_in(tmp_path) == [], 5.0)


def test_who_dies_again_and_again_is_started_ever_more_slowly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(library, "FIRST_PAUSE_S", 0.1)
    monkeypatch.setattr(library, "LONGEST_PAUSE_S", 0.3)
    dying = scripted(tmp_path, "replica-0", "echo x; sleep 0.2; exit 3", always)
    nginx = scripted(tmp_path, "nginx", "exec sleep 60", always)
    text = dying.log_file
    run_for(
        Layout([dying, nginx], "", 1.0, tmp_path),
        lambda: text.exists() and len(text.read_text()) > 8,
    )
    pauses = re.findall(r"replica-0 ended with 3 and starts again in (\S+) s", caplog.text)
    assert pauses[:4] == ["0.1", "0.2", "0.3", "0.3"]


def test_nginx_is_told_first_and_the_others_when_it_has_ended(tmp_path: Path) -> None:
    said = tmp_path / "said"
    wait = "echo {0} starts >>{1}; while true; do sleep 0.05; done"
    on_quit = "trap 'sleep 0.5; echo nginx ends >>{1}; exit 0' QUIT; " + wait
    on_term = "trap 'echo replica ends >>{1}; exit 0' TERM; " + wait
    nginx = scripted(tmp_path, "nginx", on_quit.format("nginx", said), always)
    replica = scripted(tmp_path, "replica-0", on_term.format("replica", said), always)
    run_for(
        Layout([replica, nginx], "", 5.0, tmp_path),
        lambda: said.exists() and said.read_text().count("starts") == 2,
    )
    lines = said.read_text().splitlines()
    assert sorted(lines[:2]) == ["nginx starts", "replica starts"]
    assert lines[2:] == ["nginx ends", "replica ends"]


def test_who_does_not_end_is_killed_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "KILL_S", 0.2)
    deaf = "trap '' TERM; sleep 60 & echo up; while true; do wait; done"
    replica = scripted(tmp_path, "replica-0", deaf, always)
    nginx = scripted(tmp_path, "nginx", "exec sleep 60", always)
    log = replica.log_file
    run_for(
        Layout([replica, nginx], "", 0.1, tmp_path), lambda: log.exists() and log.read_text() != ""
    )
    assert "replica-0 did not end in time and is killed" in caplog.text
    wait_until(lambda: running_in(tmp_path) == [], 5.0)


def running_in(folder: Path) -> list[str]:
    """Logs in the folder that a process still writes to."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            written = os.readlink(process / "fd" / "1")
        except OSError:
            continue  # It has ended, or is not ours.
        if written.startswith(f"{folder}/"):
            found.append(written)
    return found

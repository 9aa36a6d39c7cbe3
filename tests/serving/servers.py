"""Real servers, in a process of their own or in a thread of the test, and requests to them."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import IO, Any

from numpy.typing import NDArray
from tritonclient.grpc import service_pb2
from tritonclient.utils import serialize_byte_tensor

from tests.encoder_worlds import make_caches
from tests.processes import ForkedPython
from tests.worlds import ROOT, SCHEMA, make_dlrm, version_called
from torchrec_kvshare.cache.kv_cache import KVCache
from torchrec_kvshare.cache.metrics import CacheMetrics
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.config import ServeConfig, ServerConfig
from torchrec_kvshare.errors import ArtifactError
from torchrec_kvshare.features.schema import FeatureSchema
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.serving.columns import column_tensors, datatype_of
from torchrec_kvshare.serving.server import Ports, serve

READY = re.compile(r"serving on (http://\S+) and grpc://(\S+)")
STOP_S = 60.0  # a busy machine


@dataclass
class Asked:
    """A server that answers.

    Attributes:
        http_url: of HTTP.
        grpc_url: host and port of gRPC.
    """

    http_url: str
    grpc_url: str

    @property
    def http_address(self) -> str:
        """Host and port of HTTP."""
        return self.http_url.removeprefix("http://")

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        """One request over a connection of its own: the status, and the JSON or text that came."""
        connection = HTTPConnection(self.http_address, timeout=60.0)
        try:
            sent = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, sent, dict(headers or {}))
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, json.loads(text) if is_json else text

    def rank(self, raw: Any, **headers: str) -> tuple[int, Any]:
        """Ask for scores in the project's format."""
        return self.ask("POST", "/v1/rank", raw, headers)


@dataclass
class ServerProcess(Asked):
    """A server in a process of its own.

    Attributes:
        process: that runs it.
        logs: its log lines, parsed from JSON.
    """

    process: "subprocess.Popen[str]"
    logs: list[dict[str, Any]]

    def stop(self) -> int:
        """Ask it to end; returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_S)


class EagerLoader:
    """Engines of models that are not exported; a folder's name is the seed.

    Args:
        num_pages: of each engine's device; 0 for no cache.
        schema: of the models.
    """

    def __init__(self, num_pages: int = 40, schema: FeatureSchema = SCHEMA) -> None:
        self.metrics = CacheMetrics()
        self.num_pages = num_pages
        self.schema = schema
        self.engines: list[Engine] = []

    def load(self, folder: Path) -> Engine:
        model = RankingModel(make_dlrm(int(folder.name), self.schema)).eval()
        store = None
        if self.num_pages:
            pools = make_caches(model, [self.num_pages])
            store = KVStore([KVCache(one.pool, metrics=self.metrics) for one in pools])
        version = version_called(f"v{folder.name}")
        self.engines.append(Engine(model, self.schema, store, version=version))
        return self.engines[-1]

    def close(self) -> None:
        pass


class BreakingLoader(EagerLoader):
    """Engines of the versions up to 90; higher versions are broken."""

    def load(self, folder: Path) -> Engine:
        if int(folder.name) > 90:
            raise ArtifactError(f"{folder.name} is broken")
        return super().load(folder)


@contextmanager
def local_server(loader: EagerLoader, **settings: Any) -> Iterator[Asked]:
    """Serve the model of seed 1 from a thread of this process until the end of the block."""
    free = {"http_port": 0, "grpc_port": 0}
    config = ServeConfig(artifact="1", server=ServerConfig(**free | settings))
    started: Future[tuple[Ports, Callable[[], None]]] = Future()

    async def run() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        end = partial(loop.call_soon_threadsafe, stop.set)
        await serve(config, loader, stop, lambda ports: started.set_result((ports, end)))

    with ThreadPoolExecutor(1) as threads:
        serving = threads.submit(asyncio.run, run())
        wait([serving, started], STOP_S, FIRST_COMPLETED)
        if serving.done():
            serving.result()  # It raises.
        ports, end = started.result(0.0)
        try:
            scheme = "http" if config.server.tls_cert_file is None else "https"
            yield Asked(f"{scheme}://127.0.0.1:{ports.http}", f"127.0.0.1:{ports.grpc}")
        finally:
            end()
            serving.result(STOP_S)


@contextmanager
def running_server(served: str, *overrides: str) -> Iterator[ServerProcess]:
    """Serve with ``artifact=DIR`` or ``models=DIR`` until the end of the block.

    A server that was not stopped inside must end well at the end.
    """
    command = [sys.executable, "-W", "ignore", "-m", "pipelines.serve", served]
    free = ["server.http_port=0", "server.grpc_port=0", "threads=1"]
    process = ForkedPython(
        [*command, *free, *overrides],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    logs: list[dict[str, Any]] = []
    reader = threading.Thread(target=_read_logs, args=(process.stderr, logs), daemon=True)
    reader.start()
    try:
        ready = READY.match(process.stdout.readline())
        if ready is None:
            process.wait(STOP_S)
            reader.join(STOP_S)
            raise AssertionError(f"the server ended with {process.returncode}: {logs}")
        server = ServerProcess(ready[1], ready[2], process, logs)
        yield server
        if process.poll() is None:
            assert server.stop() == 0, logs
    finally:
        process.kill()
        process.wait()
        reader.join(STOP_S)
        process.stdout.close()
        process.stderr.close()


def inputs_of(kit: Any, tensors: Mapping[str, NDArray[Any]]) -> list[Any]:
    """Tensors as inputs of one of Triton's clients, ``tritonclient.http`` or ``.grpc``."""
    inputs = []
    for name, values in tensors.items():
        inputs.append(kit.InferInput(name, values.shape, datatype_of(values)))
        inputs[-1].set_data_from_numpy(values)
    return inputs


def grpc_message(
    raw: dict[str, Any], sequence: str = "", is_first: bool = True, is_last: bool = False
) -> service_pb2.ModelInferRequest:
    """A request, or a message of a sequence; only its first has the user and the history."""
    message = service_pb2.ModelInferRequest(model_name="kvshare", id=raw.get("request_id", ""))
    if sequence:
        message.parameters["sequence_id"].string_param = sequence
        message.parameters["sequence_start"].bool_param = is_first
        message.parameters["sequence_end"].bool_param = is_last
    for name, values in column_tensors([raw], SCHEMA).items():
        if not is_first and not name.startswith("candidates."):
            continue
        message.inputs.add(name=name, datatype=datatype_of(values), shape=values.shape)
        is_text = values.dtype == object
        content = serialize_byte_tensor(values).item() if is_text else values.tobytes()
        message.raw_input_contents.append(content)
    return message


def _read_logs(lines: IO[str], logs: list[dict[str, Any]]) -> None:
    for line in lines:
        try:
            logs.append(json.loads(line))
        except ValueError:
            logs.append({"message": line.rstrip()})  # a traceback, or a library's own words

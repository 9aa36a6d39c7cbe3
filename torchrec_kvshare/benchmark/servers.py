"""Servers as processes of their own, and requests to them: for scenarios of load."""

import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.features.draw import draw_raw_request
from torchrec_kvshare.features.schema import USER, FeatureSchema
from torchrec_kvshare.serving.columns import BYTES as TEXTS
from torchrec_kvshare.serving.columns import column_tensors, datatype_of

MODEL = "kvshare"  # name of an artifact's one model in a server
UNKNOWN_ID = 10**9
START_S = 120.0  # until a server must be ready: a busy machine loads slowly
STOP_S = 30.0
POLL_S = 0.05
READY = re.compile(r"^serving on http://(\S+) and grpc://(\S+)$", re.MULTILINE)
LOG = "server.log"


class Server(NamedTuple):
    """Where a server listens, each ``host:port``."""

    http: str
    grpc: str


@contextmanager
def running(command: Sequence[str], folder: Path) -> Iterator[Server]:
    """Run a server on free ports of this machine until the block ends.

    Args:
        command: its command line; the server prints its addresses, as ``pipelines.serve`` does.
        folder: for its log.

    Yields:
        Where it listens, once it is ready.

    Raises:
        ConfigError: if it ends before it is ready, or is not ready in time.
    """
    with TemporaryDirectory(dir=folder) as own:
        log = Path(own) / LOG
        with log.open("wb") as printed:
            process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT)
        try:
            yield _wait_for(process, log)
        finally:
            _stop(process)


def _wait_for(process: "subprocess.Popen[bytes]", log: Path) -> Server:
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        if ready := READY.search(log.read_text()):
            return Server(*ready.groups())
        time.sleep(POLL_S)
    status = process.poll()
    happened = f"is not ready after {START_S:g} s" if status is None else f"ended with {status}"
    last_line = log.read_text().strip().rpartition("\n")[2]
    raise ConfigError(f"the server {happened}; its last line: {last_line}")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def message_of(schema: FeatureSchema, user: int, num_candidates: int, seed: int) -> bytes:
    """Return the request of a user, ready for the wire.

    Args:
        schema: the model's columns; the history fills the window.
        user: id of the user, a number below the schema's number of users.
        num_candidates: candidates to score.
        seed: same seed, same events and candidates.

    Returns:
        A ``ModelInferRequest``, serialised.
    """
    from tritonclient.grpc import service_pb2
    from tritonclient.utils import serialize_byte_tensor

    max_history = schema.histories[0].window.max_history
    raw = draw_raw_request(schema, max_history, num_candidates, seed + user) | {USER: user}
    for group in ("context", "history", "candidates"):
        raw[group] = {column: _as_integers(cells) for column, cells in raw[group].items()}
    message = service_pb2.ModelInferRequest(model_name=MODEL)
    for name, tensor in column_tensors([raw], schema).items():
        datatype = datatype_of(tensor)
        message.inputs.add(name=name, datatype=datatype, shape=tensor.shape)
        is_text = datatype == TEXTS
        content = serialize_byte_tensor(tensor).item() if is_text else tensor.tobytes()
        message.raw_input_contents.append(content)
    encoded: bytes = message.SerializeToString()
    return encoded


def _as_integers(cells: Any) -> Any:
    """Turn ids into integers, as most systems have them; an unknown id becomes a large one."""
    if isinstance(cells, list):
        return [_as_integers(cell) for cell in cells]
    if isinstance(cells, str):
        return int(cells) if cells.isdecimal() else UNKNOWN_ID
    return cells

"""Serve an exported model: ``python -m pipelines.serve artifact=DIR``."""

import asyncio
import gc
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import hydra
import torch  # noqa: F401  # Its settings are made before ``main``, if it is imported by then.

from torchrec_kvshare.cache.keys import read_key
from torchrec_kvshare.commands.run import pipeline, run
from torchrec_kvshare.config import ServeConfig
from torchrec_kvshare.errors import MissingExtraError

if TYPE_CHECKING:
    from torchrec_kvshare.serving.server import Ports

# The event loop and the scoring thread share one interpreter lock: neither may hold it for long.
SWITCH_S = 5e-4


@hydra.main(version_base="1.3", config_path="../configs", config_name="serve")
@pipeline(ServeConfig)
def main(config: ServeConfig) -> None:
    """Listen, load, answer; SIGTERM and SIGINT drain."""
    try:
        from torchrec_kvshare.serving.logs import log_as_json
        from torchrec_kvshare.serving.models import EngineLoader
        from torchrec_kvshare.serving.server import serve
    except ImportError as error:
        raise MissingExtraError("server", "serving") from error
    sys.setswitchinterval(SWITCH_S)
    # Garbage collection of imported modules would delay all waiting requests.
    gc.freeze()
    log_as_json()
    host = config.server.host
    name = f"[{host}]" if ":" in host else host

    def show(ports: "Ports") -> None:
        print(f"serving on http://{name}:{ports.http} and grpc://{name}:{ports.grpc}", flush=True)

    key = read_key(config.artifact_key_file, "artifact_key_file")
    loader = EngineLoader(config.cache, config.server, config.deterministic, key)
    asyncio.run(_until_signalled(lambda stop: serve(config, loader, stop, show)))


async def _until_signalled(serve: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await serve(stop)


if __name__ == "__main__":
    run(main)

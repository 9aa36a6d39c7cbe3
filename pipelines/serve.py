"""Serve an exported model: ``python -m pipelines.serve artifact=DIR``."""

import asyncio
import gc
import signal
import sys

import hydra
import torch
from omegaconf import DictConfig

from torchrec_kvshare.config import ServeConfig, checked, literal_overrides
from torchrec_kvshare.errors import MissingExtraError

try:
    from torchrec_kvshare.serving.logs import log_as_json
    from torchrec_kvshare.serving.models import EngineLoader
    from torchrec_kvshare.serving.server import Ports, serve
except ImportError as error:
    raise MissingExtraError("server", "serving") from error

# The event loop and the scoring thread share one interpreter lock: neither keeps it for long.
SWITCH_S = 5e-4


@hydra.main(version_base="1.3", config_path="../configs", config_name="serve")
def main(composed: DictConfig) -> None:
    """Listen, load, answer; SIGTERM and SIGINT drain."""
    config = checked(composed, ServeConfig)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    sys.setswitchinterval(SWITCH_S)
    # Two things that would hold up every request that waits: to make programs again for the shapes
    # that come first, 1.2 s each and to no gain, and to look for garbage in what was imported.
    torch.jit.set_fusion_strategy([("DYNAMIC", 0)])
    gc.freeze()
    log_as_json()
    asyncio.run(_run(config))


async def _run(config: ServeConfig) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    host = config.server.host
    name = f"[{host}]" if ":" in host else host

    def show(ports: Ports) -> None:
        print(f"serving on http://{name}:{ports.http} and grpc://{name}:{ports.grpc}", flush=True)

    await serve(config, EngineLoader(config.cache, config.deterministic), stop, show)


if __name__ == "__main__":
    sys.argv = literal_overrides(sys.argv)
    main()

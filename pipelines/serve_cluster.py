"""Replicas of the server, nginx in front, Redis behind: ``python -m pipelines.serve_cluster``."""

import shlex
import signal
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from torchrec_kvshare.config import ServeClusterConfig, checked, literal_overrides
from torchrec_kvshare.errors import MissingExtraError

try:
    from torchrec_kvshare.serving.cluster import run_cluster, write_layout
    from torchrec_kvshare.serving.logs import log_as_json
except ImportError as error:
    raise MissingExtraError("server", "serving") from error


@hydra.main(version_base="1.3", config_path="../configs", config_name="serve_cluster")
def main(composed: DictConfig) -> None:
    """Write nginx.conf, start all, keep them running; SIGTERM and SIGINT drain."""
    config = checked(composed, ServeClusterConfig)
    log_as_json()
    layout = write_layout(config, list(HydraConfig.get().overrides.task))
    print(f"wrote {Path(config.output) / 'nginx.conf'}", flush=True)
    if not config.run:
        for part in layout.parts:
            print(f"{part.name}: {shlex.join(part.command)}")
        return
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: told.append(number))
    run_cluster(layout, lambda: bool(told), lambda: print(f"serving on {layout.url}", flush=True))


if __name__ == "__main__":
    sys.argv = literal_overrides(sys.argv)
    main()

"""Serve replicas behind nginx, with a shared Redis: ``python -m pipelines.serve_cluster``."""

import shlex
import signal

import hydra
from hydra.core.hydra_config import HydraConfig

from torchrec_kvshare.commands.run import pipeline, run
from torchrec_kvshare.config import ServeClusterConfig
from torchrec_kvshare.errors import MissingExtraError

COMMAND_LINE = "command-line"  # Hydra's name for what --config-dir adds


@hydra.main(version_base="1.3", config_path="../configs", config_name="serve_cluster")
@pipeline(ServeClusterConfig)
def main(config: ServeClusterConfig) -> None:
    """Write configs and secrets, start all processes, restart them; SIGTERM and SIGINT drain."""
    try:
        from torchrec_kvshare.deploy.cluster import run_cluster, write_layout
        from torchrec_kvshare.serving.logs import log_as_json
    except ImportError as error:
        raise MissingExtraError("server", "serving") from error
    log_as_json()
    hydra_config = HydraConfig.get()
    layout = write_layout(
        config,
        list(hydra_config.overrides.task),
        hydra_config.runtime.choices["cache"],
        [one.path for one in hydra_config.runtime.config_sources if one.provider == COMMAND_LINE],
    )
    print(f"wrote {layout.config_file}", flush=True)
    if not config.run:
        for one in layout.processes:
            change = "" if one.folder is None else f"cd {shlex.quote(str(one.folder))} && "
            print(f"{one.name}: {change}{shlex.join(one.command)}")
        return
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: signals.append(number))
    run_cluster(
        layout, lambda: bool(signals), lambda: print(f"serving on {layout.url}", flush=True)
    )


if __name__ == "__main__":
    run(main)

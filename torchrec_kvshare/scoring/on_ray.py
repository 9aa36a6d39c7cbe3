"""Score partitions on a Ray cluster: Ray Data hands them to actors that hold an engine each.

What travels through Ray are the names of files, so actors need a file system that all machines
see. Ray Data's own tasks for reading and writing would need cores beside those of the actors, and
where actors have all of them they would wait forever.
"""

import importlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torchrec_kvshare.commands.process import prepare_torch
from torchrec_kvshare.errors import ConfigError, DataError, KVShareError, MissingExtraError
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.scoring.partitions import Partition, ScoringSettings, score_partition

Row = dict[str, Any]


def score_on_ray(
    open_engine: Callable[[], Engine],
    partitions: Sequence[Partition],
    settings: ScoringSettings,
    *,
    num_actors: int,
    address: str | None,
    threads: int | None,
) -> Iterator[Partition]:
    """Score all partitions on actors.

    Args:
        open_engine: called by each actor.
        partitions: with paths that all machines of the cluster can read and write.
        settings: as they were begun with.
        num_actors: a core each.
        address: of a running cluster; None starts Ray on this machine until all is scored.
        threads: of each actor; None for one.

    Yields:
        Each partition when its answers are there.

    Raises:
        ConfigError: if the cluster has fewer cores than actors.
        DataError: if a partition cannot be read, when the others are scored.
        MissingExtraError: without Ray.
    """
    # Ray reports its use to its makers unless this says no before it is imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray, data = importlib.import_module("ray"), importlib.import_module("ray.data")
    except ImportError as error:
        raise MissingExtraError("ray", "scoring on Ray") from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.init(address=address, logging_level="ERROR", include_dashboard=False)
    try:
        num_cores = int(ray.cluster_resources().get("CPU", 0))
        if num_actors > num_cores:
            raise ConfigError(
                f"actors is {num_actors}; the Ray cluster has {num_cores} cores, and each actor "
                "needs one"
            )
        data.DataContext.get_current().enable_progress_bars = False
        # One block for each partition, so that an actor that is done takes the next one.
        rows = data.from_items(
            [{"partition": number} for number in range(len(partitions))],
            override_num_blocks=len(partitions),
        )
        scored = rows.map_batches(
            _Scorer,
            fn_constructor_args=(open_engine, [*partitions], settings, threads or 1),
            batch_size=1,
            compute=data.ActorPoolStrategy(size=num_actors),
            num_cpus=1,
        )
        errors = []
        for row in scored.iter_rows():
            if row["error"]:
                errors.append(row["error"])
            else:
                yield partitions[row["partition"]]
        if errors:
            raise DataError(errors[0])
    finally:
        ray.shutdown()


class _Scorer:
    """An actor: it opens its engine once."""

    def __init__(
        self,
        open_engine: Callable[[], Engine],
        partitions: Sequence[Partition],
        settings: ScoringSettings,
        threads: int,
    ) -> None:
        prepare_torch(threads)
        self._engine = open_engine()
        self._partitions = partitions
        self._settings = settings

    def __call__(self, rows: Row) -> Row:
        [number] = rows["partition"]
        error = ""
        try:
            score_partition(self._engine, self._partitions[number], self._settings, waits=True)
        except KVShareError as raised:  # Ray would wrap it in errors of its own.
            error = str(raised)
        return {"partition": [number], "error": [error]}

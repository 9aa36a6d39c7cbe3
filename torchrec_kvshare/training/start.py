"""What a run starts from: the weights and the columns of another run, or of a checkpoint of it.

Ids have the rows that they have there, so that every row of a table still stands for what it was
trained on; ids that are new since then are unknown.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from torchrec_kvshare.config import ALL, NO_HISTORY, TrainConfig
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.features.schema import MANAGED, SCHEMA
from torchrec_kvshare.training.checkpoints import PROGRESS, result_of

CONFIG = "config.json"
METRICS = "metrics.json"


class Start(NamedTuple):
    """What a run starts from.

    Attributes:
        run: folder of a run, with the columns and the rows of their ids.
        checkpoint: of the run's model.
    """

    run: Path
    checkpoint: Path


def start_of(config: TrainConfig) -> Start | None:
    """Return what a run starts from; None if it starts anew.

    Raises:
        ConfigError: if there is no such run or checkpoint, or it is of another model.
    """
    if config.init_from is None:
        if config.trainable != ALL:
            raise ConfigError(
                f"trainable is {config.trainable}, but init_from is null: the towers would stay as "
                "they were drawn; set init_from to the run whose towers are to stay"
            )
        return None
    if config.trainable != ALL and config.model.history == NO_HISTORY:
        raise ConfigError(
            f"trainable is {config.trainable}; with history={NO_HISTORY} the ranking stage is the "
            f"whole model: set trainable={ALL}"
        )
    if config.ids:
        raise ConfigError(
            f"ids has the columns {sorted(config.ids)}; with init_from ids have the rows that they "
            f"have in {config.init_from}: leave ids out"
        )
    given = Path(config.init_from).absolute()
    is_checkpoint = (given / PROGRESS).is_file()
    run = given.parents[1] if is_checkpoint else given
    if not is_checkpoint and not (run / METRICS).is_file():
        raise ConfigError(
            f"init_from is {given}, which is no finished run, with a {METRICS}, and no checkpoint, "
            f"with a {PROGRESS}"
        )
    if not (run / CONFIG).is_file() or not (run / SCHEMA).is_file():
        raise ConfigError(f"init_from is {given}, but {run} has no {CONFIG} and {SCHEMA} of a run")
    values = json.loads((run / CONFIG).read_text())
    _check_model(config, given, values["model"])
    if not is_checkpoint:
        return Start(run, result_of(run / config.model.history))
    if given.parent.name != config.model.history:
        raise ConfigError(
            f"init_from is a checkpoint of {given.parent.name}; one of {config.model.history} is "
            f"allowed, such as those in {run / config.model.history}"
        )
    managed = [column for column, ids in values["ids"].items() if ids["kind"] == MANAGED]
    if managed:
        raise ConfigError(
            f"init_from is a checkpoint of a run with managed ids, {managed}, whose rows are known "
            f"at the run's end only: set init_from={run} when it has finished"
        )
    return Start(run, given)


def _check_model(config: TrainConfig, given: Path, before: dict[str, Any]) -> None:
    now = dataclasses.asdict(config.model)
    differing = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if differing:
        changes = ", ".join(
            f"model.{key} is {now.get(key)!r}, there {before.get(key)!r}" for key in differing
        )
        raise ConfigError(f"init_from is {given}, a run of another model: {changes}")

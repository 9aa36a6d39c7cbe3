"""The cost of a large catalogue: a training step, and ranking all of it for one user.

The cost of a step depends on its batch. The cost of ranking depends on the items that are scored:
all of them if the held-out item is among the first 200, and a few thousand if it is found to be
behind them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.datasets.utils import Batch

from torchrec_kvshare.benchmark.options import EncoderOptions, ModelSizes, TimedOptions
from torchrec_kvshare.benchmark.results import Record
from torchrec_kvshare.benchmark.timing import interleaved_medians
from torchrec_kvshare.data.dataset import Dataset, build_dataset
from torchrec_kvshare.data.interactions import InteractionLog, ReadReport
from torchrec_kvshare.data.shards import in_memory
from torchrec_kvshare.data.tables import IdColumn
from torchrec_kvshare.features.schema import HISTORY, UNNAMED_TASK, History, Window
from torchrec_kvshare.model.ranking import dlrm_with_history
from torchrec_kvshare.training.evaluate import model_scorer
from torchrec_kvshare.training.loop import Trainer, TrainSettings
from torchrec_kvshare.training.objective import ObjectiveSettings
from torchrec_kvshare.training.ranking import RankingSettings, rank_held_out
from torchrec_kvshare.training.ranks import Ranks, joined_ranks
from torchrec_kvshare.training.sharding import ROWWISE_ADAGRAD, TableSettings

CATALOGUE = "catalogue"
STEP = "training_step"  # with the ranking loss alone
STEP_NEXT_EVENT = "training_step_next_event"  # with states and the next-event loss too
RANK_BEHIND = "rank_item_behind"
RANK_FIRST = "rank_first_item"
NUM_ITEMS = (10_000, 1_000_000)
NUM_USERS = 60
NUM_CATEGORIES = 40
START_TIME = 1_700_000_000
SECONDS_BETWEEN_EVENTS = 3600
# As in configs/train.yaml.
SETTINGS = TrainSettings(
    epochs=1,
    learning_rate=3e-3,
    tables=TableSettings(ROWWISE_ADAGRAD, 5e-3),
    weight_decay=1e-5,
    batch_targets=256,
    negatives=7,
    seed=0,
    checkpoint_seconds=60.0,
)
OBJECTIVE_BY_PATH = {
    STEP: ObjectiveSettings(),
    STEP_NEXT_EVENT: ObjectiveSettings(next_event=0.02, shared_items=1024),
}


@dataclass
class CatalogueOptions(TimedOptions, EncoderOptions, ModelSizes):
    """Options of ``scenario=catalogue``."""

    histories: list[int] = field(default_factory=lambda: [256])  # events of each user
    dim: int = 64


def measure_catalogue(options: CatalogueOptions) -> list[Record]:
    """Measure the time of a step and of ranking, by size of the catalogue.

    Returns:
        Records of ``latency`` by path; ``candidates`` is the size of the catalogue. And
        ``ratio_to_smallest``, of each path to the same path at the smallest catalogue.
    """
    records = []
    with joined_ranks(torch.device("cpu")) as ranks:
        for encoder in options.encoders:
            for history in options.histories:
                records += _case_records(options, encoder, history, ranks)
    return records


def _case_records(
    options: CatalogueOptions, encoder: str, history: int, ranks: Ranks
) -> list[Record]:
    call_by_path: dict[tuple[str, int], Callable[[], object]] = {}
    spec = options.spec(encoder, history)
    for num_items in NUM_ITEMS:
        shards = in_memory(catalogue_dataset(num_items, history, options.seed))
        for path, objective in OBJECTIVE_BY_PATH.items():
            torch.manual_seed(options.seed)
            with_state = replace(spec, has_state=objective.next_event > 0)
            model = dlrm_with_history(shards.schema, with_state, [options.dim, 1])
            settings = replace(SETTINGS, objective=objective)
            trainer = Trainer(model, shards, settings, Path(), ranks)
            # The windows of the user that has the whole catalogue come first.
            chosen = np.flatnonzero(trainer.stream.user > 0)[: max(1, 256 // history)]
            call_by_path[path, num_items] = partial(train_step, trainer, chosen)
        for path, moved_by in ((RANK_BEHIND, -1e6), (RANK_FIRST, 1e6)):
            scorer = partial(_moved, model, moved_by)
            one_user = RankingSettings(max_users=1)
            call_by_path[path, num_items] = partial(rank_held_out, scorer, shards, one_user)
    for call in call_by_path.values():
        call()
    latency_ms = interleaved_medians(call_by_path, options.repeats)
    records = []
    for (path, num_items), value in latency_ms.items():
        case = options.case(encoder) | {"path": path, "history": history, "candidates": num_items}
        ratio = value / latency_ms[path, NUM_ITEMS[0]]
        records.append(Record(CATALOGUE, case, "latency", value, unit="ms"))
        records.append(Record(CATALOGUE, case, "ratio_to_smallest", ratio, unit="x"))
    return records


def catalogue_dataset(num_items: int, history: int, seed: int) -> Dataset:
    """Return a data set of one user with every item, all at one time, and of ordinary users.

    Args:
        num_items: size of the catalogue.
        history: events of each ordinary user.
        seed: of their items.
    """
    rng = np.random.default_rng(seed)
    first = np.zeros(num_items, np.int64)
    users = np.concatenate([first, np.repeat(np.arange(1, NUM_USERS + 1), history)])
    items = np.concatenate(
        [np.arange(num_items), rng.integers(num_items, size=NUM_USERS * history)]
    )
    event = np.concatenate([first, np.tile(np.arange(history), NUM_USERS)])
    log = InteractionLog(
        users=IdColumn(users, [str(user) for user in range(NUM_USERS + 1)]),
        items=IdColumn(items, [str(item) for item in range(num_items)]),
        time=START_TIME + SECONDS_BETWEEN_EVENTS * event,
        labels={UNNAMED_TASK: np.ones(len(users), np.float32)},
        event_attributes={},
        item_attributes={"category": [(str(item % NUM_CATEGORIES),) for item in range(num_items)]},
        item_floats={"price": np.ones(num_items, np.float32)},
        user_attributes={},
        report=ReadReport(len(users), len(users), {}, []),
    )
    return build_dataset(log, [History(HISTORY, Window(history, history))])


def train_step(trainer: Trainer, chosen: np.ndarray) -> None:
    """Make a batch and train on it."""
    trainer.sharded.train()
    trainer.step(trainer.stream.batch(chosen, 0, 0))


def _moved(model: nn.Module, moved_by: float, batch: Batch) -> Tensor:
    """Score, with the held-out item, which is the last one, moved before or behind all others."""
    logits = model_scorer(model)(batch)
    logits[-1] += moved_by
    return logits

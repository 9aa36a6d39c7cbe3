"""What a large catalogue costs: a training step, and ranking all of it for one user.

A step costs what its batch holds. Ranking costs what the items scored cost: all of them for a
held-out item that is among the first ten, and a few thousand for one that is found to be further
behind.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.datasets.utils import Batch

from torchrec_kvshare.benchmark.plan import Plan, Sizes
from torchrec_kvshare.benchmark.results import Record
from torchrec_kvshare.benchmark.timing import interleaved_medians
from torchrec_kvshare.data.dataset import Dataset, build_dataset
from torchrec_kvshare.data.interactions import InteractionLog, ReadReport
from torchrec_kvshare.data.tables import IdColumn
from torchrec_kvshare.features.schema import HISTORY, History, Window
from torchrec_kvshare.model.ranking import dlrm_with_history
from torchrec_kvshare.training.evaluate import evaluate_catalogue, model_scorer
from torchrec_kvshare.training.loop import Trainer, TrainSettings

CATALOGUE = "catalogue"
STEP = "training_step"
RANK_BEHIND = "rank_item_behind"
RANK_FIRST = "rank_first_item"
NUM_ITEMS = (10_000, 1_000_000)
NUM_USERS = 60
NUM_CATEGORIES = 40
START_TIME = 1_700_000_000
SECONDS_BETWEEN_EVENTS = 3600
# Of configs/train.yaml.
SETTINGS = TrainSettings(1, 3e-3, 5e-3, 1e-5, 256, 7, 0, 60.0)


def measure_catalogue(plan: Plan, sizes: Sizes) -> list[Record]:
    """Milliseconds of a step and of ranking, by size of the catalogue.

    Args:
        plan: ``encoders``, ``histories`` (events of each user), ``repeats``, ``seed``.
        sizes: of the model.

    Returns:
        Records of ``latency`` by path; ``candidates`` is the size of the catalogue. And
        ``ratio_to_smallest``, of each path to its own at the smallest catalogue.
    """
    records = []
    for encoder in plan.encoders:
        for history in plan.histories:
            records += _case_records(plan, sizes, encoder, history)
    return records


def _case_records(plan: Plan, sizes: Sizes, encoder: str, history: int) -> list[Record]:
    call_by_path: dict[tuple[str, int], Callable[[], object]] = {}
    for num_items in NUM_ITEMS:
        dataset = catalogue_dataset(num_items, history, plan.seed)
        torch.manual_seed(plan.seed)
        model = dlrm_with_history(dataset.schema, sizes.spec(encoder, history), [sizes.dim, 1])
        trainer = Trainer(model, dataset, SETTINGS, Path())
        # The windows of the user that met the whole catalogue are at the start.
        chosen = np.flatnonzero(trainer.windows.user > 0)[: max(1, 256 // history)]
        call_by_path[STEP, num_items] = partial(train_step, trainer, chosen)
        for path, moved_by in ((RANK_BEHIND, -1e6), (RANK_FIRST, 1e6)):
            scorer = partial(_moved, model, moved_by)
            call_by_path[path, num_items] = partial(evaluate_catalogue, scorer, dataset, 1)
    for call in call_by_path.values():
        call()
    names = {f"{path} {num_items}": (path, num_items) for path, num_items in call_by_path}
    medians = interleaved_medians(
        {name: call_by_path[key] for name, key in names.items()}, plan.repeats
    )
    records = []
    for name, (path, num_items) in names.items():
        case = sizes.case(encoder) | {"path": path, "history": history, "candidates": num_items}
        ratio = medians[name] / medians[f"{path} {NUM_ITEMS[0]}"]
        records.append(Record(CATALOGUE, case, "latency", medians[name], "ms"))
        records.append(Record(CATALOGUE, case, "ratio_to_smallest", ratio, "x"))
    return records


def catalogue_dataset(num_items: int, history: int, seed: int) -> Dataset:
    """One user who met every item at one time, and users of so many events each."""
    rng = np.random.default_rng(seed)
    first = np.zeros(num_items, np.int64)
    users = np.concatenate([first, np.repeat(np.arange(1, NUM_USERS + 1), history)])
    items = np.concatenate(
        [np.arange(num_items), rng.integers(num_items, size=NUM_USERS * history)]
    )
    place = np.concatenate([first, np.tile(np.arange(history), NUM_USERS)])
    log = InteractionLog(
        users=IdColumn(users, [str(user) for user in range(NUM_USERS + 1)]),
        items=IdColumn(items, [str(item) for item in range(num_items)]),
        time=START_TIME + SECONDS_BETWEEN_EVENTS * place,
        label=np.ones(len(users), np.float32),
        action=None,
        item_attributes={"category": [(str(item % NUM_CATEGORIES),) for item in range(num_items)]},
        item_floats={"price": np.ones(num_items, np.float32)},
        user_attributes={},
        report=ReadReport(len(users), len(users), {}, []),
    )
    return build_dataset(log, [History(HISTORY, Window(history, history))])


def train_step(trainer: Trainer, chosen: np.ndarray) -> None:
    """Make a batch and learn from it."""
    trainer.train_model.train()
    trainer.step(trainer.batch(chosen, 0, 0))


def _moved(model: nn.Module, moved_by: float, batch: Batch) -> Tensor:
    """The model's scores, the held-out item, which stands last, moved behind or before all."""
    logits = model_scorer(model)(batch)
    logits[-1] += moved_by
    return logits

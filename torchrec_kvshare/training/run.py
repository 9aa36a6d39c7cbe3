"""One training run: the model and its baselines on one budget, measured on the same test split.

A run's folder holds the config, the schema, a digest of the data, a checkpoint for each trained
model and, at the end, ``metrics.json``. Started again with the same folder, a run goes on where it
was killed; one that is finished is never touched, and neither is one of another config or of other
data.
"""

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torchrec.models.dlrm import DLRM

from torchrec_kvshare.config import ModelConfig, TrainConfig
from torchrec_kvshare.data.dataset import TEST, TRAIN, Dataset, build_dataset, users_to_test
from torchrec_kvshare.data.digest import DataDigest, data_digest
from torchrec_kvshare.data.load import load_log
from torchrec_kvshare.data.split_report import crowded_moments, split_sizes, unknown_shares
from torchrec_kvshare.data.targets import MIN_CATALOGUE
from torchrec_kvshare.errors import ConfigError, DataError
from torchrec_kvshare.features.schema import FeatureSchema, History, Window
from torchrec_kvshare.history.kinds import KINDS, TowerSpec
from torchrec_kvshare.history.tower import HistoryTower
from torchrec_kvshare.model.ranking import dlrm_with_history, plain_dlrm, takes_prefixes
from torchrec_kvshare.training.evaluate import (
    Scorer,
    evaluate_catalogue,
    evaluate_sampled,
    model_scorer,
    popularity_scorer,
)
from torchrec_kvshare.training.loop import TrainSettings, load_weights, open_writer, train
from torchrec_kvshare.training.metrics import Values

CONFIG = "config.json"
SCHEMA = "schema.json"
DATA = "data.json"
METRICS = "metrics.json"
NO_HISTORY = "none"
HISTORY_KINDS = (*KINDS, NO_HISTORY)
WINDOWS = ("anchored", "sliding")

logger = logging.getLogger(__name__)

Metrics = dict[str, Values]


@contextmanager
def _without_onednn() -> Iterator[None]:
    """Compute with kernels that do for any number of rows.

    oneDNN compiles a GELU for each new number of rows, of which an epoch has thousands. It keeps
    the last 1,024 of them where large tensors would go, so that the heap is in pieces and grows.
    """
    is_enabled = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.set_flags(False)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(is_enabled)


@_without_onednn()
def train_run(config: TrainConfig) -> Metrics:
    """Train a model, and on the same budget its baselines; measure all on the test split.

    Args:
        config: the whole run; ``output`` is its folder.

    Returns:
        Test metrics by model: the history's kind, ``none`` (the plain DLRM) and ``popularity``. Of
        a run that is finished, what it wrote; nothing of it is written again.

    Raises:
        ConfigError: if the folder holds a run of another config, or a value cannot work.
        DataError: if the data cannot be read, has nothing to train or test on, or is not that of
            the run in the folder.
        TrainingError: if the training diverges.
    """
    _check_model(config.model)
    dataset = load_dataset(config)
    _check_tokens(config.model, dataset.schema)
    folder = Path(config.output)
    _claim(folder, config, dataset)
    if (folder / METRICS).is_file():
        logger.info("%s is finished: nothing is trained or written", folder)
        finished: Metrics = json.loads((folder / METRICS).read_text())["test"]
        return finished
    kinds = [config.model.history]
    if config.budget.baselines and config.model.history != NO_HISTORY:
        kinds.append(NO_HISTORY)
    metrics: Metrics = {}
    for kind in kinds:
        model = new_model(dataset.schema, config.model, kind, config.seed)
        train(model, dataset, _settings(config), folder / kind, folder / "tensorboard" / kind)
        scorer = model_scorer(model)
        metrics[kind] = _evaluate(scorer, dataset, config, takes_prefixes(model))
    if config.budget.baselines:
        popularity = popularity_scorer(dataset, config.negatives)
        metrics["popularity"] = _evaluate(popularity, dataset, config, share_prefill=True)
    # A run that was killed here is measured again: TensorBoard drops what it had said.
    with open_writer(folder / "tensorboard", 0) as summary:
        for kind, values in metrics.items():
            for name, value in values.items():
                if value is not None:
                    summary.add_scalar(f"test_{name.replace('@', '_at_')}/{kind}", value, 0)
    _write(folder / METRICS, json.dumps({"test": metrics}, indent=2, allow_nan=False) + "\n")
    return metrics


def load_dataset(config: TrainConfig) -> Dataset:
    """The data set of a run, read and encoded anew; the log says how it was split.

    Raises:
        DataError: if nothing is left to train or test on.
    """
    name = config.data.name
    log = load_log(config.data)
    logger.info("%s: %s", name, log.report)
    if config.budget.max_users is not None:
        log = users_to_test(log, config.budget.max_users)
    dataset = build_dataset(log, histories_of(config.model))
    for split_name, split in (("training", TRAIN), ("test", TEST)):
        if not (dataset.split == split).any():
            raise DataError(f"{name} has no event in the {split_name} split")
    if not dataset.label[dataset.split == TRAIN].any():
        raise DataError(f"{name} has no positive event in the training split")
    if len(dataset.known_items) < MIN_CATALOGUE:
        raise DataError(
            f"{name} has one item in the training split, {log.items.ids[0]}; negatives need another"
        )
    logger.info("%s: %s", name, split_sizes(dataset))
    for sentence in crowded_moments(dataset):
        logger.warning("%s: %s", name, sentence)
    shares = unknown_shares(dataset).items()
    logger.info(
        "%s: share of the test split's ids that training never met: %s",
        name,
        ", ".join(f"{column} {share:.1%}" for column, share in shares),
    )
    return dataset


def load_trained(folder: Path) -> tuple[DLRM, FeatureSchema]:
    """The trained model of a run, in eval mode, and its schema; the data is not read.

    Raises:
        ConfigError: if the folder holds no finished run, or one without a history.
        TrainingError: if a weight is not finite.
    """
    if not (folder / METRICS).is_file():
        raise ConfigError(f"{folder} holds no finished run: it has no {METRICS}")
    values = json.loads((folder / CONFIG).read_text())
    model_config = ModelConfig(**values["model"])
    if model_config.history == NO_HISTORY:
        raise ConfigError(f"{folder} was trained with history=none; there is no K/V to share")
    schema = FeatureSchema.from_json(json.loads((folder / SCHEMA).read_text()))
    model = new_model(schema, model_config, model_config.history, values["seed"])
    load_weights(model, folder / model_config.history)
    return model.eval(), schema


def provenance_of(folder: Path) -> dict[str, str]:
    """What a run's config says of a model's origin: its data, its seed, the digest of all of it."""
    config = (folder / CONFIG).read_bytes()
    values = json.loads(config)
    return {
        "data": values["data"]["name"],
        "seed": str(values["seed"]),
        "run_config_sha256": hashlib.sha256(config).hexdigest(),
    }


def new_model(schema: FeatureSchema, sizes: ModelConfig, kind: str, seed: int) -> DLRM:
    """A freshly drawn DLRM, with the history of a kind or with none."""
    torch.manual_seed(seed)
    if kind == NO_HISTORY:
        return plain_dlrm(schema, sizes.dim, sizes.top_mlp)
    return dlrm_with_history(schema, tower_spec(sizes), sizes.top_mlp)


def tower_spec(sizes: ModelConfig) -> TowerSpec:
    """What the towers of a model are.

    Raises:
        ConfigError: if a value or the combination cannot work.
    """
    return TowerSpec(
        sizes.history,
        sizes.dim,
        sizes.num_layers,
        sizes.num_heads,
        sizes.dropout,
        sizes.candidate_tokens,
        sizes.max_history if sizes.window == "sliding" else 0,
        sizes.merge,
        sizes.recent,
        sizes.num_globals,
    )


def histories_of(sizes: ModelConfig) -> list[History]:
    """What a model reads of its users' events.

    A sliding window reads as much as its layers see together, and up to a block more, so that what
    is read starts at a block boundary too.
    """
    max_history = sizes.max_history
    if sizes.window == "sliding" and sizes.history != NO_HISTORY:
        read = tower_spec(sizes).events_read + sizes.block - 1
        max_history = -(-read // sizes.block) * sizes.block
    window = Window(max_history, sizes.block)
    return [History(name, window, tuple(actions)) for name, actions in sizes.histories.items()]


def _check_model(sizes: ModelConfig) -> None:
    """Refuse what cannot work before any data is read."""
    if sizes.history not in HISTORY_KINDS:
        raise ConfigError(f"model.history is {sizes.history!r}; one of {HISTORY_KINDS}")
    if sizes.window not in WINDOWS:
        raise ConfigError(f"model.window is {sizes.window!r}; one of {WINDOWS}")
    if not sizes.top_mlp or sizes.top_mlp[-1] != 1:
        raise ConfigError(
            f"model.top_mlp is {list(sizes.top_mlp)}; its last width must be 1: the one logit"
        )
    for history in histories_of(sizes):
        if sizes.history != NO_HISTORY:
            HistoryTower(tower_spec(sizes), history.window.max_history, history.window.block)


def _check_tokens(sizes: ModelConfig, schema: FeatureSchema) -> None:
    """Refuse tokens that the data's columns cannot make before anything is written."""
    allowed = (1, 1 + len(schema.item_attributes))
    if sizes.history != NO_HISTORY and sizes.candidate_tokens not in allowed:
        raise ConfigError(
            f"model.candidate_tokens is {sizes.candidate_tokens}; one of {allowed} is allowed: all "
            f"columns in one, or the item and each of its attributes {list(schema.item_attributes)}"
        )


def _evaluate(score: Scorer, dataset: Dataset, config: TrainConfig, share_prefill: bool) -> Values:
    sampled = evaluate_sampled(score, dataset, TEST, config.negatives, share_prefill)
    return sampled | evaluate_catalogue(score, dataset, config.budget.eval_users)


def _settings(config: TrainConfig) -> TrainSettings:
    return TrainSettings(
        config.budget.epochs,
        config.learning_rate,
        config.table_learning_rate,
        config.weight_decay,
        config.batch_targets,
        config.negatives,
        config.seed,
        config.checkpoint_seconds,
    )


def _claim(folder: Path, config: TrainConfig, dataset: Dataset) -> None:
    """Write down what the run is, or find that the folder is this very run, started before."""
    values = dataclasses.asdict(config)
    digest = data_digest(dataset)
    if (folder / CONFIG).is_file():
        _check_same_run(folder, values, digest)
        return
    if (folder / METRICS).is_file():
        raise ConfigError(f"{folder} has a {METRICS} but no {CONFIG}: it is not of a run")
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / SCHEMA, json.dumps(dataset.schema.to_json()))
    _write(folder / DATA, json.dumps(digest.to_json(), indent=2) + "\n")
    # Last: a folder with a config has all of them.
    _write(folder / CONFIG, json.dumps(values, indent=2) + "\n")


def _check_same_run(folder: Path, values: dict[str, Any], digest: DataDigest) -> None:
    before: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    # Where a run lies and how many threads it has do not make it another run.
    differing = sorted(
        key
        for key in {*values, *before} - {"output", "threads"}
        if before.get(key) != values.get(key)
    )
    if differing:
        raise ConfigError(f"{folder} holds a run of another config; these differ: {differing}")
    if not (folder / DATA).is_file():
        raise ConfigError(f"{folder} holds a run without {DATA}: another version trained it")
    changes = DataDigest(**json.loads((folder / DATA).read_text())).changes(digest)
    if changes:
        raise DataError(
            f"the data of the run in {folder} has changed: {', '.join(changes)}; nothing was "
            "written. Train on it in a folder of its own"
        )


def _write(path: Path, text: str) -> None:
    """Write a file as a whole: a killed run leaves the old one or none."""
    written = path.with_name(f"{path.name}.new")
    written.write_text(text)
    os.replace(written, path)

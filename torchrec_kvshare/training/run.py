"""One training run: a model and its baselines, trained on one budget, tested on one test split.

A run's folder holds the config, the schema, a digest of the data, a checkpoint of each trained
model and, at the end, ``metrics.json``. Started again in the same folder, a killed run resumes. A
finished run, or a run of another config or other data, is never overwritten.
"""

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torchrec.models.dlrm import DLRM, DLRMTrain

from torchrec_kvshare.commands.process import STEP_MEMORY, keep_freed_memory
from torchrec_kvshare.config import (
    ALL,
    BASELINES,
    BFLOAT16,
    EXCLUDE,
    GBCE,
    NO_HISTORY,
    POOLED,
    POPULARITY,
    UNIFORM,
    IdConfig,
    ModelConfig,
    TrainConfig,
)
from torchrec_kvshare.data.digest import DataDigest, data_digest
from torchrec_kvshare.data.load import load_shards
from torchrec_kvshare.data.shards import Shards
from torchrec_kvshare.data.split_report import NAME_BY_SPLIT, SplitReport, split_report
from torchrec_kvshare.data.splits import TEST, TRAIN, VALID, split_rule
from torchrec_kvshare.data.stream import Loading, SamplingSettings
from torchrec_kvshare.data.targets import MIN_CATALOGUE
from torchrec_kvshare.errors import ConfigError, DataError, MissingExtraError
from torchrec_kvshare.features.schema import (
    HASHED,
    VOCABULARY,
    FeatureSchema,
    Hashed,
    History,
    IdMap,
    Managed,
    Window,
    load_schema,
    save_schema,
)
from torchrec_kvshare.history.kinds import CAUSAL, KINDS, TowerSpec
from torchrec_kvshare.history.tower import HistoryTower
from torchrec_kvshare.model.baselines import SequentialModel, mean_pooled_dlrm
from torchrec_kvshare.model.ranking import dlrm_with_history, plain_dlrm, takes_prefixes
from torchrec_kvshare.training.by_length import by_history_length
from torchrec_kvshare.training.checkpoints import load_weights, result_of
from torchrec_kvshare.training.evaluate import (
    Scorer,
    popularity_scorer,
    sampled_metrics,
    score_split,
)
from torchrec_kvshare.training.hyperparameters import settings_by_name, write_results
from torchrec_kvshare.training.loop import TrainSettings, open_writer, train
from torchrec_kvshare.training.metrics import Measures, rank_metrics
from torchrec_kvshare.training.objective import ObjectiveSettings
from torchrec_kvshare.training.plots import plot_by_length
from torchrec_kvshare.training.ranking import RankingSettings, rank_held_out
from torchrec_kvshare.training.ranks import Ranks, device_of, joined_ranks
from torchrec_kvshare.training.selection import check_selection
from torchrec_kvshare.training.sharding import TableSettings, check_tables
from torchrec_kvshare.training.start import CONFIG, METRICS, start_of

DATA = "data.json"
LENGTH_PLOT = "history_length.png"
TENSORBOARD = "tensorboard"  # folder of the models' curves, one folder each
HISTORY_KINDS = (*KINDS, NO_HISTORY)
WINDOWS = ("anchored", "sliding")
# What may differ when a run is resumed: where it is written, and what computes it.
FREE_KEYS = ("output", "threads", "device", "workers", "prefetch")

logger = logging.getLogger(__name__)

# By model: values by name and, for those that are null, the reasons as ``undefined``.
Metrics = dict[str, dict[str, Any]]


class Evaluated(NamedTuple):
    """Test metrics of a model: over all targets, and by length of history."""

    test: Measures
    by_length: dict[str, Measures]


@contextmanager
def _onednn_if_needed(precision: str) -> Iterator[None]:
    """Compute float32 without oneDNN, whose cache of compiled kernels fragments the heap.

    oneDNN compiles a GELU for each new number of rows, and an epoch has thousands. It keeps the
    last 1,024 of them between large tensors, so that the heap fragments and grows. But without it
    a step in bfloat16 takes 3 times as long at width 64, and 18 times at 256.
    """
    is_enabled = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.set_flags(is_enabled and precision == BFLOAT16)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(is_enabled)


def train_run(config: TrainConfig) -> Metrics | None:
    """Train a model and its baselines on the same budget; evaluate all on the test split.

    Under ``torchrun`` all ranks call it; one process alone is a world of one rank.

    Args:
        config: the whole run; ``output`` is its folder, that of the first rank for all.

    Returns:
        On the first rank test metrics by model: the history's kind and the budget's baselines; None
        on the others. A finished run returns the metrics it wrote, and writes
        nothing.

    Raises:
        ConfigError: if the folder holds a run of another config, or a value cannot work.
        DataError: if the data cannot be read, has nothing to train or test on, or differs from the
            data of the run in the folder.
        TrainingError: if training diverges.
    """
    _check_model(config.model)
    if unknown := sorted(set(config.budget.baselines) - set(BASELINES)):
        raise ConfigError(f"budget.baselines has {unknown}; {list(BASELINES)} are allowed")
    if config.next_event_loss == GBCE and config.shared_sampling != UNIFORM:
        raise ConfigError(
            f"shared_sampling is {config.shared_sampling}; next_event_loss={GBCE} calibrates "
            f"{UNIFORM} draws only"
        )
    check_selection(config.keep_best, config.patience)
    device = device_of(config.device)
    keep_freed_memory(STEP_MEMORY)
    with _onednn_if_needed(config.precision), joined_ranks(device) as ranks:
        # The default output holds the time, which ranks may read differently.
        config = dataclasses.replace(config, output=ranks.gather(config.output)[0])
        metrics = _train_run(config, ranks)
        return metrics if ranks.is_first else None


def _train_run(config: TrainConfig, ranks: Ranks) -> Metrics:
    shards, splits = load_reported(config)
    schema = shards.schema
    _check_tokens(config.model, schema)
    _check_tasks(config, schema)
    start = start_of(config)
    settings = settings_of(config)
    of_baselines = dataclasses.replace(settings, trainable=ALL)  # they start anew
    trained = [name for name in config.budget.baselines if name != POPULARITY]
    kinds = [*dict.fromkeys([config.model.history, *trained])]
    meta = torch.device("meta")
    models = [new_model(schema, config.model, kind, config.seed, meta) for kind in kinds]
    check_tables(models, settings.tables, ranks)
    folder = Path(config.output)
    if ranks.is_first:
        _claim(folder, config, shards)
    ranks.wait()
    if (folder / METRICS).is_file():
        logger.info("%s is finished: nothing is trained or written", folder)
        finished: Metrics = json.loads((folder / METRICS).read_text())["test"]
        return finished
    metrics: dict[str, Evaluated] = {}
    num_steps = {POPULARITY: 0}
    for kind in kinds:
        model = new_model(schema, config.model, kind, config.seed)
        if start and kind == config.model.history:
            load_weights(_as_trained(model), start.checkpoint)
        share_prefill = takes_prefixes(model)
        log_folder = folder / TENSORBOARD / kind
        chosen = settings if kind == config.model.history else of_baselines
        trainer = train(model, shards, chosen, folder / kind, log_folder, ranks)
        num_steps[kind] = trainer.progress.step
        if kind == config.model.history:
            schema = trainer.managed.frozen(shards.schema, shards.shared.known_ids)
        metrics[kind] = _evaluate(
            trainer.scorer(), shards, config, ranks, share_prefill=share_prefill
        )
    if POPULARITY in config.budget.baselines:
        popularity = popularity_scorer(shards, config.negatives)
        metrics[POPULARITY] = _evaluate(popularity, shards, config, ranks, share_prefill=True)
    tested = {kind: evaluated.test.to_json() for kind, evaluated in metrics.items()}
    if not ranks.is_first:
        return tested
    # A run that was killed here is evaluated again and replaces its points in TensorBoard.
    for kind, evaluated in metrics.items():
        values_by_key = settings_by_name(config, kind, FREE_KEYS)
        with open_writer(folder / TENSORBOARD / kind, num_steps[kind]) as writer:
            write_results(writer, evaluated.test.values, values_by_key, num_steps[kind])
    # Managed ids have rows only now; other columns are written as they were.
    save_schema(folder, schema)
    by_length = {kind: evaluated.by_length for kind, evaluated in metrics.items()}
    _plot(folder / LENGTH_PLOT, by_length)
    report: dict[str, Any] = {
        "test": tested,
        "by_history_length": {
            kind: {bucket: measures.to_json() for bucket, measures in by_bucket.items()}
            for kind, by_bucket in by_length.items()
        },
        "data": split_rule(config.split, config.split_times).to_json() | splits.to_json(),
    }
    if shards.shared.num_colliding_ids:
        report["colliding_ids"] = shards.shared.num_colliding_ids
    if shards.shared.num_unknown_ids:
        report["unknown_ids"] = shards.shared.num_unknown_ids
    _write(folder / METRICS, json.dumps(report, indent=2, allow_nan=False) + "\n")
    return tested


def load_data(config: TrainConfig) -> Shards:
    """Read and encode the data set of a run, or open its folder, and log how it is split.

    Raises:
        ConfigError: if a value cannot work with the data.
        DataError: if there is nothing to train or test on.
    """
    return load_reported(config)[0]


def load_reported(config: TrainConfig) -> tuple[Shards, SplitReport]:
    """Read and encode the data set of a run as ``load_data``; also return how it is split.

    Raises:
        ConfigError: if a value cannot work with the data.
        DataError: if there is nothing to train or test on.
    """
    name = config.data.name
    rule = split_rule(config.split, config.split_times)
    start = start_of(config)
    shards = load_shards(
        config.data,
        histories_of(config.model),
        max_users=config.budget.max_users,
        id_maps=id_maps_of(config.ids),
        rule=rule,
        schema=load_schema(start.run) if start else None,
    )
    logger.info("%s: %s", name, shards.report)
    report = split_report(shards, config.negatives)
    for split in (TRAIN, TEST, VALID):
        if not report.num_events[f"{NAME_BY_SPLIT[split]} split"]:
            raise DataError(f"{name} has no event in the {NAME_BY_SPLIT[split]} split of {rule}")
    of_tasks = zip(shards.schema.tasks, shards.num_positive.T, shards.num_negative.T, strict=True)
    for task, num_positive, num_negative in of_tasks:
        of_task = f" for task {task!r}" if task else ""
        if not num_positive.any():
            raise DataError(f"{name} has no positive event{of_task} in the training split")
        if not config.negatives and not num_negative.any():
            raise DataError(
                f"negatives is 0, but {name} has no event with label 0{of_task} in the training "
                "split; a label rule is needed, or 1 or more negatives"
            )
    known_items = shards.shared.known_items
    if config.negatives and len(known_items) < MIN_CATALOGUE:
        raise DataError(
            f"{name} has one item in the training split, "
            f"{shards.shared.log.items.ids[known_items[0]]}; negatives need another"
        )
    num_candidates = config.evaluation.candidates
    if num_candidates is not None and num_candidates >= len(known_items):
        raise ConfigError(
            f"evaluation.candidates is {num_candidates}; the training split of {name} has "
            f"{len(known_items)} items, {len(known_items) - 1} beside a held-out one"
        )
    logger.info("%s: %s", name, report)
    for sentence in report.crowded_moments:
        logger.warning("%s: %s", name, sentence)
    logger.info(
        "%s: share of the test split's ids that training never met: %s",
        name,
        ", ".join(f"{column} {share:.1%}" for column, share in report.unknown_shares.items()),
    )
    logger.info("%s: %.1f%% of the events tie with another one", name, 100 * report.tied_share)
    if report.own_positive_share is not None:
        logger.info(
            "%s: %.1f%% of the test split's sampled negatives are positives of their user",
            name,
            100 * report.own_positive_share,
        )
    for column, num_unknown in shards.shared.num_unknown_ids.items():
        logger.info(
            "%s: %s: %s of the %s ids of the training split are unknown to %s",
            name,
            column,
            f"{num_unknown:,}",
            f"{len(shards.shared.known_ids[column]):,}",
            config.init_from,
        )
    for sentence in report.collisions:
        logger.info("%s: %s", name, sentence)
    return shards, report


def load_trained(folder: Path) -> tuple[DLRM, FeatureSchema]:
    """Load the trained model of a run, in eval mode, and its schema; the data is not read.

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
    schema = load_schema(folder)
    model = new_model(schema, model_config, model_config.history, values["seed"])
    load_weights(_as_trained(model), result_of(folder / model_config.history))
    assert isinstance(model, DLRM)
    return model.eval(), schema


def _as_trained(model: nn.Module) -> DLRMTrain:
    """Return a model as a part of a module whose keys are those of the checkpoint."""
    assert isinstance(model, DLRM)
    return DLRMTrain(model)


def provenance_of(folder: Path) -> dict[str, str]:
    """Return a model's origin by its run's config: data name, seed, and digest of the config."""
    config = (folder / CONFIG).read_bytes()
    values = json.loads(config)
    return {
        "data": values["data"]["name"],
        "seed": str(values["seed"]),
        "run_config_sha256": hashlib.sha256(config).hexdigest(),
    }


def new_model(
    schema: FeatureSchema,
    sizes: ModelConfig,
    kind: str,
    seed: int,
    table_device: torch.device | None = None,
) -> nn.Module:
    """Build a model with random weights.

    Args:
        schema: columns, table sizes and histories.
        sizes: of the model.
        kind: of its history, for TorchRec's DLRM; or a baseline that is trained.
        seed: of the weights.
        table_device: of the tables; ``meta`` for tables that are drawn when they are sharded.
    """
    torch.manual_seed(seed)
    if kind == NO_HISTORY:
        width = sizes.table_dim or sizes.dim
        return plain_dlrm(schema, width, sizes.top_mlp, table_device)
    if kind in KINDS:
        return dlrm_with_history(schema, tower_spec(sizes), sizes.top_mlp, table_device)
    # Of a model without history the sizes are those of a causal one.
    spec = tower_spec(dataclasses.replace(sizes, history=CAUSAL, candidate_tokens=1))
    if kind == POOLED:
        spec = dataclasses.replace(spec, has_state=False)
        return mean_pooled_dlrm(schema, spec, sizes.top_mlp, table_device)
    # A state reads the K/V of the last layer: one more layer than those that mix events.
    spec = dataclasses.replace(spec, num_layers=spec.num_layers + 1, has_state=True)
    return SequentialModel(schema, spec, table_device)


def tower_spec(sizes: ModelConfig) -> TowerSpec:
    """Return the spec of a model's history towers.

    Raises:
        ConfigError: if a value or a combination of values cannot work.
    """
    return TowerSpec(
        kind=sizes.history,
        dim=sizes.dim,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        dropout=sizes.dropout,
        num_tokens=sizes.candidate_tokens,
        window=sizes.max_history if sizes.window == "sliding" else 0,
        merge=sizes.merge,
        recent=sizes.recent,
        num_globals=sizes.num_globals,
        has_state=sizes.user_state,
        token_dim=sizes.table_dim or 0,
        output_dim=sizes.table_dim or 0,
    )


def histories_of(sizes: ModelConfig) -> list[History]:
    """Return the histories that a model reads, with their windows.

    With sliding windows a model reads the events that its layers see together, rounded up so that
    the window starts at a block boundary.
    """
    max_history = sizes.max_history
    if sizes.window == "sliding" and sizes.history != NO_HISTORY:
        num_events = tower_spec(sizes).events_read + sizes.block - 1
        max_history = -(-num_events // sizes.block) * sizes.block
    window = Window(max_history, sizes.block)
    return [History(name, window, tuple(actions)) for name, actions in sizes.histories.items()]


def id_maps_of(ids: Mapping[str, IdConfig]) -> dict[str, IdMap]:
    """Return the maps of the columns that have no vocabulary.

    Raises:
        ConfigError: naming the column, if a number is missing or of no use.
    """
    maps: dict[str, IdMap] = {}
    for column, one in ids.items():
        name = f"ids.{column}"
        if one.kind != VOCABULARY and one.num_rows is None:
            raise ConfigError(f"{name}.num_rows is missing; {one.kind} ids need it")
        if one.kind == VOCABULARY and one.num_rows is not None:
            raise ConfigError(
                f"{name}.num_rows is {one.num_rows}; a vocabulary has a row for each of its ids: "
                f"set {name}.kind, or leave it out"
            )
        if one.kind != HASHED and one.salt:
            raise ConfigError(f"{name}.salt is {one.salt}; {one.kind} ids have none")
        if one.num_rows is not None:
            maps[column] = (
                Hashed(one.num_rows, one.salt)
                if one.kind == HASHED
                else Managed(one.num_rows, one.eviction_steps)
            )
    return maps


def _check_model(sizes: ModelConfig) -> None:
    """Refuse a model config that cannot work, before any data is read."""
    if sizes.history not in HISTORY_KINDS:
        raise ConfigError(f"model.history is {sizes.history!r}; one of {HISTORY_KINDS}")
    if sizes.window not in WINDOWS:
        raise ConfigError(f"model.window is {sizes.window!r}; one of {WINDOWS}")
    if not sizes.top_mlp or sizes.top_mlp[-1] != 1:
        raise ConfigError(
            f"model.top_mlp is {list(sizes.top_mlp)}; its last width must be 1: the logit of a task"
        )
    for history in histories_of(sizes):
        if sizes.history != NO_HISTORY:
            HistoryTower(tower_spec(sizes), history.window.max_history, history.window.block)


def _check_tokens(sizes: ModelConfig, schema: FeatureSchema) -> None:
    """Refuse a number of tokens that the data's columns cannot make, before anything is written."""
    allowed = (1, 1 + len(schema.item_attributes))
    if sizes.history != NO_HISTORY and sizes.candidate_tokens not in allowed:
        raise ConfigError(
            f"model.candidate_tokens is {sizes.candidate_tokens}; one of {allowed} is allowed: one "
            f"token for all columns, or one each for the item and {list(schema.item_attributes)}"
        )


def _check_tasks(config: TrainConfig, schema: FeatureSchema) -> None:
    """Refuse a weight of a task that the data does not have, before anything is written."""
    if unknown := sorted(set(config.task_weights) - set(schema.tasks)):
        named = [task for task in schema.tasks if task]
        raise ConfigError(
            f"task_weights has {unknown}; the tasks of {config.data.name} are {named}"
            f"{'' if named else ': its label is one rule, without a name'}"
        )


def _evaluate(
    score: Scorer, shards: Shards, config: TrainConfig, ranks: Ranks, *, share_prefill: bool
) -> Evaluated:
    scored = score_split(
        score, shards, TEST, config.negatives, share_prefill=share_prefill, ranks=ranks
    )
    ranked = rank_held_out(score, shards, _ranking_settings(config), ranks)
    measures = sampled_metrics(scored) | rank_metrics(ranked.position.tolist(), ranked.num_items)
    measures.log_undefined()
    return Evaluated(measures, by_history_length(scored, ranked))


def _ranking_settings(config: TrainConfig) -> RankingSettings:
    return RankingSettings(
        max_users=config.budget.eval_users,
        num_candidates=config.evaluation.candidates,
        exclude_seen=config.evaluation.seen == EXCLUDE,
    )


def _plot(path: Path, by_length: Mapping[str, Mapping[str, Measures]]) -> None:
    try:
        plot_by_length(path, by_length)
    except MissingExtraError as error:
        logger.info("no %s: %s", path, error)


def settings_of(config: TrainConfig) -> TrainSettings:
    """Return the training settings of a config."""
    return TrainSettings(
        epochs=config.budget.epochs,
        learning_rate=config.learning_rate,
        tables=TableSettings(
            optimizer=config.table_optimizer,
            learning_rate=config.table_learning_rate,
            sharding=config.sharding,
            kernels=config.kernels,
            clip=config.table_clip,
        ),
        weight_decay=config.weight_decay,
        batch_targets=config.batch_targets,
        negatives=config.negatives,
        seed=config.seed,
        checkpoint_seconds=config.checkpoint_seconds,
        keep_checkpoints=config.keep_checkpoints,
        shuffle_shards=config.shuffle_shards,
        loading=Loading(config.workers, config.prefetch),
        objective=ObjectiveSettings(
            next_event=config.next_event,
            shared_items=config.shared_items,
            loss=config.next_event_loss,
            gbce_t=config.gbce_t,
            task_weights=config.task_weights,
        ),
        sampling=SamplingSettings(
            negatives=config.negative_sampling,
            shared=config.shared_sampling,
            popularity_power=config.popularity_power,
        ),
        warmup_steps=config.warmup_steps,
        clip_norm=config.clip_norm,
        precision=config.precision,
        ema_decay=config.ema_decay,
        ranking=_ranking_settings(config),
        keep_best=config.keep_best,
        patience=config.patience,
        trainable=config.trainable,
    )


def _claim(folder: Path, config: TrainConfig, shards: Shards) -> None:
    """Write the run's config, schema and data digest, or check that the folder holds this run."""
    values = dataclasses.asdict(config)
    digest = data_digest(shards.digest(), shards.schema)
    if (folder / CONFIG).is_file():
        _check_same_run(folder, values, digest)
        return
    if (folder / METRICS).is_file():
        raise ConfigError(f"{folder} has a {METRICS} but no {CONFIG}: it is not a run")
    folder.mkdir(parents=True, exist_ok=True)
    save_schema(folder, shards.schema)
    _write(folder / DATA, json.dumps(digest.to_json(), indent=2) + "\n")
    # The config goes last: a folder that has it has the other files too.
    _write(folder / CONFIG, json.dumps(values, indent=2) + "\n")


def _check_same_run(folder: Path, values: dict[str, Any], digest: DataDigest) -> None:
    before: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    differing = sorted(
        key for key in {*values, *before} - {*FREE_KEYS} if before.get(key) != values.get(key)
    )
    if differing:
        raise ConfigError(f"{folder} holds a run of another config; these differ: {differing}")
    if not (folder / DATA).is_file():
        raise ConfigError(f"{folder} holds a run without {DATA}: another version trained it")
    changes = DataDigest(**json.loads((folder / DATA).read_text())).changes(digest)
    if changes:
        raise DataError(
            f"the data of the run in {folder} has changed: {', '.join(changes)}; nothing was "
            "written. Train on it with another output"
        )


def _write(path: Path, text: str) -> None:
    """Write a file atomically: a killed run leaves the old file or none."""
    written = path.with_name(f"{path.name}.new")
    written.write_text(text)
    os.replace(written, path)

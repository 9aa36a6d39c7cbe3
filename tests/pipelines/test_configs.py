"""A config that cannot work is an error that names the key; pipelines are thin."""

import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from hydra.errors import HydraException

from tests.pipelines.commands import (
    CONFIGS,
    ROOT,
    TINY,
    WORLD,
    composed,
    run_all,
    run_pipeline,
    spawn_pipeline,
)
from torchrec_kvshare import config
from torchrec_kvshare.benchmark.run import SCENARIO_BY_NAME
from torchrec_kvshare.config import literal_overrides
from torchrec_kvshare.errors import ConfigError

PIPELINES = sorted(path for path in (ROOT / "pipelines").glob("*.py") if path.stem != "__init__")


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """A copy of the configs to edit."""
    return Path(shutil.copytree(CONFIGS, tmp_path / "configs"))


def refused(name: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        run_pipeline(name, *overrides, "output=never_written")
    assert not (Path.cwd() / "never_written").exists()
    return str(error.value)


def test_a_misspelt_key_ends_with_its_name(configs: Path, tmp_path: Path) -> None:
    """Given to ``python -m pipelines.train`` on its command line or in a file."""
    with (configs / "train.yaml").open("a") as file:
        file.write("batch_target: 64\n")
    ended = spawn_pipeline("train", "model.dimm=16", f"output={tmp_path / 'run'}")
    assert ended.returncode == 2
    assert ended.stderr == "error: model.dimm is not a key of train; did you mean model.dim?\n"
    [ended_by_file] = run_all(tmp_path, [f"train --config-path {configs} output=run"])
    assert ended_by_file.status == 2
    assert ended_by_file.stderr == (
        "error: batch_target is not a key of this config; did you mean batch_targets?\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "misspelt", ["batch_target=1", "model.dimm=1", "data.num_user=1", "budget.epoch=1", "dat=x"]
)
def test_every_level_of_the_command_line_knows_its_keys(misspelt: str) -> None:
    with pytest.raises(HydraException, match=misspelt.partition("=")[0]):
        run_pipeline("train", misspelt)


@pytest.mark.parametrize(
    ("pipeline", "file", "line", "key"),
    [
        ("train", "data/synthetic.yaml", "num_userz: 3", "data.num_userz"),
        ("train", "budget/smoke.yaml", "epoch: 3", "budget.epoch"),
        ("train", "history/causal.yaml", "layers: 3", "model.layers"),
        ("make_requests", "data/synthetic.yaml", "items: 3", "data.items"),
        ("score", "cache/memory.yaml", "page_sise: 3", "cache.page_sise"),
        ("export", "export.yaml", "runs: x", "runs"),
        ("demo", "demo.yaml", "candidate: 3", "candidate"),
    ],
)
def test_every_level_of_the_files_knows_its_keys(
    configs: Path, pipeline: str, file: str, line: str, key: str
) -> None:
    with (configs / file).open("a") as opened:
        opened.write(f"{line}\n")
    given = {
        "train": TINY,
        "make_requests": (),
        "score": ("artifact=a", "requests=b"),
        "export": ("run=a",),
        "demo": (),
    }[pipeline]
    with pytest.raises(ConfigError) as error:
        run_pipeline(pipeline, *given, "output=never_written", configs=configs)
    assert str(error.value).startswith(f"{key} is not a key of this config; ")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("batch_targets=many", "batch_targets"),
        ("batch_targets=2.5", "batch_targets"),
        ("model.dim=wide", "model.dim"),
        ("model.top_mlp=16", "model.top_mlp"),
        ("model.top_mlp=[16,x]", "model.top_mlp"),
        ("learning_rate=fast", "learning_rate"),
        ("budget.baselines=perhaps", "budget.baselines"),
        ("data.num_users=few", "data.num_users"),
        ("threads=all", "threads"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(override: str, key: str) -> None:
    message = refused("train", *TINY, override)
    assert message.startswith(key)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_targets=0", "batch_targets is 0; it must be at least 1"),
        ("workers=-1", "workers is -1; it must be at least 0"),
        ("prefetch=0", "prefetch is 0; it must be at least 1"),
        ("shuffle_shards=0", "shuffle_shards is 0; it must be at least 1"),
        ("device=gpu", "device is 'gpu'; one of ('auto', 'cpu', 'cuda') is allowed"),
        (
            "split=last",
            "split is 'last'; one of ('time_share', 'leave_one_out', 'time') is allowed",
        ),
        (
            "split=time",
            "split_times is []; split=time needs two: where the validation split begins",
        ),
        (
            "split_times=[2019-10-01]",
            "split_times is ['2019-10-01'], and split is time_share; only",
        ),
        ("split_times=[-1,5]", "split_times is [-1, 5]; each must be at least 0"),
        ("evaluation.candidates=0", "evaluation.candidates is 0; it must be at least 1"),
        ("evaluation.seen=no", "evaluation.seen is 'no'; one of ('exclude', 'include') is allowed"),
        ("evaluation.candidates=60", "evaluation.candidates is 60; the training split of synthe"),
        ("negatives=-1", "negatives is -1; it must be at least 0"),
        ("next_event=-0.5", "next_event is -0.5; it must be at least 0"),
        ("gbce_t=1.5", "gbce_t is 1.5; it must be at most 1"),
        ("popularity_power=-1", "popularity_power is -1.0; it must be at least 0"),
        ("model.table_dim=0", "model.table_dim is 0; it must be at least 1"),
        (
            "negative_sampling=hard",
            "negative_sampling is 'hard'; one of ('uniform', 'popularity', 'in_batch') is allowed",
        ),
        (
            "shared_sampling=in_batch",
            "shared_sampling is 'in_batch'; one of ('uniform', 'popularity') is allowed",
        ),
        ("next_event_loss=bce", "next_event_loss is 'bce'; one of ('softmax', 'gbce') is allowed"),
        ("shared_items=0", "shared_items is 0; it must be at least 1"),
        (
            "budget.baselines=[none,best]",
            "budget.baselines has ['best']; ['popularity', 'none', 'pooled', 'sasrec'] are allowed",
        ),
        ("model.num_layers=0", "model.num_layers is 0; it must be at least 1"),
        ("model.dim=-16", "model.dim is -16; it must be at least 1"),
        ("threads=0", "threads is 0; it must be at least 1"),
        ("budget.epochs=0", "budget.epochs is 0; it must be at least 1"),
        ("budget.max_users=0", "budget.max_users is 0; it must be at least 1"),
        ("budget.eval_users=0", "budget.eval_users is 0; it must be at least 1"),
        ("seed=-1", "seed is -1; it must be at least 0"),
        ("data.seed=-1", "data.seed is -1; it must be at least 0"),
        ("seed=9223372036854775808", "seed is 9223372036854775808; it must be at most"),
        ("threads=2000", "threads is 2000; it must be at most 1024"),
        ("learning_rate=nan", "learning_rate is nan; it must be at least 1e-12"),
        ("learning_rate=0", "learning_rate is 0.0; it must be at least 1e-12"),
        ("learning_rate=inf", "learning_rate is inf; it must be finite"),
        ("table_learning_rate=-0.1", "table_learning_rate is -0.1; it must be at least 1e-12"),
        ("table_learning_rate=inf", "table_learning_rate is inf; it must be finite"),
        ("weight_decay=-1", "weight_decay is -1.0; it must be at least 0"),
        ("weight_decay=nan", "weight_decay is nan; it must be at least 0"),
        ("precision=half", "precision is 'half'; one of ('float32', 'bfloat16') is allowed"),
        ("ema_decay=1", "ema_decay is 1.0; it must be at most 0.999999"),
        (
            "keep_best=auc",
            "keep_best is 'auc'; null or one of ['AUC', 'GAUC', 'HR@10', 'NDCG@10', 'NE'] is",
        ),
        ("patience=0", "patience is 0; it must be at least 1"),
        ("patience=2", "patience is 2, but keep_best is null; set keep_best to the metric that"),
        ("clip_norm=0", "clip_norm is 0.0; it must be at least 1e-12"),
        ("clip_norm=inf", "clip_norm is inf; it must be finite"),
        ("table_clip=-1", "table_clip is -1.0; it must be at least 1e-12"),
        ("warmup_steps=-1", "warmup_steps is -1; it must be at least 0"),
        ("checkpoint_seconds=nan", "checkpoint_seconds is nan; it must be at least 0"),
        ("checkpoint_seconds=-1", "checkpoint_seconds is -1.0; it must be at least 0"),
        ("model.dropout=1.5", "model.dropout is 1.5; it must be at most 0.99"),
        ("model.dropout=1", "model.dropout is 1.0; it must be at most 0.99"),
        ("model.dropout=-0.1", "model.dropout is -0.1; it must be at least 0"),
        ("model.dropout=nan", "model.dropout is nan; it must be at least 0"),
        ("model.top_mlp=[64,2]", "model.top_mlp is [64, 2]; its last width must be 1"),
        ("model.top_mlp=[]", "model.top_mlp is []; its last width must be 1"),
        ("model.top_mlp=[0,1]", "model.top_mlp is [0, 1]; each must be at least 1"),
        ("model.num_heads=0", "model.num_heads is 0; it must be at least 1"),
        ("model.recent=0", "model.recent is 0; it must be at least 1"),
        ("model.history=lstm", "model.history is 'lstm'; one of"),
        ("model.history=foo", "model.history is 'foo'; one of"),
        ("model.window=foo", "model.window is 'foo'; one of"),
        ("model.num_heads=5", "num_heads is 5; it must divide dim = 16"),
        ("model.candidate_tokens=0", "model.candidate_tokens is 0; it must be at least 1"),
        ("model.candidate_tokens=3", "model.candidate_tokens is 3; one of (1, 2) is allowed"),
        ("model.merge=0", "model.merge is 0; it must be at least 1"),
        ("model.num_globals=-1", "model.num_globals is -1; it must be at least 0"),
        ("+model.histories.buys=[steal]", "steal"),
        ("+model.histories.candidates=[buy]", "histories are ['history', 'candidates']"),
        ("model.max_history=0", "model.max_history is 0; it must be at least 1"),
        ("model.block=5", "block is 5; it must divide max_history = 32 events"),
        ("data.num_users=0", "data.num_users is 0; it must be at least 1"),
        ("data.events_per_user=0", "data.events_per_user is 0; it must be at least 1"),
        ("data.num_items=3", "num_items is 3; allowed: 6 or more"),
    ],
)
def test_a_value_that_cannot_work_is_named(override: str, message: str) -> None:
    """With ``batch_targets=0`` a run trained on the result of a division by zero."""
    assert message in refused("train", *WORLD, *TINY, override)


def numbers_of(schema: type[Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield path and key of every number, and every list of numbers, of a schema."""
    for one in fields(schema):
        kinds = get_type_hints(schema)[one.name]
        inner = [kinds, *get_args(kinds)]
        if is_dataclass(kinds):
            yield from numbers_of(kinds, f"{prefix}{one.name}.")
        elif {int, float} & set(inner):
            yield f"{schema.__name__}: {prefix}{one.name}", one.name


SCHEMAS = [
    kind
    for kind in vars(config).values()
    if isinstance(kind, type) and is_dataclass(kind) and kind.__module__ == config.__name__
] + [scenario.options for scenario in SCENARIO_BY_NAME.values()]


@pytest.mark.parametrize(
    ("path", "key"),
    sorted({number for schema in SCHEMAS for number in numbers_of(schema)}),
)
def test_every_number_of_every_config_has_a_least_value_and_is_finite(path: str, key: str) -> None:
    """``dropout=1.5`` and ``epochs=0`` failed late, and NaN passed some checks."""
    for value in (math.nan, -math.inf, config.LEAST_BY_KEY[key] - 1):
        with pytest.raises(ConfigError, match=f"{path} is .*; it must be at least"):
            config._check_number(path, value, value, key)
    too_much = config.MOST_BY_KEY.get(key, math.inf) + 1
    with pytest.raises(ConfigError, match=f"{path} is .*; it must be (at most|finite)"):
        config._check_number(path, too_much, too_much, key)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("history=longer", "model.merge=3"), "merge is 3; it must divide block = 8 events"),
        (("history=longer", "model.recent=12"), "recent is 12; it must be a multiple of block = 8"),
        (("history=longer", "model.window=sliding"), "longer has no sliding windows"),
        (("history=bidirectional", "model.window=sliding"), "bidirectional has no sliding windows"),
    ],
)
def test_sizes_that_do_not_fit_the_kind_are_named(overrides: tuple[str, ...], message: str) -> None:
    assert message in refused("train", *WORLD, *TINY, *overrides)


def test_gbce_is_refused_with_draws_that_it_does_not_calibrate() -> None:
    message = refused("train", *TINY, "next_event_loss=gbce", "shared_sampling=popularity")
    assert message == (
        "shared_sampling is popularity; next_event_loss=gbce calibrates uniform draws only"
    )


def test_tokens_are_one_or_one_for_every_column(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    rows = [f"u{row % 3},i{row % 4},{1000 + row},k{row % 2},m{row % 5}" for row in range(60)]
    log.write_text("\n".join(["user_id,item_id,time,kind,maker", *rows]))
    columns = ("data=interactions", f"data.path={log}", "data.columns.item_attributes=[kind,maker]")
    message = refused("train", *columns, *TINY, "model.candidate_tokens=2")
    assert "model.candidate_tokens is 2; one of (1, 3) is allowed" in message
    assert "['kind', 'maker']" in message


@pytest.mark.parametrize(
    ("pipeline", "overrides", "key"),
    [
        ("train", ("data=movielens",), "data.root"),
        ("train", ("data=online_retail",), "data.root"),
        ("make_requests", ("data=interactions",), "data.path"),
        ("train", ("data=prepared",), "data.path"),
        ("demo", ("data=interactions",), "data.path"),
        ("export", (), "run"),
        ("score", ("requests=a",), "artifact"),
        ("score", ("artifact=a",), "requests"),
    ],
)
def test_a_missing_value_is_named(pipeline: str, overrides: tuple[str, ...], key: str) -> None:
    assert refused(pipeline, *overrides) == f"{key} is missing; set {key}=…"


@pytest.mark.parametrize("group", ["data", "history", "budget"])
def test_an_unknown_option_is_named_with_the_known_ones(group: str) -> None:
    with pytest.raises(HydraException, match=rf"Could not find '{group}/nothing'[\s\S]*Available"):
        run_pipeline("train", f"{group}=nothing")


def test_an_unknown_name_of_data_is_named_with_the_known_ones() -> None:
    message = refused("train", "data.name=nothing")
    assert "data.name is 'nothing'" in message
    names = ["completejourney", "interactions", "movielens", "online_retail", "prepared"]
    assert str([*names, "synthetic"]) in message


@pytest.mark.parametrize(
    ("argument", "literal"),
    [
        ("data.label=rating>=4", "data.label='rating>=4'"),
        ("data.label=event==buy", "data.label='event==buy'"),
        ("data.label=event!=it's", r"data.label='event!=it\'s'"),
        ("output=/tmp/run (1)", "output='/tmp/run (1)'"),
        ("data.columns.user=Käufer", "data.columns.user='Käufer'"),
        # Values that Hydra can parse stay as they are.
        ('data.label="rating>=4"', 'data.label="rating>=4"'),
        ("model.top_mlp=[8,1]", "model.top_mlp=[8,1]"),
        ("data=movielens", "data=movielens"),
        ("~budget", "~budget"),
        ("--config-dir=/tmp/a>b", "--config-dir=/tmp/a>b"),
    ],
)
def test_a_value_that_hydra_cannot_parse_is_quoted(argument: str, literal: str) -> None:
    assert literal_overrides([argument]) == [literal]


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_a_pipeline_is_thin_and_shadows_no_standard_module(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) < 90
    assert path.stem not in sys.stdlib_module_names
    assert "@hydra.main(" in source
    assert "    run(main)\n" in source
    assert (CONFIGS / f"{path.stem}.yaml").is_file()


def test_a_budget_may_set_other_values_and_the_command_line_has_the_last_word() -> None:
    """The values of ``train.yaml`` came after those of a budget and undid them."""
    paper = composed("train", "budget=paper", "shared_items=77")
    assert (paper.split, paper.model.dropout, paper.shared_items) == ("leave_one_out", 0.2, 77)
    assert paper.model.num_layers == composed("train").model.num_layers
    assert composed("train").split == "time_share"

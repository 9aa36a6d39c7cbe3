"""The registry of scenarios, and those that draw a model and time it, at small sizes."""

import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from pipelines.benchmark import main
from torchrec_kvshare.benchmark import timing
from torchrec_kvshare.benchmark.baselines import attention_forms
from torchrec_kvshare.benchmark.cost_model import Rates, attend_cost, prefill_cost
from torchrec_kvshare.benchmark.options import ModelSizes, Options
from torchrec_kvshare.benchmark.paths import Paths
from torchrec_kvshare.benchmark.results import Record
from torchrec_kvshare.benchmark.run import SCENARIO_BY_NAME, measure
from torchrec_kvshare.benchmark.scenarios import (
    attention,
    catalogue,
    items,
    throughput_drop,
    training,
)
from torchrec_kvshare.benchmark.workload import draw_requests, fill_zeros
from torchrec_kvshare.config import checked
from torchrec_kvshare.errors import ConfigError, ParityError
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.history.kinds import BIDIRECTIONAL, KINDS
from torchrec_kvshare.model.bags import user_candidate_bags
from torchrec_kvshare.model.collection import kvshare_collection
from torchrec_kvshare.model.ranking import RankingModel

compiled = throughput_drop.compiled
ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
DOCS = [
    ROOT / "README.md",
    # design.md adds a scenario that does not exist.
    *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.stem != "design"),
]
# The name of a scenario, and what is set for it.
COMMAND = re.compile(r"(?:`|pipelines\.benchmark\s+)scenario=(\w+)((?:\s+'?[\w.]+=[^\s`)]+)*)")
DIM, NUM_LAYERS, NUM_HEADS, PAGE_SIZE = 12, 2, 3, 8
HISTORY, LONG_HISTORY = 16, 40  # events
CANDIDATES = [2, 5]
SEED = 3
SIZES = ModelSizes(dim=DIM, num_layers=NUM_LAYERS, num_heads=NUM_HEADS)
# Values for scenarios that have the key.
SMALL = {
    "histories": [HISTORY],
    "long_histories": [LONG_HISTORY],
    "candidates": CANDIDATES,
    "merged_max_candidates": 2,
    "merged_chunk_rows": [64],
    "dim": DIM,
    "num_heads": NUM_HEADS,
    "page_size": PAGE_SIZE,
    "seed": SEED,
}
NEEDED = {"codec": ["artifact=a"], "tables": ["run=a"]}
RAGGED_USERS = ((5, 4), (16, 1), (30, 7))
# Of each turn; by default a scenario takes a quarter of a second for every path.
ROUND_MS = 0.01
RATES = Rates(flop_per_s=7e9, exponentials_per_s=3e8, bytes_per_s=5e9)
PREFIX_KINDS = ["causal", "target_only", "hstu"]
CATALOGUES = (50, 90)
OTHER_WAYS = ("kv_repeated", "one_sequence_mask", "flex_attention")


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Short turns and small constants; a test of its own compiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "ROUND_MS", ROUND_MS)
        patch.setattr(attention, "RAGGED_USERS", RAGGED_USERS)
        patch.setattr(attention, "measure_rates", lambda: RATES)
        patch.setattr(attention, "compiled_flex", attention_forms.sdpa_with_mask)
        patch.setattr(throughput_drop, "CASES", (("longer", LONG_HISTORY), ("causal", HISTORY)))
        patch.setattr(throughput_drop, "DIM", DIM)
        patch.setattr(throughput_drop, "DENSE_ARCH", [20, DIM])
        patch.setattr(throughput_drop, "OVER_ARCH", [14, 1])
        patch.setattr(throughput_drop, "DCN_RANK", 6)
        patch.setattr(throughput_drop, "NUM_IDS", 30)
        patch.setattr(throughput_drop, "compiled", lambda graph, _inputs, _schema: graph)
        patch.setattr(catalogue, "NUM_ITEMS", CATALOGUES)
        yield


def small_values(scenario: str) -> dict[str, Any]:
    keys = {one.name for one in fields(SCENARIO_BY_NAME[scenario].options)}
    return {key: value for key, value in SMALL.items() if key in keys}


def measured_with(scenario: str, **change: Any) -> list[Record]:
    """Measure a small causal model."""
    causal = {} if scenario == "throughput_drop" else {"encoders": ["causal"]}
    values = small_values(scenario) | causal | change
    return measure(scenario, SCENARIO_BY_NAME[scenario].options(**values))


class Measured(NamedTuple):
    """A scenario measured through its pipeline."""

    records: list[dict[str, Any]]
    folder: Path
    printed: str


VALUES_BY_SCENARIO: dict[str, dict[str, Any]] = {
    "attention": {"encoders": [*KINDS]},
    "throughput_drop": {},
    "training": {"encoders": PREFIX_KINDS, "histories": [LONG_HISTORY]},
    "catalogue": {},
    "items": {"encoders": [*KINDS], "num_tokens": 2},
    "append": {"encoders": [*KINDS], "histories": [LONG_HISTORY]},
}
Run = Callable[[str], Measured]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, small: None) -> Run:
    """The results of a scenario, measured once."""
    measured_by_scenario: dict[str, Measured] = {}

    def measured(scenario: str) -> Measured:
        if scenario not in measured_by_scenario:
            folder = tmp_path_factory.mktemp(scenario) / "results"
            values = small_values(scenario) | VALUES_BY_SCENARIO[scenario]
            overrides = [f"{key}={value}".replace("'", "") for key, value in values.items()]
            with pytest.MonkeyPatch.context() as patch:
                printed: list[str] = []
                patch.setattr("builtins.print", printed.append)
                main(composed(scenario, f"output={folder}", *overrides))
            records = json.loads((folder / "results.json").read_text())["records"]
            measured_by_scenario[scenario] = Measured(records, folder, "\n".join(printed))
        return measured_by_scenario[scenario]

    return measured


def composed(scenario: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("benchmark", [f"scenario={scenario}", *overrides])


def values(records: list[dict[str, Any]], metric: str) -> dict[tuple[str, str, int, Any], float]:
    """Figures by encoder, path, history and candidates."""
    found = {}
    for record in records:
        case = record["case"]
        if record["metric"] == metric:
            key = (case["encoder"], case["path"], case["history"], case.get("candidates"))
            assert key not in found
            found[key] = record["value"]
    return found


def units(records: list[dict[str, Any]]) -> dict[str, str]:
    found = {record["metric"]: record["unit"] for record in records}
    assert all(found[record["metric"]] == record["unit"] for record in records)
    return found


def skewed(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a path that is wrong in one number."""

    def wrong(*arguments: Any, **named: Any) -> Tensor:
        result = call(*arguments, **named).clone()
        result.view(-1)[-1] += 1e-3
        return result

    return wrong


# --- configs


@pytest.mark.parametrize("name", SCENARIO_BY_NAME)
def test_the_config_of_a_scenario_has_the_options_and_their_defaults(name: str) -> None:
    """A key that a scenario did not read was accepted and ignored."""
    schema = SCENARIO_BY_NAME[name].options
    composed_config = composed(name, "output=nowhere", *NEEDED.get(name, []))
    assert set(composed_config) == {one.name for one in fields(schema)}
    options: Any = checked(composed_config, schema)
    assert options.scenario == name
    given = {"output", "scenario", "data", "budget", "artifact", "run"} & set(composed_config)
    assert options == schema(**{key: getattr(options, key) for key in given})


def test_every_scenario_has_a_config() -> None:
    assert {path.stem for path in (CONFIGS / "scenario").iterdir()} == set(SCENARIO_BY_NAME)


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_commands_in_the_docs_take_keys_of_their_scenario(path: Path) -> None:
    for name, given in COMMAND.findall(path.read_text()):
        schema = SCENARIO_BY_NAME[name].options
        keys = {pair.strip("'").partition("=")[0].partition(".")[0] for pair in given.split()}
        assert keys <= {one.name for one in fields(schema)}, (name, given)


def test_no_scenario_imports_another() -> None:
    folder = Path(attention.__file__).parent
    for path in folder.glob("*.py"):
        assert "benchmark.scenarios" not in path.read_text(), path


def test_an_unknown_scenario_in_a_call_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'speed'; one of \['ahead', .*, 'training'\]"):
        measure("speed", Options())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repeats": 4}, "repeats is 4; a median needs at least"),
        ({"candidates": []}, r"candidates is \[\]; at least one number is needed"),
        ({"merged_chunk_rows": []}, r"merged_chunk_rows is \[\]; at least one"),
        ({"encoders": ["causal", "lstm"]}, r"encoders has \['lstm'\]; \('causal', "),
    ],
)
def test_options_that_cannot_work_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attention.AttentionOptions(**change)


# --- what all have in common


@pytest.mark.parametrize("scenario", list(VALUES_BY_SCENARIO))
def test_records_have_sizes_and_are_all_printed_and_on_tensorboard(run: Run, scenario: str) -> None:
    records, folder, printed = run(scenario)
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    for record in records:
        case = record["case"]
        assert record["scenario"] == scenario
        assert record["value"] == record["value"]
        encoder, history = case.get("encoder", "-"), case.get("history", 0)
        if encoder != "-":
            assert (case["dim"], case["layers"], case["heads"]) == (DIM, NUM_LAYERS, NUM_HEADS)
            assert case["tokens"] == (2 if scenario == "items" else 1)
        tag = f"{scenario}/{encoder}/history_{history}/{record['metric']}/{case['path']}"
        tag += f"/runtime_{case['runtime']}" if "runtime" in case else ""
        points = {point.step: point.value for point in events.Scalars(tag)}
        assert points[case.get("candidates", 0)] == pytest.approx(record["value"], rel=1e-6)
        line = [encoder, str(case.get("history", "-")), str(case.get("candidates", "all"))]
        assert [*line, case["path"]] in [row.split()[:4] for row in printed.splitlines()]
    assert list(folder.glob("*.png")) == []


# --- attention


def test_attention_measures_every_encoder_and_for_causal_the_other_ways(run: Run) -> None:
    records = run("attention").records
    assert units(records) == {
        "gflop_per_s": "GFLOP/s",
        "gexp_per_s": "1e9/s",
        "gbyte_per_s": "GB/s",
        "latency_ms": "ms",
        "fraction_of_gemm_peak": "x",
        "fraction_of_roofline": "x",
        "speedup": "x",
        "time_over_alone": "x",
    }
    latencies = values(records, "latency_ms")
    expected = {
        (encoder, path, history, queue)
        for encoder in KINDS
        for path in ("prefill", "attend", "shared")
        for history in (HISTORY, LONG_HISTORY)
        for queue in CANDIDATES
    }
    others = {
        ("causal", path, history, queue)
        for path in OTHER_WAYS
        for history in (HISTORY, LONG_HISTORY)
        for queue in CANDIDATES
    }
    # merged_max_candidates is 2, and long histories are not measured without sharing.
    merged_too = {("causal", "uncached_merged", HISTORY, 2)}
    together = [sum(column) for column in zip(*RAGGED_USERS, strict=True)]
    ragged = {(encoder, "ragged", *together) for encoder in KINDS}
    assert set(latencies) == expected | others | merged_too | ragged
    assert min(latencies.values()) > 0
    assert set(values(records, "speedup")) == others | merged_too
    assert set(values(records, "time_over_alone")) == ragged


def test_speedups_of_attention_are_over_the_time_of_shared(run: Run) -> None:
    records = run("attention").records
    latencies = values(records, "latency_ms")
    for (encoder, path, history, queue), speedup in values(records, "speedup").items():
        shared = latencies[encoder, "shared", history, queue]
        assert speedup == pytest.approx(latencies[encoder, path, history, queue] / shared)


def test_fractions_of_peak_and_roofline_are_those_of_the_cost_model(run: Run) -> None:
    records = run("attention").records
    latencies = values(records, "latency_ms")
    peaks = values(records, "fraction_of_gemm_peak")
    rooflines = values(records, "fraction_of_roofline")
    cases = {key for key in latencies if key[1] in ("prefill", "attend")}
    assert set(peaks) == set(rooflines) == cases
    for key in cases:
        encoder, path, history, queue = key
        spec = SIZES.spec(encoder, history)
        cost = attend_cost(spec, history, queue)
        if path == "prefill":
            cost = prefill_cost(spec, history)
        assert peaks[key] == pytest.approx(cost.flop / RATES.flop_per_s * 1e3 / latencies[key])
        assert rooflines[key] == pytest.approx(RATES.roofline_ms(cost) / latencies[key])
        assert peaks[key] <= rooflines[key]
    [peak] = [record["value"] for record in records if record["metric"] == "gflop_per_s"]
    assert peak == pytest.approx(7.0)


def test_ragged_time_is_over_that_of_its_users_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def medians(calls: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, float]:
        assert repeats == 5
        return {path: 3.0 if path == "ragged" else 2.0 for path in calls}

    monkeypatch.setattr(attention, "interleaved_medians", medians)
    records = measured_with("attention", histories=[], long_histories=[])
    by_metric = {record.metric: record for record in records if record.case["path"] == "ragged"}
    assert by_metric["latency_ms"].value == 3.0
    assert by_metric["time_over_alone"].value == 3.0 / 6.0
    assert by_metric["latency_ms"].case["users"] == 3


def test_other_ways_are_left_out_with_more_than_one_token() -> None:
    records = measured_with("attention", long_histories=[], candidates=[2], num_tokens=3)
    paths = {record.case["path"] for record in records}
    assert paths == {"gemm_peak", "prefill", "attend", "shared", "ragged"}


@pytest.mark.parametrize(
    ("module", "name", "path"),
    [
        (attention, "repeat_kv", "kv_repeated"),
        (attention, "pool_without_sharing", "uncached_merged"),
        (attention, "shared", "attend"),
    ],
)
def test_a_way_that_computes_something_else_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, path: str
) -> None:
    monkeypatch.setattr(module, name, skewed(getattr(module, name)))
    with pytest.raises(ParityError, match=rf"{path} differs by 0\.00.* from shared"):
        measured_with("attention", candidates=[2])


@pytest.mark.parametrize(
    ("maker", "path"),
    [("sdpa_with_mask", "one_sequence_mask"), ("compiled_flex", "flex_attention")],
)
def test_a_mask_without_the_time_bias_is_found_out(
    monkeypatch: pytest.MonkeyPatch, maker: str, path: str
) -> None:
    make = getattr(attention, maker)

    def unbiased(tower: Any, elapsed: Tensor, count: int) -> Any:
        return make(tower, torch.zeros_like(elapsed), count)

    monkeypatch.setattr(attention, maker, unbiased)
    with pytest.raises(ParityError, match=f"{path} differs by"):
        measured_with("attention", candidates=[2])


def test_a_ragged_batch_whose_users_are_mixed_up_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attend = attention.attend

    def turned(tower: Any, tokens: Any, kv: Tensor) -> Tensor:
        vectors = attend(tower, tokens, kv)
        return vectors.flip(0) if len(tokens.lengths) > 1 else vectors

    monkeypatch.setattr(attention, "attend", turned)
    with pytest.raises(ParityError, match="ragged differs by"):
        measured_with("attention", histories=[], long_histories=[])


def test_no_number_is_no_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    repeat_kv = attention_forms.repeat_kv
    monkeypatch.setattr(attention, "repeat_kv", lambda *a: repeat_kv(*a) * torch.nan)
    with pytest.raises(ParityError, match="kv_repeated differs by nan"):
        measured_with("attention")


@torch.no_grad()
def flex_and_shared(num_layers: int, history: int) -> tuple[Tensor, Tensor]:
    """Return the vectors of one user by FlexAttention and by shared attention."""
    spec = ModelSizes(dim=DIM, num_layers=num_layers, num_heads=NUM_HEADS).spec("causal")
    tower = attention.make_tower(spec, history, SEED)
    tokens = attention.draw_tokens(spec, [history], [5], SEED)
    flex = attention_forms.compiled_flex(tower, tokens.elapsed[0], 5)
    candidates = tokens.candidates.squeeze(1)
    vectors = attention_forms.one_sequence(tower, tokens.events, candidates, flex)
    return vectors, attention.shared(tower, tokens)


def test_flex_attention_gives_the_vectors_of_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    # Compiling takes many seconds per layer; here only the masks are tested.
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **given: compiled(f, **given) if given else f)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        vectors, shared = flex_and_shared(3, LONG_HISTORY)
    torch.testing.assert_close(vectors, shared, rtol=0, atol=attention.TOLERANCE)


def test_flex_attention_compiles_at_one_size_after_another() -> None:
    """The second size was compiled with dynamic sizes, and inductor's C++ did not build."""
    for history in (HISTORY, LONG_HISTORY):
        vectors, shared = flex_and_shared(1, history)
        torch.testing.assert_close(vectors, shared, rtol=0, atol=attention.TOLERANCE)


@torch.no_grad()
def test_copies_of_the_kv_in_several_parts_are_those_in_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = SIZES.spec("causal")
    tower = attention.make_tower(spec, HISTORY, SEED)
    tokens = attention.draw_tokens(spec, [HISTORY], [7], SEED)
    given = (tower, tokens.events, tokens.candidates.squeeze(1), tokens.elapsed[0])
    whole = attention_forms.repeat_kv(*given)
    monkeypatch.setattr(attention_forms, "REPEATED_AT_A_TIME", 3)
    torch.testing.assert_close(attention_forms.repeat_kv(*given), whole)


# --- throughput_drop


def test_throughput_drop_is_against_both_models_without_the_history(run: Run) -> None:
    everything = run("throughput_drop").records
    drops = throughput_drop.DROP_BY_BASELINE
    assert units(everything) == {"latency_ms": "ms"} | dict.fromkeys(drops.values(), "%")
    cases = [("longer", LONG_HISTORY), ("causal", HISTORY)]
    for runtime, paths in (
        ("eager", {"request_shared", "cross_request_hit", "uncached_merged"}),
        ("pt2", {"cross_request_hit"}),
    ):
        records = [one for one in everything if one["case"]["runtime"] == runtime]
        latencies = values(records, "latency_ms")
        assert set(latencies) == {
            (encoder, path, history, queue)
            for encoder, history in cases
            for path in {*paths, *drops}
            for queue in CANDIDATES
        }
        for baseline, metric in drops.items():
            lost = values(records, metric)
            assert {path for _, path, _, _ in lost} == paths
            assert len(lost) == len(cases) * len(paths) * len(CANDIDATES)
            for (encoder, path, history, queue), drop in lost.items():
                plain = latencies[encoder, baseline, history, queue]
                with_history = latencies[encoder, path, history, queue]
                # Throughput is 1 / latency.
                assert drop == pytest.approx(100 * (1 / plain - 1 / with_history) / (1 / plain))


@torch.no_grad()
def test_a_compiled_baseline_scores_as_the_eager_one() -> None:
    schema = throughput_drop.mlperf_schema(HISTORY, throughput_drop.POOLED_HISTORY)
    model = fill_zeros(throughput_drop.dlrm_dcn(user_candidate_bags(schema, DIM), schema)).eval()
    ranker = throughput_drop.dlrm_dcn(
        kvshare_collection(schema, SIZES.spec("causal", HISTORY)), schema
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(throughput_drop, "compiled", compiled)
        graph = throughput_drop.compiled_baseline(model, Paths(schema, ranker, PAGE_SIZE), schema)
    for request in draw_requests(schema, [1, 7], user=0, seed=SEED):
        pooled = throughput_drop.with_pooled_history(request)
        expected = throughput_drop.score_plain(model, pooled, schema)
        got = throughput_drop.score_compiled(graph, pooled, schema)
        torch.testing.assert_close(got, expected, rtol=0.0, atol=2e-5)
        alone = throughput_drop.score_plain(model, request, schema)
        assert not torch.allclose(alone, expected, atol=1e-3)  # It reads the history.


def test_a_hit_that_scores_otherwise_has_no_throughput(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Paths, "cross_request_hit", skewed(Paths.cross_request_hit))
    with pytest.raises(ParityError, match=r"cross_request_hit logits differ by 0\.00"):
        measured_with("throughput_drop")


def test_mlperf_has_26_sparse_and_13_dense_features() -> None:
    schema = throughput_drop.mlperf_schema(HISTORY)
    configs = user_candidate_bags(schema, DIM).embedding_bag_configs()
    assert sum(len(config.feature_names) for config in configs) == 26
    assert schema.num_dense == 13


# --- catalogue


def test_a_catalogue_is_trained_on_and_ranked_at_each_size(run: Run) -> None:
    records = run("catalogue").records
    assert units(records) == {"latency": "ms", "ratio_to_smallest": "x"}
    latency_ms = values(records, "latency")
    assert set(latency_ms) == {
        ("causal", path, HISTORY, num_items)
        for path in (
            *("training_step", "training_step_next_event"),
            *("rank_item_behind", "rank_first_item"),
        )
        for num_items in CATALOGUES
    }
    for (encoder, path, history, num_items), ratio in values(records, "ratio_to_smallest").items():
        smallest = latency_ms[encoder, path, history, CATALOGUES[0]]
        assert ratio == pytest.approx(latency_ms[encoder, path, history, num_items] / smallest)


# --- training


def test_training_counts_targets_and_their_ratio(run: Run) -> None:
    records = run("training").records
    assert units(records) == {"targets_per_s": "1/s", "speedup": "x"}
    rates = values(records, "targets_per_s")
    assert set(rates) == {
        (encoder, path, LONG_HISTORY, 5)
        for encoder in PREFIX_KINDS
        for path in ("whole_windows", "row_per_candidate")
    }
    for (encoder, path, history, queue), speedup in values(records, "speedup").items():
        assert path == "whole_windows"
        rows = rates[encoder, "row_per_candidate", history, queue]
        assert speedup == pytest.approx(rates[encoder, path, history, queue] / rows)


def test_targets_per_second_count_only_what_was_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    def medians(calls: dict[str, Callable[[], None]], _: int) -> dict[str, float]:
        for call in calls.values():
            call()
        return {"whole_windows": 8.0, "row_per_candidate": 20.0}

    monkeypatch.setattr(training, "interleaved_medians", medians)
    # Every second of the window's 40 events is trained one row per candidate.
    records = measured_with("training", histories=[40])
    assert [(record.case["path"], record.metric, record.value) for record in records] == [
        ("whole_windows", "targets_per_s", 5000.0),
        ("row_per_candidate", "targets_per_s", 1000.0),
        ("whole_windows", "speedup", 5.0),
    ]


def test_a_row_with_another_history_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(raw: dict[str, Any], schema: Any) -> Any:
        if str(raw["user_id"]).startswith("row"):
            backwards = raw["history"]["item_id"][::-1]
            raw = raw | {"history": raw["history"] | {"item_id": backwards}}
        return parse_request(raw, schema)

    monkeypatch.setattr(training, "parse_request", mistaken)
    message = r"row_per_candidate logits differ by .* from whole_windows"
    with pytest.raises(ParityError, match=message):
        measured_with("training")


def test_both_ways_to_train_give_every_weight_the_same_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With every target sampled the two losses are equal."""
    gradients: list[dict[str, Tensor]] = []

    def medians(calls: dict[str, partial[None]], _: int) -> dict[str, float]:
        for call in calls.values():
            call()
            parameters = call.args[0].named_parameters()
            gradients.append({n: p.grad.clone() for n, p in parameters if p.grad is not None})
        return dict.fromkeys(calls, 1.0)

    monkeypatch.setattr(training, "interleaved_medians", medians)
    measured_with("training", histories=[9])
    whole, rows = gradients
    assert set(whole) == set(rows)
    assert any(name.endswith("time_bias") for name in whole)
    for name, gradient in whole.items():
        # float32 sums of up to 0.4 in another order; worst of 100 seeds 3.0e-8.
        torch.testing.assert_close(rows[name], gradient, rtol=0, atol=1.5e-7, msg=name)


# --- items


def test_items_compares_hits_with_and_without_the_item_cache(run: Run) -> None:
    records = run("items").records
    assert units(records) == {"latency_ms": "ms", "speedup": "x"}
    latencies = values(records, "latency_ms")
    assert set(latencies) == {
        (encoder, path, HISTORY, queue)
        for encoder in KINDS
        for path in ("without_items", "with_items")
        for queue in CANDIDATES
    }
    speedups = values(records, "speedup")
    assert {path for _, path, _, _ in speedups} == {"with_items"}
    assert len(speedups) == len(KINDS) * len(CANDIDATES)
    for (encoder, path, history, queue), speedup in speedups.items():
        without = latencies[encoder, "without_items", history, queue]
        assert speedup == pytest.approx(without / latencies[encoder, path, history, queue])


def test_items_are_kept_when_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    caches = []

    class Watched(items.ItemCache):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            caches.append(self)

    monkeypatch.setattr(items, "ItemCache", Watched)
    measured_with("items", candidates=[5])
    [cache] = caches
    # Unknown items are never kept; one in 10,000 of the drawn items is unknown.
    assert cache.num_misses == 5
    assert cache.num_hits >= 5 * 5


def test_an_item_cache_that_gives_other_rows_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(items.ItemCache):
        def project(self, *arguments: Any) -> list[Tensor]:
            return [whole.flip(0) for whole in super().project(*arguments)]

    monkeypatch.setattr(items, "ItemCache", Wrong)
    with pytest.raises(ParityError, match=r"with_items scores differ by .* from without_items"):
        measured_with("items")


# --- append


def test_append_measures_every_kind_that_extends(run: Run) -> None:
    records = run("append").records
    assert units(records) == {"latency_ms": "ms", "share_of_prefill": "x"}
    latencies = values(records, "latency_ms")
    extending = [kind for kind in KINDS if kind != BIDIRECTIONAL]
    assert set(latencies) == {
        (encoder, path, LONG_HISTORY, None)
        for encoder in extending
        for path in ("prefill", "extend", "digest", "lookup_expand")
    }
    shares = values(records, "share_of_prefill")
    assert set(shares) == {(encoder, "extend", LONG_HISTORY, None) for encoder in extending}
    for (encoder, path, history, _), share in shares.items():
        prefill = latencies[encoder, "prefill", history, None]
        assert share == pytest.approx(latencies[encoder, path, history, None] / prefill)


def test_an_extension_that_is_no_prefill_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    extend = RankingModel.extend

    def wrong(*arguments: Any) -> list[Tensor]:
        return [kv + 1e-4 for kv in extend(*arguments)]

    monkeypatch.setattr(RankingModel, "extend", wrong)
    with pytest.raises(ParityError, match="extended K/V of causal differs by"):
        measured_with("append", histories=[LONG_HISTORY])


def test_append_measures_another_runtime() -> None:
    records = measured_with("append", histories=[LONG_HISTORY], runtime="torchscript")
    assert {record.case["runtime"] for record in records} == {"torchscript"}
    with pytest.raises(ConfigError, match=r"runtime is 'onnx'; \['eager', 'torchscript', 'pt2'\]"):
        measured_with("append", histories=[LONG_HISTORY], runtime="onnx")

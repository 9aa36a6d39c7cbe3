"""The dashboard queries names and labels that a real server exports, and every metric."""

import json
import re
import time
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serving.servers import BreakingLoader, EagerLoader, local_server
from tests.worlds import ROOT, draw_raw
from torchrec_kvshare.cache import reasons
from torchrec_kvshare.cache.exporters import PREFIX
from torchrec_kvshare.cache.metrics import DECLARED_BY_NAME
from torchrec_kvshare.config import ServerConfig
from torchrec_kvshare.export.artifact import MANIFEST
from torchrec_kvshare.serving.metrics import OUTCOMES, PARSE, QUEUE, SCORING, ServerMetrics
from torchrec_kvshare.serving.models import Models

DASHBOARD = json.loads((ROOT / "docs" / "grafana.json").read_text(encoding="utf-8"))
ROWS = [panel for panel in DASHBOARD["panels"] if panel["type"] == "row"]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = {one["name"]: one for one in DASHBOARD["templating"]["list"]}
GRID_WIDTH = 24

NOT_SHOWN = {
    "kvshare_cache_forgotten_bytes": "rare, and its answer says it",
}

# Prometheus adds it to whatever it reads.
TARGET_LABELS = {"instance"}
# Of a metric's type in the text format, how the names of its samples end.
SUFFIXES_BY_TYPE = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_count", "_sum"),
}
PROMQL_WORDS = {
    *("sum", "max", "count", "rate", "increase", "histogram_quantile", "or", "vector"),
}
# Ids of Grafana's formats; one that it does not know is shown as a suffix.
UNITS = {"none", "short", "reqps", "ops", "percentunit", "s", "bytes", "Bps", "sci"}
VALUES_BY_METRIC_AND_LABEL = {
    ("kvshare_requests_total", "outcome"): {*OUTCOMES},
    ("kvshare_stage_seconds", "stage"): {PARSE, QUEUE, SCORING},
    ("kvshare_cache_lookups_total", "outcome"): {reasons.HIT},
    ("kvshare_cache_events_total", "source"): {"cached", "computed"},
}

SELECTOR = re.compile(r"(kvshare_\w+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"')
GROUPING = re.compile(r"\bby\s*\(([^)]*)\)")
VARIABLE = re.compile(r"\$\{?(\w+)\}?")
LEGEND_LABEL = re.compile(r"\{\{\s*(\w+)\s*\}\}")
WORD = re.compile(r"[a-zA-Z_]\w*")


class Target(NamedTuple):
    """A query of a panel."""

    panel: str
    expr: str
    legend: str

    @property
    def selectors(self) -> list[tuple[str, dict[str, str]]]:
        """Names of samples, each with what its labels are matched with."""
        found = SELECTOR.findall(self.expr)
        return [(name, dict(MATCHER.findall(inside))) for name, inside in found]

    @property
    def groupings(self) -> list[set[str]]:
        """Labels that are left by each ``by (...)``."""
        return [{*WORD.findall(inside)} for inside in GROUPING.findall(self.expr)]


TARGETS = [
    Target(panel["title"], target["expr"], target["legendFormat"])
    for panel in PANELS
    for target in panel["targets"]
]


def texts_of_a_server() -> Iterator[str]:
    """Metrics after hits, misses, errors and a stream, once answers were checked."""
    with local_server(EagerLoader(), timeout_ms=60_000.0, shadow_share=1.0) as server:
        raw = draw_raw(7, 3, 1)
        assert server.rank(raw)[1]["cache"]["status"] == "miss"
        assert server.rank(raw)[1]["cache"]["status"] == "hit"
        assert server.rank(b"{")[0] == 400
        assert server.ask("POST", "/v1/prefetch", raw)[0] == 202
        assert server.ask("POST", "/v1/rank?model=another", raw)[0] == 404
        group = json.dumps({"candidates": raw["candidates"]})
        body = f"{json.dumps(draw_raw(5, 2, 2))}\n{group}\n".encode()
        assert "event: end" in server.ask("POST", "/v1/rank?stream=1", body)[1]
        deadline = time.monotonic() + 60.0
        while server.ask("GET", "/v1/state")[1]["parity"]["checks"] == 0:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        yield server.ask("GET", "/metrics")[1]


def text_of_a_watched_folder(folder: Path) -> str:
    """Metrics of a folder of models with one broken version."""
    for version in ("1", "99"):
        (folder / "kvshare" / version).mkdir(parents=True)
        (folder / "kvshare" / version / MANIFEST).write_text("{}")
    loader = BreakingLoader()
    metrics = ServerMetrics(loader.metrics)
    Models(loader.load, metrics, num_hot=0, hot_bytes=0).refresh(folder)
    return metrics.text().decode()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*texts_of_a_server(), text_of_a_watched_folder(tmp_path_factory.mktemp("models"))]


@pytest.fixture(scope="module")
def labels_by_name(texts: list[str]) -> dict[str, set[str]]:
    """Labels of each sample that the server may export, with those of Prometheus.

    A family without a sample shows no labels; the cache's are declared in one table.
    """
    found: dict[str, set[str]] = {}
    for family in (family for text in texts for family in text_string_to_metric_families(text)):
        declared = DECLARED_BY_NAME.get(family.name.removeprefix(f"{PREFIX}_"))
        for suffix in SUFFIXES_BY_TYPE[family.type]:
            labels = found.setdefault(family.name + suffix, {*TARGET_LABELS})
            if declared is not None and family.name.startswith(PREFIX):
                labels |= {*declared.labels}
            if suffix == "_bucket":
                labels.add("le")
        for sample in family.samples:
            found[sample.name] |= {*sample.labels}
    return found


def left_labels(target: Target, labels_by_name: Mapping[str, set[str]]) -> set[str]:
    """Labels that the answer to a query has."""
    if target.groupings:
        eaten = {"le"} if "histogram_quantile" in target.expr else set()
        return set.intersection(*target.groupings) - eaten
    if re.search(r"\b(sum|max|count)\b", target.expr):
        return set()
    return set().union(*(labels_by_name[name] for name, _ in target.selectors))


def test_the_server_was_asked_for_all_that_is_labelled(texts: list[str]) -> None:
    """Or a label could be missing from what the dashboard is held against."""
    unlabelled = {"kvshare_batch_requests", "kvshare_batch_candidates"}
    unlabelled |= {"kvshare_queue_requests", "kvshare_streams_open", "kvshare_not_finite_scores"}
    unlabelled |= {"kvshare_connections_open", "kvshare_calls_open", "kvshare_inflight_bytes"}
    unlabelled |= {"kvshare_prefetches_waiting", "kvshare_pinned_users"}
    families = [family for text in texts for family in text_string_to_metric_families(text)]
    names = {one.name for one in families if one.name.startswith("kvshare_")}
    own = {name for name in names if not name.startswith(PREFIX)}
    labelled = {one.name for one in families for sample in one.samples if {*sample.labels} - {"le"}}
    assert own - labelled == {*unlabelled, *(f"{name}_created" for name in unlabelled)} & own


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.panel)
def test_a_query_names_what_the_server_tells(
    target: Target, labels_by_name: dict[str, set[str]]
) -> None:
    assert {name for name, _ in target.selectors} <= labels_by_name.keys()
    words = re.sub(r'"[^"]*"|\[[^]]*\]|\$\w+', "", target.expr)
    words = SELECTOR.sub("", GROUPING.sub("", words))
    assert {*WORD.findall(words)} <= PROMQL_WORDS
    for name, matchers in target.selectors:
        assert matchers.keys() <= labels_by_name[name]
        for grouping in target.groupings:
            assert grouping <= labels_by_name[name]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.panel)
def test_a_legend_names_labels_that_its_query_leaves(
    target: Target, labels_by_name: dict[str, set[str]]
) -> None:
    assert {*LEGEND_LABEL.findall(target.legend)} <= left_labels(target, labels_by_name)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.panel)
def test_a_query_keeps_to_the_models_and_replicas_that_are_chosen(
    target: Target, labels_by_name: dict[str, set[str]]
) -> None:
    for name, matchers in target.selectors:
        for label in {"model", "instance"} & labels_by_name[name]:
            assert matchers.pop(label) == f"${label}"
        for label, pattern in matchers.items():
            values = {*pattern.split("|")}
            assert values <= VALUES_BY_METRIC_AND_LABEL[name, label]
    assert {*VARIABLE.findall(target.expr)} <= VARIABLES.keys() | {"__rate_interval"}


def test_every_metric_is_seen_or_has_a_reason_not_to_be(texts: list[str]) -> None:
    named = {name for target in TARGETS for name, _ in target.selectors}
    told, seen = set(), set()
    for text in texts:
        for family in text_string_to_metric_families(text):
            # When a series began; Prometheus' own affair.
            if family.name.startswith("kvshare_") and not family.name.endswith("_created"):
                told.add(family.name)
                if named & {family.name + suffix for suffix in SUFFIXES_BY_TYPE[family.type]}:
                    seen.add(family.name)
    assert told - seen == NOT_SHOWN.keys()


def test_every_panel_says_what_it_shows_and_in_which_unit() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len({*ids})
    titles = [panel["title"] for panel in DASHBOARD["panels"]]
    assert all(titles)
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        assert re.fullmatch(r"[A-Z].*[^.]\.", panel["description"]), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        refs = [target["refId"] for target in panel["targets"]]
        assert refs
        assert len(refs) == len({*refs}), panel["title"]


def test_panels_do_not_overlap_and_rows_are_full() -> None:
    panel_by_cell: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        x, y, width, height = (panel["gridPos"][key] for key in "xywh")
        assert 0 <= x < x + width <= GRID_WIDTH, panel["title"]
        for cell in product(range(x, x + width), range(y, y + height)):
            assert cell not in panel_by_cell, (panel["title"], panel_by_cell[cell])
            panel_by_cell[cell] = panel["title"]
    num_lines = max(y for _, y in panel_by_cell) + 1
    assert len(panel_by_cell) == GRID_WIDTH * num_lines
    assert all(row["gridPos"]["w"] == GRID_WIDTH for row in ROWS)


def test_prometheus_is_the_readers_choice() -> None:
    def sources(value: Any) -> Iterator[Any]:
        if isinstance(value, dict):
            yield from (found for key, found in value.items() if key == "datasource")
        parts = value.values() if isinstance(value, dict) else value
        if isinstance(parts, str) or not hasattr(parts, "__iter__"):
            return
        for part in parts:
            yield from sources(part)

    found = [*sources(DASHBOARD)]
    assert len(found) > len(PANELS)
    assert all(one == {"type": "prometheus", "uid": "${datasource}"} for one in found)
    assert VARIABLES["datasource"]["type"] == "datasource"
    assert VARIABLES["datasource"]["query"] == "prometheus"
    assert DASHBOARD["id"] is None


def test_the_variables_are_read_from_metrics_of_the_server(
    labels_by_name: dict[str, set[str]],
) -> None:
    for label in ("model", "instance"):
        query = VARIABLES[label]["query"]["query"]
        metric = re.fullmatch(rf"label_values\((\w+), {label}\)", query)
        assert metric is not None, query
        assert label in labels_by_name[metric[1]]


def test_the_limit_that_is_drawn_is_the_servers() -> None:
    assert float(VARIABLES["parity_limit"]["query"]) == ServerConfig().shadow_limit


def test_the_defaults_that_are_told_and_drawn_are_the_servers() -> None:
    config, panel_by_title = ServerConfig(), {panel["title"]: panel for panel in PANELS}
    told = re.findall(r"server\.(\w+), ([\d.]+) by default", json.dumps(PANELS))
    assert {name for name, _ in told} == {
        *("timeout_ms", "batch_requests", "batch_candidates", "queue_requests"),
    }
    for name, number in told:
        assert float(number) == getattr(config, name), name

    def highest(title: str) -> float:
        return panel_by_title[title]["fieldConfig"]["defaults"]["thresholds"]["steps"][-1]["value"]

    assert highest("Waiting requests") == config.queue_requests
    assert highest("Latency") == config.timeout_ms / 1e3

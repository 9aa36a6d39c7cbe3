"""The scenarios by name: a new one is a file in ``scenarios/``, a yaml, and a row here."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torchrec_kvshare.benchmark.options import Options
from torchrec_kvshare.benchmark.plots import Picture
from torchrec_kvshare.benchmark.results import Record
from torchrec_kvshare.benchmark.scenarios import (
    ahead,
    append,
    attention,
    cache_trace,
    catalogue,
    codec,
    faults,
    history_length,
    host,
    items,
    memory,
    publish,
    queue_length,
    runtimes,
    serving,
    tables,
    throughput_drop,
    tiers,
    training,
)
from torchrec_kvshare.errors import ConfigError


class Scenario(NamedTuple):
    """A scenario.

    Attributes:
        options: schema of its config.
        measure: takes an instance of ``options`` and returns the records.
        picture_by_name: pictures of the records, by the name of the file.
    """

    options: type[Options]
    measure: Callable[[Any], list[Record]]
    picture_by_name: Mapping[str, Picture] = {}


SCENARIO_BY_NAME = {
    queue_length.QUEUE_LENGTH: Scenario(
        queue_length.QueueLengthOptions,
        queue_length.measure_queue_length,
        queue_length.PICTURE_BY_NAME,
    ),
    memory.MEMORY: Scenario(memory.MemoryOptions, memory.measure_memory, memory.PICTURE_BY_NAME),
    attention.ATTENTION: Scenario(attention.AttentionOptions, attention.measure_attention),
    throughput_drop.THROUGHPUT_DROP: Scenario(
        throughput_drop.ThroughputDropOptions, throughput_drop.measure_throughput_drop
    ),
    training.TRAINING: Scenario(training.TrainingOptions, training.measure_training),
    catalogue.CATALOGUE: Scenario(catalogue.CatalogueOptions, catalogue.measure_catalogue),
    items.ITEMS: Scenario(items.ItemsOptions, items.measure_items),
    append.APPEND: Scenario(append.AppendOptions, append.measure_append),
    codec.CODEC: Scenario(codec.CodecOptions, codec.measure_codec),
    cache_trace.CACHE_TRACE: Scenario(
        cache_trace.CacheTraceOptions, cache_trace.measure_cache_trace, cache_trace.PICTURE_BY_NAME
    ),
    tiers.TIERS: Scenario(tiers.TiersOptions, tiers.measure_tiers),
    faults.FAULTS: Scenario(faults.FaultsOptions, faults.measure_faults),
    runtimes.RUNTIMES_SCENARIO: Scenario(runtimes.RuntimesOptions, runtimes.measure_runtimes),
    tables.TABLES: Scenario(tables.TablesOptions, tables.measure_tables),
    host.HOST: Scenario(host.HostOptions, host.measure_host),
    history_length.HISTORY_LENGTH: Scenario(
        history_length.HistoryLengthOptions,
        history_length.measure_history_length,
        history_length.PICTURE_BY_NAME,
    ),
    serving.SERVING: Scenario(serving.ServingOptions, serving.measure_serving),
    ahead.AHEAD: Scenario(ahead.AheadOptions, ahead.measure_ahead_of_requests),
    publish.PUBLISH: Scenario(publish.PublishOptions, publish.measure_publish),
}


def scenario_called(name: str | None) -> Scenario:
    """Return the scenario with this name.

    Raises:
        ConfigError: if there is none.
    """
    if name not in SCENARIO_BY_NAME:
        raise ConfigError(f"scenario is {name!r}; one of {sorted(SCENARIO_BY_NAME)} is allowed")
    return SCENARIO_BY_NAME[name]


def measure(scenario: str, options: Options) -> list[Record]:
    """Run a scenario.

    Args:
        scenario: its name.
        options: an instance of its options.

    Returns:
        Its records.

    Raises:
        ConfigError: if there is no such scenario.
        ParityError: if two paths that are compared differ.
    """
    chosen = scenario_called(scenario)
    assert isinstance(options, chosen.options)
    return chosen.measure(options)

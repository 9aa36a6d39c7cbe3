"""The benchmarks by name."""

from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.profiling.append_benchmark import APPEND, measure_append
from torchrec_kvshare.profiling.attention_benchmark import ATTENTION, measure_attention
from torchrec_kvshare.profiling.benchmarks import (
    MEMORY,
    QUEUE_LENGTH,
    measure_memory,
    measure_queue_length,
)
from torchrec_kvshare.profiling.catalogue_benchmark import CATALOGUE, measure_catalogue
from torchrec_kvshare.profiling.codec_benchmark import CODEC, measure_codec
from torchrec_kvshare.profiling.faults_benchmark import FAULTS, measure_faults
from torchrec_kvshare.profiling.host_benchmark import HOST, measure_host
from torchrec_kvshare.profiling.items_benchmark import ITEMS, measure_items
from torchrec_kvshare.profiling.plan import Plan, Sizes
from torchrec_kvshare.profiling.results import Record
from torchrec_kvshare.profiling.runtimes_benchmark import RUNTIMES_SCENARIO, measure_runtimes
from torchrec_kvshare.profiling.serving_benchmark import SERVING, measure_serving
from torchrec_kvshare.profiling.tables_benchmark import TABLES, measure_tables
from torchrec_kvshare.profiling.throughput_drop import THROUGHPUT_DROP, measure_throughput_drop
from torchrec_kvshare.profiling.tiers_benchmark import TIERS, measure_tiers
from torchrec_kvshare.profiling.trace_benchmark import CACHE_TRACE, measure_cache_trace
from torchrec_kvshare.profiling.training_benchmark import TRAINING, measure_training

MEASURE_BY_SCENARIO = {
    QUEUE_LENGTH: measure_queue_length,
    MEMORY: measure_memory,
    ATTENTION: measure_attention,
    THROUGHPUT_DROP: measure_throughput_drop,
    TRAINING: measure_training,
    CATALOGUE: measure_catalogue,
    ITEMS: measure_items,
    APPEND: measure_append,
    CODEC: measure_codec,
    CACHE_TRACE: measure_cache_trace,
    TIERS: measure_tiers,
    FAULTS: measure_faults,
    RUNTIMES_SCENARIO: measure_runtimes,
    TABLES: measure_tables,
    HOST: measure_host,
    SERVING: measure_serving,
}


def measure(scenario: str, plan: Plan, sizes: Sizes) -> list[Record]:
    """Run one scenario.

    Args:
        scenario: a key of ``MEASURE_BY_SCENARIO``.
        plan: what is measured.
        sizes: the model's sizes.

    Returns:
        Its records.

    Raises:
        ConfigError: if there is no such scenario.
        ParityError: if two paths that are compared differ.
    """
    if scenario not in MEASURE_BY_SCENARIO:
        raise ConfigError(
            f"scenario is {scenario!r}; one of {sorted(MEASURE_BY_SCENARIO)} is allowed"
        )
    return MEASURE_BY_SCENARIO[scenario](plan, sizes)

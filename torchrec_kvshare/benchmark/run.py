"""The benchmarks by name."""

from torchrec_kvshare.benchmark.plan import Plan, Sizes
from torchrec_kvshare.benchmark.results import Record
from torchrec_kvshare.benchmark.scenarios.append import APPEND, measure_append
from torchrec_kvshare.benchmark.scenarios.attention import ATTENTION, measure_attention
from torchrec_kvshare.benchmark.scenarios.cache_trace import CACHE_TRACE, measure_cache_trace
from torchrec_kvshare.benchmark.scenarios.catalogue import CATALOGUE, measure_catalogue
from torchrec_kvshare.benchmark.scenarios.codec import CODEC, measure_codec
from torchrec_kvshare.benchmark.scenarios.faults import FAULTS, measure_faults
from torchrec_kvshare.benchmark.scenarios.host import HOST, measure_host
from torchrec_kvshare.benchmark.scenarios.items import ITEMS, measure_items
from torchrec_kvshare.benchmark.scenarios.queue_length import (
    MEMORY,
    QUEUE_LENGTH,
    measure_memory,
    measure_queue_length,
)
from torchrec_kvshare.benchmark.scenarios.runtimes import RUNTIMES_SCENARIO, measure_runtimes
from torchrec_kvshare.benchmark.scenarios.serving import SERVING, measure_serving
from torchrec_kvshare.benchmark.scenarios.tables import TABLES, measure_tables
from torchrec_kvshare.benchmark.scenarios.throughput_drop import (
    THROUGHPUT_DROP,
    measure_throughput_drop,
)
from torchrec_kvshare.benchmark.scenarios.tiers import TIERS, measure_tiers
from torchrec_kvshare.benchmark.scenarios.training import TRAINING, measure_training
from torchrec_kvshare.errors import ConfigError

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

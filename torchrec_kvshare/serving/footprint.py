"""Peak memory of scoring: a bound from the limits of a batch and the model's sizes.

It is known before the first request, so that a server without enough memory does not start. Each
row is counted with everything that is alive with it at the peak; the factors are those of the
operators, rounded up (a layer's projections and feed-forward, the ranking stage's copies of its
features).
"""

import logging

from torchrec_kvshare.cache.open import OFF, TIERED
from torchrec_kvshare.commands.machine import granted_bytes
from torchrec_kvshare.config import CacheConfig, ServerConfig
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.export.artifact import Manifest
from torchrec_kvshare.features.limits import MAX_BAG_IDS, MAX_REQUEST_IDS
from torchrec_kvshare.features.schema import FeatureSchema
from torchrec_kvshare.history.kinds import TowerSpec
from torchrec_kvshare.serving.scheduler import BatchLimits

logger = logging.getLogger(__name__)

FLOAT_BYTES = 4
ROW_BYTES = 256  # of a candidate or an event: its ids, times, offsets and dense features
COLUMN_BYTES = 64  # of an event in one further column: it is copied from list to batch
ID_BYTES = 64  # of an id in a bag, beside its row of a table: it is copied from list to batch
# In multiples of the tower's width:
TOKEN_WIDTHS = 16  # a candidate's token in a layer
EVENT_WIDTHS = 12  # an event in a layer
EVENT_LAYER_WIDTHS = 6  # K/V of an event per layer, twice for copies when joined or split
# In multiples of the ranking stage's width:
RANKING_WIDTHS = 16  # a candidate in the arches of the ranking stage
FEATURE_WIDTHS = 3  # a feature of the ranking stage: gathered, concatenated, interacted
# In multiples of the tables' width:
SUM_WIDTHS = 4  # a token, while columns are summed, if it is not of the tower's width


def batch_bytes(manifest: Manifest, schema: FeatureSchema, limits: BatchLimits) -> int:
    """Return the most memory that scoring one batch takes, whatever its requests are.

    Args:
        manifest: of the artifact.
        schema: its columns.
        limits: of a batch; ``ids`` is also the limit of one request in one column.

    Returns:
        Bytes, including the requests' tensors.
    """
    spec = TowerSpec(**manifest.encoder)
    # Cached users count as no work, but all of them may have edited their histories.
    events_of_one = sum(history.window.max_history for history in schema.histories)
    num_bags = len(schema.item_attributes) * (1 + len(schema.histories))
    ids = min(limits.ids * num_bags + MAX_BAG_IDS * len(schema.context), MAX_REQUEST_IDS)
    features = 3 + len(schema.context) + len(schema.item_attributes) + len(schema.histories)
    of_sum = SUM_WIDTHS * spec.token_width if spec.token_width != spec.dim else 0
    of_candidate = (
        (TOKEN_WIDTHS * spec.num_tokens + spec.num_tokens**2) * spec.dim
        + spec.num_tokens * of_sum
        + (RANKING_WIDTHS + FEATURE_WIDTHS * features) * spec.output_width
        + FEATURE_WIDTHS * features**2
    )
    of_event = (EVENT_WIDTHS + EVENT_LAYER_WIDTHS * spec.num_layers) * spec.dim + of_sum
    events = limits.requests * events_of_one
    of_id = max(spec.token_width, spec.output_width)
    floats = limits.candidates * of_candidate + events * of_event + ids * of_id
    columns = len(schema.event_attributes) + len(schema.event_floats)
    rows = ROW_BYTES * (limits.candidates + events) + COLUMN_BYTES * columns * events
    return FLOAT_BYTES * floats + rows + ID_BYTES * ids


def check_memory(
    cache: CacheConfig, server: ServerConfig, resident_bytes: int, scoring_bytes: int
) -> None:
    """Check that the server fits into its memory, and log how much it takes at most.

    Args:
        cache: capacities of the tiers.
        server: its limits; the bound is ``memory_bytes``, or what the machine grants.
        resident_bytes: of the process with its model loaded.
        scoring_bytes: for scoring a batch, see ``batch_bytes``.

    Raises:
        ConfigError: naming each part, their sum and what is granted.
    """
    held = 0 if cache.name == OFF else cache.capacity_bytes
    if cache.name == TIERED:
        held += cache.host.capacity_bytes + 2 * cache.queue_bytes  # of the disk and the remote tier
    needed = resident_bytes + held + server.hot_bytes + scoring_bytes
    granted = server.memory_bytes or granted_bytes()
    parts = (
        f"{resident_bytes} resident, {held} in the cache, {server.hot_bytes} for hot users, "
        f"{scoring_bytes} for scoring a batch"
    )
    if needed > granted:
        raise ConfigError(
            f"{needed} bytes of memory are needed ({parts}) and {granted} are granted; lower "
            "cache.capacity_bytes, server.batch_requests, server.batch_candidates or "
            "server.max_values, or raise server.memory_bytes"
        )
    logger.info("memory: at most %d of %d bytes (%s)", needed, granted, parts)

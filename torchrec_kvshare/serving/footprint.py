"""What scoring takes of memory at most: a figure from the limits of a step and the model's sizes.

It is known before the first request, so that a server that cannot hold it does not start. Each row
is counted with what is alive beside it when most is; the factors are the operators' own, rounded up
(a layer's projections and its feed-forward arch, the ranking stage's copies of its features).
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
from torchrec_kvshare.serving.scheduler import StepLimits

logger = logging.getLogger(__name__)

FLOAT_BYTES = 4
ROW_BYTES = 256  # of a candidate or an event: its ids, times, offsets and dense features
ID_BYTES = 64  # of an id in a bag, beside its row of a table: it is copied from list to batch
TOKEN_WIDTHS = 16  # widths of the model that a candidate's token takes in a layer
RANKING_WIDTHS = 16  # that the ranking stage's arches take
FEATURE_WIDTHS = 3  # and each of its features, which are gathered, joined and met with each other
EVENT_WIDTHS = 12  # that an event takes in a layer
EVENT_LAYER_WIDTHS = 6  # and its K/V in each of them, twice for what is joined or split


def step_bytes(manifest: Manifest, schema: FeatureSchema, limits: StepLimits) -> int:
    """Most memory that scoring one step takes, whatever its requests are.

    Args:
        manifest: of the artifact that scores it.
        schema: its columns.
        limits: of a step; ``ids`` of it those of one request in one column, too.

    Returns:
        Bytes, the requests' tensors among them.
    """
    spec = TowerSpec(**manifest.encoder)
    # Users that the device knows are taken for free, and may all have edited their histories.
    events_of_one = sum(history.window.max_history for history in schema.histories)
    num_bags = len(schema.item_attributes) * (1 + len(schema.histories))
    ids = min(limits.ids * num_bags + MAX_BAG_IDS * len(schema.context), MAX_REQUEST_IDS)
    features = 3 + len(schema.context) + len(schema.item_attributes) + len(schema.histories)
    widths = TOKEN_WIDTHS * spec.num_tokens + spec.num_tokens**2 + RANKING_WIDTHS
    of_candidate = (widths + FEATURE_WIDTHS * features) * spec.dim + FEATURE_WIDTHS * features**2
    of_event = (EVENT_WIDTHS + EVENT_LAYER_WIDTHS * spec.num_layers) * spec.dim
    events = limits.requests * events_of_one
    floats = limits.candidates * of_candidate + events * of_event + ids * spec.dim
    return FLOAT_BYTES * floats + ROW_BYTES * (limits.candidates + events) + ID_BYTES * ids


def check_memory(cache: CacheConfig, server: ServerConfig, resident_bytes: int, step: int) -> None:
    """Refuse a server that its memory cannot hold, and say what it will take.

    Args:
        cache: what its tiers may hold.
        server: its limits; ``memory_bytes`` or else what the machine grants bounds the whole.
        resident_bytes: of the process, its model loaded.
        step: bytes that scoring a step takes, see ``step_bytes``.

    Raises:
        ConfigError: naming each part, what they are together and what there is.
    """
    held = 0 if cache.name == OFF else cache.capacity_bytes
    if cache.name == TIERED:
        held += cache.host.capacity_bytes + 2 * cache.queue_bytes  # of the disk and the remote tier
    needed = resident_bytes + held + server.hot_bytes + step
    granted = server.memory_bytes or granted_bytes()
    parts = (
        f"{resident_bytes} resident, {held} in the cache, {server.hot_bytes} for hot users, {step} "
        "for a step of scoring"
    )
    if needed > granted:
        raise ConfigError(
            f"{needed} bytes of memory are needed ({parts}) and {granted} are granted; lower "
            "cache.capacity_bytes, server.batch_requests, server.batch_candidates or "
            "server.max_values, or say more in server.memory_bytes"
        )
    logger.info("memory: at most %d of %d bytes (%s)", needed, granted, parts)

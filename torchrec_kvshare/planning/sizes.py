"""Bytes of one user's K/V: in pages, and as a packet in each codec."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from torchrec_kvshare.cache.codecs import get_codec
from torchrec_kvshare.cache.identity import NO_CONTEXT, UNNAMED, PrefixDigests, identity_of
from torchrec_kvshare.cache.kv_cache import PAGES
from torchrec_kvshare.cache.pages import TowerSizes
from torchrec_kvshare.cache.record import KVRecord, pack
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.export.artifact import read_artifact
from torchrec_kvshare.features.request import Events
from torchrec_kvshare.features.schema import HISTORY, TIME, FeatureSchema, History, Window
from torchrec_kvshare.features.tensors import FLOAT32
from torchrec_kvshare.history.kinds import CAUSAL, TowerSpec, new_encoder

BYTES = 4  # of a float32
USER_KEY = "0" * 64  # as long as a user's digest


@dataclass(frozen=True)
class ModelShape:
    """What decides the bytes of K/V, and the arithmetic of a request.

    Attributes:
        spec: of every tower.
        histories: what each tower reads.
        towers: sizes of each tower's K/V, by history.
    """

    spec: TowerSpec
    histories: Sequence[History]
    towers: Mapping[str, TowerSizes]

    @property
    def max_history(self) -> int:
        """Events of the longest window."""
        return max(history.window.max_history for history in self.histories)

    def user_bytes(self, tier: str, codec: str, num_events: int, page_size: int) -> int:
        """Return the bytes of a user's K/V.

        Args:
            tier: ``pages``, or a tier that stores packets.
            codec: of its K/V; pages are float32.
            num_events: of each history, cut to its window.
            page_size: rows per page, which packets have digests of, too.

        Raises:
            ConfigError: if the codec does not exist, or pages shall have another than float32.
        """
        if tier == PAGES and codec != FLOAT32:
            raise ConfigError(f"codec of tier {PAGES} is {codec!r}; attention reads {FLOAT32}")
        total = 0
        for history in self.histories:
            sizes, read = self.towers[history.name], min(num_events, history.window.max_history)
            window = history.window
            rows = new_encoder(self.spec, window.max_history, window.block).num_kv_rows(read)
            shape = (sizes.num_planes, rows, sizes.num_heads, sizes.head_dim)
            if tier == PAGES:
                rows_in_pages = -(-rows // page_size) * page_size
                total += rows_in_pages * shape[0] * shape[2] * shape[3] * BYTES
            else:
                total += _packet_bytes(history, shape, read, codec, page_size)
        return total


def given_shape(dim: int, num_layers: int, num_heads: int, max_history: int) -> ModelShape:
    """Return the shape of a causal model with one history."""
    spec = TowerSpec(CAUSAL, dim, num_layers, num_heads)
    sizes = TowerSizes(2 * num_layers, num_heads, dim // num_heads, max_history)
    history = History(HISTORY, Window(max_history, max_history))
    return ModelShape(spec, [history], {HISTORY: sizes})


def shape_of(folder: Path, key: bytes | None) -> ModelShape:
    """Return the shape of an artifact's model, from its manifest.

    Raises:
        ArtifactError: if the artifact is broken.
    """
    manifest, schema = read_artifact(folder, key)
    return ModelShape(TowerSpec(**manifest.encoder), schema.histories, manifest.towers)


def _packet_bytes(
    history: History, shape: tuple[int, int, int, int], num_events: int, codec: str, page_size: int
) -> int:
    """Pack drawn K/V: the bytes of a packet depend on its shape only."""
    if not num_events:
        return 0
    schema = FeatureSchema({}, histories=(history,))
    identity = identity_of(UNNAMED, NO_CONTEXT, history.name, page_size)
    content = PrefixDigests(Events({TIME: torch.arange(num_events)}, {}, 0), schema, identity)
    record = KVRecord(content.content, encoded_at=0.0, kv=torch.ones(shape))
    return len(pack(record, USER_KEY, get_codec(codec), key=None))

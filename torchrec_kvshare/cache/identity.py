"""What a piece of cached K/V is the K/V of: the model, the user and every event of the history.

Two digests must both match before K/V is used again. They are made of bytes alone, so they are the
same in every process and on every machine of one byte order.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from torchrec_kvshare.data.schema import FeatureSchema
from torchrec_kvshare.features import Events

DIGEST_BYTES = 16


def model_digest(state: Mapping[str, Tensor], description: Mapping[str, Any]) -> str:
    """Digest of weights, tables, architecture and window: whatever changes the K/V changes it.

    Args:
        state: the model's state dict.
        description: sizes, encoder and schema, as JSON values.

    Returns:
        Hexadecimal text.
    """
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def history_digest(events: Events, schema: FeatureSchema) -> bytes:
    """Digest of every event that the model reads of one history, in order.

    Args:
        events: the history, already cut to its window.
        schema: the model's columns, whose order the digest follows.

    Returns:
        16 bytes.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    # With the number of events every column's end is known: no two histories are the same bytes.
    digest.update(events.num_events.to_bytes(8, "little"))
    for column in sorted(events.columns):
        digest.update(events.columns[column].numpy().tobytes())
    for column in schema.item_attributes:
        bags = events.bags[column]
        digest.update(bags.lengths.numpy().tobytes())
        digest.update(bags.values.numpy().tobytes())
    return digest.digest()

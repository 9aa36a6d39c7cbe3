"""What the history tower means: float64 loops over one user and one candidate, nothing kept.

For every candidate the whole sequence is encoded again, row by row, with the candidate as its last
row. There are no masks, no batches, no cache, and no code of the fast path. Imported by tests only.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from torchrec_kvshare.attention.reference import reference_attention

LAYER_NORM_EPSILON = 1e-5  # torch.nn.LayerNorm's


def reference_tower(
    parameters: Mapping[str, Tensor],
    events: Tensor,
    event_times: list[int],
    candidate: Tensor,
    request_time: int,
) -> Tensor:
    """One candidate's vector over a history, as the tower defines it.

    Args:
        parameters: state dict of a ``HistoryTower``, such as ``layers.0.query_key_value.weight``.
        events: [L, E] event tokens, oldest first.
        event_times: L Unix seconds.
        candidate: [E], the candidate's token.
        request_time: Unix seconds.

    Returns:
        [E] float64.

    Source:
        Pre-norm block: Xiong et al. 2020 (arXiv:2002.04745). Causal history with target attention
        through the same layers: LONGER (arXiv:2505.04421).

    Example:
        >>> from torchrec_kvshare.history.tower import HistoryTower
        >>> parameters = HistoryTower(6, 2, 3, 0.0).state_dict()
        >>> reference_tower(parameters, torch.ones(4, 6), [0, 5, 5, 9], torch.ones(6), 10).shape
        torch.Size([6])
    """
    exact = {name: parameter.double() for name, parameter in parameters.items()}
    rows = [event.double() for event in events]
    rows.append(candidate.double() + exact["candidate_token"])
    depth = 0
    while f"layers.{depth}.time_bias" in exact:
        prefix = f"layers.{depth}."
        layer = {
            name.removeprefix(prefix): parameter
            for name, parameter in exact.items()
            if name.startswith(prefix)
        }
        rows = _layer(layer, rows, event_times, request_time)
        depth += 1
    return _linear(exact, "head", _layer_norm(exact, "norm", rows[-1]))


def _layer(
    layer: Mapping[str, Tensor], rows: list[Tensor], event_times: list[int], request_time: int
) -> list[Tensor]:
    """All rows one layer up; the last row is the candidate's."""
    num_buckets, num_heads = layer["time_bias"].shape
    projected = []
    for row in rows:
        both = _linear(layer, "query_key_value", _layer_norm(layer, "attention_norm", row))
        projected.append(both.reshape(3, num_heads, -1))
    above = []
    for place, row in enumerate(rows):
        biases = [torch.zeros(num_heads, dtype=torch.float64) for _ in range(place + 1)]
        if place == len(event_times):
            for event, event_time in enumerate(event_times):
                bucket = _time_bucket(request_time - event_time, num_buckets)
                biases[event] = layer["time_bias"][bucket]
        seen = projected[: place + 1]  # earlier rows, and the row itself
        keys, values = [key for _, key, _ in seen], [value for _, _, value in seen]
        attended = reference_attention(projected[place][0], keys, values, biases)
        row = row + _linear(layer, "attention_out", attended.flatten())
        hidden = _linear(layer, "feedforward_in", _layer_norm(layer, "feedforward_norm", row))
        active = torch.stack([_gelu(float(value)) for value in hidden])
        above.append(row + _linear(layer, "feedforward_out", active))
    return above


def _linear(parameters: Mapping[str, Tensor], name: str, row: Tensor) -> Tensor:
    return parameters[f"{name}.weight"] @ row + parameters[f"{name}.bias"]


def _layer_norm(parameters: Mapping[str, Tensor], name: str, row: Tensor) -> Tensor:
    mean = row.sum() / len(row)
    variance = ((row - mean) ** 2).sum() / len(row)
    normal = (row - mean) / math.sqrt(float(variance) + LAYER_NORM_EPSILON)
    return normal * parameters[f"{name}.weight"] + parameters[f"{name}.bias"]


def _gelu(value: float) -> Tensor:
    """The value times the share of a normal distribution below it (arXiv:1606.08415)."""
    share = (1.0 + math.erf(value / math.sqrt(2.0))) / 2.0
    return torch.tensor(value * share, dtype=torch.float64)


def _time_bucket(elapsed: int, num_buckets: int) -> int:
    """0 below one second, then one bucket for each doubling; the last has no end."""
    bucket = 0
    while bucket < num_buckets - 1 and elapsed >= 2**bucket:
        bucket += 1
    return bucket

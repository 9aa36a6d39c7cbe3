"""The history tower defined as float64 loops over one user and one candidate, without a cache.

For every candidate the whole history is encoded again, row by row. For each row the positions that
it sees are listed. There are no masks, no batches, no cache, and no fast-path code. Imported by
tests only.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_kvshare.attention.reference import (
    reference_attention,
    reference_bucket,
    reference_silu,
    reference_silu_attention,
)

LAYER_NORM_EPSILON = 1e-5  # torch.nn.LayerNorm's


class ReferenceOptions(NamedTuple):
    """Options of a tower that its parameters do not show.

    Args:
        kind: causal, bidirectional, target_only, hstu or longer.
        num_heads: H.
        sliding: causal, target_only, hstu: newest events seen at every layer; None sees all.
        max_history: hstu: events; its weights are divided by the square root of this.
        merge: longer: events in a group.
        recent: longer: maximum events whose groups go on to deeper layers.
        block: longer: the recent events start at a multiple of this many events.
    """

    kind: str
    num_heads: int
    sliding: int | None = None
    max_history: int = 0
    merge: int = 0
    recent: int = 0
    block: int = 0


class HistoryRow(NamedTuple):
    """A row of the history as a layer's input: an event, a group or a global token."""

    vector: Tensor  # [E]
    time: int | None  # Unix seconds; a global token has none


def reference_tower(
    parameters: Mapping[str, Tensor],
    options: ReferenceOptions,
    events: Tensor,
    event_times: list[int],
    candidate: Tensor,
    request_time: int,
) -> Tensor:
    """Compute one candidate's vector over a history.

    Args:
        parameters: state dict of a ``HistoryTower``, such as ``encoder.layers.0.out.weight``.
        options: kind and sizes of the encoder.
        events: [L, token width] event tokens, oldest first.
        event_times: L Unix seconds.
        candidate: [M, token width], the candidate's tokens.
        request_time: Unix seconds.

    Returns:
        [output width] float64: the output at the candidate's first token.

    Source:
        Pre-norm block: Xiong et al. 2020 (arXiv:2002.04745). ``causal``, ``bidirectional`` and
        ``longer``: LONGER (arXiv:2505.04421). ``target_only``: STCA (arXiv:2511.06077). ``hstu``:
        HSTU (arXiv:2402.17152).
    """
    exact = {name: parameter.double() for name, parameter in parameters.items()}
    encoder = _below(exact, "encoder")
    history = [
        HistoryRow(_entered(exact, event), time)
        for event, time in zip(events, event_times, strict=True)
    ]
    entered = [_entered(exact, token) for token in candidate]
    tokens = [token + own for token, own in zip(entered, exact["candidate_token"], strict=True)]
    seen_by_layer = _history_by_layer(encoder, options, history)
    # Not strict: the history is not computed above the last layer, where nothing sees it.
    for layer, seen in zip(range(_num_layers(encoder)), seen_by_layer, strict=False):
        biases = _candidate_biases(encoder, layer, seen, request_time)
        tokens = _candidate_above(_below(encoder, f"layers.{layer}"), options, seen, biases, tokens)
    return _linear(exact, "head", _layer_norm(exact, "norm", tokens[0]))


def reference_state(
    parameters: Mapping[str, Tensor],
    options: ReferenceOptions,
    events: Tensor,
    event_times: list[int],
) -> Tensor:
    """Compute the state of a user after a history.

    Args:
        parameters: as in ``reference_tower``.
        options: kind and sizes of the encoder.
        events: [L, token width] event tokens, oldest first.
        event_times: L Unix seconds.

    Returns:
        [output width] float64: a projection of keys and values of the newest event's row, or the
        row of its group, in the last layer; zeros without events.
    """
    exact = {name: parameter.double() for name, parameter in parameters.items()}
    encoder = _below(exact, "encoder")
    history = [
        HistoryRow(_entered(exact, event), time)
        for event, time in zip(events, event_times, strict=True)
    ]
    if not history:
        return torch.zeros_like(exact["state_head.bias"])
    *_, seen = _history_by_layer(encoder, options, history)
    newest = [row.vector for row in seen if row.time is not None][-1]
    layer = _below(encoder, f"layers.{_num_layers(encoder) - 1}")
    if options.kind == "target_only":
        key_and_value = newest  # Its K/V is the token itself.
    elif options.kind == "hstu":
        projected = _linear(layer, "gate_query_key_value", _layer_norm(layer, "norm", newest))
        key_and_value = _each([reference_silu(value) for value in projected.tolist()])
        key_and_value = key_and_value[2 * len(newest) :]
    else:
        projected = _linear(layer, "query_key_value", _layer_norm(layer, "attention_norm", newest))
        key_and_value = projected[len(newest) :]
    return _linear(exact, "state_head", key_and_value)


def _entered(parameters: Mapping[str, Tensor], token: Tensor) -> Tensor:
    """Return a token in the width of the tower; a tower of the tokens' width has no projection."""
    if "token_in.weight" not in parameters:
        return token.double()
    return _linear(parameters, "token_in", token.double())


def _candidate_above(
    layer: Mapping[str, Tensor],
    options: ReferenceOptions,
    seen: list[HistoryRow],
    biases: list[Tensor],
    tokens: list[Tensor],
) -> list[Tensor]:
    """Return a candidate's tokens one layer up: each sees the history's rows and all tokens."""
    vectors = [row.vector for row in seen] + tokens
    positions = range(len(vectors))
    no_bias = torch.zeros(options.num_heads, dtype=torch.float64)
    seen_by_position = dict.fromkeys(positions[len(seen) :], positions)
    token_biases = [no_bias for _ in tokens]
    return _vectors_above(layer, options, vectors, seen_by_position, biases + token_biases)


def _candidate_biases(
    encoder: Mapping[str, Tensor], layer: int, seen: list[HistoryRow], request_time: int
) -> list[Tensor]:
    """Return the biases of a candidate's scores: one [H] for each row that it sees."""
    time_bias = encoder["time_bias"][layer]  # [buckets, H]
    biases = []
    for position, row in enumerate(seen):
        bias = torch.zeros_like(time_bias[0])
        if row.time is not None:
            bias = bias + time_bias[reference_bucket(request_time - row.time, len(time_bias))]
        if "position_bias" in encoder:
            position_bias = encoder["position_bias"][layer]
            distance = len(seen) - position  # the newest event is 1 away
            bias = bias + position_bias[reference_bucket(distance, len(position_bias))]
        biases.append(bias)
    return biases


def _history_by_layer(
    encoder: Mapping[str, Tensor], options: ReferenceOptions, history: list[HistoryRow]
) -> Iterator[list[HistoryRow]]:
    """Yield, for each layer from the first on, the rows of the history that a candidate sees."""
    if options.kind in ("causal", "bidirectional", "hstu"):
        return _layered_history(encoder, options, history)
    if options.kind == "target_only":
        return _raw_history(encoder, options, history)
    if options.kind == "longer":
        return _longer_history(encoder, options, history)
    raise ValueError(f"the reference has no history encoder {options.kind!r}")


def _layered_history(
    encoder: Mapping[str, Tensor], options: ReferenceOptions, history: list[HistoryRow]
) -> Iterator[list[HistoryRow]]:
    """Run events through the layers, each seeing others; a candidate sees them at every layer."""
    num_events = len(history)
    for layer in range(_num_layers(encoder)):
        yield [history[position] for position in _newest(num_events, options.sliding)]
        seen_by_position = {
            position: _events_seen_by(position, num_events, options)
            for position in range(num_events)
        }
        history = _history_above(
            _below(encoder, f"layers.{layer}"), options, history, seen_by_position
        )


def _events_seen_by(position: int, num_events: int, options: ReferenceOptions) -> range:
    """Return the positions that an event sees: all, or its own and earlier ones."""
    if options.kind == "bidirectional":
        assert options.sliding is None, "a bidirectional history has no sliding window"
        return range(num_events)
    return _newest(position + 1, options.sliding)


def _newest(num_events: int, sliding: int | None) -> range:
    """Return the positions of the newest ``sliding`` of ``num_events`` events."""
    return range(0 if sliding is None else max(0, num_events - sliding), num_events)


def _raw_history(
    encoder: Mapping[str, Tensor], options: ReferenceOptions, history: list[HistoryRow]
) -> Iterator[list[HistoryRow]]:
    """Yield the event tokens themselves for every layer: events are not encoded."""
    for _ in range(_num_layers(encoder)):
        yield [history[position] for position in _newest(len(history), options.sliding)]


def _longer_history(
    encoder: Mapping[str, Tensor], options: ReferenceOptions, history: list[HistoryRow]
) -> Iterator[list[HistoryRow]]:
    """Run all groups and globals into the first layer; only recent groups and globals go on."""
    assert options.sliding is None, "a longer history has no sliding window"
    groups = _merged_groups(encoder, options, history)
    # Without events a candidate sees no rows, globals included.
    global_rows = [HistoryRow(token, None) for token in encoder["global_tokens"] if groups]
    first_recent = _first_recent_event(len(history), options) // options.merge
    for layer in range(_num_layers(encoder)):
        rows = groups + global_rows
        yield rows
        positions = range(len(rows))
        seen_by_position = {
            position: positions[: position + 1] for position in range(first_recent, len(groups))
        }
        seen_by_position |= dict.fromkeys(positions[len(groups) :], positions)
        above = _history_above(_below(encoder, f"layers.{layer}"), options, rows, seen_by_position)
        groups = [row for row in above if row.time is not None]
        global_rows = [row for row in above if row.time is None]
        first_recent = 0  # deeper layers have recent groups only


def _merged_groups(
    encoder: Mapping[str, Tensor], options: ReferenceOptions, history: list[HistoryRow]
) -> list[HistoryRow]:
    """Merge every ``merge`` events into one row with the newest's time; the last may have fewer.

    ``merge`` 2, events a b c d e → rows (a b) (c d) (e 0).
    """
    inner = _below(encoder, "inner")
    merged = []
    for start in range(0, len(history), options.merge):
        group = history[start : start + options.merge]
        positions = range(len(group))
        inner_rows = _history_above(inner, options, group, dict.fromkeys(positions, positions))
        padding = [torch.zeros_like(group[0].vector)] * (options.merge - len(group))
        side_by_side = torch.cat([row.vector for row in inner_rows] + padding)  # [merge * E]
        merged.append(HistoryRow(_linear(encoder, "merge_group", side_by_side), group[-1].time))
    return merged


def _first_recent_event(num_events: int, options: ReferenceOptions) -> int:
    """Return the first multiple of ``block`` with at most ``recent`` events from there on."""
    num_older = max(0, num_events - options.recent)
    return math.ceil(num_older / options.block) * options.block


def _history_above(
    layer: Mapping[str, Tensor],
    options: ReferenceOptions,
    history: list[HistoryRow],
    seen_by_position: Mapping[int, Sequence[int]],
) -> list[HistoryRow]:
    """Return rows of the history one layer up; history rows have no bias among themselves."""
    no_bias = torch.zeros(options.num_heads, dtype=torch.float64)
    vectors = [row.vector for row in history]
    above = _vectors_above(layer, options, vectors, seen_by_position, [no_bias for _ in vectors])
    times = [history[position].time for position in seen_by_position]
    return [HistoryRow(vector, time) for vector, time in zip(above, times, strict=True)]


def _vectors_above(
    layer: Mapping[str, Tensor],
    options: ReferenceOptions,
    vectors: list[Tensor],
    seen_by_position: Mapping[int, Sequence[int]],
    biases: list[Tensor],
) -> list[Tensor]:
    """Return the vectors at the keys of ``seen_by_position`` one layer up.

    Each sees only the vectors at the positions in its value. ``biases`` has one [H] for each
    vector, added to every score of that vector.
    """
    if options.kind == "hstu":
        return _hstu_above(layer, options, vectors, seen_by_position, biases)
    return _transformer_above(layer, options, vectors, seen_by_position, biases)


def _transformer_above(
    layer: Mapping[str, Tensor],
    options: ReferenceOptions,
    vectors: list[Tensor],
    seen_by_position: Mapping[int, Sequence[int]],
    biases: list[Tensor],
) -> list[Tensor]:
    """Apply the pre-norm block: softmax attention, then feed-forward, each added to its input."""
    queries, keys, values = [], [], []
    for vector in vectors:
        projected = _linear(layer, "query_key_value", _layer_norm(layer, "attention_norm", vector))
        query, key, value = projected.reshape(3, options.num_heads, -1)
        queries.append(query)
        keys.append(key)
        values.append(value)
    above = []
    for position, seen in seen_by_position.items():
        attended = reference_attention(
            queries[position], _at(keys, seen), _at(values, seen), _at(biases, seen)
        )
        middle = vectors[position] + _linear(layer, "attention_out", attended.flatten())
        above.append(middle + _feedforward(layer, middle))
    return above


def _feedforward(layer: Mapping[str, Tensor], vector: Tensor) -> Tensor:
    hidden = _linear(layer, "feedforward_in", _layer_norm(layer, "feedforward_norm", vector))
    return _linear(layer, "feedforward_out", _each([_gelu(value) for value in hidden.tolist()]))


def _hstu_above(
    layer: Mapping[str, Tensor],
    options: ReferenceOptions,
    vectors: list[Tensor],
    seen_by_position: Mapping[int, Sequence[int]],
    biases: list[Tensor],
) -> list[Tensor]:
    """Apply the HSTU block: SiLU attention, normed and then gated, added to its input."""
    gates, queries, keys, values = [], [], [], []
    for vector in vectors:
        projected = _linear(layer, "gate_query_key_value", _layer_norm(layer, "norm", vector))
        active = _each([reference_silu(value) for value in projected.tolist()])
        gate, query, key, value = active.reshape(4, options.num_heads, -1)
        gates.append(gate.flatten())
        queries.append(query)
        keys.append(key)
        values.append(value)
    fixed_scale = 1.0 / math.sqrt(options.max_history)
    above = []
    for position, seen in seen_by_position.items():
        attended = reference_silu_attention(
            queries[position], _at(keys, seen), _at(values, seen), _at(biases, seen), fixed_scale
        )
        gated = _layer_norm(layer, "attended_norm", attended.flatten()) * gates[position]
        above.append(vectors[position] + _linear(layer, "out", gated))
    return above


def _at(tensors: list[Tensor], positions: Sequence[int]) -> list[Tensor]:
    return [tensors[position] for position in positions]


def _each(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _num_layers(encoder: Mapping[str, Tensor]) -> int:
    return len(encoder["time_bias"])


def _below(parameters: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
    """Return the parameters of a submodule, by their names in it."""
    prefix = f"{module}."
    return {
        name.removeprefix(prefix): parameter
        for name, parameter in parameters.items()
        if name.startswith(prefix)
    }


def _linear(parameters: Mapping[str, Tensor], name: str, vector: Tensor) -> Tensor:
    return parameters[f"{name}.weight"] @ vector + parameters[f"{name}.bias"]


def _layer_norm(parameters: Mapping[str, Tensor], name: str, vector: Tensor) -> Tensor:
    mean = vector.sum() / len(vector)
    variance = ((vector - mean) ** 2).sum() / len(vector)
    normal = (vector - mean) / math.sqrt(float(variance) + LAYER_NORM_EPSILON)
    return normal * parameters[f"{name}.weight"] + parameters[f"{name}.bias"]


def _gelu(value: float) -> float:
    """Return the value times the normal CDF at the value (arXiv:1606.08415)."""
    return value * (1.0 + math.erf(value / math.sqrt(2.0))) / 2.0

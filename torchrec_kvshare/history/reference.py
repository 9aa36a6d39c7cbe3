"""What the history tower means: float64 loops over one user and one candidate, nothing kept.

For every candidate the whole history is encoded again, row by row. Who sees whom is written out as
the places each row sees. There are no masks, no batches, no cache, and no code of the fast path.
Imported by tests only.
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
    """What the parameters of a tower do not tell.

    Args:
        kind: causal, bidirectional, target_only, hstu or longer.
        num_heads: H.
        sliding: causal, target_only, hstu: events seen back at every layer; None sees all.
        max_history: hstu: events; its weights are divided by the square root of this.
        merge: longer: events in a group.
        recent: longer: events at most that go up the layers.
        block: longer: events; where the recent ones start is a multiple of it.
    """

    kind: str
    num_heads: int
    sliding: int | None = None
    max_history: int = 0
    merge: int = 0
    recent: int = 0
    block: int = 0


class HistoryRow(NamedTuple):
    """A row of the history as it enters a layer: an event's, a group's or a global token's."""

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
    """One candidate's vector over a history, as the tower defines it.

    Args:
        parameters: state dict of a ``HistoryTower``, such as ``encoder.layers.0.out.weight``.
        options: the encoder, and what its parameters do not tell.
        events: [L, E] event tokens, oldest first; the candidate sees all that its encoder shows.
        event_times: L Unix seconds.
        candidate: [M, E], the candidate's tokens.
        request_time: Unix seconds.

    Returns:
        [E] float64: what the candidate's first token has become.

    Source:
        Pre-norm block: Xiong et al. 2020 (arXiv:2002.04745). ``causal``, ``bidirectional`` and
        ``longer``: LONGER (arXiv:2505.04421). ``target_only``: STCA (arXiv:2511.06077). ``hstu``:
        HSTU (arXiv:2402.17152).
    """
    exact = {name: parameter.double() for name, parameter in parameters.items()}
    encoder = _below(exact, "encoder")
    history = [
        HistoryRow(event.double(), time) for event, time in zip(events, event_times, strict=True)
    ]
    tokens = list(candidate.double() + exact["candidate_token"])
    seen_by_layer = _history_by_layer(encoder, options, history)
    # Not strict: the history above the last layer is seen by no one, so it is not asked for.
    for layer, seen in zip(range(_num_layers(encoder)), seen_by_layer, strict=False):
        biases = _candidate_biases(encoder, layer, seen, request_time)
        tokens = _candidate_above(_below(encoder, f"layers.{layer}"), options, seen, biases, tokens)
    return _linear(exact, "head", _layer_norm(exact, "norm", tokens[0]))


def _candidate_above(
    layer: Mapping[str, Tensor],
    options: ReferenceOptions,
    seen: list[HistoryRow],
    biases: list[Tensor],
    tokens: list[Tensor],
) -> list[Tensor]:
    """A candidate's tokens one layer up: each sees the rows of the history, and all the tokens."""
    vectors = [row.vector for row in seen] + tokens
    places = range(len(vectors))
    no_bias = torch.zeros(options.num_heads, dtype=torch.float64)
    seen_by_place = dict.fromkeys(places[len(seen) :], places)
    token_biases = [no_bias for _ in tokens]
    return _vectors_above(layer, options, vectors, seen_by_place, biases + token_biases)


def _candidate_biases(
    encoder: Mapping[str, Tensor], layer: int, seen: list[HistoryRow], request_time: int
) -> list[Tensor]:
    """What a candidate adds to its scores of the rows it sees: one [H] for each."""
    time_bias = encoder["time_bias"][layer]  # [buckets, H]
    biases = []
    for place, row in enumerate(seen):
        bias = torch.zeros_like(time_bias[0])
        if row.time is not None:
            bias = bias + time_bias[reference_bucket(request_time - row.time, len(time_bias))]
        if "position_bias" in encoder:
            position_bias = encoder["position_bias"][layer]
            distance = len(seen) - place  # the newest event is 1 away
            bias = bias + position_bias[reference_bucket(distance, len(position_bias))]
        biases.append(bias)
    return biases


def _history_by_layer(
    encoder: Mapping[str, Tensor], options: ReferenceOptions, history: list[HistoryRow]
) -> Iterator[list[HistoryRow]]:
    """The rows of the history that a candidate sees, as they enter each layer, the lowest first."""
    if options.kind in ("causal", "bidirectional", "hstu"):
        return _layered_history(encoder, options, history)
    if options.kind == "target_only":
        return _raw_history(encoder, options, history)
    if options.kind == "longer":
        return _longer_history(encoder, options, history)
    raise ValueError(f"the reference knows no history encoder {options.kind!r}")


def _layered_history(
    encoder: Mapping[str, Tensor], options: ReferenceOptions, history: list[HistoryRow]
) -> Iterator[list[HistoryRow]]:
    """Events go up the layers, seeing each other, and a candidate sees them at every layer."""
    num_events = len(history)
    for layer in range(_num_layers(encoder)):
        yield [history[place] for place in _newest(num_events, options.sliding)]
        seen_by_place = {
            place: _events_seen_by(place, num_events, options) for place in range(num_events)
        }
        history = _history_above(
            _below(encoder, f"layers.{layer}"), options, history, seen_by_place
        )


def _events_seen_by(place: int, num_events: int, options: ReferenceOptions) -> range:
    """The events that an event sees: all, or itself and those before it."""
    if options.kind == "bidirectional":
        assert options.sliding is None, "a bidirectional history has no sliding window"
        return range(num_events)
    return _newest(place + 1, options.sliding)


def _newest(num_events: int, sliding: int | None) -> range:
    """The places of the last ``sliding`` of so many events."""
    return range(0 if sliding is None else max(0, num_events - sliding), num_events)


def _raw_history(
    encoder: Mapping[str, Tensor], options: ReferenceOptions, history: list[HistoryRow]
) -> Iterator[list[HistoryRow]]:
    """Events go up no layer: a candidate sees the same tokens at every one."""
    for _ in range(_num_layers(encoder)):
        yield [history[place] for place in _newest(len(history), options.sliding)]


def _longer_history(
    encoder: Mapping[str, Tensor], options: ReferenceOptions, history: list[HistoryRow]
) -> Iterator[list[HistoryRow]]:
    """All groups and globals enter the lowest layer; the recent groups and the globals go on."""
    assert options.sliding is None, "a longer history has no sliding window"
    groups = _merged_groups(encoder, options, history)
    # Without events there is nothing at all to see, no globals either.
    global_rows = [HistoryRow(token, None) for token in encoder["global_tokens"] if groups]
    first_recent = _first_recent_event(len(history), options) // options.merge
    for layer in range(_num_layers(encoder)):
        rows = groups + global_rows
        yield rows
        places = range(len(rows))
        seen_by_place = {place: places[: place + 1] for place in range(first_recent, len(groups))}
        seen_by_place |= dict.fromkeys(places[len(groups) :], places)
        above = _history_above(_below(encoder, f"layers.{layer}"), options, rows, seen_by_place)
        groups = [row for row in above if row.time is not None]
        global_rows = [row for row in above if row.time is None]
        first_recent = 0  # from here on, all the groups there are


def _merged_groups(
    encoder: Mapping[str, Tensor], options: ReferenceOptions, history: list[HistoryRow]
) -> list[HistoryRow]:
    """Each ``merge`` events become one row, with the time of the newest; the last may have fewer.

    ``merge`` 2, events a b c d e → rows (a b) (c d) (e 0).
    """
    inner = _below(encoder, "inner")
    merged = []
    for start in range(0, len(history), options.merge):
        group = history[start : start + options.merge]
        places = range(len(group))
        met = _history_above(inner, options, group, dict.fromkeys(places, places))
        missing = [torch.zeros_like(group[0].vector)] * (options.merge - len(group))
        side_by_side = torch.cat([row.vector for row in met] + missing)  # [merge * E]
        merged.append(HistoryRow(_linear(encoder, "merge_group", side_by_side), group[-1].time))
    return merged


def _first_recent_event(num_events: int, options: ReferenceOptions) -> int:
    """The first multiple of ``block`` from which on there are no more than ``recent`` events."""
    num_older = max(0, num_events - options.recent)
    return math.ceil(num_older / options.block) * options.block


def _history_above(
    layer: Mapping[str, Tensor],
    options: ReferenceOptions,
    history: list[HistoryRow],
    seen_by_place: Mapping[int, Sequence[int]],
) -> list[HistoryRow]:
    """Rows of the history one layer up; among themselves they add no bias."""
    no_bias = torch.zeros(options.num_heads, dtype=torch.float64)
    vectors = [row.vector for row in history]
    above = _vectors_above(layer, options, vectors, seen_by_place, [no_bias for _ in vectors])
    times = [history[place].time for place in seen_by_place]
    return [HistoryRow(vector, time) for vector, time in zip(above, times, strict=True)]


def _vectors_above(
    layer: Mapping[str, Tensor],
    options: ReferenceOptions,
    vectors: list[Tensor],
    seen_by_place: Mapping[int, Sequence[int]],
    biases: list[Tensor],
) -> list[Tensor]:
    """The vectors at the places named, one layer up; each sees the vectors at its places alone.

    ``biases`` has one [H] for each vector, added to every score of it.
    """
    if options.kind == "hstu":
        return _hstu_above(layer, options, vectors, seen_by_place, biases)
    return _transformer_above(layer, options, vectors, seen_by_place, biases)


def _transformer_above(
    layer: Mapping[str, Tensor],
    options: ReferenceOptions,
    vectors: list[Tensor],
    seen_by_place: Mapping[int, Sequence[int]],
    biases: list[Tensor],
) -> list[Tensor]:
    """Pre-norm block: softmax attention, then the feed-forward part, each added to its input."""
    queries, keys, values = [], [], []
    for vector in vectors:
        projected = _linear(layer, "query_key_value", _layer_norm(layer, "attention_norm", vector))
        query, key, value = projected.reshape(3, options.num_heads, -1)
        queries.append(query)
        keys.append(key)
        values.append(value)
    above = []
    for place, seen in seen_by_place.items():
        attended = reference_attention(
            queries[place], _at(keys, seen), _at(values, seen), _at(biases, seen)
        )
        middle = vectors[place] + _linear(layer, "attention_out", attended.flatten())
        above.append(middle + _feedforward(layer, middle))
    return above


def _feedforward(layer: Mapping[str, Tensor], vector: Tensor) -> Tensor:
    hidden = _linear(layer, "feedforward_in", _layer_norm(layer, "feedforward_norm", vector))
    return _linear(layer, "feedforward_out", _each([_gelu(value) for value in hidden.tolist()]))


def _hstu_above(
    layer: Mapping[str, Tensor],
    options: ReferenceOptions,
    vectors: list[Tensor],
    seen_by_place: Mapping[int, Sequence[int]],
    biases: list[Tensor],
) -> list[Tensor]:
    """HSTU block: SiLU attention, normed and then gated, added to its input."""
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
    for place, seen in seen_by_place.items():
        attended = reference_silu_attention(
            queries[place], _at(keys, seen), _at(values, seen), _at(biases, seen), fixed_scale
        )
        gated = _layer_norm(layer, "attended_norm", attended.flatten()) * gates[place]
        above.append(vectors[place] + _linear(layer, "out", gated))
    return above


def _at(tensors: list[Tensor], places: Sequence[int]) -> list[Tensor]:
    return [tensors[place] for place in places]


def _each(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _num_layers(encoder: Mapping[str, Tensor]) -> int:
    return len(encoder["time_bias"])


def _below(parameters: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
    """The parameters of a module, by their names in it."""
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
    """The value times the share of a normal distribution below it (arXiv:1606.08415)."""
    return value * (1.0 + math.erf(value / math.sqrt(2.0))) / 2.0

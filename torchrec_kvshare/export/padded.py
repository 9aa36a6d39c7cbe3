"""A ranking model over padded users: the same weights and meaning, with sizes in place of spans.

Eager code goes from user to user through jagged rows; ``torch.export`` has no loop over data. Here
every user has as many rows as the longest one, its own first, and a bias hides the others, so that
sizes are shapes and nothing branches on data.

Look-ups are inside the graphs: of an unsharded table they are a gather, or torch's embedding bag.
Sharded and quantised tables have operators that AOTInductor has not, so such models are refused.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedTensor

from torchrec_kvshare.attention.shared import hidden_bias
from torchrec_kvshare.collection import HistoryPooling, KVShareEmbeddingBagCollection
from torchrec_kvshare.data.schema import REQUEST_TIME, FeatureSchema, history_key
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.history.bidirectional import BidirectionalEncoder
from torchrec_kvshare.history.causal import CausalEncoder
from torchrec_kvshare.history.encoder import Encoder
from torchrec_kvshare.history.hstu import HSTUEncoder, HSTULayer
from torchrec_kvshare.history.longer import LongerEncoder
from torchrec_kvshare.history.target_only import TargetOnlyEncoder
from torchrec_kvshare.history.transformer import TransformerLayer
from torchrec_kvshare.ranking import RankingModel
from torchrec_kvshare.tensors import DENSE

NO_ID = -1  # where there is no id, no event and no row
# Places of rows that are no events: globals come after all events, padding is never reached.
GLOBAL_PLACE = 1 << 40
NO_PLACE = 1 << 41

# Columns of a history beside those of the schema: K/V, and the rows of it that are each user's.
KV = "kv"
ROWS = "rows"

PREFILL, EXTEND, RANK = "prefill", "extend", "rank"

Inputs = dict[str, Tensor]


class PaddedEncoder(nn.Module):
    """An encoder over users of as many rows each: transformer layers, events see earlier ones.

    Of the encoder everything but attention is used as it is; a kind overrides what is its own.

    Args:
        encoder: the weights.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.time_ends = nn.Buffer(doubling_ends(encoder.num_time_buckets))

    def layers(self) -> Iterator[tuple[int, TransformerLayer]]:
        """Depth and layer, from the first on."""
        return enumerate(cast(list[TransformerLayer], list(self.encoder.layers)))

    def prefill(self, events: Tensor, num_events: Tensor) -> tuple[Tensor, Tensor]:
        """K/V of whole histories.

        Args:
            events: [B, L, E] tokens, oldest first.
            num_events: [B] int64, of each user.

        Returns:
            Planes [planes, B, R, H, D], and which of the rows there are, [B, R] bool.
        """
        head_dim = events.size(2) // self.encoder.num_heads
        sizes = [self.encoder.num_planes, events.size(0), 0, self.encoder.num_heads, head_dim]
        # One row of places for all users: a mask of every user's own would be [B, L, L].
        return self.extend(events.new_zeros(sizes), num_events.new_zeros(1), events, num_events)

    def extend(
        self, cached: Tensor, num_cached: Tensor, events: Tensor, num_events: Tensor
    ) -> tuple[Tensor, Tensor]:
        """K/V of new events behind cached rows.

        Args:
            cached: [planes, B, K, H, D].
            num_cached: [B] int64, rows of each user.
            events: [B, L, E] tokens of the new events.
            num_events: [B] int64, of each user.

        Returns:
            Planes [planes, B, R, H, D] of the new rows, and which of them there are, [B, R] bool.
        """
        bias = self.history_bias(cached.size(2), num_cached, events.size(1), num_events)
        planes = self.encode(events, cached, [bias] * self.encoder.num_layers)
        return planes, is_within(num_events, events.size(1))

    def history_bias(
        self, num_places: int, num_cached: Tensor, num_new: int, num_events: Tensor
    ) -> Tensor | None:
        """Bias [B, 1, L, K + L] of what events do not see; None where all earlier ones are seen."""
        if num_places == 0 and self.encoder.window == 0:
            return None
        return self.earlier_bias(num_places, num_cached, num_new)

    def earlier_bias(self, num_places: int, num_cached: Tensor, num_new: int) -> Tensor:
        """Bias [B, 1, L, K + L] under which events see earlier ones, all or the last few."""
        places = num_cached.unsqueeze(1) + torch.arange(num_new, device=num_cached.device)
        oldest = places - self.encoder.window + 1 if self.encoder.window else places * 0
        return causal_bias(cached_places(num_cached, num_places), places, oldest)

    def encode(self, rows: Tensor, cached: Tensor, biases: Sequence[Tensor | None]) -> Tensor:
        """Planes [planes, B, R, H, D] of rows [B, R, E] that go up all layers."""
        planes: list[Tensor] = []
        for depth, layer in self.layers():
            # Nothing is above the last layer: its rows need keys and values only.
            if depth + 1 == self.encoder.num_layers:
                key, value = layer.project_kv(rows)
            else:
                behind = (cached[2 * depth], cached[2 * depth + 1])
                rows, key, value = self.see(layer, rows, behind, biases[depth])
            planes.extend([key, value])
        return torch.stack(planes)

    def see(
        self,
        layer: TransformerLayer,
        rows: Tensor,
        behind: tuple[Tensor, Tensor],
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [B, R, E] past a layer in which they see cached ones and each other; their K/V."""
        query, key, value = layer.heads(layer.project(rows))
        attended, _ = softmax_attention(
            query, joined(behind[0], key), joined(behind[1], value), bias
        )
        return layer.finish(rows, attended), key, value

    def attend(
        self, rows: Tensor, entered: Tensor, kv: Tensor, elapsed: Tensor, num_events: Tensor
    ) -> Tensor:
        """Candidates through all layers.

        Args:
            rows: [B, N, M, E], what ``enter`` made of the candidates.
            entered: [B, N, M, 3E or 4E], their projections.
            kv: [planes, B, R, H, D].
            elapsed: [B, L] int64 seconds from each event to the request.
            num_events: [B] int64, of each user.

        Returns:
            [B, N, M, E].
        """
        kv = self.keys_and_values(kv)
        biases = self.row_biases(kv.size(2), elapsed, num_events)
        for depth, layer in self.layers():
            projected = entered if depth == 0 else layer.project(rows)
            bias = biases[depth].transpose(1, 2).unsqueeze(2)  # [B, H, 1, R]
            rows = self.look_back(layer, rows, projected, kv[2 * depth], kv[2 * depth + 1], bias)
        return rows

    def keys_and_values(self, kv: Tensor) -> Tensor:
        """What is kept as two planes for each layer."""
        return kv

    def row_biases(self, num_rows: int, elapsed: Tensor, num_events: Tensor) -> list[Tensor]:
        """Bias [B, R, H] that candidates add to each row of K/V, at every layer."""
        bucket = torch.bucketize(elapsed, self.time_ends, right=True)
        hidden = ~is_within(num_events, num_rows)
        if self.encoder.window:
            hidden = hidden | is_within(num_events - self.encoder.window, num_rows)
        return [
            functional.embedding(bucket, time_bias).masked_fill(hidden.unsqueeze(2), hidden_bias())
            for time_bias in self.encoder.time_bias
        ]

    def look_back(
        self,
        layer: TransformerLayer,
        rows: Tensor,
        projected: Tensor,
        keys: Tensor,
        values: Tensor,
        bias: Tensor,
    ) -> Tensor:
        """Candidates [B, N, M, E] past a layer in which they see the history and their own."""
        # Flattened before it is split: a view of slices would be another one for one candidate.
        query, own_key, own_value = layer.heads(projected.flatten(1, 2))  # [B, N x M, H, D]
        over_history, log_sum_exp = softmax_attention(query, keys, values, bias)
        sizes = [-1, rows.size(2)]
        own_scores = scores_of_own(query.unflatten(1, sizes), own_key.unflatten(1, sizes))
        history_scores = log_sum_exp.unflatten(1, sizes).unsqueeze(3)  # [B, N, M, 1, H]
        weights = torch.softmax(torch.cat([history_scores, own_scores], dim=3), dim=3)
        own = weigh_own(weights[:, :, :, 1:], own_value.unflatten(1, sizes))
        share = weights[:, :, :, 0].unsqueeze(-1)
        return layer.finish(rows, over_history.unflatten(1, sizes) * share + own)


class PaddedBidirectional(PaddedEncoder):
    """Events see all events of their user."""

    def history_bias(
        self, num_places: int, num_cached: Tensor, num_new: int, num_events: Tensor
    ) -> Tensor | None:
        return hide(~is_within(num_events, num_new))[:, None, None]


class PaddedTargetOnly(PaddedEncoder):
    """Events do not see each other: the token is the one plane that is kept."""

    def extend(
        self, cached: Tensor, num_cached: Tensor, events: Tensor, num_events: Tensor
    ) -> tuple[Tensor, Tensor]:
        plane = events.unflatten(2, [self.encoder.num_heads, -1])
        return plane.unsqueeze(0), is_within(num_events, events.size(1))

    def keys_and_values(self, kv: Tensor) -> Tensor:
        events = kv[0].flatten(2)
        planes = [plane for _, layer in self.layers() for plane in layer.project_kv(events)]
        return torch.stack(planes)


class PaddedHSTU(PaddedEncoder):
    """SiLU attention, gated, with a bias of place beside that of time."""

    encoder: HSTUEncoder

    def __init__(self, encoder: HSTUEncoder) -> None:
        super().__init__(encoder)
        self.place_ends = nn.Buffer(doubling_ends(encoder.num_position_buckets))

    def history_bias(
        self, num_places: int, num_cached: Tensor, num_new: int, num_events: Tensor
    ) -> Tensor | None:
        return self.earlier_bias(num_places, num_cached, num_new)

    def see(
        self,
        layer: TransformerLayer,
        rows: Tensor,
        behind: tuple[Tensor, Tensor],
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        gated = cast(HSTULayer, layer)
        gate, query, key, value = gated.heads(gated.project(rows))
        attended = silu_attention(query, joined(behind[0], key), joined(behind[1], value), bias)
        return gated.finish(rows, attended * self.encoder.scale, gate), key, value

    def row_biases(self, num_rows: int, elapsed: Tensor, num_events: Tensor) -> list[Tensor]:
        distance = num_events.unsqueeze(1) - torch.arange(num_rows, device=elapsed.device)
        bucket = torch.bucketize(distance, self.place_ends, right=True)
        of_time = super().row_biases(num_rows, elapsed, num_events)
        of_place = [functional.embedding(bucket, bias) for bias in self.encoder.position_bias]
        return [time + place for time, place in zip(of_time, of_place, strict=True)]

    def look_back(
        self,
        layer: TransformerLayer,
        rows: Tensor,
        projected: Tensor,
        keys: Tensor,
        values: Tensor,
        bias: Tensor,
    ) -> Tensor:
        gated = cast(HSTULayer, layer)
        sizes = [-1, rows.size(2)]
        heads = gated.heads(projected.flatten(1, 2))
        over_history = silu_attention(heads[1], keys, values, bias).unflatten(1, sizes)
        gate, query, own_key, own_value = (part.unflatten(1, sizes) for part in heads)
        own = weigh_own(functional.silu(scores_of_own(query, own_key)), own_value)
        return gated.finish(rows, (over_history + own) * self.encoder.scale, gate)


class PaddedLonger(PaddedEncoder):
    """Groups of events, then globals; see ``history/longer.py``.

    All groups go up all layers: those that are not recent are hidden there, and kept as zeros.
    """

    encoder: LongerEncoder

    def extend(
        self, cached: Tensor, num_cached: Tensor, events: Tensor, num_events: Tensor
    ) -> tuple[Tensor, Tensor]:
        groups = self.merge_events(events, num_events)
        total = num_events + num_cached * self.encoder.merge
        is_group = is_within(self.num_groups(num_events), groups.size(1))
        places = num_cached.unsqueeze(1) + torch.arange(groups.size(1), device=events.device)
        recent = self.first_recent(total)
        is_kept = self.and_globals(is_group & (places >= recent.unsqueeze(1)), True)
        places = self.and_globals(places.masked_fill(~is_group, NO_PLACE), GLOBAL_PLACE)
        earlier = cached_places(num_cached, cached.size(2)).expand(places.size(0), -1)
        first, deeper = (
            causal_bias(earlier, places, oldest.unsqueeze(1)) for oldest in (recent * 0, recent)
        )
        globals_ = self.encoder.global_tokens.expand(groups.size(0), -1, -1)
        biases = [first] + [deeper] * (self.encoder.num_layers - 1)
        planes = self.encode(torch.cat([groups, globals_], dim=1), cached, biases)
        planes = torch.cat([planes[:2], planes[2:] * is_kept[:, :, None, None]])
        return planes, self.and_globals(is_group, True) & (total > 0).unsqueeze(1)

    def and_globals(self, groups: Tensor, filling: int) -> Tensor:
        """What is said of groups [B, G], and the same of all globals behind them."""
        return functional.pad(groups, [0, self.encoder.num_globals], value=filling)

    def merge_events(self, events: Tensor, num_events: Tensor) -> Tensor:
        """Groups [B, G, E] of events [B, L, E], each group through the inner layer first."""
        merge, inner = self.encoder.merge, self.encoder.inner
        first = torch.arange(0, events.size(1), merge, device=events.device)
        place = first.unsqueeze(1) + torch.arange(merge, device=events.device)  # [G, merge]
        present = place < num_events[:, None, None]
        rows = events[:, place.clamp(max=events.size(1) - 1)]  # [B, G, merge, E]
        query, key, value = (part.flatten(0, 1) for part in inner.heads(inner.project(rows)))
        bias = hide(~present).flatten(0, 1)[:, None, None]
        attended, _ = softmax_attention(query, key, value, bias)
        seen = inner.finish(rows, attended.unflatten(0, rows.shape[:2])) * present.unsqueeze(3)
        return self.encoder.merge_group(seen.flatten(2))

    def num_groups(self, num_events: Tensor) -> Tensor:
        """Groups of each user, the last of them perhaps open."""
        return (num_events + self.encoder.merge - 1) // self.encoder.merge

    def first_recent(self, num_events: Tensor) -> Tensor:
        """The first group of each user that goes on to deeper layers."""
        block = self.encoder.block
        surplus = (num_events - self.encoder.recent).clamp(min=0)
        return (surplus + block - 1) // block * block // self.encoder.merge

    def row_biases(self, num_rows: int, elapsed: Tensor, num_events: Tensor) -> list[Tensor]:
        """The bias of a group is that of its newest event; globals have none."""
        place = torch.arange(num_rows, device=elapsed.device)
        newest = ((place + 1) * self.encoder.merge).minimum(num_events.unsqueeze(1)) - 1
        bucket = torch.bucketize(elapsed.gather(1, newest.clamp(min=0)), self.time_ends, right=True)
        num_groups = self.num_groups(num_events)
        is_group = is_within(num_groups, num_rows).unsqueeze(2)
        is_row = is_within((num_groups + self.encoder.num_globals) * (num_events > 0), num_rows)
        old = is_within(self.first_recent(num_events), num_rows)
        hidden = [~is_row] + [~is_row | old] * (self.encoder.num_layers - 1)
        return [
            (functional.embedding(bucket, time_bias) * is_group).masked_fill(
                hidden[depth].unsqueeze(2), hidden_bias()
            )
            for depth, time_bias in enumerate(self.encoder.time_bias)
        ]


PADDED_BY_ENCODER: dict[type[Encoder], Callable[[Any], PaddedEncoder]] = {
    CausalEncoder: PaddedEncoder,
    BidirectionalEncoder: PaddedBidirectional,
    TargetOnlyEncoder: PaddedTargetOnly,
    HSTUEncoder: PaddedHSTU,
    LongerEncoder: PaddedLonger,
}


class PaddedTokens(nn.Module):
    """Rows of the tables that tokens are made of, by the key of a feature.

    Args:
        collection: whose tables they are.
    """

    def __init__(self, collection: KVShareEmbeddingBagCollection) -> None:
        super().__init__()
        self.tables = collection.token_embeddings.embeddings
        configs = collection.token_embeddings.embedding_configs()
        self.table_by_key = {key: c.name for c in configs for key in c.feature_names}

    def forward(self, inputs: Inputs, single_keys: list[str], bag_keys: list[str]) -> list[Tensor]:
        """For each key [..., E]; the sums of bags come last."""
        single = [look_up(self.table(key), inputs[key]) for key in single_keys]
        return single + [pool(self.table(key), inputs, key, "sum") for key in bag_keys]

    def table(self, key: str) -> Tensor:
        """The weights that a key's ids are rows of."""
        return cast(nn.Embedding, self.tables[self.table_by_key[key]]).weight


class PaddedHistory(nn.Module):
    """One history: its events into K/V, and candidates over K/V into one vector each.

    Args:
        pooling: what is eager of it.
        name: of the history.
        tokens: shared by all histories.
    """

    def __init__(self, pooling: HistoryPooling, name: str, tokens: PaddedTokens) -> None:
        super().__init__()
        self.tower = pooling.tower
        encoder = pooling.tower.encoder
        self.encoder = PADDED_BY_ENCODER[type(encoder)](encoder)
        self.tokens = tokens
        self.event_keys = pooling.event_keys
        self.bag_keys = pooling.event_bag_keys
        self.time_key = pooling.time_key
        self.kv_key, self.rows_key = history_key(name, KV), history_key(name, ROWS)

    def events(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Tokens [B, L, E] of events, and how many each user has."""
        columns = self.tokens(inputs, self.event_keys, self.bag_keys)
        return sum(columns[1:], columns[0]), num_there(inputs[self.event_keys[0]])

    def prefill(self, inputs: Inputs) -> Tensor:
        """K/V [planes, R, H, D] of whole histories."""
        return flat_rows(*self.encoder.prefill(*self.events(inputs)))

    def extend(self, inputs: Inputs) -> Tensor:
        """K/V [planes, R, H, D] of new events behind the rows that are given."""
        rows = inputs[self.rows_key]
        cached = take_rows(inputs[self.kv_key], rows)
        return flat_rows(*self.encoder.extend(cached, num_there(rows), *self.events(inputs)))

    def attend(self, candidates: Tensor, inputs: Inputs) -> Tensor:
        """One vector for each candidate of tokens [B, N, M, E]: [B, N, E]."""
        rows, entered = self.tower.enter(candidates)
        time = inputs[self.time_key]
        elapsed = inputs[REQUEST_TIME].unsqueeze(1) - time
        kv = take_rows(inputs[self.kv_key], inputs[self.rows_key])
        attended = self.encoder.attend(rows, entered, kv, elapsed, num_there(time))
        return self.tower.head(self.tower.norm(attended[:, :, 0]))


class PaddedPrefill(nn.Module):
    """Histories of all users into K/V: for each history [planes, R, H, D].

    Args:
        histories: of the model.
    """

    def __init__(self, histories: list[PaddedHistory]) -> None:
        super().__init__()
        self.histories = nn.ModuleList(histories)

    def forward(self, inputs: Inputs) -> list[Tensor]:
        return [cast(PaddedHistory, history).prefill(inputs) for history in self.histories]


class PaddedExtend(PaddedPrefill):
    """New events into K/V behind cached rows: for each history [planes, R, H, D]."""

    def forward(self, inputs: Inputs) -> list[Tensor]:
        return [cast(PaddedHistory, history).extend(inputs) for history in self.histories]


class PaddedCollection(nn.Module):
    """Stands in the collection's place: padded inputs into features of B x N candidates.

    Args:
        collection: what is eager of it.
        histories: of the model.
        tokens: shared by all histories.

    Raises:
        ConfigError: if its bags are made of anything but EmbeddingBagCollections.
    """

    def __init__(
        self,
        collection: KVShareEmbeddingBagCollection,
        histories: list[PaddedHistory],
        tokens: PaddedTokens,
    ) -> None:
        super().__init__()
        self.histories = nn.ModuleList(histories)
        self.tokens = tokens
        self.attribute_keys = collection.candidate_tokens.attribute_keys
        self.item_key = collection.candidate_tokens.item_key
        self.num_tokens = collection.candidate_tokens.num_tokens
        self.bags = nn.ModuleList(
            [one for one in collection.bags.modules() if isinstance(one, EmbeddingBagCollection)]
        )
        if list(self.configs()) != list(collection.bags.embedding_bag_configs()):
            raise ConfigError(
                f"the ranking stage's bags are {type(collection.bags).__name__}; only those made "
                "of EmbeddingBagCollections, neither sharded nor quantised, can be compiled"
            )
        configs = collection.embedding_bag_configs()
        self.keys = [key for config in configs for key in config.feature_names]
        self.dims = [config.embedding_dim for config in configs for _ in config.feature_names]

    def configs(self) -> Iterator[EmbeddingBagConfig]:
        """Tables of the ranking stage, in the order of its features."""
        for bags in self.bags:
            yield from cast(EmbeddingBagCollection, bags).embedding_bag_configs()

    def forward(self, inputs: Inputs, _kv_pages: None, _items: None) -> KeyedTensor:
        candidates = self.candidates(inputs)
        sizes = [*candidates.shape[:2], -1]
        pooled = [
            (rows if rows.dim() == 3 else rows.unsqueeze(1)).expand(sizes)
            for rows in self.pooled(inputs)
        ]
        for history in self.histories:
            pooled.append(cast(PaddedHistory, history).attend(candidates, inputs))
        return KeyedTensor(self.keys, self.dims, torch.cat(pooled, dim=2).flatten(0, 1))

    def candidates(self, inputs: Inputs) -> Tensor:
        """Tokens [B, N, M, E]."""
        columns = self.tokens(inputs, [self.item_key], self.attribute_keys)
        if self.num_tokens > 1:
            return torch.stack(columns, dim=2)
        return sum(columns[1:], columns[0]).unsqueeze(2)

    def pooled(self, inputs: Inputs) -> Iterator[Tensor]:
        """The ranking stage's own features: [B, E] of users, [B, N, E] of candidates."""
        for bags in self.bags:
            collection = cast(EmbeddingBagCollection, bags)
            for config in collection.embedding_bag_configs():
                table = cast(nn.Embedding, collection.embedding_bags[config.name]).weight
                mode = "mean" if config.pooling == PoolingType.MEAN else "sum"
                for key in config.feature_names:
                    single = key in inputs
                    yield look_up(table, inputs[key]) if single else pool(table, inputs, key, mode)


class PaddedRank(nn.Module):
    """Candidates over K/V, then the ranking stage as it is: logits [B, N].

    Args:
        model: of whose program a copy calls ``collection`` in the place of the eager one.
        collection: gives the features.
    """

    def __init__(self, model: RankingModel, collection: PaddedCollection) -> None:
        super().__init__()
        self.ranker = copy.copy(model.ranker)
        for node in self.ranker.graph.nodes:
            if node.op == "call_module" and isinstance(
                self.ranker.get_submodule(node.target), KVShareEmbeddingBagCollection
            ):
                self.ranker.set_submodule(node.target, collection)

    def forward(self, inputs: Inputs) -> list[Tensor]:
        dense = inputs[DENSE]  # [B, N, num_dense]
        logits = self.ranker(dense.flatten(0, 1), inputs, None, None)
        return [logits.view(dense.shape[:2])]


def padded_graphs(model: RankingModel, schema: FeatureSchema) -> dict[str, nn.Module]:
    """What a model computes, as graphs of tensors by name; their weights are the model's.

    Args:
        model: in eval mode.
        schema: its columns.

    Returns:
        ``prefill``, ``rank`` and, if histories can be extended, ``extend``; each takes a dict of
        tensors, see ``export/pt2.py``, and gives a list of them.

    Raises:
        ConfigError: if tables of the ranking stage are sharded or quantised.
    """
    tokens = PaddedTokens(model.collection)
    poolings = cast(list[HistoryPooling], list(model.collection.poolings))
    histories = [
        PaddedHistory(pooling, history.name, tokens)
        for pooling, history in zip(poolings, schema.histories, strict=True)
    ]
    graphs: dict[str, nn.Module] = {PREFILL: PaddedPrefill(histories)}
    if not isinstance(poolings[0].tower.encoder, BidirectionalEncoder):
        graphs[EXTEND] = PaddedExtend(histories)
    graphs[RANK] = PaddedRank(model, PaddedCollection(model.collection, histories, tokens))
    return graphs


def values_name(key: str) -> str:
    """Name of the ids [V] of a key's bags, one bag after the other."""
    return f"{key}.values"


def lengths_name(key: str) -> str:
    """Name of how many ids each bag of a key has: [B] or [B, rows], none where there is no row."""
    return f"{key}.lengths"


def doubling_ends(num_buckets: int) -> Tensor:
    """Where the buckets of ``doubling_bucket`` end, each twice as far as the one before.

    A constant of the graph: AOTInductor of torch 2.13 takes a power of integers for int64, has
    float32 of its kernel, and writes past the end of it where it uses the memory again.
    """
    return 2 ** torch.arange(num_buckets - 1)


def look_up(table: Tensor, ids: Tensor) -> Tensor:
    """Rows [..., E] of a table; zeros where there is no id."""
    rows = functional.embedding(ids.clamp(min=0), table)
    return rows.masked_fill((ids < 0).unsqueeze(-1), 0.0)


def pool(table: Tensor, inputs: Inputs, key: str, mode: str) -> Tensor:
    """Rows of a table, pooled in the bags of a key: [..., E], zeros for empty ones."""
    lengths = inputs[lengths_name(key)]
    offsets = functional.pad(lengths.flatten().cumsum(0), [1, 0])
    pooled = functional.embedding_bag(
        inputs[values_name(key)], table, offsets, mode=mode, include_last_offset=True
    )
    return pooled.view([*lengths.shape, -1])


def num_there(ids: Tensor) -> Tensor:
    """How many of each row [..., K] there are: [...]."""
    return (ids >= 0).sum(-1)


def is_within(lengths: Tensor, num_places: int) -> Tensor:
    """Which of so many places are within each of the lengths [B]: [B, places] bool."""
    return torch.arange(num_places, device=lengths.device) < lengths.unsqueeze(1)


def take_rows(kv: Tensor, rows: Tensor) -> Tensor:
    """K/V [planes, B, R, H, D] of rows [B, R] of a table [planes, T, H, D]; zeros for none."""
    taken = kv.index_select(1, rows.clamp(min=0).flatten()).unflatten(1, rows.shape)
    return taken.masked_fill((rows < 0)[:, :, None, None], 0.0)


def flat_rows(kv: Tensor, is_row: Tensor) -> Tensor:
    """Those rows of K/V [planes, B, R, H, D] that there are, one after the other."""
    return kv.flatten(1, 2).index_select(1, is_row.flatten().nonzero().squeeze(1))


def joined(behind: Tensor, rows: Tensor) -> Tensor:
    """Rows [B, R, H, D] after those behind them."""
    return rows if behind.size(1) == 0 else torch.cat([behind, rows], dim=1)


def hide(hidden: Tensor) -> Tensor:
    """The bias that hides what is marked."""
    return hidden * hidden_bias()


def cached_places(num_cached: Tensor, num_places: int) -> Tensor:
    """Places [B, K] of cached rows in their history."""
    place = torch.arange(num_places, device=num_cached.device).expand(num_cached.size(0), -1)
    return place.masked_fill(~is_within(num_cached, num_places), NO_PLACE)


def causal_bias(earlier: Tensor, places: Tensor, oldest: Tensor) -> Tensor:
    """Bias [B, 1, Q, K + Q] under which rows see those at earlier places and themselves.

    Args:
        earlier: [B, K], places of cached rows.
        places: [B, Q], of rows.
        oldest: [B, Q] or [B, 1], the first place that each of them sees.
    """
    seen = torch.cat([earlier, places], dim=1).unsqueeze(1)
    return hide((seen > places.unsqueeze(2)) | (seen < oldest.unsqueeze(2))).unsqueeze(1)


def scores_of_own(query: Tensor, own_key: Tensor) -> Tensor:
    """Scores of candidates' tokens [B, N, M, H, D] for each other: [B, N, M, M, H]."""
    scores = (query.unsqueeze(3) * own_key.unsqueeze(2)).sum(-1)
    return scores * (1.0 / math.sqrt(query.size(4)))


def weigh_own(weights: Tensor, own_value: Tensor) -> Tensor:
    """Sum of own values [B, N, M, H, D] under weights [B, N, M, M, H]: [B, N, M, H, D]."""
    return (weights.unsqueeze(-1) * own_value.unsqueeze(2)).sum(3)


def softmax_attention(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attend from rows [B, Q, H, D] to keys [B, R, H, D].

    Args:
        query: rows.
        keys: at least one.
        values: laid out as ``keys``.
        bias: [B, H, Q, R], any of which may be one; None for earlier rows and the row itself.

    Returns:
        [B, Q, H, D], and the log-sum-exp of the scores [B, Q, H].
    """
    attended, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        0.0,
        bias is None,
        attn_mask=bias,
    )
    return attended.transpose(1, 2), log_sum_exp.transpose(1, 2)


def silu_attention(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Sum of values under SiLU of scores; arguments as ``softmax_attention``'s."""
    assert bias is not None
    num_heads = query.size(2)
    query, keys, values = (turned(rows).flatten(0, 1) for rows in (query, keys, values))
    scores = torch.bmm(query, keys.transpose(1, 2)).unflatten(0, [-1, num_heads])  # [B, H, Q, R]
    weights = functional.silu(scores * (1.0 / math.sqrt(query.size(2))) + bias)
    return turned(torch.bmm(weights.flatten(0, 1), values).unflatten(0, [-1, num_heads]))


def turned(rows: Tensor) -> Tensor:
    """Rows [B, R, H, D] by heads, [B, H, R, D], or back.

    Copied at once: what makes a tensor contiguous if it is not one, or a product of four
    dimensions, asks whether a size is 1, and the graph would be one for other sizes only.
    """
    return rows.transpose(1, 2).clone(memory_format=torch.contiguous_format)

"""The baseline that anyone would write: for every candidate its user's history is encoded again.

Every candidate becomes the last row of its own copy of the history and goes through the same
weights, inside the same ranking model. It is given what can be given without sharing: chunks that
stay in cache, causal attention that skips what is masked, a last layer with one query per row.
"""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from torchrec_kvshare.collection import KVShareEmbeddingBagCollection
from torchrec_kvshare.data.schema import HISTORY_TIME, REQUEST_TIME
from torchrec_kvshare.history.causal import CausalLayer
from torchrec_kvshare.history.tower import HistoryTower, lengths_to_spans

Ranker = TypeVar("Ranker", bound=nn.Module)


class MergedEmbeddingBagCollection(EmbeddingBagCollectionInterface):
    """A KVShareEmbeddingBagCollection that pools the history without sharing; inference only.

    Args:
        collection: the tables and the tower; they are used, not copied.
        chunk_rows: events and candidates computed at once; at least one candidate always is.
    """

    def __init__(self, collection: KVShareEmbeddingBagCollection, chunk_rows: int) -> None:
        super().__init__()
        self.collection = collection
        self.chunk_rows = chunk_rows

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pool every feature for every candidate.

        Args:
            features: a VBE batch as ``data.batches.assemble`` makes it, users' candidates in order.

        Returns:
            [C, features x E], the pooled history last.
        """
        jagged_by_key = features.to_dict()
        pooled_bags = self.collection.bags(features)
        keys, inverse_indices = features.inverse_indices()
        candidate_user = inverse_indices[keys.index(HISTORY_TIME)]
        history = self.pool_history(features, jagged_by_key, candidate_user)
        names = [name for config in self.embedding_bag_configs() for name in config.feature_names]
        return KeyedTensor(
            keys=names,
            length_per_key=[self.collection.tower.dim] * len(names),
            values=torch.cat([pooled_bags.values(), history], dim=1),
        )

    def pool_history(
        self,
        features: KeyedJaggedTensor,
        jagged_by_key: dict[str, JaggedTensor],
        candidate_user: Tensor,
    ) -> Tensor:
        """One vector per candidate, each from a sequence of its own: [C, E]."""
        pooling = self.collection.pooling
        embedded = self.collection.token_embeddings(self.collection.token_features(features))
        # The tokens are made once for all rows, which is more than such a baseline would get.
        events = pooling.tokens(embedded, jagged_by_key, pooling.event_keys, pooling.event_bag_keys)
        candidates = pooling.tokens(
            embedded, jagged_by_key, [pooling.candidate_item_key], pooling.candidate_bag_keys
        )
        times = jagged_by_key[HISTORY_TIME]
        event_spans = lengths_to_spans(times.lengths())
        counts = torch.bincount(candidate_user, minlength=len(event_spans))
        pooled = []
        for user, (first, last) in enumerate(lengths_to_spans(counts)):
            seen = slice(*event_spans[user])
            elapsed = jagged_by_key[REQUEST_TIME].values()[user] - times.values()[seen]
            chunk_size = max(1, self.chunk_rows // (elapsed.numel() + 1))
            for start in range(first, last, chunk_size):
                chunk = candidates[start : min(start + chunk_size, last)]
                pooled.append(pool_chunk(self.collection.tower, events[seen], elapsed, chunk))
        return torch.cat(pooled)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The wrapped collection's."""
        return self.collection.embedding_bag_configs()

    def is_weighted(self) -> bool:
        """Never, as the wrapped collection."""
        return False


def pool_chunk(tower: HistoryTower, events: Tensor, elapsed: Tensor, candidates: Tensor) -> Tensor:
    """One user's candidates, each behind its own copy of the history.

    Args:
        tower: the encoder, in eval mode.
        events: [L, E] event tokens, oldest first.
        elapsed: [L] int64 seconds from each event to the request.
        candidates: [N, E] candidate tokens.

    Returns:
        [N, E].
    """
    history = events.expand(candidates.size(0), -1, -1)
    last_row = (candidates + tower.candidate_token).unsqueeze(1)
    rows = torch.cat([history, last_row], dim=1)  # [N, L + 1, E]
    buckets = tower.time_buckets(elapsed)
    for depth, layer in enumerate(tower.layers):
        assert isinstance(layer, CausalLayer)
        bias = layer.time_bias.index_select(0, buckets).t()  # [H, L]
        bias = functional.pad(bias, (0, 1))[None, :, None]  # [1, H, 1, L + 1]
        last = depth + 1 == tower.num_layers
        rows = _last_layer(layer, rows, bias) if last else _inner_layer(layer, rows, bias)
    return tower.head(tower.norm(rows[:, -1]))


def share_weights(model: Ranker, replaced: nn.Module, replacement: nn.Module) -> Ranker:
    """A copy of a model that owns no weights and has one module exchanged.

    Args:
        model: the model; it stays as it is.
        replaced: a module of it.
        replacement: what the copy has in its place.

    Returns:
        A model whose parameters and buffers are those of ``model``.
    """
    tensors = [*model.parameters(), *model.buffers()]
    kept: dict[int, object] = {id(tensor): tensor for tensor in tensors}
    return copy.deepcopy(model, kept | {id(replaced): replacement})


def _inner_layer(layer: CausalLayer, rows: Tensor, bias: Tensor) -> Tensor:
    """All rows one layer up: [N, L + 1, E]."""
    flat = rows.flatten(0, 1)
    query, key, value = (_heads_first(part, rows) for part in layer.project(flat))
    num_events = rows.size(1) - 1
    # Two calls instead of one with a full mask: only the causal form skips the upper triangle.
    over_candidate = functional.scaled_dot_product_attention(query[:, :, -1:], key, value, bias)
    attended = [over_candidate]
    if num_events > 0:
        query, key, value = (part[:, :, :num_events] for part in (query, key, value))
        over_events = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        attended.insert(0, over_events)
    together = torch.cat(attended, dim=2).transpose(1, 2)  # [N, L + 1, H, D]
    return layer.finish(flat, together).view_as(rows)


def _last_layer(layer: CausalLayer, rows: Tensor, bias: Tensor) -> Tensor:
    """The candidates' rows one layer up, of all other rows keys and values only: [N, 1, E]."""
    candidates = rows[:, -1]
    key, value = (_heads_first(part, rows) for part in layer.project_kv(rows.flatten(0, 1)))
    query, _, _ = layer.project(candidates)
    attended = functional.scaled_dot_product_attention(query.unsqueeze(2), key, value, bias)
    return layer.finish(candidates, attended).unsqueeze(1)


def _heads_first(projected: Tensor, rows: Tensor) -> Tensor:
    """[N x (L + 1), H, D] as [N, H, L + 1, D]."""
    return projected.unflatten(0, rows.shape[:2]).transpose(1, 2)

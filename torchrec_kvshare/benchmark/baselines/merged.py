"""The obvious baseline: the user's history is encoded again for every candidate.

Every candidate becomes the last row of its own copy of the history and goes through the same
weights, inside the same ranking model. It is as fast as it can be without sharing: chunks that fit
in the processor's cache, causal attention that skips what is masked, a last layer with one query
per row.
"""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from torchrec_kvshare.attention.operators import Visibility
from torchrec_kvshare.attention.plain import doubling_bucket
from torchrec_kvshare.features.schema import (
    REQUEST_HISTORY,
    REQUEST_TIME,
    USER,
    VECTOR,
    state_feature,
)
from torchrec_kvshare.history.causal import CausalEncoder
from torchrec_kvshare.history.encoder import NUM_TIME_BUCKETS
from torchrec_kvshare.history.pages import flat_pages
from torchrec_kvshare.history.tower import HistoryTower
from torchrec_kvshare.history.transformer import TransformerLayer
from torchrec_kvshare.model.bags import feature_names
from torchrec_kvshare.model.collection import KVShareEmbeddingBagCollection

Ranker = TypeVar("Ranker", bound=nn.Module)

NOW = 1_700_000_000  # Unix seconds


class MergedEmbeddingBagCollection(EmbeddingBagCollectionInterface):
    """A KVShareEmbeddingBagCollection that pools the history without sharing; inference only.

    Args:
        collection: its tables and tower are used, not copied.
        chunk_rows: events and candidates computed at once; at least one candidate always is.
    """

    def __init__(self, collection: KVShareEmbeddingBagCollection, chunk_rows: int) -> None:
        super().__init__()
        self.collection = collection
        self.chunk_rows = chunk_rows

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pool every feature for every candidate.

        Args:
            features: a VBE batch from ``features.batches.assemble``, users' candidates in order.

        Returns:
            [C, features x E], as the wrapped collection returns them.
        """
        jagged_by_key = features.to_dict()
        pooled_bags = self.collection.bags(features).to_dict()
        keys, inverse_indices = features.inverse_indices()
        candidate_request = inverse_indices[keys.index(USER)]
        counts = torch.bincount(candidate_request, minlength=jagged_by_key[USER].lengths().numel())
        embedded = self.collection.token_embeddings(self.collection.token_features(features))
        [(name, pooling)] = self.collection.histories.by_name().items()
        pooled = pooled_bags | {name: self.pool_history(embedded, jagged_by_key, counts)}
        if pooling.tower.has_state:
            # Encoded once per user: a state costs the baseline nothing.
            groups = self.collection.histories.group_candidates(features, jagged_by_key)
            pooled[state_feature(name)] = pooling.states(embedded, groups, jagged_by_key)
            pooled[VECTOR] = self.collection.histories.item_vectors(embedded, jagged_by_key)
        names = feature_names(self)
        return KeyedTensor(
            keys=names,
            length_per_key=[pooling.tower.spec.output_width] * len(names),
            values=torch.cat([pooled[key] for key in names], dim=1),
        )

    def pool_history(
        self,
        embedded: dict[str, JaggedTensor],
        jagged_by_key: dict[str, JaggedTensor],
        counts: Tensor,
    ) -> Tensor:
        """Return one vector per candidate, each from its own sequence: [C, E]."""
        [pooling] = self.collection.histories.by_name().values()
        # The tokens are made once for all rows, which favours the baseline.
        events = pooling.event_tokens(embedded, jagged_by_key)
        candidates = self.collection.histories.candidate_tokens(embedded, jagged_by_key)
        lengths = jagged_by_key[pooling.time_key].lengths().tolist()
        events_of = events.split(lengths)
        times_of = jagged_by_key[pooling.time_key].values().split(lengths)
        rows = list(range(len(counts)))
        if REQUEST_HISTORY in jagged_by_key:
            rows = jagged_by_key[REQUEST_HISTORY].values().tolist()
        pooled = []
        for request, chosen in enumerate(candidates.split(counts.tolist())):
            elapsed = jagged_by_key[REQUEST_TIME].values()[request] - times_of[rows[request]]
            own_events = events_of[rows[request]]
            pooled.append(
                pool_without_sharing(
                    pooling.tower, own_events, elapsed, chosen, chunk_rows=self.chunk_rows
                )
            )
        return torch.cat(pooled)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """Return the configs of the wrapped collection."""
        return self.collection.embedding_bag_configs()

    def is_weighted(self) -> bool:
        """Return what the wrapped collection returns."""
        return self.collection.is_weighted()


def pool_without_sharing(
    tower: HistoryTower, events: Tensor, elapsed: Tensor, candidates: Tensor, chunk_rows: int
) -> Tensor:
    """Return one user's candidates [N, E], each over a history that is encoded for it alone.

    Args:
        tower: the encoder, in eval mode.
        events: [L, E] event tokens, oldest first.
        elapsed: [L] int64 seconds from each event to the request.
        candidates: [N, M, E] candidate tokens.
        chunk_rows: events and candidates computed at once; at least one candidate always is.
    """
    pool = _pool_causal if _is_plain_causal(tower) else _pool_alone
    chunk_size = max(1, chunk_rows // (elapsed.numel() + 1))
    parts = candidates.split(chunk_size)
    return torch.cat([pool(tower, events, elapsed, part) for part in parts])


def _is_plain_causal(tower: HistoryTower) -> bool:
    return (
        isinstance(tower.encoder, CausalEncoder) and not tower.spec.window and tower.num_tokens == 1
    )


def _pool_alone(tower: HistoryTower, events: Tensor, elapsed: Tensor, candidates: Tensor) -> Tensor:
    """Score candidates [N, M, E] as if each were a user of its own: [N, E]."""
    num_candidates, num_events = candidates.size(0), events.size(0)
    event_offsets = torch.arange(num_candidates + 1) * num_events
    planes = tower.prefill(events.repeat(num_candidates, 1), event_offsets)
    kv = flat_pages(planes, tower.encoder.row_offsets(event_offsets))
    now = torch.full([num_candidates], NOW)
    visibility = Visibility(
        (NOW - elapsed).repeat(num_candidates), now, torch.full([num_candidates], num_events)
    )
    rows, entered = tower.enter(candidates)
    users = torch.arange(num_candidates + 1)
    return tower.attend(rows, entered, users, kv, visibility, event_offsets)


def _pool_causal(
    tower: HistoryTower, events: Tensor, elapsed: Tensor, candidates: Tensor
) -> Tensor:
    """Score candidates of a causal tower, each the last row of its copy of the history: [N, E].

    Args:
        tower: the encoder, in eval mode.
        events: [L, E] event tokens, oldest first.
        elapsed: [L] int64 seconds from each event to the request.
        candidates: [N, 1, E] candidate tokens.
    """
    history = tower.token_in(events).expand(candidates.size(0), -1, -1)
    candidates = tower.token_in(candidates) + tower.candidate_token
    rows = torch.cat([history, candidates], dim=1)  # [N, L + 1, E]
    buckets = doubling_bucket(elapsed, NUM_TIME_BUCKETS)
    for depth, layer in enumerate(tower.encoder.layers):
        assert isinstance(layer, TransformerLayer)
        bias = tower.encoder.time_bias[depth].index_select(0, buckets).t()  # [H, L]
        bias = functional.pad(bias, (0, 1))[None, :, None]  # [1, H, 1, L + 1]
        last = depth + 1 == len(tower.encoder.layers)
        rows = _last_layer(layer, rows, bias) if last else _inner_layer(layer, rows, bias)
    return tower.head(tower.norm(rows[:, -1]))


def merged_ranker(model: Ranker, chunk_rows: int) -> Ranker:
    """Return the same ranking model over the same weights, its history encoded per candidate.

    Args:
        model: a ranking model with one history; it stays as it is.
        chunk_rows: events and candidates computed at once; at least one candidate always is.
    """
    collection = next(m for m in model.modules() if isinstance(m, KVShareEmbeddingBagCollection))
    return share_weights(model, collection, MergedEmbeddingBagCollection(collection, chunk_rows))


def share_weights(model: Ranker, replaced: nn.Module, replacement: nn.Module) -> Ranker:
    """Copy a model without its weights, with one module exchanged.

    Args:
        model: the model; it stays as it is.
        replaced: one of its modules.
        replacement: the module that the copy has instead.

    Returns:
        A model whose parameters and buffers are those of ``model``.
    """
    tensors = [*model.parameters(), *model.buffers()]
    kept: dict[int, object] = {id(tensor): tensor for tensor in tensors}
    return copy.deepcopy(model, kept | {id(replaced): replacement})


def _inner_layer(layer: TransformerLayer, rows: Tensor, bias: Tensor) -> Tensor:
    """Compute one layer for all rows: [N, L + 1, E]."""
    query, key, value = (part.transpose(1, 2) for part in layer.heads(layer.project(rows)))
    num_events = rows.size(1) - 1
    # Two calls instead of one with a full mask: only causal attention skips the upper triangle.
    over_candidate = functional.scaled_dot_product_attention(query[:, :, -1:], key, value, bias)
    attended = [over_candidate]
    if num_events > 0:
        query, key, value = (part[:, :, :num_events] for part in (query, key, value))
        over_events = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        attended.insert(0, over_events)
    return layer.finish(rows, torch.cat(attended, dim=2).transpose(1, 2))


def _last_layer(layer: TransformerLayer, rows: Tensor, bias: Tensor) -> Tensor:
    """Compute one layer for the candidates' rows; others give keys and values only: [N, 1, E]."""
    key, value = (part.transpose(1, 2) for part in layer.project_kv(rows))
    query, _, _ = layer.heads(layer.project(rows[:, -1:]))
    attended = functional.scaled_dot_product_attention(query.transpose(1, 2), key, value, bias)
    return layer.finish(rows[:, -1:], attended.transpose(1, 2))

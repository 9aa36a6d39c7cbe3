"""History attention as one more pooling of an ``EmbeddingBagCollection``.

To everything around it the module is an EBC: ids in, one vector per candidate and feature out; the
pooled history is the last feature. So TorchRec's ranking models take it as it is. K/V comes either
from the history in the batch (prefill, then attend) or, through page ids in the batch, from a table
of pages.
"""

from functools import partial
from typing import Final

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollectionInterface,
    EmbeddingCollection,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from torchrec_kvshare.bags import user_candidate_bags
from torchrec_kvshare.data.schema import (
    CANDIDATE_TIME,
    HISTORY_PAGES,
    HISTORY_TIME,
    ITEM,
    REQUEST_TIME,
    VISIBLE_EVENTS,
    FeatureSchema,
    candidate_key,
    history_key,
)
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.history.tower import HistoryTower, lengths_to_spans
from torchrec_kvshare.labels import ATTEND, PREFILL

HISTORY_FEATURE = "history"  # name of the pooled vector in the resulting KeyedTensor
POSITION = "position"
START_SCALE = {POSITION: 0.25}  # of its table against the others: what an event is matters most


class TokenFeatures(nn.Module):
    """The keys that tokens are made of, each as one bag of stride 1.

    A sharded EmbeddingCollection expands every key of a VBE batch to candidate rows without a word;
    with one bag per key there is nothing to expand, and row lengths are taken from the batch
    itself. A key that the batch does not have gets an empty bag: prefill has no candidates, a
    cached score no history.
    """

    def __init__(self, keys: list[str], position_key: str, lengths_key: str) -> None:
        super().__init__()
        self.keys = keys
        self.position_key = position_key
        self.lengths_key = lengths_key

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        jagged_by_key = features.to_dict()
        values: list[Tensor] = []
        lengths: list[int] = []
        for key in self.keys:
            if key == self.position_key and self.lengths_key in jagged_by_key:
                values.append(self.positions(jagged_by_key[self.lengths_key].lengths()))
            elif key in jagged_by_key:
                values.append(jagged_by_key[key].values())
            else:
                values.append(features.values()[:0])
            lengths.append(values[-1].size(0))
        return KeyedJaggedTensor(
            keys=self.keys,
            values=torch.cat(values),
            lengths=torch.tensor(lengths, dtype=torch.int64, device=features.device()),
            stride=1,
        )

    def positions(self, lengths: Tensor) -> Tensor:
        """Index of each event from its user's oldest: [T]."""
        lengths = lengths.to(torch.int64)
        ends = lengths.cumsum(0)
        firsts = torch.repeat_interleave(ends - lengths, lengths)
        return torch.arange(firsts.size(0), device=lengths.device) - firsts


class HistoryPooling(nn.Module):
    """Token embeddings and K/V into one vector per candidate; a leaf that pipelines trace round.

    Args:
        tower: the encoder.
        event_keys: keys with one id per event, the item first.
        candidate_item_key: key with one id per candidate.
        event_bag_keys: multi-valued keys of events.
        candidate_bag_keys: multi-valued keys of candidates.
    """

    # TorchScript sees no module globals: what the forward reads by name are constants of the class.
    history_time: Final[str] = HISTORY_TIME
    history_pages: Final[str] = HISTORY_PAGES
    request_time: Final[str] = REQUEST_TIME
    candidate_time: Final[str] = CANDIDATE_TIME
    visible_events: Final[str] = VISIBLE_EVENTS
    prefill_label: Final[str] = PREFILL
    attend_label: Final[str] = ATTEND
    # TorchScript cannot tell the type of an empty list: a schema may have no multi-valued columns.
    event_bag_keys: list[str]
    candidate_bag_keys: list[str]

    def __init__(
        self,
        tower: HistoryTower,
        event_keys: list[str],
        candidate_item_key: str,
        event_bag_keys: list[str],
        candidate_bag_keys: list[str],
    ) -> None:
        super().__init__()
        self.tower = tower
        self.event_keys = event_keys
        self.candidate_item_key = candidate_item_key
        self.event_bag_keys = event_bag_keys
        self.candidate_bag_keys = candidate_bag_keys

    def tokens(
        self,
        embedded: dict[str, JaggedTensor],
        features: dict[str, JaggedTensor],
        keys: list[str],
        bag_keys: list[str],
    ) -> Tensor:
        """Sum of what one event or candidate is made of: [rows, E]."""
        token = embedded[keys[0]].values()
        for key in keys[1:]:
            token = token + embedded[key].values()
        for key in bag_keys:
            lengths = features[key].lengths().to(torch.int64)
            row = torch.repeat_interleave(torch.arange(token.size(0), device=token.device), lengths)
            token = token.index_add(0, row, embedded[key].values())
        return token

    def prefill(
        self, embedded: dict[str, JaggedTensor], features: dict[str, JaggedTensor]
    ) -> Tensor:
        """K/V of all users' histories: [layers, 2, T, H, D]."""
        events = self.tokens(embedded, features, self.event_keys, self.event_bag_keys)
        return self.tower.prefill(events, lengths_to_spans(features[self.history_time].lengths()))

    def forward(
        self,
        embedded: dict[str, JaggedTensor],
        features: dict[str, JaggedTensor],
        candidate_user: Tensor,
        kv_pages: Tensor | None,
    ) -> Tensor:
        """One vector per candidate, in the candidates' own order: [C, E]."""
        order = torch.argsort(candidate_user, stable=True)
        event_lengths = features[self.history_time].lengths()
        counts = torch.bincount(candidate_user, minlength=event_lengths.size(0))
        candidate_spans = lengths_to_spans(counts)
        candidates = self.tokens(
            embedded, features, [self.candidate_item_key], self.candidate_bag_keys
        ).index_select(0, order)
        if kv_pages is not None:
            kv, event_spans = read_pages(kv_pages, features[self.history_pages], event_lengths)
        else:
            # Labelled here, not in prefill: who calls that for its own sake has a label round it.
            with torch.autograd.profiler.record_function(self.prefill_label):
                kv = self.prefill(embedded, features)
            event_spans = lengths_to_spans(event_lengths)
        with torch.autograd.profiler.record_function(self.attend_label):
            if self.visible_events in features:
                pooled = self.tower.attend_prefix(
                    candidates,
                    kv,
                    features[self.history_time].values(),
                    features[self.candidate_time].values().index_select(0, order),
                    features[self.visible_events].values().index_select(0, order),
                    candidate_spans,
                    event_spans,
                )
            else:
                request_time = torch.repeat_interleave(
                    features[self.request_time].values(), event_lengths.to(torch.int64)
                )
                elapsed = request_time - features[self.history_time].values()
                pooled = self.tower.attend(candidates, kv, elapsed, candidate_spans, event_spans)
        return torch.empty_like(pooled).index_copy(0, order, pooled)


def read_pages(
    kv_pages: Tensor, pages: JaggedTensor, event_lengths: Tensor
) -> tuple[Tensor, list[tuple[int, int]]]:
    """K/V rows of users whose events lie in pages, and where each user's rows are.

    Args:
        kv_pages: [layers, 2, P, S, H, D], the table of pages of S events.
        pages: page ids of each user, oldest events first; B rows.
        event_lengths: [B] int, events of each user; the last page may be partly filled.

    Returns:
        ``kv`` [layers, 2, R, H, D] and the B spans in R. The table itself, not a copy, while every
        user's pages follow each other; else the pages of this batch side by side.
    """
    page_size = kv_pages.size(3)
    ids = pages.values()
    page_spans = lengths_to_spans(pages.lengths())
    lengths: list[int] = event_lengths.tolist()
    host_ids: list[int] = ids.tolist()
    in_place = True
    for first, last in page_spans:
        for place in range(first + 1, last):
            in_place = in_place and host_ids[place] == host_ids[place - 1] + 1
    kv = kv_pages if in_place else kv_pages.index_select(2, ids)
    spans: list[tuple[int, int]] = []
    for user in range(len(lengths)):
        first, last = page_spans[user]
        start = 0
        if last > first:
            start = (host_ids[first] if in_place else first) * page_size
        spans.append((start, start + lengths[user]))
    return kv.flatten(2, 3), spans


class KVShareEmbeddingBagCollection(EmbeddingBagCollectionInterface):
    """An EmbeddingBagCollection with one more feature: the history, pooled by attention.

    Args:
        bags: the ranking stage's own collection; TorchRec's own kind will do.
        token_embeddings: tables of the tokens' columns; history and candidates share the item's.
        tower: the encoder; its width is the width of the pooled vector.
        schema: which columns events and candidates have.

    Raises:
        ConfigError: if the widths of the tables differ from the tower's.

    Example:
        >>> from torchrec_kvshare.data.schema import FeatureSchema, Vocabulary, Window
        >>> vocabularies = {"user_id": Vocabulary(["u"]), "item_id": Vocabulary(["a", "b"])}
        >>> schema = FeatureSchema(vocabularies, (), False, (), (), Window(8, 4))
        >>> collection = kvshare_collection(schema, 16, 2, 4, 0.0)
        >>> [config.feature_names for config in collection.embedding_bag_configs()]
        [['user_id'], ['candidates.item_id'], ['history']]
    """

    # Compiled, the property would be bound to the type of the first tower that a process scripts: a
    # second model with another number of layers could not be exported.
    __jit_unused_properties__ = ("tower",)

    def __init__(
        self,
        bags: EmbeddingBagCollectionInterface,
        token_embeddings: EmbeddingCollection,
        tower: HistoryTower,
        schema: FeatureSchema,
    ) -> None:
        super().__init__()
        for config in [*bags.embedding_bag_configs(), *token_embeddings.embedding_configs()]:
            if config.embedding_dim != tower.dim:
                raise ConfigError(
                    f"table {config.name} is {config.embedding_dim} wide; the tower is {tower.dim}"
                )
        self.bags = bags
        self.token_embeddings = token_embeddings
        event_keys = [history_key(column) for column in (*schema.event_columns, POSITION)]
        self.pooling = HistoryPooling(
            tower,
            event_keys,
            candidate_key(ITEM),
            [history_key(column) for column in schema.item_attributes],
            [candidate_key(column) for column in schema.item_attributes],
        )
        token_keys = [k for c in token_embeddings.embedding_configs() for k in c.feature_names]
        self.token_features = TokenFeatures(token_keys, history_key(POSITION), HISTORY_TIME)
        self._configs: list[EmbeddingBagConfig] = [
            *bags.embedding_bag_configs(),
            EmbeddingBagConfig(
                name=HISTORY_FEATURE,
                embedding_dim=tower.dim,
                num_embeddings=1,
                feature_names=[HISTORY_FEATURE],
            ),
        ]
        self._output_keys: list[str] = [key for c in self._configs for key in c.feature_names]
        self._output_dims: list[int] = [tower.dim] * len(self._output_keys)

    @property
    def tower(self) -> HistoryTower:
        """The encoder."""
        return self.pooling.tower

    def forward(self, features: KeyedJaggedTensor, kv_pages: Tensor | None = None) -> KeyedTensor:
        """Pool every feature for every candidate.

        Args:
            features: a VBE batch as ``data.batches.assemble`` makes it. Each candidate sees all
                events of its user, or, with the key ``candidates.visible_events``, that many of the
                oldest.
            kv_pages: [layers, 2, P, S, H, D]; with it the K/V is read through the key
                ``history.pages`` and the history's own columns, but for its times, are not needed.

        Returns:
            [C, features x E], the pooled history last.
        """
        embedded = self.token_embeddings(self.token_features(features))
        pooled_bags = self.bags(features)
        keys, inverse_indices = features.inverse_indices()
        candidate_user = inverse_indices[keys.index(self.pooling.history_time)]
        history = self.pooling(embedded, features.to_dict(), candidate_user, kv_pages)
        return KeyedTensor(
            keys=self._output_keys,
            length_per_key=self._output_dims,
            values=torch.cat([pooled_bags.values(), history], dim=1),
        )

    @torch.jit.export
    def prefill(self, features: KeyedJaggedTensor) -> Tensor:
        """K/V of all users' histories in the batch.

        Args:
            features: the history's keys; others are not looked at.

        Returns:
            [layers, 2, T, H, D], users one after the other.
        """
        embedded = self.token_embeddings(self.token_features(features))
        return self.pooling.prefill(embedded, features.to_dict())

    @torch.jit.ignore
    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The ranking stage's tables, and one entry for the pooled history."""
        return self._configs

    @torch.jit.ignore
    def is_weighted(self) -> bool:
        """Never: the attention makes its own weights."""
        return False


def token_tables(schema: FeatureSchema, dim: int) -> list[EmbeddingConfig]:
    """Tables of the tokens: what events and candidates have in common they share.

    All but positions start on one scale: TorchRec's own start shrinks with the number of rows, and
    in a sum of columns the item would drown among columns of few values.
    """
    rows_by_column = {
        c: schema.num_rows(c) for c in (*schema.event_columns, *schema.item_attributes)
    }
    rows_by_column[POSITION] = schema.window.max_history
    shared = {ITEM, *schema.item_attributes}
    return [
        EmbeddingConfig(
            name=f"token_{column}",
            embedding_dim=dim,
            num_embeddings=num_rows,
            feature_names=[history_key(column)]
            + ([candidate_key(column)] if column in shared else []),
            init_fn=partial(nn.init.normal_, std=dim**-0.5 * START_SCALE.get(column, 1.0)),
        )
        for column, num_rows in rows_by_column.items()
    ]


def kvshare_collection(
    schema: FeatureSchema, dim: int, num_layers: int, num_heads: int, dropout: float
) -> KVShareEmbeddingBagCollection:
    """The collection for a schema, every table ``dim`` wide.

    Args:
        schema: which columns there are and how many rows each needs.
        dim: width E of all tables and of the tower.
        num_layers: layers of the tower.
        num_heads: heads of each layer; must divide ``dim``.
        dropout: share of activations dropped in training.

    Returns:
        A collection with freshly drawn weights.
    """
    return KVShareEmbeddingBagCollection(
        user_candidate_bags(schema, dim),
        EmbeddingCollection(tables=token_tables(schema, dim)),
        HistoryTower(dim, num_layers, num_heads, dropout),
        schema,
    )

"""History attention as one more pooling of an ``EmbeddingBagCollection``.

To everything around it the module is an EBC: ids in, one vector per candidate and feature out; the
pooled history is the last feature. So TorchRec's ranking models take it as it is. K/V comes either
from the history in the batch (prefill, then attend) or, through page ids in the batch, from a table
of pages.
"""

from collections.abc import Mapping
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

from torchrec_kvshare.attention.shared import Spans, lengths_to_spans
from torchrec_kvshare.bags import user_candidate_bags
from torchrec_kvshare.data.schema import (
    CANDIDATE_TIME,
    FIRST_PLACE,
    ITEM,
    PAGES,
    POSITION,
    REQUEST_HISTORY,
    REQUEST_TIME,
    TIME,
    USER,
    FeatureSchema,
    History,
    candidate_key,
    history_key,
    visible_key,
)
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.history.kinds import TowerSpec
from torchrec_kvshare.history.tower import HistoryTower
from torchrec_kvshare.labels import ATTEND, PREFILL

START_POSITION_SCALE = 0.25  # against the other tables: what an event is matters most


class TokenFeatures(nn.Module):
    """The keys that tokens are made of, each as one bag of stride 1.

    A sharded EmbeddingCollection expands every key of a VBE batch to candidate rows without a word;
    with one bag per key there is nothing to expand, and row lengths are taken from the batch
    itself. A key that the batch does not have gets an empty bag: prefill has no candidates, a
    cached score no history.

    Args:
        keys: of all token tables.
        histories: names; their positions are counted here, from the lengths of their items.
    """

    position_keys: list[str]

    def __init__(self, keys: list[str], histories: list[str]) -> None:
        super().__init__()
        self.keys = keys
        self.position_keys = [history_key(name, POSITION) for name in histories]
        self.item_keys: list[str] = [history_key(name, ITEM) for name in histories]
        self.first_keys: list[str] = [history_key(name, FIRST_PLACE) for name in histories]

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        jagged_by_key = features.to_dict()
        values: list[Tensor] = []
        lengths: list[int] = []
        for key in self.keys:
            if key in self.position_keys:
                history = self.position_keys.index(key)
                values.append(self.positions(features, jagged_by_key, history))
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

    def positions(
        self, features: KeyedJaggedTensor, jagged_by_key: dict[str, JaggedTensor], history: int
    ) -> Tensor:
        """Place of each event of a history from the oldest that its user's window holds: [T]."""
        item_key, first_key = self.item_keys[history], self.first_keys[history]
        if item_key not in jagged_by_key:
            return features.values()[:0]
        lengths = jagged_by_key[item_key].lengths().to(torch.int64)
        ends = lengths.cumsum(0)
        starts = torch.repeat_interleave(ends - lengths, lengths)
        position = torch.arange(starts.size(0), device=lengths.device) - starts
        if first_key in jagged_by_key:
            position += torch.repeat_interleave(jagged_by_key[first_key].values(), lengths)
        return position


class CandidateTokens(nn.Module):
    """Tokens of candidates, the same for every history: [C, M, E].

    Args:
        item_attributes: multi-valued columns of candidates.
        num_tokens: 1 for the sum of all columns, or one for the item and one for each attribute.

    Raises:
        ConfigError: if there are neither 1 nor as many tokens as columns.
    """

    # TorchScript cannot tell the type of an empty list: a schema may have no multi-valued columns.
    attribute_keys: list[str]

    def __init__(self, item_attributes: tuple[str, ...], num_tokens: int) -> None:
        super().__init__()
        if num_tokens not in (1, 1 + len(item_attributes)):
            raise ConfigError(
                f"num_tokens is {num_tokens}; 1 is allowed, or {1 + len(item_attributes)}: the "
                f"item and its attributes {list(item_attributes)}"
            )
        self.num_tokens = num_tokens
        self.item_key: str = candidate_key(ITEM)
        self.attribute_keys = [candidate_key(column) for column in item_attributes]

    def forward(
        self, embedded: dict[str, JaggedTensor], features: dict[str, JaggedTensor]
    ) -> Tensor:
        item = embedded[self.item_key].values()
        tokens: list[Tensor] = []
        for key in self.attribute_keys:
            nothing = torch.zeros_like(item) if self.num_tokens > 1 else item
            token = add_bags(nothing, embedded[key].values(), features[key].lengths())
            if self.num_tokens > 1:
                tokens.append(token)
            else:
                item = token
        return torch.stack([item] + tokens, dim=1)


def add_bags(rows: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Rows [R, E], each plus the sum of its bag of values; ``lengths`` [R] are the bags'."""
    counts = lengths.to(torch.int64)
    row = torch.repeat_interleave(torch.arange(rows.size(0), device=rows.device), counts)
    return rows.index_add(0, row, values)


class HistoryPooling(nn.Module):
    """One history's events and K/V into one vector per candidate.

    Args:
        tower: the encoder.
        history: what the tower reads.
        event_columns: columns with one id per event, the item first.
        bag_columns: multi-valued columns of events.
    """

    # TorchScript sees no module globals: what the forward reads by name are constants of the class.
    request_time: Final[str] = REQUEST_TIME
    request_history: Final[str] = REQUEST_HISTORY
    candidate_time: Final[str] = CANDIDATE_TIME
    event_bag_keys: list[str]

    def __init__(
        self,
        tower: HistoryTower,
        history: History,
        event_columns: tuple[str, ...],
        bag_columns: tuple[str, ...],
    ) -> None:
        super().__init__()
        self.tower = tower
        self.event_keys: list[str] = [history_key(history.name, c) for c in event_columns]
        self.event_bag_keys = [history_key(history.name, c) for c in bag_columns]
        self.time_key: str = history_key(history.name, TIME)
        self.pages_key: str = history_key(history.name, PAGES)
        self.visible_key: str = visible_key(history.name)

    def event_tokens(
        self, embedded: dict[str, JaggedTensor], features: dict[str, JaggedTensor]
    ) -> Tensor:
        """Sum of what one event is made of: [T, E]."""
        token = embedded[self.event_keys[0]].values()
        for key in self.event_keys[1:]:
            token = token + embedded[key].values()
        for key in self.event_bag_keys:
            token = add_bags(token, embedded[key].values(), features[key].lengths())
        return token

    def event_lengths(self, features: dict[str, JaggedTensor]) -> list[int]:
        """Events of each history in the batch."""
        lengths: list[int] = features[self.time_key].lengths().tolist()
        return lengths

    def prefill(
        self, embedded: dict[str, JaggedTensor], features: dict[str, JaggedTensor]
    ) -> Tensor:
        """K/V of all users' histories: [planes, R, H, D]."""
        events = self.event_tokens(embedded, features)
        return self.tower.prefill(events, lengths_to_spans(self.event_lengths(features)))

    def extend(
        self,
        embedded: dict[str, JaggedTensor],
        features: dict[str, JaggedTensor],
        cached: Tensor,
        cached_rows: Tensor,
    ) -> Tensor:
        """K/V of new events behind cached rows, ``cached_rows`` [B] of each user."""
        rows: list[int] = cached_rows.tolist()
        events = self.event_tokens(embedded, features)
        event_spans = lengths_to_spans(self.event_lengths(features))
        return self.tower.extend(cached, lengths_to_spans(rows), events, event_spans)

    def forward(
        self,
        candidates: Tensor,
        entered: Tensor,
        candidate_spans: list[tuple[int, int]],
        order: Tensor,
        kv: Tensor,
        event_spans: list[tuple[int, int]],
        features: dict[str, JaggedTensor],
    ) -> Tensor:
        """One vector per candidate, candidates grouped by request: [C, E]."""
        times = torch.split(features[self.time_key].values(), self.event_lengths(features))
        rows = self.history_of_requests(features, len(event_spans))
        spans = Spans(candidate_spans, [event_spans[row] for row in rows])
        event_time = [times[row] for row in rows]
        if self.visible_key in features:
            return self.tower.attend_prefix(
                candidates,
                entered,
                kv,
                event_time,
                features[self.candidate_time].values().index_select(0, order),
                features[self.visible_key].values().index_select(0, order),
                spans,
            )
        request_time = features[self.request_time].values()
        elapsed = [request_time[place] - event_time[place] for place in range(len(rows))]
        return self.tower.attend(candidates, entered, kv, elapsed, spans)

    def history_of_requests(
        self, features: dict[str, JaggedTensor], num_histories: int
    ) -> list[int]:
        """Row of the histories that each request reads; its own, if the batch does not say."""
        if self.request_history in features:
            rows: list[int] = features[self.request_history].values().tolist()
            return rows
        return list(range(num_histories))


def read_pages(
    kv_pages: Tensor, pages: JaggedTensor, row_lengths: list[int]
) -> tuple[Tensor, list[tuple[int, int]]]:
    """K/V rows of users whose histories lie in pages, and where each user's rows are.

    Args:
        kv_pages: [planes, P, S, H, D], the table of pages of S rows.
        pages: page ids of each user, oldest rows first; B rows.
        row_lengths: rows of each user; the last page may be partly filled.

    Returns:
        ``kv`` [planes, R, H, D] and the B spans in R. The table itself, not a copy, while every
        user's pages follow each other; else the pages of this batch side by side.
    """
    page_size = kv_pages.size(2)
    ids = pages.values()
    page_counts: list[int] = pages.lengths().tolist()
    page_spans = lengths_to_spans(page_counts)
    host_ids: list[int] = ids.tolist()
    in_place = True
    for first, last in page_spans:
        for place in range(first + 1, last):
            in_place = in_place and host_ids[place] == host_ids[place - 1] + 1
    kv = kv_pages if in_place else kv_pages.index_select(1, ids)
    spans: list[tuple[int, int]] = []
    for user in range(len(row_lengths)):
        first, last = page_spans[user]
        start = 0
        if last > first:
            start = (host_ids[first] if in_place else first) * page_size
        spans.append((start, start + row_lengths[user]))
    return kv.flatten(1, 2), spans


class KVShareEmbeddingBagCollection(EmbeddingBagCollectionInterface):
    """An EmbeddingBagCollection with one more feature for each history, pooled by attention.

    Args:
        bags: the ranking stage's own collection; TorchRec's own kind will do.
        token_embeddings: tables of the tokens' columns; histories and candidates share the item's.
        towers: an encoder for each history of the schema; their width is that of the pooled vector.
        schema: which columns events and candidates have.

    Raises:
        ConfigError: if the widths of the tables differ from the towers', or a history has no tower.

    Example:
        >>> from torchrec_kvshare.data.schema import FeatureSchema, History, Vocabulary, Window
        >>> vocabularies = {"user_id": Vocabulary(["u"]), "item_id": Vocabulary(["a", "b"])}
        >>> histories = (History("history", Window(8, 4)),)
        >>> schema = FeatureSchema(vocabularies, (), False, (), (), histories)
        >>> collection = kvshare_collection(schema, TowerSpec("causal", 16, 2, 4))
        >>> [config.feature_names for config in collection.embedding_bag_configs()]
        [['user_id'], ['candidates.item_id'], ['history']]
    """

    user_key: Final[str] = USER
    prefill_label: Final[str] = PREFILL
    attend_label: Final[str] = ATTEND

    def __init__(
        self,
        bags: EmbeddingBagCollectionInterface,
        token_embeddings: EmbeddingCollection,
        towers: Mapping[str, HistoryTower],
        schema: FeatureSchema,
    ) -> None:
        super().__init__()
        names = [history.name for history in schema.histories]
        if names != list(towers):
            raise ConfigError(f"towers are of {list(towers)}; the schema's histories are {names}")
        dim = towers[names[0]].dim
        for config in [*bags.embedding_bag_configs(), *token_embeddings.embedding_configs()]:
            if config.embedding_dim != dim:
                raise ConfigError(
                    f"table {config.name} is {config.embedding_dim} wide; the tower is {dim}"
                )
        self.bags = bags
        self.token_embeddings = token_embeddings
        token_keys = [k for c in token_embeddings.embedding_configs() for k in c.feature_names]
        self.token_features = TokenFeatures(token_keys, names)
        self.candidate_tokens = CandidateTokens(schema.item_attributes, towers[names[0]].num_tokens)
        self.poolings = nn.ModuleList()
        for history in schema.histories:
            positions = (POSITION,) if history_key(history.name, POSITION) in token_keys else ()
            columns = (*schema.event_columns, *positions)
            self.poolings.append(
                HistoryPooling(towers[history.name], history, columns, schema.item_attributes)
            )
        self._configs: list[EmbeddingBagConfig] = [
            *bags.embedding_bag_configs(),
            *[
                EmbeddingBagConfig(
                    name=name, embedding_dim=dim, num_embeddings=1, feature_names=[name]
                )
                for name in names
            ],
        ]
        self._output_keys: list[str] = [key for c in self._configs for key in c.feature_names]
        self._output_dims: list[int] = [dim] * len(self._output_keys)

    @torch.jit.ignore
    def towers(self) -> list[HistoryTower]:
        """The encoders, in the order of the schema's histories."""
        return [p.tower for p in self.poolings if isinstance(p, HistoryPooling)]

    def forward(
        self,
        features: KeyedJaggedTensor,
        kv_pages: list[Tensor] | None = None,
        items: list[Tensor] | None = None,
    ) -> KeyedTensor:
        """Pool every feature for every candidate.

        Args:
            features: a VBE batch as ``data.batches.assemble`` makes it. Each candidate sees all
                events of its user, or, with a key ``visible_key``, that many of the oldest.
            kv_pages: for each history [planes, P, S, H, D]; with them the K/V is read through the
                keys ``pages`` and the histories' columns, but for the times, are not needed.
            items: for each history what ``project_candidates`` gave for these candidates; None
                computes it.

        Returns:
            [C, features x E], the pooled histories last.
        """
        jagged_by_key = features.to_dict()
        embedded = self.token_embeddings(self.token_features(features))
        keys, inverse_indices = features.inverse_indices()
        candidate_request = inverse_indices[keys.index(self.user_key)]
        num_requests = jagged_by_key[self.user_key].lengths().size(0)
        order = torch.argsort(candidate_request, stable=True)
        counts: list[int] = torch.bincount(candidate_request, minlength=num_requests).tolist()
        candidate_spans = lengths_to_spans(counts)
        values: list[Tensor] = [self.bags(features).values()]
        tokens: list[Tensor] = []
        if items is None:
            tokens.append(self.candidate_tokens(embedded, jagged_by_key).index_select(0, order))
        for place, pooling in enumerate(self.poolings):
            lengths = pooling.event_lengths(jagged_by_key)
            if kv_pages is not None:
                row_lengths = [pooling.tower.encoder.num_rows(length) for length in lengths]
                pages = jagged_by_key[pooling.pages_key]
                kv, event_spans = read_pages(kv_pages[place], pages, row_lengths)
            else:
                # Labelled here, not in prefill: who calls that for its own sake has a label there.
                with torch.autograd.profiler.record_function(self.prefill_label):
                    kv = pooling.prefill(embedded, jagged_by_key)
                event_spans = pooling.tower.row_spans(lengths)
            with torch.autograd.profiler.record_function(self.attend_label):
                if items is None:
                    rows, entered = pooling.tower.enter(tokens[0])
                else:
                    both = items[place].index_select(0, order)
                    rows, entered = both[:, :, : pooling.tower.dim], both[:, :, pooling.tower.dim :]
                pooled = pooling(
                    rows, entered, candidate_spans, order, kv, event_spans, jagged_by_key
                )
            values.append(torch.empty_like(pooled).index_copy(0, order, pooled))
        return KeyedTensor(
            keys=self._output_keys,
            length_per_key=self._output_dims,
            values=torch.cat(values, dim=1),
        )

    @torch.jit.export
    def prefill(self, features: KeyedJaggedTensor) -> list[Tensor]:
        """K/V of all users' histories in the batch.

        Args:
            features: the histories' keys; others are not looked at.

        Returns:
            For each history [planes, R, H, D], users one after the other.
        """
        jagged_by_key = features.to_dict()
        embedded = self.token_embeddings(self.token_features(features))
        return [pooling.prefill(embedded, jagged_by_key) for pooling in self.poolings]

    @torch.jit.export
    def extend(
        self, features: KeyedJaggedTensor, cached: list[Tensor], cached_rows: list[Tensor]
    ) -> list[Tensor]:
        """K/V of new events on top of what is cached of the events before them.

        Args:
            features: the histories' keys with the new events alone, and with ``first_place``, the
                place of the first of them in the window.
            cached: for each history [planes, R, H, D], users one after the other: the rows of
                ``reusable_events``.
            cached_rows: for each history [B] int64, rows of each user.

        Returns:
            For each history [planes, new rows, H, D].

        Raises:
            ValueError: if a history is of a kind that cannot be extended.
        """
        jagged_by_key = features.to_dict()
        embedded = self.token_embeddings(self.token_features(features))
        extended: list[Tensor] = []
        for place, pooling in enumerate(self.poolings):
            extended.append(
                pooling.extend(embedded, jagged_by_key, cached[place], cached_rows[place])
            )
        return extended

    @torch.jit.export
    def project_candidates(self, features: KeyedJaggedTensor) -> list[Tensor]:
        """What candidates are before they meet a user: the same for every request.

        Args:
            features: the candidates' keys; others are not looked at.

        Returns:
            For each history [C, M, 4E or 5E]: tokens and their projections in the first layer.
        """
        embedded = self.token_embeddings(self.token_features(features))
        tokens = self.candidate_tokens(embedded, features.to_dict())
        projected: list[Tensor] = []
        for pooling in self.poolings:
            rows, entered = pooling.tower.enter(tokens)
            projected.append(torch.cat([rows, entered], dim=2))
        return projected

    @torch.jit.export
    def num_rows(self, num_events: list[int]) -> list[int]:
        """Rows of K/V that histories of so many events have, in the order of the histories."""
        rows: list[int] = []
        for place, pooling in enumerate(self.poolings):
            rows.append(pooling.tower.encoder.num_rows(num_events[place]))
        return rows

    @torch.jit.export
    def reusable(
        self, num_matched: list[int], cached_events: list[int], num_events: list[int]
    ) -> list[tuple[int, int]]:
        """What of cached K/V is right for histories that begin as the cached ones do.

        Args:
            num_matched: events that the cached and the other history begin with, by history.
            cached_events: events of the cached histories.
            num_events: events of the others.

        Returns:
            For each history its events, and the rows of K/V that they have.
        """
        reusable: list[tuple[int, int]] = []
        for place, pooling in enumerate(self.poolings):
            events = pooling.tower.encoder.reusable_events(
                num_matched[place], cached_events[place], num_events[place]
            )
            reusable.append((events, pooling.tower.encoder.reusable_rows(events)))
        return reusable

    @torch.jit.ignore
    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The ranking stage's tables, and one entry for each pooled history."""
        return self._configs

    @torch.jit.ignore
    def is_weighted(self) -> bool:
        """Never: the attention makes its own weights."""
        return False


def token_tables(schema: FeatureSchema, dim: int, has_positions: bool) -> list[EmbeddingConfig]:
    """Tables of the tokens: what events and candidates have in common they share.

    All but positions start on one scale: TorchRec's own start shrinks with the number of rows, and
    in a sum of columns the item would drown among columns of few values.

    Args:
        schema: which columns there are and how many rows each needs.
        dim: width E of every table.
        has_positions: whether event tokens say how far from the oldest event they are.
    """
    names = [history.name for history in schema.histories]
    shared = {ITEM, *schema.item_attributes}
    tables = []
    for column in (*schema.event_columns, *schema.item_attributes):
        keys = [history_key(name, column) for name in names]
        keys += [candidate_key(column)] if column in shared else []
        tables.append(_token_table(column, dim, schema.num_rows(column), keys, dim**-0.5))
    if has_positions:
        for history in schema.histories:
            tables.append(
                _token_table(
                    f"{history.name}_{POSITION}",
                    dim,
                    history.window.max_history,
                    [history_key(history.name, POSITION)],
                    START_POSITION_SCALE * dim**-0.5,
                )
            )
    return tables


def kvshare_collection(schema: FeatureSchema, spec: TowerSpec) -> KVShareEmbeddingBagCollection:
    """The collection for a schema, every table as wide as its towers.

    Args:
        schema: which columns and histories there are, and how many rows each column needs.
        spec: of the towers, one for each history.

    Returns:
        A collection with freshly drawn weights.
    """
    return KVShareEmbeddingBagCollection(
        user_candidate_bags(schema, spec.dim),
        EmbeddingCollection(tables=token_tables(schema, spec.dim, spec.has_positions)),
        {
            h.name: HistoryTower(spec, h.window.max_history, h.window.block)
            for h in schema.histories
        },
        schema,
    )


def _token_table(
    name: str, dim: int, num_rows: int, keys: list[str], std: float
) -> EmbeddingConfig:
    return EmbeddingConfig(
        name=f"token_{name}",
        embedding_dim=dim,
        num_embeddings=num_rows,
        feature_names=keys,
        init_fn=partial(nn.init.normal_, std=std),
    )

"""History attention as one more pooling of an ``EmbeddingBagCollection``.

To everything around it the module is an EBC: ids in, one vector per candidate and feature out; the
pooled histories are the last features. So TorchRec's ranking models take it unmodified. K/V comes
either from the history in the batch (prefill, then attend) or, through page ids in the batch, from
a table of pages.
"""

from collections.abc import Mapping
from functools import partial
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollectionInterface,
    EmbeddingCollection,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from torchrec_kvshare.attention.operators import Visibility
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.features.bags import floats_of
from torchrec_kvshare.features.schema import (
    CANDIDATE_TIME,
    ITEM,
    REQUEST_HISTORY,
    REQUEST_TIME,
    TIME,
    USER,
    VECTOR,
    FeatureSchema,
    candidate_key,
    event_key,
    first_index_key,
    history_key,
    item_key,
    pages_key,
    position_key,
    shared_key,
    state_feature,
    table_name,
    vector_key,
    visible_key,
)
from torchrec_kvshare.history.kinds import TowerSpec
from torchrec_kvshare.history.pages import (
    KVPages,
    flat_pages,
    offsets_of,
    position_in_user,
    users_of_rows,
)
from torchrec_kvshare.history.tower import HistoryTower, projection_between
from torchrec_kvshare.model.bags import (
    FeatureOrder,
    batch_of_one_stride,
    feature_names,
    user_candidate_bags,
)
from torchrec_kvshare.model.stages import ATTEND, PREFILL

# Which tables hold the vectors that states are multiplied with.
NO_VECTORS, OWN_VECTORS, TIED_VECTORS = "none", "own", "tied"
START_POSITION_SCALE = 0.25  # relative to the other tables: an event's content matters most
START_FLOAT_SCALE = 0.25  # likewise: a squashed float is a few units


class TokenFeatures(nn.Module):
    """The keys that tokens are made of, each as one bag of stride 1.

    A sharded EmbeddingCollection silently expands every key of a VBE batch to candidate rows. With
    one bag per key there is nothing to expand, and row lengths are taken from the batch itself. A
    key that is not in the batch gets an empty bag: a prefill batch has no candidates, a batch
    scored over cached K/V no history. Vectors are those of the candidates, then of the shared items
    of a training batch.

    Args:
        keys: the keys of all token tables.
        histories: names; events' positions are computed here, from the lengths of their items.
    """

    position_keys: list[str]

    def __init__(self, keys: list[str], histories: list[str]) -> None:
        super().__init__()
        self.keys = keys
        self.position_keys = [position_key(name) for name in histories]
        self.item_keys: list[str] = [history_key(name, ITEM) for name in histories]
        self.first_keys: list[str] = [first_index_key(name) for name in histories]
        vectors = vector_key("")
        self.sources: list[list[str]] = [
            [candidate_key(key.removeprefix(vectors)), shared_key(key.removeprefix(vectors))]
            if key.startswith(vectors)
            else [key]
            for key in keys
        ]

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        jagged_by_key = features.to_dict(compute_offsets=False)
        rows: list[JaggedTensor] = []
        for index, key in enumerate(self.keys):
            if key in self.position_keys:
                history = self.position_keys.index(key)
                values = self.positions(features, jagged_by_key, history)
            else:
                values = features.values()[:0]
                for source in self.sources[index]:
                    if source in jagged_by_key:
                        part = jagged_by_key[source].values()
                        values = part if values.size(0) == 0 else torch.cat([values, part])
            lengths = features.lengths().new_full([1], values.size(0))
            rows.append(JaggedTensor(values, lengths=lengths))
        return batch_of_one_stride(self.keys, rows, 1)

    def positions(
        self, features: KeyedJaggedTensor, jagged_by_key: dict[str, JaggedTensor], history: int
    ) -> Tensor:
        """Return each event's position, from the oldest event in its user's window: [T]."""
        item_key, first_key = self.item_keys[history], self.first_keys[history]
        if item_key not in jagged_by_key:
            return features.values()[:0]
        events = jagged_by_key[item_key]
        offsets = offsets_of(events.lengths())
        users = users_of_rows(offsets, events.values().size(0))
        position = position_in_user(offsets, users)
        if first_key in jagged_by_key:
            position += jagged_by_key[first_key].values().index_select(0, users)
        return position


class CandidateTokens(nn.Module):
    """Tokens of candidates, the same for every history: [C, M, token width].

    Args:
        item_attributes: multi-valued columns of candidates.
        num_tokens: 1 for the sum of all columns, or one for the item and one for each attribute.

    Raises:
        ConfigError: if ``num_tokens`` is neither.
    """

    # TorchScript cannot infer the type of an empty list, and a schema may have no attributes.
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
            start = torch.zeros_like(item) if self.num_tokens > 1 else item
            token = add_bags(start, embedded[key].values(), features[key].lengths())
            if self.num_tokens > 1:
                tokens.append(token)
            else:
                item = token
        return torch.stack([item] + tokens, dim=1)


class ItemVectors(nn.Module):
    """The vectors that states are multiplied with, of candidates, then of shared items.

    Args:
        item_attributes: multi-valued columns of candidates.
        projection: from the width of the tables to that of states.
    """

    attribute_keys: list[str]
    sources: list[list[str]]

    def __init__(self, item_attributes: tuple[str, ...], projection: nn.Module) -> None:
        super().__init__()
        self.projection = projection
        self.item_key: str = vector_key(ITEM)
        self.attribute_keys = [vector_key(column) for column in item_attributes]
        self.sources = [[candidate_key(column), shared_key(column)] for column in item_attributes]

    def forward(
        self, embedded: dict[str, JaggedTensor], features: dict[str, JaggedTensor]
    ) -> Tensor:
        """Return the projected sum of each item's columns: [C + S, output width]."""
        rows = embedded[self.item_key].values()
        for index, key in enumerate(self.attribute_keys):
            lengths: list[Tensor] = []
            for source in self.sources[index]:
                if source in features:
                    lengths.append(features[source].lengths())
            rows = add_bags(rows, embedded[key].values(), torch.cat(lengths))
        projected: Tensor = self.projection(rows)
        return projected


def add_bags(rows: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Add to each row [R, E] the sum of its bag of values; ``lengths`` [R] are bag lengths."""
    return rows.index_add(0, users_of_rows(offsets_of(lengths), values.size(0)), values)


class EventFloats(nn.Module):
    """Adds floats to the tokens of events: each float scales a learned vector.

    Args:
        keys: of the floats, whose values are ``bits_of`` them.
        dim: width of tokens.
    """

    def __init__(self, keys: list[str], dim: int) -> None:
        super().__init__()
        self.keys = keys
        self.weight = nn.Parameter(torch.empty(len(keys), dim))
        nn.init.normal_(self.weight, std=START_FLOAT_SCALE * dim**-0.5)

    def forward(self, tokens: Tensor, features: dict[str, JaggedTensor]) -> Tensor:
        # Products of single numbers: unlike a matrix product, the same bits in every batch.
        for index, key in enumerate(self.keys):
            values = floats_of(features[key].values())
            tokens = tokens + values.unsqueeze(1) * self.weight[index]  # [T, E]
        return tokens


class CandidateGroups(NamedTuple):
    """The candidates of a batch, grouped by user.

    Attributes:
        order: [C] int64, for each candidate in grouped order, its index in the batch.
        requests: [C] int64, the request of each candidate, in grouped order.
        users: [C] int64, the history that each candidate sees, in grouped order; never falling.
        offsets: [B + 1] int64, in candidates.
    """

    order: Tensor
    requests: Tensor
    users: Tensor
    offsets: Tensor


class KVWeights(NamedTuple):
    """What the K/V of one history depends on.

    Attributes:
        names: of weights and tables in the collection's state.
        modules: that compute the K/V from tokens.
    """

    names: list[str]
    modules: list[nn.Module]


class HistoryPooling(nn.Module):
    """Pools one history into one vector per candidate.

    Args:
        tower: the encoder.
        history: name of the history that the tower reads.
        event_keys: keys of columns with one id per event, the item's first.
        event_bag_keys: keys of multi-valued columns of events.
        event_float_keys: keys of float columns of events.
    """

    # TorchScript cannot read module globals, so the forward's keys are constants of the class.
    request_time: Final[str] = REQUEST_TIME
    candidate_time: Final[str] = CANDIDATE_TIME
    event_bag_keys: list[str]

    def __init__(
        self,
        tower: HistoryTower,
        history: str,
        event_keys: list[str],
        event_bag_keys: list[str],
        event_float_keys: list[str],
    ) -> None:
        super().__init__()
        self.tower = tower
        self.event_keys: list[str] = event_keys
        self.event_bag_keys = event_bag_keys
        token_width = tower.spec.token_width
        floats = [EventFloats(event_float_keys, token_width)] if event_float_keys else []
        self.event_floats = nn.ModuleList(floats)
        self.time_key: str = history_key(history, TIME)
        self.pages_key: str = pages_key(history)
        self.visible_key: str = visible_key(history)

    def event_tokens(
        self, embedded: dict[str, JaggedTensor], features: dict[str, JaggedTensor]
    ) -> Tensor:
        """Return event tokens, the sum of each event's columns: [T, token width]."""
        token = embedded[self.event_keys[0]].values()
        for key in self.event_keys[1:]:
            token = token + embedded[key].values()
        for key in self.event_bag_keys:
            token = add_bags(token, embedded[key].values(), features[key].lengths())
        for floats in self.event_floats:
            token = floats(token, features)
        return token

    def event_offsets(self, features: dict[str, JaggedTensor]) -> Tensor:
        """Return the offsets [B + 1] of each user's events."""
        return offsets_of(features[self.time_key].lengths())

    def prefill(
        self, embedded: dict[str, JaggedTensor], features: dict[str, JaggedTensor]
    ) -> Tensor:
        """Return K/V of all users' histories: [planes, R, H, D]."""
        events = self.event_tokens(embedded, features)
        return self.tower.prefill(events, self.event_offsets(features))

    def extend(
        self,
        embedded: dict[str, JaggedTensor],
        features: dict[str, JaggedTensor],
        cached: Tensor,
        cached_rows: Tensor,
    ) -> Tensor:
        """Return K/V of new events that follow cached rows; ``cached_rows`` [B] counts these."""
        events = self.event_tokens(embedded, features)
        rows = flat_pages(cached, offsets_of(cached_rows))
        return self.tower.extend(rows, events, self.event_offsets(features))

    def read_pages(self, kv_pages: Tensor, features: dict[str, JaggedTensor]) -> KVPages:
        """Return the K/V of the batch's users in a table of pages [planes, P, S, H, D]."""
        pages = features[self.pages_key]
        row_offsets = self.tower.encoder.row_offsets(self.event_offsets(features))
        return KVPages(kv_pages, pages.values(), offsets_of(pages.lengths()), row_offsets)

    def visible_events(self, groups: CandidateGroups, features: dict[str, JaggedTensor]) -> Tensor:
        """Return how many events of its user each candidate sees, grouped by user: [C]."""
        whole = self.event_offsets(features).diff().index_select(0, groups.users)
        if self.visible_key not in features:
            return whole
        visible = features[self.visible_key].values().index_select(0, groups.order)
        # Checked on a CPU only: elsewhere reading the values would wait for the device.
        is_checked = visible.is_cpu and not self.tower.encoder.takes_prefixes
        if is_checked and not torch.equal(visible, whole):
            raise ValueError("this encoder shows candidates whole histories, not prefixes")
        return visible

    @torch.jit.ignore
    def states(
        self,
        embedded: dict[str, JaggedTensor],
        groups: CandidateGroups,
        features: dict[str, JaggedTensor],
    ) -> Tensor:
        """Encode the histories; return the state of each candidate's user, in the batch's order."""
        planes = self.prefill(embedded, features)
        kv = flat_pages(planes, self.tower.encoder.row_offsets(self.event_offsets(features)))
        states = self.tower.state(kv, groups.users, self.visible_events(groups, features))
        return torch.empty_like(states).index_copy(0, groups.order, states)

    def forward(
        self,
        candidates: Tensor,
        entered: Tensor,
        groups: CandidateGroups,
        kv: KVPages,
        features: dict[str, JaggedTensor],
    ) -> Tensor:
        """Return one vector per candidate, grouped by user: [C, output width].

        With ``has_state`` it is twice as wide: the state of its user follows.
        """
        event_offsets = self.event_offsets(features)
        visible = self.visible_events(groups, features)
        if self.visible_key in features:
            time = features[self.candidate_time].values().index_select(0, groups.order)
        else:
            time = features[self.request_time].values().index_select(0, groups.requests)
        visibility = Visibility(features[self.time_key].values(), time, visible)
        pooled = self.tower.attend(
            candidates, entered, groups.offsets, kv, visibility, event_offsets
        )
        if not self.tower.has_state:
            return pooled
        return torch.cat([pooled, self.tower.state(kv, groups.users, visible)], dim=1)


class Histories(nn.Module):
    """All histories of the schema: K/V from events, and one vector per candidate and history.

    One module, so that TorchRec's train pipelines, which trace the collection, take it as a leaf.

    Args:
        towers: an encoder for each history of the schema.
        token_keys: features of the token tables.
        schema: columns of events and candidates.
    """

    user_key: Final[str] = USER
    request_history: Final[str] = REQUEST_HISTORY
    prefill_stage: Final[str] = PREFILL
    attend_stage: Final[str] = ATTEND

    def __init__(
        self, towers: Mapping[str, HistoryTower], token_keys: list[str], schema: FeatureSchema
    ) -> None:
        super().__init__()
        first = schema.histories[0].name
        self.names: list[str] = list(towers)
        self.has_states: bool = any(tower.has_state for tower in towers.values())
        spec = towers[first].spec
        projection: nn.Module = nn.Identity()
        if self.has_states:
            projection = projection_between(spec.token_width, spec.output_width)
        self.item_vectors = ItemVectors(schema.item_attributes, projection)
        self.candidate_tokens = CandidateTokens(schema.item_attributes, towers[first].num_tokens)
        self.first_time_key: str = history_key(first, TIME)
        self.poolings = nn.ModuleList()
        for history in schema.histories:
            event_keys = [history_key(history.name, column) for column in schema.event_columns]
            event_keys += [k for k in token_keys if k == position_key(history.name)]
            bag_keys = [history_key(history.name, column) for column in schema.item_attributes]
            float_keys = [history_key(history.name, column) for column in schema.event_floats]
            keys = (event_keys, bag_keys, float_keys)
            self.poolings.append(HistoryPooling(towers[history.name], history.name, *keys))

    @torch.jit.ignore
    def by_name(self) -> dict[str, HistoryPooling]:
        """Return the pooling of each history."""
        found = [pooling for pooling in self.poolings if isinstance(pooling, HistoryPooling)]
        return dict(zip(self.names, found, strict=True))

    def forward(
        self,
        embedded: dict[str, JaggedTensor],
        features: KeyedJaggedTensor,
        kv_pages: list[Tensor] | None,
        items: list[Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the pooled histories [C, features x width], and the shared items' vectors.

        See ``KVShareEmbeddingBagCollection.pool``.
        """
        jagged_by_key = features.to_dict(compute_offsets=False)
        groups = self.group_candidates(features, jagged_by_key)
        values: list[Tensor] = []
        tokens: list[Tensor] = []
        if items is None:
            tokens.append(
                self.candidate_tokens(embedded, jagged_by_key).index_select(0, groups.order)
            )
        for index, pooling in enumerate(self.poolings):
            if kv_pages is not None:
                kv = pooling.read_pages(kv_pages[index], jagged_by_key)
            else:
                # Recorded here, not in prefill: callers of prefill record the stage themselves.
                with torch.autograd.profiler.record_function(self.prefill_stage):
                    planes = pooling.prefill(embedded, jagged_by_key)
                event_offsets = pooling.event_offsets(jagged_by_key)
                kv = flat_pages(planes, pooling.tower.encoder.row_offsets(event_offsets))
            with torch.autograd.profiler.record_function(self.attend_stage):
                if items is None:
                    rows, entered = pooling.tower.enter(tokens[0])
                else:
                    both = items[index].index_select(0, groups.order)
                    rows, entered = both[:, :, : pooling.tower.dim], both[:, :, pooling.tower.dim :]
                pooled = pooling(rows, entered, groups, kv, jagged_by_key)
            values.append(torch.empty_like(pooled).index_copy(0, groups.order, pooled))
        if not self.has_states:
            return torch.cat(values, dim=1), values[0][:0]
        vectors = self.item_vectors(embedded, jagged_by_key)
        values.append(vectors[: groups.order.size(0)])
        return torch.cat(values, dim=1), vectors[groups.order.size(0) :]

    def group_candidates(
        self, features: KeyedJaggedTensor, jagged_by_key: dict[str, JaggedTensor]
    ) -> CandidateGroups:
        """Group the batch's candidates by the history that they see."""
        keys, inverse_indices = features.inverse_indices()
        request = inverse_indices[keys.index(self.user_key)]
        user = request
        if self.request_history in jagged_by_key:
            user = jagged_by_key[self.request_history].values().index_select(0, request)
        users, order = torch.sort(user, stable=True)
        num_histories = jagged_by_key[self.first_time_key].lengths().size(0)
        ends = torch.arange(num_histories + 1, device=users.device)
        offsets = torch.searchsorted(users, ends)
        return CandidateGroups(order, request.index_select(0, order), users, offsets)

    def prefill(
        self, embedded: dict[str, JaggedTensor], features: KeyedJaggedTensor
    ) -> list[Tensor]:
        """Return K/V [planes, R, H, D] of each history, grouped by user."""
        jagged_by_key = features.to_dict(compute_offsets=False)
        return [pooling.prefill(embedded, jagged_by_key) for pooling in self.poolings]

    def extend(
        self,
        embedded: dict[str, JaggedTensor],
        features: KeyedJaggedTensor,
        cached: list[Tensor],
        cached_rows: list[Tensor],
    ) -> list[Tensor]:
        """Return K/V of new events on top of cached rows, ``cached_rows`` [B] of each history."""
        jagged_by_key = features.to_dict(compute_offsets=False)
        extended: list[Tensor] = []
        for index, pooling in enumerate(self.poolings):
            extended.append(
                pooling.extend(embedded, jagged_by_key, cached[index], cached_rows[index])
            )
        return extended

    def project_candidates(
        self, embedded: dict[str, JaggedTensor], features: KeyedJaggedTensor
    ) -> list[Tensor]:
        """Return for each history [C, M, 4E or 5E]: tokens and their projections."""
        tokens = self.candidate_tokens(embedded, features.to_dict(compute_offsets=False))
        projected: list[Tensor] = []
        for pooling in self.poolings:
            rows, entered = pooling.tower.enter(tokens)
            projected.append(torch.cat([rows, entered], dim=2))
        return projected

    def num_kv_rows(self, num_events: list[int]) -> list[int]:
        """Return how many rows of K/V each history has, given its number of events."""
        rows: list[int] = []
        for index, pooling in enumerate(self.poolings):
            rows.append(pooling.tower.encoder.num_kv_rows(num_events[index]))
        return rows

    def reusable(
        self, num_matched: list[int], cached_events: list[int], num_events: list[int]
    ) -> list[tuple[int, int]]:
        """Return how much cached K/V is valid for histories with the same beginning.

        Args:
            num_matched: length of the common prefix of cached and new history, by history.
            cached_events: length of the cached history, by history.
            num_events: length of the new history, by history.

        Returns:
            For each history the number of reusable events, and of their rows of K/V.
        """
        reusable: list[tuple[int, int]] = []
        for index, pooling in enumerate(self.poolings):
            events = pooling.tower.encoder.reusable_events(
                num_matched[index], cached_events[index], num_events[index]
            )
            reusable.append((events, pooling.tower.encoder.reusable_rows(events)))
        return reusable


class KVShareEmbeddingBagCollection(EmbeddingBagCollectionInterface):
    """An EmbeddingBagCollection with one more feature for each history, pooled by attention.

    Args:
        bags: the ranking stage's own collection; may be TorchRec's EmbeddingBagCollection. If it is
            weighted, batches have weights, see ``features.batches.with_weights``; tokens have none.
        token_embeddings: tables of the tokens' columns; histories and candidates share the item's.
        towers: an encoder for each history of the schema. Each may have a width of its own; their
            tokens are as wide as ``token_embeddings``, their outputs as ``bags``.
        schema: columns of events and candidates.

    Raises:
        ConfigError: if a table has another width than the towers expect, or a history has no tower.

    Example:
        >>> from torchrec_kvshare.features.schema import FeatureSchema, History, Vocabulary, Window
        >>> vocabularies = {"user_id": Vocabulary(["u"]), "item_id": Vocabulary(["a", "b"])}
        >>> histories = (History("history", Window(8, 4)),)
        >>> schema = FeatureSchema(vocabularies, histories=histories)
        >>> collection = kvshare_collection(schema, TowerSpec("causal", 16, 2, 4))
        >>> [config.feature_names for config in collection.embedding_bag_configs()]
        [['user_id'], ['candidates.item_id'], ['history']]
    """

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
            raise ConfigError(f"towers are for {list(towers)}; the schema's histories are {names}")
        for name, tower in towers.items():
            _check_widths(name, tower, bags, token_embeddings)
        dim = towers[names[0]].spec.output_width
        self.bags = bags
        self.bag_order = FeatureOrder(feature_names(bags))
        self.token_embeddings = token_embeddings
        token_keys = [k for c in token_embeddings.embedding_configs() for k in c.feature_names]
        self.token_features = TokenFeatures(token_keys, names)
        self.histories = Histories(towers, token_keys, schema)
        self._configs: list[EmbeddingBagConfig] = [
            *bags.embedding_bag_configs(),
            *[
                EmbeddingBagConfig(
                    name=name,
                    embedding_dim=dim,
                    num_embeddings=1,
                    feature_names=[name, state_feature(name)] if tower.has_state else [name],
                )
                for name, tower in towers.items()
            ],
        ]
        if self.histories.has_states:
            self._configs.append(
                EmbeddingBagConfig(
                    name=VECTOR, embedding_dim=dim, num_embeddings=1, feature_names=[VECTOR]
                )
            )
        self._output_keys: list[str] = [key for c in self._configs for key in c.feature_names]
        self._output_dims: list[int] = [dim] * len(self._output_keys)

    @torch.jit.ignore
    def towers(self) -> list[HistoryTower]:
        """Return the towers, in the order of the schema's histories."""
        return [pooling.tower for pooling in self.histories.by_name().values()]

    @torch.jit.ignore
    def tower_tables(self) -> list[EmbeddingConfig]:
        """Return the token tables that towers read, of events or of candidates."""
        vectors = vector_key("")
        return [
            table
            for table in self.token_embeddings.embedding_configs()
            if not all(key.startswith(vectors) for key in table.feature_names)
        ]

    @torch.jit.ignore
    def kv_weights(self) -> list["KVWeights"]:
        """Return what the K/V of each history depends on, in the order of the schema's."""
        names = list(self.state_dict())
        tables: list[EmbeddingConfig] = []
        if isinstance(self.token_embeddings, EmbeddingCollection):
            tables = self.token_embeddings.embedding_configs()
        found = []
        for index, pooling in enumerate(self.histories.by_name().values()):
            own = f"histories.poolings.{index}."
            keys = {*pooling.event_keys, *pooling.event_bag_keys}
            # All that is not known to be read by others only: quantised tables are one state.
            unread = [f"{own}tower.{name}" for name in pooling.tower.candidate_weights()]
            for table in tables:
                if keys.isdisjoint(table.feature_names):
                    unread.append(f"token_embeddings.embeddings.{table.name}.")
            ours = [name for name in names if name.startswith((own, "token_embeddings."))]
            read = [name for name in ours if not name.startswith(tuple(unread))]
            found.append(KVWeights(read, list(pooling.modules())))
        return found

    def forward(
        self,
        features: KeyedJaggedTensor,
        kv_pages: list[Tensor] | None = None,
        items: list[Tensor] | None = None,
    ) -> KeyedTensor:
        """Pool every feature for every candidate.

        Args:
            features: a VBE batch as ``features.batches.assemble`` makes it. Each candidate sees all
                events of its user or, with a key ``visible_key``, that many of the oldest.
            kv_pages: for each history [planes, P, S, H, D]. If given, K/V is read through the keys
                ``pages``, and of the histories' columns only the times are needed.
            items: for each history the result of ``project_candidates`` for these candidates; None
                computes it.

        Returns:
            [C, features x output width], the pooled histories last. Where towers have states, that
            of the user follows each, and the candidate's own vector follows all.
        """
        return self.pool(features, kv_pages, items)[0]

    def pool(
        self,
        features: KeyedJaggedTensor,
        kv_pages: list[Tensor] | None = None,
        items: list[Tensor] | None = None,
    ) -> tuple[KeyedTensor, Tensor]:
        """Do what ``forward`` does, for training with shared items too.

        Args:
            features: may have keys ``shared_key``: S items that are not candidates of anyone.
            kv_pages: see ``forward``.
            items: see ``forward``.

        Returns:
            The pooled features, and the vectors [S, output width] of the shared items.
        """
        embedded = self.token_embeddings(self.token_features(features))
        pooled_bags = self.bag_order(self.bags(features))
        # Indexed, not unpacked: TorchRec's train pipelines trace this function.
        from_histories = self.histories(embedded, features, kv_pages, items)
        pooled = KeyedTensor(
            keys=self._output_keys,
            length_per_key=self._output_dims,
            values=torch.cat([pooled_bags, from_histories[0]], dim=1),
        )
        return pooled, from_histories[1]

    @torch.jit.export
    def prefill(self, features: KeyedJaggedTensor) -> list[Tensor]:
        """Return K/V of all users' histories in the batch.

        Args:
            features: the histories' keys; others are ignored.

        Returns:
            For each history [planes, R, H, D], grouped by user.
        """
        embedded = self.token_embeddings(self.token_features(features))
        return self.histories.prefill(embedded, features)

    @torch.jit.export
    def extend(
        self, features: KeyedJaggedTensor, cached: list[Tensor], cached_rows: list[Tensor]
    ) -> list[Tensor]:
        """Return K/V of new events on top of the cached K/V of the events before them.

        Args:
            features: the histories' keys with the new events alone, and with ``first_index``, the
                position of the first of them in the window.
            cached: for each history [planes, R, H, D], grouped by user: the rows of
                ``reusable_events``.
            cached_rows: for each history [B] int64, how many of these rows each user has.

        Returns:
            For each history [planes, new rows, H, D].

        Raises:
            ValueError: if a history is of a kind that cannot be extended.
        """
        embedded = self.token_embeddings(self.token_features(features))
        return self.histories.extend(embedded, features, cached, cached_rows)

    @torch.jit.export
    def project_candidates(self, features: KeyedJaggedTensor) -> list[Tensor]:
        """Compute the part of candidates that does not depend on the user or request.

        Args:
            features: the candidates' keys; others are ignored.

        Returns:
            For each history [C, M, 4E or 5E]: tokens and their projections in the first layer.
        """
        embedded = self.token_embeddings(self.token_features(features))
        return self.histories.project_candidates(embedded, features)

    @torch.jit.export
    def num_kv_rows(self, num_events: list[int]) -> list[int]:
        """Return how many rows of K/V each history has, given its number of events."""
        return self.histories.num_kv_rows(num_events)

    @torch.jit.export
    def reusable(
        self, num_matched: list[int], cached_events: list[int], num_events: list[int]
    ) -> list[tuple[int, int]]:
        """Return reusable events and rows; see ``Histories.reusable``."""
        return self.histories.reusable(num_matched, cached_events, num_events)

    @torch.jit.ignore
    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """Return the ranking stage's tables, and one entry for each pooled history."""
        return self._configs

    @torch.jit.ignore
    def is_weighted(self) -> bool:
        """Return whether the ranking stage's own bags take weights."""
        is_weighted: bool = self.bags.is_weighted()
        return is_weighted


def _check_widths(
    name: str,
    tower: HistoryTower,
    bags: EmbeddingBagCollectionInterface,
    token_embeddings: EmbeddingCollection,
) -> None:
    spec = tower.spec
    for config in token_embeddings.embedding_configs():
        if config.embedding_dim != spec.token_width:
            raise ConfigError(
                f"table {config.name} is {config.embedding_dim} wide; the tower of {name} takes "
                f"tokens of width {spec.token_width}: set token_dim of its spec"
            )
    for bag in bags.embedding_bag_configs():
        if bag.embedding_dim != spec.output_width:
            raise ConfigError(
                f"table {bag.name} is {bag.embedding_dim} wide; the tower of {name} gives rows of "
                f"width {spec.output_width}: set output_dim of its spec"
            )


def token_tables(
    schema: FeatureSchema, dim: int, has_positions: bool, *, vectors: str = NO_VECTORS
) -> list[EmbeddingConfig]:
    """Make the token tables; events and candidates share the tables of common columns.

    All tables but positions are initialised on one scale. TorchRec's default shrinks with the
    number of rows: in a sum of columns the item would be small next to columns of few values.

    Args:
        schema: columns and table sizes.
        dim: width of every table.
        has_positions: whether event tokens have a position, counted from the oldest event.
        vectors: ``OWN_VECTORS``: items have further tables, for the vectors that states are
            multiplied with; ``TIED_VECTORS``: these are the tables of their tokens.
    """
    vocabulary_by_column = {column: event_key(column) for column in schema.event_columns}
    vocabulary_by_column |= {column: item_key(column) for column in schema.item_attributes}
    tables = []
    for column, vocabulary in vocabulary_by_column.items():
        keys = [history_key(history.name, column) for history in schema.histories]
        name, num_rows = table_name(vocabulary), schema.num_table_rows(vocabulary)
        if column not in schema.event_attributes:
            keys.append(candidate_key(column))
            if vectors == TIED_VECTORS:
                keys.append(vector_key(column))
            if vectors == OWN_VECTORS:
                own = [vector_key(column)]
                table = _table(f"vector_{name}", dim, num_rows, keys=own, std=dim**-0.5)
                tables.append(table)
        tables.append(_table(f"token_{name}", dim, num_rows, keys=keys, std=dim**-0.5))
    if has_positions:
        for history in schema.histories:
            tables.append(
                _table(
                    f"token_position_{table_name(history.name)}",
                    dim,
                    history.window.max_history,
                    keys=[position_key(history.name)],
                    std=START_POSITION_SCALE * dim**-0.5,
                )
            )
    return tables


def kvshare_collection(
    schema: FeatureSchema, spec: TowerSpec, table_device: torch.device | None = None
) -> KVShareEmbeddingBagCollection:
    """Make the collection for a schema, its tables as wide as the spec says.

    Args:
        schema: columns, table sizes and histories.
        spec: of the towers, one tower for each history.

    Returns:
        A collection with freshly drawn weights.
    """
    return KVShareEmbeddingBagCollection(
        user_candidate_bags(schema, spec.output_width, table_device),
        EmbeddingCollection(
            tables=token_tables(
                schema,
                spec.token_width,
                spec.has_positions,
                vectors=OWN_VECTORS if spec.has_state else NO_VECTORS,
            ),
            device=table_device,
        ),
        {
            h.name: HistoryTower(spec, h.window.max_history, h.window.block)
            for h in schema.histories
        },
        schema,
    )


def _table(name: str, dim: int, num_rows: int, keys: list[str], std: float) -> EmbeddingConfig:
    return EmbeddingConfig(
        name=name,
        embedding_dim=dim,
        num_embeddings=num_rows,
        feature_names=keys,
        init_fn=partial(nn.init.normal_, std=std),
    )

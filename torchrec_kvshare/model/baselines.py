"""Models to compare with: a history pooled without attention, and a plain sequential model.

Both read the batches of the model with a shared history, so that one run trains all of them on the
same targets, negatives and windows. They are not exported.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingBagCollectionInterface,
    EmbeddingCollection,
)
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_kvshare.features.schema import (
    VECTOR,
    FeatureSchema,
    candidate_key,
    state_feature,
)
from torchrec_kvshare.history.kinds import TowerSpec
from torchrec_kvshare.history.tower import HistoryTower
from torchrec_kvshare.history.transformer import TransformerLayer
from torchrec_kvshare.model.bags import FeatureOrder, feature_names, user_candidate_bags
from torchrec_kvshare.model.collection import (
    TIED_VECTORS,
    Histories,
    TokenFeatures,
    token_tables,
)
from torchrec_kvshare.model.ranking import Predicted, over_arch


class MeanHistoryCollection(EmbeddingBagCollectionInterface):
    """An EmbeddingBagCollection with the mean of each history's visible events as one more feature.

    It is what an EmbeddingBag with MEAN pooling makes of a history.

    Args:
        schema: columns, table sizes and histories.
        spec: widths of tables; tokens are as wide as the outputs.
        table_device: of the tables; ``meta`` for tables that are drawn when they are sharded.
    """

    def __init__(
        self, schema: FeatureSchema, spec: TowerSpec, table_device: torch.device | None = None
    ) -> None:
        super().__init__()
        names = [history.name for history in schema.histories]
        width = spec.output_width
        self.bags = user_candidate_bags(schema, width, table_device)
        self.bag_order = FeatureOrder(feature_names(self.bags))
        tables = token_tables(schema, width, has_positions=False)
        for table in tables:
            table.feature_names = [
                key for key in table.feature_names if not key.startswith(candidate_key(""))
            ]
        self.token_embeddings = EmbeddingCollection(tables=tables, device=table_device)
        self.token_features = TokenFeatures(_keys(tables), names)
        # Its towers are not used: it reads events and groups candidates.
        self.histories = _histories(schema, spec, tables)
        for pooling in self.histories.by_name().values():
            pooling.tower.requires_grad_(False)
        self._configs = [
            *self.bags.embedding_bag_configs(),
            *[
                EmbeddingBagConfig(
                    name=name, embedding_dim=width, num_embeddings=1, feature_names=[name]
                )
                for name in names
            ],
        ]
        self._output_keys = feature_names(self)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pool every feature for every candidate; see ``KVShareEmbeddingBagCollection``."""
        embedded = self.token_embeddings(self.token_features(features))
        jagged_by_key = features.to_dict(compute_offsets=False)
        groups = self.histories.group_candidates(features, jagged_by_key)
        pooled = [self.bag_order(self.bags(features))]
        for pooling in self.histories.by_name().values():
            tokens = pooling.event_tokens(embedded, jagged_by_key)
            visible = pooling.visible_events(groups, jagged_by_key)
            first = pooling.event_offsets(jagged_by_key).index_select(0, groups.users)
            sums = torch.cat([tokens.new_zeros([1, tokens.size(1)]), tokens.cumsum(0)])
            total = sums.index_select(0, first + visible) - sums.index_select(0, first)
            mean = total / visible.clamp(min=1).unsqueeze(1)
            pooled.append(torch.empty_like(mean).index_copy(0, groups.order, mean))
        widths = [config.embedding_dim for config in self._configs for _ in config.feature_names]
        return KeyedTensor(self._output_keys, widths, torch.cat(pooled, dim=1))

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """Return the ranking stage's tables, and one entry for each pooled history."""
        return self._configs

    def is_weighted(self) -> bool:
        """Return False: features have no weights."""
        return False


def mean_pooled_dlrm(
    schema: FeatureSchema,
    spec: TowerSpec,
    top_mlp: list[int],
    table_device: torch.device | None = None,
) -> DLRM:
    """Make TorchRec's DLRM with the mean of the history's events as one more feature."""
    collection = MeanHistoryCollection(schema, spec, table_device)
    bags = cast(EmbeddingBagCollection, collection)
    width = spec.output_width
    return DLRM(bags, schema.num_dense, [width, width], over_arch(schema, top_mlp))


class SequentialModel(nn.Module):
    """A sequential model: the state of a user times the vector of an item, and nothing else.

    It knows no labels, so that its logit is the same for every task.

    Args:
        schema: columns, table sizes and histories.
        spec: of the towers: causal, with states. A state reads the K/V of the last layer, so that
            ``num_layers - 1`` layers mix events.
        table_device: of the tables; ``meta`` for tables that are drawn when they are sharded.

    Source:
        SASRec, Kang and McAuley 2018 (arXiv:1808.09781), with pre-norm layers.
    """

    def __init__(
        self, schema: FeatureSchema, spec: TowerSpec, table_device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.num_tasks = len(schema.tasks)
        tables = token_tables(schema, spec.token_width, spec.has_positions, vectors=TIED_VECTORS)
        self.token_embeddings = EmbeddingCollection(tables=tables, device=table_device)
        names = [history.name for history in schema.histories]
        self.token_features = TokenFeatures(_keys(tables), names)
        self.histories = _histories(schema, spec, tables)
        for pooling in self.histories.by_name().values():
            # DistributedDataParallel waits for the gradients of all that is trained.
            pooling.tower.requires_grad_(False)
            pooling.tower.token_in.requires_grad_(True)
            pooling.tower.state_head.requires_grad_(True)
            *whole, last = pooling.tower.encoder.layers
            assert isinstance(last, TransformerLayer)
            for used in (*whole, last.attention_norm, last.query_key_value):
                used.requires_grad_(True)

    def forward(self, dense: Tensor, features: KeyedJaggedTensor) -> Tensor:
        """Return logits [C, tasks]."""
        return self.predict(dense, features).logits

    def predict(self, dense: Tensor, features: KeyedJaggedTensor) -> Predicted:
        """Return logits, with the mean over histories of states times vectors as such."""
        embedded = self.token_embeddings(self.token_features(features))
        jagged_by_key = features.to_dict(compute_offsets=False)
        groups = self.histories.group_candidates(features, jagged_by_key)
        num_candidates = groups.order.size(0)
        vectors = self.histories.item_vectors(embedded, jagged_by_key)
        pooled = {VECTOR: vectors[:num_candidates]}
        logits: list[Tensor] = []
        for name, pooling in self.histories.by_name().items():
            states = pooling.states(embedded, groups, jagged_by_key)
            pooled[state_feature(name)] = states
            logits.append((states * vectors[:num_candidates]).sum(1))
        of_tasks = torch.stack(logits).mean(0).unsqueeze(1).expand(-1, self.num_tasks)
        return Predicted(of_tasks, pooled, vectors[num_candidates:])


def _histories(schema: FeatureSchema, spec: TowerSpec, tables: list[EmbeddingConfig]) -> Histories:
    towers = {
        history.name: HistoryTower(spec, history.window.max_history, history.window.block)
        for history in schema.histories
    }
    return Histories(towers, _keys(tables), schema)


def _keys(tables: list[EmbeddingConfig]) -> list[str]:
    return [key for table in tables for key in table.feature_names]

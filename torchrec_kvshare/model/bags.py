"""The ranking stage's own embedding bags, with users' features pooled once per user.

TorchRec's EmbeddingBagCollection takes a batch of user and candidate rows unchanged, and expands
users to candidates itself. Two collections, one at the users' stride and one at the candidates',
with one gather after the first, give the same vectors. Unlike TorchRec's expansion this works with
quantised tables too, and on CPU the backward of a gather is fast, while the expansion's goes value
by value.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingBagCollectionInterface,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.features.schema import (
    ITEM,
    USER,
    FeatureSchema,
    candidate_key,
    context_key,
    item_key,
    table_name,
)


def batch_of_one_stride(
    keys: list[str], rows: list[JaggedTensor], stride: int
) -> KeyedJaggedTensor:
    """Make a batch of keys of one stride, with its sizes given: none are read from a device."""
    by_key: dict[str, JaggedTensor] = {}
    for index, key in enumerate(keys):
        by_key[key] = rows[index]
    return KeyedJaggedTensor(
        keys=keys,
        values=torch.cat([bags.values() for bags in rows]),
        lengths=torch.cat([bags.lengths() for bags in rows]),
        stride=stride,
        length_per_key=[bags.values().size(0) for bags in rows],
        jt_dict=by_key,
    )


class OneStride(nn.Module):
    """Selects keys of a batch that have the same number of rows, as a batch of their own."""

    def __init__(self, keys: list[str]) -> None:
        super().__init__()
        self.keys = keys

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        jagged_by_key = features.to_dict(compute_offsets=False)
        rows = [jagged_by_key[key] for key in self.keys]
        return batch_of_one_stride(self.keys, rows, rows[0].lengths().size(0))


class FeatureOrder(nn.Module):
    """Pooled features side by side in one order: a sharded collection returns them in shard order.

    Args:
        keys: the features.
    """

    def __init__(self, keys: list[str]) -> None:
        super().__init__()
        self.keys = keys

    def forward(self, pooled: KeyedTensor) -> Tensor:
        by_key = pooled.to_dict()
        return torch.cat([by_key[key] for key in self.keys], dim=1)


class RepeatForCandidates(nn.Module):
    """Rows of users, each repeated for every candidate of the user: [C, features x E].

    Args:
        user_key: a feature with a row per user.
    """

    def __init__(self, user_key: str) -> None:
        super().__init__()
        self.user_key = user_key

    def forward(self, users: Tensor, features: KeyedJaggedTensor) -> Tensor:
        keys, inverse_indices = features.inverse_indices()
        return users.index_select(0, inverse_indices[keys.index(self.user_key)])


class UserCandidateBags(EmbeddingBagCollectionInterface):
    """An EmbeddingBagCollection over a batch of B user rows and C candidate rows.

    Args:
        user_bags: tables of the users' features.
        candidate_bags: tables of the candidates' features.

    Raises:
        ConfigError: if one of them takes weights.
    """

    def __init__(
        self, user_bags: EmbeddingBagCollection, candidate_bags: EmbeddingBagCollection
    ) -> None:
        super().__init__()
        if user_bags.is_weighted() or candidate_bags.is_weighted():
            raise ConfigError(
                "UserCandidateBags selects ids without their weights; a weighted "
                "EmbeddingBagCollection is allowed as KVShareEmbeddingBagCollection's own bags"
            )
        self.user_bags = user_bags
        self.candidate_bags = candidate_bags
        self._configs: list[EmbeddingBagConfig] = (
            user_bags.embedding_bag_configs() + candidate_bags.embedding_bag_configs()
        )
        user_keys, candidate_keys = feature_names(user_bags), feature_names(candidate_bags)
        self.user_features = OneStride(user_keys)
        self.user_order = FeatureOrder(user_keys)
        self.repeat_for_candidates = RepeatForCandidates(user_keys[0])
        self.candidate_features = OneStride(candidate_keys)
        self.candidate_order = FeatureOrder(candidate_keys)
        self._output_keys: list[str] = user_keys + candidate_keys
        self._output_dims: list[int] = [
            c.embedding_dim for c in self._configs for _ in c.feature_names
        ]

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pool each feature for each candidate: [C, features x E], users' features first."""
        users = self.user_order(self.user_bags(self.user_features(features)))
        candidates = self.candidate_order(self.candidate_bags(self.candidate_features(features)))
        repeated = self.repeat_for_candidates(users, features)
        return KeyedTensor(
            keys=self._output_keys,
            length_per_key=self._output_dims,
            values=torch.cat([repeated, candidates], dim=1),
        )

    @torch.jit.ignore
    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """Return all tables, the users' first."""
        return self._configs

    @torch.jit.ignore
    def is_weighted(self) -> bool:
        """Return False: features have no weights."""
        return False


def feature_names(bags: EmbeddingBagCollectionInterface) -> list[str]:
    """Return the features that a collection pools, in the order of its tables."""
    return [key for config in bags.embedding_bag_configs() for key in config.feature_names]


def user_candidate_bags(
    schema: FeatureSchema, dim: int, table_device: torch.device | None = None
) -> UserCandidateBags:
    """Make the tables for a schema: user and context for users, item and attributes for candidates.

    Args:
        schema: columns and table sizes.
        dim: width E of every table.
        table_device: of the tables; ``meta`` for tables that are drawn when they are sharded.

    Returns:
        The collection with freshly drawn weights.
    """
    user_keys = {USER: USER} | {context_key(c): context_key(c) for c in schema.context}
    candidate_keys = {ITEM: candidate_key(ITEM)}
    candidate_keys |= {item_key(c): candidate_key(c) for c in schema.item_attributes}
    return UserCandidateBags(
        EmbeddingBagCollection(tables=_tables(schema, user_keys, dim), device=table_device),
        EmbeddingBagCollection(tables=_tables(schema, candidate_keys, dim), device=table_device),
    )


def _tables(
    schema: FeatureSchema, key_by_column: dict[str, str], dim: int
) -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(
            name=f"bag_{table_name(column)}",
            embedding_dim=dim,
            num_embeddings=schema.num_table_rows(column),
            feature_names=[key],
            init_fn=partial(nn.init.normal_, std=dim**-0.5),
        )
        for column, key in key_by_column.items()
    ]

"""Train the ranking stage alone: towers stay as they are, to the bit, and so does their K/V.

A fleet keeps the K/V of its users when a new version of the model changes nothing that K/V depends
on. Towers are frozen whole, also the weights that only candidates read: then nothing is computed
backward through them, neither through the history nor through the candidates.

Frozen parameters are those that do not require gradients, as everywhere in PyTorch.
"""

from typing import Any

from torch import nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from torchrec_kvshare.model.collection import KVShareEmbeddingBagCollection


class FrozenTowers:
    """The towers of a model and the tables that they read, which are not trained.

    What towers give depends on no parameter then: they compute as they do when they are served,
    without dropout and without a graph.

    Args:
        model: before its tables are sharded; it may be trained as soon as this was made.
    """

    def __init__(self, model: nn.Module) -> None:
        self._poolings: list[nn.Module] = []
        for module in model.modules():
            if isinstance(module, KVShareEmbeddingBagCollection):
                self._freeze(module)

    def stay_in_eval_mode(self) -> None:
        """Take back what ``train`` did to the towers: dropout would change what is learned from."""
        for pooling in self._poolings:
            pooling.eval()

    def _freeze(self, collection: KVShareEmbeddingBagCollection) -> None:
        tables = collection.tower_tables()
        for config in tables:
            collection.token_embeddings.embeddings[config.name].requires_grad_(False)
        poolings = collection.histories.poolings
        poolings.requires_grad_(False)
        self._poolings.append(poolings)
        keys = [key for config in tables for key in config.feature_names]

        def cut(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            """Cut the graph between towers and tables: a sharded table always has a gradient."""
            embedded = inputs[0]
            others = [key for key in collection.token_features.keys if key not in keys]
            frozen = {
                key: JaggedTensor(embedded[key].values().detach(), lengths=embedded[key].lengths())
                for key in keys
            }
            return (frozen | {key: embedded[key] for key in others}, *inputs[1:])

        collection.histories.register_forward_pre_hook(cut)

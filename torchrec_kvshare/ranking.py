"""An unmodified TorchRec ranking model, with the K/V it reads as an argument.

The model is given to us whole and calls its EmbeddingBagCollection with the features alone. Tracing
it with our collection as a leaf lets the K/V pages become one more input of the same computation,
so that scoring is a function of tensors: nothing is set on a module between calls.
"""

from typing import cast

import torch
from torch import Tensor, fx, nn
from torchrec.fx import symbolic_trace
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_kvshare.bags import user_candidate_bags
from torchrec_kvshare.collection import (
    KVShareEmbeddingBagCollection,
    kvshare_collection,
)
from torchrec_kvshare.data.schema import FeatureSchema
from torchrec_kvshare.errors import ConfigError

KV_PAGES = "kv_pages"


def lift_kv_pages(model: nn.Module) -> fx.GraphModule:
    """The same model with one more input ``kv_pages``, handed to its KVShareEmbeddingBagCollection.

    Args:
        model: a ranking model called as ``model(dense_features, sparse_features)``.

    Returns:
        A module called as ``module(dense_features, sparse_features, kv_pages)``; weights are shared
        with ``model``.

    Raises:
        ConfigError: if the model calls no KVShareEmbeddingBagCollection, or more than one.
    """
    traced = symbolic_trace(model, leaf_modules=[KVShareEmbeddingBagCollection.__name__])
    calls = [
        node
        for node in traced.graph.nodes
        if node.op == "call_module"
        and isinstance(traced.get_submodule(node.target), KVShareEmbeddingBagCollection)
    ]
    if len(calls) != 1:
        raise ConfigError(
            f"{type(model).__name__} calls {len(calls)} KVShareEmbeddingBagCollections; "
            "exactly one is allowed"
        )
    last_input = [node for node in traced.graph.nodes if node.op == "placeholder"][-1]
    with traced.graph.inserting_after(last_input):
        kv_pages = traced.graph.create_node(
            "placeholder", KV_PAGES, args=(None,), type_expr=Tensor | None
        )
    calls[0].args = (*calls[0].args, kv_pages)
    traced.recompile()
    return traced


class RankingModel(nn.Module):
    """What a ranking model with history computes: tensors in, tensors out, no state.

    Args:
        model: an unmodified ranking model that holds one KVShareEmbeddingBagCollection.

    Raises:
        ConfigError: if the model holds no such collection, or more than one.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.ranker = lift_kv_pages(model)
        self.collection = next(
            module
            for module in model.modules()
            if isinstance(module, KVShareEmbeddingBagCollection)
        )

    def forward(self, dense: Tensor, features: KeyedJaggedTensor) -> Tensor:
        """Logits [C], the histories in the batch encoded on the way: one prefill per request."""
        return self.ranker(dense, features, None).squeeze(1)

    @torch.jit.export
    def prefill(self, features: KeyedJaggedTensor) -> Tensor:
        """K/V [layers, 2, T, H, D] of the histories in the batch."""
        return self.collection.prefill(features)

    @torch.jit.export
    def score(self, dense: Tensor, features: KeyedJaggedTensor, kv_pages: Tensor) -> Tensor:
        """Logits [C] over K/V read from pages through the key ``history.pages``."""
        return self.ranker(dense, features, kv_pages).squeeze(1)


def dlrm_with_history(
    schema: FeatureSchema,
    dim: int,
    num_layers: int,
    num_heads: int,
    dropout: float,
    top_mlp: list[int],
) -> DLRM:
    """TorchRec's DLRM with the pooled history as one more feature.

    Args:
        schema: columns and table sizes.
        dim: width of every table, of the dense arch's result and of the tower.
        num_layers: layers of the tower.
        num_heads: heads of each layer.
        dropout: share of activations dropped in training, in the tower.
        top_mlp: widths of the over arch, the last of them 1.

    Returns:
        An unmodified ``torchrec.models.dlrm.DLRM``.
    """
    collection = kvshare_collection(schema, dim, num_layers, num_heads, dropout)
    # DLRM's annotation names the class, but it uses the interface only.
    return DLRM(cast(EmbeddingBagCollection, collection), schema.num_dense, [dim, dim], top_mlp)


def plain_dlrm(schema: FeatureSchema, dim: int, top_mlp: list[int]) -> DLRM:
    """The same DLRM without a history, for comparison."""
    bags = cast(EmbeddingBagCollection, user_candidate_bags(schema, dim))
    return DLRM(bags, schema.num_dense, [dim, dim], top_mlp)

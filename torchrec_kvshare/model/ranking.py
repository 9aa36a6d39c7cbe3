"""An unmodified TorchRec ranking model, with the K/V it reads as an argument.

The model is given to us whole and calls its EmbeddingBagCollection with the features alone. Tracing
it with our collection as a leaf lets K/V pages and projected items become two more inputs of the
same computation, so that scoring is a function of tensors: nothing is set on a module between
calls.
"""

from typing import Protocol, cast

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import (
    IntNBitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, fx, nn
from torchrec.fx import symbolic_trace
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.features.schema import FeatureSchema
from torchrec_kvshare.history.kinds import TowerSpec
from torchrec_kvshare.model.bags import user_candidate_bags
from torchrec_kvshare.model.collection import (
    KVShareEmbeddingBagCollection,
    kvshare_collection,
)

KV_PAGES = "kv_pages"
ITEMS = "items"


def lift_kv_pages(model: nn.Module) -> fx.GraphModule:
    """The same model with two more inputs, which its KVShareEmbeddingBagCollection is handed.

    Args:
        model: a ranking model called as ``model(dense_features, sparse_features)``.

    Returns:
        A module called as ``module(dense_features, sparse_features, kv_pages, items)``; weights are
        shared with ``model``.

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
    for name in (KV_PAGES, ITEMS):
        last_input = [node for node in traced.graph.nodes if node.op == "placeholder"][-1]
        with traced.graph.inserting_after(last_input):
            added = traced.graph.create_node(
                "placeholder", name, args=(None,), type_expr=list[Tensor] | None
            )
        calls[0].args = (*calls[0].args, added)
    traced.recompile()
    return traced


class RankingFunctions(Protocol):
    """What an engine asks of a model, eager or exported."""

    def __call__(self, dense: Tensor, features: KeyedJaggedTensor) -> Tensor:
        """Logits [C], histories encoded on the way."""

    def prefill(self, features: KeyedJaggedTensor) -> list[Tensor]:
        """For each history K/V [planes, R, H, D]."""

    def extend(
        self, features: KeyedJaggedTensor, cached: list[Tensor], cached_rows: list[Tensor]
    ) -> list[Tensor]:
        """For each history K/V of new events behind cached rows."""

    def num_rows(self, num_events: list[int]) -> list[int]:
        """Rows of K/V of histories of so many events, in the order of the histories."""

    def reusable(
        self, num_matched: list[int], cached_events: list[int], num_events: list[int]
    ) -> list[tuple[int, int]]:
        """For each history events and rows of cached K/V that are right for another history."""

    def project_candidates(self, features: KeyedJaggedTensor) -> list[Tensor]:
        """For each history what candidates are before they meet a user."""

    def score(
        self,
        dense: Tensor,
        features: KeyedJaggedTensor,
        kv_pages: list[Tensor],
        items: list[Tensor] | None = None,
    ) -> Tensor:
        """Logits [C] over K/V in pages."""


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
        return self.ranker(dense, features, None, None).squeeze(1)

    @torch.jit.export
    def prefill(self, features: KeyedJaggedTensor) -> list[Tensor]:
        """For each history K/V [planes, R, H, D] of the histories in the batch."""
        return self.collection.prefill(features)

    @torch.jit.export
    def extend(
        self, features: KeyedJaggedTensor, cached: list[Tensor], cached_rows: list[Tensor]
    ) -> list[Tensor]:
        """For each history K/V of new events; see ``KVShareEmbeddingBagCollection.extend``."""
        return self.collection.extend(features, cached, cached_rows)

    @torch.jit.export
    def project_candidates(self, features: KeyedJaggedTensor) -> list[Tensor]:
        """For each history what candidates are before they meet a user, [C, M, 4E or 5E]."""
        return self.collection.project_candidates(features)

    @torch.jit.export
    def num_rows(self, num_events: list[int]) -> list[int]:
        """Rows of K/V of histories of so many events, in the order of the histories."""
        return self.collection.num_rows(num_events)

    @torch.jit.export
    def reusable(
        self, num_matched: list[int], cached_events: list[int], num_events: list[int]
    ) -> list[tuple[int, int]]:
        """For each history events and rows; see ``KVShareEmbeddingBagCollection.reusable``."""
        return self.collection.reusable(num_matched, cached_events, num_events)

    @torch.jit.export
    def score(
        self,
        dense: Tensor,
        features: KeyedJaggedTensor,
        kv_pages: list[Tensor],
        items: list[Tensor] | None = None,
    ) -> Tensor:
        """Logits [C] over K/V read from pages through the histories' keys ``pages``."""
        return self.ranker(dense, features, kv_pages, items).squeeze(1)


def dlrm_with_history(schema: FeatureSchema, spec: TowerSpec, top_mlp: list[int]) -> DLRM:
    """TorchRec's DLRM with the pooled histories as further features.

    Args:
        schema: columns and table sizes.
        spec: of the towers; its width is that of every table and of the dense arch's result.
        top_mlp: widths of the over arch, the last of them 1.

    Returns:
        An unmodified ``torchrec.models.dlrm.DLRM``.
    """
    collection = kvshare_collection(schema, spec)
    # DLRM's annotation names the class, but it uses the interface only.
    bags = cast(EmbeddingBagCollection, collection)
    return DLRM(bags, schema.num_dense, [spec.dim, spec.dim], top_mlp)


def split_tables(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A model's state: dense weights, and embedding tables."""
    collections = (
        EmbeddingBagCollection,
        EmbeddingCollection,
        IntNBitTableBatchedEmbeddingBagsCodegen,
    )
    prefixes = tuple(
        f"{name}."
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, collections)
    )
    dense: dict[str, Tensor] = {}
    tables: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        (tables if name.startswith(prefixes) else dense)[name] = tensor
    return dense, tables


def takes_prefixes(model: nn.Module) -> bool:
    """Whether candidates at different times may see prefixes of one prefill, in every history."""
    return all(
        tower.encoder.takes_prefixes
        for module in model.modules()
        if isinstance(module, KVShareEmbeddingBagCollection)
        for tower in module.towers()
    )


def plain_dlrm(schema: FeatureSchema, dim: int, top_mlp: list[int]) -> DLRM:
    """The same DLRM without a history, for comparison."""
    bags = cast(EmbeddingBagCollection, user_candidate_bags(schema, dim))
    return DLRM(bags, schema.num_dense, [dim, dim], top_mlp)

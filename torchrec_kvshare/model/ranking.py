"""An unmodified TorchRec ranking model, with the K/V it reads as an argument.

The model calls its EmbeddingBagCollection with the features only. It is traced with our collection
as a leaf, and the collection's call gets two more inputs: K/V pages and projected items. So scoring
is a function of tensors, and nothing is set on a module between calls.
"""

from typing import NamedTuple, Protocol, cast

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
    """Return the model with two more inputs, passed on to its KVShareEmbeddingBagCollection.

    Args:
        model: a ranking model called as ``model(dense_features, sparse_features)``.

    Returns:
        A module called as ``module(dense_features, sparse_features, kv_pages, items)``; weights are
        shared with ``model``.

    Raises:
        ConfigError: if the model calls no KVShareEmbeddingBagCollection, or more than one.
    """
    traced, call = _traced(model)
    for name in (KV_PAGES, ITEMS):
        last_input = [node for node in traced.graph.nodes if node.op == "placeholder"][-1]
        with traced.graph.inserting_after(last_input):
            added = traced.graph.create_node(
                "placeholder", name, args=(None,), type_expr=list[Tensor] | None
            )
        call.args = (*call.args, added)
    traced.recompile()
    return traced


class Predicted(NamedTuple):
    """What a model gives in training.

    Attributes:
        logits: [C, tasks].
        pooled: [C, width] by feature; the states of users and the vectors of candidates among them.
        shared: [S, width], the vectors of the batch's shared items.
    """

    logits: Tensor
    pooled: dict[str, Tensor]
    shared: Tensor


class RankingStage:
    """A ranking model that also shows what its KVShareEmbeddingBagCollection gives to it.

    It runs on the model's own modules, which may be sharded after it was made.

    Args:
        model: a ranking model called as ``model(dense_features, sparse_features)``.

    Raises:
        ConfigError: if the model calls no KVShareEmbeddingBagCollection, or more than one.
    """

    def __init__(self, model: nn.Module) -> None:
        traced, call = _traced(model)
        _, features = [node for node in traced.graph.nodes if node.op == "placeholder"][:2]
        with traced.graph.inserting_after(features):
            pooled = traced.graph.placeholder("pooled")
        call.replace_all_uses_with(pooled)
        traced.graph.erase_node(call)
        traced.graph.erase_node(features)
        self._model = model
        self._interpreter = fx.Interpreter(model, graph=traced.graph)
        self._collection = str(call.target)

    def predict(self, dense: Tensor, features: KeyedJaggedTensor) -> Predicted:
        """Return logits, and the pooled features they are computed from."""
        collection = self._model.get_submodule(self._collection)
        assert isinstance(collection, KVShareEmbeddingBagCollection)
        pooled, shared = collection.pool(features)
        logits: Tensor = self._interpreter.run(dense, pooled)
        return Predicted(logits, pooled.to_dict(), shared)


def _traced(model: nn.Module) -> tuple[fx.GraphModule, fx.Node]:
    """Trace a ranking model; also return its call of its collection."""
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
    return traced, calls[0]


class RankingFunctions(Protocol):
    """The functions of a ranking model that an engine calls, eager or exported."""

    def __call__(self, dense: Tensor, features: KeyedJaggedTensor) -> Tensor:
        """Return logits [C, tasks]; the histories in the batch are encoded too."""

    def prefill(self, features: KeyedJaggedTensor) -> list[Tensor]:
        """Return K/V [planes, R, H, D] of each history."""

    def extend(
        self, features: KeyedJaggedTensor, cached: list[Tensor], cached_rows: list[Tensor]
    ) -> list[Tensor]:
        """Return K/V of new events that follow cached rows, for each history."""

    def num_kv_rows(self, num_events: list[int]) -> list[int]:
        """Return how many rows of K/V each history has, given its number of events."""

    def reusable(
        self, num_matched: list[int], cached_events: list[int], num_events: list[int]
    ) -> list[tuple[int, int]]:
        """Return how many events and rows of cached K/V are valid for each new history."""

    def project_candidates(self, features: KeyedJaggedTensor) -> list[Tensor]:
        """Return the part of candidates that does not depend on the user, for each history."""

    def score(
        self,
        dense: Tensor,
        features: KeyedJaggedTensor,
        kv_pages: list[Tensor],
        items: list[Tensor] | None = None,
    ) -> Tensor:
        """Return logits [C, tasks] over K/V in pages."""


class RankingModel(nn.Module):
    """The functions of a ranking model with history: tensors in, tensors out, no state.

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
        """Return logits [C, tasks]; the batch's histories are encoded too, once per request."""
        return self.ranker(dense, features, None, None)

    @torch.jit.export
    def prefill(self, features: KeyedJaggedTensor) -> list[Tensor]:
        """Return K/V [planes, R, H, D] of each history in the batch."""
        return self.collection.prefill(features)

    @torch.jit.export
    def extend(
        self, features: KeyedJaggedTensor, cached: list[Tensor], cached_rows: list[Tensor]
    ) -> list[Tensor]:
        """Return K/V of new events; see ``KVShareEmbeddingBagCollection.extend``."""
        return self.collection.extend(features, cached, cached_rows)

    @torch.jit.export
    def project_candidates(self, features: KeyedJaggedTensor) -> list[Tensor]:
        """Return for each history [C, M, 4E or 5E]; see ``KVShareEmbeddingBagCollection``."""
        return self.collection.project_candidates(features)

    @torch.jit.export
    def num_kv_rows(self, num_events: list[int]) -> list[int]:
        """Return how many rows of K/V each history has, given its number of events."""
        return self.collection.num_kv_rows(num_events)

    @torch.jit.export
    def reusable(
        self, num_matched: list[int], cached_events: list[int], num_events: list[int]
    ) -> list[tuple[int, int]]:
        """Return events and rows; see ``KVShareEmbeddingBagCollection.reusable``."""
        return self.collection.reusable(num_matched, cached_events, num_events)

    @torch.jit.export
    def score(
        self,
        dense: Tensor,
        features: KeyedJaggedTensor,
        kv_pages: list[Tensor],
        items: list[Tensor] | None = None,
    ) -> Tensor:
        """Return logits [C, tasks] over K/V in pages, through the histories' keys ``pages``."""
        return self.ranker(dense, features, kv_pages, items)


def dlrm_with_history(
    schema: FeatureSchema,
    spec: TowerSpec,
    top_mlp: list[int],
    table_device: torch.device | None = None,
) -> DLRM:
    """Make TorchRec's DLRM with the pooled histories as additional features.

    Args:
        schema: columns and table sizes.
        spec: of the towers; the bags and the dense arch's output have its output width.
        top_mlp: widths of the over arch, the last of them, 1, of each task.
        table_device: of the tables; ``meta`` for tables that are drawn when they are sharded.

    Returns:
        An unmodified ``torchrec.models.dlrm.DLRM``.
    """
    collection = kvshare_collection(schema, spec, table_device)
    # DLRM's annotation names the class, but it uses only the interface.
    bags = cast(EmbeddingBagCollection, collection)
    width = spec.output_width
    return DLRM(bags, schema.num_dense, [width, width], over_arch(schema, top_mlp))


def over_arch(schema: FeatureSchema, top_mlp: list[int]) -> list[int]:
    """Return the widths of an over arch that has one logit for each task of the schema."""
    return [*top_mlp[:-1], top_mlp[-1] * len(schema.tasks)]


def refuse_weights(model: nn.Module) -> None:
    """Refuse a model whose bags take weights: requests have none.

    Raises:
        ConfigError: saying how such a model is scored.
    """
    for module in model.modules():
        if isinstance(module, KVShareEmbeddingBagCollection) and module.is_weighted():
            raise ConfigError(
                "the model's EmbeddingBagCollection is weighted, and requests have no weights; its "
                "batches are scored by RankingModel, with the weights that with_weights gives them"
            )


def split_tables(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a model's state into dense weights and embedding tables."""
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
    """Return whether candidates may see prefixes of one prefill, in every history."""
    return all(
        tower.encoder.takes_prefixes
        for module in model.modules()
        if isinstance(module, KVShareEmbeddingBagCollection)
        for tower in module.towers()
    )


def plain_dlrm(
    schema: FeatureSchema, dim: int, top_mlp: list[int], table_device: torch.device | None = None
) -> DLRM:
    """Make the same DLRM without a history, for comparison."""
    bags = cast(EmbeddingBagCollection, user_candidate_bags(schema, dim, table_device))
    return DLRM(bags, schema.num_dense, [dim, dim], over_arch(schema, top_mlp))

"""Quantised embedding tables: replaces a model's collections by TorchRec's quantised ones.

``torchrec.inference.modules`` quantises and shards; dense weights stay unchanged. Each collection
is traced by itself before its first run, which makes it scriptable. A quantised bag collection does
not handle inverse indices (torchrec issue 1894), so its batch must have one stride, as those of
``bags.UserCandidateBags`` have; token tables get one bag per key.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import (
    IntNBitTableBatchedEmbeddingBagsCodegen,
)
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.fused_params import FUSED_PARAM_REGISTER_TBE_BOOL
from torchrec.distributed.global_settings import get_propogate_device, set_propogate_device
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.quant_embedding import QuantEmbeddingCollectionSharder
from torchrec.distributed.quant_embeddingbag import QuantEmbeddingBagCollectionSharder
from torchrec.distributed.types import BoundsCheckMode, ModuleSharder, ShardingType
from torchrec.fx import symbolic_trace
from torchrec.inference.modules import (
    assign_weights_to_tbe,
    get_table_to_weights_from_tbe,
    quantize_inference_model,
    shard_quant_model,
)
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.model.ranking import RankingModel

FLOAT32 = "float32"
CPU = "cpu"
WEIGHT_DTYPE_BY_NAME = {
    "float16": torch.float16,
    "int8": torch.qint8,
    "int4": torch.quint4x2,
}
TABLE_DTYPES = (FLOAT32, *WEIGHT_DTYPE_BY_NAME)
# A row's scale and bias are float16 after its values, which must fill a multiple of two bytes.
WIDTH_MULTIPLE_BY_NAME = {"float16": 1, "int8": 2, "int4": 4}
# TorchRec's defaults store scale and bias separately, and float16 tables have none.
FUSED_PARAMS = {FUSED_PARAM_REGISTER_TBE_BOOL: True}
SHARDERS: list[ModuleSharder[Any]] = [
    QuantEmbeddingBagCollectionSharder(FUSED_PARAMS),
    QuantEmbeddingCollectionSharder(FUSED_PARAMS),
]

Tables = EmbeddingBagCollection | EmbeddingCollection


@torch.fx.wrap
def without_negative_rows(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """Return the batch; raise ValueError on a negative row, which fbgemm takes for a pruned row."""
    if features.values().numel() > 0 and int(features.values().min()) < 0:
        for key in features.keys():  # noqa: SIM118  # a KeyedJaggedTensor is no dictionary
            rows = features[key].values()
            if rows.numel() > 0 and int(rows.min()) < 0:
                raise ValueError(f"{key} holds row {int(rows.min())}; rows from 0 on are allowed")
    return features


class OrderedBags(nn.Module):
    """A bag collection whose output has the order of its configs: sharding orders by rank.

    Args:
        tables: quantised, maybe sharded.
        keys: in output order.
        dims: width of each key.
    """

    def __init__(self, tables: nn.Module, keys: list[str], dims: list[int]) -> None:
        super().__init__()
        self.tables = tables
        self.keys = keys
        self.dims = dims

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        pooled = self.tables(without_negative_rows(features))
        values = torch.cat([pooled[key] for key in self.keys], dim=1)
        return KeyedTensor(self.keys, self.dims, values)


class RowsByKey(nn.Module):
    """An embedding collection with types that TorchScript needs: a sharded one has none."""

    def __init__(self, tables: nn.Module) -> None:
        super().__init__()
        self.tables = tables

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        return self.tables(without_negative_rows(features))


def quantise_tables(model: RankingModel, dtype: str) -> RankingModel:
    """Return a model with its tables in another dtype; it is called and scripted as before.

    Args:
        model: with float tables; it is not changed.
        dtype: of ``TABLE_DTYPES``. int8 and int4 keep a scale and a bias for each row.

    Returns:
        A new model with weights of its own; for ``float32`` the given model.

    Raises:
        ConfigError: if there is no such dtype, if a table's width does not fit it, if the tables
            are quantised already, or if the model's bags are one EmbeddingBagCollection over users
            and candidates.
    """
    if dtype == FLOAT32:
        return model
    _check(model, dtype)
    return _replace_tables(model, lambda tables: _quantised(tables, dtype))


def shard_tables(model: RankingModel, dtype: str, world_size: int) -> RankingModel:
    """Return a model with quantised tables sharded over the ranks of one process, on CPU.

    A rank gets whole tables, as ``shard_quant_model`` shards bags by default. Shards of rows or
    columns do not work: their weights come from ``assign_weights_to_tbe``, which gives the whole
    table to each shard.

    Args:
        model: with float tables; it is not changed.
        dtype: of ``TABLE_DTYPES`` except ``float32``.
        world_size: ranks, at least 1.

    Returns:
        A new model, with the scores of ``quantise_tables`` to the bit.

    Raises:
        ConfigError: as ``quantise_tables``, if ``dtype`` is ``float32``, or if ``world_size`` is
            below 1.
    """
    if world_size < 1:
        raise ConfigError(f"world_size is {world_size}; it must be at least 1")
    _check(model, dtype)
    with _devices_propagated():
        return _replace_tables(model, lambda tables: _sharded(tables, dtype, world_size))


def table_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's tables, including scale, bias and padding of quantised rows."""
    num_bytes = 0
    for module in model.modules():
        if isinstance(module, Tables):
            num_bytes += sum(weight.nbytes for weight in module.parameters())
        elif isinstance(module, IntNBitTableBatchedEmbeddingBagsCodegen):
            num_bytes += module.weights_host.nbytes + module.weights_dev.nbytes
    return num_bytes


def _check(model: RankingModel, dtype: str) -> None:
    if dtype not in WEIGHT_DTYPE_BY_NAME:
        raise ConfigError(
            f"table dtype is {dtype!r}; tables are quantised to {list(WEIGHT_DTYPE_BY_NAME)}"
        )
    if isinstance(model.collection.bags, EmbeddingBagCollection):
        raise ConfigError(
            "the model's bags are one EmbeddingBagCollection over users and candidates; quantised, "
            "it ignores inverse indices and mixes up their rows (torchrec issue 1894); "
            "UserCandidateBags, one collection for each, is allowed"
        )
    configs = [config for tables in _tables_of(model) for config in _configs(tables)]
    if not configs:
        raise ConfigError("the model has no float tables; quantised tables are not quantised again")
    multiple = WIDTH_MULTIPLE_BY_NAME[dtype]
    for config in configs:
        if config.embedding_dim % multiple:
            raise ConfigError(
                f"table {config.name} is {config.embedding_dim} wide; {dtype} takes multiples of "
                f"{multiple}"
            )


def _tables_of(model: nn.Module) -> list[Tables]:
    return [module for module in model.modules() if isinstance(module, Tables)]


def _configs(tables: Tables) -> Sequence[BaseEmbeddingConfig]:
    if isinstance(tables, EmbeddingBagCollection):
        return tables.embedding_bag_configs()
    return tables.embedding_configs()


def _replace_tables(model: RankingModel, replace: Callable[[Tables], nn.Module]) -> RankingModel:
    """Copy the model with its tables replaced by other modules, traced."""
    traced_by_id = {id(tables): _traced(tables, replace(tables)) for tables in _tables_of(model)}
    # deepcopy takes objects in its memo as already copied, so that no float table is copied.
    return copy.deepcopy(model, traced_by_id)


def _quantised(tables: Tables, dtype: str) -> nn.Module:
    # A copy, because TorchRec leaves attributes on the module that it quantises.
    holder = nn.Sequential(copy.deepcopy(tables))
    with warnings.catch_warnings():
        # TorchRec quantises with an API that is deprecated in torch.
        warnings.filterwarnings("ignore", "torch.ao.quantization is deprecated", DeprecationWarning)
        quantize_inference_model(holder, quantization_dtype=WEIGHT_DTYPE_BY_NAME[dtype])
    return holder[0]


def _sharded(tables: Tables, dtype: str, world_size: int) -> nn.Module:
    holder = nn.Sequential(_quantised(tables, dtype))
    weights_by_table = get_table_to_weights_from_tbe(holder)
    whole_tables = ParameterConstraints(
        sharding_types=[ShardingType.TABLE_WISE.value],
        compute_kernels=[EmbeddingComputeKernel.QUANT.value],
    )
    shard_quant_model(
        holder,
        world_size,
        compute_device=CPU,
        sharding_device=CPU,
        sharders=SHARDERS,
        constraints={config.name: whole_tables for config in _configs(tables)},
    )
    assign_weights_to_tbe(holder, weights_by_table)
    # The first run makes the modules that distribute keys over ranks.
    holder(_empty_batch(_keys(tables)))
    return holder[0]


def _traced(tables: Tables, quantised: nn.Module) -> nn.Module:
    """Trace quantised tables to a scriptable graph with their bytes in its state."""
    root: nn.Module = RowsByKey(quantised)
    if isinstance(tables, EmbeddingBagCollection):
        dims = [c.embedding_dim for c in _configs(tables) for _ in c.feature_names]
        root = OrderedBags(quantised, _keys(tables), dims)
    traced = symbolic_trace(root, leaf_modules=[IntNBitTableBatchedEmbeddingBagsCodegen.__name__])
    for module in traced.modules():
        if isinstance(module, IntNBitTableBatchedEmbeddingBagsCodegen):
            _own_weights(module)
    return traced.train(tables.training)


def _own_weights(tables: IntNBitTableBatchedEmbeddingBagsCodegen) -> None:
    """Register the bytes of tables as buffers, and make an unknown row an error.

    fbgemm keeps them as a plain attribute: two models that differ only in their tables would have
    equal states, and K/V of one would pass for K/V of the other. It reads an unknown row as row 0.
    """
    for name in ("weights_host", "weights_dev"):
        weights = getattr(tables, name)
        delattr(tables, name)
        tables.register_buffer(name, weights)
    tables.bounds_check_mode_int = BoundsCheckMode.FATAL.value


def _keys(tables: Tables) -> list[str]:
    return [key for config in _configs(tables) for key in config.feature_names]


def _empty_batch(keys: list[str]) -> KeyedJaggedTensor:
    """Make a batch of one row without ids."""
    lengths = torch.zeros(len(keys), dtype=torch.int64)
    return KeyedJaggedTensor(keys, torch.empty(0, dtype=torch.int64), lengths=lengths, stride=1)


@contextmanager
def _devices_propagated() -> Iterator[None]:
    """Set TorchRec's global device propagation, without which sharded tables look for a GPU."""
    before = get_propogate_device()
    set_propogate_device(True)
    try:
        yield
    finally:
        set_propogate_device(before)

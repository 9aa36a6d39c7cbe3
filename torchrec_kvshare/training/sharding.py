"""Spread a model's embedding tables over ranks: TorchRec's planner and DistributedModelParallel.

Table optimizers are fused into the backward pass, so that a step costs what its batch holds and not
what the tables hold. Dense parts are replicated.
"""

import logging
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torchrec.optim
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.distributed.tensor import DTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import (
    EmbeddingShardingPlanner,
    ParameterConstraints,
    Topology,
)
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ModuleSharder, ShardingPlan, ShardingType
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from torchrec_kvshare.config import CPU, CUDA
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.training.ranks import Ranks

ADAGRAD, ROWWISE_ADAGRAD, SGD, ADAM = "adagrad", "rowwise_adagrad", "sgd", "adam"
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    ROWWISE_ADAGRAD: torchrec.optim.RowWiseAdagrad,
    ADAGRAD: torch.optim.Adagrad,
    SGD: torch.optim.SGD,
    ADAM: torch.optim.Adam,
}
CUDA_OPTIMIZERS = (ADAM,)  # fbgemm's CPU tables have no fused Adam
ALL_TABLES = "*"
RESERVED_SHARE = 0.15  # of a device's memory, kept free of tables for everything else
MIN_COLUMNS = 4  # of a shard of a table: fbgemm's rows are multiples of 4 floats

# What trains on a CPU. EmbeddingBagCollections: TorchRec offers row-wise shards on CUDA only, and a
# step writes all rows of a data-parallel table. EmbeddingCollections: data-parallel tables fail in
# fbgemm (PoolingMode.NONE).
CPU_TYPES: dict[type[nn.Module], tuple[str, ...]] = {
    EmbeddingBagCollection: (
        ShardingType.TABLE_WISE.value,
        ShardingType.COLUMN_WISE.value,
    ),
    EmbeddingCollection: (
        ShardingType.TABLE_WISE.value,
        ShardingType.ROW_WISE.value,
        ShardingType.COLUMN_WISE.value,
    ),
}

# What trains on a GPU: all but data-parallel tables. Their kernel has no fused optimizer, and AdamW
# would write all of their rows in every step.
CUDA_TYPES: dict[type[nn.Module], tuple[str, ...]] = {
    EmbeddingBagCollection: (
        *CPU_TYPES[EmbeddingBagCollection],
        ShardingType.ROW_WISE.value,
        ShardingType.TABLE_ROW_WISE.value,
        ShardingType.TABLE_COLUMN_WISE.value,
        ShardingType.GRID_SHARD.value,
    ),
    EmbeddingCollection: CPU_TYPES[EmbeddingCollection],
}
KERNELS_BY_DEVICE = {
    CPU: (EmbeddingComputeKernel.FUSED.value,),
    CUDA: (
        EmbeddingComputeKernel.FUSED.value,
        EmbeddingComputeKernel.FUSED_UVM.value,
        EmbeddingComputeKernel.FUSED_UVM_CACHING.value,
    ),
}

# What the planner may choose unless a table's types are given: ranks together give what one process
# gives. Of a column-wise table, row-wise Adagrad keeps a sum for each shard of a row.
DEFAULT_TYPES = (ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value)


@dataclass(frozen=True)
class TableSettings:
    """How tables are spread and trained.

    Attributes:
        optimizer: a key of ``OPTIMIZERS``.
        learning_rate: of the optimizer.
        sharding: by table name, or ``*`` for all others, the sharding types that the planner may
            choose from; empty: those of ``DEFAULT_TYPES`` that work on the device.
        kernels: by table name, or ``*``, those of TorchRec's compute kernels that the planner may
            choose from; empty: those of ``KERNELS_BY_DEVICE``.
        clip: largest absolute value in the gradient of an embedding that was looked up; None: any.
    """

    optimizer: str
    learning_rate: float
    sharding: Mapping[str, Sequence[str]] = field(default_factory=dict)
    kernels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    clip: float | None = None


def shard(
    model: nn.Module, settings: TableSettings, ranks: Ranks
) -> tuple[DistributedModelParallel, ShardingPlan]:
    """Spread a model's tables over the ranks and fuse their optimizer.

    Args:
        model: with TorchRec's embedding collections anywhere inside; its weights are kept. Tables
            on ``meta`` are drawn by their ``init_fn``, shard by shard.
        settings: of the tables.
        ranks: the processes; all of them must call this with equal models.

    Returns:
        The sharded model, and where each table lies.

    Raises:
        ConfigError: naming the table, if its sharding type does not work on the device, or naming
            the optimizer.
    """
    _check_optimizer(settings, ranks.device)
    tables = tables_of(model)
    constraints = {
        name: _constraints(name, module, settings, ranks.device) for name, module in tables.items()
    }
    weights = {
        name: value.detach().clone()
        for name, value in model.state_dict().items()
        if not value.is_meta
    }
    parameters = [p for module in _collections(model) for p in module.parameters()]
    trained = [p for p in parameters if p.requires_grad]
    _apply_optimizer_in_backward(
        OPTIMIZERS[settings.optimizer], trained, {"lr": settings.learning_rate}
    )
    # fbgemm's tables always have an optimizer. This one has no state and changes no bit: what reads
    # a frozen table cuts the graph, so that its gradients are zeros.
    frozen = [p.requires_grad_() for p in parameters if not p.requires_grad]
    _apply_optimizer_in_backward(OPTIMIZERS[SGD], frozen, {"lr": 0.0})
    sharders: list[ModuleSharder[Any]] = [
        EmbeddingBagCollectionSharder(fused_params=_fused_params(settings)),
        EmbeddingCollectionSharder(fused_params=_fused_params(settings)),
    ]
    planner = EmbeddingShardingPlanner(
        topology=_topology(ranks),
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(RESERVED_SHARE),
        debug=False,
    )
    group = torch.distributed.group.WORLD
    assert group is not None
    plan = planner.collective_plan(model, sharders, group)
    # Else the log has torch's notice that TorchRec asks an ambiguous question about tracing.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # TorchRec passes DistributedDataParallel an option that torch 2.13 deprecates.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        # Of one seed, ranks would draw the same rows for their shards of a table.
        torch.manual_seed(torch.initial_seed() + ranks.rank)
        sharded = DistributedModelParallel(model, device=ranks.device, plan=plan, sharders=sharders)
    # DistributedModelParallel draws all tables anew; those that were on meta stay as drawn.
    sharded.load_state_dict(OrderedDict(sharded.state_dict() | weights))
    return sharded, plan


def check_tables(models: Sequence[nn.Module], settings: TableSettings, ranks: Ranks) -> None:
    """Refuse settings that do not work with a run's models, before one of them is trained.

    Raises:
        ConfigError: as ``shard`` does, or naming a table that none of the models has.
    """
    _check_optimizer(settings, ranks.device)
    tables = {name: module for model in models for name, module in tables_of(model).items()}
    for table, module in tables.items():
        _constraints(table, module, settings, ranks.device)
    for key, names in (("sharding", settings.sharding), ("kernels", settings.kernels)):
        if unknown := sorted(set(names) - set(tables) - {ALL_TABLES}):
            raise ConfigError(
                f"{key} names the tables {unknown}, which no model has; {sorted(tables)} and "
                f"{ALL_TABLES!r} are allowed"
            )


def tables_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return for each table of a model, by name, the collection that holds it."""
    return {config.name: module for module in _collections(model) for config in _configs(module)}


def configs_of(model: nn.Module) -> list[BaseEmbeddingConfig]:
    """Return the configs of a model's tables."""
    return [config for module in _collections(model) for config in _configs(module)]


def plan_table(plan: ShardingPlan) -> str:
    """Return a plan as fixed-width text: how each table is spread, and over which ranks."""
    lines = [f"{'table':<32} {'sharding':<16} {'kernel':<10} ranks"]
    for module_plan in plan.plan.values():
        for name, placed in module_plan.items():  # type: ignore[attr-defined]
            kind = f"{placed.sharding_type:<16} {placed.compute_kernel:<10}"
            lines.append(f"{name:<32} {kind} {', '.join(map(str, placed.ranks))}")
    return "\n".join(lines)


def _topology(ranks: Ranks) -> Topology:
    """The machines as the planner sees them."""
    hardware = HardwareConfig()
    if ranks.device.type == CUDA:
        hardware = HardwareConfig(
            hbm_cap_bytes=torch.cuda.get_device_properties(ranks.device).total_memory
        )
    return TopologyFactory.create_topology(
        TrainerConfig(world_size=ranks.world_size, local_world_size=ranks.local_world_size),
        hardware,
        KernelConfig(compute_device=ranks.device.type),
    )


def local_weights(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the part of a sharded state dict that lies on this rank, by key and shard."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, ShardedTensor):
            found |= {f"{name}[{n}]": s.tensor for n, s in enumerate(value.local_shards())}
        else:
            found[name] = value.to_local() if isinstance(value, DTensor) else value
    return found


def redraw_rows(
    sharded: DistributedModelParallel,
    configs: Sequence[BaseEmbeddingConfig],
    rows: Tensor,
    seed: int,
) -> None:
    """Start rows of tables anew: their weights, and the state of their optimizer.

    Args:
        sharded: the model; each rank writes what lies on it.
        configs: of the tables, as ``configs_of`` returned them before the model was sharded.
        rows: [N] int64.
        seed: of the weights, which do not depend on how a table is sharded.
    """
    weights = sharded.state_dict()
    states = sharded.fused_optimizer.state_dict()["state"]
    for index, config in enumerate(configs):
        drawn = torch.empty(len(rows), config.embedding_dim)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + index)
            assert config.init_fn is not None
            config.init_fn(drawn)
        [name] = [name for name in weights if name.endswith(f".{config.name}.weight")]
        for number, shard in enumerate(weights[name].local_shards()):
            first_row, first_column = shard.metadata.shard_offsets
            num_rows, num_columns = shard.metadata.shard_sizes
            here = (rows >= first_row) & (rows < first_row + num_rows)
            own = rows[here] - first_row
            columns = slice(first_column, first_column + num_columns)
            shard.tensor.detach()[own] = drawn[here, columns].to(shard.tensor)
            for state in states.get(name, {}).values():
                state.local_shards()[number].tensor[own] = 0


def _collections(model: nn.Module) -> list[EmbeddingBagCollection | EmbeddingCollection]:
    return [
        module
        for module in model.modules()
        if isinstance(module, EmbeddingBagCollection | EmbeddingCollection)
    ]


def _configs(module: nn.Module) -> Sequence[BaseEmbeddingConfig]:
    if isinstance(module, EmbeddingBagCollection):
        return module.embedding_bag_configs()
    assert isinstance(module, EmbeddingCollection)
    return module.embedding_configs()


def _constraints(
    table: str, module: nn.Module, settings: TableSettings, device: torch.device
) -> ParameterConstraints:
    """What the planner may do with a table; refuse what does not work on the device."""
    wanted = settings.sharding.get(table, settings.sharding.get(ALL_TABLES))
    kernels = settings.kernels.get(table, settings.kernels.get(ALL_TABLES))
    allowed = (CPU_TYPES if device.type == CPU else CUDA_TYPES)[type(module)]
    if refused := sorted(set(wanted or ()) - set(allowed)):
        raise ConfigError(
            f"table {table} of an {type(module).__name__} is to be sharded {refused}; on "
            f"{device.type} {list(allowed)} are allowed"
        )
    allowed_kernels = KERNELS_BY_DEVICE[device.type]
    if set(kernels or ()) - set(allowed_kernels):
        raise ConfigError(
            f"table {table} is to have compute kernels {list(kernels or ())}; on {device.type} "
            f"{list(allowed_kernels)} are allowed: a table's optimizer is fused into them"
        )
    types = [name for name in wanted or DEFAULT_TYPES if name in allowed]
    return ParameterConstraints(
        sharding_types=types,
        compute_kernels=list(kernels or allowed_kernels),
        min_partition=MIN_COLUMNS,
    )


def _fused_params(settings: TableSettings) -> dict[str, Any]:
    """Options of fbgemm's tables, beside those of their optimizer."""
    if settings.clip is None:
        return {}
    return {"gradient_clipping": True, "max_gradient": settings.clip}


def _check_optimizer(settings: TableSettings, device: torch.device) -> None:
    allowed = [name for name in OPTIMIZERS if device.type == CUDA or name not in CUDA_OPTIMIZERS]
    if settings.optimizer not in allowed:
        raise ConfigError(
            f"table_optimizer is {settings.optimizer!r}; on {device.type} one of {allowed} is "
            "allowed"
        )

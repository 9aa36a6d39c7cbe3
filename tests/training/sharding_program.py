"""What ``test_sharding`` checks on each rank; see ``on_ranks``."""

from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torchrec.optim
from torch import Tensor, nn
from torchrec.datasets.utils import Batch
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardingPlan
from torchrec.models.dlrm import DLRMTrain
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from tests.training.on_ranks import (
    is_table,
    largest_difference,
    on_each_rank,
    plain_model,
    run_config,
    tell,
    train_on,
    trainer_of,
    whole_tensors,
)
from tests.training.worlds import MODEL
from torchrec_kvshare.data.shards import Shards
from torchrec_kvshare.features.schema import (
    candidate_key,
    position_key,
    shared_key,
    vector_key,
)
from torchrec_kvshare.training.loop import Trainer
from torchrec_kvshare.training.ranks import Ranks
from torchrec_kvshare.training.run import load_data, new_model
from torchrec_kvshare.training.sharding import (
    ADAGRAD,
    ROWWISE_ADAGRAD,
    SGD,
    TableSettings,
    shard,
    tables_of,
)

EPS = 1e-8  # fbgemm's, of both Adagrads
RATES = {SGD: 0.5, ADAGRAD: 0.05, ROWWISE_ADAGRAD: 0.05}
# Sharding types by table. Row-wise Adagrad keeps a sum for each column-wise shard of a row, so that
# it differs from the optimizer of whole rows.
FORCED: dict[str, dict[str, list[str]]] = {
    "table_wise": {"*": ["table_wise"]},
    "column_wise": {"*": ["column_wise"]},
    "row_wise": {
        "*": ["table_wise"],
        **{
            f"token_{name}": ["row_wise"] for name in ("item_id", "events_action", "items_category")
        },
    },
    "mixed": {
        "bag_item_id": ["column_wise"],
        "token_item_id": ["row_wise"],
        "token_position_history": ["column_wise"],
        "*": ["table_wise"],
    },
    "chosen by the planner": {},
}
NUM_STEPS = 6


def plain_optimizers(plain: nn.Module, name: str) -> list[torch.optim.Optimizer]:
    """The optimizers of a Trainer, of tables and of the rest, as PyTorch and TorchRec have them."""
    tables = [p for key, p in plain.named_parameters() if is_table(key)]
    dense = [p for key, p in plain.named_parameters() if not is_table(key)]
    makers: dict[str, Any] = {
        SGD: lambda: torch.optim.SGD(tables, RATES[SGD]),
        ADAGRAD: lambda: torch.optim.Adagrad(tables, RATES[ADAGRAD], eps=EPS),
        ROWWISE_ADAGRAD: lambda: torchrec.optim.RowWiseAdagrad(
            tables, RATES[ROWWISE_ADAGRAD], eps=EPS
        ),
    }
    return [makers[name](), torch.optim.AdamW(dense, 3e-3, weight_decay=1e-5)]


def check_losses(forced: str, optimizer: str, shards: Shards, folder: Path, ranks: Ranks) -> None:
    """Train on all ranks, and the plain model on the batches of all ranks."""
    settings = TableSettings(optimizer, RATES[optimizer], FORCED[forced])
    trainer = trainer_of("causal", shards, folder / "unused", ranks, tables=settings)
    plain = plain_model("causal", shards)
    optimizers = plain_optimizers(plain, optimizer)
    first_rates = [one.param_groups[0]["lr"] for one in optimizers]
    losses, expected = [], []
    for step, chosen in zip(range(NUM_STEPS), trainer.stream.epoch(0).chosen, strict=False):
        trainer.progress.step = step
        for one, rate in zip(optimizers, first_rates, strict=True):
            one.param_groups[0]["lr"] = rate * trainer._rate_share()
            one.zero_grad()
        loss, _ = plain(trainer.stream.batch(chosen, 0, 0))
        loss.backward()
        for one in optimizers:
            one.step()
        expected.append(loss.item())
        losses.append(train_on(trainer, chosen))
    tell(
        case="losses",
        forced=forced,
        optimizer=optimizer,
        types=types_of(trainer.plan),
        num_ranks=ranks_of(trainer.plan),
        losses=losses,
        expected=expected,
        tables=largest_difference(
            tables_in(whole_tensors(trainer.sharded.state_dict())), tables_in(plain.state_dict())
        ),
    )


def tables_in(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out dense weights: AdamW amplifies the rounding of gradients that are zero."""
    return {name: tensor for name, tensor in state.items() if is_table(name)}


def types_of(plan: ShardingPlan) -> dict[str, str]:
    return {
        table: placed.sharding_type
        for module_plan in plan.plan.values()
        for table, placed in module_plan.items()  # type: ignore[attr-defined]
    }


def ranks_of(plan: ShardingPlan) -> dict[str, int]:
    """Return on how many ranks each table lies."""
    return {
        table: len(set(placed.ranks))
        for module_plan in plan.plan.values()
        for table, placed in module_plan.items()  # type: ignore[attr-defined]
    }


def keys_by_table(model: nn.Module) -> dict[str, list[str]]:
    """Return the features of each table, but for positions, which are no feature of a batch."""
    found: dict[str, list[str]] = {}
    for module in dict.fromkeys(tables_of(model).values()):
        configs = (
            module.embedding_bag_configs()
            if isinstance(module, EmbeddingBagCollection)
            else module.embedding_configs()  # type: ignore[operator]
        )
        found |= {config.name: config.feature_names for config in configs}
    return {table: keys for table, keys in found.items() if position_key("history") not in keys}


def check_changed_rows(shards: Shards, folder: Path, ranks: Ranks) -> None:
    """Count rows that the second step changed, in its batch and outside of it."""
    settings = TableSettings(ROWWISE_ADAGRAD, 0.05)
    trainer = trainer_of(
        "causal", shards, folder / "unused", ranks, tables=settings, batch_targets=8
    )
    for step in (0, 1):
        chosen = trainer.stream.epoch(0).chosen[step]
        before = whole_tensors(trainer.sharded.state_dict())
        train_on(trainer, chosen)
    after = whole_tensors(trainer.sharded.state_dict())
    features = trainer.stream.batch(chosen, 0, 0).sparse_features.to_dict()  # of all ranks
    changed = {}
    for table, keys in keys_by_table(plain_model("causal", shards)).items():
        (name,) = [name for name in before if name.endswith(f".{table}.weight")]
        rows = (before[name] != after[name]).any(1).nonzero().flatten().tolist()
        # Vectors are those of candidates and of shared items.
        names = [name for key in keys for name in sources_of(key)]
        met = torch.cat([features[name].values() for name in names]).tolist()
        changed[table] = {
            "inside": len(set(rows) & set(met)),
            "outside": len(set(rows) - set(met)),
            "rows": len(before[name]),
        }
    tell(case="changed rows", changed=changed)


def sources_of(key: str) -> list[str]:
    """Return the keys of a batch that a table's feature is made of."""
    vectors = vector_key("")
    if not key.startswith(vectors):
        return [key]
    column = key.removeprefix(vectors)
    return [candidate_key(column), shared_key(column)]


def own_batches(trainer: Trainer, num_batches: int) -> list[Batch]:
    """Return batches of this rank, one of each in which it has windows."""
    parts = [trainer.stream.own(chosen) for chosen in trainer.stream.epoch(0).chosen]
    return [trainer.stream.batch(part, 0, 0) for part in parts if len(part)][:num_batches]


def check_pipeline(shards: Shards, folder: Path, ranks: Ranks) -> None:
    """Train with TorchRec's pipeline, and the same model in a plain loop."""
    plain = trainer_of("causal", shards, folder / "unused", ranks)
    batches = own_batches(plain, 5)
    expected = []
    for batch in batches:
        plain.optimizer.zero_grad()
        loss, _ = plain.sharded(batch)
        loss.backward()
        plain.optimizer.step()
        expected.append(loss.item())
    piped = trainer_of("causal", shards, folder / "unused", ranks)
    pipeline = TrainPipelineSparseDist(
        piped.sharded,
        piped.optimizer,
        torch.device("cpu"),
        execute_all_batches=True,
        pipeline_postproc=True,
    )
    left, losses = iter(batches), []
    for _ in count():
        try:
            (loss, *_) = pipeline.progress(left)
        except StopIteration:
            break
        losses.append(loss.item())
    modules = sorted(type(module).__name__ for module in pipeline._pipelined_modules)
    tell(
        case="pipeline",
        losses=losses,
        expected=expected,
        modules=modules,
        weights=largest_difference(
            whole_tensors(piped.sharded.state_dict()), whole_tensors(plain.sharded.state_dict())
        ),
    )


def check_meta(shards: Shards, ranks: Ranks) -> None:
    """Shard tables that are on meta: their rows are drawn, the dense weights stay."""
    meta = torch.device("meta")
    model = DLRMTrain(new_model(shards.schema, MODEL, "causal", 3, meta))
    state = model.state_dict()
    dense = {name: value.clone() for name, value in state.items() if not is_table(name)}
    settings = TableSettings(SGD, 0.5, {"token_item_id": ["row_wise"], "*": ["column_wise"]})
    generator = torch.get_rng_state()
    sharded, _ = shard(model, settings, ranks)
    same_generator = torch.equal(generator, torch.get_rng_state())
    weights = whole_tensors(sharded.state_dict())
    scales = {
        name.split(".")[-2]: weight.std().item() for name, weight in tables_in(weights).items()
    }
    (items,) = [weight for name, weight in weights.items() if "token_item_id" in name]
    half = -(-len(items) // ranks.world_size)
    number = min(half, len(items) - half)
    tell(
        case="meta",
        dense=largest_difference({name: weights[name] for name in dense}, dense),
        scales=scales,
        equal_rows=int((items[:number] == items[half : half + number]).all(1).sum()),
        finite=all(bool(weight.isfinite().all()) for weight in weights.values()),
        same_generator=same_generator,
        num_on_meta=[
            sum(value.is_meta for value in tables_in(state).values()),
            sum(parameter.is_meta for parameter in sharded.parameters()),
        ],
        loss=loss_of(sharded, shards, ranks),
    )


def loss_of(sharded: nn.Module, shards: Shards, ranks: Ranks) -> float:
    batch = own_batches(trainer_of("causal", shards, Path("unused"), ranks), 1)[0]
    batch.labels = batch.labels.squeeze(1)  # DLRMTrain has one task.
    loss: Tensor = sharded(batch)[0]
    loss.backward()
    return loss.item()


def check_all(ranks: Ranks, folder: Path) -> None:
    shards = load_data(run_config(folder))
    for forced in FORCED:
        check_losses(forced, SGD, shards, folder, ranks)
        check_losses(forced, ADAGRAD, shards, folder, ranks)
    for forced in ("table_wise", "row_wise", "chosen by the planner"):
        check_losses(forced, ROWWISE_ADAGRAD, shards, folder, ranks)
    check_changed_rows(shards, folder, ranks)
    check_pipeline(shards, folder, ranks)
    check_meta(shards, ranks)


if __name__ == "__main__":
    on_each_rank(check_all)

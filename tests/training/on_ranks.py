"""Start programs on several ranks, and what the programs share.

A start costs some 5 s, so one start checks many cases: a program prints a JSON object for each, and
several tests read them.
"""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRMTrain

from tests.training.worlds import BUDGET, MODEL, tiny_config
from torchrec_kvshare.config import TrainConfig
from torchrec_kvshare.data.dataset import Ints
from torchrec_kvshare.data.shards import Shards
from torchrec_kvshare.training.loop import Trainer, TrainSettings
from torchrec_kvshare.training.ranks import Ranks, joined_ranks
from torchrec_kvshare.training.run import new_model
from torchrec_kvshare.training.sharding import SGD, TableSettings

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 240  # for a program; they take some 15 s on an idle machine
COLLECTIVE_TIMEOUT = timedelta(seconds=60)  # a rank that waits alone ends with an error

# Two orders of the same sums, in float32: the worst loss of one step, of five kinds on two and on
# three ranks, was off by 9.6e-8.
LOSS_TOLERANCE = 1e-6

Case = dict[str, Any]


def environment(**changes: str) -> dict[str, str]:
    """The environment of a program: one thread, and no rank of another program."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    return inherited | quiet | changes


def shared_folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    """Return a folder that all workers of pytest-xdist share in this session."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name


def run_on_ranks(program: str, world_size: int, folder: Path) -> list[list[Case]]:
    """Run ``tests.training.PROGRAM`` on ranks that meet at a file; return each rank's cases.

    Of several workers of pytest-xdist one runs it, the others wait and read what it told.
    """
    folder.mkdir(exist_ok=True)
    told = folder / f"told-by-{world_size}.json"
    with (folder / f"lock-{world_size}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not told.exists():
            (folder / f"meet-{world_size}").unlink(missing_ok=True)
            told.write_text(json.dumps(_run(program, world_size, folder)))
    cases: list[list[Case]] = json.loads(told.read_text())
    return cases


def _run(program: str, world_size: int, folder: Path) -> list[list[Case]]:
    command = [sys.executable, "-W", "ignore", "-m", f"tests.training.{program}"]
    errors = [folder / f"errors-{rank}-of-{world_size}" for rank in range(world_size)]
    with ExitStack() as stack:
        ranks = [
            subprocess.Popen(
                [*command, str(rank), str(world_size), str(folder)],
                cwd=ROOT,
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=stack.enter_context(errors[rank].open("w")),
                text=True,
            )
            for rank in range(world_size)
        ]
        try:
            outputs = [rank.communicate(timeout=TIMEOUT_S)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.communicate()
    for path, rank in zip(errors, ranks, strict=True):
        assert rank.returncode == 0, f"{path.name}: {path.read_text()[-4000:]}"
    return [[json.loads(line) for line in output.splitlines()] for output in outputs]


def torchrun(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a program as a user does, on two ranks."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
        + ["--standalone", "--nproc_per_node=2", *arguments],
        cwd=ROOT,
        # Restarted ranks met the addresses of killed ones in torchrun's store, and waited for them:
        # github.com/pytorch/pytorch/issues/135712. With this, each restart has a store of its own.
        env=environment(PYTHONWARNINGS="ignore", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.terminate()  # It ends its ranks too, unlike one that is killed.
        output, errors = process.communicate()
        errors = f"{errors}\nnot done within {TIMEOUT_S} s"
    return subprocess.CompletedProcess(arguments, process.returncode, output, errors)


@contextmanager
def meeting(arguments: list[str]) -> Iterator[tuple[Ranks, Path]]:
    """Join the ranks that ``run_on_ranks`` started: yields these and the test's folder."""
    rank, world_size, folder = int(arguments[0]), int(arguments[1]), Path(arguments[2])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet-{world_size}",
        rank=rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    with joined_ranks(torch.device("cpu")) as ranks:
        yield ranks, folder
    dist.destroy_process_group()


def tell(**case: Any) -> None:
    """Print a case for the tests."""
    print(json.dumps(case), flush=True)


def find(cases: list[Case], **wanted: Any) -> Case:
    """Return the one case that has these values."""
    (found,) = [case for case in cases if wanted.items() <= case.items()]
    return found


def run_config(output: Path, **changes: Any) -> TrainConfig:
    """A run without dropout, whose draws would differ between numbers of ranks."""
    return tiny_config(
        output,
        model=replace(MODEL, dropout=0.0),
        budget=replace(BUDGET, epochs=2, baselines=True),
        **changes,
    )


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return step and value of every point that TensorBoard shows from a folder's event files."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(point.step, point.value) for point in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def trainer_of(
    kind: str,
    shards: Shards,
    folder: Path,
    ranks: Ranks,
    *,
    tables: TableSettings | None = None,
    seed: int = 0,
    **changes: Any,
) -> Trainer:
    """A trainer of a small model of a kind; its tables get SGD unless told otherwise."""
    sizes = replace(MODEL, history=kind, dropout=0.0, merge=4, recent=8, num_globals=3)
    settings = TrainSettings(
        epochs=2,
        learning_rate=3e-3,
        tables=tables or TableSettings(SGD, 0.5),
        weight_decay=1e-5,
        batch_targets=64,
        negatives=3,
        seed=0,
        checkpoint_seconds=1e9,
    )
    model = new_model(shards.schema, sizes, kind, seed)
    return Trainer(model, shards, replace(settings, **changes), folder, ranks)


def plain_model(kind: str, shards: Shards, seed: int = 0) -> DLRMTrain:
    """The model of ``trainer_of``, as one process has it without sharding."""
    sizes = replace(MODEL, history=kind, dropout=0.0, merge=4, recent=8, num_globals=3)
    return DLRMTrain(new_model(shards.schema, sizes, kind, seed))


def own_part(trainer: Trainer, chosen: Ints) -> tuple[Batch, int | None]:
    """Build this rank's part of a batch of windows, and count its candidates for ``step``."""
    own = trainer.stream.own(chosen)
    if len(own):
        return trainer.stream.batch(own, 0), None
    trainer.stream.hold([0])
    return trainer.stream.batch(trainer.stream.smallest(), 0), 0


def train_on(trainer: Trainer, chosen: Ints) -> float:
    """Train on this rank's part of a batch of windows; return the loss of all ranks."""
    batch, num_trained = own_part(trainer, chosen)
    return trainer.step(batch, num_trained=num_trained)


def whole_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Gather sharded tensors: every rank gets them whole. All ranks must call this."""
    whole: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, ShardedTensor):
            gathered = torch.zeros(value.size())
            value.gather(0, gathered if dist.get_rank() == 0 else None)
            dist.broadcast(gathered, 0)
            whole[name] = gathered
        elif isinstance(value, DTensor):
            whole[name] = value.full_tensor().detach().clone()
        else:
            whole[name] = value.detach().clone()
    return whole


def is_table(name: str) -> bool:
    """Whether a key of a state dict is a table's."""
    return ".embeddings." in name or ".embedding_bags." in name


def largest_difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Return the largest absolute difference between tensors of the same names."""
    assert set(found) == set(wanted)
    return max((found[name] - wanted[name]).abs().max().item() for name in wanted)


def logits_of(model: nn.Module, batch: Any) -> Tensor:
    """Return the logits [C] of a DLRM."""
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(batch.dense_features, batch.sparse_features)
    model.train()
    return logits.squeeze(1)

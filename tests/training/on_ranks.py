"""Start programs on several ranks, and what the programs share.

Importing what a rank needs costs some 5 s, so a program imports it once and forks its ranks, of one
number of them after the other. One start checks many cases: a rank prints a JSON object for each,
and several tests read them.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor
from torchrec.datasets.utils import Batch

from tests.once import make_once
from tests.processes import ROOT, ForkedPython
from tests.training.worlds import BUDGET, MODEL, tiny_config
from torchrec_kvshare.config import (
    IN_BATCH,
    LEAVE_ONE_OUT,
    POPULARITY,
    EvaluationConfig,
    TrainConfig,
)
from torchrec_kvshare.data.dataset import Ints
from torchrec_kvshare.data.shards import Shards
from torchrec_kvshare.training.loop import Trainer, TrainSettings
from torchrec_kvshare.training.objective import Objective, ObjectiveSettings
from torchrec_kvshare.training.ranks import Ranks, joined_ranks
from torchrec_kvshare.training.run import new_model
from torchrec_kvshare.training.sharding import SGD, TableSettings

TIMEOUT_S = 240  # for a program; they take some 15 s on an idle machine
TOLD, ERRORS = "told", "errors"  # files of a rank: what it prints
COLLECTIVE_TIMEOUT = timedelta(seconds=60)  # a rank that waits alone ends with an error

# Two orders of the same sums, in float32: the worst loss of one step, of five kinds on two and on
# three ranks, was off by 9.6e-8.
LOSS_TOLERANCE = 1e-6

# Of published figures: one test event of each user, ranked among drawn items. Negatives and shared
# items are drawn otherwise than by default.
PROTOCOL = {
    "split": LEAVE_ONE_OUT,
    "evaluation": EvaluationConfig(candidates=25),
    "negative_sampling": IN_BATCH,
    "shared_items": 23,
    "shared_sampling": POPULARITY,
}

Case = dict[str, Any]


def environment(**changes: str) -> dict[str, str]:
    """The environment of a program: one thread, and no rank of another program."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return inherited | quiet | changes


def run_on_ranks(program: str, folder: Path, *world_sizes: int) -> dict[int, list[list[Case]]]:
    """Run ``tests.training.PROGRAM`` on so many ranks, one number after the other.

    Of several workers of pytest-xdist one runs it, the others wait and read what it told.

    Returns:
        Each rank's cases, by the number of ranks.
    """
    make_once(folder / program, lambda _: _run(program, folder, world_sizes))
    return {
        world_size: [_cases(file_of(folder, TOLD, rank, world_size)) for rank in range(world_size)]
        for world_size in world_sizes
    }


def _run(program: str, folder: Path, world_sizes: tuple[int, ...]) -> None:
    command = [sys.executable, "-W", "ignore", "-m", f"tests.training.{program}"]
    command += [str(folder), *map(str, world_sizes)]
    process = ForkedPython(
        command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        _, errors = process.communicate(timeout=TIMEOUT_S)
    finally:
        with suppress(ProcessLookupError):  # Its ranks are of its group.
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert process.returncode == 0, errors.decode()[-4000:]


def _cases(told: Path) -> list[Case]:
    return [json.loads(line) for line in told.read_text().splitlines()]


def file_of(folder: Path, what: str, rank: int, world_size: int) -> Path:
    return folder / f"{what}-{rank}-of-{world_size}"


def on_each_rank(check: Callable[[Ranks, Path], None]) -> None:
    """Fork ranks that call ``check`` with the test's folder: a program that tests start."""
    folder, fork = Path(sys.argv[1]), get_context("fork")
    for world_size in map(int, sys.argv[2:]):
        ranks = [
            fork.Process(target=_be_rank, args=(check, folder, rank, world_size))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        for rank, process in enumerate(ranks):
            if process.exitcode:
                errors = file_of(folder, ERRORS, rank, world_size)
                sys.exit(f"{errors.name}: {errors.read_text()[-4000:]}")


def _be_rank(
    check: Callable[[Ranks, Path], None], folder: Path, rank: int, world_size: int
) -> None:
    for what, descriptor in ((TOLD, 1), (ERRORS, 2)):
        with file_of(folder, what, rank, world_size).open("w") as file:
            os.dup2(file.fileno(), descriptor)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet-{world_size}",
        rank=rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    with joined_ranks(torch.device("cpu")) as ranks:
        check(ranks, folder)
    dist.destroy_process_group()


def torchrun(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a program as a user does, on two ranks."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
        + ["--standalone", "--nproc_per_node=2", *arguments],
        cwd=ROOT,
        # Restarted ranks met the addresses of killed ones in torchrun's store, and waited for them:
        # github.com/pytorch/pytorch/issues/135712. With this, each restart has a store of its own.
        env=environment(
            PYTHONPATH=str(ROOT), PYTHONWARNINGS="ignore", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"
        ),
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
        budget=replace(BUDGET, epochs=2, baselines=["none", "popularity"]),
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


OBJECTIVE = ObjectiveSettings(next_event=0.5, shared_items=23)
NEGATIVES = 3
SIZES = replace(MODEL, dropout=0.0, table_dim=24, merge=4, recent=8, num_globals=3)


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
    sizes = replace(SIZES, history=kind)
    settings = TrainSettings(
        epochs=2,
        learning_rate=3e-3,
        tables=tables or TableSettings(SGD, 0.5),
        weight_decay=1e-5,
        batch_targets=64,
        negatives=NEGATIVES,
        seed=0,
        checkpoint_seconds=1e9,
        objective=OBJECTIVE,
    )
    model = new_model(shards.schema, sizes, kind, seed)
    return Trainer(model, shards, replace(settings, **changes), folder, ranks)


def plain_model(kind: str, shards: Shards, seed: int = 0) -> Objective:
    """The model of ``trainer_of``, as one process has it without sharding."""
    sizes = replace(SIZES, history=kind)
    return Objective(
        new_model(shards.schema, sizes, kind, seed),
        OBJECTIVE,
        histories=[history.name for history in shards.schema.histories],
        tasks=shards.schema.tasks,
        negatives=NEGATIVES,
    )


def own_part(trainer: Trainer, chosen: Ints) -> tuple[Batch, int | None]:
    """Build this rank's part of a batch of windows, and count its candidates for ``step``."""
    own = trainer.stream.own(chosen)
    if len(own):
        return trainer.stream.batch(own, 0, 0), None
    trainer.stream.hold([0])
    return trainer.stream.batch(trainer.stream.smallest(), 0, 0), 0


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
    """Return the logits [C] of a DLRM that has one task."""
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(batch.dense_features, batch.sparse_features)
    model.train()
    return logits.squeeze(1)

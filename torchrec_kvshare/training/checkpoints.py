"""Checkpoints by ``torch.distributed.checkpoint``: saved and loaded at any number of ranks.

A checkpoint is a folder that is either whole or not there. Its keys are those of the unsharded
model, so that a plain module loads it too.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch.distributed.checkpoint as dcp
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from torchrec_kvshare.errors import TrainingError
from torchrec_kvshare.training.ranks import Ranks

PROGRESS = "progress.json"
ARRAYS = "arrays.npz"
NO_ARRAYS: Mapping[str, NDArray[np.int64]] = MappingProxyType({})
MODEL, OPTIMIZER = "model", "optimizer"
RAW = "raw"  # weights whose average is in ``model``


def save_checkpoint(
    folder: Path,
    state: Mapping[str, Any],
    progress: Mapping[str, Any],
    ranks: Ranks,
    *,
    keep: int,
    arrays: Mapping[str, NDArray[np.int64]] = NO_ARRAYS,
) -> None:
    """Write a checkpoint and remove old ones.

    Args:
        folder: of the model's checkpoints.
        state: ``model``, ``optimizer`` and perhaps ``raw`` state dicts; every rank gives its own.
        progress: ``step`` names the checkpoint, and that of ``best`` names one that stays, unless
            it is None; all of it is read by ``load_progress``.
        ranks: all of them must call this.
        keep: number of checkpoints that stay, beside the best.
        arrays: that every rank has alike, for ``load_arrays``.
    """
    name = _name(progress)
    written = folder / f".{name}.new"
    if ranks.is_first:
        for torn in folder.glob(".*.new"):  # of a run that was killed while it wrote
            shutil.rmtree(torn)
        folder.mkdir(parents=True, exist_ok=True)
    ranks.wait()
    dcp.save(_filled(state), checkpoint_id=written)
    if ranks.is_first:
        if arrays:
            np.savez(written / ARRAYS, allow_pickle=False, **arrays)
        (written / PROGRESS).write_text(json.dumps(dict(progress)))
        shutil.rmtree(folder / name, ignore_errors=True)
        os.replace(written, folder / name)
        best = result_of(folder)
        for old in checkpoints_of(folder)[:-keep]:
            if old != best:
                shutil.rmtree(old)
    ranks.wait()


def checkpoints_of(folder: Path) -> list[Path]:
    """Return the whole checkpoints of a folder, the newest last."""
    return sorted(path.parent for path in folder.glob(f"[0-9]*/{PROGRESS}"))


def result_of(folder: Path) -> Path:
    """Return the checkpoint of the best epoch, if the folder's last one names it, or the last one.

    Raises:
        TrainingError: if there is no checkpoint.
    """
    checkpoints = checkpoints_of(folder)
    if not checkpoints:
        raise TrainingError(f"{folder} holds no checkpoint")
    best = load_progress(checkpoints[-1])["best"]
    return folder / _name(best) if best else checkpoints[-1]


def _name(progress: Mapping[str, Any]) -> str:
    return f"{progress['step']:010d}"


def load_progress(checkpoint: Path) -> dict[str, Any]:
    """Read where training stood."""
    progress: dict[str, Any] = json.loads((checkpoint / PROGRESS).read_text())
    return progress


def load_arrays(checkpoint: Path) -> dict[str, NDArray[np.int64]]:
    """Read the arrays that every rank has alike."""
    if not (checkpoint / ARRAYS).is_file():
        return {}
    with np.load(checkpoint / ARRAYS, allow_pickle=False) as arrays:
        return dict(arrays)


def load_checkpoint(checkpoint: Path, state: dict[str, Any]) -> None:
    """Read a checkpoint into state dicts of sharded modules, in place; all ranks must call this."""
    with _notices_left_out():
        dcp.load(_filled(state), checkpoint_id=checkpoint)


def _filled(state: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out empty dictionaries, such as SGD's state of a table: only one rank writes its own.

    The tensors are those of ``state``, which are loaded in place.
    """
    return {
        name: _filled(value) if isinstance(value, Mapping) else value
        for name, value in state.items()
        if not isinstance(value, Mapping) or _filled(value)
    }


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Give a plain model, as it was before sharding, the weights of a checkpoint.

    Raises:
        TrainingError: if it does not fit the model, or a weight is not finite.
    """
    weights = model.state_dict()
    try:
        with _notices_left_out():
            dcp.load({MODEL: weights}, checkpoint_id=checkpoint, no_dist=True)
    except CheckpointException as error:
        causes = "; ".join(str(cause) for cause, _ in error.failures.values())
        raise TrainingError(f"{checkpoint} does not fit the model: {causes}") from error
    if broken := non_finite(weights):
        raise TrainingError(f"{checkpoint} cannot be used: {broken}")
    model.load_state_dict(weights)


@contextmanager
def _notices_left_out() -> Iterator[None]:
    """Leave out two notices: that TorchRec's tensors are deprecated, and that we load alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*deprecating ShardedTensor", FutureWarning)
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def non_finite(weights: Mapping[str, Tensor]) -> str:
    """Name the first tensor that has a NaN or an infinity; empty if all are finite.

    Example:
        >>> import torch
        >>> non_finite({"bias": torch.tensor([1.0, float("nan")])})
        '1 of the 2 values of bias are not finite'
    """
    for name, tensor in weights.items():
        finite = tensor.isfinite()
        if not bool(finite.all()):
            return f"{int((~finite).sum())} of the {finite.numel()} values of {name} are not finite"
    return ""

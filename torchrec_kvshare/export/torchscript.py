"""The TorchScript runtime: one program file that any libtorch process loads, without Python.

All that is TorchScript's stays in this file. The program is a ``program.RankingProgram`` and holds
the weights; a process that loads it needs fbgemm's operators, those of ``attention/``, and none of
the model's code.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fbgemm_gpu  # noqa: F401  # registers the operators that a loaded program calls
import torch
from torch import Tensor, nn

import torchrec_kvshare.attention.operators  # noqa: F401  # likewise
from torchrec_kvshare.audit import CROSS_REQUEST, EXACT, Audit
from torchrec_kvshare.data.schema import FeatureSchema
from torchrec_kvshare.errors import ArtifactError
from torchrec_kvshare.export.parity import check_program
from torchrec_kvshare.export.program import RankingProgram
from torchrec_kvshare.ranking import RankingFunctions, RankingModel

PROGRAM = "model.pt"


def write_torchscript(
    model: RankingModel, schema: FeatureSchema, model_version: str, audit: Audit, folder: Path
) -> list[str]:
    """Write a model as a program, whose cache does what the model's audit allows.

    Args:
        model: in eval mode.
        schema: its columns.
        model_version: what answers call it.
        audit: of the model.
        folder: where the program goes.

    Returns:
        Names of the files written.

    Raises:
        ParityError: if the program, loaded again, scores other than the model.
    """
    allowed = (audit.scope == CROSS_REQUEST, audit.append == EXACT)
    scripted = script_model(RankingProgram(model, schema, model_version, *allowed).eval())
    with _notices_accepted():
        torch.jit.save(scripted, str(folder / PROGRAM))
    check_program(load_program(folder / PROGRAM), model, schema)
    return [PROGRAM]


def load_torchscript(
    folder: Path, schema: FeatureSchema, encoder: dict[str, Any]
) -> RankingFunctions:
    """The ranking functions of a program; schema and encoder are in it.

    Raises:
        ArtifactError: if it cannot be loaded.
    """
    ranking: RankingFunctions = load_program(folder / PROGRAM).ranking
    return ranking


def load_program(path: Path) -> RankingProgram:
    """The whole program, as a host of another language has it.

    Raises:
        ArtifactError: if it cannot be loaded.
    """
    try:
        with _notices_accepted():
            program: RankingProgram = torch.jit.load(str(path), map_location="cpu").eval()
    except RuntimeError as error:
        raise ArtifactError(f"{path} cannot be loaded: {error}") from error
    return program


def write_cached_forward(program: Path, destination: Path) -> None:
    """Write a program whose ``forward`` is ``rank``, for servers that call nothing else.

    Args:
        program: as ``write_torchscript`` wrote it.
        destination: the file.

    Raises:
        ArtifactError: if it cannot be loaded.
    """
    scripted = script_model(CachedForward(load_program(program)).eval())
    with _notices_accepted():
        torch.jit.save(scripted, str(destination))


class CachedForward(nn.Module):
    """A program seen through its cache.

    Args:
        program: a loaded ``RankingProgram``.
    """

    def __init__(self, program: RankingProgram) -> None:
        super().__init__()
        self.program = program

    def forward(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """See ``RankingProgram.rank``."""
        return self.program.rank(features)


def script_model(model: nn.Module) -> torch.jit.ScriptModule:
    """The model as a TorchScript program, without upstream's notices about it."""
    with _notices_accepted():
        scripted: torch.jit.ScriptModule = torch.jit.script(model)
    return scripted


@contextmanager
def _notices_accepted() -> Iterator[None]:
    """TorchScript is deprecated upstream, and torchrec's batches are annotated with IntTensor."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.*deprecated", DeprecationWarning)
        warnings.filterwarnings("ignore", "TorchScript will treat type annotations", UserWarning)
        yield

"""The TorchScript runtime: one program file that any libtorch process loads, without Python.

Scripting, saving and loading stay in this file. The program is a ``program.RankingProgram`` with
its weights; a process that loads it needs fbgemm's operators and those of ``attention/``, but none
of the model's code.
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
from torchrec_kvshare.cache.identity import UNNAMED
from torchrec_kvshare.errors import ArtifactError, ParityError
from torchrec_kvshare.export.program import RankingProgram
from torchrec_kvshare.features.batches import collate
from torchrec_kvshare.features.draw import draw_ragged_requests
from torchrec_kvshare.features.schema import FeatureSchema
from torchrec_kvshare.features.tensors import request_tensors
from torchrec_kvshare.model.ranking import RankingFunctions, RankingModel
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.verify.audit import CROSS_REQUEST, EXACT, Audit
from torchrec_kvshare.verify.parity import LOGIT_TOLERANCE, probabilities_of

PROGRAM = "model.pt"


def write_torchscript(
    model: RankingModel, schema: FeatureSchema, model_version: str, audit: Audit, folder: Path
) -> list[str]:
    """Write a model as a program, whose cache does what the model's audit allows.

    Args:
        model: in eval mode.
        schema: its columns.
        model_version: the version that answers have.
        audit: of the model.
        folder: gets the program.

    Returns:
        Names of the files written.

    Raises:
        ParityError: if the program, loaded again, does not score as the model does.
    """
    program = RankingProgram(
        model,
        schema,
        model_version,
        may_keep=audit.scope == CROSS_REQUEST,
        may_extend=audit.append == EXACT,
    )
    scripted = script_model(program.eval())
    with _warnings_ignored():
        torch.jit.save(scripted, str(folder / PROGRAM))
    check_program(load_program(folder / PROGRAM), model, schema)
    return [PROGRAM]


def load_torchscript(
    folder: Path, schema: FeatureSchema, encoder: dict[str, Any]
) -> RankingFunctions:
    """Load the ranking functions of a program, which holds its schema and encoder itself.

    Raises:
        ArtifactError: if the program cannot be loaded.
    """
    ranking: RankingFunctions = load_program(folder / PROGRAM).ranking
    return ranking


def load_program(path: Path) -> RankingProgram:
    """Load a whole program, as a host in another language does.

    Raises:
        ArtifactError: if the program cannot be loaded.
    """
    try:
        with _warnings_ignored():
            program: RankingProgram = torch.jit.load(str(path), map_location="cpu").eval()
    except RuntimeError as error:
        raise ArtifactError(f"{path} cannot be loaded: {error}") from error
    return program


def write_cached_forward(program: Path, destination: Path) -> None:
    """Write a program whose ``forward`` is ``rank``, for servers that only call ``forward``.

    Args:
        program: a file of ``write_torchscript``.
        destination: the new file.

    Raises:
        ArtifactError: if the program cannot be loaded.
    """
    scripted = script_model(CachedForward(load_program(program)).eval())
    with _warnings_ignored():
        torch.jit.save(scripted, str(destination))


class CachedForward(nn.Module):
    """A program whose ``forward`` goes through its cache.

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
    """Compile a model to TorchScript, without torch's warnings about that."""
    with _warnings_ignored():
        scripted: torch.jit.ScriptModule = torch.jit.script(model)
    return scripted


@contextmanager
def _warnings_ignored() -> Iterator[None]:
    """Ignore that TorchScript is deprecated, and that torchrec annotates batches with IntTensor."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.*deprecated", DeprecationWarning)
        warnings.filterwarnings("ignore", "TorchScript will treat type annotations", UserWarning)
        yield


@torch.no_grad()
def check_program(
    program: RankingProgram, eager: RankingModel, schema: FeatureSchema, seed: int = 0
) -> None:
    """Compare a program's probabilities, uncached and through its own cache, with the model's.

    Args:
        program: freshly loaded; its cache is used.
        eager: the exported model, in eval mode.
        schema: its columns.
        seed: of the drawn requests.

    Raises:
        ParityError: if an uncached score is not bit-equal, a cached one differs by more than
            ``LOGIT_TOLERANCE``, or a logit of the model is not finite.
    """
    batch = collate(draw_ragged_requests(schema, seed), schema)
    if not bool(eager(batch.dense_features, batch.sparse_features).isfinite().all()):
        raise ParityError("the model has logits that are not finite")
    requests = draw_ragged_requests(schema, seed)
    expected = probabilities_of(Engine(eager, schema, None, version=UNNAMED).rank(requests))
    compared = [("uncached", program(request_tensors(requests, schema)), expected, 0.0)]
    if program.may_keep:
        # Every request twice in one batch, so that the second one hits. A second call would cost
        # seconds: TorchScript optimises the program then.
        scores, _ = program.rank(request_tensors(requests * 2, schema))
        compared.append(("cached", scores, torch.cat([expected] * 2), LOGIT_TOLERANCE))
    for name, scores, wanted, allowed in compared:
        difference = float((scores - wanted).abs().max())
        if not difference <= allowed:
            raise ParityError(
                f"{name} scores of the program differ by {difference}; at most {allowed} is allowed"
            )

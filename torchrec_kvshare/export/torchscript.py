"""Export to TorchScript and load again: all that is TorchScript's stays in this file.

The program has the methods of ``ranking.RankingModel`` and holds the weights; a process that loads
it needs fbgemm's operators and none of the model's code.
"""

import importlib.metadata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import fbgemm_gpu  # noqa: F401  # registers the operators that a loaded program calls
import torch
from torch import nn

import torchrec_kvshare
from torchrec_kvshare.attention.bodies import DENSE, FLASH, NATIVE
from torchrec_kvshare.attention.native import load_native
from torchrec_kvshare.audit import EXACT, audit_model
from torchrec_kvshare.cache.identity import model_digest
from torchrec_kvshare.data.schema import ITEM, TIME, USER, FeatureSchema
from torchrec_kvshare.engine import RankingFunctions
from torchrec_kvshare.errors import ArtifactError, ConfigError
from torchrec_kvshare.export.artifact import (
    MANIFEST,
    SCHEMA,
    Manifest,
    TowerSizes,
    artifact_folder,
    file_sha256,
    read_artifact,
    write_manifest,
    write_schema,
)
from torchrec_kvshare.export.parity import check_parity
from torchrec_kvshare.ranking import RankingModel, split_tables

PROGRAM = "model.pt"
SCRIPTABLE_BODIES = (FLASH, NATIVE, DENSE)


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact: what it computes, what it reads, and what it says of itself."""

    model: RankingFunctions
    schema: FeatureSchema
    manifest: Manifest


def export_torchscript(model: RankingModel, schema: FeatureSchema, destination: Path) -> Manifest:
    """Write a TorchScript artifact; parity is checked on a fresh load before it is kept.

    Args:
        model: the trained model, in eval mode.
        schema: its columns.
        destination: the artifact's folder; must not exist.

    Returns:
        The manifest as written.

    Raises:
        ArtifactError: if ``destination`` exists.
        ConfigError: if the model's attention body is not TorchScript's.
        ParityError: if the exported scores are not the model's; nothing is left behind then.
    """
    sizes = {}
    for history, tower in zip(schema.histories, model.collection.towers(), strict=True):
        num_planes, num_heads, head_dim = tower.kv_shape
        max_rows = tower.encoder.num_rows(history.window.max_history)
        sizes[history.name] = TowerSizes(num_planes, num_heads, head_dim, max_rows)
    encoder = asdict(model.collection.towers()[0].spec)
    body = model.body
    if body not in SCRIPTABLE_BODIES:
        raise ConfigError(f"attention body {body} cannot be exported; {SCRIPTABLE_BODIES} can")
    audit = audit_model(model, schema)
    with artifact_folder(destination) as folder:
        scripted = script_model(model)
        with _notices_accepted():
            torch.jit.save(scripted, str(folder / PROGRAM))
        write_schema(folder, schema)
        program = _load_program(folder / PROGRAM)
        parity = check_parity(program, model, schema, audit.append == EXACT)
        description = {"encoder": encoder, "body": body, "schema": schema.to_json()}
        dense, tables = split_tables(model)
        manifest = Manifest(
            model_digest(dense, description),
            model_digest(tables, {}),
            encoder,
            body,
            sizes,
            _inputs(schema),
            audit.to_json(),
            parity,
            _versions(),
            {name: file_sha256(folder / name) for name in (PROGRAM, SCHEMA)},
        )
        write_manifest(folder, manifest)
    return manifest


def script_model(model: nn.Module) -> torch.jit.ScriptModule:
    """The model as a TorchScript program, without upstream's notices about it."""
    with _notices_accepted():
        scripted: torch.jit.ScriptModule = torch.jit.script(model)
    return scripted


def load_artifact(folder: Path) -> Artifact:
    """Load a TorchScript artifact whose files are those that its manifest vouches for.

    Raises:
        ArtifactError: if a file is missing, changed or cannot be loaded.
        ConfigError: if its attention body is ``native`` and cannot be compiled here.
    """
    manifest, schema = read_artifact(folder)
    if manifest.body == NATIVE:
        load_native()
    if PROGRAM not in manifest.sha256_by_file:
        raise ArtifactError(f"{folder / MANIFEST} does not vouch for {PROGRAM}")
    return Artifact(_load_program(folder / PROGRAM), schema, manifest)


def _load_program(path: Path) -> RankingFunctions:
    try:
        with _notices_accepted():
            program: RankingFunctions = torch.jit.load(str(path), map_location="cpu").eval()
    except RuntimeError as error:
        raise ArtifactError(f"{path} cannot be loaded: {error}") from error
    return program


def _inputs(schema: FeatureSchema) -> dict[str, list[str]]:
    return {
        "request": [USER, TIME],
        "context": list(schema.context),
        "history": [*schema.event_columns, *schema.item_attributes, TIME],
        "candidates": [ITEM, *schema.item_attributes, *schema.item_floats],
    }


def _versions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "torchrec": importlib.metadata.version("torchrec"),
        "torchrec_kvshare": torchrec_kvshare.__version__,
    }


@contextmanager
def _notices_accepted() -> Iterator[None]:
    """TorchScript is deprecated upstream, and torchrec's batches are annotated with IntTensor."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.*deprecated", DeprecationWarning)
        warnings.filterwarnings("ignore", "TorchScript will treat type annotations", UserWarning)
        yield

"""Export a trained model to an artifact, and load an artifact, for every runtime.

An artifact is kept only if a fresh load of it scores as the model does, cached and uncached. It is
loaded only if its files, the installed libraries and the scores of its golden requests match its
manifest. With a key, nothing is loaded unless the manifest was signed with that key.
"""

import importlib.metadata
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import fbgemm_gpu
import torch

import torchrec_kvshare
from torchrec_kvshare.cache.identity import version_of
from torchrec_kvshare.cache.pages import TowerSizes
from torchrec_kvshare.data.files import file_sha256
from torchrec_kvshare.errors import ArtifactError, ConfigError
from torchrec_kvshare.export.artifact import (
    MANIFEST,
    Manifest,
    artifact_folder,
    copy_signed,
    read_artifact,
    write_manifest,
)
from torchrec_kvshare.export.pt2 import load_pt2, pt2_files, write_pt2
from torchrec_kvshare.export.torchscript import PROGRAM, load_torchscript, write_torchscript
from torchrec_kvshare.export.weights import check_weights
from torchrec_kvshare.features.schema import (
    IDS,
    ITEM,
    SCHEMA,
    TIME,
    USER,
    FeatureSchema,
    save_schema,
)
from torchrec_kvshare.features.tensors import input_specs
from torchrec_kvshare.model.quantised import FLOAT32, quantise_tables
from torchrec_kvshare.model.ranking import RankingFunctions, RankingModel, refuse_weights
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.verify.audit import EXACT, Audit, audit_model
from torchrec_kvshare.verify.golden import GOLDEN, check_golden, read_golden, write_golden
from torchrec_kvshare.verify.parity import LOGIT_TOLERANCE, check_parity

TORCHSCRIPT, PT2 = "torchscript", "pt2"
CHECKED_VERSIONS = ("torch", "torchrec", "fbgemm")


class Runtime(NamedTuple):
    """How to write a model to files, and how to load it again.

    Attributes:
        files: maps a folder to the names of the files that ``load`` reads there.
        write: takes model, schema, model version, audit and folder; returns the files' names.
        load: takes folder, schema and encoder.
        tolerance: greatest allowed difference of its logits from the eager model's.
    """

    files: Callable[[Path], Sequence[str]]
    write: Callable[[RankingModel, FeatureSchema, str, Audit, Path], list[str]]
    load: Callable[[Path, FeatureSchema, dict[str, Any]], RankingFunctions]
    tolerance: float


RUNTIMES = {
    TORCHSCRIPT: Runtime(lambda _folder: (PROGRAM,), write_torchscript, load_torchscript, 0.0),
    # Graphs keep no K/V and have no version: they need neither the audit nor the version.
    PT2: Runtime(
        pt2_files,
        lambda model, schema, _version, _audit, folder: write_pt2(model, schema, folder),
        load_pt2,
        LOGIT_TOLERANCE,
    ),
}


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact.

    Attributes:
        model: its ranking functions.
        schema: its columns.
        manifest: its description.
        golden: requests with their scores, see ``golden.check_golden``.
    """

    model: RankingFunctions
    schema: FeatureSchema
    manifest: Manifest
    golden: list[Any]


def export_model(
    model: RankingModel,
    schema: FeatureSchema,
    destination: Path,
    *,
    runtime: str = TORCHSCRIPT,
    tables: str = FLOAT32,
    provenance: Mapping[str, str] | None = None,
    key: bytes | None = None,
) -> Manifest:
    """Write an artifact, and keep it only if a fresh load scores as the model does.

    Args:
        model: the trained model, in eval mode.
        schema: its columns.
        destination: the artifact's folder; must not exist.
        runtime: one of ``RUNTIMES``.
        tables: dtype of the artifact's embedding tables, see ``quantised.TABLE_DTYPES``.
        provenance: origin and licence of the model, for the manifest.
        key: the key that signs the manifest; None leaves it unsigned.

    Returns:
        The manifest as written.

    Raises:
        ArtifactError: if ``destination`` exists, or a weight is not finite.
        ConfigError: if there is no such runtime, or the model cannot be exported to it.
        ParityError: if the exported scores are not the model's; the folder is deleted then.
    """
    if runtime not in RUNTIMES:
        raise ConfigError(f"runtime is {runtime!r}; one of {list(RUNTIMES)} is allowed")
    refuse_weights(model)
    check_weights(model)
    encoder = asdict(model.collection.towers()[0].spec)
    version = version_of(
        model,
        schema,
        "" if runtime == TORCHSCRIPT else runtime,
        "" if tables == FLOAT32 else tables,
    )
    model = quantise_tables(model, tables)
    check_weights(model)
    audit = audit_model(model, schema)
    chosen = RUNTIMES[runtime]
    with artifact_folder(destination) as folder:
        save_schema(folder, schema)
        files = [SCHEMA, IDS, *chosen.write(model, schema, str(version), audit, folder)]
        loaded = chosen.load(folder, schema, encoder)
        parity = check_parity(
            loaded, model, schema, extends=audit.append == EXACT, tolerance=chosen.tolerance
        )
        files.append(write_golden(folder, loaded, schema))
        manifest = Manifest(
            runtime=runtime,
            model_digest=version.model,
            tables_digest=version.tables,
            kv=dict(version.kv),
            tables=tables,
            encoder=encoder,
            towers=_sizes(model, schema),
            columns=_columns(schema),
            inputs=[spec.to_json() for spec in input_specs(schema)],
            audit=audit.to_json(),
            parity=parity,
            provenance=dict(provenance or {}),
            versions=installed_versions(),
            sha256_by_file={name: file_sha256(folder / name) for name in files},
        )
        write_manifest(folder, manifest, key)
    return manifest


def load_artifact(folder: Path, key: bytes | None = None) -> Artifact:
    """Load an artifact, and check its files, versions and golden scores against the manifest.

    Args:
        folder: the artifact.
        key: the key that its manifest must be signed with; the files are then copied to a private
            folder, checked and loaded there. None loads any artifact: whoever can write to the
            folder can run code in this process.

    Raises:
        ArtifactError: naming the file that is missing, changed or not signed with the key, the
            library with another version, or the golden request with other scores.
    """
    if key is None:
        return _load(folder, folder)
    with tempfile.TemporaryDirectory(prefix="kvshare-artifact-") as copy:
        copy_signed(folder, Path(copy), key)
        return _load(folder, Path(copy))


def _load(source: Path, folder: Path) -> Artifact:
    """Load an artifact from ``folder``, which is ``source`` or a copy of it; errors name source."""
    manifest, schema = read_artifact(folder)
    if manifest.runtime not in RUNTIMES:
        raise ArtifactError(f"{source} needs runtime {manifest.runtime!r}; {list(RUNTIMES)} exist")
    runtime = RUNTIMES[manifest.runtime]
    for name in (GOLDEN, *runtime.files(folder)):
        if name not in manifest.sha256_by_file:
            raise ArtifactError(f"{source / MANIFEST} has no digest of {name}")
    _check_versions(source, manifest)
    model = runtime.load(folder, schema, manifest.encoder)
    golden = read_golden(folder)
    check_golden(golden, Engine(model, schema, None, version=manifest.version), source)
    return Artifact(model, schema, manifest, golden)


def installed_versions() -> dict[str, str]:
    """Return the versions of the libraries that an artifact depends on."""
    return {
        "torch": torch.__version__,
        "torchrec": importlib.metadata.version("torchrec"),
        "fbgemm": fbgemm_gpu.__version__,
        "torchrec_kvshare": torchrec_kvshare.__version__,
    }


def _columns(schema: FeatureSchema) -> dict[str, list[str]]:
    return {
        "request": [USER, TIME],
        "context": [*schema.context, *schema.context_floats],
        "history": [*schema.event_columns, *schema.event_floats, *schema.item_attributes, TIME],
        "candidates": [ITEM, *schema.item_attributes, *schema.item_floats],
    }


def _sizes(model: RankingModel, schema: FeatureSchema) -> dict[str, TowerSizes]:
    sizes = {}
    for history, tower in zip(schema.histories, model.collection.towers(), strict=True):
        num_planes, num_heads, head_dim = tower.kv_shape
        max_rows = tower.encoder.num_kv_rows(history.window.max_history)
        sizes[history.name] = TowerSizes(num_planes, num_heads, head_dim, max_rows)
    return sizes


def _check_versions(folder: Path, manifest: Manifest) -> None:
    """Refuse other versions of the libraries; their builds, after a plus sign, may differ."""
    here = installed_versions()
    for name in CHECKED_VERSIONS:
        expected, found = (one.get(name, "").split("+")[0] for one in (manifest.versions, here))
        if expected != found:
            raise ArtifactError(f"{folder} was exported with {name} {expected}; here is {found}")

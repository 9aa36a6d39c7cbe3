"""The artifact: a folder with the model's program, the schema and a manifest that vouches for both.

It is made beside its place and renamed into it, so that it is either whole or not there.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torchrec_kvshare.data.schema import FeatureSchema
from torchrec_kvshare.errors import ArtifactError

MANIFEST = "manifest.json"
SCHEMA = "schema.json"
FORMAT = 5
CHUNK_BYTES = 1 << 20  # read at a time: a program may be larger than the memory
VERSION_DIGITS = 16  # of each digest: what an answer calls the model's version


@dataclass(frozen=True)
class TowerSizes:
    """What a page of one history's K/V is made of, and how many rows its window has at most."""

    num_planes: int
    num_heads: int
    head_dim: int
    max_rows: int


@dataclass(frozen=True)
class Manifest:
    """What an artifact says of itself.

    Attributes:
        runtime: what its programs are for.
        model_digest: of dense weights, architecture and window.
        tables_digest: of the embedding tables.
        tables: dtype of the embedding tables.
        encoder: what the history towers are, as ``TowerSpec`` has it.
        body: how attention is computed; ``native`` needs its operators in the process.
        towers: sizes of their K/V, by history.
        columns: that a request must have, by group.
        inputs: the tensors that its programs take, see ``tensors.TensorSpec``.
        audit: where K/V may be used and whether it may be extended, with the figures behind that.
        parity: greatest differences of logits found before the artifact was kept.
        provenance: what was said of the model's origin and licence.
        versions: of the libraries it was made with.
        sha256_by_file: of the other files.
        codecs: by codec, what writing K/V in it does to scores and to bytes, where it was measured.
        break_even_events: by tier, from how many events on fetching K/V beats encoding it, where it
            was measured.
    """

    runtime: str
    model_digest: str
    tables_digest: str
    tables: str
    encoder: dict[str, Any]
    body: str
    towers: dict[str, TowerSizes]
    columns: dict[str, list[str]]
    inputs: list[dict[str, Any]]
    audit: dict[str, Any]
    parity: dict[str, float]
    provenance: dict[str, str]
    versions: dict[str, str]
    sha256_by_file: dict[str, str]
    codecs: dict[str, dict[str, float]] = field(default_factory=dict)
    break_even_events: dict[str, int] = field(default_factory=dict)

    @property
    def model_version(self) -> str:
        """Short name of the model, as it stands in answers."""
        return model_version_of(self.model_digest, self.tables_digest)

    def to_json(self) -> dict[str, Any]:
        """As it is written."""
        towers = {name: vars(sizes) for name, sizes in self.towers.items()}
        return {"format": FORMAT} | vars(self) | {"towers": towers}


def model_version_of(model_digest: str, tables_digest: str) -> str:
    """What answers call a model: ``<model>-<tables>``."""
    return f"{model_digest[:VERSION_DIGITS]}-{tables_digest[:VERSION_DIGITS]}"


@contextmanager
def artifact_folder(destination: Path) -> Iterator[Path]:
    """A fresh folder that becomes ``destination`` if all goes well, and vanishes if not.

    Raises:
        ArtifactError: if ``destination`` exists already.
    """
    if destination.exists():
        raise ArtifactError(f"{destination} exists; an artifact is never overwritten")
    destination.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        yield folder
        folder.chmod(0o755)
        os.rename(folder, destination)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def write_schema(folder: Path, schema: FeatureSchema) -> None:
    """Write the columns and vocabularies."""
    (folder / SCHEMA).write_text(json.dumps(schema.to_json()))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, last of all files."""
    (folder / MANIFEST).write_text(_encoded(manifest))


def add_measured(folder: Path, **measured: dict[str, Any]) -> Manifest:
    """Add to ``codecs`` or ``break_even_events`` of an artifact's manifest what was measured.

    Args:
        folder: the artifact.
        measured: by the manifest's field, what to add to it.

    Returns:
        The manifest as it is now.

    Raises:
        ArtifactError: if the artifact is broken.
    """
    manifest, _ = read_artifact(folder)
    merged = {name: getattr(manifest, name) | values for name, values in measured.items()}
    manifest = replace(manifest, **merged)
    written = folder / f".{MANIFEST}.new"
    written.write_text(_encoded(manifest))
    os.replace(written, folder / MANIFEST)
    return manifest


def read_artifact(folder: Path) -> tuple[Manifest, FeatureSchema]:
    """Read what an artifact says of itself and check its files against it.

    Args:
        folder: the artifact.

    Returns:
        The manifest and the schema.

    Raises:
        ArtifactError: if a file is missing, or is not the one that the manifest vouches for.
    """
    if not (folder / MANIFEST).is_file():
        raise ArtifactError(f"{folder} is no artifact: it has no {MANIFEST}")
    manifest = _decode_manifest(folder / MANIFEST)
    if SCHEMA not in manifest.sha256_by_file:
        raise ArtifactError(f"{folder / MANIFEST} does not vouch for {SCHEMA}")
    for name, expected in manifest.sha256_by_file.items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{folder} has no {name}, which its manifest names")
        if (found := file_sha256(path)) != expected:
            raise ArtifactError(f"{path} has sha256 {found}; its manifest says {expected}")
    return manifest, FeatureSchema.from_json(json.loads((folder / SCHEMA).read_text()))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal text."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _encoded(manifest: Manifest) -> str:
    return json.dumps(manifest.to_json(), indent=2) + "\n"


def _decode_manifest(path: Path) -> Manifest:
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise TypeError("it is no object")
        if values.pop("format") != FORMAT:
            raise ArtifactError(f"{path} is of another format; this version reads {FORMAT}")
        if not isinstance(values["sha256_by_file"], dict):
            raise TypeError("sha256_by_file is no object")
        towers = {name: TowerSizes(**sizes) for name, sizes in values["towers"].items()}
        return Manifest(**values | {"towers": towers})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is broken: {error}") from error

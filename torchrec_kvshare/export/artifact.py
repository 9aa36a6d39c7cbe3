"""The artifact: a folder with the model's program, the schema and a manifest that vouches for both.

It is made beside its place and renamed into it, so that it is either whole or not there. Programs
are code: who checks them by a key loads nothing that was not signed with it.
"""

import hashlib
import hmac
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torchrec_kvshare.cache.identity import ModelVersion
from torchrec_kvshare.cache.keys import keyed_digest
from torchrec_kvshare.cache.pages import TowerSizes
from torchrec_kvshare.errors import ArtifactError
from torchrec_kvshare.features.schema import FeatureSchema

MANIFEST = "manifest.json"
SCHEMA = "schema.json"
SIGNATURE = "manifest.mac"  # keyed digest of the manifest's bytes, as hexadecimal text
PURPOSE = b"kvshare-artifact"
FORMAT = 5
CHUNK_BYTES = 1 << 20  # read at a time: a program may be larger than the memory


@dataclass(frozen=True)
class Manifest:
    """What an artifact says of itself.

    Attributes:
        runtime: what its programs are for.
        model_digest: of dense weights, architecture and window.
        tables_digest: of the embedding tables.
        tables: dtype of the embedding tables.
        encoder: what the history towers are, as ``TowerSpec`` has it.
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
    def version(self) -> ModelVersion:
        """Which model it is."""
        return ModelVersion(self.model_digest, self.tables_digest)

    @property
    def model_version(self) -> str:
        """What answers call the model."""
        return str(self.version)

    def to_json(self) -> dict[str, Any]:
        """As it is written."""
        towers = {name: vars(sizes) for name, sizes in self.towers.items()}
        return {"format": FORMAT} | vars(self) | {"towers": towers}


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
    (folder / SCHEMA).write_text(json.dumps(schema.to_json(), allow_nan=False))


def write_manifest(folder: Path, manifest: Manifest, key: bytes | None = None) -> None:
    """Write the manifest, last of all files, and sign it if there is a key."""
    for name, content in ((MANIFEST, _encoded(manifest)), (SIGNATURE, _signature(manifest, key))):
        if content is not None:
            written = folder / f".{name}.new"
            written.write_text(content)
            os.replace(written, folder / name)


def add_measured(folder: Path, key: bytes | None = None, **measured: dict[str, Any]) -> Manifest:
    """Add to ``codecs`` or ``break_even_events`` of an artifact's manifest what was measured.

    Args:
        folder: the artifact.
        key: that it is signed with; None if it is not.
        measured: by the manifest's field, what to add to it.

    Returns:
        The manifest as it is now.

    Raises:
        ArtifactError: if the artifact is broken, signed with another key or without any, or a
            figure is not finite.
    """
    if key is None and (folder / SIGNATURE).exists():
        raise ArtifactError(f"{folder} is signed: artifact_key_file is needed to add to it")
    manifest, _ = read_artifact(folder, key)
    merged = {name: getattr(manifest, name) | values for name, values in measured.items()}
    manifest = replace(manifest, **merged)
    write_manifest(folder, manifest, key)
    return manifest


def read_artifact(folder: Path, key: bytes | None = None) -> tuple[Manifest, FeatureSchema]:
    """Read what an artifact says of itself and check its files against it.

    Args:
        folder: the artifact.
        key: that it must be signed with; None reads any.

    Returns:
        The manifest and the schema.

    Raises:
        ArtifactError: if it is not signed with the key, a file is missing, or a file is not the one
            that the manifest vouches for.
    """
    manifest = _read_manifest(folder, key)
    for name, expected in manifest.sha256_by_file.items():
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder} has no {name}, which its manifest names")
        _check_digest(folder / name, folder / name, expected)
    return manifest, FeatureSchema.from_json(json.loads((folder / SCHEMA).read_text()))


def copy_signed(folder: Path, destination: Path, key: bytes) -> None:
    """Copy what an artifact's manifest names, each file checked as it is copied.

    Whoever may write to the folder can change a file after it was checked, but not its copy.

    Args:
        folder: the artifact.
        destination: a folder that nobody else may write to.
        key: that the artifact must be signed with.

    Raises:
        ArtifactError: as ``read_artifact``, or if there is no room for the copy.
    """
    manifest = _read_manifest(folder, key)
    for name, expected in manifest.sha256_by_file.items():
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder} has no {name}, which its manifest names")
        try:
            shutil.copyfile(folder / name, destination / name)
        except OSError as error:
            raise ArtifactError(f"{folder / name} cannot be copied: {error}") from error
        _check_digest(folder / name, destination / name, expected)
    write_manifest(destination, manifest)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal text."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _encoded(manifest: Manifest) -> str:
    try:
        return json.dumps(manifest.to_json(), indent=2, allow_nan=False) + "\n"
    except ValueError as error:
        raise ArtifactError("a figure of the manifest is not finite") from error


def _signature(manifest: Manifest, key: bytes | None) -> str | None:
    if key is None:
        return None
    return keyed_digest([_encoded(manifest).encode()], key, PURPOSE).hex() + "\n"


def _check_digest(path: Path, read: Path, expected: str) -> None:
    """Refuse a file, or what was read of it, that the manifest does not vouch for."""
    if (found := file_sha256(read)) != expected:
        raise ArtifactError(f"{path} has sha256 {found}; its manifest says {expected}")


def _read_manifest(folder: Path, key: bytes | None) -> Manifest:
    """The manifest; nothing of it is read before its signature is right, where there is a key."""
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{folder} is no artifact: it has no {MANIFEST}") from error
    if key is not None:
        _check_signature(folder, content, key)
    manifest = _decode_manifest(path, content)
    if SCHEMA not in manifest.sha256_by_file:
        raise ArtifactError(f"{path} does not vouch for {SCHEMA}")
    return manifest


def _check_signature(folder: Path, content: bytes, key: bytes) -> None:
    path = folder / SIGNATURE
    try:
        found = path.read_bytes().strip()
    except OSError as error:
        raise ArtifactError(
            f"{folder} is not signed: it has no {SIGNATURE}, and artifact_key_file is set"
        ) from error
    if not hmac.compare_digest(found, keyed_digest([content], key, PURPOSE).hex().encode()):
        raise ArtifactError(
            f"{path} does not fit {MANIFEST}: that was changed, or signed with another key"
        )


def _decode_manifest(path: Path, content: bytes) -> Manifest:
    try:
        values = json.loads(content)
        if not isinstance(values, dict):
            raise TypeError("it is no object")
        if values.pop("format") != FORMAT:
            raise ArtifactError(f"{path} is of another format; this version reads {FORMAT}")
        if not isinstance(values["sha256_by_file"], dict):
            raise TypeError("sha256_by_file is no object")
        for name in values["sha256_by_file"]:
            # What stands elsewhere is not the artifact's, whatever its digest.
            if name in ("", "..") or Path(name).name != name:
                raise ValueError(f"it names {name!r}, which is no file of its folder")
        towers = {name: TowerSizes(**sizes) for name, sizes in values["towers"].items()}
        return Manifest(**values | {"towers": towers})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is broken: {error}") from error

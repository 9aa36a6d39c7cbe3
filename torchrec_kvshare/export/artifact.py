"""The artifact: a folder with the model's program, the schema and a manifest with their digests.

It is written to a temporary folder beside its destination and renamed, so that it is complete or
absent. Programs are code: a loader with a key loads only what was signed with that key.
"""

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

from torchrec_kvshare.cache.identity import KVVersion, ModelVersion
from torchrec_kvshare.cache.keys import keyed_digest
from torchrec_kvshare.cache.pages import TowerSizes
from torchrec_kvshare.data.files import file_sha256
from torchrec_kvshare.errors import ArtifactError
from torchrec_kvshare.features.schema import IDS, SCHEMA, FeatureSchema, load_schema

MANIFEST = "manifest.json"
SIGNATURE = "manifest.mac"  # keyed digest of the manifest's bytes, as hexadecimal text
PURPOSE = b"kvshare-artifact"
FORMAT = 9


@dataclass(frozen=True)
class Manifest:
    """Description of an artifact, as ``manifest.json`` holds it.

    Attributes:
        runtime: of its programs, one of ``exporter.RUNTIMES``.
        model_digest: of all dense weights, architecture and windows.
        tables_digest: of all embedding tables.
        kv: by history, digests of the part that its K/V depends on.
        tables: dtype of the embedding tables.
        encoder: fields of the history towers' ``TowerSpec``.
        towers: sizes of their K/V, by history.
        columns: that a request must have, by group.
        inputs: the tensors that its programs take, see ``tensors.TensorSpec``.
        audit: the scope of K/V and whether it may be extended, with the measured differences.
        parity: greatest differences of logits, measured before the artifact was kept.
        provenance: origin and licence of the model, as the exporter was told.
        versions: of the libraries that wrote it.
        sha256_by_file: of all other files.
        codecs: effect of each measured codec on scores and bytes.
        break_even_events: by measured tier, the number of events from which on fetching K/V is
            faster than encoding it.
    """

    runtime: str
    model_digest: str
    tables_digest: str
    kv: dict[str, KVVersion]
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
        """Digests of the model."""
        return ModelVersion(self.model_digest, self.tables_digest, self.kv)

    @property
    def model_version(self) -> str:
        """The version as answers have it."""
        return str(self.version)

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``manifest.json``."""
        towers = {name: vars(sizes) for name, sizes in self.towers.items()}
        kv = {name: version._asdict() for name, version in self.kv.items()}
        return {"format": FORMAT} | vars(self) | {"towers": towers, "kv": kv}


@contextmanager
def artifact_folder(destination: Path) -> Iterator[Path]:
    """Yield a new folder; rename it to ``destination`` at the end, or delete it on an error.

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


def write_manifest(folder: Path, manifest: Manifest, key: bytes | None = None) -> None:
    """Write the manifest, after all other files, and sign it if there is a key."""
    for name, content in ((MANIFEST, _encoded(manifest)), (SIGNATURE, _signature(manifest, key))):
        if content is not None:
            written = folder / f".{name}.new"
            written.write_text(content)
            os.replace(written, folder / name)


def add_measured(folder: Path, key: bytes | None = None, **measured: dict[str, Any]) -> Manifest:
    """Add measurements to ``codecs`` or ``break_even_events`` of an artifact's manifest.

    Args:
        folder: the artifact.
        key: the key that it is signed with; None if it is not signed.
        measured: new entries, by the manifest's field.

    Returns:
        The new manifest.

    Raises:
        ArtifactError: if the artifact is broken, signed with another key, signed although ``key``
            is None, or a number is not finite.
    """
    if key is None and (folder / SIGNATURE).exists():
        raise ArtifactError(f"{folder} is signed: artifact_key_file is needed to add to it")
    manifest, _ = read_artifact(folder, key)
    merged = {name: getattr(manifest, name) | values for name, values in measured.items()}
    manifest = replace(manifest, **merged)
    write_manifest(folder, manifest, key)
    return manifest


def read_artifact(folder: Path, key: bytes | None = None) -> tuple[Manifest, FeatureSchema]:
    """Read an artifact's manifest and schema, and check all its files against the manifest.

    Args:
        folder: the artifact.
        key: the key that it must be signed with; None reads any artifact.

    Returns:
        The manifest and the schema.

    Raises:
        ArtifactError: if the artifact is not signed with the key, or a file is missing or has
            another digest than the manifest says.
    """
    manifest = _read_manifest(folder, key)
    for name, expected in manifest.sha256_by_file.items():
        _check_present(folder, name)
        _check_digest(folder / name, folder / name, expected)
    return manifest, load_schema(folder)


def copy_signed(folder: Path, destination: Path, key: bytes) -> None:
    """Copy the files that an artifact's manifest names, and check the digest of each copy.

    Other users who can write to the folder can change a file after its check, but not its copy.

    Args:
        folder: the artifact.
        destination: a folder that only this user can write to.
        key: the key that the artifact must be signed with.

    Raises:
        ArtifactError: as ``read_artifact``, or if there is no room for the copy.
    """
    manifest = _read_manifest(folder, key)
    for name, expected in manifest.sha256_by_file.items():
        _check_present(folder, name)
        try:
            shutil.copyfile(folder / name, destination / name)
        except OSError as error:
            raise ArtifactError(f"{folder / name} cannot be copied: {error}") from error
        _check_digest(folder / name, destination / name, expected)
    write_manifest(destination, manifest)


def _encoded(manifest: Manifest) -> str:
    try:
        return json.dumps(manifest.to_json(), indent=2, allow_nan=False) + "\n"
    except ValueError as error:
        raise ArtifactError("a number in the manifest is not finite") from error


def _signature(manifest: Manifest, key: bytes | None) -> str | None:
    if key is None:
        return None
    return keyed_digest([_encoded(manifest).encode()], key, PURPOSE).hex() + "\n"


def _check_present(folder: Path, name: str) -> None:
    if not (folder / name).is_file():
        raise ArtifactError(f"{folder} has no {name}, which its manifest names")


def _check_digest(path: Path, copy: Path, expected: str) -> None:
    """Refuse a copy of ``path``, or the file itself, that has not the manifest's digest."""
    if (found := file_sha256(copy)) != expected:
        raise ArtifactError(f"{path} has sha256 {found}; its manifest says {expected}")


def _read_manifest(folder: Path, key: bytes | None) -> Manifest:
    """Read the manifest; with a key, check its signature before it is parsed."""
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{folder} is no artifact: it has no {MANIFEST}") from error
    if key is not None:
        _check_signature(folder, content, key)
    manifest = _decode_manifest(path, content)
    for name in (SCHEMA, IDS):
        if name not in manifest.sha256_by_file:
            raise ArtifactError(f"{path} has no digest of {name}")
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
            f"{path} does not match {MANIFEST}: it was changed, or signed with another key"
        )


def _decode_manifest(path: Path, content: bytes) -> Manifest:
    try:
        values = json.loads(content)
        if not isinstance(values, dict):
            raise TypeError("it is not an object")
        if values.pop("format") != FORMAT:
            raise ArtifactError(f"{path} has another format; this version reads format {FORMAT}")
        if not isinstance(values["sha256_by_file"], dict):
            raise TypeError("sha256_by_file is not an object")
        for name in values["sha256_by_file"]:
            # A file outside the folder is not part of the artifact, whatever its digest.
            if name in ("", "..") or Path(name).name != name:
                raise ValueError(f"it names {name!r}, which is not a file of its folder")
        towers = {name: TowerSizes(**sizes) for name, sizes in values["towers"].items()}
        kv = {name: KVVersion(**digests) for name, digests in values["kv"].items()}
        return Manifest(**values | {"towers": towers, "kv": kv})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is broken: {error}") from error

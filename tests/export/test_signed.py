"""An artifact is code: with a key, only what was signed with that key is loaded."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.worlds import SCHEMA, draw_raw, make_dlrm, parse_all
from torchrec_kvshare.cache.keys import keyed_digest, read_key
from torchrec_kvshare.data.files import file_sha256
from torchrec_kvshare.errors import ArtifactError, ConfigError
from torchrec_kvshare.export import exporter
from torchrec_kvshare.export.artifact import (
    MANIFEST,
    SIGNATURE,
    add_measured,
    read_artifact,
    write_manifest,
)
from torchrec_kvshare.export.exporter import Artifact, export_model, load_artifact
from torchrec_kvshare.export.pt2 import GRAPHS, WEIGHTS, pt2_files
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Engine

KEY, OTHER_KEY = b"a secret of ours", b"a secret of theirs"
FILES = ["golden.json", "ids.npy", "model.pt", "schema.json"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    destination = tmp_path_factory.mktemp("export") / "artifact"
    export_model(RankingModel(make_dlrm(seed=8)).eval(), SCHEMA, destination, key=KEY)
    return destination


@pytest.fixture
def signed(exported: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(exported, tmp_path / "artifact"))


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if an artifact's code is loaded."""

    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("the program was loaded")

    monkeypatch.setattr(torch.jit, "load", fail)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", fail)


def scores_of(artifact: Artifact) -> list[list[float]]:
    engine = Engine(artifact.model, artifact.schema, None, version=artifact.manifest.version)
    return [answer.scores for answer in engine.rank(parse_all([draw_raw(9, 4, 1)]))]


def rewrite(folder: Path, **changed: Any) -> None:
    written = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(written | changed))


# -------------------------------------------------------------------------------------- with a key


def test_a_signed_artifact_scores_as_it_does_unchecked(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    loaded = load_artifact(exported, KEY)
    assert list(tmp_path.iterdir()) == []  # The private copy is gone.
    assert scores_of(loaded) == scores_of(load_artifact(exported))
    assert sorted(path.name for path in exported.iterdir()) == sorted([*FILES, MANIFEST, SIGNATURE])


@pytest.mark.usefixtures("nothing_runs")
def test_an_artifact_without_a_signature_is_refused(signed: Path) -> None:
    (signed / SIGNATURE).unlink()
    with pytest.raises(ArtifactError, match=r"is not signed: it has no manifest\.mac, and"):
        load_artifact(signed, KEY)
    with pytest.raises(ArtifactError, match="is not signed"):
        read_artifact(signed, KEY)


@pytest.mark.usefixtures("nothing_runs")
def test_an_artifact_of_another_key_is_refused(signed: Path) -> None:
    with pytest.raises(ArtifactError, match=r"manifest\.mac does not match manifest\.json"):
        load_artifact(signed, OTHER_KEY)
    write_manifest(signed, read_artifact(signed)[0], OTHER_KEY)
    with pytest.raises(ArtifactError, match=r"manifest\.mac does not match manifest\.json"):
        load_artifact(signed, KEY)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("content", [b"", b"\0", "é".encode(), b"00" * 32, b"00" * 2**20])
def test_a_signature_that_is_none_is_refused(signed: Path, content: bytes) -> None:
    (signed / SIGNATURE).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"manifest\.mac does not match manifest\.json"):
        load_artifact(signed, KEY)


@pytest.mark.usefixtures("nothing_runs")
def test_a_manifest_that_was_changed_is_refused_before_it_is_read(signed: Path) -> None:
    rewrite(signed, provenance={"licence": "any"})
    with pytest.raises(ArtifactError, match=r"manifest\.mac does not match manifest\.json"):
        load_artifact(signed, KEY)
    (signed / MANIFEST).write_text("[" * 10**6)
    with pytest.raises(ArtifactError, match=r"manifest\.mac does not match manifest\.json"):
        load_artifact(signed, KEY)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_changed_is_named_where_it_lies(signed: Path, name: str) -> None:
    content = bytearray((signed / name).read_bytes())
    content[len(content) // 2] ^= 1
    (signed / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{signed / name} has sha256 .*; its manifest says"):
        load_artifact(signed, KEY)
    (signed / name).unlink()
    with pytest.raises(ArtifactError, match=f"{signed} has no {name}, which its manifest names"):
        load_artifact(signed, KEY)


def test_what_is_changed_after_it_was_checked_is_not_what_is_loaded(
    signed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files were checked and then read again, so they could be changed in between."""
    expected = scores_of(load_artifact(signed, KEY))
    check_versions: Callable[..., None] = exporter._check_versions

    def change(*given: Any) -> None:
        check_versions(*given)
        for name in FILES:
            (signed / name).write_text("something else")

    monkeypatch.setattr(exporter, "_check_versions", change)
    assert scores_of(load_artifact(signed, KEY)) == expected


def test_measured_figures_are_signed_again(signed: Path) -> None:
    before = (signed / MANIFEST).read_bytes()
    with pytest.raises(ArtifactError, match="is signed: artifact_key_file is needed to add to it"):
        add_measured(signed, break_even_events={"disk": 9})
    with pytest.raises(ArtifactError, match=r"manifest\.mac does not match"):
        add_measured(signed, OTHER_KEY, break_even_events={"disk": 9})
    assert (signed / MANIFEST).read_bytes() == before
    add_measured(signed, KEY, break_even_events={"disk": 9})
    assert load_artifact(signed, KEY).manifest.break_even_events == {"disk": 9}


def test_a_key_of_one_purpose_signs_nothing_of_another(signed: Path) -> None:
    """Otherwise a signed packet could serve as a signed artifact."""
    manifest = (signed / MANIFEST).read_bytes()
    (signed / SIGNATURE).write_text(keyed_digest([manifest], KEY).hex())
    with pytest.raises(ArtifactError, match=r"manifest\.mac does not match"):
        load_artifact(signed, KEY)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\n", "which is empty"), (b"x" * 65, "the key is 65 bytes; 1 to 64 are allowed")],
)
def test_a_key_that_signs_nothing_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(ConfigError, match=f"artifact_key_file is .*{message}"):
        read_key(str(tmp_path / "key"), "artifact_key_file")


# ------------------------------------------------------------------- names, with a key and without


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "in/side", "", ".", "..", "in/"])
def test_a_manifest_that_names_a_file_elsewhere_is_refused(signed: Path, name: str) -> None:
    """A file that it named was read and digested, in any folder."""
    (signed / "in").mkdir()
    for path in (signed / ".." / "outside", signed / "in" / "side"):
        path.write_text("something")
    digests = read_artifact(signed)[0].sha256_by_file
    rewrite(signed, sha256_by_file=digests | {name: file_sha256(signed / "in" / "side")})
    with pytest.raises(ArtifactError, match=r"manifest\.json is broken: it names .*, which is no"):
        load_artifact(signed)


def with_graphs(folder: Path, graphs: Any) -> None:
    """Make an artifact's manifest and graphs.json those of compiled graphs."""
    cpu = torch.backends.cpu.get_cpu_capability()
    (folder / GRAPHS).write_text(json.dumps({"cpu": cpu, "graphs": graphs}))
    digests = read_artifact(folder)[0].sha256_by_file
    (folder / WEIGHTS).write_bytes(b"")
    sha256_by_file = digests | {name: file_sha256(folder / name) for name in (GRAPHS, WEIGHTS)}
    rewrite(folder, runtime="pt2", sha256_by_file=sha256_by_file)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("name", ["score.pt2", "../outside.pt2", "/outside.pt2", ".."])
def test_a_graph_that_the_manifest_does_not_name_is_refused(signed: Path, name: str) -> None:
    """Only graphs.json itself had a digest: any file that it named was loaded and run."""
    for path in (signed / "score.pt2", signed / ".." / "outside.pt2"):
        path.write_text("a library")
    with_graphs(signed, {"score": {"file": name, "inputs": []}})
    with pytest.raises(ArtifactError, match=rf"manifest\.json has no digest of {name}"):
        load_artifact(signed)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    "graphs",
    [
        None,
        [],
        {"score": None},
        {"score": {"inputs": []}},
        {"score": {"file": 7, "inputs": []}},
        {"score": {"file": "score.pt2", "inputs": [{}]}},
        {"score": {"file": "score.pt2", "inputs": [{"name": None}]}},
    ],
)
def test_graphs_that_are_described_in_another_way_are_named(signed: Path, graphs: Any) -> None:
    with_graphs(signed, graphs)
    with pytest.raises(ArtifactError, match=r"graphs\.json is broken"):
        load_artifact(signed)


def test_the_files_of_graphs_are_those_that_are_loaded(tmp_path: Path) -> None:
    graphs = {name: {"file": f"{name}.pt2", "inputs": []} for name in ("encode", "score")}
    (tmp_path / GRAPHS).write_text(json.dumps({"cpu": "AVX2", "graphs": graphs}))
    assert pt2_files(tmp_path) == [GRAPHS, WEIGHTS, "encode.pt2", "score.pt2"]

"""Secrets in files; the users of private folders test those."""

import os
import stat
from pathlib import Path

import pytest

from torchrec_kvshare.cache.private import make_secret, read_secret, write_secret
from torchrec_kvshare.errors import ConfigError


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def secret_in(folder: Path) -> bytes:
    return make_secret(folder / "key", "the key", "output")


def test_a_secret_is_made_once_and_is_this_user_s_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = secret_in(tmp_path)
    finally:
        os.umask(before)
    assert len(made) == 64
    assert mode_of(tmp_path / "key") == 0o600
    assert secret_in(tmp_path) == made
    assert [*tmp_path.iterdir()] == [tmp_path / "key"]
    (tmp_path / "key").unlink()
    assert secret_in(tmp_path) != made


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602])
def test_a_secret_that_others_can_read_or_write_is_refused(tmp_path: Path, mode: int) -> None:
    secret_in(tmp_path)
    (tmp_path / "key").chmod(mode)
    with pytest.raises(ConfigError, match=f"^{tmp_path}/key has mode {mode:04o}; the key is kept"):
        secret_in(tmp_path)


def test_a_secret_that_is_written_replaces_what_others_had_prepared(tmp_path: Path) -> None:
    """A prepared link is not followed, and a file that others can access is not reused."""
    theirs = tmp_path / "theirs"
    theirs.write_text("")
    (tmp_path / "key").symlink_to(theirs)
    write_secret(tmp_path / "key", b"secret")
    assert not (tmp_path / "key").is_symlink()
    assert mode_of(tmp_path / "key") == 0o600
    assert theirs.read_text() == ""


def test_a_secret_is_what_stands_before_the_newline(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b" s3cret \r\n")
    assert read_secret(str(tmp_path / "file"), "key") == b" s3cret "


def test_a_secret_that_cannot_be_read_or_is_empty_is_refused_by_name(tmp_path: Path) -> None:
    missing, empty = str(tmp_path / "missing"), str(tmp_path / "empty")
    with pytest.raises(ConfigError, match=f"key is '{missing}', which cannot be read"):
        read_secret(missing, "key")
    Path(empty).write_text("\n")
    with pytest.raises(ConfigError, match=f"key is '{empty}', which is empty"):
        read_secret(empty, "key")

"""Files and folders that only this user can access, and secrets in files.

Anyone who can write to a compiled library runs code here, and anyone who can write to K/V changes
scores. So a trusted folder must belong to this user, and no folder above it may let another user
replace it.
"""

import os
import secrets
import stat
import tempfile
from pathlib import Path

from torchrec_kvshare.errors import ConfigError

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
OTHERS = stat.S_IRWXG | stat.S_IRWXO
SECRET_BYTES = 32


def make_private(folder: Path, purpose: str, setting: str) -> Path:
    """Make a folder that only this user can write to, or check an existing one.

    Args:
        folder: made with its missing parents.
        purpose: of the folder, for errors.
        setting: that chooses another folder, for errors.

    Returns:
        The folder, symbolic links resolved.

    Raises:
        ConfigError: if it cannot be made, or other users can write to it or replace it.
    """
    try:
        folder = folder.resolve()
        missing = [one for one in (folder, *folder.parents) if not one.exists()]
        for parent in folder.parents:
            if parent not in missing:
                _check_parent(parent, purpose, setting)
        for one in reversed(missing):
            one.mkdir(mode=0o700, exist_ok=True)
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is not a folder")
    except OSError as error:
        raise ConfigError(f"{purpose} cannot be kept: {error}; set {setting}") from error
    check_private(folder, purpose, setting)
    return folder


def check_private(path: Path, purpose: str, setting: str) -> None:
    """Refuse a file or folder that another user owns or can write to.

    Args:
        path: not a symbolic link.
        purpose: of the file or folder, for errors.
        setting: that chooses another one, for errors.

    Raises:
        ConfigError: naming its owner or its mode.
    """
    status = path.lstat()
    if status.st_uid != os.geteuid():
        raise ConfigError(
            f"{path} belongs to user {status.st_uid}; {purpose} is kept in what belongs to user "
            f"{os.geteuid()} alone: remove it, or set {setting}"
        )
    if status.st_mode & OTHERS_WRITE:
        raise ConfigError(
            f"{path} has mode {stat.S_IMODE(status.st_mode):04o}; {purpose} is kept in what no "
            "other user can write to: remove it, or chmod go-w"
        )


def check_secret(path: Path, purpose: str, setting: str) -> None:
    """Refuse a file or folder that another user owns, can write to or can read.

    Args:
        path: not a symbolic link.
        purpose: of the file or folder, for errors.
        setting: that chooses another one, for errors.

    Raises:
        ConfigError: naming its owner or its mode.
    """
    check_private(path, purpose, setting)
    mode = stat.S_IMODE(path.lstat().st_mode)
    if mode & OTHERS:
        raise ConfigError(
            f"{path} has mode {mode:04o}; {purpose} is kept in what no other user can read: "
            "remove it, or chmod go="
        )


def make_secret(path: Path, purpose: str, setting: str) -> bytes:
    """Write a new random secret to a private file, or read the existing file.

    Args:
        path: of the file, in an existing folder.
        purpose: of the secret, for errors.
        setting: that chooses another file or folder, for errors.

    Raises:
        ConfigError: if another user can read or write the existing file.
    """
    if not path.exists():
        write_secret(path, secrets.token_hex(SECRET_BYTES).encode())
    check_secret(path, purpose, setting)
    return read_secret(str(path), purpose)


def write_secret(path: Path, content: bytes) -> None:
    """Write a file with mode 0600 atomically, replacing an existing one."""
    descriptor, name = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    os.replace(name, path)


def read_secret(path: str, setting: str) -> bytes:
    """Read a secret from a file, without the newline at its end.

    Args:
        path: of the file.
        setting: that gives the path, for errors.

    Raises:
        ConfigError: if the file cannot be read or is empty.
    """
    try:
        secret = Path(path).read_bytes().rstrip(b"\r\n")
    except OSError as error:
        raise ConfigError(f"{setting} is {path!r}, which cannot be read: {error}") from error
    if not secret:
        raise ConfigError(f"{setting} is {path!r}, which is empty")
    return secret


def _check_parent(folder: Path, purpose: str, setting: str) -> None:
    """Refuse a folder in which another user can replace a file or folder."""
    status = folder.stat()
    is_open = status.st_mode & OTHERS_WRITE and not status.st_mode & stat.S_ISVTX
    if is_open or status.st_uid not in (os.geteuid(), 0):
        raise ConfigError(
            f"{folder} belongs to user {status.st_uid} and has mode "
            f"{stat.S_IMODE(status.st_mode):04o}; {purpose} is kept below folders of user "
            f"{os.geteuid()} or of root that no other user can write to: set {setting}, or "
            "chmod go-w"
        )

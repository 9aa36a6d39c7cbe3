"""Signing keys in files, and keyed digests.

The key that verifies a signature also makes it, so its file must not be readable by anyone who can
write to the signed data.
"""

import hashlib
from collections.abc import Iterable

from torchrec_kvshare.cache.private import read_secret
from torchrec_kvshare.errors import ConfigError

DIGEST_BYTES = 32


def read_key(path: str | None, name: str) -> bytes | None:
    """Read a key from a file, without the newline at its end; return None for no file.

    Args:
        path: of the file.
        name: of the setting that gives the path, for errors.

    Raises:
        ConfigError: if the file cannot be read, is empty, or is too long for a key.
    """
    if path is None:
        return None
    key = read_secret(path, name)
    try:
        check_key(key)
    except ConfigError as error:
        raise ConfigError(f"{name} is {path!r}: {error}") from error
    return key


def check_key(key: bytes) -> None:
    """Refuse an empty key, with which BLAKE2b is unkeyed and anyone can forge, and a long one.

    Raises:
        ConfigError: if the key is empty or longer than 64 bytes.
    """
    if not 1 <= len(key) <= hashlib.blake2b.MAX_KEY_SIZE:
        raise ConfigError(
            f"the key is {len(key)} bytes; 1 to {hashlib.blake2b.MAX_KEY_SIZE} are allowed"
        )


def keyed_digest(parts: Iterable[bytes | memoryview], key: bytes, purpose: bytes = b"") -> bytes:
    """Return the keyed BLAKE2b digest of all parts, concatenated.

    Args:
        parts: what is signed.
        key: 1 to 64 secret bytes.
        purpose: at most 16 bytes; digests of different purposes never match.

    Returns:
        32 bytes.

    Raises:
        ConfigError: if the key is empty or too long.
    """
    check_key(key)
    digest = hashlib.blake2b(key=key, digest_size=DIGEST_BYTES, person=purpose)
    for part in parts:
        digest.update(part)
    return digest.digest()

"""Keys in files, and digests that need such a key.

Signing and checking take the same key: whoever can check can sign. Its file is kept from everybody
who may write to what is signed.
"""

import hashlib
from collections.abc import Iterable

from torchrec_kvshare.cache.private import read_secret
from torchrec_kvshare.errors import ConfigError

DIGEST_BYTES = 32


def read_key(path: str | None, name: str) -> bytes | None:
    """The key in a file, without the newline at its end; None for no file.

    Args:
        path: of the file.
        name: of the setting that names it, for errors.

    Raises:
        ConfigError: if it cannot be read, is empty, or is too long for a key.
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
    """Refuse a key that signs nothing: with an empty one BLAKE2b is what anyone can make.

    Raises:
        ConfigError: if it is empty or too long.
    """
    if not 1 <= len(key) <= hashlib.blake2b.MAX_KEY_SIZE:
        raise ConfigError(
            f"the key is {len(key)} bytes; 1 to {hashlib.blake2b.MAX_KEY_SIZE} are allowed"
        )


def keyed_digest(parts: Iterable[bytes | memoryview], key: bytes, purpose: bytes = b"") -> bytes:
    """BLAKE2b of all parts, one after the other, keyed.

    Args:
        parts: what is signed.
        key: 1 to 64 secret bytes.
        purpose: at most 16 bytes; digests of one purpose are of no use for another.

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

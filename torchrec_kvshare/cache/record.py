"""K/V records and the packets in which the lower tiers store them.

A packet has these parts, every number little-endian:

    b"KVSH"   format version   kind of trailer   length of header
    4 bytes   1 byte           1 byte            4 bytes
    header    JSON in UTF-8: user, identity, events, and [name, dtype, shape] of each tensor
    tensors   their bytes, back to back
    trailer   of all before it: CRC-32 (4 bytes), or with a key BLAKE2b keyed by it (32 bytes)

The CRC finds accidental changes. Only a key protects against others who can write to the store.
Header and tensors are read only after the trailer is verified, and nothing in a packet is executed,
unlike pickle.
"""

import hmac
import json
import math
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any
from urllib.parse import quote, unquote

import torch
from torch import Tensor

from torchrec_kvshare.cache.codecs import Codec, is_finite
from torchrec_kvshare.cache.identity import NO_CONTEXT, Content, Identity
from torchrec_kvshare.cache.keys import DIGEST_BYTES, keyed_digest
from torchrec_kvshare.errors import RecordError

MAGIC = b"KVSH"
FORMAT_VERSION = 2
FIXED = struct.Struct("<4sBBI")
CHECKSUM, MAC = 0, 1
TRAILER_BYTES = {CHECKSUM: 4, MAC: DIGEST_BYTES}
DTYPES = {
    str(dtype): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)
}

# 64 bits: among a million model versions the chance of a collision is 1 in 37 million, and a record
# that is found by one has its whole identity inside.
SCOPE_DIGITS = 16
_DIGEST = f"[0-9a-f]{{{SCOPE_DIGITS}}}"
_SCOPE = re.compile(
    rf"({_DIGEST})-({_DIGEST})\.({_DIGEST}|none)\.([\w%~-]*)\.([0-9]{{1,18}})\.(\w+)", re.ASCII
)


@dataclass(frozen=True, eq=False)
class KVRecord:
    """One history's K/V with its identity and events.

    Attributes:
        content: identity and events.
        encoded_at: Unix seconds when the oldest of the K/V was encoded.
        kv: [planes, R, H, D] float32; the encoder decides how many rows the events have.

    Raises:
        RecordError: if a number is out of range, or the number of digests is wrong.
    """

    content: Content
    encoded_at: float
    kv: Tensor

    def __post_init__(self) -> None:
        identity, blocks, _, first_event, first_time, num_events = self.content
        numbers = {
            "first_event": first_event,
            "first_time": first_time,
            "num_events": num_events,
            "encoded_at": self.encoded_at,
        }
        for name, number in numbers.items():
            if not 0 <= number < math.inf:
                raise RecordError(f"{name} is {number}; it must be finite and not below 0")
        num_blocks = num_events // identity.block
        if len(blocks) != num_blocks:
            raise RecordError(
                f"there are {len(blocks)} digests; {num_events} events in blocks of "
                f"{identity.block} have {num_blocks}"
            )


def shortened(identity: Identity) -> Identity:
    """Return the identity with each digest cut to 16 digits (64 bits), as in scopes."""
    model, tables, context = (digest[:SCOPE_DIGITS] for digest in identity[:3])
    return identity._replace(model=model, tables=tables, context=context)


def scope_of(identity: Identity, codec: str) -> str:
    """Return a part of a store's key with the whole identity, without colon, slash or space.

    All scopes of one version of K/V begin with ``<model>-<tables>.``.

    Example:
        >>> scope_of(Identity("5e" * 32, "0f" * 32, NO_CONTEXT, "clicks: a/b", 8), "int8")
        '5e5e5e5e5e5e5e5e-0f0f0f0f0f0f0f0f.none.clicks%3A%20a%2Fb.8.int8'
    """
    model, tables, context, tower, block = shortened(identity)
    escaped = quote(tower, safe="").replace(".", "%2E")
    scope = f"{model}-{tables}.{context or 'none'}.{escaped}.{block}.{codec}"
    assert _SCOPE.fullmatch(scope), f"{identity} has digests that are not hexadecimal, or too short"
    return scope


def parse_scope(text: str) -> tuple[Identity, str] | None:
    """Return shortened identity and codec name of a scope of ``scope_of``; None for other text.

    Example:
        >>> identity = Identity("5e" * 32, "0f" * 32, NO_CONTEXT, "clicks", 8)
        >>> parse_scope(scope_of(identity, "int8")) == (shortened(identity), "int8")
        True
    """
    match = _SCOPE.fullmatch(text)
    if match is None:
        return None
    model, tables, context, tower, block, codec = match.groups()
    context = NO_CONTEXT if context == "none" else context
    identity = Identity(
        model=model, tables=tables, context=context, tower=unquote(tower), block=int(block)
    )
    # A scope that is escaped or padded in another way is not ours.
    return (identity, codec) if scope_of(identity, codec) == text else None


def pack(record: KVRecord, user: str, codec: Codec, key: bytes | None) -> bytes:
    """Write a user's K/V as a packet.

    Args:
        record: K/V, contiguous or not.
        user: owner of the K/V.
        codec: codec of the K/V.
        key: 1 to 64 secret bytes that ``unpack`` needs too, or None for a checksum only.

    Raises:
        RecordError: if the codec cannot write this K/V.
        ShapeError: if it is not K/V in float32.
        ConfigError: if the key is empty or too long.
    """
    tensors = codec.encode(record.kv)
    content = record.content
    header = {
        "user": user,
        "identity": content.identity,
        "codec": codec.name,
        "digests": [digest.hex() for digest in content.blocks],
        "whole_digest": content.whole.hex(),
        "first_event": content.first_event,
        "first_time": content.first_time,
        "num_events": content.num_events,
        "encoded_at": record.encoded_at,
        "tensors": [
            [name, str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()
        ],
    }
    header_bytes = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    kind = CHECKSUM if key is None else MAC
    parts: list[bytes | memoryview] = [
        FIXED.pack(MAGIC, FORMAT_VERSION, kind, len(header_bytes)),
        header_bytes,
        *(tensor.reshape(-1).view(torch.uint8).numpy().data for tensor in tensors.values()),
    ]
    return b"".join([*parts, _trailer(parts, key)])


def unpack(
    data: bytes | memoryview, user: str, identity: Identity, codec: Codec, key: bytes | None
) -> KVRecord:
    """Read a packet that ``pack`` wrote for this user, identity, codec and key.

    Args:
        data: bytes from a store.
        user: expected owner of the K/V.
        identity: expected identity.
        codec: expected codec.
        key: key of the expected signature; None to expect a checksum.

    Returns:
        The record; its K/V shares no memory with ``data``.

    Raises:
        RecordError: if the packet is broken or not the expected one; the message says why.
        ConfigError: if the key is empty or too long.

    Example:
        >>> from torchrec_kvshare.cache.codecs import get_codec
        >>> identity = Identity("5e" * 32, "0f" * 32, NO_CONTEXT, "clicks", 8)
        >>> three = Content(identity, (), b"digest", first_event=0, first_time=0, num_events=3)
        >>> record = KVRecord(three, encoded_at=1.7e9, kv=torch.ones(2, 3, 1, 4))
        >>> packet = pack(record, "7", get_codec("int8"), key=None)
        >>> unpack(packet, "7", identity, get_codec("int8"), key=None).kv.shape
        torch.Size([2, 3, 1, 4])
    """
    header_bytes, payload = _verified(memoryview(data).cast("B"), key)
    try:
        header = json.loads(bytes(header_bytes))
        _check_ours(header, user, identity, codec)
        content = Content(
            identity,
            blocks=tuple(bytes.fromhex(digest) for digest in header["digests"]),
            whole=bytes.fromhex(header["whole_digest"]),
            first_event=index(header["first_event"]),
            first_time=index(header["first_time"]),
            num_events=index(header["num_events"]),
        )
        kv = codec.decode(_tensors_in(payload, header["tensors"]))
        if not is_finite(kv):
            raise RecordError("the K/V holds NaN or infinity, which no codec writes")
        return KVRecord(content, float(header["encoded_at"]), kv)
    except RecordError:
        raise
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise RecordError(f"the header does not read as a record's: {error!r}") from error


def _trailer(parts: Sequence[bytes | memoryview], key: bytes | None) -> bytes:
    if key is None:
        checksum = 0
        for part in parts:
            checksum = zlib.crc32(part, checksum)
        return checksum.to_bytes(TRAILER_BYTES[CHECKSUM], "little")
    return keyed_digest(parts, key)


def _verified(data: memoryview, key: bytes | None) -> tuple[memoryview, memoryview]:
    """Verify a packet's trailer; return its header and payload."""
    expected_kind = CHECKSUM if key is None else MAC
    least_bytes = FIXED.size + TRAILER_BYTES[expected_kind]
    if len(data) < least_bytes:
        raise RecordError(f"the packet is {len(data)} bytes; none has less than {least_bytes}")
    magic, version, kind, header_length = FIXED.unpack_from(data)
    if (magic, version) != (MAGIC, FORMAT_VERSION):
        raise RecordError(
            f"the packet is {magic!r} version {version}; {MAGIC!r} version {FORMAT_VERSION} is read"
        )
    if kind != expected_kind:
        needed = f"{CHECKSUM}, a checksum" if key is None else f"{MAC}, a MAC of the key"
        raise RecordError(f"the packet's trailer is of kind {kind}; it must be {needed}")
    end = len(data) - TRAILER_BYTES[kind]
    if not hmac.compare_digest(_trailer([data[:end]], key), data[end:]):
        raise RecordError("the packet's trailer does not fit its bytes: cut, changed or forged")
    payload_start = FIXED.size + header_length
    if payload_start > end:
        raise RecordError(f"the header is {header_length} bytes; {end - FIXED.size} are there")
    return data[FIXED.size : payload_start], data[payload_start:end]


def _check_ours(header: Any, user: str, identity: Identity, codec: Codec) -> None:
    ours = {"user": user, "codec": codec.name} | identity._asdict()
    stored = dict(zip(Identity._fields, header["identity"], strict=True))
    theirs = {"user": header["user"], "codec": header["codec"]} | stored
    for name, value in ours.items():
        if theirs[name] != value:
            raise RecordError(f"{name} of the record is {theirs[name]!r}; {value!r} was asked for")


def _tensors_in(
    payload: memoryview, tensors: list[tuple[str, str, list[int]]]
) -> dict[str, Tensor]:
    sizes = [math.prod(shape) * DTYPES[dtype_name].itemsize for _, dtype_name, shape in tensors]
    if min(sizes, default=0) < 0 or sum(sizes) != len(payload):
        raise RecordError(f"the tensors are of {sizes} bytes; {len(payload)} bytes are there")
    tensor_by_name = {}
    start = 0
    for (name, dtype_name, shape), num_bytes in zip(tensors, sizes, strict=True):
        dtype = DTYPES[dtype_name]
        # A copy, because a store's bytes may be read-only. torch.frombuffer refuses empty buffers.
        part = bytearray(payload[start : start + num_bytes])
        flat = torch.frombuffer(part, dtype=dtype) if part else torch.empty(0, dtype=dtype)
        tensor_by_name[name] = flat.view(shape)
        start += num_bytes
    return tensor_by_name

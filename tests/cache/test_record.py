"""A packet from a store is the K/V that was written, or an error that says why not."""

import hashlib
import json
import struct
import zlib
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.worlds import examples, new_interpreter
from torchrec_kvshare.cache.codecs import CODECS, Codec, get_codec
from torchrec_kvshare.cache.identity import NO_CONTEXT, Content, Identity
from torchrec_kvshare.cache.record import (
    FORMAT_VERSION,
    KVRecord,
    pack,
    parse_scope,
    scope_of,
    shortened,
    unpack,
)
from torchrec_kvshare.errors import ConfigError, RecordError

USER, KEY = "user 7: ü/\ud800", b"a secret of some bytes"  # JSON may have a lone surrogate.
IDENTITY = Identity("5e" * 32, "0f" * 32, "c1" * 16, tower="clicks", block=3)
FLOAT32, INT8 = get_codec("float32"), get_codec("int8")
FIXED_BYTES, CRC_BYTES, MAC_BYTES = 10, 4, 32

every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=lambda codec: codec.name)
every_key = pytest.mark.parametrize("key", [None, KEY], ids=["no key", "key"])


def make_record(num_rows: int = 7, identity: Identity = IDENTITY) -> KVRecord:
    digests = tuple(bytes([index]) * 16 for index in range(7 // identity.block))
    generator = torch.Generator().manual_seed(num_rows)
    kv = torch.randn(2, num_rows, 3, 5, generator=generator)
    return KVRecord(
        Content(
            identity, digests, b"\xaa" * 16, first_event=11, first_time=1_600_000_000, num_events=7
        ),
        1_700_000_000.25,
        kv,
    )


def repack(
    packet: bytes, header: Any, payload: bytes | None = None, key: bytes | None = None
) -> bytes:
    """The packet with another header or payload, and a valid trailer."""
    trailer_bytes = MAC_BYTES if packet[5] else CRC_BYTES
    (header_length,) = struct.unpack("<I", packet[6:FIXED_BYTES])
    if payload is None:
        payload = packet[FIXED_BYTES + header_length : -trailer_bytes]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    signed = (
        b"KVSH"
        + bytes([FORMAT_VERSION, key is not None])
        + struct.pack("<I", len(text))
        + text
        + payload
    )
    if key is None:
        return signed + struct.pack("<I", zlib.crc32(signed))
    return signed + hashlib.blake2b(signed, key=key, digest_size=MAC_BYTES).digest()


def header_of(packet: bytes) -> dict[str, Any]:
    (header_length,) = struct.unpack("<I", packet[6:FIXED_BYTES])
    return json.loads(packet[FIXED_BYTES : FIXED_BYTES + header_length])


def read(packet: bytes | memoryview, codec: Codec = INT8, key: bytes | None = None) -> KVRecord:
    return unpack(packet, USER, IDENTITY, codec=codec, key=key)


def packets_and_scopes() -> list[str]:
    record = make_record()
    keyed = [(codec, key) for codec in CODECS.values() for key in (None, KEY)]
    packets = [pack(record, USER, codec, key).hex() for codec, key in keyed]
    return packets + [scope_of(IDENTITY, name) for name in CODECS]


def assert_same(one: KVRecord, other: KVRecord) -> None:
    for field in fields(KVRecord):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(mine, Tensor):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)
        else:
            assert (mine, type(mine)) == (theirs, type(theirs))


@every_codec
@every_key
@pytest.mark.parametrize("num_rows", [0, 1, 7, 67])
def test_a_record_comes_back_as_its_codec_writes_it(
    codec: Codec, key: bytes | None, num_rows: int
) -> None:
    record = make_record(num_rows)
    expected = codec.decode(codec.encode(record.kv))
    packet = pack(record, USER, codec, key)
    assert_same(read(packet, codec, key), replace(record, kv=expected))
    assert_same(read(memoryview(packet), codec, key), replace(record, kv=expected))


def test_a_history_without_events_and_context_comes_back() -> None:
    identity = IDENTITY._replace(context=NO_CONTEXT, tower="", block=64)
    record = KVRecord(
        Content(identity, (), b"", first_event=0, first_time=0, num_events=0),
        0.0,
        torch.empty(2, 0, 3, 5),
    )
    packet = pack(record, "", FLOAT32, None)
    assert_same(unpack(packet, "", identity, codec=FLOAT32, key=None), record)


@every_key
def test_a_packet_is_laid_out_as_documented(key: bytes | None) -> None:
    record = make_record()
    packet = pack(record, USER, FLOAT32, key)
    assert packet[:6] == b"KVSH\x02" + bytes([key is not None])
    header = header_of(packet)
    assert header == {
        "user": USER,
        "identity": list(IDENTITY),
        "codec": "float32",
        "digests": ["00" * 16, "01" * 16],
        "whole_digest": "aa" * 16,
        "first_event": 11,
        "first_time": 1_600_000_000,
        "num_events": 7,
        "encoded_at": 1_700_000_000.25,
        "tensors": [["kv", "torch.float32", [2, 7, 3, 5]]],
    }
    assert record.kv.numpy().astype("<f4").tobytes() in packet
    # The tests' own trailer equals the package's.
    assert_same(read(repack(packet, header, key=key), FLOAT32, key), record)


@every_codec
def test_a_view_is_packed_as_its_copy(codec: Codec) -> None:
    record = make_record()
    pages = torch.zeros(2, 9, 3, 8)
    view = pages[:, 1:-1, :, ::2].transpose(2, 3)
    view.copy_(torch.randn(view.shape, generator=torch.Generator().manual_seed(1)))
    assert not view.is_contiguous()
    packet = pack(replace(record, kv=view), USER, codec, None)
    assert packet == pack(replace(record, kv=view.contiguous()), USER, codec, None)


@every_codec
def test_what_was_read_shares_no_memory_with_the_packet(codec: Codec) -> None:
    packet = bytearray(pack(make_record(), USER, codec, None))
    record = read(memoryview(packet), codec)
    before = record.kv.clone()
    packet[:] = b"\xff" * len(packet)
    assert torch.equal(record.kv, before)
    record.kv.add_(1.0)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_packet_of_what_is_not_finite_is_refused(number: float) -> None:
    """Another writer may have made it; its K/V was used for scoring."""
    packet = pack(make_record(), USER, FLOAT32, None)
    (header_length,) = struct.unpack("<I", packet[6:FIXED_BYTES])
    payload = bytearray(packet[FIXED_BYTES + header_length : -CRC_BYTES])
    payload[40:44] = struct.pack("<f", number)
    with pytest.raises(RecordError, match="NaN or infinity"):
        read(repack(packet, header_of(packet), bytes(payload)), FLOAT32)


@every_codec
def test_nan_is_packed_by_no_codec(codec: Codec) -> None:
    record = make_record()
    record.kv[0, 0, 0, 0] = float("nan")
    with pytest.raises(RecordError, match=codec.name):
        pack(record, USER, codec, None)


def test_another_process_writes_the_same_bytes() -> None:
    program = """
from tests.cache.test_record import packets_and_scopes
print(*packets_and_scopes())
"""
    output, errors = new_interpreter(program, PYTHONHASHSEED="5").communicate()
    assert output.split() == packets_and_scopes(), errors


@every_codec
@every_key
def test_a_packet_cut_at_any_byte_is_refused(codec: Codec, key: bytes | None) -> None:
    packet = pack(make_record(), USER, codec, key)
    for length in range(len(packet)):
        with pytest.raises(RecordError, match="packet"):
            read(packet[:length], codec, key)


@every_key
def test_a_packet_with_any_byte_changed_is_refused(key: bytes | None) -> None:
    packet = pack(make_record(), USER, INT8, key)
    for index in range(len(packet)):
        for flip in (0x01, 0x80, 0xFF):
            changed = bytearray(packet)
            changed[index] ^= flip
            with pytest.raises(RecordError, match="packet"):
                read(bytes(changed), key=key)


# Position in the packet as a share of it; number of bytes removed; bytes inserted.
edits = st.lists(
    st.tuples(st.floats(0.0, 1.0), st.integers(0, 40), st.binary(max_size=40)),
    min_size=1,
    max_size=3,
)


@every_key
@given(edits)
def test_edited_bytes_are_refused_or_are_the_record(
    key: bytes | None, edits: list[tuple[float, int, bytes]]
) -> None:
    packet = pack(make_record(), USER, INT8, key)
    edited = packet
    for share, num_gone, come in edits:
        index = int(share * len(edited))
        edited = edited[:index] + come + edited[index + num_gone :]
    if edited == packet:
        assert_same(read(edited, key=key), read(packet, key=key))
        return
    with pytest.raises(RecordError):
        read(edited, key=key)


@every_key
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(key: bytes | None, data: bytes) -> None:
    with pytest.raises(RecordError):
        read(data, key=key)
    with pytest.raises(RecordError):
        read(b"KVSH\x02" + bytes([key is not None]) + data, key=key)


@pytest.mark.parametrize(
    ("index", "byte", "message"),
    [
        (0, ord("X"), r"b'XVSH' version 2; b'KVSH' version 2 is read"),
        (4, 1, r"b'KVSH' version 1; b'KVSH' version 2 is read"),
        (5, 1, "trailer is of kind 1; it must be 0, a checksum"),
        (5, 9, "trailer is of kind 9; it must be 0, a checksum"),
        (40, 0, "trailer does not fit its bytes: cut, changed or forged"),
    ],
)
def test_what_is_wrong_with_the_bytes_is_named(index: int, byte: int, message: str) -> None:
    packet = bytearray(pack(make_record(), USER, INT8, None))
    packet[index] = byte
    with pytest.raises(RecordError, match=message):
        read(bytes(packet))


def test_a_length_of_header_beyond_the_packet_is_refused() -> None:
    signed = b"KVSH\x02\x00" + struct.pack("<I", 5) + b"{}  "
    with pytest.raises(RecordError, match="header is 5 bytes; 4 are there"):
        read(signed + struct.pack("<I", zlib.crc32(signed)))


def test_a_packet_without_mac_is_refused_where_there_is_a_key() -> None:
    with pytest.raises(RecordError, match="kind 0; it must be 1, a MAC of the key"):
        read(pack(make_record(), USER, INT8, None), key=KEY)


def test_a_packet_with_mac_is_refused_where_there_is_no_key() -> None:
    with pytest.raises(RecordError, match="kind 1; it must be 0, a checksum"):
        read(pack(make_record(), USER, INT8, KEY), key=None)


def test_a_packet_of_another_key_is_refused() -> None:
    with pytest.raises(RecordError, match="trailer does not fit"):
        read(pack(make_record(), USER, INT8, KEY), key=KEY + b"!")


@pytest.mark.parametrize("key", [b"", b"k" * 65], ids=["empty", "long"])
def test_an_empty_or_long_key_is_refused(key: bytes) -> None:
    """With an empty key BLAKE2b is unkeyed: anyone could sign."""
    with pytest.raises(ConfigError, match=f"the key is {len(key)} bytes; 1 to 64 are allowed"):
        pack(make_record(), USER, INT8, key)
    with pytest.raises(ConfigError, match=f"the key is {len(key)} bytes"):
        read(pack(make_record(), USER, INT8, KEY), key=key)


def test_without_a_key_a_writer_to_the_store_can_forge() -> None:
    """The module's docstring says so; this test makes it explicit."""
    packet = pack(make_record(), USER, FLOAT32, None)
    zeros = bytes(make_record().kv.nbytes)
    assert (read(repack(packet, header_of(packet), zeros), FLOAT32).kv == 0.0).all()


@pytest.mark.parametrize("forgers_key", [None, b"another secret"])
def test_with_a_key_a_writer_to_the_store_cannot_forge(forgers_key: bytes | None) -> None:
    packet = pack(make_record(), USER, FLOAT32, KEY)
    zeros = bytes(make_record().kv.nbytes)
    forged = repack(packet, header_of(packet), zeros, forgers_key)
    old_mac = forged[: -MAC_BYTES if forgers_key else -CRC_BYTES] + packet[-MAC_BYTES:]
    for attempt in (forged, old_mac):
        with pytest.raises(RecordError):
            read(attempt, FLOAT32, KEY)


@every_key
def test_another_users_record_is_refused(key: bytes | None) -> None:
    packet = pack(make_record(), "user 8", INT8, key)
    with pytest.raises(
        RecordError, match=r"user of the record is 'user 8'; 'user 7.*was asked for"
    ):
        read(packet, key=key)


@every_key
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "5e" * 31 + "5f"),
        ("tables", "0f" * 31 + "0e"),
        ("context", NO_CONTEXT),
        ("tower", "clicks "),
        ("block", 2),
    ],
)
def test_a_record_of_another_identity_is_refused(key: bytes | None, field: str, value: Any) -> None:
    """Also if only digits differ that are not in the scope."""
    other = IDENTITY._replace(**{field: value})
    packet = pack(make_record(identity=other), USER, INT8, key)
    with pytest.raises(RecordError, match=f"{field} of the record is {value!r}; "):
        read(packet, key=key)


@every_codec
def test_a_record_of_another_codec_is_refused(codec: Codec) -> None:
    packet = pack(make_record(), USER, codec, None)
    for other in CODECS.values():
        if other != codec:
            with pytest.raises(RecordError, match=f"is '{codec.name}'; '{other.name}' was"):
                read(packet, other)


CODES, SCALES = ["codes", "torch.int8", [2, 7, 3, 5]], ["scales", "torch.float32", [2, 1, 3, 3]]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("first_event", -1, "first_event is -1"),
        ("first_time", -1, "first_time is -1"),
        ("num_events", -1, "num_events is -1"),
        ("num_events", 9, "2 digests; 9 events in blocks of 3 have 3"),
        ("num_events", 5, "2 digests; 5 events in blocks of 3 have 1"),
        ("num_events", 7.0, "does not read"),
        ("digests", [], "0 digests; 7 events"),
        ("digests", ["00", "no hex"], "does not read"),
        ("digests", [1, 2], "does not read"),
        ("whole_digest", None, "does not read"),
        ("encoded_at", -0.5, "encoded_at is -0.5"),
        ("encoded_at", float("nan"), "encoded_at is nan"),
        ("encoded_at", float("inf"), "encoded_at is inf"),
        ("encoded_at", 10**400, "does not read"),
        ("identity", [], "does not read"),
        ("identity", {}, "does not read"),
        ("tensors", [], "0 bytes|bytes are there"),
        ("tensors", [CODES], r"\[210\] bytes; 282 bytes are there"),
        ("tensors", [SCALES, CODES, CODES], r"\[72, 210, 210\] bytes"),
        ("tensors", [["codes", "torch.int8", [2, 7, 3, 6]], SCALES], r"\[252, 72\] bytes"),
        ("tensors", [["codes", "torch.int8", [282]]], "tensors are"),
        ("tensors", [["kv", "torch.int8", [2, 7, 3, 5]], SCALES], "tensors are"),
        ("tensors", [["codes", "torch.uint8", [2, 7, 3, 5]], SCALES], "does not read"),
        ("tensors", [["codes", "load", [2, 7, 3, 5]], SCALES], "does not read"),
        ("tensors", [["codes", "torch.int8", [210]], SCALES], "4 axes"),
        ("tensors", [["codes", "torch.int8", [7, 2, 3, 5]], SCALES], "scales are"),
        ("tensors", [CODES, ["scales", "torch.float32", [1, 2, 3, 3]]], "scales are"),
        ("tensors", [CODES, ["scales", "torch.float32", [2, 1, -3, -3]]], "does not read"),
        ("tensors", [CODES, SCALES, ["more", "torch.int8", [-1, 3]]], "bytes are there"),
        (
            "tensors",
            [CODES, SCALES, ["more", "torch.int8", [0, 2**62, 2**62]]],
            "does not read|more",
        ),
        ("tensors", [["codes", "torch.int8", [2, 7, 3, 5.0]], SCALES], "does not read"),
        ("tensors", [["codes", "torch.int8", "2735"], SCALES], "does not read"),
        ("tensors", None, "does not read"),
    ],
)
def test_a_header_that_lies_is_refused(field: str, value: Any, message: str) -> None:
    packet = pack(make_record(), USER, INT8, None)
    forged = repack(packet, header_of(packet) | {field: value})
    with pytest.raises(RecordError, match=message):
        read(forged)


@pytest.mark.parametrize("field", sorted(header_of(pack(make_record(), USER, INT8, None))))
def test_a_header_without_a_field_is_refused(field: str) -> None:
    packet = pack(make_record(), USER, INT8, None)
    header = header_of(packet)
    del header[field]
    with pytest.raises(RecordError, match=f"does not read as a record's: KeyError.'{field}'"):
        read(repack(packet, header))


@pytest.mark.parametrize(
    "header", [b"", b"{", b"[]", b"3", b"null", b"\xff", b"[" * 10**5, b"9" * 10**4]
)
def test_a_header_that_is_no_object_is_refused(header: bytes) -> None:
    with pytest.raises(RecordError, match="does not read"):
        read(repack(pack(make_record(), USER, INT8, None), header))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=9,
)
tensor_lists = st.lists(
    st.tuples(
        st.sampled_from(["codes", "scales", "kv"]),
        st.sampled_from(["torch.int8", "torch.float32", "torch.float8_e4m3fn"]),
        st.lists(st.sampled_from([-1, 0, 1, 2, 3, 5, 7, 2**40, 2**63]), max_size=5),
    ),
    max_size=3,
)


@given(
    st.sampled_from(sorted(header_of(pack(make_record(), USER, INT8, None)))),
    json_values | tensor_lists,
    st.sampled_from([b"", bytes(2), bytes(18), None]),
)
def test_no_header_makes_another_error_than_ours(
    field: str, value: Any, payload: bytes | None
) -> None:
    packet = pack(make_record(), USER, INT8, None)
    forged = repack(packet, header_of(packet) | {field: value}, payload)
    try:
        record = read(forged)
    except RecordError:
        return
    assert record.content.identity == IDENTITY
    assert len(record.content.blocks) == record.content.num_events // IDENTITY.block


def test_a_record_whose_digests_do_not_fit_its_events_cannot_be_made() -> None:
    record = make_record()
    with pytest.raises(RecordError, match="2 digests; 4 events in blocks of 3 have 1"):
        replace(record, content=record.content._replace(num_events=4))


hexadecimal = st.text("0123456789abcdef", min_size=32, max_size=64)
identities = st.builds(
    Identity,
    hexadecimal,
    hexadecimal,
    st.just(NO_CONTEXT) | hexadecimal,
    st.text() | st.text(".:/*%- _~none8é", max_size=9),
    st.integers(1, 10**6),
)


@given(identities, st.sampled_from(list(CODECS)))
def test_a_scope_is_read_as_it_was_written(identity: Identity, codec: str) -> None:
    scope = scope_of(identity, codec)
    assert parse_scope(scope) == (shortened(identity), codec)
    assert scope.isascii()
    assert scope.isprintable()
    assert not set(scope) & set(":/* \\?[]{}")
    assert scope.startswith(f"{identity.model[:16]}-{identity.tables[:16]}.")


@given(identities, identities)
def test_two_identities_have_two_scopes(one: Identity, other: Identity) -> None:
    same = shortened(one) == shortened(other)
    assert (scope_of(one, "int8") == scope_of(other, "int8")) == same


def test_a_scope_keeps_sixteen_digits_of_a_digest() -> None:
    identity = Identity("a" * 64, "b" * 64, "c" * 32, tower="likes", block=8)
    assert shortened(identity) == ("a" * 16, "b" * 16, "c" * 16, "likes", 8)
    assert shortened(shortened(identity)) == shortened(identity)
    assert shortened(identity._replace(context=NO_CONTEXT)).context == NO_CONTEXT


SCOPE = scope_of(IDENTITY, "int8")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "none",
        SCOPE.upper(),
        SCOPE + "\n",
        SCOPE + ".int8",
        SCOPE[1:],
        SCOPE.replace(".3.", ".03."),
        SCOPE.replace(".3.", ".-3."),
        SCOPE.replace(".3.", ".٣."),
        SCOPE.replace(".3.", f".{'9' * 5000}."),
        SCOPE.replace("clicks", "%63licks"),
        SCOPE.replace("clicks", "%2e"),
        SCOPE.replace("clicks", "%FF"),
        SCOPE.replace("clicks", "%"),
        SCOPE.replace("clicks", "cl.cks"),
        SCOPE.replace("clicks", "cl:cks"),
        SCOPE.replace("c1" * 8, ""),
        SCOPE.replace("c1" * 8, "nine"),
    ],
)
def test_text_that_is_no_scope_is_none(text: str) -> None:
    assert parse_scope(SCOPE) is not None
    assert parse_scope(text) is None


@examples(0.5)
@given(st.text() | st.from_regex(r"[0-9a-f]{16}-[0-9a-f]{16}\.none\.[!-~]{0,6}\.[0-9]+\.int8"))
def test_what_is_read_as_a_scope_is_written_as_it_was(text: str) -> None:
    parsed = parse_scope(text)
    assert parsed is None or scope_of(*parsed) == text


@pytest.mark.parametrize("digest", ["5e5e", "x" * 64, "5E" * 32])
def test_a_digest_that_is_none_is_a_bug_of_ours(digest: str) -> None:
    with pytest.raises(AssertionError, match="not hexadecimal, or too short"):
        scope_of(IDENTITY._replace(tables=digest), "int8")

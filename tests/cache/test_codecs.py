"""Codecs decode within their stated error, and blocks are as small as stated."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.worlds import examples
from torchrec_kvshare.cache.codecs import CHANNELS, CODECS, ROW_BLOCK, Codec, get_codec
from torchrec_kvshare.errors import ConfigError, RecordError, ShapeError

NUM_PLANES, NUM_HEADS, HEAD_DIM = 2, 3, 5  # The last block of channels is incomplete.
CASTS = [CODECS[name] for name in ("float32", "bfloat16", "float16")]
SCALED = [CODECS[name] for name in ("int8", "fp8_e4m3")]
FLOAT32_MAX = torch.finfo(torch.float32).max

every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=lambda codec: codec.name)
scaled_codecs = pytest.mark.parametrize("codec", SCALED, ids=lambda codec: codec.name)

seeds = st.integers(0, 2**32 - 1)
# Row counts around block boundaries.
row_counts = st.sampled_from([1, 7, ROW_BLOCK - 1, ROW_BLOCK, ROW_BLOCK + 1, 2 * ROW_BLOCK + 9])
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def draw_kv(num_rows: int, seed: int, head_dim: int = HEAD_DIM) -> Tensor:
    """K/V whose channels are of very different size, up to a few thousand."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(NUM_PLANES, num_rows, NUM_HEADS, head_dim, generator=generator)
    return rows * torch.randn(head_dim, generator=generator).mul(3.0).clamp_max(6.0).exp()


def through(codec: Codec, kv: Tensor) -> Tensor:
    return codec.decode(codec.encode(kv))


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def assert_within_stated_error(codec: Codec, kv: Tensor) -> None:
    """Block by block, in float64."""
    decoded = through(codec, kv)
    assert decoded.shape == kv.shape
    assert decoded.dtype == torch.float32
    errors, sizes = (decoded.double() - kv.double()).abs(), kv.double().abs()
    if codec in SCALED:
        for row in range(0, kv.size(1), ROW_BLOCK):
            for channel in range(0, kv.size(3), CHANNELS):
                block = sizes[:, row : row + ROW_BLOCK, :, channel : channel + CHANNELS]
                block[:] = block.amax((1, 3), keepdim=True)
    allowed = (sizes * codec.relative_error).clamp_min(codec.absolute_error)
    assert (errors <= allowed).all()


@every_codec
@given(row_counts, seeds)
def test_decoded_kv_is_within_the_stated_error(codec: Codec, num_rows: int, seed: int) -> None:
    assert_within_stated_error(codec, draw_kv(num_rows, seed))


@every_codec
@given(st.lists(finite, min_size=1, max_size=12), st.integers(1, 3))
def test_any_number_is_within_the_stated_error_or_refused(
    codec: Codec, numbers: list[float], head_dim: int
) -> None:
    """Subnormal numbers too, and those near the largest."""
    kv = torch.tensor(numbers * head_dim).view(1, len(numbers), 1, head_dim)
    try:
        assert_within_stated_error(codec, kv)
    except RecordError:
        assert kv.abs().max() > (65504 if codec.name == "float16" else 0.99 * FLOAT32_MAX)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("bfloat16", [1.0 + 2.0**-8]),
        ("float16", [1.0 + 2.0**-11]),
        ("int8", [127.0, 40.5]),
        ("fp8_e4m3", [448.0, 272.0]),
    ],
)
def test_the_stated_error_is_reached(name: str, numbers: list[float]) -> None:
    codec = get_codec(name)
    kv = torch.tensor(numbers).view(1, -1, 1, 1)
    error = (through(codec, kv) - kv).abs().max().item()
    assert 0.99 * codec.relative_error * numbers[0] < error


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=6))
def test_float32_keeps_every_bit(bits: list[int]) -> None:
    bits += [0x7F7FFFFF, 1, -0x7FFFFFFF, -0x80000000]  # the largest, the smallest, -0.
    numbers = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    kv = numbers[numbers.isfinite()].view(1, -1, 1, 1)
    assert same_bits(through(get_codec("float32"), kv), kv)


@every_codec
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("index", [(0, 0, 0, 0), (1, 66, 2, 4)])
def test_what_is_not_finite_is_refused(
    codec: Codec, number: float, index: tuple[int, int, int, int]
) -> None:
    """The float32 codec wrote NaN, and the next request read it from the tier."""
    kv = draw_kv(67, 1)
    kv[index] = number
    with pytest.raises(ValueError, match=rf"size (nan|inf); {codec.name} writes finite"):
        codec.encode(kv)


@pytest.mark.parametrize(
    ("name", "greatest", "too_great"),
    [("float16", 65519.0, 65520.0), ("bfloat16", 3.39e38, 3.4e38)],
)
def test_what_a_cast_would_make_infinite_is_refused(
    name: str, greatest: float, too_great: float
) -> None:
    codec = get_codec(name)
    assert through(codec, torch.full((1, 1, 1, 1), -greatest)).isfinite().all()
    with pytest.raises(RecordError, match=name):
        codec.encode(torch.full((1, 1, 1, 1), -too_great))


@every_codec
@given(row_counts, seeds)
def test_what_was_decoded_is_written_as_it_was(codec: Codec, num_rows: int, seed: int) -> None:
    first = codec.encode(draw_kv(num_rows, seed))
    again = codec.encode(codec.decode(first))
    for name, tensor in first.items():
        if name == "scales":  # A scale is a quotient, so its last bit may change; codes may not.
            torch.testing.assert_close(again[name], tensor, rtol=2**-22, atol=0.0)
        else:
            assert torch.equal(again[name].float(), tensor.float())


@pytest.mark.parametrize("codec", CASTS, ids=lambda codec: codec.name)
@given(seeds)
def test_a_cast_changes_nothing_the_second_time(codec: Codec, seed: int) -> None:
    once = through(codec, draw_kv(7, seed))
    assert same_bits(through(codec, once), once)


@every_codec
def test_zeros_are_zeros_beside_anything(codec: Codec) -> None:
    kv = draw_kv(2 * ROW_BLOCK, 3)
    kv[0, :ROW_BLOCK] = 0.0
    kv[1, :, 2] = 0.0
    decoded = through(codec, kv)
    assert (decoded[kv == 0.0] == 0.0).all()
    assert (decoded[kv != 0.0].abs() > 0.0).any()


@every_codec
def test_an_empty_history_stays_empty(codec: Codec) -> None:
    kv = torch.empty(NUM_PLANES, 0, NUM_HEADS, HEAD_DIM)
    assert sum(tensor.nbytes for tensor in codec.encode(kv).values()) == 0
    assert through(codec, kv).shape == kv.shape


@scaled_codecs
def test_a_block_of_rows_or_more_is_at_most_27_percent_of_float32(codec: Codec) -> None:
    for num_rows in range(ROW_BLOCK, 2 * ROW_BLOCK + 2):
        kv = torch.zeros(2, num_rows, 4, 16)
        assert sum(tensor.nbytes for tensor in codec.encode(kv).values()) <= 0.27 * kv.nbytes


@scaled_codecs
@given(st.integers(0, 2 * ROW_BLOCK), st.integers(0, 20), seeds)
def test_rows_behind_change_no_whole_block(
    codec: Codec, num_rows: int, num_more: int, seed: int
) -> None:
    kv = draw_kv(num_rows + num_more, seed)
    before, after = codec.encode(kv[:, :num_rows]), codec.encode(kv)
    num_blocks = num_rows // ROW_BLOCK
    kept = num_blocks * ROW_BLOCK
    assert torch.equal(before["scales"][:, :num_blocks], after["scales"][:, :num_blocks])
    assert torch.equal(before["codes"][:, :kept].float(), after["codes"][:, :kept].float())


@scaled_codecs
def test_one_loud_number_blurs_its_own_block_only(codec: Codec) -> None:
    kv = draw_kv(ROW_BLOCK + 3, 5)
    before = through(codec, kv)
    kv[1, ROW_BLOCK + 2, 2, 3] = 1e6
    moved = through(codec, kv) != before
    assert moved[1, ROW_BLOCK:, 2, 2:4].any()
    moved[1, ROW_BLOCK:, 2, 2:4] = False
    assert not moved.any()


@every_codec
@examples(0.2)
@given(row_counts, seeds)
def test_a_view_is_written_as_its_copy(codec: Codec, num_rows: int, seed: int) -> None:
    view = draw_kv(num_rows + 2, seed)[:, 1:-1].transpose(2, 3)
    assert not view.is_contiguous()
    for name, tensor in codec.encode(view.contiguous()).items():
        assert torch.equal(codec.encode(view)[name].float(), tensor.float())


@every_codec
@pytest.mark.parametrize(
    "kv",
    [torch.ones(2, 3, 4, 5, dtype=torch.float64), torch.ones(3, 4, 5), torch.ones(1, 2, 3, 4, 5)],
)
def test_only_kv_in_float32_is_written(codec: Codec, kv: Tensor) -> None:
    with pytest.raises(ShapeError, match=r"codecs write torch.float32 \[planes, R, H, D\]"):
        codec.encode(kv)


@every_codec
def test_tensors_of_another_codec_are_refused(codec: Codec) -> None:
    for other in CODECS.values():
        if other != codec:
            with pytest.raises(RecordError, match=codec.name):
                codec.decode(other.encode(draw_kv(7, 6)))


@every_codec
def test_missing_and_flat_tensors_are_refused(codec: Codec) -> None:
    tensors = codec.encode(draw_kv(7, 6))
    for name, tensor in tensors.items():
        with pytest.raises(RecordError, match="tensors are"):
            codec.decode({other: tensors[other] for other in tensors if other != name})
        with pytest.raises(RecordError, match="have 4 axes"):
            codec.decode(tensors | {name: tensor.flatten()})
    with pytest.raises(RecordError, match="'more': 'torch"):
        codec.decode(tensors | {"more": torch.zeros(1, 1, 1, 1)})


@scaled_codecs
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 2, 3, 3), (2, 1, 3, 5), (2, 0, 3, 3)])
def test_scales_that_do_not_fit_the_codes_are_refused(codec: Codec, shape: tuple[int, ...]) -> None:
    tensors = codec.encode(draw_kv(7, 6))
    with pytest.raises(RecordError, match=r"codes \[2, 7, 3, 5\] have \[2, 1, 3, 3\]"):
        codec.decode(tensors | {"scales": torch.ones(shape)})


def test_an_unknown_codec_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"codec is 'int4'; one of \('float32', 'bfloat16'"):
        get_codec("int4")


def test_codecs_are_found_by_their_names() -> None:
    assert [get_codec(name).name for name in CODECS] == list(CODECS)

"""How K/V [planes, R, H, D] is written in fewer bytes; R rows, the oldest events first.

Casts keep every number by itself. Scaled codecs divide each block of ``ROW_BLOCK`` rows and
``CHANNELS`` channels of a head by one float32, so that its greatest number is the greatest that the
codes have: blocks are small because channels of keys differ in size far more than rows do.

NaN never becomes a number: codecs refuse K/V that they cannot write, and that is not finite.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrec_kvshare.errors import ConfigError, RecordError, ShapeError

ROW_BLOCK = 64  # rows
# Two, because with one a block of 64 rows and one of a single row are 28 % of float32.
CHANNELS = 2

# Below it float32 has fewer bits, so scales stop there.
LEAST_SCALE = torch.finfo(torch.float32).tiny
# A scale, a quotient and a product are rounded, each by at most 2**-24 of what it is.
ROUNDING = 2.0**-22


@dataclass(frozen=True)
class CastCodec:
    """Every number is rounded to the nearest one of another float type.

    Attributes:
        name: as configs and records have it.
        dtype: of the numbers written.
    """

    name: str
    dtype: torch.dtype

    @property
    def is_exact(self) -> bool:
        """Whether ``decode`` gives back every bit."""
        return self.dtype == torch.float32

    @property
    def relative_error(self) -> float:
        """Greatest error, as a share of the value: half of the step between 1 and the next."""
        return 0.0 if self.is_exact else torch.finfo(self.dtype).eps / 2

    @property
    def absolute_error(self) -> float:
        """Greatest error of values so small that theirs is more: half of the least step."""
        return self.relative_error * torch.finfo(self.dtype).tiny

    def bytes_per_row(self, num_planes: int, num_heads: int, head_dim: int) -> float:
        """Bytes of one row."""
        return num_planes * num_heads * head_dim * self.dtype.itemsize

    def encode(self, kv: Tensor) -> dict[str, Tensor]:
        """Write K/V [planes, R, H, D] float32 as ``kv``; shares its memory where nothing changes.

        Raises:
            RecordError: if it is not finite or out of range.
            ShapeError: if it is not K/V in float32.
        """
        _check(kv)
        cast = kv.to(self.dtype)
        if not is_finite(cast):
            raise RecordError(_unfit(self.name, kv, torch.finfo(self.dtype).max))
        return {"kv": cast}

    def decode(self, tensors: dict[str, Tensor]) -> Tensor:
        """Read K/V [planes, R, H, D] float32; shares memory where nothing changes.

        Raises:
            RecordError: if the tensors are not what ``encode`` makes.
        """
        _check_tensors(self.name, tensors, {"kv": self.dtype})
        return tensors["kv"].float()


@dataclass(frozen=True)
class ScaledCodec:
    """Every number is rounded to a code of one byte, times the scale of its block.

    Attributes:
        name: as configs and records have it.
        dtype: of the codes.
        greatest: the greatest code; the least is its negative.
        half_step: half of the widest step between two codes.

    Example:
        >>> tensors = get_codec("int8").encode(torch.tensor([0.5, -1.27]).view(1, 1, 1, 2))
        >>> tensors["codes"].flatten(), tensors["scales"].flatten()
        (tensor([  50, -127], dtype=torch.int8), tensor([0.0100]))
    """

    name: str
    dtype: torch.dtype
    greatest: float
    half_step: float
    is_exact: ClassVar[bool] = False

    @property
    def relative_error(self) -> float:
        """Greatest error, as a share of the greatest |kv| of the block."""
        return self.half_step / self.greatest + ROUNDING

    @property
    def absolute_error(self) -> float:
        """Greatest error of blocks so small that theirs is more: those of the least scale."""
        return self.half_step * LEAST_SCALE

    def bytes_per_row(self, num_planes: int, num_heads: int, head_dim: int) -> float:
        """Bytes of one row with its share of the scales, where its block of rows is whole."""
        scale_bytes = math.ceil(head_dim / CHANNELS) * 4 / ROW_BLOCK
        return num_planes * num_heads * (head_dim * self.dtype.itemsize + scale_bytes)

    def encode(self, kv: Tensor) -> dict[str, Tensor]:
        """Write K/V [planes, R, H, D] float32 as ``codes`` and ``scales``.

        Returns:
            Codes, laid out as ``kv``, and scales [planes, blocks of rows, H, blocks of channels];
            the last block of either may be a part of one.

        Raises:
            RecordError: if the K/V is not finite or out of range.
            ShapeError: if it is not K/V in float32.
        """
        _check(kv)
        _, num_row_blocks, _, num_channel_blocks = _scales_shape(kv.shape)
        padding = (0, -kv.size(3) % CHANNELS, 0, 0, 0, -kv.size(1) % ROW_BLOCK)
        blocks = F.pad(kv.abs(), padding).unflatten(1, (num_row_blocks, ROW_BLOCK))
        channels = blocks.amax(2).unflatten(3, (num_channel_blocks, CHANNELS))
        scales = (channels.amax(4) / self.greatest).clamp_min(LEAST_SCALE)
        # Of NaN the greatest is NaN; the product is what the greatest number will be read as.
        if not (scales * self.greatest).isfinite().all():
            raise RecordError(_unfit(self.name, kv, torch.finfo(torch.float32).max))
        codes = kv / _spread(scales, kv.shape)
        if not self.dtype.is_floating_point:
            codes.round_()
        return {"codes": codes.to(self.dtype), "scales": scales}

    def decode(self, tensors: dict[str, Tensor]) -> Tensor:
        """Read K/V [planes, R, H, D] float32.

        Raises:
            RecordError: if the tensors are not what ``encode`` makes.
        """
        _check_tensors(self.name, tensors, {"codes": self.dtype, "scales": torch.float32})
        codes, scales = tensors["codes"], tensors["scales"]
        if scales.shape != _scales_shape(codes.shape):
            raise RecordError(
                f"scales are {list(scales.shape)}; {self.name} codes {list(codes.shape)} have "
                f"{list(_scales_shape(codes.shape))}"
            )
        return codes.float() * _spread(scales, codes.shape)


Codec = CastCodec | ScaledCodec

CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        CastCodec("float32", torch.float32),
        CastCodec("bfloat16", torch.bfloat16),
        CastCodec("float16", torch.float16),
        ScaledCodec("int8", torch.int8, greatest=127.0, half_step=0.5),
        # Three bits behind the point: from 256 to 448 codes lie 32 apart.
        ScaledCodec("fp8_e4m3", torch.float8_e4m3fn, greatest=448.0, half_step=16.0),
    )
}


def get_codec(name: str) -> Codec:
    """The codec of a name.

    Raises:
        ConfigError: if there is none.

    Example:
        >>> get_codec("bfloat16").bytes_per_row(num_planes=4, num_heads=2, head_dim=8)
        128
    """
    if name not in CODECS:
        raise ConfigError(f"codec is {name!r}; one of {tuple(CODECS)} is allowed")
    return CODECS[name]


def is_finite(kv: Tensor) -> bool:
    """Whether no number is NaN or infinite: the sum is not, where one of them is.

    Example:
        >>> is_finite(torch.tensor([1.0, 3e38, 3e38])), is_finite(torch.tensor([1.0, torch.nan]))
        (True, False)
    """
    return bool(kv.sum().isfinite()) or bool(kv.isfinite().all())


def _scales_shape(shape: torch.Size) -> torch.Size:
    num_planes, num_rows, num_heads, head_dim = shape
    num_row_blocks = math.ceil(num_rows / ROW_BLOCK)
    return torch.Size((num_planes, num_row_blocks, num_heads, math.ceil(head_dim / CHANNELS)))


def _spread(scales: Tensor, shape: torch.Size) -> Tensor:
    """For each number of K/V of this shape the scale of its block."""
    by_channel = scales.repeat_interleave(CHANNELS, 3)[..., : shape[3]]
    # The one block of a short history is no longer than the history.
    by_row = by_channel.unsqueeze(2).expand(-1, -1, min(ROW_BLOCK, shape[1]), -1, -1)
    return by_row.flatten(1, 2)[:, : shape[1]]  # [planes, R, H, D]


def _check(kv: Tensor) -> None:
    if kv.dtype != torch.float32 or kv.dim() != 4:
        raise ShapeError(
            f"K/V is {kv.dtype} {list(kv.shape)}; codecs write torch.float32 [planes, R, H, D]"
        )


def _check_tensors(name: str, tensors: dict[str, Tensor], dtypes: dict[str, torch.dtype]) -> None:
    if {key: tensor.dtype for key, tensor in tensors.items()} != dtypes:
        came = {key: str(tensor.dtype) for key, tensor in tensors.items()}
        raise RecordError(f"tensors are {came}; {name} has {dtypes}")
    if any(tensor.dim() != 4 for tensor in tensors.values()):
        shapes = {key: list(tensor.shape) for key, tensor in tensors.items()}
        raise RecordError(f"tensors are {shapes}; all of {name} have 4 axes")


def _unfit(name: str, kv: Tensor, greatest: float) -> str:
    worst = kv.abs().max().item()
    return f"K/V has a number of size {worst:g}; {name} writes finite ones up to {greatest:g}"

"""Codecs that write K/V [planes, R, H, D] in fewer bytes; R rows, the oldest events first.

Cast codecs round each number by itself. Scaled codecs divide each block of ``ROW_BLOCK`` rows and
``CHANNELS`` channels of a head by one float32 scale, so that the largest number of the block gets
the largest code. Blocks are small because channels of keys differ in size far more than rows do.

NaN never becomes a number: codecs refuse K/V that is out of their range or not finite.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrec_kvshare.errors import ConfigError, RecordError, ShapeError

ROW_BLOCK = 64  # rows
# Two channels: with one, a block of 64 rows and one of a single row take 28 % of float32's bytes.
CHANNELS = 2

# Smaller float32 numbers have fewer bits of precision, so scales stop here.
MIN_SCALE = torch.finfo(torch.float32).tiny
# Scale, quotient and product are rounded, each by at most 2**-24 of its value.
ROUNDING = 2.0**-22


@dataclass(frozen=True)
class CastCodec:
    """Round each number to the nearest one of another float type.

    Attributes:
        name: the name in configs and records.
        dtype: of the numbers written.
    """

    name: str
    dtype: torch.dtype

    @property
    def is_exact(self) -> bool:
        """Whether ``decode`` restores every bit."""
        return self.dtype == torch.float32

    @property
    def relative_error(self) -> float:
        """Maximum error as a share of the value: half the step from 1 to the next number."""
        return 0.0 if self.is_exact else torch.finfo(self.dtype).eps / 2

    @property
    def absolute_error(self) -> float:
        """Maximum error of subnormal values, whose relative error is larger: half their step."""
        return self.relative_error * torch.finfo(self.dtype).tiny

    def encode(self, kv: Tensor) -> dict[str, Tensor]:
        """Write K/V [planes, R, H, D] float32 as ``kv``; without a copy if the dtype is the same.

        Raises:
            RecordError: if the K/V is not finite or out of range.
            ShapeError: if it is not K/V in float32.
        """
        _check(kv)
        cast = kv.to(self.dtype)
        if not is_finite(cast):
            raise RecordError(_unfit(self.name, kv, torch.finfo(self.dtype).max))
        return {"kv": cast}

    def decode(self, tensors: dict[str, Tensor]) -> Tensor:
        """Read K/V [planes, R, H, D] float32; without a copy if the dtype is the same.

        Raises:
            RecordError: if the tensors are not such as ``encode`` returns.
        """
        _check_tensors(self.name, tensors, {"kv": self.dtype})
        return tensors["kv"].float()


@dataclass(frozen=True)
class ScaledCodec:
    """Round each number to a one-byte code times the scale of its block.

    Attributes:
        name: the name in configs and records.
        dtype: of the codes.
        max_code: the largest code; the smallest is its negative.
        half_step: half the widest step between two codes.

    Example:
        >>> tensors = get_codec("int8").encode(torch.tensor([0.5, -1.27]).view(1, 1, 1, 2))
        >>> tensors["codes"].flatten(), tensors["scales"].flatten()
        (tensor([  50, -127], dtype=torch.int8), tensor([0.0100]))
    """

    name: str
    dtype: torch.dtype
    max_code: float
    half_step: float
    is_exact: ClassVar[bool] = False

    @property
    def relative_error(self) -> float:
        """Maximum error as a share of the largest |kv| of the block."""
        return self.half_step / self.max_code + ROUNDING

    @property
    def absolute_error(self) -> float:
        """Maximum error of blocks that have the smallest scale: their relative error is larger."""
        return self.half_step * MIN_SCALE

    def encode(self, kv: Tensor) -> dict[str, Tensor]:
        """Write K/V [planes, R, H, D] float32 as ``codes`` and ``scales``.

        Returns:
            Codes, laid out as ``kv``, and scales [planes, blocks of rows, H, blocks of channels];
            the last block of rows or channels may be incomplete.

        Raises:
            RecordError: if the K/V is not finite or out of range.
            ShapeError: if it is not K/V in float32.
        """
        _check(kv)
        _, num_row_blocks, _, num_channel_blocks = _scales_shape(kv.shape)
        padding = (0, -kv.size(3) % CHANNELS, 0, 0, 0, -kv.size(1) % ROW_BLOCK)
        blocks = F.pad(kv.abs(), padding).unflatten(1, (num_row_blocks, ROW_BLOCK))
        channels = blocks.amax(2).unflatten(3, (num_channel_blocks, CHANNELS))
        scales = (channels.amax(4) / self.max_code).clamp_min(MIN_SCALE)
        # amax propagates NaN; the product is the value that the largest number decodes to.
        if not (scales * self.max_code).isfinite().all():
            raise RecordError(_unfit(self.name, kv, torch.finfo(torch.float32).max))
        codes = kv / _spread(scales, kv.shape)
        if not self.dtype.is_floating_point:
            codes.round_()
        return {"codes": codes.to(self.dtype), "scales": scales}

    def decode(self, tensors: dict[str, Tensor]) -> Tensor:
        """Read K/V [planes, R, H, D] float32.

        Raises:
            RecordError: if the tensors are not such as ``encode`` returns.
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
        ScaledCodec("int8", torch.int8, max_code=127.0, half_step=0.5),
        # Three mantissa bits: from 256 to 448 codes are 32 apart.
        ScaledCodec("fp8_e4m3", torch.float8_e4m3fn, max_code=448.0, half_step=16.0),
    )
}


def get_codec(name: str) -> Codec:
    """Return the codec with a name.

    Raises:
        ConfigError: if there is none.

    Example:
        >>> get_codec("bfloat16").is_exact
        False
    """
    if name not in CODECS:
        raise ConfigError(f"codec is {name!r}; one of {tuple(CODECS)} is allowed")
    return CODECS[name]


def is_finite(kv: Tensor) -> bool:
    """Return whether no number is NaN or infinite; a finite sum proves it without another pass.

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
    """Expand scales to the shape of the K/V: each number gets the scale of its block."""
    by_channel = scales.repeat_interleave(CHANNELS, 3)[..., : shape[3]]
    # The only block of a short history has as many rows as the history.
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


def _unfit(name: str, kv: Tensor, max_value: float) -> str:
    worst = kv.abs().max().item()
    return f"K/V has a number of size {worst:g}; {name} writes finite ones up to {max_value:g}"

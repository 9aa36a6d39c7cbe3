"""Refuse a model with weights that are not finite: one NaN in a table costs a user its scores.

Of quantised tables the scales, biases and float16 rows are checked: float16 overflows at 65504.
"""

from collections.abc import Iterator

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import (
    IntNBitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn

from torchrec_kvshare.errors import ArtifactError

SCALES_AND_BIASES = 2  # fbgemm's mode of returning rows, scales and biases separately


def check_weights(model: nn.Module) -> None:
    """Refuse weights, tables and buffers that are not finite.

    Raises:
        ArtifactError: naming the first such tensor and the count of its bad numbers.
    """
    for name, numbers in _numbers(model):
        num_wrong = int((~numbers.isfinite()).sum())
        if num_wrong > 0:
            raise ArtifactError(
                f"{name} holds {num_wrong} numbers that are not finite, of {numbers.numel()}; a "
                "model is exported with finite weights only"
            )


def _numbers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's floating-point tensors by name."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            yield name, tensor.detach()
    for module in model.modules():
        if isinstance(module, IntNBitTableBatchedEmbeddingBagsCodegen):
            yield from _quantised_numbers(module)


def _quantised_numbers(
    tables: IntNBitTableBatchedEmbeddingBagsCodegen,
) -> Iterator[tuple[str, Tensor]]:
    parts = tables.split_embedding_weights_with_scale_bias(SCALES_AND_BIASES)
    for spec, (rows, scale, bias) in zip(tables.embedding_specs, parts, strict=True):
        table, dtype = spec[0], spec[3]
        if dtype == SparseType.FP16:
            yield f"table {table}", rows.contiguous().view(torch.float16)
        if scale is not None and bias is not None:
            yield f"scales of table {table}", scale
            yield f"biases of table {table}", bias

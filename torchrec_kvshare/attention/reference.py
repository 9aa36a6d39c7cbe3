"""What the attention means, in float64 loops: no masks, no batches, nothing of the fast path.

Imported by tests only.
"""

import math

import torch
from torch import Tensor


def reference_attention(
    query: Tensor, keys: list[Tensor], values: list[Tensor], biases: list[Tensor]
) -> Tensor:
    """One row attends to a list of rows, head by head, key by key.

    Args:
        query: [H, D].
        keys: one [H, D] for each row that may be seen.
        values: likewise.
        biases: one [H] for each row, added to its scores.

    Returns:
        [H, D] float64; zeros where there is nothing to see.

    Source:
        Scaled dot-product attention, Vaswani et al. 2017, eq. 1 (arXiv:1706.03762).
    """
    num_heads, head_dim = query.shape
    attended = torch.zeros(num_heads, head_dim, dtype=torch.float64)
    for head in range(num_heads):
        scores = [
            float((query[head].double() * key[head].double()).sum()) / math.sqrt(head_dim)
            + float(bias[head])
            for key, bias in zip(keys, biases, strict=True)
        ]
        highest = max(scores, default=0.0)
        weights = [math.exp(score - highest) for score in scores]
        for weight, value in zip(weights, values, strict=True):
            attended[head] += weight / sum(weights) * value[head].double()
    return attended

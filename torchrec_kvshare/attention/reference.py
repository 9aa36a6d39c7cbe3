"""What the attention means, in float64 loops: no masks, no batches, nothing of the fast path.

Imported by tests only.
"""

import math

import torch
from torch import Tensor


def reference_attention(
    query: Tensor, keys: list[Tensor], values: list[Tensor], biases: list[Tensor]
) -> Tensor:
    """One row attends to a list of rows by softmax, head by head, key by key.

    Args:
        query: [H, D].
        keys: one [H, D] for each row that may be seen.
        values: likewise.
        biases: one [H] for each row, added to its scores.

    Returns:
        [H, D] float64; zeros where there is nothing to see.

    Source:
        Scaled dot-product attention, Vaswani et al. 2017, eq. 1 (arXiv:1706.03762).

    Example:
        >>> like, unlike, no_bias = torch.ones(1, 2), -torch.ones(1, 2), torch.zeros(1)
        >>> keys = values = [like, unlike]
        >>> reference_attention(100 * like, keys, values, [no_bias, no_bias])
        tensor([[1., 1.]], dtype=torch.float64)
    """
    attended = torch.zeros(query.shape, dtype=torch.float64)
    for head in range(len(query)):
        scores = _scores(query, keys, biases, head)
        highest = max(scores, default=0.0)
        weights = [math.exp(score - highest) for score in scores]
        for weight, value in zip(weights, values, strict=True):
            attended[head] += weight / sum(weights) * value[head].double()
    return attended


def reference_silu_attention(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    biases: list[Tensor],
    fixed_scale: float,
) -> Tensor:
    """One row sums a list of rows, each by the SiLU of its score: the weights need not add to 1.

    Args:
        query: [H, D].
        keys: one [H, D] for each row that may be seen.
        values: likewise.
        biases: one [H] for each row, added to its scores before the SiLU.
        fixed_scale: multiplies every weight, however many rows are seen.

    Returns:
        [H, D] float64; zeros where there is nothing to see.

    Source:
        Pointwise aggregated attention, HSTU, Zhai et al. 2024, eq. 2 (arXiv:2402.17152).

    Example:
        >>> query, key, no_bias = torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(1)
        >>> reference_silu_attention(query, [key], [key], [no_bias], 1.0)  # a score of 0 weighs 0
        tensor([[0., 0.]], dtype=torch.float64)
    """
    attended = torch.zeros(query.shape, dtype=torch.float64)
    for head in range(len(query)):
        scores = _scores(query, keys, biases, head)
        for score, value in zip(scores, values, strict=True):
            attended[head] += reference_silu(score) * fixed_scale * value[head].double()
    return attended


def reference_silu(value: float) -> float:
    """The value times its logistic function.

    Args:
        value: any finite number.

    Returns:
        The product, between -0.28 and ``value`` or zero.

    Source:
        Elfwing et al. 2017 (arXiv:1702.03118).

    Example:
        >>> reference_silu(0.0)
        0.0
    """
    if value < 0.0:  # exp of a large number overflows, of a small one does not
        return value * math.exp(value) / (1.0 + math.exp(value))
    return value / (1.0 + math.exp(-value))


def _scores(query: Tensor, keys: list[Tensor], biases: list[Tensor], head: int) -> list[float]:
    """One head's score of every key: the scaled product and the key's bias."""
    return [
        float((query[head].double() * key[head].double()).sum()) / math.sqrt(query.shape[1])
        + float(bias[head])
        for key, bias in zip(keys, biases, strict=True)
    ]

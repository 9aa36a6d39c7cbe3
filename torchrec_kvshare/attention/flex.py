"""FlexAttention over the histories of all users at once, for devices whose kernel it compiles to.

Users' K/V lies side by side, and a block mask lets a candidate see its own user's rows; blocks of
other users are not computed. On a CPU it runs without compilation: slow, but the same function.
"""

import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention


def flex_over_history(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    biases: list[Tensor],
    candidate_spans: list[tuple[int, int]],
    event_spans: list[tuple[int, int]],
) -> tuple[Tensor, Tensor]:
    """What candidates see of their users' histories; arguments as ``shared_attention``'s.

    Args:
        queries: [C, M, H, D].
        keys: [R, H, D].
        values: [R, H, D].
        biases: per user [H, 1, L].
        candidate_spans: B spans that cover the candidates in order.
        event_spans: B spans of K/V rows.

    Returns:
        Rows [C, M, H, D] and their log-sum-exp [C, M, H], at least float32; zeros and ``-inf``
        where there is nothing to see.
    """
    num_candidates, num_tokens = queries.shape[:2]
    exact = torch.promote_types(queries.dtype, torch.float32)
    lengths = [last - first for first, last in event_spans]
    if num_candidates == 0 or sum(lengths) == 0:
        return torch.zeros_like(queries), queries.new_full(
            queries.shape[:3], -torch.inf, dtype=exact
        )
    device = queries.device
    users = torch.arange(len(event_spans), device=device)
    counts = [(last - first) * num_tokens for first, last in candidate_spans]
    token_user = users.repeat_interleave(torch.tensor(counts, device=device))
    event_user = users.repeat_interleave(torch.tensor(lengths, device=device))
    if any(bias.size(1) != 1 for bias in biases):
        raise ValueError("body flex takes one bias row for all candidates of a user")
    bias = torch.cat([bias.squeeze(1) for bias in biases], dim=1).to(queries.dtype)  # [H, T]

    def own_user(_batch: Tensor, _head: Tensor, token: Tensor, event: Tensor) -> Tensor:
        return token_user[token] == event_user[event]

    def biased(
        score: Tensor, _batch: Tensor, head: Tensor, _token: Tensor, event: Tensor
    ) -> Tensor:
        return score + bias[head, event]

    mask = create_block_mask(own_user, None, None, len(token_user), len(event_user), device.type)
    rows, aux = _flex_attention(device.type)(
        queries.flatten(0, 1).transpose(0, 1).unsqueeze(0),
        _side_by_side(keys, event_spans),
        _side_by_side(values, event_spans),
        score_mod=biased,
        block_mask=mask,
        return_aux=AuxRequest(lse=True),
    )
    by_token = rows.squeeze(0).transpose(0, 1).unflatten(0, (-1, num_tokens))
    return by_token, aux.lse.squeeze(0).transpose(0, 1).unflatten(0, (-1, num_tokens)).to(exact)


def _side_by_side(rows: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """Users' rows as [1, H, T, D]: a view for one user, else one copy for all candidates."""
    parts = [rows[first:last] for first, last in spans]
    together = parts[0] if len(parts) == 1 else torch.cat(parts)
    return together.transpose(0, 1).unsqueeze(0)


@lru_cache
def _flex_attention(device: str) -> Any:
    return _uncompiled if device == "cpu" else torch.compile(flex_attention, dynamic=True)


def _uncompiled(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    with warnings.catch_warnings():
        # On a CPU the compiled form has no log-sum-exp; that this one is slow is known.
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return flex_attention(query, key, value, **options)

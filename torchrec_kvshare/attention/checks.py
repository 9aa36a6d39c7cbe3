"""Argument checks of the plain backend; the C++ backend makes the same ones with the same messages.

The values of offsets, page ids and the like are checked on a CPU only: elsewhere reading them would
wait for the device.
"""

import itertools

import torch
from torch import Tensor


def check_history(
    queries: Tensor,
    query_offsets: Tensor,
    keys: Tensor,
    values: Tensor,
    key_offsets: Tensor,
    cached_keys: Tensor,
    cached_values: Tensor,
    page_ids: Tensor,
    page_offsets: Tensor,
    cached_offsets: Tensor,
    window: int,
    num_globals: int,
    scoring: str,
) -> None:
    """Check that the arguments of ``operators.history_attention`` fit each other.

    Raises:
        ValueError: naming the argument.
    """
    _check_window(window)
    if num_globals < 0:
        raise ValueError(f"num_globals is {num_globals}; it takes at least 0")
    _check_queries(queries, 3)
    _check_heads("keys", keys, 3, queries)
    _check_alike("values", values, "keys", keys)
    _check_heads("cached_keys", cached_keys, 4, queries)
    _check_alike("cached_values", cached_values, "cached_keys", cached_keys)
    num_users = query_offsets.numel() - 1
    _check_offsets("query_offsets", query_offsets, num_users, queries.size(0))
    _check_offsets("key_offsets", key_offsets, num_users, keys.size(0))
    _check_offsets("page_offsets", page_offsets, num_users)
    _check_offsets("cached_offsets", cached_offsets, num_users)
    _check_pages(cached_keys, page_ids, page_offsets, cached_offsets)
    if queries.is_cpu:
        lengths = zip(query_offsets.diff().tolist(), key_offsets.diff().tolist(), strict=True)
        for user, (num_queries, num_new) in enumerate(lengths):
            if num_queries > num_new:
                raise ValueError(
                    f"key_offsets gives user {user} {num_new} keys; its queries are {num_queries}, "
                    "those of its last"
                )
    _check_scoring(scoring)


def check_candidates(
    queries: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    candidate_offsets: Tensor,
    keys: Tensor,
    values: Tensor,
    page_ids: Tensor,
    page_offsets: Tensor,
    row_offsets: Tensor,
    row_times: Tensor,
    candidate_times: Tensor,
    visible_rows: Tensor,
    time_bias: Tensor,
    place_bias: Tensor,
    window: int,
    scoring: str,
) -> None:
    """Check that the arguments of ``operators.candidate_attention`` fit each other.

    Raises:
        ValueError: naming the argument.
    """
    _check_window(window)
    _check_queries(queries, 4)
    _check_alike("own_keys", own_keys, "queries", queries)
    _check_alike("own_values", own_values, "queries", queries)
    _check_heads("keys", keys, 4, queries)
    _check_alike("values", values, "keys", keys)
    num_users, num_candidates = candidate_offsets.numel() - 1, queries.size(0)
    _check_offsets("candidate_offsets", candidate_offsets, num_users, num_candidates)
    _check_offsets("page_offsets", page_offsets, num_users)
    _check_offsets("row_offsets", row_offsets, num_users)
    _check_pages(keys, page_ids, page_offsets, row_offsets)
    _check_numbers("visible_rows", visible_rows, num_candidates)
    _check_numbers("row_times", row_times, int(row_offsets[-1]) if queries.is_cpu else None)
    _check_numbers("candidate_times", candidate_times, num_candidates)
    for name, table in (("time_bias", time_bias), ("place_bias", place_bias)):
        _check_tensor(name, table, queries.dtype, 2)
        if table.size(1) != queries.size(2):
            raise ValueError(f"{name} is {[*table.shape]}; queries is {[*queries.shape]}")
    if time_bias.size(0) == 0:
        raise ValueError("time_bias has no buckets")
    if queries.is_cpu:
        num_rows = row_offsets.diff().repeat_interleave(candidate_offsets.diff())
        for visible, count in zip(visible_rows.tolist(), num_rows.tolist(), strict=False):
            if not 0 <= visible <= count:
                raise ValueError(f"visible_rows has {visible}; its user has {count} rows")
    _check_scoring(scoring)


def check_rows_linear(rows: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Check that the arguments of ``operators.rows_linear`` fit each other.

    Raises:
        ValueError: naming the argument.
    """
    _check_tensor("rows", rows, rows.dtype, 3)
    _check_tensor("weight", weight, rows.dtype, 3)
    _check_tensor("bias", bias, rows.dtype, 1)
    if (weight.size(0), weight.size(2)) != (rows.size(0), rows.size(2)):
        raise ValueError(f"weight is {[*weight.shape]}; rows is {[*rows.shape]}")
    if bias.size(0) != weight.size(1):
        raise ValueError(f"bias is {[*bias.shape]}; weight is {[*weight.shape]}")


def _check_window(window: int) -> None:
    if window < 0:
        raise ValueError(f"window is {window}; it takes a number of rows, or 0 for all")


def _check_scoring(scoring: str) -> None:
    if scoring not in ("softmax", "silu"):
        raise ValueError(f"scoring is {scoring}; softmax and silu exist")


def _check_queries(queries: Tensor, num_dimensions: int) -> None:
    if not queries.is_floating_point():
        raise ValueError(f"queries is {_name_of(queries.dtype)}; it takes a float")
    _check_tensor("queries", queries, queries.dtype, num_dimensions)


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, num_dimensions: int) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"{name} is {_name_of(tensor.dtype)}; it takes {_name_of(dtype)}")
    if tensor.dim() != num_dimensions:
        raise ValueError(f"{name} is {[*tensor.shape]}; it takes {num_dimensions} dimensions")


def _check_alike(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    _check_tensor(name, tensor, other.dtype, other.dim())
    if tensor.shape != other.shape:
        raise ValueError(f"{name} is {[*tensor.shape]}; {other_name} is {[*other.shape]}")


def _check_heads(name: str, tensor: Tensor, num_dimensions: int, queries: Tensor) -> None:
    _check_tensor(name, tensor, queries.dtype, num_dimensions)
    if tensor.shape[-2:] != queries.shape[-2:]:
        raise ValueError(f"{name} is {[*tensor.shape]}; queries is {[*queries.shape]}")


def _check_offsets(name: str, offsets: Tensor, num_users: int, num_rows: int | None = None) -> None:
    """Check offsets [B + 1]: from 0, never falling, to at most ``num_rows`` if that is given."""
    _check_tensor(name, offsets, torch.int64, 1)
    if offsets.numel() == 0:
        raise ValueError(f"{name} has 0 offsets; no users have 1")
    if offsets.numel() != num_users + 1:
        raise ValueError(
            f"{name} has {offsets.numel()} offsets; {num_users} users have {num_users + 1}"
        )
    if not offsets.is_cpu:
        return
    ends: list[int] = offsets.tolist()
    if ends[0] != 0:
        raise ValueError(f"{name} starts at {ends[0]}; it starts at 0")
    for first, last in itertools.pairwise(ends):
        if first > last:
            raise ValueError(f"{name} goes from {first} to {last}; it never falls")
    if num_rows is not None and ends[-1] > num_rows:
        raise ValueError(f"{name} ends at {ends[-1]}; there are {num_rows} rows")


def _check_numbers(name: str, numbers: Tensor, count: int | None) -> None:
    _check_tensor(name, numbers, torch.int64, 1)
    if count is not None and numbers.numel() < count:
        raise ValueError(f"{name} has {numbers.numel()} numbers; {count} are needed")


def _check_pages(
    pages: Tensor, page_ids: Tensor, page_offsets: Tensor, row_offsets: Tensor
) -> None:
    """Check that each user has enough pages for its rows and that each page is in the table."""
    _check_numbers("page_ids", page_ids, int(page_offsets[-1]) if pages.is_cpu else None)
    if not pages.is_cpu:
        return
    num_pages, page_size = pages.shape[:2]
    for page in page_ids[: int(page_offsets[-1])].tolist():
        if not 0 <= page < num_pages:
            raise ValueError(f"page_ids has {page}; there are {num_pages} pages")
    lengths = zip(page_offsets.diff().tolist(), row_offsets.diff().tolist(), strict=True)
    for user, (given, num_rows) in enumerate(lengths):
        if given * page_size < num_rows:
            raise ValueError(
                f"page_offsets gives user {user} {given} pages of {page_size} rows; its rows are "
                f"{num_rows}"
            )


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

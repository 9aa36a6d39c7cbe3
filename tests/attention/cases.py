"""Arguments for tests of the attention operators: drawn, in any layout, empty, huge and invalid.

Arguments have the operators' names. The file imports only torch and the reference, so that a
process under a sanitizer can run all of it on its own library. Tensors end where their memory ends,
so that a read of one number too many is out of bounds. Unused rows of a page are NaN, so that
reading one shows.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from torchrec_kvshare.attention.reference import (
    reference_candidate_attention,
    reference_history_attention,
)

Arguments = dict[str, Any]

HISTORY, CANDIDATES = "history_attention", "candidate_attention"
OPERATORS = (HISTORY, CANDIDATES)
SCORINGS = ("softmax", "silu")
# Head widths below, at and between what a register holds.
HEAD_DIMS = (1, 4, 5, 16, 20, 33)
# Arguments that have gradients, in the order of the backward operators' results.
TRAINED = {
    HISTORY: ("queries", "keys", "values"),
    CANDIDATES: (
        *("queries", "own_keys", "own_values", "keys", "values", "time_bias", "place_bias"),
    ),
}
REFERENCES: dict[str, Callable[..., Tensor]] = {
    HISTORY: reference_history_attention,
    CANDIDATES: reference_candidate_attention,
}
# Largest error allowed, relative to ``error_scale``. Worst of 1,000 draws of each operator with up
# to 9 rows a user, and of 200 with up to 150, on a CPU with AVX512 and torch 2.13: against the
# reference, or the plain backend in float64, 4.5e-7 (SiLU, which sums what softmax averages) and
# 2.3e-16; gradients of float32 against those of float64 9.3e-6 (a table, over 60,000 scores).
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-15}
GRADIENT_TOLERANCE = 4e-5


def offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def normal(pick: random.Random, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(pick.getrandbits(32)))


# Drawn users.


def draw_pages(
    pick: random.Random, num_rows: Sequence[int], num_heads: int, head_dim: int
) -> Arguments:
    """Draw keys, values, page ids and offsets; some users read another user's pages."""
    page_size = pick.choice([1, 2, 3, 7, 64])
    needed = [-(-rows // page_size) + pick.choice([0, 0, 1]) for rows in num_rows]
    spare = pick.randint(0, 2)
    ids = list(range(sum(needed) + spare))
    pick.shuffle(ids)
    ids_by_user: list[list[int]] = []
    for user, pages in enumerate(needed):
        own = [ids.pop() for _ in range(pages)]
        if user > 0 and pick.random() < 0.3:
            own = (ids_by_user[user - 1] + own)[:pages]
        ids_by_user.append(own)
    shape = (sum(needed) + spare, page_size, num_heads, head_dim)
    keys, values = normal(pick, *shape), normal(pick, *shape)
    is_read = torch.zeros(shape[:2], dtype=torch.bool)
    for own, rows in zip(ids_by_user, num_rows, strict=True):
        for row in range(rows):
            is_read[own[row // page_size], row % page_size] = True
    keys[~is_read], values[~is_read] = torch.nan, torch.nan
    return {
        "keys": keys,
        "values": values,
        "page_ids": torch.tensor([one for own in ids_by_user for one in own], dtype=torch.int64),
        "page_offsets": offsets(needed),
        "row_offsets": offsets(num_rows),
    }


def draw_length(pick: random.Random, max_rows: int) -> int:
    """Draw a number of rows, often 0, often near the end of a block or a task."""
    edges = [0, 1, max_rows, *(n for n in (7, 8, 9, 63, 64, 65, 127, 128, 129) if n <= max_rows)]
    return pick.choice(edges) if pick.random() < 0.5 else pick.randint(0, max_rows)


def draw_window(pick: random.Random, max_rows: int) -> int:
    return pick.choice([0, 0, 1, 2, max_rows, 63, 64, 65, pick.randint(1, max_rows + 1)])


def draw_sharpness(pick: random.Random) -> float:
    """Draw a factor for queries: at 1e4 one row gets all the weight."""
    return pick.choice([1.0, 1.0, 1.0, 30.0, 1e4])


def draw_history(pick: random.Random, most_rows: int, most_users: int = 4) -> Arguments:
    """Draw users with cached rows, new rows, and queries of the last new rows."""
    num_heads, head_dim = pick.randint(1, 3), pick.choice(HEAD_DIMS)
    num_users = pick.randint(0, most_users)
    num_cached = [draw_length(pick, most_rows) for _ in range(num_users)]
    num_new = [draw_length(pick, most_rows) for _ in range(num_users)]
    num_queries = [pick.choice([new, pick.randint(0, new)]) for new in num_new]
    pages = draw_pages(pick, num_cached, num_heads, head_dim)
    return {
        "queries": draw_sharpness(pick) * normal(pick, sum(num_queries), num_heads, head_dim),
        "query_offsets": offsets(num_queries),
        "keys": normal(pick, sum(num_new), num_heads, head_dim),
        "values": normal(pick, sum(num_new), num_heads, head_dim),
        "key_offsets": offsets(num_new),
        "cached_keys": pages["keys"],
        "cached_values": pages["values"],
        "page_ids": pages["page_ids"],
        "page_offsets": pages["page_offsets"],
        "cached_offsets": pages["row_offsets"],
        "window": draw_window(pick, most_rows),
        "num_globals": pick.choice([0, 0, 1, 3, most_rows + 1]),
        "scoring": pick.choice(SCORINGS),
    }


def draw_elapsed(pick: random.Random) -> int:
    """Draw seconds at the edge of a bucket, or anywhere."""
    width = 2 ** pick.randint(0, 40)
    return pick.choice([-width, -1, 0, 1, width - 1, width, width + 1, pick.randint(0, 10**9)])


def draw_candidates(
    pick: random.Random, most_rows: int, most_candidates: int, most_users: int = 4
) -> Arguments:
    """Draw users with histories, and candidates at any time that see any prefix."""
    num_heads, head_dim, num_tokens = pick.randint(1, 3), pick.choice(HEAD_DIMS), pick.randint(1, 3)
    num_users = pick.randint(0, most_users)
    num_rows = [draw_length(pick, most_rows) for _ in range(num_users)]
    num_candidates = [draw_length(pick, most_candidates) for _ in range(num_users)]
    times = [pick.choice([-1, -7, 0, pick.randint(0, 2**40)]) for _ in range(sum(num_rows))]
    row_ends = offsets(num_rows).tolist()
    candidate_times, visible_rows = [], []
    for user, count in enumerate(num_candidates):
        of_user = times[row_ends[user] : row_ends[user + 1]] or [0]
        moments = [pick.choice(of_user) + draw_elapsed(pick) for _ in range(2)]
        for _ in range(count):
            candidate_times.append(pick.choice(moments))
            visible_rows.append(pick.choice([num_rows[user], pick.randint(0, num_rows[user])]))
    own = (sum(num_candidates), num_tokens, num_heads, head_dim)
    return {
        "queries": draw_sharpness(pick) * normal(pick, *own),
        "own_keys": normal(pick, *own),
        "own_values": normal(pick, *own),
        "candidate_offsets": offsets(num_candidates),
        **draw_pages(pick, num_rows, num_heads, head_dim),
        "row_times": torch.tensor(times, dtype=torch.int64),
        "candidate_times": torch.tensor(candidate_times, dtype=torch.int64),
        "visible_rows": torch.tensor(visible_rows, dtype=torch.int64),
        "time_bias": normal(pick, pick.choice([1, 2, 32, 70]), num_heads),
        "place_bias": normal(pick, pick.choice([0, 0, 1, 6]), num_heads),
        "window": draw_window(pick, most_rows),
        "scoring": pick.choice(SCORINGS),
    }


def draw_arguments(operator: str, pick: random.Random, most_rows: int) -> Arguments:
    if operator == HISTORY:
        return draw_history(pick, most_rows)
    return draw_candidates(pick, most_rows, most_rows)


def example(operator: str) -> Arguments:
    """Return arguments of three users: the last has no rows, the second two blocks and a part."""
    pick = random.Random(7)
    num_heads, head_dim, num_tokens = 3, 20, 2
    pages = draw_pages(pick, [5, 135, 0], num_heads, head_dim)
    if operator == HISTORY:
        return {
            "queries": normal(pick, 12, num_heads, head_dim),
            "query_offsets": offsets([2, 10, 0]),
            "keys": normal(pick, 14, num_heads, head_dim),
            "values": normal(pick, 14, num_heads, head_dim),
            "key_offsets": offsets([3, 11, 0]),
            "cached_keys": pages["keys"],
            "cached_values": pages["values"],
            "page_ids": pages["page_ids"],
            "page_offsets": pages["page_offsets"],
            "cached_offsets": pages["row_offsets"],
            "window": 33,
            "num_globals": 2,
            "scoring": "softmax",
        }
    own = (9, num_tokens, num_heads, head_dim)
    return {
        "queries": normal(pick, *own),
        "own_keys": normal(pick, *own),
        "own_values": normal(pick, *own),
        "candidate_offsets": offsets([4, 5, 0]),
        **pages,
        "row_times": torch.arange(140) ** 2 - 1,
        "candidate_times": torch.arange(20000, 20009),
        "visible_rows": torch.tensor([5, 0, 3, 5, 135, 64, 70, 1, 135]),
        "time_bias": normal(pick, 32, num_heads),
        "place_bias": normal(pick, 6, num_heads),
        "window": 0,
        "scoring": "softmax",
    }


# Calls and expected results.


def with_dtype(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """Return the same arguments in another floating-point dtype."""
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def call(operator: str, arguments: Arguments) -> Tensor:
    return getattr(torch.ops.torchrec_kvshare, operator)(*arguments.values())[0]


def gradients(operator: str, arguments: Arguments, out_gradient: Tensor) -> list[Tensor]:
    """Return the gradients of all arguments in ``TRAINED``."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in TRAINED[operator]}
    out = call(operator, arguments | leaves)
    return [*torch.autograd.grad(out, [*leaves.values()], out_gradient.to(out))]


def longest(arguments: Arguments, *names: str) -> float:
    """Return the largest norm of a head."""
    found = [arguments[name].nan_to_num() for name in names if name in arguments]
    return max((float(one.norm(dim=-1).max()) for one in found if one.numel() > 0), default=0.0)


def error_scale(arguments: Arguments) -> float:
    """Return the scale of errors: scores round relative to their size, and weights scale values."""
    score = longest(arguments, "queries") * longest(arguments, "keys", "cached_keys", "own_keys")
    score *= max(1, arguments["queries"].size(-1)) ** -0.5
    if "time_bias" in arguments:
        score += float(arguments["time_bias"].abs().max())
    return (1.0 + score) * longest(arguments, "values", "cached_values", "own_values")


def error_share(got: Tensor, expected: Tensor, scale: float) -> float:
    """Return the largest error relative to a scale, or to the largest result if that is larger."""
    if got.numel() == 0:
        return 0.0
    error = float((got.double() - expected).abs().max())
    return error / max(scale, float(expected.abs().max()), 1e-30)


def gradient_share(name: str, got: Tensor, expected: Tensor, arguments: Arguments) -> float:
    """Return ``error_share`` of an argument's gradient; a key's gradient scales with queries."""
    is_key = name in ("keys", "own_keys")
    factor = max(1.0, longest(arguments, "queries")) if is_key else 1.0
    return error_share(got, expected, factor * error_scale(arguments))


def assert_equals_reference(operator: str, arguments: Arguments) -> None:
    got, expected = call(operator, arguments), REFERENCES[operator](**arguments)
    assert got.dtype == arguments["queries"].dtype
    assert got.shape == expected.shape
    assert error_share(got, expected, error_scale(arguments)) <= TOLERANCE[got.dtype]


# Layouts.


def with_step(rows: Tensor, dimension: int) -> Tensor:
    """Return the same numbers with stride doubled along a dimension."""
    apart = rows.repeat_interleave(2, dimension).contiguous()
    return apart[(slice(None),) * dimension + (slice(1, None, 2),)]


def moved(rows: Tensor, dimension: int) -> Tensor:
    """Return the same numbers, with a dimension outermost in memory."""
    return rows.movedim(dimension, 0).contiguous().movedim(0, dimension)


def last_of_three(rows: Tensor) -> Tensor:
    return torch.stack([rows, rows, rows], 1).unbind(1)[2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sliced": lambda rows: torch.cat([rows[:1], rows])[1 if len(rows) else 0 :],
    "every second row": lambda rows: with_step(rows, 0),
    "every second head": lambda rows: with_step(rows, max(0, rows.dim() - 2)),
    "every second number": lambda rows: with_step(rows, rows.dim() - 1),
    "heads first": lambda rows: moved(rows, -2) if rows.dim() > 1 else rows,
    "numbers first": lambda rows: moved(rows, -1),
    "one of three": last_of_three,
}


def laid_out(arguments: Arguments, layout: str, names: Sequence[str] | None = None) -> Arguments:
    """Return the arguments with all or the named tensors in another layout."""
    return arguments | {
        name: LAYOUTS[layout](value)
        for name, value in arguments.items()
        if isinstance(value, Tensor) and (names is None or name in names)
    }


def tensor_names(arguments: Arguments) -> list[str]:
    return [name for name, value in arguments.items() if isinstance(value, Tensor)]


# Nothing to compute.


def sliced(arguments: Arguments, names: Sequence[str], *cut: Any) -> Arguments:
    return {name: arguments[name][cut] for name in names}


def empty_arguments(operator: str) -> dict[str, Arguments]:
    """Return arguments with something missing, by what is missing."""
    whole, zeros, first = example(operator), torch.zeros(4, dtype=torch.int64), torch.tensor([0])
    none = first[:0]
    if operator == HISTORY:
        cached, new = ("cached_keys", "cached_values"), ("keys", "values")
        rows = ("queries", *new, *cached)
        no_queries = sliced(whole, ["queries"], slice(0)) | {"query_offsets": zeros}
        no_new = no_queries | sliced(whole, new, slice(0)) | {"key_offsets": zeros}
        no_pages = {"page_ids": none, "page_offsets": zeros, "cached_offsets": zeros}
        no_cached = sliced(whole, cached, slice(0)) | no_pages
        return {
            "users": whole
            | {name: first for name in whole if name.endswith("_offsets")}
            | sliced(whole, rows, slice(0))
            | {"page_ids": none},
            "queries": whole | no_queries,
            "new rows": whole | no_new,
            "cached rows": whole | no_cached,
            "rows": whole | no_new | no_cached,
            "rows in pages": whole | sliced(whole, cached, slice(None), slice(0)) | no_pages,
            "heads": whole | sliced(whole, rows, ..., slice(0), slice(None)),
            "numbers": whole | sliced(whole, rows, ..., slice(0)),
        }
    own, paged = ("queries", "own_keys", "own_values"), ("keys", "values")
    tables = ("time_bias", "place_bias")
    no_candidates = sliced(whole, [*own, "candidate_times", "visible_rows"], slice(0))
    no_rows = {
        "row_times": none,
        "page_ids": none,
        "page_offsets": zeros,
        "row_offsets": zeros,
        "visible_rows": torch.zeros(9, dtype=torch.int64),
    }
    return {
        "users": whole
        | no_candidates
        | sliced(whole, paged, slice(0))
        | {name: first for name in whole if name.endswith("_offsets")}
        | {"row_times": none, "page_ids": none},
        "candidates": whole | no_candidates | {"candidate_offsets": zeros},
        "rows": whole | sliced(whole, paged, slice(0)) | no_rows,
        "rows in pages": whole | sliced(whole, paged, slice(None), slice(0)) | no_rows,
        "rows that are seen": whole | {"visible_rows": torch.zeros(9, dtype=torch.int64)},
        "tokens": whole | sliced(whole, own, slice(None), slice(0)),
        "heads": whole
        | sliced(whole, [*own, *paged], ..., slice(0), slice(None))
        | sliced(whole, tables, slice(None), slice(0)),
        "numbers": whole | sliced(whole, [*own, *paged], ..., slice(0)),
    }


# Invalid arguments, and patterns of their error messages.

Refused = list[tuple[Arguments, str]]
FIRST, LAST = -(2**63), 2**63 - 1


def refused_offsets(name: str, right: Tensor, num_rows: int | None) -> Refused:
    """Return invalid offsets in place of ``right`` [4]; ``num_rows`` limits their end, if given."""
    end = int(right[-1])
    refused: Refused = [
        ({name: right.int()}, f"{name} is int32; it takes int64"),
        ({name: right.unsqueeze(0)}, rf"{name} is \[1, 4\]; it takes 1 dimensions"),
        ({name: right[:0]}, f"{name} has 0 offsets; no users have 1"),
        ({name: torch.tensor([1, end, end, end])}, f"{name} starts at 1; it starts at 0"),
        ({name: torch.tensor([0, end, 0, end])}, f"{name} goes from {end} to 0; it never falls"),
        ({name: torch.tensor([0, LAST, FIRST, end])}, f"{name} goes from {LAST} to {FIRST}; it"),
    ]
    if name not in ("query_offsets", "candidate_offsets"):
        refused.append(({name: right[:-1]}, f"{name} has 3 offsets; 3 users have 4"))
    if num_rows is not None:
        for wrong in (end + 1, LAST):
            changed = torch.tensor([0, 0, 0, wrong])
            refused.append(({name: changed}, f"{name} ends at {wrong}; there are {num_rows} rows"))
    return refused


def refused_rows(whole: Arguments, name: str, other_name: str | None) -> Refused:
    """Return invalid rows: of another shape than ``other_name``'s, or with other heads."""
    rows = whole[name]
    shape = [*rows.shape]
    other = rf"{other_name or 'queries'} is \["
    refused: Refused = [
        ({name: rows.half()}, f"{name} is float16; it takes float32"),
        ({name: rows.to(torch.int64)}, f"{name} is int64; it takes float32"),
        ({name: rows[0]}, rf"{name} is \[.*\]; it takes {len(shape)} dimensions"),
        ({name: rows.unsqueeze(0)}, rf"{name} is \[1, .*\]; it takes {len(shape)} dimensions"),
        ({name: rows[..., 1:]}, rf"{name} is \[.*, {shape[-1] - 1}\]; {other}"),
        ({name: rows[..., 1:, :]}, rf"{name} is \[.*, {shape[-2] - 1}, .*\]; {other}"),
    ]
    if other_name is not None:
        refused.append(({name: rows[1:]}, rf"{name} is \[{shape[0] - 1}, .*\]; {other}"))
    return refused


def refused_pages(whole: Arguments, keys: str, row_offsets: str) -> Refused:
    ids, page_offsets = whole["page_ids"], whole["page_offsets"]
    num_pages, page_size = whole[keys].shape[:2]
    count = len(ids)
    values = keys.replace("keys", "values")
    no_rows = {name: whole[name][:, :0] for name in (keys, values)}
    too_few = f"page_offsets gives user 0 0 pages of {page_size} rows; its rows are 5"
    return [
        ({"page_ids": ids.int()}, "page_ids is int32; it takes int64"),
        ({"page_ids": ids.unsqueeze(1)}, r"page_ids is \[.*\]; it takes 1 dimensions"),
        ({"page_ids": ids[:-1]}, f"page_ids has {count - 1} numbers; {count} are needed"),
        ({"page_ids": ids.new_full((count,), num_pages)}, f"page_ids has {num_pages}; there are"),
        ({"page_ids": ids.new_full((count,), -1)}, f"page_ids has -1; there are {num_pages} pag"),
        ({"page_ids": ids.new_full((count,), LAST)}, f"page_ids has {LAST}; there are"),
        ({"page_offsets": torch.tensor([0, 0, count, count])}, too_few),
        (no_rows, "page_offsets gives user 0 .* pages of 0 rows; its rows are 5"),
        *refused_offsets("page_offsets", page_offsets, None),
        *refused_offsets(row_offsets, whole[row_offsets], None),
    ]


def refused_arguments(operator: str) -> Refused:
    """Return arguments that break one rule each, and a pattern of the error."""
    whole = example(operator)
    queries = whole["queries"]
    changes: Refused = [
        ({"queries": queries.to(torch.int64)}, "queries is int64; it takes a float"),
        ({"queries": queries[0]}, r"queries is \[.*\]; it takes \d dimensions"),
        ({"queries": queries.unsqueeze(-1)}, r"queries is \[.*\]; it takes \d dimensions"),
        ({"window": -1}, "window is -1; it takes a number of rows, or 0 for all"),
        ({"scoring": "relu"}, "scoring is relu; softmax and silu exist"),
    ]
    if operator == HISTORY:
        changes += [
            *refused_rows(whole, "keys", None),
            *refused_rows(whole, "values", "keys"),
            *refused_rows(whole, "cached_keys", None),
            *refused_rows(whole, "cached_values", "cached_keys"),
            *refused_offsets("query_offsets", whole["query_offsets"], 12),
            *refused_offsets("key_offsets", whole["key_offsets"], 14),
            *refused_pages(whole, "cached_keys", "cached_offsets"),
            ({"num_globals": -1}, "num_globals is -1; it takes at least 0"),
            (
                {"key_offsets": torch.tensor([0, 1, 14, 14])},
                "key_offsets gives user 0 1 keys; its queries are 2, those of its last",
            ),
        ]
    else:
        changes += [
            *refused_rows(whole, "own_keys", "queries"),
            *refused_rows(whole, "own_values", "queries"),
            *refused_rows(whole, "keys", None),
            *refused_rows(whole, "values", "keys"),
            *refused_offsets("candidate_offsets", whole["candidate_offsets"], 9),
            *refused_pages(whole, "keys", "row_offsets"),
            *refused_visibility(whole),
        ]
    return [(whole | change, message) for change, message in changes]


def refused_visibility(whole: Arguments) -> Refused:
    """Return invalid times, visible rows and biases of candidates."""
    refused: Refused = [({"time_bias": whole["time_bias"][:0]}, "time_bias has no buckets")]
    for name, count in (("row_times", 140), ("candidate_times", 9), ("visible_rows", 9)):
        numbers = whole[name]
        refused += [
            ({name: numbers.double()}, f"{name} is float64; it takes int64"),
            ({name: numbers.unsqueeze(1)}, rf"{name} is \[.*\]; it takes 1 dimensions"),
            ({name: numbers[1:]}, f"{name} has {count - 1} numbers; {count} are needed"),
        ]
    for wrong in (-1, 6, LAST, FIRST):
        visible = torch.tensor([wrong, *whole["visible_rows"][1:].tolist()])
        refused.append(({"visible_rows": visible}, f"visible_rows has {wrong}; its user has 5 row"))
    for name in ("time_bias", "place_bias"):
        table = whole[name]
        refused += [
            ({name: table.half()}, f"{name} is float16; it takes float32"),
            ({name: table[0]}, rf"{name} is \[3\]; it takes 2 dimensions"),
            ({name: table[:, 1:]}, rf"{name} is \[.*, 2\]; queries is \["),
        ]
    return refused


def huge_arguments(operator: str) -> Refused:
    """Return arguments whose sizes overflow what is computed from them, and the error."""

    def many(num_rows: int, head_dim: int, num_queries: int = 1) -> Arguments:
        """Return queries over ``num_rows`` rows that share one number in memory."""
        whole = example(operator)
        one = torch.zeros(1, 1, 1)
        table = one.expand(num_rows, 1, head_dim).unsqueeze(0)
        query = one.expand(num_queries, 1, head_dim)
        ends, numbers = torch.tensor([0, num_queries]), torch.tensor([0, num_rows])
        pages = {"page_ids": torch.tensor([0]), "page_offsets": torch.tensor([0, 1])}
        if operator == HISTORY:
            rows = {"queries": query, "keys": query, "values": query}
            cached = {"cached_keys": table, "cached_values": table, "cached_offsets": numbers}
            return whole | rows | cached | pages | {"query_offsets": ends, "key_offsets": ends}
        own = dict.fromkeys(("queries", "own_keys", "own_values"), query.unsqueeze(1))
        visibility = {
            "row_times": torch.tensor([0]).expand(num_rows),
            "candidate_times": torch.zeros(num_queries, dtype=torch.int64),
            "visible_rows": numbers[1:].expand(num_queries),
        }
        tables = {"time_bias": one[0], "place_bias": one[0]}
        rows = {"keys": table, "values": table, "row_offsets": numbers, "candidate_offsets": ends}
        return whole | own | rows | visibility | tables | pages

    too_many = "it takes at most 1099511627776 numbers"
    table = "cached_keys" if operator == HISTORY else "keys"
    wide = 2**58  # 64 times this is 0 to 64 bits
    return [
        (many(2**41, 1), f"{table} is .*{too_many}"),
        (many(1, wide), f"queries is .*{too_many}"),
        (many(0, wide, 0), f"queries is .*{too_many}"),
    ]


# All of it, for a process under a sanitizer.


def run_all(first_seed: int, num_draws: int) -> None:
    """Run every operator and its backward on all of the above."""

    def both_ways(operator: str, arguments: Arguments) -> None:
        gradients(operator, arguments, torch.ones_like(arguments["queries"]))

    for operator in OPERATORS:
        for seed in range(first_seed, first_seed + num_draws):
            both_ways(operator, draw_arguments(operator, random.Random(seed), 140))
        whole = example(operator)
        assert_equals_reference(operator, whole)
        for layout in LAYOUTS:
            for names in (*((name,) for name in tensor_names(whole)), None):
                both_ways(operator, laid_out(whole, layout, names))
        for arguments in empty_arguments(operator).values():
            both_ways(operator, arguments)
        for arguments, message in (*refused_arguments(operator), *huge_arguments(operator)):
            # Without the package's Python code there is no backend for other dtypes.
            if arguments["queries"].dtype == torch.float32:
                with pytest.raises((ValueError, RuntimeError), match=message):
                    call(operator, arguments)

"""The attention operators against ``attention/reference.py``, and their other promises.

Their arguments are in cases.py. The C++ backend computes float32, the plain one float64. Memory
safety is in test_operators_memory.py.
"""

import itertools
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.attention.cases import (
    CANDIDATES,
    GRADIENT_TOLERANCE,
    HISTORY,
    LAYOUTS,
    OPERATORS,
    SCORINGS,
    TOLERANCE,
    TRAINED,
    Arguments,
    assert_equals_reference,
    call,
    draw_arguments,
    draw_candidates,
    draw_history,
    empty_arguments,
    error_scale,
    error_share,
    example,
    gradient_share,
    gradients,
    laid_out,
    normal,
    offsets,
    refused_arguments,
    tensor_names,
    with_dtype,
)
from tests.worlds import examples, new_interpreter
from torchrec_kvshare.attention import plain
from torchrec_kvshare.attention.library import register_operators
from torchrec_kvshare.attention.operators import flat_rows, history_attention, rows_bmm, rows_linear
from torchrec_kvshare.attention.plain import doubling_bucket

by_operator = pytest.mark.parametrize("operator", OPERATORS)
by_scoring = pytest.mark.parametrize("scoring", SCORINGS)
# Arguments with one row for each row that offsets count.
ROWS = {
    HISTORY: ("queries", "keys", "values"),
    CANDIDATES: ("queries", "own_keys", "own_values"),
}
by_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
drawn = st.integers(0, 2**32 - 1).map(random.Random)


def test_the_library_computes_here() -> None:
    """Otherwise this file compares the plain backend with itself."""
    assert register_operators()


# Values.


@by_operator
@by_dtype
@examples(0.5)
@given(drawn)
def test_an_operator_equals_the_reference(
    operator: str, dtype: torch.dtype, pick: random.Random
) -> None:
    assert_equals_reference(operator, with_dtype(draw_arguments(operator, pick, 9), dtype))


@by_operator
@by_scoring
@by_dtype
def test_many_blocks_of_rows_equal_the_reference(
    operator: str, dtype: torch.dtype, scoring: str
) -> None:
    assert_equals_reference(operator, with_dtype(example(operator) | {"scoring": scoring}, dtype))


@by_operator
@examples(0.3)
@given(drawn)
def test_the_library_equals_the_plain_backend_over_many_blocks_and_tasks(
    operator: str, pick: random.Random
) -> None:
    arguments = draw_arguments(operator, pick, 150)
    expected = call(operator, with_dtype(arguments, torch.float64))
    got = call(operator, arguments)
    assert error_share(got, expected, error_scale(arguments)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("window", [63, 64, 65, 128])
@by_scoring
@by_dtype
def test_a_window_round_the_end_of_a_block_equals_the_reference(
    dtype: torch.dtype, scoring: str, window: int
) -> None:
    pick = random.Random(window)
    rows = [normal(pick, 131, 1, 5) for _ in range(3)]
    chosen = [*without_cache(rows, offsets([131])), window, 1, scoring]
    chosen[:2] = [rows[0][123:], offsets([8])]
    arguments = dict(zip(example(HISTORY), chosen, strict=True))
    assert_equals_reference(HISTORY, with_dtype(arguments, dtype))


def without_cache(rows: list[Tensor], ends: Tensor) -> list[Tensor]:
    """Queries, keys and values as arguments of a history of new rows alone."""
    queries, keys, values = rows
    cached = flat_rows(keys[:0], values[:0], torch.zeros_like(ends))
    return [queries, ends, keys, values, ends, *cached]


@by_dtype
@pytest.mark.parametrize("num_buckets", [1, 2, 5, 64, 70])
def test_time_falls_into_buckets_of_doubling_width(dtype: torch.dtype, num_buckets: int) -> None:
    """With more than 64 buckets the bucket ends overflowed, and a second fell into any bucket."""
    elapsed = [-(2**40), -1, 0, *(2**k + step for k in range(62) for step in (-1, 0))]
    row = torch.ones(1, 1, 1, dtype=dtype)
    own = torch.zeros(len(elapsed), 1, 1, 1, dtype=dtype)
    arguments = example(CANDIDATES) | {
        **dict.fromkeys(("queries", "own_keys", "own_values"), own),
        "candidate_offsets": offsets([len(elapsed)]),
        "keys": row.unsqueeze(0),
        "values": row.unsqueeze(0),
        "page_ids": torch.tensor([0]),
        "page_offsets": torch.tensor([0, 1]),
        "row_offsets": torch.tensor([0, 1]),
        "row_times": torch.tensor([0]),
        "candidate_times": torch.tensor(elapsed),
        "visible_rows": torch.ones(len(elapsed), dtype=torch.int64),
        "time_bias": 20.0 + torch.arange(num_buckets, dtype=dtype).unsqueeze(1),
        "place_bias": torch.zeros(0, 1, dtype=dtype),
        "scoring": "silu",
    }
    weights = call(CANDIDATES, arguments).flatten()  # SiLU of 20 and more is 20 and more
    expected = [min(max(0, one).bit_length(), num_buckets - 1) for one in elapsed]
    assert (weights.round() - 20).tolist() == expected
    assert doubling_bucket(torch.tensor(elapsed), num_buckets).tolist() == expected


@by_dtype
@by_scoring
def test_a_row_without_a_time_has_no_time_bias_but_its_places(
    dtype: torch.dtype, scoring: str
) -> None:
    arguments = with_dtype(example(CANDIDATES) | {"scoring": scoring}, dtype)
    arguments["row_times"] = torch.full_like(arguments["row_times"], -1)
    spoilt = arguments | {"time_bias": torch.full_like(arguments["time_bias"], torch.nan)}
    assert torch.equal(call(CANDIDATES, spoilt), call(CANDIDATES, arguments))
    no_places = arguments | {"place_bias": arguments["place_bias"][:0]}
    assert not torch.equal(call(CANDIDATES, no_places), call(CANDIDATES, arguments))
    assert_equals_reference(CANDIDATES, arguments)


@by_dtype
def test_a_candidate_that_sees_no_row_attends_to_its_own_tokens(dtype: torch.dtype) -> None:
    arguments = with_dtype(example(CANDIDATES), dtype)
    arguments["visible_rows"] = torch.zeros_like(arguments["visible_rows"])
    assert_equals_reference(CANDIDATES, arguments)
    one_token = arguments | {
        name: arguments[name][:, :1] for name in ("queries", "own_keys", "own_values")
    }
    assert torch.equal(call(CANDIDATES, one_token), one_token["own_values"])


@by_dtype
def test_a_bias_of_a_thousand_overflows_nothing(dtype: torch.dtype) -> None:
    """Next to such a bias a candidate's own tokens weigh zero; their weights were NaN."""
    arguments = with_dtype(example(CANDIDATES), dtype)
    arguments["time_bias"] = arguments["time_bias"] + 1000.0
    assert_equals_reference(CANDIDATES, arguments)


# Gradients.


@by_operator
@by_scoring
def test_gradients_are_right(operator: str, scoring: str) -> None:
    """In float64, against finite differences; both users read the same pages."""
    arguments = with_dtype(shared_pages(operator) | {"scoring": scoring}, torch.float64)
    trained = TRAINED[operator]

    def attend(*leaves: Tensor) -> Tensor:
        return call(operator, arguments | dict(zip(trained, leaves, strict=True)))

    leaves = [arguments[name].requires_grad_() for name in trained]
    assert torch.autograd.gradcheck(attend, leaves)


def shared_pages(operator: str) -> Arguments:
    """Return two users on pages 2 and 0 of two rows: the first reads 3 rows, the second 4."""
    pick = random.Random(5)
    table = [normal(pick, 3, 2, 2, 3) for _ in range(2)]
    pages = [torch.tensor([2, 0, 2, 0]), offsets([2, 2]), offsets([3, 4])]
    if operator == HISTORY:
        rows = [normal(pick, count, 2, 3) for count in (3, 5, 5)]
        tensors = [rows[0], offsets([1, 2]), rows[1], rows[2], offsets([3, 2]), *table, *pages]
        return dict(zip(example(HISTORY), [*tensors, 3, 1, "softmax"], strict=True))
    own = [normal(pick, 3, 2, 2, 3) for _ in range(3)]
    times = [torch.tensor([-1, 5, 9, 0, 3, 7, 8]), torch.tensor([9, 10, 12])]
    biases = [normal(pick, 5, 2), normal(pick, 3, 2)]
    tensors = [*own, offsets([1, 2]), *table, *pages, *times, torch.tensor([3, 4, 2]), *biases]
    return dict(zip(example(CANDIDATES), [*tensors, 3, "softmax"], strict=True))


@by_operator
@pytest.mark.parametrize("most_rows", [9, 150])
@examples(0.3)
@given(drawn)
def test_the_librarys_gradients_equal_the_plain_backends(
    operator: str, most_rows: int, pick: random.Random
) -> None:
    """Rows that two users read get the sum of both users' gradients."""
    arguments = draw_arguments(operator, pick, most_rows)
    out_gradient = normal(pick, *arguments["queries"].shape)
    exact = with_dtype(arguments, torch.float64)
    for name, got, expected in zip(
        TRAINED[operator],
        gradients(operator, arguments, out_gradient),
        gradients(operator, exact, out_gradient),
        strict=True,
    ):
        assert got.shape == expected.shape == arguments[name].shape
        assert gradient_share(name, got, expected, arguments) <= GRADIENT_TOLERANCE, name


@by_dtype
@by_scoring
def test_a_row_that_two_users_read_gets_both_gradients(dtype: torch.dtype, scoring: str) -> None:
    whole = with_dtype(shared_pages(CANDIDATES) | {"scoring": scoring}, dtype)
    out_gradient = torch.ones_like(whole["queries"])
    together = gradients(CANDIDATES, whole, out_gradient)
    alone = [
        gradients(CANDIDATES, only_user(whole, user), out_gradient[rows])
        for user, rows in enumerate((slice(0, 1), slice(1, 3)))
    ]
    for index, name in enumerate(TRAINED[CANDIDATES]):
        if name in ("keys", "values", "time_bias", "place_bias"):
            torch.testing.assert_close(together[index], alone[0][index] + alone[1][index])


@by_operator
@by_dtype
def test_a_row_that_no_query_sees_gets_no_gradient_at_all(
    operator: str, dtype: torch.dtype
) -> None:
    arguments = with_dtype(example(operator), dtype)
    changed = {"num_globals": 0, "window": 1} if operator == HISTORY else {"window": 0}
    if operator == CANDIDATES:
        changed["visible_rows"] = torch.tensor([3, 0, 2, 3, 9, 9, 70, 1, 9])
    found = gradients(operator, arguments | changed, torch.ones_like(arguments["queries"]))
    index = TRAINED[operator].index("values")
    keys, values = found[index - 1], found[index]
    assert torch.isfinite(keys).all()
    is_seen = values.abs().amax((-1, -2)) > 0.0
    assert torch.equal(is_seen | (keys.abs().amax((-1, -2)) == 0.0), torch.ones_like(is_seen))
    assert int(is_seen.sum()) == (12 if operator == HISTORY else 3 + 70)


@by_operator
def test_under_autocast_attention_is_computed_in_float32(operator: str) -> None:
    """The C++ backend refused bfloat16, and plain sums of it would lose most of a long history."""
    low = with_dtype(example(operator), torch.bfloat16)
    exact = with_dtype(low, torch.float32)
    out_gradient = torch.ones_like(exact["queries"])
    expected = [call(operator, exact), *gradients(operator, exact, out_gradient)]
    with torch.autocast("cpu", torch.bfloat16):
        found = [call(operator, low), *gradients(operator, low, out_gradient)]
        from_float32 = call(operator, exact)
    assert found[0].dtype == torch.float32
    assert torch.equal(found[0], expected[0])
    assert torch.equal(from_float32, expected[0])
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, theirs.bfloat16())


@by_operator
def test_cached_rows_and_log_sums_have_no_gradients(operator: str) -> None:
    arguments = example(operator)
    names = [name for name in ("cached_keys", "cached_values") if name in arguments]
    leaves = {name: arguments[name].requires_grad_() for name in (*names, "queries")}
    results = getattr(torch.ops.torchrec_kvshare, operator)(*(arguments | leaves).values())
    assert not results[1].requires_grad
    results[0].sum().backward()
    assert all(leaves[name].grad is None for name in names)
    assert leaves["queries"].grad is not None


# Bits: a row's result depends only on that row and the rows that it sees.


def only_user(arguments: Arguments, user: int) -> Arguments:
    """Return the arguments of one user, over the same pages."""
    kept: Arguments = {}

    def cut(name: str, of: str) -> None:
        ends = arguments[of]
        kept[name] = arguments[name][ends[user] : ends[user + 1]]

    is_history = "query_offsets" in arguments
    cut("page_ids", "page_offsets")
    if is_history:
        cut("queries", "query_offsets")
        cut("keys", "key_offsets")
        cut("values", "key_offsets")
    else:
        for name in ("queries", "own_keys", "own_values", "candidate_times", "visible_rows"):
            cut(name, "candidate_offsets")
        cut("row_times", "row_offsets")
    for name in arguments:
        if name.endswith("_offsets"):
            ends = arguments[name]
            kept[name] = torch.stack([ends[user] - ends[user], ends[user + 1] - ends[user]])
    return arguments | kept


def chosen_candidates(arguments: Arguments, chosen: list[int]) -> Arguments:
    """Return chosen candidates of the only user, in this order."""
    names = ("queries", "own_keys", "own_values", "candidate_times", "visible_rows")
    return arguments | {
        **{name: arguments[name][chosen] for name in names},
        "candidate_offsets": offsets([len(chosen)]),
    }


@by_operator
@examples(0.2)
@given(drawn)
def test_a_user_has_the_same_bits_alone_and_among_others(
    operator: str, pick: random.Random
) -> None:
    arguments = draw_arguments(operator, pick, 70)
    together = call(operator, arguments)
    ends = arguments["query_offsets" if operator == HISTORY else "candidate_offsets"].tolist()
    for user, (first, last) in enumerate(itertools.pairwise(ends)):
        alone = call(operator, only_user(arguments, user))
        assert torch.equal(alone, together[first:last])


@examples(0.2)
@given(drawn)
def test_a_candidate_has_the_same_bits_alone_and_among_others_in_any_order(
    pick: random.Random,
) -> None:
    arguments = draw_candidates(pick, 150, 140, most_users=1)
    num_candidates = len(arguments["queries"])
    if num_candidates == 0:
        return
    expected = call(CANDIDATES, arguments)
    order = list(range(num_candidates))
    pick.shuffle(order)
    assert torch.equal(call(CANDIDATES, chosen_candidates(arguments, order)), expected[order])
    for index in {0, num_candidates // 2, num_candidates - 1}:
        alone = call(CANDIDATES, chosen_candidates(arguments, [index]))
        assert torch.equal(alone, expected[[index]])


@by_operator
def test_the_number_of_threads_changes_no_bit(operator: str) -> None:
    arguments = draw_arguments(operator, random.Random(3), 150)
    assert arguments["queries"].numel() > 0
    out_gradient = torch.ones_like(arguments["queries"])
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            found = gradients(operator, arguments, out_gradient)
            results.append([call(operator, arguments), *found])
    finally:
        torch.set_num_threads(before)
    for one, *others in zip(*results, strict=True):
        assert all(torch.equal(one, other) for other in others)


@by_scoring
@pytest.mark.parametrize("window", [0, 1, 33, 64])
@pytest.mark.parametrize("head_dim", [5, 32])
def test_new_rows_have_the_same_bits_over_cached_ones_as_in_a_whole_history(
    head_dim: int, window: int, scoring: str
) -> None:
    rows = [normal(random.Random(index), 150, 2, head_dim) for index in range(3)]
    ends, options = offsets([150]), (window, 1, scoring)
    attend: Any = torch.ops.torchrec_kvshare.history_attention
    expected, _ = attend(*without_cache(rows, ends), *options)
    page_size = 7
    table = [torch.cat([row, row[:4]]).view(22, page_size, 2, head_dim) for row in rows[1:]]
    for first in (1, 63, 64, 131, 149):
        queries, keys, values = (row[first:] for row in rows)
        new = offsets([150 - first])
        num_pages = -(-first // page_size)
        paged = [*table, torch.arange(num_pages), offsets([num_pages]), offsets([first])]
        got, _ = attend(queries, new, keys, values, new, *paged, *options)
        assert torch.equal(got, expected[first:])


@by_operator
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_any_argument_gives_the_same_bits(operator: str, layout: str) -> None:
    """Own keys that had to be copied were read after the copy was freed: scores were garbage.

    And a head that was not contiguous was refused.
    """
    whole = example(operator)
    out_gradient = torch.ones_like(whole["queries"])
    expected = [call(operator, whole), *gradients(operator, whole, out_gradient)]
    for names in (*((name,) for name in tensor_names(whole)), None):
        arguments = laid_out(whole, layout, names)
        got = [call(operator, arguments), *gradients(operator, arguments, out_gradient)]
        assert got[0].is_contiguous()
        for one, other in zip(got, expected, strict=True):
            assert torch.equal(one, other), names


@by_operator
def test_an_expanded_gradient_is_read_as_it_is(operator: str) -> None:
    """The gradient of ``sum`` is one number with stride zero."""
    arguments = example(operator)
    one = torch.ones(()).expand_as(arguments["queries"])
    for got, expected in zip(
        gradients(operator, arguments, one),
        gradients(operator, arguments, one.contiguous()),
        strict=True,
    ):
        assert torch.equal(got, expected)


# Values that are not finite show, and only where they are seen.

NAN_BITS = [0x7FC00000, 0x7FC00001, 0x7FC001FF, 0x7F800001]


@by_scoring
@pytest.mark.parametrize("bits", NAN_BITS)
@pytest.mark.parametrize("name", ["keys", "values"])
def test_a_row_that_is_no_number_spoils_its_head_for_candidates_that_see_it(
    name: str, bits: int, scoring: str
) -> None:
    """A comparison with NaN is false, and a clamp with swapped operands hid such an event.

    And the exponential of a NaN with nonzero lowest bits was finite. A candidate that does not see
    the row got NaN too: the row weighed zero, and zero times NaN is NaN.
    """
    for dtype in TOLERANCE:
        arguments = with_dtype(example(CANDIDATES) | {"scoring": scoring}, dtype)
        before = call(CANDIDATES, arguments)
        pages, ids = arguments[name], arguments["page_ids"]
        first_page = int(arguments["page_offsets"][1])
        page_size = pages.size(1)
        page, slot = int(ids[first_page + 64 // page_size]), 64 % page_size
        spoilt = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        pages[page, slot, 1, 3] = spoilt.to(dtype)
        got = call(CANDIDATES, arguments)
        sees = torch.tensor([4, 6, 8])  # see 135, 70 and 135 rows; row 64 is the 65th
        others = torch.tensor([0, 1, 2, 3, 5, 7])
        assert torch.equal(got[:, :, [0, 2]], before[:, :, [0, 2]])
        assert torch.equal(got[others], before[others])
        assert is_spoilt(got[sees][:, :, 1]).all()


def is_spoilt(rows: Tensor) -> Tensor:
    """Return for each row whether it has a number that is not finite."""
    return ~torch.isfinite(rows).all(-1)


@by_dtype
@by_scoring
@pytest.mark.parametrize("name", ["queries", "own_keys", "own_values"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_candidate_that_is_no_number_spoils_itself_alone(
    bad: float, name: str, scoring: str, dtype: torch.dtype
) -> None:
    """One such candidate in a tile kept others from being rescaled: they got finite garbage."""
    arguments = with_dtype(example(CANDIDATES) | {"scoring": scoring}, dtype)
    arguments["queries"] = 30.0 * arguments["queries"]
    arguments["visible_rows"] = torch.tensor([5, 5, 5, 5, 135, 135, 135, 135, 135])
    before = call(CANDIDATES, arguments)
    for index in range(4, 9):
        changed = arguments[name].clone()
        changed[index, 1] = bad
        got = call(CANDIDATES, arguments | {name: changed})
        others = [one for one in range(9) if one != index]
        assert torch.equal(got[others], before[others])
        assert is_spoilt(got[index, 1]).all()


@by_dtype
@by_scoring
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("name", ["queries", "keys", "values"])
def test_a_row_that_is_no_number_leaves_the_rows_that_do_not_see_it(
    name: str, window: int, scoring: str, dtype: torch.dtype
) -> None:
    """Earlier rows of its tile were garbage: they were not rescaled, or added it times zero."""
    rows = [20.0 * normal(random.Random(index), 75, 2, 5).to(dtype) for index in range(3)]
    attend: Any = torch.ops.torchrec_kvshare.history_attention
    ends = offsets([75])
    before, _ = attend(*without_cache(rows, ends), window, 0, scoring)
    for bad in range(60, 72):
        spoilt = [row.clone() for row in rows]
        spoilt[("queries", "keys", "values").index(name)][bad, :, 2] = torch.nan
        got, _ = attend(*without_cache(spoilt, ends), window, 0, scoring)
        end = bad + 1 if name == "queries" else bad + window if window else 75
        assert torch.equal(got[:bad], before[:bad])
        assert torch.equal(got[end:], before[end:])
        assert is_spoilt(got[bad:end]).all()


@by_dtype
@by_scoring
def test_a_bias_that_is_no_number_spoils_what_has_it(dtype: torch.dtype, scoring: str) -> None:
    arguments = with_dtype(example(CANDIDATES) | {"scoring": scoring}, dtype)
    before = call(CANDIDATES, arguments)
    table = arguments["place_bias"].clone()
    table[4, 0] = torch.nan  # of the 8th newest row to the 15th
    got = call(CANDIDATES, arguments | {"place_bias": table})
    has_it = arguments["visible_rows"] >= 8
    assert is_spoilt(got[has_it][:, :, 0]).all()
    assert torch.equal(got[~has_it], before[~has_it])
    assert torch.equal(got[:, :, 1:], before[:, :, 1:])


@by_scoring
def test_scores_of_minus_infinity_alone_show_no_hidden_row(scoring: str) -> None:
    """A hidden row's score was -1e30, which is larger: hidden rows gave a finite result."""
    for dtype in TOLERANCE:
        queries = torch.full((2, 1, 1), 1.0, dtype=dtype)
        keys = torch.full((2, 1, 1), -torch.inf, dtype=dtype)
        keys[1] = 0.0
        ends = offsets([2])
        arguments = without_cache([queries, keys, torch.ones_like(keys)], ends)
        got, _ = torch.ops.torchrec_kvshare.history_attention(*arguments, 0, 0, scoring)
        assert not torch.isfinite(got[0]).any()


# Arguments.


@by_operator
@by_dtype
def test_nothing_to_read_is_no_fault(operator: str, dtype: torch.dtype) -> None:
    for missing, arguments in empty_arguments(operator).items():
        chosen = with_dtype(arguments, dtype)
        if chosen["queries"].numel() > 0:
            assert_equals_reference(operator, chosen)
        assert call(operator, chosen).shape == chosen["queries"].shape, missing
        found = gradients(operator, chosen, torch.ones_like(chosen["queries"]))
        for name, gradient in zip(TRAINED[operator], found, strict=True):
            assert gradient.shape == chosen[name].shape, missing
            assert torch.isfinite(gradient).all(), missing


@by_operator
@by_dtype
def test_rows_behind_the_last_users_are_not_read_and_get_zeros(
    operator: str, dtype: torch.dtype
) -> None:
    assert_rows_behind_are_not_read(operator, dtype, torch.equal)


def assert_rows_behind_are_not_read(
    operator: str, dtype: torch.dtype, are_equal: Callable[[Tensor, Tensor], bool]
) -> None:
    exact = with_dtype(example(operator), dtype)
    longer = dict(exact)
    for name in ROWS[operator]:
        rows = exact[name]
        longer[name] = torch.cat([rows, torch.full_like(rows[:3], torch.nan)])
    for name in ("page_ids", "row_times", "candidate_times", "visible_rows"):
        if name in exact:
            longer[name] = torch.cat([exact[name], torch.tensor([-7, 2**62, -1])])
    expected, got = call(operator, exact), call(operator, longer)
    num_rows = len(expected)
    assert are_equal(got[:num_rows], expected)
    assert (got[num_rows:] == 0.0).all()
    direction = torch.ones_like(expected)
    whole_direction = torch.cat([direction, torch.ones_like(got[num_rows:])])
    found = zip(
        TRAINED[operator],
        gradients(operator, longer, whole_direction),
        gradients(operator, exact, direction),
        strict=True,
    )
    for name, of_longer, of_exact in found:
        assert are_equal(of_longer[: len(of_exact)], of_exact), name
        assert (of_longer[len(of_exact) :] == 0.0).all(), name


@by_operator
@by_dtype
def test_what_does_not_fit_is_refused_by_its_name(operator: str, dtype: torch.dtype) -> None:
    """Without offsets the process crashed; the plain backend read other users' pages."""
    for arguments, message in refused_arguments(operator):
        chosen, expected = arguments, message
        if dtype == torch.float64:
            chosen = with_dtype(arguments, dtype) | {
                name: value
                for name, value in arguments.items()
                if isinstance(value, Tensor) and value.dtype == torch.float16
            }
            expected = message.replace("takes float32", "takes float64")
        if "float64; it takes int64" in message:
            chosen = chosen | {
                name: value
                for name, value in arguments.items()
                if isinstance(value, Tensor) and value.dtype == torch.float64
            }
        with pytest.raises(ValueError, match=expected):
            call(operator, chosen)


@by_operator
def test_the_backward_operator_refuses_what_the_forward_one_did_not_return(operator: str) -> None:
    arguments = example(operator)
    out, log_sums = getattr(torch.ops.torchrec_kvshare, operator)(*arguments.values())
    backward: Any = getattr(torch.ops.torchrec_kvshare, f"{operator}_backward")
    with pytest.raises(ValueError, match=r"log_sums is \[0.*\]; there are"):
        backward(out, out, log_sums[:0], *arguments.values())
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        backward(out[1:], out, log_sums, *arguments.values())


# Registration.


def run_opcheck(operator: str, arguments: Arguments) -> None:
    leaves = {name: arguments[name].detach().requires_grad_() for name in TRAINED[operator]}
    torch.library.opcheck(
        getattr(torch.ops.torchrec_kvshare, operator).default, [*(arguments | leaves).values()]
    )


@by_operator
@by_dtype
def test_an_operator_is_registered_as_torch_wants_it(operator: str, dtype: torch.dtype) -> None:
    run_opcheck(operator, with_dtype(shared_pages(operator), dtype))


@by_operator
@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_shapes_are_known_without_reading_anything(operator: str, device: str) -> None:
    arguments = example(operator)
    with FakeTensorMode():
        fakes = {
            name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
            if isinstance(value, Tensor)
            else value
            for name, value in arguments.items()
        }
        operators: Any = torch.ops.torchrec_kvshare
        out, log_sums = getattr(operators, operator)(*fakes.values())
        found = getattr(operators, f"{operator}_backward")(out, out, log_sums, *fakes.values())
    assert out.shape == fakes["queries"].shape
    assert log_sums.shape == out.shape[:-1]
    assert out.device.type == log_sums.device.type == device
    assert [one.shape for one in found] == [fakes[name].shape for name in TRAINED[operator]]


WITHOUT_LIBRARY = """
import logging, random, sys, torch
from pathlib import Path
logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
from torchrec_kvshare.attention import library
library.FOLDER = Path(sys.argv[1])
from torchrec_kvshare.attention import operators
assert not operators.register_operators()
"""
# What is computed without the library does not depend on why it is not there.
SAME_RESULTS = """
from tests.attention import cases as attention_cases
from tests.attention import test_operators
for operator in attention_cases.OPERATORS:
    for seed in range(20):
        drawn = attention_cases.draw_arguments(operator, random.Random(seed), 9)
        attention_cases.assert_equals_reference(operator, drawn)
    test_operators.test_gradients_are_right(operator, "softmax")
    for dtype in attention_cases.TOLERANCE:
        test_operators.test_an_operator_is_registered_as_torch_wants_it(operator, dtype)
        test_operators.test_nothing_to_read_is_no_fault(operator, dtype)
        test_operators.test_what_does_not_fit_is_refused_by_its_name(operator, dtype)
    test_operators.test_shapes_are_known_without_reading_anything(operator, "cuda")
"""


@pytest.mark.parametrize("is_broken", [False, True])
def test_without_the_library_the_log_says_why_and_results_are_the_same(
    is_broken: bool, tmp_path: Path
) -> None:
    capability = torch.backends.cpu.get_cpu_capability().lower()
    name = f"_native_{capability}-torch{torch.__version__.split('+')[0]}.so"
    if is_broken:
        (tmp_path / name).write_text("no library")
    (tmp_path / "_native_other-torch1.0.so").write_text("of another torch")
    program = WITHOUT_LIBRARY + ("" if is_broken else SAME_RESULTS)
    process = new_interpreter(program, str(tmp_path))
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    reason = (
        f"{name} cannot be loaded: "
        if is_broken
        else f"{name} is needed; \\['_native_other-torch1.0.so'\\] were built when"
    )
    assert len(re.findall(rf"WARNING attention: backend is plain PyTorch: .*{reason}", said)) == 1


# The Python functions that call the operators.


def test_flat_rows_are_pages_of_one_row() -> None:
    pick = random.Random(1)
    arguments = draw_history(pick, 9)
    rows = [normal(pick, 7, 2, 3) for _ in range(2)]
    cached = flat_rows(*rows, offsets([3, 4]))
    queries, keys, values = (normal(pick, 2, 2, 3) for _ in range(3))
    ends = offsets([1, 1])
    got = history_attention(queries, ends, keys, values, ends, cached, 0, 0, "softmax")
    flat = [queries, ends, keys, values, ends, *cached, 0, 0, "softmax"]
    named = dict(zip(arguments, flat, strict=True))
    assert torch.equal(got, call(HISTORY, named))
    assert_equals_reference(HISTORY, named)


# The plain backend in blocks of queries over all rows, as on a GPU, where offsets are not read.


@contextmanager
def in_blocks(num_queries: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "_chunk_slices", lambda *sizes: plain._blocks(sizes[-1]))
        patch.setattr(plain, "QUERIES_AT_ONCE", num_queries)
        yield


@by_operator
@examples(0.5)
@given(drawn)
def test_blocks_of_queries_over_everything_equal_the_reference(
    operator: str, pick: random.Random
) -> None:
    arguments = with_dtype(draw_arguments(operator, pick, 9), torch.float64)
    with in_blocks(pick.randint(1, 20)):
        assert_equals_reference(operator, arguments)


@by_operator
def test_blocks_of_queries_promise_what_users_in_turn_do(operator: str) -> None:
    with in_blocks(3):
        for scoring in SCORINGS:
            test_gradients_are_right(operator, scoring)
        test_nothing_to_read_is_no_fault(operator, torch.float64)
        assert_rows_behind_are_not_read(operator, torch.float64, torch.allclose)


# Rows of a linear layer.


@by_dtype
@given(
    st.integers(0, 70),
    st.integers(0, 40),
    st.integers(0, 70),
    st.integers(0, 2**31),
)
@examples(0.3)
def test_rows_linear_is_a_linear_layer_and_each_row_is_as_if_alone(
    dtype: torch.dtype, num_rows: int, depth: int, num_columns: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, depth, generator=generator, dtype=dtype)
    weight = torch.randn(num_columns, depth, generator=generator, dtype=dtype)
    bias = torch.randn(num_columns, generator=generator, dtype=dtype)
    got = rows_linear(rows, weight, bias)
    expected = rows.double() @ weight.double().t() + bias.double()
    scale = rows.double().abs() @ weight.double().abs().t() + bias.double().abs()
    assert ((got.double() - expected).abs() <= TOLERANCE[dtype] * scale).all()
    for chosen in ([0], [num_rows - 1], list(range(0, num_rows, 3))) if num_rows else ():
        assert torch.equal(rows_linear(rows[chosen], weight, bias), got[chosen])


def test_rows_linear_takes_any_leading_sizes_and_rows_that_are_not_dense() -> None:
    rows = torch.randn(5, 3, 14)[..., ::2]
    weight, bias = torch.randn(7, 9).t(), torch.randn(9)
    got = rows_linear(rows, weight, bias)
    assert got.shape == (5, 3, 9)
    torch.testing.assert_close(got, torch.nn.functional.linear(rows, weight, bias))


@by_dtype
@given(*[st.integers(0, 9)] * 4, st.integers(0, 2**31))
@examples(0.3)
def test_rows_bmm_is_bmm_and_each_row_is_as_if_alone(
    dtype: torch.dtype, num_groups: int, num_rows: int, depth: int, num_columns: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(num_groups, num_rows, depth, generator=generator, dtype=dtype)
    right = torch.randn(num_groups, depth, num_columns, generator=generator, dtype=dtype)
    got = rows_bmm(left, right)
    expected = left.double().bmm(right.double())
    scale = left.double().abs().bmm(right.double().abs())
    assert ((got.double() - expected).abs() <= TOLERANCE[dtype] * scale).all()
    for group in range(num_groups):
        # A group's position in memory does not matter either.
        few = slice(group, group + 2)
        assert torch.equal(rows_bmm(left[few, ::2].clone(), right[few]), got[few, ::2])


def test_rows_bmm_refuses_groups_that_are_not_each_others() -> None:
    with pytest.raises(ValueError, match=r"weight is \[2, 5, 4\]; rows is \[3, 6, 4\]"):
        rows_bmm(torch.zeros(3, 6, 4), torch.zeros(2, 4, 5))


def test_a_row_that_is_not_finite_is_alone_too() -> None:
    rows, weight, bias = torch.randn(9, 6), torch.randn(40, 6), torch.randn(40)
    expected = rows_linear(rows, weight, bias)
    rows[4, 2] = torch.nan
    got = rows_linear(rows, weight, bias)
    assert got[4].isnan().all()
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(got[others], expected[others])


@by_dtype
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (((3, 4), (5, 6), (5,)), r"weight is \[1, 5, 6\]; rows is \[1, 3, 4\]"),
        (((3, 4), (5, 4), (6,)), r"bias is \[6\]; weight is \[1, 5, 4\]"),
        (((3, 4), (5,), (5,)), r"weight is \[1, 5\]; it takes 3 dimensions"),
    ],
)
def test_what_rows_linear_refuses_it_names(
    dtype: torch.dtype, sizes: tuple[tuple[int, ...], ...], message: str
) -> None:
    rows, weight, bias = (torch.zeros(size, dtype=dtype) for size in sizes)
    with pytest.raises(ValueError, match=message):
        rows_linear(rows, weight, bias)

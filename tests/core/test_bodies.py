"""Every body of attention against its meaning in ``attention/reference.py``, and how one is chosen.

Cases have candidates of one token and of three, users without events, users without candidates,
and rows of K/V that lie apart or are two users' at once.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.core.worlds import examples
from torchrec_kvshare.attention.bodies import Attention, choose_body
from torchrec_kvshare.attention.reference import reference_attention, reference_silu_attention
from torchrec_kvshare.attention.shared import (
    Spans,
    causal_attention,
    full_attention,
    hidden_bias,
    lengths_to_spans,
    shared_attention,
)
from torchrec_kvshare.attention.silu import silu_causal_attention, silu_shared_attention

NUM_HEADS, HEAD_DIM = 2, 5
NUM_ROWS = 19  # of K/V, R
# Greatest absolute errors allowed against the float64 reference of the same rounded numbers, each
# with the worst found of 2000 drawn cases and of histories of 600 events, body by body.
TOLERANCE = {
    torch.float64: 1e-13,  # flash 1.8e-15, dense 1.4e-15
    torch.float32: 4e-6,  # flash 6.1e-7, dense 5.9e-7, flex 3.2e-7, causal 1.1e-6, native 8.8e-7
    torch.float16: 8e-3,  # flash 4.0e-3, dense 2.6e-3
    torch.bfloat16: 8e-2,  # flash 2.7e-2, dense 2.7e-2
}
# Its weights are not normalised: what is summed over 600 events is some 100 large.
SILU_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}  # 1.1e-14 and 3.6e-5

SILU, SILU_NATIVE = "silu", "silu native"
SILU_BODIES = (SILU, SILU_NATIVE)
SOFTMAX_BODIES = ("flash", "native", "dense", "flex")

seeds = st.integers(0, 2**32 - 1)
by_body = pytest.mark.parametrize("body", [*SOFTMAX_BODIES, *SILU_BODIES])
by_num_tokens = pytest.mark.parametrize("num_tokens", [1, 3])


class Case(NamedTuple):
    """Arguments of ``shared_attention``."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    own_keys: Tensor
    own_values: Tensor
    biases: list[Tensor]
    spans: Spans


class Sizes(NamedTuple):
    """What a case is drawn from: rows of events and candidates of each user."""

    event_spans: list[tuple[int, int]]
    counts: list[int]
    seed: int


@st.composite
def drawn_sizes(draw: st.DrawFn) -> Sizes:
    """Spans anywhere in R: with gaps, overlapping, the same events for two users, or none."""
    spans = []
    for _ in range(draw(st.integers(1, 4))):
        first = draw(st.integers(0, NUM_ROWS))
        spans.append((first, draw(st.integers(first, NUM_ROWS))))
    if draw(st.booleans()):
        spans.append(spans[0])
    return Sizes(spans, [draw(st.integers(0, 4)) for _ in spans], draw(seeds))


def draw_case(sizes: Sizes, num_tokens: int, dtype: torch.dtype, bias_each: bool = False) -> Case:
    """A case whose biases are one row for each user, or one for each candidate."""
    generator = torch.Generator().manual_seed(sizes.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    rows = (NUM_ROWS, NUM_HEADS, HEAD_DIM)
    own = (sum(sizes.counts), num_tokens, NUM_HEADS, HEAD_DIM)
    biases = [
        normal(NUM_HEADS, count if bias_each else 1, last - first)
        for count, (first, last) in zip(sizes.counts, sizes.event_spans, strict=True)
    ]
    spans = Spans(lengths_to_spans(sizes.counts), sizes.event_spans)
    # Queries of twice the scale make some weights sharp and some flat.
    return Case(
        2 * normal(*own), normal(*rows), normal(*rows), normal(*own), normal(*own), biases, spans
    )


@cache
def native() -> Attention:
    choose_body("native", "cpu")
    attention = Attention()
    attention.native = True
    return attention


def attend(case: Case, body: str) -> Tensor:
    if body == SILU:
        return silu_shared_attention(*case)
    if body == SILU_NATIVE:
        return native().silu_shared(*case, "native")
    if body == "native":
        return native().shared(*case, body)
    return shared_attention(*case, body)


def reference_row(
    query: Tensor, keys: list[Tensor], values: list[Tensor], biases: list[Tensor], body: str
) -> Tensor:
    if body in SILU_BODIES:
        return reference_silu_attention(query, keys, values, biases, 1.0)
    return reference_attention(query, keys, values, biases)


def expected_rows(case: Case, body: str) -> Tensor:
    """[C, M, H, D] float64: every token sees its user's events and the tokens of its candidate."""
    expected = torch.zeros(case.queries.shape, dtype=torch.float64)
    for user, (first, last) in enumerate(case.spans.candidates):
        seen = range(*case.spans.events[user])
        for candidate in range(first, last):
            bias = case.biases[user]
            row = min(candidate - first, bias.size(1) - 1)
            biases = [bias[:, row, place] for place in range(len(seen))]
            own_keys, own_values = [*case.own_keys[candidate]], [*case.own_values[candidate]]
            for token, query in enumerate(case.queries[candidate]):
                expected[candidate, token] = reference_row(
                    query,
                    [case.keys[row] for row in seen] + own_keys,
                    [case.values[row] for row in seen] + own_values,
                    biases + [torch.zeros(NUM_HEADS) for _ in own_keys],
                    body,
                )
    return expected


def assert_close(got: Tensor, expected: Tensor, body: str = "dense") -> None:
    tolerance = (SILU_TOLERANCE if body in SILU_BODIES else TOLERANCE)[got.dtype]
    torch.testing.assert_close(got.double(), expected, rtol=0.0, atol=tolerance)


# Candidates over the history of their user.


@pytest.mark.parametrize(
    ("body", "dtype"),
    [
        *((body, dtype) for body in ("flash", "dense") for dtype in TOLERANCE),
        *((body, torch.float32) for body in ("native", "flex", SILU_NATIVE)),
        *((SILU, dtype) for dtype in SILU_TOLERANCE),
    ],
)
@by_num_tokens
@examples(0.07)
@given(drawn_sizes())
def test_a_body_equals_the_reference(
    body: str, dtype: torch.dtype, num_tokens: int, sizes: Sizes
) -> None:
    case = draw_case(sizes, num_tokens, dtype)
    got = attend(case, body)
    assert got.dtype == dtype
    assert_close(got, expected_rows(case, body), body)


@pytest.mark.parametrize("body", ["flash", "native", "dense", *SILU_BODIES])
@by_num_tokens
@examples(0.15)
@given(drawn_sizes())
def test_a_bias_may_be_every_candidates_own(body: str, num_tokens: int, sizes: Sizes) -> None:
    case = draw_case(sizes, num_tokens, torch.float32, bias_each=True)
    assert_close(attend(case, body), expected_rows(case, body), body)


@by_body
@by_num_tokens
def test_a_candidate_without_events_sees_its_own_tokens(body: str, num_tokens: int) -> None:
    case = draw_case(Sizes([(4, 4), (9, 16)], [3, 2], 5), num_tokens, torch.float32)
    got = attend(case, body)
    assert_close(got, expected_rows(case, body), body)
    if num_tokens == 1 and body not in SILU_BODIES:
        assert torch.equal(got[:3], case.own_values[:3])


@by_body
@pytest.mark.parametrize("event_spans", [[], [(0, 0)], [(2, 9), (2, 9), (19, 19)]])
def test_no_candidates_give_no_rows(body: str, event_spans: list[tuple[int, int]]) -> None:
    case = draw_case(Sizes(event_spans, [0 for _ in event_spans], 1), 3, torch.float32)
    assert attend(case, body).shape == (0, 3, NUM_HEADS, HEAD_DIM)


@pytest.mark.parametrize("body", ["flash", "native", "dense", *SILU_BODIES])
@by_num_tokens
def test_a_hidden_event_weighs_nothing_at_all(body: str, num_tokens: int) -> None:
    case = draw_case(Sizes([(0, 7), (7, 18)], [3, 2], 6), num_tokens, torch.float32, bias_each=True)
    hide_some(case)
    before = attend(case, body)
    case.keys[[1, 4, 12]] = 3.0
    case.values[[1, 4, 12]] = -20.0
    assert torch.equal(attend(case, body), before)
    assert torch.isfinite(before).all()


@pytest.mark.parametrize("body", ["dense", SILU])
@by_num_tokens
def test_a_hidden_event_gets_no_gradient_at_all(body: str, num_tokens: int) -> None:
    case = draw_case(Sizes([(0, 7), (7, 18)], [3, 2], 6), num_tokens, torch.float32, bias_each=True)
    hide_some(case)
    leaves = [case.keys.requires_grad_(), case.values.requires_grad_()]
    for gradient in torch.autograd.grad(attend(case, body).square().sum(), leaves):
        assert torch.isfinite(gradient).all()
        seen = gradient.abs().amax((1, 2)) > 0.0
        assert [row for row, is_seen in enumerate(seen.tolist()) if not is_seen] == [1, 4, 12, 18]


def hide_some(case: Case) -> None:
    """Hide rows 1, 4 and 12 from everyone; row 18 is nobody's."""
    case.biases[0][:, :, [1, 4]] = hidden_bias()
    case.biases[1][:, :, [5]] = hidden_bias()


@pytest.mark.parametrize(
    ("body", "dtype"),
    [
        *((body, torch.float64) for body in ("flash", "dense", SILU)),
        *((body, torch.float32) for body in ("flash", "native", "dense", *SILU_BODIES)),
    ],
)
def test_who_sees_no_event_is_as_who_has_none(body: str, dtype: torch.dtype) -> None:
    case = draw_case(Sizes([(0, 7)], [4], 7), 3, dtype, bias_each=True)
    case.biases[0][:, [0, 2]] = hidden_bias()
    blind = case._replace(spans=Spans([(0, 4)], [(0, 0)]), biases=[case.biases[0][:, :, :0]])
    got, expected = attend(case, body), attend(blind, body)
    assert_close(got[[0, 2]], expected[[0, 2]].double(), body)
    assert not torch.isclose(got[[1, 3]], expected[[1, 3]]).any(dim=3).all()


@pytest.mark.parametrize("body", SOFTMAX_BODIES)
def test_a_bias_of_a_thousand_overflows_nothing(body: str) -> None:
    """Next to such a bias a candidate's own tokens weigh zero: their shares of it were NaN."""
    case = draw_case(Sizes([(0, 6)], [4], 6), 3, torch.float32)
    case.biases[0][:, :, 2] = 1000.0
    assert_close(attend(case, body), case.values[2].double().expand(4, 3, -1, -1))


@pytest.mark.parametrize("bias_each", [False, True])
@pytest.mark.parametrize("body", ["dense", SILU])
@by_num_tokens
def test_gradients_are_right(body: str, num_tokens: int, bias_each: bool) -> None:
    case = draw_case(
        Sizes([(2, 5), (7, 7), (4, 8)], [2, 1, 1], 7), num_tokens, torch.float64, bias_each
    )

    def of_leaves(*leaves: Tensor) -> Tensor:
        return attend(Case(*leaves[:5], list(leaves[5:]), case.spans), body)

    leaves = [leaf.requires_grad_() for leaf in (*case[:5], *case.biases)]
    assert torch.autograd.gradcheck(of_leaves, leaves, fast_mode=True)


@pytest.mark.parametrize("leaf", ["queries", "keys", "values", "own_keys", "own_values", "biases"])
@pytest.mark.parametrize("body", ["flash", "native", "flex", SILU_NATIVE])
def test_a_body_without_gradients_refuses_to_be_trained(body: str, leaf: str) -> None:
    """Where values, own tokens or biases alone were trained, it went on without some gradients."""
    case = draw_case(Sizes([(0, 6)], [4], 6), 3, torch.float32)
    trained = getattr(case, leaf)
    (trained[0] if leaf == "biases" else trained).requires_grad_()
    name = body.removeprefix("silu ")
    with pytest.raises(RuntimeError, match=f"body {name} has no gradients; body dense has"):
        attend(case, body)
    if body != "flex":
        with torch.no_grad():
            assert attend(case, body).shape == (4, 3, NUM_HEADS, HEAD_DIM)


@pytest.mark.parametrize("body", ["flesh", "", "auto"])
def test_an_unknown_body_is_named(body: str) -> None:
    case = draw_case(Sizes([(0, 6)], [4], 6), 1, torch.float32)
    with pytest.raises(ValueError, match=f"body is {body}; flash, dense and"):
        attend(case, body)


def test_scripted_bodies_are_bit_equal_to_eager() -> None:
    scripted, scripted_silu = (
        torch.jit.script(shared_attention),
        torch.jit.script(silu_shared_attention),
    )
    for seed in range(3):  # TorchScript rewrites a program after its first calls.
        case = draw_case(Sizes([(2, 9), (9, 9), (1, 12)], [3, 2, 4], seed), 3, torch.float32)
        for body in ("flash", "dense"):
            assert torch.equal(scripted(*case, body), shared_attention(*case, body))
        assert torch.equal(scripted_silu(*case), silu_shared_attention(*case))
    with pytest.raises(torch.jit.Error, match="outside TorchScript, flex exist"):
        scripted(*case, "flex")


# The choice of a body.


@pytest.mark.parametrize(
    ("name", "device", "body"),
    [
        ("auto", "cpu", "flash"),
        ("auto", "cuda", "flex"),
        ("auto", "mps", "dense"),
        ("flash", "cpu", "flash"),
        ("native", "cpu", "native"),
        ("dense", "cpu", "dense"),
        ("dense", "cuda", "dense"),
        ("flex", "cpu", "flex"),
        ("flex", "cuda", "flex"),
    ],
)
def test_the_body_chosen_is_said_in_the_log(
    name: str, device: str, body: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "torchrec_kvshare"):
        assert choose_body(name, device) == body
    assert caplog.messages == [f"attention: body {body} on {device}"]


@pytest.mark.parametrize(
    ("name", "device", "message"),
    [
        ("native", "cuda", r"attention body native runs on \('cpu',\), not on cuda"),
        ("flash", "cuda", r"attention body flash runs on \('cpu',\), not on cuda"),
        ("dense", "mps", r"attention body dense runs on \('cpu', 'cuda'\), not on mps"),
        (
            "flesh",
            "cpu",
            r"attention body is 'flesh'; one of \['auto', 'flash', 'native', 'flex', 'dense'\]",
        ),
    ],
)
def test_a_body_that_does_not_run_there_is_refused(
    name: str, device: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(ValueError, match=message):
        choose_body(name, device)
    assert caplog.messages == []


# Events over events.


class Rows(NamedTuple):
    """Arguments of ``causal_attention``: each user's keys, and queries of its last events."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    query_spans: list[tuple[int, int]]
    key_spans: list[tuple[int, int]]


def draw_events(users: list[tuple[int, int]], seed: int, dtype: torch.dtype) -> Rows:
    """Users of so many earlier events and so many queries."""
    generator = torch.Generator().manual_seed(seed)
    key_spans = lengths_to_spans([earlier + queries for earlier, queries in users])
    query_spans = lengths_to_spans([queries for _, queries in users])
    rows = (
        torch.randn(
            sum(last - first for first, last in spans),
            NUM_HEADS,
            HEAD_DIM,
            generator=generator,
            dtype=torch.float64,
        ).to(dtype)
        for spans in (query_spans, key_spans, key_spans)
    )
    query, key, value = rows
    return Rows(2 * query, key, value, query_spans, key_spans)


def expected_event(rows: Rows, user: int, place: int, window: int, body: str) -> Tensor:
    """[H, D] float64 of the user's query at a place: itself and what is earlier, window back."""
    first, last = rows.key_spans[user]
    num_queries = rows.query_spans[user][1] - rows.query_spans[user][0]
    newest = last - num_queries + place
    seen = range(first if window == 0 else max(first, newest - window + 1), newest + 1)
    return reference_row(
        rows.queries[rows.query_spans[user][0] + place],
        [rows.keys[row] for row in seen],
        [rows.values[row] for row in seen],
        [torch.zeros(NUM_HEADS) for _ in seen],
        body,
    )


users_of_events = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 8)), max_size=3)
CAUSAL = {
    "softmax": causal_attention,
    "native": lambda *rows: native().causal(*rows),
    SILU: silu_causal_attention,
    SILU_NATIVE: lambda *rows: native().silu_causal(*rows),
}
by_causal = pytest.mark.parametrize("body", CAUSAL)


@pytest.mark.parametrize(
    ("body", "dtype"),
    [
        *((body, torch.float32) for body in CAUSAL),
        *((body, torch.float64) for body in ("softmax", SILU)),
    ],
)
@examples(0.25)
@given(users_of_events, st.integers(0, 9), seeds)
def test_events_see_themselves_and_earlier_ones_as_far_as_the_window_reaches(
    body: str,
    dtype: torch.dtype,
    users: list[tuple[int, int]],
    window: int,
    seed: int,
) -> None:
    rows = draw_events(users, seed, dtype)
    expected = [
        expected_event(rows, user, place, window, body)
        for user, (_, num_queries) in enumerate(users)
        for place in range(num_queries)
    ]
    nothing = torch.empty(0, NUM_HEADS, HEAD_DIM, dtype=torch.float64)
    got = CAUSAL[body](*rows, window)
    assert_close(got, torch.stack(expected) if expected else nothing, body)


@by_causal
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("earlier", [0, 7])
def test_histories_of_many_blocks_of_rows_see_the_same(
    body: str, window: int, earlier: int
) -> None:
    rows = draw_events([(earlier, 601)], 3, torch.float32)
    got = CAUSAL[body](*rows, window)
    # Blocks are of 256 rows, or of as many as fill a core's cache: 215 or more here.
    for place in (0, 214, 215, 216, 217, 218, 255, 256, 257, 431, 436, 511, 512):
        assert_close(got[place], expected_event(rows, 0, place, window, body), body)


@pytest.mark.parametrize("body", ["native", *SILU_BODIES])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_candidates_of_many_blocks_of_rows_see_the_same(num_tokens: int, body: str) -> None:
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    own, rows = (240, num_tokens, NUM_HEADS, HEAD_DIM), (600, NUM_HEADS, HEAD_DIM)
    biases = [normal(NUM_HEADS, 240, 600)]
    tensors = (normal(*own), normal(*rows), normal(*rows), normal(*own), normal(*own))
    got = attend(Case(*tensors, biases, Spans([(0, 240)], [(0, 600)])), body)
    for place in (0, 72, 73, 218, 239):
        alone = [tensors[0][[place]], *tensors[1:3], tensors[3][[place]], tensors[4][[place]]]
        case = Case(*alone, [biases[0][:, [place]]], Spans([(0, 1)], [(0, 600)]))
        assert_close(got[[place]], expected_rows(case, body), body)


@pytest.mark.parametrize("full", [full_attention, lambda *rows: native().full(*rows)])
@examples(0.25)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 7)), max_size=3), seeds)
def test_full_attention_sees_all_keys_of_its_user(
    full: Callable[..., Tensor], users: list[tuple[int, int]], seed: int
) -> None:
    rows = draw_events(users, seed, torch.float32)
    expected = torch.zeros(rows.queries.shape, dtype=torch.float64)
    for (first, last), (key_first, key_last) in zip(rows.query_spans, rows.key_spans, strict=True):
        seen = range(key_first, key_last)
        for place in range(first, last):
            expected[place] = reference_attention(
                rows.queries[place],
                [rows.keys[row] for row in seen],
                [rows.values[row] for row in seen],
                [torch.zeros(NUM_HEADS) for _ in seen],
            )
    assert_close(full(*rows), expected)


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("body", ["softmax", SILU])
def test_gradients_over_events_are_right(body: str, window: int) -> None:
    rows = draw_events([(3, 4), (0, 0), (0, 3), (2, 1)], 9, torch.float64)
    leaves = [leaf.requires_grad_() for leaf in rows[:3]]
    assert torch.autograd.gradcheck(lambda *qkv: CAUSAL[body](*qkv, *rows[3:], window), leaves)
    full = [leaf.detach().requires_grad_() for leaf in leaves]
    if body != SILU and window == 0:
        assert torch.autograd.gradcheck(lambda *qkv: full_attention(*qkv, *rows[3:]), full)


@pytest.mark.parametrize(
    "attend_events",
    [
        lambda *rows: native().causal(*rows, 0),
        lambda *rows: native().silu_causal(*rows, 0),
        lambda *rows: native().full(*rows),
    ],
)
def test_native_events_refuse_to_be_trained(attend_events: Callable[..., Tensor]) -> None:
    rows = draw_events([(2, 5)], 4, torch.float32)
    rows.values.requires_grad_()
    with pytest.raises(RuntimeError, match="body native has no gradients; body dense has"):
        attend_events(*rows)


@pytest.mark.parametrize("body", ["softmax", "native"])
def test_a_window_of_one_gives_every_event_its_own_value(body: str) -> None:
    rows = draw_events([(2, 5), (0, 3)], 4, torch.float32)
    own = torch.cat([rows.values[2:7], rows.values[7:10]])
    assert torch.equal(CAUSAL[body](*rows, 1), own)

"""The fast attention against its meaning in ``attention/reference.py``."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.core.worlds import ATTENTION_TOLERANCE, examples
from torchrec_kvshare.attention.bodies import DENSE, FLASH
from torchrec_kvshare.attention.reference import reference_attention
from torchrec_kvshare.attention.shared import (
    Spans,
    causal_attention,
    hidden_bias,
    lengths_to_spans,
    shared_attention,
)

NUM_HEADS, HEAD_DIM = 3, 5
BODIES = (FLASH, DENSE)
NUM_ROWS = 23  # of K/V, R
DTYPES = st.sampled_from([torch.float32, torch.float64])


class Case(NamedTuple):
    """Arguments of ``shared_attention``, the biases of all users' events in one [H, T]."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    own_keys: Tensor
    own_values: Tensor
    event_bias: Tensor
    spans: Spans


def draw_case(
    event_spans: list[tuple[int, int]],
    counts: list[int],
    seed: int,
    dtype: torch.dtype,
    num_tokens: int = 1,
) -> Case:
    """Users whose events lie at ``event_spans`` and who have ``counts`` candidates of M tokens."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    num_events = sum(last - first for first, last in event_spans)
    rows, own = (NUM_ROWS, NUM_HEADS, HEAD_DIM), (sum(counts), num_tokens, NUM_HEADS, HEAD_DIM)
    return Case(
        # Queries of twice the scale make some weights sharp and some flat.
        2 * normal(*own),
        normal(*rows),
        normal(*rows),
        normal(*own),
        normal(*own),
        normal(NUM_HEADS, num_events),
        Spans(lengths_to_spans(counts), event_spans),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Spans anywhere in R: with gaps, overlapping, the same events for two users, or none."""
    spans = []
    for _ in range(draw(st.integers(1, 4))):
        first = draw(st.integers(0, NUM_ROWS))
        spans.append((first, draw(st.integers(first, NUM_ROWS))))
    if draw(st.booleans()):
        spans.append(spans[0])
    counts = [draw(st.integers(0, 6)) for _ in spans]
    seed, num_tokens = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from([1, 2, 4]))
    return draw_case(spans, counts, seed, draw(DTYPES), num_tokens)


def expected_rows(case: Case, visible: list[int] | None = None) -> Tensor:
    """[C, M, H, D] float64; candidate c sees ``visible[c]`` of its user's events."""
    expected = torch.empty(case.queries.shape, dtype=torch.float64)
    bias_first = 0
    for (first, last), (event_first, event_last) in zip(*case.spans, strict=True):
        for place in range(first, last):
            num_seen = event_last - event_first if visible is None else visible[place]
            seen = range(event_first, event_first + num_seen)
            biases = [case.event_bias[:, bias_first + event] for event in range(num_seen)]
            biases += [torch.zeros(NUM_HEADS) for _ in case.own_keys[place]]
            for token, query in enumerate(case.queries[place]):
                expected[place, token] = reference_attention(
                    query,
                    [*(case.keys[row] for row in seen), *case.own_keys[place]],
                    [*(case.values[row] for row in seen), *case.own_values[place]],
                    biases,
                )
        bias_first += event_last - event_first
    return expected


def biases_of_users(case: Case) -> list[Tensor]:
    """Per user [H, 1, L]: all its candidates see all its events."""
    lengths = [last - first for first, last in case.spans.events]
    return [bias.unsqueeze(1) for bias in case.event_bias.split(lengths, dim=1)]


def biases_of_candidates(case: Case, visible: list[int] | None = None) -> list[Tensor]:
    """The same as [H, N, L], hidden where a candidate sees less."""
    biases = []
    for (first, last), shared in zip(case.spans.candidates, biases_of_users(case), strict=True):
        bias = shared.repeat(1, last - first, 1)
        for place in range(first, last):
            if visible is not None:
                bias[:, place - first, visible[place] :] = hidden_bias()
        biases.append(bias)
    return biases


def serving_arguments(case: Case, body: str = FLASH) -> tuple[Any, ...]:
    """``case`` as ``shared_attention`` takes it in serving."""
    return (*case[:5], biases_of_users(case), case.spans, body)


def training_arguments(
    case: Case, visible: list[int] | None = None, body: str = DENSE
) -> tuple[Any, ...]:
    """``case`` as ``shared_attention`` takes it in training."""
    return (*case[:5], biases_of_candidates(case, visible), case.spans, body)


def assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        got.double(), expected, rtol=0.0, atol=ATTENTION_TOLERANCE[got.dtype]
    )


@pytest.mark.parametrize("body", BODIES)
@given(case=cases())
def test_shared_attention_equals_the_reference(case: Case, body: str) -> None:
    assert_close(shared_attention(*serving_arguments(case, body)), expected_rows(case))


@pytest.mark.parametrize("body", BODIES)
@given(case=cases(), random=st.randoms(use_true_random=False))
def test_shared_attention_equals_the_reference_on_the_events_it_may_see(
    case: Case, random: Any, body: str
) -> None:
    visible = []
    for (first, last), (event_first, event_last) in zip(*case.spans, strict=True):
        visible += [random.randint(0, event_last - event_first) for _ in range(first, last)]
    got = shared_attention(*training_arguments(case, visible, body))
    assert_close(got, expected_rows(case, visible))


@examples(0.5)
@given(st.lists(st.integers(0, 11), min_size=0, max_size=4), st.integers(0, 2**32 - 1), DTYPES)
def test_causal_attention_equals_the_reference(
    lengths: list[int], seed: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, sum(lengths), NUM_HEADS, HEAD_DIM, generator=generator, dtype=dtype)
    query, key, value = 2 * rows[0], rows[1], rows[2]
    spans = lengths_to_spans(lengths)
    expected = torch.empty(sum(lengths), NUM_HEADS, HEAD_DIM, dtype=torch.float64)
    for first, last in spans:
        for place in range(first, last):
            seen = range(first, place + 1)
            expected[place] = reference_attention(
                query[place],
                [key[row] for row in seen],
                [value[row] for row in seen],
                [torch.zeros(NUM_HEADS) for _ in seen],
            )
    assert_close(causal_attention(query, key, value, spans, spans, 0), expected)


@given(cases())
def test_a_prefix_of_everything_is_the_whole_history(case: Case) -> None:
    got = shared_attention(*training_arguments(case))
    assert_close(got, shared_attention(*serving_arguments(case)).double())


@pytest.mark.parametrize("dtype", ATTENTION_TOLERANCE)
def test_a_candidate_without_history_gets_its_own_value(dtype: torch.dtype) -> None:
    case = draw_case([(4, 4), (9, 16)], [3, 2], 5, dtype)
    assert torch.equal(shared_attention(*serving_arguments(case))[:3], case.own_values[:3])
    assert torch.equal(shared_attention(*training_arguments(case))[:3], case.own_values[:3])


@pytest.mark.parametrize("body", BODIES)
def test_a_candidate_that_may_see_nothing_gets_its_own_value(body: str) -> None:
    case = draw_case([(9, 16)], [4], 5, torch.float32)
    got = shared_attention(*training_arguments(case, [0, 7, 0, 2], body))
    assert torch.equal(got[[0, 2]], case.own_values[[0, 2]])
    assert not torch.isclose(got[[1, 3]], case.own_values[[1, 3]]).any()


@pytest.mark.parametrize("spans", [[], [(0, 0)], [(2, 9), (2, 9), (23, 23)]])
def test_no_candidates_give_no_rows(spans: list[tuple[int, int]]) -> None:
    case = draw_case(spans, [0 for _ in spans], 1, torch.float32, num_tokens=2)
    assert shared_attention(*serving_arguments(case)).shape == (0, 2, NUM_HEADS, HEAD_DIM)
    assert shared_attention(*training_arguments(case)).shape == (0, 2, NUM_HEADS, HEAD_DIM)


@pytest.mark.parametrize("spans", [[], [(0, 0)], [(0, 0), (0, 0)]])
def test_no_events_give_no_rows(spans: list[tuple[int, int]]) -> None:
    nothing = torch.empty(0, NUM_HEADS, HEAD_DIM)
    assert causal_attention(nothing, nothing, nothing, spans, spans, 0).shape == nothing.shape


def test_two_users_may_share_the_same_events() -> None:
    case = draw_case([(3, 12), (3, 12)], [2, 2], 8, torch.float32)
    case.queries[2:] = case.queries[:2]
    case.own_keys[2:], case.own_values[2:] = case.own_keys[:2], case.own_values[:2]
    case.event_bias[:, 9:] = case.event_bias[:, :9]
    got = shared_attention(*serving_arguments(case))
    assert torch.equal(got[:2], got[2:])


def test_where_the_events_lie_does_not_matter() -> None:
    case = draw_case([(0, 6), (6, 13)], [2, 3], 4, torch.float32)
    keys, values = torch.full_like(case.keys, math.nan), torch.full_like(case.values, math.nan)
    for moved, old in ((keys, case.keys), (values, case.values)):
        moved[17:23], moved[2:9] = old[0:6], old[6:13]
    spans = case.spans._replace(events=[(17, 23), (2, 9)])
    moved = case._replace(keys=keys, values=values, spans=spans)
    for arguments in (serving_arguments, training_arguments):
        assert torch.equal(shared_attention(*arguments(moved)), shared_attention(*arguments(case)))


def test_a_bias_of_a_thousand_overflows_nothing() -> None:
    case = draw_case([(0, 6)], [4], 6, torch.float32)
    case.event_bias[:, 2] = 1000.0
    got = shared_attention(*serving_arguments(case))
    assert_close(got, case.values[2].double().expand(4, 1, -1, -1))
    case.event_bias[:] = -1000.0
    assert_close(shared_attention(*serving_arguments(case)), case.own_values.double())


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_gradients_of_shared_attention_are_right(num_tokens: int) -> None:
    case = draw_case([(2, 5), (7, 7), (4, 8)], [2, 1, 1], 7, torch.float64, num_tokens)
    visible = [0, 2, 0, 4]
    leaves = [tensor.requires_grad_() for tensor in case[:6]]

    def of_leaves(*tensors: Tensor) -> Tensor:
        return shared_attention(*training_arguments(Case(*tensors, case.spans), visible))

    assert torch.autograd.gradcheck(of_leaves, leaves)


def test_gradients_of_causal_attention_are_right() -> None:
    generator = torch.Generator().manual_seed(9)
    leaves = [
        torch.randn(6, NUM_HEADS, HEAD_DIM, generator=generator, dtype=torch.float64)
        for _ in range(3)
    ]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    spans = [(0, 4), (4, 4), (4, 6)]
    assert torch.autograd.gradcheck(lambda *qkv: causal_attention(*qkv, spans, spans, 0), leaves)


def test_scripted_attention_is_bit_equal_to_eager() -> None:
    case = draw_case([(2, 9), (9, 9), (1, 12)], [3, 2, 4], 11, torch.float32)
    scripted = torch.jit.script(shared_attention)
    for _ in range(3):  # TorchScript rewrites a program after its first calls.
        for arguments in (serving_arguments(case), training_arguments(case)):
            assert torch.equal(scripted(*arguments), shared_attention(*arguments))

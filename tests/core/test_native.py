"""The C++ body beyond its meaning: bits, compiling, and what a process needs to run a program.

Its values are compared with the reference in test_bodies.py and, in whole models, below.
"""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.core.worlds import fresh_process
from torchrec_kvshare.attention import native
from torchrec_kvshare.attention.bodies import Attention, choose_body
from torchrec_kvshare.attention.shared import Spans
from torchrec_kvshare.errors import ConfigError

NUM_HEADS = 3
# Widths of a head below, at and between what a register holds.
HEAD_DIMS = (1, 5, 16, 32, 40)
NUM_EVENTS, NUM_CANDIDATES = 150, 137  # two blocks of keys and a part, a task of queries and a part


@pytest.fixture(scope="module")
def attention() -> Attention:
    choose_body("native", "cpu")
    chosen = Attention()
    chosen.native = True
    return chosen


def draw(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator)


def candidates_of(head_dim: int, num_tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values, own keys and own values; queries and own rows lie in one tensor."""
    projected = draw(NUM_CANDIDATES, num_tokens, 3, NUM_HEADS, head_dim)
    query, own_key, own_value = projected.unbind(2)
    keys, values = draw(2, NUM_EVENTS, NUM_HEADS, head_dim).unbind(0)
    return query, keys, values, own_key, own_value


# A row's bits depend on that row and its keys alone.


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("function", ["shared", "silu_shared"])
def test_a_candidate_has_the_same_bits_alone_and_among_others(
    attention: Attention, function: str, head_dim: int, num_tokens: int
) -> None:
    query, keys, values, own_key, own_value = candidates_of(head_dim, num_tokens)
    attend, bias = getattr(attention, function), draw(NUM_HEADS, 1, NUM_EVENTS)
    spans = Spans([(0, 100), (100, NUM_CANDIDATES)], [(0, NUM_EVENTS), (7, 90)])
    biases = [bias, bias[:, :, 7:90]]
    together = attend(query, keys, values, own_key, own_value, biases, spans, "native")
    for place in (0, 6, 99, 100, 128, NUM_CANDIDATES - 1):
        user = int(place >= 100)
        one = slice(place, place + 1)
        alone = attend(
            *(query[one], keys, values, own_key[one], own_value[one], biases[user : user + 1]),
            *(Spans([(0, 1)], spans.events[user : user + 1]), "native"),
        )
        assert torch.equal(alone, together[one])


@pytest.mark.parametrize("window", [0, 1, 33])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("function", ["causal", "silu_causal"])
def test_new_events_have_the_same_bits_as_in_a_whole_history(
    attention: Attention, function: str, head_dim: int, window: int
) -> None:
    queries, keys, values = draw(3, NUM_EVENTS, NUM_HEADS, head_dim).unbind(0)
    attend, whole = getattr(attention, function), [(0, NUM_EVENTS)]
    expected = attend(queries, keys, values, whole, whole, window)
    for first in (1, 64, 131, NUM_EVENTS - 1):
        new = attend(queries[first:], keys, values, [(0, NUM_EVENTS - first)], whole, window)
        assert torch.equal(new, expected[first:])


@pytest.mark.parametrize("function", ["shared", "silu_shared"])
def test_the_number_of_threads_changes_no_bit(attention: Attention, function: str) -> None:
    tensors, bias = candidates_of(32, 1), draw(NUM_HEADS, 1, NUM_EVENTS)
    spans = Spans([(0, NUM_CANDIDATES)], [(0, NUM_EVENTS)])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(getattr(attention, function)(*tensors, [bias], spans, "native"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


# What cannot be computed is said, not hidden.


@pytest.mark.parametrize("function", ["shared", "silu_shared"])
def test_an_event_that_is_no_number_makes_scores_that_are_none(
    attention: Attention, function: str
) -> None:
    """A comparison with NaN is false: a clamp written the other way round hid such an event."""
    query, keys, values, own_key, own_value = candidates_of(32, 1)
    keys[70, 1, 3] = torch.nan
    spans = Spans([(0, NUM_CANDIDATES)], [(0, NUM_EVENTS)])
    bias = torch.zeros(NUM_HEADS, 1, NUM_EVENTS)
    attend = getattr(attention, function)
    got = attend(query, keys, values, own_key, own_value, [bias], spans, "native")
    assert torch.isnan(got[:, :, 1]).all()
    assert torch.isfinite(got[:, :, [0, 2]]).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_refused(attention: Attention, dtype: torch.dtype) -> None:
    rows = draw(3, 4, NUM_HEADS, 8).to(dtype)
    with pytest.raises(RuntimeError, match="expected scalar type Float but found"):
        attention.causal(*rows.unbind(0), [(0, 4)], [(0, 4)], 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"spans": Spans([(0, 5)], [(0, 151)]), "biases": [torch.zeros(NUM_HEADS, 1, 151)]},
            "keys are 0 to 151 of 150",
        ),
        ({"spans": Spans([(0, 5)], [(-1, 149)])}, "keys are -1 to 149 of 150"),
        ({"spans": Spans([(0, 138)], [(0, 150)])}, "rows are 0 to 138 of 137"),
        ({"spans": Spans([(0, 5)], [])}, "0 spans of events and 1 biases are for 1 users"),
        ({"biases": [torch.zeros(NUM_HEADS, 1, 149)]}, r"a bias is \[3, 1, 149\]"),
        ({"biases": [torch.zeros(NUM_HEADS, 4, 150)]}, r"a bias is \[3, 4, 150\]"),
        ({"keys": torch.zeros(150, NUM_HEADS, 9)}, r"values are .*the keys are \[150, 3, 9\]"),
        ({"own_keys": torch.zeros(5, 1, NUM_HEADS, 8)}, "own keys and values are"),
    ],
)
@pytest.mark.parametrize("function", ["shared", "silu_shared"])
def test_what_lies_outside_a_tensor_is_not_read(
    attention: Attention, function: str, change: dict[str, Any], message: str
) -> None:
    queries, keys, values, own_keys, own_values = candidates_of(8, 1)
    arguments = {
        "queries": queries,
        "keys": keys,
        "values": values,
        "own_keys": own_keys,
        "own_values": own_values,
        "biases": [torch.zeros(NUM_HEADS, 1, NUM_EVENTS)],
        "spans": Spans([(0, 5)], [(0, NUM_EVENTS)]),
    }
    with pytest.raises(ValueError, match=message):
        getattr(attention, function)(**(arguments | change), body="native")


def test_events_outside_a_tensor_are_not_read(attention: Attention) -> None:
    rows = draw(9, NUM_HEADS, 8)
    for queries, keys, message in (
        ([(0, 9)], [(0, 10)], "keys are 0 to 10 of 9"),
        ([(0, 9)], [(3, 9)], "keys are 3 to 9 of 9"),  # fewer than the rows that are their last
        ([(0, 10)], [(0, 9)], "rows are 0 to 10 of 9"),
        ([(0, 9)], [], "1 and 0 spans do not pair"),
    ):
        with pytest.raises(ValueError, match=message):
            attention.causal(rows, rows, rows, queries, keys, 0)
    with pytest.raises(ValueError, match="1 and 0 spans do not pair"):
        attention.full(rows, rows, rows, [(0, 9)], [])


# Compiling.


def test_without_a_compiler_the_body_is_refused_and_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    message = r"body native needs g\+\+, which is not installed; flash needs none"
    with pytest.raises(ConfigError, match=message):
        native.load_native.__wrapped__(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_the_compiler_says_is_in_the_error_and_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.cpp"
    broken.write_text("int attention( { return 7; }\n")
    monkeypatch.setattr(native, "SOURCE", broken)
    with pytest.raises(ConfigError, match=r"body native cannot be compiled: .*broken\.cpp:1"):
        native.load_native.__wrapped__(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"body native cannot be kept: .*file/cache"):
        native.load_native.__wrapped__(tmp_path / "file" / "cache")


def test_a_library_is_compiled_once_and_again_for_another_source(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands = []

    def record(command: list[str], **_: object) -> None:
        commands.append(command)
        Path(command[-1]).write_text("compiled")

    source = tmp_path / "one.cpp"
    source.write_text("// one\n")
    monkeypatch.setattr(native, "SOURCE", source)
    monkeypatch.setattr(subprocess, "run", record)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    for text in ("// one\n", "// one\n", "// two\n"):
        source.write_text(text)
        native.load_native.__wrapped__(tmp_path / "cache")
    assert len(commands) == 2 * 2  # compiled and linked, twice
    assert len(list((tmp_path / "cache").iterdir())) == 2


PROGRAM = """
import sys, torch
from tests.core import test_native
from torchrec_kvshare.attention.bodies import Attention, choose_body
choose_body("native", "cpu")
attention = Attention()
attention.native = True
torch.save((torch.backends.cpu.get_cpu_capability(), test_native.rows_of(attention)), sys.argv[1])
"""


def rows_of(attention: Attention) -> list[Tensor]:
    """Every function once."""
    *tensors, bias = *candidates_of(40, 3), draw(NUM_HEADS, 1, NUM_EVENTS)
    spans = Spans([(0, NUM_CANDIDATES)], [(0, NUM_EVENTS)])
    queries, whole = draw(NUM_EVENTS, NUM_HEADS, 40), [(0, NUM_EVENTS)]
    return [
        attention.shared(*tensors, [bias], spans, "native"),
        attention.silu_shared(*tensors, [bias], spans, "native"),
        attention.causal(queries, *tensors[1:3], whole, whole, 0),
        attention.silu_causal(queries, *tensors[1:3], whole, whole, 33),
        attention.full(queries, *tensors[1:3], whole, whole),
    ]


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_it_is_compiled_for_lesser_cpus_too(
    attention: Attention, capability: str, tmp_path: Path
) -> None:
    process = fresh_process(PROGRAM, str(tmp_path / "rows.pt"), ATEN_CPU_CAPABILITY=capability)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    compiled_for, got = torch.load(tmp_path / "rows.pt")
    assert compiled_for.lower() == capability
    for there, here in zip(got, rows_of(attention), strict=True):
        # Sums are in another order; worst of the five, against the greatest value: 5.9e-7.
        assert (there - here).abs().max() <= 2e-6 * here.abs().max()


# Programs.


def scripted(is_native: bool) -> torch.jit.ScriptModule:
    chosen = Attention()
    chosen.native = is_native

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = chosen

        def forward(self, rows: Tensor, spans: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
            return (
                self.attention.causal(rows, rows, rows, spans, spans, 0),
                self.attention.silu_causal(rows, rows, rows, spans, spans, 0),
            )

    return torch.jit.script(Layer())


def test_a_program_calls_native_operators_only_if_it_was_scripted_with_them(
    attention: Attention,
) -> None:
    rows = draw(9, NUM_HEADS, 8)
    for is_native in (False, True):
        program = scripted(is_native)
        assert ("torchrec_kvshare.causal_attention" in program.attention.causal.code) == is_native
        got = program(rows, [(0, 9)])
        chosen = attention if is_native else Attention()
        assert torch.equal(got[0], chosen.causal(rows, rows, rows, [(0, 9)], [(0, 9)], 0))
        assert torch.equal(got[1], chosen.silu_causal(rows, rows, rows, [(0, 9)], [(0, 9)], 0))

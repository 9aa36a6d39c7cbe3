"""An id has one canonical spelling, wherever it comes from."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_kvshare.features.ids import canonical_id, is_integer_id
from torchrec_kvshare.features.schema import UNKNOWN_ROW, Vocabulary


@pytest.mark.parametrize(
    ("raw", "canonical"),
    [
        ("17850.0", "17850"),
        ("17850.00", "17850"),
        (17850.0, "17850"),
        (17850, "17850"),
        ("0.0", "0"),
        (-0.0, "0"),
        ("-0", "0"),
        ("-0.0", "0"),
        ("-3.0", "-3"),
        (-3, "-3"),
        ("  a b ", "a b"),
        ("85123A", "85123A"),
        ("007", "007"),
        ("007.0", "007.0"),
        ("4.5", "4.5"),
        (4.5, "4.5"),
        (".0", ".0"),
        ("v2.0", "v2.0"),
        ("1e+16", "10000000000000000"),
        ("1e5", "1e5"),
        (True, "true"),
        ("True", "true"),
        ("false", "false"),
        ("", ""),
        (" ", ""),
    ],
)
def test_an_id_has_one_spelling(raw: str | float, canonical: str) -> None:
    assert canonical_id(raw) == canonical


@given(st.text() | st.integers(-(2**80), 2**80).map(str) | st.floats().map(repr))
def test_a_canonical_id_is_its_own_canonical_id(text: str) -> None:
    assert canonical_id(canonical_id(text)) == canonical_id(text)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_and_its_printed_text_are_one_id(number: float) -> None:
    assert canonical_id(number) == canonical_id(repr(number))


@given(st.integers(-(2**53), 2**53))
def test_every_spelling_of_an_integer_has_its_row(number: int) -> None:
    vocabulary = Vocabulary([str(number), "other"])
    spellings = [number, float(number), str(number), f"{number}.0", f" {number}", f"{number} "]
    assert vocabulary.rows(spellings) == [2] * 6


def test_a_boolean_is_not_the_integer_that_python_takes_it_for() -> None:
    assert Vocabulary(["1", "0"]).rows([True, False]) == [UNKNOWN_ROW] * 2
    assert Vocabulary(["true", "false"]).rows([True, False, "True", "false"]) == [2, 3, 2, 3]
    assert Vocabulary(["true"]).rows([1]) == [UNKNOWN_ROW]


def test_integers_of_a_vocabulary_are_recognised_by_their_digits() -> None:
    assert is_integer_id("-7")
    assert not is_integer_id("٣")
    assert not is_integer_id("9" * 5000)
    assert Vocabulary(["3.5"]).row(3.5) == 2

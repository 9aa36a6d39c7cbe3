"""Codes and hashed rows of ids are the same in Python, NumPy, torch, programs and C++."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from torchrec_kvshare.features.hashed_rows import hashed_rows
from torchrec_kvshare.features.hashing import (
    IDS_AT_A_TIME,
    MAX_CODE,
    codes_of_ids,
    codes_of_integers,
)
from torchrec_kvshare.features.ids import canonical_id, is_integer_id

NUM_ROWS, SALT = 9_999_991, 12_345_678_901
# By raw id: its code, and its row of NUM_ROWS with SALT. These values never change: tables that
# were trained with them are in use. tests/pipelines/test_cpp.py holds the C++ host to them.
GOLDEN = {
    0: (4073552104164651883, 1404778),
    17850: (3958970580470684005, 1969512),
    "17850.0": (3958970580470684005, 1969512),
    -(2**63): (1299200705590623478, 7443961),
    2**63 - 1: (763911908259588009, 8962595),
    2**63: (4490902401129242966, 6274400),
    "85123A": (1074313396730006891, 6256336),
    "007": (681883267099616969, 941426),
    "ünï 日本": (3968832108969746628, 1658930),
    "x" * 256: (2389016516752921176, 2218180),
}
BITS = 2**64 - 1


def spelt_out(spelt: str) -> int:
    """The code of a canonical id, in Python's integers."""
    state = 0xCBF29CE484222325
    for byte in spelt.encode("utf-8", "surrogatepass"):
        state = (state ^ byte) * 0x100000001B3 & BITS
    if is_integer_id(spelt) and -(2**63) <= int(spelt) < 2**63:
        state = int(spelt) & BITS
    return mixed_out(state) >> 2


def mixed_out(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & BITS
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & BITS
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & BITS
    return state ^ (state >> 31)


NUMBERS = st.integers(-(2**63) - 2, 2**63 + 2) | st.integers(-(10**25), 10**25)
# Texts of digits and signs are the ones that may be taken for integers.
IDS = st.text() | NUMBERS.map(str) | st.text("-0123456789", max_size=21)


def test_codes_and_rows_are_those_that_were_always_given() -> None:
    spelt = [canonical_id(raw) for raw in GOLDEN]
    codes = codes_of_ids(spelt).codes
    rows = hashed_rows(torch.from_numpy(codes), NUM_ROWS, SALT)
    assert dict(zip(GOLDEN, zip(codes.tolist(), rows.tolist(), strict=True), strict=True)) == GOLDEN


@given(st.lists(IDS))
def test_a_code_depends_on_the_id_alone(texts: list[str]) -> None:
    ids = [canonical_id(text) for text in texts]
    coded = codes_of_ids(ids)
    assert coded.codes.tolist() == [spelt_out(one) for one in ids]
    in_range = [is_integer_id(one) and -(2**63) <= int(one) < 2**63 for one in ids]
    assert coded.is_integer.tolist() == in_range


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1))
def test_an_integer_has_the_code_of_its_digits(integers: list[int]) -> None:
    codes = codes_of_integers(np.array(integers, np.int64))
    assert codes.tolist() == codes_of_ids([*map(str, integers)]).codes.tolist()
    assert codes.min() >= 0
    assert codes.max() <= MAX_CODE


def test_many_ids_have_the_codes_of_few() -> None:
    """Ids are hashed in chunks."""
    ids = [str(number) if number % 3 else f"é{number}" for number in range(IDS_AT_A_TIME + 5)]
    assert codes_of_ids(ids).codes[-7:].tolist() == codes_of_ids(ids[-7:]).codes.tolist()


@given(
    st.lists(st.integers(0, MAX_CODE), min_size=1), st.integers(1, 2**40), st.integers(0, 2**63 - 1)
)
def test_tensor_arithmetic_gives_the_rows_of_unsigned_integers(
    codes: list[int], num_rows: int, salt: int
) -> None:
    rows = hashed_rows(torch.tensor(codes), num_rows, salt)
    assert rows.tolist() == [mixed_out(code ^ salt) % 2**63 % num_rows for code in codes]


class Rows(nn.Module):
    def forward(self, codes: Tensor) -> Tensor:
        return hashed_rows(codes, 97, 5)


def scripted() -> Callable[[Tensor], Tensor]:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(Rows()), file)
    file.seek(0)
    loaded: Callable[[Tensor], Tensor] = torch.jit.load(file)
    return loaded


def exported() -> Callable[[Tensor], Tensor]:
    size = torch.export.Dim("size")
    example = (torch.arange(3),)
    program = torch.export.export(Rows(), example, dynamic_shapes={"codes": {0: size}})
    loaded: Callable[[Tensor], Tensor] = program.module()
    return loaded


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("runtime", [scripted, exported])
def test_a_program_gives_the_same_rows(runtime: Callable[[], Callable[[Tensor], Tensor]]) -> None:
    codes = torch.from_numpy(codes_of_integers(np.arange(-500, 500)))
    assert torch.equal(runtime()(codes), Rows()(codes))


def test_rows_are_spread_evenly_and_another_salt_spreads_them_anew() -> None:
    codes = torch.from_numpy(codes_of_integers(np.arange(100_000)))
    one, other = (hashed_rows(codes, 1000, salt) for salt in (0, 1))
    for rows in (one, other):
        # 100 ids a row; a binomial's standard deviation is 10.
        counts = torch.bincount(rows, minlength=1000)
        assert counts.min() > 50
        assert counts.max() < 150
    # Pairs that share a row share another one only by chance: 1 in 1000.
    together = one[:50_000] == one[50_000:]
    assert 20 < together.sum() < 100
    assert (together & (other[:50_000] == other[50_000:])).sum() < 5

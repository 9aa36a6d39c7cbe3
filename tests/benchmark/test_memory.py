"""Peaks are counted to the byte."""

import torch

from torchrec_kvshare.benchmark.memory import peak_allocated_bytes

MIB = 2**20


def test_the_peak_of_one_tensor_is_its_size() -> None:
    assert peak_allocated_bytes(lambda: torch.empty(MIB, dtype=torch.uint8)) == MIB


def test_what_was_freed_before_does_not_count_towards_the_peak() -> None:
    def one_after_the_other() -> None:
        for num_bytes in (3 * MIB, 2 * MIB):
            torch.empty(num_bytes, dtype=torch.uint8)

    assert peak_allocated_bytes(one_after_the_other) == 3 * MIB


def test_what_is_held_at_once_is_added_up() -> None:
    def both_at_once() -> None:
        held = torch.empty(3 * MIB, dtype=torch.uint8)
        torch.empty(2 * MIB, dtype=torch.uint8)
        del held

    assert peak_allocated_bytes(both_at_once) == 5 * MIB


def test_memory_that_existed_before_is_not_counted() -> None:
    existing = torch.ones(MIB)
    assert peak_allocated_bytes(lambda: existing.view(2, -1)) == 0
    assert peak_allocated_bytes(lambda: existing.mul_(2)) < MIB


def test_a_call_that_allocates_nothing_has_no_peak() -> None:
    assert peak_allocated_bytes(lambda: None) == 0

"""Pages are never lost or allocated twice, and return what was written."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.worlds import HEAD_DIM, NUM_HEADS, NUM_PLANES, PAGE_BYTES, PAGE_SIZE
from torchrec_kvshare.cache.pages import PagePool
from torchrec_kvshare.errors import ConfigError


def make_pool(capacity_bytes: int) -> PagePool:
    return PagePool(
        capacity_bytes, PAGE_SIZE, num_planes=NUM_PLANES, num_heads=NUM_HEADS, head_dim=HEAD_DIM
    )


def draw_kv(num_rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(NUM_PLANES, num_rows, NUM_HEADS, HEAD_DIM, generator=generator)


def read_back(pool: PagePool, pages: list[int], num_rows: int) -> Tensor:
    """Read the pages one by one."""
    parts = [pool.kv_pages[:, page] for page in pages]
    return torch.cat([*parts, torch.empty(NUM_PLANES, 0, NUM_HEADS, HEAD_DIM)], dim=1)[:, :num_rows]


# A history with so many rows arrives, or one of the kept histories leaves.
steps = st.lists(
    st.tuples(st.just("come"), st.integers(0, 4 * PAGE_SIZE))
    | st.tuples(st.just("go"), st.integers(0, 100)),
    max_size=30,
)


@given(st.integers(PAGE_BYTES, 12 * PAGE_BYTES), steps)
def test_random_lives_of_users_lose_no_page_and_share_none(
    capacity_bytes: int, lives: list[tuple[str, int]]
) -> None:
    pool = make_pool(capacity_bytes)
    assert pool.kv_pages.nbytes <= capacity_bytes < pool.kv_pages.nbytes + PAGE_BYTES
    held: list[tuple[list[int], Tensor]] = []
    for seed, (step, number) in enumerate(lives):
        if step == "come":
            num_free = pool.num_free
            pages = pool.allocate(pool.pages_for(number))
            if pages is None:
                assert number > num_free * PAGE_SIZE
                assert pool.num_free == num_free
                continue
            kv = draw_kv(number, seed)
            pool.write(pages, kv)
            held.append((pages, kv))
        elif held:
            pages, _ = held.pop(number % len(held))
            pool.free(pages)
        taken = [page for pages, _ in held for page in pages]
        assert len(set(taken)) == len(taken) == pool.num_pages - pool.num_free
        assert all(0 <= page < pool.num_pages for page in taken)
        for pages, kv in held:
            assert torch.equal(read_back(pool, pages, kv.size(1)), kv)


@given(st.lists(st.booleans(), min_size=1, max_size=16), st.integers(0, 16))
def test_pages_follow_each_other_where_there_is_room(is_free: list[bool], num_pages: int) -> None:
    pool = make_pool(len(is_free) * PAGE_BYTES)
    pool.allocate(len(is_free))
    pool.free([page for page, free in enumerate(is_free) if free])
    runs = "".join("#" if free else " " for free in is_free).split()
    pages = pool.allocate(num_pages)
    if num_pages > sum(is_free):
        assert pages is None
        return
    assert pages is not None
    assert len(pages) == num_pages
    if any(len(run) >= num_pages for run in runs):
        assert pages == list(range(pages[0], pages[0] + num_pages)) if pages else True
    else:
        assert pages == sorted(pages)
    assert all(is_free[page] for page in pages)


@pytest.mark.parametrize(("num_rows", "num_pages"), [(0, 0), (1, 1), (5, 1), (6, 2), (11, 3)])
def test_a_partly_filled_page_is_a_page(num_rows: int, num_pages: int) -> None:
    assert make_pool(PAGE_BYTES).pages_for(num_rows) == num_pages


def test_writing_leaves_other_pages_alone() -> None:
    pool = make_pool(6 * PAGE_BYTES)
    pool.kv_pages.fill_(7.0)
    pool.write([4, 1], draw_kv(PAGE_SIZE + 2, 1))
    assert (pool.kv_pages[:, [0, 2, 3, 5]] == 7.0).all()
    assert (pool.kv_pages[:, 1, 2:] == 7.0).all()


def test_a_page_given_back_twice_is_a_bug_of_ours() -> None:
    pool = make_pool(3 * PAGE_BYTES)
    pages = pool.allocate(2)
    assert pages is not None
    pool.free(pages)
    with pytest.raises(AssertionError):
        pool.free(pages)


def test_a_budget_below_one_page_is_refused() -> None:
    with pytest.raises(ConfigError, match=f"{PAGE_BYTES - 1}; one page of 5 rows needs 960"):
        make_pool(PAGE_BYTES - 1)


def test_a_page_of_no_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="page_size is 0"):
        PagePool(4096, 0, num_planes=NUM_PLANES, num_heads=NUM_HEADS, head_dim=HEAD_DIM)

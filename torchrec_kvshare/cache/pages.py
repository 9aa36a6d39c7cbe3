"""A bounded pool of fixed-size pages of K/V: one more embedding table, whose rows are pages.

A row of K/V belongs to one event or to a group of events, depending on the encoder.

Pages of one history are allocated contiguously where there is room, so that attention reads them
in place.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_kvshare.errors import ConfigError, ShapeError

FREE, TAKEN = 1, 0


@dataclass(frozen=True)
class TowerSizes:
    """Sizes of one history's K/V, and the most rows that its window has."""

    num_planes: int
    num_heads: int
    head_dim: int
    max_rows: int


class PagePool:
    """As many pages of ``page_size`` rows as a byte budget allows; the memory is allocated once.

    Args:
        capacity_bytes: most bytes of K/V.
        page_size: rows per page, S.
        num_planes: K/V tensors of the tower: two per layer for most encoders.
        num_heads: H.
        head_dim: D.

    Raises:
        ConfigError: if the budget is too small for one page.

    Example:
        >>> pool = PagePool(capacity_bytes=4096, page_size=4, num_planes=2, num_heads=2, head_dim=8)
        >>> pool.num_pages, pool.allocate(3), pool.num_free
        (8, [0, 1, 2], 5)
    """

    def __init__(
        self, capacity_bytes: int, page_size: int, num_planes: int, num_heads: int, head_dim: int
    ) -> None:
        if page_size < 1:
            raise ConfigError(f"page_size is {page_size}; it must be at least 1 row")
        self.page_size = page_size
        self.page_bytes = num_planes * page_size * num_heads * head_dim * 4
        self.num_pages = capacity_bytes // self.page_bytes
        if self.num_pages < 1:
            raise ConfigError(
                f"capacity_bytes is {capacity_bytes}; one page of {page_size} rows needs "
                f"{self.page_bytes}"
            )
        self.kv_pages = torch.zeros(
            num_planes, self.num_pages, page_size, num_heads, head_dim
        )  # [planes, P, S, H, D]
        self._state = bytearray([FREE]) * self.num_pages

    @property
    def capacity_bytes(self) -> int:
        """Bytes of all pages."""
        return self.num_pages * self.page_bytes

    @property
    def num_free(self) -> int:
        """Free pages."""
        return self._state.count(FREE)

    def pages_for(self, num_rows: int) -> int:
        """Return the number of pages for ``num_rows`` rows."""
        return -(-num_rows // self.page_size)

    def allocate(self, num_pages: int, after: int = -1) -> list[int] | None:
        """Allocate pages: contiguous after page ``after``, else contiguous anywhere, else any.

        Returns:
            The pages; None, and nothing is allocated, if too few are free.
        """
        if num_pages > self.num_free:
            return None
        run = bytes([FREE]) * num_pages
        is_next = self._state.startswith(run, after + 1)
        first = after + 1 if is_next else self._state.find(run)
        if first >= 0:
            pages = list(range(first, first + num_pages))
        else:
            pages = [page for page, state in enumerate(self._state) if state == FREE][:num_pages]
        for page in pages:
            self._state[page] = TAKEN
        return pages

    def free(self, pages: list[int]) -> None:
        """Free pages."""
        for page in pages:
            assert self._state[page] == TAKEN
            self._state[page] = FREE

    def check(self, kv: Tensor) -> None:
        """Refuse K/V that these pages cannot hold.

        Raises:
            ShapeError: if its planes, heads or head width differ from the pool's.
        """
        num_planes, _, _, num_heads, head_dim = self.kv_pages.shape
        if kv.dim() != 4 or (kv.size(0), *kv.shape[2:]) != (num_planes, num_heads, head_dim):
            raise ShapeError(
                f"K/V is {list(kv.shape)}; the pool holds [{num_planes}, rows, {num_heads}, "
                f"{head_dim}]"
            )

    def write(self, pages: list[int], kv: Tensor, first: int = 0) -> None:
        """Copy rows [planes, R, H, D] of one history into its pages, starting at row ``first``."""
        rows = self.kv_pages.flatten(1, 2)  # [planes, P x S, H, D], the pages themselves
        last = first + kv.size(1)
        if _are_contiguous(pages):
            start = pages[0] * self.page_size if pages else 0
            rows[:, start + first : start + last] = kv
        else:
            rows.index_copy_(1, self._rows_of(pages)[first:last], kv)

    def read(self, pages: list[int], num_rows: int) -> Tensor:
        """Return the first rows [planes, R, H, D] of one history; a view of contiguous pages."""
        rows = self.kv_pages.flatten(1, 2)
        if _are_contiguous(pages):
            start = pages[0] * self.page_size if pages else 0
            return rows[:, start : start + num_rows]
        return rows.index_select(1, self._rows_of(pages)[:num_rows])

    def _rows_of(self, pages: list[int]) -> Tensor:
        starts = torch.tensor(pages).unsqueeze(1) * self.page_size
        return (starts + torch.arange(self.page_size)).flatten()


def _are_contiguous(pages: list[int]) -> bool:
    return pages == list(range(pages[0], pages[0] + len(pages))) if pages else True

"""A bounded pool of fixed-size pages of K/V: one more embedding table, whose rows are pages.

Pages of one history are taken side by side where there is room, so that attention reads them in
place.
"""

import torch
from torch import Tensor

from torchrec_kvshare.errors import ConfigError, ShapeError

FREE, TAKEN = 1, 0


class PagePool:
    """Pages of ``page_size`` events, as many as the byte budget allows; allocated once.

    Args:
        capacity_bytes: most bytes of K/V held.
        page_size: events per page, S.
        num_layers: layers of the tower.
        num_heads: H.
        head_dim: D.

    Raises:
        ConfigError: if the budget is too small for one page.

    Example:
        >>> pool = PagePool(capacity_bytes=4096, page_size=4, num_layers=1, num_heads=2, head_dim=8)
        >>> pool.num_pages, pool.allocate(3), pool.num_free
        (8, [0, 1, 2], 5)
    """

    def __init__(
        self, capacity_bytes: int, page_size: int, num_layers: int, num_heads: int, head_dim: int
    ) -> None:
        if page_size < 1:
            raise ConfigError(f"page_size is {page_size}; it must be at least 1 event")
        self.page_size = page_size
        self.page_bytes = num_layers * 2 * page_size * num_heads * head_dim * 4
        self.num_pages = capacity_bytes // self.page_bytes
        if self.num_pages < 1:
            raise ConfigError(
                f"capacity_bytes is {capacity_bytes}; one page of {page_size} events needs "
                f"{self.page_bytes}"
            )
        self.kv_pages = torch.zeros(
            num_layers, 2, self.num_pages, page_size, num_heads, head_dim
        )  # [layers, 2, P, S, H, D]
        self._state = bytearray([FREE]) * self.num_pages

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return self._state.count(FREE)

    def pages_for(self, num_events: int) -> int:
        """Pages that a history of so many events takes."""
        return -(-num_events // self.page_size)

    def allocate(self, num_pages: int) -> list[int] | None:
        """Take pages: the first run long enough, else any, else None and nothing is taken."""
        if num_pages > self.num_free:
            return None
        first = self._state.find(bytes([FREE]) * num_pages)
        if first >= 0:
            pages = list(range(first, first + num_pages))
        else:
            pages = [page for page, state in enumerate(self._state) if state == FREE][:num_pages]
        for page in pages:
            self._state[page] = TAKEN
        return pages

    def free(self, pages: list[int]) -> None:
        """Give pages back."""
        for page in pages:
            assert self._state[page] == TAKEN
            self._state[page] = FREE

    def check(self, kv: Tensor) -> None:
        """Refuse K/V that these pages cannot hold.

        Raises:
            ShapeError: if its layers, heads or head width differ from the pool's.
        """
        num_layers, _, _, _, num_heads, head_dim = self.kv_pages.shape
        if kv.dim() != 5 or (*kv.shape[:2], *kv.shape[3:]) != (num_layers, 2, num_heads, head_dim):
            raise ShapeError(
                f"K/V is {list(kv.shape)}; the pool holds [{num_layers}, 2, events, {num_heads}, "
                f"{head_dim}]"
            )

    def write(self, pages: list[int], kv: Tensor) -> None:
        """Copy the K/V of one history [layers, 2, L, H, D] into its pages, oldest event first."""
        for place, page in enumerate(pages):
            part = kv[:, :, place * self.page_size : (place + 1) * self.page_size]
            self.kv_pages[:, :, page, : part.size(2)] = part

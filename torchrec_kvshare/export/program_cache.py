"""The cache inside an exported program: pages of one history's K/V, by user.

Any libtorch process that loads the program has it, without Python. It keeps the events with their
K/V and compares them with a request's events one by one: there is no digest, so no collision. It
has no clock: the times of a user's own requests give the age of the user's K/V. Runs in
TorchScript; calls must not overlap.
"""

from typing import Final

import torch
from torch import Tensor, nn

from torchrec_kvshare.cache.kv_cache import MAX_REMEMBERED
from torchrec_kvshare.cache.reasons import (
    COLD,
    EDITED,
    EVICTED,
    EXPIRED,
    HIT,
    SHRUNK,
    SLID,
)

PAGE_SIZE = 32  # rows of K/V


class ProgramCache(nn.Module):
    """K/V of one history by user; the pages of a user are consecutive.

    Args:
        num_planes: tensors of K/V that the tower keeps.
        num_heads: H.
        head_dim: D.
        num_columns: columns of an event with one value, the time last. In a list of events bags
            follow them, two tensors each.

    Attributes:
        kv_pages: [planes, P, S, H, D]; no pages before ``configure``.
    """

    page_size: Final[int] = PAGE_SIZE
    max_remembered: Final[int] = MAX_REMEMBERED
    hit: Final[str] = HIT
    cold: Final[str] = COLD
    expired: Final[str] = EXPIRED
    evicted: Final[str] = EVICTED
    edited: Final[str] = EDITED
    shrunk: Final[str] = SHRUNK
    slid: Final[str] = SLID

    # By user; the users of first_page are in the order of their last use, oldest first.
    first_page: dict[int, int]
    num_rows: dict[int, int]
    first_event: dict[int, int]
    encoded_at: dict[int, int]
    events: dict[int, list[Tensor]]
    drop_reason: dict[int, str]

    def __init__(self, num_planes: int, num_heads: int, head_dim: int, num_columns: int) -> None:
        super().__init__()
        self.num_planes = num_planes
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.num_columns = num_columns
        self.ttl_s = 0.0
        self.kv_pages = torch.empty([num_planes, 0, PAGE_SIZE, num_heads, head_dim])
        self.is_free = torch.empty([0], dtype=torch.bool)
        self.first_page = {}
        self.num_rows = {}
        self.first_event = {}
        self.encoded_at = {}
        self.events = {}
        self.drop_reason = {}

    def configure(self, capacity_bytes: int, ttl_s: float) -> None:
        """Empty the cache and allocate as many pages as fit; K/V expires after ``ttl_s``."""
        page_bytes = self.num_planes * self.page_size * self.num_heads * self.head_dim * 4
        num_pages = capacity_bytes // page_bytes
        if num_pages < 1:
            raise ValueError(f"capacity_bytes is {capacity_bytes}; one page takes {page_bytes}")
        self.clear(self.evicted)
        self.drop_reason.clear()
        self.kv_pages = torch.empty(
            [self.num_planes, num_pages, self.page_size, self.num_heads, self.head_dim]
        )
        self.is_free = torch.ones([num_pages], dtype=torch.bool)
        self.ttl_s = ttl_s

    def lookup(
        self, user: int, events: list[Tensor], first_event: int, time: int
    ) -> tuple[str, int, int]:
        """Return ``hit`` or the reason for a miss, and the numbers of matched and kept events."""
        if user not in self.first_page:
            return self.drop_reason.get(user, self.cold), 0, 0
        age = time - self.encoded_at[user]
        if age > self.ttl_s or age < -self.ttl_s:
            return self.expired, 0, 0
        self.first_page[user] = self.first_page.pop(user)  # Move the user to the end.
        kept = self.events[user]
        num_kept, num_events = kept[0].size(0), events[0].size(0)
        num_matched = self.num_equal(kept, events)
        # If a host does not know first_event, a later first time shows that old events have left.
        time_column = self.num_columns - 1
        has_left = int(kept[time_column][0]) < int(events[time_column][0])
        if num_matched == num_kept and num_kept == num_events:
            reason = self.hit
        elif num_matched == num_kept:
            reason = self.cold
        elif num_matched == 0 and (first_event != self.first_event[user] or has_left):
            reason = self.slid
        else:
            reason = self.shrunk if num_events < num_kept else self.edited
        return reason, num_matched, num_kept

    def num_equal(self, one: list[Tensor], other: list[Tensor]) -> int:
        """Count the leading events that are equal in two histories."""
        num_equal = min(one[0].size(0), other[0].size(0))
        for column in range(self.num_columns):
            num_equal = leading_equal(one[column][:num_equal], other[column][:num_equal])
        for bag in range(self.num_columns, len(one), 2):
            lengths = one[bag][:num_equal]
            num_equal = leading_equal(lengths, other[bag][:num_equal])
            ends = lengths[:num_equal].cumsum(0)
            num_values = int(ends[-1].item()) if num_equal > 0 else 0
            num_equal_values = leading_equal(one[bag + 1][:num_values], other[bag + 1][:num_values])
            num_equal = int((ends <= num_equal_values).sum().item())
        return num_equal

    def keep(
        self,
        user: int,
        events: list[Tensor],
        first_event: int,
        time: int,
        kv: Tensor,
        num_kept: int,
        pinned: dict[int, int],
    ) -> bool:
        """Keep K/V [planes, R, H, D] after the first ``num_kept`` rows that the user has.

        Return False and change nothing of the user if the user is pinned, or if there is no room
        without dropping pinned users.
        """
        if user in pinned:
            return False
        num_rows = num_kept + kv.size(1)
        encoded_at = self.encoded_at[user] if num_kept > 0 else time
        first = self.make_room(user, self.pages_of(num_rows), pinned)
        if first < 0:
            return False
        rows = self.kv_pages.flatten(1, 2)
        start = first * self.page_size
        if num_kept > 0 and first != self.first_page[user]:
            # Cloned: old and new pages may overlap.
            rows[:, start : start + num_kept] = self.read(user, num_kept).clone()
        rows[:, start + num_kept : start + num_rows] = kv
        if user in self.first_page:
            self.drop(user, self.evicted)
        self.drop_reason.pop(user, "")
        self.is_free[first : first + self.pages_of(num_rows)] = False
        self.first_page[user] = first
        self.num_rows[user] = num_rows
        self.first_event[user] = first_event
        self.encoded_at[user] = encoded_at
        # Cloned: the host may overwrite its tensors.
        self.events[user] = [column.clone() for column in events]
        return True

    def make_room(self, user: int, num_pages: int, pinned: dict[int, int]) -> int:
        """Evict the least recently used users until ``find_run`` succeeds; -1 if it never does."""
        if num_pages > self.is_free.size(0):
            return -1
        first = self.find_run(user, num_pages)
        users = list(self.first_page.keys())
        index = 0
        while first < 0 and index < len(users):
            if users[index] != user and users[index] not in pinned:
                self.drop(users[index], self.evicted)
                first = self.find_run(user, num_pages)
            index += 1
        return first

    def find_run(self, user: int, num_pages: int) -> int:
        """Find consecutive pages that are free or the user's own; return the first, or -1.

        The user's own first page is preferred.
        """
        is_free = self.is_free
        own = -1
        if user in self.first_page:
            own = self.first_page[user]
            is_free = is_free.clone()
            is_free[own : own + self.pages_of(self.num_rows[user])] = True
        num_free = torch.constant_pad_nd(is_free.cumsum(0), [1, 0])
        starts = torch.nonzero(num_free[num_pages:] - num_free[:-num_pages] == num_pages).flatten()
        if starts.size(0) == 0:
            return -1
        if own >= 0 and bool((starts == own).any()):
            return own
        return int(starts[0].item())

    def read(self, user: int, num_rows: int) -> Tensor:
        """Return a view of the first rows [planes, R, H, D] of a user."""
        start = self.first_page.get(user, 0) * self.page_size
        return self.kv_pages.flatten(1, 2)[:, start : start + num_rows]

    def pages_of_users(self, users: list[int], rows: list[int]) -> list[list[int]]:
        """Return the page ids of each user's first rows; none for a user without rows."""
        pages: list[list[int]] = []
        for index in range(len(users)):
            first = self.first_page.get(users[index], 0)
            pages.append(list(range(first, first + self.pages_of(rows[index]))))
        return pages

    def gather_rows(self, users: list[int], rows: list[int], not_in_pages: list[Tensor]) -> Tensor:
        """Join K/V [planes, R, H, D] of users; it is read from pages if none is given."""
        parts: list[Tensor] = []
        for index, kv in enumerate(not_in_pages):
            parts.append(kv if kv.size(1) > 0 else self.read(users[index], rows[index]))
        return torch.cat(parts, dim=1)

    def pages_of(self, num_rows: int) -> int:
        """Return the number of pages that this many rows take."""
        return (num_rows + self.page_size - 1) // self.page_size

    def forget(self, user: int) -> None:
        """Drop the K/V of a user, and the reason of an earlier drop."""
        if user in self.first_page:
            self.drop(user, self.cold)
        self.drop_reason.pop(user, "")

    def clear(self, reason: str) -> None:
        """Drop the K/V of all users."""
        for user in list(self.first_page.keys()):
            self.drop(user, reason)

    def drop(self, user: int, reason: str) -> None:
        """Drop the K/V of a user, and remember the reason."""
        first = self.first_page.pop(user)
        self.is_free[first : first + self.pages_of(self.num_rows.pop(user))] = True
        self.first_event.pop(user)
        self.encoded_at.pop(user)
        self.events.pop(user)
        if len(self.drop_reason) >= self.max_remembered:
            self.drop_reason.clear()
        self.drop_reason[user] = reason

    def held_bytes(self) -> int:
        """Return the bytes of the pages that hold K/V."""
        num_held = int((~self.is_free).sum().item())
        return num_held * self.kv_pages[:, :1].numel() * 4


def leading_equal(one: Tensor, other: Tensor) -> int:
    """Count the leading values that are equal in two tensors of one length.

    Example:
        >>> leading_equal(torch.tensor([3, 4, 5]), torch.tensor([3, 7, 5]))
        1
    """
    if torch.equal(one, other):
        return one.size(0)
    return int((one != other).nonzero()[0].item())

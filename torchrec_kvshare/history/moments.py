"""From when and from where candidates look at a history, and the bias which that gives each event.

Candidates of one request share one moment, so that their bias is one row for all of them. In
training a target and its negatives share a moment, and each moment sees a prefix of the history.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_kvshare.attention.shared import Spans, hidden_bias


class Moments(NamedTuple):
    """The moments of each user, G of them, over its L events.

    Attributes:
        elapsed: per user [G, L] int64 seconds from each event to each moment.
        visible: per user [G] int64, how many of the oldest events a moment sees.
        hidden: per user [G, L] bool, the events a moment does not see; no elements if it sees all.
        of_candidate: per user [N] int64, the moment of each candidate; not read where G is 1.
    """

    elapsed: list[Tensor]
    visible: list[Tensor]
    hidden: list[Tensor]
    of_candidate: list[Tensor]


def moments_of_requests(elapsed: list[Tensor], candidate_spans: list[tuple[int, int]]) -> Moments:
    """One moment for each user, which sees all its events.

    Args:
        elapsed: per user [L] int64 seconds from each event to the request.
        candidate_spans: of each user.
    """
    visible: list[Tensor] = []
    hidden: list[Tensor] = []
    of_candidate: list[Tensor] = []
    rows: list[Tensor] = []
    for user in range(len(elapsed)):
        first, last = candidate_spans[user]
        num_events, device = elapsed[user].size(0), elapsed[user].device
        rows.append(elapsed[user].unsqueeze(0))
        visible.append(torch.full([1], num_events, dtype=torch.int64, device=device))
        hidden.append(torch.empty(0, dtype=torch.bool, device=device))
        of_candidate.append(torch.zeros([last - first], dtype=torch.int64, device=device))
    return Moments(rows, visible, hidden, of_candidate)


def moments_of_candidates(
    event_time: list[Tensor],
    candidate_time: Tensor,
    visible_events: Tensor,
    candidate_spans: list[tuple[int, int]],
    window: int,
) -> Moments:
    """Moments of candidates that see different prefixes of one history at different times.

    Args:
        event_time: per user [L] int64 Unix seconds.
        candidate_time: [C] int64 Unix seconds.
        visible_events: [C] int64, how many of its user's oldest events a candidate may see.
        candidate_spans: of each user.
        window: how many of the visible events are seen, the newest; 0 for all.
    """
    elapsed: list[Tensor] = []
    visible: list[Tensor] = []
    hidden: list[Tensor] = []
    of_candidate: list[Tensor] = []
    for user in range(len(event_time)):
        first, last = candidate_spans[user]
        asked = torch.stack([candidate_time[first:last], visible_events[first:last]])
        # A target and its negatives stand side by side and share one moment.
        moment, moment_of_candidate, _ = torch.unique_consecutive(
            asked, return_inverse=True, return_counts=True, dim=1
        )
        position = torch.arange(event_time[user].size(0), device=candidate_time.device)
        end = moment[1].unsqueeze(1)
        unseen = position >= end
        if window > 0:
            unseen = unseen | (position < end - window)
        elapsed.append(moment[0].unsqueeze(1) - event_time[user])  # [G, L]
        visible.append(moment[1])
        hidden.append(unseen)
        of_candidate.append(moment_of_candidate)
    return Moments(elapsed, visible, hidden, of_candidate)


def newest_events(spans: list[tuple[int, int]], window: int) -> list[tuple[int, int]]:
    """The last ``window`` rows of each span; all of them if it is 0.

    Example:
        >>> newest_events([(0, 5), (5, 6)], 2)
        [(3, 5), (5, 6)]
    """
    newest: list[tuple[int, int]] = []
    for first, last in spans:
        newest.append((first if window == 0 else max(first, last - window), last))
    return newest


def doubling_bucket(amount: Tensor, num_buckets: int) -> Tensor:
    """Bucket of each number: 0 below one, then one for each doubling; the last has no end.

    Example:
        >>> doubling_bucket(torch.tensor([-5, 0, 1, 2, 3, 4, 100]), 4)
        tensor([0, 0, 1, 2, 2, 3, 3])
    """
    ends = 2 ** torch.arange(num_buckets - 1, device=amount.device)
    return torch.bucketize(amount, ends, right=True)


def candidate_biases(bias_by_event: list[Tensor], moments: Moments, spans: Spans) -> list[Tensor]:
    """Biases as attention takes them, unseen events hidden.

    Args:
        bias_by_event: per user [G, L, H].
        moments: of each user.
        spans: whose candidates and rows are whose.

    Returns:
        Per user [H, 1, L] where all candidates share a moment that sees all, else [H, N, L].
    """
    biases: list[Tensor] = []
    for user in range(len(spans.candidates)):
        bias = bias_by_event[user]
        if moments.hidden[user].numel() > 0:
            bias = bias.masked_fill(moments.hidden[user].unsqueeze(2), hidden_bias())
        bias = bias.permute(2, 0, 1).contiguous()  # [H, G, L]
        if bias.size(1) != 1:
            bias = bias.index_select(1, moments.of_candidate[user])
        biases.append(bias)
    return biases

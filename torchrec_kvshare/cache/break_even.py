"""From how many events on a tier pays: a shorter history is encoded faster than it is fetched."""

from collections.abc import Mapping


def break_even_events(fetch_to_prefill: Mapping[int, float]) -> int:
    """Return the shortest history from which on fetching K/V is cheaper at all lengths measured.

    Args:
        fetch_to_prefill: time to fetch over time to encode, by events.

    Returns:
        Its events; one more than the longest if fetching the longest is not cheaper.

    Example:
        >>> break_even_events({16: 1.5, 32: 0.9, 64: 1.1, 128: 0.6, 256: 0.4})
        128
        >>> break_even_events({16: 0.5, 32: 1.2})
        33
    """
    least = max(fetch_to_prefill) + 1
    for num_events in sorted(fetch_to_prefill, reverse=True):
        if not fetch_to_prefill[num_events] < 1.0:
            break
        least = num_events
    return least

"""The cache status of an answer, decided the same way by the engine and by exported programs.

This file runs in TorchScript, which cannot read a module's constants, so it repeats the words of
``reasons.py``.
"""

from typing import NamedTuple


class Decision(NamedTuple):
    """What the cache did for one request, over all its histories.

    Attributes:
        status: ``hit``, ``partial``, ``miss`` or ``bypass``.
        reason: why it is not a hit; empty for a hit.
        cached_events: events whose K/V was cached.
        computed_events: events that are encoded.
    """

    status: str
    reason: str
    cached_events: int
    computed_events: int


def decide(
    reasons: list[str], num_events: list[int], kept_events: list[int], why_not_kept: str
) -> Decision:
    """Combine the look-ups of a request's histories into one decision.

    Args:
        reasons: for each history ``hit``, or why some of its K/V was not cached.
        num_events: of each history.
        kept_events: for each history that missed, events whose cached K/V is valid for it.
        why_not_kept: why new K/V was not kept; empty if it was kept or nothing was encoded.

    Example:
        >>> decide(["hit", "edited"], [9, 5], [0, 3], "")
        Decision(status='partial', reason='edited', cached_events=12, computed_events=2)
    """
    cached, total = 0, 0
    missed = ""
    for index, reason in enumerate(reasons):
        total += num_events[index]
        if reason == "hit":
            cached += num_events[index]
        elif num_events[index] > 0:
            cached += kept_events[index]
            missed = reason if missed == "" else missed
    if total == 0:
        return Decision("bypass", "too_short", 0, 0)
    if why_not_kept != "":
        return Decision("bypass", why_not_kept, cached, total - cached)
    if missed == "":
        return Decision("hit", "", cached, 0)
    return Decision("partial" if cached > 0 else "miss", missed, cached, total - cached)

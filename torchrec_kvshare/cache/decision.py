"""What an answer says of its cache: one decision for the engine and for exported programs.

Runs in TorchScript, which sees no module's constants: the words are those of ``reasons.py``.
"""

from typing import NamedTuple


class Decision(NamedTuple):
    """What the cache did for one request, over all of its histories.

    Attributes:
        status: ``hit``, ``partial``, ``miss`` or ``bypass``.
        reason: why not a hit; empty for one.
        cached_events: events whose K/V was there.
        computed_events: events that are encoded.
    """

    status: str
    reason: str
    cached_events: int
    computed_events: int


def decide(
    reasons: list[str], num_events: list[int], kept_events: list[int], why_not_kept: str
) -> Decision:
    """Judge the look-ups of a request's histories.

    Args:
        reasons: of each history: ``hit``, or why not all of its K/V was there.
        num_events: of each history.
        kept_events: of each history that missed, events whose cached K/V is right for it.
        why_not_kept: why new K/V was not kept; empty if it was, or there is none.

    Example:
        >>> decide(["hit", "edited"], [9, 5], [0, 3], "")
        Decision(status='partial', reason='edited', cached_events=12, computed_events=2)
    """
    cached, total = 0, 0
    missed = ""
    for place, reason in enumerate(reasons):
        total += num_events[place]
        if reason == "hit":
            cached += num_events[place]
        elif num_events[place] > 0:
            cached += kept_events[place]
            missed = reason if missed == "" else missed
    if total == 0:
        return Decision("bypass", "too_short", 0, 0)
    if why_not_kept != "":
        return Decision("bypass", why_not_kept, cached, total - cached)
    if missed == "":
        return Decision("hit", "", cached, 0)
    return Decision("partial" if cached > 0 else "miss", missed, cached, total - cached)

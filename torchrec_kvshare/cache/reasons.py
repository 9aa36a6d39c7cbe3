"""Statuses and reasons of the cache, shared by answers, look-ups and metrics."""

HIT = "hit"
PARTIAL = "partial"  # some of the K/V was there
MISS = "miss"
BYPASS = "bypass"  # scored without the cache, or new K/V was not kept

COLD = "cold"  # these events were never encoded
EXPIRED = "expired"
EVICTED = "evicted"
EDITED = "edited"
SHRUNK = "shrunk"
SLID = "slid"  # the window starts at another event: the oldest events have left
MODEL = "model"  # the cached K/V is another model's
TABLES = "tables"  # the same model's with other embedding tables
CONTEXT = "context"  # encoded with other context values
CODEC = "codec"  # written in another codec
DEADLINE = "deadline"  # a tier took too long
TIER_ERROR = "tier_error"
TOO_SHORT = "too_short"  # fewer events than min_events
NOT_ADMITTED = "not_admitted"  # no room in the page pool, or not admitted by its policy
NOT_FINITE = "not_finite"  # the K/V has NaN or infinity, which is never kept
DRIFT = "drift"  # cached scores were found wrong: the cache is off

"""What the cache did and why: words that answers, look-ups and metrics have in common."""

HIT = "hit"
PARTIAL = "partial"  # some of the K/V was there
MISS = "miss"
BYPASS = "bypass"  # nothing is kept of it

COLD = "cold"  # these events were never seen
EXPIRED = "expired"
EVICTED = "evicted"
EDITED = "edited"
SHRUNK = "shrunk"
SLID = "slid"  # the window starts elsewhere: the oldest events have left
MODEL = "model"  # what is kept is another model's
TABLES = "tables"  # of the same model with other embeddings
CONTEXT = "context"
CODEC = "codec"  # it is written in another codec
DEADLINE = "deadline"  # a tier took too long
TIER_ERROR = "tier_error"
TOO_SHORT = "too_short"  # to be worth keeping
NOT_ADMITTED = "not_admitted"  # there was no room
NOT_FINITE = "not_finite"  # the model gave NaN or infinity, which nobody keeps
DRIFT = "drift"  # cached scores were found wrong: the cache is left alone

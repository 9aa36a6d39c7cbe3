"""Names of the stages of a request, as profiles, traces and metrics show them."""

LOOKUP = "kvshare/lookup"
PREFILL = "kvshare/prefill"
EXPAND = "kvshare/expand"
SCORE = "kvshare/score"  # attend and rank together
ATTEND = "kvshare/attend"

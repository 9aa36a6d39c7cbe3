"""Names of the stages of a request, as they stand in profiles, traces and metrics."""

LOOKUP = "kvshare/lookup"
PREFILL = "kvshare/prefill"
EXPAND = "kvshare/expand"
SCORE = "kvshare/score"  # attend and rank together
ATTEND = "kvshare/attend"

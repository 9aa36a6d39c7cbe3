"""Metrics by length of history: what a model gains from the events that its targets may see.

A history's length is the number of strictly earlier events of the target's user in the whole log,
also where the model reads fewer of them.
"""

import numpy as np

from torchrec_kvshare.training.evaluate import Scored, sampled_metrics
from torchrec_kvshare.training.metrics import Measures, measures_of, metric_name, rank_metrics
from torchrec_kvshare.training.ranking import Ranked

# Fewest events of each bucket.
LEAST_BY_BUCKET = {"0-10": 0, "11-50": 11, "51-200": 51, "201-1000": 201, "more": 1001}
SAMPLED_NAMES = ("AUC", "GAUC")
RANK_NAMES = ("HR@10", "NDCG@10")
TARGETS, HELD_OUT = "targets", "held_out"


def by_history_length(scored: Scored, ranked: Ranked) -> dict[str, Measures]:
    """Compute metrics by length of history.

    Args:
        scored: the targets of ``AUC`` and ``GAUC``.
        ranked: the held-out events of ``HR@10`` and ``NDCG@10``.

    Returns:
        By bucket the number of ``targets``, the number of ``held_out`` events, and the metrics,
        AUC and GAUC of every task.
    """
    least = list(LEAST_BY_BUCKET.values())
    sampled = [metric_name(name, task) for task in scored.tasks for name in SAMPLED_NAMES]
    bucket_of_target, bucket_of_held_out = (
        np.searchsorted(least, counts, side="right") - 1
        for counts in (scored.num_earlier, ranked.num_earlier)
    )
    found = {}
    for bucket, name in enumerate(LEAST_BY_BUCKET):
        targets = scored.take(np.flatnonzero(bucket_of_target == bucket))
        positions = ranked.position[bucket_of_held_out == bucket].tolist()
        counts = measures_of({TARGETS: len(targets.keys), HELD_OUT: len(positions)})
        found[name] = (
            counts
            | sampled_metrics(targets).take(*sampled)
            | rank_metrics(positions, ranked.num_items).take(*RANK_NAMES)
        )
    return found

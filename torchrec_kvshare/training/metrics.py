"""Quality of scores, from torchrec.metrics where it has the metric.

AUC, GAUC (mean of the users' AUCs) and NE (log loss over the log loss of the mean label) are
TorchRec's. Hit rate and NDCG of one held-out item in the whole catalogue are computed from its
rank. A metric that is undefined for the given rows, such as the AUC of positives alone, is None,
and the log says why.
"""

import logging
import math

import torch
from torch import Tensor
from torchrec.metrics.auc import compute_auc
from torchrec.metrics.gauc import compute_window_auc, get_auc_states
from torchrec.metrics.ne import compute_ne, get_ne_states

logger = logging.getLogger(__name__)

Values = dict[str, float | None]  # by name of the metric

CUTOFF = 10  # items: length of the list shown to a user, for the rank metrics
ETA = 1e-12  # torchrec.metrics' own guard against log(0)
USERS_AT_A_TIME = 64  # bounds memory: TorchRec pads their rows to the longest


def classification_metrics(probabilities: Tensor, labels: Tensor, rows_per_user: Tensor) -> Values:
    """Compute AUC, GAUC and NE of predicted probabilities.

    Args:
        probabilities: [R] float, grouped by user.
        labels: [R] float, 0 or 1.
        rows_per_user: [U] int64, with sum R.

    Returns:
        ``AUC``, ``GAUC`` and ``NE``. All are None if the labels are of one class; GAUC is None if
        no user has both classes and different scores.

    Source:
        torchrec.metrics; NE: He et al. 2014, "Practical Lessons from Predicting Clicks on Ads".
    """
    num_positive = int(labels.sum())
    if num_positive in (0, len(labels)):
        logger.warning(
            "no AUC, GAUC or NE: %d of %d labels are positive", num_positive, len(labels)
        )
        return {"AUC": None, "GAUC": None, "NE": None}
    predictions, labels, weights = probabilities[None], labels[None], torch.ones(1, len(labels))
    return {
        "AUC": float(compute_auc(1, [predictions], [labels], [weights])[0]),
        "GAUC": _gauc(labels, predictions, weights, rows_per_user),
        "NE": _ne(labels, predictions, weights),
    }


def rank_metrics(ranks: list[int]) -> Values:
    """Compute hit rate and NDCG of one relevant item per user.

    Args:
        ranks: rank of the held-out item in its user's ranking, from 0.

    Returns:
        ``HR@10`` and ``NDCG@10``, means over users; None if there are no users.

    Example:
        >>> rank_metrics([0, 1, 99])
        {'HR@10': 0.6666666666666666, 'NDCG@10': 0.5436432511904858}
    """
    names = f"HR@{CUTOFF}", f"NDCG@{CUTOFF}"
    if not ranks:
        logger.warning("no %s or %s: no user has a held-out item", *names)
        return dict.fromkeys(names)
    gains = [1 / math.log2(rank + 2) for rank in ranks if rank < CUTOFF]
    return {names[0]: len(gains) / len(ranks), names[1]: sum(gains) / len(ranks)}


def num_ahead(scores: Tensor, target: Tensor, excluded: Tensor) -> Tensor:
    """Count the items that rank before each user's target; ties rank before it.

    Args:
        scores: [W, I] float, one row per user.
        target: [W] float, score of the target.
        excluded: [W, I] bool, items that do not count; True for the target if it is among them.

    Returns:
        [W] int64. Summed over the chunks of a catalogue it is the target's rank, from 0.

    Example:
        >>> scores, target = torch.tensor([[0.9, 0.5, 0.5, 0.1]]), torch.tensor([0.5])
        >>> num_ahead(scores, target, torch.tensor([[False, True, False, False]]))
        tensor([2])
    """
    # Not `scores >= target`: with NaN scores of a diverged model the target would rank first.
    return (~(scores < target[:, None]) & ~excluded).sum(1)


def _ne(labels: Tensor, predictions: Tensor, weights: Tensor) -> float:
    sums = get_ne_states(labels, predictions, weights, ETA)
    ne = compute_ne(
        sums["cross_entropy_sum"],
        sums["weighted_num_samples"],
        sums["pos_labels"],
        sums["neg_labels"],
        ETA,
    )
    return float(ne[0])


def _gauc(
    labels: Tensor, predictions: Tensor, weights: Tensor, rows_per_user: Tensor
) -> float | None:
    auc_sum, num_users = torch.zeros(1), torch.zeros(1)
    first = 0
    for counts in rows_per_user.split(USERS_AT_A_TIME):
        last = first + int(counts.sum())
        part = slice(first, last)
        states = get_auc_states(labels[:, part], predictions[:, part], weights[:, part], counts)
        auc_sum += states["auc_sum"]
        num_users += states["num_samples"]
        first = last
    if not num_users:
        logger.warning("no GAUC: no user has both labels and different scores")
        return None
    return float(compute_window_auc(auc_sum, num_users)["gauc"][0])

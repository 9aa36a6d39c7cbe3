"""Quality of scores, from torchrec.metrics where it has the measure.

AUC, GAUC (the mean of the users' AUCs) and NE (log loss over that of the mean label) are
TorchRec's; hit rate and NDCG of one held-out item in a whole catalogue are counted from its rank.
"""

import math

import torch
from torch import Tensor
from torchrec.metrics.auc import compute_auc
from torchrec.metrics.gauc import compute_window_auc, get_auc_states
from torchrec.metrics.ne import compute_ne, get_ne_states

ETA = 1e-12  # torchrec.metrics' own guard against log(0)
USERS_AT_A_TIME = 64  # their rows are padded to the longest; bounds that memory


def classification_metrics(
    probabilities: Tensor, labels: Tensor, rows_per_user: Tensor
) -> dict[str, float]:
    """AUC, GAUC and NE of predicted probabilities.

    Args:
        probabilities: [R] float, users one after the other.
        labels: [R] float, 0 or 1.
        rows_per_user: [U] int64, together R.

    Returns:
        ``AUC``, ``GAUC`` and ``NE``.

    Source:
        torchrec.metrics; NE: He et al. 2014, "Practical Lessons from Predicting Clicks on Ads".
    """
    predicted, labelled, weights = probabilities[None], labels[None], torch.ones(1, len(labels))
    auc = compute_auc(1, [predicted], [labelled], [weights])
    ne = _ne(labelled, predicted, weights)
    return {
        "AUC": float(auc[0]),
        "GAUC": _gauc(labelled, predicted, weights, rows_per_user),
        "NE": ne,
    }


def rank_metrics(ranks: list[int], cutoff: int = 10) -> dict[str, float]:
    """Hit rate and NDCG of one relevant item per user.

    Args:
        ranks: place of the held-out item in its user's ranking, from 0.
        cutoff: length of the list shown.

    Returns:
        ``HR@<cutoff>`` and ``NDCG@<cutoff>``, means over users.

    Example:
        >>> rank_metrics([0, 1, 99])
        {'HR@10': 0.6666666666666666, 'NDCG@10': 0.5436432511904858}
    """
    gains = [1 / math.log2(rank + 2) for rank in ranks if rank < cutoff]
    users = max(len(ranks), 1)
    return {f"HR@{cutoff}": len(gains) / users, f"NDCG@{cutoff}": sum(gains) / users}


def rank_of_target(scores: Tensor, target: Tensor, excluded: Tensor) -> Tensor:
    """Place of each user's target among the items that are not excluded; ties count against it.

    Args:
        scores: [W, I] float.
        target: [W] int64, the target's column.
        excluded: [W, I] bool; the target itself is never excluded.

    Returns:
        [W] int64, from 0.
    """
    own = scores.gather(1, target[:, None])
    # Not `scores >= own`: a NaN, of a model that diverged, would stand first then.
    ahead = ~(scores < own) & ~excluded
    ahead.scatter_(1, target[:, None], False)
    return ahead.sum(1)


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


def _gauc(labels: Tensor, predictions: Tensor, weights: Tensor, rows_per_user: Tensor) -> float:
    auc_sum, num_users = torch.zeros(1), torch.zeros(1)
    first = 0
    for counts in rows_per_user.split(USERS_AT_A_TIME):
        last = first + int(counts.sum())
        part = slice(first, last)
        states = get_auc_states(labels[:, part], predictions[:, part], weights[:, part], counts)
        auc_sum += states["auc_sum"]
        num_users += states["num_samples"]
        first = last
    return float(compute_window_auc(auc_sum, num_users)["gauc"][0])

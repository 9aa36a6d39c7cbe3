"""Quality of scores, from torchrec.metrics where it has the measure.

AUC, GAUC (the mean of the users' AUCs) and NE (log loss over that of the mean label) are
TorchRec's; hit rate and NDCG of one held-out item in a whole catalogue are counted from its rank.
A measure that means nothing for the rows given, such as the AUC of positives alone, is None, and
the log says why.
"""

import logging
import math

import torch
from torch import Tensor
from torchrec.metrics.auc import compute_auc
from torchrec.metrics.gauc import compute_window_auc, get_auc_states
from torchrec.metrics.ne import compute_ne, get_ne_states

logger = logging.getLogger(__name__)

Values = dict[str, float | None]  # by name of the measure

CUTOFF = 10  # length of the list shown, in the rank metrics
ETA = 1e-12  # torchrec.metrics' own guard against log(0)
USERS_AT_A_TIME = 64  # their rows are padded to the longest; bounds that memory


def classification_metrics(probabilities: Tensor, labels: Tensor, rows_per_user: Tensor) -> Values:
    """AUC, GAUC and NE of predicted probabilities.

    Args:
        probabilities: [R] float, users one after the other.
        labels: [R] float, 0 or 1.
        rows_per_user: [U] int64, together R.

    Returns:
        ``AUC``, ``GAUC`` and ``NE``; None for all where the labels are of one class, and for GAUC
        where no user has both classes and different scores.

    Source:
        torchrec.metrics; NE: He et al. 2014, "Practical Lessons from Predicting Clicks on Ads".
    """
    num_positive = int(labels.sum())
    if num_positive in (0, len(labels)):
        logger.warning(
            "no AUC, GAUC or NE: %d of %d labels are positive", num_positive, len(labels)
        )
        return {"AUC": None, "GAUC": None, "NE": None}
    predicted, labelled, weights = probabilities[None], labels[None], torch.ones(1, len(labels))
    auc = compute_auc(1, [predicted], [labelled], [weights])
    ne = _ne(labelled, predicted, weights)
    return {
        "AUC": float(auc[0]),
        "GAUC": _gauc(labelled, predicted, weights, rows_per_user),
        "NE": ne,
    }


def rank_metrics(ranks: list[int]) -> Values:
    """Hit rate and NDCG of one relevant item per user.

    Args:
        ranks: place of the held-out item in its user's ranking, from 0.

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
    """How many items stand before each user's target; ties count against it.

    Args:
        scores: [W, I] float.
        target: [W] float, the target's own score.
        excluded: [W, I] bool, items that do not count; the target is one of them if it is there.

    Returns:
        [W] int64. Summed over the chunks of a catalogue it is the target's place, from 0.

    Example:
        >>> scores, target = torch.tensor([[0.9, 0.5, 0.5, 0.1]]), torch.tensor([0.5])
        >>> num_ahead(scores, target, torch.tensor([[False, True, False, False]]))
        tensor([2])
    """
    # Not `scores >= target`: a NaN, of a model that diverged, would stand first then.
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

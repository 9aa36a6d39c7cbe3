"""Quality of scores, from torchrec.metrics where it has the metric.

AUC, GAUC (mean of the users' AUCs), NE (log loss over the log loss of the mean label) and
calibration (sum of predictions over sum of labels) are TorchRec's. Hit rate, NDCG and MRR of one
held-out item are computed from its rank. A metric that is undefined for the given rows, such as the
AUC of positives alone, has a reason in place of a value.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchrec.metrics.auc import compute_auc
from torchrec.metrics.calibration import compute_calibration, get_calibration_states
from torchrec.metrics.gauc import compute_window_auc, get_auc_states
from torchrec.metrics.ne import compute_ne, get_ne_states

logger = logging.getLogger(__name__)

Values = dict[str, float | None]  # by name of the metric

CUTOFFS = (1, 5, 10, 50, 200)  # items: lengths of the list shown to a user, for rank metrics
MAX_CUTOFF = max(CUTOFFS)
# Of the held-out item by its rank, from 0.
GAIN_BY_METRIC: dict[str, Callable[[int], float]] = {
    "HR": lambda rank: 1.0,
    "NDCG": lambda rank: 1 / math.log2(rank + 2),
    "MRR": lambda rank: 1 / (rank + 1),
}
ETA = 1e-12  # torchrec.metrics' own guard against log(0)
USERS_AT_A_TIME = 64  # bounds memory: TorchRec pads their rows to the longest


@dataclass(frozen=True)
class Measures:
    """Metrics of some scores.

    Attributes:
        values: by name; None for a metric that is undefined.
        undefined: the reason for each None, by name.
    """

    values: Values
    undefined: dict[str, str]

    def __or__(self, other: "Measures") -> "Measures":
        return Measures(self.values | other.values, self.undefined | other.undefined)

    def of_task(self, task: str) -> "Measures":
        """Return the metrics under their names for a task."""
        return Measures(
            {metric_name(name, task): value for name, value in self.values.items()},
            {metric_name(name, task): reason for name, reason in self.undefined.items()},
        )

    def take(self, *names: str) -> "Measures":
        """Return some of the metrics."""
        reasons = {name: self.undefined[name] for name in names if name in self.undefined}
        return Measures({name: self.values[name] for name in names}, reasons)

    def to_json(self) -> dict[str, Any]:
        """Return the values, with the reasons as ``undefined`` beside them if there are any."""
        reasons = {"undefined": self.undefined} if self.undefined else {}
        return self.values | reasons

    def log_undefined(self) -> None:
        """Log why metrics have no value, once for each reason."""
        for reason in dict.fromkeys(self.undefined.values()):
            names = [name for name, one in self.undefined.items() if one == reason]
            logger.warning("no %s: %s", ", ".join(names), reason)


def measures_of(found: Mapping[str, float | str]) -> Measures:
    """Return metrics, each given as its value or as the reason why it has none.

    Example:
        >>> measures_of({"AUC": 0.5, "GAUC": "there is no target"}).to_json()
        {'AUC': 0.5, 'GAUC': None, 'undefined': {'GAUC': 'there is no target'}}
    """
    reasons = {name: one for name, one in found.items() if isinstance(one, str)}
    values = {name: None if isinstance(one, str) else one for name, one in found.items()}
    return Measures(values, reasons)


def classification_metrics(
    probabilities: Tensor, labels: Tensor, rows_per_user: Tensor
) -> Measures:
    """Compute AUC, GAUC, NE and calibration of predicted probabilities.

    Args:
        probabilities: [R] float, grouped by user.
        labels: [R] float, 0 or 1.
        rows_per_user: [U] int64, with sum R.

    Returns:
        ``AUC``, ``GAUC``, ``NE`` and ``calibration``. The first three are undefined if the labels
        are of one class, AUC if all scores are equal, GAUC if no user has both classes and
        different scores, and calibration without a positive label.

    Source:
        torchrec.metrics; NE: He et al. 2014, "Practical Lessons from Predicting Clicks on Ads".
    """
    num_rows, num_positive = len(labels), int(labels.sum())
    predictions, labels, weights = probabilities[None], labels[None], torch.ones(1, num_rows)
    if num_positive in (0, num_rows):
        which = "positive" if num_positive else "negative"
        reason = f"all {num_rows} labels are {which}" if num_rows else "there is no target"
        found: dict[str, float | str] = dict.fromkeys(("AUC", "GAUC", "NE"), reason)
    else:
        found = {
            "AUC": _auc(labels, predictions, weights),
            "GAUC": _gauc(labels, predictions, weights, rows_per_user),
            "NE": _ne(labels, predictions, weights),
        }
    found["calibration"] = (
        _calibration(labels, predictions, weights) if num_positive else found["NE"]
    )
    return measures_of(found)


def metric_name(metric: str, task: str) -> str:
    """Return the name of a task's metric.

    Example:
        >>> metric_name("AUC", "like"), metric_name("AUC", "")
        ('AUC/like', 'AUC')
    """
    return f"{metric}/{task}" if task else metric


def rank_metrics(ranks: Sequence[int], num_items: int) -> Measures:
    """Compute hit rate, NDCG and MRR of one relevant item per user, at each of ``CUTOFFS``.

    Args:
        ranks: rank of the held-out item in its user's ranking, from 0; those beyond the largest
            cut-off may be lower bounds.
        num_items: number of items in a ranking.

    Returns:
        ``HR@K``, ``NDCG@K`` and ``MRR@K``, means over users; undefined if there are no users. HR@K
        is undefined too if a ranking has no more than K items: every item is a hit.

    Example:
        >>> values = rank_metrics([0, 1, 99], num_items=150).values
        >>> values["HR@10"], values["NDCG@10"], values["MRR@10"], values["HR@200"]
        (0.6666666666666666, 0.5436432511904858, 0.5, None)
    """
    found: dict[str, float | str] = {}
    for name, gain in GAIN_BY_METRIC.items():
        for cutoff in CUTOFFS:
            gains = [gain(rank) for rank in ranks if rank < cutoff]
            found[f"{name}@{cutoff}"] = sum(gains) / max(1, len(ranks))
    everything = [f"HR@{cutoff}" for cutoff in CUTOFFS if cutoff >= num_items]
    found |= dict.fromkeys(everything, f"a ranking has {num_items} items, and each is a hit")
    if not ranks:
        found = dict.fromkeys(found, "no user has a held-out item")
    return measures_of(found)


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


def _auc(labels: Tensor, predictions: Tensor, weights: Tensor) -> float | str:
    # TorchRec's AUC of equal scores is that of the order in which they came.
    if bool((predictions == predictions[0, 0]).all()):
        return f"all {predictions.numel()} scores are equal"
    return float(compute_auc(1, [predictions], [labels], [weights])[0])


def _calibration(labels: Tensor, predictions: Tensor, weights: Tensor) -> float:
    sums = get_calibration_states(labels, predictions, weights)
    return float(compute_calibration(sums["calibration_num"], sums["calibration_denom"])[0])


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
) -> float | str:
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
        return "no user has both labels and different scores"
    return float(compute_window_auc(auc_sum, num_users)["gauc"][0])

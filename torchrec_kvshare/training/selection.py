"""Which epoch's weights are a run's result, and when a run stops early."""

from dataclasses import dataclass

from torchrec_kvshare.errors import ConfigError

# Metrics of the validation split by which an epoch may be chosen: whether higher is better.
HIGHER_IS_BETTER = {"AUC": True, "GAUC": True, "NE": False, "HR@10": True, "NDCG@10": True}
RANKED = ("HR@10", "NDCG@10")  # of held-out items among the catalogue, not of sampled targets


@dataclass(frozen=True)
class Best:
    """The best epoch so far.

    Attributes:
        value: of the metric, after the epoch.
        epoch: from 0.
        step: steps trained until then, the number of the epoch's checkpoint.
    """

    value: float
    epoch: int
    step: int


def is_better(metric: str, value: float | None, best: Best | None) -> bool:
    """Return whether a value is better than the best one; an undefined one never is.

    Example:
        >>> is_better("NE", 0.8, Best(0.9, epoch=0, step=23))
        True
        >>> is_better("AUC", 0.9, Best(0.9, epoch=0, step=23))
        False
    """
    if value is None:
        return False
    if best is None:
        return True
    return value > best.value if HIGHER_IS_BETTER[metric] else value < best.value


def check_selection(keep_best: str | None, patience: int | None) -> None:
    """Refuse an unknown metric, and a patience without a metric.

    Raises:
        ConfigError: naming the key.
    """
    if keep_best is not None and keep_best not in HIGHER_IS_BETTER:
        raise ConfigError(
            f"keep_best is {keep_best!r}; null or one of {sorted(HIGHER_IS_BETTER)} is allowed"
        )
    if patience is not None and keep_best is None:
        raise ConfigError(
            f"patience is {patience}, but keep_best is null; set keep_best to the metric that must "
            f"improve, one of {sorted(HIGHER_IS_BETTER)}"
        )

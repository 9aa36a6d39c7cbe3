"""What training minimises: how candidates are ranked and, beside it, what each user's next item is.

The ranking loss is TorchRec's: binary cross entropy of every candidate, summed over the tasks. The
next-event loss is that of sequential models: of all items, which one does the user take next? It
teaches item vectors and the history's rows with every item of the catalogue, not with a few
negatives. It is a softmax, or a binary cross entropy of the target's item and all others (gBCE).

A target is predicted from the state of its user (``HistoryTower.state``) at the newest event that
it sees. So whatever a candidate may not see, this loss does not see either: later events, and
events at the target's own time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrec.datasets.utils import Batch

from torchrec_kvshare.config import GBCE, SOFTMAX
from torchrec_kvshare.features.bags import floats_of
from torchrec_kvshare.features.schema import (
    DRAW_RATIO,
    ITEM,
    SHARED_PROBABILITY,
    TARGET_PROBABILITY,
    UNKNOWN_ROW,
    VECTOR,
    candidate_key,
    shared_key,
    state_feature,
    visible_key,
)
from torchrec_kvshare.history.tower import HistoryTower
from torchrec_kvshare.model.baselines import SequentialModel
from torchrec_kvshare.model.ranking import Predicted, RankingStage

HIDDEN = -1e30  # of a logit; its probability is 0 beside any other


@dataclass(frozen=True)
class ObjectiveSettings:
    """What is minimised.

    Attributes:
        next_event: weight of the next-event loss beside the ranking loss; 0 for none.
        shared_items: maximum number of items that a target is told from; a smaller catalogue is
            taken whole.
        loss: the next-event loss, ``SOFTMAX`` or ``GBCE``.
        gbce_t: how far gBCE corrects for its draws, from 0, not at all, to 1.
        task_weights: weights of tasks in the ranking loss, by name; those of others are 1.
    """

    next_event: float = 0.0
    shared_items: int = 1024
    loss: str = SOFTMAX
    gbce_t: float = 0.75
    task_weights: Mapping[str, float] = field(default_factory=dict)


class Objective(nn.Module):
    """A ranking model and its loss, called as TorchRec's ``DLRMTrain``.

    Args:
        model: a ranking model, or a SequentialModel, which has a next-event loss only, of weight 1.
        settings: what is minimised. A model whose towers have no states has a ranking loss only.
        histories: names, in the order of the schema.
        tasks: names, in the order of the logits.
        negatives: candidates of each target beside its own item.
        has_draw_ratios: whether negatives are drawn more often the more popular they are, so that
            batches have ``DRAW_RATIO``.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: ObjectiveSettings,
        *,
        histories: Sequence[str],
        tasks: Sequence[str],
        negatives: int,
        has_draw_ratios: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.weight = 1.0 if isinstance(model, SequentialModel) else settings.next_event
        self.settings = settings
        self.task_weights = [settings.task_weights.get(task, 1.0) for task in tasks]
        self.histories = histories
        self.has_draw_ratios = has_draw_ratios
        self.of_targets = slice(None, None, 1 + negatives)  # in a batch's candidates
        self.has_next_event = self.weight > 0 and any(
            isinstance(module, HistoryTower) and module.has_state for module in model.modules()
        )
        self._stage: RankingStage | None = None
        if self.has_next_event and not isinstance(model, SequentialModel):
            self._stage = RankingStage(model)

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Return the loss; then loss, logits [C, tasks] and labels [C, tasks], detached."""
        if not self.has_next_event:
            logits = self.model(batch.dense_features, batch.sparse_features).float()
            loss = self._ranking(logits, batch)
            return loss, (loss.detach(), logits.detach(), batch.labels)
        predicted = self._predict(batch)
        logits = predicted.logits.float()
        losses = [
            self._next_event(predicted.pooled, batch, name, predicted.shared.float())
            for name in self.histories
        ]
        loss = torch.stack(losses).mean() * self.weight
        if not isinstance(self.model, SequentialModel):
            loss = loss + self._ranking(logits, batch)
        return loss, (loss.detach(), logits.detach(), batch.labels)

    def _ranking(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the tasks' binary cross entropies, each a mean over candidates, weighted.

        A candidate without a label for a task has a loss of 0 there. The mean is over all
        candidates: every label counts the same, whichever batch and rank it is in.

        An item that is drawn r times as often as if all were alike has r times the negatives, so
        its trained logit is lower by log r. Subtracted here, this is not learned: scores mean the
        same whatever negatives are drawn from.
        """
        if self.has_draw_ratios:
            ratios = floats_of(batch.sparse_features[DRAW_RATIO].values())
            logits = logits - ratios.unsqueeze(1)
        labels = batch.labels.nan_to_num(0.0)
        counts = (~batch.labels.isnan()).to(logits.dtype)
        losses = [
            functional.binary_cross_entropy_with_logits(
                logits[:, task], labels[:, task], weight=counts[:, task]
            )
            * weight
            for task, weight in enumerate(self.task_weights)
        ]
        return torch.stack(losses).sum()

    def _predict(self, batch: Batch) -> Predicted:
        if isinstance(self.model, SequentialModel):
            return self.model.predict(batch.dense_features, batch.sparse_features)
        assert self._stage is not None
        return self._stage.predict(batch.dense_features, batch.sparse_features)

    def _next_event(
        self, pooled: dict[str, Tensor], batch: Batch, history: str, shared: Tensor
    ) -> Tensor:
        """Return the loss of one history, a mean over all targets of the batch.

        Only targets that are positive for the first task and see an event of the history, and
        whose item is not shown as unknown, have a loss other than 0.
        """
        features = batch.sparse_features
        items = features[candidate_key(ITEM)].values()[self.of_targets]
        states = pooled[state_feature(history)][self.of_targets].float()
        own = (states * pooled[VECTOR][self.of_targets].float()).sum(1)
        is_own = is_own_item(items, features[shared_key(ITEM)].values())
        of_shared = floats_of(features[SHARED_PROBABILITY].values())
        of_targets = floats_of(features[TARGET_PROBABILITY].values()[self.of_targets])
        if self.settings.loss == GBCE:
            t = self.settings.gbce_t
            losses = gbce_loss(states, own, shared, is_own, of_targets, t)
        else:
            losses = next_item_loss(states, own, shared, is_own, of_targets, of_shared)
        visible = features[visible_key(history)].values()[self.of_targets]
        is_positive = batch.labels[self.of_targets, 0] > 0
        counts = is_positive & (visible > 0) & (items != UNKNOWN_ROW)
        return (losses * counts).mean()


# Wrapped, because TorchRec's train pipelines trace the objective; here they would meet a device.
@torch.fx.wrap
def is_own_item(items: Tensor, shared_items: Tensor) -> Tensor:
    """Return which shared items [S] are a target's own [P], by their table rows: [P, S]."""
    return shared_items == items.unsqueeze(1)


@torch.fx.wrap
def next_item_loss(
    states: Tensor,
    own: Tensor,
    vectors: Tensor,
    is_own: Tensor,
    own_probability: Tensor,
    probability: Tensor,
) -> Tensor:
    """Return the cross entropy of each target's item among the catalogue.

    Args:
        states: [P, E] of the targets' users.
        own: [P] logit of each target's item.
        vectors: [S, E] of items of the catalogue: all of them once, or draws.
        is_own: [P, S] which of them are the target's item.
        own_probability: [P] with which a draw is the target's item.
        probability: [S] with which a draw is that item; of the whole catalogue one by its size.

    Returns:
        [P]. Of the whole catalogue it is exact; of draws the sum over all other items is estimated
        by that over the draws, each of which stands for the more items the rarer it is drawn.

    Source:
        Sampled softmax with the logQ correction, Bengio and Senecal 2008. Full cross entropy in
        SASRec: Klenitskiy and Vasilev 2023 (arXiv:2309.07602).
    """
    logits = _others(states, vectors)
    num_others = (~is_own).sum(1).clamp(min=1).to(states.dtype)
    # The probability of a draw that is another item than the target's.
    of_others = torch.log1p(-own_probability) - num_others.log()  # [P]
    logits = logits + of_others.unsqueeze(1) - probability.log()
    logits = logits.masked_fill(is_own, HIDDEN)
    # Not one matrix with the own logit in it: it would be a copy of [P, S], forward and backward.
    return torch.logaddexp(own, torch.logsumexp(logits, dim=1)) - own


@torch.fx.wrap
def gbce_loss(
    states: Tensor,
    own: Tensor,
    vectors: Tensor,
    is_own: Tensor,
    own_probability: Tensor,
    t: float,
) -> Tensor:
    """Return the generalised binary cross entropy of each target's item and the others drawn.

    Args:
        states: [P, E] of the targets' users.
        own: [P] logit of each target's item.
        vectors: [S, E] of items of the catalogue: all of them once, or uniform draws.
        is_own: [P, S] which of them are the target's item.
        own_probability: [P], one by the size of the catalogue.
        t: from 0, plain binary cross entropy, to 1, at which the sigmoid of a logit is the
            probability of the item as if nothing were sampled.

    Returns:
        [P], a mean over the target's item and the others.

    Source:
        gSASRec, Petrov and Macdonald 2023 (arXiv:2308.07192): of k negatives the positive's
        likelihood has the exponent a (t (1 - 1/a) + 1/a), where a is k by the number of others.
    """
    logits = _others(states, vectors)
    num_others = (~is_own).sum(1).to(states.dtype)
    share = num_others * own_probability / (1.0 - own_probability)  # of all other items
    beta = 1.0 - t * (1.0 - share)
    of_others = functional.softplus(logits).masked_fill(is_own, 0.0).sum(1)
    return (beta * functional.softplus(-own) + of_others) / (1.0 + num_others)


def _others(states: Tensor, vectors: Tensor) -> Tensor:
    """Return logits [P, S] in the precision of the arguments, whatever the model computes in."""
    with torch.autocast(states.device.type, enabled=False):
        return states @ vectors.T

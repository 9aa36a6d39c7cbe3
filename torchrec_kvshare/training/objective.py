"""What training minimises: how candidates are ranked and, beside it, what each user's next item is.

The ranking loss is TorchRec's: binary cross entropy of every candidate. The next-event loss is that
of sequential models: of all items, which one does the user take next? It teaches item vectors and
the history's rows with every item of the catalogue, not with a few negatives.

A target is predicted from the state of its user (``HistoryTower.state``) at the newest event that
it sees. So whatever a candidate may not see, this loss does not see either: later events, and
events at the target's own time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrec.datasets.utils import Batch

from torchrec_kvshare.features.schema import (
    ITEM,
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
    """

    next_event: float = 0.0
    shared_items: int = 1024


class Objective(nn.Module):
    """A ranking model and its loss, called as TorchRec's ``DLRMTrain``.

    Args:
        model: a ranking model, or a SequentialModel, which has a next-event loss only, of weight 1.
        settings: what is minimised. A model whose towers have no states has a ranking loss only.
        histories: names, in the order of the schema.
        negatives: candidates of each target beside its own item.
        num_items: size of the catalogue.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: ObjectiveSettings,
        *,
        histories: Sequence[str],
        negatives: int,
        num_items: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.weight = 1.0 if isinstance(model, SequentialModel) else settings.next_event
        self.histories = histories
        self.num_items = num_items
        self.of_targets = slice(None, None, 1 + negatives)  # in a batch's candidates
        self.has_next_event = self.weight > 0 and any(
            isinstance(module, HistoryTower) and module.has_state for module in model.modules()
        )
        self._stage: RankingStage | None = None
        if self.has_next_event and not isinstance(model, SequentialModel):
            self._stage = RankingStage(model)

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Return the loss; then loss, logits [C] and labels [C], detached."""
        if not self.has_next_event:
            logits = self.model(batch.dense_features, batch.sparse_features).squeeze(1).float()
            loss = functional.binary_cross_entropy_with_logits(logits, batch.labels)
            return loss, (loss.detach(), logits.detach(), batch.labels)
        predicted = self._predict(batch)
        logits = predicted.logits.float()
        losses = [
            self._next_event(predicted.pooled, batch, name, predicted.shared.float())
            for name in self.histories
        ]
        loss = torch.stack(losses).mean() * self.weight
        if not isinstance(self.model, SequentialModel):
            loss = loss + functional.binary_cross_entropy_with_logits(logits, batch.labels)
        return loss, (loss.detach(), logits.detach(), batch.labels)

    def _predict(self, batch: Batch) -> Predicted:
        if isinstance(self.model, SequentialModel):
            return self.model.predict(batch.dense_features, batch.sparse_features)
        assert self._stage is not None
        return self._stage.predict(batch.dense_features, batch.sparse_features)

    def _next_event(
        self, pooled: dict[str, Tensor], batch: Batch, history: str, shared: Tensor
    ) -> Tensor:
        """Return the loss of one history, a mean over all targets of the batch.

        Only positive targets that see an event of the history, and whose item is not shown as
        unknown, have a loss other than 0.
        """
        features = batch.sparse_features
        items = features[candidate_key(ITEM)].values()[self.of_targets]
        states = pooled[state_feature(history)][self.of_targets].float()
        own = (states * pooled[VECTOR][self.of_targets].float()).sum(1)
        losses = next_item_loss(
            states, own, shared, items, features[shared_key(ITEM)].values(), self.num_items
        )
        visible = features[visible_key(history)].values()[self.of_targets]
        counts = (batch.labels[self.of_targets] > 0) & (visible > 0) & (items != UNKNOWN_ROW)
        return (losses * counts).mean()


@torch.fx.wrap  # TorchRec's train pipelines trace the objective; here they would meet a device.
def next_item_loss(
    states: Tensor,
    own: Tensor,
    vectors: Tensor,
    items: Tensor,
    shared_items: Tensor,
    num_items: int,
) -> Tensor:
    """Return the cross entropy of each target's item among the catalogue.

    Args:
        states: [P, E] of the targets' users.
        own: [P] logit of each target's item.
        vectors: [S, E] of items of the catalogue: all of them once, or uniform draws.
        items: [P] int64, table row of each target's item.
        shared_items: [S] int64, those of ``vectors``.
        num_items: size of the catalogue.

    Returns:
        [P]. Of the whole catalogue it is exact; of draws the sum over all other items is estimated
        by that over the draws, each of which stands for as many items.

    Source:
        Sampled softmax with the logQ correction, Bengio and Senecal 2008, of uniform draws. Full
        cross entropy in SASRec: Klenitskiy and Vasilev 2023 (arXiv:2309.07602).
    """
    # In the precision of the arguments, whatever the model computes in.
    with torch.autocast(states.device.type, enabled=False):
        logits = states @ vectors.T  # [P, S]
    is_own = shared_items == items.unsqueeze(1)
    num_others = vectors.size(0) - is_own.sum(1, keepdim=True)
    stands_for = (num_items - 1) / num_others.clamp(min=1).to(states.dtype)
    logits = (logits + stands_for.log()).masked_fill(is_own, HIDDEN)
    return torch.logsumexp(torch.cat([own.unsqueeze(1), logits], dim=1), dim=1) - own

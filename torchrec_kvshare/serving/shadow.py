"""Shadow parity: a share of cached answers is scored again without the cache, in idle time.

If the scores differ, the model is scored without its cache from then on, and an alarm is set until
another version takes over.
"""

import math
import random
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_kvshare.cache.reasons import BYPASS, MISS
from torchrec_kvshare.errors import ScoreError
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.scoring.encoded_user import EncodedUser
from torchrec_kvshare.scoring.engine import Answer, Engine, Unscored
from torchrec_kvshare.verify.parity import probabilities_of

MAX_WAITING = 32  # answers that wait to be checked; the oldest are dropped


class Sample(NamedTuple):
    """An answer to check; its scores [N, tasks] are None if they were not finite."""

    engine: Engine
    request: Request
    scores: Tensor | None


@dataclass(frozen=True)
class _Begun:
    """A sample that is partly scored again."""

    sample: Sample
    user: EncodedUser  # of an engine without a cache
    scores: list[Tensor] = field(default_factory=list)  # by part

    @property
    def num_scored(self) -> int:
        """Number of candidates that are scored again."""
        return sum(map(len, self.scores))


class ShadowParity:
    """Samples cached answers and compares them with uncached scores.

    Args:
        share: of cached answers that are checked, 0 to 1.
        part_candidates: scored at a time; a request that comes meanwhile waits for no more.
        seed: of the sampling.

    Example:
        >>> ShadowParity(share=0.01, part_candidates=1024).check() is None
        True
    """

    def __init__(self, share: float, part_candidates: int, seed: int = 0) -> None:
        self._share = share
        self._part_candidates = part_candidates
        self._draw = random.Random(seed)
        self._waiting: deque[Sample] = deque(maxlen=MAX_WAITING)
        self._lock = threading.Lock()  # The scoring thread checks, other threads forget users.
        self._begun: _Begun | None = None

    def offer(self, engine: Engine, request: Request, answer: Answer | Unscored) -> None:
        """Sample an answer, unless it read nothing from the cache.

        Cached K/V whose scores are not finite is always checked: the cache may be the cause.
        """
        if answer.cache.status in (MISS, BYPASS) and answer.cache.cached_events == 0:
            return
        if isinstance(answer, Unscored):
            is_kept, scores = self._share > 0.0, None
        else:
            is_kept, scores = self._draw.random() < self._share, probabilities_of([answer])
        if is_kept:
            with self._lock:
                self._waiting.append(Sample(engine, request, scores))

    def forget(self, user_id: str) -> None:
        """Drop all answers of a user."""
        with self._lock:
            others = [one for one in self._waiting if one.request.user_id != user_id]
            self._waiting = deque(others, MAX_WAITING)
            if self._begun is not None and self._begun.sample.request.user_id == user_id:
                self._begun = None

    def check(self) -> tuple[Sample, float] | None:
        """Score the next part of a sample without the cache.

        Returns:
            None until all candidates of a sample are scored, and if there is no sample. Then the
            sample and the greatest difference of a probability of any task, infinite if only one of
            the two is finite.
        """
        with self._lock:
            begun, self._begun = self._begun, None  # If this one raises, the next call goes on.
            if begun is None and not self._waiting:
                return None
            waiting = None if begun is not None else self._waiting.popleft()
        if waiting is not None:
            begun = _begin(waiting)
        assert begun is not None
        sample, first = begun.sample, begun.num_scored
        part = sample.request.part(first, first + self._part_candidates)
        try:
            begun.scores.append(begun.user.score(part, first))
        except ScoreError:
            # The model has no finite scores; the cache is wrong only if it gave some.
            return sample, 0.0 if sample.scores is None else math.inf
        if begun.num_scored < sample.request.num_candidates:
            self._begun = begun
            return None
        if sample.scores is None:
            return sample, math.inf
        moved = (torch.cat(begun.scores) - sample.scores).abs()
        return sample, float(moved.max()) if moved.numel() else 0.0

    @property
    def has_more(self) -> bool:
        """Whether a sample waits or is partly scored."""
        return bool(self._waiting) or self._begun is not None


def _begin(sample: Sample) -> _Begun:
    engine = sample.engine
    uncached = Engine(engine.model, engine.schema, None, version=engine.version)
    return _Begun(sample, EncodedUser(uncached, sample.request))

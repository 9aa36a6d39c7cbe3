"""Proof in production: cached answers are scored again without the cache, in idle time.

What is found wrong is never explained away: the model is scored without its cache from then on, and
the alarm stands until another version takes over.
"""

import math
import random
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from torchrec_kvshare.cache.reasons import BYPASS, MISS
from torchrec_kvshare.errors import ScoreError
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.scoring.engine import Answer, Engine, Unscored

MAX_WAITING = 32  # answers that wait for an idle moment; the oldest are given up


class Sample(NamedTuple):
    """An answer that is to be checked; None stands for scores that were not finite."""

    engine: Engine
    request: Request
    scores: list[float] | None


@dataclass(frozen=True)
class _Begun:
    """A sample of which some candidates were scored again."""

    sample: Sample
    engine: Engine  # without the cache
    kv_by_history: Sequence[Tensor]
    scores: list[float] = field(default_factory=list)


class ShadowParity:
    """Samples of cached answers, and how far they are from uncached ones.

    Args:
        share: of the cached answers that are kept to be checked, 0 to 1.
        part_candidates: scored together: nobody who comes meanwhile waits for more.
        seed: of the draw.

    Example:
        >>> ShadowParity(share=0.01, part_candidates=1024).check() is None
        True
    """

    def __init__(self, share: float, part_candidates: int, seed: int = 0) -> None:
        self._share = share
        self._part_candidates = part_candidates
        self._draw = random.Random(seed)
        self._waiting: deque[Sample] = deque(maxlen=MAX_WAITING)
        self._lock = threading.Lock()  # The scoring thread checks, and others forget users.
        self._begun: _Begun | None = None

    def offer(self, engine: Engine, request: Request, answer: Answer | Unscored) -> None:
        """Maybe keep an answer for later; one that read nothing from the cache proves nothing.

        Where cached K/V gave no finite scores, the cache may be why: that is always checked.
        """
        if answer.cache.status in (MISS, BYPASS) and answer.cache.cached_events == 0:
            return
        if isinstance(answer, Unscored):
            is_kept, scores = self._share > 0.0, None
        else:
            is_kept, scores = self._draw.random() < self._share, answer.scores
        if is_kept:
            with self._lock:
                self._waiting.append(Sample(engine, request, scores))

    def forget(self, user_id: str) -> None:
        """Keep no answer of a user."""
        with self._lock:
            others = [one for one in self._waiting if one.request.user_id != user_id]
            self._waiting = deque(others, MAX_WAITING)
            if self._begun is not None and self._begun.sample.request.user_id == user_id:
                self._begun = None

    def check(self) -> tuple[Sample, float] | None:
        """Score a sample's next candidates without the cache, as many as a step has of a request.

        Returns:
            Once all are scored, the sample and the greatest difference of a probability, infinite
            if only one of the two is a number; None before that, and if there is no sample.
        """
        with self._lock:
            begun, self._begun = self._begun, None  # Whatever is raised below, another is next.
            if begun is None and not self._waiting:
                return None
            waiting = None if begun is not None else self._waiting.popleft()
        if waiting is not None:
            begun = _begin(waiting)
        assert begun is not None
        sample, first = begun.sample, len(begun.scores)
        part = sample.request.part(first, first + self._part_candidates)
        try:
            begun.scores.extend(begun.engine.score_with(part, begun.kv_by_history, first))
        except ScoreError:
            # The model itself has none; the cache is wrong only if it had some.
            return sample, 0.0 if sample.scores is None else math.inf
        if len(begun.scores) < sample.request.num_candidates:
            self._begun = begun
            return None
        if sample.scores is None:
            return sample, math.inf
        pairs = zip(begun.scores, sample.scores, strict=True)
        return sample, max((abs(ours - theirs) for ours, theirs in pairs), default=0.0)

    @property
    def has_more(self) -> bool:
        """Whether a sample waits, or was begun."""
        return bool(self._waiting) or self._begun is not None


def _begin(sample: Sample) -> _Begun:
    engine = sample.engine
    uncached = Engine(engine.model, engine.schema, None, version=engine.version)
    return _Begun(sample, uncached, uncached.encode(sample.request).kv_by_history)

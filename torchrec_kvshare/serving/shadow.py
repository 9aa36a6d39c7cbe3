"""Proof in production: cached answers are scored again without the cache, in idle time.

What is found wrong is never explained away: the model is scored without its cache from then on, and
the alarm stands until another version takes over.
"""

import random
from collections import deque
from typing import NamedTuple

from torchrec_kvshare.cache.reasons import BYPASS, MISS
from torchrec_kvshare.engine import Answer, Engine
from torchrec_kvshare.features import Request

MAX_WAITING = 32  # answers that wait for an idle moment; the oldest are given up


class Sample(NamedTuple):
    """An answer that is to be checked."""

    engine: Engine
    request: Request
    scores: list[float]


class ShadowParity:
    """Samples of cached answers, and how far they are from uncached ones.

    Args:
        share: of the cached answers that are kept to be checked, 0 to 1.
        seed: of the draw.

    Example:
        >>> ShadowParity(share=0.01).check() is None
        True
    """

    def __init__(self, share: float, seed: int = 0) -> None:
        self._share = share
        self._draw = random.Random(seed)
        self._waiting: deque[Sample] = deque(maxlen=MAX_WAITING)

    def offer(self, engine: Engine, request: Request, answer: Answer) -> None:
        """Maybe keep an answer for later; one that read nothing from the cache proves nothing."""
        if answer.cache.status in (MISS, BYPASS) and answer.cache.cached_events == 0:
            return
        if self._draw.random() < self._share:
            self._waiting.append(Sample(engine, request, answer.scores))

    def check(self) -> tuple[Sample, float] | None:
        """Score one sample without the cache.

        Returns:
            The sample and the greatest difference of a probability; None if there is none.
        """
        if not self._waiting:
            return None
        sample = self._waiting.popleft()
        engine = sample.engine
        uncached = Engine(engine.model, engine.schema, engine.model_version, None)
        [answer] = uncached.rank([sample.request])
        pairs = zip(answer.scores, sample.scores, strict=True)
        return sample, max((abs(ours - theirs) for ours, theirs in pairs), default=0.0)

    @property
    def has_more(self) -> bool:
        """Whether a sample waits."""
        return bool(self._waiting)

"""The engine that answers now, and how a new model takes over: warm, and between two requests."""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from torchrec_kvshare.engine import Answer, Engine
from torchrec_kvshare.errors import ConfigError, RequestError
from torchrec_kvshare.features import parse_request, parse_user

WARM_BATCH = 8  # users encoded together


class LiveEngine:
    """Answers raw requests with the current model, and remembers who asks most often.

    Args:
        engine: the current model's.
        num_hot: users whose last request is remembered, so that a new model can be warmed.

    Raises:
        ConfigError: if ``num_hot`` is below 1.
    """

    def __init__(self, engine: Engine, num_hot: int = 256) -> None:
        if num_hot < 1:
            raise ConfigError(f"num_hot is {num_hot}; it must be at least 1")
        self.engine = engine
        self._num_hot = num_hot
        self._recent: OrderedDict[str, tuple[int, Mapping[str, Any]]] = OrderedDict()
        self._lock = threading.Lock()

    def rank(self, raws: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """Score raw requests in one batch, all by one model.

        Raises:
            RequestError: for the first that cannot be scored; then none is.
        """
        engine = self.engine
        requests = [parse_request(raw, engine.schema) for raw in raws]
        answers = engine.rank(requests)
        with self._lock:
            for request, raw in zip(requests, raws, strict=True):
                times, _ = self._recent.pop(request.user_id, (0, raw))
                self._recent[request.user_id] = (times + 1, raw)
            while len(self._recent) > self._num_hot:
                self._forget_coldest()
        return answers

    def publish(self, successor: Engine) -> int:
        """Warm a new model with the users that ask most, then let it answer.

        Requests that came before are answered by the old model; both may share a stack of tiers.

        Args:
            successor: the new model's engine.

        Returns:
            How many users are warm; a request that the new model cannot read is left out.
        """
        users = []
        for raw in self.hottest():
            try:
                users.append(parse_user(raw, successor.schema))
            except RequestError:
                continue  # It is of a user whom the new model will refuse as well.
        for first in range(0, len(users), WARM_BATCH):
            successor.prefetch(users[first : first + WARM_BATCH])
        self.engine = successor
        return len(users)

    def hottest(self) -> list[Mapping[str, Any]]:
        """Last requests of the remembered users, of whom asked most often first."""
        with self._lock:
            ranked = sorted(self._recent.values(), key=lambda one: one[0], reverse=True)
        return [raw for _, raw in ranked]

    def _forget_coldest(self) -> None:
        """Of the older half, who asked least: a newcomer has a chance to become hot."""
        older = list(self._recent)[: (len(self._recent) + 1) // 2]
        del self._recent[min(older, key=lambda user_id: self._recent[user_id][0])]

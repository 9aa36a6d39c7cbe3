"""The program that TorchScript exports: a ranking model over plain tensors, for any host language.

``features/tensors.py`` defines the tensors. The program builds TorchRec's batches itself, and
``rank`` keeps K/V between calls in its own caches. Runs in TorchScript.
"""

from typing import Final

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_kvshare.cache.decision import Decision, decide
from torchrec_kvshare.cache.reasons import (
    BYPASS,
    COLD,
    EDITED,
    EVICTED,
    EXPIRED,
    HIT,
    MISS,
    MODEL,
    NOT_ADMITTED,
    PARTIAL,
    SHRUNK,
    SLID,
    TOO_SHORT,
)
from torchrec_kvshare.export.inputs import (
    check_finite,
    check_num_ids,
    check_range,
    check_scores,
    check_times,
    sums_by_row,
)
from torchrec_kvshare.export.program_cache import ProgramCache
from torchrec_kvshare.features.bags import bits_of
from torchrec_kvshare.features.hashing import MAX_INT64
from torchrec_kvshare.features.limits import MAX_REQUEST_IDS
from torchrec_kvshare.features.schema import (
    FIRST_EVENT,
    ITEM,
    REQUEST_TIME,
    TIME,
    USER,
    FeatureSchema,
    History,
    candidate_key,
    context_key,
    first_index_key,
    history_key,
    pages_key,
)
from torchrec_kvshare.features.tensors import DENSE, INT64, USER_KEY, input_specs
from torchrec_kvshare.history.pages import offsets_of
from torchrec_kvshare.model.ranking import RankingModel

CAPACITY_BYTES = 256 * 2**20
TTL_S = 300.0
REASONS = ("", COLD, EXPIRED, EVICTED, EDITED, SHRUNK, SLID, MODEL, TOO_SHORT, NOT_ADMITTED)

Part = tuple[str, Tensor, Tensor]  # key, values, lengths


class ProgramHistory(nn.Module):
    """One history of a program: its cache, and its events by request and as keys of a batch.

    Args:
        history: its name and window.
        event_columns: columns with one id per event.
        event_floats: columns with one float per event.
        item_attributes: multi-valued columns of events.
        kv_shape: planes, heads and head width of its K/V.
    """

    request_time_key: Final[str] = TIME

    column_keys: list[str]
    float_keys: list[str]
    bag_keys: list[str]

    def __init__(
        self,
        history: History,
        event_columns: tuple[str, ...],
        event_floats: tuple[str, ...],
        item_attributes: tuple[str, ...],
        kv_shape: tuple[int, int, int],
    ) -> None:
        super().__init__()
        name = history.name
        self.column_keys = [history_key(name, c) for c in (*event_columns, *event_floats, TIME)]
        self.float_keys = [history_key(name, c) for c in event_floats]
        self.bag_keys = [history_key(name, c) for c in item_attributes]
        self.time_key: str = history_key(name, TIME)
        self.pages_key: str = pages_key(name)
        self.first_index_key: str = first_index_key(name)
        self.first_event_key: str = history_key(name, FIRST_EVENT)
        self.cache = ProgramCache(*kv_shape, len(self.column_keys))

    def check(self, features: dict[str, Tensor], num_requests: int) -> None:
        """Refuse tensors of different lengths, floats that are none, and times out of order.

        The error names a tensor.
        """
        for key in self.float_keys:
            check_floats(features, key + ".values")
            if features[key + ".values"].dim() != 1:
                raise ValueError(f"{key}.values has more than one dimension")
        counts = lengths_of(features, self.column_keys[0], num_requests)
        for key in self.column_keys[1:]:
            if not torch.equal(lengths_of(features, key, num_requests), counts):
                raise ValueError(f"{key}.lengths differs from {self.column_keys[0]}.lengths")
        num_events = int(counts.sum())
        for key in self.bag_keys:
            lengths_of(features, key, num_events)
        request_times: list[int] = features[self.request_time_key].tolist()
        num_of_requests: list[int] = counts.tolist()
        first_index = 0
        name = self.time_key + ".values"
        for request, times in enumerate(torch.split(features[name], num_of_requests)):
            check_times(name, times, request_times[request], first_index)
            first_index += times.size(0)

    def num_ids(self, features: dict[str, Tensor]) -> Tensor:
        """Count the ids [B] in the bags of each request's events."""
        counts = features[self.time_key + ".lengths"]
        num_ids = torch.zeros_like(counts)
        for key in self.bag_keys:
            num_ids = num_ids + sums_by_row(features[key + ".lengths"], counts)
        return num_ids

    def split(self, features: dict[str, Tensor]) -> list[list[Tensor]]:
        """Split the events by request: the columns, then lengths and values of each bag.

        Floats are split as their bits: batches and the cache hold integers.
        """
        counts: list[int] = features[self.time_key + ".lengths"].tolist()
        by_column: list[list[Tensor]] = []
        for key in self.column_keys:
            values = features[key + ".values"]
            if key in self.float_keys:
                values = bits_of(values)
            by_column.append(list(torch.split(values, counts)))
        for key in self.bag_keys:
            lengths = list(torch.split(features[key + ".lengths"], counts))
            num_values = [int(part.sum()) for part in lengths]
            by_column.append(lengths)
            by_column.append(list(torch.split(features[key + ".values"], num_values)))
        return [[column[request] for column in by_column] for request in range(len(counts))]

    def tail(self, events: list[Tensor], first: int) -> list[Tensor]:
        """Return the events of a request from index ``first`` on."""
        if first == 0:
            return events
        num_columns = len(self.column_keys)
        rest = [column[first:] for column in events[:num_columns]]
        for bag in range(num_columns, len(events), 2):
            num_before = int(events[bag][:first].sum())
            rest.append(events[bag][first:])
            rest.append(events[bag + 1][num_before:])
        return rest

    def parts(self, events: list[list[Tensor]]) -> list[Part]:
        """Join the events of several requests to keys of a batch."""
        parts: list[Part] = []
        counts = torch.tensor([columns[0].size(0) for columns in events])
        for index, key in enumerate(self.column_keys):
            parts.append((key, torch.cat([columns[index] for columns in events]), counts))
        for index, key in enumerate(self.bag_keys):
            bag = len(self.column_keys) + 2 * index
            lengths = torch.cat([columns[bag] for columns in events])
            parts.append((key, torch.cat([columns[bag + 1] for columns in events]), lengths))
        return parts

    def pages_part(self, pages: list[list[int]]) -> Part:
        """Join the page ids of each request to a key of a batch."""
        ids: list[int] = []
        for of_request in pages:
            ids += of_request
        counts = torch.tensor([len(of_request) for of_request in pages])
        return self.pages_key, torch.tensor(ids, dtype=torch.int64), counts

    def time_part(self, events: list[list[Tensor]]) -> Part:
        """Join the times to a key of a batch: scoring over cached K/V reads no other column."""
        time = len(self.column_keys) - 1
        counts = torch.tensor([columns[time].size(0) for columns in events])
        return self.time_key, torch.cat([columns[time] for columns in events]), counts


class RankingProgram(nn.Module):
    """The interface of an exported model.

    Args:
        ranking: the model, whose methods take TorchRec's batches.
        schema: its columns.
        model_version: the version that answers have.
        may_keep: whether its audit allows K/V between requests; otherwise ``rank`` raises.
        may_extend: whether its audit allows K/V to be extended.

    Attributes:
        ranking: the model, for hosts that build TorchRec's batches themselves.
    """

    user_key: Final[str] = USER
    cache_key: Final[str] = USER_KEY
    model: Final[str] = MODEL
    time_key: Final[str] = TIME
    request_time: Final[str] = REQUEST_TIME
    dense: Final[str] = DENSE
    hit: Final[str] = HIT
    partial: Final[str] = PARTIAL
    miss: Final[str] = MISS
    bypass: Final[str] = BYPASS
    too_short: Final[str] = TOO_SHORT
    not_admitted: Final[str] = NOT_ADMITTED
    max_request_ids: Final[int] = MAX_REQUEST_IDS
    default_capacity_bytes: Final[int] = CAPACITY_BYTES
    default_ttl_s: Final[float] = TTL_S

    input_names: list[str]
    least: list[int]
    most: list[int]
    context_keys: list[str]
    bag_keys: list[str]
    reasons: list[str]
    tasks: list[str]
    shares: list[float]

    def __init__(
        self,
        ranking: RankingModel,
        schema: FeatureSchema,
        model_version: str,
        may_keep: bool = True,
        may_extend: bool = True,
    ) -> None:
        super().__init__()
        self.may_keep = may_keep
        self.may_extend = may_extend
        self.ranking = ranking
        self.model_version = model_version
        specs = [spec for spec in input_specs(schema) if spec.dtype == INT64]
        self.input_names = [spec.name for spec in specs]
        self.least = [-MAX_INT64 - 1 if spec.least is None else spec.least for spec in specs]
        self.most = [MAX_INT64 if spec.most is None else spec.most for spec in specs]
        self.context_keys = [context_key(column) for column in schema.context]
        self.num_dense: int = schema.num_dense
        self.tasks = list(schema.tasks)
        self.item_key: str = candidate_key(ITEM)
        self.bag_keys = [candidate_key(column) for column in schema.item_attributes]
        self.histories = nn.ModuleList()
        weights: list[int] = []
        columns = (schema.event_columns, schema.event_floats, schema.item_attributes)
        for history, tower in zip(schema.histories, ranking.collection.towers(), strict=True):
            self.histories.append(ProgramHistory(history, *columns, tower.kv_shape))
            max_rows = tower.encoder.num_kv_rows(history.window.max_history)
            weights.append(tower.kv_shape[0] * max_rows)
        # Histories share a capacity in proportion to the K/V of a full window.
        self.shares = [weight / sum(weights) for weight in weights]
        self.is_configured = False
        self.reasons = list(REASONS)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Return probabilities [C, tasks] float64; encode every history and keep nothing."""
        self.check(features)
        parts = self.request_parts(features) + self.event_parts(self.split_events(features))
        batch = batch_of(parts, self.request_of_candidates(features))
        logits = torch.empty([0, len(self.tasks)])
        # A ranking stage takes no empty batch.
        if features[self.dense].size(0) > 0:
            with torch.no_grad():
                logits = self.ranking(features[self.dense], batch)
        return probabilities(logits)

    @torch.jit.export
    def prefill(self, features: dict[str, Tensor]) -> list[Tensor]:
        """Return for each history K/V [planes, R, H, D] of all requests, one after the other."""
        self.check(features)
        events = self.split_events(features)
        nothing = [history.cache.read(0, 0) for history in self.histories]
        none = [[0 for _ in of_history] for of_history in events]
        return self.encode(events, nothing, none, none)

    @torch.jit.export
    def extend(
        self, features: dict[str, Tensor], cached: list[Tensor], cached_events: list[list[int]]
    ) -> list[Tensor]:
        """Return for each history the K/V of new events that follow cached events.

        Args:
            features: the new events only.
            cached: for each history [planes, R, H, D], the rows of the cached events.
            cached_events: for each history the number of reusable events of each request.
        """
        self.check(features)
        by_request: list[list[tuple[int, int]]] = []
        for request in range(len(cached_events[0])):
            counts = [of_history[request] for of_history in cached_events]
            by_request.append(self.ranking.reusable(counts, counts, counts))
        rows = [[one[index][1] for one in by_request] for index in range(len(cached))]
        return self.encode(self.split_events(features), cached, cached_events, rows)

    @torch.jit.export
    def reusable(
        self, num_matched: list[int], cached_events: list[int], num_events: list[int]
    ) -> list[tuple[int, int]]:
        """Return for each history the events and rows that can be extended, as the model does."""
        return self.ranking.reusable(num_matched, cached_events, num_events)

    @torch.jit.export
    def num_kv_rows(self, num_events: list[int]) -> list[int]:
        """Return for each history the rows of K/V that this many events have."""
        return self.ranking.num_kv_rows(num_events)

    @torch.jit.export
    def score(self, features: dict[str, Tensor], kv: list[Tensor]) -> Tensor:
        """Return probabilities [C, tasks] float64 over K/V from ``prefill`` and ``extend``.

        Args:
            features: of the events only the times are read.
            kv: for each history [planes, R, H, D], all rows of all requests, one after the other.
        """
        self.check(features)
        events = self.split_events(features)
        tables = [one.unsqueeze(2) for one in kv]
        pages = [one_page_for_each(rows) for rows in self.rows_of_requests(events)]
        return self.score_pages(features, events, tables, pages)

    @torch.jit.export
    def rank(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Score through the program's own cache; encode misses request by request.

        Returns:
            Probabilities [C, tasks] float64, and [B, 4] int64: indices into ``status_names`` and
            ``reason_names``, cached events and computed events.

        Raises:
            ValueError: if the model's audit allows no K/V between requests.
        """
        if not self.may_keep:
            raise ValueError("the model failed its audit: no K/V is kept, call forward")
        self.check(features)
        if not self.is_configured:
            self.configure(self.default_capacity_bytes, self.default_ttl_s)
        events = self.split_events(features)
        users: list[int] = features[self.cache_key].tolist()
        first_events: list[list[int]] = []
        for history in self.histories:
            starts: list[int] = features[history.first_event_key].tolist()
            first_events.append(starts)
        times: list[int] = features[self.time_key].tolist()
        # Users of this batch, whose pages must stay.
        pinned: dict[int, int] = {}
        # By request and history; without rows if the K/V is in pages.
        kv_by_request: list[list[Tensor]] = []
        use: list[list[int]] = []
        for request, user in enumerate(users):
            own_events = [of_history[request] for of_history in events]
            own_firsts = [of_history[request] for of_history in first_events]
            own_kv, own_use = self.acquire(user, own_events, own_firsts, times[request], pinned)
            pinned[user] = request
            use.append(own_use)
            kv_by_request.append(own_kv)
        rows = self.rows_of_requests(events)
        tables: list[Tensor] = []
        pages: list[list[list[int]]] = []
        for index, history in enumerate(self.histories):
            not_in_pages = [own_kv[index] for own_kv in kv_by_request]
            if sum([kv.size(1) for kv in not_in_pages]) == 0:
                tables.append(history.cache.kv_pages)
                pages.append(history.cache.pages_of_users(users, rows[index]))
            else:
                kv = history.cache.gather_rows(users, rows[index], not_in_pages)
                tables.append(kv.unsqueeze(2))
                pages.append(one_page_for_each(rows[index]))
        return self.score_pages(features, events, tables, pages), torch.tensor(use).view(-1, 4)

    @torch.jit.export
    def status_names(self) -> list[str]:
        """Return the names of the statuses in the first column of ``rank``."""
        return [self.hit, self.partial, self.miss, self.bypass]

    @torch.jit.export
    def reason_names(self) -> list[str]:
        """Return the names of the reasons in the second column of ``rank``; empty for a hit."""
        return self.reasons

    @torch.jit.export
    def task_names(self) -> list[str]:
        """Return the names of the tasks, whose probabilities stand side by side."""
        return self.tasks

    @torch.jit.export
    def configure(self, capacity_bytes: int, ttl_s: float) -> None:
        """Start with an empty cache of ``capacity_bytes``; K/V expires after ``ttl_s``."""
        for index, history in enumerate(self.histories):
            history.cache.configure(int(capacity_bytes * self.shares[index]), ttl_s)
        self.is_configured = True

    @torch.jit.export
    def forget(self, user: int) -> None:
        """Drop the K/V of a user."""
        for history in self.histories:
            history.cache.forget(user)

    @torch.jit.export
    def renew(self, model_version: str) -> None:
        """Drop all K/V, after the host has put other weights into this program."""
        self.model_version = model_version
        for history in self.histories:
            history.cache.clear(self.model)

    @torch.jit.export
    def held_bytes(self) -> int:
        """Return the bytes of the pages that hold K/V."""
        num_bytes = 0
        for history in self.histories:
            num_bytes += history.cache.held_bytes()
        return num_bytes

    def acquire(
        self,
        user: int,
        events: list[list[Tensor]],
        first_events: list[int],
        time: int,
        pinned: dict[int, int],
    ) -> tuple[list[Tensor], list[int]]:
        """Look up a request's K/V; encode and keep what is missing.

        Returns:
            For each history the K/V, without rows if it is in pages; and the request's row of
            ``rank``.
        """
        kv: list[Tensor] = []
        reasons: list[str] = []
        num_matched: list[int] = []
        num_cached: list[int] = []
        for index, history in enumerate(self.histories):
            kv.append(history.cache.read(user, 0))
            reason, matched, cached = self.too_short, 0, 0
            if events[index][0].size(0) > 0:
                reason, matched, cached = history.cache.lookup(
                    user, events[index], first_events[index], time
                )
            reasons.append(reason)
            num_matched.append(matched if self.may_extend else 0)
            num_cached.append(cached)
        num_events = [columns[0].size(0) for columns in events]
        reusable = self.ranking.reusable(num_matched, num_cached, num_events)
        kept = [one[0] for one in reusable]
        decision = decide(reasons, num_events, kept, "")
        if decision.status == self.hit or decision.status == self.bypass:
            return kv, self.use_of(decision)
        cached_kv: list[Tensor] = []
        tails: list[list[list[Tensor]]] = []
        for index, history in enumerate(self.histories):
            cached_kv.append(history.cache.read(user, reusable[index][1]))
            tails.append([history.tail(events[index], kept[index])])
        rows = [[one[1]] for one in reusable]
        fresh = self.encode(tails, cached_kv, [[one] for one in kept], rows)
        why_not_kept = ""
        for index, history in enumerate(self.histories):
            if reasons[index] != self.hit and num_events[index] > 0:
                first, kept_rows = first_events[index], reusable[index][1]
                if not history.cache.keep(
                    user, events[index], first, time, fresh[index], kept_rows, pinned
                ):
                    why_not_kept = self.not_admitted
                    kv[index] = torch.cat([cached_kv[index], fresh[index]], dim=1)
        return kv, self.use_of(decide(reasons, num_events, kept, why_not_kept))

    def use_of(self, decision: Decision) -> list[int]:
        """Return a request's row of ``rank``."""
        status = self.status_names().index(decision.status)
        reason = self.reasons.index(decision.reason)
        return [status, reason, decision.cached_events, decision.computed_events]

    def encode(
        self,
        events: list[list[list[Tensor]]],
        cached: list[Tensor],
        cached_events: list[list[int]],
        cached_rows: list[list[int]],
    ) -> list[Tensor]:
        """Return for each history the K/V of events that follow cached ones."""
        parts = self.event_parts(events)
        no_candidates = torch.empty([0], dtype=torch.int64)
        is_extended = sum([kv.size(1) for kv in cached]) > 0
        if is_extended:
            for index, history in enumerate(self.histories):
                firsts = torch.tensor(cached_events[index])
                parts.append((history.first_index_key, firsts, torch.ones_like(firsts)))
        rows = [torch.tensor(counts) for counts in cached_rows]
        with torch.no_grad():
            if is_extended:
                fresh = self.ranking.extend(batch_of(parts, no_candidates), cached, rows)
            else:
                fresh = self.ranking.prefill(batch_of(parts, no_candidates))
        num_rows = self.new_rows(events, cached_events, cached_rows)
        return [kv[:, : sum(num_rows[index])] for index, kv in enumerate(fresh)]

    def new_rows(
        self,
        events: list[list[list[Tensor]]],
        cached_events: list[list[int]],
        cached_rows: list[list[int]],
    ) -> list[list[int]]:
        """Count the new rows of K/V, by history and request."""
        by_request: list[list[int]] = []
        for request in range(len(events[0])):
            counts = [
                cached_events[index][request] + of_history[request][0].size(0)
                for index, of_history in enumerate(events)
            ]
            rows = self.ranking.num_kv_rows(counts)
            by_request.append(
                [number - cached_rows[index][request] for index, number in enumerate(rows)]
            )
        return [[rows[index] for rows in by_request] for index in range(len(events))]

    def split_events(self, features: dict[str, Tensor]) -> list[list[list[Tensor]]]:
        """Split the events by history and request."""
        return [history.split(features) for history in self.histories]

    def rows_of_requests(self, events: list[list[list[Tensor]]]) -> list[list[int]]:
        """Count all rows of K/V, by history and request."""
        none = [[0 for _ in of_history] for of_history in events]
        return self.new_rows(events, none, none)

    def event_parts(self, events: list[list[list[Tensor]]]) -> list[Part]:
        """Join the events of all histories to keys of a batch."""
        parts: list[Part] = []
        for index, history in enumerate(self.histories):
            parts += history.parts(events[index])
        return parts

    def request_parts(self, features: dict[str, Tensor]) -> list[Part]:
        """Return users, contexts, times and candidates as keys of a batch."""
        users, time = features[self.user_key], features[self.time_key]
        items = features[self.item_key + ".values"]
        parts = [
            (self.user_key, users, torch.ones_like(users)),
            (self.request_time, time, torch.ones_like(time)),
            (self.item_key, items, torch.ones_like(items)),
        ]
        for key in self.context_keys + self.bag_keys:
            parts.append((key, features[key + ".values"], features[key + ".lengths"]))
        return parts

    def score_pages(
        self,
        features: dict[str, Tensor],
        events: list[list[list[Tensor]]],
        tables: list[Tensor],
        pages: list[list[list[int]]],
    ) -> Tensor:
        """Return probabilities [C, tasks] over K/V in pages; page ids by history and request."""
        parts = self.request_parts(features)
        for index, history in enumerate(self.histories):
            parts.append(history.time_part(events[index]))
            parts.append(history.pages_part(pages[index]))
        batch = batch_of(parts, self.request_of_candidates(features))
        logits = torch.empty([0, len(self.tasks)])
        if features[self.dense].size(0) > 0:
            with torch.no_grad():
                logits = self.ranking.score(features[self.dense], batch, tables)
        return probabilities(logits)

    def request_of_candidates(self, features: dict[str, Tensor]) -> Tensor:
        """Return the request that each candidate belongs to, [C] int64."""
        counts = features[self.item_key + ".lengths"]
        return torch.repeat_interleave(torch.arange(counts.size(0)), counts)

    def check(self, features: dict[str, Tensor]) -> None:
        """Refuse tensors that do not match each other or are out of range; the error names one."""
        for index, name in enumerate(self.input_names):
            if name not in features:
                raise ValueError(f"{name} is missing")
            check_range(name, features[name], self.least[index], self.most[index])
        num_requests = features[self.user_key].size(0)
        for key in [self.cache_key, self.time_key]:
            check_rows(features, key, num_requests)
        for key in self.context_keys:
            lengths_of(features, key, num_requests)
        for history in self.histories:
            history.check(features, num_requests)
            check_rows(features, history.first_event_key, num_requests)
        counts = lengths_of(features, self.item_key, num_requests)
        num_candidates = int(counts.sum())
        num_ids = torch.zeros_like(counts)
        for key in self.context_keys:
            num_ids = num_ids + features[key + ".lengths"]
        for key in self.bag_keys:
            num_ids = num_ids + sums_by_row(lengths_of(features, key, num_candidates), counts)
        for history in self.histories:
            num_ids = num_ids + history.num_ids(features)
        check_num_ids(num_ids, self.max_request_ids)
        self.check_dense(features, num_candidates)

    def check_dense(self, features: dict[str, Tensor], num_candidates: int) -> None:
        """Refuse dense features of the wrong shape or dtype, and numbers that are not finite."""
        check_floats(features, self.dense)
        dense = features[self.dense]
        if dense.dim() != 2 or dense.size(1) != self.num_dense:
            raise ValueError(f"{self.dense} is {dense.size()}; it must be [C, {self.num_dense}]")
        check_rows(features, self.dense, num_candidates)


def probabilities(logits: Tensor) -> Tensor:
    """Map logits to probabilities; refuse logits that are not finite.

    It uses exp: a vectorised sigmoid returns different bits in the last rows of a tensor.
    """
    check_scores(logits)
    return 1.0 / (1.0 + torch.exp(-logits.double()))


def check_floats(features: dict[str, Tensor], name: str) -> None:
    """Refuse a tensor that is missing or does not hold finite float32 numbers."""
    if name not in features:
        raise ValueError(f"{name} is missing")
    if features[name].dtype != torch.float32:
        raise ValueError(f"{name} does not hold float32")
    check_finite(name, features[name])


def check_rows(features: dict[str, Tensor], name: str, num_rows: int) -> None:
    """Refuse a tensor that does not have ``num_rows`` rows."""
    if features[name].size(0) != num_rows:
        raise ValueError(f"{name} has {features[name].size(0)} rows; it must have {num_rows}")


def lengths_of(features: dict[str, Tensor], key: str, num_rows: int) -> Tensor:
    """Return the lengths of a key's rows; refuse lengths that do not match the values."""
    lengths, num_values = features[key + ".lengths"], features[key + ".values"].size(0)
    if lengths.size(0) != num_rows:
        raise ValueError(f"{key}.lengths has {lengths.size(0)} rows; it must have {num_rows}")
    if int(lengths.sum()) != num_values:
        raise ValueError(
            f"{key}.lengths sum to {int(lengths.sum())}; {key}.values has {num_values} rows"
        )
    return lengths


def batch_of(parts: list[Part], request_of_candidates: Tensor) -> KeyedJaggedTensor:
    """Build a batch of keys, each with its own stride; see ``features.batches.assemble``."""
    keys: list[str] = []
    rows: dict[str, JaggedTensor] = {}
    inverse: list[Tensor] = []
    own_rows = torch.arange(request_of_candidates.size(0))
    for key, values, lengths in parts:
        keys.append(key)
        rows[key] = JaggedTensor(values, lengths=lengths, offsets=offsets_of(lengths))
        inverse.append(own_rows if key.startswith("candidates.") else request_of_candidates)
    return KeyedJaggedTensor(
        keys=keys,
        values=torch.cat([values for _, values, _ in parts]),
        lengths=torch.cat([lengths for _, _, lengths in parts]),
        stride=request_of_candidates.size(0),
        stride_per_key=[lengths.size(0) for _, _, lengths in parts],
        length_per_key=[values.size(0) for _, values, _ in parts],
        jt_dict=rows,
        inverse_indices=(keys, torch.stack(inverse)),
    )


def one_page_for_each(rows: list[int]) -> list[list[int]]:
    """Return page ids of consecutive K/V rows in pages of one row each, by request."""
    pages: list[list[int]] = []
    first = 0
    for num_rows in rows:
        pages.append(list(range(first, first + num_rows)))
        first += num_rows
    return pages

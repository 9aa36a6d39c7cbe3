"""Finding a cached history, and extending it by a few events, against its prefill."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from torchrec_kvshare.benchmark.exports import EAGER, WARM_CALLS, exported
from torchrec_kvshare.benchmark.options import (
    EncoderOptions,
    ModelSizes,
    PageSize,
    TimedOptions,
)
from torchrec_kvshare.benchmark.results import PREFILL_PATH, Case, Record
from torchrec_kvshare.benchmark.timing import interleaved_medians
from torchrec_kvshare.benchmark.workload import draw_requests, make_cache, make_dlrm, make_schema
from torchrec_kvshare.cache.identity import NO_CONTEXT, UNNAMED, PrefixDigests, identity_of
from torchrec_kvshare.errors import ConfigError, ParityError
from torchrec_kvshare.export.exporter import RUNTIMES
from torchrec_kvshare.features.batches import (
    collate_candidates,
    collate_history,
    collate_tails,
    with_pages,
)
from torchrec_kvshare.features.schema import HISTORY
from torchrec_kvshare.history.kinds import CAUSAL, HSTU, KIND_BY_NAME, LONGER, TARGET_ONLY
from torchrec_kvshare.history.pages import split_users
from torchrec_kvshare.model.ranking import RankingFunctions, RankingModel
from torchrec_kvshare.verify.parity import LOGIT_TOLERANCE

APPEND = "append"
EXTEND = "extend"
DIGEST = "digest"
LOOKUP_EXPAND = "lookup_expand"  # digest, look-up and expand: the cost of a hit before scoring
NUM_APPENDED = 8  # events


@dataclass
class AppendOptions(TimedOptions, EncoderOptions, ModelSizes, PageSize):
    """Options of ``scenario=append``."""

    histories: list[int] = field(default_factory=lambda: [256, 1024, 4096])  # events
    candidates: list[int] = field(default_factory=lambda: [500])  # the first is used
    # A kind that does not extend is left out.
    encoders: list[str] = field(default_factory=lambda: [CAUSAL, TARGET_ONLY, HSTU, LONGER])
    runtime: str = EAGER  # or one of ``RUNTIMES``

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.runtime not in (EAGER, *RUNTIMES):
            raise ConfigError(f"runtime is {self.runtime!r}; {[EAGER, *RUNTIMES]} are allowed")


@torch.no_grad()
def measure_append(options: AppendOptions) -> list[Record]:
    """Measure the latency of a prefill, of extending by 8 events, and of finding cached K/V.

    Returns:
        Records of ``latency_ms``, and of ``extend`` its ``share_of_prefill``.

    Raises:
        ConfigError: if a history has no event before those 8.
        ParityError: if extended K/V differs from that of a prefill.
    """
    if min(options.histories, default=0) <= NUM_APPENDED:
        raise ConfigError(
            f"histories is {options.histories}; more than {NUM_APPENDED} events are needed"
        )
    records: list[Record] = []
    for encoder in options.encoders:
        for history in options.histories if KIND_BY_NAME[encoder].extends else ():
            latency_ms = interleaved_medians(_calls(options, encoder, history), options.repeats)
            case: Case = options.case(encoder) | {"history": history, "users": 1}
            case |= {"runtime": options.runtime}
            records += [
                Record(APPEND, case | {"path": path}, "latency_ms", value, unit="ms")
                for path, value in latency_ms.items()
            ]
            share = latency_ms[EXTEND] / latency_ms[PREFILL_PATH]
            records.append(
                Record(APPEND, case | {"path": EXTEND}, "share_of_prefill", share, unit="x")
            )
    return records


def _calls(options: AppendOptions, encoder: str, history: int) -> dict[str, Callable[[], object]]:
    # The recent events of ``longer`` start at a block boundary, which appending must not move.
    block = options.spec(encoder, history).recent if encoder == LONGER else None
    schema = make_schema(history, num_users=1, block=block)
    eager = RankingModel(make_dlrm(schema, options, options.seed, encoder)).eval()
    [tower] = eager.collection.towers()
    model: RankingFunctions = eager
    if options.runtime != EAGER:
        model, _ = exported(options.runtime, eager, schema)
    cache = make_cache(tower, history, 1, options.page_size)
    [request] = draw_requests(schema, options.candidates[:1], user=0, seed=options.seed)
    events = request.events_by_history[HISTORY]
    prefill = partial(model.prefill, collate_history([request], schema).sparse_features)
    [kv] = split_users(prefill()[0], model.num_kv_rows([events.num_events]))
    before = events.num_events - NUM_APPENDED
    [(kept_events, kept_rows)] = model.reusable([before], [before], [events.num_events])
    new = events.part(kept_events, events.num_events)
    tails = collate_tails([{HISTORY: new}], {HISTORY: [kept_events]}, schema)
    extend = partial(
        model.extend, tails.sparse_features, [kv[:, :kept_rows]], [torch.tensor([kept_rows])]
    )
    expected = kv[:, kept_rows:]
    for _ in range(WARM_CALLS):
        prefill()
        difference = float((extend()[0][:, : expected.size(1)] - expected).abs().max())
    if not difference <= LOGIT_TOLERANCE:
        raise ParityError(f"extended K/V of {encoder} differs by {difference} from a prefill's")

    identity = identity_of(UNNAMED, NO_CONTEXT, HISTORY, options.page_size)

    def digests() -> PrefixDigests:
        return PrefixDigests(events, schema, identity)

    entry = cache.put(request.user_id, digests().content, kv)
    assert entry is not None  # The cache was made for this history.
    cache.release(entry)
    features = collate_candidates([request], schema).sparse_features

    def lookup_expand() -> None:
        found = cache.lookup(request.user_id, digests()).entry
        assert found is not None
        with_pages(features, schema, [[found.pages]])
        cache.release(found)

    return {
        PREFILL_PATH: prefill,
        EXTEND: extend,
        DIGEST: lambda: digests().whole,
        LOOKUP_EXPAND: lookup_expand,
    }

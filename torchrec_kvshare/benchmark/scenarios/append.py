"""What a cached history costs to find, and what it costs when it has grown by a few events."""

from collections.abc import Callable
from functools import partial

import torch

from torchrec_kvshare.benchmark.plan import Plan, Sizes
from torchrec_kvshare.benchmark.results import Case, Record
from torchrec_kvshare.benchmark.timing import interleaved_medians
from torchrec_kvshare.benchmark.workload import (
    draw_requests,
    fill_zeros,
    make_cache,
    make_schema,
)
from torchrec_kvshare.cache.identity import NO_CONTEXT, UNNAMED, PrefixDigests, identity_of
from torchrec_kvshare.errors import ConfigError, ParityError
from torchrec_kvshare.features.batches import (
    collate_candidates,
    collate_history,
    collate_tails,
    user_of_candidates,
)
from torchrec_kvshare.features.schema import HISTORY
from torchrec_kvshare.history.kinds import KIND_BY_NAME, LONGER
from torchrec_kvshare.history.pages import split_users
from torchrec_kvshare.model.ranking import RankingModel, dlrm_with_history
from torchrec_kvshare.scoring.engine import expand
from torchrec_kvshare.verify.parity import LOGIT_TOLERANCE

APPEND = "append"
PREFILL = "prefill"
EXTEND = "extend"
DIGEST = "digest"
LOOKUP_EXPAND = "lookup_expand"  # digest, look-up and expand: what a hit costs before it is scored
NUM_APPENDED = 8  # events


@torch.no_grad()
def measure_append(plan: Plan, sizes: Sizes) -> list[Record]:
    """Latency of prefill, of extending by 8 events, and of finding what is cached.

    Args:
        plan: ``encoders`` (but for ``bidirectional``), ``histories``, the first of ``candidates``,
            ``repeats``, ``seed``.
        sizes: of the tower.

    Returns:
        Records of ``latency_ms``, and of ``extend`` its ``share_of_prefill``.

    Raises:
        ConfigError: if a history has no event before those 8.
        ParityError: if extended K/V is not that of a prefill.
    """
    if min(plan.histories) <= NUM_APPENDED:
        raise ConfigError(
            f"histories is {list(plan.histories)}; more than {NUM_APPENDED} events are needed"
        )
    records: list[Record] = []
    for encoder in plan.encoders:
        for history in plan.histories if KIND_BY_NAME[encoder].extends else ():
            latency_ms = interleaved_medians(_calls(plan, sizes, encoder, history), plan.repeats)
            case: Case = sizes.case(encoder) | {"history": history, "users": 1}
            records += [
                Record(APPEND, case | {"path": path}, "latency_ms", value, "ms")
                for path, value in latency_ms.items()
            ]
            share = latency_ms[EXTEND] / latency_ms[PREFILL]
            records.append(Record(APPEND, case | {"path": EXTEND}, "share_of_prefill", share, "x"))
    return records


def _calls(plan: Plan, sizes: Sizes, encoder: str, history: int) -> dict[str, Callable[[], object]]:
    spec = sizes.spec(encoder, history)
    # The recent events of ``longer`` start at a block boundary: here they do not start elsewhere.
    schema = make_schema(history, num_users=1, block=spec.recent if encoder == LONGER else None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        ranker = dlrm_with_history(schema, spec, [sizes.dim, 1])
    model = RankingModel(fill_zeros(ranker)).eval()
    [tower] = model.collection.towers()
    cache = make_cache(tower, history, 1, sizes.page_size)
    [request] = draw_requests(schema, plan.candidates[:1], user=0, seed=plan.seed)
    events = request.events_by_history[HISTORY]
    prefill = partial(model.prefill, collate_history([request], schema).sparse_features)
    [kv] = split_users(prefill()[0], model.num_rows([events.num_events]))
    before = events.num_events - NUM_APPENDED
    [(kept_events, kept_rows)] = model.reusable([before], [before], [events.num_events])
    new = events.part(kept_events, events.num_events)
    tails = collate_tails([{HISTORY: new}], {HISTORY: [kept_events]}, schema)
    extend = partial(
        model.extend, tails.sparse_features, [kv[:, :kept_rows]], [torch.tensor([kept_rows])]
    )
    expected = kv[:, kept_rows:]
    difference = float((extend()[0][:, : expected.size(1)] - expected).abs().max())
    if not difference <= LOGIT_TOLERANCE:
        raise ParityError(f"K/V of {encoder} extended differs by {difference} from a prefill's")

    identity = identity_of(UNNAMED, NO_CONTEXT, HISTORY, sizes.page_size)

    def digests() -> PrefixDigests:
        return PrefixDigests(events, schema, identity)

    entry = cache.put(request.user_id, digests().content, kv)
    assert entry is not None  # The cache was made for this history.
    cache.release(entry)
    features = collate_candidates([request], schema).sparse_features

    def lookup_expand() -> None:
        found = cache.lookup(request.user_id, digests()).entry
        assert found is not None
        expand(features, HISTORY, [found.pages], user_of_candidates([request]))
        cache.release(found)

    return {
        PREFILL: prefill,
        EXTEND: extend,
        DIGEST: lambda: digests().whole,
        LOOKUP_EXPAND: lookup_expand,
    }

"""What keeping projected candidates is worth: hits with the item cache warm and without it."""

from collections.abc import Sequence
from functools import partial

import torch

from torchrec_kvshare.benchmark.plan import MERGE, Plan, Sizes
from torchrec_kvshare.benchmark.results import Case, Record
from torchrec_kvshare.benchmark.timing import interleaved_medians
from torchrec_kvshare.benchmark.workload import (
    NUM_ITEMS,
    draw_requests,
    fill_zeros,
    make_cache,
    make_schema,
)
from torchrec_kvshare.cache.identity import UNNAMED
from torchrec_kvshare.cache.items import ItemCache
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.errors import ParityError
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.history.kinds import LONGER
from torchrec_kvshare.model.ranking import RankingModel, dlrm_with_history
from torchrec_kvshare.scoring.engine import Engine

ITEMS = "items"
WITHOUT_ITEMS = "without_items"
WITH_ITEMS = "with_items"
# Of probabilities; worst of 30 requests 0, but a batch of another size may round logits by 2e-6.
TOLERANCE = 2e-6


def measure_items(plan: Plan, sizes: Sizes) -> list[Record]:
    """Latency of the engine on hits, candidates' projections kept or computed anew.

    Args:
        plan: ``encoders``, ``histories``, ``candidates``, ``repeats``, ``seed``.
        sizes: of the tower; with ``num_tokens`` 2 the category is a token of its own.

    Returns:
        Records of ``latency_ms`` and of ``speedup``, without the item cache over with it.

    Raises:
        ParityError: if the scores differ.
    """
    records: list[Record] = []
    for encoder in plan.encoders:
        for history in plan.histories:
            engines, requests = _engines(plan, sizes, encoder, history)
            for request in requests:
                case: Case = sizes.case(encoder) | {
                    "history": history,
                    "candidates": request.num_candidates,
                    "users": 1,
                }
                records += _records(engines, request, case, plan.repeats)
    return records


def _engines(
    plan: Plan, sizes: Sizes, encoder: str, history: int
) -> tuple[dict[str, Engine], Sequence[Request]]:
    # Recent events of ``longer`` are a part of the window, in whole blocks.
    schema = make_schema(history, num_users=1, block=MERGE if encoder == LONGER else None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        ranker = dlrm_with_history(schema, sizes.spec(encoder, history), [sizes.dim, 1])
    model = RankingModel(fill_zeros(ranker)).eval()
    [tower] = model.collection.towers()
    items_by_path = {WITHOUT_ITEMS: None, WITH_ITEMS: ItemCache(NUM_ITEMS, schema)}

    def new_store() -> KVStore:
        return KVStore([make_cache(tower, history, 1, sizes.page_size)])

    engines = {
        path: Engine(model, schema, new_store(), items, UNNAMED)
        for path, items in items_by_path.items()
    }
    return engines, draw_requests(schema, plan.candidates, user=0, seed=plan.seed)


def _records(
    engines: dict[str, Engine], request: Request, case: Case, repeats: int
) -> list[Record]:
    scores = [torch.tensor(engine.rank([request])[0].scores) for engine in engines.values()]
    difference = float((scores[0] - scores[1]).abs().max())
    if not difference <= TOLERANCE:
        raise ParityError(f"{WITH_ITEMS} scores differ by {difference} from {WITHOUT_ITEMS}")
    latency_ms = interleaved_medians(
        {path: partial(engine.rank, [request]) for path, engine in engines.items()}, repeats
    )
    speedup = latency_ms[WITHOUT_ITEMS] / latency_ms[WITH_ITEMS]
    return [
        *(
            Record(ITEMS, case | {"path": path}, "latency_ms", value, "ms")
            for path, value in latency_ms.items()
        ),
        Record(ITEMS, case | {"path": WITH_ITEMS}, "speedup", speedup, "x"),
    ]

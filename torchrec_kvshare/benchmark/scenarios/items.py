"""Hits with projected candidates kept in a warm item cache, against hits without it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from torchrec_kvshare.benchmark.options import (
    MERGE,
    EncoderOptions,
    ModelSizes,
    PageSize,
    TimedOptions,
)
from torchrec_kvshare.benchmark.results import Case, Record
from torchrec_kvshare.benchmark.timing import interleaved_medians
from torchrec_kvshare.benchmark.workload import (
    NUM_ITEMS,
    draw_requests,
    make_cache,
    make_dlrm,
    make_schema,
)
from torchrec_kvshare.cache.identity import UNNAMED
from torchrec_kvshare.cache.items import ItemCache
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.errors import ParityError
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.history.kinds import LONGER
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Engine

ITEMS = "items"
WITHOUT_ITEMS = "without_items"
WITH_ITEMS = "with_items"
# Of probabilities; worst of 30 requests 0, but a batch of another size may move logits by 2e-6.
TOLERANCE = 2e-6


@dataclass
class ItemsOptions(TimedOptions, EncoderOptions, ModelSizes, PageSize):
    """Options of ``scenario=items``."""

    histories: list[int] = field(default_factory=lambda: [256, 1000])  # events
    candidates: list[int] = field(default_factory=lambda: [100, 500, 1000])


def measure_items(options: ItemsOptions) -> list[Record]:
    """Measure the latency of the engine on hits, with projections kept and computed again.

    Returns:
        Records of ``latency_ms`` and of ``speedup``, without the item cache over with it.

    Raises:
        ParityError: if the scores differ.
    """
    records: list[Record] = []
    for encoder in options.encoders:
        for history in options.histories:
            engines, requests = _engines(options, encoder, history)
            for request in requests:
                case: Case = options.case(encoder) | {
                    "history": history,
                    "candidates": request.num_candidates,
                    "users": 1,
                }
                records += _records(engines, request, case, options.repeats)
    return records


def _engines(
    options: ItemsOptions, encoder: str, history: int
) -> tuple[dict[str, Engine], Sequence[Request]]:
    # The recent events of ``longer`` are a part of the window, in whole blocks.
    schema = make_schema(history, num_users=1, block=MERGE if encoder == LONGER else None)
    model = RankingModel(make_dlrm(schema, options, options.seed, encoder)).eval()
    [tower] = model.collection.towers()
    items_by_path = {WITHOUT_ITEMS: None, WITH_ITEMS: ItemCache(NUM_ITEMS, schema)}

    def new_store() -> KVStore:
        return KVStore([make_cache(tower, history, 1, options.page_size)])

    engines = {
        path: Engine(model, schema, new_store(), items=items, version=UNNAMED)
        for path, items in items_by_path.items()
    }
    return engines, draw_requests(schema, options.candidates, user=0, seed=options.seed)


def _records(
    engines: dict[str, Engine], request: Request, case: Case, repeats: int
) -> list[Record]:
    scores = [torch.tensor(engine.rank([request])[0].ranking_scores) for engine in engines.values()]
    difference = float((scores[0] - scores[1]).abs().max())
    if not difference <= TOLERANCE:
        raise ParityError(f"{WITH_ITEMS} scores differ by {difference} from {WITHOUT_ITEMS}")
    latency_ms = interleaved_medians(
        {path: partial(engine.rank, [request]) for path, engine in engines.items()}, repeats
    )
    speedup = latency_ms[WITHOUT_ITEMS] / latency_ms[WITH_ITEMS]
    return [
        *(
            Record(ITEMS, case | {"path": path}, "latency_ms", value, unit="ms")
            for path, value in latency_ms.items()
        ),
        Record(ITEMS, case | {"path": WITH_ITEMS}, "speedup", speedup, unit="x"),
    ]

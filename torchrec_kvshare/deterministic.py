"""Deterministic mode: a candidate's score does not depend on what else is scored, to the last bit.

On a CPU the number of rows of a matrix decides how MKL computes each of them, unless the process
was started in its strict reproducibility mode. Whether that, and all other operators of a model,
keep the promise is tried before the first request: here, on the model itself.
"""

from typing import Any

import torch
from torch import Tensor

from torchrec_kvshare.data.schema import USER, FeatureSchema
from torchrec_kvshare.draw import draw_raw_request
from torchrec_kvshare.engine import Engine, RankingFunctions
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.export.parity import score_through_pages
from torchrec_kvshare.features import Request, collate, parse_request

STRICT_MKL = "MKL_CBWR=AVX512,STRICT"
NUM_CANDIDATES = 1037  # enough for two threads to share an elementwise operator, and odd
# Candidates scored at once; kernels change where a tile is full and one row is left over.
SPLITS = (1, 2, 15, 16, 33, 65, 130, 769)
SHORT_HISTORIES = (12, 3, 1)  # events; matrices so small have kernels of their own


@torch.no_grad()
def require_determinism(model: RankingFunctions, schema: FeatureSchema) -> None:
    """Refuse to go on if scores are not bit-equal however they are computed.

    A long history's candidates are scored all at once, some at once, in reverse, beside other
    users, and over K/V from pages that was encoded beside other users' and alone; those of short
    histories all at once and some at once.

    Args:
        model: eager or exported.
        schema: its columns.

    Raises:
        ConfigError: naming what changed a score and by how much.
    """
    longest = max(history.window.max_history for history in schema.histories)
    sizes = ((longest, NUM_CANDIDATES), (longest // 3, 7), (1, 64))
    raws = [
        draw_raw_request(schema, num_events, num_candidates, seed) | {USER: f"drawn {seed}"}
        for seed, (num_events, num_candidates) in enumerate(sizes)
    ]
    request, *mates = (parse_request(raw, schema) for raw in raws)
    expected = _logits(model, [request], schema)
    tried = {
        "batchmates": _logits(model, [request, *mates], schema)[:NUM_CANDIDATES],
        "batchmates before it": _logits(model, [*mates, request], schema)[-NUM_CANDIDATES:],
        "cached K/V": score_through_pages(model, [request], schema),
        "K/V cached beside batchmates": score_through_pages(model, [*mates, request], schema)[
            -NUM_CANDIDATES:
        ],
        "the order of candidates": _logits(model, [_part(raws[0], -1, schema)], schema).flip(0),
    }
    for what, logits in tried.items():
        _refuse_if_moved(what, logits, expected)
    for num_events in (longest, *SHORT_HISTORIES):
        raw = draw_raw_request(schema, num_events, NUM_CANDIDATES, num_events)
        together = _logits(model, [parse_request(raw, schema)], schema)
        for size in SPLITS:
            among = _logits(model, [_part(raw, size, schema)], schema)
            what = f"scoring it among {size} over {num_events} events"
            _refuse_if_moved(what, among, together[:size])
    whole, part = (
        torch.tensor(Engine(model, schema, "tried", None).rank([one])[0].scores)
        for one in (request, _part(raws[0], 1, schema))
    )
    _refuse_if_moved("scoring it alone", part, whole[:1])


def _logits(model: RankingFunctions, requests: list[Request], schema: FeatureSchema) -> Tensor:
    batch = collate(requests, schema)
    return model(batch.dense_features, batch.sparse_features)


def _part(raw: dict[str, Any], size: int, schema: FeatureSchema) -> Request:
    """The request with its first candidates only; -1 for all of them in reverse."""
    cut = slice(None, None, -1) if size < 0 else slice(0, size)
    candidates = {column: cells[cut] for column, cells in raw["candidates"].items()}
    return parse_request(raw | {"candidates": candidates}, schema)


def _refuse_if_moved(what: str, got: Tensor, expected: Tensor) -> None:
    if not torch.equal(got, expected):
        raise ConfigError(
            f"deterministic is true, but {what} moves a score by "
            f"{float((got - expected).abs().max()):.1e}; a process on a CPU has to be started with "
            f"{STRICT_MKL} in its environment, and with a number of threads that divides dim"
        )

"""Proof that a candidate's score is bit-equal whatever else is scored with it.

A matrix library picks its kernel, and so the rounding of each row, by the number of rows and their
alignment in memory. ``compute_rows_alone`` gives a model linear layers that compute each row
independently; attention does so already. ``require_determinism`` tries the whole model before its
first request, because other operators may break the promise too.
"""

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from torchrec_kvshare.attention.operators import rows_bmm, rows_linear
from torchrec_kvshare.cache.identity import UNNAMED
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.features.batches import collate
from torchrec_kvshare.features.draw import draw_raw_request
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.features.schema import USER, FeatureSchema
from torchrec_kvshare.history.encoder import Projection
from torchrec_kvshare.model.ranking import RankingFunctions, RankingModel
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.verify.parity import (
    probabilities_of,
    score_extended,
    score_through_pages,
)

NUM_CANDIDATES = 1037  # odd, and enough for two threads to share an elementwise operator
# Candidates scored at once; kernels change where a tile is full and one row is left over.
SPLITS = (1, 2, 15, 16, 33, 65, 130, 769)
SHORT_HISTORIES = (12, 3, 1)  # events; matrices this small have other kernels


class RowsLinear(Projection):
    """A linear layer that computes each row independently of the others; for scoring only."""

    def forward(self, input: Tensor) -> Tensor:
        return rows_linear(input, self.weight, self.bias)

    def outputs_from(self, rows: Tensor, first: int) -> Tensor:
        """Return outputs ``first`` to N, [..., N - first], of rows [..., K]."""
        return rows_linear(rows, self.weight[first:], self.bias[first:])


def compute_rows_alone(model: RankingModel) -> RankingModel:
    """Return a copy of a model whose linear layers and ``torch.bmm`` compute each row on its own.

    Args:
        model: in eval mode; its weights are shared with the copy.

    Raises:
        ConfigError: if a linear layer has no bias or is of an unknown class.
    """
    # Share weights: tables may be large.
    memo = {id(weight): weight for weight in (*model.parameters(), *model.buffers())}
    alone = copy.deepcopy(model, memo)
    for name, module in alone.named_modules():
        if isinstance(module, fx.GraphModule):
            _replace_bmm(module)  # TorchRec's InteractionArch, among others
        if not isinstance(module, nn.Linear):
            continue
        if type(module) not in (nn.Linear, Projection) or module.bias is None:
            raise ConfigError(
                f"deterministic is true, and {name} is a {type(module).__name__}"
                f"{'' if module.bias is not None else ' without bias'}; plain linear layers with a "
                "bias can be computed row by row"
            )
        module.__class__ = RowsLinear
    return alone


def _replace_bmm(traced: fx.GraphModule) -> None:
    for node in traced.graph.find_nodes(op="call_function", target=torch.bmm):
        node.target = rows_bmm
    traced.recompile()


@torch.no_grad()
def require_determinism(model: RankingFunctions, schema: FeatureSchema) -> None:
    """Refuse a model whose scores are not bit-equal on every way to compute them.

    Candidates of a long history are scored together, in part, in reverse order, beside other users,
    and over cached K/V that was encoded alone, beside other users and in two steps. Candidates of
    short histories are scored together and in part.

    Args:
        model: eager or exported.
        schema: columns of the model.

    Raises:
        ConfigError: naming the way that moved a score most, and by how much.
    """
    distance_by_way = _distances(model, schema)
    moved = {way: distance for way, distance in distance_by_way.items() if distance != 0.0}
    if moved:
        # Not Python's max, which may lose a NaN.
        worst = [*moved][int(torch.tensor([*moved.values()]).argmax())]
        raise ConfigError(
            f"deterministic is true, but {len(moved)} of {len(distance_by_way)} ways to score the "
            f"same candidates move a score, most of all {worst}, by {moved[worst]:.1e}; in an "
            "artifact that was exported with deterministic=true linear layers move none"
        )


def _distances(model: RankingFunctions, schema: FeatureSchema) -> dict[str, float]:
    """Return by how much each way to score the same candidates moves a score."""
    longest = max(history.window.max_history for history in schema.histories)
    sizes = ((longest, NUM_CANDIDATES), (longest // 3, 7), (1, 64))
    raws = [
        draw_raw_request(schema, num_events, num_candidates, seed) | {USER: f"drawn {seed}"}
        for seed, (num_events, num_candidates) in enumerate(sizes)
    ]
    request, *batchmates = (parse_request(raw, schema) for raw in raws)
    expected = _logits(model, [request], schema)
    tried = {
        "batchmates": _logits(model, [request, *batchmates], schema)[:NUM_CANDIDATES],
        "batchmates before it": _logits(model, [*batchmates, request], schema)[-NUM_CANDIDATES:],
        "cached K/V": score_through_pages(model, [request], schema),
        "K/V cached beside batchmates": score_through_pages(model, [*batchmates, request], schema)[
            -NUM_CANDIDATES:
        ],
        "the order of candidates": _logits(model, [_part(raws[0], -1, schema)], schema).flip(0),
    }
    distance_by_way = {way: _distance(logits, expected) for way, logits in tried.items()}
    for num_events in (longest, *SHORT_HISTORIES):
        raw = draw_raw_request(schema, num_events, NUM_CANDIDATES, num_events)
        together = _logits(model, [parse_request(raw, schema)], schema)
        for num_candidates in SPLITS:
            part = _logits(model, [_part(raw, num_candidates, schema)], schema)
            way = f"scoring it among {num_candidates} over {num_events} events"
            distance_by_way[way] = _distance(part, together[:num_candidates])
    engine = Engine(model, schema, None, version=UNNAMED)
    whole, alone = (
        probabilities_of(engine.rank([one])).logit() for one in (request, _part(raws[0], 1, schema))
    )
    return distance_by_way | {
        "scoring it alone": _distance(alone, whole[:1]),
        "K/V extended by new events": _distance(score_extended(model, [request], schema), whole),
    }


def _logits(model: RankingFunctions, requests: list[Request], schema: FeatureSchema) -> Tensor:
    batch = collate(requests, schema)
    return model(batch.dense_features, batch.sparse_features)


def _part(raw: dict[str, Any], num_candidates: int, schema: FeatureSchema) -> Request:
    """Return the request with its first candidates only; -1 for all of them in reverse order."""
    cut = slice(None, None, -1) if num_candidates < 0 else slice(0, num_candidates)
    candidates = {column: cells[cut] for column, cells in raw["candidates"].items()}
    return parse_request(raw | {"candidates": candidates}, schema)


def _distance(got: Tensor, expected: Tensor) -> float:
    return 0.0 if torch.equal(got, expected) else float((got - expected).abs().max())

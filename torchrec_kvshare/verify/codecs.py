"""What a change of precision does to scores: an engine asks before a tier writes K/V in a codec.

Histories are encoded once, their K/V is written and read again as a tier does it, and the requests
are scored over what was read.
"""

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrec_kvshare.cache.codecs import CHANNELS, CODECS, ROW_BLOCK, Codec
from torchrec_kvshare.cache.identity import NO_CONTEXT, PrefixDigests, identity_of, text_digest
from torchrec_kvshare.cache.record import KVRecord, pack, unpack
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.features.tensors import FLOAT32
from torchrec_kvshare.scoring.engine import Engine

TOP = 10  # candidates


class Effect(NamedTuple):
    """Scores of one request in a codec of K/V, or a dtype of tables, against the exact ones.

    AUC and overlap are of the first task, which ranks.

    Attributes:
        auc: of these scores, see ``request_auc``.
        overlap: share of the exact best candidates that are among the best by these scores.
        max_difference: greatest difference of a score of any task from the exact one.
        num_bytes: bytes of the K/V of all histories, or of the tables.
    """

    auc: float
    overlap: float
    max_difference: float
    num_bytes: int


def codec_effects(
    engine: Engine, targeted: Iterable[tuple[Request, int]], page_size: int
) -> dict[str, list[Effect]]:
    """Score requests over K/V that was written and read in each codec.

    Args:
        engine: an engine without a cache.
        targeted: requests, each with the index of its positive candidate; a request without events
            has no K/V and is left out.
        page_size: rows per page, a part of the identity of K/V.

    Returns:
        By codec the effect on each request, in order; ``FLOAT32`` is one of them.

    Raises:
        RecordError: if a codec cannot write the K/V.
    """
    effects_by_codec: dict[str, list[Effect]] = {name: [] for name in CODECS}
    for request, target in targeted:
        if request.num_events == 0:
            continue
        records = _records(engine, request, page_size)
        user = text_digest(request.user_id)
        scores_by_codec: dict[str, Tensor] = {}
        bytes_by_codec: dict[str, int] = {}
        for name, codec in CODECS.items():
            read = [_write_and_read(record, user, codec) for record in records]
            scores_by_codec[name] = engine.score_with(request, [kv for kv, _ in read])
            bytes_by_codec[name] = sum(num_bytes for _, num_bytes in read)
        for name, scores in scores_by_codec.items():
            effect = effect_on(scores, scores_by_codec[FLOAT32], target, bytes_by_codec[name])
            effects_by_codec[name].append(effect)
    return effects_by_codec


def effect_on(scores: Tensor, exact: Tensor, target: int, num_bytes: int) -> Effect:
    """Compare the scores of one request with the exact ones of the same candidates.

    Args:
        scores: [N, tasks] of at least two candidates.
        exact: [N, tasks] of the same candidates.
        target: index of the positive candidate.
        num_bytes: bytes of the K/V or tables behind ``scores``.
    """
    ranking, exact_ranking = scores[:, 0].tolist(), exact[:, 0].tolist()
    overlap = top_overlap(ranking, exact_ranking)
    greatest = float((scores - exact).abs().max())
    return Effect(request_auc(ranking, target), overlap, greatest, num_bytes)


def effect_figures(effects: Sequence[Effect], exact: Sequence[Effect]) -> dict[str, float]:
    """Summarise the effects on all requests, as the manifest of an artifact has them.

    Args:
        effects: of a codec or dtype, by request.
        exact: of ``FLOAT32``, on the same requests.

    Returns:
        ``auc_change``, ``top10_overlap``, ``max_score_difference``, ``bytes_ratio``.
    """
    num_bytes, exact_bytes = (sum(e.num_bytes for e in each) for each in (effects, exact))
    return {
        "auc_change": fmean(e.auc for e in effects) - fmean(e.auc for e in exact),
        "top10_overlap": fmean(e.overlap for e in effects),
        "max_score_difference": max(e.max_difference for e in effects),
        "bytes_ratio": num_bytes / exact_bytes,
    }


def request_auc(scores: Sequence[float], target: int) -> float:
    """Return the share of the other candidates that score below the target; equal ones count half.

    With one positive per request this is its AUC, and the mean over requests is GAUC with equal
    weights.

    Args:
        scores: of at least two candidates.
        target: index of the positive candidate.

    Example:
        >>> request_auc([0.5, 0.1, 0.9, 0.5, 0.2], target=0)
        0.625
    """
    others = [*scores[:target], *scores[target + 1 :]]
    below = sum(score < scores[target] for score in others)
    equal = sum(score == scores[target] for score in others)
    return (below + equal / 2) / len(others)


def top_overlap(scores: Sequence[float], exact: Sequence[float], top: int = TOP) -> float:
    """Return the share of the best candidates by exact scores that are among the best by others.

    Args:
        scores: of the candidates.
        exact: of the same candidates.
        top: how many candidates are the best ones; all, if there are fewer. Of equal scores the
            first candidate wins.

    Example:
        >>> top_overlap([0.1, 0.3, 0.2, 0.4], [0.4, 0.3, 0.2, 0.1], top=2)
        0.5
    """
    best = _best(exact, top)
    return len(best & _best(scores, top)) / len(best)


def is_within_error(codec: Codec, kv: Tensor, read: Tensor) -> bool:
    """Return whether K/V [planes, R, H, D] was read within the error of the codec.

    Args:
        codec: exact, so that every bit must be equal, or one that scales blocks.
        kv: what was written.
        read: what was read.
    """
    if codec.is_exact:
        return torch.equal(*(each.contiguous().view(torch.int32) for each in (kv, read)))
    sizes = kv.double().abs().transpose(1, 2)  # [planes, H, R, D]
    blocks = F.max_pool2d(sizes, (ROW_BLOCK, CHANNELS), ceil_mode=True)
    by_row = blocks.repeat_interleave(ROW_BLOCK, 2).repeat_interleave(CHANNELS, 3)
    greatest = by_row[:, :, : kv.size(1), : kv.size(3)].transpose(1, 2)
    allowed = (greatest * codec.relative_error).clamp_min(codec.absolute_error)
    return bool(((read.double() - kv.double()).abs() <= allowed).all())


def _records(engine: Engine, request: Request, page_size: int) -> list[KVRecord]:
    """Encode each history, as an engine hands its K/V to the tiers."""
    kv_by_history, _ = engine.encode(request)
    records = []
    for history, kv in zip(engine.schema.histories, kv_by_history, strict=True):
        identity = identity_of(engine.version, NO_CONTEXT, history.name, page_size)
        events = request.events_by_history[history.name]
        content = PrefixDigests(events, engine.schema, identity).content
        records.append(KVRecord(content, float(request.time), kv))
    return records


def _write_and_read(record: KVRecord, user: str, codec: Codec) -> tuple[Tensor, int]:
    """Return the K/V as a tier gives it back, and the bytes of its packet."""
    if record.content.num_events == 0:
        return record.kv, 0  # An engine gives no such K/V to a tier.
    packet = pack(record, user, codec, key=None)
    return unpack(packet, user, record.content.identity, codec, key=None).kv, len(packet)


def _best(scores: Sequence[float], top: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda index: -scores[index])[:top])

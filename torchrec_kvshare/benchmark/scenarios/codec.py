"""What K/V written in a codec does to a trained model's scores, and how many bytes it takes.

Histories are encoded once, written and read again as a tier does it, and scored over what was read.
Nothing is timed. The artifact's manifest gets the figures: an engine asks there before it lets a
tier write in a codec.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_kvshare.benchmark.plan import Plan, Sizes
from torchrec_kvshare.benchmark.results import Case, Record
from torchrec_kvshare.cache.codecs import CODECS, Codec
from torchrec_kvshare.cache.identity import NO_CONTEXT, PrefixDigests, identity_of, text_digest
from torchrec_kvshare.cache.record import KVRecord, pack, unpack
from torchrec_kvshare.config import DataConfig
from torchrec_kvshare.data.dataset import Dataset, build_dataset
from torchrec_kvshare.data.load import load_log
from torchrec_kvshare.data.requests import make_targeted_requests
from torchrec_kvshare.errors import ConfigError, DataError
from torchrec_kvshare.export.artifact import add_measured
from torchrec_kvshare.export.exporter import load_artifact
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.features.schema import ITEM, FeatureSchema
from torchrec_kvshare.scoring.engine import Engine

CODEC = "codec"
FLOAT32 = "float32"  # what the others are compared with
TOP = 10  # candidates
UNIT_BY_METRIC = {
    "auc_change": "auc",
    "top10_overlap": "share",
    "max_score_difference": "probability",
    "bytes_ratio": "x",
}


class Effect(NamedTuple):
    """What a codec of K/V, or a dtype of tables, does to one request.

    Attributes:
        auc: of the scores over K/V that was written in it.
        overlap: share of float32's best candidates among its best.
        max_difference: of a score from float32's.
        num_bytes: of what is changed: K/V of all histories, or tables.
    """

    auc: float
    overlap: float
    max_difference: float
    num_bytes: int


@torch.no_grad()
def measure_codec(plan: Plan, sizes: Sizes) -> list[Record]:
    """Change of AUC, of the best candidates, of scores and of bytes, by lossy codec.

    The AUC is the mean of the requests' own, see ``request_auc``; the positive is the item of the
    test event, whatever its label. Requests without events have no K/V and are left out.

    Args:
        plan: ``artifact``, whose manifest gets the figures; ``data``, what it was trained on or
            later events of the same items; ``requests``, one number of ``candidates``, ``seed``.
        sizes: ``page_size``; the model is the artifact's.

    Returns:
        Of float32 its ``auc``; of each other codec ``auc_change``, ``top10_overlap``,
        ``max_score_difference`` and ``bytes_ratio``, whole records over those of float32.

    Raises:
        ConfigError: if the plan has no artifact, or its data or candidates cannot be used.
        ArtifactError: if the artifact is broken.
        DataError: if the data cannot be read, or no request has an event.
        RequestError: if the data lacks a column of the model.
        RecordError: if a codec cannot write the model's K/V.
    """
    artifact_folder, data, num_candidates = _needed(plan)
    artifact = load_artifact(artifact_folder, plan.artifact_key)
    dataset = build_dataset(load_log(data), artifact.schema.histories)
    check_known(artifact.schema, dataset, data.name)
    engine = Engine(artifact.model, artifact.schema, None, version=artifact.manifest.version)
    effects_by_codec: dict[str, list[Effect]] = {name: [] for name in CODECS}
    for raw, target in make_targeted_requests(dataset, plan.requests, num_candidates, plan.seed):
        request = parse_request(raw, artifact.schema)
        if request.num_events:
            for name, effect in _effects(engine, request, target, sizes.page_size).items():
                effects_by_codec[name].append(effect)
    exact = effects_by_codec.pop(FLOAT32)
    if not exact:
        raise DataError(
            f"none of {plan.requests} requests of data {data.name} has an event that is read"
        )
    figures_by_codec = {
        name: codec_figures(effects, exact) for name, effects in effects_by_codec.items()
    }
    measured = {"candidates": num_candidates, "requests": len(exact)}
    add_measured(
        artifact_folder,
        plan.artifact_key,
        codecs={name: figures | measured for name, figures in figures_by_codec.items()},
    )

    def record(codec: str, metric: str, value: float, unit: str) -> Record:
        encoder = artifact.manifest.encoder["kind"]
        case: Case = {"path": codec, "codec": codec, "encoder": encoder} | measured
        return Record(CODEC, case, metric, value, unit)

    return [
        record(FLOAT32, "auc", fmean(effect.auc for effect in exact), "auc"),
        *(
            record(name, metric, value, UNIT_BY_METRIC[metric])
            for name, figures in figures_by_codec.items()
            for metric, value in figures.items()
        ),
    ]


def request_auc(scores: Sequence[float], target: int) -> float:
    """Share of the other candidates that score below the target, those as high counted half.

    With one positive a request this is its AUC, and the mean over requests is GAUC with equal
    weights.

    Args:
        scores: of at least two candidates.
        target: place of the positive one.

    Example:
        >>> request_auc([0.5, 0.1, 0.9, 0.5, 0.2], target=0)
        0.625
    """
    others = [*scores[:target], *scores[target + 1 :]]
    below = sum(score < scores[target] for score in others)
    equal = sum(score == scores[target] for score in others)
    return (below + equal / 2) / len(others)


def top_overlap(scores: Sequence[float], exact: Sequence[float], top: int = TOP) -> float:
    """Share of the best candidates by exact scores that are among the best by others.

    Args:
        scores: of the candidates.
        exact: of the same candidates.
        top: how many are best, if there are so many; of equal ones the first.

    Example:
        >>> top_overlap([0.1, 0.3, 0.2, 0.4], [0.4, 0.3, 0.2, 0.1], top=2)
        0.5
    """
    best = _best(exact, top)
    return len(best & _best(scores, top)) / len(best)


def effect_on(
    scores: Sequence[float], exact: Sequence[float], target: int, num_bytes: int
) -> Effect:
    """What changed scores are worth beside the exact ones of the same candidates.

    Args:
        scores: of at least two candidates.
        exact: likewise.
        target: place of the positive one.
        num_bytes: that the scores' K/V or tables take.
    """
    greatest = max(abs(score - other) for score, other in zip(scores, exact, strict=True))
    return Effect(request_auc(scores, target), top_overlap(scores, exact), greatest, num_bytes)


def codec_figures(effects: Sequence[Effect], exact: Sequence[Effect]) -> dict[str, float]:
    """What a codec does to all requests.

    Args:
        effects: of the codec, by request.
        exact: of float32, by the same requests.

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


def _needed(plan: Plan) -> tuple[Path, DataConfig, int]:
    """Artifact, data and candidates of a plan that has them."""
    if plan.artifact is None or plan.data is None:
        raise ConfigError(
            "artifact or data is null; scenario=codec measures a trained model on its own data: "
            "artifact=DIR, an output of pipelines.export, and data=NAME with data.root or data.path"
        )
    return plan.artifact, plan.data, one_queue_length(plan, CODEC)


def one_queue_length(plan: Plan, scenario: str) -> int:
    """The candidates of every request of a plan that has some requests.

    Raises:
        ConfigError: if there is not one number of candidates, or no request.
    """
    if len(plan.candidates) != 1 or plan.candidates[0] < 2:
        raise ConfigError(
            f"candidates is {list(plan.candidates)}; scenario={scenario} takes one number, at "
            "least 2"
        )
    if plan.requests < 1:
        raise ConfigError(f"requests is {plan.requests}; it must be at least 1")
    return plan.candidates[0]


def check_known(schema: FeatureSchema, dataset: Dataset, data_name: str) -> None:
    """Refuse requests of items that the model does not know: its scores of them say nothing."""
    known = set(schema.vocabulary_by_column[ITEM].ids)
    num_shared = len(known.intersection(dataset.log.items.ids))
    if 2 * num_shared < len(known):
        raise ConfigError(
            f"data {data_name} has {num_shared} of the {len(known)} items that the model knows; "
            "at least half are needed: is it what the model was trained on?"
        )


def _effects(engine: Engine, request: Request, target: int, block: int) -> dict[str, Effect]:
    """What each codec does to one request."""
    records = _records(engine, request, block)
    user = text_digest(request.user_id)
    scores_by_codec: dict[str, list[float]] = {}
    bytes_by_codec: dict[str, int] = {}
    for name, codec in CODECS.items():
        read = [_write_and_read(record, user, codec) for record in records]
        scores_by_codec[name] = engine.score_with(request, [kv for kv, _ in read])
        bytes_by_codec[name] = sum(num_bytes for _, num_bytes in read)
    exact = scores_by_codec[FLOAT32]
    return {
        name: effect_on(scores, exact, target, bytes_by_codec[name])
        for name, scores in scores_by_codec.items()
    }


def _records(engine: Engine, request: Request, block: int) -> list[KVRecord]:
    """Each history's K/V, as an engine hands it to its tiers."""
    records = []
    kv_by_history = engine.encode(request).kv_by_history
    for place, history in enumerate(engine.schema.histories):
        identity = identity_of(engine.version, NO_CONTEXT, history.name, block)
        events = request.events_by_history[history.name]
        content = PrefixDigests(events, engine.schema, identity).content
        records.append(KVRecord(content, float(request.time), kv_by_history[place]))
    return records


def _write_and_read(record: KVRecord, user: str, codec: Codec) -> tuple[Tensor, int]:
    """K/V as a tier gives it back, and the bytes that it lay in."""
    if record.content.num_events == 0:
        return record.kv, 0  # No tier ever gets it.
    packet = pack(record, user, codec, key=None)
    return unpack(packet, user, record.content.identity, codec, key=None).kv, len(packet)


def _best(scores: Sequence[float], top: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda place: -scores[place])[:top])

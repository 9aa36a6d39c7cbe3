"""Latency of one request against its number of candidates, by the path that scores it."""

from dataclasses import dataclass
from functools import partial

from torchrec_kvshare.benchmark.options import TimedOptions
from torchrec_kvshare.benchmark.paths import CROSS_REQUEST_HIT, REQUEST_SHARED, UNCACHED_MERGED
from torchrec_kvshare.benchmark.plots import GREY, Line
from torchrec_kvshare.benchmark.queues import QueueOptions, Queues, queue_picture
from torchrec_kvshare.benchmark.results import Record
from torchrec_kvshare.benchmark.timing import (
    fusion_costs,
    interleaved_medians,
    seed_model_speedup,
)

QUEUE_LENGTH = "queue_length"
SEED_MODEL = "seed_model"

SEED_MODEL_LINE = Line("seed model, N / (0.85 + 0.15 N)", GREY, is_dashed=True)
PICTURE_BY_NAME = {
    "latency": queue_picture(
        ("latency_ms",), "latency of a request [ms]", SEED_MODEL, SEED_MODEL_LINE
    ),
    "speedup": queue_picture(
        ("speedup_vs_uncached", "seed_model_speedup"),
        "speed-up over the uncached path [x]",
        SEED_MODEL,
        SEED_MODEL_LINE,
    ),
}


@dataclass
class QueueLengthOptions(QueueOptions, TimedOptions):
    """Options of ``scenario=queue_length``."""


def measure_queue_length(options: QueueLengthOptions) -> list[Record]:
    """Measure the latency of one request against its number of candidates.

    Returns:
        Records of ``latency_ms``, ``requests_per_s``, ``speedup_vs_uncached``,
        ``speedup_vs_request_shared``, ``seed_model_speedup``, and per history ``fusion_cost_ratio``
        and the ``chunk_rows`` of ``uncached_merged``. Long histories are compared neither with
        ``uncached_merged`` nor with the seed model.

    Raises:
        ParityError: if the logits of two paths differ.
    """
    records = []
    for history in (*options.histories, *options.long_histories):
        queues = Queues(QUEUE_LENGTH, options, history)
        shared_ms = []
        for request, score_by_path in queues.cases():
            latency_ms = interleaved_medians(score_by_path, options.repeats)
            shared_ms.append(latency_ms[REQUEST_SHARED])
            records += _latency_records(queues, request.num_candidates, latency_ms)
        if len(set(options.candidates)) > 1:
            history_cost, candidate_cost = fusion_costs(options.candidates, shared_ms)
            ratio = candidate_cost / history_cost
            records.append(queues.record(REQUEST_SHARED, "fusion_cost_ratio", ratio, "x"))
        records += queues.chunk_records()
    return records


def _latency_records(
    queues: Queues, num_candidates: int, latency_ms: dict[str, float]
) -> list[Record]:
    record = partial(queues.record, num_candidates=num_candidates)
    records = []
    for path, value in latency_ms.items():
        records.append(record(path, "latency_ms", value, "ms"))
        records.append(record(path, "requests_per_s", 1e3 / value, "1/s"))
        if path != UNCACHED_MERGED and UNCACHED_MERGED in latency_ms:
            speedup = latency_ms[UNCACHED_MERGED] / value
            records.append(record(path, "speedup_vs_uncached", speedup, "x"))
    speedup = latency_ms[REQUEST_SHARED] / latency_ms[CROSS_REQUEST_HIT]
    records.append(record(CROSS_REQUEST_HIT, "speedup_vs_request_shared", speedup, "x"))
    if queues.chunk_rows is not None:
        speedup = seed_model_speedup(num_candidates)
        records.append(record(SEED_MODEL, "seed_model_speedup", speedup, "x"))
    return records

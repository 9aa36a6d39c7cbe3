"""Peak memory of one request against its number of candidates, by the path that scores it."""

from dataclasses import dataclass
from functools import partial
from math import prod

from torchrec_kvshare.benchmark.memory import peak_allocated_bytes
from torchrec_kvshare.benchmark.paths import CROSS_REQUEST_HIT
from torchrec_kvshare.benchmark.plots import GREY, Line
from torchrec_kvshare.benchmark.queues import QueueOptions, Queues, queue_picture
from torchrec_kvshare.benchmark.results import Record
from torchrec_kvshare.benchmark.workload import BYTES

MEMORY = "memory"
REPEATED_KV = "repeated_kv"

PICTURE_BY_NAME = {
    "memory": queue_picture(
        ("peak_bytes", "repeated_kv_bytes"),
        "peak above what was held [bytes]",
        REPEATED_KV,
        Line("one K/V copy per candidate", GREY, is_dashed=True),
    )
}


@dataclass
class MemoryOptions(QueueOptions):
    """Options of ``scenario=memory``; the counts are exact, so nothing is repeated."""


def measure_memory(options: MemoryOptions) -> list[Record]:
    """Measure the peak memory of scoring one request against its number of candidates.

    ``uncached_merged`` computes a chunk of candidates at a time, so its peak stops growing where a
    chunk is full; what it pays for that is time. ``repeated_kv_bytes`` is what copying one user's
    K/V to all candidates would add.

    Returns:
        Records of ``peak_bytes``, above what was allocated before; of ``kv_bytes_held``, the pages
        in the pool after the request; and of ``repeated_kv_bytes``.

    Raises:
        ParityError: if the logits of two paths differ.
    """
    records = []
    for history in (*options.histories, *options.long_histories):
        queues = Queues(MEMORY, options, history)
        [tower] = queues.paths.model.collection.towers()
        user_kv_bytes = BYTES * prod(tower.kv_shape) * tower.encoder.num_kv_rows(history)
        for request, score_by_path in queues.cases():
            record = partial(queues.record, num_candidates=request.num_candidates)
            for path, score in score_by_path.items():
                records.append(record(path, "peak_bytes", peak_allocated_bytes(score), "bytes"))
            held_bytes = queues.paths.cache.held_bytes
            repeated_bytes = (request.num_candidates - 1) * user_kv_bytes
            records += [
                record(CROSS_REQUEST_HIT, "kv_bytes_held", held_bytes, "bytes"),
                record(REPEATED_KV, "repeated_kv_bytes", repeated_bytes, "bytes"),
            ]
        records += queues.chunk_records()
    return records

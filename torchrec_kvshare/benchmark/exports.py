"""A model in another runtime, to be timed beside the eager one."""

import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from torchrec_kvshare.export.exporter import RUNTIMES
from torchrec_kvshare.features.schema import FeatureSchema
from torchrec_kvshare.model.ranking import RankingFunctions, RankingModel
from torchrec_kvshare.verify.audit import audit_model

EAGER = "eager"
MODEL_NAME = "benchmark"
WARM_CALLS = 3  # TorchScript rewrites a program after its first calls.


def exported(
    runtime: str, eager: RankingModel, schema: FeatureSchema
) -> tuple[RankingFunctions, list[tuple[str, float, str]]]:
    """Export and load the model; return it with the costs: metric, value and unit."""
    chosen = RUNTIMES[runtime]
    audit = audit_model(eager, schema)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        files = chosen.write(eager, schema, MODEL_NAME, audit, folder)
        written = time.perf_counter()
        spec = asdict(eager.collection.towers()[0].spec)
        model = chosen.load(folder, schema, spec)
        loaded = time.perf_counter()
        num_bytes = sum((folder / file).stat().st_size for file in files)
    return model, [
        ("export_s", written - start, "s"),
        ("load_s", loaded - written, "s"),
        ("artifact_bytes", float(num_bytes), "bytes"),
    ]

"""What K/V written in a codec does to a trained model's scores, and how many bytes it takes.

Nothing is timed. The artifact's manifest gets the figures: an engine asks there before it lets a
tier write in a codec.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from omegaconf import MISSING

from torchrec_kvshare.benchmark.effects import EffectOptions, effect_records, targeted_requests
from torchrec_kvshare.benchmark.options import PageSize
from torchrec_kvshare.benchmark.results import Case, Record
from torchrec_kvshare.cache.keys import read_key
from torchrec_kvshare.errors import DataError
from torchrec_kvshare.export.artifact import add_measured
from torchrec_kvshare.export.exporter import load_artifact
from torchrec_kvshare.features.tensors import FLOAT32
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.verify.codecs import codec_effects, effect_figures

CODEC = "codec"


@dataclass
class CodecOptions(EffectOptions, PageSize):
    """Options of ``scenario=codec``."""

    artifact: str = MISSING  # output of pipelines.export; its manifest gets the figures
    artifact_key_file: str | None = None  # secret the artifact must be signed with


@torch.no_grad()
def measure_codec(options: CodecOptions) -> list[Record]:
    """Measure how AUC, best candidates, scores and bytes change, by lossy codec.

    The AUC is the mean of the requests' own, see ``request_auc``; the positive is the item of the
    test event, whatever its label. Requests without events have no K/V and are left out.

    Returns:
        Of float32 its ``auc``; of each other codec ``auc_change``, ``top10_overlap``,
        ``max_score_difference`` and ``bytes_ratio``, whole records over those of float32.

    Raises:
        ArtifactError: if the artifact is broken.
        ConfigError: if the key, the data or the candidates cannot be used.
        DataError: if the data cannot be read, or no request has an event.
        RequestError: if the data lacks a column of the model.
        RecordError: if a codec cannot write the model's K/V.
    """
    folder = Path(options.artifact)
    key = read_key(options.artifact_key_file, "artifact_key_file")
    artifact = load_artifact(folder, key)
    engine = Engine(artifact.model, artifact.schema, None, version=artifact.manifest.version)
    requests = targeted_requests(options, artifact.schema)
    effects_by_codec = codec_effects(engine, requests, options.page_size)
    exact = effects_by_codec.pop(FLOAT32)
    if not exact:
        raise DataError(
            f"none of {options.requests} requests of data {options.data.name} has an event that "
            "is read"
        )
    figures_by_codec = {
        name: effect_figures(effects, exact) for name, effects in effects_by_codec.items()
    }
    measured = {"candidates": options.num_candidates, "requests": len(exact)}
    add_measured(
        folder, key, codecs={name: one | measured for name, one in figures_by_codec.items()}
    )
    case: Case = {"encoder": artifact.manifest.encoder["kind"]} | measured
    auc = fmean(effect.auc for effect in exact)
    return effect_records(CODEC, CODEC, auc=auc, figures_by_name=figures_by_codec, case=case)

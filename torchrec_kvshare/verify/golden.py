"""Proof that a loaded artifact scores as it did when it was exported.

An artifact holds requests with their scores. They are drawn from the schema alone and kept as raw
JSON, so that a host in any language checks its whole path from JSON to scores with them.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchrec_kvshare.cache.identity import UNNAMED
from torchrec_kvshare.errors import ArtifactError
from torchrec_kvshare.features.draw import draw_ragged_raws
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.features.schema import SCORES, FeatureSchema
from torchrec_kvshare.model.ranking import RankingFunctions
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.verify.parity import LOGIT_TOLERANCE

GOLDEN = "golden.json"
SEED = 0


def write_golden(folder: Path, model: RankingFunctions, schema: FeatureSchema) -> str:
    """Write drawn requests with the model's scores; return the file's name."""
    engine = Engine(model, schema, None, version=UNNAMED)
    raws = draw_ragged_raws(schema, SEED)
    answers = engine.rank([parse_request(raw, schema) for raw in raws])
    golden = [
        {"request": raw, SCORES: answer.scores} for raw, answer in zip(raws, answers, strict=True)
    ]
    (folder / GOLDEN).write_text(json.dumps(golden, allow_nan=False))
    return GOLDEN


def read_golden(folder: Path) -> list[Any]:
    """Read what ``write_golden`` wrote."""
    golden: list[Any] = json.loads((folder / GOLDEN).read_text())
    return golden


def check_golden(golden: Sequence[Any], engine: Engine, folder: Path) -> None:
    """Refuse a loaded model whose scores differ from those at export by over ``LOGIT_TOLERANCE``.

    Args:
        golden: what ``read_golden`` returned.
        engine: scores the requests with the loaded model.
        folder: the artifact, for the error message.

    Raises:
        ArtifactError: naming the request, the candidate, the task and both scores.
    """
    answers = engine.rank([parse_request(one["request"], engine.schema) for one in golden])
    for one, answer in zip(golden, answers, strict=True):
        expected_by_task = replace(answer, scores=one[SCORES]).scores_by_task
        for task, scores in answer.scores_by_task.items():
            of_task = f" for task {task}" if task else ""
            for index, (expected, got) in enumerate(
                zip(expected_by_task[task], scores, strict=True)
            ):
                if not abs(got - expected) <= LOGIT_TOLERANCE:
                    raise ArtifactError(
                        f"{folder} scores candidate {index} of golden request "
                        f"{answer.request_id} {got}{of_task} here; it was exported with {expected}"
                    )

"""The engine as a model of Triton's Python backend: requests and answers are the project's JSON.

The module ``triton_python_backend_utils`` exists only in a process that Triton starts.
"""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from torchrec_kvshare.cache.keys import read_key
from torchrec_kvshare.export.exporter import load_artifact
from torchrec_kvshare.export.open import new_engine
from torchrec_kvshare.export.triton import ANSWER, ARTIFACT, KEY_FILE, REQUEST
from torchrec_kvshare.scoring.files import score_lines

MAX_BATCH = 64  # requests scored together


class TritonPythonModel:
    """The class that Triton's Python backend calls; its method names are Triton's."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the artifact in this model's folder."""
        self._backend = importlib.import_module("triton_python_backend_utils")
        folder = Path(args["model_repository"]) / args["model_version"]
        parameters = json.loads(args.get("model_config", "{}")).get("parameters", {})
        key_file = parameters.get(KEY_FILE, {}).get("string_value")
        key = read_key(key_file, KEY_FILE)
        self._engine = new_engine(load_artifact(folder / ARTIFACT, key))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer the lines of each Triton request; a bad line gets its error in place of scores."""
        return [self._answer(request) for request in requests]

    def finalize(self) -> None:
        """Close the engine."""
        self._engine.close()

    def _answer(self, request: Any) -> Any:
        tensor = self._backend.get_input_tensor_by_name(request, REQUEST)
        # score_lines skips blank lines, but every line that Triton sends needs an answer.
        lines = [bytes(line).strip() or b"null" for line in tensor.as_numpy().flatten()]
        answers = [
            json.dumps(answer, allow_nan=False)
            for answer in score_lines(self._engine, lines, MAX_BATCH)
        ]
        output = self._backend.Tensor(ANSWER, np.array(answers, dtype=object))
        return self._backend.InferenceResponse(output_tensors=[output])

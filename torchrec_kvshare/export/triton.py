"""Write a model repository for Triton Inference Server: two models from one artifact.

``NAME`` is the program with its own cache, for the ``pytorch_libtorch`` platform: plain tensors, no
Python. ``NAME_engine`` is the engine with all its tiers, for the Python backend: requests and
answers are the project's JSON. The configs are Triton's own messages as text.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from torchrec_kvshare.cache.keys import read_key
from torchrec_kvshare.errors import ConfigError, MissingExtraError
from torchrec_kvshare.export.artifact import artifact_folder, read_artifact
from torchrec_kvshare.export.torchscript import PROGRAM, write_cached_forward
from torchrec_kvshare.features.tensors import FLOAT32, INT64, TensorSpec, input_specs
from torchrec_kvshare.verify.audit import CROSS_REQUEST

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

CONFIG = "config.pbtxt"
VERSION = "1"
ARTIFACT = "artifact"
MODEL_FILE = "model.py"
# Triton's Python backend looks for this class in a model's folder.
MODEL_SOURCE = (
    "from torchrec_kvshare.export.triton_model import TritonPythonModel as TritonPythonModel\n"
)
# Triton's PyTorch backend names results in their order: <name>__<index>.
SCORES, CACHE = "scores__0", "cache__1"
REQUEST, ANSWER = "request", "answer"
KEY_FILE = "artifact_key_file"  # a parameter of the engine's config


def write_repository(
    artifact: Path, destination: Path, name: str = "kvshare", key_file: str | None = None
) -> None:
    """Write a model repository that Triton serves.

    Args:
        artifact: of runtime TorchScript; it is copied.
        destination: the repository; must not exist.
        name: of the models.
        key_file: holds the key that the artifact must be signed with; Triton's host needs it at the
            same path.

    Raises:
        ArtifactError: if the artifact is broken or not signed with the key, or ``destination``
            exists.
        ConfigError: if the artifact holds no TorchScript program, or its model failed its audit.
        MissingExtraError: if ``tritonclient`` is not installed.
    """
    key = read_key(key_file, KEY_FILE)
    manifest, schema = read_artifact(artifact, key)
    if PROGRAM not in manifest.sha256_by_file:
        raise ConfigError(f"{artifact} has runtime {manifest.runtime}; Triton needs torchscript")
    if manifest.audit["scope"] != CROSS_REQUEST:
        raise ConfigError(f"{artifact} failed its audit: no K/V may be kept between requests")
    with artifact_folder(destination) as folder:
        program = folder / name / VERSION
        program.mkdir(parents=True)
        engine = folder / f"{name}_engine" / VERSION
        shutil.copytree(artifact, engine / ARTIFACT)
        read_artifact(engine / ARTIFACT, key)  # Check the copy: Triton loads that one.
        write_cached_forward(engine / ARTIFACT / PROGRAM, program / PROGRAM)
        config = program_config(name, input_specs(schema), len(schema.tasks))
        _write_config(folder / name, config)
        (engine / MODEL_FILE).write_text(MODEL_SOURCE)
        _write_config(folder / f"{name}_engine", engine_config(f"{name}_engine", key_file))


def program_config(name: str, inputs: Sequence[TensorSpec], num_tasks: int) -> "ModelConfig":
    """Return the program's config: a tensor for each input; scores and use of the cache as outputs.

    Args:
        name: of the model.
        inputs: of the program.
        num_tasks: columns of its scores.
    """
    config = _new_config(name)
    config.platform = "pytorch_libtorch"
    config.default_model_filename = PROGRAM
    type_by_dtype = {INT64: _pb().TYPE_INT64, FLOAT32: _pb().TYPE_FP32}
    for spec in inputs:
        config.input.add(name=spec.name, data_type=type_by_dtype[spec.dtype], dims=spec.shape)
    config.output.add(name=SCORES, data_type=_pb().TYPE_FP64, dims=[-1, num_tasks])
    config.output.add(name=CACHE, data_type=_pb().TYPE_INT64, dims=[-1, 4])
    return config


def engine_config(name: str, key_file: str | None = None) -> "ModelConfig":
    """Return the engine's config: requests as JSON texts in, one answer for each out.

    Args:
        name: of the model.
        key_file: holds the key that the artifact must be signed with.
    """
    config = _new_config(name)
    config.backend = "python"
    config.input.add(name=REQUEST, data_type=_pb().TYPE_STRING, dims=[-1])
    config.output.add(name=ANSWER, data_type=_pb().TYPE_STRING, dims=[-1])
    if key_file is not None:
        config.parameters[KEY_FILE].string_value = str(Path(key_file).resolve())
    return config


def _new_config(name: str) -> "ModelConfig":
    # No batching by Triton: the inputs differ in their number of rows.
    config = _pb().ModelConfig(name=name, max_batch_size=0)
    # One instance, because it holds the cache; calls of a program must not overlap.
    config.instance_group.add(count=1, kind=_pb().ModelInstanceGroup.KIND_CPU)
    return config


def _write_config(folder: Path, config: "ModelConfig") -> None:
    from google.protobuf import text_format  # comes with tritonclient

    (folder / CONFIG).write_text(text_format.MessageToString(config))


def _pb() -> ModuleType:
    try:
        from tritonclient.grpc import model_config_pb2  # an extra
    except ImportError as error:
        raise MissingExtraError("triton", "a Triton model repository") from error
    return model_config_pb2

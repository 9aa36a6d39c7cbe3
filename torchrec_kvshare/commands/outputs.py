"""Checks of a pipeline's outputs, before it does anything.

An output that cannot be written, that is also an input, or that two jobs of a sweep share is an
error before the first hour of work, not after it.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ValueType
from omegaconf import DictConfig, OmegaConf

from torchrec_kvshare.config import writes_file
from torchrec_kvshare.errors import ConfigError

OUTPUTS = ("output", "tensorboard", "server.tensorboard")
INPUTS = ("run", "artifact", "models", "requests", "data.path", "data.root")


def check_outputs(config: Any) -> None:
    """Refuse outputs that cannot be written or that are inputs, before anything is written.

    Args:
        config: a pipeline's config, an instance of its schema.

    Raises:
        ConfigError: naming the key.
    """
    for key, output in _paths(config, OUTPUTS):
        is_file = key == "output" and writes_file(config)
        _check_kind(key, output, is_file)
        _check_parent(key, output)
        for other_key, other in _paths(config, INPUTS):
            if other.resolve() == output.resolve() or _is_same_file(output, other):
                raise ConfigError(f"{key} is {str(output)!r}, which is {other_key} too")


def refuse_shared_outputs(overrides: Sequence[str]) -> None:
    """Refuse a sweep in which two jobs would write to one output.

    Values with ``${…}`` may differ by job, so they are checked when their job starts.

    Args:
        overrides: the overrides of a sweep's command line.

    Raises:
        ConfigError: naming the key.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    # Only Hydra can expand a glob, which may give any number of jobs.
    globs = [one for one in parsed if one.value_type == ValueType.GLOB_CHOICE_SWEEP]
    known = [one for one in parsed if one not in globs]
    (jobs,) = BasicSweeper.split_arguments(known, None)
    for key in OUTPUTS:
        values = [value for job in jobs for value in job if value.lstrip("+").startswith(f"{key}=")]
        for value, num_jobs in Counter(values).items():
            # The sweeper escapes braces with backslashes.
            is_literal = "${" not in value.replace("\\", "")
            if is_literal and (num_jobs > 1 or globs):
                raise ConfigError(_shared(key, value))


def give_own_output(composed: DictConfig, job: int, taken: set[str], *, is_default: bool) -> None:
    """Give a job of a sweep an output of its own.

    Args:
        composed: the job's config; a default output gets the job's number.
        job: its number in the sweep.
        taken: outputs of earlier jobs; this job's outputs are added.
        is_default: whether the command line leaves the output to the config.

    Raises:
        ConfigError: if an earlier job has this output.
    """
    if "output" not in composed:
        return
    if is_default:
        path = Path(composed.output)
        composed.output = str(path.with_stem(f"{path.stem}-{job}"))
    for key in OUTPUTS:
        value = OmegaConf.select(composed, key)
        override = f"{key}={value}"
        if override in taken:
            raise ConfigError(_shared(key, override))
        if value is not None:
            taken.add(override)


def _shared(key: str, override: str) -> str:
    return (
        f"{override} is the output of several jobs of this sweep; each needs its own, such as "
        f"'{key}=runs/${{hydra:job.num}}'"
    )


def _paths(config: Any, keys: Sequence[str]) -> Iterator[tuple[str, Path]]:
    for key in keys:
        value = config
        for name in key.split("."):
            value = getattr(value, name, None)
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, str):
                yield key, Path(path)


def _check_kind(key: str, output: Path, is_file: bool) -> None:
    if not output.exists() or (output.is_file() if is_file else output.is_dir()):
        return
    kind = "folder" if output.is_dir() else "file" if output.is_file() else "device"
    needed = "file" if is_file else "folder"
    raise ConfigError(f"{key} is {str(output)!r}, which is a {kind}; a {needed} is needed")


def _check_parent(key: str, output: Path) -> None:
    """Check that the nearest existing parent folder can be written to."""
    parent = next(one for one in output.absolute().parents if one.exists())
    if output.is_dir():
        parent = output.absolute()
    if not parent.is_dir():
        raise ConfigError(f"{key} is {str(output)!r}, but {str(parent)!r} is a file")
    try:
        TemporaryFile(dir=parent).close()
    except OSError as error:
        raise ConfigError(
            f"{key} is {str(output)!r}, but nothing can be written to {str(parent)!r}: "
            f"{error.strerror}"
        ) from error


def _is_same_file(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)

"""Pipelines as commands: a user's mistake ends in one line, a bug in its traceback.

Exit statuses: 0 success, 1 a bug, 2 a user's mistake, 3 some requests were refused, 130
interrupted, 141 the reader of standard output is gone.
"""

import functools
import inspect
import logging
import os
import runpy
import select
import signal
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from difflib import get_close_matches
from errno import EDQUOT, ENAMETOOLONG, ENOSPC, EROFS
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from torchrec_kvshare.commands.help import help_of, list_of_pipelines
from torchrec_kvshare.commands.layout import PIPELINES, pipeline_names
from torchrec_kvshare.commands.messages import message_of
from torchrec_kvshare.commands.outputs import (
    check_outputs,
    give_own_output,
    refuse_shared_outputs,
)
from torchrec_kvshare.commands.process import prepare_torch, share_cores
from torchrec_kvshare.config import Schema, checked, literal_overrides
from torchrec_kvshare.errors import ConfigError, KVShareError, TrainingError

FULL_ERROR = "HYDRA_FULL_ERROR"
HELP = ("--help", "-h")
FAILED, MISTAKE = 1, 2
INTERRUPTED = 128 + signal.SIGINT
UNREAD = 128 + signal.SIGPIPE
# Our errors and Hydra's, and what the system refuses because of a path.
MISTAKES = (
    *(KVShareError, HydraException, OmegaConfBaseException),
    *(PermissionError, IsADirectoryError, NotADirectoryError),
)
DISK_ERRNOS = (ENOSPC, EDQUOT, EROFS, ENAMETOOLONG)  # the disk's or the path's fault
# Not installed as dependencies: torchrec's metadata asks for the CUDA build of fbgemm.
BY_HAND = ("torchrec", "fbgemm_gpu")

SchemaOf = Callable[[DictConfig], type[Schema]]


@dataclass
class _Jobs:
    """Results of the jobs of one command; a sweep has several."""

    pipeline: str
    full_error: str | None  # HYDRA_FULL_ERROR as the user has set it
    has_default_output: bool
    statuses: list[int] = field(default_factory=list)
    outputs: set[str] = field(default_factory=set)


# Jobs of the command that runs in this process; None if a pipeline is called from Python.
_JOBS: ContextVar[_Jobs | None] = ContextVar("jobs", default=None)


def pipeline(
    schema: type[Schema] | SchemaOf[Schema],
) -> Callable[[Callable[[Schema], None]], Callable[..., None]]:
    """Turn a function of a checked config into one of a composed config, for ``hydra.main``.

    Args:
        schema: the dataclass that the config must fit, or a function that picks it by the composed
            config; its ``threads`` are torch's.

    Returns:
        The decorator. A decorated function raises its errors when called from Python; as a command
        it reports them, so that the other jobs of a sweep run.
    """

    def decorate(main: Callable[[Schema], None]) -> Callable[..., None]:
        @functools.wraps(main)
        def job(composed: DictConfig) -> None:
            jobs = _JOBS.get()
            if jobs is None:
                main(_prepare(composed, schema))
            else:
                _run_job(jobs, composed, lambda: main(_prepare(composed, schema)))

        return job

    return decorate


def run(main: Callable[[], Any]) -> NoReturn:
    """Run a pipeline with the command line's arguments, and exit.

    Args:
        main: the pipeline's function, decorated with ``hydra.main`` and ``pipeline``.
    """
    name = Path(inspect.getfile(inspect.unwrap(main))).stem
    sys.exit(_status(functools.partial(_run, main, name), name))


def kvshare() -> NoReturn:
    """Run the command ``kvshare``, whose first argument names the pipeline, and exit."""
    name, *arguments = sys.argv[1:] or HELP
    if name in HELP:
        sys.exit(_status(lambda: print(list_of_pipelines()), name))
    if name not in pipeline_names():
        near = get_close_matches(name, pipeline_names(), 1)
        known = f"did you mean {near[0]}?" if near else f"one of {pipeline_names()} is allowed"
        _print_error(f"{name!r} is not a pipeline; {known}")
        sys.exit(MISTAKE)
    if set(HELP) & set(arguments):  # Printed without importing the pipeline.
        sys.exit(_status(lambda: print(help_of(name, arguments)), name))
    sys.argv = [sys.argv[0], *arguments]
    share_cores()
    sys.exit(_status(lambda: _run_file(name), name))


def _run_file(name: str) -> None:
    try:
        runpy.run_path(str(PIPELINES / f"{name}.py"), run_name="__main__")
    except ModuleNotFoundError as error:
        if error.name not in BY_HAND:
            raise
        raise ConfigError(
            f"{error.name} is not installed; pip install --no-deps torchrec fbgemm-gpu-cpu, or see "
            "Install in README.md"
        ) from error


def _run(main: Callable[[], Any], name: str) -> None:
    arguments = literal_overrides(sys.argv[1:])
    if set(HELP) & set(arguments):
        print(help_of(name, arguments))
        return
    options = _options(arguments)
    if _is_sweep(options):
        refuse_shared_outputs(options.overrides)
    has_default_output = not any(one.lstrip("+").startswith("output=") for one in options.overrides)
    jobs = _Jobs(name, os.environ.get(FULL_ERROR), has_default_output)
    sys.argv = [sys.argv[0], *arguments]
    # If standard output is closed, logging would print a traceback for every line.
    logging.raiseExceptions = False
    token = _JOBS.set(jobs)
    try:
        with _environment(FULL_ERROR, "1"):  # Makes Hydra raise errors instead of printing them.
            main()
    except Exception as error:
        # Jobs report their own errors, so this is Hydra's, about its arguments.
        jobs.statuses.append(_report(error, name, is_mistake=True))
    finally:
        _JOBS.reset(token)
    sys.exit(next((status for status in jobs.statuses if status), 0))


def _run_job(jobs: _Jobs, composed: DictConfig, action: Callable[[], None]) -> None:
    is_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    number = HydraConfig.get().job.num if is_sweep else 0

    def prepared() -> None:
        if is_sweep:
            give_own_output(composed, number, jobs.outputs, is_default=jobs.has_default_output)
        action()

    # Processes that the job starts must see the user's own setting.
    with _environment(FULL_ERROR, jobs.full_error):
        label = f"job {number}: " if is_sweep else ""
        jobs.statuses.append(_status(prepared, jobs.pipeline, label))


def _prepare(composed: DictConfig, schema: type[Schema] | SchemaOf[Schema]) -> Schema:
    chosen: type[Schema] = schema if isinstance(schema, type) else schema(composed)
    config = checked(composed, chosen)
    check_outputs(config)
    if hasattr(config, "threads") and "torch" in sys.modules:  # serve_cluster computes nothing.
        prepare_torch(config.threads)
    return config


def _options(arguments: Sequence[str]) -> Namespace:
    """Parse the arguments as Hydra does; raise a ConfigError for what it cannot parse."""
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise ConfigError(message)

    parser.error = refuse  # type: ignore[method-assign]
    options = parser.parse_args(arguments)
    for override in options.overrides:
        key, equals, _ = override.partition("=")
        if not key or not (equals or key.startswith("~")):
            raise ConfigError(f"{override!r} is not key=value")
    return options


def _is_sweep(options: Namespace) -> bool:
    return bool(options.multirun) or "hydra.mode=MULTIRUN" in options.overrides


def _status(action: Callable[[], None], name: str, job: str | None = None) -> int:
    """Run an action, or a job of Hydra's, and report its error; return the exit status."""
    try:
        action()
        sys.stdout.flush()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except KeyboardInterrupt:
        if job is not None:  # Ends the whole sweep.
            raise
        return INTERRUPTED
    except BrokenPipeError as error:
        return UNREAD if _is_unread() else _report(error, name, is_mistake=False)
    except Exception as error:
        return _report(error, name, job or "", is_mistake=_is_mistake(error))
    return 0


def _report(error: Exception, name: str, job: str = "", *, is_mistake: bool) -> int:
    if not is_mistake or os.environ.get(FULL_ERROR) == "1":
        traceback.print_exception(error)
    else:
        _print_error(job + message_of(error, name))
    # That training diverges is its outcome, not a mistake in the command.
    return MISTAKE if is_mistake and not isinstance(error, TrainingError) else FAILED


def _is_mistake(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in DISK_ERRNOS:
        return True
    return isinstance(error, MISTAKES)


def _is_unread() -> bool:
    """Whether standard output has lost its reader; if so, send further output to /dev/null."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)  # poll reports errors without being asked to.
    if not output.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _print_error(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)


@contextmanager
def _environment(variable: str, value: str | None) -> Iterator[None]:
    """Set an environment variable, or unset it, until the block ends."""
    before = os.environ.get(variable)
    _set(variable, value)
    try:
        yield
    finally:
        _set(variable, before)


def _set(variable: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(variable, None)
    else:
        os.environ[variable] = value

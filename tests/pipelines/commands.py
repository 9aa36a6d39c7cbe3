"""Run pipelines as a user does: in a new process, or in this one if that is enough."""

import importlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from tests.processes import ROOT, ForkedPython
from tests.worlds import fresh_process

CONFIGS = ROOT / "configs"
WORLD = (
    "data.num_users=40",
    "data.events_per_user=40",
    "data.num_items=60",
    "data.num_categories=6",
)
TINY = (
    "budget=smoke",
    "threads=1",
    "model.dim=16",
    "model.num_heads=2",
    "model.top_mlp=[16,1]",
    "model.max_history=32",
    "model.block=8",
)

# Runs one command line after another, so that torch is imported once.
ONE_AFTER_ANOTHER = """
import contextlib, io, json, os, sys
from torchrec_kvshare.commands.run import kvshare

os.chdir(sys.argv[1])
for arguments in json.loads(sys.argv[2]):
    sys.argv = ["kvshare", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        with contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                kvshare()
            except SystemExit as ended:
                status = ended.code
    print(json.dumps([status, out.getvalue(), err.getvalue()]), flush=True)
"""


class Ended(NamedTuple):
    """Exit status and output of a command."""

    status: int
    stdout: str
    stderr: str


def composed(name: str, *overrides: str, configs: Path = CONFIGS) -> DictConfig:
    """Compose the config of a pipeline, unchecked."""
    with initialize_config_dir(str(configs), version_base="1.3"):
        return compose(name, overrides=list(overrides))


def run_pipeline(name: str, *overrides: str, configs: Path = CONFIGS) -> None:
    """Compose and run a pipeline in this process."""
    config = composed(name, *overrides, configs=configs)
    importlib.import_module(f"pipelines.{name}").main(config)


def spawn_pipeline(name: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run ``python -m pipelines.NAME`` with arguments as a shell passes them."""
    process = ForkedPython(
        [sys.executable, "-W", "ignore", "-m", f"pipelines.{name}", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    output, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def run_all(folder: Path, commands: Iterable[str]) -> list[Ended]:
    """Run command lines in one new process; ``{folder}`` in them is its working directory."""
    argvs = [shlex.split(command.replace("{folder}", str(folder))) for command in commands]
    process = fresh_process(ONE_AFTER_ANOTHER, str(folder), json.dumps(argvs))
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return endings(output)


def endings(output: str) -> list[Ended]:
    """Read what ``ONE_AFTER_ANOTHER`` printed."""
    return [Ended(*json.loads(line)) for line in output.splitlines()]

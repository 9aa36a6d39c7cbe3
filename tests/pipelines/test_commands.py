"""A command ends in its result, in one line about a mistake, or in the traceback of a bug."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.pipelines.commands import CONFIGS, ROOT, TINY, WORLD, Ended, run_all
from tests.worlds import new_interpreter
from torchrec_kvshare.commands.help import (
    comment_of,
    groups_of,
    help_of,
    keys_of,
    list_of_pipelines,
    options_of,
)
from torchrec_kvshare.commands.layout import pipeline_names, typed_command

FAILED, MISTAKE, REFUSED, INTERRUPTED, UNREAD = 1, 2, 3, 130, 141


# ----------------------------------------------------------------------- commands of the project

NOWHERE = "is the output of several jobs of this sweep"
EMPTY = "output is empty; set output=…, or leave it out"
MESSAGE_BY_COMMAND = {
    # --- keys
    "trian": "'trian' is not a pipeline; did you mean train?",
    "train model.dimm=16": "model.dimm is not a key of train; did you mean model.dim?",
    "train dim=16": "dim is not a key of train; did you mean model.dim?",
    "train hist=causal": "hist is not a key of train; did you mean history?",
    "train ~modell": "modell is not a key of train; did you mean model?",
    "make_requests zzz=1": "zzz is not a key of make_requests; its keys are candidates, count, "
    "data, output, partitions, seed",
    "train cache=memory": "cache is not a key of train; its keys are",
    "train data.root=x": "data.root is a key of data=completejourney or data=movielens or "
    "data=online_retail; choose that,",
    "score artifact=a requests=b cache.watermark=1": "cache.watermark is a key of cache=tiered;",
    "train ++model.dimm=16": "model.dimm is not a key of this config; did you mean dim?",
    "profile_scoring userss=(": "userss is not a key of profile_scoring; did you mean users?",
    # --- keys of a scenario
    "benchmark dimm=3": "dimm is not a key of benchmark; did you mean dim?",
    "benchmark scenario=attention page_size=8": "page_size is a key of scenario=ahead or",
    "benchmark scenario=append data=movielens": "data is a key of scenario=cache_trace or scenario="
    "codec or scenario=history_length or scenario=tables; choose that",
    "benchmark scenario=append ++data.seed=3": "data is not a key of this config; its keys are",
    "benchmark scenario=memory ++repeats=9": "repeats is not a key of this config; its keys are",
    "benchmark scenario=append histories=[0]": "histories is [0]; each must be at least 1",
    "benchmark scenario=append encoders=[lstm]": "encoders has ['lstm']; ('causal', ",
    "benchmark scenario=codec": "artifact is missing; set artifact=…",
    "benchmark scenario=tables": "run is missing; set run=…",
    # --- how they are written
    "train foo": "'foo' is not key=value",
    "train =3": "'=3' is not key=value",
    "train +seed=3": "Could not append to config. An item is already at 'seed'.",
    "train seed=0,1": "seed is '0,1': write seed=[0,1] for a list",
    "train --foo": "unrecognized arguments: --foo",
    "train --cfg=x": "argument --cfg/-c: invalid choice: 'x'",
    "train --run --cfg=job": "Only one of --run, --multirun, --cfg,",
    "train --resolve": "The --resolve flag can only be used",
    "train --config-path=/nowhere": "Primary config directory not found. Check that",
    "train --config-dir=/nowhere": "Additional config directory '/nowhere' not found",
    "train --config-name=nothing": "Cannot find primary config 'nothing'.",
    # --- values
    "train data=nothing": "data is 'nothing'; one of ['completejourney', 'interactions',",
    "benchmark scenario=speed": "scenario is 'speed'; one of ['ahead', 'append', ",
    "train data=movielens": "data.root is missing; set data.root=…",
    "train model.dim=wide": "model.dim: Value 'wide' of type 'str' could not be converted",
    "train output=${nothing}": "output: Interpolation key 'nothing' not found",
    "train model.dim=0": "model.dim is 0; it must be at least 1",
    # --- an empty variable of a shell
    "train output=": EMPTY,
    "audit run=a output=": EMPTY,
    "benchmark output=": EMPTY,
    "demo output=": EMPTY,
    "export run=a output=": EMPTY,
    "make_requests output=": EMPTY,
    "profile_scoring output=": EMPTY,
    "score artifact=a requests=b output=": EMPTY,
    "serve_cluster artifact=a output=": EMPTY,
    "train output=' '": EMPTY,
    "export run=": "run is empty; set run=…",
    "audit run=": "run is empty; set run=…",
    "score artifact= requests=b": "artifact is empty; set artifact=…",
    "score artifact=a requests=": "requests is empty; set requests=…",
    "score artifact=a requests=b tensorboard=": "tensorboard is empty; set tensorboard=…",
    "serve artifact=": "artifact is empty; set artifact=…",
    "serve models=": "models is empty; set models=…",
    "serve artifact=a server.host=": "server.host is empty; set server.host=…",
    "serve artifact=a cache=tiered cache.disk.folder=": "cache.disk.folder is empty; set",
    "train data=movielens data.root=": "data.root is empty; set data.root=…",
    "train data=interactions data.path=": "data.path is empty; set data.path=…",
    # --- where nothing can be written
    "train output=file": "output is 'file', which is a file; a folder is needed",
    "export run=a output=file/a/b": "output is 'file/a/b', but '{folder}/file' is a file",
    "make_requests output=folder": "output is 'folder', which is a folder; a file is needed",
    "make_requests output=/dev/null": "output is '/dev/null', which is a device; a file is needed",
    "score artifact=a requests=b output=file/a": "output is 'file/a', but '{folder}/file' is a",
    "score artifact=a requests=b tensorboard=file": "tensorboard is 'file', which is a file;",
    "serve artifact=a server.tensorboard=file": "server.tensorboard is 'file', which is a file;",
    "audit run=a output=/proc/a": "output is '/proc/a', but nothing can be written to '/proc':",
    # A shell has taken the quotes off.
    "profile_scoring output=file/(1)": "output is 'file/(1)', but",
    # --- where an input is
    "score artifact=a requests=file output=./file": "output is 'file', which is requests too",
    "score artifact=a requests=file output=link": "output is 'link', which is requests too",
    "export run=folder output={folder}/folder": "output is '{folder}/folder', which is run too",
    "audit run=folder output=folder": "output is 'folder', which is run too",
    "train data=movielens data.root=folder output=folder": "output is 'folder', which is data.root",
    "make_requests data=interactions data.path=file output=file": "output is 'file', which is data",
    "benchmark scenario=tiers artifact=folder output=folder": "output is 'folder', which is",
    "serve_cluster artifact=folder output=folder": "output is 'folder', which is artifact too",
    # --- what is not there
    "score artifact=a requests=file output=b": "a is no artifact: it has no manifest.json",
    "export run=a output=b": "a holds no finished run: it has no metrics.json",
    "audit run=a output=b": "a holds no finished run: it has no metrics.json",
    # --- several jobs, one output
    "train -m seed=0,1 output=a": f"output=a {NOWHERE}",
    "audit -m run=a,b output=a": f"output=a {NOWHERE}",
    "benchmark -m seed=0,1 output=a": f"output=a {NOWHERE}",
    "demo -m seed=range(2) output=a": f"output=a {NOWHERE}",
    "export -m run=a target=pt2,triton output=a": f"output=a {NOWHERE}",
    "make_requests -m seed=0,1 output=a": f"output=a {NOWHERE}",
    "make_requests -m seed=0,1 output=a,b": f"output=a {NOWHERE}",
    "make_requests hydra.mode=MULTIRUN seed=0,1 output=a": f"output=a {NOWHERE}",
    "make_requests -m data=glob(*) output=a": f"output=a {NOWHERE}",
    "profile_scoring -m seed=0,1 output=a": f"output=a {NOWHERE}",
    "score -m artifact=a,b requests=c output=a": f"output=a {NOWHERE}",
    "score -m artifact=a,b requests=c tensorboard=a": f"tensorboard=a {NOWHERE}",
    "serve_cluster -m artifact=a,b output=a run=false": f"output=a {NOWHERE}",
}


class Commands(NamedTuple):
    """Results of several commands in one folder."""

    folder: Path
    ended_by_name: dict[str, Ended]


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory: pytest.TempPathFactory) -> Commands:
    folder = tmp_path_factory.mktemp("mistakes").resolve()
    (folder / "file").write_text("user_id,item_id,time\n")
    (folder / "link").hardlink_to(folder / "file")
    (folder / "folder").mkdir()
    ended = run_all(folder, list(MESSAGE_BY_COMMAND))
    return Commands(folder, dict(zip(MESSAGE_BY_COMMAND, ended, strict=True)))


@pytest.mark.parametrize("command", MESSAGE_BY_COMMAND)
def test_a_mistake_ends_in_one_line_that_says_what_to_do(mistakes: Commands, command: str) -> None:
    """A misspelt key was four lines of Hydra's, a missing file a 40-line traceback, status 1."""
    ended = mistakes.ended_by_name[command]
    message = MESSAGE_BY_COMMAND[command].replace("{folder}", str(mistakes.folder))
    assert ended.status == MISTAKE, ended.stderr
    assert ended.stdout == ""
    assert ended.stderr.startswith(f"error: {message}")
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.endswith("\n")


def test_a_mistake_writes_nothing(mistakes: Commands) -> None:
    """``output=`` wrote into the working directory, and ``output=LOG`` over the log."""
    left = {path.name for path in mistakes.folder.iterdir()}
    assert left == {"file", "folder", "link"}
    assert (mistakes.folder / "file").read_text() == "user_id,item_id,time\n"
    assert list((mistakes.folder / "folder").iterdir()) == []


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory: pytest.TempPathFactory) -> Commands:
    folder = tmp_path_factory.mktemp("sweeps")
    small = " ".join((*WORLD, "count=2", "candidates=3"))
    command_by_name = {
        "default output": "make_requests -m seed=0,1",
        "by number": "make_requests -m seed=2,3 'output=own-${hydra:job.num}.jsonl'",
        "by another value": "make_requests -m seed=4,5 'output=one-${count}.jsonl'",
        "one job": "make_requests -m seed=6 output=single.jsonl",
        "two outputs": "make_requests -m output=c.jsonl,d.jsonl",
    }
    commands = [f"{command} {small}" for command in command_by_name.values()]
    # Not a sweep, but it needs a process too.
    run = tmp_path_factory.mktemp("diverged") / "run"
    rates = "learning_rate=1e30 table_learning_rate=1e30 checkpoint_seconds=0"
    commands.append(" ".join(("train", *WORLD, *TINY, f"output={run}", rates)))
    names = [*command_by_name, "diverged"]
    return Commands(folder, dict(zip(names, run_all(folder, commands), strict=True)))


def test_a_training_that_diverges_ends_in_one_line_and_a_status(sweeps: Commands) -> None:
    """``learning_rate=1e6`` ended with exit status 0 and an NE of NaN."""
    ended = sweeps.ended_by_name["diverged"]
    assert ended.status == FAILED
    last = ended.stderr.splitlines()[-1]
    assert re.match(r"error: causal, epoch 1, batch \d+: .*Last finite checkpoint, kept in ", last)


def test_jobs_of_a_sweep_write_to_files_of_their_own(sweeps: Commands) -> None:
    """Both jobs of ``make_requests -m seed=0,1`` wrote to one file, the second over the first."""
    ended = sweeps.ended_by_name["default output"]
    assert ended.status == 0, ended.stderr
    written = re.findall(r"wrote 2 requests to (\S+)", ended.stdout)
    assert [name[-8:] for name in written] == ["-0.jsonl", "-1.jsonl"]
    contents = [(sweeps.folder / name).read_text() for name in written]
    assert contents[0] != contents[1]


def test_outputs_that_differ_by_job_are_kept(sweeps: Commands) -> None:
    for name in ("by number", "one job", "two outputs"):
        assert sweeps.ended_by_name[name].status == 0
    for stem in ("own-0", "own-1", "single", "c", "d"):
        assert (sweeps.folder / f"{stem}.jsonl").is_file()


def test_a_job_does_not_write_over_the_one_before_it(sweeps: Commands) -> None:
    ended = sweeps.ended_by_name["by another value"]
    assert ended.status == MISTAKE
    assert ended.stderr.startswith(f"error: job 1: output=one-2.jsonl {NOWHERE}")
    assert ended.stdout.count("wrote 2 requests") == 1


def test_hydra_leaves_one_file_for_a_sweep_and_no_folders_for_its_jobs(sweeps: Commands) -> None:
    left = [path.relative_to(sweeps.folder) for path in sweeps.folder.rglob("*") if path.is_file()]
    others = [path for path in left if path.suffix != ".jsonl"]
    assert others
    assert {(path.parts[:2], path.name) for path in others} == {
        (("runs", "multirun"), "multirun.yaml")
    }


def test_hydras_flags_and_help_work(tmp_path: Path) -> None:
    text_by_command = {
        "train --cfg job": "batch_targets: 256\n",
        "train --info defaults": "data/synthetic",
        "train --hydra-help": "--config-dir",
        "train data=nothing --help": help_of("train") + "\n",
        "--help": list_of_pipelines() + "\n",
        "": list_of_pipelines() + "\n",
    }
    all_ended = run_all(tmp_path, list(text_by_command))
    for text, ended in zip(text_by_command.values(), all_ended, strict=True):
        assert (ended.status, ended.stderr) == (0, "")
        assert text in ended.stdout


# ---------------------------------------------------------------------- the test's own pipeline

OWN_PIPELINE = """
import os, signal, sys, time
import hydra
from torchrec_kvshare.commands.run import pipeline, run
from torchrec_kvshare.config import AuditConfig
from torchrec_kvshare.errors import DataError


@hydra.main(version_base="1.3", config_path={configs!r}, config_name="audit")
@pipeline(AuditConfig)
def main(config: AuditConfig) -> None:
    print(f"{{config.run}} in {{config.output}}", flush=True)
    if config.run == "mistake":
        raise DataError("the first line\\n  and the second")
    if config.run == "bug":
        print(1 / 0)
    if config.run == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    if config.run == "full":
        with open("/dev/full", "w") as file:
            file.write("more than fits")
    if config.run == "refused":
        sys.exit(3)
    if config.run == "environment":
        print("HYDRA_FULL_ERROR is", os.environ.get("HYDRA_FULL_ERROR"))


if __name__ == "__main__":
    run(main)
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "audit.py"
    path.write_text(OWN_PIPELINE.format(configs=str(CONFIGS)))
    return path


def run_own(own: Path, *arguments: str, **environment: str) -> Ended:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(own), *arguments],
        cwd=own.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def test_an_error_of_ours_is_one_line_or_with_full_error_a_traceback(own: Path) -> None:
    ended = run_own(own, "run=mistake", "output=a")
    assert ended == Ended(MISTAKE, "mistake in a\n", "error: the first line and the second\n")
    ended = run_own(own, "run=mistake", "output=a", HYDRA_FULL_ERROR="1")
    assert ended.status == MISTAKE
    assert ended.stderr.startswith("Traceback")
    ended = run_own(own, "runn=mistake", HYDRA_FULL_ERROR="1")
    assert ended.status == MISTAKE
    assert "ConfigCompositionException" in ended.stderr


def test_a_bug_keeps_its_traceback(own: Path) -> None:
    ended = run_own(own, "run=bug", "output=a")
    assert ended.status == FAILED
    assert ended.stderr.startswith("Traceback")
    assert "ZeroDivisionError" in ended.stderr


def test_a_full_disk_is_not_a_bug(own: Path) -> None:
    ended = run_own(own, "run=full", "output=a")
    assert ended.status == MISTAKE
    assert ended.stderr == "error: [Errno 28] No space left on device\n"


def test_an_interrupted_command_is_silent(own: Path) -> None:
    ended = run_own(own, "-m", "run=interrupt,ok")
    assert ended.status == INTERRUPTED
    assert ended.stderr == ""
    assert "ok in" not in ended.stdout


def test_a_closed_standard_output_gives_no_traceback(own: Path) -> None:
    """``kvshare train | head -1`` ended in two tracebacks."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as stdout:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(own), "run=ok", "output=a"],
            cwd=own.parent,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (UNREAD, "")


def test_every_job_of_a_sweep_runs_and_reports_its_own_error(own: Path) -> None:
    """A refused line in the first job kept the others of a sweep from starting."""
    ended = run_own(own, "-m", "run=refused,mistake,ok")
    assert ended.status == REFUSED
    assert ended.stderr == "error: job 1: the first line and the second\n"
    lines = ended.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["refused", "mistake", "ok"]
    assert len({line.split()[-1] for line in lines}) == 3


def test_processes_of_a_pipeline_see_the_users_environment(own: Path) -> None:
    assert run_own(own, "run=environment").stdout.endswith("HYDRA_FULL_ERROR is None\n")
    ended = run_own(own, "run=environment", HYDRA_FULL_ERROR="0")
    assert ended.stdout.endswith("HYDRA_FULL_ERROR is 0\n")


# ------------------------------------------------------------------------------------------ help


def test_help_imports_no_torch() -> None:
    program = """
import sys
from torchrec_kvshare.commands.run import kvshare
for arguments in (["--help"], ["train", "-h"]):
    sys.argv = ["kvshare", *arguments]
    try:
        kvshare()
    except SystemExit as ended:
        assert ended.code == 0
assert "torch" not in sys.modules
"""
    process = new_interpreter(program)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "usage: kvshare NAME" in output
    assert "usage: python -m pipelines.train" in output


def test_every_pipeline_is_listed_with_what_it_does() -> None:
    lines = list_of_pipelines().splitlines()
    for name in pipeline_names():
        (line,) = [line for line in lines if line.startswith(f"  {name} ")]
        assert re.fullmatch(rf"  {name} +[A-Z][^`]+\.", line)


@pytest.mark.parametrize("name", pipeline_names())
def test_help_shows_a_pipelines_values_with_their_comments_and_its_groups_alone(name: str) -> None:
    shown = help_of(name)
    assert shown.startswith(f"usage: {' '.join(typed_command(name))} [key=value ...]\n")
    for line in (CONFIGS / f"{name}.yaml").read_text().partition("\n\n")[2].splitlines():
        assert f"  {line}".rstrip() in shown.splitlines()
    assert "hydra_quiet" not in shown
    defaults = (CONFIGS / f"{name}.yaml").read_text().partition("\n\n")[0]
    for folder in CONFIGS.iterdir():
        if folder.is_dir():
            is_taken = folder.name in groups_of(name)
            assert (f"{folder.name}=" in shown.partition("Groups")[2]) == is_taken
            assert is_taken or f"{folder.name}:" not in defaults
    for group, default in groups_of(name).items():
        for option in options_of(group):
            mark = "\\*" if option == default else " "
            assert re.search(rf"^{mark} {group}={option} +\S.+$", shown, re.MULTILINE)


@pytest.mark.parametrize(
    "path",
    sorted(CONFIGS.rglob("*.yaml")),
    ids=lambda path: str(path.relative_to(CONFIGS)),
)
def test_every_number_in_a_config_says_what_it_counts(path: Path) -> None:
    lines = path.read_text().splitlines()
    numbers = [line for line in lines if re.match(r"\s*\w+: \[?-?\d[\d.e_-]*(,.*|\]|\s.*|$)", line)]
    uncommented = [line for line in numbers if " # " not in line and not line.endswith("127.0.0.1")]
    assert uncommented == []
    if path.parent != CONFIGS:
        assert comment_of(path.parent.name, path.stem)


def test_help_shows_the_values_of_an_option_that_is_named() -> None:
    shown = help_of("score", ["cache=tiered", "data=movielens", "threads=1"])
    for line in (CONFIGS / "cache" / "tiered.yaml").read_text().splitlines():
        assert f"  {line}" in shown.splitlines()
    assert "Values of data" not in shown


def test_a_key_that_only_some_options_have_names_them() -> None:
    options_by_key = keys_of("score")
    assert options_by_key["cache.ttl_s"] == ["cache=memory", "cache=tiered"]
    assert options_by_key["cache.disk.folder"] == ["cache=tiered"]
    assert options_by_key["artifact"] == []
    assert "scenario" not in options_by_key


def test_a_group_that_only_some_options_take_is_a_group_of_the_pipeline() -> None:
    groups = {"scenario": "queue_length", "data": "synthetic", "budget": "demo"}
    assert groups_of("benchmark") == groups
    options_by_key = keys_of("benchmark")
    with_data = ("cache_trace", "codec", "history_length", "tables")
    assert options_by_key["data"] == [f"scenario={name}" for name in with_data]
    assert options_by_key["data.path"] == ["data=interactions", "data=prepared"]

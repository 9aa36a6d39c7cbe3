"""The wheel holds all that the commands need, under one name, and the commands run from it."""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.pipelines.commands import ONE_AFTER_ANOTHER, ROOT, TINY, WORLD, endings
from torchrec_kvshare.attention import build
from torchrec_kvshare.commands.layout import pipeline_names

PARTS = ("torchrec_kvshare", "pipelines", "configs")
ABOUT = ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE")
NATIVE = Path("torchrec_kvshare/attention")
CAPABILITIES = ("avx2", "avx512") if platform.machine() == "x86_64" else ("default",)
LIBRARIES = [f"_native_{one}-torch{torch.__version__.split('+')[0]}.so" for one in CAPABILITIES]


def copy_checkout(folder: Path, *ignored_files: str) -> Path:
    """Copy what a wheel is built from, without a ``build`` folder, which would end up in it."""
    for name in PARTS:
        ignored = shutil.ignore_patterns("__pycache__", *ignored_files)
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ABOUT:
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel with the checkout's operators, compiled here if they are older than their source."""
    source = copy_checkout(tmp_path_factory.mktemp("source") / "checkout")
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))[0]


@pytest.fixture(scope="module")
def without_compiler(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A wheel built without a compiler, and pip's output."""
    source = copy_checkout(tmp_path_factory.mktemp("source") / "checkout", "*.so")
    return build_wheel(source, tmp_path_factory.mktemp("wheel"), PATH=str(source / "nothing"))


def build_wheel(source: Path, folder: Path, **environment: str) -> tuple[Path, str]:
    options = ("--verbose", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder))
    output = pip("wheel", *options, str(source), **environment)
    (built,) = folder.iterdir()
    return built, output


class Environment(NamedTuple):
    """A virtual environment with the package in it, and an empty folder to work in."""

    programs: Path
    packages: Path
    work: Path

    def run(self, *command: str) -> "subprocess.CompletedProcess[str]":
        # PYTHONPATH and the like may name the checkout.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        return subprocess.run(
            [str(self.programs / command[0]), *command[1:]],
            cwd=self.work,
            env=inherited | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
            check=False,
        )

    def succeed(self, *command: str) -> str:
        done = self.run(*command)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def succeed_all(self, *commands: tuple[str, ...]) -> None:
        """Run the arguments of ``kvshare`` one after another in one process."""
        output = self.succeed("python", "-c", ONE_AFTER_ANOTHER, ".", json.dumps(commands))
        for ended in endings(output):
            assert ended.status == 0, ended.stderr


def new_environment(folder: Path, wheel: Path) -> Environment:
    """Make an environment with the wheel and this environment's packages, without the checkout."""
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    pip("--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    packages = next((folder / "venv" / "lib").glob("python*/site-packages"))
    # .pth files of the other folders are not read, so an editable install there is not found.
    others = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (packages / "others.pth").write_text("".join(f"{other}\n" for other in sorted(others)))
    (folder / "work").mkdir()
    return Environment(python.parent, packages, folder / "work")


def pip(*arguments: str, **environment: str) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return new_environment(tmp_path_factory.mktemp("installed"), wheel)


@pytest.fixture(scope="module")
def exported(installed: Environment) -> Path:
    """An artifact and a file of requests, made by the commands of the wheel."""
    installed.succeed_all(
        ("train", *WORLD, *TINY, "budget.baselines=[]", "output=run"),
        ("export", "run=run", "output=artifact", "threads=1"),
        ("make_requests", *WORLD, "count=5", "candidates=9", "output=requests.jsonl"),
    )
    return installed.work


def test_the_wheel_holds_every_file_of_the_checkout_under_one_name(wheel: Path) -> None:
    """``pipelines`` was at the top of site-packages, and ``configs`` was missing."""
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {str(NATIVE / name) for name in LIBRARIES}
    for part in PARTS:
        prefix = "" if part == PARTS[0] else f"{PARTS[0]}/"
        for path in (ROOT / part).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so":
                expected.add(f"{prefix}{path.relative_to(ROOT)}")
    assert held == expected


def test_an_installed_wheel_trains_exports_and_scores(
    installed: Environment, exported: Path
) -> None:
    """Every pipeline of an installed wheel ended in "Primary config directory not found"."""
    told = installed.succeed("python", "-c", "import torchrec_kvshare as t; print(t.__file__)")
    assert told.strip() == str(installed.packages / "torchrec_kvshare" / "__init__.py")
    listed = installed.succeed("kvshare", "--help")
    assert all(f"  {name} " in listed for name in pipeline_names())
    assert "usage: kvshare train [key=value ...]" in installed.succeed("kvshare", "train", "-h")
    files = ("artifact=artifact", "requests=requests.jsonl", "output=answers.jsonl")
    assert "scored 5, refused 0" in installed.succeed("kvshare", "score", *files)
    answers = [
        json.loads(line) for line in (installed.work / "answers.jsonl").read_text().splitlines()
    ]
    assert [len(answer["scores"]) for answer in answers] == [9] * 5


# The C++ operators.

REGISTERED = """
import logging, sys, torch
from torchrec_kvshare.attention.library import register_operators
logging.basicConfig(stream=sys.stdout, format="%(message)s")
print(register_operators())
print(*torch.ops.loaded_libraries)
"""


def test_a_fresh_environment_loads_the_operators_of_its_wheel(
    wheel: Path, installed: Environment
) -> None:
    """They were compiled at first use, into the user's home."""
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    is_registered, loaded = installed.succeed("python", "-c", REGISTERED).split()
    assert is_registered == "True"
    assert Path(loaded).parent == installed.packages / NATIVE


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_libraries_need_torchs_own_and_no_python(installed: Environment, name: str) -> None:
    """A host in C++ loads them; a second OpenMP would fight torch's for the cores."""
    told = subprocess.run(
        ["readelf", "--dynamic", installed.packages / NATIVE / name],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    needed = {line.split("[")[1][:-1] for line in told.splitlines() if "(NEEDED)" in line}
    of_the_compiler = ("libstdc++.", "libm.", "libgcc_s.", "libc.", "ld-linux-")
    others = {library for library in needed if not library.startswith(of_the_compiler)}
    assert others == {"libtorch_cpu.so", "libc10.so"}


def test_without_a_compiler_the_package_scores_by_pytorchs_own_operators(
    without_compiler: tuple[Path, str], exported: Path, tmp_path: Path
) -> None:
    wheel, told = without_compiler
    assert "g++ is missing: the attention operators are not built" in told
    assert [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")] == []
    environment = new_environment(tmp_path, wheel)
    reason, is_registered, *loaded = environment.succeed("python", "-c", REGISTERED).splitlines()
    assert "[] were built when the package was installed" in reason
    assert is_registered == "False"
    assert not any("_native" in library for library in loaded)
    # The artifact was exported with the library; its golden requests are scored without it.
    artifact = f"artifact={exported / 'artifact'}"
    requests = f"requests={exported / 'requests.jsonl'}"
    scored = environment.succeed("kvshare", "score", artifact, requests, "output=scores")
    assert "scored 5, refused 0" in scored


def build_in_place(checkout: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    return build_operators(checkout, "--inplace", **environment)


def build_operators(
    checkout: Path, *options: str, **environment: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-W", "ignore", "setup.py", "build_ext", *options],
        cwd=checkout,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def libraries_of(checkout: Path) -> list[str]:
    return sorted(path.name for path in (checkout / NATIVE).glob("*.so"))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A checkout whose source has no operators, so that it compiles quickly."""
    checkout = copy_checkout(tmp_path / "checkout", "*.so")
    write_source(checkout, "int number = 7;\n")
    return checkout


def write_source(checkout: Path, text: str) -> None:
    (source,) = (checkout / NATIVE).glob("*.cpp")
    source.write_text(text)


def test_a_build_leaves_the_libraries_that_it_made_and_no_other(small: Path) -> None:
    """A library of another torch, or of a removed source, was never deleted."""
    (small / NATIVE / "_native_avx2-torch2.12.0.so").write_text("an older torch's")
    assert build_in_place(small).returncode == 0
    assert libraries_of(small) == LIBRARIES
    write_source(small, 'extern "C" int other_number = 8;\n')
    assert build_in_place(small).returncode == 0
    assert all(b"other_number" in (small / NATIVE / name).read_bytes() for name in LIBRARIES)
    assert "g++ is missing" in build_in_place(small, PATH="/nowhere").stderr
    assert libraries_of(small) == []


def test_what_is_up_to_date_is_not_compiled_again(small: Path, tmp_path: Path) -> None:
    """Each wheel and each repeated install compiled all libraries: most of a minute."""
    here, wheel = small / NATIVE, tmp_path / "wheel"
    options = ("--build-lib", str(wheel))
    assert build_operators(small, *options).returncode == 0
    assert libraries_of(wheel) == LIBRARIES
    assert libraries_of(small) == []
    assert build_in_place(small).returncode == 0
    for name in LIBRARIES:
        (here / name).write_text("up to date")
    assert build_operators(small, *options).returncode == 0
    assert build_in_place(small).returncode == 0
    for folder in (here, wheel / NATIVE):
        assert {(folder / name).read_text() for name in LIBRARIES} == {"up to date"}
    assert build_operators(small, "--force", *options).returncode == 0
    assert all((wheel / NATIVE / name).read_bytes()[:4] == b"\x7fELF" for name in LIBRARIES)
    build = here / "build.py"
    build.write_text(f"{build.read_text()}\n# Other flags.\n")
    assert build_in_place(small).returncode == 0
    assert all((here / name).read_bytes()[:4] == b"\x7fELF" for name in LIBRARIES)


def test_the_compilers_message_is_in_the_error_and_nothing_is_left(small: Path) -> None:
    assert build_in_place(small).returncode == 0
    write_source(small, "int attention( { return 7; }\n")
    done = build_in_place(small)
    assert done.returncode != 0
    assert "the attention operators cannot be compiled: " in done.stderr
    assert ".cpp:1:" in done.stderr
    assert libraries_of(small) == []


def test_a_build_that_is_isolated_from_torch_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip removes site-packages, which hold the torch to build for, from the path."""
    monkeypatch.setattr(sys, "path", [])
    assert build.find_torch() == Path(torch.__file__).parent
    assert build.torch_version() == torch.__version__.split("+")[0]


def test_an_installed_wheel_starts_processes_of_its_own(installed: Environment) -> None:
    """Replicas of a cluster were started as ``pipelines.serve``, which a wheel does not have."""
    told = installed.succeed(
        *("kvshare", "serve_cluster", "artifact=a", "replicas=1", "run=false", "output=cluster")
    )
    (replica,) = [line for line in told.splitlines() if line.startswith("replica-0: ")]
    start = replica.removeprefix("replica-0: ").split(" ")[:4]
    assert start[1:] == ["-m", "torchrec_kvshare", "serve"]
    assert Path(start[0]).parent == installed.programs
    ended = installed.run("python", *start[1:], "artifact=nowhere", "server.http_port=0")
    assert ended.returncode == 2
    assert "nowhere is no artifact" in ended.stderr
    assert "usage: kvshare serve" in installed.succeed("python", *start[1:], "--help")
    as_module = ("python", "-m", "torchrec_kvshare.pipelines.serve", "artifact=nowhere")
    assert installed.run(*as_module).stderr.startswith("error: nowhere is no artifact")


def test_an_editable_install_has_the_command_and_the_operators_too(
    small: Path, tmp_path: Path
) -> None:
    source = small
    build = "import setuptools.build_meta as b; b.build_editable('wheel')"
    (source / "wheel").mkdir()
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", build], cwd=source, capture_output=True, check=True
    )
    (editable,) = (source / "wheel").glob("*.whl")
    environment = new_environment(tmp_path, editable)
    told = environment.succeed("python", "-c", "import torchrec_kvshare as t; print(t.__file__)")
    assert told.strip() == str(source / "torchrec_kvshare" / "__init__.py")
    # The pipeline that imports least.
    assert "http_port: " in environment.succeed("kvshare", "serve", "--cfg", "job")
    told = environment.succeed("python", "-c", "from torchrec_kvshare.pipelines import serve as s")
    assert told == ""
    is_registered, loaded = environment.succeed("python", "-c", REGISTERED).split()
    assert is_registered == "True"
    assert Path(loaded).parent == source / NATIVE


def test_without_torchrec_the_command_says_what_to_install(wheel: Path, tmp_path: Path) -> None:
    """pip installs no torchrec: its metadata asks for the CUDA build of fbgemm."""
    environment = new_environment(tmp_path, wheel)
    others = Path((environment.packages / "others.pth").read_text().splitlines()[0])
    (environment.packages / "others.pth").unlink()
    has = {path.name for path in environment.packages.iterdir()} | {"torchrec"}
    for path in others.iterdir():
        if path.name not in has and path.suffix != ".pth":
            (environment.packages / path.name).symlink_to(path)
    ended = environment.run("kvshare", "train")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: torchrec is not installed; pip install --no-deps torch")
    assert ended.stderr.count("\n") == 1

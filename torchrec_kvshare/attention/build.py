"""Builds the C++ operators while the package is installed; nothing imports this file afterwards.

setuptools alone would build a module of one Python, with the flags of that Python. The operators
are a library that any libtorch process can load: linked against torch's libraries and no Python,
once for each kind of vector instructions. They are built for the torch beside which they will run,
which pip hides from the build unless it is told ``--no-build-isolation``.
"""

import importlib.metadata
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

COMPILER = "g++"
FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fopenmp")
# On x86-64, by torch's name for what the CPU has. Elsewhere there is one library: the compiler's
# default.
FLAGS_BY_CAPABILITY = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"),
}
DEFAULT = "DEFAULT"


class BuildOperators(build_ext):
    """Build the extension of ``setup.py``, which names the source, as libraries beside it.

    Without a compiler or torch nothing is built and a warning says so. Where the compiler fails,
    the installation fails.
    """

    def run(self) -> None:
        """Compile, in the checkout or where a wheel is gathered; older libraries go."""
        source = self._source()
        root = Path() if self.inplace else Path(self.build_lib)
        for stale in (root / source.parent).glob("_native_*.so"):
            stale.unlink()
        for name in missing_tools():
            self.warn(f"{name} is not there: the attention operators are not built")
        for capability, library in self._library_by_capability().items():
            compile_library(source, compiler_flags(capability), root / library)

    def get_outputs(self) -> list[str]:
        """What a wheel gets."""
        libraries = self._library_by_capability().values()
        return [str(Path(self.build_lib, library)) for library in libraries]

    def get_output_mapping(self) -> dict[str, str]:
        """Where an editable install has it."""
        libraries = map(str, self._library_by_capability().values()) if self.inplace else ()
        return {str(Path(self.build_lib, library)): library for library in libraries}

    def _source(self) -> Path:
        [extension] = self.extensions
        [source] = extension.sources
        return Path(source)

    def _library_by_capability(self) -> dict[str, Path]:
        """Paths from the root of the checkout, or of a wheel."""
        if missing_tools():
            return {}
        is_x86 = platform.machine() in ("x86_64", "AMD64")
        folder, version = self._source().parent, torch_version()
        return {
            capability: folder / f"_native_{capability.lower()}-torch{version}.so"
            for capability in (FLAGS_BY_CAPABILITY if is_x86 else [DEFAULT])
        }


class OperatorsWheel(bdist_wheel):
    """A wheel of one platform and of any Python, as the libraries are."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform."""
        return "py3", "none", super().get_tag()[2]


def missing_tools() -> list[str]:
    """What the operators cannot be built without and is not there."""
    is_there = {COMPILER: shutil.which(COMPILER), "torch": find_torch()}
    return [name for name, place in is_there.items() if place is None]


def find_torch() -> Path | None:
    """The folder of the torch that is installed here, isolated from it or not."""
    for place in (*sys.path, sysconfig.get_path("platlib")):
        folder = Path(place) / "torch"
        if (folder / "include").is_dir():
            return folder
    return None


def torch_version() -> str:
    """Its release; a CPU build's and a CUDA build's libraries take the same operators."""
    folder = find_torch()
    assert folder is not None
    [found] = importlib.metadata.distributions(name="torch", path=[str(folder.parent)])
    return found.version.split("+")[0]


def compiler_flags(capability: str) -> tuple[str, ...]:
    """What g++ is told for a CPU of which torch says that it has the capability."""
    return (*FLAGS, *FLAGS_BY_CAPABILITY.get(capability, ()))


def compile_library(source: Path, flags: Sequence[str], library: Path) -> None:
    """Compile operators for torch; ``library`` is there whole or not at all.

    Args:
        source: in C++.
        flags: for g++.
        library: to be made, with its folder if that is not there.

    Raises:
        CompileError: with what the compiler says.
    """
    torch = find_torch()
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        compiled, linked = f"{folder}/operators.o", Path(folder, "operators.so")
        run_compiler(*flags, "-c", str(source), f"-I{torch}/include", "-o", compiled)
        # Linked without OpenMP: a second runtime beside torch's own would fight it for the cores.
        libraries = (f"-L{torch}/lib", "-ltorch_cpu", "-lc10")
        run_compiler("-shared", compiled, *libraries, "-o", str(linked))
        linked.replace(library)


def run_compiler(*arguments: str) -> None:
    """Run g++ and be silent, unless it fails."""
    done = subprocess.run([COMPILER, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(f"the attention operators cannot be compiled: {done.stderr}")

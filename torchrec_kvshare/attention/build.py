"""Builds the C++ operators while the package is installed; nothing imports this file afterwards.

setuptools alone would build an extension module for one Python version, with its flags. The
operators are a library that any libtorch process can load: linked against torch and not against
Python, once per vector instruction set. They are built for the installed torch, which pip hides
from the build unless ``--no-build-isolation`` is given.
"""

import importlib.metadata
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError
from setuptools.modified import newer_group

COMPILER = "g++"
FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fopenmp")
# On x86-64, by torch's name for the CPU capability. Other machines get one library with the
# compiler's default flags.
FLAGS_BY_CAPABILITY = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"),
}
DEFAULT = "DEFAULT"


class BuildOperators(build_ext):
    """Build the extension that ``setup.py`` names as libraries beside its source.

    Without a compiler or torch, nothing is built and a warning says so. If the compiler fails, the
    installation fails. As other extensions, a library is not compiled again if the checkout has one
    that is newer than its source and this file, unless ``--force`` is given.
    """

    def run(self) -> None:
        """Build into the checkout or the wheel's build folder; delete older libraries first."""
        source = self._source()
        root = Path() if self.inplace else Path(self.build_lib)
        for name in missing_tools():
            self.warn(f"{name} is missing: the attention operators are not built")
        libraries = self._library_by_capability()
        outdated = {
            capability: library
            for capability, library in libraries.items()
            if self.force or newer_group([str(source), __file__], str(library))
        }
        current = set(libraries.values()) - set(outdated.values())
        for stale in set((root / source.parent).glob("_native_*.so")) - {root / c for c in current}:
            stale.unlink()
        if not self.inplace:
            self.mkpath(str(root / source.parent))
            for library in current:
                self.copy_file(str(library), str(root / library))
        with ThreadPoolExecutor() as threads:
            compiling = [
                threads.submit(compile_library, source, compiler_flags(capability), root / library)
                for capability, library in outdated.items()
            ]
        for one in compiling:
            one.result()

    def get_outputs(self) -> list[str]:
        """List the files that go into a wheel."""
        libraries = self._library_by_capability().values()
        return [str(Path(self.build_lib, library)) for library in libraries]

    def get_output_mapping(self) -> dict[str, str]:
        """Map files of a wheel to where an editable install has them."""
        libraries = map(str, self._library_by_capability().values()) if self.inplace else ()
        return {str(Path(self.build_lib, library)): library for library in libraries}

    def _source(self) -> Path:
        [extension] = self.extensions
        [source] = extension.sources
        return Path(source)

    def _library_by_capability(self) -> dict[str, Path]:
        """Library paths, relative to the root of the checkout or wheel."""
        if missing_tools():
            return {}
        is_x86 = platform.machine() in ("x86_64", "AMD64")
        folder, version = self._source().parent, torch_version()
        return {
            capability: folder / f"_native_{capability.lower()}-torch{version}.so"
            for capability in (FLAGS_BY_CAPABILITY if is_x86 else [DEFAULT])
        }


class OperatorsWheel(bdist_wheel):
    """A wheel for one platform and any Python version, as the libraries are."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return Python, ABI and platform tags."""
        return "py3", "none", super().get_tag()[2]


def missing_tools() -> list[str]:
    """Return the names of required build tools that are not installed."""
    path_by_tool = {COMPILER: shutil.which(COMPILER), "torch": find_torch()}
    return [tool for tool, path in path_by_tool.items() if path is None]


def find_torch() -> Path | None:
    """Return the folder of the installed torch, also when pip isolates the build from it."""
    for parent in (*sys.path, sysconfig.get_path("platlib")):
        folder = Path(parent) / "torch"
        if (folder / "include").is_dir():
            return folder
    return None


def torch_version() -> str:
    """Return torch's release without the build suffix: CPU and CUDA builds share the library."""
    folder = find_torch()
    assert folder is not None
    [found] = importlib.metadata.distributions(name="torch", path=[str(folder.parent)])
    return found.version.split("+")[0]


def compiler_flags(capability: str) -> tuple[str, ...]:
    """Return the g++ flags for a CPU capability, by torch's name for it."""
    return (*FLAGS, *FLAGS_BY_CAPABILITY.get(capability, ()))


def compile_library(source: Path, flags: Sequence[str], library: Path) -> None:
    """Compile the operators for torch; ``library`` is written atomically.

    Args:
        source: C++ file.
        flags: for g++.
        library: path of the result; its folder is made if missing.

    Raises:
        CompileError: with the compiler's output.
    """
    torch = find_torch()
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        compiled, linked = f"{folder}/operators.o", Path(folder, "operators.so")
        run_compiler(*flags, "-c", str(source), f"-I{torch}/include", "-o", compiled)
        # Linked without OpenMP: a second runtime would compete with torch's own for the cores.
        libraries = (f"-L{torch}/lib", "-ltorch_cpu", "-lc10")
        run_compiler("-shared", compiled, *libraries, "-o", str(linked))
        linked.replace(library)


def run_compiler(*arguments: str) -> None:
    """Run g++ and show its output only if it fails."""
    done = subprocess.run([COMPILER, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(f"the attention operators cannot be compiled: {done.stderr}")

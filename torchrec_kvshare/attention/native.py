"""Body ``native``: the same attention in C++, compiled for the CPU that it runs on.

torch's flash kernel goes over the scores of a small head several times and merges own tokens
afterwards; ``native.cpp`` keeps a tile of scores in the core's first cache until it is done with
them. It is compiled once for each machine, by g++, and kept in the user's cache folder. float32, no
gradients. Needs torch alone.
"""

import functools
import hashlib
import logging
import os
import subprocess
import tempfile
from pathlib import Path

import torch

from torchrec_kvshare.errors import ConfigError

COMPILER = "g++"
FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fopenmp")
FLAGS_BY_CAPABILITY = {
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}
SOURCE = Path(__file__).with_name("native.cpp")

logger = logging.getLogger(__name__)


@functools.cache
def load_native(cache: Path | None = None) -> None:
    """Register the operators in this process; the first time on a machine, compile them.

    Args:
        cache: folder that compiled libraries are kept in, one for each source, torch and CPU; None
            for ``.cache/torchrec_kvshare`` in the user's home.

    Raises:
        ConfigError: if they cannot be compiled here, saying why.
    """
    flags = (*FLAGS, *FLAGS_BY_CAPABILITY.get(torch.backends.cpu.get_cpu_capability(), ()))
    identity = (SOURCE.read_text(), torch.__version__, COMPILER, *flags)
    digest = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    folder = cache or Path.home() / ".cache" / "torchrec_kvshare"
    library = folder / f"native-{digest}.so"
    if not library.exists():
        compile_native(flags, library)
    torch.ops.load_library(library)


def compile_native(flags: tuple[str, ...], library: Path) -> None:
    """Compile ``native.cpp``; ``library`` is there whole or not at all.

    Raises:
        ConfigError: if there is no compiler, it fails, or the folder cannot be written to.
    """
    logger.info("compiling %s to %s", SOURCE.name, library)
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"attention body native cannot be kept: {error}") from error
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built, compiled = f"{folder}/native.so", f"{folder}/native.o"
        include, libraries = f"-I{torch_folder}/include", f"-L{torch_folder}/lib"
        run_compiler(*flags, "-c", str(SOURCE), include, "-o", compiled)
        # Linked without OpenMP: a second runtime beside torch's own would fight it for the cores.
        run_compiler("-shared", compiled, libraries, "-ltorch_cpu", "-lc10", "-o", built)
        os.replace(built, library)


def run_compiler(*arguments: str) -> None:
    """Run g++ and be silent, unless it fails."""
    try:
        subprocess.run([COMPILER, *arguments], check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ConfigError(
            f"attention body native needs {COMPILER}, which is not installed; flash needs none"
        ) from error
    except subprocess.CalledProcessError as error:
        raise ConfigError(f"attention body native cannot be compiled: {error.stderr}") from error

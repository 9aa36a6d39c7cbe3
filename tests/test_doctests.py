"""Every example in a docstring of the package is run.

Modules are walked here and not by pytest's --doctest-modules, so that tests/conftest.py imports
torchrec before the first module of the package is imported.
"""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import torchrec_kvshare

PACKAGE = torchrec_kvshare.__name__
ROOT = Path(torchrec_kvshare.__path__[0])
MODULES = [
    PACKAGE,
    *(module.name for module in pkgutil.walk_packages(torchrec_kvshare.__path__, f"{PACKAGE}.")),
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_the_module_print_what_they_say(name: str) -> None:
    module = importlib.import_module(name)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for examples in doctest.DocTestFinder().find(module, name):
        runner.run(examples, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


def test_every_file_of_the_package_is_walked() -> None:
    """A folder without ``__init__.py`` would be missing from the walk, and from the wheel."""
    files = {
        ".".join((PACKAGE, *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        for path in ROOT.rglob("*.py")
    }
    assert files == set(MODULES)

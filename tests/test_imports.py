"""Data goes one way: a file imports only from rooms before its own."""

import ast
from pathlib import Path

import pytest

import torchrec_kvshare
from tests.worlds import new_interpreter

PACKAGE = torchrec_kvshare.__name__
FOLDER = Path(torchrec_kvshare.__path__[0])
# Files and folders of the package; each imports only from itself and from earlier ones.
ROOMS = (
    *("errors", "config", "commands", "__main__", "features", "data", "attention", "history"),
    *("model", "cache", "scoring", "verify", "training", "export", "serving", "deploy"),
    *("benchmark", "planning"),
)


def modules_imported_by(path: Path) -> list[str]:
    """Return the names of every import from the package in a file, without the package's name."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            # Both the named package and the imported name may be a module.
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name.removeprefix(f"{PACKAGE}.") for name in names if name.startswith(f"{PACKAGE}.")]


def files() -> list[Path]:
    return sorted(path for path in FOLDER.rglob("*.py") if path != FOLDER / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(FOLDER).with_suffix("").parts[0]


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_file_imports_only_from_earlier_rooms(path: Path) -> None:
    room = room_of(path)
    assert room in ROOMS
    allowed = {*ROOMS[: ROOMS.index(room) + 1], "__version__"}
    imported = {name.split(".")[0] for name in modules_imported_by(path)}
    assert imported - allowed == set()


def test_the_package_itself_imports_nothing() -> None:
    assert modules_imported_by(FOLDER / "__init__.py") == []


def test_references_are_imported_by_references_alone() -> None:
    importers = {
        path.name
        for path in files()
        for name in modules_imported_by(path)
        if "reference" in name.split(".")
    }
    assert importers == {"reference.py"}


def test_references_share_no_code_with_the_fast_path() -> None:
    for path in files():
        if path.name == "reference.py":
            rooms = {tuple(name.split(".")[:2]) for name in modules_imported_by(path)}
            assert rooms <= {("attention", "reference")}


def test_attention_and_errors_need_torch_alone() -> None:
    program = f"""
import sys
import {PACKAGE}.errors
assert "torch" not in sys.modules
import {PACKAGE}.attention.operators
assert "torch" in sys.modules
print([name for name in sys.modules if name.split(".")[0] in ("torchrec", "fbgemm_gpu", "numpy")
       and name != "numpy" and not name.startswith("numpy.")])
"""
    output, errors = new_interpreter(program).communicate()
    assert output == "[]\n", errors

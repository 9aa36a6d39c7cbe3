"""Where the files of pipelines and their configs are.

A wheel has both folders inside the package; a checkout, and an editable install of one, has them
beside it.
"""

import ast
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
IS_INSTALLED = (PACKAGE / "pipelines").is_dir()
ROOT = PACKAGE if IS_INSTALLED else PACKAGE.parent
PIPELINES = ROOT / "pipelines"
CONFIGS = ROOT / "configs"


def pipeline_names() -> list[str]:
    """Return the names of all pipelines, sorted."""
    return sorted(path.stem for path in PIPELINES.glob("*.py") if path.stem != "__init__")


def summary_of(pipeline: str) -> str:
    """Return what a pipeline does: the first line of its docstring, without its command."""
    docstring = ast.get_docstring(ast.parse((PIPELINES / f"{pipeline}.py").read_text())) or ""
    return docstring.partition("\n")[0].partition(": ``")[0].rstrip(".") + "."


def typed_command(pipeline: str) -> list[str]:
    """Return the command a user types to run a pipeline.

    Example:
        >>> typed_command("train")
        ['python', '-m', 'pipelines.train']
    """
    return ["kvshare", pipeline] if IS_INSTALLED else ["python", "-m", f"pipelines.{pipeline}"]


def process_command(pipeline: str) -> list[str]:
    """Return the start of a command line that runs a pipeline in a new process."""
    return [sys.executable, "-m", PACKAGE.name, pipeline]

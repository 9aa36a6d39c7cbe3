"""The examples run, and the README shows the snippet as it is."""

import re
import runpy
from pathlib import Path

import pytest

from tests.pipelines.commands import ROOT
from tests.training.on_ranks import torchrun

DISTRIBUTED = ROOT / "examples" / "own_dlrm_distributed.py"
SNIPPET = ROOT / "examples" / "score_one_user.py"
MAX_LINES = 15


def without_docstring(text: str) -> str:
    return text.split('"""')[2].strip()


def test_the_snippet_scores_one_user_cold_and_from_the_cache(
    artifact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [str(SNIPPET), str(artifact)])
    runpy.run_path(str(SNIPPET), run_name="__main__")
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("miss [")
    assert second == first.replace("miss", "hit")


def test_the_readme_shows_the_snippet_as_it_is() -> None:
    snippet = without_docstring(SNIPPET.read_text())
    statements = [line for line in snippet.splitlines() if line and "import" not in line]
    assert snippet in (ROOT / "README.md").read_text()
    assert len(statements) <= MAX_LINES


def test_a_users_own_dlrm_scores_alike_with_and_without_the_cache(
    capsys: pytest.CaptureFixture[str],
) -> None:
    runpy.run_path(str(ROOT / "examples" / "own_dlrm.py"), run_name="__main__")
    uncached, cold, warm, renewed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in (uncached, cold, warm)] == ["bypass", "miss", "hit"]
    assert renewed.startswith("miss model [")
    assert cold.removeprefix("miss") == warm.removeprefix("hit")


def assert_plan_and_losses(output: str, num_ranks: int) -> None:
    """Check what the distributed example prints: a line for each table, and losses that fall."""
    header, *lines = output.splitlines()
    assert header.split() == ["table", "sharding", "kernel", "ranks"]
    plan, steps = lines[:4], lines[4:]
    assert {line.split()[0] for line in plan} == {
        *("users", "products"),
        *("token_item_id", "token_position_history"),
    }
    (items,) = [line.split(maxsplit=3) for line in plan if line.startswith("token_item_id ")]
    assert items[1] == "row_wise"
    assert items[3] == ", ".join(map(str, range(num_ranks)))
    losses = [float(re.fullmatch(r"step \d loss (\d\.\d{4})", line)[1]) for line in steps]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]


def test_a_users_own_dlrm_is_trained_in_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(DISTRIBUTED), run_name="__main__")
    assert_plan_and_losses(capsys.readouterr().out, 1)


def test_a_users_own_dlrm_is_trained_on_two_ranks() -> None:
    done = torchrun(str(DISTRIBUTED))
    assert done.returncode == 0, done.stderr[-4000:]
    assert_plan_and_losses(done.stdout, 2)

"""The documentation is true: links resolve, commands compose, and files that it names exist.

The README's snippet itself is run by ``pipelines/test_examples.py``.
"""

import importlib
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

from tests.pipelines.commands import CONFIGS, ROOT, composed
from tests.test_imports import ROOMS
from torchrec_kvshare import config as config_schemas
from torchrec_kvshare.benchmark.run import scenario_called
from torchrec_kvshare.commands.help import keys_of
from torchrec_kvshare.commands.layout import pipeline_names
from torchrec_kvshare.config import checked, literal_overrides
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.planning.report import ADVISED

PAGES = (
    *(ROOT / "README.md", ROOT / "CHANGELOG.md"),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
)
MAX_README_LINES = 180

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+)$", re.MULTILINE)
COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:python -m pipelines\.|kvshare )(.*)", re.DOTALL)
IMPORT = re.compile(r"^from ([\w.]+) import (\w+(?:, \w+)*)$", re.MULTILINE)
COMMENT = re.compile(r" #.*$")
MAKE = re.compile(r"\bmake ([a-z][a-z-]*)")
NAMED_FILE = re.compile(
    r"(?<![\w/.-])(?:torchrec_kvshare|configs|docs|examples|pipelines|tests)/[\w./*<>-]*"
)
NAMED_TEST = re.compile(r"test_\w+")
NAMED_KEY = re.compile(r"(?<![\w./+-])(?:budget|cache|data|model|server)(?:\.[a-z_0-9]+)+(?![\w.])")
NAMED_SCENARIO = re.compile(r"\bscenario=([a-z_]+)")
FILE_ENDINGS = (".json", ".md", ".pt", ".py")
ROOM = re.compile(r"^  (\w+)(?:/|\.py) ", re.MULTILINE)
NAMED_PART = re.compile(r"<\w+>")  # of a path: configs/scenario/<name>.yaml
ALTERNATIVES = re.compile(r"'?[\w.-]+(?:\|[\w.-]+)+'?")  # quoted if Hydra cannot read them
OWN_CONFIGS = "--config-dir="
OMITTED = "…"  # the rest of a command

# Words that stand for a value; those that are not here are texts, such as DIR and FILE.
VALUE_BY_PLACEHOLDER = {"N": "3", "KIND": "causal"}
OPTION_BY_GROUP = {"data": "synthetic", "scenario": "queue_length"}  # for NAME


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    return [Block(*found) for found in FENCED.findall(page.read_text())]


def prose_of(page: Path) -> str:
    return FENCED.sub("", page.read_text())


def inline_code_of(page: Path) -> list[str]:
    """Code in backticks, on one line each, as it reads where a table did not need a backslash."""
    return [" ".join(code.split()).replace(r"\|", "|") for code in INLINE.findall(prose_of(page))]


def shell_lines_of(page: Path) -> Iterator[str]:
    """Lines of the blocks that a shell reads, those that go on joined."""
    for language, text in blocks_of(page):
        if language in ("", "bash", "sh"):
            yield from text.replace("\\\n", " ").splitlines()


def commands_of(page: Path) -> list[str]:
    """Command lines of pipelines, in blocks and in the text, without their comments."""
    found = (*shell_lines_of(page), *inline_code_of(page))
    return [" ".join(COMMENT.sub("", code).split()) for code in found if COMMAND.match(code)]


def anchors_of(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub makes them."""
    num_by_slug = Counter[str]()
    anchors = set()
    for heading in HEADING.findall(prose_of(page)):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        anchors.add(f"{slug}-{num_by_slug[slug]}" if num_by_slug[slug] else slug)
        num_by_slug[slug] += 1
    return anchors


def check_command(command: str) -> None:
    """Compose the config of a documented command, and check it unless a part is left out.

    Raises:
        HydraException: if a key or an option is unknown.
        ConfigError: if a value cannot work, or one that is needed is missing.
    """
    found = COMMAND.match(command)
    assert found is not None, command
    name, *arguments = shlex.split(found.group(1))
    if name in ("NAME", OMITTED):
        return
    assert name in pipeline_names(), f"{name} is no pipeline"
    overrides = [
        argument for argument in arguments if not argument.startswith("-") and argument != OMITTED
    ]
    if any(argument.startswith(OWN_CONFIGS) for argument in arguments):
        # The option is written by `pipelines.advise`; its keys are those of the others.
        overrides = ["cache=tiered" if one == f"cache={ADVISED}" else one for one in overrides]
    values_by_override = [_values(_filled(one, overrides)) for one in literal_overrides(overrides)]
    for number in range(max(map(len, values_by_override), default=1)):
        chosen = [values[number % len(values)] for values in values_by_override]
        config = composed(name, *chosen)
        if arguments and OMITTED not in arguments:
            checked(config, schema_of(name, config))


def schema_of(pipeline: str, config: DictConfig) -> type[Any]:
    """The dataclass that the config of a pipeline must fit, by the pipeline's source."""
    if pipeline == "benchmark":
        return scenario_called(config.scenario).options
    source = (ROOT / "pipelines" / f"{pipeline}.py").read_text()
    [name] = re.findall(r"^@pipeline\((\w+)\)$", source, re.MULTILINE)
    return getattr(config_schemas, name)


def _filled(override: str, overrides: list[str]) -> str:
    """An override with values in place of placeholders."""
    key, equals, value = override.partition("=")
    if value == "NAME" and key in OPTION_BY_GROUP:
        has_root = any(other.startswith(f"{key}.root=") for other in overrides)
        return f"{key}={'online_retail' if has_root else OPTION_BY_GROUP[key]}"
    return f"{key}{equals}{VALUE_BY_PLACEHOLDER.get(value, value)}"


def _values(override: str) -> list[str]:
    """An override once for each value of ``key=a|b|c``, or of a sweep, ``key=a,b,c``."""
    key, _, value = override.partition("=")
    if ALTERNATIVES.fullmatch(value):
        return [f"{key}={one}" for one in value.strip("'").split("|")]
    parsed = OverridesParser.create().parse_override(override)
    if not parsed.is_sweep_override():
        return [override]
    return [f"{parsed.get_key_element()}={one}" for one in parsed.sweep_string_iterator()]


COMMANDS = sorted({command for page in PAGES for command in commands_of(page)})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors_resolve(page: Path) -> None:
    for link in LINK.findall(prose_of(page)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{link} of {page} is not there"
        if anchor:
            assert anchor in anchors_of(target), f"{link} of {page} is no heading"


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_commands_compose(command: str) -> None:
    check_command(command)


@pytest.mark.parametrize(
    "command",
    [
        "python -m pipelines.train model.dimm=16",
        "python -m pipelines.train -m sed=0,1",
        "kvshare score artifact=DIR requests=FILE output=FILE cache=tierd",
        "python -m pipelines.benchmark scenario=qeue_length",
        "python -m pipelines.train data=NAME data.rooot=DIR",
        "python -m pipelines.train … budget=smoke|dmo",
        "python -m pipelines.export run=DIR output=DIR targett=pt2",
    ],
)
def test_a_misspelt_key_or_option_in_a_command_is_found(command: str) -> None:
    with pytest.raises(HydraException):
        check_command(command)


@pytest.mark.parametrize(
    "command",
    [
        "python -m pipelines.train model.dim=wide",
        "python -m pipelines.train budget=smoke model.dropout=1.5",
        "python -m pipelines.train data=interactions",
        "python -m pipelines.serve_cluster artifact=DIR replicas=0",
    ],
)
def test_a_value_in_a_command_that_cannot_work_is_found(command: str) -> None:
    with pytest.raises(ConfigError):
        check_command(command)


def test_commands_are_found_in_blocks_and_in_prose(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Run `python -m pipelines.audit\nrun=DIR`, or `A=1 kvshare train …`, or `kvshare` alone:\n"
        "```\nkvshare export run=DIR \\\n    target=pt2  # a comment\npip install torch\n```\n"
        "| `kvshare train budget=smoke\\|demo` |\n"
        "```python\nkvshare = 3\n```\n"
    )
    assert commands_of(page) == [
        "kvshare export run=DIR target=pt2",
        "python -m pipelines.audit run=DIR",
        "A=1 kvshare train …",
        "kvshare train budget=smoke|demo",
    ]


def test_every_pipeline_is_documented() -> None:
    documented = {re.split(r"\W", COMMAND.sub(r"\1", command))[0] for command in COMMANDS}
    assert set(pipeline_names()) <= documented | {"demo"}  # `make demo` runs that one.


def test_every_scenario_is_documented() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    for path in (CONFIGS / "scenario").glob("*.yaml"):
        assert f"scenario={path.stem}" in text, f"docs/benchmarks.md does not have {path.stem}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_make_targets_and_named_files_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for code in (*shell_lines_of(page), *inline_code_of(page)):
        for target in MAKE.findall(code.partition("#")[0]):
            assert target in targets, f"make {target} of {page} is no target"
    for code in inline_code_of(page):
        for name in NAMED_FILE.findall(code):
            found = list(ROOT.glob(NAMED_PART.sub("*", name).rstrip("/.")))
            assert found, f"{name} of {page} is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_keys_and_scenarios_of_configs_exist(page: Path) -> None:
    keys = {key for pipeline in pipeline_names() for key in keys_of(pipeline)}
    scenarios = {path.stem for path in (CONFIGS / "scenario").glob("*.yaml")}
    for code in inline_code_of(page):
        for key in NAMED_KEY.findall(code):
            assert key in keys or key.endswith(FILE_ENDINGS), f"{key} of {page} is no key"
        for scenario in NAMED_SCENARIO.findall(code):
            assert scenario in scenarios, f"scenario={scenario} of {page} is not there"


def test_named_tests_exist() -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for page in PAGES:
        for code in inline_code_of(page):
            if NAMED_TEST.fullmatch(code):
                assert f"def {code}(" in tests, f"{code} of {page} is no test"


def test_the_rooms_stand_in_the_order_of_their_imports() -> None:
    [drawn] = [text for _, text in blocks_of(ROOT / "docs" / "design.md") if "errors.py" in text]
    assert ROOM.findall(drawn) == [room for room in ROOMS if room != "__main__"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_imports_in_python_blocks_resolve(page: Path) -> None:
    for language, text in blocks_of(page):
        for module, names in IMPORT.findall(text) if language == "python" else ():
            for name in names.split(", "):
                found = importlib.import_module(module)
                assert hasattr(found, name), f"{name} of {page} is not in {module}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES

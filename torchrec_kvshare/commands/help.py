"""Help of a pipeline: its own values with their comments, and the groups that it takes.

It is read from the files in ``configs/``, so what a comment says there is what a user is shown.
"""

import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from torchrec_kvshare.commands.layout import CONFIGS, pipeline_names, summary_of, typed_command

FOOTER = """\
More: `--help group=option` shows the values of an option too; `--cfg job` prints all values as they
are composed; `-m key=1,2` runs once for each value; `--hydra-help` lists Hydra's own options.
HYDRA_FULL_ERROR=1 in the environment shows where an error was raised."""
OVERRIDE = "override "
# No group of a pipeline's values: the package's own settings of Hydra, and where the values stand.
NO_GROUPS = ("hydra_quiet", "_self_")


def list_of_pipelines() -> str:
    """What ``kvshare --help`` prints."""
    names = pipeline_names()
    width = max(map(len, names))
    lines = [f"  {name:<{width}}  {summary_of(name)}" for name in names]
    head = ["usage: kvshare NAME [key=value ...]", "", *lines, ""]
    return "\n".join([*head, "`kvshare NAME --help` shows what a pipeline takes."])


def help_of(pipeline: str, arguments: Sequence[str] = ()) -> str:
    """What ``--help`` of a pipeline prints.

    Args:
        pipeline: its name.
        arguments: beside ``--help``; of each option among them the values are shown too.
    """
    parts = [f"usage: {shlex.join(typed_command(pipeline))} [key=value ...]", summary_of(pipeline)]
    parts += [f"Values, in configs/{file}.yaml:\n\n{_values(file)}" for file in _files(pipeline)]
    groups = [_options(*group) for group in groups_of(pipeline).items()]
    if groups:
        parts += ["Groups, one option of each (* if none is given):", *groups]
    for group in groups_of(pipeline):
        for option in options_of(group):
            if f"{group}={option}" in arguments:
                text = _indented(_text(f"{group}/{option}"))
                parts.append(f"Values of {group}={option}:\n\n{text}")
    return "\n\n".join([*parts, FOOTER])


def groups_of(pipeline: str) -> dict[str, str]:
    """The groups that a pipeline takes, with the option that it takes of each by default."""
    option_by_group: dict[str, str] = {}
    for file in reversed(_files(pipeline)):
        for entry in _defaults(file):
            if isinstance(entry, DictConfig):
                for group, option in entry.items():
                    if "/" not in str(group):
                        option_by_group[str(group).removeprefix(OVERRIDE)] = option
    return option_by_group


def keys_of(pipeline: str) -> dict[str, list[str]]:
    """Every key that some choice of groups gives a pipeline, with the options that have it.

    Keys of its own files, and the groups themselves, are with no option.
    """
    own = [key for file in _files(pipeline) for key in _keys(_load(file), "")]
    options_by_key = {key: list[str]() for key in (*groups_of(pipeline), *own)}
    for group in groups_of(pipeline):
        for option in options_of(group):
            package = _package(_text(f"{group}/{option}"), group)
            for key in _keys(_load(f"{group}/{option}"), package):
                options_by_key[key] = [*options_by_key.get(key, []), f"{group}={option}"]
    return {key: options for key, options in options_by_key.items() if key != "defaults"}


def options_of(group: str) -> list[str]:
    """Names of a group's options, in order."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def comment_of(group: str, option: str) -> str:
    """What an option is, in a line: the first comment of its file."""
    for line in _text(f"{group}/{option}").splitlines():
        if line.startswith("# ") and not line.startswith("# @package"):
            return line.removeprefix("# ")
    return ""


def _options(group: str, default: str) -> str:
    options = options_of(group)
    width = max(len(f"{group}={option}") for option in options)
    lines = []
    for option in options:
        mark = "*" if option == default else " "
        lines.append(f"{mark} {f'{group}={option}':<{width}}  {comment_of(group, option)}")
    return "\n".join(lines)


def _files(pipeline: str) -> list[str]:
    """Its own file, and those that it builds on."""
    bases = [one for one in _defaults(pipeline) if isinstance(one, str) and one not in NO_GROUPS]
    return [pipeline, *(file for base in bases for file in _files(base))]


def _values(file: str) -> str:
    """A file as it stands, without its head and its list of defaults."""
    _, _, body = _text(file).partition("\ndefaults:\n")
    return _indented(body.partition("\n\n")[2])


def _indented(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())


def _defaults(file: str) -> Any:
    return _load(file).get("defaults", [])


def _keys(values: DictConfig, prefix: str) -> Iterator[str]:
    for name, value in values.items_ex(resolve=False):
        key = f"{prefix}.{name!s}".lstrip(".")
        yield key
        if isinstance(value, DictConfig):
            yield from _keys(value, key)


def _package(text: str, group: str) -> str:
    """Where an option's values stand among a pipeline's."""
    first = text.partition("\n")[0]
    if not first.startswith("# @package "):
        return group
    package = first.removeprefix("# @package ").strip()
    return "" if package == "_global_" else package


def _load(file: str) -> DictConfig:
    loaded = OmegaConf.load(CONFIGS / f"{file}.yaml")
    assert isinstance(loaded, DictConfig)
    return loaded


def _text(file: str) -> str:
    return (CONFIGS / f"{file}.yaml").read_text()

"""Help of a pipeline: its config values with their comments, and the config groups it takes.

The text is read from the files in ``configs/``: their comments are what a user sees.
"""

import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from torchrec_kvshare.commands.layout import CONFIGS, pipeline_names, summary_of, typed_command

FOOTER = """\
More: `--help group=option` also shows the values of an option; `--cfg job` prints the composed
config; `-m key=1,2` runs once for each value; `--hydra-help` lists Hydra's own options.
HYDRA_FULL_ERROR=1 in the environment prints the traceback of an error."""
OVERRIDE = "override "
# Entries of a defaults list that are not config groups: Hydra's settings, and the file itself.
NO_GROUPS = ("hydra_quiet", "_self_")


def list_of_pipelines() -> str:
    """Return what ``kvshare --help`` prints."""
    names = pipeline_names()
    width = max(map(len, names))
    lines = [f"  {name:<{width}}  {summary_of(name)}" for name in names]
    head = ["usage: kvshare NAME [key=value ...]", "", *lines, ""]
    return "\n".join([*head, "`kvshare NAME --help` shows what a pipeline takes."])


def help_of(pipeline: str, arguments: Sequence[str] = ()) -> str:
    """Return what ``--help`` of a pipeline prints.

    Args:
        pipeline: its name.
        arguments: the other arguments; for each ``group=option`` the option's values are shown too.
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
    """Return the config groups that a pipeline takes, each with its default option.

    Groups that only some options of another group take are included.
    """
    option_by_group = _own_groups(pipeline)
    for group in [*option_by_group]:
        for option in options_of(group):
            option_by_group |= _groups_in(f"{group}/{option}")
    return option_by_group


def keys_of(pipeline: str) -> dict[str, list[str]]:
    """Return every key that a pipeline can have, with the group options that define it.

    Keys of the pipeline's own files, and the groups themselves, have no options.
    """
    own = [key for file in _files(pipeline) for key in _keys(_load(file), "")]
    options_by_key = {key: list[str]() for key in (*_own_groups(pipeline), *own)}
    for group in groups_of(pipeline):
        for option in options_of(group):
            file = f"{group}/{option}"
            for key in (*_groups_in(file), *_keys(_load(file), _package(_text(file), group))):
                options_by_key[key] = [*options_by_key.get(key, []), f"{group}={option}"]
    return {key: options for key, options in options_by_key.items() if key != "defaults"}


def options_of(group: str) -> list[str]:
    """Return the names of a group's options, sorted."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def comment_of(group: str, option: str) -> str:
    """Return the first comment of an option's file: what it is, in one line."""
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


def _own_groups(pipeline: str) -> dict[str, str]:
    """Return the groups in the defaults of a pipeline's own files, each with its default option."""
    option_by_group: dict[str, str] = {}
    for file in reversed(_files(pipeline)):
        option_by_group |= _groups_in(file)
    return option_by_group


def _groups_in(file: str) -> dict[str, str]:
    """Return the groups in the defaults of one file; an absolute one starts with a slash."""
    option_by_group = {}
    for entry in _defaults(file):
        if isinstance(entry, DictConfig):
            for name, option in entry.items():
                group = str(name).removeprefix(OVERRIDE).removeprefix("/")
                if "/" not in group:
                    option_by_group[group] = option
    return option_by_group


def _files(pipeline: str) -> list[str]:
    """Return the pipeline's config file and the files it builds on."""
    bases = [one for one in _defaults(pipeline) if isinstance(one, str) and one not in NO_GROUPS]
    return [pipeline, *(file for base in bases for file in _files(base))]


def _values(file: str) -> str:
    """Return a file's values with their comments, without its first line and its defaults list."""
    _, _, rest = _text(file).partition("\ndefaults:\n")
    return _indented(rest.partition("\n\n")[2])


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
    """Return the key under which Hydra puts an option's values."""
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

"""A user's mistake in one line: what is wrong, and what is allowed.

Hydra's own messages have several lines and end with its search path. The most frequent ones are
reworded, with the nearest key that the pipeline has.
"""

import re
from difflib import get_close_matches

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from torchrec_kvshare.commands.help import keys_of

NO_SUCH_KEY = re.compile(r"Could not (?:override|delete from config\.) '([^'@]*)'")
AMBIGUOUS = re.compile(r"Ambiguous value for argument '(.*)'")
SEARCH_PATH = re.compile(r"\n(Config s|S)earch path:.*", re.DOTALL)


def message_of(error: Exception, pipeline: str) -> str:
    """Return the message of an error in one line.

    Args:
        error: ours, Hydra's, OmegaConf's, or the operating system's.
        pipeline: the pipeline that raised it.
    """
    text = str(error)
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} cannot be read as key=value: {_first_line(error.message)}"
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return f"{group} is {option!r}; one of {sorted(error.options)} is allowed"
    if isinstance(error, HydraException):
        if (found := NO_SUCH_KEY.search(text)) and not found[1].startswith("hydra."):
            return _no_such_key(found[1], pipeline)
        if found := AMBIGUOUS.search(text):
            key, _, values = found[1].partition("=")
            return (
                f"{key} is {values!r}: write {key}=[{values}] for a list, {key}=\"'{values}'\" for "
                "a string, and -m to run once for each"
            )
        text = SEARCH_PATH.sub("", text)
        if isinstance(error.__cause__, OmegaConfBaseException):
            text = f"{text}\n{_first_line(str(error.__cause__))}"
    elif isinstance(error, OmegaConfBaseException):
        text = f"{error.full_key}: {_first_line(text)}"
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _no_such_key(key: str, pipeline: str) -> str:
    options_by_key = keys_of(pipeline)
    if options := options_by_key.get(key):
        # A schema has all keys of a group inside it, but not those of another choice at the top.
        added = f", or add the key with ++{key}=…" if "." in key else ""
        return f"{key} is a key of {' or '.join(options)}; choose that{added}"
    parent, _, name = key.rpartition(".")
    siblings = sorted(one for one in options_by_key if one.rpartition(".")[0] == parent)
    sibling_by_name = {one.rpartition(".")[2]: one for one in siblings}
    near = [sibling_by_name[one] for one in get_close_matches(name, sibling_by_name, 1)]
    near = near or [one for one in options_by_key if one.rpartition(".")[2] == name]
    if near:
        return f"{key} is not a key of {pipeline}; did you mean {' or '.join(near)}?"
    known = siblings or sorted(one for one in options_by_key if "." not in one)
    return f"{key} is not a key of {pipeline}; its keys are {', '.join(known)}"


def _first_line(text: str) -> str:
    return text.partition("\n")[0]

"""The files of a log or of requests: one, a list, those that a glob matches, or those of a folder.

Below a folder or a glob, folders named ``key=value`` are columns of the files in them, as Hive,
Spark and DuckDB write them.
"""

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from torchrec_kvshare.errors import ConfigError, DataError

NO_VALUE = "__HIVE_DEFAULT_PARTITION__"  # what the value of a folder is called if it is missing
HIDDEN = (".", "_")  # names that begin so are no data, such as Spark's _SUCCESS


class SourceFile(NamedTuple):
    """A file among others, and where it is below the folder or the glob that it was found by."""

    path: Path
    text_by_column: dict[str, str]  # from the names of its folders
    name: Path = Path()


def source_files(paths: str | list[str], key: str = "data.path") -> list[SourceFile]:
    """Return the files that a config names, in the order in which they are read.

    Args:
        paths: a file, a glob, a folder with files at any depth, or a list of these; files of a glob
            or folder are sorted by path, hidden ones are left out.
        key: of the config, for messages.

    Returns:
        The files, at least one.

    Raises:
        ConfigError: if ``paths`` is not text or a list of texts, or empty.
        DataError: if a glob or a folder holds no file, or one file is named twice.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "day=2019-10-01"
        >>> folder.mkdir()
        >>> _ = (folder / "log.csv").write_text("user_id,item_id,time")
        >>> [(file.path.name, file.text_by_column) for file in source_files(str(folder.parent))]
        [('log.csv', {'day': '2019-10-01'})]
    """
    several = paths if isinstance(paths, list) else [paths]
    if not several or not all(isinstance(one, str) and one.strip() for one in several):
        raise ConfigError(f"{key} is {paths!r}; a file, a folder, a glob or a list of these")
    files = [file for one in several for file in _files_of(one)]
    seen: set[Path] = set()
    for file in files:
        if file.path in seen:
            raise DataError(f"{file.path} is named twice by {key} {paths!r}")
        seen.add(file.path)
    return files


def source_name(files: Sequence[SourceFile]) -> str:
    """Return the name of a log in messages.

    Example:
        >>> source_name([SourceFile(Path("a.csv"), {}), SourceFile(Path("b.csv"), {})])
        'a.csv and 1 other file'
    """
    others = len(files) - 1
    suffix = "" if others == 1 else "s"
    return f"{files[0].path} and {others} other file{suffix}" if others else str(files[0].path)


def _files_of(text: str) -> Iterator[SourceFile]:
    path = Path(text)
    if path.is_dir():
        root, found = path, [one for one in path.rglob("*") if one.is_file()]
    elif glob.has_magic(text) and not path.exists():
        root = _root_of(path)
        found = [Path(one) for one in glob.glob(text, recursive=True) if Path(one).is_file()]
    else:
        yield SourceFile(path, {}, Path(path.name))
        return
    found = [one for one in sorted(found) if not _is_hidden(one.relative_to(root))]
    if not found:
        raise DataError(f"{text} holds no file")
    for one in found:
        name = one.relative_to(root)
        yield SourceFile(one, dict(_partitions(name)), name)


def _root_of(pattern: Path) -> Path:
    """Return the folder of a glob: its parts before the first with a wildcard."""
    parts = pattern.parts
    magic = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:magic])


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(HIDDEN) and "=" not in part for part in path.parts)


def _partitions(path: Path) -> Iterator[tuple[str, str]]:
    for part in path.parts[:-1]:
        key, equals, value = part.partition("=")
        if equals:
            yield unquote(key), "" if value == NO_VALUE else unquote(value)

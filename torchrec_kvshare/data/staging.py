"""Stages of preparing a log, each written once: what a killed run has finished is not done again.

A stage is a file or a folder of the work folder. It is written under another name and renamed when
it is complete, so that what has its name is whole. DuckDB computes them within a memory limit and
spills to the work folder.
"""

import importlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchrec_kvshare.data.chunks import Chunk
from torchrec_kvshare.data.files import FileFormat
from torchrec_kvshare.data.sources import SourceFile
from torchrec_kvshare.data.tables import EXAMPLES_PER_REASON, Part, position_name, table_chunks
from torchrec_kvshare.errors import ConfigError, DataError, MissingExtraError
from torchrec_kvshare.features.ids import is_integer_id

# Python, its libraries and one chunk: measured 160 MB beside DuckDB's own.
RESERVED_BYTES = 300_000_000
LEAST_BYTES = 500_000_000
BATCH_ROWS = 131_072  # rows of a Parquet file that Python has in memory
INTEGER = "^(0|[1-9][0-9]{0,17})$"
INSTANT = "^[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}$"
GLOB = "*?["  # DuckDB would expand these in the name of a file
DICTIONARY_BYTES = 16 * 2**20  # of a chunk's texts; a longer dictionary is written as plain texts
ROWS = "FORMAT parquet, COMPRESSION lz4, PARQUET_VERSION V2"


class Work:
    """The work folder: stages by name, and the database that computes them.

    Args:
        folder: made if it is missing.
        memory_bytes: limit of the whole process; DuckDB gets what Python does not need.
        threads: DuckDB's threads.
        finished: called after each stage with its name.

    Raises:
        ConfigError: if the limit is too low, or DuckDB cannot name the folder.
        MissingExtraError: without DuckDB or pyarrow.
    """

    def __init__(
        self, folder: Path, memory_bytes: int, threads: int, finished: Callable[[str], None]
    ) -> None:
        if memory_bytes < LEAST_BYTES:
            raise ConfigError(f"memory_bytes is {memory_bytes}; it must be at least {LEAST_BYTES}")
        if set(GLOB) & set(str(folder)):
            raise ConfigError(f"output is {str(folder.parent)!r}; none of {GLOB} may be in it")
        try:
            duckdb = importlib.import_module("duckdb")
            self.arrow = importlib.import_module("pyarrow")
            self.parquet = importlib.import_module("pyarrow.parquet")
        except ImportError as error:
            raise MissingExtraError("prepare", "preparing a log") from error
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.finished = folder, finished
        self.database = duckdb.connect(
            config={
                "memory_limit": f"{memory_bytes - RESERVED_BYTES}B",
                "threads": threads,
                "temp_directory": str(folder / "spill"),
                "preserve_insertion_order": False,
            }
        )
        self.errors = duckdb.Error

    def make(self, name: str, write: Callable[[Path], None]) -> Path:
        """Make a stage unless it is there, and return its path."""
        path = self.folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(f"{path.name}.new")
            remove(unfinished)
            write(unfinished)
            os.replace(unfinished, path)
            # DuckDB may take the memory that Arrow no longer uses.
            self.arrow.default_memory_pool().release_unused()
        self.finished(name)
        return path

    def copy(self, name: str, query: str, options: str = ROWS) -> Path:
        """Make a stage of a query's rows."""
        return self.make(
            name, lambda path: self.execute(f"COPY ({query}) TO {quoted(path)} ({options})")
        )

    def execute(self, statement: str) -> Any:
        """Execute a statement.

        Raises:
            DataError: if DuckDB cannot do it within its memory or disk.
        """
        try:
            return self.database.execute(statement)
        except self.errors as error:
            if type(error).__name__ in ("OutOfMemoryException", "IOException"):
                first = str(error).splitlines()[0]
                raise DataError(
                    f"DuckDB: {first}; raise memory_bytes, or free disk space"
                ) from error
            raise

    def one(self, query: str) -> tuple[Any, ...]:
        """Return the only row of a query."""
        [row] = self.execute(query).fetchall()
        return tuple(row)

    def batches(self, path: Path, columns: Sequence[str] | None = None) -> Iterator[Any]:
        """Yield the rows of a Parquet file as Arrow batches."""
        with self.parquet.ParquetFile(path, pre_buffer=False) as file:
            yield from file.iter_batches(BATCH_ROWS, columns=columns)

    def write(self, path: Path, tables: Iterator[Any], schema: Any) -> None:
        """Write Arrow tables of one schema to a Parquet file."""
        with self.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
            for table in tables:
                writer.write_table(table)

    def write_columns(self, name: str, columns: dict[str, Any]) -> None:
        """Make a stage of columns that are in memory."""
        made = self.arrow.table(columns)
        self.make(name, lambda path: self.write(path, iter([made]), made.schema))

    def write_json(self, name: str, compute: Callable[[], Any]) -> Any:
        """Make a stage of a JSON value, and return the value."""

        def write(path: Path) -> None:
            path.write_text(json.dumps(compute()))

        path = self.make(name, write)
        return json.loads(path.read_text())

    def close(self) -> None:
        """Close the database."""
        self.database.close()


def stage_files(
    work: Work,
    files: Sequence[SourceFile],
    names: Sequence[str],
    file_format: FileFormat,
    list_separator: str,
    lists: Sequence[str],
    time: str,
) -> tuple[list[Part], int, list[str]]:
    """Write the wanted columns of every file as texts: one Parquet file each, in ``staged/``.

    Columns: ``row``, counted over all files, ``position`` in the file, and ``c0``, ``c1``, … in the
    order of ``names``. The times of most logs are integers, or written as 2019-10-01 00:00:00, and
    nearly all different: such texts stand as numbers in ``integer`` or ``instant``, with a null in
    their column.

    Returns:
        The files with their rows; the number of rows with a wrong number of fields, and the first.
    """
    parts, num_misfits, misfits, first_row = [], 0, list[str](), 0
    for index, file in enumerate(files):
        chunks = table_chunks(file, names, file_format, list_separator, lists)
        staged = _Staged(work.arrow, names, time, file_format.missing, first_row)
        counts = _stage_file(work, f"staged/{index:05d}", chunks, staged)
        parts.append(Part(str(file.path), position_name(file.path), counts["num_rows"]))
        first_row += counts["num_rows"]
        num_misfits += counts["num_misfits"]
        misfits = [*misfits, *counts["misfits"]][:EXAMPLES_PER_REASON]
    return parts, num_misfits, misfits


def _stage_file(
    work: Work, name: str, chunks: Iterator[Chunk], staged: "_Staged"
) -> dict[str, Any]:
    counts: dict[str, Any] = {"num_rows": 0, "num_misfits": 0, "misfits": []}

    def tables() -> Iterator[Any]:
        for chunk in chunks:
            yield staged.table(chunk, counts["num_rows"])
            counts["num_rows"] += len(chunk.positions)
            counts["num_misfits"] += chunk.num_misfits
            counts["misfits"] = [*counts["misfits"], *chunk.misfits][:EXAMPLES_PER_REASON]

    def write(path: Path) -> None:
        with work.parquet.ParquetWriter(path, staged.schema, **staged.encodings()) as writer:
            for table in tables():
                writer.write_table(table)
        path.with_name(f"{Path(name).name}.json").write_text(json.dumps(counts))

    path = work.make(f"{name}.parquet", write)
    return dict(json.loads(path.with_suffix(".json").read_text()))


class _Staged:
    """Makes Arrow tables of chunks."""

    def __init__(
        self, arrow: Any, names: Sequence[str], time: str, missing: Sequence[str], first_row: int
    ) -> None:
        self.arrow, self.compute = arrow, importlib.import_module("pyarrow.compute")
        self.names, self.time, self.first_row = names, time, first_row
        self.missing = arrow.array(missing, arrow.string())
        self.has_missing_integer = any(map(is_integer_id, missing))
        text, number = arrow.dictionary(arrow.int32(), arrow.string()), arrow.int64()
        self.kind_by_column = dict.fromkeys(("row", "position", "integer", "instant"), number)
        self.kind_by_column |= {
            f"c{index}": arrow.string() if name == time else text
            for index, name in enumerate(names)
        }
        self.schema = arrow.schema(list(self.kind_by_column.items()))

    def encodings(self) -> dict[str, Any]:
        """Return how the columns are written."""
        numbers = [key for key, kind in self.kind_by_column.items() if kind == self.arrow.int64()]
        texts = [key for key in self.kind_by_column if key not in numbers]
        return {
            "use_dictionary": texts,
            "dictionary_pagesize_limit": DICTIONARY_BYTES,
            "column_encoding": dict.fromkeys(numbers, "DELTA_BINARY_PACKED"),
            "write_statistics": False,  # They take longer than the texts.
            "compression": "lz4",
        }

    def table(self, chunk: Chunk, num_before: int) -> Any:
        first = self.first_row + num_before
        columns = {
            "row": np.arange(first, first + len(chunk.positions)),
            "position": chunk.positions,
        }
        for index, name in enumerate(self.names):
            codes, texts = chunk.columns[name]
            if name == self.time:
                columns |= self._times(codes, texts, f"c{index}")
            else:
                columns[f"c{index}"] = self.arrow.DictionaryArray.from_arrays(
                    self.arrow.array(codes.astype(np.int32)), self._texts(texts)
                )
        return self.arrow.table([columns[name] for name in self.schema.names], schema=self.schema)

    def _texts(self, texts: Any) -> Any:
        array = self.arrow.array(texts, self.arrow.string()) if isinstance(texts, list) else texts
        return array.cast(self.arrow.string()).fill_null("")

    def _times(self, codes: Any, texts: Any, column: str) -> dict[str, Any]:
        """Return times by row: integers and instants as numbers, and other texts as they are."""
        arrow, compute = self.arrow, self.compute
        spelled = self._texts(texts)
        is_integer = not isinstance(texts, list) and texts.type == arrow.int64()
        if is_integer and not self.has_missing_integer:
            integers, instants = texts, arrow.nulls(len(texts), arrow.int64())
        else:
            integers = self._parsed(spelled, INTEGER, arrow.int64())
            instants = self._parsed(spelled, INSTANT, arrow.timestamp("s")).cast(arrow.int64())
        is_number = compute.or_(compute.is_valid(integers), compute.is_valid(instants))
        others = compute.if_else(is_number, None, spelled)
        by_name = {"integer": integers, "instant": instants, column: others}
        return {name: values.take(arrow.array(codes)) for name, values in by_name.items()}

    def _parsed(self, texts: Any, pattern: str, kind: Any) -> Any:
        """Return the texts of a pattern as numbers, null for others and for missing values."""
        compute = self.compute
        is_spelled = compute.match_substring_regex(texts, pattern)
        is_spelled = compute.and_not(is_spelled, compute.is_in(texts, value_set=self.missing))
        try:
            return compute.if_else(is_spelled, texts, None).cast(kind)
        except self.arrow.ArrowInvalid:  # Some are no dates, such as 2010-02-30.
            return self.arrow.nulls(len(texts), kind)


def table(path: Path, options: str = "") -> str:
    """Return a Parquet file, or those of a folder, as a table of SQL."""
    name = path / "*.parquet" if path.is_dir() else path
    return f"read_parquet({quoted(name)}{options})"


def quoted(value: Path | str) -> str:
    """Return a text as a literal of SQL."""
    return "'" + str(value).replace("'", "''") + "'"


def identifier(name: str) -> str:
    """Return the name of a column as SQL has it."""
    return '"' + name.replace('"', '""') + '"'


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

"""Prepare a log of any length for training: shards by user, in a folder, within a memory limit.

The folder holds what ``build_dataset`` makes of the same log: its codes, its order and the ids of
its training split. A shard has the users whose code leaves the same remainder, with all of their
events. docs/data.md describes the files.
"""

import json
import os
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from torchrec_kvshare.commands.machine import granted_cores
from torchrec_kvshare.config import (
    CompleteJourneyData,
    DataConfig,
    InteractionsData,
    MovieLensData,
    OnlineRetailData,
    PrepareConfig,
)
from torchrec_kvshare.data.coding import CodedLog, code_files
from torchrec_kvshare.data.cut import Cutter
from torchrec_kvshare.data.dataset import in_canonical_order
from torchrec_kvshare.data.interactions import InteractionLog, ReadReport, codes_of_labels
from torchrec_kvshare.data.load import file_format_of, load_log, mapping_of, root_of
from torchrec_kvshare.data.shards import (
    MANIFEST,
    event_column,
    event_float_column,
    label_column,
    request_column,
    request_file,
    request_float_column,
)
from torchrec_kvshare.data.sources import source_files
from torchrec_kvshare.data.splits import SplitRule, split_rule
from torchrec_kvshare.data.staging import Work, remove, table
from torchrec_kvshare.errors import ConfigError, DataError

STATE = "state.json"  # what an unfinished folder is made of
WORK = "work"


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Prepare a log, or go on where a killed process stopped.

    Args:
        config: the log, the folder, and the limits.

    Returns:
        The manifest of the folder.

    Raises:
        ConfigError: if the folder holds something else, or a value cannot work.
        DataError: if the log cannot be used.
        MissingExtraError: without DuckDB or pyarrow, or if the data set is not installed.
    """
    folder = Path(config.output)
    rule = split_rule(config.split, config.split_times)
    made_of = _made_of(config, rule)
    if (folder / MANIFEST).is_file():
        manifest = json.loads((folder / MANIFEST).read_text())
        _check_same(folder, manifest["made_of"], made_of)
        return dict(manifest)
    _claim(folder, made_of)
    with tqdm(unit="stage", desc="prepare") as bar:

        def finished(name: str) -> None:
            bar.set_description(name, refresh=False)
            bar.update()

        work = Work(folder / WORK, config.memory_bytes, config.threads or granted_cores(), finished)
        with closing(work):
            log = _coded(work, config.data)
            cutter = Cutter(work, log, folder, config.num_shards, rule)
            bar.total = bar.n + 2 * cutter.num_shards
            manifest = cutter.write() | {"source": made_of["data"], "made_of": made_of}
    unfinished = folder / f"{MANIFEST}.new"
    unfinished.write_text(json.dumps(manifest, indent=2) + "\n")
    os.replace(unfinished, folder / MANIFEST)
    remove(folder / WORK)
    remove(folder / STATE)
    return manifest


def _made_of(config: PrepareConfig, rule: SplitRule) -> dict[str, Any]:
    """Return all that decides what the folder will hold."""
    files: list[Path] = []
    if isinstance(config.data, InteractionsData):
        files = [file.path for file in source_files(config.data.path)]
        paths = config.data.path if isinstance(config.data.path, list) else [config.data.path]
        output = Path(config.output).resolve()
        for path in map(Path, paths):
            if path.is_dir() and path.resolve() in output.parents:
                raise ConfigError(
                    f"output is {config.output!r}, inside data.path {str(path)!r}; its files would "
                    "be read as the log's; name a folder beside it"
                )
    elif isinstance(config.data, OnlineRetailData | MovieLensData | CompleteJourneyData):
        files = sorted(path for path in root_of(config.data).glob("*") if path.is_file())
    inputs = []
    for path in files:
        if not path.is_file():
            raise DataError(f"{path} cannot be read: there is no such file")
        status = path.stat()
        inputs.append([str(path), status.st_size, status.st_mtime_ns])
    data = asdict(config.data)
    if isinstance(data.get("label"), dict):
        data["label"] = [*data["label"].items()]  # The order of tasks counts, too.
    return {
        "data": data,
        "num_shards": config.num_shards,
        "split_rule": rule.to_json(),
        "inputs": inputs,
    }


def _claim(folder: Path, made_of: dict[str, Any]) -> None:
    """Make the folder, or check that it was begun with the same config and files."""
    state = folder / STATE
    if state.is_file():
        _check_same(folder, json.loads(state.read_text()), made_of)
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(
            f"output is {str(folder)!r}, which holds other files; allowed: a new or empty folder, "
            "or one that pipelines.prepare has begun"
        )
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{STATE}.new"
    unfinished.write_text(json.dumps(made_of))
    os.replace(unfinished, state)


def _check_same(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    named = {
        "data": "another data config",
        "num_shards": "another num_shards",
        "split_rule": "another split",
        "inputs": "other files",
    }
    now = json.loads(json.dumps(now))
    other = [words for key, words in named.items() if before.get(key) != now[key]]
    if other:
        raise ConfigError(
            f"output is {str(folder)!r}, which was begun with {' and '.join(other)}; name another "
            "folder, or remove this one"
        )


# --- the coded log


def _coded(work: Work, data: DataConfig) -> CodedLog:
    if isinstance(data, InteractionsData):
        mapping, file_format = mapping_of(data), file_format_of(data.format)
        return code_files(work, source_files(data.path), mapping, file_format)
    return _coded_in_memory(work, data)


def _coded_in_memory(work: Work, data: DataConfig) -> CodedLog:
    """Write a log that has a reader of its own, or none, as stages."""
    done = work.folder / "log.json"
    if not done.exists():
        _write_log(work, in_canonical_order(load_log(data)))
    described = json.loads(done.read_text())
    report = described["report"]
    return CodedLog(
        events=f"SELECT * FROM {table(work.folder / 'events.parquet')}",
        tasks=tuple(described["tasks"]),
        event_attributes=tuple(described["event_attributes"]),
        item_attributes=tuple(described["item_attributes"]),
        item_floats=tuple(described["item_floats"]),
        user_attributes=tuple(described["user_attributes"]),
        request_attributes=tuple(described["request_attributes"]),
        user_floats=tuple(described["user_floats"]),
        request_floats=tuple(described["request_floats"]),
        event_floats=tuple(described["event_floats"]),
        report=ReadReport(**report | {"notes": tuple(report["notes"])}),
        time_form=described["time_form"],
    )


def _write_log(work: Work, log: InteractionLog) -> None:
    arrow = work.arrow
    columns = [("user", log.users), ("item", log.items)]
    columns += [
        (event_column(number), ids) for number, ids in enumerate(log.event_attributes.values())
    ]
    for role, ids in columns:
        work.write_columns(f"ids/{role}.parquet", {"id": arrow.array(ids.ids, arrow.string())})
    events = {
        "user": log.users.codes,
        "item": log.items.codes.astype(np.int32),
        "time": log.time,
    }
    for number, labels in enumerate(log.labels.values()):
        events[label_column(number)] = codes_of_labels(labels)
    for number, ids in enumerate(log.event_attributes.values()):
        events[event_column(number)] = ids.codes.astype(np.int32)
    for number, column in enumerate(log.request_attributes.values()):
        events[request_column(number)] = column.codes.astype(np.int32)
    for number, floats in enumerate(log.request_floats.values()):
        events[request_float_column(number)] = floats
    for number, floats in enumerate(log.event_floats.values()):
        events[event_float_column(number)] = floats
    work.write_columns("events.parquet", events)
    texts = arrow.list_(arrow.string())
    for role, attributes in (("item", log.item_attributes), ("user", log.user_attributes)):
        for number, values in enumerate(attributes.values()):
            codes = [code for code, value in enumerate(values) if value]
            given = arrow.array([list(values[code]) for code in codes], texts)
            coded = {"code": arrow.array(codes, arrow.int64()), "value": given}
            work.write_columns(f"{role}_attributes/{number}.parquet", coded)
    for number, column in enumerate(log.request_attributes.values()):
        given = arrow.array([list(value) for value in column.values], texts)
        work.write_columns(request_file(number), {"value": given})
    for role, floats_by_name in (("item", log.item_floats), ("user", log.user_floats)):
        for number, floats in enumerate(floats_by_name.values()):
            coded = {"code": np.arange(len(floats)), "value": floats}
            work.write_columns(f"{role}_floats/{number}.parquet", coded)
    summary = log.report.summary
    described = {
        "tasks": list(log.labels),
        "event_attributes": list(log.event_attributes),
        "item_attributes": list(log.item_attributes),
        "item_floats": list(log.item_floats),
        "user_attributes": list(log.user_attributes),
        "request_attributes": list(log.request_attributes),
        "user_floats": list(log.user_floats),
        "request_floats": list(log.request_floats),
        "event_floats": list(log.event_floats),
        "report": asdict(replace(log.report, summary=None)),
        "time_form": None if summary is None else summary.time_form,
    }
    work.write_json("log.json", lambda: described)

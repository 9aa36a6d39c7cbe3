"""Code a log of any length with DuckDB: the same rows, ids and values as ``build_log``'s.

What a text means is said in Python, once per distinct text: ``interactions`` and ``times`` do it
here as they do in memory. DuckDB finds the distinct texts, joins what they mean to the rows,
numbers the ids in the order of ``sorted_ids``, and counts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torchrec_kvshare.data.files import FileFormat
from torchrec_kvshare.data.interactions import (
    BAD_FLOATS,
    BAD_LABEL,
    DUBIOUS_IDS,
    MISSING_LABEL,
    VALUES_SHOWN,
    ColumnMapping,
    LabelRule,
    ReadReport,
    attribute_ids,
    bad_float,
    check_float,
    check_kept,
    check_labels,
    dubious_note,
    example_of,
    label_rule,
)
from torchrec_kvshare.data.shards import (
    event_column,
    event_float_column,
    label_column,
    request_column,
    request_file,
    request_float_column,
)
from torchrec_kvshare.data.sources import SourceFile, source_name
from torchrec_kvshare.data.staging import Work, quoted, stage_files, table
from torchrec_kvshare.data.tables import EXAMPLES_PER_REASON, Exclusion, Part, without_missing
from torchrec_kvshare.data.times import Instants, Integers, TimeReader, finite_number, time_reader
from torchrec_kvshare.errors import DataError
from torchrec_kvshare.features.ids import canonical_id
from torchrec_kvshare.features.limits import MAX_TIME

BAD_TIME = "bad time"
_INTEGER = "regexp_full_match(id, '0|-?[1-9][0-9]*')"
# `sorted_ids`: negative integers, the longest first and the greatest digits first; other integers
# by length and digits; texts by code point, which is the order of UTF-8's bytes.
ORDER_OF_IDS = f"""
    CASE WHEN NOT {_INTEGER} THEN 2 WHEN id LIKE '-%' THEN 0 ELSE 1 END,
    CASE WHEN NOT {_INTEGER} THEN 0 WHEN id LIKE '-%' THEN -strlen(id) ELSE strlen(id) END,
    CASE WHEN {_INTEGER} AND id LIKE '-%' THEN translate(id, '0123456789', '9876543210') ELSE id END
"""
INSTANT = "strftime(make_timestamp(instant * 1000000), '%Y-%m-%d %H:%M:%S')"
COUNT_SHIFT = 2**32  # above the number of values of an attribute


@dataclass
class CodedLog:
    """A log whose ids are numbered: stages of the work folder, and the events as a query.

    Stages: ``ids/<role>.parquet`` with ``id`` in the order of codes; ``item_attributes/<n>``,
    ``user_attributes/<n>``, ``item_floats/<n>`` and ``user_floats/<n>.parquet`` with ``code`` and
    ``value``, for owners that have one; ``request_file(n)`` with ``value`` in the order of codes.

    Args:
        events: a query with ``user``, ``item``, ``time``, for each task ``label_column(n)``, for
            each attribute of events ``event_column(n)``, for each attribute of requests
            ``request_column(n)``, for each float of requests ``request_float_column(n)`` and of
            events ``event_float_column(n)``.
        tasks: names of the tasks.
        event_attributes: names of attributes of events, whose roles are ``event_column(n)``.
        item_attributes: names of item attributes.
        item_floats: names of item floats.
        user_attributes: names of user attributes.
        request_attributes: names of attributes of requests.
        user_floats: names of user floats.
        request_floats: names of floats of requests.
        event_floats: names of floats of events.
        report: of the rows read, without its summary.
        time_form: how times are written; None: the log was not read from files.
    """

    events: str
    tasks: tuple[str, ...]
    event_attributes: tuple[str, ...]
    item_attributes: tuple[str, ...]
    item_floats: tuple[str, ...]
    user_attributes: tuple[str, ...]
    request_attributes: tuple[str, ...]
    user_floats: tuple[str, ...]
    request_floats: tuple[str, ...]
    event_floats: tuple[str, ...]
    report: ReadReport
    time_form: str | None


def code_files(
    work: Work, files: Sequence[SourceFile], columns: ColumnMapping, file_format: FileFormat
) -> CodedLog:
    """Stage and code the files of a log.

    Args:
        work: where the stages are made.
        files: the files.
        columns: the columns by their role.
        file_format: how the files are written.

    Returns:
        The coded log.

    Raises:
        DataError: as ``read_interactions`` does for the same files.
    """
    parts, num_misfits, misfits = stage_files(
        work,
        files,
        columns.names(),
        file_format,
        list_separator=columns.list_separator,
        lists=columns.attributes,
        time=columns.time,
    )
    coding = _Coding(work, source_name(files), parts, columns, file_format.missing)
    time_form = coding.code_rows()
    report = coding.report(num_misfits, misfits)
    coding.number_ids()
    coding.choose_attributes()
    coding.code_requests()
    coding.take_medians()
    return CodedLog(
        events=coding.events(),
        tasks=columns.tasks,
        event_attributes=tuple(columns.event_ids),
        item_attributes=columns.item_attributes,
        item_floats=columns.item_floats,
        user_attributes=columns.user_attributes,
        request_attributes=columns.request_attributes,
        user_floats=columns.user_floats,
        request_floats=columns.request_floats,
        event_floats=columns.event_floats,
        report=report,
        time_form=time_form,
    )


class _Step(NamedTuple):
    """A reason to drop a row, in the order in which they are tested."""

    reason: str
    column: str
    number: int


@dataclass
class _Coding:
    """The queries of one log. Columns are called ``c<n>`` in staged texts, by their index."""

    work: Work
    source: str
    parts: list[Part]
    columns: ColumnMapping
    missing: Sequence[str]
    steps: list[_Step] = field(default_factory=list)
    seconds: str = ""  # of a staged time, as SQL
    text_of_time: str = ""  # the column of the texts in seconds.parquet

    def __post_init__(self) -> None:
        self.index_by_name = {name: index for index, name in enumerate(self.columns.names())}
        time = f"c{self.index_by_name[self.columns.time]}"
        self.staged = (
            f"(SELECT * REPLACE (coalesce({time}, CAST(integer AS VARCHAR), {INSTANT}) AS {time}), "
            f"{time} AS other FROM {table(self.work.folder / 'staged')})"
        )
        before, after = self.columns.exclusions_before_time(), self.columns.exclusions_after_time()
        # By task; in staged texts its labels are called as in the events, by its index.
        self.rules: list[tuple[str, LabelRule]] = [
            (label_column(number), label_rule(rule))
            for number, rule in enumerate(self.columns.rule_by_task.values())
        ]
        reasons = [(one.reason, one.column) for one in before]
        reasons += [(BAD_TIME, self.columns.time)]
        reasons += [(one.reason, one.column) for one in after]
        self.label_step = len(reasons)
        reasons += [(BAD_LABEL, rule.column) for _, rule in self.rules[:1]]
        self.steps = [_Step(*reason, number) for number, reason in enumerate(reasons)]
        self.time_step = len(before)
        numbered = [*enumerate(before), *enumerate(after, start=len(before) + 1)]
        self.exclusions: dict[str, list[tuple[int, Exclusion]]] = {}
        for number, exclusion in numbered:
            self.exclusions.setdefault(exclusion.column, []).append((number, exclusion))
        self.id_by_role = {"user": self.columns.user, "item": self.columns.item}
        for number, name in enumerate(self.columns.event_ids.values()):
            self.id_by_role[event_column(number)] = name

    # --- what texts mean

    def code_rows(self) -> str:
        """Make ``rows.parquet``: of every row why it is dropped, and what its texts mean."""
        named = [
            *self.id_by_role.values(),
            *self.columns.attributes,
            *self.columns.floats,
            *(rule.column for _, rule in self.rules),
        ]
        for name in dict.fromkeys(named):
            self._find_values(name)
        bad = [step for step in self.steps if self._has_bad(step)]
        time_form = self._read_times([step for step in bad if step.number < self.time_step])
        tested = [step for step in self.steps if step in bad or step.number == self.time_step]
        before = [step for step in tested if step.number < self.label_step]
        for task in range(len(self.rules)):
            self._check_labels(task, before)
        self._write_rows(tested)
        return time_form

    def _find_values(self, name: str) -> None:
        """Make ``values/<n>.parquet``: the distinct texts of a column and what they mean."""
        index = self.index_by_name[name]
        distinct = self.work.copy(
            f"distinct/{index}.parquet", f"SELECT DISTINCT c{index} AS text FROM {self.staged}"
        )
        arrow = self.work.arrow
        kinds = {"code": arrow.int64(), "text": arrow.string()}
        for number, _ in self.exclusions.get(name, ()):
            kinds[f"bad{number}"] = arrow.bool_()
        if name in self.id_by_role.values():
            kinds["id"] = arrow.string()
        for label, rule in self.rules:
            if name == rule.column:
                kinds[label] = arrow.float64()
        if name in self.columns.attributes:
            kinds["ids"] = arrow.list_(arrow.string())
        if name in self.columns.floats:
            kinds |= {"number": arrow.float64(), "issue": arrow.int64()}
        schema = arrow.schema(list(kinds.items()))

        def tables() -> Iterator[Any]:
            code = 0
            for batch in self.work.batches(distinct):
                texts = batch.column("text").to_pylist()
                values = {"code": range(code, code + len(texts)), "text": texts}
                values |= self._meaning(name, without_missing(texts, self.missing), kinds)
                yield arrow.table({key: arrow.array(values[key], kinds[key]) for key in kinds})
                code += len(texts)

        self.work.make(
            f"values/{index}.parquet", lambda path: self.work.write(path, tables(), schema)
        )

    def _meaning(self, name: str, texts: list[str], kinds: dict[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = {
            f"bad{number}": list(map(exclusion.excludes, texts))
            for number, exclusion in self.exclusions.get(name, ())
        }
        if "id" in kinds:
            values["id"] = list(map(canonical_id, texts))
        for column, rule in self.rules:
            if column in kinds:
                labels = map(rule.label, texts)
                values[column] = [None if label != label else label for label in labels]
        if "ids" in kinds:
            values["ids"] = [attribute_ids(text, self.columns.list_separator) for text in texts]
        if "number" in kinds:
            reasons = [bad_float(text) for text in texts]
            numbers = [finite_number(text) for text in texts]
            values["issue"] = [BAD_FLOATS.index(one) if one else None for one in reasons]
            values["number"] = [
                None if reason or number != number else number
                for number, reason in zip(numbers, reasons, strict=True)
            ]
        return values

    def _values(self, name: str) -> str:
        return table(self.work.folder / f"values/{self.index_by_name[name]}.parquet")

    def _has_bad(self, step: _Step) -> bool:
        """Return whether some text of a column makes its row bad; a bad time is not known yet."""
        if step.reason == BAD_TIME:
            return False
        tests = [(f"bad{step.number}", step.column)]
        if step.reason == BAD_LABEL:
            tests = [(f"{label} IS NULL", rule.column) for label, rule in self.rules]
        return all(
            self.work.one(f"SELECT bool_or({condition}) FROM {self._values(column)}")[0]
            for condition, column in tests
        )

    # --- times

    def _read_times(self, bad: Sequence[_Step]) -> str:
        """Decide the format of the times of the rows kept so far, and return it in words."""
        where = f"{self._from_staged([step.column for step in bad])}"
        where += f" WHERE {self._verdict(bad)} IS NULL"
        is_plain = self.columns.time_format.pattern is None
        time = f"c{self.index_by_name[self.columns.time]}"
        # A pattern may read integers and instants as something else.
        text = "other" if is_plain else time
        for name in ("integer", "instant"):
            found = f"{name} IS NOT NULL" if is_plain else "false"
            self.work.copy(
                f"times/{name}.parquet", f"SELECT DISTINCT {name} AS time {where} AND {found}"
            )
        self.work.copy(
            "times/text.parquet",
            f"SELECT DISTINCT {text} AS time {where} AND {text} IS NOT NULL",
        )
        what = f"column {self.columns.time!r} of {self.source}"
        try:
            reader = time_reader(self._times(), self.columns.time_format, what)
            self._write_seconds(reader)
            form = reader.checked_form()
        except DataError:
            # The message names the first such texts, which takes the texts in their order.
            self._raise_in_order(where, time, what)
            raise
        parsed = ["seconds.seconds"]
        if is_plain:
            most = MAX_TIME * reader.per_second
            parsed += [
                "CASE WHEN integer >= 0 AND CAST(integer AS DOUBLE) <= "
                f"{most} THEN integer // {reader.per_second} END",
                f"CASE WHEN instant BETWEEN 0 AND {MAX_TIME} THEN instant END",
            ]
        self.seconds = f"coalesce({', '.join(parsed)})"
        self.text_of_time = text
        return form

    def _times(self) -> Iterator[Sequence[str]]:
        """Yield the distinct times, in no order."""
        for name, wrap in (("integer", Integers), ("instant", Instants)):
            for batch in self.work.batches(self.work.folder / f"times/{name}.parquet"):
                yield wrap(batch.column("time").to_numpy())
        for batch in self.work.batches(self.work.folder / "times/text.parquet"):
            yield without_missing(batch.column("time").to_pylist(), self.missing)

    def _write_seconds(self, reader: TimeReader) -> None:
        """Make ``seconds.parquet``: of texts that DuckDB does not parse; count the others."""
        arrow = self.work.arrow
        schema = arrow.schema([("text", arrow.string()), ("seconds", arrow.int64())])

        def tables() -> Iterator[Any]:
            for batch in self.work.batches(self.work.folder / "times/text.parquet"):
                texts = batch.column("time").to_pylist()
                seconds = reader.seconds(without_missing(texts, self.missing))
                whole = [None if second != second else int(second) for second in seconds.tolist()]
                yield arrow.table([texts, whole], schema=schema)

        path = self.work.folder / "seconds.parquet"
        is_made = path.exists()
        self.work.make(path.name, lambda path: self.work.write(path, tables(), schema))
        for texts in self._times():
            if is_made or isinstance(texts, Integers):
                reader.seconds(texts)

    def _raise_in_order(self, where: str, time: str, what: str) -> None:
        # As in memory, texts are in the order of the file, whichever row of them is kept.
        order = self.work.copy(
            "times/in_order.parquet",
            f"SELECT {time} AS time FROM {self.staged} WHERE {time} IN (SELECT {time} {where}) "
            "GROUP BY 1 ORDER BY min(row)",
        )

        def chunks() -> Iterator[Sequence[str]]:
            for batch in self.work.batches(order):
                yield without_missing(batch.column("time").to_pylist(), self.missing)

        reader = time_reader(chunks(), self.columns.time_format, what)
        for texts in chunks():
            reader.seconds(texts)
        reader.checked_form()

    # --- rows

    def _from_staged(self, names: Sequence[str]) -> str:
        """Return FROM: the staged texts, and as ``v<n>`` what those of some columns mean."""
        joins = [f"FROM {self.staged}"]
        for name in dict.fromkeys(names):
            index = self.index_by_name[name]
            joins.append(f"JOIN {self._values(name)} AS v{index} ON c{index} = v{index}.text")
        return " ".join(joins)

    def _verdict(self, steps: Sequence[_Step]) -> str:
        """Return the number of the first step that drops a row, NULL for a kept row, as SQL."""
        cases = []
        for step in steps:
            index = self.index_by_name[step.column]
            bad = f"v{index}.bad{step.number}"
            if step.reason == BAD_TIME:
                bad = f"({self.seconds}) IS NULL"
            elif step.reason == BAD_LABEL:
                bad = " AND ".join(
                    f"v{self.index_by_name[rule.column]}.{label} IS NULL"
                    for label, rule in self.rules
                )
            cases.append(f"WHEN {bad} THEN {step.number}")
        return f"CASE {' '.join(cases)} END" if cases else "NULL"

    def _all_rows(self, names: Sequence[str]) -> str:
        seconds = table(self.work.folder / "seconds.parquet")
        on = f"{self.text_of_time} = seconds.text"
        return f"{self._from_staged(names)} LEFT JOIN {seconds} AS seconds ON {on}"

    def _check_labels(self, task: int, steps: Sequence[_Step]) -> None:
        column, rule = self.rules[task]
        name = rule.column
        index = self.index_by_name[name]
        others = [step.column for step in steps if step.reason != BAD_TIME]
        kept = f"{self._all_rows([name, *others])} WHERE {self._verdict(steps)} IS NULL"

        def count() -> dict[str, Any]:
            by_text = (
                f"SELECT v{index}.code, any_value(v{index}.{column}) AS label, count(*) AS n "
                f"{kept} GROUP BY 1"
            )
            positive, negative = self.work.one(
                "SELECT coalesce(sum(n) FILTER (label = 1), 0)::BIGINT, "
                f"coalesce(sum(n) FILTER (label = 0), 0)::BIGINT FROM ({by_text})"
            )
            frequent = []
            if not positive:
                frequent = self.work.execute(
                    f"SELECT text, n FROM ({by_text}) JOIN {self._values(name)} USING (code) "
                    f"JOIN (SELECT c{index} AS text, min(row) AS first FROM {self.staged} "
                    f"GROUP BY 1) USING (text) ORDER BY n DESC, first LIMIT {VALUES_SHOWN}"
                ).fetchall()
            return {"positive": positive, "negative": negative, "frequent": frequent}

        counts = self.work.write_json(f"labels/{task}.json", count)
        texts = without_missing([text for text, _ in counts["frequent"]], self.missing)
        name_of_task, rule_text = [*self.columns.rule_by_task.items()][task]
        check_labels(
            name_of_task,
            rule_text,
            self.source,
            num_positive=counts["positive"],
            num_negative=counts["negative"],
            frequent=list(zip(texts, [n for _, n in counts["frequent"]], strict=True)),
        )

    def _write_rows(self, steps: Sequence[_Step]) -> None:
        coded = dict.fromkeys((*self.id_by_role.values(), *self.columns.attributes))
        labels = [
            f"CAST(v{self.index_by_name[rule.column]}.{column} AS TINYINT) AS {column}"
            for column, rule in self.rules
        ] or [f"CAST(1 AS TINYINT) AS {label_column(0)}"]
        selected = [
            f"CAST({self._verdict(steps)} AS TINYINT) AS verdict",
            "row",
            f"{self.seconds} AS time",
            *labels,
        ]
        for name in coded:
            index = self.index_by_name[name]
            selected.append(f"v{index}.code AS k{index}")
        for name in self.columns.floats:
            index = self.index_by_name[name]
            selected += [f"v{index}.number AS n{index}", f"v{index}.issue AS i{index}"]
        names = [*coded, *self.columns.floats]
        names += [step.column for step in steps if step.reason != BAD_TIME]
        names += [rule.column for _, rule in self.rules]
        self.work.copy("rows.parquet", f"SELECT {', '.join(selected)} {self._all_rows(names)}")

    @property
    def rows(self) -> str:
        """All rows, as a table of SQL."""
        return table(self.work.folder / "rows.parquet")

    @property
    def kept(self) -> str:
        """The kept rows, as a table of SQL."""
        return f"(FROM {self.rows} WHERE verdict IS NULL)"

    # --- the report

    def report(self, num_misfits: int, misfits: Sequence[str]) -> ReadReport:
        """Return which rows were kept, and why others were dropped."""
        num_rows, num_kept = self.work.one(
            f"SELECT count(*), count(*) FILTER (verdict IS NULL) FROM {self.rows}"
        )
        dropped = {"wrong number of fields": num_misfits} if num_misfits else {}
        examples = list(misfits)
        counts = dict(
            self.work.execute(
                f"SELECT verdict, count(*) FROM {self.rows} WHERE verdict IS NOT NULL GROUP BY 1"
            ).fetchall()
        )
        for step in self.steps:
            if count := counts.get(step.number, 0):
                dropped[step.reason] = dropped.get(step.reason, 0) + count
                examples += self._examples(f"verdict = {step.number}", step.reason, step.column)
        report = ReadReport(num_rows + num_misfits, num_kept, dropped, examples)
        check_kept(report, self.source)
        bad_floats = {}
        for name in self.columns.floats:
            index = self.index_by_name[name]
            for issue, reason in enumerate(BAD_FLOATS):
                where = f"verdict IS NULL AND i{index} = {issue}"
                [count] = self.work.one(f"SELECT count(*) FROM {self.rows} WHERE {where}")
                if count:
                    bad_floats[f"{name}: {reason}"] = count
                    examples += self._examples(where, reason, name)
            self._check_float(name)
        return ReadReport(
            rows_read=report.rows_read,
            rows_kept=num_kept,
            dropped=dropped,
            examples=examples,
            bad_floats=bad_floats,
            missing_labels=self._missing_labels(),
            notes=(*self._notes("user"), *self._notes("item")),
        )

    def _missing_labels(self) -> dict[str, int]:
        missing = {}
        for task, (label, _) in zip(self.columns.tasks, self.rules, strict=False):
            [count] = self.work.one(f"SELECT count(*) FROM {self.kept} WHERE {label} IS NULL")
            if count:
                missing[task] = count
        return missing

    def _examples(self, where: str, reason: str, name: str) -> list[str]:
        found = self.work.execute(
            f"SELECT row, position, c{self.index_by_name[name]} FROM {self.staged} WHERE row IN "
            f"(SELECT row FROM {self.rows} WHERE {where} ORDER BY row LIMIT {EXAMPLES_PER_REASON}) "
            "ORDER BY row"
        ).fetchall()
        return [
            example_of(self._part(row).where(position), reason, name, shown)
            for row, position, text in found
            for shown in without_missing([text], self.missing)
        ]

    def _part(self, row: int) -> Part:
        for part in self.parts:
            if row < part.num_rows:
                return part
            row -= part.num_rows
        raise AssertionError("a row beyond the last file")

    def _check_float(self, name: str) -> None:
        index = self.index_by_name[name]
        [num_numbers] = self.work.one(f"SELECT count(n{index}) FROM {self.kept}")
        first = ""
        if not num_numbers:
            [first] = self.work.one(f"SELECT arg_min(c{index}, row) FROM {self.staged}")
        [first] = without_missing([first], self.missing)
        check_float(name, self.source, num_numbers, first)

    def _notes(self, role: str) -> list[str]:
        name = self.id_by_role[role]
        dubious = ", ".join(map(quoted, DUBIOUS_IDS))
        [is_possible] = self.work.one(
            f"SELECT count(*) FROM {self._values(name)} WHERE id IN ({dubious})"
        )
        if not is_possible:
            return []
        found = self.work.execute(
            f"SELECT id, count(*) FROM {self.kept} JOIN {self._values(name)} AS v "
            f"ON k{self.index_by_name[name]} = v.code WHERE id IN ({dubious}) GROUP BY id "
            "ORDER BY min(row)"
        ).fetchall()
        return [dubious_note(role, id_, num_rows) for id_, num_rows in found]

    # --- codes

    def number_ids(self) -> None:
        """Make ``ids/<role>.parquet``, and ``codes/<role>.parquet`` with the code of each text."""
        for role, name in self.id_by_role.items():
            occurring = f"SELECT k{self.index_by_name[name]} FROM {self.kept}"
            ids = self.work.copy(
                f"ids/{role}.parquet",
                f"SELECT DISTINCT id FROM {self._values(name)} WHERE code IN ({occurring}) "
                f"ORDER BY {ORDER_OF_IDS}",
            )
            self.work.copy(
                f"codes/{role}.parquet",
                f"SELECT v.code AS k, i.file_row_number AS code FROM {self._values(name)} AS v "
                f"JOIN {table(ids, ', file_row_number = true')} AS i USING (id)",
            )

    def _codes(self, role: str) -> str:
        """Return JOIN: as ``<role>s.code`` the codes of the kept rows."""
        codes = table(self.work.folder / f"codes/{role}.parquet")
        index = self.index_by_name[self.id_by_role[role]]
        return f"JOIN {codes} AS {role}s ON k{index} = {role}s.k"

    def events(self) -> str:
        """Return the query of the coded events."""
        joins = " ".join(map(self._codes, self.id_by_role))
        others = "".join(
            f", CAST(coalesce({label}, {MISSING_LABEL}) AS UTINYINT) AS {label}"
            for label in map(label_column, range(len(self.columns.tasks)))
        )
        others += "".join(
            f", CAST({role}s.code AS INTEGER) AS {role}"
            for role in map(event_column, range(len(self.columns.event_ids)))
        )
        for number, name in enumerate(self.columns.request_attributes):
            codes = table(self.work.folder / f"codes/request{number}.parquet")
            others += f", CAST(r{number}.code AS INTEGER) AS {request_column(number)}"
            joins += f" JOIN {codes} AS r{number} ON k{self.index_by_name[name]} = r{number}.k"
        for number, name in enumerate(self.columns.request_floats):
            others += f", {self._float(name)} AS {request_float_column(number)}"
        for number, name in enumerate(self.columns.event_floats):
            others += f", {self._float(name)} AS {event_float_column(number)}"
        return (
            f"SELECT users.code AS user, CAST(items.code AS INTEGER) AS item, time{others} "
            f"FROM {self.kept} {joins}"
        )

    def _float(self, name: str) -> str:
        """Return the number of a kept row, else 0, as SQL; a negative zero is 0."""
        number = f"CAST(coalesce(n{self.index_by_name[name]}, 0) AS FLOAT)"
        return f"CASE WHEN {number} = 0 THEN CAST(0 AS FLOAT) ELSE {number} END"

    # --- values of items and users

    def choose_attributes(self) -> None:
        """Make ``<role>_attributes/<n>.parquet``: the value that most rows of an owner have.

        Ties go to the first in order: values are lists, which DuckDB orders as Python does tuples.
        """
        for role, names in (
            ("item", self.columns.item_attributes),
            ("user", self.columns.user_attributes),
        ):
            for number, name in enumerate(names):
                index = self.index_by_name[name]
                ranks = self.work.copy(
                    f"ranks/{index}.parquet",
                    f"SELECT DISTINCT ids FROM {self._values(name)} WHERE len(ids) > 0 "
                    "ORDER BY ids",
                )
                ranked = table(ranks, ", file_row_number = true")
                self.work.copy(
                    f"{role}_attributes/{number}.parquet",
                    f"""WITH ranked AS (
                        SELECT v.code, r.file_row_number AS rank
                        FROM {self._values(name)} AS v JOIN {ranked} AS r USING (ids)
                    ), counted AS (
                        SELECT {role}s.code AS owner, rank, count(*) AS n FROM {self.kept}
                        {self._codes(role)} JOIN ranked ON k{index} = ranked.code GROUP BY ALL
                    ), best AS (
                        SELECT owner, arg_min(rank, rank - n * {COUNT_SHIFT}) AS rank
                        FROM counted GROUP BY owner
                    )
                    SELECT owner AS code, ids AS value
                    FROM best JOIN {ranked} AS r ON rank = r.file_row_number ORDER BY code""",
                )

    def code_requests(self) -> None:
        """Make ``request_file(n)``, and ``codes/request<n>.parquet`` with the code of each text."""
        for number, name in enumerate(self.columns.request_attributes):
            occurring = f"SELECT k{self.index_by_name[name]} FROM {self.kept}"
            values = self.work.copy(
                request_file(number),
                f"SELECT DISTINCT ids AS value FROM {self._values(name)} "
                f"WHERE code IN ({occurring}) ORDER BY value",
            )
            self.work.copy(
                f"codes/request{number}.parquet",
                f"SELECT v.code AS k, r.file_row_number AS code FROM {self._values(name)} AS v "
                f"JOIN {table(values, ', file_row_number = true')} AS r ON v.ids = r.value",
            )

    def take_medians(self) -> None:
        """Make ``<role>_floats/<n>.parquet``: the median of the numbers of an owner's rows."""
        for role, names in (
            ("item", self.columns.item_floats),
            ("user", self.columns.user_floats),
        ):
            for number, name in enumerate(names):
                self._take_median(role, f"n{self.index_by_name[name]}", number)

    def _take_median(self, role: str, value: str, number: int) -> None:
        self.work.copy(
            f"{role}_floats/{number}.parquet",
            f"""WITH counted AS (
                SELECT {role}s.code AS code, {value} AS number, count(*) AS n
                FROM {self.kept} {self._codes(role)} WHERE {value} IS NOT NULL GROUP BY ALL
            ), ordered AS (
                SELECT code, number, sum(n) OVER (PARTITION BY code) AS total,
                    sum(n) OVER (PARTITION BY code ORDER BY number) AS upto
                FROM counted
            )
            SELECT code, CAST((min(number) FILTER (upto > (total - 1) // 2)
                + min(number) FILTER (upto > total // 2)) / 2 AS FLOAT) AS value
            FROM ordered GROUP BY code ORDER BY code""",
        )

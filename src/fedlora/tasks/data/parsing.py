"""Parsers of CSV and JSON text that keep every value as it is written, and name the line of an error."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

Columns = dict[str, list[Any]]  # column -> its values; None if a row has none
DELIMITERS = (",", ";", "\t", "|")  # the candidates for a CSV file
CONSTANTS = {"NaN": None, "Infinity": float("inf"), "-Infinity": -float("inf")}  # of JSON as Python writes it


def parse_csv(text: str, delimiter: str | None) -> Columns:
    """Return the columns as text, None for an empty cell. Rows must be as wide as the header."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        delimiter = delimiter or _find_delimiter(text)
        rows = _csv_rows(text, delimiter)
        _, header = next(rows, (1, []))
        table = []
        for line, cells in rows:
            if len(cells) != len(header):
                raise ValueError(
                    f"line {line} has {len(cells)} cells separated by {delimiter!r}, and the header has {len(header)}; "
                    f"put double quotes around a cell with {delimiter!r} in it, or set task.delimiter where another "
                    "character separates cells"
                )
            table.append(cells)
    finally:
        csv.field_size_limit(limit)
    if not table:
        raise ValueError("it holds no rows below its header" if header else "it holds no rows")
    columns = [(name, [row[i] or None for row in table]) for i, name in enumerate(header)]
    columns = [(name, values) for name, values in columns if name or any(v is not None for v in values)]
    twice = _find_duplicate(name for name, _ in columns)
    if twice is not None:
        raise ValueError(f"its header has the column {twice!r} twice; give every column a name of its own")
    return dict(columns)


def _find_duplicate(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _find_delimiter(text: str) -> str:
    """Return the only character that separates the header, or that gives all rows one width if there are several."""
    marks = [mark for mark in DELIMITERS if max(_row_widths(text, mark, 1), default=0) > 1]
    even = [mark for mark in marks if len(_row_widths(text, mark)) == 1] if len(marks) > 1 else marks
    if len(marks) > 1 and len(even) != 1:
        raise ValueError(f"its cells may be separated by {' and '.join(map(repr, marks))}; set task.delimiter to one")
    return even[0] if even else DELIMITERS[0]


def _row_widths(text: str, delimiter: str, most: int | None = None) -> set[int]:
    """Return the different widths of all rows, or of the first ``most``; empty if a row cannot be parsed."""
    try:
        return {len(cells) for _, cells in islice(_csv_rows(text, delimiter), most)}
    except ValueError:
        return set()


def _csv_rows(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield each row's first line and cells, without empty lines; wrong quotes and line ends are a ``ValueError``."""
    last = ""

    def read_lines() -> Iterator[str]:
        nonlocal last
        for last in io.StringIO(text, newline=""):  # noqa: UP028 - the last line is needed below
            yield last

    reader = csv.reader(read_lines(), delimiter=delimiter, strict=True)
    ends = set()
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(_explain_quotes(line, str(error))) from error
        ends |= {last[len(last.rstrip("\r\n")) :]} - {""}
        if len(ends) > 1:
            raise ValueError(
                f"line {line} has a different line ending than the lines before; put double quotes around a cell with "
                "a line break in it, and end all rows alike"
            )
        if delimiter == "\t" and any("\t" in cell and ("\n" in cell or "\r" in cell) for cell in cells):
            raise ValueError(
                f"the double quotes that open in line {line} are closed only in line {reader.line_num}, over tabs and "
                "line breaks; double a quote that belongs to a text"
            )
        if cells:
            yield line, cells


def _explain_quotes(line: int, reason: str) -> str:
    if "end of data" in reason:
        return f"the double quotes that open in line {line} are never closed"
    if "expected after" in reason:
        return (
            f"line {line} has text after the closing quotes of a cell; write a quote within a quoted cell twice, and "
            "no space before the delimiter"
        )
    return f"line {line}: {reason.rstrip('.')}"


def parse_json(text: str) -> Columns:
    """Return the columns of a list of objects, or of an object a line. A missing key and NaN are None."""
    if text.lstrip()[:1] == "[":
        escapes = "\\u" in text
        rows = [_check_row(row, f"row {n}", escapes) for n, row in enumerate(_load_json(text, "the list"), 1)]
    else:
        lines = ((f"line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
        rows = [_check_row(_load_json(line, where), where, "\\u" in line) for where, line in lines]
    if not rows:
        raise ValueError("it holds no rows")
    names = list(dict.fromkeys(name for row in rows for name in row))
    if not names:
        raise ValueError("its rows have no columns")
    return {name: [row.get(name) for row in rows] for name in names}


def _load_json(text: str, where: str) -> Any:
    try:
        return json.loads(text, parse_constant=CONSTANTS.get, object_pairs_hook=_parse_object)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if where != "the list" else f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{where} is no JSON ({error.msg} at {place}); write one object a line") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON that can be read ({str(error).rstrip('.')})") from error


def _parse_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"an object has the key {_find_duplicate(name for name, _ in pairs)!r} twice")
    return row


def _check_row(row: Any, where: str, escapes: bool) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {json.dumps(row)[:40]}; each row is an object with a key for every column")
    if escapes:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where} has half of a surrogate pair (\\ud800 to \\udfff), which is no text") from error
    return row

"""The text of a CSV or JSON file as columns, every value as it is written, or one sentence with its line."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

Columns = dict[str, list[Any]]  # column -> its values; None where a row has none
DELIMITERS = (",", ";", "\t", "|")  # what a CSV file is tried for


def parse_csv(text: str, delimiter: str | None) -> Columns:
    """Columns of text, None for an empty cell; rows are as wide as the header or an error."""
    with _long_cells():
        delimiter = delimiter or _find_delimiter(text)
        rows = _csv_rows(text, delimiter)
        _, header = next(rows, (1, []))
        table = []
        for line, cells in rows:
            if len(cells) != len(header):
                raise ValueError(_width(line, len(cells), len(header), delimiter))
            table.append(cells)
    if not table:
        raise ValueError("it holds no rows below its header" if header else "it holds no rows")
    columns = [(name, [row[i] or None for row in table]) for i, name in enumerate(header)]
    columns = [(name, values) for name, values in columns if name or any(v is not None for v in values)]
    doubled = [name for name, count in Counter(name for name, _ in columns).items() if count > 1]
    if doubled:
        raise ValueError(f"its header has the column {doubled[0]!r} twice; give every column a name of its own")
    return dict(columns)


def _width(line: int, cells: int, wanted: int, delimiter: str) -> str:
    return (
        f"line {line} has {cells} cells separated by {delimiter!r}, and the header has {wanted}; put double "
        f"quotes around a cell with {delimiter!r} in it, or set task.delimiter where another character separates cells"
    )


def _find_delimiter(text: str) -> str:
    """The one character that parts the header, or of several the one that parts all rows alike."""
    widths = {mark: _header_width(text, mark) for mark in DELIMITERS}
    parting = [mark for mark, width in widths.items() if width > 1]
    if len(parting) > 1:
        parting = [mark for mark in parting if _is_even(text, mark)]
        if len(parting) != 1:
            marks = " and ".join(repr(mark) for mark, width in widths.items() if width > 1)
            raise ValueError(f"its cells may be separated by {marks}; set task.delimiter to one of them")
    return parting[0] if parting else DELIMITERS[0]


def _header_width(text: str, delimiter: str) -> int:
    try:
        return len(next(_csv_rows(text, delimiter), (1, []))[1])
    except ValueError:
        return 0


def _is_even(text: str, delimiter: str) -> bool:
    try:
        return len({len(cells) for _, cells in _csv_rows(text, delimiter)}) == 1
    except ValueError:
        return False


def _csv_rows(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Each row's first line and cells, without empty lines. ``ValueError`` where quotes or line ends do not fit."""
    lines = _Lines(text)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    ends = set()
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(_quotes(line, str(error))) from error
        ends |= {lines.last[len(lines.last.rstrip("\r\n")) :]} - {""}
        if len(ends) > 1:
            raise ValueError(
                f"line {line} has a different line ending than the lines before; put double quotes around a cell with "
                "a line break in it, and end all rows alike"
            )
        if delimiter == "\t" and any("\t" in cell and ("\n" in cell or "\r" in cell) for cell in cells):
            raise ValueError(f"the double quotes that open in line {line} are closed {_after(reader, line)}")
        if cells:
            yield line, cells


def _after(reader: Any, line: int) -> str:
    return f"only in line {reader.line_num}, over tabs and line breaks; double a quote that belongs to a text"


def _quotes(line: int, reason: str) -> str:
    if "end of data" in reason:
        return f"the double quotes that open in line {line} are never closed"
    if "expected after" in reason:
        return (
            f"line {line} has text after the closing quotes of a cell; write a quote within a quoted cell twice, and "
            "no space before the delimiter"
        )
    return f"line {line}: {reason.rstrip('.')}"


class _Lines:
    """The lines of a text with their ends, and the last of them that was read."""

    def __init__(self, text: str):
        self.lines, self.last = io.StringIO(text, newline=""), ""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.last = next(self.lines)
        return self.last


@contextmanager
def _long_cells() -> Iterator[None]:
    """Lifts the limit of the ``csv`` module on a cell's length."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def parse_json(text: str) -> Columns:
    """Columns of values: of one list of objects, or of an object a line. A key that a row lacks is None, as is NaN."""
    rows = _json_list(text) if text.lstrip()[:1] == "[" else _json_lines(text)
    if not rows:
        raise ValueError("it holds no rows")
    names = list(dict.fromkeys(name for row in rows for name in row))
    if not names:
        raise ValueError("its rows have no columns")
    return {name: [row.get(name) for row in rows] for name in names}


def _json_lines(text: str) -> list[Mapping[str, Any]]:
    lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    return [_json_row(_json(line, f"line {number}"), f"line {number}", "\\u" in line) for number, line in lines]


def _json_list(text: str) -> list[Mapping[str, Any]]:
    escapes = "\\u" in text
    return [_json_row(row, f"row {number}", escapes) for number, row in enumerate(_json(text, "the list"), 1)]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text, parse_constant=_constant, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if where != "the list" else f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{where} is no JSON ({error.msg} at {place}); write one object a line") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON that can be read ({str(error).rstrip('.')})") from error


def _constant(name: str) -> float | None:
    return None if name == "NaN" else float(name)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        doubled = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"an object has the key {doubled!r} twice")
    return found


def _json_row(row: Any, where: str, escapes: bool) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {json.dumps(row)[:40]}; each row is an object with a key for every column")
    if escapes:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where} has half of a surrogate pair (\\ud800 to \\udfff), which is no text") from error
    return row

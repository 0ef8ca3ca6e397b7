"""Tables from CSV and JSON files, with their encodings."""

import codecs
import gzip
import json
import re
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from fedlora.tasks.data.parsing import Columns, parse_csv, parse_json

INTEGER = re.compile(r"0|-?[1-9][0-9]*")  # in Python's notation
LARGEST = 2**63 - 1
ARROW = {str: "large_string", bool: "bool", float: "float64", int: "int64"}
MARKS = (  # byte order marks, the longest first
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip


@dataclass(frozen=True)
class TextFormat:
    """The settings ``task.encoding`` and ``task.delimiter`` of text files; None: detected from the file."""

    encoding: str | None = None
    delimiter: str | None = None

    def __post_init__(self) -> None:
        if self.encoding is not None:
            try:
                b"".decode(self.encoding)
                "".encode(self.encoding)
            except (LookupError, ValueError) as error:
                raise ValueError(
                    f"task.encoding is {self.encoding!r}, which is no encoding of text; take a name that Python knows, "
                    "such as 'utf-8', 'utf-16', 'latin-1' or 'cp1252'."
                ) from error
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n\0'):
            raise ValueError(
                f"task.delimiter is {self.delimiter!r}; it is one character that is neither a quote nor a line break, "
                "such as ',' or ';'."
            )


def read_text_files(files: Sequence[Path], kind: str, tabs: bool, form: TextFormat) -> Any:
    """Return the rows of one or several ``csv`` or ``json`` files as a ``datasets.Dataset``, in the files' order.

    ``tabs``: the default delimiter is a tab. Raises ``ValueError`` with the file and the line of an error.
    """
    columns: Columns = {}
    rows = 0
    for file in files:
        try:
            text = _decode(_read_bytes(file), form)
            more = parse_csv(text, form.delimiter or ("\t" if tabs else None)) if kind == "csv" else parse_json(text)
            if any("\0" in name for name in more):
                raise ValueError("the name of one of its columns has a null character in it; give it another")
            if kind == "csv" and columns and list(more) != list(columns):
                raise ValueError(f"its columns are {', '.join(more)}, and {files[0].name} has {', '.join(columns)}")
        except ValueError as error:
            raise ValueError(f"{str(file)!r} could not be read as {kind}: {error}.") from error
        count = len(next(iter(more.values())))
        for name in dict.fromkeys([*columns, *more]):
            columns.setdefault(name, [None] * rows).extend(more.get(name, [None] * count))
        rows += count
    return _to_dataset({name: _to_integers(x) for name, x in columns.items()} if kind == "csv" else columns)


def _read_bytes(file: Path) -> bytes:
    data = file.read_bytes()
    if not file.name.lower().endswith(".gz"):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"it is no whole gzip file ({str(error).rstrip('.')})") from error


def _decode(data: bytes, form: TextFormat) -> str:
    marked = next((name for mark, name in MARKS if data.startswith(mark)), None)
    encoding = form.encoding or marked or "utf-8"
    if marked and codecs.lookup(encoding).name[:5] != marked[:5]:
        raise ValueError(
            f"it begins with the byte order mark of {marked[:6].rstrip('-').upper()}, but task.encoding is "
            f"{encoding!r}; leave the setting out"
        )
    try:
        text = data.decode(encoding)
    except UnicodeError as error:
        start = getattr(error, "start", 0)
        line = data[:start].decode(encoding, "replace").count("\n") + 1
        other = "another encoding" if form.encoding else "the encoding it is written in"
        raise ValueError(
            f"line {line} is not {encoding} (byte 0x{data[start : start + 1].hex()}); set task.encoding to {other}, "
            "such as 'cp1252' or 'latin-1'"
        ) from error
    _check_not_utf8(data, encoding)
    text = text.removeprefix("\ufeff") if form.encoding else text
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(f"line {line} has a null character; if the file is UTF-16, set task.encoding to 'utf-16'")
    return text


def _check_not_utf8(data: bytes, encoding: str) -> None:
    """Raise ``ValueError`` for UTF-8 under the name of another encoding, most of which decode any bytes to something.

    Text of several words in another encoding is hardly ever valid UTF-8 as well.
    """
    name = codecs.lookup(encoding).name
    if name.startswith("utf") or data.isascii():
        return
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return
    place = next(i for i, character in enumerate(text) if not character.isascii())
    wrong = text[place].encode("utf-8").decode(encoding, "replace")
    raise ValueError(
        f"task.encoding is {encoding!r}, but all of it is valid UTF-8: line {text[:place].count(chr(10)) + 1} has "
        f"{text[place]!r}, which would be read as {wrong!r}; set task.encoding to 'utf-8', or save the file in UTF-8 "
        f"if it is {encoding} and {wrong!r} is right"
    )


def _to_integers(values: list[Any]) -> list[Any]:
    """Return integers if all cells are written as integers, else the cells unchanged."""
    cells = [value for value in values if value is not None]
    if not cells or not all(INTEGER.fullmatch(cell) and len(cell) <= 20 for cell in cells):
        return values
    numbers = [None if value is None else int(value) for value in values]
    return numbers if _fits([number for number in numbers if number is not None]) else values


def _fits(numbers: Sequence[int]) -> bool:
    return min(numbers) >= -LARGEST and max(numbers) <= LARGEST


def _to_dataset(columns: Columns) -> Any:
    import datasets
    import pyarrow

    arrays = {name: _to_arrow(values) for name, values in columns.items()}
    features = datasets.Features({name: feature for name, (_, feature) in arrays.items()})
    table = pyarrow.table({name: array for name, (array, _) in arrays.items()})
    return datasets.Dataset(datasets.table.InMemoryTable(table), info=datasets.DatasetInfo(features=features))


def _to_arrow(values: list[Any]) -> tuple[Any, Any]:
    """Return a column in Arrow and its feature. Mixed and nested values are stored as JSON."""
    import datasets
    import pyarrow

    present = [value for value in values if value is not None]
    kinds = {type(value) for value in present} or {str}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind not in ARROW or (kind is int and not _fits(present)):
        texts = [None if value is None else json.dumps(value) for value in values]
        return pyarrow.array(texts, pyarrow.large_string()), _json_feature()()
    feature = datasets.Value(ARROW[kind])
    return pyarrow.array(values, feature.pa_type), feature


@cache
def _json_feature() -> type:
    """Return a feature of ``datasets`` that stores values as JSON and returns them unchanged."""
    import pyarrow
    from datasets.features.features import register_feature

    @dataclass
    class ExactJson:
        dtype: ClassVar[str] = "dict"
        pa_type: ClassVar[Any] = pyarrow.large_string()
        id: Any = field(default=None, repr=False)
        _type: str = field(default="ExactJson", init=False, repr=False)

        def __call__(self) -> Any:
            return self.pa_type

        def encode_example(self, value: Any) -> str | None:
            return None if value is None else json.dumps(value)

        def decode_example(self, value: str | None, token_per_repo_id: Any = None) -> Any:
            return None if value is None else json.loads(value)

        def cast_storage(self, storage: Any) -> Any:
            return storage.cast(self.pa_type)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it is experimental
        register_feature(ExactJson, "ExactJson")
    return ExactJson

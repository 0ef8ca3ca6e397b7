"""CSV and JSON files: every value is the one that was written, or the file is refused by its line."""

import csv
import gzip
import io
import json
import math

import datasets
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.data import rows as source
from fedlora.tasks.data.tables import TextFormat, read_text_files
from fedlora.tasks.text_classification import TextClassification

AS_IT_SHOWS = TextFormat()
MANY = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def load(file, **form):
    """A file's rows as ``splits`` would have them."""
    name = file.name.removesuffix(".gz")
    return read_text_files(
        [file], "csv" if name[-3:] in ("csv", "tsv") else "json", name.endswith("tsv"), TextFormat(**form)
    )


def put(folder, content, name="train.csv"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def columns(split):
    return {name: list(split[name]) for name in split.column_names}


# What is written by Python is read back


AWKWARD = st.sampled_from(
    ["NA", "None", "null", "n/a", "NaN", "", " ", "a,b", "a;b", 'say "x"', "two\nlines", "two\r\nlines", "a\rb", "01", "1",
     "-0", "1.0", "1e3", "\ufeff", "\u2028", "\x85", "😀", "é", "\0", "\t", "2020-01-01", "true", "'", "\\", "\x1a", "٣",
     "9223372036854775808"]
)  # fmt: skip
TEXT = st.one_of(AWKWARD, st.lists(AWKWARD, max_size=3).map("".join), st.text(max_size=8))
PLAIN = st.one_of(TEXT, st.none(), st.integers(), st.integers(0, 5), st.booleans(), st.floats(allow_nan=False))
VALUE = st.one_of(PLAIN, st.lists(PLAIN, max_size=3), st.dictionaries(TEXT, PLAIN, max_size=3))


def attempt(file):
    """A file's columns, or None where it is refused in one sentence."""
    try:
        return columns(load(file))
    except ValueError as error:
        return None if "\n" not in str(error) else pytest.fail(f"several lines: {error}")


def as_csv_text(value):
    """A value as the csv module writes it; None for an empty cell, which is a missing value."""
    return None if value is None or value == "" else str(value)


@MANY
@given(
    rows=st.lists(st.tuples(TEXT, PLAIN, TEXT), min_size=1, max_size=6),
    delimiter=st.sampled_from(",;\t|"),
    end=st.sampled_from(["\n", "\r\n"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    width=st.integers(1, 3),
)
def test_csv_is_read_back_or_refused(tmp_path, rows, delimiter, end, encoding, quoting, width):
    file = io.StringIO(newline="")
    lines = csv.writer(file, delimiter=delimiter, lineterminator=end, quoting=quoting)
    names = ["text", "label", "more"][:width]
    lines.writerows([names, *(row[:width] for row in rows)])
    found = attempt(put(tmp_path, file.getvalue().encode(encoding)))
    if found is None:  # a line break that was not quoted, quotes over tabs, one column that may be several
        assert delimiter == "\t" or width == 1 or any(mark in file.getvalue() for mark in "\0\r")
        return
    written = [[as_csv_text(value) for value in column] for column in list(zip(*rows))[:width]]
    assert [[None if v is None else str(v) for v in found[name]] for name in names] == written


@MANY
@given(rows=st.lists(st.dictionaries(TEXT, VALUE, min_size=1, max_size=4), min_size=1, max_size=6), ascii=st.booleans(), form=st.sampled_from(["lines", "list"]), encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))  # fmt: skip
def test_json_is_read_back_or_refused(tmp_path, rows, ascii, form, encoding):
    lines = [json.dumps(row, ensure_ascii=ascii) for row in rows]
    text = "\n".join(lines) if form == "lines" else json.dumps(rows, ensure_ascii=ascii, indent=1)
    found = attempt(put(tmp_path, text.encode(encoding), "train.jsonl"))
    names = list(dict.fromkeys(name for row in rows for name in row))
    if found is None:
        assert any("\0" in name for name in names)
        return
    values = [[row.get(name) for name in names] for row in rows]
    assert repr([list(row) for row in zip(*found.values())]) == repr(values), "the types are the same, too"


def test_the_properties_refuse_little(tmp_path):
    """Else they would hold of a reader that refuses everything."""
    rows = [('a,b\n"c" 😀', 1), ("NA", 0), ("\ufeffx\r\ny", 2)]
    for delimiter in ",;\t|":
        file = io.StringIO(newline="")
        csv.writer(file, delimiter=delimiter).writerows([("text", "label"), *rows])
        assert columns(load(put(tmp_path, file.getvalue()))) == {"text": [t for t, _ in rows], "label": [1, 0, 2]}
    values = [1, 2.5, "x", None, True, 2**70, ["a", 1], {"b": None}, math.inf]
    file = put(tmp_path, "".join(json.dumps({"v": v}) + "\n" for v in values), "t.jsonl")
    assert repr(list(load(file)["v"])) == repr(values)


# No row is shifted


SHIFTED = {
    "a comma in every row": ("text,label\nso good, yes,1\nso bad, no,0\n", r"line 2 has 3 cells .* the header has 2"),
    "a comma at each line's end": ("text,label\ngood,1,\nbad,0,\n", r"line 2 has 3 cells .* the header has 2"),
    "one row too long": ("text,label\ngood,1\n\nbad, no,0\n", r"line 4 has 3 cells .*quotes around a cell"),
    "one row too short": ("text,label\ngood,1\nbad\n", r"line 3 has 1 cells"),
    "after a cell of several lines": ('text,label\n"a\nb\nc",1\nbad, no,0\n', r"line 5 has 3 cells"),
    "an open quote": ('text,label\n"good,1\nbad,0\n', r"quotes that open in line 2 are never closed"),
    "quotes escaped by backslashes": ('text,label\n"say \\"x\\"",1\n', r"line 2 has text after the closing quotes"),
    "a column twice": ("text,label,text\na,1,b\n", r"has the column 'text' twice"),
    "no rows": ("text,label\n", r"no rows below its header"),
    "a line break at a cell's end that Python does not quote": ("text\na\r\nb\n", r"line 2 has a different line ending"),
    "line ends of two kinds": ("text\na\rb\nc\n", r"line 2 has a different line ending"),
}  # fmt: skip


@pytest.mark.parametrize("content,sentence", SHIFTED.values(), ids=SHIFTED)
def test_no_row_is_shifted(tmp_path, content, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        load(put(tmp_path, content))
    assert str(tmp_path / "train.csv") in str(caught.value)


def test_quotes_that_are_text_in_tabs_swallow_no_rows(tmp_path):
    """GLUE's own files have no quoting: a quote that opens a text would run on to the next."""
    file = put(tmp_path, 'text\tlabel\n"good\t1\nbad"\t0\n', "train.tsv")
    with pytest.raises(ValueError, match=r"quotes that open in line 2 are closed only in line 3, over tabs"):
        load(file)


def test_unnamed_columns(tmp_path):
    """An index that pandas wrote is a column that nobody uses; empty cells at all lines' ends are none."""
    assert columns(load(put(tmp_path, ",text\n0,a\n1,b\n")))["text"] == ["a", "b"]
    assert load(put(tmp_path, "text,label,,\na,1,,\nb,0,,\n")).column_names == ["text", "label"]


# Only an empty cell is missing


WORDS = ["None", "NA", "N/A", "n/a", "null", "NULL", "nan", "NaN", "#N/A", "-", " "]


def test_words_are_no_gaps(tmp_path):
    rows = "".join(f"{word},row {i}\n" for i, word in enumerate(WORDS))
    found = load(put(tmp_path, f"label,text\n{rows},\n"))
    assert list(found["label"]) == [*WORDS, None]
    lines = "".join(json.dumps({"label": word}) + "\n" for word in [*WORDS, "", None])
    assert list(load(put(tmp_path, lines, "t.jsonl"))["label"]) == [*WORDS, "", None]


def test_nan_is_missing(tmp_path):
    lines = '{"label": 1.0, "x": 1}\n{"label": NaN, "x": 2}\n{"x": NaN}\n'
    found = load(put(tmp_path, lines, "t.jsonl"))
    assert columns(found) == {"label": [1.0, None, None], "x": [1, 2, None]}
    datasets.Dataset.from_dict({"label": [0.0, math.nan]}).to_parquet(str(tmp_path / "t.parquet"))
    for split in (found, datasets.Dataset.from_parquet(str(tmp_path / "t.parquet"), keep_in_memory=True)):
        with pytest.raises(ValueError, match=r"column 'label' \(task.label\) has [12] missing values"):
            source.read_column(split, "label", "task.label")


# Types


def test_numbers_are_numbers_where_all_of_the_column_is(tmp_path):
    found = columns(load(put(tmp_path, "a,b,c,d,e,f\n1,01,1,1.50,,9223372036854775808\n-2,2,x,2,3,1\n")))
    assert found == {"a": [1, -2], "b": ["01", "2"], "c": ["1", "x"], "d": ["1.50", "2"], "e": [None, 3],
                     "f": ["9223372036854775808", "1"]}  # fmt: skip


def test_regression_takes_numbers_from_text(tmp_path):
    split = load(put(tmp_path, "label\n1.50\n-2\n.5\n3e2\n"))
    assert source.read_numbers(split, "label", "training").tolist() == [1.5, -2, 0.5, 300]
    for odd in ("1,5", "nan", "inf", "1_000", "1e40", "x", "٣"):
        split = load(put(tmp_path, f'label\n1.5\n"{odd}"\n'))
        with pytest.raises(ValueError, match="holds .* in the training rows; a regression needs a number"):
            source.read_numbers(split, "label", "training")


LATE = {
    "a word after many numbers": [1] * 10_000 + ["A12"],
    "a number after nothing": [None] * 10_000 + [7],
    "a list among texts": ["a", ["a", "b"]],
    "an object with other keys": [{"a": 1}, {"b": "x"}],
    "a number after a truth": [True, 2],
    "half a number after whole ones": [1, 2.5],
    "dates": ["2020-01-01", "2020-01-01 12:00:00"],
    "beyond 64 bits": [1, 2**70],
}


@pytest.mark.parametrize("values", LATE.values(), ids=LATE)
def test_types_that_change_late(tmp_path, values):
    """In a column that is not used, and the values themselves where it is."""
    rows = [{"text": f"row {i}", "label": i % 2, "other": value} for i, value in enumerate(values)]
    (train, test) = source.load_splits(str(put(tmp_path, "".join(json.dumps(r) + "\n" for r in rows), "train.jsonl")), None, "train", ["test"], 0)  # fmt: skip
    assert len(train) + len(test) == len(rows) and set(train["label"]) <= {0, 1}
    found = load(tmp_path / "train.jsonl")
    assert repr(list(found["other"])) == repr(values)
    assert repr(found.select([len(rows) - 1])[0]["other"]) == repr(values[-1])


def test_words_late_in_csv(tmp_path):
    numbers = [str(i) for i in range(10_000)]
    file = put(tmp_path, "id,text\n" + "".join(f"{i},row\n" for i in [*numbers, "A12"]))
    assert list(load(file)["id"]) == [*numbers, "A12"]


# Encodings and delimiters


def test_encodings(tmp_path):
    text = "text,label\nGrüße aus Köln,1\n„schön“ – €,0\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert list(load(put(tmp_path, text.encode(encoding)))["text"]) == ["Grüße aus Köln", "„schön“ – €"]
    file = put(tmp_path, text.encode("cp1252"))
    with pytest.raises(ValueError, match=r"line 2 is not utf-8 \(byte 0xfc\); set task.encoding to the encoding"):
        load(file)
    assert list(load(file, encoding="cp1252")["text"]) == ["Grüße aus Köln", "„schön“ – €"]
    with pytest.raises(ValueError, match="line 2 is not ascii .*task.encoding to another encoding"):
        load(file, encoding="ascii")
    with pytest.raises(ValueError, match="null character; if the file is UTF-16, set task.encoding"):
        load(put(tmp_path, "text,label\na,1\n".encode("utf-16-le")))
    assert columns(load(tmp_path / "train.csv", encoding="utf-16-le")) == {"text": ["a"], "label": [1]}
    with pytest.raises(ValueError, match="begins with the byte order mark of UTF-8, but task.encoding is 'latin-1'"):
        load(put(tmp_path, text.encode("utf-8-sig")), encoding="latin-1")
    with pytest.raises(ValueError, match=r"line 1 is not utf-8 \(byte 0xe9\); set task.encoding"):
        load(put(tmp_path, b'{"text": "caf\xe9"}\n', "t.jsonl"))


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "mac-roman", "gb18030"])
def test_utf8_under_another_name_is_refused(tmp_path, encoding):
    text = "text,label\nwell,0\ncafé in Köln,1\n"
    file = put(tmp_path, text.encode())
    wrong = "é".encode().decode(encoding)
    assert wrong != "é" and text.encode().decode(encoding), "it is read without an error"
    with pytest.raises(ValueError, match="valid UTF-8: line 3 has 'é'") as found:
        load(file, encoding=encoding)
    assert f"which would be read as {wrong!r}; set task.encoding to 'utf-8', or save the file in UTF-8" in str(
        found.value
    )
    assert str(file) in str(found.value) and repr(encoding) in str(found.value)
    assert list(load(file, encoding="utf-8")["text"]) == ["well", "café in Köln"]
    # a file that is what it is declared, and one without such characters
    assert list(load(put(tmp_path, text.encode(encoding)), encoding=encoding)["text"]) == ["well", "café in Köln"]
    assert list(load(put(tmp_path, "text,label\nwell,0\n"), encoding=encoding)["text"]) == ["well"]
    # "Ã©" in earnest: the way that the error names
    assert list(load(put(tmp_path, f"text,label\n{wrong},0\n"))["text"]) == [wrong]


@pytest.mark.parametrize("name,content", {
    "a.csv": "text;label\nso gut, ja;1\nso schlecht;0\n", "b.csv": "text\tlabel\nso gut, ja\t1\nso schlecht\t0\n",
    "c.tsv": "text\tlabel\nso gut, ja\t1\nso schlecht\t0\n", "d.csv": "text|label\nso gut, ja|1\nso schlecht|0\n",
    "e.CSV": 'text,label\n"so gut, ja",1\nso schlecht,0\n',
    "f.csv": "\"text, in words\";label\nso gut, ja;1\nso schlecht;0\n",
}.items())  # fmt: skip
def test_delimiters(tmp_path, name, content):
    (train, test) = source.load_splits(str(put(tmp_path, content, name)), None, "train", ["test"], 0)
    rows = sorted([*zip(*columns(train).values()), *zip(*columns(test).values())])
    assert rows == [("so gut, ja", 1), ("so schlecht", 0)]


def test_delimiters_that_are_not_clear(tmp_path):
    both = put(tmp_path, "a,b;c\n1,2;3\n")
    with pytest.raises(ValueError, match="may be separated by ',' and ';'; set task.delimiter"):
        load(both)
    assert columns(load(both, delimiter=";")) == {"a,b": ["1,2"], "c": [3]}
    assert columns(load(both, delimiter=",")) == {"a": [1], "b;c": ["2;3"]}
    split = load(put(tmp_path, "text:label\na:1\n"))
    with pytest.raises(ValueError, match="its columns are text:label; .*set task.delimiter|task.delimiter"):
        source.check_column(split, "text", "task.text")
    assert columns(load(tmp_path / "train.csv", delimiter=":")) == {"text": ["a"], "label": [1]}


@pytest.mark.parametrize("settings,sentence", [
    ({"encoding": "latin-99"}, "task.encoding is 'latin-99', which is no encoding of text"),
    ({"encoding": "base64"}, "task.encoding is 'base64', which is no encoding of text"),
    ({"delimiter": ", "}, "task.delimiter is ', '; it is one character"), ({"delimiter": '"'}, "task.delimiter is"),
    ({"delimiter": ""}, "task.delimiter is ''"),
])  # fmt: skip
def test_settings_are_checked_at_once(settings, sentence):
    for task in (TextClassification, CausalLM):
        with pytest.raises(ValueError, match=sentence):
            task("rows.csv", **settings)


BROKEN = {
    "not JSON": ('{"a": 1}\n{"a"', "line 2 is no JSON"),
    "a list a line": ("[1]\n[2]\n", "the list is no JSON"),
    "a number": ('{"a": 1}\n7\n', "line 2 is 7; each row is an object"),
    "a key twice": ('{"a": 1, "a": 2}\n', "has the key 'a' twice"),
    "half a character": ('{"a": "\\ud800"}\n', "line 1 has half of a surrogate pair"),
    "a list of texts": ('["a", "b"]', 'row 1 is "a"'),
    "a null in a name": ('{"\\u0000": 1}', "name of one of its columns has a null character"),
    "only spaces": ("  \n \n", "holds no rows"),
}


@pytest.mark.parametrize("content,sentence", BROKEN.values(), ids=BROKEN)
def test_json_that_is_not_understood(tmp_path, content, sentence):
    with pytest.raises(ValueError, match=sentence):
        load(put(tmp_path, content, "train.jsonl"))


def test_long_cells_and_gzip(tmp_path):
    text = "x" * 300_000
    file = put(tmp_path, gzip.compress(f"text,label\n{text},1\n".encode()), "train.csv.gz")
    assert list(load(file)["text"]) == [text]
    assert csv.field_size_limit() < 300_000, "the module's limit is as it was"
    with pytest.raises(ValueError, match="no whole gzip file"):
        load(put(tmp_path, file.read_bytes()[:30], "train.csv.gz"))


def test_hidden_labels_of_glue_in_text(tmp_path):
    from fedlora.tasks.glue import Glue

    split = load(put(tmp_path, "sentence1,sentence2,label\na,b,-1.0\nc,d,-1.0\n"))
    with pytest.raises(ValueError, match="has the label -1, which stands for hidden"):
        Glue(subset="stsb").targets(split, split, None)


def test_exact_columns_behave_as_others(tmp_path):
    """Columns of several types are kept as JSON: they are cut, drawn and joined like all others."""
    values = [1, "a", None, [2], {"k": 1.5}] * 3
    split = load(put(tmp_path, "".join(json.dumps({"v": v, "n": i}) + "\n" for i, v in enumerate(values)), "t.jsonl"))
    cut = split.train_test_split(0.4, seed=1)
    both, sets = source.concatenate([cut["train"], cut["test"]])
    assert [values[i] for i in both["n"]] == list(both["v"]) and torch.bincount(sets).tolist() == [9, 6]

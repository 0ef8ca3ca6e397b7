"""Where rows lie: a file, a folder, a data repository of the hub, or the digits that come with scikit-learn."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from fedlora.tasks.data.folders import READERS, Files, ending, inner_files, is_picture, is_table, ordered, own_splits
from fedlora.tasks.data.tables import TextFormat, read

DIGITS = "digits"
ONLY = "all"  # the split of data that comes without any
# What a repository may say of its CSV and JSON files.
REPOSITORY = {"name", "version", "data_dir", "data_files", "description", "features", "sep", "delimiter", "encoding"}


def load(data: str, config: str | None, form: TextFormat) -> Mapping[str, Any]:
    """All splits by name, a single file's as ``ONLY``. ``ValueError`` says what cannot be read, and why."""
    import datasets
    from huggingface_hub.utils import logging as hub

    datasets.disable_progress_bars()
    hub.set_verbosity_error()  # its retries would be said six times before our one sentence
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # and a broken file's errors before ours
    path = Path(data).expanduser()
    if data == DIGITS:
        return _digits()
    try:
        if path.is_file():
            return {ONLY: _read([path], form)}
        if path.is_dir():
            return _folder(path, config, form)
        if data.startswith((".", "/", "~")) or ending(data):
            raise ValueError(f"there is no data at {data!r}; name a file, a folder, a hub id, or 'digits'.")
        return _repository(data, config, form, ["csv"])
    except (OSError, datasets.exceptions.DatasetNotFoundError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(
            f"the data {data!r} could not be read: {_reason(error)}; name a file, a folder or a hub id."
        ) from error


def _folder(path: Path, config: str | None, form: TextFormat) -> Mapping[str, Any]:
    import datasets

    if (path / "dataset_dict.json").exists():
        return dict(datasets.load_from_disk(str(path)))
    if (path / "dataset_info.json").exists() and (path / "state.json").exists():
        return {ONLY: datasets.load_from_disk(str(path))}
    inner = inner_files(path)
    files = own_splits(path, inner)
    if files:
        return Files(files, lambda some: _read(ordered(some, path), form))
    kinds = {READERS[ending(file) or ""] for file in inner if is_table(file)}
    if "parquet" in kinds:  # a copy of a hub's data repository
        return dict(datasets.load_dataset(str(path), config))
    if any(map(is_picture, inner)):
        return dict(datasets.load_dataset("imagefolder", data_dir=str(path)))
    if kinds:
        return _repository(str(path), config, form, ["csv", "json"])
    raise ValueError(f"the folder {str(path)!r} holds no data; it needs train and test files ({', '.join(READERS)}).")


def _repository(data: str, config: str | None, form: TextFormat, kinds: Sequence[str]) -> Mapping[str, Any]:
    """A hub's data repository or a copy of one; its files of these kinds are read here, others by ``datasets``.

    ``ValueError`` where the repository says of its files what is not understood.
    """
    import datasets

    builder = datasets.load_dataset_builder(data, config)
    if builder.name not in kinds:
        return dict(datasets.load_dataset(data, config))
    own, usual = builder.config, type(builder.config)()
    odd = [f.name for f in fields(own) if f.name not in REPOSITORY and getattr(own, f.name) != getattr(usual, f.name)]
    if odd:
        raise ValueError(
            f"the README of {data!r} sets {odd[0]!r} for its {builder.name} files, which is not understood; write the "
            "rows to files that need no settings, and name their folder as task.data."
        )
    separator = getattr(own, "sep", None)
    form = TextFormat(
        form.encoding or (None if own.encoding == usual.encoding else own.encoding),
        form.delimiter or (None if separator == getattr(usual, "sep", None) else separator),
    )
    found = {str(split): list(map(str, files)) for split, files in own.data_files.items()}
    return Files(found, lambda files: _named(_read(_downloaded(files), form), builder.info.features))


def _downloaded(files: Sequence[str]) -> list[Path]:
    """The files on this machine; those that lie here are left where they are."""
    import datasets

    return [Path(file) for file in datasets.DownloadManager().download(list(files))]


def _named(split: Any, declared: Mapping[str, Any] | None) -> Any:
    """The rows with the label names that their repository declares."""
    import datasets

    for name, feature in (declared or {}).items():
        if isinstance(feature, datasets.ClassLabel) and name in split.column_names:
            order, numbers = split.column_names, [_class(value, feature.names, name) for value in split[name]]
            split = split.remove_columns(name).add_column(name, numbers, feature=feature).select_columns(order)
    return split


def _class(value: Any, names: Sequence[str], column: str) -> int | None:
    """The number of a label that is written as its name, or as its number where no name is one."""
    if value is None or str(value) in names:
        return None if value is None else names.index(str(value))
    number = None if any(name.strip().lstrip("-").isdigit() for name in names) else value
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(names):
        raise ValueError(
            f"column {column!r} holds {value!r}, and the README of its repository names the labels {', '.join(names)}; "
            "correct one of the two."
        )
    return number


def _read(files: list[Path], form: TextFormat) -> Any:
    import datasets

    kind = READERS.get(ending(files[0]) or "")
    if kind is None:
        raise ValueError(f"{str(files[0])!r} is of no kind that can be read; the kinds are {', '.join(READERS)}.")
    for file in files:
        if file.stat().st_size == 0:
            raise ValueError(f"the file {str(file)!r} is empty; it needs rows.")
    if kind != "parquet":
        return read(files, kind, ".tsv" in (ending(files[0]) or ""), form)
    # A cache of its own for each run: two processes may read one file, and nothing is left in the home folder.
    try:
        return datasets.load_dataset(kind, data_files=[*map(str, files)], split="train", keep_in_memory=True)
    except (OSError, ValueError, TypeError, StopIteration, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{str(files[0])!r} could not be read as {kind}: {_reason(error)}.") from error


def _reason(error: BaseException) -> str:
    """The first line of what began it: the outer errors only say that something went wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().splitlines()
    return text[0].rstrip(".") if text else "it holds no rows"


@cache
def _digits() -> Mapping[str, Any]:
    import datasets
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    pixels = (found.images * (255 / 16)).round().astype("uint8")
    halves = train_test_split(range(len(pixels)), test_size=0.25, random_state=0, stratify=found.target)
    return {
        split: datasets.Dataset.from_dict(
            {"image": [pixels[i].tobytes() for i in rows], "label": [int(found.target[i]) for i in rows]}
        )
        for split, rows in zip(("train", "test"), halves)
    }

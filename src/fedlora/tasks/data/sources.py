"""Data by its place: a file, a folder, a data repository of the hub, or scikit-learn's digits."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from fedlora.tasks.data import folders
from fedlora.tasks.data.tables import TextFormat, read_text_files

DIGITS = "digits"
ONLY = "all"  # the split of data without splits
# The settings that a repository may have for its CSV and JSON files.
REPOSITORY = {"name", "version", "data_dir", "data_files", "description", "features", "sep", "delimiter", "encoding"}


def load_data(data: str, config: str | None, form: TextFormat) -> Mapping[str, Any]:
    """Return all splits by name, a single file's as ``ONLY``. Raises ``ValueError`` if they cannot be read."""
    import datasets
    from huggingface_hub.utils import logging as hub

    datasets.disable_progress_bars()
    hub.set_verbosity_error()  # no messages of retries before our one sentence
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # nor of a broken file
    path = Path(data).expanduser()
    if data == DIGITS:
        return _load_digits()
    try:
        if path.is_file():
            return {ONLY: _read([path], form)}
        if path.is_dir():
            return _load_folder(path, config, form)
        if data.startswith((".", "/", "~")) or folders.file_ending(data):
            raise ValueError(f"there is no data at {data!r}; name a file, a folder, a hub id, or 'digits'.")
        return _load_repository(data, config, form, ["csv"])
    except (OSError, datasets.exceptions.DatasetNotFoundError, datasets.exceptions.DatasetGenerationError) as error:
        cause = _root_cause(error)
        raise ValueError(f"the data {data!r} could not be read: {cause}; name a file, a folder or a hub id.") from error


def _load_folder(path: Path, config: str | None, form: TextFormat) -> Mapping[str, Any]:
    import datasets

    if (path / "dataset_dict.json").exists():
        return dict(datasets.load_from_disk(str(path)))
    if (path / "dataset_info.json").exists() and (path / "state.json").exists():
        return {ONLY: datasets.load_from_disk(str(path))}
    inner = folders.inner_files(path)
    files = folders.top_level_splits(path, inner)
    if files:
        return folders.LazySplits(files, lambda shards: _read(folders.order_shards(shards, path), form))
    kinds = {folders.READERS[folders.file_ending(file) or ""] for file in inner if folders.is_table(file)}
    if "parquet" in kinds:  # a copy of a hub's data repository
        return dict(datasets.load_dataset(str(path), config))
    if any(map(folders.is_image, inner)):
        return dict(datasets.load_dataset("imagefolder", data_dir=str(path)))
    if kinds:
        return _load_repository(str(path), config, form, ["csv", "json"])
    endings = ", ".join(folders.READERS)
    raise ValueError(f"the folder {str(path)!r} has no data; it needs train and test files ({endings}).")


def _load_repository(data: str, config: str | None, form: TextFormat, kinds: Sequence[str]) -> Mapping[str, Any]:
    """Return the splits of a hub's data repository or of a copy; ``datasets`` reads files that are not of ``kinds``.

    Raises ``ValueError`` if the repository has settings for its files that are not supported.
    """
    import datasets

    builder = datasets.load_dataset_builder(data, config)
    if builder.name not in kinds:
        return dict(datasets.load_dataset(data, config))
    settings, usual = builder.config, type(builder.config)()
    names = [f.name for f in fields(settings) if f.name not in REPOSITORY]
    odd = [name for name in names if getattr(settings, name) != getattr(usual, name)]
    if odd:
        raise ValueError(
            f"the README of {data!r} sets {odd[0]!r} for its {builder.name} files, which is not understood; write the "
            "rows to files that need no settings, and name their folder as task.data."
        )
    separator = getattr(settings, "sep", None)
    form = TextFormat(
        form.encoding or (None if settings.encoding == usual.encoding else settings.encoding),
        form.delimiter or (None if separator == getattr(usual, "sep", None) else separator),
    )

    def read(files: list[str]) -> Any:  # local files are not copied
        paths = [Path(file) for file in datasets.DownloadManager().download(files)]
        return _set_label_names(_read(paths, form), builder.info.features)

    return folders.LazySplits({str(split): list(map(str, files)) for split, files in settings.data_files.items()}, read)


def _set_label_names(split: Any, declared: Mapping[str, Any] | None) -> Any:
    """Return the rows with the label names that their repository declares."""
    import datasets

    for name, feature in (declared or {}).items():
        if isinstance(feature, datasets.ClassLabel) and name in split.column_names:
            order, numbers = split.column_names, [_class_number(value, feature.names, name) for value in split[name]]
            split = split.remove_columns(name).add_column(name, numbers, feature=feature).select_columns(order)
    return split


def _class_number(value: Any, names: Sequence[str], column: str) -> int | None:
    """Return the number of a label, which is written as its name, or as a number if no name is a number."""
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

    ending = folders.file_ending(files[0]) or ""
    kind = folders.READERS.get(ending)
    if kind is None:
        raise ValueError(f"{str(files[0])!r} has an unknown ending; the known ones are {', '.join(folders.READERS)}.")
    for file in files:
        if file.stat().st_size == 0:
            raise ValueError(f"the file {str(file)!r} is empty; it needs rows.")
    if kind != "parquet":
        return read_text_files(files, kind, ".tsv" in ending, form)
    # In memory, so that two processes may read one file, and no cache is left in the home folder.
    try:
        return datasets.load_dataset(kind, data_files=[*map(str, files)], split="train", keep_in_memory=True)
    except (OSError, ValueError, TypeError, StopIteration, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{str(files[0])!r} could not be read as {kind}: {_root_cause(error)}.") from error


def _root_cause(error: BaseException) -> str:
    """Return the first line of the innermost error, which says more than the outer ones."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().splitlines()
    return text[0].rstrip(".") if text else "it holds no rows"


@cache
def _load_digits() -> Mapping[str, Any]:
    import datasets
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype("uint8")
    halves = train_test_split(range(len(pixels)), test_size=0.25, random_state=0, stratify=digits.target)
    return {
        split: datasets.Dataset.from_dict(
            {"image": [pixels[i].tobytes() for i in rows], "label": [int(digits.target[i]) for i in rows]}
        )
        for split, rows in zip(("train", "test"), halves)
    }

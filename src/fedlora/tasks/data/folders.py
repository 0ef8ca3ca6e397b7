"""The splits of a folder by the names of its files."""

import re
from collections import UserDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv"}
READERS |= {f"{ending}.gz": kind for ending, kind in READERS.items()} | {".parquet": "parquet"}
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# Files about data: of the hub, of datasets, of image folders, of models.
ABOUT = {"meta", "metadata", "dataset_info", "dataset_infos", "dataset_dict", "state", "config"}
USUAL = {"train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation"}
SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?:-[0-9a-f]{16})?")


def file_ending(file: Path | str) -> str | None:
    """Return the file's ending among ``READERS``, or None."""
    name = str(file).lower()
    return next((e for e in sorted(READERS, key=len, reverse=True) if name.endswith(e)), None)


class LazySplits(UserDict[str, Any]):
    """Splits that are read on access, so that a broken split does not hide the others."""

    def __init__(self, files: Mapping[str, list[Any]], read: Callable[[list[Any]], Any]):
        super().__init__(files)
        self.read = read

    def __getitem__(self, split: str) -> Any:
        return self.read(self.data[split])


def is_table(file: Path) -> bool:
    """Whether this is a file of rows, neither hidden nor about other data."""
    hidden = file.name.startswith(".")
    return file.is_file() and not hidden and file_ending(file) is not None and _stem(file) not in ABOUT


def is_image(file: Path) -> bool:
    """Whether a file has an image's ending and is not hidden."""
    return not file.name.startswith(".") and file.suffix.lower() in IMAGES


def inner_files(folder: Path) -> list[Path]:
    """Return the files in all folders below this folder, except hidden ones."""
    inside = (p for p in sorted(folder.rglob("*")) if p.parent != folder and p.is_file())
    return [p for p in inside if not any(part.startswith(".") for part in p.relative_to(folder).parts)]


def top_level_splits(folder: Path, inner: list[Path]) -> dict[str, list[Path]]:
    """Return the folder's own files by split, or nothing if the splits are in the folders of ``inner``.

    A file's split is its name without ending and shard number. Raises ``ValueError`` if both places have splits.
    """
    splits: dict[str, list[Path]] = {}
    for file in filter(is_table, sorted(folder.iterdir())):
        splits.setdefault(_split(file), []).append(file)
    below = {path.relative_to(folder).parts[0] for path in inner if is_table(path) or is_image(path)}
    below |= {_split(path) for path in inner if is_table(path)}
    if not below or not splits:
        return splits
    usual, others = sorted(USUAL & set(splits)), sorted(USUAL & below)
    if usual and others:
        raise ValueError(
            f"the folder {str(folder)!r} holds the split {usual[0]!r} in {splits[usual[0]][0].name} and the split "
            f"{others[0]!r} in folders of its own; name one of the two places as task.data, or move the other away."
        )
    return splits if usual else {}


def _stem(file: Path) -> str:
    return file.name[: -len(file_ending(file) or "")]


def _split(file: Path) -> str:
    shard = SHARD.fullmatch(_stem(file))
    return shard["split"] if shard else _stem(file)


def order_shards(files: list[Path], folder: Path) -> list[Path]:
    """Return the files of one split in order. Raises ``ValueError`` if they are not one complete set of shards."""
    matches, split = [SHARD.fullmatch(_stem(file)) for file in files], _split(files[0])
    counts = {shard["count"] if shard else None for shard in matches}
    if len(files) > 1 and (len(counts) > 1 or None in counts or len(set(map(file_ending, files))) > 1):
        raise ValueError(
            f"the folder {str(folder)!r} has several files for the split {split!r}, {files[0].name} and "
            f"{files[-1].name}; move all but one away, or name one as task.data."
        )
    numbers, count = [int(shard["number"]) for shard in matches if shard], int(next(iter(counts)) or 0)
    if numbers != list(range(count)):
        missing = sorted(set(range(count)) - set(numbers))
        hint = f"number {missing[0]} is missing" if missing else "some are there twice"
        raise ValueError(
            f"the folder {str(folder)!r} has {len(numbers)} files of the {count} shards of the split {split!r}, and "
            f"{hint}; put each of them there once."
        )
    return files

"""The splits of a folder: which of its files belong to which, and what makes it ambiguous."""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

READERS = {
    ".jsonl": "json",
    ".json": "json",
    ".jsonl.gz": "json",
    ".json.gz": "json",
    ".csv": "csv",
    ".csv.gz": "csv",
    ".tsv": "csv",
    ".tsv.gz": "csv",
    ".parquet": "parquet",
}
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# Files about data: of the hub, of datasets, of image folders, of models.
ABOUT = {"meta", "metadata", "dataset_info", "dataset_infos", "dataset_dict", "state", "config"}
USUAL = {"train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation"}
F = TypeVar("F")
SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?:-[0-9a-f]{16})?")


def ending(file: Path | str) -> str | None:
    """The file's ending among those that can be read."""
    name = str(file).lower()
    return next((e for e in sorted(READERS, key=len, reverse=True) if name.endswith(e)), None)


class Files(Mapping[str, Any], Generic[F]):
    """Splits that are read when they are asked for, so that none is kept from its user by another one."""

    def __init__(self, files: Mapping[str, list[F]], read: Callable[[list[F]], Any]):
        self.files, self.read = files, read

    def __getitem__(self, split: str) -> Any:
        return self.read(self.files[split])

    def __contains__(self, split: object) -> bool:  # without reading it
        return split in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def split_files(folder: Path) -> dict[str, list[Path]]:
    """The files that lie in the folder itself, by their split: a file's name without its ending and its shard."""
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if is_table(file):
            found.setdefault(_split(file), []).append(file)
    return found


def is_table(file: Path) -> bool:
    """Whether this is a file of rows: none that is hidden or that describes other data."""
    return file.is_file() and not file.name.startswith(".") and ending(file) is not None and _stem(file) not in ABOUT


def is_picture(file: Path) -> bool:
    """Whether a file's name says that it is a picture."""
    return not file.name.startswith(".") and file.suffix.lower() in PICTURES


def inner_files(folder: Path) -> list[Path]:
    """Files of all folders in the folder, none of them hidden."""
    inside = (p for p in sorted(folder.rglob("*")) if p.parent != folder and p.is_file())
    return [p for p in inside if not any(part.startswith(".") for part in p.relative_to(folder).parts)]


def own_splits(folder: Path, inner: list[Path]) -> dict[str, list[Path]]:
    """``split_files``, or none where the folder's rows lie in folders of its own, ``inner``.

    ``ValueError`` where they could lie in either.
    """
    own = split_files(folder)
    below = {path.relative_to(folder).parts[0] for path in inner if is_table(path) or is_picture(path)}
    below |= {_split(path) for path in inner if is_table(path)}
    if not below or not own:
        return own
    usual, others = sorted(USUAL & set(own)), sorted(USUAL & below)
    if usual and others:
        raise ValueError(
            f"the folder {str(folder)!r} holds the split {usual[0]!r} in {own[usual[0]][0].name} and the split "
            f"{others[0]!r} in folders of its own; name one of the two places as task.data, or move the other away."
        )
    return own if usual else {}


def _stem(file: Path) -> str:
    return file.name[: -len(ending(file) or "")]


def _split(file: Path) -> str:
    shard = SHARD.fullmatch(_stem(file))
    return shard["split"] if shard else _stem(file)


def ordered(files: list[Path], folder: Path) -> list[Path]:
    """The files of one split in order. ``ValueError`` where they are no whole set of shards, or several files."""
    matches, split = [SHARD.fullmatch(_stem(file)) for file in files], _split(files[0])
    counts = {shard["count"] if shard else None for shard in matches}
    if len(files) > 1 and (len(counts) > 1 or None in counts or len({ending(file) for file in files}) > 1):
        names = " and ".join((files[0].name, files[-1].name))
        raise ValueError(
            f"the folder {str(folder)!r} has several files for the split {split!r}, {names}; move all but one away, or "
            "name one as task.data."
        )
    numbers, count = [int(shard["number"]) for shard in matches if shard], int(next(iter(counts)) or 0)
    if numbers != list(range(count)):
        lacking = sorted(set(range(count)) - set(numbers))
        hint = f"number {lacking[0]} is missing" if lacking else "some are there twice"
        raise ValueError(
            f"the folder {str(folder)!r} has {len(numbers)} files of the {count} shards of the split {split!r}, and "
            f"{hint}; put each of them there once."
        )
    return files

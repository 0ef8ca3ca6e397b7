"""Files: trees as safetensors and tables as JSON, written whole or not at all, and headers checked before use.

The name of a verified file ends with a digest of its content, so a file that was cut off or altered is noticed.

``read_header`` is the one reader of safetensors headers. It reads the eight bytes that say how long the header is, then
the header, and checks both against the file before a tensor is made; nothing of a pickle is ever read.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save
from torch import Tensor

from fedlora.text import display_safe
from fedlora.types import Layer, Tree

SEPARATOR = "/"  # between part and leaf; module paths have dots, never this
SIZES = {  # bytes a number, by safetensors' names of dtypes
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
DIMENSIONS = 8
NAME = 512  # characters of a tensor's name
METADATA = "__metadata__"  # the notes in a header
SUFFIX = ".safetensors"
BROKEN = (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, SafetensorError)


class RefusedFileError(ValueError):
    """A verified file whose content is not the one that was written; the text says why."""


class RefusedHeaderError(ValueError):
    """A file or message whose header is not what it should be; the text says what was found, without a full stop."""


@dataclass(frozen=True)
class Limits:
    """How much of a file or message is taken in. The defaults are for files that a user names."""

    size: int = 2**36  # bytes of the whole
    tensors: int = 100_000
    header: int = 2**25  # bytes


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """A header that fits its file: each tensor's dtype and shape, and the notes beside them."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)


FILES = Limits()


def upload_limits(megabytes: float) -> Limits:
    """For one message of a party."""
    return Limits(int(megabytes * 1e6), 20_000, 2**22)


def read_header(source: str | Path | bytes, limits: Limits = FILES) -> Header:
    """The header of a safetensors file, or of the bytes of one, checked against the limits and its own size.

    Raises ``RefusedHeaderError`` where size, header, names, dtypes, shapes or offsets are not in order, and ``OSError``
    where there is no such file. At most the header is held in memory.
    """
    if not isinstance(source, bytes) and Path(source).exists() and not Path(source).is_file():
        raise RefusedHeaderError("it is no file")  # reading a pipe would wait for ever
    if isinstance(source, bytes):
        return _parsed(source[8 : 8 + _header_size(source[:8], len(source), limits)], len(source), limits)
    with open(source, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        return _parsed(_exactly(file, _header_size(_exactly(file, 8, size), size, limits), size), size, limits)


def _exactly(file: BinaryIO, count: int, size: int) -> bytes:
    found = file.read(count)
    if len(found) != count:
        raise RefusedHeaderError(f"it ends within its header, after {size} bytes")
    return found


def _header_size(start: bytes, size: int, limits: Limits) -> int:
    if size > limits.size:
        raise RefusedHeaderError(f"it has {size} bytes, and {limits.size} are the most that is taken")
    if len(start) < 8:
        raise RefusedHeaderError(f"it ends within its header, after {size} bytes")
    length = int.from_bytes(start, "little")
    if length > limits.header:
        raise RefusedHeaderError(f"its header claims {length} bytes, and {limits.header} are the most that is taken")
    if length > size - 8 or length < 2:
        raise RefusedHeaderError(f"its header claims {length} bytes of {size}")
    return length


def _parsed(text: bytes, size: int, limits: Limits) -> Header:
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        why = str(error) if isinstance(error, RefusedHeaderError) else f"its header is no JSON ({type(error).__name__})"
        raise RefusedHeaderError(why) from error
    if not isinstance(found, dict):
        raise RefusedHeaderError("its header is no table of tensors")
    notes = found.pop(METADATA, {})
    if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
        raise RefusedHeaderError("its notes are no texts")
    if len(found) > limits.tensors:
        raise RefusedHeaderError(f"it holds {len(found)} tensors, and {limits.tensors} are the most that is taken")
    spans = [_span(name, told) for name, told in found.items()]
    _covers(spans, size - 8 - len(text))
    return Header({name: TensorInfo(told["dtype"], tuple(told["shape"])) for name, told in found.items()}, notes)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise RefusedHeaderError("its header has a name twice")
    return found


def _span(name: str, told: Any) -> tuple[int, int]:
    """Where a tensor lies, if its name, dtype and shape are in order and fit that."""
    if not 0 < len(name) <= NAME or not name.isprintable():
        raise RefusedHeaderError(f"it names a tensor {display_safe(name, 60)!r}, which is no plain name")
    if not isinstance(told, dict) or told.keys() != {"dtype", "shape", "data_offsets"}:
        raise RefusedHeaderError(f"its entry {name!r} is no tensor")
    shape, span = (_counts(name, told[key]) for key in ("shape", "data_offsets"))
    width = SIZES.get(told["dtype"]) if isinstance(told["dtype"], str) else None
    if width is None or len(shape) > DIMENSIONS or len(span) != 2:
        raise RefusedHeaderError(f"its entry {name!r} has no usual dtype, shape and offsets")
    for count in shape:
        width *= count
    if span[1] - span[0] != width:
        raise RefusedHeaderError(f"its tensor {name!r} claims {width} bytes and has {span[1] - span[0]}")
    return span[0], span[1]


def _counts(name: str, told: Any) -> list[int]:
    if not isinstance(told, list) or not all(type(x) is int and 0 <= x < 2**48 for x in told):
        raise RefusedHeaderError(f"its entry {name!r} has sizes that are no counts")
    return told


def _covers(spans: list[tuple[int, int]], size: int) -> None:
    """The tensors lie one after the other, without gaps, and fill the file."""
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise RefusedHeaderError("its tensors overlap, or leave gaps")
        at = end
    if at != size:
        raise RefusedHeaderError(f"its tensors end after {at} of {size} bytes; it is cut off, or longer than it says")


def flatten(tree: Tree) -> dict[str, Tensor]:
    """``part/leaf`` -> leaf, the very tensors of the tree."""
    return {f"{part}{SEPARATOR}{leaf}": x for part, layer in tree.items() for leaf, x in layer.items()}


def unflatten(leaves: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tree of leaves that ``flatten`` named. Parts without leaves are lost."""
    tree: dict[str, dict[str, Tensor]] = {}
    for key, x in leaves.items():
        part, _, leaf = key.rpartition(SEPARATOR)
        tree.setdefault(part, {})[leaf] = x
    return tree


def encode_tree(tree: Tree, notes: Mapping[str, str] | None = None) -> bytes:
    """A tree as the bytes of a safetensors file: the one form of trees on disk and in messages."""
    # Cloned, since safetensors refuses tensors that share memory.
    leaves = {key: x.detach().cpu().clone().contiguous() for key, x in flatten(tree).items()}
    return serialize(leaves, notes)


def decode_tree(source: bytes | Path, limits: Limits = FILES) -> dict[str, dict[str, Tensor]]:
    """The tree that ``encode_tree`` wrote, from its bytes or its file. Its header is checked before a tensor is made.

    Each leaf has memory of its own: safetensors gives views at any offset, and the last bits of a factorisation depend
    on the alignment. Raises ``RefusedHeaderError``, ``SafetensorError`` or, for a file, ``OSError``.
    """
    read_header(source, limits)
    leaves = load(source) if isinstance(source, bytes) else load_file(source)
    return unflatten({key: x.clone() for key, x in leaves.items()})


def serialize(tensors: dict[str, Tensor], notes: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file whose bytes follow from its content: safetensors itself orders notes by chance."""
    data = save(tensors, dict(notes or {}) or None)
    if not notes:
        return data
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header = {METADATA: dict(sorted(header.pop(METADATA).items())), **header}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text + data[start:]


def save_tree(path: Path, tree: Tree, about: Mapping[str, str] | None = None) -> None:
    """Writes a tree as a safetensors file, every leaf in its own dtype."""
    write(path, encode_tree(tree, {"format": "pt", **(about or {})}))


def load_tree(path: Path) -> Tree:
    """The tree that ``save_tree`` wrote. ``ValueError`` where the file is missing or broken."""
    try:
        return decode_tree(path)
    except (RefusedHeaderError, SafetensorError, OSError) as error:
        raise ValueError(
            f"{str(path)!r} cannot be read, the run was cut off or edited: {error}; run it anew."
        ) from error


def load_about(path: Path) -> dict[str, Any]:
    """The notes that ``save_tree`` put beside a tree under ``about``. ``ValueError`` where they are not there."""
    try:
        return _parse_about(read_header(path))
    except (ValueError, KeyError, OSError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} cannot be read, it was cut off or edited: {error!s}; run it anew.") from error


def _parse_about(header: Header) -> dict[str, Any]:
    found = json.loads(header.metadata["about"])
    if not isinstance(found, dict):
        raise ValueError("its notes are no table")
    return found


def encode_state(tree: Tree, about: Mapping[str, Any]) -> bytes:
    """Encodes a tree and plain values as a safetensors file, with the layout of each leaf in memory.

    The last bits of a product depend on the order of its factors' numbers.
    """
    orders = {key: order for key, x in flatten(tree).items() if (order := _stride_order(x)) is not None}
    return encode_tree(tree, {"format": "pt", "about": json.dumps({**about, "orders": orders})})


def decode_state(content: bytes) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Decodes the tree and the values of ``encode_state``. Raises ``RefusedFileError`` if there are none."""
    try:
        about = _parse_about(read_header(content))
        leaves = flatten(decode_tree(content))
        for key, order in about.pop("orders").items():
            back = sorted(range(len(order)), key=order.__getitem__)
            leaves[key] = leaves[key].permute(order).contiguous().permute(back)
    except BROKEN as error:
        raise RefusedFileError(f"it holds no tree of leaves ({error})") from error
    return unflatten(leaves), about


def _stride_order(x: Tensor) -> list[int] | None:
    """The dimensions from the widest stride to the narrowest; None for a contiguous tensor."""
    if x.is_contiguous():
        return None
    stride = x.stride()
    order = sorted(range(x.dim()), key=lambda d: (-stride[d], d))
    return order if x.permute(order).is_contiguous() else None


def write_verified_file(folder: Path, stem: str, content: bytes) -> str:
    """Writes ``STEM-DIGEST.safetensors`` and returns that name."""
    name = _verified_name(stem, content)
    write(folder / name, content)
    return name


def read_verified_file(path: Path) -> bytes:
    """Reads a verified file. Raises ``RefusedFileError`` if it is missing or its content is not that of its name."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RefusedFileError(f"{path.name} cannot be read ({error.strerror})") from error
    if path.name != _verified_name(path.name.rpartition("-")[0], content):
        raise RefusedFileError(f"{path.name} was cut off or altered")
    return content


def _verified_name(stem: str, content: bytes) -> str:
    return f"{stem}-{hashlib.blake2b(content, digest_size=16).hexdigest()}{SUFFIX}"


class OffloadedTree(Mapping[str, Layer]):
    """A tree on disk: a part is read when it is asked for, and let go with what was made of it."""

    def __init__(self, path: Path, tree: Tree):
        self.path = path
        self.forms = {
            part: {leaf: torch.empty(x.shape, dtype=x.dtype, device="meta") for leaf, x in layer.items()}
            for part, layer in tree.items()
        }
        self.device = next((x.device for layer in tree.values() for x in layer.values()), torch.device("cpu"))
        save_tree(path, tree)

    def form(self, part: str) -> Layer:
        """Leaves and shapes, without values."""
        return self.forms[part]

    def __iter__(self) -> Iterator[str]:
        return iter(self.forms)

    def __len__(self) -> int:
        return len(self.forms)

    def __getitem__(self, part: str) -> Layer:
        with safe_open(self.path, framework="pt") as file:
            found = {leaf: file.get_tensor(f"{part}{SEPARATOR}{leaf}") for leaf in self.forms[part]}
        return {leaf: x.to(self.device) for leaf, x in found.items()}


def check_new_folder(folder: str | Path) -> Path:
    """A folder that may be written, new or empty; nothing is made yet. ``ValueError`` where it would overwrite."""
    path = Path(folder).expanduser()
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"{str(path)!r} exists already and is not empty; name another folder.")
    _within_reach(path)
    return path


def check_output_file(file: str | Path) -> Path:
    """A file that may be written or written over; nothing is made yet. ``ValueError`` where it cannot be."""
    path = Path(file).expanduser()
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; name a file in it.")
    _within_reach(path.parent)
    return path


def _within_reach(path: Path) -> None:
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"cannot write to {str(path)!r}: {str(there)!r} is no folder to write in; choose another.")


def save_json(path: Path, value: Any) -> None:
    """Indented JSON, written whole or not at all."""
    write(path, (json.dumps(value, indent=2) + "\n").encode())


def digest(tree: Tree) -> str:
    """Names, shapes, dtypes and bits of all leaves as one short text."""
    found = hashlib.blake2b(digest_size=16)
    for part in sorted(tree):
        for leaf in sorted(tree[part]):
            x = tree[part][leaf].detach().cpu().contiguous()
            found.update(f"{part}{SEPARATOR}{leaf} {tuple(x.shape)} {x.dtype};".encode())
            found.update(x.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def write(path: Path, content: bytes) -> None:
    """Through a temporary file beside it, synced and renamed: a crash or a full disk leaves the old file.

    The folder is synced, too: what is written afterwards may count on this file, whatever happens to the machine.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def remove_temporary_files(folder: Path) -> None:
    """Removes what ``write`` had begun in a folder when its process was killed; nobody may be writing there now."""
    for ending in ("safetensors", "json", "jsonl", "toml"):
        for path in folder.glob(f".*.{ending}.????????"):
            path.unlink()


def sync_folder(folder: Path) -> None:
    """What was renamed or removed in a folder is so on the disk, where the system lets a folder be synced."""
    if os.name != "posix":
        return
    place = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)

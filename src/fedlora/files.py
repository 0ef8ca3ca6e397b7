"""Files: trees as safetensors and tables as JSON. Writes are atomic, and headers are checked before use.

The name of a verified file ends with a digest of its content, so damage is detected.

``read_header`` is the only reader of safetensors headers. It checks the header and its length against the file before
a tensor is created. No pickle is ever read.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
SIZES = {  # bytes per value, by safetensors' names of dtypes
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
DIMENSIONS = 8
NAME = 512  # characters of a tensor's name
METADATA = "__metadata__"  # the notes in a header
SUFFIX = ".safetensors"
BROKEN = (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, SafetensorError)


class RefusedFileError(ValueError):
    """A verified file was damaged; the text has the reason."""


class RefusedHeaderError(ValueError):
    """The header of a file or message is invalid; the text has the reason, without a full stop."""


@dataclass(frozen=True)
class Limits:
    """The largest accepted file or message. The defaults are for files that a user names."""

    size: int = 2**36  # bytes of the whole
    tensors: int = 100_000
    header: int = 2**25  # bytes


@dataclass(frozen=True)
class TensorInfo:
    """The header's entry of one tensor."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """A valid header: each tensor's dtype and shape, and the metadata."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)


FILES = Limits()


def upload_limits(megabytes: float) -> Limits:
    """Return the limits of one message of a client."""
    return Limits(int(megabytes * 1e6), 20_000, 2**22)


def read_header(source: str | Path | bytes, limits: Limits = FILES) -> Header:
    """Return the header of a safetensors file or of its bytes, checked against the limits and the file's size.

    Only the header is read. Raises ``RefusedHeaderError`` if size, header, names, dtypes, shapes or offsets are
    invalid, and ``OSError`` if there is no such file.
    """
    if not isinstance(source, bytes) and Path(source).exists() and not Path(source).is_file():
        raise RefusedHeaderError("it is no file")  # reading a pipe would wait for ever
    if isinstance(source, bytes):
        return _parse_header(source[8 : 8 + _header_size(source[:8], len(source), limits)], len(source), limits)
    with open(source, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        return _parse_header(
            _read_exactly(file, _header_size(_read_exactly(file, 8, size), size, limits), size), size, limits
        )


def _read_exactly(file: BinaryIO, count: int, size: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise RefusedHeaderError(f"it ends within its header, after {size} bytes")
    return data


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


def _parse_header(text: bytes, size: int, limits: Limits) -> Header:
    try:
        table = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        why = str(error) if isinstance(error, RefusedHeaderError) else f"its header is no JSON ({type(error).__name__})"
        raise RefusedHeaderError(why) from error
    if not isinstance(table, dict):
        raise RefusedHeaderError("its header is no table of tensors")
    notes = table.pop(METADATA, {})
    if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
        raise RefusedHeaderError("its notes are no texts")
    if len(table) > limits.tensors:
        raise RefusedHeaderError(f"it holds {len(table)} tensors, and {limits.tensors} are the most that is taken")
    _check_spans([_check_tensor(name, entry) for name, entry in table.items()], size - 8 - len(text))
    return Header({name: TensorInfo(entry["dtype"], tuple(entry["shape"])) for name, entry in table.items()}, notes)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise RefusedHeaderError("its header has a name twice")
    return table


def _check_tensor(name: str, entry: Any) -> tuple[int, int]:
    """Check a tensor's name, dtype and shape against its offsets, and return the offsets."""
    if not 0 < len(name) <= NAME or not name.isprintable():
        raise RefusedHeaderError(f"it names a tensor {display_safe(name, 60)!r}, which is no plain name")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise RefusedHeaderError(f"its entry {name!r} is no tensor")
    shape, span = (_check_counts(name, entry[key]) for key in ("shape", "data_offsets"))
    width = SIZES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if width is None or len(shape) > DIMENSIONS or len(span) != 2:
        raise RefusedHeaderError(f"its entry {name!r} has no usual dtype, shape and offsets")
    size = width * math.prod(shape)
    if span[1] - span[0] != size:
        raise RefusedHeaderError(f"its tensor {name!r} claims {size} bytes and has {span[1] - span[0]}")
    return span[0], span[1]


def _check_counts(name: str, counts: Any) -> list[int]:
    if not isinstance(counts, list) or not all(type(x) is int and 0 <= x < 2**48 for x in counts):
        raise RefusedHeaderError(f"its entry {name!r} has sizes that are no counts")
    return counts


def _check_spans(spans: list[tuple[int, int]], size: int) -> None:
    """Check that the tensors fill the file without gaps."""
    last = 0
    for begin, end in sorted(spans):
        if begin != last:
            raise RefusedHeaderError("its tensors overlap, or leave gaps")
        last = end
    if last != size:
        raise RefusedHeaderError(f"its tensors end after {last} of {size} bytes; it is cut off, or longer than it says")


def flatten(tree: Tree) -> dict[str, Tensor]:
    """Return ``part/leaf`` -> leaf, without copies."""
    return {f"{part}{SEPARATOR}{leaf}": x for part, layer in tree.items() for leaf, x in layer.items()}


def unflatten(leaves: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Invert ``flatten``. Parts without leaves are lost."""
    tree: dict[str, dict[str, Tensor]] = {}
    for key, x in leaves.items():
        part, _, leaf = key.rpartition(SEPARATOR)
        tree.setdefault(part, {})[leaf] = x
    return tree


def encode_tree(tree: Tree, notes: Mapping[str, str] | None = None) -> bytes:
    """Return a tree as the bytes of a safetensors file, its form on disk and in messages."""
    # Cloned, since safetensors refuses tensors that share memory.
    leaves = {key: x.detach().cpu().clone().contiguous() for key, x in flatten(tree).items()}
    return serialize(leaves, notes)


def decode_tree(source: bytes | Path, limits: Limits = FILES) -> dict[str, dict[str, Tensor]]:
    """Return the tree of ``encode_tree``, from its bytes or its file.

    Each leaf has its own memory: safetensors returns views at any offset, and the last bits of a factorisation depend
    on the alignment. Raises ``RefusedHeaderError``, ``SafetensorError`` or, for a file, ``OSError``.
    """
    read_header(source, limits)
    leaves = load(source) if isinstance(source, bytes) else load_file(source)
    return unflatten({key: x.clone() for key, x in leaves.items()})


def serialize(tensors: dict[str, Tensor], notes: Mapping[str, str] | None = None) -> bytes:
    """Return the bytes of a safetensors file. They depend on the content only: notes are sorted."""
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
    """Write a tree as a safetensors file, every leaf in its own dtype."""
    write(path, encode_tree(tree, {"format": "pt", **(about or {})}))


def load_tree(path: Path) -> Tree:
    """Return the tree of ``save_tree``. Raises ``ValueError`` if the file is missing or broken."""
    try:
        return decode_tree(path)
    except (RefusedHeaderError, SafetensorError, OSError) as error:
        raise ValueError(
            f"{str(path)!r} cannot be read, the run was cut off or edited: {error}; run it anew."
        ) from error


def load_about(path: Path) -> dict[str, Any]:
    """Return the notes of ``save_tree`` with the key ``about``. Raises ``ValueError`` if there are none."""
    try:
        return _parse_about(read_header(path))
    except (ValueError, KeyError, OSError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} cannot be read, it was cut off or edited: {error!s}; run it anew.") from error


def _parse_about(header: Header) -> dict[str, Any]:
    about = json.loads(header.metadata["about"])
    if not isinstance(about, dict):
        raise ValueError("its notes are no table")
    return about


def encode_state(tree: Tree, about: Mapping[str, Any]) -> bytes:
    """Return a tree and plain values as a safetensors file, with the memory layout of each leaf.

    The last bits of a product depend on the layout of its factors.
    """
    orders = {key: order for key, x in flatten(tree).items() if (order := _stride_order(x)) is not None}
    return encode_tree(tree, {"format": "pt", "about": json.dumps({**about, "orders": orders})})


def decode_state(content: bytes) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Invert ``encode_state``. Raises ``RefusedFileError`` if the content is of another kind."""
    try:
        about = _parse_about(read_header(content))
        leaves = flatten(decode_tree(content))
        for key, order in about.pop("orders").items():
            inverse = sorted(range(len(order)), key=order.__getitem__)
            leaves[key] = leaves[key].permute(order).contiguous().permute(inverse)
    except BROKEN as error:
        raise RefusedFileError(f"it holds no tree of leaves ({error})") from error
    return unflatten(leaves), about


def _stride_order(x: Tensor) -> list[int] | None:
    """Return the dimensions from the largest stride to the smallest; None for a contiguous tensor."""
    if x.is_contiguous():
        return None
    stride = x.stride()
    order = sorted(range(x.dim()), key=lambda d: (-stride[d], d))
    return order if x.permute(order).is_contiguous() else None


def write_verified_file(folder: Path, stem: str, content: bytes) -> str:
    """Write ``STEM-DIGEST.safetensors``, and return that name."""
    name = _verified_name(stem, content)
    write(folder / name, content)
    return name


def read_verified_file(path: Path) -> bytes:
    """Return the content of a verified file. Raises ``RefusedFileError`` if it is missing or damaged."""
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
    """A tree on disk. A part is read when it is accessed, and is not kept in memory."""

    def __init__(self, path: Path, tree: Tree):
        self.path = path
        self.forms = {
            part: {leaf: torch.empty(x.shape, dtype=x.dtype, device="meta") for leaf, x in layer.items()}
            for part, layer in tree.items()
        }
        self.device = next((x.device for layer in tree.values() for x in layer.values()), torch.device("cpu"))
        save_tree(path, tree)

    def form(self, part: str) -> Layer:
        """Return a part's leaves without values."""
        return self.forms[part]

    def __iter__(self) -> Iterator[str]:
        return iter(self.forms)

    def __len__(self) -> int:
        return len(self.forms)

    def __getitem__(self, part: str) -> Layer:
        with safe_open(self.path, framework="pt") as file:
            return {leaf: file.get_tensor(f"{part}{SEPARATOR}{leaf}").to(self.device) for leaf in self.forms[part]}


def check_new_folder(folder: str | Path) -> Path:
    """Return the path of a new or empty folder. Raises ``ValueError`` if files would be overwritten."""
    path = Path(folder).expanduser()
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"{str(path)!r} exists already and is not empty; name another folder.")
    _check_writable(path)
    return path


@contextmanager
def remove_on_error(folder: Path) -> Iterator[None]:
    """Remove a folder, which the block writes, if the block raises."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def check_output_file(file: str | Path) -> Path:
    """Return the path of a file. Raises ``ValueError`` if it cannot be written."""
    path = Path(file).expanduser()
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; name a file in it.")
    _check_writable(path.parent)
    return path


def _check_writable(path: Path) -> None:
    parent = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"cannot write to {str(path)!r}: {str(parent)!r} is no folder to write in; choose another.")


def save_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write(path, (json.dumps(value, indent=2) + "\n").encode())


def digest(tree: Tree) -> str:
    """Return a hash of the names, shapes, dtypes and bits of all leaves."""
    hasher = hashlib.blake2b(digest_size=16)
    for part in sorted(tree):
        for leaf in sorted(tree[part]):
            x = tree[part][leaf].detach().cpu().contiguous()
            hasher.update(f"{part}{SEPARATOR}{leaf} {tuple(x.shape)} {x.dtype};".encode())
            hasher.update(x.reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def write(path: Path, content: bytes) -> None:
    """Write a file atomically, by a temporary file that is synced and renamed. A crash leaves the old file.

    The folder is synced, too, so that later writes may rely on this file even if the machine crashes.
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
    """Remove the temporary files of interrupted writes from a folder. No process may be writing to it."""
    for ending in ("safetensors", "json", "jsonl", "toml"):
        for path in folder.glob(f".*.{ending}.????????"):
            path.unlink()


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries to disk, on systems that support it."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

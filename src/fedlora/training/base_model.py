"""Which base model an adapter belongs to: by its name, and by a digest of its weights where there is one."""

import hashlib
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

SNAPSHOT = re.compile(r"models--(?P<name>[^/]+)/snapshots/(?P<revision>[^/]+)$")  # of a folder in the Hub's cache
KINDS = ("*.safetensors", "pytorch_model*.bin")  # the first kind that a folder has holds its weights
CHUNK = 2**20


class Base(NamedTuple):
    """A base model as an adapter names it, and where that is known a digest of its weights."""

    name: str | None
    revision: str | None
    digest: str | None = None

    @classmethod
    def named(cls, config: Mapping[str, Any], digest: str | None = None) -> "Base":
        """By the settings of an adapter, and the digest that was written beside its tensors."""
        name, revision = config.get("base_model_name_or_path") or None, config.get("revision") or None
        found = SNAPSHOT.search(name.replace("\\", "/").rstrip("/")) if isinstance(name, str) else None
        if found:
            name, revision = found["name"].replace("--", "/"), found["revision"]
        return cls(None if name is None else str(name), None if revision in (None, "main") else str(revision), digest)

    def __str__(self) -> str:
        return repr(self.name) + (f" at revision {self.revision}" if self.revision else "")


def same_base(one: Base, other: Base) -> bool | None:
    """Whether two adapters have one base model; None where their names differ and nothing else is known.

    A digest is of more weight than a name. Where only one has a digest beside its tensors, and where the names differ,
    the weights of a base that lies here are read.
    """
    alike = (one.name, one.revision) == (other.name, other.revision)
    if one.digest is None and other.digest is None and alike:
        return True
    first, second = (base.digest or weights_digest(base.name) for base in (one, other))
    if first is not None and second is not None:
        return first == second
    return True if alike else None


def weights_digest(model: str | None) -> str | None:
    """A digest of the weights in a model's folder; None where it is no folder with weights."""
    if not model:
        return None
    try:
        folder = Path(model).expanduser()
        files = next((found for kind in KINDS if (found := sorted(folder.glob(kind)))), [])
        seen = [(file, file.stat()) for file in files if file.is_file()]  # reading a pipe would wait for ever
        return _digest(tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in seen)) if seen else None
    except (OSError, RuntimeError):  # a folder that cannot be read: its name is all that is known
        return None


@lru_cache(maxsize=64)
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    total = hashlib.blake2b(digest_size=16)
    for file, _, _ in files:
        own = hashlib.blake2b(digest_size=16)
        with open(file, "rb") as content:
            while chunk := content.read(CHUNK):
                own.update(chunk)
        total.update(own.digest())
    return total.hexdigest()

"""The base model of an adapter: its name, and a digest of its weights if they are available."""

import hashlib
import re
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

SNAPSHOT = re.compile(r"models--(?P<name>[^/]+)/snapshots/(?P<revision>[^/]+)$")  # of a folder in the Hub's cache
KINDS = ("*.safetensors", "pytorch_model*.bin")  # weight files; the first kind in a folder counts


class BaseModel(NamedTuple):
    """A base model as an adapter names it, and a digest of its weights if known."""

    name: str | None
    revision: str | None
    digest: str | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], digest: str | None = None) -> "BaseModel":
        """Return the base model of an adapter's settings, with the digest that was written beside its tensors."""
        name, revision = config.get("base_model_name_or_path") or None, config.get("revision") or None
        snapshot = SNAPSHOT.search(name.replace("\\", "/").rstrip("/")) if isinstance(name, str) else None
        if snapshot:
            name, revision = snapshot["name"].replace("--", "/"), snapshot["revision"]
        return cls(None if name is None else str(name), None if revision in (None, "main") else str(revision), digest)

    def __str__(self) -> str:
        return repr(self.name) + (f" at revision {self.revision}" if self.revision else "")


def is_same_base(first: BaseModel, second: BaseModel) -> bool | None:
    """Whether two adapters have the same base model; None if their names differ and nothing else is known.

    A digest decides before a name. If only one adapter has a digest, or if the names differ, the weights of a base
    model on this machine are read.
    """
    alike = (first.name, first.revision) == (second.name, second.revision)
    if first.digest is None and second.digest is None and alike:
        return True
    digests = [base.digest or weights_digest(base.name) for base in (first, second)]
    if None not in digests:
        return digests[0] == digests[1]
    return True if alike else None


def weights_digest(model: str | None) -> str | None:
    """Return a digest of the weights in a model's folder, or None if it is no folder with weights."""
    if not model:
        return None
    try:
        folder = Path(model).expanduser()
        files = next((files for kind in KINDS if (files := sorted(folder.glob(kind)))), [])
        stats = [(file, file.stat()) for file in files if file.is_file()]  # reading a pipe would never end
        return _hash_files(tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in stats)) if stats else None
    except (OSError, RuntimeError):  # an unreadable folder
        return None


@lru_cache(maxsize=64)
def _hash_files(files: tuple[tuple[Path, int, int], ...]) -> str:
    total = hashlib.blake2b(digest_size=16)
    for file, _, _ in files:
        with open(file, "rb") as content:
            total.update(hashlib.file_digest(content, partial(hashlib.blake2b, digest_size=16)).digest())
    return total.hexdigest()

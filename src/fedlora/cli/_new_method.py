"""The skeleton of a new method and its test; no other file needs an edit."""

import re
from importlib.resources import files
from pathlib import Path
from string import Template

from fedlora.files import write
from fedlora.methods import METHODS

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def write_method(name: str, paper: str | None = None, root: Path = Path(".")) -> list[Path]:
    """Write ``src/fedlora/methods/NAME.py`` and ``tests/methods/test_NAME.py`` below ``root``, a checkout."""
    if not NAME.fullmatch(name):
        raise ValueError(
            f"a method cannot be called {name!r}; its name is lower-case words joined by '-', e.g. fed-svd."
        )
    module = name.replace("-", "_")
    source, tests = root / "src" / "fedlora" / "methods", root / "tests" / "methods"
    for folder in (source, tests):
        if not folder.is_dir():
            raise ValueError(
                f"{str(root)!r} is no checkout of fedlora: it has no {folder.relative_to(root)}; set --root."
            )
    paths = [source / f"{module}.py", tests / f"test_{module}.py"]
    taken = next((path for path in paths if path.exists()), None)
    if taken or name in METHODS.names():
        raise ValueError(f"there is a method {name!r} already{f' ({taken})' if taken else ''}; choose another name.")
    words = {
        "title": name, "module": module, "paper": paper or "https://",
        "class": "".join(word.capitalize() for word in name.split("-")),
    }  # fmt: skip
    texts = [
        Template((files("fedlora.cli") / "templates" / f"{kind}.py.txt").read_text(encoding="utf-8")).substitute(words)
        for kind in ("method", "test_method")
    ]
    for path, text in zip(paths, texts, strict=True):
        write(path, text.encode())
    return paths

"""A federation's configuration as a complete Flower app, ready for ``flwr run``."""

import re
from pathlib import Path

import tomli_w

from fedlora.files import check_new_folder, write
from fedlora.runs.config import Config
from fedlora.schema import ConfigError, dumps

APP = '''"""This federation's {kind} app; {note}."""

from pathlib import Path

from fedlora.flower import {kind}_app

app = {kind}_app(Path(__file__).with_name("config.toml"))
'''
NOTES = {
    "client": "settings of a client's own machine are in its node's configuration",
    "server": "it keeps the run in the folder ``out`` of the run's configuration",
}


def write_app(folder: str | Path, config: Config, out: str | Path | None = None) -> Path:
    """Write the app into a new folder, and return it: ``pyproject.toml``, and a package with both apps and the config.

    The server keeps the run in ``out``; ``flwr run -c 'out="..."'`` overrides it. The app has no dependencies: every
    machine has fedlora installed, and Flower installs nothing when a message arrives. Raises ``ValueError`` if the
    folder is not empty.
    """
    if config.party:
        raise ConfigError(
            "the configuration has [[party]] tables, which are for a rehearsal in one process; leave them out, and put "
            "each party's settings into its node's configuration."
        )
    path = check_new_folder(folder)
    name = re.sub(r"[^a-z0-9]+", "_", path.name.lower()).strip("_") or "federation"
    name = name if name[0].isalpha() else f"app_{name}"
    title = f"{config.method.title} for {config.clients.members} parties, by fedlora"
    components = {f"{kind}app": f"{name}.{kind}_app:app" for kind in ("server", "client")}
    flower = {"publisher": "fedlora", "components": components, "config": {"out": str(out or f"runs/{path.name}")}}
    table = {
        "build-system": {"requires": ["hatchling"], "build-backend": "hatchling.build"},
        "project": {
            "version": "1.0.0", "license": "Apache-2.0", "dependencies": [],
            "name": name.replace("_", "-"), "description": title,
        },
        "tool": {"flwr": {"app": flower}},
    }  # fmt: skip
    write(path / "pyproject.toml", tomli_w.dumps(table).encode())
    files = {f"{kind}_app.py": APP.format(kind=kind, note=note) for kind, note in NOTES.items()}
    files |= {"__init__.py": "", "config.toml": dumps(config.table)}
    for file, text in files.items():
        write(path / name / file, text.encode())
    return path

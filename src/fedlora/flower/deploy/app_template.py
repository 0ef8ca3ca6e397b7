"""A federation's configuration as a complete Flower app, ready for ``flwr run``."""

import re
from pathlib import Path

import tomli_w

from fedlora.files import check_new_folder, write
from fedlora.runs.config import Config, dumps

PYPROJECT = {
    "build-system": {"requires": ["hatchling"], "build-backend": "hatchling.build"},
    "project": {"version": "1.0.0", "license": "Apache-2.0", "dependencies": []},
}
CLIENT = '''"""This federation's client app; settings of a client's own machine are in its node's configuration."""

from pathlib import Path

from fedlora.flower import client_app

app = client_app(Path(__file__).with_name("config.toml"))
'''
SERVER = '''"""This federation's server app; it keeps the run in the folder ``out`` of the run's configuration."""

from pathlib import Path

from fedlora.flower import server_app

app = server_app(Path(__file__).with_name("config.toml"))
'''


def write_app(folder: str | Path, config: Config, out: str | Path | None = None) -> Path:
    """Writes the app into a new folder: ``pyproject.toml`` and a package with both apps and ``config.toml``.

    ``out`` is where the server will keep the run; ``flwr run -c 'out="..."'`` sets another. Dependencies are empty:
    every machine has fedlora installed, and Flower installs nothing when a message comes. Returns the folder;
    ``ValueError`` where it would overwrite something.
    """
    path = check_new_folder(folder)
    name = re.sub(r"[^a-z0-9]+", "_", path.name.lower()).strip("_") or "federation"
    name = name if name[0].isalpha() else f"app_{name}"
    title = f"{config.method.title} for {config.clients.members} parties, by fedlora"
    project = {**PYPROJECT["project"], "name": name.replace("_", "-"), "description": title}
    components = {"serverapp": f"{name}.server_app:app", "clientapp": f"{name}.client_app:app"}
    flower = {"publisher": "fedlora", "components": components, "config": {"out": str(out or f"runs/{path.name}")}}
    table = {"build-system": PYPROJECT["build-system"], "project": project, "tool": {"flwr": {"app": flower}}}
    write(path / "pyproject.toml", tomli_w.dumps(table).encode())
    for file, text in (("__init__.py", ""), ("client_app.py", CLIENT), ("server_app.py", SERVER)):
        write(path / name / file, text.encode())
    write(path / name / "config.toml", dumps(config.table).encode())
    return path

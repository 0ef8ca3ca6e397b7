"""Write FedLLM-Bench's rows, one list a client in a JSON file, as train.jsonl and test.jsonl with a column client.

    python examples/leaderboards/fed_aya.py aya_38c_25k.json fed-aya

The file holds a list of lists, or an object whose values are the lists. Of every client, each tenth row is a test row,
and the last row of a client with fewer than ten.
"""

import json
import sys
from pathlib import Path
from typing import Any


def read_clients(path: Path) -> list[list[dict[str, Any]]]:
    """Return each client's rows. Raises ``ValueError`` for another form, or a client with fewer than two rows."""
    content = json.loads(path.read_text(encoding="utf-8"))
    clients = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(clients, list) or not clients or not all(isinstance(rows, list) for rows in clients):
        raise ValueError(f"{str(path)!r} holds no list of rows for each client; name a file of FedLLM-Bench.")
    for number, rows in enumerate(clients):
        if len(rows) < 2 or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"client {number} of {str(path)!r} needs at least two rows, each an object; correct them.")
    return clients


def write_splits(clients: list[list[dict[str, Any]]], folder: Path) -> None:
    """Write the rows of all clients to ``train.jsonl`` and ``test.jsonl`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with (
        open(folder / "train.jsonl", "w", encoding="utf-8") as train,
        open(folder / "test.jsonl", "w", encoding="utf-8") as test,
    ):
        for number, rows in enumerate(clients):
            last = len(rows) - 1 if len(rows) < 10 else -1
            for i, row in enumerate(rows):
                line = json.dumps({**row, "client": f"{number:02d}"}, ensure_ascii=False)
                (test if i % 10 == 9 or i == last else train).write(line + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python fed_aya.py FILE.json FOLDER")
    write_splits(read_clients(Path(sys.argv[1])), Path(sys.argv[2]))

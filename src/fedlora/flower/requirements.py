"""What a client with its own trainer takes from the server, and what it requires of a run.

It is read in the process that Flower starts for each message, and imports no torch.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from fedlora.registry import unknown
from fedlora.schema import ConfigError, Table, flatten_table

SENT = (  # the sections that clients need; the others are the server's own
    "model", "task", "clients", "adapter", "method", "training", "evaluation", "server", "privacy", "flower",
    "compression", "attack",
)  # fmt: skip
NUMBERS = ("rounds", "seed")
CODE = re.compile(r"\w[\w.]*:\w[\w.]*")  # "package.module:Class"


class RefusedTermsError(ValueError):
    """The client does not take part in a run of these settings or this model. The text has no row, so it is sent."""


def check_terms(table: Table, requires: Mapping[str, Any], accepts: Collection[str]) -> None:
    """Raise ``RefusedTermsError`` for settings that break a client's requirements, or name code it did not accept.

    ``requires`` has values of settings, by dotted keys. ``accepts`` has paths ``"package.module:Class"`` of plug-ins,
    and ``"attack"`` if the run may have one.
    """
    if odd := sorted(table.keys() - {*SENT, *NUMBERS}):
        raise RefusedTermsError(f"the server set {odd[0]!r}, which is no setting of clients")
    if table.get("task", {}).get("name") != "objects" or table["clients"].get("partition") != {"name": "own"}:
        raise RefusedTermsError("the server's run is not one of clients with their own trainers and data")
    if "attack" in table and "attack" not in accepts:
        raise RefusedTermsError("the run lets clients attack it; a client that plays along says accepts=['attack']")
    flat = flatten_table({key: x for key, x in table.items() if key not in ("model", "task")})
    for key, value in flat.items():
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str) and CODE.fullmatch(name) and name not in accepts:
                raise RefusedTermsError(
                    f"the server set {key} = {name!r}, which would import code here; a client that has it says "
                    f"accepts=[{name!r}]"
                )
    for key, value in requires.items():
        if flat.get(key) != value or isinstance(flat.get(key), bool) != isinstance(value, bool):
            raise RefusedTermsError(f"this client requires {key} = {value!r}, and the run has {flat.get(key)!r}")


def check_requirements(requires: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` unless the requirements are settings of clients, by dotted keys."""
    for key in requires:
        section, dot, _ = key.partition(".")
        if not dot or section not in SENT:
            example = "privacy.level"
            raise ConfigError(
                f"requires has {key!r}; it is a setting by its dotted key, such as {example!r}."
                if section in SENT
                else unknown("section", section, SENT, "sections of settings that clients have")
            )

"""Commands for a federation over Flower: certs."""

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from fedlora.cli.speech import say

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Federations over Flower, each party at home.")

HANDOUT = """
What goes where:
{places}
Send each party's folder to that party alone: whoever holds NAME.key can take part as NAME.

On the server, in {folder}/server:
  flower-superlink --ssl-ca-certfile ca.crt --ssl-certfile server.pem --ssl-keyfile server.key \\
      --enable-supernode-auth --host {listen} --port 8443 --database state.db
Flower asks for no login where runs are started and nodes registered: let only known addresses reach this port.

Once, where the runs are started from; in ~/.flwr/config.toml:
  [superlink.fl]
  address = "{address}:8443"
  root-certificates = "{absolute}/ca.crt"
then, for each party:
{register}

At each party, in its folder:
{nodes}
"""
NODE = """  flower-supernode --root-certificates ca.crt --superlink {address}:8443 \\
      --auth-supernode-private-key {name}.key --node-config 'KEY="VALUE"'"""


@app.callback()
def flower() -> None:
    """Federations over Flower, each party at home."""


@app.command()
def certs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for the keys and certificates.")],
    parties: Annotated[str, typer.Option(help="The parties' names, with commas.")],
    hosts: Annotated[
        str, typer.Option(help="Names and addresses by which parties reach the server, with commas.")
    ] = "127.0.0.1,localhost",
    days: Annotated[int, typer.Option(min=1, help="How long the certificates are valid.")] = 365,
) -> None:
    """Make a CA, the server's TLS certificate and a key for each party, and say what goes to whom."""
    names, reached = _listed(parties), _listed(hosts)
    made = _certificates()(folder, names, reached, days)
    typer.echo(_handout(made, names, reached).strip("\n"))
    say(f"Valid for {days} days. The keys are written once and nowhere else.")


def _certificates():
    try:
        import flwr  # noqa: F401 - the commands below are Flower's

        from fedlora.flower.certs import certificates
    except ImportError as error:
        raise ValueError(
            f"{error.name or error} is missing, which Flower needs; run `pip install 'fedlora[flower]'`."
        ) from error
    return certificates


def _listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _handout(folder: Path, names: list[str], hosts: list[str]) -> str:
    address = f"[{hosts[0]}]" if ":" in hosts[0] else hosts[0]
    keys = folder / "server" / "keys"
    local = set(hosts) <= {"127.0.0.1", "localhost", "::1"}
    return HANDOUT.format(
        folder=folder,
        absolute=folder.absolute(),
        address=address,
        listen="127.0.0.1" if local else "0.0.0.0",
        places=_places(folder, names),
        register="\n".join(f"  flwr supernode register {quote(f'{keys}/{name}.key.pub')} fl" for name in names),
        nodes="\n".join(NODE.format(address=address, name=name) for name in names),
    )


def _places(folder: Path, names: list[str]) -> str:
    rows = [
        ("stays here, offline", f"{folder}/ca.key", ""),
        ("the server", f"{folder}/server/", "ca.crt, server.pem, server.key, keys/"),
        *((f"party {name}", f"{folder}/parties/{name}/", f"ca.crt, {name}.key, {name}.key.pub") for name in names),
    ]
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"  {who:<{first}}  {where:<{second}}  {what}".rstrip() for who, where, what in rows)

"""Commands for a federation over Flower: init, local, result, certs."""

from pathlib import Path
from shlex import quote
from typing import Annotated, Optional

import typer

from fedlora.cli._options import ConfigPath, Json, Override, answer, names, numbered, say
from fedlora.cli._plain import Command, Group

app = typer.Typer(
    cls=Group, no_args_is_help=True, rich_markup_mode=None, help="Federations over Flower, each party at home."
)

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

At each party, in its folder, with its own rows and columns:
{nodes}
Two nodes on one machine need --port NUMBER, another for each.
"""
NODE = """  flower-supernode --root-certificates ca.crt --superlink {address}:8443 \\
      --auth-supernode-private-key {name}.key \\
      --node-config 'client={number} state="state" task.data="rows.csv" task.text="text" task.label="label"'"""


@app.callback()
def flower() -> None:
    """Federations over Flower, each party at home."""


@app.command(cls=Command)
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for the app.")],
    config: Annotated[Path, typer.Option(help="The federation, a TOML file.")],
    override: Override = None,
    out: Annotated[Optional[Path], typer.Option(help="Where the server keeps the run [default: runs/DIR].")] = None,  # noqa: UP045
) -> None:
    """Write a complete Flower app of a configuration, ready for `flwr run`."""
    _extra()
    from fedlora.flower.deploy.app_template import write_app as write
    from fedlora.runs.config import read

    made = write(folder, read(config, override or []), out)
    typer.echo(f"{made} is a Flower app; start it with `flwr run {made} CONNECTION --stream`.")
    say("Each node says who it is: flower-supernode ... --node-config 'client=0 task.data=\"rows.csv\"'")


@app.command(cls=Command)
def local(
    config: ConfigPath,
    nodes: Annotated[Optional[int], typer.Option(min=1, help="How many parties [default: clients.count].")] = None,  # noqa: UP045
    override: Override = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="A folder for the run; one that was broken off goes on [default: runs/NAME-flower-N]."),
    ] = None,
    parties: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="A TOML file with a [[party]] table for each: what its node's configuration says."),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Without TLS and without node keys.")] = False,
    tls: Annotated[bool, typer.Option("--tls", help="With TLS and a key for each node: the default.")] = False,
    as_json: Json = False,
) -> None:
    """Run a federation over a SuperLink and SuperNodes, all processes of this machine, and stop them all."""
    _extra()
    from fedlora.flower.deploy.local import run_local
    from fedlora.reporting import terminal
    from fedlora.reporting.tables.run import summary as tables
    from fedlora.runs.config import read

    if insecure and tls:
        raise ValueError("--insecure and --tls exclude each other; keep one of them.")
    resolved = read(config, [*(override or []), *([f"clients.count={nodes}"] if nodes else [])])
    out = out or numbered(Path("runs") / f"{config.stem}-flower")
    summary = run_local(resolved, out, parties, insecure, say)
    answer(as_json, summary, lambda: terminal.show(*tables(summary), whole=(f"Folder: {out}",)))


@app.command(cls=Command)
def result(
    config: ConfigPath,
    state: Annotated[Path, typer.Option(help="What the node's configuration calls state.")],
    client: Annotated[int, typer.Option(help="This party's number.")],
    out: Annotated[Path, typer.Option(help="A new folder: a run's, for show and export --client.")],
    run: Annotated[Optional[str], typer.Option(help="Which run [default: the last one].")] = None,  # noqa: UP045
    override: Override = None,
) -> None:
    """Write what this party holds after a run as a run's folder; nothing leaves the machine."""
    _extra()
    from fedlora.flower.deploy.client_result import write_result as write
    from fedlora.runs.config import read

    found = write(read(config, override or []), state, client, out, run)
    typer.echo(f"{out} has client {client}'s own model after round {found['rounds']}.")
    say(f"Next: fedlora export {out} --client {client} --out adapter")


def _extra() -> None:
    """One sentence where Flower is not installed."""
    try:
        import cryptography  # noqa: F401
        import flwr  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"{error.name or error} is missing, which Flower needs; run `pip install 'fedlora[flower]'`."
        ) from error


@app.command(cls=Command)
def certs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for the keys and certificates.")],
    parties: Annotated[str, typer.Option(help="The parties' names, with commas.")],
    hosts: Annotated[
        str, typer.Option(help="Names and addresses by which parties reach the server, with commas.")
    ] = "127.0.0.1,localhost",
    days: Annotated[int, typer.Option(min=1, help="How long the certificates are valid.")] = 365,
) -> None:
    """Make a CA, the server's TLS certificate and a key for each party, and say what goes to whom."""
    _extra()
    from fedlora.flower.deploy.certificates import create_certificates

    called, reached = names(parties), names(hosts)
    made = create_certificates(folder, called, reached, days)
    typer.echo(_handout(made, called, reached).strip("\n"))
    say(f"Valid for {days} days. The keys are written once and nowhere else.")


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
        nodes="\n".join(NODE.format(address=address, name=name, number=i) for i, name in enumerate(names)),
    )


def _places(folder: Path, names: list[str]) -> str:
    rows = [
        ("stays here, offline", f"{folder}/ca.key", ""),
        ("the server", f"{folder}/server/", "ca.crt, server.pem, server.key, keys/"),
        *((f"party {name}", f"{folder}/parties/{name}/", f"ca.crt, {name}.key, {name}.key.pub") for name in names),
    ]
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"  {who:<{first}}  {where:<{second}}  {what}".rstrip() for who, where, what in rows)

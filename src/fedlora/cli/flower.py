"""Commands for a federation over Flower: init, local, result, certs."""

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from fedlora.cli._options import (
    Command,
    ConfigPath,
    Json,
    Override,
    PlainGroup,
    choose_folder,
    parse_names,
    print_result,
    say,
)  # fmt: skip

app = typer.Typer(
    cls=PlainGroup, no_args_is_help=True, rich_markup_mode=None,
    help="Federations over Flower, each client on its own machine.",
)  # fmt: skip

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


@app.command("init", cls=Command)
def init_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for the app.")],
    config: Annotated[Path, typer.Option(help="The federation, a TOML file.")],
    override: Override = None,
    out: Annotated[Path | None, typer.Option(help="The server's folder for the run [default: runs/DIR].")] = None,
) -> None:
    """Write a complete Flower app of a configuration, ready for `flwr run`."""
    _check_flower()
    from fedlora.flower.deploy.app_template import write_app
    from fedlora.runs.config import read

    path = write_app(folder, read(config, override or []), out)
    typer.echo(f"{path} is a Flower app; start it with `flwr run {path} CONNECTION --stream`.")
    say("Each node says who it is: flower-supernode ... --node-config 'client=0 task.data=\"rows.csv\"'")


@app.command("local", cls=Command)
def local_command(
    config: ConfigPath,
    nodes: Annotated[int | None, typer.Option(min=1, help="Number of clients [default: clients.count].")] = None,
    override: Override = None,
    out: Annotated[
        Path | None,
        typer.Option(help="A folder for the run; one that was broken off continues [default: runs/NAME-flower-N]."),
    ] = None,
    parties: Annotated[
        Path | None, typer.Option(help="A TOML file with a [[party]] table for each client: the settings of its node.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Without TLS and without node keys.")] = False,
    tls: Annotated[bool, typer.Option("--tls", help="With TLS and a key for each node: the default.")] = False,
    as_json: Json = False,
) -> None:
    """Run a federation over a SuperLink and SuperNodes, all processes of this machine, and stop them all."""
    _check_flower()
    from fedlora.flower.deploy.local import run_local
    from fedlora.reporting.tables.run import tabulate_summary
    from fedlora.runs.config import read

    if insecure and tls:
        raise ValueError("--insecure and --tls exclude each other; keep one of them.")
    resolved = read(config, [*(override or []), *([f"clients.count={nodes}"] if nodes else [])])
    out = out or choose_folder(f"{config.stem}-flower")
    summary = run_local(resolved, out, parties, insecure, say)
    print_result(as_json, summary, lambda: tabulate_summary(summary), [f"Folder: {out}"])


@app.command("result", cls=Command)
def result_command(
    config: ConfigPath,
    state: Annotated[Path, typer.Option(help="The setting state of the node's configuration.")],
    client: Annotated[int, typer.Option(help="This client's number.")],
    out: Annotated[Path, typer.Option(help="A new folder of a run, for show and export --client.")],
    run: Annotated[str | None, typer.Option(help="The run [default: the last one].")] = None,
    override: Override = None,
) -> None:
    """Write this client's state after a run as a run's folder; nothing leaves the machine."""
    _check_flower()
    from fedlora.flower.deploy.client_result import write_result
    from fedlora.runs.config import read

    result = write_result(read(config, override or []), state, client, out, run)
    typer.echo(f"{out} has client {client}'s own model after round {result['rounds']}.")
    say(f"Next: fedlora export {out} --client {client} --out adapter")


def _check_flower() -> None:
    try:
        import cryptography  # noqa: F401
        import flwr  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"{error.name or error} is missing, which Flower needs; run `pip install 'fedlora[flower]'`."
        ) from error


@app.command("certs", cls=Command)
def certs_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for the keys and certificates.")],
    parties: Annotated[str, typer.Option(help="The clients' names, with commas.")],
    hosts: Annotated[
        str, typer.Option(help="Names and addresses of the server, as clients reach it, with commas.")
    ] = "127.0.0.1,localhost",
    days: Annotated[int, typer.Option(min=1, help="Validity of the certificates.")] = 365,
) -> None:
    """Make a CA, the server's TLS certificate and a key for each client, and print the recipient of each file."""
    _check_flower()
    from fedlora.flower.deploy.certificates import create_certificates

    clients, addresses = parse_names(parties), parse_names(hosts)
    path = create_certificates(folder, clients, addresses, days)
    typer.echo(_format_handout(path, clients, addresses).strip("\n"))
    say(f"Valid for {days} days. The keys are written once and nowhere else.")


def _format_handout(folder: Path, names: list[str], hosts: list[str]) -> str:
    address = f"[{hosts[0]}]" if ":" in hosts[0] else hosts[0]
    keys = folder / "server" / "keys"
    is_local = set(hosts) <= {"127.0.0.1", "localhost", "::1"}
    places = [
        ("stays here, offline", f"{folder}/ca.key", ""),
        ("the server", f"{folder}/server/", "ca.crt, server.pem, server.key, keys/"),
        *((f"party {name}", f"{folder}/parties/{name}/", f"ca.crt, {name}.key, {name}.key.pub") for name in names),
    ]
    first, second = (max(len(row[column]) for row in places) for column in (0, 1))
    return HANDOUT.format(
        folder=folder,
        absolute=folder.absolute(),
        address=address,
        listen="127.0.0.1" if is_local else "0.0.0.0",
        places="\n".join(f"  {who:<{first}}  {path:<{second}}  {names}".rstrip() for who, path, names in places),
        register="\n".join(f"  flwr supernode register {quote(f'{keys}/{name}.key.pub')} fl" for name in names),
        nodes="\n".join(NODE.format(address=address, name=name, number=i) for i, name in enumerate(names)),
    )

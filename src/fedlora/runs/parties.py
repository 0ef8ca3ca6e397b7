"""Build the rehearsal of a federation: parties with their own files and columns, played in one process on one model."""

from collections.abc import Sequence
from dataclasses import replace

from fedlora.engines.federation import Federation
from fedlora.engines.inputs import describe_changes, digest_model
from fedlora.runs.build import build_federation, check_row_tokens, load_model, load_rows, prepare_attack
from fedlora.runs.sections import Sections
from fedlora.schema import ConfigError
from fedlora.training.reference import add_reference


def build_rehearsal(config: Sections, parties: Sequence[Sections]) -> Federation:
    """Load the model once and the rows of every party, and build the server's federation with the parties' own.

    ``parties`` has the configuration of each client. As in a deployment, the server has no rows. Raises
    ``ConfigError`` with the party's file if its rows cannot be read, or its pretrained model is another one.
    """
    f = build_federation(config, combines=True)
    own = {}
    for client, party in enumerate(parties):
        title = config.party[client].title(client)
        try:
            own[client] = _build_party(config, f, party, client, title)
        except (ValueError, OSError) as error:
            raise ConfigError(f"{title}: {error}") from error
    return replace(f, parties=own)


def _build_party(config: Sections, f: Federation, party: Sections, client: int, title: str) -> Federation:
    """Return the federation as one party has it: its own task and rows, on the model of ``f``."""
    if party.model.name != config.model.name:
        _check_same_model(config, f, party)
    data, shards, names = load_rows(party, client, False)
    assert data is not None
    check_row_tokens(party, f.model.network, data)
    data = add_reference(f.model, party.task, data, config.evaluation)
    data = replace(data, notes=tuple(f"{title}: {note}" for note in data.notes))
    return replace(f, task=party.task, data=data, shards=shards, label_names=names, attack=prepare_attack(party))


def _check_same_model(config: Sections, f: Federation, party: Sections) -> None:
    """Raise ``ConfigError`` if a party's copy of the pretrained model differs from that of the rehearsal."""
    copy = load_model(party, None, {}, f.label_names)
    if changes := describe_changes(digest_model(f), digest_model(copy)):
        raise ConfigError(
            f"its model, {party.model.name!r}, is not {config.model.name!r}, which the rehearsal loads: "
            f"{'; '.join(changes)}; set model.name to a copy of the same model."
        )

"""The server's instructions to a client, sent beside the adapter: the method, the round, the base updates."""

import json
from dataclasses import asdict, dataclass

from flwr.app import ConfigRecord, Message

from fedlora.training.recipe import Recipe

RECORD, BASE_UPDATES = "fedlora", "fedlora.base_updates"  # records of a message: instructions, missing base updates
PROTOCOL = 1


@dataclass(frozen=True)
class Instructions:
    """The instructions of one message."""

    recipe: Recipe
    round: int  # from 0
    seed: int  # of this client in this round
    series: str  # names the run: a node discards what it kept of another run
    arrays: str  # the record with the adapter
    first: int = 0  # the message has the base updates after the first ``first`` ones,
    last: int = 0  # up to number ``last``

    def record(self) -> ConfigRecord:
        """Return a record for the message."""
        rest = {key: value for key, value in vars(self).items() if key != "recipe"}
        return ConfigRecord({**rest, "recipe": json.dumps(asdict(self.recipe)), "protocol": PROTOCOL})

    @classmethod
    def read(cls, message: Message) -> "Instructions | None":
        """Return a message's instructions, or None if the server's strategy is not fedlora's."""
        if RECORD not in message.content:
            return None
        values = dict(message.content[RECORD])
        if values.pop("protocol", None) != PROTOCOL:
            raise ValueError(
                "the server's fedlora speaks another protocol than this node's; install one version at both."
            )
        recipe = Recipe(**json.loads(values["recipe"]))
        check_method_name(recipe)
        return cls(**{**values, "recipe": recipe})


def check_method_name(recipe: Recipe) -> None:
    """Raise ``ValueError`` if the method is named by its place: a client imports nothing that a message names."""
    if ":" in recipe.method:
        raise ValueError(
            f"the method is {recipe.method!r}, but what a server names is imported by every client; name an installed "
            "method, see `fedlora methods`."
        )

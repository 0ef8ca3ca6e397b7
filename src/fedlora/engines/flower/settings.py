"""The ``[flower]`` table: how a server deals with parties that are late, away or wrong."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Network:
    """The ``[flower]`` table; in one process it has no effect."""

    min_clients: int = 2  # a round with fewer good uploads waits for more; at most clients.count
    round_timeout: float | None = None  # seconds that a round waits for its slowest client; None: until it has answered
    join_timeout: float = 60.0  # seconds that the first round waits for all parties
    poll: float = 0.3  # seconds between two looks for replies

    def __post_init__(self):
        if self.min_clients < 1:
            raise ValueError(f"flower.min_clients is {self.min_clients}; a round needs at least 1 client.")
        for key in ("round_timeout", "join_timeout", "poll"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise ValueError(f"flower.{key} is {value}; it must be a positive number of seconds.")

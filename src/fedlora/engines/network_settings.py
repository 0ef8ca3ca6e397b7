"""The ``[flower]`` table: timeouts and limits of a server, and secure aggregation."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Network:
    """The ``[flower]`` table; in one process it has no effect."""

    min_clients: int = 2  # a round with fewer good uploads waits for more; at most clients.count
    round_timeout: float = 3600.0  # seconds that a round waits for its slowest client
    join_timeout: float = 60.0  # seconds that the first round waits for all to connect, longer while one still loads
    poll: float = 0.3  # seconds between two requests for replies
    retry: float = 10.0  # seconds until a client that failed is asked again
    repair_timeout: float = 60.0  # seconds with too few clients until a run ends
    secure_aggregation: bool = False  # the server learns the sum of the uploads, and no upload
    secure_threshold: int | None = None  # clients of a round that must stay to its end; None: two thirds, and one
    secure_range: float = 16.0  # the largest absolute value that a client can send

    def __post_init__(self):
        if self.min_clients < 1:
            raise ValueError(f"flower.min_clients is {self.min_clients}; a round needs at least 1 client.")
        for key in ("round_timeout", "join_timeout", "poll", "retry", "repair_timeout"):
            value = getattr(self, key)
            if not value > 0:
                raise ValueError(f"flower.{key} is {value}; it must be a positive number of seconds.")
        if not 0 < self.secure_range < 2**20:
            raise ValueError(f"flower.secure_range is {self.secure_range}; it lies above 0 and below 2^20.")

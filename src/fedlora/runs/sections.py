"""The sections of a configuration, a dataclass each; nothing is checked here."""

from dataclasses import dataclass, field
from typing import Literal

from fedlora.engines.checkpoint import CheckpointSettings
from fedlora.engines.clients import Clients
from fedlora.engines.comm.compression import Compression
from fedlora.engines.network_settings import Network
from fedlora.engines.server_optimizer import ServerOptimizer
from fedlora.methods._base import Method
from fedlora.runs.trackers import Track
from fedlora.schema import PerMachine, Table
from fedlora.security.attacks._base import Attack
from fedlora.security.privacy import Privacy
from fedlora.security.robust._base import RobustAggregator
from fedlora.security.validation import Validation
from fedlora.tasks._base import Task
from fedlora.training.device import Engine
from fedlora.training.evaluation import Evaluation
from fedlora.training.local import Training


@dataclass(frozen=True)
class ModelTable:
    """The ``[model]`` table."""

    name: PerMachine[str]  # a hub id or a local folder
    # Modules to adapt: names, "all-linear" or a regular expression of paths; None: the query and value projections.
    targets: str | list[str] | None = None
    head: list[str] | None = None  # modules trained in full; None: what the task put on top
    start: str | None = None  # a PEFT adapter folder, held by every party, that adapters and head begin with
    same_base: PerMachine[bool | None] = None  # true: the base of ``start`` is this model, whatever it is called there
    quantize: Literal["4bit", "8bit"] | None = None  # hold the base in so many bits, on a GPU, through bitsandbytes
    overlay: bool | None = (
        None  # keep base updates beside the base weights; None: where these are multiplied in bfloat16
    )


@dataclass(frozen=True)
class Sections:
    """The sections of a run, and its resolved TOML ``table``: every default written out, enough to repeat the run."""

    model: ModelTable
    task: Task
    method: Method
    clients: Clients = field(default_factory=Clients)
    training: Training = field(default_factory=Training)
    evaluation: Evaluation = field(default_factory=Evaluation)
    server: ServerOptimizer = field(default_factory=ServerOptimizer)
    privacy: Privacy = field(default_factory=Privacy)
    engine: Engine = field(default_factory=Engine)
    flower: Network = field(default_factory=Network)
    validation: Validation = field(default_factory=Validation)
    robust: RobustAggregator | None = None
    attack: Attack | None = None
    compression: Compression = field(default_factory=Compression)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    track: Track = field(default_factory=Track)
    rounds: int = 20
    seed: int = 0
    table: Table = field(init=False, repr=False)

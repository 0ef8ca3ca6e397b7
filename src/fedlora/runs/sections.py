"""The sections of a configuration: the class of each, and the dataclass that holds them all."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fedlora.adapters import ADAPTERS
from fedlora.engines.checkpoint import CheckpointSettings
from fedlora.engines.clients import Clients
from fedlora.engines.comm.compression import Compression
from fedlora.engines.network_settings import Network
from fedlora.engines.server_optimizer import ServerOptimizer
from fedlora.methods import METHODS
from fedlora.methods._base import Method
from fedlora.methods.fedit import FedIT
from fedlora.runs.trackers import Track
from fedlora.schema import PerMachine, Table
from fedlora.security.attacks import ATTACKS
from fedlora.security.attacks._base import Attack
from fedlora.security.privacy import Privacy
from fedlora.security.robust import ROBUST_RULES
from fedlora.security.robust._base import RobustAggregator
from fedlora.security.validation import Validation
from fedlora.tasks import TASKS
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
    head: list[str] | None = None  # modules trained in full; None: the head that the task adds
    start: str | None = None  # a PEFT adapter folder with the initial adapters and head; every client needs it
    same_base: PerMachine[bool | None] = None  # true: ``start`` belongs to this model, even if it names another
    quantize: Literal["4bit", "8bit"] | None = None  # the precision of the base, on a GPU, through bitsandbytes
    # Keep base updates beside the base weights; None: if these are used in bfloat16. false adds them in float32, a
    # weight at a time, and rounds the sum to the weight's precision.
    overlay: bool | None = None
    attention: PerMachine[Literal["auto", "sdpa", "eager", "flash_attention_2"]] = "auto"  # auto: transformers' choice


EMBEDDED = ("digits", "demo-vit")  # names of data and models that ship with the library


@dataclass(frozen=True)
class Party:
    """One ``[[party]]`` table: the settings in which one party of a rehearsal differs from the rest of the file."""

    task: dict[str, Any] = field(default_factory=dict)  # settings that a machine may have of its own, as ``model``
    model: dict[str, Any] = field(default_factory=dict)
    file: str | None = None  # where they were read from, for messages

    def title(self, client: int) -> str:
        """Return the name of the party in messages: its file, or its number."""
        if self.file is None:
            return f"party {client}"
        path = Path(self.file)
        return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else self.file


# Section -> the dataclass of its settings, or the registry of the classes that its ``name`` selects from. The order is
# that of config.toml; an adapter is part of the method.
SECTIONS: Mapping[str, Any] = {
    "model": ModelTable, "task": TASKS, "clients": Clients, "adapter": ADAPTERS, "method": METHODS,
    "training": Training, "evaluation": Evaluation, "server": ServerOptimizer, "privacy": Privacy, "engine": Engine,
    "flower": Network, "validation": Validation, "robust": ROBUST_RULES, "attack": ATTACKS,
    "compression": Compression, "checkpoint": CheckpointSettings,
}  # fmt: skip
OPTIONAL = ("adapter", "robust", "attack")  # sections without a default


@dataclass(frozen=True)
class Sections:
    """The objects of all sections, and ``table``: the TOML of the run with all defaults, enough to repeat it."""

    model: ModelTable
    task: Task
    method: Method = field(default_factory=FedIT)
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
    party: tuple[Party, ...] = ()  # parties with own data that this process plays; see runs/parties.py
    rounds: int = 20
    seed: int = 0
    compare: Mapping[str, Any] = field(default_factory=dict)  # label -> settings of that method in a comparison
    table: Table = field(init=False, repr=False)

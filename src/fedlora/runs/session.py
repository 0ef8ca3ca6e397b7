"""A federation around the caller's own training loop, which trains one client at a time."""

import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.engines.checkpoint import is_extendable
from fedlora.engines.client_turn import ClientTurn
from fedlora.engines.in_process import InProcess
from fedlora.engines.loop import Reply, explain_overflow
from fedlora.engines.record import RoundRecord
from fedlora.engines.trainers import ClientInfo, Evaluate, LazyShards, OwnEvaluator, number_rows, to_scores
from fedlora.files import write
from fedlora.rounds import public_leaves, select_leaves_to_train
from fedlora.runs.build import build_own_federation
from fedlora.runs.callbacks import Callbacks
from fedlora.runs.config import Config, build
from fedlora.runs.federate import build_clients, own_config
from fedlora.runs.file_names import CONFIG
from fedlora.runs.folder import RunFolder
from fedlora.runs.interrupt import Stop
from fedlora.runs.objects import task_table
from fedlora.runs.result import Rounds
from fedlora.runs.run import Result, build_recorder, finish_run
from fedlora.schema import ConfigError, read_table
from fedlora.tasks.metrics.scores import Scores
from fedlora.training.frozen import Frozen
from fedlora.training.local import Training, replace_leaves
from fedlora.training.model import Model
from fedlora.training.open_model import open_model
from fedlora.training.own_trainer import check_turn, read_end
from fedlora.training.ranks import (
    average,
    average_tree,
    barrier,
    check_equal,
    copy_from_first_rank,
    is_first_rank,
    share_failure,
)
from fedlora.training.sharding import check_wrappers
from fedlora.training.train_mode import set_train_mode
from fedlora.types import Tree, Turn, Work

OPEN = 2**31 - 1  # the number of rounds of a session that was not given one
UNUSED = "it had no turn in this session"


@dataclass
class OpenTurn:
    """The turn of the client whose block is open."""

    turn: ClientTurn
    start: Tree
    trained: Mapping[str, frozenset[str]]
    loss: float | None = None


class Session(Rounds):
    """A federation whose training loop is yours: plain PyTorch, Lightning, Accelerate, or anything else.

        session = fedlora.Session(model, method="flora", clients=3)
        for _ in range(10):
            for k in session.cohort():
                with session.client(k, examples=len(data[k])) as model:
                    train(model, data[k])
            session.aggregate()
        session.save("runs/mine")

    Args:
        model: a ``PeftModel`` with one LoRA or VeRA, or a network with an adapter of ``fedlora.attach``. It is the
            model of all clients in turn; the leaves of one client are set before its block and read after it.
        method: a method's name, its table, or the method itself.
        clients: their number, or the ``[clients]`` table.
        rounds: their number, if it is known; privacy with a target ε needs it.
        seed: of the run, for cohorts and for the methods' draws.
        evaluate: ``evaluate(network, client)`` returns metrics of a client's model, see ``fedlora.federate``. None: the
            records have no scores.
        metric: the main metric of ``evaluate``. ``higher``: whether higher values are better.
        callbacks: see ``fedlora.Callback``.
        sections: further tables of the configuration, such as ``compression`` or ``robust``.

    Raises ``ConfigError`` for a method that cannot work here, with the reason.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Any = "fedit",
        clients: Any = 2,
        *,
        rounds: int | None = None,
        seed: int = 0,
        evaluate: Evaluate | None = None,
        metric: str = "loss",
        higher: bool | None = None,
        callbacks: Sequence[Any] = (),
        **sections: Any,
    ) -> None:
        opened = open_model(model)
        task = task_table(metric, higher, {"session": "open" if rounds is None else "given"})
        config = own_config(
            opened, task, method, build_clients(clients), rounds or OPEN, seed, Training(), sections, None
        )
        if rounds is None and not is_extendable(config.table):
            raise ConfigError(
                "privacy.target_epsilon is spread over all rounds; give the session their number, rounds=."
            )
        with share_failure():
            self._begin(config, opened, evaluate, callbacks, None)

    @classmethod
    def load(
        cls, folder: str | Path, model: nn.Module, evaluate: Evaluate | None = None, callbacks: Sequence[Any] = ()
    ) -> "Session":
        """Return the session that ``save`` wrote to a folder, on a model that is built in the same way.

        The next rounds have the same bits as without the break. Raises ``ConfigError`` if the folder holds no session,
        and ``ValueError`` if the model has another base or adapter.
        """
        path = Path(folder).expanduser()
        with share_failure(), copy_from_first_rank(path) as saved:
            if not (saved / CONFIG).exists():
                raise ConfigError(f"{str(path)!r} holds no session: it has no {CONFIG}; name a folder that save wrote.")
            table = read_table(saved / CONFIG)
            length = table.get("task", {}).get("objects", {}).get("session")
            if length is None:
                raise ConfigError(f"{str(path)!r} holds a run and no session; go on with it by fedlora.resume.")
            config = build({**table, "rounds": OPEN} if length == "open" else table)
            session = cls.__new__(cls)
            session._begin(config, open_model(model), evaluate, callbacks, saved)
            session._saved_to = path
        return session

    def _begin(
        self, config: Config, model: Model, evaluate: Evaluate | None, callbacks: Sequence[Any], saved: Path | None
    ) -> None:
        model.synchronize()
        self.config, self._evaluate, self._rows = config, evaluate, dict[int, int]()
        place, self._exit = Path(mkdtemp(prefix="fedlora-session-")), ExitStack()
        self._folder = folder = place / "run"
        if saved is None:
            folder.mkdir()
            (folder / "metrics.jsonl").touch()
        else:
            shutil.copytree(saved, folder)
        # A client's number of rows is given with its turn; before its first turn it counts as 1.
        rows = self._rows
        shards = LazyShards(config.clients.count, lambda client: number_rows(rows.get(client, 1)))
        self._federation = build_own_federation(config, model, shards)
        try:
            self._recorder = build_recorder(
                config,
                self._federation,
                folder,
                Stop(),
                saved is not None,
                Callbacks(callbacks if is_first_rank() else ()),
            )
        except ValueError as error:  # names the caller's folder, instead of the copy
            raise type(error)(str(error).replace(str(folder), str(saved))) from error
        self._exit.enter_context(self._recorder.writing())
        self._exit.callback(shutil.rmtree, place, ignore_errors=True)
        weakref.finalize(self, self._exit.close)
        self._engine = InProcess()
        self._at = self._recorder.restore(self._engine, self._federation) or self._engine.begin(self._federation)
        self._replies: dict[int, Reply | None] | None = None  # of the open round
        self._open: OpenTurn | None = None
        self._broken: str | None = None  # why no turn can follow
        self._saved_to: Path | None = saved
        self._result: Result | None = None

    # ------------------------------------------------------------------------------------------- a round
    @property
    def round(self) -> int:
        """The number of the round that is open or comes next, from 1."""
        return self._at.number + 1

    @property
    def turn(self) -> Turn:
        """The open client's turn: its round and number (from 0), its rank, and the seed of its draws."""
        if self._open is None:
            raise ValueError("no client's turn is open; use this inside `with session.client(k) as model:`.")
        return self._open.turn.turn

    def cohort(self) -> list[int]:
        """Return the clients of this round: those that were drawn, without dropouts and excluded clients."""
        f, at = self._federation, self._at
        if self._replies is None:
            if at.number >= f.rounds:
                raise ValueError(f"the session has finished its {f.rounds} rounds.")
            self._engine.open_round(f, at)
            self._replies = {}
            for client in self._engine.absent:
                self._engine.open_turn(f, at, client)  # what is sent to a client that does not reply counts
        return [client for client in f.cohort(at.number) if client not in self._engine.absent]

    @contextmanager
    def client(
        self, number: int, examples: int = 1, loss: Callable[[nn.Module], Tensor] | None = None
    ) -> Iterator[nn.Module]:
        """Set the model to a client's start, freeze what the method does not train, and receive its update at the end.

        Build the optimizer inside the block, of the parameters that require gradients. If the block raises, the turn
        does not count, and may be repeated.

        Args:
            number: the client, one of ``cohort()``.
            examples: its number of training rows, which is its weight in the aggregate.
            loss: the loss of a network on one batch, for the methods that choose what to train by its gradient.
        """
        with share_failure(), self._hold_turn(number, examples, loss) as network:
            yield network

    @contextmanager
    def _hold_turn(self, number: int, examples: int, loss: Callable[[nn.Module], Tensor] | None) -> Iterator[nn.Module]:
        check_equal(f"client {number}'s number of examples", examples)
        if number not in self.cohort():
            raise ValueError(f"client {number} is not in the cohort of round {self.round}, {self.cohort()}.")
        assert self._replies is not None
        if self._open is not None or number in self._replies:
            why = "its turn is over" if self._open is None else f"client {self.turn.client}'s turn is open"
            raise ValueError(f"client {number} cannot begin a turn in round {self.round}: {why}.")
        if self._broken is not None:
            raise ValueError(f"the session has ended: {self._broken}")
        if examples < 1:
            raise ValueError(f"client {number} has {examples} examples; a client needs at least one.")
        self._rows[number] = examples
        f, at, model = self._federation, self._at, self._federation.model
        turn = self._engine.open_turn(f, at, number)
        assert turn is not None
        start = turn.start(at.shared, self._engine.state(number))
        trained = select_leaves_to_train(f.rules, start, turn.turn, lambda start: self._gradient(start, loss))
        check_wrappers(model.network)
        model.load(start)
        parameters = model.select(trained)
        self._open = OpenTurn(turn, start, trained)
        set_train_mode(model.network)
        frozen = Frozen.read(model.network, model.parts)
        try:
            try:
                yield model.network
            finally:
                self._check_frozen(frozen)
            self._open.loss = average(self._open.loss)
            end = self._read_end(start, trained, turn.turn) if parameters else start
            work = {part: Work(start[part], end[part], trained[part]) for part in f.rules}
            update = turn.finish(at.shared, work, self._open.loss)
            self._replies[number] = self._engine.close_turn(f, at, turn, update)
        finally:
            self._open = None

    def _check_frozen(self, frozen: Frozen) -> None:
        """Raise ``ValueError`` if a turn has changed the base. The session ends with it: all clients share the base."""
        try:
            frozen.check(self._federation.model.network)
        except ValueError as error:
            self._broken = str(error)
            raise

    def report_loss(self, loss: float | Tensor) -> None:
        """Set the mean training loss of the open turn, for the records."""
        _ = self.turn
        assert self._open is not None
        self._open.loss = float(loss.detach() if isinstance(loss, Tensor) else loss)

    @share_failure()
    def aggregate(self) -> RoundRecord:
        """Combine the uploads of this round's turns, evaluate if that is due, and return the round's record.

        A client of the cohort without a turn is absent. Raises ``ValueError`` if no client had a turn.
        """
        cohort = self.cohort()  # empty in some rounds of Poisson sampling
        if self._open is not None or (cohort and not self._replies):
            raise ValueError(
                "no client has finished a turn in this round; begin with `with session.client(k) as model:`."
            )
        for client in self._federation.cohort(self._at.number):
            if client not in (self._replies or {}):
                self._engine.absent.setdefault(client, UNUSED)
        assert self._replies is not None
        replies = [reply for client, reply in sorted(self._replies.items()) if reply is not None]
        with explain_overflow():
            done = self._engine.close_round(self._federation, self._at, replies, self._evaluator())
        self._recorder.add(done, self._engine, self._federation)
        self._replies, self._result = None, None
        return done.record

    def _gradient(self, start: Tree, loss: Callable[[nn.Module], Tensor] | None) -> Tree:
        method, model = self._federation.method, self._federation.model
        if loss is None:
            raise ValueError(
                f"{method.title} chooses what to train by a gradient on the client's rows; pass session.client(k, "
                "loss=lambda model: …), the loss on one batch."
            )
        model.load(start)
        model.network.eval()
        return average_tree(model.gradient(loss))

    def _read_end(self, start: Tree, trained: Mapping[str, frozenset[str]], turn: Turn) -> Tree:
        assert self._open is not None
        end = read_end(self._federation.model, start, trained, self._open.loss, turn)
        check_turn(self._federation.model, start, end, trained, self._federation.rules, turn)
        return replace_leaves(start, end, trained)

    def _evaluator(self) -> OwnEvaluator | None:
        if self._evaluate is None:
            return None
        return OwnEvaluator(self._federation.model, self._federation.clients.members, self._score)

    @torch.no_grad()
    def _score(self, client: int) -> Scores:
        f = self._federation
        network = f.model.network.eval()
        assert self._evaluate is not None
        return to_scores(self._evaluate(network, ClientInfo(client, f.clients.members, f.seed, model=network)), client)

    # ------------------------------------------------------------------------------------------ the model
    def model(self, client: int | None = None) -> nn.Module:
        """Return the network with the shared leaves, or with those of a client; it is in evaluation mode."""
        f, shared = self._federation, self._at.shared
        if self._open is not None:
            raise ValueError(f"client {self.turn.client}'s turn is open; end it first.")
        if client is None and f.method.personal:
            raise ValueError(f"{f.method.title} has a model for each client and none for all; give a client's number.")
        if client is None:
            f.model.load({part: public_leaves(layer) for part, layer in shared.items()})
        else:
            f.model.load(ClientTurn(f, f.turn(self._at.number, client)).start(shared, self._engine.state(client)))
        return f.model.network.eval()

    # ------------------------------------------------------------------------------------------- the run
    @property
    def records(self) -> Sequence[RoundRecord]:
        """The records of all rounds."""
        return self._recorder.records

    @property
    def result(self) -> Result:
        """The result of the rounds so far, as of ``fedlora.run``."""
        if self._result is None:
            config = self.config
            if config.rounds == OPEN:
                config = replace(config, rounds=max(1, len(self.records)))
            kept = self._engine.kept_trees()
            self._result = finish_run(config, self._federation, self._recorder, kept, lambda event: None, True)
            RunFolder(self._folder).write_config(config.table)
        return self._result

    @property
    def summary(self) -> Mapping[str, Any]:
        """The summary of the rounds so far."""
        return self.result.summary

    @share_failure()
    def save(self, folder: str | Path) -> Path:
        """Write the session to a run folder: for ``Session.load``, and for ``fedlora show``, ``report`` and ``export``.

        The folder is new, or one that this session was loaded from or saved to before. Raises ``ConfigError`` for
        another folder that is not empty, and ``ValueError`` within a round.
        """
        if self._replies:
            raise ValueError(f"round {self.round} is open; call aggregate() before save().")
        path = Path(folder).expanduser()
        if is_first_rank():
            self._save(path)
        barrier()  # the folder is there for all ranks after this
        self._saved_to = path
        return path

    def _save(self, path: Path) -> None:
        mine = self._saved_to is not None and path.absolute() == self._saved_to.absolute()
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{str(path)!r} is a file; choose a new folder.")
        if not mine and path.exists() and any(path.iterdir()):
            raise ConfigError(f"{str(path)!r} is not empty and holds nothing of this session; choose another folder.")
        if self._recorder.checkpoints is not None:
            self._recorder.checkpoints.save()
        _ = self.result
        copy_run(self._folder, path)


def copy_run(source: Path, target: Path) -> None:
    """Make ``target`` a copy of a run folder: first write new files, then delete those that the run no longer has."""
    files = [path.relative_to(source) for path in sorted(source.rglob("*")) if path.is_file()]
    for file in files:
        content = (source / file).read_bytes()
        place = target / file
        if not place.exists() or place.read_bytes() != content:
            place.parent.mkdir(parents=True, exist_ok=True)
            write(place, content)
    for place in target.rglob("*"):
        if place.is_file() and place.relative_to(target) not in files:
            place.unlink()

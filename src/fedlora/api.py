"""The public functions on whole runs: run, federate, resume, compare, open, plan, sweep, aggregate."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fedlora.engines.clients import Clients
from fedlora.engines.loop import Event, Observe, Watch
from fedlora.engines.trainers import ClientInfo, Evaluate
from fedlora.export.aggregate import AggregationReport, aggregate_adapters, build_method
from fedlora.export.peft import export_model
from fedlora.files import write
from fedlora.methods._base import Method
from fedlora.reporting.html import render_page
from fedlora.reporting.load import load_runs
from fedlora.reporting.tables.plan import tabulate_plan
from fedlora.reporting.tables.sweep import tabulate_sweep
from fedlora.runs.all_ranks import run_on_all_ranks
from fedlora.runs.compare import compare_methods
from fedlora.runs.comparison import Cell, Compared
from fedlora.runs.config import AnyConfig, Overrides, to_config, to_table
from fedlora.runs.federate import attach_trainers, config_of_trainers
from fedlora.runs.file_names import COMPARISON, CONFIG
from fedlora.runs.folder import RunFolder, read_json
from fedlora.runs.objects import build_objects, code_of, take_objects
from fedlora.runs.party_files import PartySource, read_parties
from fedlora.runs.plan.plan import plan_run
from fedlora.runs.resume import read_resumable, resume_folder
from fedlora.runs.run import Drive, Result, run_config
from fedlora.runs.sweep import CHOSEN, REPORT, Sweep
from fedlora.runs.table import Table, from_pairs, to_html
from fedlora.schema import ConfigError, read_table
from fedlora.tasks._code import Code
from fedlora.training.device import Engine
from fedlora.training.ranks import is_parallel
from fedlora.training.transformers_trainer import Schedule

if TYPE_CHECKING:
    from pandas import DataFrame


# ------------------------------------------------------------------------------------------------------------ runs
@dataclass(frozen=True)
class RunResult(Result):
    """A run that has ended: ``summary``, ``records``, the ``shared`` leaves and those that clients keep.

    ``frame()`` and ``clients_frame()`` are pandas data frames.
    """

    code: Code | None = field(default=None, repr=False)  # the run's Python objects

    def export(
        self, out: str | Path, client: int | None = None, rank: int | None = None, merged: bool = False
    ) -> dict[str, Any]:
        """Write the result to a new folder, load it again and compare the outputs; see ``OpenRun.export``."""
        return export_model(RunFolder.open(self._place()), out, client, rank, merged, self.code)

    def report(self, out: str | Path = "report.html") -> Path:
        """Write a report as one HTML file that needs no network; an existing file is replaced."""
        return write_report([self._place()], out)

    def _place(self) -> Path:
        if self.folder is None:
            raise ConfigError("this run has no folder, so there is nothing to read; give out= a new folder.")
        return self.folder


def run(
    config: AnyConfig | None = None,
    out: str | Path | None = None,
    watch: Watch = lambda event: None,
    observe: Observe | None = None,
    drive: Drive | None = None,
    again: bool = False,
    callbacks: Sequence[Any] = (),
    overrides: Overrides = (),
    parties: Sequence[PartySource] | None = None,
    **objects: Any,
) -> RunResult:
    """Run a federation to its end, or to Ctrl-C: a configuration, or Python objects.

        result = fedlora.run("mine.toml", out="runs/one", overrides={"method.name": "fedsa-lora"})
        result.summary["final"]

        import torch
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        rows = [(torch.randn(4), k % 2) for k in range(40)]
        result = fedlora.run(
            model=net, train=[rows[:20], rows[20:]], test=rows, targets=["0"], head=["2"], method="fedsa-lora",
            loss=lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1]),
            training=fedlora.Training(local_steps=2), rounds=2, out="runs/two",
        )

    Args:
        config: the path of a TOML file, its table, or a ``Config``.
        out: a new folder for ``config.toml`` (enough to repeat the run), ``metrics.jsonl`` (a line for each round, as
            it happens), ``summary.json``, ``shared.safetensors``, ``clients/K.safetensors`` and, if the method updates
            the base, ``base_update.safetensors``.
        watch: called with every event.
        observe: returns more figures for each round's record.
        drive: runs the rounds, instead of the engine that ``engine.name`` selects.
        again: ``out`` may hold the beginning of this run, which is then resumed from its last checkpoint.
        callbacks: see ``fedlora.Callback``.
        overrides: settings that replace those of ``config``: ``"key=value"``, or a dict, with dotted keys.
        parties: the TOML file, or the table, of each party with data of its own, to play them all in this process;
            ``config`` may then be None. See ``party_files.read_parties``.
        objects: instead of ``config``: ``model``, ``train``, ``test``, ``loss``, ``metrics``, ``losses`` and
            ``collate`` (see ``fedlora.Objects``), and settings: ``targets``, ``head``, ``method``, ``adapter``,
            ``clients``, ``partition``, ``rounds``, ``seed``, ``training``, ``higher``, and further sections of a
            configuration (see ``fedlora.runs.objects.config_of_objects``).

    Ctrl-C raises no ``KeyboardInterrupt`` here: the call returns the finished rounds, and
    ``result.summary["interrupted"]`` is true. A second Ctrl-C exits at once.

    Raises ``ConfigError`` for a folder that holds a run or cannot be written, ``OSError`` if the disk is full, and
    ``CallbackError`` if a callback raises. Finished rounds stay. The traceback of an unexpected error is written to the
    folder's ``error.log``.
    """
    if parties is None:
        resolved = to_config(take_objects(config, objects), overrides)
    elif objects:
        raise ConfigError(
            f"parties and {next(iter(objects))} are both given; parties have their data in files: drop one."
        )
    else:
        resolved = read_parties(parties, config, overrides, lambda text: watch(Event("note", 0, text=text)))
    result = run_config(resolved, out, watch, observe, drive, again, callbacks)
    return RunResult(**vars(result), code=code_of(resolved))


def federate(
    trainer: Callable[[ClientInfo], Any],
    clients: int | Mapping[str, Any] | Clients,
    method: str | Mapping[str, Any] | Method | Sequence[str] = "fedit",
    rounds: int = 20,
    out: str | Path | None = None,
    *,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    data: Any = None,
    evaluate: Evaluate | None = None,
    metric: str = "loss",
    higher: bool | None = None,
    schedule: Schedule = "run",
    keep_optimizer: bool = False,
    callbacks: Sequence[Any] = (),
    watch: Watch = lambda event: None,
    again: bool = False,
    **sections: Any,
) -> RunResult | Compared:
    """Run a federation whose clients train with your own trainers, in this process.

        import torch, peft
        from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

        def trainer(client):
            rows = [{"input_ids": torch.randint(5, 90, (8,)), "labels": i % 2} for i in range(20)]
            sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
            network = BertForSequenceClassification(BertConfig(vocab_size=90, **sizes))
            network = peft.get_peft_model(network, peft.LoraConfig(r=2, task_type="SEQ_CLS"))
            args = TrainingArguments("out", max_steps=2, report_to=[], disable_tqdm=True, dataloader_pin_memory=False)
            return Trainer(network, args, train_dataset=rows, eval_dataset=rows)

        result = fedlora.federate(trainer, clients=2, method="fedsa-lora", rounds=2, out="runs/own")

    Args:
        trainer: called once for each client, as ``trainer(client)`` with a ``ClientInfo``. Returns a ``Trainer`` of
            transformers or TRL, or any object with ``.model`` and ``.train()``. A turn is one call of ``train()``; its
            budget is the trainer's (``max_steps`` or ``num_train_epochs``). The first trainer's model is that of all
            clients: later Trainers are handed it, and other objects must be built on ``client.model``.
        clients: their number, or the ``[clients]`` table, such as ``{"count": 100, "per_round": 10}``.
        method: a method's name, its table, or the method itself; a list of names is a comparison. The adapter is that
            of the model.
        rounds: the number of rounds.
        out: a new run folder; ``fedlora show``, ``report``, ``compare`` and ``resume`` work on it.
        seed: of the run. Python's, numpy's and torch's generators are set from run, round and client before each turn.
        seeds: several seeds are a comparison, too; the result is that of ``fedlora.compare``.
        data: common rows that ``clients["partition"]`` divides: a Dataset. ``client.rows`` has each client's numbers.
            None: the clients have rows of their own.
        evaluate: ``evaluate(network, client)`` returns metrics by name, each a number, or a sum over rows and their
            number. None: the trainer's own ``evaluate()``, if it has an ``eval_dataset``.
        metric: the main metric. ``higher``: whether higher values are better; None: known from the name, or true.
        schedule: whether a Trainer's learning-rate schedule covers the whole ``"run"``, or each ``"turn"`` anew.
        keep_optimizer: each client keeps its optimizer's moments between its turns (Trainers of transformers only).
        callbacks: see ``fedlora.Callback``. ``watch`` is called with every event.
        again: ``out`` may hold the beginning of this run, which then goes on from its last checkpoint.
        sections: further tables of the configuration: ``compression``, ``privacy``, ``validation``, ``robust``,
            ``server``, ``checkpoint``, ``evaluation``, ``attack``, ``engine``, ``track``.

    Afterwards the network of the trainers is as it was before, so that a second call begins as the first did; the
    trained leaves are in the result and in ``out``.

    Ctrl-C returns the finished rounds, with ``result.summary["interrupted"]`` true; a comparison raises
    ``KeyboardInterrupt``.

    Raises ``ConfigError`` for settings that cannot work in the caller's loop, with the reason, and ``ValueError`` if a
    trainer is not supported or a turn does not keep the method's rules.
    """
    config = config_of_trainers(
        trainer, clients, method, rounds, seed, data, evaluate, metric, higher, schedule, keep_optimizer, sections
    )
    is_list = isinstance(method, list | tuple)
    if not is_list and seeds is None:
        place = None if out is None else Path(out).expanduser()
        return RunResult(**vars(run_on_all_ranks(config, place, watch, callbacks, again)))
    if is_parallel():
        raise ConfigError(
            "a comparison of methods or seeds runs with one process a client; call federate once for each of them, "
            "with its own out."
        )
    methods = list(method) if is_list else None
    return compare_methods(config, methods, [seed] if seeds is None else seeds, out, callbacks=callbacks)


def resume(
    path: str | Path,
    rounds: int | None = None,
    overrides: Overrides = (),
    watch: Watch = lambda event: None,
    callbacks: Sequence[Any] = (),
    trainer: Callable[[ClientInfo], Any] | None = None,
    evaluate: Evaluate | None = None,
    data: Any = None,
    **objects: Any,
) -> RunResult:
    """Resume the run in a folder, to ``rounds`` or to the number in its configuration.

        fedlora.run("mine.toml", out="runs/more", overrides={"rounds": 1})
        result = fedlora.resume("runs/more", rounds=2)

    ``overrides`` are settings that do not change the bits: ``engine.name``, ``engine.threads``, ``checkpoint.keep``,
    and ``task.data`` if the data have moved. A run on Python objects needs the same ``objects`` again: ``model``,
    ``train``, ``test``, and those of ``loss``, ``metrics``, ``losses`` and ``collate`` that it was given. A run of
    ``fedlora.federate`` needs the same ``trainer``, and ``evaluate`` and ``data`` if it was given them. Raises
    ``ConfigError`` for a folder without a run, with a finished run or with one that cannot be resumed here, and
    ``ValueError`` if no checkpoint is sound, or if the rows or the model have changed.
    """
    if trainer is not None:
        config = attach_trainers(read_resumable(path, rounds, overrides), trainer, data, evaluate)
        return RunResult(**vars(run_on_all_ranks(config, Path(path).expanduser(), watch, callbacks, again=True)))
    own = build_objects(objects) if objects else None
    result = resume_folder(path, rounds, overrides, watch, callbacks, own)
    return RunResult(**vars(result), code=None if own is None else own.code())


def compare(
    config: AnyConfig | None = None,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    out: str | Path | None = None,
    jobs: int = 1,
    watch: Callable[[Cell, Event], None] = lambda cell, event: None,
    done: Callable[[Cell], None] = lambda cell: None,
    overrides: Overrides = (),
    callbacks: Sequence[Any] = (),
    **objects: Any,
) -> Compared:
    """Run all methods with all seeds: with the same data, partition, initial weights and budgets. A run may diverge.

        compared = fedlora.compare("mine.toml", methods=["fedit", "local"], seeds=[0])
        compared.frame()  # a row for each run
        compared.rows  # means for each method

    Args:
        config: the path of a TOML file, its table, or a ``Config``: whatever ``fedlora.run`` accepts.
        methods: names of methods, labels of ``[compare.LABEL]`` tables, ``"centralised"``; the configuration's if None.
        seeds: a run of each method for each; they replace the configuration's.
        out: a new folder for ``comparison.json`` and a run's folder for each method and seed. An interrupted comparison
            there is resumed: finished runs stay, and others are resumed from their checkpoints.
        jobs: runs at the same time, in processes of their own with one thread each; a script that asks for several
            needs ``if __name__ == "__main__":``. Python objects need ``jobs=1``.
        watch: called with a run and each of its events, if ``jobs`` is 1.
        done: called with each run that has ended.
        overrides: ``"key=value"`` or a dict of dotted keys.
        callbacks: of every run, see ``fedlora.Callback``; they need ``jobs=1``.
        objects: instead of ``config``, as in ``fedlora.run``.

    Raises ``ConfigError`` for wrong settings before the first run, and ``ValueError`` if a run in ``out`` has another
    configuration, or if the data have changed.
    """
    resolved = take_objects(config, objects)
    return compare_methods(resolved, methods, seeds, out, jobs, watch, done, overrides, callbacks)


# ------------------------------------------------------------------------------------------------ finished runs
@dataclass(frozen=True)
class OpenRun(RunFolder):
    """The folder of a run, finished or not: its settings, its figures and its model.

    ``config``, ``summary`` (of a run that has ended), ``records`` (a mapping a round), ``shared`` and ``tree(client)``
    (leaves by part of the model) are read when they are first needed; ``frame()`` and ``clients_frame()`` are pandas
    data frames. Open the folder again to see the rounds that were finished since.
    """

    def export(
        self, out: str | Path, client: int | None = None, rank: int | None = None, merged: bool = False
    ) -> dict[str, Any]:
        """Write the result to a new folder as a PEFT adapter, load it again and compare the logits.

        A run on Python objects is written as an update that ``fedlora.load_update`` applies to its network. Nothing is
        compared then, since the network is not here; ``RunResult.export`` compares.

        Args:
            out: a new folder.
            client: the number of a client, for its own model; None: the shared one.
            rank: truncate every weight's update to this rank.
            merged: write the whole model instead of an adapter.

        Returns ``folder``, ``client``, ``ranks``, ``error`` (of the truncation, relative to all updates) and
        ``difference`` (the largest of the logits, relative to the largest logit). Raises ``ConfigError`` for a run
        without such a model, and ``RuntimeError`` if the logits differ.
        """
        return export_model(RunFolder.open(self.path), out, client, rank, merged)

    def report(self, out: str | Path = "report.html") -> Path:
        """Write a report as one HTML file that needs no network; an existing file is replaced."""
        return write_report([self.path], out)

    def resume(
        self,
        rounds: int | None = None,
        overrides: Overrides = (),
        watch: Watch = lambda event: None,
        callbacks: Sequence[Any] = (),
        **objects: Any,
    ) -> RunResult:
        """Resume the run, or extend it to ``rounds``; see ``fedlora.resume``. This object then has the new rounds."""
        result = resume(self.path, rounds, overrides, watch, callbacks, **objects)
        for name in set(vars(self)) - {"path"}:  # cached from before
            del vars(self)[name]
        return result

    def _repr_html_(self) -> str:
        if self.has_summary:
            return super()._repr_html_()
        done = f"{len(self.records)} of {self.table.get('rounds', 20)}"
        return to_html(from_pairs("Under way, or broken off", [("folder", str(self.path)), ("rounds", done)]))


class OpenComparison(Compared):
    """The runs of a comparison's folder."""

    def __init__(self, path: Path, cells: Sequence[Cell]):
        super().__init__(cells)
        self.path = path

    def report(self, out: str | Path = "report.html") -> Path:
        """Write a report as one HTML file that needs no network; an existing file is replaced."""
        return write_report([self.path], out)


def open(path: str | Path) -> "OpenRun | OpenComparison | SweepReport":
    """Open the folder of a run, of a comparison or of a sweep.

        run = fedlora.open("runs/mine-1")
        run.frame()
        run.report("mine.html")

    Raises ``ConfigError`` for any other folder.
    """
    folder = Path(path).expanduser()
    if (folder / COMPARISON).exists():
        cells = [
            Cell(**{**cell, "folder": _locate_run(folder, cell)}) for cell in read_json(folder / COMPARISON)["runs"]
        ]
        return OpenComparison(folder, cells)
    if (folder / REPORT).exists():
        return SweepReport.read(folder)
    if (folder / CONFIG).exists():
        return OpenRun(folder)
    raise ConfigError(
        f"{str(folder)!r} holds no run: it has no {CONFIG}; name a folder that fedlora.run, compare or sweep made."
    )


def _locate_run(folder: Path, cell: Mapping[str, Any]) -> str | None:
    """Return where a compared run lies now; comparisons may be moved as a whole."""
    return str(folder / Path(cell["folder"]).name) if cell.get("folder") else None


def write_report(runs: Sequence[Path], out: str | Path) -> Path:
    """Write a report on folders of runs and comparisons as one HTML file, and return its path."""
    path = Path(out).expanduser()
    write(path, render_page(load_runs(runs)).encode())
    return path


# ------------------------------------------------------------------------------------------ before and between
@dataclass(frozen=True)
class Plan:
    """The costs of a run before it begins.

    ``bytes`` and ``memory`` are in bytes, ``flops`` are floating-point operations; ``memory`` has ``client``,
    ``server`` and ``one_process``, each the whole of a machine, and their parts. ``numbers`` counts parameters, and
    ``rows`` has the clients' rows, steps and passes. ``options`` are the method's properties, and ``estimates`` are
    sentences on the figures that are not exact.
    """

    method: str
    title: str
    options: Mapping[str, Any]
    numbers: Mapping[str, Any]
    rows: Mapping[str, Any]
    bytes: Mapping[str, Any]
    memory: Mapping[str, int]
    flops: Mapping[str, float]
    estimates: Sequence[str]
    privacy: Mapping[str, Any] | None = None  # of the whole run

    def _repr_html_(self) -> str:
        return _render([*tabulate_plan({key: value for key, value in vars(self).items() if value is not None})])


def plan(config: AnyConfig, overrides: Overrides = ()) -> Plan:
    """Estimate the costs of a run, without pretrained weights: bytes, memory, operations.

        plan = fedlora.plan("mine.toml")
        plan.memory["one_process"] / 1e6  # MB

    ``config`` is the path of a TOML file, its table or a ``Config``. Raises the ``ConfigError`` that the run would.
    """
    resolved = to_config(config, overrides)
    return Plan(resolved.table["method"]["name"], **plan_run(resolved))


@dataclass(frozen=True)
class SweepReport:
    """The trials of a sweep, and the best one of each method."""

    report: Mapping[str, Any]  # the content of sweep.json
    table: Mapping[str, Any] | None  # the configuration with the best values, for ``compare``; None: it was stopped
    folder: Path | None

    @classmethod
    def read(cls, folder: Path) -> "SweepReport":
        """Read the folder of a sweep, finished or stopped."""
        chosen = folder / CHOSEN
        return cls(read_json(folder / REPORT), read_table(chosen) if chosen.exists() else None, folder)

    @property
    def best(self) -> dict[str, dict[str, Any]]:
        """Each method's best values, by dotted key; empty if no trial has a figure."""
        return {row["method"]: dict(row["values"]) for row in self.report["methods"]}

    def frame(self) -> "DataFrame":
        """Return a data frame with a row for each trial: its values, and ``value``, the mean figure over seeds."""
        import pandas

        return pandas.DataFrame(
            {"method": row["method"], "trial": trial["trial"], **trial["values"], "value": trial["value"],
             "chosen": trial["trial"] == row["chosen"], "seconds": trial["seconds"]}
            for row in self.report["methods"] for trial in row["trials"]
        )  # fmt: skip

    def _repr_html_(self) -> str:
        return _render(tabulate_sweep(self.report))


def sweep(
    config: AnyConfig,
    space: Mapping[str, Any] | Sequence[str],
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    holdout: float | None = None,
    trials: int | None = None,
    out: str | Path | None = None,
    jobs: int = 1,
    watch: Callable[[Cell, Event], None] = lambda cell, event: None,
    done: Callable[[Cell], None] = lambda cell: None,
    overrides: Overrides = (),
) -> SweepReport:
    """Try settings on validation rows, as many for every method, and return the best.

        swept = fedlora.sweep("mine.toml", {"training.learning_rate": [1e-3, 5e-3]})
        fedlora.compare(swept.table, ["fedit"], seeds=[1])

    Args:
        config: the path of a TOML file, its table or a ``Config``.
        space: values to try by dotted key: a list, or a range as ``"1e-5:1e-3:log"`` to draw from, with ``trials``;
            or the command line's ``"key=a,b,c"``.
        methods: those of a comparison; the configuration's own if empty.
        seeds: a trial's figure is the mean over them.
        holdout: the share of the training rows to choose by; None: the data's validation rows, or 0.1.
        trials: draw so many instead of all combinations.
        out: a folder for the trials; a sweep that was stopped continues there. None: nothing is kept.
        jobs: runs at the same time, in processes of their own.
        watch, done: as in ``fedlora.compare``.
        overrides: settings of all trials.

    Raises ``ConfigError`` for settings that are wrong or make no difference, before the first run.
    """
    planned = Sweep.plan(to_table(config, overrides), space, methods, seeds, holdout, trials)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary if out is None else out).expanduser()
        planned.run(folder, jobs, watch, done)
        report = SweepReport.read(folder)
    return report if out is not None else replace(report, folder=None)


# ------------------------------------------------------------------------------------------------------ adapters
def aggregate(
    adapters: Sequence[str | Path],
    out: str | Path,
    method: str | Method | None = None,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    residual: str | Path | None = None,
    exact: bool = False,
    same_base: bool = False,
    settings: Overrides = (),
    device: str = "auto",
    threads: int | None = None,
) -> AggregationReport:
    """Combine trained LoRA adapters, folders that PEFT wrote, into one; no base model is needed.

        report = fedlora.aggregate(["a", "b", "c"], out="merged", method="svd", weights=[3, 1, 1])
        report.errors  # weight by weight, against the exact mean

    Args:
        adapters: PEFT folders of one base model.
        out: a new folder that PEFT loads.
        method: a name or a method; None: ``"svd"``, or ``"flora"`` with ``exact``.
        weights: shares of any sum; None: equal.
        rank: of the result; None: the largest of the adapters'.
        residual: a new folder of a second adapter, for the method's base update.
        exact: one adapter with everything, of the sum of the ranks.
        same_base: the adapters' base models are one, under different names.
        settings: of the method, if it is a name.
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        threads: of the processor; None: all.

    Raises ``ValueError`` if the adapters do not belong together, or the method cannot produce the wanted output.
    """
    if isinstance(adapters, str | Path):
        raise ConfigError(f"adapters is {str(adapters)!r}; it is a list of folders, e.g. [{str(adapters)!r}].")
    name = method or ("flora" if exact else "svd")
    rule = build_method(name, settings) if isinstance(name, str) else _check_merging(name, settings)
    engine = Engine(device=device, threads=threads)
    report = aggregate_adapters(adapters, rule, out, weights, rank, residual, exact, engine, same_base)
    return replace(report, method=name) if isinstance(name, str) else report


def _check_merging(method: Method, settings: Overrides) -> Method:
    """Return the method. Raises ``ConfigError`` if it cannot be applied to finished adapters."""
    if not isinstance(method, Method):
        raise ConfigError(f"method is {method!r}; it should be a name, such as 'svd', or a method's object.")
    if why := method.merge_obstacle():
        raise ConfigError(f"{method.title} cannot be applied to finished adapters: {why}.")
    if settings:
        raise ConfigError(f"settings are {settings!r}, and the method is an object; set them there.")
    return method


def _render(items: Sequence[Table | str]) -> str:
    """Return the HTML of tables; lines stand below the table before them."""
    tables = [item for item in items if isinstance(item, Table)]
    lines = [item for item in items if isinstance(item, str)]
    return "".join(to_html(table) for table in tables[:-1]) + to_html(tables[-1], below=lines)

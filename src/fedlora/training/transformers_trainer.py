"""A client's turn with a ``Trainer`` of transformers or TRL: its seed, schedule, optimizer and folder.

The budget of a turn is ``max_steps`` or ``num_train_epochs`` of the trainer's arguments. The learning-rate schedule
covers the whole run, or one turn.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from fedlora.seeds import derive_seed
from fedlora.training.deepspeed import check_zero_plugin, find_zero_plugin, release_engine, use_own_settings
from fedlora.training.local import Training
from fedlora.training.own_trainer import OwnTrainer, read_loss, set_seeds
from fedlora.training.ranks import average_tree, is_parallel
from fedlora.training.sharding import is_fully_sharded
from fedlora.types import Tree

Schedule = Literal["run", "turn"]  # the part of a run that a learning-rate schedule covers
LOSS_SCALE_IS_RIGHT = "_fedlora_loss_scale_is_right"
SPEED = (  # suffixes of the names of figures that are no metrics
    "runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time", "num_tokens",
)  # fmt: skip


def is_transformers_trainer(trainer: Any) -> bool:
    """Return whether a trainer is a ``Trainer`` of transformers; those of TRL are."""
    from transformers import Trainer

    return isinstance(trainer, Trainer)


def check_trainer(trainer: Any) -> None:
    """Raise ``ValueError`` for settings of a ``Trainer`` that a turn cannot keep."""
    if trainer.optimizer is not None or trainer.lr_scheduler is not None:
        raise ValueError(
            "the Trainer was given optimizers=(…), which hold the parameters of one turn; give the optimizer's class "
            "by optimizer_cls_and_kwargs or args.optim, so that each turn builds its own."
        )
    if trainer.model_init is not None:
        raise ValueError("the Trainer was given model_init, which makes a new model in each turn; give model instead.")
    _check_parallelism(trainer)
    if trainer.args.resume_from_checkpoint:
        raise ValueError(
            "args.resume_from_checkpoint would replace what the server sends; leave it out, and resume the run by "
            "fedlora.resume or again=True."
        )


def _check_parallelism(trainer: Any) -> None:
    plugin = find_fsdp(trainer)
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError(
            "the Trainer uses FSDP version 1, which flattens parameters, so adapters cannot be read from it; set "
            'fsdp_config={"version": 2} in its arguments, or fsdp_version: 2 in the configuration of Accelerate.'
        )
    if plugin is not None and plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "cpu_ram_efficient_loading gives the base to the first process only, and base updates and checkpoints "
            "need it in each; set it to false in fsdp_config, or FSDP_CPU_RAM_EFFICIENT_LOADING=false."
        )
    if (deepspeed := find_zero_plugin(trainer)) is not None:
        check_zero_plugin(deepspeed, trainer.model)


def find_fsdp(trainer: Any) -> Any:
    """Return the FSDP settings that a ``Trainer`` trains with, or None."""
    return getattr(trainer.accelerator.state, "fsdp_plugin", None)


def adopt_model(trainer: Any, network: Any) -> None:
    """Replace the model of a trainer by ``network``."""
    if trainer.model is not network:
        trainer.model = trainer.model_wrapped = trainer.callback_handler.model = network


def free_optimizer(trainer: Any) -> None:
    """Drop a trainer's optimizer, whose moments are twice as large as the adapter, between its client's turns.

    ``accelerator.free_memory()`` would collect the garbage of the whole process, which takes longer than short turns.
    """
    release_engine(trainer)
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.callback_handler.optimizer = trainer.callback_handler.lr_scheduler = None
    for name in ("_optimizers", "_schedulers", "_dataloaders", "_models"):
        getattr(trainer.accelerator, name, []).clear()


def describe_training(trainer: Any) -> Training:
    """Return the ``[training]`` table that describes a trainer's arguments, for the record of the run."""
    args = trainer.args
    budget: dict[str, Any] = {"local_steps": args.max_steps}
    if args.max_steps <= 0:
        budget = {"local_epochs": max(1, round(args.num_train_epochs))}
    kind = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    known: Any = {"constant": "constant", "cosine": "cosine"}.get(kind, "linear")
    return Training(
        **budget, batch_size=args.per_device_train_batch_size * max(1, args.world_size),
        learning_rate=args.learning_rate, weight_decay=args.weight_decay, schedule=known,
        max_grad_norm=args.max_grad_norm or None, accumulation_steps=args.gradient_accumulation_steps,
    )  # fmt: skip


@dataclass
class TransformersTurn(OwnTrainer):
    """One client's turn with a ``Trainer``."""

    schedule: Schedule = "run"

    def gradient(self, start: Tree) -> Tree:
        """Return the gradient at ``start`` on the trainer's first batch of the turn, without dropout."""
        self.model.load(start)
        self.model.network.eval()
        with set_seeds(derive_seed(self.turn.seed, "gradient")):
            batch = self.trainer._prepare_inputs(next(iter(self.trainer.get_train_dataloader())))
            return average_tree(self.model.gradient(lambda network: self.trainer.compute_loss(network, batch)))

    def train(self, parameters: Mapping[tuple[str, str], Tensor]) -> float | None:
        trainer = self.trainer
        if self.keep_optimizer and (find_fsdp(trainer) or find_zero_plugin(trainer)):
            raise ValueError(
                "keep_optimizer needs an optimizer whose moments are whole in each process, and FSDP and DeepSpeed "
                "divide them; leave keep_optimizer out, or use DDP."
            )
        release_engine(trainer)  # of a turn that was interrupted
        use_own_settings(trainer)
        unwrap_model(trainer)
        if find_fsdp(trainer) and is_fully_sharded(trainer.model):
            find_fsdp(trainer).auto_wrap_policy = None  # it would look for layers by class, which FSDP2 has replaced
        trainer.optimizer = trainer.lr_scheduler = None
        with self._settings(parameters):
            loss = read_loss(trainer.train())
        if self.keep_optimizer:
            state = getattr(trainer.optimizer, "optimizer", trainer.optimizer).state
            self.state = (self.state or {}) | {key: state[x] for key, x in parameters.items() if x in state}
        free_optimizer(trainer)
        unwrap_model(trainer)
        if is_parallel():
            check_loss_scale(trainer)
        return loss

    @contextmanager
    def _settings(self, parameters: Mapping[tuple[str, str], Tensor]) -> Iterator[None]:
        """Set the trainer's seed, folder, schedule and moments for this turn, and restore them after it."""
        from transformers import TrainerCallback

        trainer, args, turn = self.trainer, self.trainer.args, self.turn
        folder, seeds = args.output_dir, (args.seed, args.data_seed)
        loader = trainer.accelerator.dataloader_config
        done = self.step_done

        class Steps(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
                done()

        args.seed = turn.seed % 2**32
        args.data_seed = loader.data_seed = args.seed
        args.output_dir = str(Path(folder) / f"client-{turn.client}" / f"round-{turn.round + 1}")
        trainer.create_scheduler = self._schedule_over_run(trainer.create_scheduler)
        trainer.create_optimizer = self._restore_moments(trainer.create_optimizer, parameters)
        steps = Steps()
        trainer.add_callback(steps)
        try:
            yield
        finally:
            trainer.remove_callback(steps)
            del trainer.create_scheduler, trainer.create_optimizer
            args.output_dir, (args.seed, args.data_seed), loader.data_seed = folder, seeds, seeds[1]

    def _schedule_over_run(self, create: Callable[..., Any]) -> Callable[..., Any]:
        def create_scheduler(num_training_steps: int, optimizer: Any = None) -> Any:
            if self.schedule == "turn":
                return create(num_training_steps, optimizer)
            scheduler = create(num_training_steps * self.rounds, optimizer)
            advance_scheduler(scheduler, num_training_steps * self.turn.round)
            return scheduler

        return create_scheduler

    def _restore_moments(
        self, create: Callable[..., Any], parameters: Mapping[tuple[str, str], Tensor]
    ) -> Callable[..., Any]:
        def create_optimizer(*args: Any, **options: Any) -> Any:
            optimizer = create(*args, **options)
            kept = (self.state or {}) if self.keep_optimizer else {}
            for key in parameters.keys() & kept.keys():
                # Copied, because the optimizer works in place and the turn may be interrupted.
                moments = {name: x.clone() if torch.is_tensor(x) else x for name, x in kept[key].items()}
                optimizer.state[parameters[key]] = moments
            return optimizer

        return create_optimizer


def unwrap_model(trainer: Any) -> None:
    """Make a ``Trainer`` wrap its model anew in its next ``train()``.

    DDP looks at the parameters that require gradients when it is built, and methods change them from round to round.
    After an evaluation Accelerate takes the model as wrapped, so that processes would train apart from each other.
    """
    trainer.model_wrapped = trainer.model
    if is_parallel():
        attributes = vars(trainer.model)
        attributes.pop("_is_accelerate_prepared", None)
        if (forward := attributes.pop("_original_forward", None)) is not None:  # without mixed precision around it
            trainer.model.forward = forward


def check_loss_scale(trainer: Any) -> None:
    """Raise ``ValueError`` if a ``Trainer`` multiplies a loss by the number of processes that is a mean already.

    By ``average_tokens_across_devices`` the model must divide its loss by the number of tokens of all processes. Many
    models take the number and do not use it: their losses and gradients would be too large.
    """
    if not (trainer.args.average_tokens_across_devices and trainer.model_accepts_loss_kwargs):
        return
    if trainer.compute_loss_func is not None or getattr(trainer, LOSS_SCALE_IS_RIGHT, False):
        return
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    mode, numbers = trainer.model.training, (1000, 2000)
    trainer.model.eval()
    with torch.no_grad():
        items = [torch.tensor(number, device=trainer.args.device) for number in numbers]
        losses = [float(trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=x)) for x in items]
    trainer.model.train(mode)
    if losses[0] == losses[1]:
        network = getattr(trainer.model, "get_base_model", lambda: trainer.model)()
        raise ValueError(
            f"the loss of {type(network).__name__.removeprefix('FSDP')} is a mean over each process's rows, and the "
            "Trainer multiplies it by the number of processes; set average_tokens_across_devices=False."
        )
    setattr(trainer, LOSS_SCALE_IS_RIGHT, True)


def advance_scheduler(scheduler: Any, steps: int) -> None:
    """Set a new learning-rate scheduler to the state after ``steps`` steps."""
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            "args.lr_scheduler_type is reduce_lr_on_plateau, which has no schedule over a run; set "
            'schedule="turn", or take another type.'
        )
    if steps == 0:
        return
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"args.lr_scheduler_type makes a {type(scheduler).__name__}, which cannot go on from a later step; set "
            'schedule="turn", or take another type.'
        )
    scheduler.last_epoch = steps
    rates = [base * rate(steps) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates):
        group["lr"] = rate
    scheduler._last_lr = rates


def evaluate_trainer(trainer: Any) -> tuple[dict[str, float], int]:
    """Return the metrics of a trainer's ``evaluate()``, without the prefix ``eval_``, and its number of rows."""
    models = trainer.accelerator._models
    if find_fsdp(trainer):  # else Accelerate would ask for an optimizer, to shard the model that is sharded already
        models.append(trainer.model)
    if find_zero_plugin(trainer):  # else the Trainer would make an engine, which it refuses below ZeRO stage 3
        models.append(trainer.model)
        trainer.deepspeed = trainer.model
    try:
        found = trainer.evaluate()
    finally:
        models.clear()
        release_engine(trainer)
        unwrap_model(trainer)
    metrics = {name.removeprefix("eval_"): x for name, x in found.items() if name.startswith("eval_")}
    figures = {name: float(x) for name, x in metrics.items() if isinstance(x, int | float) and not name.endswith(SPEED)}
    data = trainer.eval_dataset
    return figures, sum(map(len, data.values())) if isinstance(data, dict) else len(data)

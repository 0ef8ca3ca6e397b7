"""Settings of different sections that exclude each other, checked before anything is loaded."""

from collections.abc import Iterator, Sequence

import torch

from fedlora.adapters import ADAPTERS, Adapter
from fedlora.engines.loop import ENGINES
from fedlora.engines.partition import Given
from fedlora.methods import METHODS
from fedlora.methods._base import Method
from fedlora.runs.sections import Sections
from fedlora.schema import ConfigError
from fedlora.security.attacks._base import Attack
from fedlora.security.privacy import accounting
from fedlora.tasks import TASKS
from fedlora.tasks._base import Task
from fedlora.training.recipe import PROBE_LAYER
from fedlora.types import Turn, Work


def check_compatibility(config: Sections) -> None:
    """Raise ``ValueError`` for the first two settings that exclude each other."""
    for message in _exclusions(config):
        raise ConfigError(message)


def _exclusions(config: Sections) -> Iterator[str]:
    """Yield a sentence for each violation, cheap checks first."""
    if config.rounds < 1:
        yield f"rounds is {config.rounds}; a run needs at least 1."
    check_adapter(type(config.method), config.table["method"]["name"], config.method.adapter)
    yield from _of_method(config)
    yield from _of_own_loop(config)
    yield from _of_compression(config)
    ENGINES.check(config.engine.name)
    yield from _of_parties(config)
    for size in config.clients.remaining_sizes if config.flower.secure_aggregation else ():
        yield from _of_secure_aggregation(config, size)
    yield from _of_trust(config)
    if config.engine.offload and config.evaluation.measure:
        yield "engine.offload keeps uploads on disk, but error measures need them all; set evaluation.measure = false."
    config.engine.select_device()  # raises if the device is not available
    budgets = config.clients.budgets(config.method.adapter.budget, config.seed)
    yield from _of_ranks(config, budgets)
    if config.privacy.on:
        if config.method.uses_gradient:
            yield (
                f"privacy.level is {config.privacy.level!r}, but {config.method.title} chooses what to train by a "
                'gradient on the client\'s rows that gets no noise; set method.score to "weight" or "random".'
            )
        yield from _of_client_privacy(config, budgets) if config.privacy.by_client else _of_example_privacy(config)
        accounting.require_opacus()


def check_adapter(method: type[Method], name: str, adapter: Adapter) -> None:
    """Raise ``ConfigError`` if a method is not defined for an adapter."""
    if not isinstance(adapter, method.adapters):
        allowed = [key for key, value in ADAPTERS.classes().items() if issubclass(value, method.adapters)]
        raise ConfigError(
            f"the method {name!r} is not defined for adapter.name = {ADAPTERS.name_of(type(adapter))!r}; "
            f"set it to {' or '.join(map(repr, allowed))}."
        )


def _of_method(config: Sections) -> Iterator[str]:
    """Yield the settings that the task or the method does not support."""
    method, optimizer = config.method, config.server.optimizer
    if isinstance(config.clients.partitioner, Given) and not config.task.is_own_code:
        yield (
            "clients.partition is 'given', which is for the datasets of fedlora.run(train=[...]); name the partition "
            "of the task's rows, such as 'iid'."
        )
    has_trainers = "trainer" in getattr(config.task, "objects", {})  # each process calls the function for its own
    if config.task.is_own_code and not has_trainers and config.engine.name == "flower-simulation":
        yield (
            "engine.name is 'flower-simulation', whose clients are other processes, and the model and data are Python "
            "objects of this one; leave engine.name out."
        )
    if config.task.is_own_code and config.model.start is not None:
        yield "model.start is set, and the model is a Python object; load the adapter into the model beforehand."
    if config.task.is_own_code and config.model.quantize is not None:
        yield f"model.quantize is {config.model.quantize!r}, and the model is a Python object; quantise it beforehand."
    if config.model.quantize is not None and not config.task.quantizes:
        supported = [name for name, kind in TASKS.classes().items() if kind.quantizes]
        yield (
            f"model.quantize is {config.model.quantize!r}, but {config.table['task']['name']!r} trains its base's head "
            f"in full; leave it out, or take {' or '.join(map(repr, supported))}."
        )
    for section, other in (("training", "training.batch_size"), ("evaluation", "evaluation.batch_size")):
        limit = getattr(config, section).max_tokens
        if limit is not None and type(config.task).padded_lengths is Task.padded_lengths:
            yield (
                f"{section}.max_tokens is {limit}, but rows of {config.table['task']['name']!r} have no tokens; leave "
                f"it out, and set {other}."
            )
    if config.model.quantize is not None and config.model.overlay is False:
        yield (
            f"model.overlay is false, but a base of model.quantize = {config.model.quantize!r} has steps that are "
            "larger than an update and would lose it; leave model.overlay out, so that base updates are kept beside it."
        )
    if config.model.attention != "auto" and not config.task.accepts_loading:
        yield (
            f"model.attention is {config.model.attention!r}, but the task {config.table['task']['name']!r} loads its "
            "network itself; leave model.attention out."
        )
    if config.model.attention == "flash_attention_2" and getattr(config.task, "packing", False):
        yield (
            "model.attention is 'flash_attention_2', which takes no mask that separates the rows of task.packing; set "
            "model.attention to 'sdpa', or leave task.packing out."
        )
    if optimizer != "none" and not method.averages:
        yield (
            f"server.optimizer = {optimizer!r} works on averaged leaves, but {method.title} does not average them; "
            "take a method that averages (such as fedit), or leave the server's optimizer out."
        )
    if config.checkpoint.best == "global" and method.personal:
        yield (
            f"checkpoint.best is 'global', but {method.title} has no global model; set it to 'clients', for their mean."
        )


def _of_own_loop(config: Sections) -> Iterator[str]:
    """Yield the settings that need fedlora's own training loop, if the caller has brought another one."""
    method, clients = config.method, config.clients
    if not getattr(config.task, "has_own_loop", False):
        return
    if config.privacy.by_example:
        yield (
            "privacy.level is 'example', which clips each row's gradient inside fedlora's own training loop; set "
            "privacy.level = 'client', which works on uploads."
        )
    penalty = method.penalty(PROBE_LAYER)
    if isinstance(penalty, torch.Tensor) or penalty != 0.0:
        yield (
            f"{method.title} adds a penalty to the loss with these settings, which a training loop of your own does "
            "not compute; set it to 0, or run the method with fedlora's own loop (fedlora.run)."
        )
    if config.attack is not None and type(config.attack).poison is not Attack.poison:
        yield (
            f"attack.name is {config.table['attack']['name']!r}, which changes rows inside fedlora's own loop; take "
            "an attack on uploads, or let the attackers' trainers have other rows."
        )
    scales_steps = clients.capability is not None and "steps" in clients.capability_scales
    for key in ("local_steps", "stragglers", "permute_labels", "new"):
        if getattr(clients, key):
            yield (
                f"clients.{key} is {getattr(clients, key)!r}, which changes what fedlora's own training loop does; "
                "leave it out, and let the client's trainer do it."
            )
    if scales_steps:
        yield "clients.capability_scales has 'steps', which are those of your own trainers; leave it out."


def _of_compression(config: Sections) -> Iterator[str]:
    method, compression = config.method, config.compression
    if config.flower.secure_aggregation and compression.upward is not None:
        yield (
            f"compression.up is {compression.up!r}, but flower.secure_aggregation adds up masked fixed-point numbers, "
            "and codes with their own scales or positions cannot be added; leave compression.up and top_k out."
        )
    if compression.error_feedback and not method.keeps_frame:
        yield (
            f"compression.error_feedback adds the error of one round to the next, but {method.title} begins each round "
            "in other coordinates; leave error_feedback out, or take a method that averages."
        )
    if compression.downward is not None and compression.downward.coarse and not method.keeps_frame:
        yield (
            f"compression.down is {compression.down!r}, which sends changes only, but {method.title} serves other "
            "coordinates each round; take int8, bfloat16 or float16."
        )


def _of_parties(config: Sections) -> Iterator[str]:
    clients, parties = config.clients, len(config.party)
    if parties and not clients.own_data:
        yield (
            "[[party]] tables give each client its own data, but clients.partition is "
            f'{clients.partition_table["name"]!r}; set it to {{ name = "own" }}, or leave them out.'
        )
    if parties and parties != clients.count:
        yield f"there are {parties} [[party]] tables, but clients.count is {clients.count}; each client has one."
    if clients.own_data and config.checkpoint.best == "global":
        yield (
            "checkpoint.best is 'global', but clients.partition is 'own', so the server has no test rows; set it to "
            "'clients', for the mean of their scores."
        )


def _of_secure_aggregation(config: Sections, cohort: int) -> Iterator[str]:
    method, threshold = config.method, config.flower.secure_threshold
    if not method.sums:
        supported = [name for name, kind in METHODS.classes().items() if kind.sums]
        yield (
            f"flower.secure_aggregation hides each upload in a sum, but {method.title}'s server must see every "
            f"client's factors; take one of {', '.join(supported)}, or leave secure_aggregation out."
        )
    if cohort < 3 or (threshold is not None and not cohort / 2 < threshold <= cohort):
        yield (
            f"flower.secure_aggregation has rounds of {cohort} clients and a threshold of {threshold}; "
            "it needs 3 clients, and a threshold above half of them."
        )


def _of_trust(config: Sections) -> Iterator[str]:
    """Yield the violations of ``[robust]`` and ``[attack]``; the plug-ins raise their own."""
    is_secure = config.flower.secure_aggregation
    if config.robust is not None:
        config.robust.check(config.method, is_secure)
        if config.privacy.sums_clients:
            yield (
                "[robust] lets one client's upload decide about another's, so privacy.noise_on = 'sum' cannot bound "
                'what one client changes; set privacy.noise_on = "upload", or leave [robust] out.'
            )
    if config.attack is not None:
        config.attack.check(config.method, config.task, is_secure)


def _of_ranks(config: Sections, budgets: Sequence[int]) -> Iterator[str]:
    name, method, clients = config.table["method"]["name"], config.method, config.clients
    if not method.any_rank and len(set(budgets)) > 1:
        supported = [other for other, kind in METHODS.classes().items() if kind.any_rank]
        key, remedy = "ranks", "set one number"
        if clients.capability is not None:
            key, remedy = "capability", 'take "rank" out of clients.capability_scales'
        yield (
            f"clients.{key} gives the clients ranks {sorted(set(budgets))}, but {name!r} needs one rank for all; "
            f"{remedy}, or take {' or '.join(map(repr, supported))}."
        )
    if config.training.local_epochs is not None and clients.local_steps is not None:
        yield "clients.local_steps and training.local_epochs are both set; keep one of them."
    if not method.any_rank and set(budgets) != {method.adapter.budget}:
        yield (
            f"clients.ranks is {budgets[0]}, but adapter.rank is {method.adapter.budget}; "
            f"{name!r} needs them equal: leave clients.ranks out."
        )


def _of_client_privacy(config: Sections, budgets: Sequence[int]) -> Iterator[str]:
    """Yield the settings that have no privacy guarantee for whole clients."""
    method, clients, privacy, full = config.method, config.clients, config.privacy, config.method.adapter.budget
    layer = {leaf: torch.zeros(1, 1) for leaf in method.adapter.trainable}
    if not method.send(Work(layer, layer, frozenset(layer)), Turn(0, 0, 1)):
        yield f"privacy.level is 'client', but {method.title} sends nothing; set privacy.level = 'example' or 'none'."
    if method.weighting != "uniform":
        yield (
            "privacy.level is 'client' and method.weighting is 'examples': a client's weight depends on its rows, so "
            'no noise bounds its part; set method.weighting = "uniform".'
        )
    if method.prunes:
        yield (
            f"privacy.level is 'client', but {method.title}'s ranks depend on the training, so the size of an upload "
            "reveals what noise should hide; set method.decay = 1.0."
        )
    if privacy.noise_on == "sum" and not (method.sums and method.averages):
        yield (
            f"privacy.noise_on is 'sum', but {method.title}'s server is no sum of what is sent, so one client's part "
            'in it has no bound; set privacy.noise_on = "upload", which adds noise to every upload by itself.'
        )
    if privacy.noise_on == "sum" and set(budgets) != {full}:
        yield (
            f"clients train {min(budgets)} to {max(budgets)} of {full} ranks or heads: the fewer clients train a rank, "
            "the more each of them weighs in its mean; give all clients all, or set privacy.noise_on = 'upload'."
        )
    if clients.rate is not None and (clients.dropout or clients.stragglers):
        yield (
            "clients.sampling is 'poisson', but dropout and stragglers are drawn as shares of a cohort, so one client "
            "more changes what others do; leave clients.dropout and clients.stragglers out."
        )
    privacy.delta_of(clients.members)  # raises if delta is too large for so few clients


def _of_example_privacy(config: Sections) -> Iterator[str]:
    """Yield the settings that have no privacy guarantee for single rows."""
    if config.privacy.noise_on != "sum":
        yield (
            "privacy.noise_on is 'upload', which belongs to privacy.level = 'client'; at the level 'example' the noise "
            "is in every step: leave it out."
        )
    if config.task.losses_obstacle is not None:
        yield f"privacy.level is 'example', but {config.task.losses_obstacle}."
    if getattr(config.task, "packing", False):
        yield (
            "task.packing is set, but rows in one sequence have no gradients of their own; with privacy.level = "
            "'example' set task.packing = false."
        )

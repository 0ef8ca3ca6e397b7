"""The description of a model with adapters that another machine holds, and a ``Model`` without a network made of it.

A server of clients with their own trainers has no model. It takes the description and the first leaves of one client,
and compares those of the others with them.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedlora.adapters import ADAPTERS, Adapter, Dense
from fedlora.engines.inputs import SAMPLE, model_settings
from fedlora.schema import construct, construct_by_name
from fedlora.security.validation.expected import RefusedError
from fedlora.text import display_safe
from fedlora.training.local import Training
from fedlora.training.model import Model
from fedlora.training.parts import Part
from fedlora.training.peft_model import read_peft_config
from fedlora.types import Tree

PARTS = 20_000  # parts of a model
NAME = 500  # characters of a name
SIDE = 2**24  # outputs or inputs of a weight
VALUES = 2**31  # of all leaves together
PEFT = (  # the settings of PEFT that a description may have: none that names code
    "peft_type", "task_type", "base_model_name_or_path", "revision", "r", "target_modules", "modules_to_save",
    "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "fan_in_fan_out",
    "inference_mode", "layers_to_transform", "layers_pattern",
)  # fmt: skip
ORIGINAL = ".original_module."  # PEFT's unused copy of a module that is trained in full


@dataclass(frozen=True)
class PartSpec:
    """One part: its adapter, and the outputs and inputs of its base weight; None for a part trained in full."""

    adapter: Adapter
    shape: tuple[int, int] | None
    from_seed: bool  # whether the run's seed determines its first leaves


@dataclass(frozen=True)
class ModelSpec:
    """Everything about a client's model that a server and the other clients must know, except for its first leaves."""

    name: str
    adapter: Adapter  # of the method; single parts may have another rank or scale
    parts: Mapping[str, PartSpec]
    base: str  # a digest of the pretrained weights
    settings: Mapping[str, str] = field(default_factory=dict)  # see ``inputs.model_settings``
    training: Training = field(default_factory=Training)  # as far as it is known
    peft: Mapping[str, Any] = field(default_factory=dict)  # PEFT's configuration of the adapter, for an export
    has_scores: bool = True  # whether clients evaluate

    def to_json(self) -> str:
        """Return the description as JSON. Each adapter is in it once."""
        adapters = list(dict.fromkeys([self.adapter, *(part.adapter for part in self.parts.values())]))
        parts = {
            path: [adapters.index(part.adapter), part.from_seed, *(part.shape or ())]
            for path, part in self.parts.items()
        }
        table = {
            "name": self.name, "adapters": [_adapter_table(x) for x in adapters], "parts": parts, "base": self.base,
            "settings": dict(self.settings), "peft": dict(self.peft), "has_scores": self.has_scores,
            "training": {key: x for key, x in asdict(self.training).items() if x is not None},
        }  # fmt: skip
        return json.dumps(table)

    @classmethod
    def from_json(cls, text: str) -> "ModelSpec":
        """Invert ``to_json``. The text may come from anybody: raises ``RefusedError`` for one that makes no sense."""
        try:
            table = json.loads(text)
            adapters = [_read_adapter(x) for x in table["adapters"]]
            parts = {_read_name(path): _read_part(entry, adapters) for path, entry in table["parts"].items()}
            settings = {_read_name(key): _read_name(value) for key, value in table["settings"].items()}
            training = construct(Training, "training", table["training"])
            spec = cls(
                _read_name(table["name"]), adapters[0], parts, _read_name(table["base"]), settings, training,
                {key: table["peft"][key] for key in PEFT if key in table["peft"]}, table["has_scores"] is True,
            )  # fmt: skip
        except RefusedError:
            raise
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, ImportError, RecursionError) as error:
            raise RefusedError(f"its description of the model is malformed ({display_safe(error)})") from error
        sizes = [sum(part.shape) * max(1, part.adapter.budget) for part in parts.values() if part.shape is not None]
        if not sizes or len(parts) > PARTS or sum(sizes) > VALUES:
            raise RefusedError(f"its model has {len(parts)} parts and adapters of {sum(sizes)} values")
        return spec

    def find_difference(self, other: "ModelSpec") -> str | None:
        """Return the first difference of this model from the run's, as the end of a sentence; None if there is none."""
        for path in sorted(self.parts.keys() | other.parts.keys()):
            mine, theirs = (_describe_part(spec.parts.get(path)) for spec in (self, other))
            if mine != theirs:
                return f"its model has {mine} at {path!r}, and the run's {theirs}"
        if self.adapter != other.adapter:
            return f"its adapter is {self.adapter}, and the run's {other.adapter}"
        odd = [k for k in sorted({*self.settings, *other.settings}) if self.settings.get(k) != other.settings.get(k)]
        if odd:
            values = (spec.settings.get(odd[0], "its default") for spec in (self, other))
            return "in its model's config.json {} is {}, and in the run's {}".format(odd[0], *values)
        if self.base != other.base:
            return "its pretrained model has other weights than the run's"
        return None


def describe_model(model: Model, name: str, adapter: Adapter, training: Training, has_scores: bool) -> ModelSpec:
    """Return the description of a model, whose base has no updates."""
    parts = {path: PartSpec(part.adapter, part.shape, part.from_seed) for path, part in model.parts.items()}
    settings = model_settings(model.network)
    own = read_peft_config(model.network)
    peft = {key: own[key] for key in PEFT if key in own}
    return ModelSpec(name[:NAME], adapter, parts, digest_weights(model), settings, training, peft, has_scores)


def digest_weights(model: Model) -> str:
    """Return a digest of up to 1,024 values of each frozen weight, in bfloat16, the coarsest precision of a base."""
    hasher = hashlib.blake2b(digest_size=16)
    leaves = {x.data_ptr() for part in model.parts.values() for x in part.leaves.values()}
    for name, x in sorted(model.network.state_dict().items()):
        if isinstance(x, Tensor) and x.data_ptr() not in leaves and ORIGINAL not in name:
            values = x.detach().reshape(-1)
            values = values[:: max(1, len(values) // SAMPLE)][:SAMPLE]
            values = values.bfloat16().view(torch.int16) if values.is_floating_point() else values
            hasher.update(f"{name} {tuple(x.shape)}".encode() + values.cpu().numpy().tobytes())
    return hasher.hexdigest()


class RemoteModel(Model):
    """The model of clients on other machines, without a network: leaves and rules, but no forward pass.

    ``leaves`` are the first ones of the parts whose first leaves no seed determines. Raises ``RefusedError`` if they do
    not belong to the description.
    """

    losses_obstacle: ClassVar[str] = "the loss is inside the caller's own loop"

    def __init__(self, spec: ModelSpec, leaves: Tree):
        own = [path for path, part in spec.parts.items() if not part.from_seed]
        if leaves.keys() != set(own):
            odd = sorted(leaves.keys() ^ set(own))[0]
            raise RefusedError(f"the first leaves of {display_safe(odd)!r} are missing, or belong to no part")
        for path in own:
            _check_leaves(path, spec.parts[path], leaves[path])
        parts = {path: RemotePart.build(part, leaves.get(path, {})) for path, part in spec.parts.items()}
        super().__init__(nn.Module(), parts, "float32", torch.device("cpu"))
        self.spec = spec
        self.remote_adapter = spec.adapter
        self.remote_base = {"base": spec.base, "settings": dict(spec.settings)}

    def fold(self, base_updates: Mapping[str, Any]) -> None:
        self.base_version += 1  # the base is on the clients' machines

    def unfold(self) -> None:
        self.base_version += 1


@dataclass(frozen=True)
class RemotePart(Part):
    """A part of a model on other machines; ``module`` holds its first leaves."""

    size: tuple[int, int] | None = None
    from_seed: bool = False  # type: ignore[misc]

    @classmethod
    def build(cls, part: PartSpec, leaves: Mapping[str, Tensor]) -> "RemotePart":
        """Return the part of a description with these leaves."""
        frozen = {name: nn.Parameter(x, requires_grad=False) for name, x in leaves.items()}
        return cls(nn.ParameterDict(frozen), part.adapter, part.shape, part.from_seed)

    @property
    def leaves(self) -> Mapping[str, nn.Parameter]:
        return dict(self.module.items())  # type: ignore[operator]

    @property
    def shape(self) -> tuple[int, int] | None:
        return self.size


def _adapter_table(adapter: Adapter) -> dict[str, Any]:
    if isinstance(adapter, Dense):
        return {"name": "dense", "names": sorted(adapter.names)}
    settings = {key: x for key, x in asdict(adapter).items() if x is not None}
    return {"name": ADAPTERS.name_of(type(adapter)), **settings}


def _read_adapter(table: Mapping[str, Any]) -> Adapter:
    if table["name"] == "dense":
        return Dense(frozenset(_read_name(name) for name in table["names"]))
    if table["name"] not in ADAPTERS.names():  # a name from elsewhere imports no module here
        raise RefusedError(f"its adapter is {display_safe(table['name'])!r}, which is not installed here")
    return construct_by_name(ADAPTERS, "adapter", dict(table))


def _read_part(entry: Any, adapters: list[Adapter]) -> PartSpec:
    number, from_seed, *shape = entry
    is_sound = type(number) is int and 0 <= number < len(adapters) and type(from_seed) is bool
    if not is_sound or len(shape) not in (0, 2) or not all(type(n) is int and 0 < n <= SIDE for n in shape):
        raise RefusedError("a part of its model has no adapter, or no usual shape")
    adapter = adapters[number]
    if isinstance(adapter, Dense) != (not shape) or (from_seed and not shape):
        raise RefusedError("a part of its model has a shape that does not belong to its adapter")
    return PartSpec(adapter, (shape[0], shape[1]) if shape else None, from_seed)


def _read_name(value: Any) -> str:
    if not isinstance(value, str) or len(value) > NAME or not value.isprintable():
        raise RefusedError(f"its description of the model has {display_safe(value, 60)!r}, which is no plain text")
    return value


def _describe_part(part: PartSpec | None) -> str:
    if part is None:
        return "nothing"
    if part.shape is None:
        return f"{', '.join(sorted(part.adapter.trainable))} trained in full"
    return f"{part.adapter} on a weight of {part.shape[0]} x {part.shape[1]}"


def _check_leaves(path: str, part: PartSpec, leaves: Mapping[str, Tensor]) -> None:
    """Raise ``RefusedError`` unless the leaves are finite, float32, and those of the part's adapter."""
    if part.shape is None:
        shapes: Mapping[str, Any] = dict.fromkeys(part.adapter.trainable)
    elif sum(part.shape) * part.adapter.budget > sum(x.numel() for x in leaves.values()):
        raise RefusedError(f"the first leaves of {path!r} are too few for {part.adapter}")
    else:
        shapes = {leaf: x.shape for leaf, x in part.adapter.init(*part.shape, 0).items()}
    if leaves.keys() != shapes.keys():
        raise RefusedError(f"{path!r} has the first leaves {sorted(leaves)}, and its adapter has {sorted(shapes)}")
    for leaf, x in leaves.items():
        if shapes[leaf] not in (None, x.shape) or x.dtype != torch.float32 or not bool(x.isfinite().all()):
            raise RefusedError(f"the first {leaf} of {path!r} is {x.dtype} {tuple(x.shape)}, or not finite")

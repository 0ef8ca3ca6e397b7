"""Whether finished adapters belong together."""

from collections.abc import Sequence

from fedlora.training.base_model import same_base
from fedlora.training.peft_folder import AdapterFolder
from fedlora.training.peft_settings import compare_settings


def check_together(adapters: Sequence[AdapterFolder], one_base: bool = False) -> None:
    """``ValueError`` where they do not: one base model and task, the same weights, of the same sizes.

    ``one_base`` says that the base models are one, whatever they are called.
    """
    first = adapters[0]
    _check_labels(adapters)
    for other in adapters[1:]:
        if not one_base:
            _check_base(first, other)
        compare_settings(first.path, first.config, other.path, other.config)
        _check_weights(first, other)


def _check_weights(first: AdapterFolder, other: AdapterFolder) -> None:
    odd = sorted(set(first.shapes) ^ set(other.shapes)) or sorted(set(first.whole) ^ set(other.whole))
    if odd:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise ValueError(
            f"{str(first.path)!r} and {str(other.path)!r} do not adapt the same weights; only one of them has "
            f"{', '.join(odd[:3])}{more}."
        )
    pairs = [(p, s[:2], other.shapes[p][:2]) for p, s in first.shapes.items()]
    for part, *both in [*pairs, *((key, s, other.whole[key]) for key, s in first.whole.items())]:
        here, there = (" x ".join(map(str, sizes)) for sizes in both)
        if here != there:
            raise ValueError(
                f"{part!r} is {here} in {str(first.path)!r} but {there} in {str(other.path)!r}; combine adapters "
                "of one model and task."
            )


def _check_base(first: AdapterFolder, other: AdapterFolder) -> None:
    known = same_base(first.base, other.base)
    if known is None:
        raise ValueError(
            f"the adapters have different base models: {first.base} in {str(first.path)!r} and {other.base} in "
            f"{str(other.path)!r}; combine adapters of one model, or where these are two names of one, say --same-base."
        )
    if not known:
        raise ValueError(
            f"the adapters have different base models: the weights of {first.base} in {str(first.path)!r} are not "
            f"those of {other.base} in {str(other.path)!r}; combine adapters of one model, or where the files differ "
            "but not the weights, say --same-base."
        )


def _check_labels(adapters: Sequence[AdapterFolder]) -> None:
    """``ValueError`` where two adapters call their outputs otherwise."""
    named = [a for a in adapters if a.labels is not None]
    for other in named[1:]:
        here, there = named[0].labels or (), other.labels or ()
        if here != there:
            k = next((k for k, pair in enumerate(zip(here, there)) if pair[0] != pair[1]), min(len(here), len(there)))
            one, two = (repr(x[k]) if k < len(x) else "none" for x in (here, there))
            raise ValueError(
                f"the adapters have different labels: label {k} is {one} in {str(named[0].path)!r} and {two} in "
                f"{str(other.path)!r}; train them with one task.label_names."
            )

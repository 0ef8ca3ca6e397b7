"""A tiny federation that is broken off and goes on, and what must be alike then."""

import json

import fedlora
from fedlora.files import load_tree
from tests.fixtures.federation import REFERENCE, config, same, settings

SMALL = (
    "task.train_rows=60", "task.test_rows=30", "training.local_steps=1", "training.batch_size=8",
    "clients.split={name='iid'}",
)  # fmt: skip


def small(name, *more):
    """A configuration of a method, three clients, a fraction of a second a round."""
    return config(*settings(name), *SMALL, *more)


def like_reference(name, *more):
    """The configuration of ``reference(name)``, and settings that leave its bits alone."""
    return config(*settings(name), *REFERENCE, *more)


def breaking(event, after, kind="step"):
    """Ctrl-C in the round after so many; as a run's ``watch``."""
    if event.kind == kind and event.round == after:
        raise KeyboardInterrupt


def stopped(made, folder, after):
    """A run that was asked for more rounds than it came to."""
    return fedlora.run(made, folder, lambda event: breaking(event, after, "turn"))


def lines(folder):
    """A run's records without what the clock says."""
    text = (folder / "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in text.splitlines()]


def trees(folder):
    """All leaves that a run leaves, by file."""
    return {
        str(path.relative_to(folder)): load_tree(path)
        for path in sorted(folder.rglob("*.safetensors"))
        if "checkpoints" not in path.parts
    }


def ledger(folder):
    """The crossings that the newest checkpoint has."""
    from fedlora.engines.snapshot import _crossings
    from fedlora.engines.verified_files import unpacked

    newest = sorted(path for path in (folder / "checkpoints").glob("[0-9]*"))[-1]
    tree, about = unpacked(newest.read_bytes())
    return _crossings(tree["numbers"]["ledger"], about["words"])


def alike(folder, other):
    """Whether two runs left the same bits: what is shared, what is kept, folds, records, and every crossing."""
    a, b = trees(folder), trees(other)
    assert a.keys() == b.keys()
    for name in a:
        assert same(a[name], b[name]), name
    assert lines(folder) == lines(other)
    assert sorted(ledger(folder)) == sorted(ledger(other)), "on a grid, replies of a round come in any order"
    return True

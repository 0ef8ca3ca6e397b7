"""One run on the grid for each method, with every message that crossed, for all tests that only look at it."""

from typing import NamedTuple

import pytest

from fedlora.methods import METHODS


class Finished(NamedTuple):
    """A run on the grid: its world, its rounds, and a copy of every message, in the order of crossing."""

    world: object
    rounds: list
    messages: list

    def up(self):
        """What parties sent."""
        return [m for m in self.messages if m.metadata.src_node_id >= 10]


@pytest.fixture(scope="session")
def grid(tmp_path_factory):
    """``grid(method)``: the run of ``reference(method)``'s configuration on the grid, made once a worker.

    Tests look at it and leave it as it is.
    """
    from tests.fixtures.federation import REFERENCE, settings
    from tests.fixtures.flower import World

    folder, runs = tmp_path_factory.mktemp("grid"), {}

    def run(name: str) -> Finished:
        if name not in runs:
            messages = []

            def post(message):
                messages.append(message)
                return message

            world = World(folder / name, *settings(name), *REFERENCE, post=post)
            runs[name] = Finished(world, world.run(), messages)
        return runs[name]

    return run


@pytest.fixture(params=[pytest.param(n, marks=pytest.mark.xdist_group(f"grid of {n}")) for n in METHODS.names()])
def name(request):
    """Every method in turn; the tests of one method run on one worker, which has its runs."""
    return request.param

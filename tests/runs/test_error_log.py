"""No error reaches the user as a traceback: one sentence, and the traceback in a file."""

import os
import pickle
import subprocess

import click
import pytest
from typer.main import get_command

from fedlora.cli import app
from fedlora.methods import METHODS
from fedlora.runs import error_log as crash
from tests.fixtures.toml import TOML

# A command in a process where one function of a library raises.
BROKEN = """
import sys, types
library = types.ModuleType("library")
exec("def fails(*a, **k): raise {error}", library.__dict__)
import fedlora.{module}
fedlora.{module}.{name} = library.fails
from fedlora.cli import main
main()
"""


@pytest.fixture
def broken(commands, tmp_path):
    (tmp_path / "my.toml").write_text(TOML)

    def call(where: str, error: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        module, _, name = where.partition(":")
        code = BROKEN.format(module=module, name=name, error=error)
        return commands.call(["python", "-c", code, *arguments], tmp_path, {**os.environ, **environment})

    return call


@pytest.mark.parametrize(
    ("where", "error", "arguments", "log"),
    [
        ("engines.in_process:InProcess.run", "IndexError('index out of range in self')", ["run", "my.toml", "--out", "r"], "r"),
        ("engines.client_turn:client_turn", "RuntimeError('CUDA error')", ["compare", "my.toml", "--methods", "local", "--out", "c"], "c/local-seed0"),
        ("runs.config:Config.federation", "KeyError('x')", ["run", "my.toml", "--out", "r"], "."),
        ("runs.config:Config.federation", "ValueError('inhomogeneous shape')", ["run", "my.toml", "--out", "r"], "."),
        ("runs.plan.plan:plan_methods", "TypeError('no')", ["plan", "my.toml"], "."),
        ("runs.sweep:Sweep.plan", "AssertionError()", ["sweep", "my.toml", "-o", "training.learning_rate=1e-3,1e-2"], "."),
        ("export.aggregate:aggregate_adapters", "OSError('Unable to load weights')", ["aggregate", "a", "b", "--out", "m"], "."),
        ("runs.folder:RunFolder.open", "AttributeError('no')", ["export", "r", "--out", "m"], "."),
        ("runs.folder:RunFolder.open", "NotImplementedError('no')", ["chat", "r", "--prompt", "x"], "."),
    ],
)  # fmt: skip
def test_an_unexpected_error_is_one_sentence_and_a_file(broken, tmp_path, where, error, arguments, log):
    found = broken(where, error, *arguments)
    assert (found.returncode, found.stdout) == (2, ""), found.stderr
    assert found.stderr.count("\n") == 1 and "Traceback" not in found.stderr, found.stderr
    kind = error.partition("(")[0]
    assert found.stderr.startswith(f"fedlora: an unexpected {kind} came from library")
    path = tmp_path / log / "error.log"
    assert str(path.relative_to(tmp_path)) in found.stderr
    text = path.read_text()
    assert "Traceback (most recent call last)" in text and kind in text and "torch " in text


def test_a_second_error_is_added_and_a_traceback_can_be_asked_for(broken, tmp_path):
    for _ in range(2):
        broken("runs.plan.plan:plan_methods", "TypeError('no')", "plan", "my.toml")
    assert (tmp_path / "error.log").read_text().count("Traceback") == 2
    found = broken("runs.plan.plan:plan_methods", "TypeError('no')", "plan", "my.toml", FEDLORA_TRACEBACK="1")
    assert found.returncode == 1 and "Traceback" in found.stderr
    assert (tmp_path / "error.log").read_text().count("Traceback") == 2


def test_a_users_mistake_leaves_no_file(broken, tmp_path):
    found = broken("runs.plan.plan:plan_methods", "TypeError('no')", "run", "none.toml")
    assert found.returncode == 2 and "there is no configuration file" in found.stderr
    assert not (tmp_path / "error.log").exists()


def test_an_error_from_another_process_says_the_same(tmp_path):
    """Pickling loses the traceback."""
    for call in (lambda: METHODS.load("fedditt"), lambda: [][0]):
        error = _raised(call)
        crash.write_traceback(error, tmp_path)
        there = pickle.loads(pickle.dumps(error))
        assert there.__traceback__ is None and crash.explain_error(there) == crash.explain_error(error)
    assert "an unexpected IndexError" in crash.explain_error(there)


def test_a_file_of_the_system_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    error = _raised(lambda: list((tmp_path / "file").iterdir()))
    sentence = crash.explain_error(error)
    assert str(tmp_path / "file") in sentence and "not a directory" in sentence and "Errno" not in sentence


def _raised(call):
    with pytest.raises(Exception) as found:
        call()
    return found.value


def _every(command: click.Command, context: click.Context):
    yield command, context
    for name, one in getattr(command, "commands", {}).items():
        yield from _every(one, click.Context(one, context, name))


def test_help_is_plain():
    root = get_command(app)
    texts = [command.get_help(context) for command, context in _every(root, click.Context(root, info_name="fedlora"))]
    assert len(texts) > 20 and not [text for text in texts if "\\" in text]
    assert any("[required]" in text for text in texts) and any("[x>=1]" in text for text in texts)

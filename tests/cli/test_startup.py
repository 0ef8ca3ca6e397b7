"""Starting stays cheap, and the shell can complete."""

import json
import os
import subprocess
import sys

import pytest

from fedlora.cli import _completion as completing
from fedlora.methods import METHODS

HEAVY = ("torch", "transformers", "pydantic", "numpy", "pandas", "rich", "importlib.metadata")


def modules_after(code):
    text = f"import sys; {code}; import json; print(json.dumps(sorted(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True).stdout
    return set(json.loads(found.splitlines()[-1]))


def test_import_fedlora_imports_nothing_heavy_and_names_come_when_asked():
    found = modules_after("import fedlora")
    assert not found & set(HEAVY)
    assert sum(name.startswith("fedlora") for name in found) == 1
    code = (
        "import fedlora; assert fedlora.__version__.startswith('0.'); fedlora.Callback; assert 'torch' in sys.modules"
    )
    assert "fedlora.runs.callbacks" in modules_after(code)


def test_help_watch_and_cite_do_not_wait_for_torch():
    found = modules_after("import fedlora.cli, fedlora.runs.progress_file, fedlora.reporting.watch")
    assert not found & {"torch", "transformers", "pydantic", "pandas"}


def test_what_is_not_there_is_said():
    import fedlora

    with pytest.raises(AttributeError, match="no attribute 'runn'"):
        fedlora.runn  # noqa: B018
    assert set(fedlora.__all__) == set(dir(fedlora))


def test_methods_complete():
    assert completing.list_method_names() == METHODS.names(), "without importing a method"
    assert completing.complete_method("fedr") == ["fedrot-lora"]
    assert completing.complete_methods("fedit,fedr") == ["fedit,fedrot-lora"]
    assert "fedit,fedit" not in completing.complete_methods(
        "fedit,"
    ) and "fedit,centralised" in completing.complete_methods("fedit,")
    assert completing.complete_override("method.name=ra") == ["method.name=ravan"] and completing.complete_override(
        "meth"
    ) == ["method.name="]
    assert completing.complete_override("rounds=") == []


def test_the_shell_is_offered_commands_and_methods(commands, tmp_path):
    def completed(line, word):
        """What bash would offer."""
        env = {**os.environ, "_FEDLORA_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(word)}
        return commands.call(["fedlora"], tmp_path, env).stdout.split()

    assert {"watch", "doctor", "cite"} <= set(completed("fedlora ", 1))
    assert completed("fedlora cite fedr", 2) == ["fedrot-lora"]
    assert completed("fedlora methods rav", 2) == ["ravan"]
    assert completed("fedlora compare x.toml --methods fedit,rav", 4) == ["fedit,ravan"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_shown_and_installed(shell, commands, tmp_path):
    env = {**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    shown = commands.call(["fedlora", "--show-completion", shell], tmp_path, env)
    assert shown.returncode == 0 and "_FEDLORA_COMPLETE" in shown.stdout
    installed = commands.call(["fedlora", "--install-completion", shell], tmp_path, env)
    assert installed.returncode == 0, installed.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file() and "_FEDLORA_COMPLETE" in path.read_text()]
    assert written, "a file that the shell reads"

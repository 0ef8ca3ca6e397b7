"""`fedlora new-method` in a copy of the checkout: found, lawful, tested."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedlora.cli.methods import write_method

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path):
    for folder in ("src", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_a_new_method_is_found_and_held_to_the_laws(checkout):
    paths = write_method("fed-new", "https://example.org/paper", checkout)
    assert [path.name for path in paths] == ["fed_new.py", "test_fed_new.py"]
    wrong = paths[1].with_name("test_fed_new_wrong.py")
    wrong.write_text(paths[1].read_text().replace("zip(c.w, c.A)", "zip(c.w[::-1], c.A)"))
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "-k", "FedNew or fed_new",
         "tests/methods/test_fed_new.py", "tests/methods/test_fed_new_wrong.py", "tests/laws/test_laws.py"],
        cwd=checkout, check=False, env={**os.environ, "PYTHONPATH": str(checkout / "src")}, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 1, found.stdout + found.stderr
    results = re.findall(r"^(PASSED|FAILED|ERROR) ([\w/]+\.py)", found.stdout, re.M)
    assert {place for result, place in results if result != "PASSED"} == {"tests/methods/test_fed_new_wrong.py"}, (
        "only where its closed form is wrong",
        found.stdout,
    )
    for place in ("tests/methods/test_fed_new.py", "tests/laws/test_laws.py"):
        assert ("PASSED", place) in results, found.stdout


def test_mistakes(checkout, tmp_path):
    with pytest.raises(ValueError, match="a method cannot be called 'FedSVD'; its name is lower-case"):
        write_method("FedSVD", None, checkout)
    with pytest.raises(ValueError, match="there is a method 'fedit' already"):
        write_method("fedit", None, checkout)
    with pytest.raises(ValueError, match="is no checkout of fedlora"):
        write_method("fed-new", None, tmp_path / "elsewhere")

"""Every block of code in README.md and docs/ runs, page by page, in an empty folder; see blocks.py for the exceptions."""

import os
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

from fedlora.runs.config import build
from fedlora.schema import dumps, merge_tables
from tests.docs import blocks, standins

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TESTED = [path for path in PAGES if "```" in path.read_text(encoding="utf-8")]
# Their commands are those of the README, the quickstart and the tutorials with other options.
SECOND_TIER = {"docs/personal.md", "docs/plan.md", "docs/report.md", "docs/sweep.md"}
SECONDS = float(os.environ.get("FEDLORA_DOCS_SECONDS", 600))  # for one block, on a machine that may be busy


def language(block: blocks.Block) -> str:
    """README's blocks of commands have no language; elsewhere one is needed."""
    return block.language or ("bash" if block.page == "README.md" else "")


def left_out(block: blocks.Block) -> str | None:
    """Why a block is not run."""
    if block.page == "README.md":
        return next((why for begins, why in standins.README_NOT_RUN.items() if block.text.startswith(begins)), None)
    return block.said.get("not run")


@pytest.fixture(scope="module")
def programs(commands, tmp_path_factory):
    return commands.write_programs(tmp_path_factory.mktemp("docs") / "bin")


@pytest.fixture
def shell(programs, tmp_path):
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FEDLORA")}
    environment = {**kept, "PATH": path, "HOME": str(tmp_path), "NO_COLOR": "1", "COLUMNS": "140", "TERM": "dumb"}

    def call(text: str, seconds: float = SECONDS) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", text], cwd=tmp_path, env=environment, text=True, timeout=seconds,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip

    return call


def prepared(path: Path, folder: Path, shell) -> None:
    """The page's folder as its comments want it."""
    for name in blocks.asides(path, "stand-in"):
        standins.quick(folder, name)
    for name in blocks.asides(path, "encoder"):
        standins.encoder(folder, name)
    for name in blocks.asides(path, "decoder"):
        standins.decoder(folder, name)
    if path.name == "README.md":
        (folder / "mine.toml").write_text(standins.README_CONFIG)
    shutil.copytree(ROOT / "examples", folder / "examples")
    for name in blocks.asides(path, "in small"):
        standins.example(ROOT, folder, name)
    for command in blocks.asides(path, "first"):
        done(f"{path.name}, before its blocks", command, shell)


def done(where: str, command: str, shell) -> None:
    """A command that a page does not show, but needs."""
    found = shell(command)
    assert found.returncode == 0, f"{where}: {command}\n{found.stdout}"


def commands(block: blocks.Block, shell) -> None:
    """Each command ends as it should, and prints what the page shows."""
    parts = blocks.steps(block)
    for number, (text, shown) in enumerate(parts, 1):
        found = shell(text)
        status = int(block.said.get("fails", 0)) if number == len(parts) else 0
        assert found.returncode == status, f"{block.place}: {text}\nended with {found.returncode}:\n{found.stdout}"
        if shown:
            assert blocks.agrees(found.stdout, shown), f"{block.place}: {text}\nprinted:\n{found.stdout}\nnot:\n{shown}"


def script(block: blocks.Block, shell, folder: Path) -> None:
    """A Python block in a process of its own; its first line may name its file, which later blocks import."""
    first = block.text.splitlines()[0].removeprefix("# ")
    name = first if first.isascii() and first.endswith(".py") and " " not in first else f"block_{block.line}.py"
    (folder / name).write_text(block.text + "\n")
    found = shell(f"python {shlex.quote(name)}")
    assert found.returncode == 0, f"{block.place}:\n{found.stdout}"


def configuration(block: blocks.Block, base: dict, folder: Path, own_network: bool) -> dict:
    """A TOML block is built, laid over the page's last whole one where it is a part.

    Its first line may name its file; the page's commands then find it there in small.
    """
    table = tomllib.loads(block.text)
    whole = {"model", "task"} <= table.keys()
    table = table if whole else merge_tables(base, table)
    build(table)
    name = block.text.splitlines()[0].removeprefix("# ").partition(":")[0].strip()
    if block.text.startswith("# ") and name.endswith(".toml") and " " not in name and not (folder / name).exists():
        (folder / name).write_text(dumps(standins.small(table, own_network)))
    return table if whole else base


def run(path: Path, shell, folder: Path, processes: bool) -> None:
    """The page from its first block to its last."""
    prepared(path, folder, shell)
    base, found = tomllib.loads(standins.QUICK), blocks.blocks(path, ROOT)
    own_network = any(block.language == "python" and "demo_vit" in block.text for block in found)  # the page reads it
    for block in found:
        kind = language(block)
        if "written" in block.said:
            tomllib.loads(block.text)
            (folder / block.text.splitlines()[0].removeprefix("# ")).write_text(block.text + "\n")
        elif left_out(block) is not None or ("processes" in block.said and not processes):
            continue
        elif kind in blocks.SHELL:
            if block.page == "README.md":
                before = [text for begins, text in standins.README_BEFORE.items() if block.text.startswith(begins)]
                for command in before:
                    done(block.place, command, shell)
            commands(block, shell)
        elif kind == "python":
            script(block, shell, folder)
        elif kind == "toml":
            base = configuration(block, base, folder, own_network)


def has_processes(path: Path) -> bool:
    return any("processes" in block.said for block in blocks.blocks(path, ROOT))


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=named(path), marks=[pytest.mark.slow] if named(path) in SECOND_TIER else [])
        for path in TESTED
        if not has_processes(path)
    ],
)
def test_the_blocks_of_a_page_run(path, shell, tmp_path):
    run(path, shell, tmp_path, processes=False)


@pytest.mark.flower
@pytest.mark.slow
@pytest.mark.xdist_group("flower")
@pytest.mark.parametrize("path", [p for p in TESTED if has_processes(p)], ids=named)
def test_the_blocks_of_a_page_with_flowers_processes_run(path, shell, tmp_path):
    pytest.importorskip("flwr", reason="needs the flower extra")
    run(path, shell, tmp_path, processes=True)


def test_every_block_says_what_it_is():
    """A language that is run or shown; what is not run says why, in words; and most blocks do run."""
    found = [block for path in TESTED for block in blocks.blocks(path, ROOT)]
    for block in found:
        kind = language(block)
        assert kind in blocks.RUN | blocks.SHOWN, f"{block.place}: a block of {kind or 'no language'}"
        reason = left_out(block)
        assert reason is None or len(reason.split()) >= 2, f"{block.place}: say why it is not run"
        if kind == "python":
            part = "def part():\n" + textwrap.indent(block.text, "    ")
            compile(block.text if reason is None else part, block.place, "exec")
    runnable = [block for block in found if language(block) in blocks.RUN]
    skipped = [f"{block.place}: {reason}" for block in runnable if (reason := left_out(block))]
    print("\n".join([f"{len(runnable)} blocks, of which {len(skipped)} are not run:", *skipped]))
    assert len(skipped) < len(runnable) / 2


@pytest.mark.parametrize("path", [p for p in TESTED if has_processes(p) or named(p) in SECOND_TIER], ids=named)
def test_the_blocks_of_a_page_of_the_second_tier_are_well_formed(path, tmp_path):
    """Its configurations are built and bash can read its commands; every page's Python is compiled above."""
    base = tomllib.loads(standins.QUICK)
    for block in blocks.blocks(path, ROOT):
        if "written" in block.said:
            tomllib.loads(block.text)
        elif language(block) == "toml" and left_out(block) is None:
            base = configuration(block, base, tmp_path, own_network=False)
        elif language(block) in blocks.SHELL:
            for command, _ in blocks.steps(block):
                subprocess.run(["bash", "-n", "-c", command], check=True)


def test_output_is_compared_line_by_line():
    assert blocks.agrees("a 1.25 s\nb\nc\nd\n", "a ... s\n...\nd")
    assert not blocks.agrees("a 1.25 s\nb\n", "a ... s\nc")
    block = blocks.Block("p", 1, "console", "$ fedlora x \\\n> --y\none\n$ two")
    assert blocks.steps(block) == [("fedlora x \\\n--y", "one\n"), ("two", "")]

"""The house rules that a reader would have to check by eye."""

import ast
import os
import re
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
from scripts.pages import house

from fedlora.methods import METHODS
from fedlora.tasks import TASKS
from fedlora.tasks._base import Task

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "fedlora"
FILES = sorted(SOURCE.rglob("*.py"))
LAYERS = [*map(set, house.LAYERS), {"__main__", "__init__"}]  # from the ground up: imports go to a lower layer only
CORE = {"types", "seeds", "linalg", "adapters", "methods", "rounds"}  # pure functions of tensors
OUTSIDE = {"torch", "jaxtyping"}  # what they may import beside the standard library


def module(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def layer(name: str) -> int:
    found = [number for number, names in enumerate(LAYERS) if name in names]
    assert found, f"{name} is no package of the plan"
    return found[0]


@cache
def text_of(path: Path) -> str:
    return path.read_text()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(text_of(path))


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(tree_of(path)))


def name_of(path: Path) -> str:
    """The dotted name of a file of the package."""
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imports(tree: Iterable[ast.AST]) -> list[str]:
    """The modules that a file imports anywhere, also inside functions and for type checkers only."""
    names = []
    for node in tree:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            own = (f"{node.module}.{alias.name}" for alias in node.names)
            names += dict.fromkeys(name if name in MODULES else node.module for name in own)
    return names


def upward(package: str, names: Iterable[str]) -> list[str]:
    """The imports of a package's file that do not go to a lower layer, except for those within the package."""
    own, found = layer(package), []
    for name in names:
        parts = name.split(".")
        if parts[0] == "fedlora" and len(parts) > 1:
            ground = own == 0 and layer(parts[1]) == 0  # no circles there: the test of circles
            found += [name] if parts[1] != package and layer(parts[1]) >= own and not ground else []
        elif package in CORE and parts[0] not in OUTSIDE | set(sys.stdlib_module_names):
            found.append(name)
    return found


def import_graph() -> dict[str, list[str]]:
    """Each file of the package, by its dotted name, with those that it imports."""
    return {name: [other for other in imports(nodes(path)) if other in MODULES] for name, path in MODULES.items()}


def circles(graph: dict[str, list[str]]) -> set[frozenset[str]]:
    """The strongly connected components of a graph that hold a circle."""
    reached = {}
    for name in graph:
        found, left = set(), [name]
        while left:
            new = set(graph[left.pop()]) - found
            found |= new
            left += new
        reached[name] = found
    return {frozenset(b for b in reached[a] if a in reached[b]) for a in graph if a in reached[a]}


def test_the_floor_plan():
    entries = {path.stem for path in SOURCE.iterdir() if path.suffix in ("", ".py") and path.name != "__pycache__"}
    assert entries <= set().union(*LAYERS)
    assert len(entries) <= 23
    assert all((path.parent / "__init__.py").exists() for path in FILES), "setuptools leaves such a folder out"


def test_imports_go_to_a_lower_layer():
    found = {(name_of(path), name) for path in FILES for name in upward(module(path), imports(nodes(path)))}
    assert not found, sorted(found)


def test_no_files_import_each_other():
    found = circles(import_graph())
    assert not found, [sorted(circle) for circle in found]


@pytest.mark.parametrize(
    "text",
    [
        "from fedlora.engines import loop",
        "from fedlora.engines.loop import Loop",
        "import fedlora.engines.loop as loop",
        "def late():\n    from fedlora.engines import loop",
        "if TYPE_CHECKING:\n    from fedlora.engines.loop import Loop",
    ],
)
def test_planted_imports_are_found(text):
    planted = imports(ast.walk(ast.parse(text)))
    assert upward("training", planted) == ["fedlora.engines.loop"], "upward"
    assert upward("engines", planted) == upward("runs", planted) == []
    graph = import_graph()
    graph["fedlora.engines.federation"] += planted
    (circle,) = circles(graph)
    assert {"fedlora.engines.federation", "fedlora.engines.loop"} <= circle


def test_planted_sideways_and_outside_imports_are_found():
    assert upward("export", ["fedlora.reporting.table"]) == ["fedlora.reporting.table"]
    assert upward("adapters", ["numpy.linalg", "math", "torch.nn"]) == ["numpy.linalg"]


def functions(path: Path):
    return (node for node in nodes(path) if isinstance(node, ast.FunctionDef))


CITES = {"cite", "CITE", "CITE_RS"}  # data: BibTeX


def names_of(node: ast.Assign) -> set[str]:
    return {target.id for target in node.targets if isinstance(target, ast.Name)}


PARTICIPLE = re.compile(
    "made|told|kept|said|found|given|taken|known|shown|sent|held|drawn|written|chosen|built|lost|left|heard|begun|done|gone|"
    "seen|hidden|understood|spent|worn|thrown|grown|broken|spoken|sold|bought|brought|caught|fed|led|met|paid|won|stood|"
    "sought|taught|thought|lent|meant|dealt|spun|stuck|struck|swept|torn|"
    r"(?!(?:seed|speed|need|feed|embed|exceed|proceed|bed|red|shared)$)\w+ed"
)


def named_by_participles(tree: Iterable[ast.AST]) -> list[str]:
    """The functions whose name is or ends with a past participle, except for questions (``is_...``, ``has_...``)."""
    names = [node.name for node in tree if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    words = {name: name.strip("_").split("_") for name in names}
    return [
        name for name in names if PARTICIPLE.fullmatch(words[name][-1]) and words[name][0] not in ("is", "has", "are")
    ]


def test_functions_are_verbs():
    found = [f"{name_of(path)}: {name}" for path in FILES for name in named_by_participles(nodes(path))]
    assert not found, "a function is named for what it does, as in build_table: " + ", ".join(found)


def test_planted_participles_are_found():
    planted = ast.parse(
        "def told(): ...\ndef rows_kept(): ...\nclass A:\n    def _is_done(self): ...\n    def seed(self): ..."
    )
    assert named_by_participles(ast.walk(planted)) == ["told", "rows_kept"]


def test_a_public_name_has_one_meaning():
    places: dict[str, list[str]] = {}
    for path in FILES:
        for node in tree_of(path).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(name_of(path))
    found = {name: modules for name, modules in places.items() if len(modules) > 1}
    assert not found, found


def code_lines(path: Path) -> int:
    """Without blank lines, comments, docstrings and citations: the papers' explanations are no burden."""
    text = text_of(path)
    told: set[int] = set()
    for node in nodes(path):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            told |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and CITES & names_of(node):
            told |= set(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(1 for i, line in lines if i not in told and line.strip() and not line.strip().startswith("#"))


def test_sizes():
    """A method is a page and functions are short; a file is one idea, of whatever length that takes."""
    for path in FILES:
        lines = len(text_of(path).splitlines())
        assert path.parent.name != "methods" or path.stem.startswith("_") or lines <= 120, (
            f"{path.relative_to(SOURCE)} has {lines} lines"
        )
    lengths = sorted(
        sum(1 for line in range(node.body[0].lineno, node.end_lineno + 1)) for path in FILES for node in functions(path)
    )
    assert lengths[len(lengths) // 2] <= 10
    assert lengths[int(len(lengths) * 0.9)] <= 25
    assert sum(code_lines(p) for p in FILES if module(p) in CORE) <= 1700


def test_the_core_writes_to_nothing():
    for path in (p for p in FILES if module(p) in CORE):
        for node in nodes(path):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                name = node.func.attr
                assert not (name.endswith("_") and not name.endswith("__")), f"{path.name}: {name}() works in place"
            assert not (isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Subscript)), path.name


def test_no_branch_on_a_methods_name():
    known = set(METHODS.names())
    for path in FILES:
        for node in nodes(path):
            if isinstance(node, ast.Compare | ast.MatchValue):
                texts = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
                assert not texts & known, f"{path.name}:{node.lineno}"


def test_nothing_unwanted():
    banned = {
        r"except (Base)?Exception\b(?!:\n\s+\S.*\n\s+raise)": "swallows errors",
        r"except:": "swallows errors",
        r"import pickle|\bpickle\.|torch\.load\(|strict=False": "unsafe or partial loading",
        r"TODO|FIXME|XXX|NotImplementedError": "unfinished",
        r"/(work|root|home)/": "a path of one machine",
    }
    for path in FILES:
        text = text_of(path)
        for pattern, why in banned.items():
            assert not re.search(pattern, text) or path.stem in ("files", "compare", "client_messages"), (
                f"{path.name}: {why}"
            )
        assert not {"utils", "helpers", "common", "manager", "core"} & set(
            path.relative_to(SOURCE).with_suffix("").parts
        )


def test_public_things_are_explained():
    for path in (p for p in FILES if p.parent.name not in ("methods",) or p.stem == "__init__"):
        tree = tree_of(path)
        assert ast.get_docstring(tree), f"{path} has no docstring"
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            assert not public or ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


def test_every_method_names_its_source():
    for name in METHODS.names():
        kind = METHODS.load(name)
        assert kind.title, name
        assert kind.__doc__, name


@pytest.mark.xdist_group("whole")
def test_groups_of_tests_stay_whole(request):
    """pytest 9.2 with xdist 3.8 splits them over the workers and says nothing; two of Flower's federations then starve."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("one process runs all tests: nothing to keep together")
    assert request.node.nodeid.endswith("@whole")


def test_every_file_that_counts_as_a_task_is_one():
    """A file of machinery whose name does not begin with ``_`` would be offered to users as a task."""
    for name in TASKS.names():
        kind = TASKS.load(name)
        assert issubclass(kind, Task) and isinstance(kind.quantizes, bool), name


def test_tests_mirror_the_source():
    """A folder of tests is a package of the source, or one of the few that look at all of it; fixtures are fixtures."""
    tests = ROOT / "tests"
    for folder in {path.parent for path in tests.rglob("test_*.py")} - {tests}:
        place = folder.relative_to(tests)
        known = (SOURCE / place).is_dir() or (SOURCE / place).with_suffix(".py").exists()
        assert known or place.parts[0] in ("docs", "fuzz", "laws"), f"{folder} has no package in the source"
    for path in tests.rglob("*.py"):
        for name in imports(nodes(path)):
            stem = name.rpartition(".")[2]
            assert not (name.startswith("tests.") and stem.startswith("test_")), f"{path} imports from {name}"

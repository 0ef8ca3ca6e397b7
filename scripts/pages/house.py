"""The map of the source: docs/figures/house.svg, drawn from the imports.

A box is a file at the top of the package, a package or one of its subpackages; a row is a layer. Boxes import from rows
below them only. A line is drawn where no chain of other lines says the same.
"""

import ast
from functools import cache
from html import escape
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "fedlora"
LAYERS = (  # from the ground up; tests/test_house.py holds the imports to it
    ("types", "seeds", "text", "files", "registry", "schema", "linalg"),
    ("adapters",),
    ("methods",),
    ("rounds",),
    ("tasks",),
    ("training",),
    ("security",),
    ("engines",),
    ("runs",),
    ("flower", "export", "reporting", "code_eval"),
    ("api",),
    ("cli",),
)
WIDTH, ROW, BOX, GAP, LEFT = 1180, 62, 38, 12, 96


@cache
def modules() -> dict[str, Path]:
    """The dotted name of every file of the package."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            own = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules() else node.module for name in own}
    return {name for name in found if name in modules()}


def room(name: str) -> str:
    """The box of a module: its subpackage, its package, or the file itself at the top."""
    parts, path = name.split(".")[1:], modules()[name]
    package = parts if path.name == "__init__.py" else parts[:-1]
    return "/".join(package[:2]) or (parts[0] if parts else "")


@cache
def arrows() -> frozenset[tuple[str, str]]:
    """The pairs of boxes of which the first imports the second; subpackages belong to their package's row."""
    top = {layer for row in LAYERS for layer in row}
    pairs = {(room(name), room(other)) for name, path in modules().items() for other in imports(path)}
    return frozenset((a, b) for a, b in pairs if a != b and {a.split("/")[0], b.split("/")[0]} <= top)


def packages() -> frozenset[tuple[str, str]]:
    """The same between packages and files at the top."""
    pairs = {(a.split("/")[0], b.split("/")[0]) for a, b in arrows()}
    return frozenset((a, b) for a, b in pairs if a != b)


def reduced(pairs: frozenset[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs that no chain of other pairs implies."""
    below: dict[str, set[str]] = {}
    for a, b in pairs:
        below.setdefault(a, set()).add(b)

    @cache
    def reach(a: str) -> frozenset[str]:
        return frozenset(below.get(a, ())).union(*(reach(b) for b in below.get(a, ())))

    return sorted((a, b) for a, b in pairs if not any(b in reach(c) for c in below[a] - {b}))


def purpose(name: str) -> str:
    """The first sentence of a box's docstring."""
    path = SOURCE / name / "__init__.py"
    tree = ast.parse((path if path.exists() else SOURCE / f"{name}.py").read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or "").splitlines()[0].replace("`", "")


def figure() -> str:
    """The picture, as SVG."""
    rooms = {x for pair in arrows() for x in pair}
    height = ROW * len(LAYERS) + 40
    places: dict[str, tuple[float, float, float]] = {}
    boxes = []
    for number, row in enumerate(LAYERS):
        y = height - ROW * (number + 1) - 10
        width = (WIDTH - LEFT - GAP * len(row)) / len(row) if len(row) > 1 else WIDTH - LEFT - GAP
        for i, name in enumerate(row):
            x = LEFT + i * (width + GAP)
            places[name] = (x + width / 2, y, y + BOX)
            inner = sorted(r.split("/")[1] for r in rooms if r.startswith(f"{name}/"))
            boxes.append(_box(name, inner, x, y, width, len(row) == 1))
        boxes.append(f'<text class="n" x="8" y="{y + 24}">layer {number}</text>')
    lines = [_line(places[a], places[b]) for a, b in reduced(packages()) if places[a][1] < places[b][1]]
    about = f"{len(rooms)} packages and files in {len(LAYERS)} layers, {len(arrows())} imports between them"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{about}">\n'
        "<style>text{font:13px system-ui,sans-serif;fill:#1b1f23}.n{fill:#5b6570}.p{font-size:11px;fill:#5b6570}"
        "rect{fill:#eef3f8;stroke:#8aa0b5}line{stroke:#8aa0b5;stroke-width:1.2}"
        "@media(prefers-color-scheme:dark){text{fill:#e6e9ec}.n,.p{fill:#a7b0b9}rect{fill:#22303c}}</style>\n"
        + "\n".join([*lines, *boxes])
        + f'\n<text class="n" x="8" y="16">{about}; each box imports from lower rows only</text>\n</svg>\n'
    )


def _box(name: str, inner: list[str], x: float, y: float, width: float, wide: bool) -> str:
    label = f"{name}/" if (SOURCE / name).is_dir() else name
    more = " ".join(inner)
    about = f"{purpose(name)} {f'({more})' if more else ''}" if wide else more
    at = f'y="{y + 24}"' if wide or not more else f'y="{y + 16}"'
    text = f'<rect x="{x:.0f}" y="{y}" width="{width:.0f}" height="{BOX}" rx="5"/>'
    text += f'<text x="{x + 10:.0f}" {at}>{escape(label)}</text>'
    if about:
        place = f'x="{x + 96:.0f}" y="{y + 24}"' if wide else f'x="{x + 10:.0f}" y="{y + 31}"'
        text += f'<text class="p" {place}>{escape(about)}</text>'
    return text


def _line(above: tuple[float, float, float], below: tuple[float, float, float]) -> str:
    return f'<line x1="{above[0]:.0f}" y1="{above[2]}" x2="{below[0]:.0f}" y2="{below[1]}"/>'

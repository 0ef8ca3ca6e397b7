"""Messages on docs/errors.md that cannot be brought about in a second stand in the source as the page has them."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SAID = re.compile(r"<!-- said by: (?P<file>\S+) -->\n```text\n(?P<text>.+?)\n```", re.S)


def texts(path: Path) -> list[str]:
    """Every string of a file; what an f-string fills in is ``...``."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "..." for v in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def said(shown: str, found: list[str]) -> bool:
    """Whether one string has all parts of what is shown, in order."""
    parts = [re.escape(part.strip()) for part in shown.split("...") if part.strip()]
    return any(re.search(".*?".join(parts), text, re.S) for text in found)


def test_the_source_says_what_the_page_says():
    shown = list(SAID.finditer((ROOT / "docs" / "errors.md").read_text(encoding="utf-8")))
    assert len(shown) >= 5
    for one in shown:
        assert said(one["text"], texts(ROOT / one["file"])), f"{one['file']} does not say: {one['text']}"


def test_another_sentence_would_be_found_out():
    assert said("a ... c", ["x a b c"]) and not said("a ... d", ["x a b c"]) and not said("c ... a", ["x a b c"])

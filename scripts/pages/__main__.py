"""Writes the generated pages of docs/, or says which are out of date.

    python -m scripts.pages            # writes what differs
    python -m scripts.pages --check    # writes nothing; exit status 1 and the files' names where something differs

Generated whole: docs/methods/*.md, docs/figures/methods/*.svg, docs/figures/house.svg, docs/cli.md. In the other pages
only the figures between ``<!-- = ... -->`` and ``<!-- . -->`` are filled in (see scripts/pages/measured.py); their text
is written by hand.
"""

import argparse
import sys
from pathlib import Path

from scripts.pages import command_line, curves, house, measured, methods

DOCS = Path(__file__).parents[2] / "docs"


def made(docs: Path = DOCS) -> dict[Path, str]:
    """Every generated file and its text. ``ValueError`` where a page asks for a figure that is not there."""
    found = measured.Results.read(docs)
    drawn = curves.read(docs)
    files = {docs / "cli.md": command_line.page(), docs / "figures" / "house.svg": house.figure()}
    files |= {docs / "methods" / name: text for name, text in methods.pages(found, drawn).items()}
    files |= {docs / "figures" / "methods" / name: text for name, text in curves.figures(drawn).items()}
    for path in sorted(docs.rglob("*.md")):
        if path not in files and measured.OPENS.search(text := path.read_text(encoding="utf-8")):
            files[path] = found.filled(text, path.name)
    return files


def stale(files: dict[Path, str], docs: Path = DOCS) -> list[Path]:
    """Files that differ from what they should be, or should not be there."""
    differ = [path for path, text in files.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    there = [*(docs / "methods").glob("*.md"), *(docs / "figures" / "methods").glob("*.svg")]
    return differ + [path for path in sorted(there) if path not in files]


def main() -> None:
    """Parses, compares, and writes unless only asked to check."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--check", action="store_true", help="write nothing; exit 1 where something is out of date")
    asked = options.parse_args()
    files = made()
    wrong = stale(files)
    for path in wrong:
        print(path.relative_to(DOCS.parent))
        if not asked.check and path in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files[path], encoding="utf-8")
        elif not asked.check:
            path.unlink()
    if asked.check and wrong:
        sys.exit("These generated files are out of date; run `python -m scripts.pages` and commit what it writes.")


if __name__ == "__main__":
    main()

"""A hook of MkDocs: links that leave docs/ (an example, say) lead to a copy of that file in the site.

On a plain file browser the same links work as they stand. A link to a folder, or to a file that is not there, is left
alone, and `mkdocs build --strict` then says that it leads nowhere.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"\]\((?P<to>(?:\.\./)+[^)#\s]+)(?P<part>#[^)\s]*)?\)")
FENCE = re.compile(r"^(`{3,}).*?^\1", re.M | re.S)
FOLDER = "project"


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with such links led to the copies."""
    docs = Path(config.docs_dir)
    here = posixpath.dirname(page.file.src_uri)

    def led(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(here, match["to"]))
        file = (docs / target).resolve()
        if not target.startswith("../") or not file.is_file():
            return match[0]
        uri = f"{FOLDER}/{file.relative_to(docs.parent.resolve()).as_posix()}"
        uri = f"{uri}.txt" if uri.endswith((".md", ".toml", ".py")) else uri  # shown as text, not offered as a download
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, content=file.read_text(encoding="utf-8")))
        return f"]({posixpath.relpath(uri, here or '.')}{match['part'] or ''})"

    parts, at = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [LINK.sub(led, markdown[at : fence.start()]), fence[0]]
        at = fence.end()
    return "".join([*parts, LINK.sub(led, markdown[at:])])

"""Hooks of mkdocs: pages of the repository that lie outside docs/, and generated pages.

The sources stay readable on GitHub: links between Markdown files of the repository are rewritten here, and links to
files that are no pages, such as code, become plain text.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))
import reference  # noqa: E402

OUTSIDE = {  # file of the repository -> page
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "data_prep/README.md": "data_prep.md",
    "ds_configs/README.md": "ds_configs.md",
    "eval/RESULTS.md": "results.md",
    "integrations/comfyui/README.md": "comfyui.md",
}
GENERATED = {"settings.md": reference.settings, "commands.md": reference.commands}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files, config):
    """Add the pages that are not files of docs/."""
    for source, page in OUTSIDE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=rewritten(text, source)))
    for page, make in GENERATED.items():
        files.append(File.generated(config, page, content=make()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrite the links of the pages in docs/."""
    if page.file.src_uri in (*OUTSIDE.values(), *GENERATED):
        return markdown
    return rewritten(markdown, f"docs/{page.file.src_uri}")


def rewritten(text: str, source: str) -> str:
    """Return the Markdown of a file of the repository with links for the site, where all pages lie in one folder."""

    def of_link(match: re.Match) -> str:
        mark, label, target = match.groups()
        path, hash_, anchor = target.partition("#")
        if not path or "://" in path or path.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        page = OUTSIDE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        return f"{mark}[{label}]({page}{hash_}{anchor})" if page else label

    return LINK.sub(of_link, text)

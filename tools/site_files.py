"""What mkdocs does for this site beside its plugins: files of the repository that pages link to go along.

A page names them by their relative path (`../benchmarks/results/values.json`), which GitHub understands. The
site gets them below `repository/`; of a folder, a list of what is in it.
"""

import re
from pathlib import Path
from posixpath import normpath
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(\s*\.\./([^)#\s]+)(#[^)\s]*)?\)")
"""To what is outside of docs/."""


def on_files(files: Files, *, config: Any) -> Files:
    """Add what pages link to."""
    linked = set()
    for page in files.documentation_pages():
        linked |= {normpath(found[1]) for found in LINK.finditer(page.content_string)}
    for name in sorted(linked):
        there = ROOT / name
        if there.is_dir():
            inside = sorted(file.name for file in there.iterdir() if file.is_file())
            for file in inside:
                _add(files, f"{name}/{file}", config)
            lines = [f"# {there.name}", "", *(f"- [{file}]({file})" for file in inside)]
            page = File.generated(config, f"repository/{name}/index.md", content="\n".join(lines))
            page.inclusion = InclusionLevel.NOT_IN_NAV
            files.append(page)
        elif there.is_file():
            _add(files, name, config)
    return files


def _add(files: Files, name: str, config: Any) -> None:
    there = f"repository/{name}"
    if there.endswith(".md"):  # as it is: a page of its own would have links of its own
        there += ".txt"
    if files.get_file_from_path(there) is None:
        files.append(File.generated(config, there, abs_src_path=str(ROOT / name)))


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Point to them."""

    def moved(link: re.Match[str]) -> str:
        name = normpath(link[1])
        there = ROOT / name
        if there.is_dir():
            return f"](repository/{name}/index.md)"
        return f"](repository/{name}.txt)" if name.endswith(".md") else f"](repository/{name})"

    return LINK.sub(moved, markdown)

"""Hooks of the documentation site (mkdocs.yml): the pages are written for GitHub, and this makes them work on the site.

README.md is the home page, tutorial.py becomes a page, links to files outside docs/ work, and `::: nnunet_dante.NAME`
in api.md finds NAME, a name of the public API, in the module that defines it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import jupytext
from mkdocs.structure.files import File, Files

import nnunet_dante

REPOSITORY = Path(__file__).parents[1]
HOME, TUTORIAL = Path("README.md"), Path("docs/tutorial.py")
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")  # the target of a Markdown link, not to another server


def place(source: Path) -> str:
    """Return where a file of the repository (relative path) lies on the site."""
    if source == HOME:
        return "index.md"
    source = source.with_suffix(".md") if source == TUTORIAL else source
    return (source.relative_to("docs") if source.parts[0] == "docs" else source).as_posix()


def targets(page: Path) -> set[Path]:
    """Return the files of the repository that a page (relative path) links to."""
    found = {Path(os.path.normpath(page.parent / link)) for link in LINK.findall((REPOSITORY / page).read_text())}
    return {file for file in found if (REPOSITORY / file).is_file()}


def on_files(files: Files, config) -> Files:
    """Add the tutorial, and the files outside docs/ that pages link to."""
    notebook = jupytext.read(REPOSITORY / TUTORIAL)
    cells = (c.source if c.cell_type == "markdown" else f"```python\n{c.source}\n```" for c in notebook.cells)
    files.append(File.generated(config, place(TUTORIAL), content="\n\n".join(cells)))
    todo = [HOME, *(file.relative_to(REPOSITORY) for file in (REPOSITORY / "docs").glob("*.md"))]
    added = {TUTORIAL}
    while todo:
        page = todo.pop()
        for file in {page, *(targets(page) if page.suffix == ".md" else ())} - added:
            added.add(file)
            todo.append(file)
            if file.parts[0] != "docs":
                files.append(File.generated(config, place(file), abs_src_path=str(REPOSITORY / file)))
    return files


def on_page_markdown(markdown: str, page, **_: object) -> str:
    """Turn links between places in the repository into links between places on the site, and find the API's names."""
    uri = page.file.src_uri
    source = HOME if uri == "index.md" else Path("docs", uri)
    if not (REPOSITORY / source).is_file() and uri != place(TUTORIAL):
        source = Path(uri)

    def moved(link: re.Match[str]) -> str:
        target = Path(os.path.normpath(source.parent / link[1]))
        if not (REPOSITORY / target).is_file():
            return link[1]
        return os.path.relpath(place(target), Path(uri).parent)

    def defined(name: re.Match[str]) -> str:
        return f"::: nnunet_dante.{nnunet_dante._HOME[name[1]]}.{name[1]}"

    return re.sub(r"^::: nnunet_dante\.(\w+)$", defined, LINK.sub(moved, markdown), flags=re.MULTILINE)

"""What mkdocs.yml needs besides the pages of this folder: as pages too README, CONTRIBUTING, CHANGELOG, model cards,
notebooks, and the code that any of them links to."""

import json
import logging
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
SOURCES = {page: source for source, page in PAGES.items()}
CARDS, NOTEBOOKS = "model_cards/*/README.md", "examples/*.ipynb"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|!?\[[^\]]*\]\([^)]*\))*)\]\(([^)\s]+)\)")
MEDIA = (".png", ".gif", ".jpg", ".wav")  # shown as they are

log = logging.getLogger("mkdocs.repository")  # below mkdocs' own, whose warnings end a strict build


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.nav.append({"Model cards": [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob(CARDS))]})
    return config


def in_site(place: str) -> str:
    """Where a file or a folder of the repository stands in the site; folders are their README."""
    if (ROOT / place).is_dir():
        place = f"{place}/README.md"
    if place in PAGES or place.startswith("docs/"):
        return PAGES.get(place, place.removeprefix("docs/"))
    return place if place.endswith((".md", *MEDIA)) else f"{place}.md"


def in_repository(page: str) -> str:
    """The file of the repository that a page is of, the other way round."""
    if page in SOURCES:
        return SOURCES[page]
    return f"docs/{page}" if (ROOT / "docs" / page).is_file() else page if (ROOT / page).is_file() else page[:-3]


def as_markdown(path: Path) -> str:
    """The text of a page: a notebook's cells one by one, code as a block."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
        return "\n\n".join(cell if kind == "markdown" else f"```python\n{cell}\n```" for kind, cell in cells)
    return text if path.suffix == ".md" else f"# {path.name}\n\n````python\n{text}\n````"


def targets(source: str, text: str) -> list[str]:
    """The files and folders of the repository that a page links to."""
    links = (target.partition("#")[0] for _, _, target in LINK.findall(text) if "://" not in target)
    folder = posixpath.dirname(source)
    return [posixpath.normpath(posixpath.join(folder, link)) for link in links if link and "mailto:" not in link]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    found = [path for pattern in ("docs/*.md", CARDS, NOTEBOOKS) for path in sorted(ROOT.glob(pattern))]
    waiting, seen = [*PAGES, *(path.relative_to(ROOT).as_posix() for path in found)], set()
    while waiting:
        source = waiting.pop()
        page = in_site(source)
        if page in seen or not (ROOT / source).exists():  # what is missing is told where it is linked from
            continue
        seen.add(page)
        path = ROOT / in_repository(page)
        if page.endswith(MEDIA):
            if files.get_file_from_path(page) is None:
                files.append(File.generated(config, page, abs_src_path=str(path)))
            continue
        text = as_markdown(path)
        if files.get_file_from_path(page) is None:
            files.append(File.generated(config, page, content=text))
        if path.suffix in (".md", ".ipynb"):
            waiting += targets(in_repository(page), text)
    return files


def on_page_markdown(markdown: str, page, config: MkDocsConfig, files: Files) -> str:
    """Links as they stand in the repository to those of the site."""
    source = in_repository(page.file.src_uri)
    if source.endswith(".py"):
        return markdown
    folder = posixpath.dirname(page.file.src_uri)

    def rewritten(match: re.Match) -> str:
        mark, text, target = match.groups()
        text = LINK.sub(rewritten, text)
        path, _, anchor = target.partition("#")
        if not path or "://" in target or target.startswith("mailto:"):
            return f"{mark}[{text}]({target})"
        place = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if not (ROOT / place).exists():
            log.warning("%s links to %s, which isn't there", source, target)
        return f"{mark}[{text}]({posixpath.relpath(in_site(place), folder or '.')}{'#' * bool(anchor)}{anchor})"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.S | re.M)  # not within blocks of code
    return "".join(part if index % 2 else LINK.sub(rewritten, part) for index, part in enumerate(parts))

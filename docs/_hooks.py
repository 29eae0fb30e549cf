"""What mkdocs.yml needs besides the pages of this folder: README, CONTRIBUTING and CHANGELOG as pages, and links."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|!?\[[^\]]*\]\([^)]*\))*)\]\(([^)\s]+)\)")
PICTURES = (".png", ".gif", ".jpg")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    every = [ROOT / source for source in PAGES] + sorted((ROOT / "docs").glob("*.md"))
    for path in every:
        for _, _, target in LINK.findall(path.read_text(encoding="utf-8")):
            place = posixpath.normpath((path.parent.relative_to(ROOT) / target).as_posix())
            if place.endswith(PICTURES) and not place.startswith("docs/") and files.get_file_from_path(place) is None:
                files.append(File.generated(config, place, abs_src_path=str(ROOT / place)))
    return files


def on_page_markdown(markdown: str, page, config: MkDocsConfig, files: Files) -> str:
    """Links as they stand in the repository to those of the site; what isn't in the site is linked in the repository,
    where its address is known (``repo_url``), and else is text."""
    source = {page_name: name for name, page_name in PAGES.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    folder = posixpath.dirname(source)

    def rewritten(match: re.Match) -> str:
        mark, text, target = match.groups()
        text = LINK.sub(rewritten, text)
        path, _, anchor = target.partition("#")
        if not path or "://" in target or target.startswith("mailto:"):
            return f"{mark}[{text}]({target})"
        place = posixpath.normpath(posixpath.join(folder, path))
        here = PAGES.get(place, place.removeprefix("docs/"))
        if files.get_file_from_path(here) is not None:
            return f"{mark}[{text}]({here}{'#' * bool(anchor)}{anchor})"
        return f"{mark}[{text}]({config.repo_url}/blob/main/{place})" if config.repo_url else text

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.S | re.M)  # not within blocks of code
    return "".join(part if index % 2 else LINK.sub(rewritten, part) for index, part in enumerate(parts))

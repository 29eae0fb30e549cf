"""Links between the pages of the repository lead somewhere; mkdocs --strict checks those of the site made of them."""

import re

import pytest


PAGES = ("*.md", "docs/*.md", "model_cards/*/README.md", "training/data/README.md", "examples/*.ipynb")
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.DOTALL | re.MULTILINE)


def anchors(text):
    """Those that GitHub gives a page's headings."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    words = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in words}


def dead_links(page, text, root):
    found = []
    for link in LINK.findall(CODE.sub("", text)):
        path, _, anchor = link.partition("#")
        if "://" in link or link.startswith("mailto:"):
            continue
        place = (page.parent / path).resolve() if path else page
        place = place / "README.md" if place.is_dir() and anchor else place
        if not place.exists() or not place.is_relative_to(root):
            found.append(link)
        elif anchor and anchor not in anchors(place.read_text(encoding="utf-8")):
            found.append(link)
    return found


def test_each_leads_to_a_file_and_a_heading_that_are_there(root):
    pages = [path for pattern in PAGES for path in sorted(root.glob(pattern))]
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    assert sum(len(LINK.findall(text)) for text in texts.values()) > 150
    dead = {str(page.relative_to(root)): dead_links(page, text, root) for page, text in texts.items()}
    assert not any(dead.values()), {page: links for page, links in dead.items() if links}


@pytest.mark.parametrize(
    ("link", "dead"),
    [
        ("docs/app.md", False),
        ("#tasks", False),
        ("docs/data.md#captions", False),
        ("model_cards/vqdit-emoji-32", False),
        ("model_cards/vqdit-emoji-latent#evaluation", False),
        ("https://example.org/#none", False),
        ("docs/ap.md", True),
        ("model_cards/vqdit", True),
        ("#task", True),
        ("docs/data.md#caption", True),
        ("model_cards/vqdit-emoji-latent#none", True),
        ("../elsewhere", True),
    ],
)
def test_dead_ones_are_found(root, link, dead):
    assert dead_links(root / "README.md", f"[one]({link}) and `[code](nowhere)`", root) == [link] * dead

"""The pictures of the page in the docs, of shipped checkpoints' examples at a click.

SCREENSHOTS=docs python -m pytest -n 0 -m slow tests/app/test_screenshots.py

writes them there, and else nowhere that stays; with a font that has Chinese (`apt-get install fonts-wqy-microhei`).
"""

import io
import os
from pathlib import Path

import pytest
from PIL import Image


pytest.importorskip("gradio")
expect = pytest.importorskip("playwright.sync_api").expect

from diffusers_vqdit.app.__main__ import load_pipeline  # noqa: E402
from diffusers_vqdit.app.page import launch, make_page  # noqa: E402


pytestmark = pytest.mark.slow
PATIENCE = 120_000  # ms
MAX_BYTES = 120_000


@pytest.fixture(scope="module")
def address(root):
    """The address of the page of a shipped checkpoint, which is served once."""
    pages, addresses = [], {}

    def address(name):
        if name not in addresses:
            folder = str(root / "model_cards" / name)
            pages.append(make_page(load_pipeline(folder), folder))
            addresses[name] = launch(pages[-1], prevent_thread_lock=True, quiet=True)[1]
        return addresses[name]

    yield address
    for page in pages:
        page.close()


def draw(visitor):
    visitor.panel.get_by_text("a red apple", exact=True).first.click()
    visitor.drawn(4)


def repaint(visitor):
    visitor.pick(4)
    visitor.paint(rows=(-55, -20, 15, 50), left=-120)
    visitor.panel.get_by_label("text", exact=True).fill("woman farmer, light skin tone")
    visitor.click("Repaint")
    visitor.drawn(4)


def enlarge(visitor):
    visitor.pick(3)
    visitor.drawn(1)


def caption(visitor):
    visitor.pick(4)
    expect(written(visitor)).not_to_have_value("", timeout=PATIENCE)


def label(visitor):
    visitor.pick(1)
    visitor.sees("[0-9]+%")


def find(visitor):
    visitor.pick(4)
    found = visitor.panel.locator(".grid-container").nth(1).locator("img")
    expect(found).to_have_count(6, timeout=PATIENCE)


def sound(visitor):
    visitor.panel.get_by_text("grapes", exact=True).first.click()
    expect(written(visitor)).not_to_have_value("", timeout=PATIENCE)


def written(visitor):
    return visitor.panel.locator("textarea[disabled]").filter(visible=True)


@pytest.mark.parametrize("use", [draw, repaint, enlarge, caption, label, find, sound], ids=lambda use: use.__name__)
def test_a_tab_of_a_shipped_checkpoint_is_used_and_shown(visit, address, tmp_path, use):
    visitor = visit(address("vqdit-talking-emoji" if use is sound else "vqdit-emoji"))
    visitor.tab(use.__name__.capitalize())
    use(visitor)
    visitor.idle()
    visitor.page.evaluate("scrollTo(0, 0)")
    box = visitor.panel.bounding_box()
    area = {"x": box["x"] - 16, "y": 0, "width": box["width"] + 32, "height": min(1200, box["y"] + box["height"] + 16)}
    shot = Image.open(io.BytesIO(visitor.page.screenshot(clip=area))).convert("RGB")
    path = Path(os.environ.get("SCREENSHOTS", tmp_path)) / f"app_{use.__name__}.png"
    shot.quantize(dither=Image.Dither.NONE).save(path, optimize=True)
    assert path.stat().st_size <= MAX_BYTES

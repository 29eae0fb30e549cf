"""The page in a browser, each tab used as a person would."""

import io
import re
import shutil

import pytest
from PIL import Image, ImageColor

from diffusers_vqdit.utils.provenance import GENERATED, digital_source_type


pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")

from diffusers_vqdit.app.tabs import BRUSH  # noqa: E402


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium"),
]
expect = playwright.expect
PATIENCE = 60_000  # ms


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visitor:
    """Someone at the page, and what the page fetched for them."""

    def __init__(self, browser, address):
        self.page = browser.new_page(viewport={"width": 1200, "height": 1400})
        self.page.set_default_timeout(PATIENCE)
        self.files = set()
        self.page.on("request", lambda one: self.files.add(one.url) if "/file=" in one.url else None)
        self.page.goto(address)

    def tab(self, name):
        self.page.get_by_role("tab", name=name, exact=True).click()
        self.panel = self.page.get_by_role("tabpanel").filter(visible=True)
        return self.panel

    def idle(self):
        """Wait until nothing is waited for."""
        self.page.wait_for_timeout(300)
        expect(self.panel.locator(".wrap.translucent, .wrap.generating").filter(visible=True)).to_have_count(0)

    def click(self, button):
        self.panel.get_by_role("button", name=button, exact=True).click()

    def pick(self, example):
        """Click on the thumbnail of an example."""
        self.panel.locator("button.gallery-item").filter(has=self.page.locator("img")).nth(example).click()

    def upload(self, *paths):
        for _ in range(10):  # a component that isn't ready yet takes no file
            try:
                with self.page.expect_response(re.compile("/upload"), timeout=6_000):
                    self.panel.locator("input[type=file]").first.set_input_files(list(paths))
            except playwright.TimeoutError:
                continue
            self.page.wait_for_timeout(500)
            return
        raise AssertionError("nothing could be uploaded")

    def sees(self, text):
        expect(self.page.get_by_text(re.compile(text)).filter(visible=True).first).to_be_visible(timeout=PATIENCE)

    def drawn(self, count):
        """Wait until so many finished pictures are shown, which are PNG files named by the model."""
        pictures = self.panel.locator(".grid-container img[src*='/codes0-'], .grid-container img[src*='/latents0-']")
        expect(pictures).to_have_count(count, timeout=PATIENCE)
        return [one.get_attribute("src") for one in pictures.all()]


@pytest.fixture
def visitor(browser, served):
    visitor = Visitor(browser, served["codes"])
    yield visitor
    visitor.page.context.close()


def test_drawing_shows_the_codes_step_by_step(visitor):
    visitor.tab("Draw").get_by_label("text", exact=True).fill("a red apple")
    visitor.click("Draw")
    visitor.drawn(4)
    assert len([url for url in visitor.files if url.endswith(".webp")]) > 4 * 4  # frames on the way


def test_an_example_runs_at_a_click_and_brings_its_task(visitor):
    visitor.tab("Draw").get_by_text("box", exact=True).click()
    visitor.drawn(4)
    expect(visitor.panel.get_by_label("Task")).to_have_value("label → image")
    expect(visitor.panel.get_by_label("label", exact=True)).to_have_value("box")
    expect(visitor.panel.get_by_label("text", exact=True)).to_be_hidden()
    before = visitor.drawn(4)
    visitor.panel.get_by_text("a blue box", exact=True).click()
    expect(visitor.panel.get_by_label("text", exact=True)).to_have_value("a blue box")
    visitor.idle()
    assert not set(before) & set(visitor.drawn(4))


def test_a_downloaded_picture_says_that_it_is_generated(visitor, tmp_path):
    visitor.tab("Draw").get_by_text("a red apple", exact=True).click()
    visitor.drawn(4)
    visitor.panel.locator(".grid-container img").first.click()
    with visitor.page.expect_download() as download:
        visitor.panel.get_by_label("Download").click()
    download.value.save_as(tmp_path / "mine.png")
    assert digital_source_type(tmp_path / "mine.png") == GENERATED


def paint(visitor):
    """Paint across the middle; again while the editor, which is still making its canvas, has taken no stroke."""
    for _ in range(20):
        visitor.idle()
        box = visitor.panel.locator("canvas").first.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        visitor.page.mouse.move(x - 60, y)
        visitor.page.mouse.down()
        for step in range(12):
            visitor.page.mouse.move(x - 60 + 10 * step, y)
            visitor.page.wait_for_timeout(30)
        visitor.page.mouse.up()
        visitor.page.wait_for_timeout(1000)
        seen = visitor.page.screenshot(clip={"x": x, "y": y, "width": 1, "height": 1})
        if Image.open(io.BytesIO(seen)).convert("RGB").getpixel((0, 0)) == ImageColor.getrgb(BRUSH):
            return
    raise AssertionError("nothing could be painted")


def test_a_picture_is_repainted_where_the_brush_was(visitor, picture_file):
    visitor.tab("Repaint")
    visitor.upload(picture_file(40, 20))
    paint(visitor)
    visitor.panel.get_by_label("text", exact=True).fill("green")
    visitor.click("Repaint")
    visitor.drawn(4)
    visitor.page.reload()
    visitor.tab("Repaint")
    visitor.pick(0)
    visitor.idle()
    expect(visitor.panel.get_by_label("text", exact=True)).to_have_value("a yellow dot")
    visitor.click("Repaint")
    visitor.sees("nothing is painted on the picture yet")


@pytest.mark.parametrize(("tab", "count"), [("Repair", 4), ("Enlarge", 1), ("Edit", 4)])
def test_pictures_are_made_from_a_picture_at_a_click(visitor, tab, count):
    visitor.tab(tab)
    visitor.pick(1)
    visitor.drawn(count)


def test_a_picture_is_captioned_and_labelled_at_a_click(visitor):
    visitor.tab("Caption")
    visitor.pick(0)
    expect(visitor.panel.locator("textarea[disabled]").first).not_to_have_value("", timeout=PATIENCE)
    visitor.tab("Label")
    visitor.pick(1)
    visitor.sees("[0-9]+%")
    visitor.panel.get_by_label("Task").click()
    visitor.page.get_by_role("option", name="image → text, among names of your own").click()
    visitor.panel.get_by_label("Names to choose among").fill("a cat\na dog")
    visitor.click("Label")
    visitor.sees("a (cat|dog)")
    visitor.idle()
    assert visitor.panel.get_by_text(re.compile("^a (cat|dog)$")).count() >= 2


def test_pairs_and_texts_are_made(visitor):
    visitor.tab("Pairs")
    visitor.click("Make pairs")
    visitor.drawn(4)
    visitor.tab("Texts").get_by_text("a blue box", exact=True).click()
    expect(visitor.panel.get_by_label("Task")).to_have_value("text → text_zh")
    expect(visitor.panel.locator("textarea[disabled]").filter(visible=True)).not_to_have_value("", timeout=PATIENCE)


def test_a_gallery_is_searched(visitor, picture_file):
    visitor.tab("Find")
    visitor.upload(*(picture_file(16, 16, color) for color in ("red", "green", "blue")))
    visitor.panel.get_by_label("text", exact=True).fill("green")
    visitor.click("Find")
    found = visitor.panel.locator(".grid-container").nth(1).locator("img")
    expect(found).to_have_count(3, timeout=PATIENCE)
    visitor.panel.get_by_label("Find", exact=True).first.click()
    visitor.page.get_by_role("option", name="text by image").click()
    visitor.panel.get_by_label("Texts to look in").fill("a dot\ngreen")
    expect(visitor.panel.get_by_label("text", exact=True)).to_be_hidden()


def test_a_broken_upload_and_a_prompt_too_long_are_told(visitor, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nonsense")
    visitor.tab("Caption")
    visitor.upload(tmp_path / "broken.png")
    visitor.click("Describe")
    visitor.sees("This file can't be read: it is broken")
    box = visitor.tab("Draw").get_by_label("text", exact=True)
    assert box.get_attribute("maxlength") == "2000"
    box.fill("a red apple, " * 20)
    visitor.click("Draw")
    visitor.sees("1 of 1 texts of prompt have more than 12 tokens and are cut")
    visitor.drawn(4)
    box.fill("")
    visitor.click("Draw")
    visitor.sees("Write something into 'text' first")


def test_two_people_at_once_see_each_their_own(browser, served):
    people = [Visitor(browser, served["codes"]) for _ in range(2)]
    for one, text in zip(people, ("green", "a dot"), strict=True):
        one.tab("Draw").get_by_label("text", exact=True).fill(text)
    for one in people:
        one.click("Draw")
    first, second = (set(one.drawn(4)) for one in people)
    assert not first & second
    for one in people:
        one.page.context.close()


def test_a_pipeline_over_latents_draws(browser, served):
    visitor = Visitor(browser, served["latents"])
    visitor.tab("Draw").get_by_label("text", exact=True).fill("a red apple")
    visitor.click("Draw")
    visitor.drawn(4)
    assert [one.inner_text() for one in visitor.page.get_by_role("tab").all()] == ["Draw", "Repaint", "Repair"]
    visitor.page.context.close()

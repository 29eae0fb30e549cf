"""Someone who uses the page in Chromium."""

import io
import re

from PIL import Image, ImageColor
from playwright.sync_api import TimeoutError, expect

from diffusers_vqdit.app.tabs import BRUSH


PATIENCE = 60_000  # ms


class Visitor:
    """Someone at the page, and what the page fetched for them."""

    def __init__(self, browser, address, **options):
        self.page = browser.new_page(viewport={"width": 1200, "height": 1400}, **options)
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

    def choose(self, label, option):
        """Choose an option of a list."""
        self.panel.get_by_label(label, exact=True).filter(visible=True).first.click()
        self.page.get_by_role("option", name=option, exact=True).click()

    def upload(self, *paths, place=0):
        """Upload files at a place, of those that take any."""
        for _ in range(10):  # a component that isn't ready yet takes no file
            try:
                with self.page.expect_response(re.compile("/upload"), timeout=6_000):
                    self.panel.locator("input[type=file]").nth(place).set_input_files(list(paths))
            except TimeoutError:
                continue
            self.page.wait_for_timeout(500)
            return
        raise AssertionError("nothing could be uploaded")

    def sees(self, text):
        expect(self.page.get_by_text(re.compile(text)).filter(visible=True).first).to_be_visible(timeout=PATIENCE)

    def drawn(self, count):
        """Wait until so many finished pictures are shown, which are PNG files."""
        pictures = self.panel.locator(".grid-container img[src$='.png']")
        expect(pictures).to_have_count(count, timeout=PATIENCE)
        return [one.get_attribute("src") for one in pictures.all()]

    def paint(self, rows=(0,), left=-60):
        """Paint across the middle, and pixels below it, from pixels beside it on; again while the editor, which is
        still making its canvas, has taken no stroke."""
        for _ in range(20):
            self.idle()
            box = self.panel.locator("canvas").first.bounding_box()
            x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
            for below in rows:
                self.page.mouse.move(x + left, y + below)
                self.page.mouse.down()
                for right in range(left, 60, 10):
                    self.page.mouse.move(x + right, y + below)
                    self.page.wait_for_timeout(30)
                self.page.mouse.up()
            self.page.wait_for_timeout(1000)
            seen = self.page.screenshot(clip={"x": x, "y": y, "width": 1, "height": 1})
            if Image.open(io.BytesIO(seen)).convert("RGB").getpixel((0, 0)) == ImageColor.getrgb(BRUSH):
                return
        raise AssertionError("nothing could be painted")

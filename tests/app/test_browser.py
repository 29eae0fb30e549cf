"""The page in a browser, each tab used as a person would."""

import re

import pytest
import soundfile

from diffusers_vqdit.utils.provenance import GENERATED, digital_source_type


pytest.importorskip("gradio")
expect = pytest.importorskip("playwright.sync_api").expect

pytestmark = pytest.mark.slow
PATIENCE = 60_000  # ms


@pytest.fixture
def visitor(visit, served):
    return visit(served["codes"])


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


def test_a_picture_is_repainted_where_the_brush_was(visitor, picture_file):
    visitor.tab("Repaint")
    visitor.upload(picture_file(40, 20))
    visitor.paint()
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
    visitor.upload(picture_file(16, 16, "green"))
    visitor.click("Find")
    ranked = visitor.panel.get_by_label("Found, best first").filter(visible=True)
    expect(ranked).to_have_value(re.compile("^1\\. (a dot\n2\\. green|green\n2\\. a dot)$"), timeout=PATIENCE)
    visitor.pick(1)  # looks for its caption among all pictures
    expect(visitor.panel.get_by_label("text", exact=True)).to_have_value("green")
    expect(found).to_have_count(2, timeout=PATIENCE)


def test_sounds_are_made_heard_recorded_and_uploaded(visit, served_sounds, tmp_path):
    visitor = visit(served_sounds, permissions=["microphone"])
    visitor.tab("Sound").get_by_text("a blue box", exact=True).click()
    expect(visitor.panel.get_by_label("Task")).to_have_value("text → sound")
    expect(visitor.panel.locator("audio[controls]").filter(visible=True)).to_have_count(1, timeout=PATIENCE)
    with visitor.page.expect_download() as download:
        visitor.panel.get_by_label("Download").filter(visible=True).click()
    download.value.save_as(tmp_path / "said.wav")
    assert soundfile.info(tmp_path / "said.wav").frames > 0
    assert digital_source_type(tmp_path / "said.wav") == GENERATED

    visitor.panel.get_by_text("a red apple", exact=True).click()
    expect(visitor.panel.get_by_label("Task")).to_have_value("sound → text")
    heard = visitor.panel.locator("textarea[disabled]").filter(visible=True)
    expect(heard).not_to_have_value("", timeout=PATIENCE)

    visitor.choose("Task", "sound → image")
    visitor.panel.get_by_label("Clear").filter(visible=True).click()
    visitor.panel.get_by_role("button", name="Record", exact=True).click()
    visitor.page.wait_for_timeout(1000)
    # It can be played before it is uploaded, and a run until then has no sound.
    with visitor.page.expect_response(lambda response: "/upload" in response.url, timeout=PATIENCE):
        visitor.panel.get_by_role("button", name="Stop", exact=True).click()
    expect(visitor.panel.get_by_role("button", name="Play", exact=True)).to_be_visible(timeout=PATIENCE)
    visitor.click("Run")
    visitor.drawn(1)

    (tmp_path / "broken.wav").write_bytes(b"RIFF nonsense")
    visitor.panel.get_by_label("Clear").filter(visible=True).click()
    visitor.panel.get_by_label("Upload file").filter(visible=True).first.click()
    visitor.upload(tmp_path / "broken.wav")
    visitor.click("Run")
    visitor.sees("This file can't be read: it is broken")


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


def test_two_people_at_once_see_each_their_own(visit, served):
    people = [visit(served["codes"]) for _ in range(2)]
    for one, text in zip(people, ("green", "a dot"), strict=True):
        one.tab("Draw").get_by_label("text", exact=True).fill(text)
    for one in people:
        one.click("Draw")
    first, second = (set(one.drawn(4)) for one in people)
    assert not first & second


def test_a_pipeline_over_latents_draws(visit, served):
    visitor = visit(served["latents"])
    visitor.tab("Draw").get_by_label("text", exact=True).fill("a red apple")
    visitor.click("Draw")
    visitor.drawn(4)
    assert [one.inner_text() for one in visitor.page.get_by_role("tab").all()] == ["Draw", "Repaint", "Repair"]

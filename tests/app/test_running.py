"""What the page reads, refuses and tells, and how a call that runs is shown."""

import logging
import threading

import pytest
import torch
from PIL import Image


gr = pytest.importorskip("gradio")

from diffusers_vqdit.app import running  # noqa: E402
from diffusers_vqdit.app.tabs import SIDE, enlarged, painted  # noqa: E402
from diffusers_vqdit.utils.provenance import COMPOSITE, GENERATED, digital_source_type  # noqa: E402


def test_steps_come_in_order_and_then_the_result():
    def call(callback):
        for step in range(3):
            assert callback(None, step, 0.0, {"latents": step}) == {"latents": step}
        return "done"

    assert list(running.steps_of(call, lambda latents: latents * 10)) == [
        *((False, 0), (False, 10), (False, 20), (True, "done"))
    ]


@pytest.mark.parametrize("steps", [1, 16, 17, 50, 256])
def test_of_many_steps_some_are_shown(steps):
    def call(callback):
        for step in range(steps):
            callback(None, step, 0.0, {"latents": step})

    shown = [value for done, value in running.steps_of(call, lambda latents: latents, steps) if not done]
    assert shown[0] == 0 and len(shown) <= running.MAX_FRAMES and 2 * len(shown) >= min(steps, running.MAX_FRAMES)
    assert len(set(map(int.__sub__, shown[1:], shown))) <= 1


def test_what_a_call_raises_is_raised():
    def call(callback):
        callback(None, 0, 0.0, {"latents": 1})
        raise ValueError("no such task")

    steps = running.steps_of(call, lambda latents: latents)
    assert next(steps) == (False, 1)
    with pytest.raises(ValueError, match="no such task"):
        next(steps)


def test_a_call_ends_when_the_person_leaves():
    ended, go_on = threading.Event(), threading.Event()

    def call(callback):
        try:
            callback(None, 0, 0.0, {"latents": 0})
            go_on.wait(10)
            callback(None, 1, 0.0, {"latents": 1})
        finally:
            ended.set()

    steps = running.steps_of(call, lambda latents: latents)
    next(steps)
    steps.close()
    go_on.set()
    assert ended.wait(10)


def test_warnings_of_the_call_are_shown_and_those_of_others_not(monkeypatch):
    shown = []
    monkeypatch.setattr(running.gr, "Warning", shown.append)
    package = logging.getLogger("diffusers_vqdit.pipelines.text_segment")

    def call(callback):
        other = threading.Thread(target=package.warning, args=("another person's",))
        other.start()
        other.join()
        for _ in range(2):
            package.warning("prompt has 30 tokens; <mask>")

    list(running.steps_of(call, lambda latents: latents))
    assert shown == ["prompt has 30 tokens; &lt;mask&gt;"]
    assert not [one for one in logging.getLogger("diffusers_vqdit").handlers if isinstance(one, running._Notes)]


def test_errors_are_sentences_without_html():
    def event():
        yield 1
        raise ValueError("the task 'a->b' needs <mask>")

    steps = running.refusing(event)()
    assert next(steps) == 1
    with pytest.raises(gr.Error) as refused:
        next(steps)
    assert refused.value.message == "the task 'a-&gt;b' needs &lt;mask&gt;"


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError, KeyError, OSError, AssertionError])
def test_errors_that_nobody_foresaw_are_told_and_logged(kind, caplog):
    def event():
        yield 1
        raise kind("in /home/someone/secret.py")

    steps = running.refusing(event)()
    assert next(steps) == 1
    with pytest.raises(gr.Error) as refused:
        next(steps)
    assert refused.value.message == running.FAILED
    assert "secret.py" in caplog.text


@pytest.mark.parametrize(
    ("read", "arguments", "message"),
    [
        *((running.read_text, ("text", value), "Write something into 'text'") for value in (None, "", "  \n")),
        (running.read_text, ("text", "a" * 2001), "'text' has 2001 characters; at most 2000"),
        (running.read_lines, ("names", "a cat\n\n", 2), "'names' has 1 lines; write 2 to 256"),
        (running.read_lines, ("names", "a\n" * 257), "'names' has 257 lines"),
        (running.read_picture, ("image", None), "Give a picture as 'image'"),
        (running.read_sound, ("speech", None), "Record or upload a sound as 'speech'"),
    ],
)
def test_what_is_missing_or_too_much_is_told(read, arguments, message):
    with pytest.raises(ValueError, match=message):
        read(*arguments)


@pytest.mark.parametrize(("width", "height"), [(4097, 2), (2, 5000)])
def test_large_pictures_are_refused_before_they_are_decoded(picture_file, width, height):
    with pytest.raises(ValueError, match=f"{width} x {height} pixels; at most 4096"):
        running.read_picture("image", picture_file(width, height))


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n nonsense", b"GIF89a", b"<svg></svg>"])
def test_broken_pictures_are_refused(tmp_path, content):
    path = tmp_path / "secret-folder.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="can't be read") as refused:
        running.read_picture("image", str(path))
    assert "secret" not in str(refused.value)


def test_a_picture_that_is_cut_off_is_refused(tmp_path, picture_file):
    with open(picture_file(64, 64), "rb") as file:
        (tmp_path / "half.png").write_bytes(file.read()[:-60])
    with pytest.raises(ValueError, match="can't be read"):
        running.read_picture("image", str(tmp_path / "half.png"))


@pytest.mark.parametrize(("size", "tiles"), [((64, 64), None), ((72, 64), 72), ((57, 65), 72), ((1, 512), None)])
def test_the_tiles_of_a_picture_that_is_enlarged_are_bounded(picture_file, size, tiles):
    read = [running.read_picture, ("image_lowres", picture_file(*size), (8, 8))]
    if tiles is None:
        assert read[0](*read[1]).size == size
    else:
        with pytest.raises(ValueError, match=f"of which it has {tiles}; at most 64"):
            read[0](*read[1])


@pytest.mark.parametrize(("composite", "source"), [(False, GENERATED), (True, COMPOSITE)])
def test_pictures_say_that_they_are_generated(tmp_path, composite, source):
    pictures = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    paths = running.saved_files(pictures, str(tmp_path), "you/model", description="红苹果", composite=composite)
    assert [digital_source_type(path) for path in paths] == [source] * 2
    assert Image.open(paths[1]).text["Description"] == "红苹果" and paths[1].endswith("/model-1.png")


@pytest.mark.parametrize("size", [(32, 32), (300, 120), (7, 64), (1000, 900)])
def test_what_is_painted_is_the_mask_at_the_picture_s_own_size(size):
    picture = Image.effect_noise(size, 64).convert("RGB")
    value, kept = enlarged(picture)
    shown = value["background"]
    assert kept is picture and max(shown.size) == SIDE
    with pytest.raises(ValueError, match="nothing is painted"):
        painted({"background": shown, "layers": [Image.new("RGBA", shown.size)]}, kept)
    layer = Image.new("RGBA", shown.size)
    layer.paste((217, 70, 239, 255), (0, 0, shown.width // 2, shown.height))
    image, mask = painted({"background": shown, "layers": [layer]}, kept)
    assert image is kept and mask.size == size and set(mask.tobytes()) == {0, 255}
    left = sum(mask.crop((0, 0, size[0] // 2, size[1])).tobytes()) / 255
    assert left == size[0] // 2 * size[1] and mask.getpixel((size[0] - 1, 0)) == 0


def test_painting_needs_a_picture():
    with pytest.raises(ValueError, match="Give a picture first"):
        painted({"background": None, "layers": []}, None)

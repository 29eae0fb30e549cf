"""Calls of a pipeline for a page: what is read and checked before, each step on the way, and sentences for errors."""

import functools
import html
import logging
import queue
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ..utils.images import to_rgb
from ..utils.provenance import save_generated
from ..utils.sounds import sound_seconds


MAX_CHARACTERS = 2000  # of a text
MAX_SIDE = 4096  # pixels of a picture's height or width
MAX_FRAMES = 16  # of the pictures that are shown while a call runs
MAX_SECONDS = 300  # of a sound
MAX_TILES = 64  # of a picture that is enlarged
MAX_ITEMS = 256  # of a gallery, or of names to choose among
MAX_FILE_SIZE = 20 * 2**20  # bytes
FAILED = "The model failed at this; its reason stands in the page's log. Fewer or smaller things at once may work."
UNREADABLE = "This file can't be read: it is broken, or of an unknown kind."

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------------------------------------------
# Errors and warnings as sentences


def _sentence(message: Any) -> str:
    """What a page shows; messages have arrows and blanks that are no HTML."""
    return html.escape(str(message), quote=False)


def refusing(function: Callable[..., Iterator]) -> Callable[..., Iterator]:
    """An event's generator whose errors are sentences: what it refuses, and which library it misses, in its own words;
    others are logged, and the person is told that there was one."""

    @functools.wraps(function)
    def wrapped(*args: Any) -> Iterator:
        try:
            yield from function(*args)
        except (ValueError, ImportError) as error:
            raise gr.Error(_sentence(error), print_exception=False) from error
        except Exception as error:
            logger.exception("a call of the page failed")
            raise gr.Error(FAILED, print_exception=False) from error

    return wrapped


def reading_files(component: Any) -> Any:
    """A component of uploaded files, which tells of those that can't be read in a sentence and not by their path."""
    preprocess = component.preprocess

    def read(payload: Any) -> Any:
        try:
            return preprocess(payload)
        except Exception as error:  # of Pillow and its plugins
            raise gr.Error(UNREADABLE, print_exception=False) from error

    component.preprocess = read
    return component


class _Notes(logging.Handler):
    """The package's warnings of one thread."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.thread = threading.get_ident()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self.thread and record.getMessage() not in self.messages:
            self.messages.append(record.getMessage())


class _Left(Exception):
    """The person has left while a call was running."""


def steps_of(
    call: Callable[[Callable], Any], preview: Callable[[Any], Any], num_inference_steps: int = MAX_FRAMES
) -> Iterator[tuple[bool, Any]]:
    """Run a pipeline's call in a thread of its own, and tell how it goes.

    Args:
        call: takes what the pipeline's ``callback_on_step_end`` is to be. It ends early where the iteration does.
        preview: makes what is shown of a step's latents.
        num_inference_steps: of the call. Of more than there are to be frames, some are left out.

    Yields:
        (False, a preview) after each step, and at last (True, what the call returned).
    """
    every = -(-num_inference_steps // MAX_FRAMES)
    events: queue.SimpleQueue = queue.SimpleQueue()
    left = threading.Event()

    def callback(pipeline: Any, step: int, timestep: Any, inputs: dict) -> dict:
        if left.is_set():
            raise _Left
        if step % every == 0:
            events.put((False, preview(inputs["latents"])))
        return inputs

    def run() -> None:
        notes, package = _Notes(), logging.getLogger(__name__.partition(".")[0])
        package.addHandler(notes)
        try:
            output = call(callback)
            events.put((True, (output, notes.messages)))
        except BaseException as error:
            events.put((None, error))
        finally:
            package.removeHandler(notes)

    threading.Thread(target=run, daemon=True).start()
    try:
        while True:
            done, value = events.get()
            if done is None:
                raise value
            if done:
                output, messages = value
                for message in messages:
                    gr.Warning(_sentence(message))
                yield True, output
                return
            yield False, value
    finally:
        left.set()


# ---------------------------------------------------------------------------------------------------------------------
# What is given and what comes out


def read_text(name: str, value: str | None) -> str:
    """A text that someone has written.

    Raises:
        ValueError: if there is none, or it is too long.
    """
    text = (value or "").strip()
    if not text:
        raise ValueError(f"Write something into {name!r} first.")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{name!r} has {len(text)} characters; at most {MAX_CHARACTERS} are read here.")
    return text


def read_lines(name: str, value: str | None, least: int = 1) -> list[str]:
    """Texts that stand on lines.

    Raises:
        ValueError: if there are too few or too many, or one is too long.
    """
    lines = [line.strip() for line in (value or "").splitlines() if line.strip()]
    if not least <= len(lines) <= MAX_ITEMS:
        raise ValueError(f"{name!r} has {len(lines)} lines; write {least} to {MAX_ITEMS}.")
    return [read_text(name, line) for line in lines]


def read_picture(name: str, path: str | None, tile: tuple[int, int] | None = None) -> Image.Image:
    """An uploaded picture; with `tile` one that is enlarged in tiles of this height and width.

    Raises:
        ValueError: if there is none, or it is broken or too large.
    """
    if path is None:
        raise ValueError(f"Give a picture as {name!r} first.")
    try:
        with Image.open(path) as image:
            if max(image.size) > MAX_SIDE:
                width, height = image.size
                raise ValueError(f"The picture has {width} x {height} pixels; at most {MAX_SIDE} a side are read.")
            image.load()
            picture = to_rgb(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(UNREADABLE) from error
    if tile is not None:
        rows, columns = (-(-side // one) for side, one in zip((picture.height, picture.width), tile, strict=True))
        if rows * columns > MAX_TILES:
            raise ValueError(
                f"The picture has {picture.width} x {picture.height} pixels. It is enlarged in tiles of {tile[1]} x "
                f"{tile[0]}, of which it has {rows * columns}; at most {MAX_TILES} are drawn here."
            )
    return picture


def read_sound(name: str, path: str | None) -> str:
    """An uploaded or recorded sound.

    Raises:
        ValueError: if there is none, or it is broken or too long.
    """
    if path is None:
        raise ValueError(f"Record or upload a sound as {name!r} first.")
    try:
        seconds = sound_seconds(path)
    except ValueError as error:
        raise ValueError(UNREADABLE) from error
    if seconds > MAX_SECONDS:
        raise ValueError(f"The sound has {seconds:.0f} seconds; at most {MAX_SECONDS} are read.")
    return path


def saved_files(
    values: Sequence[Any],
    cache_dir: str,
    model_id: str,
    *,
    description: str = "",
    composite: bool = False,
    sampling_rate: int | None = None,
) -> list[str]:
    """Files of generated pictures, or sounds, which say that they are generated, as they are downloaded.

    Args:
        cache_dir: the component's, whose files gradio serves as they are.
        sampling_rate: of sounds.
    """
    folder = Path(cache_dir) / secrets.token_hex(16)
    folder.mkdir(parents=True)
    suffix = "png" if sampling_rate is None else "wav"
    paths = [folder / f"{Path(model_id).name}-{index}.{suffix}" for index in range(len(values))]
    options: dict[str, Any] = {"model_id": model_id, "description": description or None, "composite": composite}
    for value, path in zip(values, paths, strict=True):
        save_generated(value, path, **options, sampling_rate=sampling_rate)
    return [str(path) for path in paths]

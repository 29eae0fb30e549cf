"""The flags that say how pictures are read, with the names of diffusers' own scripts."""

import argparse

from ..utils.arguments import non_negative_integer
from ..utils.fitting import INTERPOLATION_MODES, RESIZE_MODES


PADDING = {"white": "pad", "border": "pad_border"}


def _padding(text: str) -> str:
    """The type of ``--pad``: the resize mode that it stands for."""
    if text not in PADDING:
        raise argparse.ArgumentTypeError(f"value={text!r} must be one of {sorted(PADDING)}")
    return PADDING[text]


def add_image_arguments(
    group: argparse._ActionsContainer, *, resize_mode: str | None, default: str, augmented: bool = False
) -> None:
    """Add the flags of how pictures become squares, or of a bucket's aspect ratio, and of who decodes them.

    Args:
        resize_mode: by default.
        default: what this is, for the help.
        augmented: whether pictures are read again and again, and may be cropped and mirrored otherwise each time.
    """
    modes = group.add_mutually_exclusive_group()
    modes.add_argument(
        "--resize_mode",
        choices=RESIZE_MODES,
        default=resize_mode,
        help="How pictures of another aspect ratio are read: crop cuts the middle out, pad fits them whole on white, "
        "pad_border on the colour of their border; auto does so where they stand on plain or transparent ground, and "
        f"crops else. {default}",
    )
    modes.add_argument(
        "--center_crop", action="store_const", const="crop", dest="resize_mode", help="The same as --resize_mode crop."
    )
    modes.add_argument(
        "--pad",
        type=_padding,
        dest="resize_mode",
        metavar="{white,border}",
        help="Fit pictures whole, on white or on the colour of their border: --resize_mode pad or pad_border.",
    )
    group.add_argument(
        "--image_interpolation_mode",
        choices=INTERPOLATION_MODES,
        default="lanczos",
        help="How pictures are resized. Pipelines resize what they are passed by lanczos.",
    )
    if augmented:
        modes.add_argument("--random_crop", action="store_true", help="Cut another part out each time.")
        group.add_argument("--random_flip", action="store_true", help="Mirror half of the pictures.")
    group.add_argument(
        "--dataloader_num_workers",
        type=non_negative_integer,
        default=0,
        help="Processes that decode pictures ahead of time; 0: the main process does.",
    )

#!/usr/bin/env python
"""What masked diffusion looks like: a GIF of pictures whose codes appear step by step, grey where they are masked.

    python examples/animate_sampling.py --prompt "a red apple" snowman 红苹果 --output_file sampling.gif

Draws a prompt a column with the starter, or another pipeline over codes, and keeps the codes of every step that
`callback_on_step_end` gets. Takes a few seconds of one CPU core.
"""

import argparse
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from PIL import Image

from diffusers_vqdit import VQDiTPipeline
from diffusers_vqdit.app.abilities import IMAGES, TEXTS, CodesModel
from diffusers_vqdit.app.unmasking import unmasking_image
from diffusers_vqdit.training.files import check_output_file
from diffusers_vqdit.utils.arguments import argument_parser, model_name, output_path, positive_integer, random_seed
from diffusers_vqdit.utils.starter import STARTER
from diffusers_vqdit.utils.told_errors import told_errors


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Animate the sampling of prompts.")
    parser.add_argument("--pretrained_model_name_or_path", type=model_name, default=str(STARTER))
    parser.add_argument("--prompt", nargs="+", default=["a red apple", "snowman", "sailboat", "红苹果"])
    parser.add_argument("--num_inference_steps", type=positive_integer, help="By default the pipeline's own.")
    parser.add_argument("--seed", type=random_seed, default=0)
    parser.add_argument("--side", type=positive_integer, default=192, help="Pixels of a picture's side.")
    parser.add_argument("--frame_ms", type=positive_integer, default=150, help="Milliseconds of a step.")
    parser.add_argument("--output_file", type=output_path, default=Path("outputs/sampling.gif"))
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> None:
    check_output_file("output_file", args.output_file, ".gif")
    pipe = VQDiTPipeline.from_pretrained(args.pretrained_model_name_or_path)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    model = CodesModel(pipe)
    drawing = [
        one for one in model.abilities if one.generates(IMAGES) and [each.kind for each in one.given] == [TEXTS]
    ]
    if not drawing:
        raise ValueError(f"the pipeline draws no pictures of texts; it knows {pipe.transformer.config.tasks}")
    (given,), (drawn,) = drawing[0].given, drawing[0].generated
    frames: list[list[Image.Image]] = []

    def keep(pipe: VQDiTPipeline, step: int, timestep: float, inputs: dict) -> dict:
        frames.append(unmasking_image(pipe._segments[drawn.name], inputs["latents"]))
        return inputs

    generators = [torch.Generator().manual_seed(args.seed + index) for index in range(len(args.prompt))]
    options = {"num_inference_steps": args.num_inference_steps, "callback_on_step_end": keep}
    frames.append(model(drawing[0], {given.name: args.prompt}, generator=generators, **options)[drawn.name])

    size = (args.side, args.side)
    grids = [make_image_grid([one.resize(size) for one in row], rows=1, cols=len(row)) for row in frames]
    # The finished pictures stay for two seconds.
    durations = [args.frame_ms] * (len(grids) - 1) + [2000]
    args.output_file.parent.mkdir(parents=True, exist_ok=True)
    grids = [grid.quantize(64, dither=Image.Dither.NONE) for grid in grids]
    grids[0].save(args.output_file, save_all=True, append_images=grids[1:], duration=durations, loop=0)
    print(f"{args.output_file.resolve()}: {len(grids)} frames")


if __name__ == "__main__":
    with told_errors():
        main(parse_args())

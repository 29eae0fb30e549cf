"""Convert a foreign image tokenizer to a folder that `ImageVQModel.from_pretrained` loads.

python -m diffusers_vqdit.interop.convert --checkpoint vq_ds16_c2i.pt --output_dir vq-llamagen
"""

import argparse

from diffusers_vqdit import ImageVQModel
from diffusers_vqdit.interop import FORMATS
from diffusers_vqdit.utils.arguments import argument_parser, output_path
from diffusers_vqdit.utils.told_errors import told_errors


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(
        description="Convert an image tokenizer of another code base to an ImageVQModel.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="formats:\n" + "\n".join(f"  {name:14} {text}" for name, (_, text) in FORMATS.items()),
    )
    parser.add_argument("--checkpoint", required=True, help=".safetensors, .ckpt, .pt, .pth or .bin file.")
    parser.add_argument("--output_dir", type=output_path, required=True)
    parser.add_argument("--format", choices=list(FORMATS), help="By default told from the weights, where it can be.")
    parser.add_argument("--config", help="YAML or JSON file of the original's arguments, for what shapes don't tell.")
    parser.add_argument(
        "--use_ema",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="Take the moving averages of the weights; by default as the original's own evaluation does.",
    )
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> None:
    model = ImageVQModel.from_original(args.checkpoint, format=args.format, config=args.config, use_ema=args.use_ema)
    model.save_pretrained(args.output_dir)
    print(
        f"saved {model.num_codes} codes, {model.downsample_factor} x {model.downsample_factor} pixels each, to "
        f"{args.output_dir}"
    )


if __name__ == "__main__":
    with told_errors():
        main(parse_args())

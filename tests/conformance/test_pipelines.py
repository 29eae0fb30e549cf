"""Diffusers' mixins for pipelines."""

import unittest

import torch
from diffusers import DDIMScheduler
from diffusers_tests.pipelines.test_pipelines_common import PipelineTesterMixin
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from diffusers_vqdit import (
    ImageVQModel,
    MaskedDiffusionScheduler,
    TextVQModel,
    VQDiTLatentPipeline,
    VQDiTPipeline,
    VQDiTTransformer2DModel,
)


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer of one token a byte."""
    names = ["<pad>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", mask_token="<mask>")


def image_vq() -> ImageVQModel:
    return ImageVQModel(
        block_out_channels=[8, 8],
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        num_vq_embeddings=32,
        sample_size=8,
    ).eval()


def text_vq() -> TextVQModel:
    return TextVQModel(vocab_size=258, max_length=12, num_codes=300, hidden_size=16, code_dim=4).eval()


def trained(model: torch.nn.Module) -> torch.nn.Module:
    """As after some training: with its zero modulation nothing that is given changes the output."""
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


class Common(PipelineTesterMixin):
    batch_params = frozenset(["prompt"])
    callback_cfg_params = frozenset()
    test_attention_slicing = False  # replaces attention processors that fused attention has made needless
    test_xformers_attention = False
    test_layerwise_casting = True
    test_group_offloading = True

    given = {"prompt": "a red apple"}

    def get_dummy_inputs(self, device, seed=0):
        return {
            "generator": self.get_generator(seed),
            "num_inference_steps": 2,
            "guidance_scale": 3.0,
            "output_type": "np",
            **self.given,
        }

    @unittest.skip("prompts are codes; prompt_embeds are those of a text encoder")
    def test_encode_prompt_works_in_isolation(self):
        pass


class TestVQDiTPipeline(Common, unittest.TestCase):
    pipeline_class = VQDiTPipeline
    params = frozenset(["prompt", "image", "mask_image", "guidance_scale"])

    def get_dummy_components(self):
        torch.manual_seed(0)
        transformer = VQDiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            segments={"text": {"vocab_size": 300, "shape": [12]}, "image": {"vocab_size": 32, "shape": [4, 4]}},
            tasks=["text->image", "->image"],
        )
        return {
            "transformer": trained(transformer),
            "scheduler": MaskedDiffusionScheduler(),
            "image_vq": image_vq(),
            "text_vq": text_vq(),
            "tokenizer": letters(),
        }

    def test_save_load_optional_components(self):
        # Nothing is left that reads prompts or draws pictures.
        self.given = {"output": "image", "output_type": "latent", "guidance_scale": 1.0}
        super().test_save_load_optional_components()


class TestVQDiTLatentPipeline(Common, unittest.TestCase):
    pipeline_class = VQDiTLatentPipeline
    params = frozenset(["prompt", "image", "mask_image", "height", "width", "guidance_scale"])

    def get_dummy_components(self):
        torch.manual_seed(0)
        transformer = VQDiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            in_channels=4,
            sample_size=4,
            patch_size=2,
            num_embeds_ada_norm=10,
            caption_channels=4,
        )
        return {
            "transformer": trained(transformer),
            "vae": image_vq(),
            "scheduler": DDIMScheduler(),
            "text_encoder": text_vq(),
            "tokenizer": letters(),
        }

    def test_save_load_optional_components(self):
        self.given = {"class_labels": 3}  # nothing is left that reads prompts
        super().test_save_load_optional_components()

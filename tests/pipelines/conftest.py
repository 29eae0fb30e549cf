"""A tiny pipeline over latents, as there is one over codes."""

import pytest
import torch
from diffusers import DDIMScheduler

from diffusers_vqdit import VQDiTLatentPipeline, VQDiTTransformer2DModel


@pytest.fixture
def latent_pipeline(image_vq, text_vq, tokenizer):
    image_vq.register_to_config(latents_mean=[0.1, 0.2, -0.3, 0.0], latents_std=[0.5, 1.0, 2.0, 0.1])
    transformer = VQDiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        sample_size=4,
        patch_size=1,
        num_embeds_ada_norm=3,
        caption_channels=4,
    ).share_embedder()
    for parameter in transformer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    names = {0: "fruit, apple", 1: "box", 2: "dot"}
    pipe = VQDiTLatentPipeline(transformer.eval(), image_vq, DDIMScheduler(), text_vq, tokenizer, id2label=names)
    pipe.set_progress_bar_config(disable=True)
    return pipe

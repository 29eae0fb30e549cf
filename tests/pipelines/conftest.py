"""A tiny pipeline over latents, as there is one over codes."""

import pytest
import torch
from diffusers import DDIMScheduler

from diffusers_vqdit import VQDiTLatentPipeline


@pytest.fixture
def latent_pipeline(image_vq, text_vq, tokenizer, make_latent_transformer):
    image_vq.register_to_config(latents_mean=[0.1, 0.2, -0.3, 0.0], latents_std=[0.5, 1.0, 2.0, 0.1])
    transformer = make_latent_transformer()
    for parameter in transformer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    names = {0: "fruit, apple", 1: "box", 2: "dot"}
    pipe = VQDiTLatentPipeline(transformer.eval(), image_vq, DDIMScheduler(), text_vq, tokenizer, id2label=names)
    pipe.set_progress_bar_config(disable=True)
    return pipe

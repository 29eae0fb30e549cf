"""Cards of what is published without its training."""

import huggingface_hub
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from huggingface_hub import ModelCard

from diffusers_vqdit import VQDiTLatentPipeline, VQDiTTransformer2DModel


def test_what_is_pushed_has_a_card_of_ours(hub, client, pipeline, text_vq, tmp_path):
    """In place of diffusers' with nothing filled in; one that someone has written stays."""

    def card(name):
        return ModelCard(hub.repositories[f"alice/{name}"].resolve("main").files["README.md"].content.decode())

    pipeline.push_to_hub("alice/pipe")
    denoiser = VQDiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=4, patch_size=1, num_embeds_ada_norm=3
    )
    latents = VQDiTLatentPipeline(denoiser, pipeline.image_vq, FlowMatchEulerDiscreteScheduler())
    latents.push_to_hub("alice/latents")
    pipeline.image_vq.push_to_hub("alice/image_vq")
    text_vq.push_to_hub("alice/text_vq")
    pipeline.transformer.push_to_hub("alice/transformer")
    pipeline.scheduler.push_to_hub("alice/scheduler")
    pipeline.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="alice/saved")
    pipeline.image_vq.save_pretrained(tmp_path / "model", push_to_hub=True, repo_id="alice/model")
    for name in ("pipe", "latents", "image_vq", "text_vq", "transformer", "scheduler", "saved", "model"):
        text = card(name).content
        assert f"# {name}\n" in text and "More Information Needed" not in text and f'"alice/{name}"' in text, name
        for heading in ("Use", "Intended use", "Limits", "Risks", "Evaluation", "Training", "Data and licences"):
            assert f"\n## {heading}\n" in text, (name, heading)
        assert card(name).data.library_name == "diffusers" and "diffusers_vqdit" in card(name).data.tags
        huggingface_hub.HfApi()._validate_yaml(text)
    assert card("pipe").data.pipeline_tag == "text-to-image" and "flow-matching" in card("latents").data.tags
    assert (tmp_path / "saved" / "README.md").read_text() == card("saved").content

    written = ModelCard("---\nlicense: mit\n---\n\n# Mine\n")
    written.push_to_hub("alice/pipe")
    pipeline.push_to_hub("alice/pipe")
    assert card("pipe").data.license == "mit" and "# Mine" in card("pipe").content
    (tmp_path / "saved" / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine too\n")
    pipeline.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="alice/saved")
    assert card("saved").content == "---\nlicense: mit\n---\n\n# Mine too\n"
    blank = populate_model_card(load_or_create_model_card("alice/nothing"))
    blank.data.license = "apache-2.0"
    blank.push_to_hub("alice/model")  # by an earlier version
    pipeline.image_vq.push_to_hub("alice/model")
    assert card("model").data.license == "apache-2.0" and "* Weights: apache-2.0" in card("model").content

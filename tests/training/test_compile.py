"""Tokenizers are compiled in place: the same weights, under the same names, as without."""

import pytest
import torch
from safetensors.torch import load_file


COMPILED = {"image_vq": ["Encoder", "Decoder"], "text_vq": ["ConvBlock", "ConvBlock"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("image_vq", "--block_out_channels 8 8 --norm_num_groups 4 --latent_channels 8 --num_vq_embeddings 16"),
        ("text_vq", "--tokenizer_vocab_size 300 --num_codes 64 --hidden_size 16"),
    ],
)
def test_a_compiled_tokenizer_trains_the_same_weights(script, root, tmp_path, monkeypatch, name, options):
    # Traced as ever, but not handed to a compiler, which takes minutes.
    called = []

    def traced_only(self):
        called.append(type(self).__name__)
        compile_module(self, backend="eager")

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", traced_only)
    weights = []
    module = script(f"train_{name}")
    for folder, flag in (("plain", ""), ("compiled", "--compile")):
        arguments = (
            f"--dataset_name {root / 'training/data/emoji.parquet'} --max_train_samples 8 --validation_split none "
            f"--report_to none --train_batch_size 4 --max_train_steps 2 --output_dir {tmp_path / folder} {options}"
        )
        module.main(module.parse_args([*arguments.split(), *flag.split()]))
        weights.append(load_file(tmp_path / folder / "diffusion_pytorch_model.safetensors"))
    plain, traced = weights
    assert called == COMPILED[name]
    assert plain.keys() == traced.keys()
    for key, value in plain.items():
        torch.testing.assert_close(traced[key], value, atol=1e-5, rtol=1e-4, msg=key)

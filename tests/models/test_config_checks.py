"""Bad arguments of the constructors: each is refused before anything is built, by its name."""

import math

import numpy as np
import pytest
import torch.nn as nn

from diffusers_vqdit import ImageVQModel, MaskedDiffusionScheduler, TextVQModel, VQDiTTransformer2DModel
from diffusers_vqdit.models.maskgit_blocks import MaskGITDecoder, MaskGITEncoder
from diffusers_vqdit.models.quantizers.codebook import IndexBackpropagationQuantizer, SimVectorQuantizer
from diffusers_vqdit.models.quantizers.lookup_free import FiniteScalarQuantizer, LookupFreeQuantizer
from diffusers_vqdit.models.quantizers.vector import VectorQuantizer


IMAGE = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "latent_channels": 4,
    "num_vq_embeddings": 16,
}
TEXT = {"vocab_size": 20, "max_length": 4, "num_codes": 8, "hidden_size": 8, "code_dim": 4}
SEGMENTS = {"text": {"vocab_size": 8, "shape": [4]}, "image": {"vocab_size": 16, "shape": [2, 2]}}
CODES = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "segments": SEGMENTS}
LATENT = {
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "num_layers": 1,
    "sample_size": 4,
    "num_embeds_ada_norm": 3,
}
WIDTHS = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
MAKERS = {
    "image": lambda **given: ImageVQModel(**{**IMAGE, **given}),
    "text": lambda **given: TextVQModel(**{**TEXT, **given}),
    "codes": lambda **given: VQDiTTransformer2DModel(**{**CODES, **given}),
    "latent": lambda **given: VQDiTTransformer2DModel(**{**LATENT, **given}),
    "scheduler": MaskedDiffusionScheduler,
    "vq": lambda **given: VectorQuantizer(**{"num_codes": 8, "code_dim": 4, **given}),
    "simvq": lambda **given: SimVectorQuantizer(**{"num_codes": 8, "code_dim": 4, **given}),
    "ibq": lambda **given: IndexBackpropagationQuantizer(**{"num_codes": 8, "code_dim": 4, **given}),
    "fsq": FiniteScalarQuantizer,
    "lfq": lambda **given: LookupFreeQuantizer(**{"code_dim": 4, **given}),
    "encoder": lambda **given: MaskGITEncoder(**{"in_channels": 3, "out_channels": 4, **WIDTHS, **given}),
    "decoder": lambda **given: MaskGITDecoder(**{"in_channels": 4, "out_channels": 3, **WIDTHS, **given}),
}

COUNTS = [0, -1, 1.5, True, "4", None, [4], math.nan, 10**12]  # for what counts something
FLAGS = [1, "yes", None]
CHOICES = ["other", 1, None, ["none"]]
LISTS = [(), "8", 8, None, (0,), (8, -8), (8, 8.0), (True, 8)]
NOT_NEGATIVE = [-0.5, math.nan, math.inf, "0.1", None, True, [0.1]]
# The argument, and values that it can't have.
BAD = {
    "image": {
        **dict.fromkeys(["in_channels", "out_channels", "latent_channels", "sample_size", "layers_per_block"], COUNTS),
        **dict.fromkeys(["num_vq_embeddings", "norm_num_groups", "num_quantizers"], COUNTS),
        "vq_embed_dim": [value for value in COUNTS if value is not None],
        **dict.fromkeys(["mid_block_add_attention", "lookup_from_codebook", "force_upcast"], FLAGS),
        **dict.fromkeys(["act_fn", "norm_type", "quantizer_type"], CHOICES),
        **dict.fromkeys(["codebook_norm", "codebook_update", "codebook_init", "gradient_estimator"], CHOICES),
        **dict.fromkeys(["block_out_channels", "down_block_types", "up_block_types"], LISTS),
        **dict.fromkeys(["beta", "entropy_weight"], NOT_NEGATIVE),
        **dict.fromkeys(["scaling_factor", "entropy_temperature"], [0, *NOT_NEGATIVE]),
        **dict.fromkeys(["ema_decay", "restart_threshold"], [2, *NOT_NEGATIVE]),
        "fsq_levels": [(8, 2), 8, "8", (4, 4)],
        "pixel_range": [(1.0, 0.0), (0.0,), None, 1.0, (0.0, math.nan), ("0", "1")],
        "latents_mean": [[0.0] * 4, 1.0],
    },
    "text": {
        **dict.fromkeys(["vocab_size", "max_length", "downsample_factor", "num_codebooks", "num_quantizers"], COUNTS),
        **dict.fromkeys(["num_codes", "code_dim", "hidden_size", "kernel_size"], COUNTS),
        "num_layers": COUNTS[1:],
        "pad_token_id": [-1, 20, 0.0, None, "0"],
        **dict.fromkeys(["codebook_norm", "codebook_update", "codebook_init", "quantizer_type"], CHOICES),
        "beta": NOT_NEGATIVE,
        **dict.fromkeys(["ema_decay", "restart_threshold"], [2, *NOT_NEGATIVE]),
    },
    "codes": {
        **dict.fromkeys(["num_attention_heads", "attention_head_dim", "num_layers"], COUNTS),
        "segments": [{}, [], "text", 3, {"a": None}, {"a": []}, {1: SEGMENTS["text"]}, {"a-b": SEGMENTS["text"]}],
        "tasks": ["text->image", ["text"], ["text->sketch"], [3], {"text": 1}, ["->"], ["text->text"]],
        "time_conditioned": FLAGS,
        "dropout": [1, *NOT_NEGATIVE],
        "norm_eps": [0, *NOT_NEGATIVE],
        "activation_fn": CHOICES,
        "caption_channels": [4, 0],
    },
    "latent": {
        **dict.fromkeys(["in_channels", "sample_size", "patch_size", "num_layers", "norm_num_groups"], COUNTS),
        "out_channels": [value for value in COUNTS if value is not None],
        "num_embeds_ada_norm": COUNTS,
        "caption_channels": [value for value in COUNTS if value is not None],
        "attention_head_dim": [*COUNTS, 1],
        "freq_shift": [128, *NOT_NEGATIVE],
        **dict.fromkeys(["attention_bias", "upcast_attention", "norm_elementwise_affine"], FLAGS),
        "norm_type": [*CHOICES, "layer_norm"],
        "tasks": [["->image"]],
        "time_conditioned": [True],
    },
    "scheduler": {
        **dict.fromkeys(["masking", "sampler", "guidance_schedule"], CHOICES),
        "temperature": [1e-45, 1e7, *NOT_NEGATIVE],
        "choice_temperature": NOT_NEGATIVE,
        "entropy_bound": [value for value in NOT_NEGATIVE if value != math.inf],
        "remask": [2, 0.5, *NOT_NEGATIVE],
    },
    "vq": {
        **dict.fromkeys(["num_codes", "code_dim"], COUNTS),
        **dict.fromkeys(["codebook_norm", "codebook_update", "codebook_init", "gradient_estimator"], CHOICES),
        "ema_decay": [2, *NOT_NEGATIVE],
        "restart_threshold": [1, *NOT_NEGATIVE],
        "entropy_temperature": [0, *NOT_NEGATIVE],
    },
    "simvq": {"num_codes": COUNTS, "gradient_estimator": CHOICES, "entropy_weight": NOT_NEGATIVE},
    "ibq": {"code_dim": COUNTS, "codebook_norm": CHOICES, "beta": NOT_NEGATIVE},
    "fsq": {"levels": [(), None, 8, (8, 2), (8, 0), (8, True), (8.0,), (10**6,) * 3]},
    "lfq": {"code_dim": [*COUNTS, 25], "codebook_norm": CHOICES, "entropy_temperature": [0, *NOT_NEGATIVE]},
    "encoder": {"block_out_channels": LISTS, "layers_per_block": COUNTS, "in_channels": COUNTS},
    "decoder": {"norm_num_groups": [3, *COUNTS], "out_channels": COUNTS},
}


@pytest.mark.parametrize(("maker", "name"), [(maker, name) for maker in BAD for name in BAD[maker]])
def test_a_bad_argument_is_named_before_anything_is_built(maker, name, monkeypatch):
    MAKERS[maker](**({"levels": (4, 4)} if maker == "fsq" else {}))  # without it, all is well
    built = []
    original = nn.Parameter.__new__
    monkeypatch.setattr(nn.Parameter, "__new__", lambda *args, **kwargs: built.append(1) or original(*args, **kwargs))
    for value in BAD[maker][name]:
        with pytest.raises(ValueError, match=name):
            MAKERS[maker](**{name: value})
        assert not built, (name, value)


@pytest.mark.parametrize(
    ("maker", "given", "names"),
    [
        ("image", {"block_out_channels": (8, 12, 8)}, ["block_out_channels", "down_block_types"]),
        ("image", {"norm_num_groups": 3}, ["block_out_channels", "norm_num_groups=3"]),
        ("image", {"norm_type": "spatial"}, ["block_out_channels", "norm_type"]),
        (
            "image",
            {"norm_type": "spatial", "block_out_channels": (32, 32), "vq_embed_dim": 3},
            ["vq_embed_dim", "norm_type"],
        ),
        ("image", {"quantizer_type": "fsq"}, ["fsq_levels"]),
        ("image", {"quantizer_type": "fsq", "fsq_levels": (4, 4)}, ["num_vq_embeddings", "vq_embed_dim"]),
        ("image", {"quantizer_type": "lfq", "num_vq_embeddings": 17}, ["num_vq_embeddings=17", "16"]),
        ("image", {"quantizer_type": "lfq", "restart_threshold": 0.1}, ["restart_threshold", "quantizer_type"]),
        ("image", {"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}, ["latents_mean", "4"]),
        ("image", {"latents_mean": [0.0] * 4, "latents_std": [1.0, 1.0, 0.0, 1.0]}, ["latents_std", "above 0"]),
        ("text", {"max_length": 5, "downsample_factor": 2}, ["max_length=5", "downsample_factor=2"]),
        ("text", {"num_codebooks": 2}, ["num_codebooks", "codebook_norm"]),
        ("text", {"quantizer_type": "rvq", "num_quantizers": 2}, ["num_quantizers=2", "codebook_norm='none'"]),
        ("text", {"num_quantizers": 2, "codebook_norm": "none"}, ["num_quantizers=2", "quantizer_type='vq'"]),
        (
            "text",
            {"quantizer_type": "rvq", "num_codebooks": 2, "codebook_norm": "none"},
            ["num_codebooks=2", "quantizer_type='rvq'"],
        ),
        (
            "text",
            {"quantizer_type": "rvq", "downsample_factor": 4, "code_dim": 6, "codebook_norm": "none"},
            ["code_dim=6", "downsample_factor=4"],
        ),
        ("image", {"num_quantizers": 2}, ["num_quantizers=2", "quantizer_type='vq'"]),
        ("image", {"quantizer_type": "rvq", "codebook_norm": "l2"}, ["codebook_norm='l2'", "quantizer_type='rvq'"]),
        ("codes", {"segments": {"a": {"vocab_size": 0, "shape": [4]}}}, ["segments['a']", "vocab_size=0"]),
        ("codes", {"segments": {"a": {"vocab_size": True, "shape": [4]}}}, ["segments['a']", "vocab_size"]),
        ("codes", {"segments": {"a": {"vocab_size": 10**9, "shape": [4]}}}, ["segments['a']", "vocab_size"]),
        ("codes", {"segments": {"a": {"vocab_size": 4, "shape": [True]}}}, ["segments['a']", "shape"]),
        ("codes", {"segments": {"a": {"vocab_size": 4, "shape": [10**5, 10**5]}}}, ["segments['a']", "shape"]),
        ("codes", {"segments": {"a": {"vocab_size": 4, "shape": "44"}}}, ["segments['a']", "shape"]),
        ("codes", {"segments": {"a": {"vocab_size": 4, "shape": [4], "size": 1}}}, ["segments['a']", "'size'"]),
        *(
            ("codes", {"segments": {**SEGMENTS, "a": {"vocab_size": size, "shape": [4], "shared_with": other}}}, words)
            for size, other, words in [
                (8, "sketch", ["segments['a']", "shared_with='sketch'"]),
                (9, "text", ["shared_with='text'", "vocab_size=9"]),
                (8, "a", ["shared_with='a'"]),
                (8, None, ["shared_with=None"]),
                (8, ["text"], ["shared_with=['text']"]),
            ]
        ),
        (
            "codes",
            {
                "segments": {
                    **SEGMENTS,
                    "a": {"vocab_size": 8, "shape": [4], "shared_with": "b"},
                    "b": {"vocab_size": 8, "shape": [4], "shared_with": "text"},
                }
            },
            ["segments['a']", "shared_with='b'"],
        ),
        (
            "codes",
            {"use_rotary_positional_embeddings": True, "attention_head_dim": 7},
            ["attention_head_dim=7", "even"],
        ),
        ("codes", {"segments": {"training": {"vocab_size": 4, "shape": [4]}}}, ["'training' can't be a name"]),
        ("latent", {"patch_size": 8}, ["patch_size=8", "sample_size=4"]),
        ("scheduler", {"remask": 0.5, "sampler": "halton"}, ["remask=0.5", "sampler"]),
    ],
)
def test_arguments_that_do_not_fit_together_are_named(maker, given, names):
    with pytest.raises(ValueError) as error:
        MAKERS[maker](**given)
    assert all(name in str(error.value) for name in names), str(error.value)


def test_numpy_numbers_are_taken_and_saved_as_pythons(tmp_path):
    model = MAKERS["image"](num_vq_embeddings=np.int64(16), beta=np.float32(0.5), block_out_channels=[np.int32(8)] * 2)
    model.save_pretrained(tmp_path / "image")
    loaded = ImageVQModel.from_pretrained(tmp_path / "image")
    assert loaded.num_codes == 16 and loaded.config.beta == 0.5
    segments = {"a": {"vocab_size": np.int64(8), "shape": [np.int64(4)]}}
    MAKERS["codes"](segments=segments).save_pretrained(tmp_path / "codes")
    assert VQDiTTransformer2DModel.from_pretrained(tmp_path / "codes").config.segments["a"]["shape"] == [4]

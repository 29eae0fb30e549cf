import copy

import pytest
import torch
import torch.nn as nn
from accelerate import cpu_offload
from accelerate.utils import convert_to_fp32
from diffusers import VQModel

from diffusers_vqdit import ImageVQModel
from diffusers_vqdit.models.position_norm import PositionNorm


CONFIG = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "num_vq_embeddings": 64,
    "sample_size": 16,
}


def _input_shapes(module, shapes):
    """Append the shape of each input that `module` gets to `shapes`."""
    # Before the call: a checkpointed block's second forward ends as soon as the backward pass has what it needs.
    module.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    return shapes


@pytest.mark.parametrize(
    "options", [{}, {"norm_type": "spatial", "block_out_channels": (32, 32)}, {"vq_embed_dim": 3}]
)
def test_a_stock_checkpoint_gives_the_same_latents_codes_and_pictures(tmp_path, options):
    stock = VQModel(**{**CONFIG, **options}).eval()
    stock.quantize.embedding.weight.data.normal_()
    stock.save_pretrained(tmp_path)
    ours = ImageVQModel.from_pretrained(tmp_path).eval()
    assert sorted(ours.state_dict()) == sorted(stock.state_dict())
    sample = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        latents = stock.encode(sample).latents
        codes = stock.quantize(latents)[2][2].view(2, 8, 8)
        torch.testing.assert_close(ours.encode(sample).latents, latents, atol=1e-5, rtol=0)
        assert torch.equal(ours.encode_codes(sample), codes)
        expected = stock(sample).sample
        torch.testing.assert_close(ours(sample).sample, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.decode_codes(codes).sample, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.decode(latents).sample, expected, atol=1e-5, rtol=0)


def test_lookup_from_codebook_as_in_the_stock_model(tmp_path):
    stock = VQModel(**CONFIG, lookup_from_codebook=True).eval()
    stock.save_pretrained(tmp_path)
    ours = ImageVQModel.from_pretrained(tmp_path).eval()
    codes = torch.randint(64, (2, 8, 8))
    with torch.no_grad():
        expected = stock.decode(codes, force_not_quantize=True, shape=(2, 8, 8, 4)).sample
        actual = ours.decode(codes, force_not_quantize=True, shape=(2, 8, 8, 4)).sample
    torch.testing.assert_close(actual, expected)


def test_save_and_load_keep_everything(tmp_path):
    model = ImageVQModel(**CONFIG, codebook_norm="l2", codebook_update="ema", codebook_init="kmeans").train()
    model(torch.rand(4, 3, 16, 16) * 2 - 1)
    model.eval().save_pretrained(tmp_path)
    loaded = ImageVQModel.from_pretrained(tmp_path)
    assert {k: v for k, v in loaded.config.items() if k.startswith("codebook")} == {
        "codebook_norm": "l2",
        "codebook_update": "ema",
        "codebook_init": "kmeans",
    }
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_codes_are_those_of_the_forward_pass():
    model = ImageVQModel(**CONFIG).eval()
    model.quantize.embedding.weight.data.normal_()
    sample = torch.rand(2, 3, 16, 16) * 2 - 1
    output = model(sample)
    assert output.codes.dtype == torch.int64
    assert torch.equal(output.codes, model.encode_codes(sample))
    torch.testing.assert_close(output.sample, model.decode_codes(output.codes).sample, atol=1e-5, rtol=0)
    assert model.downsample_factor == 2
    assert model.num_codes == 64


QUANTIZERS = {
    "vq": {"gradient_estimator": "rotation", "entropy_weight": 0.1},
    "rvq": {"num_quantizers": 3, "codebook_update": "ema", "codebook_init": "data", "restart_threshold": 0.1},
    "simvq": {"vq_embed_dim": 6, "gradient_estimator": "rotation"},
    "ibq": {"codebook_norm": "l2"},
    "fsq": {"fsq_levels": (4, 4, 4), "vq_embed_dim": 3},
    "lfq": {"vq_embed_dim": 6, "codebook_norm": "l2", "entropy_weight": 0.1},
}


@pytest.mark.parametrize("quantizer_type", QUANTIZERS)
def test_offloaded_layer_by_layer_it_gives_the_same(quantizer_type):
    """As by `enable_sequential_cpu_offload`: a layer has its weights during its own call only."""
    model = ImageVQModel(**CONFIG, quantizer_type=quantizer_type, **QUANTIZERS[quantizer_type]).eval()
    sample = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        codes, expected = model.encode_codes(sample), model(sample).sample
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert {parameter.device.type for parameter in model.encoder.parameters()} == {"meta"}
        assert torch.equal(model.encode_codes(sample), codes)
        torch.testing.assert_close(model(sample).sample, expected)
        torch.testing.assert_close(model.decode_codes(codes).sample, expected)


@pytest.mark.parametrize("quantizer_type", QUANTIZERS)
def test_every_quantizer_trains_saves_and_loads(tmp_path, quantizer_type):
    model = ImageVQModel(**CONFIG, quantizer_type=quantizer_type, **QUANTIZERS[quantizer_type]).train()
    sample = torch.rand(2, 3, 16, 16) * 2 - 1
    output = model(sample)
    ((output.sample - sample).square().mean() + output.commit_loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.encoder.parameters())
    model.eval().save_pretrained(tmp_path)
    loaded = ImageVQModel.from_pretrained(tmp_path)
    codes = model.encode_codes(sample)
    assert codes.shape[3:] == ((3,) if quantizer_type == "rvq" else ()) and torch.equal(codes, model(sample).codes)
    assert codes.max() < model.num_codes == 64
    assert torch.equal(loaded.encode_codes(sample), codes)
    with torch.no_grad():
        torch.testing.assert_close(loaded.decode_codes(codes).sample, model.decode_codes(codes).sample)
        half = loaded.to(torch.bfloat16)
        assert half.decode_codes(half.encode_codes(sample)).sample.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantizer_type": "other"}, "quantizer_type='other' must be one of"),
        ({"quantizer_type": "simvq", "codebook_update": "ema"}, "codebook_update='ema' has no meaning with .*'simvq'"),
        ({"quantizer_type": "fsq"}, "fsq_levels is missing"),
        ({"quantizer_type": "fsq", "fsq_levels": (8, 8)}, "vq_embed_dim=4 must be 64 and 2"),
        ({"quantizer_type": "lfq"}, "num_vq_embeddings=64 and vq_embed_dim=4 must be 16 and 4"),
        ({"pixel_range": (1.0, 0.0)}, "pixel_range="),
        ({"down_block_types": ("MaskGITDownBlock2D",) * 2}, "up_block_types=.*MaskGITUpBlock2D.* with MaskGIT"),
    ],
)
def test_quantizer_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ImageVQModel(**{**CONFIG, **options})


@pytest.mark.parametrize("norm_type", ["group", "position"])
def test_with_norms_of_positions_codes_depend_on_what_is_near(norm_type, tmp_path):
    model = ImageVQModel(**CONFIG, mid_block_add_attention=False, encoder_norm_type=norm_type).eval()
    sample = torch.rand(1, 3, 96, 96) * 2 - 1
    other = sample.clone()
    other[..., 64:] = -1
    first, second = (model.encode(x).latents for x in (sample, other))
    # 32 pixels from the change, beyond the sight of two levels with a block each: 16 columns of codes.
    assert torch.equal(first[..., :16], second[..., :16]) == (norm_type == "position")
    assert not torch.equal(first[..., 32:], second[..., 32:])
    model.save_pretrained(tmp_path)
    loaded = ImageVQModel.from_pretrained(tmp_path)
    assert loaded.config.encoder_norm_type == norm_type and torch.equal(loaded.encode(sample).latents, first)


@pytest.mark.parametrize("shape", [(2, 6, 4, 3), (2, 6, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_of_positions_is_that_of_each_vector(shape, dtype):
    norm = PositionNorm(6).to(dtype)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x = (3 * torch.randn(shape) + 2).to(dtype)
    vectors = x.double().movedim(1, -1)
    expected = (vectors - vectors.mean(-1, keepdim=True)) / (vectors.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    expected = (expected * norm.weight.double() + norm.bias.double()).movedim(-1, 1)
    assert norm(x).shape == x.shape and norm(x).dtype == dtype
    torch.testing.assert_close(norm(x).double(), expected, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=0.01)


@pytest.mark.parametrize("quantizer", ["vq", "rvq", "fsq", "lfq"])
@pytest.mark.parametrize("attention", [False, True])
def test_norms_of_positions_with_attention_half_precision_and_checkpointing(quantizer, attention):
    """No group norm is left in the encoder, all norms learn, and gradients are the same with checkpointing."""
    options = {
        "vq": {},
        "rvq": {"quantizer_type": "rvq", "num_quantizers": 2},
        "fsq": {"quantizer_type": "fsq", "fsq_levels": (3, 3), "num_vq_embeddings": 9, "vq_embed_dim": 2},
        "lfq": {"quantizer_type": "lfq", "num_vq_embeddings": 16, "vq_embed_dim": 4},
    }[quantizer]
    blocks = ["DownEncoderBlock2D"] * (len(CONFIG["block_out_channels"]) - 1)
    options |= {"down_block_types": [*blocks, "AttnDownEncoderBlock2D" if attention else "DownEncoderBlock2D"]}
    options |= {"mid_block_add_attention": attention, "encoder_norm_type": "position"}
    torch.manual_seed(0)
    model = ImageVQModel(**{**CONFIG, **options}).train()
    assert not any(isinstance(module, nn.GroupNorm) for module in model.encoder.modules())
    sample, gradients = torch.rand(2, 3, 32, 32) * 2 - 1, []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        model(sample).sample.square().mean().backward()
        gradients.append({name: one.grad.clone() for name, one in model.encoder.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}")
    half = model.eval().to(torch.bfloat16)
    picture = half.decode_codes(half.encode_codes(sample)).sample
    assert picture.dtype == torch.bfloat16 and picture.isfinite().all()


def test_the_pixel_range_is_changed_outside_the_convolutions():
    torch.manual_seed(0)
    plain = ImageVQModel(**CONFIG).eval()
    model = ImageVQModel(**CONFIG, pixel_range=(0.0, 255.0)).eval()
    model.load_state_dict(plain.state_dict())
    sample = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        # VQModel takes any range.
        torch.testing.assert_close(model.encode(sample).latents, plain.encode((sample + 1) * 127.5).latents)
        latents = torch.randn(1, 4, 8, 8)
        expected = plain.decode(latents).sample / 127.5 - 1
        torch.testing.assert_close(model.decode(latents).sample, expected)


def test_slicing_equals_the_whole_batch():
    model = ImageVQModel(**CONFIG).eval()
    sample = torch.rand(3, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        whole = model(sample).sample
        encoded, decoded = _input_shapes(model.encoder, []), _input_shapes(model.decoder, [])
        model.enable_slicing()
        torch.testing.assert_close(model(sample).sample, whole, atol=1e-5, rtol=0)
        assert encoded == [(1, 3, 16, 16)] * 3
        assert decoded == [(1, 4, 8, 8)] * 3
        model.disable_slicing()
        model(sample)
        assert encoded[3:] == [(3, 3, 16, 16)]


def test_one_tile_equals_the_whole_and_large_pictures_keep_their_size():
    model = ImageVQModel(**CONFIG).eval()
    model.quantize.embedding.weight.data.normal_()
    small, large = torch.rand(1, 3, 16, 16) * 2 - 1, torch.rand(1, 3, 40, 56) * 2 - 1
    with torch.no_grad():
        whole = model(small).sample
        model.enable_tiling()
        assert torch.equal(model(small).sample, whole)
        assert model.encode_codes(large).shape == (1, 20, 28)
        assert model(large).sample.shape == large.shape
        encoded, decoded = _input_shapes(model.encoder, []), _input_shapes(model.decoder, [])
        assert torch.isfinite(model(large).sample).all()
        # Tiles start every 12 pixels, the last at the border: 3 rows of 5.
        assert encoded == [(1, 3, 16, 16)] * 15
        assert decoded == [(1, 4, 8, 8)] * 15
        model.disable_tiling()
        model(large)
        assert encoded[15:] == [(1, 3, 40, 56)]


@pytest.mark.parametrize("shape", [(40, 40), (17, 16), (64, 33)])
def test_tiles_of_a_local_function_add_up_to_the_whole(shape):
    model = ImageVQModel(**CONFIG)
    pixels, codes = torch.rand(2, 3, 2 * shape[0], 2 * shape[1]), torch.rand(2, 4, *shape)
    pool, grow = torch.nn.AvgPool2d(2), torch.nn.Upsample(scale_factor=2)
    torch.testing.assert_close(model._tiled(pixels, pool, tile=16, tile_out=8), pool(pixels))
    torch.testing.assert_close(model._tiled(codes, grow, tile=8, tile_out=16), grow(codes))


def test_gradient_checkpointing_gives_the_same_gradients():
    sample = torch.rand(2, 3, 16, 16) * 2 - 1
    gradients, calls = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = ImageVQModel(**CONFIG).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        shapes = [_input_shapes(block, []) for block in (model.encoder.down_blocks[0], model.decoder.up_blocks[0])]
        output = model(sample)
        (output.sample.square().mean() + output.commit_loss).backward()
        calls.append([len(s) for s in shapes])
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert calls == [[1, 1], [2, 2]]  # computed a second time in the backward pass
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_bfloat16_model_runs():
    model = ImageVQModel(**CONFIG).eval().to(torch.bfloat16)
    codes = model.encode_codes(torch.rand(1, 3, 16, 16) * 2 - 1)
    assert model.decode_codes(codes).sample.dtype == torch.bfloat16


def test_accelerate_can_cast_the_output():
    model = ImageVQModel(**CONFIG).eval().to(torch.bfloat16)
    output = model(torch.rand(1, 3, 16, 16).to(torch.bfloat16))
    cast = convert_to_fp32(output)  # as the models that Accelerator prepares for mixed precision do
    assert cast.keys() == output.keys() and cast.sample.dtype == torch.float32
    assert torch.equal(cast.codes, output.codes) and torch.equal(cast.commit_loss, output.commit_loss)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (torch.zeros(3, 16, 16), "shape"),
        (torch.zeros(1, 1, 16, 16), "shape"),
        (torch.zeros(1, 3, 15, 16), "multiples of 2"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "torch.uint8"),
        (torch.full((1, 3, 16, 16), 255.0), "255"),
        (torch.full((1, 3, 16, 16), float("nan")), "nan"),
    ],
)
def test_bad_pictures_are_named(sample, message):
    with pytest.raises(ValueError, match=message):
        ImageVQModel(**CONFIG).encode_codes(sample)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(1, 64, dtype=torch.int64), "shape"),
        (torch.zeros(1, 8, 8), "float32"),
        (torch.full((1, 8, 8), 64), "got values from 64 to 64"),
    ],
)
def test_bad_codes_are_named(codes, message):
    with pytest.raises(ValueError, match=message):
        ImageVQModel(**CONFIG).decode_codes(codes)


def layouts(model, sample, **autocast):
    """What encoding and decoding give, and whether all of their 3 x 3 convolutions have the channels last."""
    seen = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
        )
        for layer in model.modules()
        if isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == (3, 3) and layer.in_channels > 4
    ]
    with torch.autocast("cpu", torch.bfloat16, **autocast):
        latents = model.encode(sample).latents
        decoded = model.decode(latents, force_not_quantize=True).sample
    for hook in hooks:
        hook.remove()
    assert latents.is_contiguous() and decoded.is_contiguous()
    return latents, decoded, set(seen)


def test_half_precision_convolves_with_the_channels_last_on_cpus_and_nothing_else_does(image_vq):
    sample = 2 * torch.rand(2, 3, 32, 32) - 1
    with torch.no_grad():
        *plain, seen = layouts(image_vq, sample, enabled=False)
        assert False in seen  # attention leaves the channels last, whatever they were
        *cast, seen = layouts(image_vq, sample, enabled=True)
        assert seen == {True}
        half = copy.deepcopy(image_vq).bfloat16()
        *low, seen = layouts(half, sample.bfloat16(), enabled=False)
        assert seen == {True}
        for found in (cast, low):
            for one, expected in zip(found, plain, strict=True):
                torch.testing.assert_close(one.float(), expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))
    assert False in layouts(image_vq, sample, enabled=True)[2]  # in training


def test_a_tokenizer_takes_the_layout_that_its_user_chooses(image_vq):
    sample = 2 * torch.rand(2, 3, 32, 32) - 1
    with torch.no_grad():
        *plain, _ = layouts(image_vq, sample, enabled=False)
        *found, seen = layouts(image_vq.to(memory_format=torch.channels_last), sample, enabled=False)
    assert True in seen
    for one, expected in zip(found, plain, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)


def test_a_tile_of_one_code_overlaps_none():
    model = ImageVQModel(**{**CONFIG, "sample_size": 2}).eval()
    model.enable_tiling()
    with torch.no_grad():
        assert model.encode_codes(torch.rand(1, 3, 8, 6) * 2 - 1).shape == (1, 4, 3)

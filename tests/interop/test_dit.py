"""The original DiT's checkpoints: its forward written again from the paper, and round trips of the weights."""

import argparse
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel

from diffusers_vqdit import VQDiTTransformer2DModel
from diffusers_vqdit.interop.dit import (
    convert_from_original,
    convert_to_original,
    load_original_dit,
    save_original_dit,
)


WIDTH, HEADS, LAYERS, PATCH, SIZE, CHANNELS, CLASSES = 24, 3, 2, 2, 8, 4, 10


def sines(positions, width, dtype=torch.float64):
    """Sines, then cosines, of positions at `width` / 2 frequencies 10000^(-2 k / width)."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2, dtype=dtype) / (width // 2))
    angles = positions.to(dtype)[:, None] * frequencies
    return angles.sin(), angles.cos()


def original_weights():
    """Random weights under the original's names, of which each counts."""
    state = {}

    def linear(name, inputs, outputs):
        state[f"{name}.weight"] = torch.randn(outputs, inputs) / math.sqrt(inputs)
        state[f"{name}.bias"] = 0.1 * torch.randn(outputs)

    linear("x_embedder.proj", CHANNELS * PATCH**2, WIDTH)
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"].view(WIDTH, CHANNELS, PATCH, PATCH)
    rows, columns = (x.flatten() for x in torch.meshgrid(*[torch.arange(SIZE // PATCH)] * 2, indexing="ij"))
    # Half of the channels for the column, then half for the row.
    state["pos_embed"] = torch.cat([*sines(columns, WIDTH // 2), *sines(rows, WIDTH // 2)], 1).float()[None]
    linear("t_embedder.mlp.0", 256, WIDTH)
    linear("t_embedder.mlp.2", WIDTH, WIDTH)
    state["y_embedder.embedding_table.weight"] = torch.randn(CLASSES + 1, WIDTH)
    for layer in range(LAYERS):
        linear(f"blocks.{layer}.adaLN_modulation.1", WIDTH, 6 * WIDTH)
        linear(f"blocks.{layer}.attn.qkv", WIDTH, 3 * WIDTH)
        linear(f"blocks.{layer}.attn.proj", WIDTH, WIDTH)
        linear(f"blocks.{layer}.mlp.fc1", WIDTH, 4 * WIDTH)
        linear(f"blocks.{layer}.mlp.fc2", 4 * WIDTH, WIDTH)
    linear("final_layer.adaLN_modulation.1", WIDTH, 2 * WIDTH)
    linear("final_layer.linear", WIDTH, PATCH**2 * 2 * CHANNELS)
    return state


def original_forward(state, latents, timestep, labels):
    """DiT as the paper has it: section 3.2, figure 3 and, for the time's embedding, appendix A."""

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def normalised(x, shift, scale):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
        return (x - mean) / (variance + 1e-6).sqrt() * (1 + scale[:, None]) + shift[:, None]

    side = SIZE // PATCH
    patches = latents.unflatten(3, (side, PATCH)).unflatten(2, (side, PATCH))  # (B, C, h, p, w, p)
    patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, C p p)
    x = patches @ state["x_embedder.proj.weight"].flatten(1).T + state["x_embedder.proj.bias"] + state["pos_embed"]
    sine, cosine = sines(timestep, 256, torch.float32)  # at 999, float64 would differ by 6e-5
    time = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([cosine, sine], 1))))
    conditioning = F.silu(time + state["y_embedder.embedding_table.weight"][labels])
    for layer in range(LAYERS):
        block = f"blocks.{layer}."
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{block}adaLN_modulation.1", conditioning).chunk(6, 1)
        qkv = linear(f"{block}attn.qkv", normalised(x, shift1, scale1))
        query, key, value = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, head_dim)
        weights = (query @ key.mT / math.sqrt(WIDTH // HEADS)).softmax(-1)
        attended = linear(f"{block}attn.proj", (weights @ value).transpose(1, 2).flatten(2))
        x = x + gate1[:, None] * attended
        hidden = F.gelu(linear(f"{block}mlp.fc1", normalised(x, shift2, scale2)), approximate="tanh")
        x = x + gate2[:, None] * linear(f"{block}mlp.fc2", hidden)
    shift, scale = linear("final_layer.adaLN_modulation.1", conditioning).chunk(2, 1)
    x = linear("final_layer.linear", normalised(x, shift, scale))
    x = x.unflatten(-1, (PATCH, PATCH, -1)).unflatten(1, (side, side))  # (B, h, w, p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


INPUTS = (torch.randn(3, CHANNELS, SIZE, SIZE), torch.tensor([0, 417, 999]), torch.tensor([3, 9, 10]))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_original_checkpoint_gives_the_originals_outputs(tmp_path):
    state = original_weights()
    torch.save(state, tmp_path / "dit.pt")
    model = VQDiTTransformer2DModel.from_original(tmp_path / "dit.pt", num_attention_heads=HEADS)
    expected = original_forward(state, *INPUTS)
    close(model(*INPUTS).sample, expected)
    assert model.has_shared_embedder and model.config.out_channels == 2 * CHANNELS
    # Through diffusers' format, and back.
    model.save_pretrained(tmp_path / "ours")
    again = VQDiTTransformer2DModel.from_pretrained(tmp_path / "ours").eval()
    close(again(*INPUTS).sample, expected)
    save_original_dit(again, tmp_path / "again.pt")
    written = torch.load(tmp_path / "again.pt", weights_only=True)
    assert written.keys() == state.keys()
    for name, value in state.items():
        torch.testing.assert_close(written[name], value, atol=1e-6, rtol=0, msg=name)
    close(original_forward(written, *INPUTS), expected)
    # What stock DiT computes from the same weights is something else, which is why the config has these fields.
    stock = DiTTransformer2DModel.from_pretrained(tmp_path / "ours").eval()
    assert (stock(*INPUTS).sample - expected).abs().max() > 1e-2


@torch.no_grad()
def test_stock_weights_make_the_round_trip_through_the_original_format():
    stock = DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        num_layers=LAYERS,
        sample_size=SIZE,
        num_embeds_ada_norm=CLASSES,
    ).eval()
    with pytest.raises(ValueError, match="block 1's embedder differs"):
        convert_to_original(stock.state_dict(), 16)
    first = stock.transformer_blocks[0].norm1.emb.state_dict()
    stock.transformer_blocks[1].norm1.emb.load_state_dict(first)
    ours = VQDiTTransformer2DModel.from_config(stock.config).eval()
    ours.load_state_dict(convert_from_original(convert_to_original(stock.state_dict(), 16)))
    close(ours(*INPUTS).sample, stock(*INPUTS).sample)
    back = DiTTransformer2DModel.from_config(stock.config).eval()
    back.load_state_dict(convert_from_original(convert_to_original(ours.share_embedder().state_dict(), 16)))
    close(back(*INPUTS).sample, stock(*INPUTS).sample)


@torch.no_grad()
def test_the_moving_average_of_a_training_run(tmp_path):
    last, average = original_weights(), original_weights()
    checkpoint = {
        "model": {f"module.{name}": value for name, value in last.items()},
        "ema": average,
        "opt": {"state": {}, "param_groups": []},
        "args": argparse.Namespace(model="DiT-S/2"),
    }
    torch.save(checkpoint, tmp_path / "run.pt")
    ema = VQDiTTransformer2DModel.from_original(tmp_path / "run.pt", num_attention_heads=HEADS)
    model = VQDiTTransformer2DModel.from_original(tmp_path / "run.pt", num_attention_heads=HEADS, use_ema=False)
    close(ema(*INPUTS).sample, original_forward(average, *INPUTS))
    close(model(*INPUTS).sample, original_forward(last, *INPUTS))
    save_original_dit(model, tmp_path / "again.pt", ema=ema)
    written = torch.load(tmp_path / "again.pt", weights_only=True)
    for name in last:
        torch.testing.assert_close(written["model"][name], last[name], atol=1e-6, rtol=0)
        torch.testing.assert_close(written["ema"][name], average[name], atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_old_name_loads_the_same(tmp_path):
    state = original_weights()
    torch.save(state, tmp_path / "dit.pt")
    with pytest.warns(FutureWarning, match="from_original"):
        model = load_original_dit(tmp_path / "dit.pt", num_attention_heads=HEADS)
    close(model(*INPUTS).sample, original_forward(state, *INPUTS))


def test_what_does_not_fit_is_named(tmp_path):
    state = original_weights()
    with pytest.raises(ValueError, match="'final_layer.linear.bias' is not in it"):
        convert_from_original({n: v for n, v in state.items() if n != "final_layer.linear.bias"})
    with pytest.raises(ValueError, match=r"no place for: \['projectors.0.weight'\]"):
        convert_from_original({**state, "projectors.0.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="pos_embed is not the sine-cosine table"):
        convert_from_original({**state, "pos_embed": torch.randn(1, 16, WIDTH)})
    torch.save(state, tmp_path / "dit.pt")
    for changed in (
        {"final_layer.linear.bias": torch.zeros(9)},
        {"y_embedder.embedding_table.weight": torch.ones(3, 5)},
    ):
        with pytest.raises(ValueError, match="not a whole DiT .*must have shape"):
            VQDiTTransformer2DModel.from_original({**state, **changed}, num_attention_heads=HEADS)
    with pytest.raises(ValueError, match="num_attention_heads=None must be given for a width of 24"):
        VQDiTTransformer2DModel.from_original(tmp_path / "dit.pt")
    shifted = VQDiTTransformer2DModel(num_attention_heads=2, attention_head_dim=4, num_layers=1, sample_size=4)
    with pytest.raises(ValueError, match="freq_shift': 1.0, 'norm_eps': 1e-05"):
        save_original_dit(shifted, tmp_path / "ours.pt")

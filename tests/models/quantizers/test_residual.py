"""Laws of residual codes: one level is the plain quantizer, and each level takes from the error."""

import copy

import pytest
import torch

from diffusers_vqdit.models.quantizers.codebook import SimVectorQuantizer
from diffusers_vqdit.models.quantizers.residual import ResidualVectorQuantizer
from diffusers_vqdit.models.quantizers.vector import VectorQuantizer


OPTIONS = {
    "gradient": {"beta": 0.5},
    "rotation": {"gradient_estimator": "rotation", "codebook_init": "data"},
    "ema": {"codebook_update": "ema", "codebook_init": "kmeans", "restart_threshold": 0.3},
    "entropy": {"entropy_weight": 0.1, "entropy_temperature": 0.5},
    "l2": {"codebook_norm": "l2", "codebook_update": "ema", "codebook_init": "data"},
}


def make(levels, **options):
    return ResidualVectorQuantizer(VectorQuantizer(16, 4, **options) for _ in range(levels))


def spread(levels, **options):
    """With codebooks of the scale of what each level is left."""
    quantizer = make(levels, **options)
    for index, level in enumerate(quantizer):
        level.embedding.weight.data = 2.0**-index * torch.randn(16, 4)
    return quantizer


def trained(quantizer, z, steps=5, drift=0.1):
    """Everything there is to tell of some steps of training."""
    seen, quantizer = [], quantizer.train()
    for step in range(steps):
        part = (z + drift * step).requires_grad_()
        output = quantizer(part)
        (output.loss + (output.quantized * torch.linspace(-1, 1, z.shape[-1])).sum()).backward()
        seen += [output.quantized, output.codes, output.loss, output.entropy_loss, output.usage, output.perplexity]
        seen.append(part.grad)
        for parameter in quantizer.parameters():
            if parameter.grad is not None:
                parameter.data -= 0.1 * parameter.grad
                parameter.grad = None
    return [value.detach().clone() for value in seen]


@pytest.mark.parametrize("name", OPTIONS)
def test_one_level_is_the_plain_quantizer_bit_for_bit(name):
    z = torch.randn(6, 10, 4)
    plain = VectorQuantizer(16, 4, **OPTIONS[name])
    residual = ResidualVectorQuantizer([copy.deepcopy(plain)])
    for ours, expected in zip(trained(residual, z.clone()), trained(plain, z.clone()), strict=True):
        assert torch.equal(ours.reshape(expected.shape), expected)
    assert {f"0.{name}": value.tolist() for name, value in plain.state_dict().items()} == {
        name: value.tolist() for name, value in residual.state_dict().items()
    }
    plain.eval(), residual.eval()
    assert torch.equal(residual.encode(z)[..., 0], plain.encode(z))
    assert torch.equal(residual.lookup(residual.encode(z)), plain.lookup(plain.encode(z)))


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "l2"])
def test_each_level_takes_from_the_error_and_the_codes_before_it_stay(name):
    z = torch.randn(400, 4)
    quantizer = spread(4, **OPTIONS[name])
    # Averages take some steps to come to the vectors, which stay where they are.
    trained(quantizer, z, 60 if OPTIONS[name].get("codebook_update") == "ema" else 1, drift=0.0)
    quantizer.eval()
    codes = quantizer.encode(z)
    errors, quantized = [z.square().mean()], 0
    for index, level in enumerate(quantizer):
        assert torch.equal(ResidualVectorQuantizer(quantizer[: index + 1]).encode(z), codes[:, : index + 1])
        quantized = quantized + level.lookup(codes[:, index])
        errors.append((z - quantized).square().mean())
    assert all(later < 0.85 * before for before, later in zip(errors[:-1], errors[1:], strict=True)), errors
    torch.testing.assert_close(quantizer.lookup(codes), quantized)
    output = quantizer(z)
    assert torch.equal(output.codes, codes) and output.usage.shape == output.perplexity.shape == (4,)
    torch.testing.assert_close(output.quantized, quantized)


def test_loss_and_gradients_equal_autograd_on_the_formula():
    quantizer, upstream = spread(3, beta=0.3).train(), torch.randn(20, 4)
    z = torch.randn(20, 4, requires_grad=True)
    output = quantizer(z)
    (output.loss + (output.quantized * upstream).sum()).backward()

    other = z.detach().requires_grad_()
    books = [level.embedding.weight.detach().requires_grad_() for level in quantizer]
    residual, loss = other, 0.0
    for book, codes in zip(books, output.codes.unbind(-1), strict=True):
        chosen = book[codes]
        loss = loss + 0.3 * (residual - chosen.detach()).square().mean()
        loss = loss + (residual.detach() - chosen).square().mean()
        residual = residual - chosen.detach()
    (loss + (other * upstream).sum()).backward()  # through the sum once, not once a level
    torch.testing.assert_close(output.loss, loss)
    torch.testing.assert_close(z.grad, other.grad)
    for level, book in zip(quantizer, books, strict=True):
        torch.testing.assert_close(level.embedding.weight.grad, book.grad)


def test_dead_codes_of_every_level_restart():
    used = {}
    for threshold in (0.0, 0.1):
        quantizer = spread(3, codebook_update="ema", ema_decay=0.5, restart_threshold=threshold).train()
        for level in quantizer:
            level._place(torch.arange(4, 16), 100 + torch.randn(12, 4))  # where no vector is
        for _ in range(20):
            used[threshold] = quantizer(torch.randn(200, 4)).usage
    assert (used[0.0] <= 0.25).all() and (used[0.1] > 0.8).all(), used


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_the_codes_of_its_vectors_in_float32(dtype):
    quantizer, z = spread(3).eval(), torch.randn(200, 4).to(dtype)
    expected = quantizer(z.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = quantizer(z)
    assert torch.equal(output.codes, expected.codes) and torch.equal(quantizer.encode(z), expected.codes)
    assert output.quantized.dtype == dtype and output.loss.dtype == torch.float32


def test_levels_may_be_of_another_kind():
    quantizer = ResidualVectorQuantizer(SimVectorQuantizer(64, 4) for _ in range(2)).train()
    z = torch.randn(30, 4, requires_grad=True)
    output = quantizer(z)
    (output.loss + output.quantized.sum()).backward()
    assert all(level.projection.weight.grad.abs().sum() > 0 for level in quantizer)
    assert torch.equal(quantizer.encode(z), output.codes)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(5, 2, dtype=torch.int64), r"must end in 3, one a level, got shape \(5, 2\)"),
        (torch.tensor(0), "must end in 3"),
        (torch.tensor([0, 15, 16]), r"must be in \[0, 16\)"),
        (torch.zeros(3), "float32"),
    ],
)
def test_bad_codes_are_named(codes, message):
    with pytest.raises(ValueError, match=message):
        make(3).lookup(codes)


def test_bad_vectors_are_named():
    for function in (make(2), make(2).encode):
        with pytest.raises(ValueError, match="must end in 4 channels"):
            function(torch.zeros(3, 5))

"""Likelihood bounds against brute force: all masks of a few codes, and a joint distribution that is known."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from diffusers_vqdit.likelihood.bounds import negative_elbo, stratified_masks


LENGTH, SIZE = 4, 3


class TrueConditionals:
    """In a transformer's place: the exact conditionals of a random joint distribution over LENGTH codes of SIZE."""

    def __init__(self):
        self.config = SimpleNamespace(segments={"image": {"vocab_size": SIZE, "shape": [2, 2]}}, time_conditioned=True)
        generator = torch.Generator().manual_seed(3)
        self.joint = torch.rand((SIZE,) * LENGTH, generator=generator, dtype=torch.float64) ** 3
        self.joint /= self.joint.sum()

    def __call__(self, codes, timestep=None, prefix=None, masked=None, check_values=True):
        logits = []
        for row in codes["image"].flatten(1).tolist():
            visible = tuple(slice(None) if code == SIZE else slice(code, code + 1) for code in row)
            for position, code in enumerate(row):
                if code == SIZE:
                    others = [axis for axis in range(LENGTH) if axis != position]
                    logits.append(self.joint[visible].sum(others).log())
        return SimpleNamespace(sample={"image": torch.stack(logits)})


def every_mask():
    """All sets of masked codes, repeated so that each number of masked codes is as frequent as any other."""
    masks = []
    for count in range(1, LENGTH + 1):
        repeats = math.lcm(*(math.comb(LENGTH, k) for k in range(1, LENGTH + 1))) // math.comb(LENGTH, count)
        for chosen in itertools.combinations(range(LENGTH), count):
            masks += [[position in chosen for position in range(LENGTH)]] * repeats
    return torch.tensor(masks)


def test_the_bound_of_true_conditionals_is_the_likelihood():
    model = TrueConditionals()
    codes = torch.tensor(list(itertools.product(range(SIZE), repeat=LENGTH))).view(-1, 2, 2)
    bound = negative_elbo(model, {"image": codes}, None, every_mask()).nll
    torch.testing.assert_close(bound, -model.joint.flatten().log(), rtol=1e-5, atol=1e-5)


def test_the_estimate_is_unbiased_and_its_error_is_told():
    model = TrueConditionals()
    codes = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]]).view(-1, 2, 2)
    exact = -torch.stack([model.joint[tuple(row)] for row in codes.flatten(1).tolist()]).log()
    errors, told = [], []
    for seed in range(150):
        masks, _ = stratified_masks(LENGTH, 16, torch.Generator().manual_seed(seed))
        output = negative_elbo(model, {"image": codes}, None, masks)
        errors.append(output.nll - exact)
        told.append(output.standard_error)
    errors, told = torch.stack(errors), torch.stack(told)
    spread = errors.std(0)
    assert (errors.mean(0).abs() < 4 * spread / math.sqrt(len(errors))).all()
    # 150 draws know a standard deviation to 6 %; four times that.
    assert (told.square().mean(0).sqrt() / spread - 1).abs().max() < 0.24


def test_masks_have_the_distribution_of_masked_diffusion():
    masks, ratios = stratified_masks(8, 4000, torch.Generator().manual_seed(0))
    counts = masks.sum(1)
    # k is uniform; stratified, so that the counts hardly vary.
    assert (torch.bincount(counts, minlength=9)[1:] - 500).abs().max() <= 2
    assert (masks.double().mean(0) - 4.5 / 8).abs().max() < 4 * 0.5 / math.sqrt(4000)
    for k in (1, 4, 8):  # Beta(k, 9 - k): mean k / 9, variance k (9 - k) / 810
        chosen = ratios[counts == k]
        assert abs(chosen.mean() - k / 9) < 4 * math.sqrt(k * (9 - k) / 810 / len(chosen))


def test_one_code_is_exact_with_one_mask():
    masks, _ = stratified_masks(1, 32)
    assert masks.tolist() == [[True]]


@pytest.mark.parametrize("num_samples", [0, 3, 2.0])
def test_wrong_numbers_of_samples_are_named(num_samples):
    with pytest.raises(ValueError, match=f"num_samples={num_samples}"):
        stratified_masks(4, num_samples)


def test_a_model_s_bound_is_that_of_plain_loops(transformer):
    text, image = torch.randint(64, (3, 12)), torch.randint(32, (3, 4, 4))
    label = torch.tensor([[0], [1], [2]])
    masks, _ = stratified_masks(12 + 16, 4, torch.Generator().manual_seed(1))
    with torch.no_grad():
        prefix = transformer.encode_prefix({"label": label})
    output = negative_elbo(transformer, {"image": image, "text": text}, prefix, masks, batch_size=2)
    expected = torch.zeros(3, dtype=torch.float64)
    for mask in masks:
        for row in range(3):
            noised = {
                "image": image[row : row + 1].flatten(1).masked_fill(mask[:16], 32).view(1, 4, 4),
                "text": text[row : row + 1].masked_fill(mask[16:], 64),
            }
            with torch.no_grad():
                logits = transformer(noised, given={"label": label[row : row + 1]}).sample
            for name, codes, hidden in (("image", image[row].flatten(), mask[:16]), ("text", text[row], mask[16:])):
                scores = logits[name][0].log_softmax(-1)
                for position in hidden.nonzero()[:, 0].tolist():
                    expected[row] -= scores[position, codes[position]].double() * 28 / int(mask.sum()) / len(masks)
    torch.testing.assert_close(output.nll, expected, rtol=1e-5, atol=1e-4)
    assert output.num_codes == 28
    torch.testing.assert_close(output.bits_per_code, output.nats_per_code / math.log(2))


def test_one_prefix_is_shared_by_all_candidates(transformer):
    image = torch.randint(32, (5, 4, 4))
    given = {"label": torch.tensor([[1]])}
    masks, _ = stratified_masks(16, 2, torch.Generator().manual_seed(1))
    with torch.no_grad():
        shared = negative_elbo(transformer, {"image": image}, transformer.encode_prefix(given), masks).nll
        given["label"] = given["label"].expand(5, -1)
        copied = negative_elbo(transformer, {"image": image}, transformer.encode_prefix(given), masks).nll
    torch.testing.assert_close(shared, copied)

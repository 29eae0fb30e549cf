import itertools
import math

import pytest
import torch

from diffusers_vqdit.schedulers.samplers import (
    check_device,
    draw,
    draw_masked,
    entropies,
    halton_order,
    highest,
    next_reveals,
    within_entropy_bound,
)


def test_codes_are_drawn_from_the_softmax():
    logits = torch.randn(6)
    noise = torch.rand(60_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for temperature in (0.5, 1.0, 2.0):
        codes, log_probabilities, _ = draw(logits.expand(60_000, 6), noise, temperature)
        expected = torch.softmax(logits.double() / temperature, 0)
        torch.testing.assert_close(torch.bincount(codes, minlength=6) / 60_000.0, expected.float(), atol=0.01, rtol=0)
        torch.testing.assert_close(log_probabilities, expected.log()[codes], rtol=1e-5, atol=1e-5)
    assert (draw(logits.expand(9, 6), noise[:9], 0.0)[0] == logits.argmax()).all()


def test_impossible_codes_are_never_drawn():
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf]).expand(5, 5)
    noise = torch.tensor([0.0, 0.25, 0.5, 0.75, 1 - 1e-16], dtype=torch.float64)
    assert draw(logits, noise, 1.0)[0].tolist() == [1, 1, 3, 3, 3]
    # The last of many numbers, where sums in two orders differ in their last digits
    logits = torch.randn(2000, 100)
    logits[:, 90:] = -math.inf
    codes, _, _ = draw(logits, torch.full((2000,), 1 - 2**-53, dtype=torch.float64), 1.0)
    assert (codes == 89).all()


@pytest.mark.parametrize("size", [1, 2, 7, 16, 37, 1024, 1500])
def test_codes_are_those_of_the_whole_distribution_function(size):
    logits = 3 * torch.randn(500, size)
    logits[:, ::3] = -math.inf if size > 1 else 0.0
    noise = torch.rand(500, dtype=torch.float64)
    noise[:2] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    expected = torch.searchsorted(cumulative / cumulative[:, -1:], noise[:, None], right=True)[:, 0]
    codes, log_probabilities, _ = draw(logits, noise, 1.0)
    assert torch.isfinite(log_probabilities).all()
    # Single precision moves a boundary between two codes by 1e-7 at most.
    assert (codes != expected).sum() <= 1


def test_entropies_have_the_closed_forms():
    certain = torch.tensor([-math.inf, 5.0, -math.inf, -math.inf])
    logits = torch.stack([torch.zeros(4), certain, torch.tensor([0.0, math.log(3.0), -math.inf, -math.inf])])
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    expected = torch.tensor([math.log(4), 0.0, quarter], dtype=torch.float64)
    torch.testing.assert_close(entropies(logits.softmax(-1)), expected, atol=1e-6, rtol=1e-6)
    assert entropies(logits.softmax(-1))[1] == 0


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_entropies_are_those_at_the_temperature_and_at_1_where_that_is_0(temperature):
    logits = torch.tensor([[[0.0, math.log(3.0), -math.inf]]])
    share = 3 ** (1 / (temperature or 1.0)) / (1 + 3 ** (1 / (temperature or 1.0)))
    masked, noise = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.float64)
    found = draw_masked(logits, masked, noise, temperature, entropy=True)[2]
    assert found.item() == pytest.approx(-(share * math.log(share) + (1 - share) * math.log(1 - share)), abs=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("size", [1000, 8192, 2**19])
def test_draws_in_parts_are_bit_for_bit_those_at_once(temperature, size):
    positions = 2**21 // size
    logits = torch.randn(2, positions, size).round(decimals=1)  # with ties
    masked = torch.rand(2, positions) < 0.8
    masked[0] = True
    noise = torch.rand(2, positions, dtype=torch.float64)
    codes, log_probabilities, probabilities = draw(logits[masked], noise[masked], temperature)
    expected = codes, log_probabilities, entropies(probabilities)
    found = draw_masked(logits, masked, noise, temperature, entropy=True)
    assert all(torch.equal(x[masked], y) and not x[~masked].any() for x, y in zip(found, expected, strict=True))
    assert draw_masked(logits, masked, noise, temperature)[2] is None
    none = draw_masked(logits, torch.zeros_like(masked), noise, temperature)
    assert none[0].shape == masked.shape and not none[0].any() and not none[1].any()


def test_draws_at_all_positions_are_those_at_the_masked_ones():
    class Elsewhere(torch.Tensor):
        device = torch.device("meta")  # in name only

    logits, masked = torch.randn(2, 9, 50), torch.rand(2, 9) < 0.6
    noise = torch.rand(2, 9, dtype=torch.float64)
    for temperature in (0.0, 0.7, 1.0):
        expected = draw_masked(logits, masked, noise, temperature, entropy=True)
        found = draw_masked(logits.as_subclass(Elsewhere), masked, noise, temperature, entropy=True)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.as_subclass(torch.Tensor), theirs)


def test_the_next_reveal_has_the_law_of_one_step_after_another():
    ratios = torch.tensor([0.0, 0.1, 0.4, 0.9, 1.0], dtype=torch.float64)
    count = 200_000
    noise = torch.rand(count, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    masked = torch.tensor([True, False, True]).expand(count, 3)
    left, revealed = next_reveals(masked, noise, ratios, torch.full((count,), 3))
    assert not revealed[:, 1].any() and revealed.any(1).all()
    for k in range(3):
        stay, go = ratios[k] / 0.9, (ratios[k + 1] - ratios[k]) / 0.9
        for first, last, expected in ((1, 1, go * go), (1, 0, go * stay), (0, 1, stay * go)):
            share = ((left == k) & (revealed[:, 0] == first) & (revealed[:, 2] == last)).double().mean()
            assert share.item() == pytest.approx(float(expected), abs=0.006)  # five standard deviations


def test_the_next_reveal_of_extreme_noise_and_of_rows_without_masks():
    ratios = torch.sin(torch.linspace(0, math.pi / 2, 1001, dtype=torch.float64))
    noise = torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64)
    for steps in (1, 2, 500, 1000):
        left, revealed = next_reveals(torch.ones(2, 1, dtype=torch.bool), noise, ratios, torch.full((2,), steps))
        assert left.tolist() == [0, steps - 1] and revealed.all()
    left, revealed = next_reveals(torch.zeros(2, 1, dtype=torch.bool), noise, ratios, torch.tensor([7, 0]))
    assert left.tolist() == [6, 0] and not revealed.any()
    left, revealed = next_reveals(torch.ones(2, 1, dtype=torch.bool), noise, ratios, torch.tensor([0, 0]))
    assert left.tolist() == [0, 0] and revealed.all()


def test_the_set_within_an_entropy_bound_is_the_largest_one():
    generator = torch.Generator().manual_seed(0)
    entropy = torch.rand(30, 6, generator=generator, dtype=torch.float64)
    entropy[5:, ::3] = math.inf
    for bound in (0.0, 0.3, 1.0, 10.0, math.inf):
        chosen = within_entropy_bound(entropy, bound)
        for row, mine in zip(entropy, chosen, strict=True):
            finite = row.isfinite().nonzero()[:, 0].tolist()
            sizes = [
                size
                for size in range(1, len(finite) + 1)
                for one in itertools.combinations(finite, size)
                if row[list(one)].sum() - row[list(one)].max() <= bound
            ]
            assert mine.sum() == max(sizes)
            assert row[mine].max() <= row[~mine].min() if not mine.all() else True
    assert not within_entropy_bound(torch.full((1, 4), math.inf, dtype=torch.float64), 9.0).any()


def test_the_highest_are_as_many_as_asked_and_the_first_of_equal_ones():
    scores = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, -math.inf]])
    assert highest(scores, torch.tensor([3, 2])).tolist() == [[False, True, True, True], [True, True, False, False]]
    assert not highest(scores, torch.tensor([0, 0])).any()


@pytest.mark.parametrize("shape", [(1,), (24,), (4, 4), (8, 8), (16, 16), (5, 7), (1, 9), (2, 3, 4)])
def test_halton_visits_every_cell_once(shape):
    order = halton_order(shape)
    assert order.sort().values.tolist() == list(range(math.prod(shape)))


def test_halton_starts_as_the_sequence_does():
    assert halton_order((8,)).argsort().tolist() == [4, 2, 6, 1, 5, 3, 7, 0]  # 1/2, 1/4, 3/4, 1/8, ...
    visited = [divmod(cell, 9) for cell in halton_order((8, 9)).argsort()[:5].tolist()]
    # (1/2, 1/3), (1/4, 2/3), (3/4, 1/9), (1/8, 4/9), (5/8, 7/9)
    assert visited == [(4, 3), (2, 6), (6, 1), (1, 4), (5, 7)]
    with pytest.raises(ValueError, match=r"shape=\(2, 2, 2, 2\) must have one to 3 axes"):
        halton_order((2, 2, 2, 2))


@pytest.mark.parametrize("size", [8, 16])
def test_the_beginnings_of_a_halton_order_are_spread_more_evenly_than_random_ones(size):
    def unevenness(order, count):  # the variance of the number of visited cells among 4 x 4 blocks
        visited = (order < count).double().view(4, size // 4, 4, size // 4).sum((1, 3))
        return visited.var().item()

    generator = torch.Generator().manual_seed(0)
    others = [torch.randperm(size * size, generator=generator) for _ in range(200)]
    for share in (1 / 8, 1 / 4, 1 / 2):
        count = int(share * size * size)
        mine = unevenness(halton_order((size, size)), count)
        theirs = sorted(unevenness(other, count) for other in others)
        assert mine <= theirs[10] and mine < theirs[100]  # among the best twentieth; half of them are worse


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_codes_are_in_range_whatever_the_logits_are(value):
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 5, 64, 100):
        logits = torch.randn(200, size, generator=generator)
        logits[torch.rand(200, size, generator=generator) < 0.3] = value
        logits[:20] = value
        noise = torch.rand(200, generator=generator, dtype=torch.float64)
        for temperature in (0, 1e-6, 1.0, 1e6):
            codes, _, _ = draw(logits, noise, temperature)
            assert codes.min() >= 0 and codes.max() < size


def test_devices_without_float64_are_refused_by_the_scripts_and_by_pipelines():
    check_device(torch.device("cuda", 1), "")
    with pytest.raises(ValueError, match="'mps' doesn't have: accelerate launch --cpu"):
        check_device(torch.device("mps"), "accelerate launch --cpu")

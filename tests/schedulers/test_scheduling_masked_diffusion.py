import itertools
import math

import pytest
import torch

from diffusers_vqdit import MaskedDiffusionScheduler
from diffusers_vqdit.schedulers.samplers import draw


MASKINGS = ["linear", "cosine"]


class ExactDenoiser:
    """The true conditionals p(x_i | visible codes) of a table over 3 codes with 3 values each."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.table = torch.rand(3, 3, 3, generator=generator, dtype=torch.float64) ** 3
        self.table /= self.table.sum()
        self.logits = torch.empty(4, 4, 4, 3, 3, dtype=torch.float64)
        for pattern in itertools.product(range(4), repeat=3):  # 3 is the mask
            visible = self.table[tuple(slice(None) if x == 3 else slice(x, x + 1) for x in pattern)]
            for position in range(3):
                others = [d for d in range(3) if d != position]
                self.logits[pattern][position] = (visible.sum(others) / visible.sum()).expand(3).log()

    def __call__(self, sample):
        return self.logits[sample.unbind(1)]


@pytest.mark.parametrize("masking", MASKINGS)
def test_the_schedule_starts_clean_and_ends_masked(masking):
    scheduler = MaskedDiffusionScheduler(masking=masking)
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    ratio = scheduler.mask_ratio(t)
    assert ratio[0] == 0 and ratio[-1] == pytest.approx(1)
    assert (ratio.diff() > 0).all()
    torch.testing.assert_close(scheduler.alpha(t), 1 - ratio)
    torch.testing.assert_close(scheduler.time_of_mask_ratio(ratio), t)


@pytest.mark.parametrize("masking", MASKINGS)
def test_the_derivative_and_the_loss_weight_equal_finite_differences(masking):
    scheduler = MaskedDiffusionScheduler(masking=masking)
    t = torch.linspace(0.05, 0.95, 50, dtype=torch.float64)
    slope = (scheduler.alpha(t + 1e-6) - scheduler.alpha(t - 1e-6)) / 2e-6
    torch.testing.assert_close(scheduler.d_alpha(t), slope, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(scheduler.loss_weight(t), -slope / (1 - scheduler.alpha(t)), rtol=1e-6, atol=1e-8)


def test_loss_weights_have_the_closed_forms():
    t = torch.linspace(0.05, 1, 20, dtype=torch.float64)
    torch.testing.assert_close(MaskedDiffusionScheduler(masking="linear").loss_weight(t), 1 / t)
    cosine = MaskedDiffusionScheduler(masking="cosine")
    r = cosine.mask_ratio(t)
    torch.testing.assert_close(cosine.loss_weight(t), math.pi / 2 * (1 - r**2).clamp_min(0).sqrt() / r)


@pytest.mark.parametrize("masking", MASKINGS)
def test_the_share_of_masks_is_the_schedules(masking):
    scheduler = MaskedDiffusionScheduler(masking=masking)
    times = torch.tensor([0.0, 0.2, 0.7, 1.0])
    codes = torch.randint(5, (4, 40_000))
    noised = scheduler.add_noise(codes, times, mask_token_id=5, generator=torch.Generator().manual_seed(0))
    share = (noised == 5).double().mean(1)
    # Five standard deviations of a mean of 40,000 draws are at most 0.0125.
    torch.testing.assert_close(share, scheduler.mask_ratio(times.double()), atol=0.0125, rtol=0)
    assert torch.equal(noised[noised < 5], codes[noised < 5])


@pytest.mark.parametrize("masking", MASKINGS)
def test_the_bound_of_the_exact_denoiser_is_the_log_likelihood(masking):
    # With exact conditionals the NELBO is tight for the any-order average: E_x[NELBO] = entropy of the table.
    scheduler, denoiser = MaskedDiffusionScheduler(masking=masking), ExactDenoiser()
    generator = torch.Generator().manual_seed(0)
    count = 400_000
    flat = torch.multinomial(denoiser.table.flatten(), count, replacement=True, generator=generator)
    x = torch.stack([flat // 9, flat // 3 % 3, flat % 3], 1)
    t = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    noised = scheduler.add_noise(x, t, mask_token_id=3, generator=generator)
    log_p = denoiser(noised).gather(2, x[..., None])[..., 0]
    nelbo = (scheduler.loss_weight(t)[:, None] * -log_p * (noised == 3)).sum(1).mean()
    entropy = -(denoiser.table * denoiser.table.log()).sum()
    assert nelbo.item() == pytest.approx(entropy.item(), rel=0.01)


@pytest.mark.parametrize("masking", MASKINGS)
def test_the_bound_of_each_sample_is_its_log_likelihood(masking):
    # The chain rule holds in any order, so with exact conditionals the integral over t is -log p(x) for every x. All
    # masks are enumerated: what is left is the error of the midpoint rule.
    scheduler, denoiser = MaskedDiffusionScheduler(masking=masking), ExactDenoiser()
    t = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    ratio = scheduler.mask_ratio(t)
    for x in (torch.tensor([0, 1, 2]), torch.tensor([2, 2, 0])):
        bound, wrong = 0.0, 0.0
        for masked in map(torch.tensor, itertools.product([False, True], repeat=3)):
            chance = torch.where(masked, ratio[:, None], 1 - ratio[:, None]).prod(1)
            integral = (scheduler.loss_weight(t) * chance).mean()
            log_p = denoiser(x.masked_fill(masked, 3)[None])[0].gather(1, x[:, None])[:, 0]
            bound += integral * -log_p[masked].sum()
            wrong += integral * masked.sum() * math.log(3)
        assert bound.item() == pytest.approx(-denoiser.table[tuple(x)].log().item(), rel=1e-5)
        assert wrong.item() == pytest.approx(3 * math.log(3), rel=1e-5)  # the uniform denoiser's likelihood


@pytest.mark.parametrize("masking", MASKINGS)
def test_ancestral_sampling_draws_from_the_exact_distribution(masking):
    scheduler, denoiser = MaskedDiffusionScheduler(masking=masking, sampler="ancestral"), ExactDenoiser()
    scheduler.set_timesteps(64)
    generator = torch.Generator().manual_seed(0)
    sample = torch.full((40_000, 3), 3)
    for timestep in scheduler.timesteps:
        sample = scheduler.step(denoiser(sample), timestep, sample, generator=generator).prev_sample
    counts = torch.bincount(sample @ torch.tensor([9, 3, 1]), minlength=27).double() / len(sample)
    # Total variation: sampling noise of 27 cells is about 0.01; two codes revealed at once add some 1/64.
    assert 0.5 * (counts - denoiser.table.flatten()).abs().sum() < 0.025


def test_codes_are_drawn_from_the_softmax():
    logits = torch.randn(6)
    noise = torch.rand(60_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for temperature in (0.5, 1.0, 2.0):
        codes, log_probabilities = draw(logits.expand(60_000, 6), noise, temperature)
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
    codes, _ = draw(logits, torch.full((2000,), 1 - 2**-53, dtype=torch.float64), 1.0)
    assert (codes == 89).all()


@pytest.mark.parametrize("size", [1, 2, 7, 16, 37, 1024, 1500])
def test_codes_are_those_of_the_whole_distribution_function(size):
    logits = 3 * torch.randn(500, size)
    logits[:, ::3] = -math.inf if size > 1 else 0.0
    noise = torch.rand(500, dtype=torch.float64)
    noise[:2] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    expected = torch.searchsorted(cumulative / cumulative[:, -1:], noise[:, None], right=True)[:, 0]
    codes, log_probabilities = draw(logits, noise, 1.0)
    assert torch.isfinite(log_probabilities).all()
    # Single precision moves a boundary between two codes by 1e-7 at most.
    assert (codes != expected).sum() <= 1


@pytest.mark.parametrize("sampler", ["ancestral", "confidence"])
@pytest.mark.parametrize("masking", MASKINGS)
def test_rows_are_on_their_own_and_known_codes_stay(sampler, masking):
    scheduler = MaskedDiffusionScheduler(masking=masking, sampler=sampler)
    scheduler.set_timesteps(7)
    start = torch.randint(9, (3, 20))
    start[0, :] = 8  # all masked
    start[1, ::2] = 8  # half masked
    start[2] = start[2].clamp_max(7)  # nothing to reveal
    logits = torch.randn(7, 3, 20, 8)

    def run(rows):
        sample = start[rows]
        generators = [torch.Generator().manual_seed(row) for row in rows]
        for index, timestep in enumerate(scheduler.timesteps):
            previous = sample
            sample = scheduler.step(logits[index, rows], timestep, sample, generator=generators).prev_sample
            visible = previous < 8
            assert torch.equal(sample[visible], previous[visible])
        return sample

    together = run([0, 1, 2])
    assert (together < 8).all()
    assert torch.equal(together[2], start[2])
    for row in range(3):
        assert torch.equal(run([row])[0], together[row])


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("steps", [8, 16])
def test_confidence_reveals_as_many_as_the_schedule_says(masking, steps):
    scheduler = MaskedDiffusionScheduler(masking=masking, sampler="confidence")
    scheduler.set_timesteps(steps)
    sample = torch.full((3, 64), 4)
    sample[1, 40:] = 0  # 40 are masked
    sample[2, :] = 1
    counts = torch.tensor([64.0, 40.0, 0.0])
    for index, timestep in enumerate(scheduler.timesteps):
        before = (sample == 4).sum(1)
        sample = scheduler.step(torch.randn(3, 64, 4), timestep, sample).prev_sample
        left = (sample == 4).sum(1)
        expected = counts * float(scheduler.mask_ratio(torch.tensor(1 - (index + 1) / steps, dtype=torch.float64)))
        assert ((left < before) | (before == 0)).all()
        assert (left - expected).abs().max() < 2.5  # at least one a step, and each row's count is whole
    assert (left == 0).all()


def test_a_row_with_fewer_masks_than_steps_reveals_one_a_step():
    scheduler = MaskedDiffusionScheduler(sampler="confidence")
    scheduler.set_timesteps(8)
    sample = torch.full((1, 3), 4)
    left = []
    for timestep in scheduler.timesteps:
        sample = scheduler.step(torch.randn(1, 3, 4), timestep, sample).prev_sample
        left.append((sample == 4).sum().item())
    assert left == [2, 1, 0, 0, 0, 0, 0, 0]


def test_ancestral_reveals_a_share_that_keeps_to_the_schedule():
    scheduler = MaskedDiffusionScheduler(masking="cosine", sampler="ancestral")
    scheduler.set_timesteps(5)
    sample = torch.full((1, 40_000), 4)
    generator = torch.Generator().manual_seed(0)
    for index, timestep in enumerate(scheduler.timesteps):
        sample = scheduler.step(torch.zeros(1, 40_000, 4), timestep, sample, generator=generator).prev_sample
        left = (sample == 4).float().mean().item()
        assert left == pytest.approx(math.sin(math.pi / 2 * (1 - (index + 1) / 5)), abs=0.0125)


def test_the_predicted_sample_keeps_what_is_known_and_draws_the_rest():
    scheduler = MaskedDiffusionScheduler()
    scheduler.set_timesteps(4)
    sample = torch.tensor([[4, 1, 4, 2, 4, 4]])
    before = sample.clone()
    previous, original = scheduler.step(torch.randn(1, 6, 4), 1.0, sample, return_dict=False)
    assert torch.equal(sample, before)
    assert (original < 4).all() and torch.equal(original[sample < 4], sample[sample < 4])
    assert torch.equal(previous[previous < 4], original[previous < 4])


def test_confidence_without_noise_reveals_the_likeliest():
    scheduler = MaskedDiffusionScheduler(sampler="confidence", temperature=0.0, choice_temperature=0.0)
    scheduler.set_timesteps(4)
    logits = torch.zeros(1, 10, 3)
    logits[0, :, 1] = torch.arange(10.0)
    sample = scheduler.step(logits, scheduler.timesteps[0], torch.full((1, 10), 3)).prev_sample[0]
    revealed = (sample < 3).nonzero()[:, 0].tolist()
    assert revealed == list(range(10 - len(revealed), 10)) and 0 < len(revealed) < 10


def test_save_and_load(tmp_path):
    scheduler = MaskedDiffusionScheduler(masking="linear", sampler="ancestral", temperature=0.7)
    scheduler.save_pretrained(tmp_path)
    loaded = MaskedDiffusionScheduler.from_pretrained(tmp_path)
    assert (loaded.config.masking, loaded.config.sampler, loaded.config.temperature) == ("linear", "ancestral", 0.7)


@pytest.mark.parametrize("options", [{"masking": "square"}, {"sampler": "best"}, {"temperature": -1.0}])
def test_bad_options_are_named(options):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        MaskedDiffusionScheduler(**options)


def test_bad_input_is_named():
    scheduler = MaskedDiffusionScheduler()
    codes = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="set_timesteps before"):
        scheduler.step(torch.zeros(2, 3, 4), 1.0, codes)
    with pytest.raises(ValueError, match="num_inference_steps=0"):
        scheduler.set_timesteps(0)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=r"\(2, 3, 4\) and \(2, 2\)"):
        scheduler.step(torch.zeros(2, 3, 4), 1.0, codes[:, :2])
    with pytest.raises(ValueError, match="list of 3, but there are 2 rows"):
        scheduler.step(torch.zeros(2, 3, 4), 1.0, codes, generator=[torch.Generator() for _ in range(3)])
    with pytest.raises(ValueError, match="generator=7 must be a torch.Generator"):
        scheduler.step(torch.zeros(2, 3, 4), 1.0, codes, generator=7)
    with pytest.raises(ValueError, match=r"\[0, 4\]"):
        scheduler.step(torch.zeros(2, 3, 4), 1.0, codes + 5)
    for timestep in (0.0, 0.3, 1.25, -0.25, 999.0):
        with pytest.raises(ValueError, match=f"timestep={timestep} must be one of the 4 that"):
            scheduler.step(torch.zeros(2, 3, 4), timestep, codes)
    with pytest.raises(ValueError, match="got torch.int32 and torch.float32"):
        scheduler.step(torch.zeros(2, 3, 4), 1.0, codes.int())
    with pytest.raises(ValueError, match="got torch.int64 and torch.int64"):
        scheduler.step(torch.zeros(2, 3, 4, dtype=torch.int64), 1.0, codes)
    with pytest.raises(ValueError, match="num_inference_steps=2.5"):
        scheduler.set_timesteps(2.5)
    with pytest.raises(ValueError, match=r"tensor of shape \(2,\), got 0.5"):
        scheduler.add_noise(codes, 0.5, mask_token_id=4)
    with pytest.raises(ValueError, match="timesteps must be in"):
        scheduler.add_noise(codes, torch.tensor([0.5, 1.5]), mask_token_id=4)
    with pytest.raises(ValueError, match=r"\[0, 4\)"):
        scheduler.add_noise(codes + 4, torch.tensor([0.5, 0.5]), mask_token_id=4)
    with pytest.raises(ValueError, match="float32"):
        scheduler.add_noise(torch.zeros(2, 3), torch.tensor([0.5, 0.5]), mask_token_id=4)

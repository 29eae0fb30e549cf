import itertools
import math

import numpy as np
import pytest
import torch

from diffusers_vqdit import MaskedDiffusionScheduler
from diffusers_vqdit.schedulers.samplers import halton_order


MASKINGS = ["linear", "cosine"]
SAMPLERS = [
    {"sampler": "ancestral"},
    {"sampler": "ancestral", "remask": 0.3},
    {"sampler": "confidence"},
    {"sampler": "halton"},
    {"sampler": "entropy_bound", "entropy_bound": 0.7},
    {"sampler": "threshold", "threshold": 0.3},
]


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
def test_the_bound_of_the_exact_denoiser_is_the_log_likelihood(masking, denoiser):
    # With exact conditionals the NELBO is tight for the any-order average: E_x[NELBO] = entropy of the table.
    scheduler = MaskedDiffusionScheduler(masking=masking)
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
def test_the_bound_of_each_sample_is_its_log_likelihood(masking, denoiser):
    # The chain rule holds in any order, so with exact conditionals the integral over t is -log p(x) for every x. All
    # masks are enumerated: what is left is the error of the midpoint rule.
    scheduler = MaskedDiffusionScheduler(masking=masking)
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
def test_ancestral_sampling_draws_from_the_exact_distribution(masking, denoiser):
    scheduler = MaskedDiffusionScheduler(masking=masking, sampler="ancestral")
    scheduler.set_timesteps(64)
    generator = torch.Generator().manual_seed(0)
    sample = torch.full((40_000, 3), 3)
    for timestep in scheduler.timesteps:
        sample = scheduler.step(denoiser(sample), timestep, sample, generator=generator).prev_sample
    counts = torch.bincount(sample @ torch.tensor([9, 3, 1]), minlength=27).double() / len(sample)
    # Total variation: sampling noise of 27 cells is about 0.01; two codes revealed at once add some 1/64.
    assert 0.5 * (counts - denoiser.table.flatten()).abs().sum() < 0.025


def sample_codes(scheduler, model, sample, generator=None, **options):
    """Sample as a pipeline does, and count the calls of the model."""
    known, event, calls = sample < model.mask, None, 0
    for timestep in scheduler.timesteps:
        event = scheduler.next_event(timestep, sample == model.mask, event, generator=generator)
        if event.needs_model:
            calls += 1
            sample = scheduler.step(
                model(sample),
                timestep,
                sample,
                revealed=event.revealed,
                known=known,
                generator=generator,
                **options,
            ).prev_sample
    return sample, calls


class TinyModel:
    """Logits (B, 20, 8) that depend on all codes of the row, and on nothing else."""

    mask = 8

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.weight = torch.randn(9, 20, 8, dtype=torch.float64, generator=generator)

    def __call__(self, sample):
        own = self.weight[sample, torch.arange(20)]  # (B, 20, 8)
        return 2 * own + own.roll(1, 1) - own.roll(5, 1)


@pytest.mark.parametrize("options", SAMPLERS)
@pytest.mark.parametrize("masking", MASKINGS)
def test_rows_are_on_their_own_and_known_codes_stay(options, masking):
    scheduler = MaskedDiffusionScheduler(masking=masking, **options)
    scheduler.set_timesteps(7)
    start = torch.randint(9, (4, 20))
    start[0, :] = 8  # all masked
    start[1, ::2] = 8  # half masked
    start[2] = start[2].clamp_max(7)  # nothing to reveal
    start[3] = start[3].clamp_max(7)
    start[3, 5] = 8  # one masked

    def run(rows):
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return sample_codes(scheduler, TinyModel(), start[rows], generators, shape=(4, 5))[0]

    together = run([0, 1, 2, 3])
    assert (together < 8).all()
    known = start < 8
    assert torch.equal(together[known], start[known])
    for row in range(4):
        assert torch.equal(run([row])[0], together[row])
    assert torch.equal(run([3, 0]), together[[3, 0]])


@pytest.mark.parametrize("options", [one for one in SAMPLERS if not one.get("remask")])
def test_visible_codes_never_change(options):
    scheduler = MaskedDiffusionScheduler(**options)
    scheduler.set_timesteps(7)
    sample = torch.full((3, 20), 8)
    for timestep in scheduler.timesteps:
        previous = sample
        sample = scheduler.step(torch.randn(3, 20, 8), timestep, sample).prev_sample
        assert torch.equal(sample[previous < 8], previous[previous < 8])
    assert (sample < 8).all()


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


def law(denoiser, steps, sigma=0.0):
    """The distribution (4, 4, 4) of what n steps make of three masks, linear masking, by enumeration of all paths.

    `sigma` is ReMDM's, capped as there: visible codes are masked with this probability, masked ones revealed with
    (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t).
    """
    states = list(itertools.product(range(4), repeat=3))
    table = {state: 0.0 for state in states}
    table[3, 3, 3] = 1.0
    for left in range(steps, 0, -1):
        alpha_t, alpha_s = 1 - left / steps, 1 - (left - 1) / steps
        capped = min(sigma, (1 - alpha_s) / alpha_t) if alpha_t else sigma
        reveal = (alpha_s - (1 - capped) * alpha_t) / (1 - alpha_t)
        after = {state: 0.0 for state in states}
        for state, mass in table.items():
            if not mass:
                continue
            chances = []  # of each position's next value
            for position, value in enumerate(state):
                if value == 3:
                    p = denoiser.logits[state][position].exp()
                    chances.append([*(reveal * p).tolist(), 1 - reveal])
                else:
                    chances.append([(1 - capped) * (x == value) + capped * (x == 3) for x in range(4)])
            for following in states:
                after[following] += mass * math.prod(c[x] for c, x in zip(chances, following, strict=True))
        table = after
    assert sum(table.values()) == pytest.approx(1)
    return torch.tensor([table[state] for state in itertools.product(range(3), repeat=3)], dtype=torch.float64)


def frequencies(sample):
    return torch.bincount(sample @ torch.tensor([9, 3, 1]), minlength=27).double() / len(sample)


def total_variation(p, q):
    return 0.5 * (p - q).abs().sum().item()


# Total variation of the frequencies of 40,000 samples from 27 cells is about 0.01; 0.02 is far beyond chance.
COUNT, CHANCE = 40_000, 0.02


@pytest.mark.parametrize("steps", [2, 3, 200])
def test_event_driven_sampling_has_the_distribution_of_the_plain_one(denoiser, steps):
    scheduler = MaskedDiffusionScheduler(masking="linear", sampler="ancestral")
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    event_driven, calls = sample_codes(scheduler, denoiser, torch.full((COUNT, 3), 3), generator)
    assert calls == min(steps, 3)
    if steps == 200:
        assert total_variation(frequencies(event_driven), denoiser.table.flatten()) < CHANCE
        return
    plain = torch.full((COUNT, 3), 3)
    for timestep in scheduler.timesteps:
        plain = scheduler.step(denoiser(plain), timestep, plain, generator=generator).prev_sample
    expected = law(denoiser, steps)
    assert total_variation(expected, denoiser.table.flatten()) > 2 * CHANCE  # so few steps are not exact
    assert total_variation(frequencies(plain), expected) < CHANCE
    assert total_variation(frequencies(event_driven), expected) < CHANCE


def test_event_driven_sampling_infills_as_the_plain_one(denoiser):
    scheduler = MaskedDiffusionScheduler(masking="cosine", sampler="ancestral")
    scheduler.set_timesteps(200)
    start = torch.tensor([3, 1, 3]).expand(COUNT, 3)
    sample, calls = sample_codes(scheduler, denoiser, start, torch.Generator().manual_seed(0))
    assert calls == 2 and (sample[:, 1] == 1).all()
    expected = denoiser.table[:, 1] / denoiser.table[:, 1].sum()
    observed = torch.bincount(sample[:, 0] * 3 + sample[:, 2], minlength=9).double() / COUNT
    assert total_variation(observed, expected.flatten()) < CHANCE


@pytest.mark.parametrize("masking", MASKINGS)
def test_event_driven_sampling_needs_a_call_for_each_code_at_most(masking):
    scheduler = MaskedDiffusionScheduler(masking=masking, sampler="ancestral")
    scheduler.set_timesteps(1000)
    start = torch.full((6, 20), 8)
    start[1, :13] = 0
    start[2, :] = 0
    sample, calls = sample_codes(scheduler, TinyModel(), start)
    assert (sample < 8).all() and 15 <= calls <= 20  # 20 codes seldom share a step of 1,000
    assert sample_codes(scheduler, TinyModel(), start[1:2])[1] <= 7
    assert sample_codes(scheduler, TinyModel(), start[2:3])[1] == 0


def test_events_are_on_the_grid_and_each_rows_times_fall():
    scheduler = MaskedDiffusionScheduler(sampler="ancestral")
    scheduler.set_timesteps(40)
    masked, event, last = torch.ones(5, 9, dtype=torch.bool), None, torch.full((5,), 1.1)
    for timestep in scheduler.timesteps:
        event = scheduler.next_event(timestep, masked, event)
        active = masked.any(1)
        assert torch.isin(event.timesteps, scheduler.timesteps).all()
        assert (event.timesteps <= timestep).all() and (event.timesteps < last)[active].all()
        assert torch.equal(event.revealed.any(1), active) and not (event.revealed & ~masked).any()
        assert event.needs_model == bool(active.any())
        masked, last = masked & ~event.revealed, event.timesteps
    assert not masked.any()


def test_codes_masked_anew_between_events_are_still_revealed_by_the_end():
    scheduler = MaskedDiffusionScheduler(sampler="ancestral")
    scheduler.set_timesteps(10)
    sample, event = torch.full((4, 20), 8), None
    for index, timestep in enumerate(scheduler.timesteps):
        event = scheduler.next_event(timestep, sample == 8, event)
        if event.needs_model:
            sample = scheduler.step(TinyModel()(sample), timestep, sample, revealed=event.revealed).prev_sample
        if index == 7:  # as a callback may
            sample[:, :10] = 8
    assert (sample < 8).all()


@pytest.mark.parametrize("remask", [0.3, 1.0])
def test_remasking_has_the_distribution_of_the_papers_formulas(denoiser, remask):
    scheduler = MaskedDiffusionScheduler(masking="linear", sampler="ancestral", remask=remask)
    scheduler.set_timesteps(8)
    start = torch.full((4 * COUNT, 3), 3)
    sample, _ = sample_codes(scheduler, denoiser, start, torch.Generator().manual_seed(0))
    expected = law(denoiser, 8, sigma=remask)
    assert total_variation(expected, law(denoiser, 8)) > 1.25 * CHANCE  # it makes a difference
    assert total_variation(frequencies(sample), expected) < CHANCE / 2  # half as far with four times the samples


@pytest.mark.parametrize("masking", MASKINGS)
def test_remasking_keeps_the_exact_distribution(denoiser, masking):
    scheduler = MaskedDiffusionScheduler(masking=masking, sampler="ancestral", remask=0.02)
    scheduler.set_timesteps(100)
    sample, calls = sample_codes(scheduler, denoiser, torch.full((COUNT, 3), 3), torch.Generator().manual_seed(0))
    # Two codes that are revealed at once are drawn independently: an error of the order of 0.02, on top of chance.
    assert calls == 100 and total_variation(frequencies(sample), denoiser.table.flatten()) < 0.03


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("remask", [0.1, 1.0])
def test_remasking_keeps_the_share_of_masks(masking, remask):
    scheduler = MaskedDiffusionScheduler(masking=masking, sampler="ancestral", remask=remask)
    scheduler.set_timesteps(10)
    sample = torch.full((1, 40_000), 4)
    generator, again = torch.Generator().manual_seed(0), 0
    for index, timestep in enumerate(scheduler.timesteps):
        before = sample
        sample = scheduler.step(torch.zeros(1, 40_000, 4), timestep, sample, generator=generator).prev_sample
        again += int(((before < 4) & (sample == 4)).sum())
        ratio = scheduler.mask_ratio(torch.tensor(1 - (index + 1) / 10, dtype=torch.float64)).item()
        assert (sample == 4).double().mean().item() == pytest.approx(ratio, abs=0.0125)
    assert again > 4000 and (sample < 4).all()


def test_remasking_leaves_known_codes_alone():
    scheduler = MaskedDiffusionScheduler(sampler="ancestral", remask=1.0)
    scheduler.set_timesteps(4)
    sample = torch.randint(4, (1, 1000))
    known = torch.rand(1, 1000) < 0.5
    after = scheduler.step(torch.zeros(1, 1000, 4), 0.75, sample, known=known).prev_sample
    assert torch.equal(after[known], sample[known])
    assert (after[~known] == 4).any() and torch.equal(after[after < 4], sample[after < 4])
    assert (scheduler.step(torch.zeros(1, 1000, 4), 0.25, sample).prev_sample < 4).all()  # never in the last step


@pytest.mark.parametrize(
    "options", [{"sampler": "entropy_bound", "entropy_bound": 0.0}, {"sampler": "halton", "masking": "linear"}]
)
def test_one_code_a_step_in_an_order_of_no_choice_of_values_is_exact(denoiser, options):
    scheduler = MaskedDiffusionScheduler(**options)
    scheduler.set_timesteps(3)
    sample, calls = sample_codes(scheduler, denoiser, torch.full((COUNT, 3), 3), torch.Generator().manual_seed(0))
    assert calls == 3 and total_variation(frequencies(sample), denoiser.table.flatten()) < CHANCE


def test_entropy_bound_zero_reveals_one_code_a_step_and_those_that_are_certain():
    scheduler = MaskedDiffusionScheduler(sampler="entropy_bound", entropy_bound=0.0)
    scheduler.set_timesteps(30)
    sample, left = torch.full((2, 6), 4), []
    logits = torch.randn(2, 6, 4)
    logits[1, 1:4] = torch.tensor([-math.inf, 0.0, -math.inf, -math.inf])
    for timestep in scheduler.timesteps:
        sample = scheduler.step(logits, timestep, sample).prev_sample
        left.append((sample == 4).sum(1).tolist())
    assert [a for a, _ in left[:7]] == [5, 4, 3, 2, 1, 0, 0]
    assert [b for _, b in left[:4]] == [2, 1, 0, 0]  # three are certain: they come with the first
    assert sample[1, 1:4].tolist() == [1, 1, 1]


def test_entropy_bound_takes_fewer_steps_the_looser_it_is_and_ends_in_time():
    calls = []
    for bound in (0.0, 1.0, 3.0, math.inf):
        scheduler = MaskedDiffusionScheduler(sampler="entropy_bound", entropy_bound=bound)
        scheduler.set_timesteps(30)
        sample, count = sample_codes(scheduler, TinyModel(), torch.full((3, 20), 8), torch.Generator().manual_seed(0))
        assert (sample < 8).all()
        calls.append(count)
    assert calls[0] == 20 > calls[1] > calls[2] > calls[3] == 1
    scheduler = MaskedDiffusionScheduler(sampler="entropy_bound", entropy_bound=0.0)
    scheduler.set_timesteps(5)
    sample, count = sample_codes(scheduler, TinyModel(), torch.full((3, 20), 8))
    assert count == 5 and (sample < 8).all()


def test_the_time_of_an_entropy_bounded_row_is_that_of_its_masks():
    scheduler = MaskedDiffusionScheduler(sampler="entropy_bound")
    scheduler.set_timesteps(50)
    masked = torch.arange(8).expand(3, 8) < torch.tensor([[8], [4], [0]])
    event = scheduler.next_event(1.0, masked)
    torch.testing.assert_close(scheduler.mask_ratio(event.timesteps), torch.tensor([1.0, 0.5, 0.0]))
    assert event.revealed is None and event.needs_model
    assert event.num_masked.tolist() == [8, 4, 0]


def reveals_above(threshold, probabilities, steps=4, left=4):
    """Where a step with `left` of `steps` left reveals codes whose likeliest value has these probabilities."""
    scheduler = MaskedDiffusionScheduler(sampler="threshold", threshold=threshold, masking="linear", temperature=0.0)
    scheduler.set_timesteps(steps)
    p = torch.tensor([probabilities])
    logits = torch.stack([p, (1 - p) / 2, (1 - p) / 2], dim=-1).log()
    return (scheduler.step(logits, left / steps, torch.full(p.shape, 3)).prev_sample[0] == 0).tolist()


def test_a_threshold_reveals_what_is_above_it_and_at_least_what_the_schedule_says():
    assert reveals_above(0.7, [0.9, 0.5, 0.8, 0.6]) == [True, False, True, False]
    assert reveals_above(0.95, [0.9, 0.5, 0.8, 0.6]) == [True, False, False, False]  # a quarter of four
    assert reveals_above(0.95, [0.9, 0.5, 0.8, 0.6], left=2) == [True, False, True, False]  # a half
    assert reveals_above(1.0, [1.0, 1.0, 1.0, 1.0]) == [True, False, False, False]  # nothing is above 1
    assert reveals_above(0.0, [0.9, 0.5, 0.8, 0.6]) == [True] * 4
    assert reveals_above(1.0, [0.9, 0.5, 0.8, 0.6], left=1) == [True] * 4


def test_a_threshold_takes_fewer_steps_the_lower_it_is_and_never_more_than_there_are():
    calls = []
    for threshold in (1.0, 0.5, 0.2, 0.0):
        scheduler = MaskedDiffusionScheduler(sampler="threshold", threshold=threshold)
        scheduler.set_timesteps(12)
        sample, count = sample_codes(scheduler, TinyModel(), torch.full((3, 20), 8), torch.Generator().manual_seed(0))
        assert (sample < 8).all()
        calls.append(count)
    assert calls[0] == 12 >= calls[1] > calls[2] > calls[3] == 1


@pytest.mark.parametrize("options", SAMPLERS)
def test_a_step_waits_for_no_device(options):
    """Tensors without values say so: what has to be read, or to be counted for a shape, raises an error."""
    scheduler = MaskedDiffusionScheduler(**options)
    scheduler.set_timesteps(6, device="meta")
    sample = torch.full((2, 12), 8, device="meta")
    logits = torch.randn(2, 12, 8, device="meta")
    assert scheduler.step(logits, 0.5, sample, check_values=False).prev_sample.shape == (2, 12)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        scheduler.step(logits, 0.5, sample)


@pytest.mark.parametrize("options", SAMPLERS)
def test_a_step_that_looks_at_no_values_is_the_same_step(options):
    scheduler = MaskedDiffusionScheduler(**options)
    scheduler.set_timesteps(6)
    sample, logits = torch.full((2, 12), 8), torch.randn(2, 12, 8)
    sample[0, :5] = 3
    one, other = (
        scheduler.step(logits, 0.5, sample, generator=torch.Generator().manual_seed(1), check_values=check)
        for check in (True, False)
    )
    assert torch.equal(one.prev_sample, other.prev_sample)
    assert torch.equal(one.pred_original_sample, other.pred_original_sample)


def test_halton_reveals_in_its_order_as_many_as_the_schedule_says():
    scheduler = MaskedDiffusionScheduler(masking="linear", sampler="halton")
    scheduler.set_timesteps(4)
    sample = torch.full((2, 16), 8)
    sample[1, ::2] = 0
    order = halton_order((4, 4))
    for index, timestep in enumerate(scheduler.timesteps):
        sample = scheduler.step(torch.randn(2, 16, 8), timestep, sample, shape=(4, 4)).prev_sample
        assert torch.equal(sample[0] < 8, order < 4 * (index + 1))
        assert (sample[1] == 8).sum() == 8 - 2 * (index + 1)
    first = scheduler.step(torch.zeros(1, 16, 8), 1.0, torch.full((1, 16), 8)).prev_sample[0]
    assert torch.equal(first < 8, halton_order((16,)) < 4)  # without a shape the codes are in a row


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_guidance_rises_as_masks_fall_and_one_stays_one(schedule):
    scheduler = MaskedDiffusionScheduler(guidance_schedule=schedule)
    ratio = torch.linspace(1, 0, 101, dtype=torch.float64)
    scale = scheduler.guidance_scale_at(ratio, 4.0)
    assert scale[-1] == 4 and scale[0] == (4 if schedule == "constant" else 1)
    assert (scale.diff() >= 0).all()
    assert scale[50].item() == pytest.approx(4 if schedule == "constant" else 2.5)
    assert (scheduler.guidance_scale_at(ratio, 1.0) == 1).all()


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


@pytest.mark.parametrize(
    "options",
    [
        {"masking": "square"},
        {"sampler": "best"},
        {"temperature": -1.0},
        {"entropy_bound": -0.5},
        {"threshold": -0.1},
        {"threshold": 1.1},
        {"remask": 1.5, "sampler": "ancestral"},
        {"remask": 0.1, "sampler": "halton"},
        {"guidance_schedule": "steep"},
    ],
)
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
    for name in ("revealed", "known"):
        with pytest.raises(
            ValueError, match=rf"{name} must be bool of shape \(2, 3\), got torch.bool of shape \(2, 2\)"
        ):
            scheduler.step(torch.zeros(2, 3, 4), 1.0, codes, **{name: codes[:, :2] == 0})
    with pytest.raises(ValueError, match=r"shape=\(2, 2\) must have 3 cells"):
        scheduler.step(torch.zeros(2, 3, 4), 1.0, codes, shape=(2, 2))
    with pytest.raises(ValueError, match="timestep=0.3 must be one of the 4 that"):
        scheduler.next_event(0.3, codes == 0)
    with pytest.raises(ValueError, match=r"masked must be bool \(B, N\), got torch.int64 of shape \(2, 3\)"):
        scheduler.next_event(1.0, codes)
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


@pytest.mark.parametrize("steps", [0, -1, 2.5, "4", None, True, [4], math.nan, 100_001, 10**9, torch.tensor(4)])
def test_bad_numbers_of_steps_are_named(steps):
    with pytest.raises(ValueError, match="num_inference_steps="):
        MaskedDiffusionScheduler().set_timesteps(steps)


def test_numpy_steps_are_taken():
    scheduler = MaskedDiffusionScheduler()
    scheduler.set_timesteps(np.int64(4))
    assert scheduler.timesteps.tolist() == [1.0, 0.75, 0.5, 0.25] and type(scheduler.num_inference_steps) is int


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (-1, 1e-45, 1e-7, 1e7, math.nan, math.inf, "1", True)),
        *(("timestep", value) for value in ("1", None, math.nan, True, torch.ones(2), torch.tensor([]))),
        *((name, value) for name in ("model_output", "sample") for value in (None, [[0]], 3)),
        *((name, value) for name in ("revealed", "known") for value in (True, [[True] * 3] * 2)),
        *(("shape", value) for value in ("3", 3, (1.5, 2), (-1, -3), (True, 3), ())),
        *(("generator", value) for value in (7, "seed", [torch.Generator()] * 3)),
        *(("model_output", torch.zeros(2, 3, 4).index_fill_(2, torch.tensor([1]), v)) for v in (math.nan, math.inf)),
        ("model_output", torch.full((2, 3, 4), -math.inf)),
    ],
)
def test_bad_arguments_of_a_step_are_named(name, value):
    scheduler = MaskedDiffusionScheduler()
    scheduler.set_timesteps(4)
    given = {"model_output": torch.zeros(2, 3, 4), "timestep": 1.0, "sample": torch.full((2, 3), 4), name: value}
    with pytest.raises(ValueError, match=name):
        scheduler.step(given.pop("model_output"), given.pop("timestep"), given.pop("sample"), **given)


def test_only_what_is_drawn_must_be_finite():
    scheduler = MaskedDiffusionScheduler()
    scheduler.set_timesteps(1)
    logits = torch.zeros(1, 2, 4)
    logits[0, 0] = math.nan  # of a visible code
    logits[0, 1, :3] = -math.inf  # forbids codes
    assert scheduler.step(logits, 1.0, torch.tensor([[2, 4]])).prev_sample.tolist() == [[2, 3]]

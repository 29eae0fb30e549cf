"""``num_inference_steps="auto"``: what the sampler is sure enough of, and at least one code, until all are there."""

import math

import pytest
import torch

from diffusers_vqdit import MaskedDiffusionScheduler


K, N = 11, 20
SETTINGS = [
    *({"sampler": "threshold", "threshold": value} for value in (0.0, 0.2, 0.5, 0.9, 1.0)),
    *({"sampler": "entropy_bound", "entropy_bound": value} for value in (0.0, 0.5, 3.0, math.inf)),
]


def model(sample):
    """Logits (B, N, K) that depend on the codes of the row, of all degrees of sureness."""
    own = (sample * torch.arange(1, N + 1)).sum(1) % 97
    grid = torch.arange(N * K).view(N, K)
    wave = torch.sin(own[:, None, None] * 0.37 + grid * 1.7 + (sample * 0.9)[:, :, None])
    return 6 * wave * torch.linspace(0, 1, N)[:, None]


def run(scheduler, sample, seeds, num_codes=N):
    scheduler.set_timesteps("auto", num_codes=num_codes)
    generators, event, states = [torch.Generator().manual_seed(seed) for seed in seeds], None, [sample]
    for timestep in scheduler.timesteps:
        event = scheduler.next_event(timestep, sample == K, event, generator=generators)
        if not event.needs_model:
            break
        sample = scheduler.step(model(sample), timestep, sample, generator=generators).prev_sample
        states.append(sample)
    return states


def start():
    sample = torch.full((4, N), K)
    sample[1, 5:], sample[2], sample[3, ::2] = 3, 4, 1  # all masked, few, none, half
    return sample


@pytest.mark.parametrize("options", SETTINGS)
def test_each_step_reveals_what_is_sure_enough_and_at_least_one_code(options):
    states = run(MaskedDiffusionScheduler(**options), start(), range(4))
    assert not (states[-1] == K).any() and len(states) - 1 <= N
    for before, after in zip(states, states[1:], strict=False):
        probabilities = model(before).double().softmax(-1)
        for row in range(4):
            masked = (before[row] == K).nonzero()[:, 0].tolist()
            revealed = [place for place in masked if after[row, place] != K]
            assert torch.equal(after[row][before[row] != K], before[row][before[row] != K])
            assert len(revealed) >= min(1, len(masked))
            if options["sampler"] == "entropy_bound":
                entropy = {place: torch.special.entr(probabilities[row, place]).sum().item() for place in masked}
                order = sorted(masked, key=entropy.get)
                spent = [sum(entropy[place] for place in order[:count]) for count in range(len(order))]
                expected = [p for p, total in zip(order, spent, strict=True) if total <= options["entropy_bound"]]
                assert sorted(revealed) == sorted(expected)
            else:
                drawn = {place: probabilities[row, place, after[row, place]].item() for place in revealed}
                assert len(revealed) == 1 or all(value > options["threshold"] for value in drawn.values())


@pytest.mark.parametrize("options", SETTINGS)
def test_a_row_is_as_alone_and_as_with_more_times(options):
    scheduler, sample = MaskedDiffusionScheduler(**options), start()
    whole = run(scheduler, sample, range(4))[-1]
    for row in range(4):
        assert torch.equal(run(scheduler, sample[row : row + 1], [row])[-1][0], whole[row])
    assert torch.equal(run(scheduler, sample, range(4), num_codes=7 * N)[-1], whole)


def test_the_setting_is_the_target():
    """From one call for all to one for each code, and never more than a looser setting takes."""
    for name, loose_to_strict in (("threshold", [0.0, 0.3, 0.6, 1.0]), ("entropy_bound", [math.inf, 8.0, 2.0, 0.0])):
        calls = []
        for value in loose_to_strict:
            scheduler = MaskedDiffusionScheduler(sampler=name, temperature=0.5, **{name: value})
            rows = [len(run(scheduler, torch.full((1, N), K), [seed])) - 1 for seed in range(8)]
            calls.append(sum(rows) / len(rows))
        assert calls[0] == 1 and calls[-1] == N and calls == sorted(calls)


def test_no_schedule_asks_for_more():
    """At a threshold of 1 a number of steps reveals what the schedule says; ``"auto"`` one code a step."""
    scheduler = MaskedDiffusionScheduler(sampler="threshold", threshold=1.0)
    states = run(scheduler, torch.full((2, N), K), [0, 1])
    assert [(state == K).sum(1).tolist() for state in states] == [[left] * 2 for left in range(N, -1, -1)]
    scheduler.set_timesteps(4)
    assert not scheduler.until_done and len(scheduler.timesteps) == 4


@pytest.mark.parametrize("sampler", ["ancestral", "confidence", "halton"])
def test_other_samplers_need_a_number(sampler):
    with pytest.raises(ValueError, match=f"num_inference_steps='auto' needs one of .*sampler='{sampler}'"):
        MaskedDiffusionScheduler(sampler=sampler).set_timesteps("auto", num_codes=N)


@pytest.mark.parametrize("num_codes", [None, 0, 2.5, "4"])
def test_auto_needs_the_number_of_codes(num_codes):
    with pytest.raises(ValueError, match="num_codes="):
        MaskedDiffusionScheduler(sampler="threshold").set_timesteps("auto", num_codes=num_codes)


def test_times_of_many_steps_are_known_again():
    scheduler = MaskedDiffusionScheduler()
    scheduler.set_timesteps(100_000)
    assert [scheduler._steps_left(scheduler.timesteps[i]) for i in (0, 1, 34_465, 99_999)] == [
        100_000,
        99_999,
        65_535,
        1,
    ]

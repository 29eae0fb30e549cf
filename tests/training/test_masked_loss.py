"""Draws of a training step of masked diffusion, and its loss."""

import math

import pytest
import torch

from diffusers_vqdit import MaskedDiffusionScheduler, Task
from diffusers_vqdit.schedulers.samplers import SharedGenerator, uniform
from diffusers_vqdit.training.draws import row_generators, step_generator
from diffusers_vqdit.training.masked_loss import (
    block_timesteps,
    draw_task,
    masked_diffusion_loss,
    stratified_timesteps,
)


def test_times_are_uniform_and_one_in_each_interval():
    times = stratified_timesteps(1000, torch.Generator().manual_seed(0))
    assert times.min() > 0 and times.max() <= 1
    assert torch.equal(torch.ceil(times.sort().values * 1000).long(), torch.arange(1, 1001))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_draws_are_those_of_the_global_batch(world_size, transformer):
    def parts(rank):
        size = 8 // world_size
        times = stratified_timesteps(size, step_generator(1, 2), rank=rank, world_size=world_size)
        noise = [torch.rand(3, generator=g) for g in row_generators(1, 2, size, rank=rank)]
        return times, torch.stack(noise)

    times, noise = (torch.cat(part) for part in zip(*map(parts, range(world_size)), strict=True))
    assert torch.equal(times, stratified_timesteps(8, step_generator(1, 2)))
    assert torch.equal(noise, torch.stack([torch.rand(3, generator=g) for g in row_generators(1, 2, 8)]))
    assert len(noise.unique()) == noise.numel()
    for seed, step in ((1, 3), (2, 2), (2, 1)):
        other = torch.stack([torch.rand(3, generator=g) for g in row_generators(seed, step, 8)])
        assert not torch.isin(other, noise).any()
    with pytest.raises(ValueError, match="give timesteps"):
        codes = {"image": torch.randint(32, (8, 4, 4))}
        generators = row_generators(1, 2, 8)
        masked_diffusion_loss(transformer, MaskedDiffusionScheduler(), {}, codes, generator=generators)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_shared_generator_draws_the_rows_of_the_global_batch(world_size):
    size, device = 8 // world_size, torch.device("cpu")

    def drawn(rank, count):
        shared = SharedGenerator(step_generator(1, 2), rank, count)
        return [uniform(torch.Size([8 // count, *rest]), shared, device) for rest in ((), (3,), (4, 4))]

    parts = zip(*(drawn(rank, world_size) for rank in range(world_size)), strict=True)
    for whole, part in zip(drawn(0, 1), parts, strict=True):
        assert torch.equal(torch.cat(part), whole) and all(len(rows) == size for rows in part)
        assert len(whole.unique()) == whole.numel()
    assert not torch.isin(drawn(0, 1)[2], drawn(0, 1)[1]).any()


@pytest.mark.parametrize("weighting", ["flat", "nelbo"])
def test_a_batch_in_two_parts_has_the_loss_of_the_whole(transformer, weighting, monkeypatch):
    """Each process's loss counts by its share of the masked codes, so that their mean is that of the global batch."""
    codes, scheduler = torch.randint(32, (6, 4, 4)), MaskedDiffusionScheduler()
    times = torch.tensor([0.05, 0.1, 0.2, 0.9, 0.95, 1.0])
    counts = []

    def loss(rows):
        with torch.no_grad():
            return masked_diffusion_loss(
                transformer,
                scheduler,
                {},
                {"image": codes[rows]},
                weighting=weighting,
                timesteps=times[rows],
                generator=row_generators(0, 0, 6)[rows],
            )

    whole, halves = loss(slice(0, 6)), (slice(0, 3), slice(3, 6))
    monkeypatch.setattr("diffusers_vqdit.training.masked_loss.mean_over_processes", lambda x: counts.append(x) or x)
    [loss(rows) for rows in halves]
    mean = (counts[0] + counts[1]) / 2
    monkeypatch.setattr("diffusers_vqdit.training.masked_loss.mean_over_processes", lambda x: mean)
    torch.testing.assert_close((loss(halves[0]) + loss(halves[1])) / 2, whole)
    assert weighting == "nelbo" or counts[0] != counts[1]


def test_tasks_are_drawn_by_weight_and_repeatably():
    tasks = [(Task.parse("text->image"), 3.0), (Task.parse("->image"), 1.0)]
    drawn = [draw_task(tasks, step_generator(0, step)) for step in range(4000)]
    share = sum(task == tasks[0][0] for task in drawn) / len(drawn)
    assert share == pytest.approx(0.75, abs=0.035)  # five standard deviations
    assert drawn[7] == draw_task(tasks, step_generator(0, 7))


def test_the_loss_of_a_uniform_model_is_log_k_in_both_weightings(transformer):
    for layer in transformer.heads.values():
        layer.weight.data.zero_()
        layer.bias.data.zero_()
    generated = {"image": torch.randint(32, (256, 4, 4))}
    for masking in ("linear", "cosine"):
        scheduler = MaskedDiffusionScheduler(masking=masking)
        options = {"generator": torch.Generator().manual_seed(0)}
        flat = masked_diffusion_loss(transformer, scheduler, {}, generated, weighting="flat", **options)
        assert flat.item() == pytest.approx(math.log(32), rel=1e-5)
        # E[weight x masked] = 1: the bound of a uniform model is log K nats a code.
        nelbo = [
            masked_diffusion_loss(transformer, scheduler, {}, generated, weighting="nelbo", **options).item()
            for _ in range(10)
        ]
        assert sum(nelbo) / 10 == pytest.approx(math.log(32), rel=0.05)
    with pytest.raises(ValueError, match="weighting='other'"):
        masked_diffusion_loss(transformer, scheduler, {}, generated, weighting="other")


def test_times_of_blocks_are_as_uniform_as_their_rows():
    times = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    found = block_timesteps(times, 4, torch.Generator().manual_seed(1))
    assert ((found > 0) & (found <= 1)).all()
    for block in found.unbind(1):
        assert torch.histc(block, 10, 0, 1).sub(2000).abs().max() < 200
    gaps = found.sort(1).values.diff(dim=1)
    assert torch.allclose(gaps, torch.full_like(gaps, 0.25), atol=1e-5)
    assert torch.allclose(block_timesteps(times[:, None][:5, 0], 1), times[:5, None])

"""Self-distillation through time: against a plain reference that walks each row alone, and its laws."""

import copy
import math

import pytest
import torch

from diffusers_vqdit import MaskedDiffusionScheduler
from diffusers_vqdit.training.distillation_loss import distillation_loss, teacher_probabilities
from diffusers_vqdit.training.draws import row_generators


SIZES, SHAPES = {"image": 32, "text": 64, "label": 3}, {"image": (4, 4), "text": (12,), "label": (1,)}


def codes_of(names, rows=3):
    return {name: torch.randint(SIZES[name], (rows, *SHAPES[name])) for name in names}


@torch.no_grad()
def plain(teacher, scheduler, given, noised, left, generator, *, steps, num_steps, guidance_scale, temperature):
    """One row: the distribution that each masked code is drawn from, a list by segment, code after code."""
    share_of = lambda k: float(scheduler.mask_ratio(torch.tensor(k / steps, dtype=torch.float64)))  # noqa: E731
    noised = {name: codes.clone() for name, codes in noised.items()}
    first = {name: (codes.flatten() == SIZES[name]).nonzero()[:, 0].tolist() for name, codes in noised.items()}
    found = {name: {} for name in noised}
    for k in range(left, left - num_steps, -1):
        time = torch.tensor([k / steps])
        logits = teacher(noised, timestep=time, given=given).sample
        masks = sum((codes == SIZES[name]).sum().item() for name, codes in noised.items())
        share = masks / sum(codes.numel() for codes in noised.values())
        if given and guidance_scale != 1:
            scale = float(scheduler.guidance_scale_at(torch.tensor([share], dtype=torch.float64), guidance_scale))
            free = teacher(noised, timestep=time).sample
            logits = {name: free[name] + scale * (logits[name] - free[name]) for name in logits}
        for name, codes in noised.items():
            flat = codes.flatten()
            noise = torch.rand(len(flat), generator=generator, dtype=torch.float64)
            chance = torch.rand(len(flat), generator=generator, dtype=torch.float64)
            for place in (flat == SIZES[name]).nonzero()[:, 0].tolist():
                scores = logits[name][0, place].double()
                if temperature == 0:
                    p = torch.zeros_like(scores)
                    p[scores.argmax()] = 1
                else:
                    p = (scores / temperature).softmax(0)
                found[name][place] = p
                if chance[place] < 1 - share_of(k - 1) / share_of(k):
                    flat[place] = int((p.cumsum(0) <= noise[place]).sum().clamp_max(SIZES[name] - 1))
            noised[name] = flat.view(codes.shape)
    return {name: [found[name][place] for place in first[name]] for name in noised}


@pytest.mark.parametrize("masking", ["cosine", "linear"])
@pytest.mark.parametrize(
    ("given", "generated", "guidance_scale", "temperature", "schedule"),
    [
        (["text"], ["image"], 3.0, 0.5, "constant"),
        (["text"], ["image"], 3.0, 1.0, "linear"),
        (["label"], ["image"], 1.0, 0.0, "constant"),
        ([], ["image", "text"], 1.0, 1.0, "constant"),
        (["image"], ["text"], 2.0, 0.0, "cosine"),
    ],
)
def test_the_teachers_way_is_that_of_each_row_alone(
    transformer, given, generated, guidance_scale, temperature, schedule, masking
):
    scheduler = MaskedDiffusionScheduler(masking=masking, guidance_schedule=schedule)
    given, codes = codes_of(given), codes_of(generated)
    left = torch.tensor([8, 5, 4])
    for name, value in codes.items():
        share = torch.tensor([1.0, 0.6, 0.1]).view(-1, *[1] * len(SHAPES[name]))
        value[torch.rand(value.shape) < share] = SIZES[name]
    options = {"guidance_scale": guidance_scale, "temperature": temperature, "num_steps": 4}
    found = teacher_probabilities(
        transformer, scheduler, given, codes, left, num_inference_steps=8, generator=row_generators(0, 0, 3), **options
    )
    expected = {name: [] for name in codes}
    for row, generator in enumerate(row_generators(0, 0, 3)):
        alone = [{name: value[row : row + 1] for name, value in part.items()} for part in (given, codes)]
        way = plain(transformer, scheduler, *alone, int(left[row]), generator, steps=8, **options)
        for name, parts in way.items():
            expected[name] += parts
    for name, parts in expected.items():
        torch.testing.assert_close(found[name].double(), torch.stack(parts), atol=2e-6, rtol=1e-4)


def test_the_loss_is_the_mean_divergence_and_trains_the_student_alone(transformer):
    student, scheduler = copy.deepcopy(transformer), MaskedDiffusionScheduler()
    for parameter in student.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    given, codes = codes_of(["text"], 4), codes_of(["image"], 4)
    times, left = torch.tensor([0.1, 0.25, 0.26, 1.0]), torch.tensor([2, 2, 4, 8])  # rounded up to quarters
    loss = distillation_loss(
        *(student, transformer, scheduler, given, codes),
        timesteps=times,
        num_inference_steps=8,
        guidance_scale=2.0,
        generator=row_generators(0, 0, 4),
    )
    generators = row_generators(0, 0, 4)
    noised = scheduler.add_noise(codes["image"].flatten(1), left / 8, mask_token_id=32, generator=generators)
    wanted = teacher_probabilities(
        *(transformer, scheduler, given, {"image": noised.view(4, 4, 4)}, left),
        num_inference_steps=8,
        num_steps=2,
        guidance_scale=2.0,
        generator=generators,
    )["image"].double()
    with torch.no_grad():
        logits = student({"image": noised.view(4, 4, 4)}, given=given).sample["image"][noised == 32].double()
    expected = (wanted * (wanted.log() - logits.log_softmax(-1))).sum(-1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4) and loss > 0.01
    loss.backward()
    assert student.heads["image"].weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in transformer.parameters())


def test_a_student_that_does_as_its_teacher_has_nothing_to_learn(transformer):
    """In one step; in two it has, as the second knows more. At temperature 0 the code that is taken is learnt."""
    scheduler, codes = MaskedDiffusionScheduler(), codes_of(["image"], 8)
    student = copy.deepcopy(transformer)

    def loss(num_steps, temperature):
        return distillation_loss(
            *(student, transformer, scheduler, {}, codes),
            timesteps=torch.linspace(0.125, 1, 8),
            num_inference_steps=8,
            num_steps=num_steps,
            temperature=temperature,
            generator=row_generators(0, 0, 8),
        ).item()

    assert loss(1, 1.0) == pytest.approx(0, abs=1e-6)
    assert loss(2, 1.0) > 1e-4 and math.isfinite(loss(1, 0.0)) and loss(1, 0.0) > 0.1
    for num_steps in (3, 0, 1.5, 16):
        with pytest.raises(ValueError, match="num_steps|num_inference_steps"):
            loss(num_steps, 1.0)


def test_a_batch_in_two_parts_has_the_loss_of_the_whole(transformer, monkeypatch):
    scheduler, student = MaskedDiffusionScheduler(), copy.deepcopy(transformer)
    student.heads["image"].bias.data += torch.randn(32)
    given, codes = codes_of(["label"], 6), codes_of(["image"], 6)
    times, counts = torch.tensor([0.05, 0.1, 0.2, 0.9, 0.95, 1.0]), []

    def loss(rows):
        with torch.no_grad():
            return distillation_loss(
                *(student, transformer, scheduler, {"label": given["label"][rows]}, {"image": codes["image"][rows]}),
                timesteps=times[rows],
                num_inference_steps=8,
                guidance_scale=3.0,
                generator=row_generators(0, 0, 6)[rows],
            )

    whole, halves = loss(slice(0, 6)), (slice(0, 3), slice(3, 6))
    name = "diffusers_vqdit.training.distillation_loss.mean_over_processes"
    monkeypatch.setattr(name, lambda x: counts.append(x) or x)
    [loss(rows) for rows in halves]
    monkeypatch.setattr(name, lambda x: (counts[0] + counts[1]) / 2)
    torch.testing.assert_close((loss(halves[0]) + loss(halves[1])) / 2, whole)
    assert counts[0] != counts[1]

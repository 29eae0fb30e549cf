#!/usr/bin/env python
"""Train the transformer of a pipeline on one GPU, each task's whole step captured as a CUDA graph.

A small transformer's step is some two thousand kernels, which a CPU takes some 60 ms to launch, however small the
batch. Here each task's step (loss, gradients, clipping, AdamW, averages) is captured once and launched as one: on an
H100 128 spoken captions took 22 ms a step, and 512 pictures of 64 px, where the GPU is the slower, 53 ms. The loss is
that of ``train_vqdit.py``. Any pipeline is trained on; to begin from scratch, a first step of that script makes one:

    accelerate launch training/train_vqdit.py --codes_dir outputs/codes --image_vq outputs/image_vq \
        --text_vq outputs/text_vq --tasks "text->image:3,image->text:2,->image:0.5" --max_train_steps 1 \
        --output_dir outputs/start
    python examples/train_with_cuda_graphs.py --pretrained_model_name_or_path outputs/start --codes_dir outputs/codes \
        --tasks "text->image:3,image->text:2,->image:0.5" --minutes 10 --output_dir outputs/transformer

The result is the averaged transformer, for ``VQDiTPipeline.from_pretrained("outputs/start", transformer=...)``. There
are no checkpoints to go on from, no second GPU, and no segments of several shapes (aspect ratios, blocks of texts,
encoders' states): for those there is ``train_vqdit.py``. Without a GPU the same steps run one kernel after the other.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from diffusers_vqdit import MaskedDiffusionScheduler, VQDiTTransformer2DModel
from diffusers_vqdit.tasks import Task, parse_tasks
from diffusers_vqdit.training.codes import CodeDataset
from diffusers_vqdit.training.draws import step_generator
from diffusers_vqdit.training.masked_loss import draw_task, stratified_timesteps
from diffusers_vqdit.training.optimization import parameter_groups, set_dropout
from diffusers_vqdit.utils.arguments import (
    argument_parser,
    model_name,
    output_path,
    positive_integer,
    positive_number,
    random_seed,
    share,
)


WARMUP_STEPS = 500
LOOKS = 50  # steps between two looks at the loss, which wait for the GPU


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Train a pipeline's transformer by captured steps.")
    parser.add_argument("--pretrained_model_name_or_path", type=model_name, required=True, help="To begin with.")
    parser.add_argument("--codes_dir", required=True)
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--minutes", type=positive_number, required=True, help="Of training, the captures among them.")
    parser.add_argument("--train_batch_size", type=positive_integer, default=512)
    parser.add_argument("--learning_rate", type=positive_number, default=1e-3)
    parser.add_argument("--dropout", type=share, default=0.0)
    parser.add_argument("--ema_decay", type=share, default=0.999)
    parser.add_argument("--seed", type=random_seed, default=0)
    parser.add_argument("--output_dir", type=output_path, required=True)
    return parser.parse_args(input_args)


class TrainingStep:
    """One task's step on buffers of one shape: captured where there is a GPU.

    Args:
        update: clips the gradients that there are, and steps.
    """

    def __init__(
        self,
        task: Task,
        transformer: VQDiTTransformer2DModel,
        scheduler: MaskedDiffusionScheduler,
        update: Callable[[], None],
        batch_size: int,
    ) -> None:
        self.task, self.transformer, self.scheduler, self.update = task, transformer, scheduler, update
        device, segments = transformer.device, transformer.config.segments
        self.given, self.generated = (
            {name: torch.zeros(batch_size, *segments[name]["shape"], dtype=torch.long, device=device) for name in side}
            for side in (task.given, task.generated)
        )
        self.timesteps = torch.full((batch_size,), 0.5, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.loss = torch.zeros((), device=device)

    def capture(self, pool: tuple[int, int]) -> None:
        """Capture the step, whose gradients lie in the pool's memory. It isn't run."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # lets libraries allocate what they keep
                self._backward()
                self.transformer.zero_grad()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.loss.copy_(self._backward())  # out of the pool, which all captures share
            self.update()
        self.transformer.zero_grad()

    def _backward(self) -> torch.Tensor:
        """The loss of [`masked_diffusion_loss`], flat, with the logits of all codes: how many are masked is not known
        without waiting."""
        segments = self.transformer.config.segments
        ratio = self.scheduler.mask_ratio(self.timesteps)[:, None]
        hidden = {
            name: torch.rand(codes.flatten(1).shape, device=codes.device) < ratio
            for name, codes in self.generated.items()
        }
        noised = {
            name: codes.masked_fill(hidden[name].view_as(codes), segments[name]["vocab_size"])
            for name, codes in self.generated.items()
        }
        with torch.autocast(self.timesteps.device.type, torch.bfloat16):
            logits = self.transformer(noised, given=self.given or None, check_values=False).sample
        total, count = torch.zeros_like(self.loss), torch.zeros_like(self.loss)
        for name, codes in self.generated.items():
            error = F.cross_entropy(logits[name].float().flatten(0, 1), codes.flatten(), reduction="none")
            total = total + (error * hidden[name].flatten()).sum()
            count = count + hidden[name].sum()
        loss = total / count.clamp_min(1)
        loss.backward()
        return loss.detach()

    def __call__(
        self, given: dict[str, torch.Tensor], generated: dict[str, torch.Tensor], timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Take the step on these codes (B, *shape) and times (B,) of the CPU; returns the loss, not waited for."""
        sources = [*given.values(), *generated.values(), timesteps]
        own = [self.given[name] for name in given] + [self.generated[name] for name in generated]
        for target, source in zip([*own, self.timesteps], sources, strict=True):
            target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)
        if self.graph is None:
            self.loss.copy_(self._backward())
            self.update()
            self.transformer.zero_grad()
        else:
            self.graph.replay()
        return self.loss


def make_update(
    transformer: VQDiTTransformer2DModel, rate: torch.Tensor, ema_decay: float
) -> tuple[Callable[[], None], list[torch.Tensor]]:
    """What clips gradients and steps, without waiting for the device, and the averages that it keeps."""
    parameters = list(transformer.parameters())
    options = {"fused": True, "capturable": True} if rate.is_cuda else {}
    optimizer = torch.optim.AdamW(parameter_groups(transformer, 0.01), lr=rate, betas=(0.9, 0.98), **options)
    for parameter in parameters:  # before any capture, or each replay would begin anew
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=rate.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    averages = [parameter.detach().clone() for parameter in parameters]

    def update() -> None:
        # Parameters of no segment of the task have no gradient, and rest.
        torch.nn.utils.clip_grad_norm_([one for one in parameters if one.grad is not None], 1.0, foreach=True)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - ema_decay)

    return update, averages


def main(args: argparse.Namespace) -> None:
    # 1. Transformer, codes, tasks
    started, device = time.time(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    folder = Path(args.pretrained_model_name_or_path)
    transformer = VQDiTTransformer2DModel.from_pretrained(folder / "transformer").to(device).train()
    set_dropout(transformer, args.dropout)
    scheduler = MaskedDiffusionScheduler.from_pretrained(folder / "scheduler")
    codes, tasks, size = CodeDataset(args.codes_dir), parse_tasks(args.tasks), args.train_batch_size
    if size > len(codes):
        raise ValueError(f"--train_batch_size {size} is more than the {len(codes)} rows of {args.codes_dir}")

    # 2. Steps
    rate = torch.zeros((), device=device)
    update, averages = make_update(transformer, rate, args.ema_decay)
    steps = {str(task): TrainingStep(task, transformer, scheduler, update, size) for task, _ in tasks}
    if device.type == "cuda":
        pool = torch.cuda.graph_pool_handle()
        for step in steps.values():
            step.capture(pool)
        torch.cuda.synchronize()
    captured, limit = time.time(), 60 * args.minutes
    print(f"{len(steps)} tasks after {captured - started:.1f} s", flush=True)

    # 3. Train
    order, losses, done, number = torch.empty(0, dtype=torch.long), {}, 0.0, 0
    while done < 1:
        generator = step_generator(args.seed, number)
        if len(order) < size:
            order = torch.cat([order, torch.randperm(len(codes), generator=generator)])
        rows, order = order[:size], order[size:]
        task = draw_task(tasks, generator)
        timesteps = stratified_timesteps(size, generator)
        given, generated = codes.batch(rows, task, generator=generator)
        rate.fill_(args.learning_rate * min(1.0, (number + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * done)))
        losses[str(task)] = steps[str(task)](given, generated, timesteps)
        number += 1
        if number % LOOKS == 0 or device.type == "cpu":
            seen = {name: value.item() for name, value in losses.items()}
            if not all(map(math.isfinite, seen.values())):
                raise RuntimeError(f"step {number}: the loss is not finite: {seen}. Lower --learning_rate")
            done = (time.time() - captured) / (limit - (captured - started))
            if number % (20 * LOOKS) == 0 or done >= 1:
                told = ", ".join(f"{name} {value:.3f}" for name, value in seen.items())
                print(f"step {number}, {1000 * (time.time() - captured) / number:.1f} ms each: {told}", flush=True)

    # 4. Save the averages
    with torch.no_grad():
        for parameter, average in zip(transformer.parameters(), averages, strict=True):
            parameter.copy_(average)
    transformer.eval().save_pretrained(args.output_dir)
    print(f"saved to {args.output_dir} after {number} steps of {size}, {time.time() - started:.0f} s")


if __name__ == "__main__":
    main(parse_args())

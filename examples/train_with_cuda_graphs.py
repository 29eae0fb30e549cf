#!/usr/bin/env python
"""Train the transformer of a pipeline on one GPU as fast as it goes: compiled blocks, each task's step one CUDA graph.

A small transformer's step is some two thousand kernels, which a CPU takes some 60 ms to launch, however small the
batch. Here each task's step (loss, gradients, clipping, the update, averages) is captured once and launched as one. It
computes on a copy of the weights in bfloat16, with compiled blocks; the blocks' matrices move by Muon (Jordan et al.
2024), all else by AdamW. On an H200 a step of 256 pictures of 64 px took 15 ms (14 M parameters, 2 x 2 codes a
position), one of 128 spoken captions 7 ms; compiled, blocks took three fifths of the time. The loss is that of
``train_vqdit.py``. Any pipeline is trained on; to begin from scratch, a first step of that script makes one:

    accelerate launch training/train_vqdit.py --codes_dir outputs/codes --image_vq outputs/image_vq \
        --text_vq outputs/text_vq --tasks "text->image:3,image->text:2,->image:0.5" --max_train_steps 1 \
        --output_dir outputs/start
    python examples/train_with_cuda_graphs.py --pretrained_model_name_or_path outputs/start --codes_dir outputs/codes \
        --tasks "text->image:3,image->text:2,->image:0.5" --minutes 10 --output_dir outputs/transformer

The result is the averaged transformer, for ``VQDiTPipeline.from_pretrained("outputs/start", transformer=...)``. There
are no checkpoints to go on from, no second GPU, and no segments of several shapes (aspect ratios, blocks of texts,
encoders' states): for those there is ``train_vqdit.py``. Without a GPU the same steps run one kernel after the other,
in single precision.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from diffusers_vqdit import MaskedDiffusionScheduler, VQDiTPipeline, VQDiTTransformer2DModel
from diffusers_vqdit.tasks import Task, check_task, parse_tasks
from diffusers_vqdit.training.codes import CodeDataset
from diffusers_vqdit.training.draws import step_generator
from diffusers_vqdit.training.files import check_output_file
from diffusers_vqdit.training.finetuning import check_same_segments
from diffusers_vqdit.training.masked_loss import draw_task, stratified_timesteps
from diffusers_vqdit.training.muon import block_matrices
from diffusers_vqdit.training.optimization import parameter_groups, set_dropout
from diffusers_vqdit.training.task_codes import match_labels
from diffusers_vqdit.utils.arguments import (
    argument_parser,
    model_name,
    output_path,
    positive_integer,
    positive_number,
    random_seed,
    share,
)
from diffusers_vqdit.utils.told_errors import told_errors


WARMUP_STEPS = 300
CONSTANT = 0.4  # of the time; then the learning rate falls along a cosine
COMPILED = 0.04  # of the steps: a task with fewer isn't worth the time that compiling takes
LOOKS = 50  # steps between two looks at the loss, which wait for the GPU


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Train a pipeline's transformer by captured steps.")
    parser.add_argument("--pretrained_model_name_or_path", type=model_name, required=True, help="To begin with.")
    parser.add_argument("--codes_dir", required=True)
    parser.add_argument(
        "--row_repeats", type=Path, help="File of numpy: how often each row is drawn in an epoch, whole numbers (N,)."
    )
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--minutes", type=positive_number, required=True, help="Of training, the captures among them.")
    parser.add_argument("--train_batch_size", type=positive_integer, default=256)
    parser.add_argument("--learning_rate", type=positive_number, default=2e-3)
    parser.add_argument("--dropout", type=share, default=0.0)
    parser.add_argument("--ema_decay", type=share, default=0.999)
    parser.add_argument("--seed", type=random_seed, default=0)
    parser.add_argument("--output_dir", type=output_path, required=True)
    return parser.parse_args(input_args)


def code_loss(logits: torch.Tensor, codes: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """The sum of the cross-entropies of logits (B, N, K) at hidden codes (B, N)."""
    error = F.cross_entropy(logits.float().flatten(0, 1), codes.flatten(), reduction="none")
    return (error * hidden.flatten()).sum()


class TrainingStep:
    """One task's step on buffers of one shape: captured where there is a GPU.

    Args:
        update: clips the gradients that there are, and steps.
        code_loss: [`code_loss`], or a compiled one.
    """

    def __init__(
        self,
        task: Task,
        transformer: VQDiTTransformer2DModel,
        scheduler: MaskedDiffusionScheduler,
        update: Callable[[], None],
        batch_size: int,
        code_loss: Callable[..., torch.Tensor] = code_loss,
    ) -> None:
        self.task, self.transformer, self.scheduler, self.update = task, transformer, scheduler, update
        self.code_loss = code_loss
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
            for _ in range(3):  # compiles, and lets libraries allocate what they keep
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
        logits = self.transformer(noised, given=self.given or None, check_values=False).sample
        total, count = torch.zeros_like(self.loss), torch.zeros_like(self.loss)
        for name, codes in self.generated.items():
            total = total + self.code_loss(logits[name], codes, hidden[name])
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


class Muon:
    """Muon (Jordan et al. 2024) for captures: a learning rate on the device, all matrices of one shape at once.

    `torch.optim.Muon` takes the rate as a number, which a capture would keep for ever, and one matrix after the other.
    The step's size is AdamW's (Liu et al. 2025, equation 4), so that one learning rate serves both.

    Args:
        matrices: parameters of two axes.
        rate: the learning rate.
    """

    MOMENTUM, WEIGHT_DECAY = 0.95, 0.1

    def __init__(self, matrices: list[torch.nn.Parameter], rate: torch.Tensor) -> None:
        self.rate, shapes = rate, {matrix.shape for matrix in matrices}
        self.groups = [[matrix for matrix in matrices if matrix.shape == shape] for shape in shapes]
        self.momenta = [torch.zeros_like(torch.stack(group), requires_grad=False) for group in self.groups]

    @torch.no_grad()
    def step(self) -> None:
        """A step by the gradients, which all matrices have."""
        for group, momentum in zip(self.groups, self.momenta, strict=True):
            gradient = torch.stack([matrix.grad for matrix in group])
            momentum.lerp_(gradient, 1 - self.MOMENTUM)
            scale = 0.2 * max(gradient.shape[1:]) ** 0.5
            step = orthogonalize(gradient.lerp(momentum, self.MOMENTUM)) * (self.rate * scale)
            torch._foreach_mul_(group, 1 - self.rate * self.WEIGHT_DECAY)
            torch._foreach_sub_(group, list(step.unbind()))


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices (M, n, m) with all singular values near 1, by five steps of Newton and Schulz (Jordan et al. 2024)."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else matrices.dtype)
    x = x if wide else x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x if wide else x.mT).to(matrices.dtype)


def make_update(
    transformer: VQDiTTransformer2DModel, weights: VQDiTTransformer2DModel, rate: torch.Tensor, ema_decay: float
) -> tuple[Callable[[], None], list[torch.Tensor]]:
    """What clips the gradients of `transformer` and steps, without waiting for the device, and the averages that it
    keeps. The step is that of `weights`, in single precision, which are rounded to the transformer's type."""
    working, parameters = list(transformer.parameters()), list(weights.parameters())
    matrices = block_matrices(weights)
    others = parameter_groups(weights, 0.01, without=matrices)
    options = {"fused": True, "capturable": True} if rate.is_cuda else {}
    adamw, muon = torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), **options), Muon(matrices, rate)
    for group in others:
        for parameter in group["params"]:  # before any capture, or each replay would begin anew
            adamw.state[parameter] = {
                "step": torch.zeros((), device=rate.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    averages = [parameter.detach().clone() for parameter in parameters]

    def update() -> None:
        # Parameters of no segment of the task have no gradient, and rest.
        for one, parameter in zip(working, parameters, strict=True):
            parameter.grad = None if one.grad is None else one.grad.float()
        torch.nn.utils.clip_grad_norm_([one for one in parameters if one.grad is not None], 1.0, foreach=True)
        adamw.step()
        muon.step()
        weights.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(working, parameters)
            torch._foreach_lerp_(averages, parameters, 1 - ema_decay)

    return update, averages


def drawn_rows(repeats: Path | None, count: int, batch_size: int) -> torch.Tensor:
    """The rows of an epoch, each as often as the file says, or once.

    Raises:
        ValueError: for a file that can't be read, is of another shape or kind, or of fewer rows than a batch has.
    """
    times = np.ones(count, np.int64)
    if repeats is not None:
        try:
            with open(repeats, "rb") as file:
                times = np.lib.format.read_array(file)
        except (OSError, ValueError) as error:
            raise ValueError(f"--row_repeats {repeats} is no array that numpy.save wrote: {error}") from error
    if times.shape != (count,) or times.dtype.kind not in "iu" or times.min() < 0:
        raise ValueError(
            f"--row_repeats {repeats} has {times.dtype} of shape {times.shape}; it must have a whole number from 0 up "
            f"for each of the {count} rows of --codes_dir"
        )
    if batch_size > times.sum():
        raise ValueError(f"--train_batch_size {batch_size} is more than the {times.sum()} rows of an epoch")
    return torch.from_numpy(np.repeat(np.arange(count), times.astype(np.int64)))


def check_tasks(tasks: list[Task], transformer: VQDiTTransformer2DModel, codes: CodeDataset) -> None:
    """Refuse what can't be captured, or isn't of these codes and this transformer.

    Raises:
        ValueError: for a task that the transformer doesn't know, and segments that aren't in the codes, are others
            there, or have several shapes or states.
    """
    for task in tasks:
        check_task(task, transformer.config.tasks)
    names = {name for task in tasks for name in task.segments}
    if missing := sorted(names - set(codes.segments)):
        raise ValueError(f"--codes_dir {codes.folder} has no segments {missing}, but {sorted(codes.segments)}")
    segments = {name: codes.segments[name] for name in sorted(names)}
    check_same_segments(transformer, segments)
    uncaptured = [name for name, one in segments.items() if "channels" in one or "block_length" in one]
    if uncaptured or codes.buckets is not None:
        raise ValueError(
            f"--codes_dir {codes.folder}: {uncaptured or 'pictures'} are states or of several shapes, which have no "
            "captured steps; use training/train_vqdit.py"
        )


def main(args: argparse.Namespace) -> None:
    # 1. Transformer, codes, tasks
    check_output_file("output_dir", args.output_dir / "config.json")  # before the training, not after it
    started, device = time.time(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    name = args.pretrained_model_name_or_path
    pipeline = VQDiTPipeline.from_pretrained(name)
    scheduler = pipeline.scheduler
    weights = pipeline.transformer.to(device, torch.float32).train()
    set_dropout(weights, args.dropout)
    transformer = copy.deepcopy(weights)
    if device.type == "cuda":
        transformer.to(torch.bfloat16)
        transformer.compile_repeated_blocks(dynamic=True)
    codes, tasks, size = CodeDataset(args.codes_dir), parse_tasks(args.tasks), args.train_batch_size
    known = {"transformer": weights, "segments": pipeline.config.segments, "labels": list(pipeline.config.labels)}
    match_labels(known, codes, {segment for task, _ in tasks for segment in task.segments})
    check_tasks([task for task, _ in tasks], weights, codes)
    rows_of_epoch = drawn_rows(args.row_repeats, len(codes), size)

    # 2. Steps
    rate = torch.zeros((), device=device)
    update, averages = make_update(transformer, weights, rate, args.ema_decay)
    loss = torch.compile(code_loss) if device.type == "cuda" else code_loss
    steps = {str(task): TrainingStep(task, transformer, scheduler, update, size, loss) for task, _ in tasks}
    if device.type == "cuda":
        pool, shares = torch.cuda.graph_pool_handle(), sum(weight for _, weight in tasks)
        torch._dynamo.config.recompile_limit = 64  # of blocks with other segments around them
        for task, weight in tasks:
            with torch.compiler.set_stance("default" if weight >= COMPILED * shares else "force_eager"):
                steps[str(task)].capture(pool)
        torch.cuda.synchronize()
    captured = time.time()
    left = 60 * args.minutes - (captured - started)
    print(f"{len(steps)} tasks after {captured - started:.1f} s", flush=True)
    if left <= 0:
        raise ValueError(f"--minutes {args.minutes:g} were over before the first step: give more")

    # 3. Train
    order, losses, done, number = torch.empty(0, dtype=torch.long), {}, 0.0, 0
    while done < 1:
        generator = step_generator(args.seed, number)
        if len(order) < size:
            order = torch.cat([order, rows_of_epoch[torch.randperm(len(rows_of_epoch), generator=generator)]])
        rows, order = order[:size], order[size:]
        task = draw_task(tasks, generator)
        timesteps = stratified_timesteps(size, generator)
        given, generated = codes.batch(rows, task, generator=generator)
        fall = max(0.0, (done - CONSTANT) / (1 - CONSTANT))
        rate.fill_(args.learning_rate * min(1.0, (number + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * fall)))
        losses[str(task)] = steps[str(task)](given, generated, timesteps)
        number += 1
        if number % LOOKS == 0 or device.type == "cpu":
            seen = {name: value.item() for name, value in losses.items()}
            if not all(map(math.isfinite, seen.values())):
                raise RuntimeError(f"step {number}: the loss is not finite: {seen}. Lower --learning_rate")
            done = (time.time() - captured) / left
            if number % (20 * LOOKS) == 0 or done >= 1:
                told = ", ".join(f"{name} {value:.3f}" for name, value in seen.items())
                print(f"step {number}, {1000 * (time.time() - captured) / number:.1f} ms each: {told}", flush=True)

    # 4. Save the averages
    with torch.no_grad():
        for parameter, average in zip(weights.parameters(), averages, strict=True):
            parameter.copy_(average)
    weights.eval().save_pretrained(args.output_dir)
    print(f"saved to {args.output_dir} after {number} steps of {size}, {time.time() - started:.0f} s")


if __name__ == "__main__":
    with told_errors():
        main(parse_args())

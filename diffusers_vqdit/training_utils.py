"""What the training scripts share: reading a dataset, checkpoints that survive a kill, parameter groups.

The Accelerate loops themselves stand in full in ``training/``.
"""

import argparse
import io
import logging
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from PIL import Image

from .image_utils import resize_image, to_rgb
from .models.quantizers import mean_over_processes
from .tasks import Task
from .utils.checks import shown
from .utils.redaction import known_secrets, without_secrets


logger = logging.getLogger(__name__)

CHECKPOINT_PREFIX = "checkpoint-"


# ---------------------------------------------------------------------------------------------------------------------
# Data


def load_training_dataset(
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    split: str = "train",
    columns: Iterable[str] = (),
    image_column: str | None = None,
    max_samples: int | None = None,
    cache_dir: str | None = None,
):
    """Load a `datasets.Dataset` from a Hub name, a local parquet file, or an image folder with ``metadata.jsonl``.

    Args:
        dataset_name: a Hub dataset, a folder that `datasets` can load, or the path of a ``.parquet`` file.
        dataset_config_name: the dataset's configuration, if it has several.
        train_data_dir: an image folder, with ``metadata.jsonl`` for captions and labels.
        split: the split to take. Where the data comes as one table with a ``split`` column, its rows are selected; a
            source without the split asked for is refused.
        columns: the columns that must be there.
        image_column: the column that holds pictures. It is read undecoded: decode it with [`decode_image`], which
            skips broken files.
        max_samples: keep the first so many rows.
        cache_dir: where `datasets` keeps its cache.

    Raises:
        ValueError: if neither or both sources are given, or if a column or the split is missing; the message lists
            the ones there are.
    """
    from datasets import Image as ImageFeature
    from datasets import load_dataset

    if (dataset_name is None) == (train_data_dir is None):
        raise ValueError(
            f"give either dataset_name or train_data_dir, got dataset_name={dataset_name!r} and "
            f"train_data_dir={train_data_dir!r}"
        )
    if train_data_dir is not None:
        if not Path(train_data_dir).is_dir():
            raise ValueError(f"train_data_dir={train_data_dir!r} is not a folder")
        table = load_dataset("imagefolder", data_dir=train_data_dir, cache_dir=cache_dir)
    elif dataset_name.endswith(".parquet"):
        if not Path(dataset_name).is_file():
            raise ValueError(f"dataset_name={dataset_name!r}: there is no such file")
        table = load_dataset("parquet", data_files=dataset_name, cache_dir=cache_dir)
    else:
        table = load_dataset(dataset_name, dataset_config_name, cache_dir=cache_dir)

    if "split" in next(iter(table.values())).column_names:
        everything = table[next(iter(table))]
        labels = everything["split"]
        rows = [index for index, value in enumerate(labels) if value == split]
        if not rows:
            raise ValueError(f"split={split!r} is not in the data's split column: it has {sorted(set(labels))}")
        dataset = everything.select(rows)
    elif split in table:
        dataset = table[split]
    else:
        raise ValueError(f"split={split!r} is not in the data: it has {sorted(table)}")

    wanted = [*columns, *([image_column] if image_column else [])]
    for column in wanted:
        if column not in dataset.column_names:
            raise ValueError(f"column {column!r} is not in the data: it has {dataset.column_names}")
    if image_column:
        dataset = dataset.cast_column(image_column, ImageFeature(decode=False))
    if max_samples is not None:
        dataset = dataset.select(range(min(max_samples, len(dataset))))
    return dataset


def decode_image(value: dict, resolution: int, resize_mode: str = "crop") -> torch.Tensor:
    """One undecoded picture of a `datasets` image column as a (3, resolution, resolution) float tensor in [-1, 1].

    Args:
        value: ``{"bytes": bytes or None, "path": str or None}``; the path is read where there are no bytes.
        resolution: height and width of the result.
        resize_mode: ``"crop"`` resizes the shorter side and cuts the middle out, ``"pad"`` fits the whole picture on
            white.

    Raises:
        ValueError: if there are neither bytes nor the path of a regular file, or they are no picture that Pillow can
            read as RGB ([`~image_utils.to_rgb`]).
    """
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (None, None)
    if data is None and path is None:
        raise ValueError(f"the picture is missing: it must have bytes or a path, got {shown(value)}")
    # A pipe would block, and Pillow would say of a folder that it may not be read.
    if data is None and not os.path.isfile(path):
        raise ValueError(f"the picture's path {shown(path)} is not a regular file")
    try:
        Image.init()
        # EPS pictures are programs that Ghostscript runs, for as long as they like.
        formats = [name for name in Image.ID if name != "EPS"]
        picture = Image.open(io.BytesIO(data) if data is not None else path, formats=formats)
    except Exception as error:  # besides OSError, a plugin may raise anything on bytes that are no picture
        raise ValueError(f"the picture {shown(path)} can't be read: {error}") from error
    with picture:
        picture = resize_image(to_rgb(picture), (resolution, resolution), resize_mode)
        data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return data.view(resolution, resolution, 3).permute(2, 0, 1).float() / 127.5 - 1.0


def decode_images(dataset, image_column: str, resolution: int) -> tuple[torch.Tensor, list[int]]:
    """Decode every picture of a dataset once, leaving out the broken ones with a warning that names the file.

    Returns:
        a uint8 tensor (N, 3, resolution, resolution) and the row numbers it holds.

    Raises:
        ValueError: if no picture could be read.
    """
    pictures, rows = [], []
    for row, value in enumerate(dataset[image_column]):
        try:
            picture = decode_image(value, resolution)
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises on broken files
            logger.warning(f"skipped picture {value.get('path') or row}: {error}")
            continue
        pictures.append(((picture + 1.0) * 127.5).round().to(torch.uint8))
        rows.append(row)
    skipped = len(dataset) - len(rows)
    if not rows:
        raise ValueError(f"column {image_column!r}: none of the {len(dataset)} pictures could be read")
    if skipped:
        logger.warning(f"skipped {skipped} of {len(dataset)} pictures that could not be read")
    return torch.stack(pictures), rows


def to_pixels(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 pictures as float32 in [-1, 1]."""
    return pictures.float() / 127.5 - 1.0


def check_captions(captions: list[str | None], column: str) -> None:
    """Raise a ValueError that names the first rows whose caption is missing or empty."""
    missing = [row for row, text in enumerate(captions) if not isinstance(text, str) or not text.strip()]
    if missing:
        raise ValueError(f"column {column!r}: {len(missing)} rows have no caption, the first are rows {missing[:5]}")


def shuffled_batches(
    size: int, batch_size: int, *, seed: int, start: int = 0, rank: int = 0, world_size: int = 1
) -> Iterator[torch.Tensor]:
    """Endless index batches of a dataset held in memory: each epoch in an order of its own, drawn from (seed, epoch).

    The batch at a given step is the same in a run that was never stopped and in one resumed at `start`. The batches of
    the ranks are disjoint parts of one global batch. An epoch's remainder is carried into the next epoch, so that
    small datasets work with any batch size.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    global_batch = batch_size * world_size
    orders: dict[int, torch.Tensor] = {}

    def order(epoch: int) -> torch.Tensor:
        if epoch not in orders:
            orders.clear()
            orders[epoch] = torch.randperm(size, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        return orders[epoch]

    step = start
    while True:
        first = step * global_batch + rank * batch_size
        yield torch.tensor([int(order(i // size)[i % size]) for i in range(first, first + batch_size)])
        step += 1


# ---------------------------------------------------------------------------------------------------------------------
# Optimization


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay for matrices only; embeddings, norms and biases have none."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    decayed, plain = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim >= 2 and id(parameter) not in embeddings else plain).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


# ---------------------------------------------------------------------------------------------------------------------
# Trackers


def tracker_config(args: argparse.Namespace) -> dict[str, int | float | str | bool]:
    """The arguments of a run as every tracker takes them: TensorBoard refuses lists, paths and None.

    Without the Hub's token and other secrets, which others would read in the tracker.
    """
    secrets = known_secrets(args.hub_token)
    kept = {name: value for name, value in vars(args).items() if name != "hub_token"}
    return {n: v if isinstance(v, int | float) else without_secrets(str(v), secrets) for n, v in kept.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints in `output_dir`, oldest first."""
    found = [p for p in Path(output_dir).glob(f"{CHECKPOINT_PREFIX}*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(CHECKPOINT_PREFIX))


def save_checkpoint(
    accelerator: Accelerator, output_dir: str | Path, step: int, *, total_limit: int | None = None
) -> Path:
    """Save the Accelerate state as ``checkpoint-{step}`` under a temporary name, rename it, then drop the oldest ones.

    A run killed while it writes leaves the older checkpoints as they were.
    """
    output_dir = Path(output_dir)
    final = output_dir / f"{CHECKPOINT_PREFIX}{step}"
    unfinished = output_dir / f"tmp-{final.name}"
    if accelerator.is_main_process and unfinished.exists():
        shutil.rmtree(unfinished)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if final.exists():
            shutil.rmtree(final)
        unfinished.rename(final)
        if total_limit is not None:
            for old in checkpoints(output_dir)[:-total_limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def find_checkpoint(output_dir: str | Path, resume_from_checkpoint: str | None) -> Path | None:
    """The checkpoint that ``--resume_from_checkpoint`` means: ``latest`` (None when there is none) or a name or path.

    Raises:
        ValueError: if the checkpoint named is not there.
    """
    if resume_from_checkpoint is None:
        return None
    if resume_from_checkpoint == "latest":
        found = checkpoints(output_dir)
        return found[-1] if found else None
    path = Path(output_dir) / Path(resume_from_checkpoint).name
    if not path.is_dir():
        raise ValueError(
            f"resume_from_checkpoint={resume_from_checkpoint!r} is not in {output_dir}: it has "
            f"{[p.name for p in checkpoints(output_dir)]}"
        )
    return path


@contextmanager
def averaged_weights(ema: EMAModel | None, parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Give parameters their moving averages until the end of the ``with`` block; without an EMA nothing changes."""
    if ema is None:
        yield
        return
    parameters = list(parameters)
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def save_pretrained_atomically(model, folder: str | Path, **kwargs) -> None:
    """`model.save_pretrained(folder)` under a temporary name, moved into place file by file when it is complete."""
    folder = Path(folder)
    unfinished = folder.with_name(f"tmp-{folder.name}")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    model.save_pretrained(unfinished, **kwargs)
    for path in sorted(unfinished.rglob("*")):
        if path.is_file():
            target = folder / path.relative_to(unfinished)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    shutil.rmtree(unfinished)


# ---------------------------------------------------------------------------------------------------------------------
# Measures


def psnr(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each picture in dB, for pictures (B, C, H, W) in [-1, 1] (peak 2)."""
    error = (prediction.float().clamp(-1, 1) - target.float()).square().flatten(1).mean(1)
    return 10.0 * torch.log10(4.0 / error.clamp_min(1e-12))


def ssim(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each picture, for pictures (B, C, H, W) in [-1, 1].

    An 11 x 11 Gaussian window with a deviation of 1.5 pixels, K1 = 0.01, K2 = 0.03 (Wang et al. 2004, eq. 13),
    averaged over channels and over the positions where the window fits.
    """
    window_size, deviation, peak = 11, 1.5, 2.0
    if min(prediction.shape[-2:]) < window_size:
        raise ValueError(f"ssim needs pictures of at least {window_size} pixels, got {tuple(prediction.shape)}")
    channels = prediction.shape[1]
    offsets = torch.arange(window_size, device=prediction.device, dtype=torch.float32) - window_size // 2
    line = torch.exp(-offsets.square() / (2 * deviation**2))
    line = line / line.sum()
    window = (line[:, None] * line[None, :]).expand(channels, 1, window_size, window_size)

    def mean(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(x, window, groups=channels)

    x, y = prediction.float().clamp(-1, 1), target.float()
    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    score = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    return score.flatten(1).mean(1)


def code_usage(codes: torch.Tensor, num_codes: int) -> tuple[float, float]:
    """Share of the codebook in use, and perplexity (exp of the entropy in nats), over all `codes`."""
    counts = torch.bincount(codes.flatten(), minlength=num_codes).double()
    probabilities = counts / counts.sum()
    entropy = -(probabilities * probabilities.clamp_min(1e-30).log()).sum()
    return float((counts > 0).double().mean()), math.exp(float(entropy))


# ---------------------------------------------------------------------------------------------------------------------
# Masked diffusion


def step_generator(seed: int, step: int) -> torch.Generator:
    """A CPU generator that depends on (seed, step) alone, so that a resumed run draws as an unbroken one; for what all
    processes draw alike."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))


def row_generators(seed: int, step: int, batch_size: int, *, rank: int = 0) -> list[torch.Generator]:
    """CPU generators of a process's rows, that depend on (seed, step, row of the global batch) alone: what they draw
    is the same however many processes share the batch.

    Args:
        batch_size: rows B of each process; the process `rank` has the rows `rank` B to (`rank` + 1) B - 1.
    """
    states = np.random.SeedSequence((seed, step, 1)).generate_state((rank + 1) * batch_size)[rank * batch_size :]
    return [torch.Generator().manual_seed(int(state)) for state in states]


def draw_task(tasks: list[tuple[Task, float]], generator: torch.Generator) -> Task:
    """One task, drawn by weight."""
    weights = torch.tensor([weight for _, weight in tasks], dtype=torch.float64)
    return tasks[int(torch.multinomial(weights, 1, generator=generator))][0]


def stratified_timesteps(
    batch_size: int, generator: torch.Generator | None = None, *, rank: int = 0, world_size: int = 1
) -> torch.Tensor:
    """Times (B,) in (0, 1], one in each of as many equal intervals as the global batch has rows, in random order:
    uniform, with less variance (Kingma et al. 2021, appendix I.1).

    Args:
        batch_size: rows B of each process.
        generator: the same on all processes, as [`step_generator`] is; on the CPU.
        rank, world_size: the part of the global batch's times to take.
    """
    count = batch_size * world_size
    offset = torch.rand(count, generator=generator)
    times = (torch.randperm(count, generator=generator) + 1.0 - offset) / count
    return times[rank * batch_size : (rank + 1) * batch_size]


def masked_diffusion_loss(
    transformer: torch.nn.Module,
    scheduler,
    given: dict[str, torch.Tensor],
    generated: dict[str, torch.Tensor],
    *,
    weighting: str = "flat",
    timesteps: torch.Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> torch.Tensor:
    """Cross-entropy at the masked codes of one batch of one task.

    Args:
        transformer: a `VQDiTTransformer2DModel` with segments, possibly wrapped.
        scheduler: the `MaskedDiffusionScheduler` that masks.
        given, generated: name -> (B, *shape) int64 codes.
        weighting: ``"nelbo"`` weighs each row by -alpha'(t) / (1 - alpha(t)), so that the mean is the exact bound in
            nats per generated code (Sahoo et al. 2024, eq. 10); ``"flat"`` takes the mean over
            the masked codes (MaskGIT).
        timesteps: times (B,) in (0, 1] on the CPU; by default [`stratified_timesteps`] of this batch.
        generator: draws the masks, and the times where they are not given; one, or one a row, on the CPU.

    Returns:
        the loss, a scalar. With several processes all must call this together, and the mean of their losses, as of
        their gradients, is that of the global batch: each counts by its share of the masked codes.
    """
    if weighting not in ("flat", "nelbo"):
        raise ValueError(f"weighting={weighting!r} must be 'flat' or 'nelbo'")
    device, batch_size = next((codes.device, len(codes)) for codes in generated.values())
    if timesteps is None:
        if isinstance(generator, list):
            raise ValueError("generator is a list of one a row, which can't draw stratified times: give timesteps")
        timesteps = stratified_timesteps(batch_size, generator)
    vocab_sizes = {name: size["vocab_size"] for name, size in unwrap(transformer).config.segments.items()}
    noised, masked = {}, {}
    for name, codes in generated.items():
        corrupted = scheduler.add_noise(
            codes.flatten(1), timesteps, mask_token_id=vocab_sizes[name], generator=generator
        )
        masked[name] = corrupted == vocab_sizes[name]
        noised[name] = corrupted.view_as(codes)
    timesteps = timesteps.to(device)
    logits = transformer(noised, timestep=timesteps, given=given, masked=masked).sample
    weights = scheduler.loss_weight(timesteps)  # (B,)
    total, count = 0.0, 0
    for name, codes in generated.items():
        hidden = masked[name]
        error = F.cross_entropy(logits[name].float(), codes.flatten(1)[hidden], reduction="none")  # (M,)
        if weighting == "nelbo":
            error = error * weights[:, None].expand_as(hidden)[hidden]
            count += hidden.numel()
        else:
            count += error.numel()
        total = total + error.sum()
    # Where nothing is masked at all, the loss is 0.
    return total / mean_over_processes(torch.tensor(float(count), device=device)).clamp_min(1e-6)


def set_dropout(model: ModelMixin, dropout: float) -> None:
    """Give a loaded model another dropout rate, in all its dropout layers and in its config."""
    model.register_to_config(dropout=dropout)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside DistributedDataParallel or torch.compile."""
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model, keep_torch_compile=False)

"""What the training scripts share: reading a dataset, parameter groups, moving averages, measures.

The Accelerate loops themselves stand in full in ``training/``.
"""

import argparse
import io
import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from PIL import Image, ImageOps

from .image_utils import on_white
from .tasks import Task
from .training.checkpoints import find_checkpoint, save_checkpoint  # noqa: F401 (kept for who imports them here)
from .training.files import checkpoint_step, checkpoints, save_pretrained_atomically  # noqa: F401


logger = logging.getLogger(__name__)


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


def decode_image(value: dict, resolution: int) -> torch.Tensor:
    """One undecoded picture of a `datasets` image column as a (3, resolution, resolution) float tensor in [-1, 1].

    Transparent pixels become white; the shorter side is resized to `resolution` and the centre is cropped.

    Raises:
        OSError: if the bytes are no picture that Pillow can read.
    """
    source = io.BytesIO(value["bytes"]) if value.get("bytes") is not None else value["path"]
    with Image.open(source) as picture:
        picture = ImageOps.exif_transpose(picture)
        picture = ImageOps.fit(on_white(picture), (resolution, resolution), Image.Resampling.LANCZOS)
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

    Without the Hub's token, which others would read in the tracker.
    """
    kept = {name: value for name, value in vars(args).items() if name != "hub_token"}
    return {n: v if isinstance(v, int | float | str | bool) else str(v) for n, v in kept.items()}


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


def step_generator(seed: int, step: int, rank: int = 0) -> torch.Generator:
    """A CPU generator that depends on (seed, step, rank) alone, so that a resumed run draws as an unbroken one."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 4_099 + rank)


def draw_task(tasks: list[tuple[Task, float]], generator: torch.Generator) -> Task:
    """One task, drawn by weight."""
    weights = torch.tensor([weight for _, weight in tasks], dtype=torch.float64)
    return tasks[int(torch.multinomial(weights, 1, generator=generator))][0]


def stratified_timesteps(batch_size: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Times (B,) in (0, 1], one in each of B equal intervals in random order: uniform, with less variance (Kingma et
    al. 2021, appendix I.1)."""
    offset = torch.rand(batch_size, generator=generator)
    return (torch.randperm(batch_size, generator=generator) + 1.0 - offset) / batch_size


def masked_diffusion_loss(
    transformer: torch.nn.Module,
    scheduler,
    given: dict[str, torch.Tensor],
    generated: dict[str, torch.Tensor],
    *,
    weighting: str = "flat",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Cross-entropy at the masked codes of one batch of one task.

    Args:
        transformer: a `VQDiTTransformer2DModel` with segments, possibly wrapped.
        scheduler: the `MaskedDiffusionScheduler` that masks.
        given, generated: name -> (B, *shape) int64 codes.
        weighting: ``"nelbo"`` weighs each row by -alpha'(t) / (1 - alpha(t)), so that the mean is the exact bound in
            nats per generated code (Sahoo et al. 2024, eq. 10); ``"flat"`` takes the mean over
            the masked codes (MaskGIT).
        generator: draws times and masks, on the CPU.

    Returns:
        the loss, a scalar.
    """
    if weighting not in ("flat", "nelbo"):
        raise ValueError(f"weighting={weighting!r} must be 'flat' or 'nelbo'")
    batch_size = len(next(iter(generated.values())))
    vocab_sizes = {name: size["vocab_size"] for name, size in unwrap(transformer).config.segments.items()}
    timesteps = stratified_timesteps(batch_size, generator)
    noised, masked = {}, {}
    for name, codes in generated.items():
        flat = codes.flatten(1)
        corrupted = scheduler.add_noise(
            flat.cpu(), timesteps, mask_token_id=vocab_sizes[name], generator=generator
        ).to(codes.device)
        masked[name] = corrupted == vocab_sizes[name]
        noised[name] = corrupted.view_as(codes)
    timesteps = timesteps.to(next(iter(generated.values())).device)
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
    return total / max(count, 1)


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

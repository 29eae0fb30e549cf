"""How every training script begins: Accelerate, optimizer, moving averages, trackers, batches."""

import argparse
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from .arguments import tracker_config
from .audio_data import SoundDataset, SoundStream, load_crops
from .checkpoints import OLDER, read_manifest
from .image_dataset import ImageDataset, load_batches
from .image_stream import ImageStream
from .launch import check_launch
from .muon import MuonAdamW, block_matrices
from .optimization import parameter_groups
from .publish import create_repository
from .row_order import bucket_batches, shuffled_batches
from .run import TrainingRun, training_run
from .sharding import prepare_sharding


logger = get_logger(__name__)

# Of runs that don't say theirs; shorter ones have less.
MAX_WARMUP_STEPS = 200
MAX_EMA_DECAY = 0.999


def make_accelerator(args: argparse.Namespace, *, find_unused_parameters: bool = False) -> Accelerator:
    """Set up Accelerate, the log on the terminal and the seed of all generators, as the script's arguments say.

    Args:
        find_unused_parameters: for models of which a step may train a part only.
    """
    check_launch()
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(
            project_dir=str(args.output_dir), logging_dir=str(args.output_dir / args.logging_dir)
        ),
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters),
            # The others wait while one process encodes the data, draws or uploads; ten minutes are the default.
            InitProcessGroupKwargs(timeout=timedelta(days=1)),
        ],
        step_scheduler_with_optimizer=False,
    )
    if accelerator.gradient_accumulation_steps != args.gradient_accumulation_steps:
        raise ValueError(
            f"gradient_accumulation_steps={args.gradient_accumulation_steps}, but the launcher's config says "
            f"{accelerator.gradient_accumulation_steps}, which wins: give the same, or leave it out of the config"
        )
    # Of other libraries only what may be wrong: they tell of each file of a checkpoint, and of each download.
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    for name in ("diffusers_vqdit", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO)
    set_seed(args.seed)
    if getattr(args, "allow_tf32", False):
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


@contextmanager
def open_run(
    args: argparse.Namespace,
    accelerator: Accelerator,
    *,
    project: str,
    folders: Sequence[str],
    files: Sequence[str],
) -> Iterator[TrainingRun]:
    """The run in ``args.output_dir``, for a ``with`` block, see [`training_run`]; with what every run writes, and the
    repository that it is published in.

    Args:
        project: as in [`start_trackers`].
    """
    logs = [f"{args.logging_dir}/{project}"] if accelerator.log_with else []
    with training_run(
        accelerator,
        args.output_dir,
        folders=[*folders, *logs, OLDER],
        files=files,
        max_skipped_steps=args.max_skipped_steps,
    ) as run:
        if accelerator.is_main_process:
            create_repository(args)
        yield run


def set_default(args: argparse.Namespace, name: str, checkpoint: Path | None, default: float) -> None:
    """Where a flag isn't given, set it: to what the run that goes on had, or to a default that the script found."""
    if getattr(args, name) is None:
        kept = {} if checkpoint is None else read_manifest(checkpoint).settings
        found = kept.get(name)  # None of what such a run had no use for
        setattr(args, name, default if found is None else found)
        logger.info(f"{name}={getattr(args, name):.3g}")


def make_optimizer(args: argparse.Namespace, model: torch.nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW over a model's trained parameters, with weight decay where it belongs (see [`parameter_groups`]); with
    ``--optimizer muon`` of the scripts that have it, Muon over the matrices of its blocks."""
    muon = getattr(args, "optimizer", "adamw") == "muon"
    matrices = block_matrices(model) if muon else []
    adamw = torch.optim.AdamW(
        parameter_groups(model, args.adam_weight_decay, without=matrices),
        lr=learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=True,
    )
    return MuonAdamW(matrices, adamw, lr=learning_rate, weight_decay=args.adam_weight_decay) if muon else adamw


def prepare(
    args: argparse.Namespace,
    accelerator: Accelerator,
    model: torch.nn.Module,
    num_samples: int,
    *,
    checkpoint: Path | None = None,
    scale_lr: bool = False,
) -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, int]:
    """The model as Accelerate wraps it, its optimizer, the learning rate schedule, and how many steps there will be.

    ``--lr_warmup_steps`` and ``--ema_decay`` that aren't given become what suits so many steps.

    Args:
        num_samples: of the training data, from which epochs become steps; 0 of a stream.
        checkpoint: of the run that goes on.
        scale_lr: multiply the learning rate by the processes and the accumulated batches.
    """
    batches = accelerator.num_processes * args.gradient_accumulation_steps
    optimizer = make_optimizer(args, model, args.learning_rate * batches if scale_lr else args.learning_rate)
    global_batch = args.train_batch_size * batches
    max_steps = args.max_train_steps or math.ceil(num_samples / global_batch) * args.num_train_epochs
    set_default(args, "lr_warmup_steps", checkpoint, min(MAX_WARMUP_STEPS, math.ceil(max_steps / 20)))
    if args.lr_warmup_steps >= max_steps > 1 and args.lr_scheduler != "constant" and accelerator.is_main_process:
        logger.warning(
            f"lr_warmup_steps={args.lr_warmup_steps} are all of the run's {max_steps} steps: its learning rate only "
            f"rises, to {max_steps / args.lr_warmup_steps:.2g} times learning_rate. Give fewer, or more steps"
        )
    # Over a fifth of the steps
    set_default(args, "ema_decay", checkpoint, min(MAX_EMA_DECAY, max(0.0, 1 - 5 / max_steps)))
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=max_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    samples = num_samples or "streamed"
    logger.info(f"{samples} samples, {parameters / 1e6:.1f} M trained parameters, {max_steps} steps of {global_batch}")
    prepare_sharding(args, accelerator, model)
    return *accelerator.prepare(model, optimizer, lr_scheduler), max_steps


def make_ema(
    args: argparse.Namespace, parameters: Iterable[torch.nn.Parameter], device: torch.device
) -> EMAModel | None:
    """The parameters' moving averages, where ``--use_ema`` asks for them: in float32, as in half precision, which
    DeepSpeed keeps them in, a step's part of an average is rounded away."""
    if not args.use_ema:
        return None
    parameters = [parameter.detach().float() for parameter in parameters]
    sharded = any(isinstance(parameter, DTensor) for parameter in parameters)
    ema = EMAModel(parameters, decay=args.ema_decay, foreach=not sharded)  # PyTorch copies no lists of shards
    ema.to(device)
    return ema


def start_trackers(args: argparse.Namespace, accelerator: Accelerator, project: str) -> None:
    """Tell the trackers of ``--report_to`` what the run is."""
    if accelerator.is_main_process and accelerator.log_with:
        accelerator.init_trackers(project, config=tracker_config(args))


def run_batches(
    args: argparse.Namespace,
    accelerator: Accelerator,
    num_samples: int,
    step: int,
    buckets: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:
    """This process's batches of rows, from those of optimizer step `step` on: see [`shuffled_batches`], and
    [`bucket_batches`] where the rows are in `buckets` (N,)."""
    options = {
        "seed": args.seed,
        "start": step * args.gradient_accumulation_steps,
        "rank": accelerator.process_index,
        "world_size": accelerator.num_processes,
    }
    if buckets is None:
        return shuffled_batches(num_samples, args.train_batch_size, **options)
    return bucket_batches(buckets, args.train_batch_size, **options)


def image_batches(
    args: argparse.Namespace, accelerator: Accelerator, images: ImageDataset | ImageStream, step: int
) -> Iterator[torch.Tensor]:
    """This process's batches of pictures (B, 3, H, W) uint8, from those of optimizer step `step` on; a stream's from
    its own state on."""
    if isinstance(images, ImageStream):
        return images.batches(args.train_batch_size, args.dataloader_num_workers)
    stride = args.train_batch_size * accelerator.num_processes
    first = step * args.gradient_accumulation_steps * stride + accelerator.process_index * args.train_batch_size
    batches = run_batches(args, accelerator, len(images), step)
    return load_batches(images, batches, first=first, stride=stride, num_workers=args.dataloader_num_workers)


def sound_batches(
    args: argparse.Namespace, accelerator: Accelerator, sounds: SoundDataset | SoundStream, length: int, step: int
) -> Iterator[torch.Tensor]:
    """This process's batches of parts of sounds (B, length), from those of optimizer step `step` on; a stream's from
    its own state on."""
    if isinstance(sounds, SoundStream):
        return sounds.batches(args.train_batch_size, args.dataloader_num_workers)
    return load_crops(
        sounds,
        run_batches(args, accelerator, len(sounds), step),
        length,
        seed=args.seed,
        step=step * args.gradient_accumulation_steps,
        rank=accelerator.process_index,
        num_workers=args.dataloader_num_workers,
    )


def progress_bar(accelerator: Accelerator, max_steps: int, step: int) -> tqdm:
    """The bar of a run's optimizer steps, which one process of a machine shows."""
    return tqdm(total=max_steps, initial=step, desc="Steps", disable=not accelerator.is_local_main_process)

#!/usr/bin/env python
"""Distil a VQDiT pipeline to few steps: self-distillation through time (Deschenaux & Gulcehre 2024).

    accelerate launch training/distill_vqdit.py --pretrained_model_name_or_path model_cards/vqdit-emoji-32 \
        --codes_dir outputs/codes --tasks text->image --num_teacher_steps 16 --num_student_steps 2 \
        --use_ema --output_dir outputs/few

The student begins as the teacher, and learns to predict in one step what the teacher predicts on its way of two. In
the next round it is the teacher, whose steps are twice as long: 16 to 2 steps are three rounds, of equal lengths. What
the teacher does by default, guidance and temperature, is distilled in, so that a step of the student is one pass
without guidance. The output folder is a complete pipeline of the distilled tasks:

    pipe("a red apple", num_inference_steps=2)

The 32 px starter's figures stand in docs/performance.md.
"""

import argparse
import copy
import math

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers.training_utils import EMAModel

from diffusers_vqdit import MaskedDiffusionScheduler, VQDiTPipeline, VQDiTTransformer2DModel
from diffusers_vqdit.schedulers.samplers import check_device
from diffusers_vqdit.tasks import Task, check_task, parse_tasks
from diffusers_vqdit.training import setup
from diffusers_vqdit.training.arguments import (
    add_keeping_arguments,
    add_training_arguments,
    add_transformer_arguments,
    add_validation_prompts_argument,
)
from diffusers_vqdit.training.checkpoints import find_checkpoint, plain_config, save_checkpoint
from diffusers_vqdit.training.codes import CodeDataset
from diffusers_vqdit.training.distillation_loss import distillation_loss
from diffusers_vqdit.training.finetuning import check_same_segments
from diffusers_vqdit.training.masked_loss import draw_batch, track_loss
from diffusers_vqdit.training.model_card import Measure
from diffusers_vqdit.training.optimization import set_dropout
from diffusers_vqdit.training.publish import publish_pipeline, publishes_checkpoints
from diffusers_vqdit.training.run import TrainingRun, check_drawable, due
from diffusers_vqdit.training.sharding import evaluated, whole_state
from diffusers_vqdit.training.task_codes import add_codes_arguments, check_source, load_codes
from diffusers_vqdit.training.throughput import Throughput, shown_rate
from diffusers_vqdit.training.unused_arguments import refuse_unused_arguments
from diffusers_vqdit.training.utilisation import Utilisation
from diffusers_vqdit.training.validation import draw_validation
from diffusers_vqdit.training.watch import TrainingWatch
from diffusers_vqdit.utils.arguments import argument_parser, model_name, non_negative_number, positive_integer
from diffusers_vqdit.utils.fingerprints import model_fingerprint
from diffusers_vqdit.utils.told_errors import told_errors


logger = get_logger(__name__)

PROJECT = "vqdit-distillation"  # of the trackers


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Distil a VQ diffusion transformer to few steps.")

    models = parser.add_argument_group("models")
    models.add_argument(
        "--pretrained_model_name_or_path",
        type=model_name,
        required=True,
        help="The teacher, a pipeline: a folder or a Hub id.",
    )
    models.add_argument("--revision", help="Revision of the pretrained pipeline.")
    models.add_argument("--variant", help="Variant of the pretrained pipeline's files, such as fp16.")
    models.add_argument("--num_teacher_steps", type=positive_integer, default=16)
    models.add_argument(
        "--num_student_steps",
        type=positive_integer,
        default=2,
        help="The teacher's are so many times a power of two, one round for each.",
    )
    models.add_argument(
        "--guidance_scale",
        type=non_negative_number,
        help="The teacher's, which the student needs none of then; by default as the pipeline does. 1 distils none, "
        "for a student that is guided as the teacher is.",
    )

    data = add_codes_arguments(parser)
    data.add_argument("--tasks", default="text->image", help="Tasks of the teacher, and their weights.")

    training = add_training_arguments(
        parser,
        output_dir="outputs/vqdit-distilled",
        train_batch_size=64,
        num_train_epochs=30,
        learning_rate=1e-4,
        lr_scheduler="constant_with_warmup",
        lr_warmup_steps=100,
        adam_beta2=0.98,
        adam_weight_decay=0.0,
        ema_decay=0.99,
    )
    add_transformer_arguments(training)

    keeping = add_keeping_arguments(parser)
    add_validation_prompts_argument(keeping)

    args = parser.parse_args(input_args)
    check_source(parser, args)
    ratio = args.num_teacher_steps / args.num_student_steps
    if ratio < 2 or not math.log2(ratio).is_integer():
        parser.error(
            f"num_teacher_steps={args.num_teacher_steps} must be 2, 4, 8, ... times "
            f"num_student_steps={args.num_student_steps}"
        )
    refuse_unused_arguments(parser, args)
    return args


def how_drawn(
    args: argparse.Namespace, pipeline: VQDiTPipeline, tasks: list[tuple[Task, float]]
) -> dict[Task, tuple[float, float]]:
    """The teacher's guidance scale and temperature, by task.

    Raises:
        ValueError: for a task that the teacher doesn't know, that makes texts by blocks, or that is guided by another
            one of them.
    """
    found = {}
    for task, _ in tasks:
        check_task(task, pipeline.transformer.config.tasks or [])
        if any("block_length" in pipeline.transformer.config.segments[name] for name in task.generated):
            raise ValueError(f"tasks={args.tasks!r}: {str(task)!r} makes texts by blocks, which can't be distilled")
        guidance_scale, _, temperature = pipeline.default_settings(task, args.guidance_scale if task.given else 1.0)
        free = Task((), task.generated)
        if guidance_scale != 1.0 and free in [other for other, _ in tasks]:
            raise ValueError(
                f"tasks={args.tasks!r}: {str(task)!r} has its guidance of {guidance_scale:g} distilled in, but with "
                f"{str(free)!r} the pipeline would guide it again: distil {str(free)!r} in a run of its own, or both "
                "with --guidance_scale 1"
            )
        scheduled = pipeline.scheduler.config.temperature
        found[task] = guidance_scale, scheduled if temperature is None else temperature
    return found


def build_student(
    args: argparse.Namespace, pretrained: VQDiTTransformer2DModel, tasks: list[tuple[Task, float]]
) -> tuple[VQDiTTransformer2DModel, VQDiTTransformer2DModel]:
    """The student, and the frozen teacher, which is the same yet."""
    student = pretrained.float().train()
    set_dropout(student, 0.0)  # the teacher's answers to what it draws are enough
    student.register_to_config(tasks=[str(task) for task, _ in tasks])
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    if args.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # each task has its own lengths
        student.compile_repeated_blocks()
        teacher.compile_repeated_blocks()
    return student, teacher


def begin_round(
    student: torch.nn.Module, teacher: torch.nn.Module, ema: EMAModel | None, trained: list[torch.nn.Parameter]
) -> None:
    """Make the student the next teacher, by its averaged weights where there are any; it goes on from these too."""
    if ema is not None:
        ema.copy_to(trained)
    teacher.load_state_dict(whole_state(student))


def loss_measures(task_losses: dict[str, float]) -> list[Measure]:
    """The losses of the tasks in the last round, for the model card."""
    metric = "divergence from the teacher of the last round"
    return [Measure(task, metric, loss, "training data", "nats per code") for task, loss in task_losses.items()]


def main(args: argparse.Namespace) -> None:
    folders = ["samples", "codes", "transformer", "scheduler", *VQDiTPipeline._optional_components]
    files = ["README.md", "model_index.json", "pipeline.py"]
    # A step trains the embeddings and heads of its task's segments only.
    accelerator = setup.make_accelerator(args, find_unused_parameters=True)
    check_device(accelerator.device, "accelerate launch --cpu")
    with setup.open_run(args, accelerator, project=PROJECT, folders=folders, files=files) as run:
        train(args, accelerator, run)


def run_identity(
    args: argparse.Namespace, parts: dict, codes: CodeDataset, tasks: dict[Task, tuple[float, float]]
) -> dict:
    """What must be as it was where a run is resumed."""
    return {
        "script": "distill_vqdit",
        **{name: getattr(args, name) for name in ("num_teacher_steps", "num_student_steps", "tasks", "use_ema")},
        "guidance scale, temperature": {str(task): list(how) for task, how in tasks.items()},
        "teacher": model_fingerprint(parts["transformer"]),
        "scheduler": plain_config(parts["scheduler"]),
        **codes.identity(),
    }


def num_rounds(args: argparse.Namespace, max_steps: float) -> int:
    """How often the teacher's steps are halved.

    Raises:
        ValueError: if there are more rounds than steps.
    """
    rounds = int(math.log2(args.num_teacher_steps // args.num_student_steps))
    if max_steps < rounds:
        raise ValueError(
            f"max_train_steps={max_steps} must be at least {rounds}: each round that halves the teacher's "
            f"{args.num_teacher_steps} steps, down to {args.num_student_steps}, takes one"
        )
    return rounds


def train(args: argparse.Namespace, accelerator: Accelerator, run: TrainingRun) -> None:
    # 1. Teacher, tasks, codes
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    num_rounds(args, args.max_train_steps or math.inf)  # too few are told before the work
    pipeline = VQDiTPipeline.from_pretrained(
        args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant, cache_dir=args.cache_dir
    )
    tasks = parse_tasks(args.tasks)
    drawn = how_drawn(args, pipeline, tasks)
    reading = {name: pipeline.config[name] for name in ("lowres_factor", "resize_mode", "segments")}
    parts = {**pipeline.components, "labels": list(pipeline.config.labels), **reading}
    codes = load_codes(args, parts, {name for task in drawn for name in task.segments}, accelerator)
    check_same_segments(parts["transformer"], {n: codes.segments[n] for task in drawn for n in task.segments})
    identity, labels = run_identity(args, parts, codes, drawn), parts.pop("labels")

    # 2. Student, optimizer, learning rate
    student, teacher = build_student(args, parts["transformer"], tasks)
    teacher.to(accelerator.device)
    scheduler = parts["scheduler"]
    # What is drawn at the teacher's temperature is learnt; the student draws from that as it is.
    parts["scheduler"] = MaskedDiffusionScheduler.from_config(scheduler.config, temperature=1.0)
    student, optimizer, lr_scheduler, max_steps = setup.prepare(
        args, accelerator, student, len(codes), scale_lr=args.scale_lr
    )
    rounds = num_rounds(args, max_steps)
    trained = list(student.parameters())
    ema = setup.make_ema(args, trained, accelerator.device)

    def build_pipeline(whole: VQDiTTransformer2DModel) -> VQDiTPipeline:
        made = VQDiTPipeline(**{**parts, "transformer": whole, "id2label": dict(enumerate(labels))})
        return made.to(accelerator.device)  # the tokenizers too, which encoded nothing where codes were given

    with evaluated(accelerator, student) as whole:
        if whole is not None:
            check_drawable(build_pipeline(whole), "prompt", "validation_prompts", args.validation_prompts)

    # 3. Resume
    measures = run.begin(checkpoint, identity=identity, args=args, states={"ema": ema, "teacher": teacher})
    setup.start_trackers(args, accelerator, PROJECT)

    # 4. Train, round by round
    step, micro_step = run.step, run.step * args.gradient_accumulation_steps
    batches = setup.run_batches(args, accelerator, len(codes), step, codes.buckets)
    progress = setup.progress_bar(accelerator, max_steps, step)
    this_round = measures.get("round", 0)
    task_losses: dict[str, float] = measures.get("task_losses", {})
    throughput, stop = Throughput(), False
    utilisation = Utilisation(args, accelerator)
    watch = TrainingWatch(accelerator, args)
    while step < max_steps and not stop:
        if step * rounds // max_steps > this_round:
            this_round += 1
            begin_round(student, teacher, ema, trained)
            task_losses = {}
        rows = next(batches)
        batch = draw_batch(codes, tasks, rows, accelerator, seed=args.seed, step=micro_step)
        guidance_scale, temperature = drawn[batch.task]
        if this_round:  # distilled in
            guidance_scale, temperature = 1.0, float(temperature > 0)
        with accelerator.accumulate(student), utilisation.counting():
            with accelerator.autocast():  # for the teacher, which isn't prepared
                loss = distillation_loss(
                    student,
                    teacher,
                    scheduler,
                    batch.given,
                    batch.generated,
                    timesteps=batch.timesteps,
                    generator=batch.generator,
                    num_inference_steps=args.num_teacher_steps >> this_round,
                    guidance_scale=guidance_scale,
                    temperature=temperature,
                )
            norm = run.descend(optimizer, trained, loss, args.max_grad_norm, lr_scheduler, ema)
        micro_step += 1
        throughput.add(len(rows) * accelerator.num_processes)
        average = track_loss(accelerator, task_losses, batch.task, loss)
        if norm is None:
            continue

        step += 1
        run.end_step(step)
        logs = {
            "lr": lr_scheduler.get_last_lr()[0],
            "gradient_norm": norm,
            "skipped_steps": run.skipped_steps,
            **utilisation.figures(),
        }
        progress.update(1)
        speed = throughput.end_step()
        shown = {name: f"{x:.4f}" for name, x in task_losses.items()} | {"images/s": shown_rate(speed)}
        progress.set_postfix({"round": this_round + 1, **shown})
        accelerator.log(
            {f"loss/{batch.task}": average, "round": this_round + 1, **logs, "images_per_second": speed}, step=step
        )
        if args.validation_prompts and due(step, args.validation_steps):
            with evaluated(accelerator, student, ema, trained) as whole:
                if whole is not None:
                    draw_validation(args, accelerator, build_pipeline(whole), args.validation_prompts, step)
        watch.look(step, average, norm)
        stop = run.stop_requested()
        if stop or due(step, args.checkpointing_steps) or step == max_steps:
            kept = run.kept(task_losses=task_losses, round=this_round)
            save_checkpoint(accelerator, args.output_dir, step, total_limit=args.checkpoints_total_limit, **kept)
            if publishes_checkpoints(args) and step < max_steps and not stop:
                with evaluated(accelerator, student, ema, trained) as whole:
                    if whole is not None:
                        measured = loss_measures(task_losses)
                        publish_pipeline(args, build_pipeline(whole), measured, args.validation_prompts, step=step)
        throughput.go_on()
    progress.close()

    # 5. Save the pipeline
    accelerator.wait_for_everyone()
    if not stop or step == max_steps:
        with evaluated(accelerator, student, ema, trained) as whole:
            if whole is not None:
                publish_pipeline(args, build_pipeline(whole), loss_measures(task_losses), args.validation_prompts)
        logger.info(f"saved to {args.output_dir}")
    accelerator.end_training()


if __name__ == "__main__":
    with told_errors():
        main(parse_args())

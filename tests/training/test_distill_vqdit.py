"""The distillation script: what its pipeline is, that the student learns, and what it refuses."""

import pytest
import torch

from diffusers_vqdit import MaskedDiffusionScheduler, VQDiTPipeline
from diffusers_vqdit.training.codes import CodeDataset
from diffusers_vqdit.training.distillation_loss import distillation_loss
from diffusers_vqdit.training.draws import row_generators
from diffusers_vqdit.training.run import TrainingRun
from diffusers_vqdit.training.task_codes import load_codes


@pytest.fixture
def distil(script, pipeline, picture_folder, tmp_path):
    pipeline.scheduler = MaskedDiffusionScheduler(temperature=0.5)
    pipeline.save_pretrained(tmp_path / "teacher")

    def run(more, **patches):
        module = script("distill_vqdit")
        for name, value in patches.items():
            setattr(module, name, value)
        arguments = (
            f"--pretrained_model_name_or_path {tmp_path / 'teacher'} --train_data_dir {picture_folder} "
            f"--output_dir {tmp_path / 'out'} --report_to none --train_batch_size 8 --lr_warmup_steps 0 {more}"
        )
        module.main(module.parse_args(arguments.split()))

    return run


def test_a_student_learns_and_is_a_pipeline_of_few_steps(distil, tmp_path):
    distil("--num_teacher_steps 4 --num_student_steps 1 --max_train_steps 30 --learning_rate 3e-3 "
           "--validation_prompts dot")  # fmt: skip
    teacher, student = (VQDiTPipeline.from_pretrained(tmp_path / name) for name in ("teacher", "out"))
    assert student.transformer.config.tasks == ["text->image"]
    assert student.scheduler.config == {**teacher.scheduler.config, "temperature": 1.0}
    assert [(row.task, row.guidance_scale) for row in student.tasks] == [("text->image", 1.0)]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Distilled from `teacher` (self-distillation through time, 4 steps to 1)." in card
    assert "num_inference_steps=1" in card and "- distillation" in card
    assert "| text->image | training data | divergence from the teacher of the last round |" in card
    assert (tmp_path / "out" / "samples" / "0.png").is_file()

    codes = CodeDataset(tmp_path / "out" / "codes")
    given, generated = {"text": codes.codes["text"].long()}, {"image": codes.codes["image"].long()}

    def divergence(model):
        with torch.no_grad():
            return distillation_loss(
                *(model.eval(), teacher.transformer.eval(), teacher.scheduler, given, generated),
                timesteps=torch.ones(len(codes)),
                num_inference_steps=4,
                num_steps=4,
                guidance_scale=3.0,
                generator=row_generators(0, 0, len(codes)),
            ).item()

    assert divergence(student.transformer) < 0.9 * divergence(teacher.transformer)


def test_guidance_of_one_is_not_distilled_in(distil, tmp_path):
    distil("--guidance_scale 1 --tasks text->image,->image --max_train_steps 3")
    student = VQDiTPipeline.from_pretrained(tmp_path / "out")
    assert {row.task: row.guidance_scale for row in student.tasks} == {"text->image": 3.0, "->image": 1.0}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--tasks label->text", "was not trained for the task 'label->text'; it knows text->image"),
        ("--tasks text->image,->image", "'text->image' has its guidance of 3 distilled in, but with '->image'"),
        ("--tasks text-image", "must have one '->'"),
        ("--validation_prompts dot --tasks image->text", "validation_prompts=.'dot'. can't be drawn"),
        ("--num_teacher_steps 16 --num_student_steps 2 --max_train_steps 2", "max_train_steps=2 must be at least 3"),
    ],
)
def test_what_can_not_be_distilled_is_refused_before_the_first_step(distil, monkeypatch, more, message):
    monkeypatch.setattr(TrainingRun, "begin", None)
    with pytest.raises(ValueError, match=message):
        distil(more)


def test_the_datas_segments_are_the_teachers(distil):
    def load(*arguments):
        codes = load_codes(*arguments)
        codes.segments["text"] |= {"vocab_size": 65}
        return codes

    with pytest.raises(ValueError, match="segment 'text' is .*65.* in the data but .*64.* in the pretrained"):
        distil("--max_train_steps 3", load_codes=load)

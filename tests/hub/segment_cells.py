"""What a pipeline of the Hub does without the package: ``python segment_cells.py REPOSITORY OUTPUT``."""

import json
import sys

import torch
from diffusers import DiffusionPipeline
from PIL import Image


repository, output = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(repository, custom_pipeline="pipeline", trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
assert "diffusers_vqdit" not in sys.modules
modalities = {name: entry["modality"] for name, entry in pipe.config.segments.items()}
values = {"image": Image.new("RGB", (16, 16), "red"), "text": "a red box", "label": 0}
arguments = {"image": "image", "text": "prompt", "label": "class_label"}


def passed(names, values_of=values):
    call = {arguments[name]: values_of[modalities[name]] for name in names if name in arguments}
    inputs = {name: values_of[modalities[name]] for name in names if name not in arguments}
    return {**call, "inputs": inputs}


found = {"labels": [], "repainted": {}}
for entry in pipe.config.segments.values():
    found["labels"] = list(entry["names"].values()) if "names" in entry else found["labels"]
for row in pipe.tasks:
    given, generated = row.task.split("->")
    given = given.split("+") if given else []
    made = pipe(**passed(given), output=generated, num_inference_steps=2).segments[generated]
    found[row.task] = [type(made).__name__, len(made), getattr(made[0], "mode", None)]
    name, kind = generated, modalities[generated]
    if not given and kind != "label" or kind == "text":
        values_of = {**values, "text": "a <mask> box" if kind == "text" else values["text"]}
        mask = Image.new("L", (16, 16))
        mask.paste(255, (0, 0, 8, 16))
        extra = {"mask_image": mask} if kind == "image" else {}
        call = passed([name], values_of)
        call["inputs"] |= passed(given)["inputs"]
        made = pipe(**call, output=name, num_inference_steps=2, **extra).segments[name]
        found["repainted"][name] = len(made) == 1
codes = pipe.transformer.config.segments
assert all(
    torch.is_tensor(value) for value in pipe(output_type="latent", **passed(given), output=generated).segments.values()
)
with open(output, "w") as file:
    json.dump(found, file)

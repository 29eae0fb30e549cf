"""Names of version 0.1 whose modules are gone."""

import importlib
import subprocess
import sys

import pytest

import diffusers_vqdit


TRAINING_UTILS = (
    "averaged_weights check_captions checkpoint_step checkpoints code_usage decode_image decode_images "
    "find_checkpoint load_training_dataset parameter_groups psnr row_generators save_checkpoint "
    "save_pretrained_atomically set_dropout shuffled_batches ssim step_generator to_pixels tracker_config unwrap"
)


@pytest.mark.parametrize("name", TRAINING_UTILS.split())
def test_training_utils_gives_out_its_names_and_says_where_they_stand(name):
    old = importlib.import_module("diffusers_vqdit.training_utils")
    vars(old).pop(name, None)  # as in a process that didn't ask for it yet
    with pytest.warns(
        FutureWarning, match=rf"training_utils\.{name}` is deprecated.*from `diffusers_vqdit\.(training|utils)"
    ):
        found = getattr(old, name)
    assert found is getattr(importlib.import_module(found.__module__), name)
    assert diffusers_vqdit.training_utils is old


def test_the_old_path_costs_nothing_until_it_is_asked_for():
    code = (
        "import sys, diffusers_vqdit; assert not [m for m in sys.modules if m.startswith('diffusers_vqdit.training.')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(ImportError, match="no_such_name"):
        exec("from diffusers_vqdit.training_utils import no_such_name")

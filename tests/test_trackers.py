"""Trackers beside TensorBoard get a run's figures and pictures."""

import os
import sqlite3
import subprocess
import sys

import pytest


FLAGS = (
    "--report_to {tracker} --validation_split none --block_out_channels 8 8 --norm_num_groups 4 --latent_channels 4 "
    "--resolution 16 --num_vq_embeddings 16 --validation_steps 2 --train_batch_size 4 --max_train_steps 4"
)


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_run_is_tracked(root, picture_folder, tmp_path, tracker):
    """Without an account: Weights & Biases keeps its files for a later upload, trackio a database."""
    pytest.importorskip(tracker)
    flags = f"--train_data_dir {picture_folder} --output_dir {tmp_path / 'out'} {FLAGS.format(tracker=tracker)}"
    own = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "trackio")}
    command = [sys.executable, str(root / "training/train_image_vq.py"), *flags.split()]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **own}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    wanted = ("reconstruction", "gradient_norm", "images_per_second", "validation/psnr")
    if tracker == "wandb":
        (kept,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
        assert all(name.encode() in kept.read_bytes() for name in wanted)
        assert list(kept.parent.glob("files/media/images/**/*.png"))
        return
    (kept,) = (path for path in (tmp_path / "trackio").glob("*.db"))
    with sqlite3.connect(kept) as database:
        logged = str(database.execute("SELECT metrics FROM metrics").fetchall())
    assert all(name in logged for name in wanted)

"""Processes that were asked for, and don't run: found out from the launcher's command line."""

import logging
import subprocess
import sys

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from diffusers_vqdit.training.launch import asked_processes, check_launch


SCRIPT = ["training/train_vqdit.py", "--num_processes", "7", "--seed", "1"]


@pytest.mark.parametrize(
    ("command", "asked"),
    [
        (["python", "/venv/bin/accelerate", "launch", "--cpu", "--num_processes", "2"], 2),
        (["python", "/venv/bin/accelerate-launch", "--cpu", "--num-processes=3"], 3),
        (["python", "-m", "accelerate.commands.launch", "--num_processes", "4"], 4),
        (["python", "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes=5"], 5),
        (["accelerate", "launch", "--cpu"], None),
        (["torchrun", "--nproc_per_node", "2"], None),
        (["python"], None),
        (["bash", "-c", "accelerate launch --num_processes 2"], None),
        (["accelerate", "env"], None),
    ],
)
def test_the_number_asked_for_is_read(command, asked):
    assert asked_processes([*command, *SCRIPT]) == asked


def test_a_config_file_counts_too(tmp_path):
    config = tmp_path / "accelerate.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nnum_processes: 6\nmixed_precision: 'no'\n"
        "use_cpu: true\n"
    )
    assert asked_processes(["accelerate", "launch", "--config_file", str(config), *SCRIPT]) == 6


class Parent:
    def __init__(self, command):
        self.command = command

    def parent(self):
        return self if self.command is not None else None

    def cmdline(self):
        return self.command


@pytest.mark.parametrize(
    ("command", "warned"),
    [
        (["accelerate", "launch", "--cpu", "--num_processes", "2", "x.py"], True),
        (["accelerate", "launch", "--cpu", "--num_processes", "1", "x.py"], False),
        (["accelerate", "launch", "--no_such_flag"], False),
        (["bash"], False),
        (None, False),
    ],
)
def test_fewer_processes_than_asked_are_told(monkeypatch, caplog, command, warned):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("psutil.Process", lambda: Parent(command))
    with caplog.at_level(logging.WARNING):
        check_launch()
    assert (len(caplog.records) == 1) == warned
    if warned:
        assert "asked for 2 processes, but one runs" in caplog.text
        assert f"torchrun --nproc_per_node 2 {sys.argv[0]}" in caplog.text


@pytest.mark.slow
def test_torchrun_on_cpus_starts_one_run_of_two_processes(root, tmp_path):
    arguments = (
        f"--dataset_name {root / 'training/data/emoji.parquet'} --max_train_samples 8 --validation_split none "
        "--report_to none --train_batch_size 4 --max_train_steps 1 --tokenizer_vocab_size 300 --num_codes 64 "
        f"--output_dir {tmp_path}"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29533"]
    done = subprocess.run(
        [*command, root / "training/train_text_vq.py", *arguments.split()], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("steps of 8") == 1  # told by the main process alone


ENGINES = {
    "cpu": {"multi_gpu": True, "num_processes": 2},
    "one_gpu": {"multi_gpu": False, "use_fsdp": False, "use_deepspeed": False, "num_processes": 1},
    "multi_gpu": {"multi_gpu": True, "num_machines": 1},
    "multi_node": {"multi_gpu": True, "num_machines": 2, "num_processes": 16},
    "fsdp2": {"use_fsdp": True, "fsdp_version": 2, "fsdp_state_dict_type": "SHARDED_STATE_DICT"},
    "deepspeed_zero2": {"use_deepspeed": True, "zero_stage": 2},
}


def test_every_config_of_an_engine_is_there_and_says_how_it_is_started(root):
    files = sorted((root / "training/accelerate_configs").glob("*.yaml"))
    assert {path.stem for path in files} == set(ENGINES)
    for path in files:
        assert f"accelerate launch --config_file training/accelerate_configs/{path.name} " in path.read_text(), path


@pytest.mark.parametrize("name", ENGINES)
def test_accelerate_takes_the_config_of_an_engine(root, name):
    config = root / f"training/accelerate_configs/{name}.yaml"
    arguments = launch_command_parser().parse_args(["--config_file", str(config), "train.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    assert {key: getattr(arguments, key) for key in ENGINES[name]} == ENGINES[name]


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="takes the accelerators")
def test_the_config_for_cpus_starts_two_processes_that_train_together(root, tmp_path):
    script = tmp_path / "count.py"
    script.write_text(
        "import sys\nimport torch\nfrom accelerate import Accelerator\n"
        "from diffusers_vqdit.training.launch import check_launch\n"
        "check_launch()\naccelerator = Accelerator()\n"
        "total = accelerator.reduce(torch.ones(1), 'sum').item()\n"
        "open(f'{sys.argv[1]}/{accelerator.process_index}', 'w').write(f'{total} {accelerator.device.type}')\n"
        "accelerator.end_training()\n"
    )
    config = root / "training/accelerate_configs/cpu.yaml"
    command = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
    subprocess.run([sys.executable, *command, str(script), str(tmp_path)], check=True, timeout=300, cwd=root)
    assert {path.name: path.read_text() for path in tmp_path.glob("[0-9]")} == {"0": "2.0 cpu", "1": "2.0 cpu"}

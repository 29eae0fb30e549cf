"""Run training scripts one after another in this process, or in those of torchrun; for test_processes.py.

    python run_jobs.py jobs.json        (a list of {"script": path, "arguments": [..], "log": path})

Each job's log gets what the script reported at its steps, and how often codes were placed onto vectors. With SHARDED
in the environment the models are sharded (FSDP2), which Accelerate does on accelerators only: what it would have set
up is set up here, and the rest is its own.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from diffusers_vqdit.models.quantizers.vector import VectorQuantizer
from diffusers_vqdit.training import setup


reports, placed = [], []
place = VectorQuantizer._place


def log(self, values, step=None, log_kwargs=None):
    reports.append({name: float(value) for name, value in values.items() if not name.endswith("_per_second")})


def counting_place(self, codes, vectors):
    placed.append(len(codes))
    place(self, codes, vectors)


def sharding_accelerator(*args, **kwargs):
    accelerator = make_accelerator(*args, **kwargs)
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP", state_dict_type="SHARDED_STATE_DICT"
    )
    return accelerator


make_accelerator = setup.make_accelerator
if os.environ.get("SHARDED"):
    setup.make_accelerator = sharding_accelerator
Accelerator.log = log
Accelerator.end_training = lambda self: None  # the next job needs the process group
VectorQuantizer._place = counting_place

for number, job in enumerate(json.loads(Path(sys.argv[1]).read_text())):
    reports.clear(), placed.clear()
    spec = importlib.util.spec_from_file_location(f"job_{number}", job["script"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(module.parse_args(job["arguments"]))
    if int(os.environ.get("RANK", 0)) == 0:
        Path(job["log"]).write_text(json.dumps({"reports": reports, "placed": placed}))

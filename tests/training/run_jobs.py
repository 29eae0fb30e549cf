"""Run training scripts one after another in this process, or in those of torchrun; for test_processes.py.

    python run_jobs.py jobs.json        (a list of {"script": path, "arguments": [..], "log": path})

Each job's log gets what the script reported at its steps, and how often codes were placed onto vectors.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

from accelerate import Accelerator

from diffusers_vqdit.models.quantizers.vector import VectorQuantizer


reports, placed = [], []
place = VectorQuantizer._place


def log(self, values, step=None, log_kwargs=None):
    reports.append({name: float(value) for name, value in values.items() if not name.endswith("_per_second")})


def counting_place(self, codes, vectors):
    placed.append(len(codes))
    place(self, codes, vectors)


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

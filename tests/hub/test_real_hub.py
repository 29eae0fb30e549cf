"""The steps of the local Hub's tests on huggingface.co, where a token is given.

    VQDIT_TEST_HUB_TOKEN=hf_... python -m pytest tests/hub/test_real_hub.py

The token needs the right to write. A private repository is made, and deleted at the end.
"""

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = pytest.mark.skipif(
    "VQDIT_TEST_HUB_TOKEN" not in os.environ, reason="VQDIT_TEST_HUB_TOKEN has no token of the Hub"
)

STEPS = """
import json, sys, torch
import diffusers_vqdit
from diffusers import DiffusionPipeline
from diffusers_vqdit import VQDiTPipeline
from huggingface_hub import HfApi, ModelCard

folder, name = sys.argv[1:3]
api = HfApi()
repository = api.whoami()["name"] + "/" + name
pipe = VQDiTPipeline.from_pretrained(folder)
draw = lambda p: p("a dot", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
try:
    pipe.push_to_hub(repository, private=True)
    commits = len(api.list_repo_commits(repository))
    pipe.push_to_hub(repository, private=True)
    unchanged = len(api.list_repo_commits(repository)) == commits
    api.create_tag(repository, tag="v1")
    loaded = [VQDiTPipeline.from_pretrained(repository), DiffusionPipeline.from_pretrained(repository, revision="v1")]
    code = DiffusionPipeline.from_pretrained(repository, custom_pipeline="pipeline", trust_remote_code=True)
    ModelCard.load(repository).validate()
    same = [torch.equal(draw(one), draw(pipe)) for one in [*loaded, code]]
    print(json.dumps({"commits": commits, "unchanged": unchanged, "same": same}))
finally:
    api.delete_repo(repository, missing_ok=True)
"""


def test_publishing_and_loading(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "saved")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_TOKEN": os.environ["VQDIT_TEST_HUB_TOKEN"], "HF_HOME": str(tmp_path / "hf")}
    arguments = [sys.executable, "-c", STEPS, str(tmp_path / "saved"), f"vqdit-test-{secrets.token_hex(4)}"]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, cwd=Path(tmp_path))
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome == {"commits": 2, "unchanged": True, "same": [True, True, True]}

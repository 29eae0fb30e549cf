"""Publishing: complete or not at all, whatever happens to the connection."""

import os
import time

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError

from diffusers_vqdit.utils.hub import push_folder


PATIENT = {"wait": 0.0, "max_retries": 8}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """huggingface_hub waits for seconds between its retries."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def folder(tmp_path):
    """A model of two large files and a small one."""
    for name in ("image_vq", "transformer"):
        (tmp_path / "model" / name).mkdir(parents=True)
        (tmp_path / "model" / name / "model.safetensors").write_bytes(os.urandom(200_000))
    (tmp_path / "model" / "model_index.json").write_text("{}")
    return tmp_path / "model"


def contents(hub, repo_id, revision="main"):
    files = hub.repositories[repo_id].resolve(revision).files
    return {path: file.content for path, file in files.items() if path != ".gitattributes"}


def expected(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_is_one_commit(hub, client, folder):
    first = push_folder(folder, "model", commit_message="First")  # the token's namespace
    assert contents(hub, "alice/model") == expected(folder)
    assert hub.repositories["alice/model"].log() == ["First", "initial commit"]
    assert push_folder(folder, "alice/model").oid == first.oid  # nothing to do
    (folder / "model_index.json").write_text('{"a": 1}')
    push_folder(folder, "alice/model", path_in_repo="sub", ignore_patterns=["transformer/*"])
    found = contents(hub, "alice/model")
    added = {path.removeprefix("sub/") for path in found if path.startswith("sub/")}
    assert added == {"model_index.json", "image_vq/model.safetensors"}
    assert hub.count("PUT", "^/lfs/") == 2  # the third upload's weights were there already


def test_pushing_needs_the_right_token(hub, client, folder):
    with pytest.raises(HfHubHTTPError, match="401"):
        push_folder(folder, "alice/model", token="hf_wrong", **PATIENT)
    with pytest.raises(HfHubHTTPError, match="403"):
        push_folder(folder, "alice/model", token="hf_bob", **PATIENT)
    assert not hub.repositories
    assert len(hub.requests) < 10  # a refusal is no reason to try again
    push_folder(folder, "alice/secret", private=True)
    with pytest.raises(huggingface_hub.errors.RepositoryNotFoundError):
        huggingface_hub.HfApi(token="hf_bob").model_info("alice/secret")
    with pytest.raises(ValueError, match="no file to publish"):
        push_folder(folder, "alice/model", allow_patterns=["*.txt"])


@pytest.mark.parametrize("every", [2, 3, 4, 5])
def test_a_server_that_fails_every_nth_request(hub, client, folder, every):
    hub.fail_every = every
    push_folder(folder, "alice/model", wait=0.0, max_retries=30)
    assert contents(hub, "alice/model") == expected(folder)
    assert hub.repositories["alice/model"].log() == ["Upload folder", "initial commit"]
    assert hub.count("PUT", "^/lfs/", status=200) == 2  # what arrived is not sent again


def test_a_server_that_gives_up(hub, client, folder):
    hub.fail_every = 1
    with pytest.raises(HfHubHTTPError, match="503"):
        push_folder(folder, "alice/model", wait=0.0, max_retries=2)
    assert hub.count("POST", "/api/repos/create") == 3


@pytest.mark.parametrize("call", ["/commit/", "/verify", "/preupload/", "/api/repos/create"])
def test_an_answer_that_is_lost(hub, client, folder, call):
    hub.lose_answers = [call]
    push_folder(folder, "alice/model", **PATIENT)
    assert not hub.lose_answers
    assert contents(hub, "alice/model") == expected(folder)
    assert hub.repositories["alice/model"].log() == ["Upload folder", "initial commit"]  # not committed twice


def test_a_server_that_dies_in_the_middle_of_an_upload(hub, client, folder):
    push_folder(folder, "alice/model", commit_message="Old")
    before = contents(hub, "alice/model")
    for path in folder.rglob("*.safetensors"):
        path.write_bytes(os.urandom(200_000))
    hub.die_after = 250_000  # in the second file or, with both under way, in either
    with pytest.raises(Exception, match="Error while uploading|refused"):
        push_folder(folder, "alice/model", commit_message="New", wait=0.0, max_retries=1)
    assert contents(hub, "alice/model") == before  # nothing is half-published
    uploaded = hub.count("PUT", "^/lfs/", status=200)

    hub.start()
    push_folder(folder, "alice/model", commit_message="New")
    assert contents(hub, "alice/model") == expected(folder)
    assert hub.repositories["alice/model"].log() == ["New", "Old", "initial commit"]
    assert hub.count("PUT", "^/lfs/", status=200) - uploaded <= 2


def test_what_arrived_is_not_sent_again(hub, client, folder):
    hub.lose_answers = ["/commit/"]
    with pytest.raises(Exception, match="disconnected"):
        push_folder(folder, "alice/model", max_retries=0)
    sent = hub.count("PUT", "^/lfs/")
    push_folder(folder, "alice/model")
    assert hub.count("PUT", "^/lfs/") == sent


def test_a_damaged_upload_is_refused(hub, client, folder):
    path = folder / "transformer" / "model.safetensors"
    operation = huggingface_hub.CommitOperationAdd("model.safetensors", str(path))
    huggingface_hub.HfApi().create_repo("alice/model")
    path.write_bytes(os.urandom(200_000))  # after its checksum was announced
    operation.upload_info.sha256 = b"\0" * 32
    with pytest.raises(RuntimeError):
        huggingface_hub.HfApi().create_commit("alice/model", [operation], commit_message="Damaged")
    assert contents(hub, "alice/model") == {}


def test_files_come_back_whole_and_in_ranges(hub, client, folder, tmp_path):
    push_folder(folder, "alice/model")
    cache = tmp_path / "cache"
    full = huggingface_hub.hf_hub_download("alice/model", "transformer/model.safetensors", cache_dir=cache)
    content = (folder / "transformer" / "model.safetensors").read_bytes()
    with open(full, "rb") as file:
        assert file.read() == content
    url = huggingface_hub.hf_hub_url("alice/model", "transformer/model.safetensors")
    client = huggingface_hub.utils.get_session()
    for header, status, part in (("bytes=1000-", 206, content[1000:]), ("bytes=0-9", 206, content[:10])):
        answer = client.get(url, headers={"Range": header}, follow_redirects=True)
        assert (answer.status_code, answer.content) == (status, part)
        assert answer.headers["Content-Range"].endswith(f"/{len(content)}")
    assert client.get(url, headers={"Range": "bytes=999999-"}, follow_redirects=True).status_code == 416

"""What is saved is whole; damaged configs and weights are refused by the name of the field or tensor and its place."""

import json
import math
import pickle
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from safetensors.torch import load_file, save_file

from diffusers_vqdit import (
    ImageVQModel,
    MaskedDiffusionScheduler,
    TextVQModel,
    VQDiTLatentPipeline,
    VQDiTPipeline,
    VQDiTTransformer2DModel,
)


CLASSES = {
    "image_vq": ImageVQModel,
    "text_vq": TextVQModel,
    "transformer": VQDiTTransformer2DModel,
    "scheduler": MaskedDiffusionScheduler,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"
# What the value of a kind may have become.
DAMAGE = {
    bool: [None, "yes", 3, []],
    int: [None, "x", math.nan, -1, [], {}, 1.5, True, 10**15],
    float: [None, "x", math.nan, -math.inf, [], {}, True],
    str: [None, 3, "other", [], {}],
    list: ["x", 3, {}, [None], math.nan],
    dict: ["x", 3, [], {}, {"a": 3}],
    type(None): ["x", {}, math.nan],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, make_pipeline):
    """A pipeline's folder, and one with its weights in shards."""
    folder = tmp_path_factory.mktemp("whole")
    make_pipeline(0).save_pretrained(folder / "plain")
    make_pipeline(0).save_pretrained(folder / "sharded", max_shard_size="20KB")
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    shutil.copytree(whole / "plain", tmp_path / "plain")
    return tmp_path / "plain"


def refused(call, *names, kinds=(ValueError,)):
    with pytest.raises(kinds) as error:
        call()
    assert all(str(name) in str(error.value) for name in names), f"{names}: {error.value}"


# ---------------------------------------------------------------------------------------------------------------------
# Configs


@pytest.mark.parametrize("part", CLASSES)
def test_a_damaged_field_is_named_with_its_file(folder, part):
    file = folder / part / CLASSES[part].config_name
    config, count = json.loads(file.read_text()), 0
    fields = [name for name in config if not name.startswith("_")] + ["_format_version", "_class_name"]
    for name in fields:
        for value in DAMAGE[type(config[name])]:
            if (name, value) == ("num_embeds_ada_norm", None):
                continue  # without labels; of latents only
            file.write_text(json.dumps({**config, name: value}))
            refused(lambda: CLASSES[part].from_pretrained(folder / part), name, file)
            count += 1
    print(count, "configs refused")
    assert count > 30


def test_a_config_of_another_class_or_format_is_refused(folder):
    file = folder / "image_vq" / "config.json"
    config = json.loads(file.read_text())
    for name in ("TextVQModel", "UNet2DModel", "Nothing"):
        file.write_text(json.dumps({**config, "_class_name": name}))
        refused(lambda: ImageVQModel.from_pretrained(folder / "image_vq"), f"_class_name={name!r}", "ImageVQModel")
    file.write_text(json.dumps({**config, "_use_default_values": 3}))
    refused(lambda: ImageVQModel.from_pretrained(folder / "image_vq"), "_use_default_values=3")
    file.write_text(json.dumps({**config, "_format_version": 2}))
    refused(lambda: ImageVQModel.from_pretrained(folder / "image_vq"), "format version 2", "upgrade")
    refused(lambda: ImageVQModel.from_config({"_class_name": "UNet2DModel"}), "_class_name='UNet2DModel'")


@pytest.mark.parametrize("text", ["", "{", "null", "[]", '"text"', "3", '{"in_channels": }', "\x00", "NaN", "[1, 2"])
def test_a_file_that_is_no_config_is_named(folder, text):
    for part, kind in CLASSES.items():
        file = folder / part / kind.config_name
        file.write_text(text)
        refused(lambda kind=kind, part=part: kind.from_pretrained(folder / part), file, kinds=(ValueError, OSError))


def test_subclasses_bases_and_unknown_keys_still_load(folder):
    file = folder / "image_vq" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "_class_name": "VQModel", "colour": "red"}))
    assert type(ImageVQModel.from_pretrained(folder / "image_vq")) is ImageVQModel

    class Mine(ImageVQModel):
        pass

    Mine.from_pretrained(folder / "image_vq").save_pretrained(folder / "mine")
    assert type(ImageVQModel.from_pretrained(folder / "mine")) is ImageVQModel


@pytest.mark.parametrize("entry", ["x", 3, {}, [], ["diffusers"], ["diffusers", 3], [None, "x"], True])
def test_a_damaged_entry_of_a_pipeline_is_named(folder, entry):
    file = folder / "model_index.json"
    index = json.loads(file.read_text())
    for part in CLASSES:
        file.write_text(json.dumps({**index, part: entry}))
        refused(lambda: VQDiTPipeline.from_pretrained(folder), f"{part}=")
    file.write_text(json.dumps({**index, "_format_version": "1"}))
    refused(lambda: DiffusionPipeline.from_pretrained(folder), "_format_version='1'")
    file.write_text(json.dumps(["VQDiTPipeline"]))
    refused(lambda: VQDiTPipeline.from_pretrained(folder), file)


def test_a_refused_config_leaves_the_default_dtype(folder):
    file = folder / "image_vq" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "in_channels": 0}))
    refused(lambda: ImageVQModel.from_pretrained(folder / "image_vq", dtype=torch.float16), "in_channels=0")
    assert torch.get_default_dtype() == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def wrong(tensor):
    """Ways to spoil a tensor."""
    grown = torch.cat([tensor.reshape(1, *tensor.shape)] * 2)
    spoilt = {"another shape": grown}
    if tensor.is_floating_point():
        spoilt["an integer"] = torch.zeros(tensor.shape, dtype=torch.int64)
        for value in (math.nan, math.inf, -math.inf):
            spoilt[str(value)] = tensor.clone().flatten().index_fill_(0, torch.tensor([tensor.numel() - 1]), value)
            spoilt[str(value)] = spoilt[str(value)].view(tensor.shape)
    else:
        spoilt["a float"] = torch.zeros(tensor.shape)
    return spoilt


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("part", ["image_vq", "text_vq", "transformer"])
def test_a_spoilt_tensor_is_named(folder, part, low_cpu_mem_usage):
    file = folder / part / WEIGHTS
    weights, count = load_file(file), 0
    buffers = [name for name in weights if name.endswith(("updates", "cluster_size", "cluster_mean"))]
    assert part != "text_vq" or len(buffers) == 3
    for name in [*list(weights)[:: max(1, len(weights) // 4)], *buffers]:
        for changed in [None, *wrong(weights[name]).values()]:
            rest = {key: value for key, value in weights.items() if key != name}
            save_file(rest if changed is None else {**rest, name: changed}, file)
            refused(
                lambda: CLASSES[part].from_pretrained(folder / part, low_cpu_mem_usage=low_cpu_mem_usage),
                *(repr(name), file),
            )
            count += 1
    print(count, "files of weights refused")
    assert count >= 20


@pytest.mark.parametrize("load", [VQDiTPipeline.from_pretrained, DiffusionPipeline.from_pretrained])
def test_a_pipeline_names_what_its_components_lack(folder, load):
    file = folder / "image_vq" / WEIGHTS
    weights = load_file(file)
    save_file({name: value for name, value in weights.items() if name != "decoder.conv_in.weight"}, file)
    refused(lambda: load(folder), "'decoder.conv_in.weight'", file)


def test_weights_of_another_config_and_of_another_model_are_refused(folder):
    file = folder / "text_vq" / "config.json"
    config = json.loads(file.read_text())
    for name, value in {"num_layers": 2, "hidden_size": 32, "num_codes": 65, "vocab_size": 301}.items():
        file.write_text(json.dumps({**config, name: value}))
        said = "that the config asks for" if name == "num_layers" else "by the config it must have"
        refused(lambda: TextVQModel.from_pretrained(folder / "text_vq"), folder / "text_vq" / WEIGHTS, said)
    shutil.copy(folder / "image_vq" / WEIGHTS, folder / "transformer")
    refused(lambda: VQDiTTransformer2DModel.from_pretrained(folder / "transformer"), "missing", "another model's")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("form", ["plain", "sharded"])
def test_a_truncated_file_is_named(whole, tmp_path, form, share):
    shutil.copytree(whole / form / "transformer", tmp_path / "transformer")
    for file in sorted((tmp_path / "transformer").glob("*.safetensors"))[:2]:
        content = file.read_bytes()
        file.write_bytes(content[: int(share * len(content))])
        refused(
            lambda: VQDiTTransformer2DModel.from_pretrained(tmp_path / "transformer"),
            file,
            kinds=(ValueError, OSError),
        )
        file.write_bytes(content)
    VQDiTTransformer2DModel.from_pretrained(tmp_path / "transformer")


@pytest.mark.parametrize(
    "content", [b"text", b"\x00" * 64, b"\xff" * 64, b'{"a": 1}', b"\x08" + b"\x00" * 7 + b"{}      "]
)
def test_a_file_of_something_else_is_refused(folder, content):
    file = folder / "image_vq" / WEIGHTS
    file.write_bytes(content)
    refused(lambda: ImageVQModel.from_pretrained(folder / "image_vq"), file, kinds=(ValueError, OSError))


class Runs:
    def __reduce__(self):
        return exec, ("raise SystemExit('code ran')",)


def test_pickles_with_code_or_without_tensors_by_name_are_refused(folder):
    file = folder / "image_vq" / "diffusion_pytorch_model.bin"
    (folder / "image_vq" / WEIGHTS).unlink()
    file.write_bytes(pickle.dumps(Runs()))
    refused(lambda: ImageVQModel.from_pretrained(folder / "image_vq"), file, kinds=(OSError,))
    for content in (Runs(), [torch.zeros(2)], {"state_dict": {"a": torch.zeros(2)}}, torch.zeros(2)):
        torch.save(content, file)
        refused(lambda: ImageVQModel.from_pretrained(folder / "image_vq"), "image_vq", kinds=(ValueError, OSError))


@pytest.mark.parametrize(
    "damage",
    [
        lambda index: "{",
        lambda index: "null",
        lambda index: json.dumps({"metadata": {}}),
        lambda index: json.dumps({"metadata": {}, "weight_map": []}),
        lambda index: json.dumps({"metadata": {}, "weight_map": {}}),
        lambda index: json.dumps({"metadata": {}, "weight_map": {"a": 3}}),
        lambda index: json.dumps({"weight_map": index["weight_map"]}),
        lambda index: json.dumps({**index, "weight_map": {**index["weight_map"], "a": "no-such-shard.safetensors"}}),
    ],
)
def test_a_damaged_index_of_shards_is_named(whole, tmp_path, damage):
    shutil.copytree(whole / "sharded" / "transformer", tmp_path / "transformer")
    file = tmp_path / "transformer" / f"{WEIGHTS}.index.json"
    written = damage(json.loads(file.read_text()))
    file.write_text(written)
    said = ("no-such-shard",) if "no-such-shard" in written else (file, "'weight_map'")
    refused(
        lambda: VQDiTTransformer2DModel.from_pretrained(tmp_path / "transformer"), *said, kinds=(ValueError, OSError)
    )


def test_a_tensor_that_the_shards_lack_is_named_and_a_missing_shard_too(whole, tmp_path):
    shutil.copytree(whole / "sharded" / "transformer", tmp_path / "transformer")
    file = sorted((tmp_path / "transformer").glob("*.safetensors"))[1]
    weights = load_file(file)
    name = next(iter(weights))
    save_file({key: value for key, value in weights.items() if key != name}, file)
    refused(lambda: VQDiTTransformer2DModel.from_pretrained(tmp_path / "transformer"), repr(name), file)
    file.unlink()
    refused(
        lambda: VQDiTTransformer2DModel.from_pretrained(tmp_path / "transformer"),
        file.name,
        kinds=(ValueError, OSError),
    )


def test_what_diffusers_offers_still_loads(folder, whole):
    path = folder / "transformer"
    expected = load_file(path / WEIGHTS)
    for options in (
        {"low_cpu_mem_usage": False},
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"dtype": torch.float32},
        {"disable_mmap": True},
    ):
        model = VQDiTTransformer2DModel.from_pretrained(path, **options)
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items()), options
    half = VQDiTTransformer2DModel.from_pretrained(path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    save_file({**expected, "another": torch.zeros(2)}, path / WEIGHTS)  # a warning, as diffusers has it
    model, info = VQDiTTransformer2DModel.from_pretrained(path, output_loading_info=True)
    assert info["unexpected_keys"] == ["another"] and not info["missing_keys"]
    save_file({**expected, "norm": torch.zeros(2)}, path / WEIGHTS)
    other = {**expected, "heads.image.bias": torch.zeros(5)}
    save_file(other, path / WEIGHTS)
    VQDiTTransformer2DModel.from_pretrained(path, low_cpu_mem_usage=False, ignore_mismatched_sizes=True)
    float8 = {name: value.to(torch.float8_e4m3fn) for name, value in expected.items()}
    save_file(float8, path / WEIGHTS)
    VQDiTTransformer2DModel.from_pretrained(path)


def test_a_stock_codebook_lacks_moving_averages_that_another_config_asks_for(folder):
    ImageVQModel.from_pretrained(folder / "image_vq")
    with pytest.raises(ValueError, match="'quantize.cluster_size'"):
        ImageVQModel.from_pretrained(folder / "image_vq", codebook_update="ema")


# ---------------------------------------------------------------------------------------------------------------------
# Saving


def test_what_is_not_finite_is_not_saved(pipeline, tmp_path):
    with torch.no_grad():
        pipeline.text_vq.to_logits.weight[3, 2] = math.nan
    for saved in (pipeline, pipeline.text_vq):
        refused(lambda saved=saved: saved.save_pretrained(tmp_path / "new"), "'to_logits.weight'", "NaN")
    assert not (tmp_path / "new").exists()


def test_weights_with_an_adapter_are_not_saved(pipeline, tmp_path):
    peft = pytest.importorskip("peft")
    pipeline.save_pretrained(tmp_path / "base")
    pipeline.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]), "style")
    for saved in (pipeline, pipeline.transformer):
        refused(lambda saved=saved: saved.save_pretrained(tmp_path / "new"), "style", "unload", "save_lora_weights")
    assert not (tmp_path / "new").exists()
    pipeline.transformer.unload_lora()
    pipeline.save_pretrained(tmp_path / "new")
    names = [load_file(tmp_path / name / "transformer" / WEIGHTS) for name in ("base", "new")]
    assert names[0].keys() == names[1].keys()


FORMS = [{}, {"max_shard_size": "60KB"}, {"max_shard_size": "90KB"}, {"safe_serialization": False}]
FORMS += [{"safe_serialization": False, "max_shard_size": "60KB"}]


@pytest.mark.parametrize("second", FORMS)
@pytest.mark.parametrize("first", FORMS)
def test_the_newest_save_is_what_loads(make_pipeline, tmp_path, first, second):
    old, new = (make_pipeline(seed).transformer for seed in (0, 1))
    old.save_pretrained(tmp_path, variant="fp16", max_shard_size="60KB")
    for name in ("my-model.safetensors", "notes.bin", "model.ckpt"):
        (tmp_path / name).write_text("mine")
    kept = {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != "config.json"}
    old.save_pretrained(tmp_path, **first)
    new.save_pretrained(tmp_path, **second)
    sharded_pickles = set(second) == {"safe_serialization", "max_shard_size"}  # diffusers looks for them if asked to
    found = type(new).from_pretrained(tmp_path, use_safetensors=False if sharded_pickles else None).state_dict()
    assert all(torch.equal(found[name], value) for name, value in new.state_dict().items())
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert not list(tmp_path.glob(".unfinished*"))


def test_a_pipeline_replaces_older_forms_in_all_its_folders(make_pipeline, tmp_path):
    make_pipeline(0).save_pretrained(tmp_path, max_shard_size="60KB")
    make_pipeline(0).save_pretrained(tmp_path, safe_serialization=False, variant="fp16")
    (new := make_pipeline(1)).save_pretrained(tmp_path)
    loaded = VQDiTPipeline.from_pretrained(tmp_path)
    for part in ("transformer", "image_vq", "text_vq"):
        found, expected = getattr(loaded, part).state_dict(), getattr(new, part).state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        names = {"config.json", WEIGHTS, "diffusion_pytorch_model.fp16.bin"}
        assert {path.name for path in (tmp_path / part).iterdir()} == names


def test_a_save_that_fails_leaves_the_old_files(pipeline, tmp_path, monkeypatch):
    pipeline.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    pipeline.transformer.heads["image"].bias.data += 1

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(pipeline.tokenizer), "save_pretrained", full)
    refused(lambda: pipeline.save_pretrained(tmp_path), "No space left", "still whole", kinds=(OSError,))
    monkeypatch.setattr("safetensors.torch.save_file", full)
    refused(lambda: pipeline.transformer.save_pretrained(tmp_path / "transformer"), "still whole", kinds=(OSError,))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    refused(lambda: pipeline.save_pretrained(tmp_path / "model_index.json"), "is a file")


def test_a_latent_pipeline_is_checked_as_well(tmp_path):
    transformer = VQDiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, num_layers=2, in_channels=4, sample_size=4, num_embeds_ada_norm=3
    )
    vae = ImageVQModel(norm_num_groups=4, block_out_channels=(8,), latent_channels=4, num_vq_embeddings=8)
    pipe = VQDiTLatentPipeline(transformer, vae, DDIMScheduler())
    pipe.save_pretrained(tmp_path)
    VQDiTLatentPipeline.from_pretrained(tmp_path)
    file = tmp_path / "transformer" / WEIGHTS
    weights = load_file(file)
    save_file({name: value for name, value in weights.items() if "blocks.1.ff" not in name}, file)
    refused(lambda: VQDiTLatentPipeline.from_pretrained(tmp_path), "blocks.1.ff", file)
    vae.encoder.conv_in.weight.data.fill_(math.inf)
    refused(lambda: pipe.save_pretrained(tmp_path), "vae", "'encoder.conv_in.weight'")


def test_pipelines_models_and_schedulers_are_pushed_in_one_commit(hub, client, pipeline, tmp_path):
    pipeline.push_to_hub("alice/pipe", commit_message="Pipeline")
    assert hub.repositories["alice/pipe"].log() == ["Pipeline", "initial commit"]
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert {"README.md", "model_index.json", "pipeline.py", weights} <= set(published_files(hub, "alice/pipe"))
    pipeline.image_vq.push_to_hub("alice/image_vq")
    pipeline.scheduler.push_to_hub("alice/scheduler")
    pipeline.save_pretrained(str(tmp_path / "saved"), push_to_hub=True, repo_id="alice/saved")
    for name in ("image_vq", "scheduler", "saved"):
        assert len(hub.repositories[f"alice/{name}"].log()) == 2

    loaded = VQDiTPipeline.from_pretrained("alice/pipe", cache_dir=tmp_path / "cache")
    for name, value in pipeline.transformer.state_dict().items():
        assert torch.equal(loaded.transformer.state_dict()[name], value), name
    ImageVQModel.from_pretrained("alice/image_vq", cache_dir=tmp_path / "cache")
    MaskedDiffusionScheduler.from_pretrained("alice/scheduler", cache_dir=tmp_path / "cache")


def published_files(hub, repo_id):
    repository = hub.repositories[repo_id]
    assert len(repository.log()) == 2  # one commit after the first, empty one
    return repository.resolve("main").files


def test_configs_name_no_folder_of_this_machine(hub, client, image_vq, tmp_path):
    image_vq.save_pretrained(tmp_path / "private-folder" / "vq")
    model = ImageVQModel.from_pretrained(tmp_path / "private-folder" / "vq")
    model.push_to_hub("alice/origin")
    config = json.loads(published_files(hub, "alice/origin")["config.json"].content)
    assert config["_name_or_path"] == "vq"
    loaded = ImageVQModel.from_pretrained("alice/origin", cache_dir=tmp_path / "cache")
    assert {**loaded.config, "_name_or_path": None} == {**model.config, "_name_or_path": None}

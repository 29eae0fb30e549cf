"""The loading matrix, run in a process of its own: one way to load, and all that it must load.

    python loading_cells.py WAY PLACE SOURCE FORMS OUTPUT [offline]

WAY is ``own`` (the package's classes), ``plugin`` (diffusers' classes, with the package imported) or ``code``
(diffusers' classes and the repository's ``pipeline.py``, without the package). SOURCE is a folder or a user of the
Hub, FORMS the folder with what was saved. Each cell's outcome is written to OUTPUT: "ok", or a traceback.
"""

import json
import sys
import tempfile
import traceback
from pathlib import Path

import torch
from diffusers import AutoModel, DiffusionPipeline
from huggingface_hub import HfApi, hf_hub_download
from safetensors.torch import load_file


WAY, PLACE, SOURCE, FORMS, OUTPUT = sys.argv[1:6]
OFFLINE = "offline" in sys.argv[6:]
if WAY != "code":
    from diffusers_vqdit import ImageVQModel, TextVQModel, VQDiTPipeline, VQDiTTransformer2DModel
CACHES = tempfile.TemporaryDirectory()


def at(name: str) -> str:
    """Where a form is: a folder, or a repository's id."""
    return f"{SOURCE}/{name}"


def load(path: str, **arguments) -> DiffusionPipeline:
    """A pipeline, loaded this process's way. Each call has an empty cache, but for the default one's."""
    arguments.setdefault("cache_dir", tempfile.mkdtemp(dir=CACHES.name))
    if WAY == "code":
        arguments |= {"custom_pipeline": "pipeline", "trust_remote_code": True}
    pipe = (VQDiTPipeline if WAY == "own" else DiffusionPipeline).from_pretrained(path, **arguments)
    pipe.set_progress_bar_config(disable=True)
    package = "diffusers_modules" if WAY == "code" else "diffusers_vqdit"
    for one in (pipe, pipe.transformer, pipe.scheduler, pipe.image_vq, pipe.text_vq):
        assert type(one).__module__.split(".")[0] == package, type(one)
    return pipe


def saved(form: str, part: str = "transformer", file: str = "diffusion_pytorch_model.safetensors") -> dict:
    return load_file(Path(FORMS) / form / part / file)


def same_weights(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    found = model.state_dict()
    return set(found) == set(expected) and all(
        torch.equal(found[name], expected[name].to(found[name])) for name in found
    )


def draw(pipe: DiffusionPipeline) -> torch.Tensor:
    """Two pictures, the same at each call."""
    return pipe(
        "a red apple",
        num_inference_steps=3,
        num_images_per_prompt=2,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images


def message_of(kind: type[Exception], call, *arguments, **keywords) -> str:
    try:
        call(*arguments, **keywords)
    except kind as error:
        return str(error)
    raise AssertionError(f"{call} raised nothing")


# ---------------------------------------------------------------------------------------------------------------------
# The cells


def plain() -> None:
    # The default cache: the offline process finds it.
    pipe = load(at("plain"), cache_dir=None)
    assert same_weights(pipe.transformer, saved("plain"))
    assert same_weights(pipe.image_vq, saved("plain", "image_vq"))
    assert same_weights(pipe.text_vq, saved("plain", "text_vq"))
    assert list(pipe.config.labels) == ["fruit", "box", "dot"]
    # Bit for bit the pictures of a pipeline that never left the folder.
    assert torch.equal(draw(pipe), draw(load(f"{FORMS}/plain")))
    assert pipe(image=draw(pipe), num_inference_steps=2).texts is not None


def variant() -> None:
    pipe = load(at("plain"), variant="fp16")
    assert pipe.transformer.dtype == torch.float32
    assert same_weights(pipe.transformer, saved("plain", file="diffusion_pytorch_model.fp16.safetensors"))
    assert not same_weights(pipe.transformer, saved("plain"))
    draw(pipe)


def dtype() -> None:
    pipe = load(at("plain"), dtype=torch.bfloat16)
    assert pipe.transformer.dtype == pipe.image_vq.dtype == torch.bfloat16
    draw(pipe)


def shards() -> None:
    assert torch.equal(draw(load(at("sharded"))), draw(load(at("plain"))))


def from_pipe() -> None:
    pipe = load(at("plain"))
    other = type(pipe).from_pipe(pipe)
    assert other is not pipe and other.transformer is pipe.transformer
    assert list(other.config.labels) == ["fruit", "box", "dot"]
    assert torch.equal(draw(other), draw(pipe))


def swap() -> None:
    transformer = load(at("other")).transformer
    pipe = load(at("plain"), transformer=transformer)
    assert pipe.transformer is transformer
    assert not torch.equal(draw(pipe), draw(load(at("plain"))))
    scheduler = type(pipe.scheduler)(temperature=0.0, choice_temperature=0.0)
    assert load(at("plain"), scheduler=scheduler).scheduler is scheduler
    pipe.save_pretrained(folder := tempfile.mkdtemp(dir=CACHES.name))
    assert torch.equal(draw(load(folder)), draw(pipe))


def save_again() -> None:
    pipe = load(at("plain"))
    if PLACE == "hub":
        path = at(f"saved-{WAY}")
        pipe.push_to_hub(path)
    else:
        path = tempfile.mkdtemp(dir=CACHES.name)
        pipe.save_pretrained(path)
    again = load(path)
    assert torch.equal(draw(again), draw(pipe))
    index = again.load_config(path)
    assert index["_class_name"] == "VQDiTPipeline" and index["transformer"][0] == "diffusers"
    code = hf_hub_download(path, "pipeline.py") if PLACE == "hub" else f"{path}/pipeline.py"
    assert Path(code).read_text() == (Path(FORMS) / "plain" / "pipeline.py").read_text()


def segments() -> None:
    """What a segment is stands in the config alone; a copy says it too."""
    pipe = load(at("segments"))
    assert pipe.config.segments["style"]["names"] == {"0": "flat", "1": "round", "2": "bold"}
    again = tempfile.mkdtemp(dir=CACHES.name)
    pipe.save_pretrained(again)
    for one in (pipe, load(again)):
        assert same_weights(one.transformer, saved("segments"))
        image = one(inputs={"style": "bold"}, num_inference_steps=2).images[0]
        assert one(inputs={"sketch": image}).labels[0] in ("flat", "round", "bold")


def several() -> None:
    """Tokenizers of segments in one component, in each of its forms."""
    pipe = load(at("several"))
    package = "diffusers_modules" if WAY == "code" else "diffusers_vqdit"
    assert type(pipe.segment_tokenizers).__module__.split(".")[0] == package
    names = {name: f"{name}.tokenizer" for name in ("sketch", "words")}
    for variant, dtype in ((None, torch.float32), ("fp16", torch.float32), ("fp16", torch.float16)):
        one = pipe if variant is None else load(at("several"), variant=variant, dtype=dtype)
        file = f"diffusion_pytorch_model.{variant}.safetensors" if variant else "diffusion_pytorch_model.safetensors"
        assert one.segment_tokenizers.dtype == dtype and not one.segment_tokenizers.training
        for name, folder in names.items():
            expected = saved("several", f"segment_tokenizers/{folder}", file)
            assert same_weights(one.segment_tokenizers.tokenizers[name], expected), (variant, name)
    again = tempfile.mkdtemp(dir=CACHES.name)
    pipe.save_pretrained(again)
    for one in (pipe, load(again)):
        image = one(inputs={"summary": "a red apple"}, num_inference_steps=2).images[0]
        sketch = one(image=image, num_inference_steps=2, output_type="latent").segments["sketch"]
        assert sketch.shape == (1, 4, 4)
        assert isinstance(one(inputs={"sketch": image}, num_inference_steps=2).texts[0], str)
    found = sorted(path.relative_to(again).as_posix() for path in Path(again, "segment_tokenizers").rglob("*.*"))
    assert "segment_tokenizers/words.tokenizer/tokenizer/tokenizer.json" in found


def revision() -> None:
    older = load(at("plain"), revision="v1")
    assert same_weights(older.transformer, saved("other"))
    if WAY == "own":
        commit = HfApi().list_repo_refs(at("plain")).tags[0].target_commit
        assert same_weights(load(at("plain"), revision=commit).transformer, saved("other"))


def models() -> None:
    classes = {"transformer": VQDiTTransformer2DModel, "image_vq": ImageVQModel, "text_vq": TextVQModel}
    for part, kind in classes.items():
        loader = kind if WAY == "own" else AutoModel
        cache = tempfile.mkdtemp(dir=CACHES.name)
        model = loader.from_pretrained(at("plain"), subfolder=part, cache_dir=cache)
        assert type(model) is kind and same_weights(model, saved("plain", part))
    loader = VQDiTTransformer2DModel if WAY == "own" else AutoModel
    half = loader.from_pretrained(at("plain"), subfolder="transformer", variant="fp16", dtype=torch.float16)
    assert half.dtype == torch.float16
    assert same_weights(half, saved("plain", file="diffusion_pytorch_model.fp16.safetensors"))
    sharded = loader.from_pretrained(at("sharded"), subfolder="transformer")
    assert same_weights(sharded, saved("plain"))


def later_version() -> None:
    assert "format version 99" in message_of(ValueError, load, at("later"))
    if WAY != "code":
        message = message_of(ValueError, ImageVQModel.from_pretrained, at("later"), subfolder="image_vq")
        assert "format version 99" in message and "upgrade" in message


def missing_file() -> None:
    message = message_of(OSError, load, at("missing"))
    assert "diffusion_pytorch_model" in message and "transformer" in message, message


def offline() -> None:
    if WAY == "code":
        # diffusers asks the Hub for the commit of the code, so the repository's id doesn't do without a connection;
        # the folder of the cache does.
        path = str(Path(hf_hub_download(at("plain"), "model_index.json")).parent)
    else:
        path = at("plain")
    assert torch.equal(draw(load(path, cache_dir=None)), draw(load(f"{FORMS}/plain")))


CELLS_OF = {
    "own": [
        plain,
        variant,
        dtype,
        shards,
        from_pipe,
        swap,
        save_again,
        segments,
        several,
        models,
        later_version,
        missing_file,
    ],
    "plugin": [
        plain,
        variant,
        dtype,
        shards,
        from_pipe,
        swap,
        save_again,
        segments,
        several,
        models,
        later_version,
        missing_file,
    ],
    "code": [
        plain,
        variant,
        dtype,
        shards,
        from_pipe,
        swap,
        save_again,
        segments,
        several,
        later_version,
        missing_file,
    ],
}

if __name__ == "__main__":
    cells = [offline] if OFFLINE else CELLS_OF[WAY] + ([revision] if PLACE == "hub" else [])
    outcomes = {}
    for cell in cells:
        try:
            cell()
            assert WAY != "code" or "diffusers_vqdit" not in sys.modules
            outcomes[cell.__name__] = "ok"
        except Exception:
            outcomes[cell.__name__] = traceback.format_exc()
    Path(OUTPUT).write_text(json.dumps(outcomes))

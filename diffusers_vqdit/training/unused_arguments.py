"""The arguments that have no say in what a script does, given the others: its parser refuses them, and the model card
of a run leaves them out."""

import argparse
from collections.abc import Iterable

from ..models.image_vq import QUANTIZER_OPTIONS
from ..pipelines.segment_base import IMAGE, LABEL, LOWRES, TEXT
from ..tasks import parse_tasks
from ..utils.arguments import refuse_unused
from .quantizer_arguments import quantizer_options
from .segment_columns import RESERVED, has_captions, is_taken


_QUANTIZERS = set(sum(QUANTIZER_OPTIONS.values(), ())) - {"ema_decay"}  # --ema_decay is that of the weights
# Arguments that make a new model, which a pretrained one has no use for.
_OF_NEW_MODELS = {
    *("num_layers", "num_attention_heads", "attention_head_dim", "patch_size", "masking", "shift"),
    *("image_vq", "text_vq", "text_tokenizer", "text_encoder", "image_encoder", "use_rotary_positional_embeddings"),
    *("block_out_channels", "layers_per_block", "norm_num_groups", "mid_block_attention", "encoder_norm_type"),
    *("latent_channels", "num_vq_embeddings", "vq_embed_dim", "quantizer_type", *_QUANTIZERS),
    *("tokenizer_vocab_size", "max_length", "downsample_factor", "num_codebooks", "num_codes", "code_dim"),
    *("hidden_size", "kernel_size"),
    *("sampling_rate", "n_fft", "hop_length", "num_mel_bins", "min_frequency", "max_frequency", "log_mel_range"),
}
# Arguments that do something only where another is given and not 0, by that one's name.
_DEPENDENT = {
    "pretrained_model_name_or_path": ("revision", "variant"),
    "dataset_name": ("dataset_config_name",),
    "rank": ("lora_alpha", "lora_dropout", "lora_layers"),
    "use_ema": ("ema_decay",),
    "push_to_hub": ("hub_strategy",),
    "alignment_encoder": ("alignment_weight", "alignment_layer"),
    "caption_columns": ("caption_dropout", "states_file"),
    "label_column": ("label_dropout",),
    "entropy_weight": ("entropy_temperature",),
    "perceptual_weight": ("perceptual_backbone", "perceptual_image_size", "lpips_weights"),
    "adversarial_weight": (
        *("adversarial_loss", "adversarial_start", "discriminator_warmup", "adaptive_weight", "lecam_weight"),
        *("discriminator_channels", "discriminator_layers", "discriminator_learning_rate"),
        "discriminator_max_grad_norm",
    ),
    "adversarial_start": ("discriminator_warmup",),
    "features": ("features_image_size",),
}
# Arguments that say how data are read and encoded, which codes are already.
_OF_DATA = {
    *("image_column", "caption_column", "prompt_columns", "label_column", "image_augmentations", "max_train_samples"),
    *("image_interpolation_mode", "dataloader_num_workers", "block_length", "max_text_length", "max_sequence_length"),
    *("max_audio_length", "audio_codebooks"),
}
# Arguments that say what a segment is made from, and those of what makes it, by its name.
_OF_SEGMENTS = {
    IMAGE: (("image_column",), ("image_vq",)),
    TEXT: (("caption_column", "prompt_columns"), ("text_vq", "text_tokenizer", "text_encoder")),
}
_OF_PICTURES = {
    *("image_column", "image_augmentations", "resolution", "aspect_ratio_buckets", "image_interpolation_mode"),
    "dataloader_num_workers",
}
# Arguments that change nothing of what is made: they may stay in a command of which others are taken out.
_CONVENIENCES = {"dataloader_num_workers", "logging_dir", "peak_tflops", "hub_strategy", "validation_steps"}


def refuse_unused_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program if a flag was set that has no say in what it does, given the others."""
    refuse_unused(
        parser, args, {name: why for name, why in unused_arguments(args).items() if name not in _CONVENIENCES}
    )


def unused_arguments(args: argparse.Namespace) -> dict[str, str]:
    """A script's arguments that have no say, by name, and why, such as ``"without --use_ema"``."""
    given, found = vars(args), _of_data(args) if "segment" in args else {}

    def add(names: Iterable[str], why: str) -> None:
        found.update({name: why for name in names if name in given and name not in found})

    for name, dependents in _DEPENDENT.items():
        if name in given and not given[name]:
            add(dependents, f"without --{name}")
    if given.get("pretrained_model_name_or_path") is not None:
        why = "with --pretrained_model_name_or_path"
        add({"patch"} if not given.get("patch") else (), why)  # but for segments that are new
        add(_OF_NEW_MODELS, why)
        add({"dropout"} if "objective" in given else (), why)  # of latents: never changed
    elif "fsq_levels" in given:  # an image tokenizer
        kind, why = args.quantizer_type, f"with --quantizer_type {args.quantizer_type}"
        add(_QUANTIZERS - set(quantizer_options(args)), why)
        add({"fsq": ("num_vq_embeddings", "vq_embed_dim"), "lfq": ("num_vq_embeddings",)}.get(kind, ()), why)
    elif given.get("quantizer_type") == "vq":  # a text tokenizer
        add({"num_quantizers"}, "with --quantizer_type vq")
    if given.get("lpips_weights") is not None:
        add({"perceptual_backbone", "perceptual_image_size"}, "with --lpips_weights")
    if given.get("features") == "inception":
        add({"features_image_size"}, "with --features inception")
    if "sizes" in given:
        add({"sizes"} if "sizes" not in args.tasks else (), "without a task of 'sizes'")
    if "objective" in given:
        add({"learn_sigma"} if args.objective != "epsilon" else (), f"with --objective {args.objective}")
        add({"shift", "logit_normal"} if args.objective != "flow" else (), f"with --objective {args.objective}")
    if "lr_scheduler" in given:
        kind, why = args.lr_scheduler, f"with --lr_scheduler {args.lr_scheduler}"
        add({"lr_num_cycles"} if kind != "cosine_with_restarts" else (), why)
        add({"lr_power"} if kind != "polynomial" else (), why)
    if given.get("lr_scheduler") == "constant" and args.lr_warmup_steps != 0:  # which is what happens anyway
        add({"lr_warmup_steps"}, "with --lr_scheduler constant")
    if given.get("report_to") == "none":
        add({"logging_dir", "peak_tflops"}, "with --report_to none")
    wanted = [name for name in ("validation_prompts", "validation_images", "validation_labels") if name in given]
    if wanted and not any(given[name] for name in wanted):
        add({"validation_steps"}, f"without --{' or --'.join(wanted)}")
    return found


def _of_data(args: argparse.Namespace) -> dict[str, str]:
    """Of the arguments of a script that encodes data."""
    given, found = vars(args), dict[str, str]()
    named, pretrained = {flag.name for flag in args.segment}, given.get("pretrained_model_name_or_path") is not None
    if "tasks" not in given:  # encode_dataset.py
        pictures, texts = given["image_vq"] or named, ("caption_column", "prompt_columns", "text_columns")
        found |= {} if pictures else dict.fromkeys((*_OF_PICTURES, "resize_mode"), "without --image_vq")
        found |= {} if has_captions(args) else dict.fromkeys(texts, "without --text_vq")
    elif args.tasks is not None:
        try:
            segments = {name for task, _ in parse_tasks(args.tasks) for name in task.segments}
        except ValueError:  # which the script raises itself
            return {}
        pictures = {IMAGE, LOWRES} & segments or named
        captions = segments - named - (set(RESERVED) - {TEXT})
        found |= {} if LABEL in segments else {"label_column": f"without a task of {LABEL!r}"}
        found |= {} if pictures else dict.fromkeys(_OF_PICTURES, f"without a task of {IMAGE!r}")
        found |= {} if captions else dict.fromkeys(("caption_column", "prompt_columns"), f"without a task of {TEXT!r}")
    for flag in args.segment:
        columns, makers = _OF_SEGMENTS.get(flag.name, ((), ()))
        unread = [name for name in makers if name in given and not is_taken(args, name)]
        names = (*columns, *(unread if given.get("codes_dir") is None else ()))  # theirs are known by fingerprints
        found |= dict.fromkeys(names, f"with {flag.flag} {flag.name}={flag.column}, which makes {flag.name!r}")
    if not (given.get("text_tokenizer") or named or pretrained):
        found |= dict.fromkeys(("block_length", "max_text_length"), "without --text_tokenizer")
    if not (given.get("text_encoder") or named or pretrained):
        found["max_sequence_length"] = "without --text_encoder"
    if not named:
        found |= dict.fromkeys(("max_audio_length", "audio_codebooks"), "without --segment")
    if given.get("codes_dir") is not None:
        found |= dict.fromkeys(_OF_DATA, "with --codes_dir")
    return {name: why for name, why in found.items() if name in given}

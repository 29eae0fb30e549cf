"""One pipeline for every task: what you pass is given, what you ask for is generated."""

import json
from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils import deprecate, replace_example_docstring
from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ..models.image_vq import ImageVQModel
from ..models.multi_tokenizer import MultiTokenizerModel
from ..models.text_vq import TextVQModel
from ..models.transformer_vqdit import VQDiTPrefix, VQDiTTransformer2DModel
from ..schedulers.scheduling_masked_diffusion import MaskedDiffusionScheduler
from ..tasks import Task
from ..utils.checks import check_choice, check_integer
from ..utils.fitting import RESIZE_MODES
from .block_generation import BlockGenerationMixin
from .check_inputs import callback_inputs
from .guidance import Scales, encode_given, guidance_scales, guidance_steps
from .likelihood_mixin import LikelihoodMixin
from .lora_mixin import LoraMixin
from .pipeline_output import VQDiTPipelineOutput
from .pipeline_utils import PluginPipelineMixin, check_components, with_own_state
from .ready_codes import encode_partial_value, encode_value
from .retrieval_mixin import RetrievalMixin
from .segment_base import ENCODERS, EncodedValue
from .segment_processors import (
    check_code_segments,
    check_label_names,
    check_segment_entries,
    check_segment_tokenizers,
    check_token_tokenizers,
    warn_of_tokenizers,
)
from .sizes_mixin import Codes


EXAMPLE_DOC_STRING = """
        Examples:
            ```py
            >>> from diffusers_vqdit import VQDiTPipeline

            >>> pipe = VQDiTPipeline.from_pretrained("model_cards/vqdit-emoji")
            >>> image = pipe("a red apple").images[0]
            >>> text = pipe(image=image).texts[0]
            >>> repainted = pipe("a green apple", image, mask_image=mask).images[0]
            >>> texts = pipe("a <mask> apple", output="text").texts
            ```
"""


class VQDiTPipeline(
    LoraMixin, BlockGenerationMixin, LikelihoodMixin, RetrievalMixin, PluginPipelineMixin, DiffusionPipeline
):
    """Generate pictures, captions or labels from one another by masked diffusion over their codes.

    Args:
        transformer: the denoiser, with the segments ``image``, ``text`` and ``label``, some of them or others.
        scheduler: masks and samples.
        image_vq: tokenizer of pictures; None for a checkpoint without them.
        text_vq: tokenizer of texts, with its `tokenizer`; None for a checkpoint without them.
        id2label: the names of the label codes, by code. `labels`, a list of them, is its older name.
        lowres_factor: how many times smaller the pictures were that ``image_lowres`` was trained on.
        resize_mode: how the training read pictures that are not of the grid's aspect ratio: ``"crop"`` cut their
            middle out, ``"pad"`` fitted them whole on white, ``"pad_border"`` on their border's colour; ``"auto"`` did
            so where they stand on transparent or plain ground, else it cropped. Pictures to repaint are always fitted
            whole.
        segments: what the segments are, by name: ``"modality"``: ``"image"``, ``"text"``, ``"label"``, ``"audio"``, or
            of encoders ``"states"`` and ``"image_states"``;
            ``"tokenizer"``, what makes their codes: a component, by default ``image_vq`` or ``text_vq``, or one of
            `segment_tokenizers`; a label's ``"names"``, a list or a dict by code; a picture's ``"buckets"``, the grids
            [[h, w], ...] of all aspect ratios trained on, the transformer's first; and ``"lowres_of"`` for pictures
            that another picture segment's are made from, with ``"factor"``, how many times smaller they are (2). A
            segment that is not in it is a label if its name is ``label`` (with the names `id2label`), a picture if its
            codes are on a grid (those of ``image_lowres``: small ones of ``image``, by `lowres_factor`), else a text.
        segment_tokenizers: the tokenizers of segments that the other components are not for, by name: models, or of
            texts by blocks tokenizers of transformers.
        text_encoder: a frozen text encoder of transformers, with its `tokenizer_2`: for a segment of the modality
            ``"states"``, given as what it makes of a text.
        image_encoder: a frozen vision encoder of transformers, with its `feature_extractor`: for ``"image_states"``.

    Raises:
        ValueError: if `segments` has a segment that the transformer doesn't have, an unknown modality or option, or
            one that doesn't fit the segment's codes.

    ``pipe.tasks`` shows what the checkpoint can do, with the defaults and what to pass.

    A pipeline may be used by several threads at once, each call with arguments of its own. ``pipe._interrupt = True``
    ends all the calls that run.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->text_vq->transformer->image_vq"
    _optional_components = ["image_vq", "text_vq", "tokenizer", *ENCODERS, "segment_tokenizers"]
    # Its parts are called, and not itself, so that no hook would bring it to the device.
    _exclude_from_cpu_offload = ["segment_tokenizers"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: VQDiTTransformer2DModel,
        scheduler: MaskedDiffusionScheduler,
        image_vq: ImageVQModel | None = None,
        text_vq: TextVQModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        labels: list[str] | dict[str, str] | None = None,
        lowres_factor: int = 2,
        resize_mode: str = "crop",
        segments: dict[str, dict[str, Any]] | None = None,
        segment_tokenizers: MultiTokenizerModel | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
        text_encoder: PreTrainedModel | None = None,
        tokenizer_2: PreTrainedTokenizerBase | None = None,
        image_encoder: PreTrainedModel | None = None,
        feature_extractor: BaseImageProcessor | None = None,
    ) -> None:
        super().__init__()
        check_components(transformer=transformer, scheduler=scheduler)
        check_choice("resize_mode", resize_mode, RESIZE_MODES)
        lowres_factor = check_integer("lowres_factor", lowres_factor, 2)
        known = check_code_segments(transformer.config.get("segments"))
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            image_vq=image_vq,
            text_vq=text_vq,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            tokenizer_2=tokenizer_2,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
            segment_tokenizers=segment_tokenizers,
        )
        named = [name for name in self._optional_components if name != "segment_tokenizers"]
        more = check_segment_tokenizers(segment_tokenizers, named)
        # Where the container is left out, what its tokenizers are for is refused at use, as where a component is.
        tokenizers = None if segment_tokenizers is None else [*named, *more]
        segments = check_segment_entries(segments or {}, known, tokenizers)
        check_token_tokenizers(segment_tokenizers, segments, known)
        warn_of_tokenizers(named, more, segments)
        if id2label is None and isinstance(labels, list | tuple) and labels:  # a dict is what was saved
            deprecate("labels", "1.0.0", "Pass id2label, a dict by code.")
        labels = check_label_names(id2label, labels, segments, known)
        names = {str(code): name for code, name in enumerate(labels)}
        self.register_to_config(labels=labels, id2label=names, segments=segments)
        self.register_to_config(lowres_factor=lowres_factor, resize_mode=resize_mode)
        factor = image_vq.downsample_factor if image_vq is not None else 1
        self.image_processor = VaeImageProcessor(vae_scale_factor=factor)
        # Pictures as they are, for pasting: in [0, 1], at their own size.
        self.pixel_processor = VaeImageProcessor(vae_scale_factor=1, do_normalize=False)

    def to_json_string(self) -> str:
        """The config as it is saved: without `labels`, as `DiffusionPipeline.download` takes lists for components."""
        config = json.loads(super().to_json_string())
        del config["labels"]
        for name in (*ENCODERS, "segment_tokenizers"):
            if config.get(name) == [None, None]:  # as version 0.1 wrote it, which doesn't know them
                del config[name]
        return json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    def _encode_inputs(
        self,
        task: Task,
        passed: dict[str, list],
        mask_image: torch.Tensor | None,
        strength: float | None,
        repeats: int,
        shapes: dict[str, tuple[int, ...]],
        guidance_scale: Scales = 1.0,
        negative: Iterable[str] = (),
    ) -> tuple[VQDiTPrefix | None, dict[str, torch.LongTensor], dict[str, Callable], int]:
        """The prefix of what is given, with those of its parts that guidance needs, the codes of what is known of the
        generated side, what finishes its segments' values ([`EncodedValue`]), and the tiles of each sample; for each
        sample `repeats` times. Of `negative` the values are negative prompts."""
        segments, known = self._segments_of(shapes), {}
        for name in negative:
            segments[name].argument = "negative_prompt"  # for messages
        encoded: dict[str, EncodedValue] = {}
        for name, value in passed.items():
            segment = segments[name]
            if name in task.given:
                encoded[name] = encode_value(segment, value)
            else:
                encoded[name] = encode_partial_value(segment, value, mask_image)
                known[name] = encoded[name].codes
        # What a segment's own value says of it comes before what another's does.
        order = sorted(encoded, key=lambda name: name in known)
        ends = [(encoded[name].finishes, encoded[name].finish) for name in order]
        finish = {name: end for name, end in ends if name is not None and end is not None}
        tiles = max((value.tiles for value in encoded.values()), default=1)
        for name, one in encoded.items():
            whole = task.generated == (one.finishes,) and not known
            if one.tiles > 1 and (not whole or one.tiles != tiles):
                raise ValueError(
                    f"{name!r} is so large that it makes {one.tiles} tiles, which only make {one.finishes!r}, "
                    f"not {'+'.join(task.generated)!r}, and nothing that is partly known"
                )
        given = {name: value for name, value in encoded.items() if name not in known}
        parts = [names for names in guidance_steps(task.given, guidance_scale)[0][:-1] if names]
        prefix = encode_given(self.transformer, given, parts) if given else None
        if strength is not None:
            name = next(name for name in known if segments[name].takes_mask)
            known[name] = self._forget(known[name], strength, prefix, name)
        if repeats > 1 and passed:
            # Each sample's tiles stay together.
            size = len(prefix) if prefix is not None else len(next(iter(known.values())))
            rows = torch.arange(size).unflatten(0, (-1, 1, tiles)).expand(-1, repeats, -1).flatten()
            prefix = prefix.select(rows) if prefix is not None else None
            known = {name: codes[rows] for name, codes in known.items()}
        return prefix, known, finish, tiles

    # -----------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    @with_own_state
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        class_labels: int | str | list[int | str] | None = None,
        *,
        output: str | None = None,
        mask_image: PipelineImageInput | None = None,
        strength: float | None = None,
        inputs: dict[str, Any] | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: Scales | None = None,
        num_inference_steps: int | str | None = None,
        temperature: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Codes | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["VQDiTPipeline", int, float, dict], dict]
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        class_label: int | str | list[int | str] | None = None,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        max_sequence_length: int | None = None,
        image_guidance_scale: float | None = None,
        gen_length: int | None = None,
        block_length: int | None = None,
        threshold: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_early_stop: bool = True,
        max_new_tokens: int | None = None,
    ) -> VQDiTPipelineOutput | tuple:
        """Generate.

        Args:
            prompt: given text or texts, of the segment ``text``, or without one of the only segment that has a text
                encoder. Where text is generated, one with blanks to fill in: each ``<mask>`` is one token, and what
                else it says stays. Of a text that is generated by blocks, its beginning, or one with blanks.
            image: given pictures: PIL, arrays (B, H, W, C) or tensors (B, C, H, W) in [0, 1]. Where a picture is
                generated, one to repaint (with `mask_image`), to repair (with `strength`), or else to enlarge, of any
                size, by a checkpoint that has ``image_lowres``.
            class_labels: given label or labels, by number or name. `class_label` is its older name.
            output: the segments to generate, such as ``"image"``, ``"text"`` or ``"image+text"``. By default those of
                the one task that the checkpoint knows from what is passed (``pipe.tasks``). Where there are several
                or none: ``"text"`` when a picture or a blank is given, without mask or strength, else ``"image"``.
            mask_image: one mask or one a picture, white where to repaint: of the one picture segment that is both
                passed and generated. The codes that white pixels change are generated; black pixels come out as they
                went in, and so does the size. Of a sound an array over its time, 1 where to fill in.
            strength: share of the codes to draw anew in (0, 1], those that fit the others worst
                ([`~likelihood.bounds.code_log_probabilities`]).
            inputs: what is given by segment, for segments other than ``text``, ``image`` and ``label``. Wherever a
                value is passed, here or in `prompt`, `image` or `class_labels`, its codes may be: int64 (B, *shape),
                the segment's ``vocab_size`` where a generated one is unknown; pictures' of another grid with its
                `height` and `width`.
            height, width: of generated pictures in pixels, and of given ones of a segment with buckets; multiples
                of a position's. By default the training's; of several the nearest in aspect ratio to the pictures
                passed, the same for all of a call. What is repainted is fitted into it, and comes out at its own size.
            guidance_scale: g of classifier-free guidance l_u + g (l_c - l_u) on the logits (Ho & Salimans 2022); 1 is
                none. By default 3 for pictures where the checkpoint knows the task without anything given, else 1. Or
                one a given segment, ``{"source": 1.5, "text": 3.0}``: l_u + 1.5 (l_s - l_u) + 3 (l_st - l_s) (Brooks
                et al. 2023), pictures first, then the others, each as in the dict. That needs the tasks ``->image``
                and ``source->image``, but for those that equal scales, or a first one of 1, leave out. 0 draws as if
                nothing were given: what switches guidance off is 1.
            num_inference_steps: steps of the sampler. By default 16 for pictures and labels, and as many as there are
                codes for texts alone, whose codes hang together more. ``"auto"`` takes as many as the `threshold` or
                the `entropy_bound` of the scheduler's sampler asks for: [`MaskedDiffusionScheduler.set_timesteps`].
            temperature: divides the logits. By default the scheduler's for pictures and for all that is generated
                from nothing, and 0, the likeliest code, for texts and labels that something is given for.
            num_images_per_prompt: samples for each given one, next to one another.
            generator: one for the batch, or one a sample, which then comes out as it would alone.
            latents: codes to start from, int64, the segment's ``vocab_size`` where unknown. Known codes stay. A
                tensor, or a dict of them where several segments are generated.
            output_type: ``"pil"``, ``"np"`` or ``"pt"``; ``"latent"`` returns codes, of texts and labels too.
            return_dict: whether to return a [`VQDiTPipelineOutput`] or a tuple (images, texts, labels); where ready
                codes or sounds are generated, (images, texts, labels, segments, audios, sampling_rate).
            callback_on_step_end: called as ``callback(pipeline, step, timestep, {"latents": codes})`` after each
                step; may return other codes. Setting ``pipeline._interrupt`` ends the sampling of all calls that run;
                codes still masked are then decoded as last predicted, and stay masked in ``"latent"`` output. Of texts
                by blocks `step` counts from 0 in each block, and the codes are the block's, of the texts that go on.
            callback_on_step_end_tensor_inputs: what it gets: ``["latents"]``, the default, or ``[]``.
            negative_prompt: text or texts that guidance leads away from, l_n + g (l_c - l_n): given in place of
                `prompt`, with all else that is given, where else nothing is. No unconditional task is needed.
            prompt_embeds: states (B, n, channels) of the text encoder in place of `prompt` ([`encode_prompt`]).
            prompt_attention_mask: (B, n), zero at their padding.
            negative_prompt_embeds, negative_prompt_attention_mask: the same in place of `negative_prompt`.
            max_sequence_length: tokens of a text for its text encoder; the rest is cut off. By default the training's.
            image_guidance_scale: that of given pictures on their own; `guidance_scale` is then that of the others.

            gen_length: of texts that are generated by blocks, the most codes after what is known, the end among them;
                by default up to the training's longest. `max_new_tokens` is transformers' name of it.
            block_length: codes of such a text that are drawn together, of which `num_inference_steps` are the steps;
                by default the training's.
            threshold: draws them with the scheduler's sampler ``"threshold"``, at this one.
            top_k, top_p: leave the likeliest codes only: so many, or those that have this probability together.
            eos_early_stop: whether a text ends with the block that has its end. Else it is drawn to its full length,
                and ends with its first end when it is decoded.

        Raises:
            ValueError: for an argument that doesn't fit, or a task that the checkpoint was not trained for.

        Examples:
        """
        tensor_inputs = callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)

        # 1. Check the arguments, and choose those left to us
        given = self._passed(prompt, image, class_labels, inputs, class_label)
        against = (negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask)
        given, negative, avoided = self._prompts(given, prompt_embeds, prompt_attention_mask, *against)
        task, passed, mask_image, batch_size, shapes = self.check_inputs(
            given,
            output,
            mask_image=mask_image,
            strength=strength,
            guidance_scale=guidance_scale,
            temperature=temperature,
            latents=latents,
            num_images_per_prompt=num_images_per_prompt,
            num_inference_steps=num_inference_steps,
            output_type=output_type,
            return_dict=return_dict,
            generator=generator,
            height=height,
            width=width,
            negative=avoided,
            image_guidance_scale=image_guidance_scale,
            callback_on_step_end=callback_on_step_end,
            tensor_inputs=tensor_inputs,
        )
        negative = self._read_negative(task, passed, negative, avoided)
        shapes = shapes | self._sequence_shapes(passed, negative, max_sequence_length)
        blocks = self._block_options(
            task, gen_length, max_new_tokens, block_length, threshold, top_k, top_p, eos_early_stop
        )
        if blocks is not None:
            num_inference_steps = num_inference_steps or blocks.block_length
        guidance_scale, num_inference_steps, temperature = self.default_settings(
            task, guidance_scale, num_inference_steps, temperature, bool(negative)
        )
        scheduler = self.scheduler if blocks is None else self._scheduler_of(blocks, temperature)
        scheduler.check_steps(num_inference_steps, "" if blocks is None else "pass threshold=0.5 with it, or ")
        guidance_scale = guidance_scales(task, guidance_scale, image_guidance_scale, self._segments)
        self._guidance_scale = guidance_scale

        # 2. Encode what is given, and what is known of the generated side
        prefix, known, finish, tiles = self._encode_inputs(
            task, passed, mask_image, strength, num_images_per_prompt, shapes, guidance_scale
        )
        prefix = self._with_negative(prefix, task, passed, negative, num_images_per_prompt, shapes)
        if isinstance(generator, list):
            generator = [one for one in generator for _ in range(tiles)]

        # 3. Start from masks, and from what is known
        codes = self.prepare_latents(task, batch_size * tiles, known or latents, shapes)

        # 4. Denoise
        run: dict[str, Any] = {"guidance_scale": guidance_scale, "temperature": temperature, "generator": generator}
        run |= {"callback": callback_on_step_end, "tensor_inputs": tensor_inputs}
        if blocks is not None:
            run |= {"options": blocks, "whole": latents is not None}
        denoise = self._denoise_at_once if blocks is None else self._denoise_blocks
        codes, predicted = denoise(codes, prefix, num_inference_steps, **run)

        # 5. Decode
        processors = self._segments
        if output_type == "latent":
            segments = codes
        else:
            codes = {n: torch.where(v == self._mask_token_id(n), predicted[n], v) for n, v in codes.items()}
            segments = {
                name: finish[name](value, num_images_per_prompt, output_type)
                if name in finish
                else processors[name].decode(value, output_type)
                for name, value in codes.items()
            }
        first: dict[str, Any] = {}
        for name, value in reversed(segments.items()):
            first |= processors[name].fields(value)
        self.maybe_free_model_hooks()
        found = VQDiTPipelineOutput(**first, segments=segments)
        return found if return_dict else found.as_tuple([processors[name].output_field for name in segments])

"""The denoiser: a diffusion transformer over segments of codes, or over continuous latents as in DiT."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils.accelerate_utils import apply_forward_hook

from ..tasks import canonical_task
from ..utils.checkpoint_mixin import ModelCheckpointMixin
from .block_causal import BlockCausal, equal_spans
from .cache_mixin import DenoiserCacheMixin
from .config_checks import check_transformer
from .generation_cache import GenerationCache
from .growth_mixin import GrowthMixin
from .layers import VQDiTModulation, VQDiTPrefix, check_kind, check_timestep, expand_segments, join_masks
from .outputs import VQDiTOutput
from .segment_layers import SegmentLayers, check_masked, ordered_codes
from .transformer_dit import LatentDiT
from .vqdit_block import VQDiTBlock


class VQDiTTransformer2DModel(
    ModelCheckpointMixin, GrowthMixin, DenoiserCacheMixin, BlockCausal, SegmentLayers, LatentDiT
):
    """A diffusion transformer that denoises segments of codes, given other segments.

    With ``segments=None`` it is diffusers' `DiTTransformer2DModel` over continuous latents, weights and outputs alike
    (see [`~models.transformer_dit.LatentDiT`]), but that labels are not dropped inside in training: stock DiT drops
    others in each block.
    With segments, the positions of the given ones attend to one another and never to generated ones; those attend to
    everything. So what a given segment contributes is the same at every sampling step: [`encode_prefix`] computes it
    once. No attention mask is needed.

    Codes of a segment are in [0, K), K being its ``vocab_size``; K itself is the mask. The mask is never predicted.

    Args:
        num_attention_heads, attention_head_dim, num_layers, dropout, attention_bias, activation_fn, norm_eps: as in
            `DiTTransformer2DModel`, whose other arguments hold for ``segments=None`` only.
        segments: name -> ``{"vocab_size": K, "shape": [n], [h, w] or [t, h, w]}``; names as in tasks: letters, digits
            and underscores. With ``"shared_with": other``, too, the segment's codes mean what the other's do (a second
            language, a smaller picture), and it uses the other's embeddings and head, and its patch.
            With ``"patch": [2, 2]``, dividing the shape, a position holds 2 x 2 codes. Each keeps its own mask and
            logits, so all that takes codes takes the same as without; a call costs as much as with a quarter of the
            codes. The codes of a patch share one codebook's embeddings and head, unless ``"separate_codebooks":
            True``: then each place in the patch has its own, as for 8 codebooks a frame in ``"shape": [frames, 8],
            "patch": [1, 8]``.
            With ``"centered_positions": True``, for two axes or three, codes on another grid than `shape` have
            positions by one scale for all axes, at which the longest sides of both, in codes, are equally long, and
            both have one middle: things keep their proportions at each aspect ratio. Without, the default, each axis
            is scaled to `shape` by itself.
            With ``"block_length": L``, dividing n of its shape [n], it is of any length, n usually at most, and is
            generated block by block, each given all before it ([`extend_prefix`]).
            ``{"channels": C, "shape": [n]}`` is a segment that is only given: states of a frozen encoder of texts or
            pictures, at most or about n of them.
        tasks: the tasks that the weights were trained for, such as ``["text->image", "->image"]``.
        time_conditioned: whether adaLN sees the time too. The share of masked codes already tells it.
        freq_shift: for ``segments=None``: s in the frequencies 10000^(-k / (128 - s)) of the time's embedding; 1 in
            stock DiT and 0 in the original one, whose ``norm_eps`` is 1e-6 besides.
        caption_channels: for ``segments=None``: channels of the text encoder's states; None for no captions.
        use_rotary_positional_embeddings: with segments: whether queries and keys are rotated by their position in
            their segment, too (Su et al. 2021). The added sine-cosine positions say where a position is, scaled to the
            segment's `shape`; these say how far two are apart. For grids and lengths of other sizes than were trained
            on.

    Raises:
        ValueError: if an argument has a wrong type, is out of range or doesn't fit the others; a segment lacks its
            size or shape, or has a name that no module can have; a task has a segment that there is not.
    """

    # What diffusers called DiT's checkpoints before `DiTTransformer2DModel`.
    _saved_class_names = ("Transformer2DModel",)
    _supports_gradient_checkpointing = True
    _no_split_modules = ["VQDiTBlock", "DiTBlock"]
    _repeated_blocks = ["VQDiTBlock", "DiTBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "code_embeddings", "proj_in", "caption_embedding", "norm"]

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        attention_bias: bool = True,
        sample_size: int = 32,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int | None = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_zero",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-5,
        segments: dict[str, dict[str, Any]] | None = None,
        tasks: list[str] | None = None,
        time_conditioned: bool = False,
        freq_shift: float = 1.0,
        caption_channels: int | None = None,
        use_rotary_positional_embeddings: bool = False,
    ) -> None:
        check_transformer(self.config)
        if segments is None:
            self._build_latent(
                freq_shift,
                caption_channels,
                num_attention_heads=num_attention_heads,
                attention_head_dim=attention_head_dim,
                in_channels=in_channels,
                out_channels=out_channels,
                num_layers=num_layers,
                dropout=dropout,
                norm_num_groups=norm_num_groups,
                attention_bias=attention_bias,
                sample_size=sample_size,
                patch_size=patch_size,
                activation_fn=activation_fn,
                num_embeds_ada_norm=num_embeds_ada_norm,
                upcast_attention=upcast_attention,
                norm_type=norm_type,
                norm_elementwise_affine=norm_elementwise_affine,
                norm_eps=norm_eps,
            )
            return
        super(DiTTransformer2DModel, self).__init__()
        dim = num_attention_heads * attention_head_dim
        self.inner_dim = dim
        self.gradient_checkpointing = False
        # 1. Codes and conditioning
        self._build_embeddings(segments, dim)
        # One row a segment and role: first the given ones, then the generated ones.
        self.segment_embedding = nn.Embedding(2 * len(segments), dim)
        if time_conditioned:
            self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
            self.time_embedding = TimestepEmbedding(256, dim)
        # 2. Blocks
        self.transformer_blocks = nn.ModuleList(
            VQDiTBlock(dim, num_attention_heads, attention_head_dim, attention_bias, dropout, activation_fn, norm_eps)
            for _ in range(num_layers)
        )
        # 3. Output
        self.norm_out = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.adaln_out = nn.Linear(dim, 2 * dim)
        self._build_heads(segments, dim)
        self._initialize_weights()

    def register_to_config(self, **kwargs: Any) -> None:
        """Put arguments into the config, tasks as [`Task`] writes them: they are compared as strings."""
        tasks = kwargs.get("tasks")
        if isinstance(tasks, list | tuple):
            kwargs["tasks"] = [canonical_task(task) for task in tasks]
        super().register_to_config(**kwargs)

    def _initialize_weights(self) -> None:
        """DiT's initialisation: Xavier matrices, zero modulation and heads; the first loss is log K exactly."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for layer in [block.adaln for block in self.transformer_blocks] + [self.adaln_out]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self._initialize_segment_layers()
        nn.init.normal_(self.segment_embedding.weight, std=0.5)

    # -----------------------------------------------------------------------------------------------------------------
    # Parts of the forward pass

    def _conditioning(
        self, codes: dict[str, torch.Tensor], generated: bool, timestep: torch.Tensor | None = None
    ) -> torch.Tensor:
        """SiLU of the conditioning (1 or B, segments, D), as adaLN takes it."""
        order = sorted(self.config.segments)
        size, device = next((len(value), value.device) for value in codes.values())
        # The codes' device, as offloaded weights are elsewhere until the layer is called. Filled there: a copy would
        # wait for a GPU, and can't be captured into a CUDA graph.
        numbers = [order.index(name) + len(order) * generated for name in codes]
        rows = torch.cat([torch.full((1,), number, device=device) for number in numbers])
        conditioning = self.segment_embedding(rows)[None]  # (1, segments, D)
        if self.config.time_conditioned and generated:
            if timestep is None:
                raise ValueError("timestep is None, but this model is time_conditioned: give times (B,) in [0, 1]")
            blocks = timestep.shape[1] if isinstance(timestep, torch.Tensor) and timestep.ndim == 2 else 1
            times = check_timestep(timestep, size * blocks).to(device).float()
            frequencies = self.time_proj(1000.0 * times).to(conditioning)
            # (B, segments or blocks, D)
            conditioning = conditioning + self.time_embedding(frequencies).unflatten(0, (-1, blocks))
        return F.silu(conditioning)

    def _block(self, block: VQDiTBlock, *args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)

    def _run_blocks(
        self,
        hidden: torch.Tensor,
        conditioning: torch.Tensor,
        lengths: tuple[int, ...],
        prefix: VQDiTPrefix | None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        modulation: VQDiTModulation | None,
        kept: list[tuple[torch.Tensor, torch.Tensor]] | None,
        mask: torch.BoolTensor | None = None,
    ) -> torch.Tensor:
        """Hidden states (B, N, D) of generated positions after all blocks, whose keys and values go to `kept`. The
        attention's mask is by default what the prefix has of padding."""
        if mask is None and prefix is not None and prefix.mask is not None:
            seen = prefix.mask.new_ones(len(prefix), 1, 1, sum(lengths))
            mask = torch.cat([prefix.mask, seen], dim=-1)  # (B, 1, 1, S + N)
        for layer, block in enumerate(self.transformer_blocks):
            memory = (prefix.keys[layer], prefix.values[layer]) if prefix is not None else None
            own = modulation.blocks[layer] if modulation is not None else None
            hidden, key, value = self._block(block, hidden, conditioning, lengths, memory, False, rotary, mask, own)
            if kept is not None:
                kept.append((key, value))
        return hidden

    @apply_forward_hook
    def encode_prefix(
        self,
        given: dict[str, torch.Tensor],
        given_mask: dict[str, torch.Tensor] | None = None,
        check_values: bool = True,
    ) -> VQDiTPrefix:
        """Keys and values of the given segments at every layer.

        Args:
            given: name -> codes (B, *shape), or states (B, n, channels) of an encoder, n of any size; at least one
                segment.
            given_mask: name -> (B, n), zero at padding, for some of the given segments; n their positions. What is
                padding is seen by nothing.
            check_values: as in [`forward`].

        Raises:
            ValueError: for no segment or an unknown one, a wrong shape or dtype, or a code out of range.
        """
        given = ordered_codes(given, self.config.segments, "given", check_values)
        hidden_states, lengths, rotary = self._embed(given)  # (B, S, D)
        mask = join_masks(
            {} if given_mask is None else given_mask, tuple(given), lengths, hidden_states
        )  # (B, 1, 1, S), or None
        within = None
        if mask is not None:
            # Padding sees itself as well: a row of the softmax must not be empty.
            within = mask | torch.eye(sum(lengths), dtype=torch.bool, device=mask.device)  # (B, 1, S, S)
        conditioning = self._conditioning(given, generated=False)
        keys, values = [], []
        for block in self.transformer_blocks:
            last = block is self.transformer_blocks[-1]
            hidden_states, key, value = self._block(
                block, hidden_states, conditioning, lengths, None, last, rotary, within
            )
            keys.append(key)
            values.append(value)
        return VQDiTPrefix(tuple(given), keys, values, mask)

    @apply_forward_hook
    def encode_modulation(self, hidden_states: dict[str, torch.LongTensor]) -> VQDiTModulation:
        """adaLN's shifts, scales and gates of the generated segments, for reuse at every sampling step.

        Args:
            hidden_states: name -> codes (B, *shape) of the generated segments; their values are not read.

        Raises:
            ValueError: for a model that is time_conditioned, or wrong codes as in [`forward`].
        """
        if self.config.time_conditioned:
            raise ValueError("encode_modulation: the model is time_conditioned, so that adaLN is another at each time")
        codes = ordered_codes(hidden_states, self.config.segments, "hidden_states", check_values=False)
        conditioning = self._conditioning(codes, generated=True)  # (1, segments, D)
        # Through the blocks' own calls, as weights that are offloaded by blocks are elsewhere until then.
        blocks = [block(None, conditioning) for block in self.transformer_blocks]
        return VQDiTModulation(tuple(codes), conditioning, blocks, self.adaln_out(conditioning))

    def _prefix_of(
        self,
        codes: dict[str, torch.LongTensor],
        given: dict[str, torch.Tensor] | None,
        given_mask: dict[str, torch.Tensor] | None,
        prefix: VQDiTPrefix | None,
        check_values: bool,
    ) -> VQDiTPrefix | None:
        """What the generated segments see, none of which may be among the given ones."""
        has_given = given is not None and len(given) > 0
        if has_given and prefix is not None:
            raise ValueError("give given or prefix, not both")
        if given_mask is not None and len(given_mask) and not has_given:
            raise ValueError("given_mask needs given; a prefix has its own")
        if has_given:
            prefix = self.encode_prefix(given, given_mask, check_values)
        if prefix is not None and (both := set(codes) & set(prefix.names)):
            raise ValueError(f"the segments {sorted(both)} are given and generated at once")
        return prefix

    # -----------------------------------------------------------------------------------------------------------------

    def forward(
        self,
        hidden_states: torch.Tensor | dict[str, torch.LongTensor],
        timestep: torch.Tensor | None = None,
        class_labels: torch.LongTensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        *,
        given: dict[str, torch.Tensor] | None = None,
        given_mask: dict[str, torch.Tensor] | None = None,
        prefix: VQDiTPrefix | None = None,
        masked: dict[str, torch.BoolTensor] | None = None,
        clean: dict[str, torch.LongTensor] | None = None,
        with_unconditional: bool = False,
        modulation: VQDiTModulation | None = None,
        cache: GenerationCache | None = None,
        check_values: bool = True,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> VQDiTOutput | Transformer2DModelOutput | tuple:
        """Predict the codes of the generated segments.

        Args:
            hidden_states: name -> codes (B, *shape) of the generated segments, K where masked. Without segments,
                latents (B, C, H, W), and the arguments are those of `DiTTransformer2DModel`.
            timestep: times (B,) in [0, 1]; read by a time-conditioned model only. With `clean`, also (B, blocks).
            class_labels, cross_attention_kwargs: for ``segments=None`` only; a label is a given segment here.
            given: name -> codes (B, *shape) of the given segments, or states (B, n, channels) of an encoder.
            given_mask: name -> (B, n), zero at padding, for some of the given segments: see [`encode_prefix`].
            prefix: what [`encode_prefix`] made of them, in place of `given`; without segments, what
                [`encode_caption`] made of a caption, in place of `encoder_hidden_states`.
            masked: name -> (B, N) bool, N = prod(shape); logits are then computed at these positions only.
            clean: the one generated segment -> its codes (B, n) without masks, n whole blocks: all blocks are then
                predicted in one pass, each given those before it as they are here. For training and likelihoods.
            with_unconditional: whether to predict without what is given as well, as guidance needs it, in the same
                pass: the logits then have twice the rows, first those with it.
            modulation: what [`encode_modulation`] made of the same segments; None makes it anew.
            cache: the run's, from [`new_cache`], to reuse what has not changed since its last call; not with `masked`.
            check_values: whether to look at the codes' values, which waits for the device. A loop whose codes come
                from a scheduler may check them where they enter.
            encoder_hidden_states, encoder_attention_mask: for ``segments=None`` only: see [`encode_caption`].

        Returns:
            [`VQDiTOutput`], or a tuple with its dict.

        Raises:
            ValueError: for an unknown segment or one on both sides, a wrong shape or dtype, or a code out of range.
        """
        if self.config.segments is None:
            others = (given, given_mask, masked, clean, modulation, cache)
            if with_unconditional or any(one is not None for one in others):
                raise ValueError(
                    "clean, given, given_mask, masked, with_unconditional, modulation and cache need a model with "
                    "segments; this one has segments=None"
                )
            if encoder_hidden_states is not None:
                prefix = self._caption_prefix(prefix, encoder_hidden_states, encoder_attention_mask)
            return self._forward_latent(
                hidden_states, timestep, class_labels, cross_attention_kwargs, return_dict, prefix
            )
        if class_labels is not None or cross_attention_kwargs is not None:
            raise ValueError("class_labels and cross_attention_kwargs need segments=None; pass labels in given")
        if encoder_hidden_states is not None:
            raise ValueError(
                "encoder_hidden_states needs segments=None; pass texts in given, as codes, or as states of a segment "
                "that has channels"
            )
        check_kind("prefix", prefix, VQDiTPrefix, "encode_prefix")
        check_kind("modulation", modulation, VQDiTModulation, "encode_modulation")
        check_kind("cache", cache, GenerationCache, "new_cache")
        codes = ordered_codes(hidden_states, self.config.segments, "hidden_states", check_values)
        check_masked(masked, codes)

        # 1. Given segments, and clean blocks
        prefix = self._prefix_of(codes, given, given_mask, prefix, check_values)
        if with_unconditional and prefix is None:
            raise ValueError("with_unconditional=True needs given or prefix: there is nothing to leave out")
        mask = None
        if clean is not None:
            prefix, mask = self._clean_blocks(codes, clean, prefix, with_unconditional or bool(modulation or cache))

        # 2. Generated segments
        hidden, lengths, rotary = self._embed(codes, prefix.offsets if prefix is not None else {})  # (B, N, D)
        if prefix is not None and len(prefix.keys[0]) != len(hidden):
            raise ValueError(f"given or prefix has {len(prefix.keys[0])} samples, but hidden_states {len(hidden)}")
        if modulation is None:
            conditioning = self._conditioning(codes, generated=True, timestep=timestep)
        elif modulation.names != tuple(codes):
            raise ValueError(f"modulation is of the segments {list(modulation.names)}, but these are {list(codes)}")
        else:
            conditioning = modulation.conditioning
        if cache is not None and not cache.is_due(codes, masked, with_unconditional):
            sample = cache.predict(self, codes, hidden, lengths, rotary, prefix, conditioning, modulation)
            return VQDiTOutput(sample=sample) if return_dict else (sample,)
        if with_unconditional:
            hidden = torch.cat([hidden, hidden])  # (2B, N, D); the prefix is the first B rows' only
            conditioning = torch.cat([conditioning] * 2) if len(conditioning) > 1 else conditioning
            masked = None if masked is None else {name: torch.cat([where, where]) for name, where in masked.items()}
        spans = lengths if conditioning.shape[1] == len(lengths) else equal_spans(lengths, conditioning.shape[1])
        kept: list[tuple[torch.Tensor, torch.Tensor]] | None = None if cache is None else []
        hidden = self._run_blocks(hidden, conditioning, spans, prefix, rotary, modulation, kept, mask)

        # 3. Heads
        out = self.adaln_out(conditioning) if modulation is None else modulation.out  # (1 or B, segments, 2D)
        if spans != lengths:
            out = expand_segments(out, spans)  # (B, N, 2D)
        sample = {}
        for index, (name, part) in enumerate(zip(codes, hidden.split(lengths, dim=1), strict=True)):
            one = out[:, index : index + 1] if spans == lengths else out
            shift, scale = one.chunk(2, dim=-1)  # (1 or B, 1 or N, D)
            where = masked[name] if masked is not None else None
            sample[name] = self._logits(name, part, shift, scale, codes[name].shape[1:], where)
        if cache is not None:
            cache.store(codes, kept or [], sample)
        return VQDiTOutput(sample=sample) if return_dict else (sample,)

"""DiT over continuous latents: diffusers' weights, its conditioning computed once, captions as a given prefix."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, BasicTransformerBlock
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils.accelerate_utils import apply_forward_hook

from ..utils.weight_files import check_converted
from .attention_processor import DiTAttnProcessor
from .layers import VQDiTPrefix, check_timestep, modulate, sincos_positions


class DiTBlock(BasicTransformerBlock):
    """Stock DiT's block, its modules and weights, with the conditioning computed outside and room for a prefix."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor,
        prefix: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """Hidden states (B, N, D), with a conditioning (1 or B, D) that went through SiLU."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.norm1.linear(conditioning)[:, None].chunk(6, dim=-1)
        normed = modulate(self.norm1.norm, hidden_states, shift1, scale1)  # (B, N, D)
        options = dict(cross_attention_kwargs or {})
        if prefix is not None:
            options["prefix"] = prefix
        attended = self.attn1(normed, attention_mask=attention_mask, **options)  # (B, N, D)
        hidden_states = torch.addcmul(hidden_states, gate1, attended)
        normed = modulate(self.norm3, hidden_states, shift2, scale2)
        return torch.addcmul(hidden_states, gate2, self.ff(normed))

    def keys_and_values(
        self, hidden_states: torch.Tensor, conditioning: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, N, heads, head_dim) that the block's attention sees at these positions."""
        shift, scale = self.norm1.linear(conditioning)[:, None].chunk(6, dim=-1)[:2]
        normed = modulate(self.norm1.norm, hidden_states, shift, scale)
        key, value = self.attn1.to_k(normed), self.attn1.to_v(normed)
        return key.unflatten(-1, (self.attn1.heads, -1)), value.unflatten(-1, (self.attn1.heads, -1))


class LatentDiT(DiTTransformer2DModel, AttentionMixin, PeftAdapterMixin):
    """The part of [`VQDiTTransformer2DModel`] with ``segments=None``; its state dict is `DiTTransformer2DModel`'s.

    Stock DiT has a copy of the time and label embedder in every block. Where the copies are equal, as in all weights
    that come from the original DiT, [`share_embedder`] keeps the first and the conditioning is computed once.

    A caption is a given prefix, as in the model with segments: its states pass through the same blocks among
    themselves, with a conditioning of their own instead of time and label, and the latents attend to them. So they
    are computed once for all sampling steps, no block gets new weights, every token counts (a pooled embedding in
    adaLN would lose their order), and without a caption the model is DiT exactly.
    """

    def _build_latent(self, freq_shift: float, caption_channels: int | None, **dit: Any) -> None:
        """DiT's modules under stock DiT's names, the caption's if there is one, and DiT's initialisation."""
        num_layers, dim = dit["num_layers"], dit["num_attention_heads"] * dit["attention_head_dim"]
        super().__init__(**{**dit, "num_layers": 0})
        self.register_to_config(num_layers=num_layers)  # the parent has written what it was given
        self.transformer_blocks = nn.ModuleList(
            DiTBlock(
                dim,
                dit["num_attention_heads"],
                dit["attention_head_dim"],
                dropout=dit["dropout"],
                activation_fn=dit["activation_fn"],
                num_embeds_ada_norm=dit["num_embeds_ada_norm"],
                attention_bias=dit["attention_bias"],
                upcast_attention=dit["upcast_attention"],
                norm_type=dit["norm_type"],
                norm_elementwise_affine=dit["norm_elementwise_affine"],
                norm_eps=dit["norm_eps"],
            )
            for _ in range(num_layers)
        )
        for block in self.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = freq_shift
            # Each block would drop other labels. They are dropped once, outside, by who trains.
            block.norm1.emb.class_embedder.dropout_prob = 0.0
        if caption_channels is not None:
            self.caption_norm = nn.LayerNorm(caption_channels, elementwise_affine=False, eps=1e-6)
            self.caption_projection = PixArtAlphaTextProjection(caption_channels, dim)
            self.caption_embedding = nn.Parameter(torch.zeros(1, dim))
        self.set_attn_processor(DiTAttnProcessor())
        self._initialize_latent_weights()

    def _initialize_latent_weights(self) -> None:
        """The original DiT's initialisation: Xavier matrices, zero modulation and output; one embedder for all."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.pos_embed.proj.weight.view(len(self.pos_embed.proj.weight), -1))
        nn.init.zeros_(self.pos_embed.proj.bias)
        first = self.transformer_blocks[0].norm1.emb
        for weight in (
            first.class_embedder.embedding_table.weight,
            first.timestep_embedder.linear_1.weight,
            first.timestep_embedder.linear_2.weight,
        ):
            nn.init.normal_(weight, std=0.02)
        for block in self.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(first.state_dict())
        for layer in [block.norm1.linear for block in self.transformer_blocks] + [self.proj_out_1, self.proj_out_2]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    # -----------------------------------------------------------------------------------------------------------------
    # One embedder

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "LatentDiT":
        """`ModelMixin.from_pretrained`; blocks whose embedders are equal share one from then on."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.segments is None and model._embedders_are_equal():
            model.share_embedder()
        return loaded

    @classmethod
    def from_original(
        cls,
        checkpoint: str | Path | Mapping[str, torch.Tensor],
        *,
        num_attention_heads: int | None = None,
        use_ema: bool = True,
    ) -> Self:
        """The model of the original DiT's code (Peebles & Xie 2023) that a checkpoint holds, with its outputs.

        Args:
            checkpoint: a ``.pt`` file of weights, or of a training run with ``"ema"`` and ``"model"``; or what it
                holds. Files are read without running code that they may hold.
            num_attention_heads: not written in the file; by default that of the published size of this width.
            use_ema: whether to take a training run's moving average or its last weights.

        Raises:
            ValueError: if the file can't be read safely and whole, the weights are not DiT's, or
                `num_attention_heads` can't be known.
        """
        # By its full name, as in ImageVQModel.from_original.
        load_original = import_module("diffusers_vqdit.interop.dit").load_original

        config, state_dict = load_original(checkpoint, num_attention_heads=num_attention_heads, use_ema=use_ema)
        model = cls(**config)
        check_converted(model.state_dict(), state_dict, "DiT")
        model.load_state_dict(state_dict)
        return model.share_embedder().eval()

    def _embedders_are_equal(self) -> bool:
        first, *others = (block.norm1.emb for block in self.transformer_blocks)
        return all(
            a.device == b.device and a.device.type != "meta" and torch.equal(a, b)
            for other in others
            if other is not None
            for a, b in zip(first.state_dict().values(), other.state_dict().values(), strict=True)
        )

    def share_embedder(self) -> Self:
        """Keep the first block's embedder of time and label for all blocks: fewer weights, computed once.

        State dicts stay as stock DiT's, with a copy in each block; copies that differ are refused on load. Call it
        before an optimizer is made: as in the original DiT, training then trains one embedder.

        Returns:
            the model itself.

        Raises:
            ValueError: if the blocks' embedders differ, or the model has segments.
        """
        if self.config.segments is not None:
            raise ValueError("share_embedder needs segments=None; a model with segments has one embedder already")
        if not self._embedders_are_equal():
            raise ValueError(
                "the blocks' embedders of time and label differ, so that they can't share one; leave them as they are"
            )
        if self.has_shared_embedder:
            return self
        for block in self.transformer_blocks[1:]:
            block.norm1.emb = None
        self.register_state_dict_post_hook(_add_copies)
        self.register_load_state_dict_pre_hook(_drop_copies)
        return self

    @property
    def has_shared_embedder(self) -> bool:
        """Whether all blocks use the first one's embedder."""
        return all(block.norm1.emb is None for block in self.transformer_blocks[1:])

    # -----------------------------------------------------------------------------------------------------------------
    # Parts of the forward pass

    def _block_latent(self, block: DiTBlock, *args: Any) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)

    def _check_latent(self, latents: torch.Tensor, timestep: Any, class_labels: torch.Tensor | None) -> None:
        channels, patch = self.config.in_channels, self.config.patch_size
        if not isinstance(latents, torch.Tensor) or latents.ndim != 4 or latents.shape[1] != channels:
            got = tuple(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
            raise ValueError(f"hidden_states must be latents (B, {channels}, H, W) where segments=None, got {got}")
        if latents.shape[2] % patch or latents.shape[3] % patch:
            raise ValueError(
                f"hidden_states' height and width must be multiples of patch_size={patch}, got {tuple(latents.shape)}"
            )
        if timestep is None:
            raise ValueError("timestep is None; give timesteps (B,), in the scheduler's units")
        check_timestep(timestep, len(latents))
        if class_labels is not None and class_labels.numel() and not torch.compiler.is_compiling():
            # Checked here, as a wrong index on a GPU kills the process's whole context.
            low, high = torch.stack(class_labels.aminmax()).tolist()
            null = self.config.num_embeds_ada_norm
            if low < 0 or high > null:
                raise ValueError(f"class_labels must be in [0, {null}], {null} being no label; got {low} to {high}")

    @apply_forward_hook
    def encode_caption(
        self, encoder_hidden_states: torch.Tensor, encoder_attention_mask: torch.Tensor | None = None
    ) -> VQDiTPrefix:
        """Keys and values of captions at every layer, for reuse at every sampling step.

        Args:
            encoder_hidden_states: states (B, S, caption_channels) of a text encoder.
            encoder_attention_mask: (B, S), zero at padding; a row of zeros is a sample without a caption.

        Raises:
            ValueError: if the model has no ``caption_channels``, or for a wrong shape.
        """
        channels = self.config.caption_channels
        if channels is None:
            raise ValueError("encoder_hidden_states need a model with caption_channels; this one has None")
        states, mask = encoder_hidden_states, encoder_attention_mask
        if states.ndim != 3 or states.shape[2] != channels:
            raise ValueError(f"encoder_hidden_states must have shape (B, S, {channels}), got {tuple(states.shape)}")
        if mask is not None:
            if mask.shape != states.shape[:2]:
                raise ValueError(
                    f"encoder_attention_mask must have shape {tuple(states.shape[:2])}, got {tuple(mask.shape)}"
                )
            mask = mask.bool()
            mask = None if mask.all() else mask[:, None, None, :]  # (B, 1, 1, S); without one, attention is fused
        hidden = self.caption_projection(self.caption_norm(states.to(self.caption_embedding.dtype)))  # (B, S, D)
        length = hidden.shape[1]
        hidden = hidden + sincos_positions((length,), (length,), self.inner_dim, hidden)
        conditioning = F.silu(self.caption_embedding)  # (1, D)
        within = None
        if mask is not None:
            # Padding sees itself as well: a row of the softmax must not be empty.
            within = mask | torch.eye(length, dtype=torch.bool, device=mask.device)  # (B, 1, S, S)
        keys, values = [], []
        with self.hooks_context("caption"):
            for block in self.transformer_blocks:
                key, value = block.keys_and_values(hidden, conditioning)
                keys.append(key)
                values.append(value)
                if block is not self.transformer_blocks[-1]:
                    hidden = self._block_latent(block, hidden, conditioning, None, within)
        return VQDiTPrefix(("caption",), keys, values, mask)

    def _caption_prefix(
        self, prefix: VQDiTPrefix | None, states: torch.Tensor, mask: torch.Tensor | None
    ) -> VQDiTPrefix:
        """The prefix of a caption's states, where there is none yet."""
        if prefix is not None:
            raise ValueError("give encoder_hidden_states or prefix, not both")
        return self.encode_caption(states, mask)

    def _forward_latent(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | None,
        class_labels: torch.LongTensor | None,
        cross_attention_kwargs: dict[str, Any] | None,
        return_dict: bool,
        prefix: VQDiTPrefix | None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """DiT (Peebles & Xie 2023, figure 3): latents (B, C, H, W) to a prediction (B, out_channels, H, W)."""
        self._check_latent(hidden_states, timestep, class_labels)
        batch_size, _, height, width = hidden_states.shape
        if prefix is not None and len(prefix) != batch_size:
            raise ValueError(f"the caption has {len(prefix)} samples, but hidden_states {batch_size}")
        if class_labels is None:
            class_labels = torch.full((batch_size,), self.config.num_embeds_ada_norm, device=hidden_states.device)
        timestep = torch.as_tensor(timestep).reshape(-1).expand(batch_size)

        # 1. Patches, and what the latents may see of the prefix
        # Contiguous, or each of the blocks' norms would copy what the convolution has laid out by channels.
        hidden = self.pos_embed(hidden_states).contiguous()  # (B, N, D)
        mask = None
        if prefix is not None and prefix.mask is not None:
            own = prefix.mask.new_ones(batch_size, 1, 1, hidden.shape[1])
            mask = torch.cat([prefix.mask, own], dim=-1)  # (B, 1, 1, S + N)

        # 2. Conditioning: one for all blocks or, where their weights differ, one for each
        embedders = [block.norm1.emb for block in self.transformer_blocks if block.norm1.emb is not None]
        conditionings = [F.silu(emb(timestep, class_labels, hidden_dtype=hidden.dtype)) for emb in embedders]  # (B, D)
        first = conditionings[0]
        if self.has_shared_embedder:
            conditionings = [first] * len(self.transformer_blocks)

        # 3. Blocks
        for layer, (block, conditioning) in enumerate(zip(self.transformer_blocks, conditionings, strict=True)):
            memory = (prefix.keys[layer], prefix.values[layer]) if prefix is not None else None
            hidden = self._block_latent(block, hidden, conditioning, memory, mask, cross_attention_kwargs)

        # 4. Output
        shift, scale = self.proj_out_1(first)[:, None].chunk(2, dim=-1)  # (B, 1, D)
        hidden = self.proj_out_2(modulate(self.norm_out, hidden, shift, scale))  # (B, N, p p out_channels)
        patch = self.config.patch_size
        grid = hidden.unflatten(1, (height // patch, width // patch)).unflatten(-1, (patch, patch, -1))
        sample = torch.einsum("nhwpqc->nchpwq", grid).reshape(batch_size, -1, height, width)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def _add_copies(module: LatentDiT, state_dict: dict[str, torch.Tensor], prefix: str, local_metadata: dict) -> None:
    """The first block's embedder once for each block, as stock DiT has it; not where training has it in shards, whose
    checkpoints look for a module by each name."""
    first = f"{prefix}transformer_blocks.0.norm1.emb."
    for name in [name for name in state_dict if name.startswith(first) and not hasattr(state_dict[name], "to_local")]:
        for layer in range(1, len(module.transformer_blocks)):
            copy = f"{prefix}transformer_blocks.{layer}.norm1.emb.{name.removeprefix(first)}"
            # safetensors refuses tensors that share memory.
            state_dict[copy] = state_dict[name].detach().clone()


def _drop_copies(
    module: LatentDiT,
    state_dict: dict[str, torch.Tensor],
    prefix: str,
    local_metadata: dict,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Take the other blocks' embedders out of what is loaded, if they equal the first one's."""
    first = f"{prefix}transformer_blocks.0.norm1.emb."
    for name in [name for name in state_dict if name.startswith(first)]:
        for layer in range(1, len(module.transformer_blocks)):
            copy = state_dict.pop(f"{prefix}transformer_blocks.{layer}.norm1.emb.{name.removeprefix(first)}", None)
            if copy is not None and not torch.equal(copy.to(state_dict[name]), state_dict[name]):
                error_msgs.append(
                    f"block {layer}'s embedder differs from the first one's, which this model's blocks share; load "
                    "these weights with from_pretrained, or into a model whose embedder is not shared"
                )

"""The text tokenizer: the tokens of a caption to a fixed grid of codes and back."""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook

from ..utils.checkpoint_mixin import ModelCheckpointMixin
from .config_checks import check_text_vq
from .outputs import CastableOutput
from .quantizers.residual import ResidualVectorQuantizer
from .quantizers.vector import RETIRED, VectorQuantizer


SIF_SMOOTHING = 1e-3  # a of Arora et al. 2017, who found 1e-3 to 1e-4 best


@dataclass
class TextVQOutput(CastableOutput):
    """Output of [`TextVQModel`].

    Args:
        logits (`torch.Tensor` of shape `(B, T, V)`): scores of the tokens.
        commit_loss (`torch.Tensor`): codebook and commitment loss, a scalar.
        codes (`torch.LongTensor` of shape `(B, L)`, or `(B, L, q)` of residual codes): in [0, num_codes).
        usage, perplexity (`torch.Tensor`): of the batch's codes, means over the codebooks; `(q,)` of residual codes,
            one a level.
    """

    logits: torch.Tensor
    commit_loss: torch.Tensor | None = None
    codes: torch.LongTensor | None = None
    usage: torch.Tensor | None = None
    perplexity: torch.Tensor | None = None


class ConvBlock(nn.Module):
    """Pre-norm residual block over a window of `kernel_size` positions."""

    def __init__(self, hidden_size: int, kernel_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.conv = nn.Conv1d(hidden_size, 2 * hidden_size, kernel_size, padding=kernel_size // 2)
        self.proj = nn.Linear(2 * hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, N, H) to (B, N, H)."""
        inner = self.conv(self.norm(hidden_states).transpose(1, 2)).transpose(1, 2)  # (B, N, 2H)
        return hidden_states + self.proj(F.gelu(inner))


class TextVQModel(ModelCheckpointMixin, ModelMixin, ConfigMixin):
    """A VQ-VAE over token ids.

    `downsample_factor` tokens share a position, so a caption of up to `max_length` tokens has L = max_length /
    downsample_factor of them. With ``quantizer_type="rvq"`` a position has q = `num_quantizers` residual codes
    (Zeghidour et al. 2021, SoundStream, section III.C) and a caption the codes (B, L, q): a segment of shape [L, q],
    whose transformer puts a position's codes into one position. With ``"vq"`` it has one, or `num_codebooks` residual
    codes side by side: (B, L * num_codebooks).

    Each of the r = `downsample_factor` tokens of a position has `code_dim` / r of the channels that ``"rvq"``
    quantizes, and level i of q sees those of the first ceil(i r / q) tokens. So what its code says of these doesn't
    hang on the tokens after them, and tokens that were never seen side by side come back too.

    Encoder and decoder see a window of some tokens only. What a code means then hardly depends on the rest of the
    caption, so captions that were never seen come back as well.

    Args:
        vocab_size: number V of tokens.
        max_length: number T of token positions; shorter captions are padded.
        pad_token_id: the token of padding.
        downsample_factor: tokens a position.
        num_codebooks: codes a position with ``"vq"``.
        num_codes: size K of the codebook; residual codebooks are told apart by their place.
        code_dim: length of a code vector.
        hidden_size, num_layers, kernel_size: width, depth and window (odd) of the encoder and the decoder.
        beta, codebook_norm, codebook_update, codebook_init, ema_decay, restart_threshold: see
            [`~models.quantizers.VectorQuantizer`]. Several codes a position need ``codebook_norm="none"``.
        quantizer_type: ``"vq"`` or ``"rvq"``.
        num_quantizers: codes a position with ``"rvq"``.

    Raises:
        ValueError: if an argument has a wrong type, is out of range or doesn't fit the others.
    """

    _supports_gradient_checkpointing = True
    # As `VQModel` has it: the codebook is read outside of a call of its own.
    _skip_layerwise_casting_patterns = ["quantizers", "norm"]
    _supports_group_offloading = False

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 2048,
        max_length: int = 24,
        pad_token_id: int = 0,
        downsample_factor: int = 1,
        num_codebooks: int = 1,
        num_codes: int = 2048,
        code_dim: int = 16,
        hidden_size: int = 128,
        num_layers: int = 1,
        kernel_size: int = 1,
        beta: float = 0.25,
        codebook_norm: str = "l2",
        codebook_update: str = "ema",
        codebook_init: str = "data",
        ema_decay: float = 0.99,
        restart_threshold: float = 0.05,
        quantizer_type: str = "vq",
        num_quantizers: int = 1,
    ) -> None:
        super().__init__()
        check_text_vq(self.config)
        patch = downsample_factor * hidden_size
        self.token_embedding = nn.Embedding(vocab_size, hidden_size)
        self.encoder = nn.ModuleList(ConvBlock(hidden_size, kernel_size) for _ in range(num_layers))
        number = num_codebooks * num_quantizers
        if quantizer_type == "rvq":
            width, channels = hidden_size, code_dim // downsample_factor  # token by token
            seen = [-(-downsample_factor * level // number) * channels for level in range(1, number + 1)]
        else:
            width, channels, seen = patch, code_dim, [code_dim] * number
        self.to_code = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, channels))
        # Residual codes are Euclidean: a norm keeps the latents' scale from drifting away from the codebook's.
        self.code_norm = nn.Identity() if codebook_norm == "l2" else nn.LayerNorm(channels, elementwise_affine=False)
        self.quantizers = ResidualVectorQuantizer(
            VectorQuantizer(
                num_codes,
                dim,
                beta=beta,
                codebook_norm=codebook_norm,
                codebook_update=codebook_update,
                codebook_init=codebook_init,
                ema_decay=ema_decay,
                restart_threshold=restart_threshold,
            )
            for dim in seen
        )
        self.from_code = nn.Linear(code_dim, patch)
        self.decoder = nn.ModuleList(ConvBlock(hidden_size, kernel_size) for _ in range(num_layers))
        self.norm_out = nn.LayerNorm(hidden_size)
        self.to_logits = nn.Linear(hidden_size, vocab_size)
        self.gradient_checkpointing = False

    @property
    def num_codes(self) -> int:
        """Size K of the codebook."""
        return self.config.num_codes

    @property
    def num_code_positions(self) -> int:
        """Number L of codes of a caption, or of its positions where they have several."""
        return self.config.max_length // self.config.downsample_factor * self.config.num_codebooks

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Shape of a caption's codes: (L,), or (L, q) of residual codes."""
        levels = (self.config.num_quantizers,) if self.config.quantizer_type == "rvq" else ()
        return (self.num_code_positions, *levels)

    @torch.no_grad()
    def merge_codes(self, tolerance: float = 0.05) -> torch.LongTensor | list[torch.LongTensor]:
        """Keep one code, the most used, of those that lie nearer to one another than `tolerance`; for after training.

        Restarts put spare codes onto vectors that have a code already. Which of the two is nearer is then left to
        rounding, which differs between batch sizes and dtypes, or to what a position's other tokens leave over. Both
        decode to the same token, but a transformer that was trained on the one does not know the other.

        Args:
            tolerance: squared distance, as a multiple of the codes' mean squared length.

        Returns:
            (K',) int64: the old numbers of the codes 0 to K' - 1. `num_codes` is K' from now on. With several
            codebooks, which can't differ in size, the codes that are left of each; they keep their numbers, and no
            vector is nearest to the others any more.
        """
        kept = [_codes_apart(quantizer, tolerance) for quantizer in self.quantizers]
        if len(kept) > 1:
            for quantizer, codes in zip(self.quantizers, kept, strict=True):
                quantizer.retire(codes)
            return kept
        self.quantizers[0].keep(kept[0])
        self.quantizers.num_codes = len(kept[0])
        self.register_to_config(num_codes=len(kept[0]))
        return kept[0]

    # -----------------------------------------------------------------------------------------------------------------
    # Tokens to codes

    def _check_tokens(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Token ids with padding where the mask is zero."""
        length, size = self.config.max_length, self.config.vocab_size
        if input_ids.ndim != 2 or input_ids.shape[1] != length:
            raise ValueError(
                f"input_ids must have shape (B, {length}), got {tuple(input_ids.shape)}; tokenize with "
                f"padding='max_length', truncation=True, max_length={length}"
            )
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids must be int64 or int32, got {input_ids.dtype}")
        if input_ids.numel() and (input_ids.min() < 0 or input_ids.max() >= size):
            raise ValueError(
                f"input_ids must be in [0, {size}), got values from {input_ids.min()} to {input_ids.max()}"
            )
        if attention_mask is None:
            return input_ids
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}, got "
                f"{tuple(attention_mask.shape)}"
            )
        return input_ids.masked_fill(attention_mask == 0, self.config.pad_token_id)

    def _run(self, blocks: nn.ModuleList, hidden_states: torch.Tensor) -> torch.Tensor:
        for block in blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden_states = self._gradient_checkpointing_func(block, hidden_states)
            else:
                hidden_states = block(hidden_states)
        return hidden_states

    def _encode(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden_states = self._run(self.encoder, self.token_embedding(input_ids))  # (B, T, H)
        if self.config.quantizer_type == "vq":
            hidden_states = self._join(hidden_states)  # (B, T/r, rH)
        latents = self.code_norm(self.to_code(hidden_states))
        return latents if self.config.quantizer_type == "vq" else self._join(latents)  # (B, T/r, D)

    def _join(self, states: torch.Tensor) -> torch.Tensor:
        """States (B, T, C) of tokens as those of positions (B, T/r, rC)."""
        return states.unflatten(1, (-1, self.config.downsample_factor)).flatten(2)

    @apply_forward_hook
    @torch.no_grad()
    def encode_codes(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None
    ) -> torch.LongTensor:
        """Codes (B, L), or (B, L, q), int64 in [0, num_codes) of token ids (B, T). Tokens where the mask is zero count
        as padding.

        Raises:
            ValueError: if the shape or dtype is another, or an id is out of range.
        """
        codes = self.quantizers.encode(self._encode(self._check_tokens(input_ids, attention_mask)))
        return codes.view(-1, *self.code_shape)

    # -----------------------------------------------------------------------------------------------------------------
    # Codes to tokens

    def _levels(self, codes: torch.LongTensor) -> torch.LongTensor:
        """The codes of each position (B, T/r, codes), whose number may be 1."""
        if codes.shape[1:] != self.code_shape:
            shape = ", ".join(map(str, self.code_shape))
            raise ValueError(f"codes must have shape (B, {shape}), got {tuple(codes.shape)}")
        return codes.reshape(len(codes), -1, len(self.quantizers))

    def _lookup(self, codes: torch.LongTensor) -> torch.Tensor:
        """Sum (B, T/r, D) of the residual codes' vectors."""
        return self.quantizers.lookup(self._levels(codes))

    def _decode_states(self, quantized: torch.Tensor) -> torch.Tensor:
        patches = self.from_code(quantized)  # (B, T/r, rH)
        hidden_states = patches.unflatten(2, (self.config.downsample_factor, -1)).flatten(1, 2)  # (B, T, H)
        return self.norm_out(self._run(self.decoder, hidden_states))  # (B, T, H)

    def _decode(self, quantized: torch.Tensor) -> torch.Tensor:
        return self.to_logits(self._decode_states(quantized))  # (B, T, V)

    @apply_forward_hook
    def decode_codes(self, codes: torch.LongTensor) -> torch.Tensor:
        """Logits (B, T, V) over the tokens, of codes (B, L) or (B, L, q).

        Raises:
            ValueError: if the shape or dtype is another, or a code is out of range.
        """
        return self._decode(self._lookup(codes))

    @apply_forward_hook
    @torch.no_grad()
    def encode_states(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.BoolTensor]:
        """The codes' vectors (B, T/r, D), as a text encoder's states, and which hold a token (B, T/r)."""
        tokens = self._check_tokens(input_ids, attention_mask)
        real = (tokens != self.config.pad_token_id).unflatten(1, (-1, self.config.downsample_factor)).any(-1)
        return self._lookup(self.encode_codes(tokens)), real

    @apply_forward_hook
    @torch.no_grad()
    def embed(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """One unit vector (B, D) a text, float32, D = hidden_size: its codes' decoder states, pooled by rarity.

        Quantized vectors are short; the decoder's last hidden states, which hold no more than the codes do, tell
        codes apart linearly. Position i weighs a / (a + p_i) with a = 1e-3 (Arora et al. 2017, SIF, section 3), p_i
        being the frequency of its code in training as the codebook keeps it, the mean where there are several. A
        codebook without such statistics weighs all positions alike. Padding is left out; a text of nothing else is
        the zero vector.

        Args:
            input_ids: (B, T) token ids, int64.
            attention_mask: (B, T), 0 at padding.

        Raises:
            ValueError: if the shape or dtype is another, or an id is out of range.
        """
        tokens = self._check_tokens(input_ids, attention_mask)
        codes = self.encode_codes(tokens)
        states = self._decode_states(self._lookup(codes)).float()  # (B, T, H)
        weights = (tokens != self.config.pad_token_id).float()
        if hasattr(self.quantizers[0], "cluster_size"):
            each = self._levels(codes).unbind(-1)
            frequencies = [q.cluster_size.float()[part] for q, part in zip(self.quantizers, each, strict=True)]
            frequency = torch.stack(frequencies).mean(0)  # (B, T/r)
            rarity = SIF_SMOOTHING / (SIF_SMOOTHING + frequency)
            weights = weights * rarity.repeat_interleave(self.config.downsample_factor, dim=1)
        return F.normalize((states * weights[..., None]).sum(1), dim=-1)

    def forward(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None, return_dict: bool = True
    ) -> TextVQOutput | tuple[torch.Tensor, ...]:
        """Encode, quantize and decode token ids (B, T)."""
        latents = self._encode(self._check_tokens(input_ids, attention_mask))
        output = self.quantizers(latents)
        # Straight through to the latents, not to their unit vectors.
        logits = self._decode(latents + (output.quantized - latents).detach())
        codes = output.codes.view(-1, *self.code_shape)
        if not return_dict:
            return logits, output.loss, codes
        each = self.config.quantizer_type == "rvq"
        return TextVQOutput(
            logits=logits,
            commit_loss=output.loss,
            codes=codes,
            usage=output.usage if each else output.usage.mean(),
            perplexity=output.perplexity if each else output.perplexity.mean(),
        )


def _codes_apart(quantizer: VectorQuantizer, tolerance: float) -> torch.LongTensor:
    """Numbers (K',) of the most used codes of which no two are nearer than `tolerance`, see [`merge_codes`]; those
    that an earlier call has retired are none of them."""
    codebook = quantizer.codebook.double()  # (K, D)
    free = codebook.abs().amax(1) < RETIRED / 2
    radius = tolerance * codebook[free].square().sum(1).mean()
    usage = getattr(quantizer, "cluster_size", free.float())
    for code in usage.argsort(descending=True, stable=True).tolist():
        if free[code]:
            free &= (codebook - codebook[code]).square().sum(1) >= radius
            free[code] = True
    return free.nonzero()[:, 0]

"""The image tokenizer: pictures to a grid of codes and back."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from diffusers import VQModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder, DecoderOutput, Encoder
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook

from ..utils.checkpoint_mixin import ModelCheckpointMixin
from ..utils.images import blend_tiles
from ..utils.weight_files import check_converted
from .config_checks import MASKGIT_BLOCKS, check_image_vq
from .maskgit_blocks import MaskGITDecoder, MaskGITEncoder
from .outputs import CastableOutput
from .position_norm import replace_group_norms
from .quantizers.codebook import IndexBackpropagationQuantizer, SimVectorQuantizer
from .quantizers.lookup_free import FiniteScalarQuantizer, LookupFreeQuantizer
from .quantizers.residual import ResidualVectorQuantizer
from .quantizers.vector import Quantizer, QuantizerOutput, VectorQuantizer


_ENTROPY = ("entropy_weight", "entropy_temperature")
# The options of ImageVQModel that each quantizer takes.
QUANTIZER_OPTIONS = {
    "vq": (
        *("beta", "codebook_norm", "codebook_update", "codebook_init", "ema_decay", "restart_threshold"),
        *("gradient_estimator", *_ENTROPY),
    ),
    "rvq": (
        *("num_quantizers", "beta", "codebook_update", "codebook_init", "ema_decay", "restart_threshold"),
        *("gradient_estimator", *_ENTROPY),
    ),
    "simvq": ("beta", "gradient_estimator", *_ENTROPY),
    "ibq": ("beta", "codebook_norm", *_ENTROPY),
    "fsq": ("fsq_levels",),
    "lfq": ("beta", "codebook_norm", *_ENTROPY),
}


@dataclass
class ImageVQOutput(CastableOutput):
    """Output of [`ImageVQModel`].

    Args:
        sample (`torch.Tensor` of shape `(B, C, H, W)`): the reconstruction.
        commit_loss (`torch.Tensor`): the quantizer's loss, with all its terms; a scalar.
        entropy_loss (`torch.Tensor`): the entropy loss's share of `commit_loss`.
        codes (`torch.LongTensor` of shape `(B, h, w)`, or `(B, h, w, q)` of residual codes): in [0, num_codes).
        usage, perplexity (`torch.Tensor`): of the batch's codes, see [`~models.quantizers.QuantizerOutput`]; `(q,)` of
            residual codes, one a level.
    """

    sample: torch.Tensor
    commit_loss: torch.Tensor | None = None
    entropy_loss: torch.Tensor | None = None
    codes: torch.LongTensor | None = None
    usage: torch.Tensor | None = None
    perplexity: torch.Tensor | None = None


class ImageVQModel(ModelCheckpointMixin, VQModel):
    """A diffusers `VQModel` with codes: ``encode_codes`` and ``decode_codes``, and a quantizer made for training.

    Every `VQModel` checkpoint loads and gives the same latents, codes and pictures. The arguments of `VQModel` mean
    what they mean there; those added are saved in the config as well. `from_original` reads the checkpoints of other
    code bases.

    Args:
        down_block_types, up_block_types: as in `VQModel`, or ``"MaskGITDownBlock2D"`` and ``"MaskGITUpBlock2D"`` for
            every level of MaskGIT's VQGAN ([`~models.maskgit_blocks.MaskGITEncoder`]), which has no attention and no
            `quant_conv`.
        pixel_range: the range of pixels that encoder and decoder were trained with. Pictures given and returned are
            in [-1, 1] whatever it is.
        quantizer_type: ``"vq"``, the nearest code of a codebook ([`~models.quantizers.VectorQuantizer`]); ``"rvq"``,
            q residual codes a position ([`~models.quantizers.residual.ResidualVectorQuantizer`]); ``"simvq"``
            ([`~models.quantizers.codebook.SimVectorQuantizer`]), ``"ibq"``
            ([`~models.quantizers.codebook.IndexBackpropagationQuantizer`]), ``"fsq"``
            ([`~models.quantizers.lookup_free.FiniteScalarQuantizer`]), or ``"lfq"``
            ([`~models.quantizers.lookup_free.LookupFreeQuantizer`]). An option below that the type doesn't take must
            keep its default.
        beta: weight of the commitment term.
        codebook_norm: ``"none"`` (Euclidean) or ``"l2"``; with ``"lfq"``, ``"l2"`` is BSQ.
        codebook_update: ``"gradient"`` or ``"ema"``.
        codebook_init: ``"uniform"``, ``"data"`` or ``"kmeans"``.
        ema_decay: decay of the codebook's moving averages.
        restart_threshold: share of uniform use below which a code is restarted; 0 for never.
        latents_mean, latents_std: statistics of the latents' channels on the training set, for Gaussian diffusion
            ([`~models.vae_latents.measure_latents`]); None where only ``scaling_factor`` counts, as in `VQModel`.
        gradient_estimator: ``"straight_through"`` or ``"rotation"`` (the rotation trick).
        entropy_weight, entropy_temperature: of the entropy loss.
        fsq_levels: levels of each of FSQ's channels. `vq_embed_dim` must be their number, and `num_vq_embeddings`
            their product; with ``"lfq"`` it must be 2^vq_embed_dim.
        num_quantizers: levels q of ``"rvq"``, each with a codebook of `num_vq_embeddings` codes.
        encoder_norm_type: ``"group"``, as in `VQModel`; or ``"position"``, a norm of each position on its own
            ([`~models.position_norm.PositionNorm`]), with which a patch's code depends on what is around it and not on
            the whole picture; but attention, of `mid_block_add_attention` or of ``"AttnDownEncoderBlock2D"``, still
            looks at all of it.

    Raises:
        ValueError: if an argument has a wrong type, is out of range or doesn't fit the others.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 3,
        sample_size: int = 32,
        num_vq_embeddings: int = 256,
        norm_num_groups: int = 32,
        vq_embed_dim: int | None = None,
        scaling_factor: float = 0.18215,
        norm_type: str = "group",
        mid_block_add_attention: bool = True,
        lookup_from_codebook: bool = False,
        force_upcast: bool = False,
        quantizer_type: str = "vq",
        beta: float = 0.25,
        codebook_norm: str = "none",
        codebook_update: str = "gradient",
        codebook_init: str = "uniform",
        ema_decay: float = 0.99,
        restart_threshold: float = 0.0,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        gradient_estimator: str = "straight_through",
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
        fsq_levels: tuple[int, ...] | None = None,
        pixel_range: tuple[float, float] = (-1.0, 1.0),
        num_quantizers: int = 1,
        encoder_norm_type: str = "group",
    ) -> None:
        parameters = inspect.signature(ImageVQModel.__init__).parameters
        check_image_vq(self.config, QUANTIZER_OPTIONS, {name: one.default for name, one in parameters.items()})
        # VQModel's own __init__ makes the stock quantizer and the stock blocks only.
        super(VQModel, self).__init__()
        code_dim = vq_embed_dim if vq_embed_dim is not None else latent_channels
        widths: dict[str, Any] = {
            "block_out_channels": block_out_channels,
            "layers_per_block": layers_per_block,
            "norm_num_groups": norm_num_groups,
        }
        if MASKGIT_BLOCKS[0] in down_block_types:
            self.encoder = MaskGITEncoder(in_channels, latent_channels, **widths)
            self.quant_conv, self.post_quant_conv = nn.Identity(), nn.Identity()
            self.decoder = MaskGITDecoder(latent_channels, out_channels, **widths)
        else:
            widths |= {"act_fn": act_fn, "mid_block_add_attention": mid_block_add_attention}
            self.encoder = Encoder(
                in_channels, latent_channels, down_block_types=down_block_types, double_z=False, **widths
            )
            if encoder_norm_type == "position":
                replace_group_norms(self.encoder)
            self.quant_conv = nn.Conv2d(latent_channels, code_dim, 1)
            self.post_quant_conv = nn.Conv2d(code_dim, latent_channels, 1)
            self.decoder = Decoder(
                latent_channels, out_channels, up_block_types=up_block_types, norm_type=norm_type, **widths
            )
        self.quantize = _quantizer(
            quantizer_type,
            num_vq_embeddings,
            code_dim,
            beta=beta,
            codebook_norm=codebook_norm,
            codebook_update=codebook_update,
            codebook_init=codebook_init,
            ema_decay=ema_decay,
            restart_threshold=restart_threshold,
            gradient_estimator=gradient_estimator,
            entropy_weight=entropy_weight,
            entropy_temperature=entropy_temperature,
            fsq_levels=fsq_levels,
            num_quantizers=num_quantizers,
        )
        self.use_slicing = False
        self.use_tiling = False
        # The overlap of neighbouring tiles, as a share of a tile; they are blended across it.
        self.tile_overlap_factor = 0.25

    @classmethod
    def from_original(
        cls,
        checkpoint: str | Path | Mapping[str, torch.Tensor],
        *,
        format: str | None = None,
        config: str | Path | Mapping | None = None,
        use_ema: bool | None = None,
    ) -> "ImageVQModel":
        """The image tokenizer of another code base as an `ImageVQModel`: the same latents, codes and pictures.

        Args:
            checkpoint: a ``.safetensors``, ``.ckpt``, ``.pt``, ``.pth`` or ``.bin`` file, or a state dict. Files are
                read without running code that they may hold.
            format: one of `diffusers_vqdit.interop.FORMATS`; by default told from the names and shapes of the weights.
                taming, IBQ and open-muse checkpoints look the same and need it.
            config: the original's constructor arguments as a mapping, or a YAML or JSON file of them, nested as the
                original has them. What the shapes tell is checked against it; it adds the resolution and what the
                shapes can't tell, such as LlamaGen's ``codebook_l2_norm``. ``pixel_range`` in it overrides the
                format's.
            use_ema: take the moving averages of the weights that the checkpoint holds beside them. By default as the
                original's own evaluation does: LlamaGen and IBQ take them where there are some.

        Raises:
            ValueError: if the file can't be read safely and whole, or the weights are not those of the format; the
                message says what was expected.
        """
        # Imported here and by its full name: a checkpoint's own pipeline.py has no converters, and diffusers imports
        # all that a statement in it names.
        load_original = import_module("diffusers_vqdit.interop").load_original

        model_config, state_dict = load_original(checkpoint, format=format, config=config, use_ema=use_ema)
        model = cls(**model_config)
        check_converted(model.state_dict(), state_dict, "tokenizer")
        model.load_state_dict(state_dict)
        return model.eval()

    @property
    def num_codes(self) -> int:
        """Size K of the codebook, of each of them with residual codes."""
        return self.config.num_vq_embeddings

    @property
    def downsample_factor(self) -> int:
        """Pixels of a picture's side for each code."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    # -----------------------------------------------------------------------------------------------------------------
    # Pictures to codes

    def _check_sample(self, sample: torch.Tensor) -> None:
        channels, factor = self.config.in_channels, self.downsample_factor
        if sample.ndim != 4 or sample.shape[1] != channels:
            raise ValueError(f"sample must have shape (B, {channels}, H, W), got {tuple(sample.shape)}")
        if not sample.is_floating_point():
            raise ValueError(f"sample must be a float tensor in [-1, 1], got {sample.dtype}")
        if sample.shape[2] % factor or sample.shape[3] % factor:
            raise ValueError(f"sample's height and width must be multiples of {factor}, got {tuple(sample.shape[2:])}")

    @apply_forward_hook
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> VQEncoderOutput | tuple[torch.Tensor]:
        """Latents (B, D, h, w) of pictures (B, C, H, W), before quantization."""
        self._check_sample(x)
        parts = x.split(1) if self.use_slicing else [x]
        latents = torch.cat([self._encode(part) for part in parts])
        return VQEncoderOutput(latents=latents) if return_dict else (latents,)

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        tile = self.config.sample_size
        if self.use_tiling and max(x.shape[2:]) > tile:
            return self._tiled(x, self._encode_tile, tile, tile // self.downsample_factor)
        return self._encode_tile(x)

    def _encode_tile(self, x: torch.Tensor) -> torch.Tensor:
        low, high = self.config.pixel_range
        if (low, high) != (-1, 1):
            x = low + (high - low) * (x + 1) / 2
        return self.quant_conv(self.encoder(_layout(x))).contiguous()

    @apply_forward_hook
    @torch.no_grad()
    def encode_codes(self, sample: torch.Tensor) -> torch.LongTensor:
        """Codes (B, h, w), or (B, h, w, q), int64 in [0, num_codes) of pictures (B, C, H, W) in [-1, 1].

        Raises:
            ValueError: if the shape, dtype or value range is not that.
        """
        self._check_sample(sample)
        if sample.numel() and not (sample.min() >= -1.01 and sample.max() <= 1.01):
            raise ValueError(
                f"sample must be in [-1, 1], got values from {sample.min().item():.3g} to {sample.max().item():.3g}"
            )
        latents = self.encode(sample.to(self.dtype)).latents
        return self.quantize.encode(latents.permute(0, 2, 3, 1))

    # -----------------------------------------------------------------------------------------------------------------
    # Codes to pictures

    @apply_forward_hook
    def decode_codes(self, codes: torch.LongTensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """Pictures (B, C, H, W), about [-1, 1], of codes (B, h, w) or (B, h, w, q).

        Raises:
            ValueError: if the codes have another shape or dtype, or are out of range.
        """
        levels = (self.config.num_quantizers,) if self.config.quantizer_type == "rvq" else ()
        if codes.ndim != 3 + len(levels) or codes.shape[3:] != levels:
            shape = ", ".join(map(str, ("B", "h", "w", *levels)))
            raise ValueError(f"codes must have shape ({shape}), got {tuple(codes.shape)}")
        vectors = self.quantize.lookup(codes).to(self.dtype)
        quantized = vectors.permute(0, 3, 1, 2).contiguous()  # (B, D, h, w)
        return self.decode(quantized, force_not_quantize=True, return_dict=return_dict)

    @apply_forward_hook
    def decode(
        self,
        h: torch.Tensor,
        force_not_quantize: bool = False,
        return_dict: bool = True,
        shape: tuple[int, ...] | None = None,
    ) -> DecoderOutput | tuple[torch.Tensor, torch.Tensor]:
        """Pictures of latents (B, D, h, w), which are quantized first unless `force_not_quantize`.

        As in `VQModel`, with ``lookup_from_codebook`` in the config and `force_not_quantize` `h` holds codes, and
        `shape` is (B, h, w, D).
        """
        if not force_not_quantize:
            output = self._quantize(h)
            quantized, loss = output.quantized.permute(0, 3, 1, 2).contiguous(), output.loss
        else:
            if self.config.lookup_from_codebook and not h.is_floating_point():
                h = self.quantize.lookup(h).to(self.dtype)
                h = (h if shape is None else h.view(shape)).permute(0, 3, 1, 2).contiguous()
            quantized, loss = h, torch.zeros((h.shape[0],), device=h.device, dtype=h.dtype)
        parts = quantized.split(1) if self.use_slicing else [quantized]
        sample = torch.cat([self._decode(part) for part in parts])
        return DecoderOutput(sample=sample, commit_loss=loss) if return_dict else (sample, loss)

    def _quantize(self, latents: torch.Tensor) -> QuantizerOutput:
        return self.quantize(latents.permute(0, 2, 3, 1))

    def _decode(self, quantized: torch.Tensor) -> torch.Tensor:
        tile = self.config.sample_size // self.downsample_factor
        if self.use_tiling and max(quantized.shape[2:]) > tile:
            return self._tiled(quantized, self._decode_tile, tile, self.config.sample_size)
        return self._decode_tile(quantized)

    def _decode_tile(self, quantized: torch.Tensor) -> torch.Tensor:
        hidden = self.post_quant_conv(_layout(quantized))
        sample = self.decoder(hidden, quantized if self.config.norm_type == "spatial" else None).contiguous()
        low, high = self.config.pixel_range
        return sample if (low, high) == (-1, 1) else 2 * (sample - low) / (high - low) - 1

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> ImageVQOutput | tuple[torch.Tensor, ...]:
        """Encode, quantize and decode pictures (B, C, H, W) in [-1, 1]."""
        latents = self.encode(sample).latents
        output = self._quantize(latents)
        decoded = self.decode(output.quantized.permute(0, 3, 1, 2).contiguous(), force_not_quantize=True).sample
        if not return_dict:
            return decoded, output.loss
        return ImageVQOutput(
            sample=decoded,
            commit_loss=output.loss,
            entropy_loss=output.entropy_loss,
            codes=output.codes,
            usage=output.usage,
            perplexity=output.perplexity,
        )

    # -----------------------------------------------------------------------------------------------------------------
    # Tiling

    def _tiled(self, sample: torch.Tensor, function, tile: int, tile_out: int) -> torch.Tensor:
        """Apply `function` to overlapping tiles of side `tile` and blend the results, of side `tile_out` each."""
        # Tiles start at multiples of one code, in pixels and in codes alike.
        codes = min(tile, tile_out)
        step = max(1, codes - max(1, round(codes * self.tile_overlap_factor))) * (tile // codes)

        def starts(size: int) -> list[int]:
            last = max(size - tile, 0)
            return sorted({min(start, last) for start in range(0, last + step, step)})

        height, width = sample.shape[2:]

        def scale(n: int) -> int:
            return n * tile_out // tile

        corners = [(top, left) for top in starts(height) for left in starts(width)]
        parts = ((y, x, function(sample[:, :, y : y + tile, x : x + tile])) for y, x in corners)
        return blend_tiles(((scale(y), scale(x), part) for y, x, part in parts), (scale(height), scale(width)))


def _quantizer(quantizer_type: str, num_codes: int, code_dim: int, **options) -> Quantizer:
    """The quantizer that the arguments of [`ImageVQModel`] ask for."""
    taken = {name: options[name] for name in QUANTIZER_OPTIONS[quantizer_type]}
    if quantizer_type == "vq":
        return VectorQuantizer(num_codes, code_dim, **taken, follow=True)
    if quantizer_type == "rvq":
        number = taken.pop("num_quantizers")
        levels = (VectorQuantizer(num_codes, code_dim, **taken, follow=True) for _ in range(number))
        return ResidualVectorQuantizer(levels)
    if quantizer_type == "simvq":
        return SimVectorQuantizer(num_codes, code_dim, **taken)
    if quantizer_type == "ibq":
        return IndexBackpropagationQuantizer(num_codes, code_dim, **taken)
    if quantizer_type == "lfq":
        return LookupFreeQuantizer(code_dim, **taken)
    return FiniteScalarQuantizer(taken["fsq_levels"])


def _layout(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) as it is, or with its channels last: the convolutions that follow keep the layout.

    CPUs convolve several times as fast so in half precision. In float32 they gain less, and results would change in
    their last bits; small models train slower.
    """
    half = x.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(x.device.type)
    if half and x.device.type == "cpu" and not torch.is_grad_enabled():
        return x.contiguous(memory_format=torch.channels_last)
    return x

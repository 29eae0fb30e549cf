"""Copies of a transformer that know more: more segments, more codes of a segment, more labels."""

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
import torch.nn as nn

from ..utils.checks import check_integer, shown


class GrowthMixin:
    """The part of [`VQDiTTransformer2DModel`] that makes larger copies of it, for finetuning."""

    # The model's, of diffusers and of its other parts
    config: Any
    device: torch.device
    dtype: torch.dtype
    training: bool
    has_shared_embedder: bool
    segment_embedding: nn.Embedding
    from_config: ClassVar[Callable[..., Any]]
    state_dict: Callable[[], dict[str, torch.Tensor]]
    peft_config: dict[str, Any]  # where adapters are loaded

    def with_segments(self, segments: dict[str, dict[str, Any]]) -> Self:
        """A copy that has more segments, for training on more tasks. What the model knows it still does, exactly.

        A new segment that is shared with a known one begins in its role.

        Args:
            segments: the new ones, as in the configuration.

        Raises:
            ValueError: for a segment that the model has already, or one that can't be used.
        """
        if self.config.segments is None or not isinstance(segments, dict):
            raise ValueError("segments must be a dict, and the model one with segments")
        if known := sorted(set(segments) & set(self.config.segments)):
            raise ValueError(f"segments: the model has {known} already")
        self._check_grows()
        config = dict(self.config)
        config["segments"] = {**self.config.segments, **segments}
        model = type(self).from_config(config)
        state = model.state_dict()
        state.update({name: value for name, value in self.state_dict().items() if name != "segment_embedding.weight"})
        old, new = sorted(self.config.segments), sorted(config["segments"])
        for row, name in enumerate(new):
            source = name if name in old else config["segments"][name].get("shared_with")
            if source in old:
                for role in (0, 1):
                    value = self.segment_embedding.weight[old.index(source) + role * len(old)]
                    state["segment_embedding.weight"][row + role * len(new)] = value.detach()
        model.load_state_dict(state)
        return self._placed_alike(model)

    def _check_grows(self) -> None:
        """Raise a ValueError if adapters are loaded, whose layers stand around those that grow."""
        if any(".base_layer." in key for key in self.state_dict()):
            raise ValueError(
                f"the adapters {list(self.peft_config)} are loaded, and a model grows without any: unload them first "
                "(pipe.unload_lora_weights()), after fusing them (pipe.fuse_lora()) to keep what they change"
            )

    def _placed_alike(self, model: Any) -> Any:
        """A model on this one's device, in its dtype and mode."""
        # Not by diffusers' `to`, which warns of modules to be kept in float32 where there are none.
        return nn.Module.to(model, self.device, self.dtype).train(self.training)

    def with_vocab_size(self, name: str, size: int) -> Self:
        """A copy whose segment has more codes, for training with more labels. Known codes keep their weights.

        New codes begin with fresh embeddings and logits of zero; the mask is the row after them. Segments that share
        the embeddings of this one have as many codes.

        Args:
            name: a segment with embeddings of its own.
            size: its new ``vocab_size``.

        Raises:
            ValueError: for an unknown segment, a shared one, one of several codebooks, or a size that isn't larger.
        """
        known = self.config.segments.get(name) if self.config.segments else None
        if known is None or {"shared_with", "channels"} & set(known):
            own = [
                n
                for n, segment in (self.config.segments or {}).items()
                if not {"shared_with", "channels"} & set(segment)
            ]
            raise ValueError(f"name={shown(name)} must be a segment with embeddings of its own, one of {own}")
        if known.get("separate_codebooks"):
            raise ValueError(f"name={name!r} has codebooks of its own for the places in a patch, which don't grow")
        old = known["vocab_size"]
        size = check_integer("size", size, old + 1)
        self._check_grows()
        config = dict(self.config)
        config["segments"] = {
            other: {**segment, "vocab_size": size} if name in (other, segment.get("shared_with")) else segment
            for other, segment in self.config.segments.items()
        }
        model = type(self).from_config(config)
        state = self.state_dict()
        for key in (f"code_embeddings.{name}.weight", f"heads.{name}.weight", f"heads.{name}.bias"):
            grown = model.state_dict()[key].to(state[key])
            grown[:old] = state[key][:old]
            grown[size:] = state[key][old:]  # the mask's row, which heads have not
            state[key] = grown
        model.load_state_dict(state)
        return self._placed_alike(model)

    def with_num_embeds_ada_norm(self, size: int) -> Self:
        """A copy with embeddings for more labels, new ones fresh. Known labels, and none, give what they gave.

        Args:
            size: the new number of labels; no label is the row after them.

        Raises:
            ValueError: if the model has segments, or not fewer labels.
        """
        old = self.config.num_embeds_ada_norm
        if self.config.segments is not None:
            raise ValueError("with_num_embeds_ada_norm needs segments=None; with segments, labels are codes of one")
        size = check_integer("size", size, old + 1)
        self._check_grows()
        model = type(self).from_config({**self.config, "num_embeds_ada_norm": size})
        state = self.state_dict()
        fresh = model.state_dict()
        for key in [key for key in state if key.endswith("class_embedder.embedding_table.weight")]:
            grown = fresh[key].to(state[key])
            grown[:old], grown[size:] = state[key][:old], state[key][old:]
            state[key] = grown
        model.load_state_dict(state)
        if self.has_shared_embedder:
            model.share_embedder()
        return self._placed_alike(model)

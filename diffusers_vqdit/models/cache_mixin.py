"""Caches of a denoiser, as diffusers' models have them: ``enable_cache(config)`` and ``disable_cache()``."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

from diffusers.hooks import FirstBlockCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.cache_utils import CacheMixin

from .generation_cache import GenerationCache, GenerationCacheConfig
from .transformer_dit import DiTBlock


# A lock for each model with hooks of diffusers, whose state is the model's and not a call's. Not an attribute: models
# are copied, and locks can't be.
_LOCKS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


class DenoiserCacheMixin(CacheMixin):
    """The part of [`VQDiTTransformer2DModel`] that is told to reuse what changes little between sampling steps.

    A model with segments takes a [`GenerationCacheConfig`]: each run of a pipeline then has a cache of its own. With
    ``segments=None`` it takes diffusers' `FirstBlockCacheConfig` and `TaylorSeerCacheConfig`, which keep their state
    in hooks on the model: the calls of pipelines that use it wait for one another. All are approximations, off by
    default.
    """

    config: Any
    _cache_config: Any

    def enable_cache(self, config: Any) -> None:
        """Reuse what changes little between the sampling steps, until [`disable_cache`].

        Args:
            config: what, and how long.

        Raises:
            ValueError: for a config that this model doesn't take, or if a cache is enabled already.
        """
        if self.is_cache_enabled:
            raise ValueError(
                f"config={config}: the cache of {self._cache_config} is enabled already; call disable_cache() before"
            )
        own = self.config.segments is not None
        kinds = (GenerationCacheConfig,) if own else (FirstBlockCacheConfig, TaylorSeerCacheConfig)
        if not isinstance(config, kinds):
            raise ValueError(
                f"config={config} must be one of {[kind.__name__ for kind in kinds]} for a model with "
                f"segments{'' if own else '=None'}"
            )
        if own:
            self._cache_config = config
            return
        if isinstance(config, TaylorSeerCacheConfig):
            if config.use_lite_mode:
                raise ValueError(
                    "config: use_lite_mode=True needs a model with one output projection, and this has two; use "
                    "use_lite_mode=False"
                )
            if config.cache_identifiers is None and config.skip_predict_identifiers is None:
                # Diffusers' own patterns find other models' attention only.
                config = replace(config, cache_identifiers=[r"transformer_blocks\.\d+\.(attn1|ff)"])
        TransformerBlockRegistry.register(DiTBlock, TransformerBlockMetadata(return_hidden_states_index=0))
        super().enable_cache(config)

    def disable_cache(self) -> None:
        """Compute everything again."""
        if isinstance(self._cache_config, GenerationCacheConfig):
            self._cache_config = None
        else:
            super().disable_cache()

    def new_cache(self) -> GenerationCache | None:
        """A cache for one run, for the `cache` of its calls; None where none is enabled."""
        config = self._cache_config
        return GenerationCache(config) if isinstance(config, GenerationCacheConfig) else None

    @property
    def _has_cache_hooks(self) -> bool:
        return self.is_cache_enabled and not isinstance(self._cache_config, GenerationCacheConfig)

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        # Pipelines call it at their end. Without a cache it would make a registry, and look through all modules.
        if self._has_cache_hooks:
            super()._reset_stateful_cache(recurse)

    def hooks_context(self, name: str) -> AbstractContextManager:
        """`cache_context` for hooks of diffusers, where there are any."""
        return self.cache_context(name) if self._has_cache_hooks else nullcontext()

    @contextmanager
    def own_hooks(self) -> Iterator[None]:
        """Have the hooks' state, where there are hooks, to oneself until the end of the ``with`` block."""
        if not self._has_cache_hooks:
            yield
            return
        with _LOCKS.setdefault(self, RLock()):  # a call in the callback of another begins anew, and so does that one
            self._reset_stateful_cache()
            try:
                yield
            finally:
                self._reset_stateful_cache()

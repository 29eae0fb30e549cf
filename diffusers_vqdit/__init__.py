"""VQ-VAE tokenizers for images and text, and a diffusion transformer over their codes, for Hugging Face diffusers.

Importing this package makes its classes known to diffusers, so that ``DiffusionPipeline.from_pretrained`` finds them.
"""

import sys
from typing import TYPE_CHECKING

import diffusers
from diffusers.utils.import_utils import _LazyModule

from .utils.moved import MovedModule
from .version import __version__


_import_structure = {
    "models.generation_cache": ["GenerationCacheConfig"],
    "models.image_vq": ["ImageVQModel"],
    "models.multi_tokenizer": ["MultiTokenizerModel"],
    "models.spectrogram_vq": ["SpectrogramVQModel"],
    "models.text_vq": ["TextVQModel"],
    "models.transformer_vqdit": ["VQDiTTransformer2DModel"],
    "pipelines.pipeline_vqdit": ["VQDiTPipeline", "VQDiTPipelineOutput"],
    "pipelines.pipeline_vqdit_latent": ["VQDiTLatentPipeline"],
    "likelihood.gallery": ["GalleryIndex"],
    "schedulers.scheduling_masked_diffusion": ["MaskedDiffusionScheduler"],
    "tasks": ["Task", "parse_tasks"],
}

# What the module `training_utils` of version 0.1 had.
_training_utils = {
    "training.arguments": ["tracker_config"],
    "training.checkpoints": ["find_checkpoint", "save_checkpoint"],
    "utils.texts": ["check_captions"],
    "utils.decoding": ["decode_image", "to_pixels"],
    "training.data": ["decode_images", "load_training_dataset"],
    "training.row_order": ["shuffled_batches"],
    "training.draws": ["row_generators", "step_generator"],
    "training.files": ["checkpoint_step", "checkpoints", "save_pretrained_atomically"],
    "training.metrics": ["code_usage", "psnr", "ssim"],
    "training.optimization": ["averaged_weights", "parameter_groups", "set_dropout", "unwrap"],
}

if TYPE_CHECKING:
    from .likelihood.gallery import GalleryIndex
    from .models.generation_cache import GenerationCacheConfig
    from .models.image_vq import ImageVQModel
    from .models.multi_tokenizer import MultiTokenizerModel
    from .models.spectrogram_vq import SpectrogramVQModel
    from .models.text_vq import TextVQModel
    from .models.transformer_vqdit import VQDiTTransformer2DModel
    from .pipelines.pipeline_vqdit import VQDiTPipeline, VQDiTPipelineOutput
    from .pipelines.pipeline_vqdit_latent import VQDiTLatentPipeline
    from .schedulers.scheduling_masked_diffusion import MaskedDiffusionScheduler
    from .tasks import Task, parse_tasks
else:
    _moved = MovedModule(__name__, __file__, _training_utils, old_name=f"{__name__}.training_utils")
    sys.modules[f"{__name__}.training_utils"] = _moved
    _extra = {"__version__": __version__, "training_utils": _moved}
    sys.modules[__name__] = _LazyModule(
        __name__, __file__, _import_structure, module_spec=__spec__, extra_objects=_extra
    )

# DiffusionPipeline.from_pretrained looks classes up as attributes of `diffusers`. Its module is lazy, as ours is, so
# the names are entered in its table and nothing is imported until one is asked for.
_not_components = ("tasks", "likelihood.gallery", "models.generation_cache")
_components = [name for module, names in _import_structure.items() if module not in _not_components for name in names]
if isinstance(diffusers, _LazyModule):
    sys.modules["diffusers.vqdit"] = sys.modules[__name__]
    diffusers._class_to_module.update({name: "vqdit" for name in _components})
    for _name in _components:  # a repository's own copy of the class, loaded earlier, makes room for the package's
        vars(diffusers).pop(_name, None)
else:  # DIFFUSERS_SLOW_IMPORT=1
    for _name in _components:
        setattr(diffusers, _name, getattr(sys.modules[__name__], _name))

"""Names of version 0.1, whose modules stand in ``training/`` now."""

from .training.arguments import tracker_config  # noqa: F401
from .training.checkpoints import find_checkpoint, save_checkpoint  # noqa: F401
from .training.columns import check_captions  # noqa: F401
from .training.data import decode_image, decode_images, load_training_dataset, shuffled_batches, to_pixels  # noqa: F401
from .training.draws import row_generators, step_generator  # noqa: F401
from .training.files import checkpoint_step, checkpoints, save_pretrained_atomically  # noqa: F401
from .training.metrics import code_usage, psnr, ssim  # noqa: F401
from .training.optimization import averaged_weights, parameter_groups, set_dropout, unwrap  # noqa: F401

"""A pretrained transformer over codes, made to fit the segments, labels and tasks of other data."""

from collections.abc import Sequence

from ..models.transformer_vqdit import VQDiTTransformer2DModel


def extend_transformer(
    transformer: VQDiTTransformer2DModel,
    segments: dict[str, dict],
    labels: Sequence[str],
    tasks: Sequence[str],
    *,
    lora: bool = False,
) -> VQDiTTransformer2DModel:
    """The transformer with what the data has beside its own: more labels, segments, tasks.

    Args:
        segments: the data's, by name, as the transformer's config has them.
        labels: the data's, the transformer's own first.
        lora: whether only a LoRA is trained, which can't add labels or segments.

    Raises:
        ValueError: if a segment differs from the transformer's own, or a LoRA would have to add one.
    """
    known = transformer.config.segments
    if "label" in known and "label" in segments and len(labels) > known["label"]["vocab_size"]:
        if lora:
            raise ValueError(
                f"the labels {list(labels[known['label']['vocab_size'] :])} are new to the pipeline; a LoRA can't add "
                "them: drop --rank"
            )
        transformer = transformer.with_vocab_size("label", len(labels))
        known = transformer.config.segments
    for name, segment in segments.items():
        own = {key: known[name][key] for key in ("patch", "separate_codebooks") if key in known.get(name, ())}
        if name in known and {**own, **segment} != known[name]:
            raise ValueError(
                f"segment {name!r} is {segment} in the data but {known[name]} in the pretrained transformer"
            )
    if new := {name: segment for name, segment in segments.items() if name not in known}:
        if lora:
            raise ValueError(f"the segments {sorted(new)} are new to the pipeline; a LoRA can't add them: drop --rank")
        transformer = transformer.with_segments(new)
    known_tasks = list(transformer.config.tasks or [])
    transformer.register_to_config(tasks=known_tasks + [task for task in tasks if task not in known_tasks])
    return transformer

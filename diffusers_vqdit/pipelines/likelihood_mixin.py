"""What a model of likelihoods does besides drawing and retrieving: score, classify."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.utils import BaseOutput

from ..likelihood.block_bounds import block_masks, negative_elbo_of_blocks
from ..likelihood.bounds import (
    LikelihoodOutput,
    check_num_samples,
    code_log_probabilities,
    negative_elbo,
    stratified_masks,
)
from ..likelihood.retrieval import all_masked
from ..models.layers import VQDiTPrefix
from ..tasks import Task
from ..utils.checks import check_integer, shown
from ..utils.texts import check_texts
from .check_inputs import check_batch, check_generator
from .guidance import encode_given
from .inputs_mixin import InputsMixin
from .label_segment import LabelSegment
from .ready_codes import encode_one_each
from .segment_base import LABEL, TEXT, SegmentProcessor, forget_positions
from .sizes_mixin import in_order
from .text_segment import TextSegment


@dataclass
class ClassificationOutput(BaseOutput):
    """Output of [`VQDiTPipeline.classify`].

    Args:
        labels (`list[str]`): the most probable label of each sample.
        probabilities (`torch.Tensor` of shape `(B, L)`): float32, rows sum to 1.
        names (`list[str]`): the L labels, in the order of the columns.
    """

    labels: list[str]
    probabilities: torch.Tensor
    names: list[str]


class LikelihoodMixin(InputsMixin):
    """The part of [`VQDiTPipeline`] that compares candidates: likelihoods and classification."""

    @torch.no_grad()
    def score(
        self,
        task: str,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        class_labels: int | str | list[int | str] | None = None,
        *,
        inputs: dict[str, Any] | None = None,
        num_samples: int = 32,
        batch_size: int = 64,
        generator: torch.Generator | None = None,
        class_label: int | str | list[int | str] | None = None,
    ) -> LikelihoodOutput:
        """How likely the generated side of a task is given the other: bounds on -log p, comparable among candidates.

        All candidates share the masks, so that their differences are known better than each bound
        ([`~likelihood.bounds.negative_elbo`]). One on either side stands for all, as in the pictures of one prompt.

        Args:
            task: the arrow, such as ``"text->image"``.
            prompt, image, class_labels, inputs: what the task has on either side, as in [`__call__`].
            num_samples: masks, 1 or an even number. The standard error falls with its root or faster.
            batch_size: candidates a forward pass.
            generator: draws the masks, on the CPU; the same seed gives the same masks.

        Returns:
            [`~likelihood.bounds.LikelihoodOutput`]: ``nll`` and ``standard_error`` in nats, ``bits_per_code``.

        Raises:
            ValueError: if what is passed is not what the task has, or for an argument that doesn't fit.

        Examples:
            ```py
            >>> output = pipe.score("image->text", ["a red apple", "a sailboat"], image)
            >>> best = output.nll.argmin()
            ```
        """
        if not isinstance(task, str):
            raise ValueError(f"task={shown(task)} must be a string such as 'text->image'")
        check_num_samples(num_samples)
        check_integer("batch_size", batch_size, 1)
        check_generator(generator, cpu_only=True)
        self._check_device()
        self._check_scheduler()
        arrow = Task.parse(task)
        passed = self._passed(prompt, image, class_labels, inputs, class_label)
        self._check_task(arrow, ())
        if sorted(passed) != sorted(arrow.segments):
            raise ValueError(
                f"task={task!r} has the segments {sorted(arrow.segments)}, but {sorted(passed)} were passed"
            )
        self._check_task(arrow, self._tokenized(passed, passed))
        passed = self._read(passed, unknown=False)
        check_batch({name: len(value) for name, value in passed.items()}, 1, generator, broadcast=True)
        state = None if generator is None else generator.get_state()
        places, found = [], []
        for own, values, segments in self._by_grid(passed, arrow.segments):
            if generator is not None and state is not None:
                generator.set_state(state)  # the masks of a grid don't depend on what else is scored
            places.append(own)
            found.append(self._score(arrow, values, segments, num_samples, batch_size, generator))
        self.maybe_free_model_hooks()
        fields = ("nll", "standard_error", "num_codes")
        return LikelihoodOutput(**{name: in_order(places, [getattr(one, name) for one in found]) for name in fields})

    def _score(
        self,
        task: Task,
        passed: dict[str, list],
        segments: dict[str, SegmentProcessor],
        num_samples: int,
        batch_size: int,
        generator: torch.Generator | None,
    ) -> LikelihoodOutput:
        """[`score`] of samples whose pictures are of one grid."""
        size = max(map(len, passed.values()))
        # What is the same for all is encoded once.
        given = {name: encode_one_each(segments[name], passed[name]) for name in task.given}
        prefix = encode_given(self.transformer, given) if given else None
        codes = {name: encode_one_each(segments[name], passed[name]).codes for name in task.generated}
        generated = {name: value.expand(size, *value.shape[1:]) for name, value in codes.items()}
        bound, num_samples = self._bound_of(generated, num_samples, generator)
        with self.progress_bar(total=num_samples * -(-size // batch_size)) as progress_bar:
            return bound(prefix=prefix, batch_size=batch_size, progress=progress_bar.update)

    def _bound_of(
        self, generated: dict[str, torch.LongTensor], num_samples: int, generator: torch.Generator | None
    ) -> tuple[Callable[..., LikelihoodOutput], int]:
        """[`~likelihood.bounds.negative_elbo`] of codes as a function of the prefix, with masks that are drawn now,
        and how many these are."""
        options: dict[str, Any] = {}
        blocks: Any = [(self._segment(name), codes) for name, codes in generated.items()]
        blocks = [(segment, codes) for segment, codes in blocks if segment.block_length is not None]
        function: Callable[..., LikelihoodOutput] = negative_elbo_of_blocks if blocks else negative_elbo
        if blocks:
            ((segment, codes),) = blocks
            length = segment.block_length
            masks, ratios = block_masks(codes.shape[1] // length, length, num_samples, generator)
            options["lengths"] = segment.lengths(codes)
        else:
            num_codes = sum(value[0].numel() for value in generated.values())
            masks, ratios = stratified_masks(num_codes, num_samples, generator)
        times = self.scheduler.time_of_mask_ratio(ratios) if self.transformer.config.time_conditioned else None
        return partial(function, self.transformer, generated, masks=masks, times=times, **options), len(masks)

    # -----------------------------------------------------------------------------------------------------------------
    # Classification and retrieval

    @torch.no_grad()
    def classify(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        labels: list[str] | None = None,
        *,
        output: str | None = None,
        inputs: dict[str, Any] | None = None,
        num_samples: int = 32,
        batch_size: int = 64,
        generator: torch.Generator | None = None,
    ) -> ClassificationOutput:
        """Label texts, pictures or both; among the checkpoint's labels, or among texts of your own.

        The checkpoint's label is one code, so its distribution is exact: one forward pass. Texts of your own are
        candidates for a text segment, such as the caption: the softmax over them of the bound on log p(text | given),
        with masks that all share, less that on log p(text) where the checkpoint knows the task ``->text`` (PMI: a
        uniform prior). Without it, frequent and short texts have an advantage.

        Args:
            prompt, image: what is given, as in [`__call__`]. Both: of one batch size.
            labels: candidate texts, at least two, all different; None for the checkpoint's labels.
            output: the label segment, by default ``label``, or the only one where there is none of this name; for
                `labels` the text segment, by default ``text``, in the same way.
            inputs: what is given by segment, as in [`__call__`].
            num_samples: masks, as in [`score`]; for `labels` only.
            batch_size: candidates a forward pass; for `labels` only.
            generator: draws the masks, on the CPU; for `labels` only.

        Raises:
            ValueError: for a task that the checkpoint was not trained for, or an argument that doesn't fit.

        Examples:
            ```py
            >>> pipe.classify(image=image).labels[0]
            >>> pipe.classify(image=image, labels=["a cat", "a dog"]).probabilities
            ```
        """
        check_num_samples(num_samples)
        check_integer("batch_size", batch_size, 1)
        check_generator(generator, cpu_only=True)
        passed = self._passed(prompt, image, None, inputs)
        if not passed:
            raise ValueError("prompt and image are None: there is nothing to classify")
        if labels is not None:
            segment = self._only_segment(TextSegment, TEXT, output)
            if segment.name in passed:
                raise ValueError(
                    f"labels of your own are candidates for {segment.name!r}, which was passed too: pass image, or "
                    "whatever else they are to describe"
                )
            names = _candidates(labels)
            segment.argument = "labels"  # for messages; segments are made anew for each call
            segment.check_whole("labels", names)
            scores = -self._candidate_nll(passed, segment, names, num_samples, batch_size, generator)
        else:
            segment = self._only_segment(LabelSegment, LABEL, output)
            _, passed = self._plan(passed, segment.name)
            passed = self._read(passed, unknown=False)
            check_batch({name: len(value) for name, value in passed.items()}, 1, None)
            places, found = [], []
            for own, values, segments in self._by_grid(passed, passed):
                given = {name: encode_one_each(segments[name], value) for name, value in values.items()}
                codes = {name: value.codes for name, value in given.items()}
                masks = {name: value.mask for name, value in given.items() if value.mask is not None}
                places.append(own)
                found.append(all_masked(self.transformer, segment.name, codes, masks)[1][:, 0])
            scores = in_order(places, found)  # (B, K)
            names = segment.decode(torch.arange(scores.shape[1])[:, None])
        self.maybe_free_model_hooks()
        probabilities = scores.softmax(-1).float().cpu()
        best = [names[index] for index in probabilities.argmax(1).tolist()]
        return ClassificationOutput(labels=best, probabilities=probabilities, names=names)

    def _only_segment(self, kind: type[SegmentProcessor], default: str, name: str | None) -> SegmentProcessor:
        """The segment of a modality that an output names; by default the only one, or the one of a name."""
        found = {name: one for name, one in self._segments.items() if isinstance(one, kind)}
        if name is None:
            name = next(iter(found)) if len(found) == 1 else default
        if name not in found:
            raise ValueError(
                f"output={shown(name)} must be a {kind.noun} segment; this checkpoint has {sorted(found)}"
            )
        return found[name]

    def _candidate_nll(
        self,
        passed: dict[str, Any],
        segment: SegmentProcessor,
        labels: list[str],
        num_samples: int,
        batch_size: int,
        generator: torch.Generator | None,
    ) -> torch.Tensor:
        """Bounds (B, L) on -log p(text | given), less those on -log p(text) where the checkpoint knows them."""
        self._check_device()
        self._check_scheduler()
        name = segment.name
        task = Task(tuple(passed), (name,))
        self._check_task(task, ())
        self._check_task(task, (name, *self._tokenized(passed, passed)))
        passed = self._read(passed, unknown=False)
        check_batch({one: len(value) for one, value in passed.items()}, 1, None)
        text = segment.encode(labels)
        bound, _ = self._bound_of({name: text}, num_samples, generator)
        places, found = [], []
        for own, values, segments in self._by_grid(passed, passed):
            prefixes = encode_given(self.transformer, {n: encode_one_each(segments[n], v) for n, v in values.items()})
            # A sample's keys and values serve all texts.
            rows = [prefixes.select(slice(row, row + 1)) for row in range(len(prefixes))]
            places.append(own)
            found.append(torch.stack([bound(prefix=row, batch_size=batch_size).nll for row in rows]))
        nll = in_order(places, found)
        if str(Task((), (name,))) in (self.transformer.config.tasks or []):
            nll = nll - bound(prefix=None, batch_size=batch_size).nll
        return nll

    def _forget(
        self, codes: torch.LongTensor, strength: float, prefix: VQDiTPrefix | None, segment: str
    ) -> torch.LongTensor:
        """Codes (B, h, w), or (B, h, w, q), masked at the share `strength` of positions: where they fit the others
        worst."""
        scheduler = self.scheduler
        times = (
            (lambda r: scheduler.time_of_mask_ratio(torch.tensor(r)))
            if self.transformer.config.time_conditioned
            else None
        )
        fit = code_log_probabilities(
            self.transformer, {segment: codes}, prefix, times=times, generator=torch.Generator().manual_seed(0)
        )[segment]  # (B, N)
        fit = fit.unflatten(1, (codes.shape[1] * codes.shape[2], -1)).mean(2)  # (B, h * w)
        worst = fit.argsort(dim=1, stable=True)[:, : max(1, round(strength * fit.shape[1]))]
        touched = torch.zeros_like(fit, dtype=torch.bool).scatter(1, worst, True).view(codes.shape[:3])
        return forget_positions(codes, codes, touched, self._mask_token_id(segment))

    def _mask_token_id(self, segment: str) -> int:
        return self.transformer.config.segments[segment]["vocab_size"]


def _candidates(labels: Any) -> list[str]:
    if not isinstance(labels, list) or not labels or len(set(check_texts("labels", labels))) < 2:
        raise ValueError(f"labels={shown(labels)} must be a list of at least two different texts")
    if len(set(labels)) < len(labels):
        raise ValueError(f"labels={shown(labels)} must be different from one another")
    return list(labels)

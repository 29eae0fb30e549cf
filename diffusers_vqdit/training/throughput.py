"""How many samples a second a training takes."""

import time
from collections import deque


class Throughput:
    """Samples a second of the last steps, of all processes; what is done between steps, such as validation and
    checkpoints, is left out.

    Args:
        steps: how many optimizer steps it is the mean of.
    """

    def __init__(self, steps: int = 50) -> None:
        self._steps: deque[tuple[float, float]] = deque(maxlen=steps)
        self._samples, self._since = 0.0, time.perf_counter()

    def add(self, samples: float) -> None:
        """Count a micro-batch."""
        self._samples += samples

    def end_step(self) -> float:
        """The figure, with the step that ends here."""
        self._steps.append((self._samples, time.perf_counter() - self._since))
        self._samples = 0.0
        self.go_on()
        samples, seconds = map(sum, zip(*self._steps, strict=True))
        return samples / seconds

    def go_on(self) -> None:
        """Begin the next step's time here."""
        self._since = time.perf_counter()


def shown_rate(rate: float) -> str:
    """A figure of so many a second as a progress bar shows it: 143, 0.52."""
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"

"""Samples a second are those of the last steps, without what is done between them."""

import pytest

from diffusers_vqdit.training import throughput


def test_pauses_and_steps_long_past_do_not_count(monkeypatch):
    now = 100.0
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now)
    meter = throughput.Throughput(steps=4)
    for step in range(1, 20):
        for _ in range(2):  # micro-batches
            now += 0.5 if step > 8 else 5.0  # the first steps compile
            meter.add(3)
        speed = meter.end_step()
        fast = min(max(step - 8, 0), 4)  # of the last four steps, at most
        assert speed == pytest.approx(6 * min(step, 4) / (fast * 1 + (min(step, 4) - fast) * 10))
        now += 60.0  # validation
        meter.go_on()


@pytest.mark.parametrize(
    ("rate", "shown"), [(0.516, "0.52"), (3.04, "3"), (9.4, "9.4"), (12.34, "12"), (4321.0, "4321")]
)
def test_rates_of_every_size_are_told(rate, shown):
    assert throughput.shown_rate(rate) == shown

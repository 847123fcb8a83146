"""Step times are measured in turns: held to a clock that is made up, on machines that drift and that are noisy."""

import json
import math

import numpy as np
import pytest

from sense_v2.hf.experiments.step_times import at_equal_time, compare, is_clear, median_interval, take_turns

TRUE_RATIO = 1.3
SECONDS = {"plain": 0.2, "engram": 0.2 * TRUE_RATIO}


class Machine:
    """A clock, and steps that let it run by their own time, times what the machine is slower at that moment."""

    def __init__(self, slowness):
        self.now, self.ran, self._slowness = 0.0, [], slowness

    def steps(self):
        return {name: lambda name=name: self._step(name) for name in SECONDS}

    def _step(self, name):
        self.ran.append(name)
        self.now += SECONDS[name] * self._slowness(self.now)


def measured(slowness, rounds=9):
    machine = Machine(slowness)
    seconds = take_turns(machine.steps(), rounds=rounds, block_steps=3, clock=lambda: machine.now)
    return compare(seconds, base="plain", other="engram")


def test_blocks_take_turns_and_turn_around():
    machine = Machine(lambda now: 1.0)
    seconds = take_turns(machine.steps(), rounds=2, block_steps=2, clock=lambda: machine.now)
    a_round = ["plain"] * 2 + ["engram"] * 4 + ["plain"] * 2
    assert machine.ran == a_round * 3, "one round to warm up, and two that count"
    assert seconds == {name: pytest.approx([own] * 2) for name, own in SECONDS.items()}


def slower(now):
    return 1 + now / 30


def faster(now):
    return 5 / (1 + now / 10)


def throttled(now):
    return 3 if now > 20 else 1


@pytest.mark.parametrize("drift", [slower, faster, throttled])
def test_a_machine_that_drifts_gives_the_right_ratio(drift):
    one_after_the_other = Machine(drift)
    runs = {}
    for name, step in one_after_the_other.steps().items():
        began = one_after_the_other.now
        for _ in range(100):
            step()
        runs[name] = one_after_the_other.now - began
    assert abs(runs["engram"] / runs["plain"] - TRUE_RATIO) > 0.5, "runs that follow each other are compared wrongly"

    times = measured(drift)
    assert times["ratio"] == pytest.approx(TRUE_RATIO, rel=0.02)
    assert times["low"] <= times["ratio"] <= times["high"]
    assert is_clear(times)
    assert times["rounds"] == 9
    assert json.loads(json.dumps(times)) == times


def test_a_step_that_the_machine_held_up_does_not_count():
    held_up = iter([1, 1, 1, 1, 9, 1, 1, 1] * 100)
    times = measured(lambda now: next(held_up))
    assert times["low"] == pytest.approx(TRUE_RATIO)
    assert times["high"] == pytest.approx(TRUE_RATIO)


def test_noise_says_that_it_cannot_say():
    noise = np.random.default_rng(0)
    times = measured(lambda now: float(noise.lognormal(sigma=1.0)))
    assert not is_clear(times)
    assert at_equal_time(curve(300), curve(300), times) is None


def test_medians_and_spread_of_each_model():
    times = measured(lambda now: 1.0)
    for name, own in SECONDS.items():
        assert times["seconds"][name] == {key: pytest.approx(own) for key in ("median", "low", "high")}


def test_too_few_rounds_are_refused():
    with pytest.raises(ValueError, match="5 values have no 95% interval of their median; six are needed"):
        measured(lambda now: 1.0, rounds=5)


def test_the_interval_holds_the_median_as_often_as_it_says():
    noise = np.random.default_rng(1)
    held = [low <= 1 <= high for low, high in (median_interval(noise.lognormal(size=12) ** 2) for _ in range(2000))]
    assert np.mean(held) > 0.95


def curve(steps, end=3.0):
    """Losses that fall by a straight line from 5 at step 50 to `end`."""
    return [{"step": step, "loss": 5 - (5 - end) * (step - 50) / (steps - 50)} for step in range(50, steps + 1, 50)]


def test_equal_time_reads_the_curves_by_steps():
    plain, engram = curve(300), curve(300, end=2.0)
    found = at_equal_time(plain, engram, {"ratio": 1.25, "low": 1.2, "high": 1.5})
    assert found["base_steps"] == 300
    assert found["other_steps"] == 240
    assert found["base"] == pytest.approx(math.exp(3.0))
    assert found["other"] == pytest.approx(math.exp(5 - 3 * 190 / 250))
    assert found["ratio"] == pytest.approx(found["other"] / found["base"])
    assert found["low"] == pytest.approx(math.exp(5 - 3 * 200 / 250 - 3))
    assert found["high"] == pytest.approx(math.exp(5 - 3 * 150 / 250 - 3))


def test_equal_time_where_the_other_is_faster():
    found = at_equal_time(curve(300), curve(300, end=2.0), {"ratio": 0.8, "low": 0.8, "high": 0.8})
    assert (found["base_steps"], found["other_steps"]) == (240, 300)
    assert found["other"] == pytest.approx(math.exp(2.0))


def test_equal_time_before_the_first_evaluation_is_not_told():
    assert at_equal_time(curve(300), curve(300), {"ratio": 7.0, "low": 7.0, "high": 7.0}) is None
    assert at_equal_time(curve(300), curve(300), {"ratio": 5.9, "low": 5.5, "high": 6.1}) is None

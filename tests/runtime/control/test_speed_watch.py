"""Speeds that are followed: changes that last, on all ranks alike, and nothing of chance."""

from __future__ import annotations

import numpy as np
import pytest

from moeless_opt.problems.arrays import FloatArray
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.spec import TimeModel
from moeless_opt.problems.spec.topology import Topology
from moeless_opt.runtime.control.backend import Observation
from moeless_opt.runtime.control.controller import Controller
from moeless_opt.runtime.control.planner import Planner
from moeless_opt.runtime.control.speed_watch import SpeedWatch
from tests.runtime.control.test_controller import TOPOLOGY, G, L, Notebook, skewed


def look(rng: np.random.Generator, speed_G: FloatArray, noise: float = 0.03, layers: int = 4) -> Observation:
    """What ranks of these speeds would tell."""
    tokens = rng.integers(50, 400, (layers, len(speed_G)))
    seconds = tokens / speed_G * 1e-5 * rng.lognormal(0, noise, tokens.shape)
    return Observation(load_LE=tokens, tokens_LG=tokens, seconds_LG=seconds, batches=1)


def test_noise_changes_nothing_and_a_drift_is_found() -> None:
    rng = np.random.default_rng(0)
    watch, even = SpeedWatch(), np.ones(8)
    assert not any(watch.see(look(rng, even, noise=0.1)) for _ in range(200))
    slow = even.copy()
    slow[3] = 0.7
    told = [watch.see(look(rng, slow)) for _ in range(10)]
    assert told.index(True) == 2  # three looks in a row
    assert sum(told) == 1
    assert watch.speed_G == pytest.approx(slow, abs=0.03)
    assert watch.speed_G is not None
    assert (watch.speed_G == 1).sum() == 7
    told = [watch.see(look(rng, even)) for _ in range(5)]  # and back
    assert told.index(True) == 2
    assert (watch.speed_G == 1).all()
    assert watch.changes == 2


def test_a_look_that_was_slow_by_chance_is_none() -> None:
    rng = np.random.default_rng(1)
    watch, slow = SpeedWatch(), np.array([1.0, 0.5, 1.0, 1.0])
    for _ in range(30):
        assert not watch.see(look(rng, np.ones(4)))
        assert not watch.see(look(rng, slow))  # twice in a row at most
        assert not watch.see(look(rng, slow))


def test_ranks_without_tokens_and_other_ranks() -> None:
    rng = np.random.default_rng(2)
    watch = SpeedWatch(patience=1)
    idle = Observation(
        load_LE=np.zeros((1, 3), int), tokens_LG=np.zeros((1, 3), int), seconds_LG=np.zeros((1, 3)), batches=1
    )
    assert not watch.see(idle)
    assert watch.see(look(rng, np.array([1.0, 1.0, 0.5]), noise=0))
    assert watch.speed_G == pytest.approx([1, 1, 0.5])
    part = look(rng, np.array([1.0, 1.0, 1.0]), noise=0)
    part.tokens_LG[:, 2] = 0
    assert not watch.see(part)  # of who served nothing, nothing new is known
    assert watch.speed_G == pytest.approx([1, 1, 0.5])
    assert watch.see(look(rng, np.ones(2), noise=0))  # a rank was lost, and which is not known
    assert watch.speed_G == pytest.approx([1, 1])
    assert not watch.see(look(rng, np.ones(3), noise=0))  # and is back: nothing was believed of it
    for bad in ({"patience": 0}, {"least": 0.0}, {"least": 1.0}, {"noise": -1.0}):
        with pytest.raises(ProblemError):
            SpeedWatch(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("layers", [1, 2])
def test_few_layers_are_followed_no_more_rashly(layers: int) -> None:
    """A tenth of noise: hardly a change where there is none (a fifth of all looks were, of one layer)."""
    false = 0
    for seed in range(3):
        rng, watch = np.random.default_rng(seed), SpeedWatch()
        false += sum(watch.see(look(rng, np.ones(8), noise=0.1, layers=layers)) for _ in range(150))
        slow = np.array([1.0] * 7 + [0.7])
        rng, watch = np.random.default_rng(seed), SpeedWatch()
        told = [watch.see(look(rng, slow, noise=0.1, layers=layers)) for _ in range(15)]
        assert any(told)
        assert watch.speed_G is not None
        assert watch.speed_G[7] == pytest.approx(0.7, abs=0.12)
    assert false <= 2


def test_one_rank_and_all_ranks_slow_are_no_change() -> None:
    rng = np.random.default_rng(3)
    for gpus in (1, 2, 8):
        watch = SpeedWatch()
        for factor in (1.0, 0.3, 1.0):
            assert not any(watch.see(look(rng, factor * np.ones(gpus))) for _ in range(8))
        assert watch.speed_G == pytest.approx(np.ones(gpus))


def test_most_ranks_slow_is_a_few_fast_and_the_reverse() -> None:
    rng, watch = np.random.default_rng(4), SpeedWatch()
    for speed in ([1, 1, 1, 1, 0.5, 0.5, 1], [0.5, 1, 1, 0.5, 0.5, 0.5, 0.5], [1] * 7):
        speed_G = np.array(speed, dtype=float)
        for _ in range(6):
            watch.see(look(rng, speed_G))
        assert watch.speed_G == pytest.approx(speed_G / np.median(speed_G), abs=0.06)


def test_who_is_busy_does_not_say_who_is_usual() -> None:
    """Only the slow ones serve for a while: they stay slow."""
    rng, watch, speed_G = np.random.default_rng(5), SpeedWatch(), np.array([1.0, 1.0, 1.0, 0.5, 0.5])
    for _ in range(4):
        watch.see(look(rng, speed_G, noise=0.01))
    assert watch.speed_G == pytest.approx(speed_G, abs=0.03)
    for _ in range(8):
        part = look(rng, speed_G, noise=0.01)
        part.tokens_LG[:, :3] = 0
        assert not watch.see(part)


def test_a_fixed_part_of_the_time_makes_nobody_slow() -> None:
    """Decode: a pass takes 1 ms whoever serves how many; shares by the tokens' rate would run away."""
    time = TimeModel(launch=1e-3, token_cost=1e-6, unit="s")
    tokens = np.array([[400, 300, 200, 50]] * 3)
    for watch, fooled in ((SpeedWatch(), True), (SpeedWatch(time=time), False)):
        told = False
        for _ in range(6):
            seconds = 10 * 1e-3 + tokens * 1e-6
            told |= watch.see(Observation(load_LE=tokens, tokens_LG=tokens, seconds_LG=seconds, batches=10))
        assert told is fooled
    slow = SpeedWatch(time=time)
    for _ in range(3):
        seconds = (10 * 1e-3 + tokens * 1e-6) / [1, 1, 0.5, 1]
        slow.see(Observation(load_LE=tokens, tokens_LG=tokens, seconds_LG=seconds, batches=10))
    assert slow.speed_G == pytest.approx([1, 1, 0.5, 1])
    with pytest.raises(ProblemError, match="time: must be a TimeModel of token_cost and launch"):
        SpeedWatch(time=TimeModel(activation_cost=1.0))


def test_speeds_that_are_known_are_where_it_begins() -> None:
    """A topology that says so; and a watch that goes on beside another controller."""
    uneven = TOPOLOGY.replace(speed_G=np.array([2.0, 2.0, 1.0, 2.0]))
    backend = Slowed(8, np.array([1.0, 1.0, 0.5, 1.0]))
    watch = SpeedWatch()
    controller = Controller(backend, Planner(topology=uneven), every=2, speeds=watch)
    for _ in range(16):
        controller.after()
    assert backend.told == []  # they are as the topology says
    assert watch.speed_G == pytest.approx([1, 1, 0.5, 1])
    equal = Slowed(8, np.ones(4))
    controller = Controller(equal, Planner(topology=uneven), every=2, speeds=SpeedWatch())
    for _ in range(16):
        controller.after()
    assert equal.told[-1] == pytest.approx(np.ones(4))  # they are not
    again = Slowed(2, np.array([1.0, 1.0, 0.5, 1.0]))
    Controller(again, Planner(topology=TOPOLOGY), every=2, speeds=watch)
    assert again.told[0] == pytest.approx([1, 1, 0.5, 1])


class Slowed(Notebook):
    """GPUs that take as long as their speeds say; tokens as the plan shares them."""

    def __init__(self, looks: int, speed_G: FloatArray) -> None:
        super().__init__([skewed(0)] * looks)
        self.speed_G, self.told = speed_G, []  # type: ignore[var-annotated]
        self.share: FloatArray | None = None

    def observe(self) -> Observation:
        load = self.loads.pop(0)
        plan = self.applied[-1] if self.applied else None
        tokens = np.zeros((L, G))
        for x in range(L):
            for g in range(G):
                for c, e in enumerate(self.slots_LGC[x, g].tolist()):
                    count = (self.slots_LGC[x] == e).sum()
                    part = 1 / max(count, 1) if plan is None else plan.share_LGC[x, g, c]
                    tokens[x, g] += load[x, e] * part if e >= 0 else 0.0
        return Observation(
            load_LE=load, tokens_LG=np.rint(tokens).astype(int), seconds_LG=tokens / self.speed_G, batches=1
        )

    def set_speeds(self, speed_G: FloatArray) -> None:
        self.told.append(speed_G.copy())


@pytest.mark.parametrize("lag", [0, 1])
def test_plans_are_made_for_the_gpus_as_they_are(lag: int) -> None:
    speed_G = np.array([1.0, 1.0, 0.5, 1.0])
    backend = Slowed(12, speed_G)
    controller = Controller(backend, Planner(topology=TOPOLOGY), every=2, lag=lag, speeds=SpeedWatch())
    for _ in range(24):
        controller.after()
    controller.close()
    assert len(backend.told) == 1
    assert backend.told[0] == pytest.approx(speed_G)
    before, after = controller.decisions[0].plan, controller.decisions[-1].plan
    load = skewed(0).astype(float)

    def slowest(plan: object) -> float:
        share = plan.share_LGC * load[np.arange(L)[:, None, None], np.maximum(plan.slots_LGC, 0)]  # type: ignore[attr-defined]
        return float((np.where(plan.slots_LGC >= 0, share, 0).sum(2) / speed_G).max(1).sum())  # type: ignore[attr-defined]

    assert slowest(after) < 0.7 * slowest(before)


def test_who_cannot_be_told_is_refused() -> None:
    with pytest.raises(ProblemError, match="planner: has no at_speeds"):
        Controller(Notebook([]), lambda load, live: None, speeds=SpeedWatch())  # type: ignore[arg-type, return-value]
    told = Planner(topology=Topology.uniform(1, 2, slots=4)).at_speeds(np.array([1.0, 0.5]))
    assert told.topology.speed_G.tolist() == [1.0, 0.5]

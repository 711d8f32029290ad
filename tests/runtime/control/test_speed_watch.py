"""Speeds that are followed: changes that last, on all ranks alike, and nothing of chance."""

from __future__ import annotations

import numpy as np
import pytest

from moeless_opt.problems.arrays import FloatArray
from moeless_opt.problems.errors import ProblemError
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
    assert not watch.see(look(rng, np.ones(2), noise=0))  # a rank was lost
    assert watch.speed_G == pytest.approx([1, 1])
    for bad in ({"patience": 0}, {"least": 0.0}, {"least": 1.0}, {"noise": -1.0}):
        with pytest.raises(ProblemError):
            SpeedWatch(**bad)  # type: ignore[arg-type]


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

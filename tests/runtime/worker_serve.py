"""Two ranks of the serving engine of which one cannot plan: both serve on, and plan again when told to."""

from __future__ import annotations

from typing import Any

import numpy as np
from worlds import join, report

from moeless_opt.problems.spec import Topology, held_LGE
from moeless_opt.runtime.control import Controller, Planner
from moeless_opt.runtime.serve import Planning, Sampling, ServeRequest
from moeless_opt.runtime.serve.engine import EngineOptions
from moeless_opt.runtime.serve.engine.channel import queue_channels
from moeless_opt.runtime.serve.engine.steering import _Watched
from moeless_opt.runtime.serve.engine.worker import Worker
from moeless_opt.runtime.tiny_moe import model as tiny


def main() -> None:
    """The other rank has a plan that this one has not; it must not wait for it for ever."""
    rank, _ = join()
    front, back = queue_channels()
    options = EngineOptions(kv_blocks=16, context_length=64, planning=Planning(policy="static"))
    worker = Worker(options, back, 64, frozenset())
    steering, tokens = worker.steering, []
    topology = Topology.uniform(1, 2, slots=10)

    def planner(load_LE: Any, slots_LGC: Any) -> Any:
        if rank == 1:
            raise RuntimeError("the planner broke")
        return Planner(topology=topology, solver="eplb", split="equal")(load_LE, slots_LGC)

    def steps(count: int, name: str) -> list[int]:
        prompt, found = tiny.encode("And"), []
        rule = Sampling(temperature=0, max_tokens=12, ignore_end=True)
        front.send(("submit", (ServeRequest(id=name, prompt=tuple(prompt), sampling=rule), len(prompt))))
        for _ in range(count):  # as many on both ranks: each is an exchange
            worker.step()
            for kind, content in front.take(0):
                if kind == "tokens":
                    found.extend(pick.token for _, pick, _, _ in content)
        return found

    steering._controller = Controller(_Watched(steering), planner, every=2)
    tokens.append(steps(20, "broken"))
    assert steering.planning.paused
    assert "failed" in [event.kind for event in steering.events]
    assert steering.live.migrator.idle, "what one rank alone was handed is dropped"
    front.send(("order", (1, "planning", Planning(policy="eplb", every=4))))
    tokens.append(steps(24, "again"))
    assert not steering.planning.paused
    assert not steering.failed
    other_LGC = np.ascontiguousarray(steering.live.target_LGC[:, ::-1])
    front.send(("order", (2, "planning", Planning(policy="static"))))
    front.send(("order", (3, "apply", ("given", other_LGC))))
    tokens.append(steps(30, "given"))
    worker.live.settle()
    assert [event.kind for _, event in worker.answers] == ["settings", "settings", "given"]
    assert np.array_equal(held_LGE(worker.live.slots_LGC, 16), held_LGE(other_LGC, 16))
    report({"tokens": tokens})


if __name__ == "__main__":
    main()

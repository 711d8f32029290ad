"""What weights on their way cost: waiting for them, and links that they share with the all-to-all.

Before a layer can run, somebody has to have decided where its experts go, and the replicas that were missing
must have come. Both start `distance` layers earlier, so that the time of those layers hides them; what is
left is waited for. Deciding (a predictor and a planner) takes its time first, then the transfer begins.

Without contention transfers and the all-to-all pass each other unhindered. With it they share a GPU's port
fairly (assumed; the port of the transfers is taken to be the one that the all-to-all waits for): while both
want it, each gets half. A layer's all-to-all then takes up to twice as long, but no longer than it and the
transfers of the next `distance` layers, in equal parts, need one after the other; and the transfers get of
the port what the all-to-all leaves. A migration beside undisturbed passes is stretched likewise.
"""

from __future__ import annotations

import numpy as np

from moeless_opt.problems.arrays import FloatArray

__all__ = ["slowed", "stretched", "waits"]


def slowed(network_L: FloatArray, load_L: FloatArray, distance: int) -> FloatArray:
    """Seconds by which transfers for the next layers prolong each layer's all-to-all, shape [L].

    Parameters
    ----------
    network_L, load_L : arrays, shape [L]
        Seconds of the all-to-all, and of the transfers that each layer waits for, alone on the port.
    distance : int
        Layers ahead that transfers start.
    """
    layers = len(load_L)
    part = np.concatenate([load_L, np.zeros(distance)]) / distance
    ahead_L = np.sum([part[step : step + layers] for step in range(1, distance + 1)], axis=0)
    return np.asarray(np.minimum(network_L, ahead_L))


def stretched(seconds: float, network_share: float) -> float:
    """Seconds of a migration beside passes that were all-to-all for a share n of their time.

    While it runs the all-to-all takes twice as long, which is ``2 n / (1 + n)`` of the time, and the
    migration then has half of the port: it takes ``1 + n`` times as long as alone.
    """
    return seconds * (1 + network_share)


def waits(
    load_L: FloatArray,
    before: FloatArray,
    now: FloatArray,
    distance: int,
    *,
    decide: float = 0.0,
    contention: bool = False,
) -> tuple[FloatArray, FloatArray]:
    """What each layer waits for, and what its all-to-all takes longer, each of shape [L].

    Parameters
    ----------
    load_L : array, shape [L]
        Seconds of each layer's transfers, alone on the port.
    before, now : arrays, shape [2, L]
        Seconds of each layer, and of its all-to-all (part of the first), in the last pass and in this one:
        before the first layers, the last ones of the last pass run.
    distance : int
        Layers ahead that deciding and transfers start.
    decide : float
        Seconds that a layer's decision takes.
    contention : bool
        Whether transfers and the all-to-all share ports.
    """
    longer_L = slowed(now[1], load_L, distance) if contention else np.zeros(len(load_L))
    window = np.concatenate(
        [before[:, -distance:], now + np.stack([longer_L, np.zeros(len(load_L))])], axis=1
    )
    total = np.concatenate([np.zeros((2, 1)), np.cumsum(window, axis=1)], axis=1)
    span_L, network_L = total[:, distance:-1] - total[:, : -1 - distance]
    late_L = np.maximum(decide - span_L, 0.0)
    if contention:
        span_L = span_L - network_L
    wait_L = np.where(load_L > 0, np.maximum(decide + load_L - span_L, 0.0), 0.0)
    return np.maximum(wait_L, late_L), longer_L

"""Shares as the dispatch table of a problem has them: rounded to whole entries, whoever made them."""

from __future__ import annotations

import numpy as np

from moeless_opt.problems.arrays import FloatArray, SlotArray
from moeless_opt.problems.plan import gpu_times, gpu_tokens
from moeless_opt.problems.spec import Problem
from moeless_opt.solvers.shares import entry_shares

__all__ = ["in_entries"]

_WHOLE = 1e-9


def in_entries(
    problem: Problem, load_LE: FloatArray, slots_LGC: SlotArray, share_LGC: FloatArray
) -> FloatArray:
    """The shares, where the problem has a table of entries in multiples of one of them, shape [L, G, C].

    The largest time is made least by it. Where time is more than tokens, what each GPU takes besides counts
    as it is, and replicas without a share get none. Shares that are whole entries already stay.
    """
    entries = problem.share_entries
    if entries is None or not (np.isfinite(share_LGC).all() and (share_LGC >= 0).all()):
        return share_LGC
    count_LGC = share_LGC * entries
    if (np.abs(count_LGC - np.rint(count_LGC)) <= _WHOLE).all():
        return np.asarray(np.rint(count_LGC) / entries)
    speed_G, time = problem.topology.speed_G, problem.time
    if time.counts_tokens_only:
        return entry_shares(load_LE, slots_LGC, share_LGC, entries, speed_G)
    work_LG = gpu_times(load_LE, slots_LGC, share_LGC, speed_G, time) * speed_G
    token_LG = gpu_tokens(load_LE, slots_LGC, share_LGC)
    cost = time.token_cost
    if time.has_curve:  # as if every token cost the same
        cost = float(work_LG.sum()) / max(float(token_LG.sum()), 1e-300)
    extra_LG = work_LG / cost - token_LG if cost > 0 else np.zeros_like(token_LG)
    return entry_shares(load_LE, slots_LGC, share_LGC, entries, speed_G, extra_LG=extra_LG, idle=False)

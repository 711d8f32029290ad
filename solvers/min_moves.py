"""Proof."""

from moeless_opt.solvers.replan_flow import Cut, LayerFlow


def flow_moves_bound(state: LayerFlow, cut: Cut) -> int:
    """Moves that any plan needs at least, from one minimum cut."""
    leave = 0
    for name, excess in cut.excess.items():
        for load in sorted((state.load[expert] for expert in cut.captive[name]), reverse=True):
            if excess <= 0:
                break
            excess -= load
            leave += 1
    arrive, overflow = 0, sum(cut.excess.values())
    for slack in sorted(cut.slack.values(), reverse=True):
        if overflow <= 0:
            break
        overflow -= slack
        arrive += 1
    return max(leave, arrive)

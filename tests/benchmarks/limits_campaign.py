"""Plans under limits against enumeration: ``python tests/benchmarks/limits_campaign.py [--cases N]``.

Random small problems with any limits (see `tests.oracles.limited`), solved by default and judged by all their
placements: how many plans are above the optimum and by how much, moves above the fewest, refusals of what has
a plan, false bounds and proofs. Exits with 1 if anything is wrong rather than weak.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

import moeless_opt as mo

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.oracles.limited import Verdict, draw, judge


def kinds(problem: mo.Problem) -> list[str]:
    """The limits that are set."""
    default = mo.Limits()
    names = [n for n in mo.Limits.__dataclass_fields__ if getattr(problem.limits, n) != getattr(default, n)]
    names.append(str(problem.split))
    if problem.current is not None:
        names.append("live")
    if problem.loads.shape[0] > 1:
        names.append("scenarios")
    if problem.layers > 1:
        names.append("layers")
    return names


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=0, help="worst cases to name")
    args = parser.parse_args()
    verdicts: dict[int, Verdict] = {}
    problems: dict[int, mo.Problem] = {}
    wrong: list[str] = []
    impossible, spent = 0, 0.0
    for case in range(args.cases):
        problem = draw(np.random.default_rng((args.seed, case)))
        began = time.process_time()
        try:
            verdict = judge(problem)
        except (AssertionError, mo.MoelessError) as error:
            wrong.append(f"case {case}: {type(error).__name__} {error}")
            continue
        finally:
            spent += time.process_time() - began
        if verdict is None:
            impossible += 1
            continue
        verdicts[case], problems[case] = verdict, problem
        wrong += [f"case {case}: {claim}" for claim in verdict.false]
    excess = {case: verdict.excess for case, verdict in verdicts.items()}
    above = [case for case in excess if excess[case] > 0]
    sizes = np.array([excess[case] for case in above]) if above else np.zeros(1)
    more = [case for case, v in verdicts.items() if v.moves > v.fewest]
    live = [case for case in verdicts if problems[case].current is not None]
    print(f"{args.cases} cases, {impossible} impossible and said to be, {len(wrong)} wrong; {spent:.0f} s")
    print(
        f"{len(above)} of {len(verdicts)} plans above the optimum "
        f"({len(above) / max(len(verdicts), 1):.2%}); "
        f"of those median {np.median(sizes):.2%}, worst {sizes.max():.2%}"
    )
    fewest, moves = sum(verdicts[c].fewest for c in live), sum(verdicts[c].moves for c in live)
    print(
        f"{len(more)} of {len(live)} re-plans move more than the fewest: {moves} replicas, {fewest} would do"
    )
    every = Counter(kind for problem in problems.values() for kind in kinds(problem))
    high = Counter(kind for case in above for kind in kinds(problems[case]))
    print("above, by kind:", ", ".join(f"{kind} {high[kind]}/{every[kind]}" for kind in sorted(every)))
    for case in sorted(above, key=lambda c: -excess[c])[: args.show]:
        v = verdicts[case]
        print(f"case {case}: {v.value:.6g}, best {v.best:.6g}, {excess[case]:.1%}: {kinds(problems[case])}")
    for line in wrong[:20]:
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""The campaign against misreading: renamed keys, turned axes, missing ranks; no recording may be misread.

    python tests/benchmarks/misread.py [--cases N] [--seed S] [--first N]
    python tests/benchmarks/misread.py --case NUMBER [--seed S]

What a case is and what counts as wrong stands in ``tests/misreading.py``. Prints a table by change, then each
failure with the number that repeats it; exits with 1 if there is any.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def main() -> int:
    """Run the campaign, or one case."""
    from tests.misreading import run_case

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this one")
    args = parser.parse_args()
    if args.case is not None:
        args.first, args.cases = args.case, 1
    total: Counter[str] = Counter()
    read: Counter[str] = Counter()
    wrong = []
    with tempfile.TemporaryDirectory() as name:
        for number in range(args.first, args.first + args.cases):
            found = run_case(args.seed, number, Path(name))
            total[found.change] += 1
            read[found.change] += found.read and not found.wrong
            if found.wrong:
                wrong.append(f"{number}: {found.kind}, {found.change}: {found.wrong}")
            elif args.case is not None:
                print(f"{found.kind}, {found.change}: {found.text}")
    print("| change | cases | read right | refused | wrong |\n|---|---|---|---|---|")
    for change in [*sorted(total), "all"]:
        count, right = (sum(x.values()) if change == "all" else x[change] for x in (total, read))
        bad = sum(f", {change}: " in one or change == "all" for one in wrong)
        print(f"| {change} | {count} | {right} | {count - right - bad} | {bad} |")
    print("\n".join(wrong))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())

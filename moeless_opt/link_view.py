"""The view of a plan's traffic: what goes over which link, what it costs, and how little it could be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moeless_opt.plots import picture, plain_title
from moeless_opt.problems.arrays import FloatArray, Record
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.plan import Locality, Plan, token_flows
from moeless_opt.problems.spec import Problem
from moeless_opt.problems.text import html_table
from moeless_opt.report import table
from moeless_opt.solvers.locality import locality_of

__all__ = ["Traffic", "traffic"]

_LONG = 1e5  # tokens over a link from which on they are counted in larger units
_WORDS = {0: "", 3: "thousand ", 6: "million ", 9: "billion "}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Traffic(Record):
    """Tokens over the links under a plan, for the expected loads, all layers together.

    Parameters
    ----------
    problem : Problem
        Whose loads these are.
    token_GG : array, shape [G, G]
        Tokens that come from one GPU (row) and are served on another (column).
    locality : Locality
        Cost of the traffic, tokens outside their groups and hops, by layer, each with a bound.
    """

    problem: Problem
    token_GG: FloatArray
    locality: Locality

    @property
    def token_NN(self) -> FloatArray:
        """Tokens from node to node, shape [N, N]."""
        node_G, nodes = self.problem.topology.node_G, self.problem.topology.nodes
        inside_NG = (node_G == np.arange(nodes)[:, None]).astype(np.float64)
        return np.asarray(inside_NG @ self.token_GG @ inside_NG.T)

    @property
    def leaving(self) -> float:
        """Share of the tokens that are served on another node than they come from."""
        total = float(self.token_GG.sum())
        return 1 - float(np.trace(self.token_NN)) / total if total else 0.0

    @property
    def summary(self) -> dict[str, float]:
        """The figures in short: shares of all tokens (hops: mean cost), and the least that they can be."""
        problem, told = self.problem, self.locality
        tokens = float(problem.load_LE.sum()) or 1.0
        found = {
            "leaving": self.leaving,
            "cost": float(told.traffic_L.sum()) / tokens,
            "least_cost": float(told.traffic_bound_L.sum()) / tokens,
        }
        if told.outside_L is not None and told.outside_bound_L is not None:
            found["outside"] = float(told.outside_L.sum()) / tokens
            found["least_outside"] = float(told.outside_bound_L.sum()) / tokens
        flow_LEE = problem.loads.flow_LEE
        if told.hops_L is not None and told.hops_bound_L is not None and flow_LEE is not None:
            hops = float(flow_LEE.sum()) or 1.0
            found["hops"] = float(told.hops_L.sum()) / hops
            found["least_hops"] = float(told.hops_bound_L.sum()) / hops
        return found

    def text(self, by: str = "nodes") -> str:
        """A table of the links, and the figures.

        Parameters
        ----------
        by : {"nodes", "gpus"}
            Links between which.
        """
        return f"{table(*self._cells(by), words_last=False)}\n{self._figures()}"

    def __str__(self) -> str:
        return self.text("nodes")

    def __repr__(self) -> str:
        return f"Traffic({self._figures()})"

    def _repr_html_(self) -> str:
        return html_table(*self._cells("nodes"), f"{self.problem.name}: {self._figures()}")

    def _cells(self, by: str) -> tuple[list[str], list[list[str]]]:
        if by not in ("nodes", "gpus"):
            raise ProblemError("by", f"is {by!r}, must be 'nodes' or 'gpus'")
        tokens, what = (self.token_NN, "node") if by == "nodes" else (self.token_GG, "GPU")
        most = float(tokens.max(initial=0.0))
        power = min(3 * int(np.log10(most) // 3), max(_WORDS)) if most >= _LONG else 0
        head = [f"{_WORDS[power]}tokens from {what}", *(f"to {i}" for i in range(len(tokens)))]
        told = ".4g" if power else ".6g"
        cells_NN = (tokens / 10.0**power).tolist()
        return head, [[str(i), *(f"{value:{told}}" for value in row)] for i, row in enumerate(cells_NN)]

    def _figures(self) -> str:
        said = self.summary
        parts = [f"{said['leaving']:.2%} of the tokens leave their node"]
        if self.problem.topology.cost_GG is not None:
            parts.append(f"a token costs {said['cost']:.4g} (at least {said['least_cost']:.4g})")
        else:
            parts[0] += f" (at least {said['least_cost']:.2%} must)"
        if "outside" in said:
            parts.append(
                f"{said['outside']:.2%} are served outside their group's node (at least "
                f"{said['least_outside']:.2%} in this time)"
            )
        if "hops" in said:
            parts.append(f"a hop to the next layer costs {said['hops']:.4g}")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"nodes": self.token_NN.tolist(), "gpus": self.token_GG.tolist(), "summary": self.summary}

    def plot(self, *, by: str = "gpus", form: str = "png") -> bytes:
        """Draw the links as a matrix, darker where more tokens go.

        Parameters
        ----------
        by : {"gpus", "nodes"}
            Links between which.
        form : {"png", "svg", "pdf"}
            Format of the picture.
        """
        from matplotlib.figure import Figure

        self._cells(by)
        figure = Figure(figsize=(5.5, 4.5), layout="constrained")
        axes = figure.subplots()
        shown = axes.imshow(self.token_GG if by == "gpus" else self.token_NN, cmap="Blues", vmin=0)
        figure.colorbar(shown, label="tokens")
        what = "GPU" if by == "gpus" else "node"
        axes.set(xlabel=f"served on {what}", ylabel=f"from {what}", title=plain_title(self.problem.name))
        return picture(figure, form, dpi=120)


def traffic(plan: Plan, problem: Problem | None = None) -> Traffic:
    """What a plan sends over which link.

    Parameters
    ----------
    plan : Plan
        Of any solver.
    problem : Problem, optional
        Whose loads to take; the plan's own by default.

    Raises
    ------
    ProblemError
        If the problem is unknown (a plan from a file), or of another shape.
    """
    if problem is None:
        if isinstance(plan.made_for, str):
            raise ProblemError("problem", "is missing: a plan from a file does not say what it was made for")
        problem = plan.made_for
    have = (*plan.slots_LGC.shape[:2], plan.experts)
    want = (problem.layers, problem.topology.gpus, problem.experts)
    if have != want:
        raise ProblemError(
            "plan",
            "is for {} layers, {} GPUs and {} experts; the problem has {}, {} and {}".format(*have, *want),
        )
    token_LGG = token_flows(problem, plan.slots_LGC, plan.share_LGC)
    known = plan.locality if problem is plan.made_for else None
    return Traffic(problem=problem, token_GG=token_LGG.sum(0), locality=known or locality_of(problem, plan))

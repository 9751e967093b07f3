"""One choice per unit with the least total loss under every budget: a small integer programme, solved exactly."""

from collections.abc import Sequence

import numpy as np

from lutq.errors import LutqError

SCALE = 1e4  # of losses and budgets as the solver sees them: its tolerances, about 1e-6, are absolute


def choose(
    losses: Sequence[Sequence[float]], costs: Sequence[Sequence[Sequence[int]]], budgets: Sequence[int]
) -> list[int] | None:
    """The choice for each unit that makes the sum of losses least while each sum of costs is at most its budget.

    losses: a row per unit, an entry per choice; rows may differ in length. costs: for each budget a table of that form. None
    where no choice meets all budgets. Raises LutqError where the solver gives up.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    lengths = [len(row) for row in losses]
    ends = np.cumsum(lengths)
    begins = ends - lengths
    once = np.repeat(np.eye(len(lengths)), lengths, axis=1)  # every unit gets one choice
    constraints = [LinearConstraint(once, 1, 1)]
    for table, budget in zip(costs, budgets, strict=True):
        if sum(map(min, table)) > budget:
            return None
        scale = SCALE / max(budget, 1)
        constraints.append(LinearConstraint(scale * np.concatenate(table)[None], -np.inf, scale * budget))
    loss = np.concatenate(losses).astype(float)
    loss *= SCALE / (abs(loss).max() or 1)
    while True:
        options = {"mip_rel_gap": 0}
        result = milp(loss, integrality=np.ones(len(loss)), bounds=Bounds(0, 1), constraints=constraints, options=options)
        if result.status == 2:
            return None
        if not result.success:
            raise LutqError(f"no allocation of bits was found ({result.message}): give another target")
        chosen = [int(result.x[begin:end].argmax()) for begin, end in zip(begins, ends, strict=True)]
        if all(total(table, chosen) <= budget for table, budget in zip(costs, budgets, strict=True)):
            return chosen
        taken = np.zeros(len(loss))  # within the solver's tolerance only: everything but this one choice
        taken[begins + chosen] = 1
        constraints.append(LinearConstraint(taken[None], -np.inf, len(lengths) - 1))


def total(table: Sequence[Sequence[int]], chosen: Sequence[int]) -> int:
    """The sum of what is chosen of a table with a row per unit."""
    return sum(row[choice] for row, choice in zip(table, chosen, strict=True))

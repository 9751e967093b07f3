"""The integer programme against all possibilities."""

import itertools

import numpy as np
import pytest

from lutq.knapsack import choose, total


def best_of_all(losses, costs, budgets):
    """The least loss that keeps every budget, in exact integers; None where nothing does."""
    best = None
    for chosen in itertools.product(*(range(len(row)) for row in losses)):
        if all(total(table, chosen) <= budget for table, budget in zip(costs, budgets, strict=True)):
            loss = total(losses, chosen)
            best = loss if best is None else min(best, loss)
    return best


def random_problem(seed, kinds, largest):
    """Losses, and for each kind of cost a table with numbers up to `largest` and a budget that leaves something to choose."""
    random = np.random.default_rng([seed, kinds])
    lengths = random.integers(1, 7, size=random.integers(1, 6))
    losses = [tuple(random.exponential(size=n) * 10.0 ** random.integers(-4, 2)) for n in lengths]
    costs = [[tuple(int(c) for c in random.integers(1, largest, n)) for n in lengths] for _ in range(kinds)]
    least, most = ([sum(map(pick, table)) for table in costs] for pick in (min, max))
    return losses, costs, [int(low + random.uniform(-0.1, 1) * (high - low)) for low, high in zip(least, most, strict=True)]


@pytest.mark.parametrize("largest", [10, 10**4, 10**11])
@pytest.mark.parametrize("kinds", [0, 1, 2, 3])
def test_choice_is_the_best_of_all(kinds, largest):
    found = {True: 0, False: 0}
    for seed in range(25):
        losses, costs, budgets = random_problem(seed, kinds, largest)
        about, best, chosen = f"{kinds=} {largest=} {seed=}", best_of_all(losses, costs, budgets), choose(losses, costs, budgets)
        found[chosen is None] += 1
        if best is None:
            assert chosen is None, f"{about} {chosen=}"
            continue
        assert chosen is not None, about
        for table, budget in zip(costs, budgets, strict=True):
            assert total(table, chosen) <= budget, f"{about} {budget=} {total(table, chosen)=}"
        assert total(losses, chosen) == pytest.approx(best, rel=1e-9), about
    assert found[False], f"{kinds=} {largest=} {found=}"
    assert found[True] or kinds == 0, f"{kinds=} {largest=} {found=}"


@pytest.mark.parametrize("kinds", [1, 2])
def test_one_too_much_is_too_much(kinds):
    """A budget of just what a choice takes is kept with it, and a budget of one less without it, however large the numbers."""
    for seed in range(10):
        losses, costs, _ = random_problem(seed, kinds, 10**12)
        exact = [total(table, [int(np.argmin(row)) for row in losses]) for table in costs]
        assert total(losses, choose(losses, costs, exact)) == pytest.approx(sum(map(min, losses))), f"{seed=}"
        budgets = [exact[0] - 1, *exact[1:]]
        best, chosen = best_of_all(losses, costs, budgets), choose(losses, costs, budgets)
        assert (best is None) == (chosen is None), f"{seed=} {best=} {chosen=}"
        if chosen is not None:
            assert total(costs[0], chosen) <= budgets[0], f"{seed=}"
            assert total(losses, chosen) == pytest.approx(best, rel=1e-9), f"{seed=}"


def test_equal_losses_of_nothing():
    assert choose([(0.0, 0.0)], [[(3, 1)]], [1]) == [1]
    assert choose([(0.0,), (0.0,)], [], []) == [0, 0]
    assert choose([(0.0,)], [[(3,)]], [2]) is None

"""Grids of cases that are smaller than full products."""

from itertools import combinations, product


def pairwise(*axes) -> list[tuple]:
    """Tuples with one value of each axis, in which every two values of two axes meet: the greedy
    choice, from the full product, of the tuple with most pairs that have not met."""
    cases = list(product(*(range(len(axis)) for axis in axes)))

    def pairs(case):
        return set(combinations(enumerate(case), 2))

    left, chosen = set().union(*map(pairs, cases)), []
    while left:
        best = max(cases, key=lambda case: len(pairs(case) & left))
        left -= pairs(best)
        chosen.append(tuple(axis[i] for axis, i in zip(axes, best, strict=True)))
    return chosen

"""Few cases of many parameters."""

from itertools import combinations, product


def pairwise(**values) -> tuple[str, list[tuple]]:
    """Names and cases for `parametrize`: each value meets each of every other parameter.

    Faults hang on one value or on two that meet; of all combinations about as many are left as the
    two longest parameters have. Deterministic: in turn the case that brings most new pairs.
    """
    cases = list(product(*values.values()))
    pairs = {case: set(combinations(enumerate(case), 2)) for case in cases}
    missing, chosen = set().union(*pairs.values()), []
    while missing:
        best = max(cases, key=lambda case: len(pairs[case] & missing))
        chosen.append(best)
        missing -= pairs[best]
    return ", ".join(values), chosen

"""Estimators of the weight gradient: `LowRank`, `Exact` and `Sampled`.

`Estimator` is the base class of one's own; `molegrad.estimators.base` says how to write it.
"""

from molegrad.estimators.base import Estimate, Estimator, State
from molegrad.estimators.exact import Exact
from molegrad.estimators.lowrank import LowRank
from molegrad.estimators.sampled import Sampled

__all__ = ["Estimate", "Estimator", "Exact", "LowRank", "Sampled", "State", "methods"]


def methods() -> dict[str, tuple[type[Estimator], dict]]:
    """Method names, as --streaming_method takes them, with the estimator and the options that each
    stands for; those of one's own subclasses of `Estimator` come last."""
    kinds = [LowRank, Exact, Sampled]
    kinds += [kind for kind in _descendants(Estimator) if kind not in kinds]
    return {name: (kind, options) for kind in kinds for name, options in kind.METHODS.items()}


def _descendants(kind: type[Estimator]) -> list[type[Estimator]]:
    direct = kind.__subclasses__()
    return [*direct, *(c for d in direct for c in _descendants(d))]

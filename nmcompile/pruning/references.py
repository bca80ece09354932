"""The reference operators by name, written in PyTorch. Kernels equal them bit for bit, draw for draw."""

from collections.abc import Mapping
from types import MappingProxyType

from nmcompile.pruning.baselines import biased, sdgp, unbiased, uniform
from nmcompile.pruning.magnitude import greedy, greedy_by_value
from nmcompile.pruning.minimum_variance import mvue
from nmcompile.pruning.mvue_paper import mvue_approx, mvue_one_of_two, mvue_pairs
from nmcompile.pruning.operator import PruningOperator

OPERATORS: Mapping[str, PruningOperator] = MappingProxyType(
    {
        "greedy": greedy,
        "greedy_by_value": greedy_by_value,
        "mvue": mvue,
        "mvue_one_of_two": mvue_one_of_two,
        "mvue_pairs": mvue_pairs,
        "mvue_approx": mvue_approx,
        "biased": biased,
        "uniform": uniform,
        "unbiased": unbiased,
        "sdgp": sdgp,
    }
)
"""The operators by name, as a config spells them."""

"""Pruning operators for N:M sparsity, usable alone: `greedy(x, "2:4")`, `mvue(x, "2:4", dim=0, generator=g)`."""

from collections.abc import Mapping
from types import MappingProxyType

from nmcompile.pruning.baselines import biased as biased
from nmcompile.pruning.baselines import sdgp as sdgp
from nmcompile.pruning.baselines import unbiased as unbiased
from nmcompile.pruning.baselines import uniform as uniform
from nmcompile.pruning.magnitude import greedy as greedy
from nmcompile.pruning.magnitude import greedy_by_value as greedy_by_value
from nmcompile.pruning.magnitude import mask as mask
from nmcompile.pruning.mvue import mvue as mvue
from nmcompile.pruning.mvue_paper import mvue_approx as mvue_approx
from nmcompile.pruning.mvue_paper import mvue_one_of_two as mvue_one_of_two
from nmcompile.pruning.mvue_paper import mvue_pairs as mvue_pairs
from nmcompile.pruning.operator import PruningOperator as PruningOperator
from nmcompile.pruning.operator import check as check
from nmcompile.pruning.pattern import NMPattern as NMPattern
from nmcompile.pruning.philox import draw_key as draw_key
from nmcompile.pruning.transposable import transposable_mask as transposable_mask

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
"""Operators by name, as a config spells them."""

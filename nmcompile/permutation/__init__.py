"""Channel permutations that win back magnitude before N:M pruning (Pool & Yu 2021)."""

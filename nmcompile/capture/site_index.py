"""Lookup of the layer that a call in the stitched graph belongs to."""

from collections.abc import Iterable

from nmcompile.capture.sites import FoundSite


class SiteIndex:
    """An index of layers by the weight that a node is given and by the module that contains the node."""

    def __init__(self, sites: list[FoundSite]) -> None:
        self.sites = sites
        self.taken: dict[tuple[str, frozenset[int]], int] = {}

    def of_call(self, module: str, parameters: frozenset[int]) -> tuple[str, ...]:
        """Return the layer of a conv or linear call; the n-th call on the same weight in a module is its n-th site."""
        same = [found.site for found in self.sites if parameters and found.parameters == parameters]
        here = [site for site in same if site.module == module] or same[:1]
        here = here or [found.site for found in self.sites if found.site.module == module and not found.site.role]
        if not here:
            return ()
        count = self.taken.get((module, parameters), 0)
        self.taken[module, parameters] = count + 1
        return (here[count % len(here)].layer.name,)

    def given(self, parameters: Iterable[int]) -> tuple[str, ...]:
        """Return the layers whose weight is passed to an operator other than conv or linear, like fused attention."""
        given = frozenset(parameters)
        plain = (found for found in self.sites if not found.site.is_expression)
        return tuple(found.site.layer.name for found in plain if found.parameters <= given)

    def within(self, module: str) -> tuple[str, ...]:
        """Return every layer at or below a module."""
        sites = (found.site for found in self.sites)
        return tuple(s.layer.name for s in sites if not module or f"{s.module}.".startswith(f"{module}."))

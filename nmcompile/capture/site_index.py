"""Which layer a call in the stitched graph belongs to."""

from collections.abc import Iterable

from nmcompile.capture.sites import FoundSite


class SiteIndex:
    """Finds the layers that a node runs by the weight it is given, and by the module that it stands in."""

    def __init__(self, sites: list[FoundSite]) -> None:
        self.sites = sites
        self.taken: dict[tuple[str, frozenset[int]], int] = {}

    def of_call(self, module: str, parameters: frozenset[int]) -> tuple[str, ...]:
        """The layer of a conv or linear call; the n-th call on the same weight in a module is its n-th site."""
        same = [found.site for found in self.sites if parameters and found.parameters == parameters]
        here = [site for site in same if site.module == module] or same[:1]
        here = here or [found.site for found in self.sites if found.site.module == module and not found.site.role]
        if not here:
            return ()
        count = self.taken.get((module, parameters), 0)
        self.taken[module, parameters] = count + 1
        return (here[count % len(here)].layer.name,)

    def given(self, parameters: Iterable[int]) -> tuple[str, ...]:
        """The layers whose weight is handed to an operator that is no conv or linear: fused attention, for one."""
        given = frozenset(parameters)
        plain = (found for found in self.sites if not found.site.is_expression)
        return tuple(found.site.layer.name for found in plain if found.parameters <= given)

    def within(self, module: str) -> tuple[str, ...]:
        """Every layer at or below a module."""
        sites = (found.site for found in self.sites)
        return tuple(s.layer.name for s in sites if not module or f"{s.module}.".startswith(f"{module}."))

"""New names for the layers of a captured model."""

from collections.abc import Mapping
from dataclasses import replace

from nmcompile.ir.captured import Captured, Facts, Site


def rename_layers(captured: Captured, sites: Mapping[str, Site]) -> Captured:
    """Return the captured model with other sites for some of its layers, by their present names."""
    names = {old: new.layer.name for old, new in sites.items()}
    names |= {site.layer.name: site.layer.name for site in captured.sites if site.layer.name not in names} | {"": ""}
    whole = captured.whole
    if whole is not None:
        whole = replace(whole, layers={node: tuple(names[one] for one in held) for node, held in whole.layers.items()})
    return replace(
        captured,
        sites=tuple(sites.get(site.layer.name, site) for site in captured.sites),
        facts={names[name]: _renamed(facts, names) for name, facts in captured.facts.items()},
        behind={names[name]: one for name, one in captured.behind.items()},
        bypassed={names.get(name, name): one for name, one in captured.bypassed.items()},
        suspected={names.get(name, name): one for name, one in captured.suspected.items()},
        tied={names[name]: one for name, one in captured.tied.items()},
        adapters=frozenset(names[name] for name in captured.adapters),
        recurrent=frozenset(names[name] for name in captured.recurrent),
        whole=whole,
    )


def _renamed(facts: Facts, names: Mapping[str, str]) -> Facts:
    sources = frozenset(names[name] for name in facts.sources)
    return replace(facts, sources=sources, readers=frozenset(names[name] for name in facts.readers))

"""The JSON of a report has the keys that the page on it describes, and no others."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import nmcompile

PAGE = (Path(__file__).parents[2] / "docs" / "reports.md").read_text(encoding="utf-8")
TABLE = PAGE.split("| key of a report | value |")[1].split("\n\n")[0]
DESCRIBED = set(re.findall(r"`(?:[a-z]+(?:\[\])?\.)?([a-z_]+)`", TABLE))


def keys_of(value: object) -> set[str]:
    """Return the keys of all objects that are records; those named by layers, modules or phases are not."""
    if isinstance(value, list):
        return set().union(*map(keys_of, value))
    if not isinstance(value, dict):
        return set()
    is_named = set(value) <= {"forward", "backward", "update"} or not all(map(str.isidentifier, value))
    return (set() if is_named else set(value)).union(*map(keys_of, value.values()))


@pytest.mark.parametrize("mode", ["training", "inference"])
def test_every_key_is_described(mode: str) -> None:
    model, x = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()), torch.randn(2, 4, 8, 8)
    compiled = nmcompile.compile(model.train(mode == "training"), mode, args=(x,), calibration=[x])
    analyzed = nmcompile.analyze(model, mode, args=(x,), predict=True)
    found = keys_of([json.loads(one.to_json()) for one in (nmcompile.inspect(compiled, args=(x,)), analyzed)])
    known = DESCRIBED | {"schema_version"}
    assert found - known == set()
    assert {"layers", "rows", "sample", "noise", "dense_seconds", "step_seconds"} <= found

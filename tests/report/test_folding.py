"""Folds of equal layers, and the one name that stands for theirs."""

import torch
from torch import nn

import nmcompile
from nmcompile import CompileConfig
from nmcompile.report.folding import fold_layers


def folds_of(names: list[str], widths: dict[str, int] | None = None) -> list[str]:
    """Return the folds of linear layers with these names, all pruned, of width 8 unless another is given."""
    root = nn.Module()
    for name in names:
        *path, last = name.split(".")
        owner = root
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.add_module(last, nn.Linear(8, (widths or {}).get(name, 8)))
    report = nmcompile.analyze(root, "training", config=CompileConfig(ends="sparse"))
    folds = fold_layers(report.layers)
    assert sorted(layer.name for fold in folds for layer in fold.layers) == sorted(names)
    return [str(fold) for fold in folds]


def test_numbers_fold_to_ranges() -> None:
    names = [f"layers.{i}.{end}" for i in (0, 1, 2, 5, 7, 8) for end in ("up", "down")]
    assert folds_of(names) == ["layers.[0-2,5,7-8].up ×6", "layers.[0-2,5,7-8].down ×6"]


def test_numbers_within_words_fold_too() -> None:
    assert folds_of([f"layer_{i}.fc" for i in range(12)]) == ["layer_[0-11].fc ×12"]


def test_a_name_stands_for_no_layer_that_is_not_in_the_fold() -> None:
    """0.0 is of another shape, so `[0-2].[0-1]` would name it too."""
    names = [f"b.{i}.{j}" for i in range(3) for j in range(2)]
    assert folds_of(names, {"b.0.0": 16}) == ["b.0.0", "b.[0-2].1 ×3", "b.[1-2].0 ×2"]
    assert folds_of(names) == ["b.[0-2].[0-1] ×6"]


def test_leading_zeros_stay() -> None:
    assert folds_of(["a01", "a02", "a10"]) == ["a0[1-2] ×2", "a10"]


def test_names_hold_more_digits_than_a_number() -> None:
    """Python reads no number of more than 4300 digits, and a name may be one."""
    names = ["a" + "1" * 5000, "a" + "2" * 5000]
    assert sorted(folds_of(names)) == names
    assert folds_of([f"b{10**17 + i}" for i in range(3)]) == [f"b[{10**17}-{10**17 + 2}] ×3"]


def test_layers_of_other_plans_or_kernels_do_not_fold() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    x = torch.randn(4, 8)
    folds = fold_layers(nmcompile.inspect(nmcompile.compile(model, args=(x,))).layers)
    assert [str(fold) for fold in folds] == ["0", "[1-2] ×2", "3"]

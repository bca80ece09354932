"""Adapters beside the layers of a compiled model: left dense, and merged without changing outputs."""

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig
from nmcompile.errors import ConfigError

TARGETS = ["fc1", "fc2", "head"]
CONFIGS: dict[str, peft.PeftConfig] = {
    "lora": peft.LoraConfig(target_modules=TARGETS, r=4, init_lora_weights=False),
    "dora": peft.LoraConfig(target_modules=TARGETS, r=4, use_dora=True, init_lora_weights=False),
    "ia3": peft.IA3Config(target_modules=TARGETS, feedforward_modules=["fc2"], init_ia3_weights=False),
    "vera": peft.VeraConfig(target_modules=["fc1", "fc2"], r=4),
    "loha": peft.LoHaConfig(target_modules=TARGETS, r=4, init_weights=False),
    "adalora": peft.AdaLoraConfig(target_modules=TARGETS, init_r=4, total_step=10),
    "oft": peft.OFTConfig(target_modules=TARGETS, oft_block_size=4),
}  # fmt: skip


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc1, self.fc2, self.head = (
            nn.Linear(width, out) for width, out in ((8, 16), (16, 16), (16, 16), (16, 4))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc2(self.fc1(self.stem(x).relu()).relu()).relu())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 8)


def adapted(kind: str) -> Any:
    return peft.get_peft_model(Network(), CONFIGS[kind]).eval()


@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters_are_not_pruned(kind: str, x: Tensor) -> None:
    """Only weights of the model itself carry masks, and only if the adapter does not read them."""
    model = adapted(kind)
    compiled = nmcompile.compile(model, "training")
    y = compiled(x)
    report = nmcompile.inspect(compiled)
    sparse = {layer.name for layer in report.layers if layer.status == "sparse"}
    pruned = ("stem",) if kind == "dora" else ("stem", "fc1.base_layer", "fc2.base_layer")
    assert sparse == {f"base_model.model.{name}" for name in pruned}
    for layer in report.layers:
        if "base_layer" not in layer.name and any(name in layer.name for name in TARGETS[:2]):
            assert layer.reasons[0].startswith("adapter, not pruned")
    torch.testing.assert_close(nmcompile.finalize(compiled)(x), y, rtol=0, atol=0)
    y.square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for n, p in compiled.named_parameters() if "vera" not in n)


def test_the_last_linear_stays_dense_under_its_adapter(x: Tensor) -> None:
    for args in (None, (x,)):
        report = nmcompile.analyze(adapted("lora"), args=args)
        assert report.layer("base_model.model.head.base_layer").reasons[0].startswith("last linear")


def test_an_adapter_that_is_named_is_pruned_and_stays_so(x: Tensor) -> None:
    name = "base_model.model.fc1.lora_A.default"
    asked = CompileConfig(layers={name: nmcompile.presets["weights"]})
    compiled = nmcompile.compile(adapted("lora"), "weights", config=asked)
    y = compiled(x)
    assert nmcompile.inspect(compiled).layer(name).status == "sparse"
    assert nmcompile.inspect(compiled).layer(name.replace("fc1", "fc2")).status == "dense"
    again = nmcompile.compile(compiled, "weights")
    torch.testing.assert_close(again(x), y, rtol=0, atol=0)


@pytest.mark.parametrize("names", ["lora_A lora_B", "lora_a lora_b"])
def test_adapters_of_other_libraries_are_known_by_name(names: str, x: Tensor) -> None:
    """loralib and LitGPT multiply by parameters in a subclass of the layer; torchtune has layers of those names."""
    down, up = names.split()

    class Adapted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            is_layer = down == "lora_a"
            setattr(self, down, nn.Linear(8, 4) if is_layer else nn.Parameter(torch.randn(4, 8)))
            setattr(self, up, nn.Linear(4, 8) if is_layer else nn.Parameter(torch.randn(8, 4)))

        def forward(self, x: Tensor) -> Tensor:
            base = nn.functional.linear(x, self.weight, self.bias)
            if down == "lora_a":
                return base + self.lora_b(self.lora_a(x))  # type: ignore[operator]
            return base + x @ self.lora_A.T @ self.lora_B.T  # type: ignore[operator]

    model = nn.Sequential(nn.Linear(8, 8), Adapted(), nn.Linear(8, 2))
    report = nmcompile.analyze(model, "weights", args=(x,))
    reasons = {layer.name: layer.reasons[0][:7] for layer in report.layers if "lora" in layer.name}
    assert reasons == dict.fromkeys([f"1.{down}", f"1.{up}"], "adapter")
    assert [layer.name for layer in report.layers if layer.status == "sparse"] in (["1"], ["1.weight"])


class TestMerging:
    """Merging of `BA` into a base layer's weight `W`, with the mask `m`."""

    def merged_weight(self, model: Any) -> Tensor:
        layer = model.get_submodule("base_model.model.fc1")
        return layer.base_layer.weight.detach() + layer.get_delta_weight("default")

    def test_finalize_first_keeps_the_outputs(self, x: Tensor) -> None:
        """W m + B A: what the compiled model computed, and no longer sparse."""
        compiled = nmcompile.compile(adapted("lora"), "weights")
        y, plain = compiled(x), nmcompile.finalize(compiled)
        expected = self.merged_weight(plain)
        merged = plain.merge_and_unload()  # type: ignore[operator]
        torch.testing.assert_close(merged(x), y)
        torch.testing.assert_close(merged.fc1.weight, expected)
        assert torch.count_nonzero(merged.fc1.weight) == 16 * 16

    def test_merging_first_prunes_the_sum(self, x: Tensor) -> None:
        """(W + B A) m: sparse, with a mask of the sum and other outputs."""
        model = adapted("lora")
        weight = self.merged_weight(model)
        compiled = nmcompile.compile(model.merge_and_unload(), "weights")
        plain = nmcompile.finalize(compiled)
        torch.testing.assert_close(plain(x), compiled(x), rtol=0, atol=0)
        blocks = weight.unflatten(1, (-1, 4))
        kept = torch.where(blocks.abs().argsort(-1, descending=True).argsort(-1) < 2, blocks, 0).flatten(1)
        torch.testing.assert_close(plain.get_parameter("fc1.weight"), kept)
        assert nmcompile.verify(plain).ok

    @pytest.mark.parametrize("kind", ["lora", "ia3", "oft"])
    @pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
    def test_merging_into_a_pruned_layer_is_refused(self, kind: str, merge: str, x: Tensor) -> None:
        """The sum would get another mask, and compute neither what the model did nor what the adapter learned."""
        compiled: Any = nmcompile.compile(adapted(kind), "weights")
        y, before = compiled(x), {name: value.clone() for name, value in compiled.state_dict().items()}
        for model in (compiled, copy.deepcopy(compiled)):
            with pytest.raises(ConfigError, match=r"fc1.*finalize\(model\).merge_and_unload"):
                getattr(model, merge)()
        assert all(torch.equal(value, before[name]) for name, value in compiled.state_dict().items())
        assert torch.equal(compiled(x), y)
        torch.testing.assert_close(nmcompile.finalize(compiled).merge_and_unload()(x), y)  # type: ignore[operator]

    def test_merging_is_allowed_where_no_weight_is_pruned(self, x: Tensor) -> None:
        compiled: Any = nmcompile.compile(adapted("lora"), "gradients")
        y = compiled(x)
        torch.testing.assert_close(compiled.merge_and_unload()(x), y)

    def test_adapters_come_off_and_go_on_a_compiled_model(self, x: Tensor) -> None:
        """`unload` leaves the pruned base layers; adapters that are added later are dense, and train alone."""
        base = nmcompile.compile(Network(), "weights")
        y = base(x)
        model: Any = peft.get_peft_model(base, peft.LoraConfig(target_modules=TARGETS, r=4))
        assert torch.equal(model(x), y)
        model(x).square().sum().backward()
        assert {name.split(".")[-3] for name, p in model.named_parameters() if p.grad is not None} == {
            "lora_A",
            "lora_B",
        }
        torch.testing.assert_close(model.unload()(x), y, rtol=0, atol=0)

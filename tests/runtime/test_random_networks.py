"""Small random networks of convolutions, norms, activations, pools and residual branches as runtimes."""

import torch
from hypothesis import given, settings
from torch import Tensor, nn

import nmcompile
from nmcompile.errors import ConfigError
from tests.export.test_whole_networks import PRUNED
from tests.runtime.exact_module import exact
from tests.runtime.test_runtime import compiled, in_torch
from tests.test_random_nets import fixed, nets


@given(nets)
@settings(fixed, max_examples=4)
def test_random_networks_equal_the_module(drawn: tuple[nn.Module, Tensor]) -> None:
    net, x = drawn
    model = compiled(net, x, PRUNED)
    try:
        runtime = nmcompile.runtime(model, (x,))
    except ConfigError as error:
        assert "multiplies integers" in str(error)
        return
    for one in (x, 3 * torch.randn_like(x)):
        with exact(model):
            expected = model(one)
        for run in (runtime, in_torch(runtime, one)):
            assert torch.equal(run(one), expected)

"""Where training mode loses accuracy in a short run: the gradients, the weights, or their number; beyond the paper.

Half of the weights between the ends are zero in each forward, so a dense network of half as many weights is the fair
comparison: what it loses too, no rule for masks can win back. SR-STE (Zhou et al. 2021) lets pruned weights decay.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from nmcompile.config import CompileConfig
from nmcompile.demo.resnet import ResNet
from nmcompile.errors import ConfigError
from nmcompile.paper.comparison import Comparison, Row, Setting
from nmcompile.paper.methods import Compiled, gradients
from nmcompile.paper.refresh import DENSE, LARGER, STEADY

HALF_WIDTH = 11  # of 16 channels: 47 % of the weights of convolutions
DECAY = 2e-3
"""SR-STE's λ, ten times Zhou et al.'s: a run of a few hundred steps gives a smaller one no time to act."""


def half_the_weights(model: nn.Module, calibration: Sequence[Tensor]) -> Iterator[nn.Module]:
    """Train a dense network of half as many weights in place of the model.

    Raises:
        ConfigError: the model is another network than the small one.
    """
    if not isinstance(model, ResNet):
        raise ConfigError(f"capacity halves the network 'small', not a {type(model).__name__}: leave out --model")
    yield ResNet(calibration[0].shape[-1], model.fc.out_features, HALF_WIDTH)


EXPERIMENT = Comparison(
    name="capacity",
    title="Where training mode loses accuracy",
    rows=(
        DENSE,
        Row("dense, half the weights", half_the_weights),
        Row("G 2:4", gradients("mvue", "2:4")),
        Row("W 2:4", Compiled("t-weights")),
        Row("W 2:4, G 2:4", STEADY.method),
        Row("W 2:4, G 2:4, SR-STE", Compiled("training", CompileConfig(refresh=1, sr_ste=DECAY))),
    ),
    settings={"quick": Setting("images", "small", LARGER)},
    orders=(("W 2:4, G 2:4", "dense, half the weights"), ("W 2:4, G 2:4, SR-STE", "W 2:4, G 2:4")),
    caption=(
        "Test accuracy (%), minus that of dense training: a dense network of half as many weights, MVUE 2:4 gradients "
        "(G), transposable 2:4 weights by the steady rule (W), both, and both with masks of every step and SR-STE."
    ),
)

"""A compiled model -> a callable that computes the network in integers on the CPU."""

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nmcompile.api.finalize import finalize
from nmcompile.arguments import Args, Kwargs
from nmcompile.checks import check_call, check_compiled
from nmcompile.errors import ConfigError, ExportError
from nmcompile.runtime.arena import plan_arena
from nmcompile.runtime.executor import executor_for
from nmcompile.runtime.layers import names_of, of_weights, runtime_layers
from nmcompile.runtime.lower import lower
from nmcompile.runtime.runtime import Runtime
from nmcompile.runtime.trace import trace_graph
from nmcompile.three_gemm.record import record_of


def runtime(compiled: nn.Module, args: Args, *, kwargs: Kwargs | None = None) -> Runtime:
    """Return a callable that computes a compiled model for inference in integers, for inputs of these shapes.

    Between its layers the network is codes of one byte, channels last: 4-bit and 8-bit activations, pruned where they
    arise, and residual sums of whole steps. What it has no step for, torch computes in floats. Weights are copied and
    packed now; later changes of the model are not seen.

    Its integers are those that the model's definition gives: sums are exact, and each factor, bias and norm is a
    float32 operation as in the model. Where the model's own linear layers and 2-d convolutions sum integers too, both
    give the same numbers, bit for bit: on the CPU, without gradients, with 2:4 weights and inputs of at most four bits,
    and under `torch.use_deterministic_algorithms(True)`, which chooses integers without a measurement. Any other layer
    of the model multiplies floats, so next to the middle between two codes it may round to the other one.

    Args:
        compiled: a model that `compile(mode="inference")` made, float32 on the CPU, in eval mode, with calibrated
            inputs. `CompileConfig(outputs="int8", ends="int8")` leaves the fewest floats.
        args, kwargs: an example of the inputs, a tuple and a dict. Only their shapes and dtypes count.

    Raises:
        ConfigError: `args` that are not a tuple, or hold no tensor or an empty one; a model of which no layer
            multiplies integers.
        CalibrationError: an input is to be quantized, but has no clip.
        ExportError: a model in train mode, inside a wrapper, in another dtype or on another device; one that
            torch.export cannot trace, or whose layers the graph does not show (packed projections of attention, say).
        StateError: the model is not compiled.
    """
    check_compiled("compiled", compiled)
    check_call(args, kwargs)
    example = pytree.tree_leaves((args or (), dict(kwargs or {})))
    if not any(isinstance(one, Tensor) for one in example):
        raise ConfigError("args and kwargs hold no tensor; give an example of the model's inputs, args=(x,)")
    if any(isinstance(one, Tensor) and one.numel() == 0 for one in example):
        raise ConfigError("args and kwargs hold an empty tensor; give an example of the size that is to be computed")
    root, _ = record_of(compiled)
    if compiled is not root:
        raise ExportError(f"{type(compiled).__name__} wraps a compiled model; give that, or compile what wraps it")
    if compiled.training:
        raise ExportError(f"{type(compiled).__name__} is in train mode; call .eval() before nmcompile.runtime")
    layers = runtime_layers(compiled)
    plain = finalize(compiled)
    graph = trace_graph(plain, args or (), kwargs or {})
    program = lower(graph, of_weights(layers, names_of(plain)))
    arena = plan_arena(program.steps)
    return Runtime(program, arena, executor_for(program.steps, arena), example)

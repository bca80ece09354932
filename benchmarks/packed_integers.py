"""Linear layers with few tokens, whose time goes into reading the weight.

The weight is 2:4 with 4-bit integers, packed to three bits for each weight, and the kernel is that of a frozen layer:
it rounds the input too, as ONNX Runtime's does. Its peers read the same weight in other forms: `F.linear` on the dense
fp32 weight, the sparse kernel for fp32 values, and ONNX Runtime's MatMulNBits with the same integers in blocks of 32,
which computes in fp32 (accuracy level 0) or in int8 (level 4). Every form exists in more copies, read in rotation, than
a cache holds. Outputs are compared first.

`layer` is what a user calls: a chain of layers compiled with mode "inference" beside dense ones in eager mode, before
and after `nmcompile.freeze`. One thread is timed by its processor time, several by wall-clock time.

python benchmarks/packed_integers.py   # writes benchmarks/results/packed_integers.json
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from tabulate import tabulate
from timing import in_turns, processor
from torch import Tensor, nn
from torch.nn import functional as F

import nmcompile
from nmcompile import CompileConfig, Phase, presets
from nmcompile.backends.cpu.gemm import Geometry, sparse_forward
from nmcompile.backends.cpu.kernels import kernel_support
from nmcompile.native import INSTRUCTION_SETS, kernels

SHAPES = (4096, 4096), (11008, 4096)  # out and in
TOKENS = 1, 2, 4, 8, 16, 64, 256
INPUT_STEP = 0.03
LAYER_TOKENS = 1, 16, 256
LEVELS = {"MatMulNBits, level 0": 0, "MatMulNBits, level 4": 4}
OURS = "packed integers"
PAUSE = 0.05  # seconds, until the threads of ONNX Runtime and PyTorch fall asleep


@dataclass(frozen=True)
class Form:
    """A weight in `count` copies.

    Args:
        read_all: multiplies with each copy and returns the last product.
        bytes_per_weight: the size of one copy for each weight of the dense matrix.
    """

    read_all: Callable[[], Tensor]
    count: int
    bytes_per_weight: float


@dataclass(frozen=True)
class Row:
    """The median times of one product, its speed-up over each peer, and what each form reads in a second."""

    product: str
    tokens: int
    threads: int
    milliseconds: dict[str, float]
    speedup: dict[str, float]
    bytes_per_weight: dict[str, float]
    gigabytes_per_second: dict[str, float]


def forms_of(integers: Tensor, step: float, x: Tensor, reach: int, threads: int) -> dict[str, Form]:
    """Return every form of a weight, each in as many copies as exceed `reach` bytes."""
    isa, dense = INSTRUCTION_SETS[0], integers.float() * step
    rows, tokens = integers.shape[0], x.shape[0]
    y, steps = x.new_empty(tokens, rows), torch.full((rows,), step * INPUT_STEP)

    def packed_layer() -> Any:
        return kernels.FrozenLinear(pack(), INPUT_STEP, 0, 15, steps, None)

    def pack() -> Any:
        packed = kernels.pack_integers(integers, threads)
        assert packed is not None
        return packed

    def packed_product(layer: Any) -> Tensor:
        assert layer.run(x.data_ptr(), tokens, y.data_ptr(), isa, threads)
        return y

    def sparse_product(packs: list[Any]) -> Tensor:
        assert sparse_forward(x, dense, None, None, y, Geometry(), packs)
        return y

    def packed_values() -> list[Any]:
        packs: list[Any] = []
        sparse_product(packs)
        return packs

    ours = partial(form, weights=integers.numel(), reach=reach)
    return {
        OURS: ours(packed_product, packed_layer, lambda _: pack().bytes),
        "F.linear": ours(partial(F.linear, x), dense.clone, lambda weight: weight.numel() * 4),
        "sparse fp32": ours(sparse_product, packed_values, lambda packs: packs[0].bytes),
    } | {name: nbits_form(integers, step, x, reach, threads, level) for name, level in LEVELS.items()}


def form(
    product: Callable[[Any], Tensor], make: Callable[[], Any], size: Callable[[Any], int], weights: int, reach: int
) -> Form:
    first = make()
    copies = [first, *(make() for _ in range(reach // size(first)))]
    return Form(lambda: [product(one) for one in copies][-1], len(copies), size(first) / weights)


def nbits_form(integers: Tensor, step: float, x: Tensor, reach: int, threads: int, level: int) -> Form:
    """Return a session with a node for each copy, so that all of them share the overhead of one call."""
    rows, depth = integers.shape
    nibbles = (integers + 8).to(torch.uint8)
    blocks = (nibbles[:, ::2] | nibbles[:, 1::2] << 4).reshape(rows, depth // 32, 16).numpy()
    scales = np.full(rows * depth // 32, step, np.float32)
    count = 1 + reach // (blocks.nbytes + scales.nbytes)
    options = {"K": depth, "N": rows, "bits": 4, "block_size": 32, "accuracy_level": level}
    stored, nodes, outputs = [], [], []
    for i in range(count):
        stored += [numpy_helper.from_array(blocks, f"b{i}"), numpy_helper.from_array(scales, f"s{i}")]
        nodes.append(
            helper.make_node("MatMulNBits", ["x", f"b{i}", f"s{i}"], [f"y{i}"], domain="com.microsoft", **options)
        )
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [len(x), rows]))
    source = helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))
    graph = helper.make_graph(nodes, "products", [source], outputs, stored)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    session = session_of(helper.make_model(graph, opset_imports=opsets, ir_version=10), threads)
    feed = {"x": x.numpy()}
    taken = (blocks.nbytes + scales.nbytes) / integers.numel()
    return Form(lambda: torch.from_numpy(session.run(None, feed)[-1]), count, taken)


def session_of(model: onnx.ModelProto, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def integers_of(rows: int, depth: int) -> Tensor:
    """Return int8 weights: two of each four in [-7, 7], the others zero."""
    kept = torch.rand(rows, depth // 4, 4).argsort(-1).lt(2).flatten(1)
    return torch.where(kept, torch.randint(-7, 8, (rows, depth)), 0).to(torch.int8)


def product_row(shape: tuple[int, int], tokens: int, reach: int, threads: int, repeats: int) -> Row:
    rows, depth = shape
    integers, step = integers_of(rows, depth), 0.01
    x = torch.randint(0, 16, (tokens, depth)) * INPUT_STEP
    forms = forms_of(integers, step, x, reach, threads)
    exact = x.double() @ integers.double().t() * step
    for name, one in forms.items():
        # Level 4 rounds the input to eight bits.
        torch.testing.assert_close(one.read_all().double(), exact, rtol=1e-4, atol=0.5 if "level 4" in name else 1e-3)
    calls, pause = {name: one.read_all for name, one in forms.items()}, 0.0 if threads == 1 else PAUSE
    times = in_turns(calls, repeats, clock=clock_of(threads), pause=pause)
    medians = {name: statistics.median(values) / forms[name].count for name, values in times.items()}
    taken = {name: one.bytes_per_weight for name, one in forms.items()}
    return row_of(f"{rows} x {depth}", tokens, threads, medians, integers.numel(), taken)


def clock_of(threads: int) -> Callable[[], float]:
    """Return processor time for one thread, which a busy machine stretches less; for several it would count waiting."""
    return time.process_time if threads == 1 else time.perf_counter


def row_of(
    name: str, tokens: int, threads: int, medians: dict[str, float], weights: int, taken: dict[str, float]
) -> Row:
    speedup = {peer: time / medians[OURS] for peer, time in medians.items() if peer != OURS}
    rate = {form: taken[form] * weights / medians[form] / 1e6 for form in taken}
    return Row(name, tokens, threads, medians, speedup, taken, rate)


def layer_row(features: int, layers: int, tokens: int, threads: int, repeats: int, is_frozen: bool) -> Row:
    """Time a chain of compiled layers beside dense ones; its weights exceed the cache."""
    net = nn.Sequential(*(nn.Linear(features, features) for _ in range(layers))).eval()
    dense, x = copy.deepcopy(net), torch.randn(tokens, features)
    config = CompileConfig(layers={"_default": presets["inference"]}, ends="sparse")
    compiled = nmcompile.compile(net, "inference", args=(x,), config=config, calibration=[x], backend="cpu").eval()
    if is_frozen:
        nmcompile.freeze(compiled)
    with torch.no_grad():
        compiled(x)
        times = in_turns({OURS: lambda: compiled(x), "eager": lambda: dense(x)}, repeats, clock=clock_of(threads))
    kernels = {layer.choices[Phase.FORWARD].kernel for layer in nmcompile.inspect(compiled).layers}
    medians = {name: statistics.median(values) / layers for name, values in times.items()}
    name = f"layer {features} x {features}{', frozen' * is_frozen}, kernel: {', '.join(sorted(kernels))}"
    return row_of(name, tokens, threads, medians, features**2, {})


def measure(reach: int, repeats: int, threads: tuple[int, ...]) -> Iterator[Row]:
    for count in threads:
        torch.set_num_threads(count)
        for shape in SHAPES:
            for tokens in TOKENS if shape == SHAPES[0] else TOKENS[:1]:
                yield product_row(shape, tokens, reach, count, repeats)
        for tokens, is_frozen in product(LAYER_TOKENS, (False, True)):
            yield layer_row(4096, 4, tokens, count, repeats, is_frozen)


def table(rows: list[Row]) -> str:
    peers = list(dict.fromkeys(peer for row in rows for peer in row.speedup))
    lines = [[r.product, r.tokens, r.threads, r.milliseconds[OURS], *(r.speedup.get(p) for p in peers)] for r in rows]
    return tabulate(lines, headers=["product", "tokens", "threads", "ms", *peers], floatfmt=".2f")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--megabytes", type=int, default=128, help="that the copies of each form take at least")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "packed_integers.json")
    options = parser.parse_args()
    if not kernel_support().ok:
        raise SystemExit(kernel_support().reason)
    torch.manual_seed(0)
    rows = []
    for row in measure(options.megabytes * 2**20, options.repeats, tuple(dict.fromkeys(options.threads))):
        rows.append(row)
        print(table([row]), flush=True)
    print(table(rows))
    options.out.parent.mkdir(exist_ok=True)
    setting = {
        "torch": torch.__version__,
        "onnxruntime": ort.__version__,
        "machine": processor(),
        "repeats": options.repeats,
        "megabytes": options.megabytes,
    }
    options.out.write_text(json.dumps({**setting, "results": [asdict(row) for row in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()

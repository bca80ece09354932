"""Valid ONNX files on which ONNX Runtime dies or never ends, found by mutating small models, and harmless relatives."""

import onnx

HEADER = '<ir_version: 8, opset_import: ["": 17, "local": 1, "com.microsoft": 1]>\n'
FUNCTION = '\n<domain: "local", opset_import: ["": 17, "local": 1]>\n'
SIGNATURE = "g (float[1,4] x) => (float[A,B] y)"
IMAGE = "g (float[1,4,4,4] x) => (float[A,B,C,D] y)"
RUNS = "y = Loop <body = b (int64 i, bool was, float[A,B] a) => (bool go, float[A,B] o) {{ {} o = Relu(a) }}> ({}, x)"
AGAIN, TRUE, DECIDED = (
    "go = Identity(was)",
    "go = Constant<value = bool {1}>()",
    "s = ReduceSum<keepdims = 0>(a) go = Less(s, z)",
)
FOREVER = "int64 n = {4611686018427387904}, bool c = {1}, float z = {0}"


def chain(depth: int, calls: int) -> str:
    """Make functions that each call the next one several times in a row."""
    functions = []
    for level in range(depth):
        called = f"local.f{level + 1}" if level + 1 < depth else "Relu"
        body = " ".join(f"t{call + 1} = {called}(t{call})" for call in range(calls))
        functions.append(f"{FUNCTION}f{level} (t0) => (t{calls}) {{ {body} }}")
    return "{ y = local.f0(x) }" + "".join(functions)


FATAL = {
    **{
        f"{op} of nothing": (f'{SIGNATURE} {{ y = {op}(x, "", x) }}', "an input that is not")
        for op in ("Sum", "Max", "Min", "Mean")
    },
    "Einsum of nothing": (f'{SIGNATURE} {{ y = Einsum<equation = "ij,jk->ik">(x, "") }}', "an input that is not"),
    "Sum of nothing in a function": (
        f'{SIGNATURE} {{ y = local.f(x, "") }}{FUNCTION}f (a, b) => (c) {{ c = Sum(a, b) }}', "an input that is not"
    ),
    "Sum of nothing two functions down": (
        f"{SIGNATURE} {{ y = local.f(x) }}{FUNCTION}f (a, b) => (c) {{ c = local.g(a, b) }}"
        f"{FUNCTION}g (a, b) => (c) {{ d = Identity(b) c = Sum(a, d) }}",
        "an input that is not",
    ),
    "Split into nothing": (
        f'{SIGNATURE} <int64[2] s = {{0, 1}}> {{ y, "" = Split(x, s) }}', "leaves out one of its outputs"
    ),
    "Loop into nothing": (
        f"{SIGNATURE} <int64 n = {{3}}, bool c = {{1}}> {{ "
        + RUNS.format(AGAIN + " p = Relu(a)", "n, c, x").replace("float[A,B] o)", "float[A,B] o, float[A,B] p)")
        .replace("y = Loop", 'y, "" = Loop').replace("float[A,B] a)", "float[A,B] a, float[A,B] a2)") + " }",
        "leaves out one of its outputs",
    ),
    "integers by -1": (
        f"{SIGNATURE} <int32[1] a = {{-2147483648}}, int32 b = {{-1}}> "
        "{ c = Div(a, b) d = Cast<to = 1>(c) y = Add(x, d) }",
        "divides integers by -1",
    ),
    "computed integers by -1": (
        f"{SIGNATURE} <int64[1,4] a = {{-9223372036854775808, 0, 0, 0}}, int64 b = {{-1}}> {{ "
        "i = Cast<to = 7>(x) z = Sub(i, i) s = Add(z, a) c = Div(s, b) y = Cast<to = 1>(c) }",
        "divides integers by -1",
    ),
    "frames of no length": (
        "g (float[1,16,1] x) => (float[A,B,C,D] y) <int64 step = {1}, int64 size = {0}> "
        '{ y = STFT(x, step, "", size) }',
        "not above zero",
    ),
    "2 to the 18 calls": (f"{SIGNATURE} {chain(18, 2)}", "add more than 32768 nodes"),
    "70 functions deep": (f"{SIGNATURE} {chain(70, 1)}", "more than 64 graphs and functions"),
    "Loop of 2 to the 62": (f"{SIGNATURE} <{FOREVER}> {{ {RUNS.format(AGAIN, 'n, c')} }}", "runs more than"),
    "Loop without a condition": (f'{SIGNATURE} <{FOREVER}> {{ {RUNS.format(AGAIN, """n, "" """)} }}', "runs more than"),
    "Loop that always says yes": (f"{SIGNATURE} <{FOREVER}> {{ {RUNS.format(TRUE, 'n, c')} }}", "runs more than"),
    "Loop that asks a constant": (
        f"{SIGNATURE} <{FOREVER}> {{ {RUNS.format('h = Identity(c) go = Identity(h)', 'n, c')} }}", "runs more than"
    ),
    "Loop without a count": (f"""{SIGNATURE} <{FOREVER}> {{ {RUNS.format(AGAIN, '"", c')} }}""", "runs more than"),
    "Loop of a Constant": (
        f"{SIGNATURE} <{FOREVER}> {{ m = Constant<value_int = 4611686018427387904>() k = Identity(m) "
        f"{RUNS.format(AGAIN, 'k, c')} }}",
        "runs more than",
    ),
    "Loops in loops": (
        f"{SIGNATURE} <int64 n = {{10000}}, bool c = {{1}}> {{ "
        + RUNS.format(AGAIN + " u = Loop <body = d (int64 j, bool w, float[A,B] e) => (bool again, float[A,B] f) "
                      "{ again = Identity(w) f = Relu(e) }> (n, c, a)", "n, c") + " }",
        "runs more than",
    ),
    **{
        f"weight of {dims}": (f"{SIGNATURE} <float[{dims}] w = {{}}> {{ y = {op} }}", "a weight without elements")
        for dims, op in (("4,0", "MatMul(x, w)"), ("0,4", "Gemm<transB = 1>(x, w)"), ("0,4,4", "MatMul(x, w)"))
    },
    "quantized weight of nothing": (
        "g (float[1,0] x) => (float[A,B] y) <int8[0,4] w = {}, float s = {1}, uint8 z = {0}, int8 v = {0}> "
        "{ q = QuantizeLinear(x, s, z) e = DequantizeLinear(q, s, z) d = DequantizeLinear(w, s, v) y = MatMul(e, d) }",
        "a weight without elements",
    ),
    "weight of nothing in an operator of ONNX Runtime": (
        "g (float[1,0] x) => (float[A,B] y) <uint8[0,0] w = {}> "
        "{ y = com.microsoft.DynamicQuantizeMatMul(x, w, x) }",
        "a weight without elements",
    ),
    "Loop of no count": (
        f"{SIGNATURE} <int64[0] n = {{}}, bool c = {{1}}> {{ {RUNS.format(AGAIN, 'n, c')} }}", "not a single element"
    ),
    "Loop on no answer": (
        f"{SIGNATURE} <int64 n = {{3}}, bool[0] c = {{}}> {{ {RUNS.format(AGAIN, 'n, c')} }}", "not a single element"
    ),
    "Conv without channels": (
        f"{IMAGE} <float[0,4,3,3] w = {{}}> {{ y = Conv(x, w) }}", "a weight without elements"
    ),
    "LSTM of no size": (
        "g (float[1,1,4] x) => (float[A,B,C,D] y) <float[1,0,4] w = {}, float[1,0,0] r = {}> "
        "{ y = LSTM<hidden_size = 0>(x, w, r) }",
        "a weight without elements",
    ),
    "Sum of nothing in a branch": (
        f"{SIGNATURE} <bool c = {{1}}> {{ y = If (c) <then_branch = t () => (float[A,B] p) {{ p = Sum(x, \"\") }}, "
        "else_branch = e () => (float[A,B] q) { q = Relu(x) }> }",
        "an input that is not",
    ),
}  # fmt: skip
"""Models and the expected error texts, by what is wrong with the model."""

HARMLESS = {
    "optional inputs left out": f'{SIGNATURE} <float m = {{1}}> {{ y = Clip(x, "", m) }}',
    "optional inputs left out in a function": (
        f'{SIGNATURE} {{ y = local.f(x, "") }}{FUNCTION}f (a, b) => (c) {{ c = Clip(a, b) }}'
    ),
    "region of no size": f'{IMAGE} <float[0] r = {{}}, float[4] s = {{1, 1, 2, 2}}> {{ y = Resize(x, r, s) }}',
    "empty cache": f"{SIGNATURE} <float[0,4] w = {{}}> {{ y = Concat<axis = 0>(w, x) }}",
    "optional outputs left out": f'{SIGNATURE} {{ y, "" = Dropout(x) }}',
    "Loop that decides": f"{SIGNATURE} <{FOREVER}> {{ {RUNS.format(DECIDED, 'n, c')} }}",
    "Loop that says no": f"{SIGNATURE} <{FOREVER}> {{ {RUNS.format(TRUE.replace('{1}', '{0}'), 'n, c')} }}",
    "Loop of a thousand": f"{SIGNATURE} <int64 n = {{1000}}, bool c = {{1}}> {{ {RUNS.format(AGAIN, 'n, c')} }}",
    "integers by 2": (
        f"{SIGNATURE} <int32 b = {{2}}> {{ i = Cast<to = 6>(x) c = Div(i, b) y = Cast<to = 1>(c) }}"
    ),
    "numbers by -1": f"{SIGNATURE} <float b = {{-1}}> {{ y = Div(x, b) }}",
    "1024 calls": f"{SIGNATURE} {chain(10, 2)}",
    "60 functions deep": f"{SIGNATURE} {chain(60, 1)}",
}  # fmt: skip


def built(text: str) -> bytes:
    return bytes(onnx.parser.parse_model(HEADER + text).SerializeToString())

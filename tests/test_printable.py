"""Names in models and files can hold anything; when printed they stay text in their place."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import nmcompile
from nmcompile.backends.shared.known_choices import forget, known_choices
from nmcompile.backends.shared.saved_choices import load_choices, save_choices
from nmcompile.cli import cli
from nmcompile.errors import NMCompileError
from nmcompile.ir.plan import Reverted
from nmcompile.printable import LONGEST, in_markdown, printable, table

FORGED = "every block holds"
HOSTILE = f"a\n\n{FORGED}\r\x1b[2K\x1b]0;title\x07\x9b\u2028\u202eb|`<img src=x>`| \ud800"
"""Newlines, a forged verdict, a cleared line, a set title, other line ends, reversed text, markup, half a character."""
NAME = HOSTILE.replace("\ud800", "").replace(".", "")
"""Such a name, in the form that a torch module can have."""
CHARACTERS = ("\0", "\x1b", "\n", "\r", "\t", "\x7f", "\x9b", "\xad", "\u2029", "\u2066", "\ud8ab")


def assert_is_text(shown: str) -> None:
    """Check that nothing moves the cursor, and that no line says what only the program may say."""
    assert [character for character in shown if not character.isprintable() and character != "\n"] == []
    assert FORGED not in (line.strip() for line in shown.splitlines())
    shown.encode()


@pytest.mark.parametrize("character", CHARACTERS)
def test_what_is_not_printable_is_escaped(character: str) -> None:
    shown = printable(f"a{character}b")
    assert shown.isprintable() and shown.startswith("a\\") and shown.endswith("b")


@pytest.mark.parametrize("text", ["", "fc.weight", "größe", "层/权重", "2:4 and 4×8 – “x”"])
def test_what_is_printable_stays(text: str) -> None:
    assert printable(text) == text


def test_long_text_keeps_its_ends() -> None:
    shown = printable("a" * 10**6 + "b" * 10**6)
    assert len(shown) == LONGEST + 3 and shown.startswith("aaa") and "a...b" in shown and shown.endswith("bbb")


def test_markdown_shows_the_text() -> None:
    assert in_markdown("a|b`c<d>&__e__[f](g)") == r"a\|b\`c&lt;d&gt;&amp;\_\_e\_\_\[f\](g)"


def test_a_row_of_a_table_is_one_line() -> None:
    lines = table([[HOSTILE, 3], ["1e400", 4]], ["name", "number"], "github").splitlines()
    assert len(lines) == 4 and all(line.replace("\\|", "").count("|") == 3 for line in lines)
    assert "1e400" in lines[3]


@pytest.mark.parametrize("kind", [NMCompileError, *NMCompileError.__subclasses__()])
def test_an_error_is_one_printable_line(kind: type[NMCompileError]) -> None:
    error = kind(f"layer {HOSTILE}: {'x' * 10**6}")
    assert str(error).isprintable() and len(str(error)) < 10**4 and str(error).startswith("layer a\\n")


class Net(nn.Module):
    """A model with every kind of row and note: a sparse layer, a bypassed one, one that stays Python, a skipped one."""

    def __init__(self) -> None:
        super().__init__()
        for name, module in {"in": nn.Linear(8, 8), "mid": nn.Linear(8, 8), "two": nn.Bilinear(8, 8, 8)}.items():
            self.add_module(NAME + name, module)
        self.first, self.second, self.third = self.children()

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.second(self.first(x).relu())
        return self.third(hidden, hidden) if hidden.sum() > 0 else hidden


@pytest.fixture
def compiled() -> nn.Module:
    return nmcompile.compile(Net(), config=nmcompile.CompileConfig(ends="sparse"))


@pytest.mark.parametrize("form", ["screen", "text", "markdown", "graphs", "json"])
def test_a_report_shows_names_as_text(form: str, compiled: nn.Module) -> None:
    compiled(torch.randn(2, 8))
    report = nmcompile.inspect(compiled)
    graphs = "\n".join(str(layer.graphs) for layer in report.layers)
    forms = {"screen": str(report), "text": report.full(), "markdown": report.to_markdown(), "graphs": graphs}
    shown = (forms | {"json": report.to_json()})[form]
    assert_is_text(shown)
    if form == "markdown":
        before, notes, after = shown.split("\n```")
        assert "<img" in notes and "<img" not in before + after and "`<" not in before + after


def test_other_reports_show_names_as_text(compiled: nn.Module) -> None:
    assert_is_text(str(nmcompile.compare(nmcompile.decompile(compiled), compiled, torch.randn(2, 8))))
    assert_is_text(str(Reverted((HOSTILE,), 1.0, 0.5)))
    checks = str(nmcompile.verify(compiled))
    assert_is_text(checks.removesuffix(FORGED))
    assert checks.endswith(f"\n\n{FORGED}")


def proto(weight: "np.ndarray[Any, Any]", name: str = NAME) -> onnx.ModelProto:
    """Make a product with a weight in which every name is hostile."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", name], ["y"], name=name)],
        name,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (2, 8))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (2, 8))],
        [numpy_helper.from_array(weight, name)],
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])


def broken(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Make a file that the checker refuses, quoting its hostile names."""
    proto.graph.node[0].op_type = proto.graph.node[0].name
    return proto


def unknown_input(proto: onnx.ModelProto) -> onnx.ModelProto:
    proto.graph.node[0].input[0] = f"{NAME} unknown"
    return proto


def short(proto: onnx.ModelProto) -> onnx.ModelProto:
    proto.graph.initializer[0].raw_data = b""
    return proto


FILES: dict[str, tuple[Callable[[onnx.ModelProto], onnx.ModelProto], int]] = {
    "dense": (lambda proto: proto, 1),
    "operator": (broken, 1),
    "input": (unknown_input, 1),
    "data": (short, 1),
}


@pytest.mark.parametrize("command", [("inspect",), ("verify", "--pattern", "2:4")])
@pytest.mark.parametrize("case", FILES)
def test_a_file_cannot_print_a_verdict(case: str, command: tuple[str, ...], tmp_path: Path) -> None:
    edit, status = FILES[case]
    path = tmp_path / "m.onnx"
    path.write_bytes(edit(proto(np.ones((8, 8), np.float32))).SerializeToString())
    result = CliRunner().invoke(cli, [command[0], str(path), *command[1:]])
    assert result.exit_code == (0 if case == "dense" and command == ("inspect",) else status)
    assert_is_text(result.output if result.exception is None else result.output + str(result.exception))
    assert isinstance(result.exception, NMCompileError | SystemExit | None)


@pytest.fixture
def nothing_loaded() -> Iterator[None]:
    forget()  # measurements of earlier tests
    yield
    forget()


def test_saved_choices_cannot_print_a_verdict(tmp_path: Path, nothing_loaded: None) -> None:
    path = tmp_path / "choices.json"
    save_choices(path)
    reason = HOSTILE.encode("unicode_escape").decode().replace("\\x", "\\u00")
    path.write_text(path.read_text().replace("{}", f'{{"p": {{"kernel": "dense", "reason": "{reason}"}}}}'))
    load_choices(path)
    assert known_choices()["p"].reason == HOSTILE
    assert_is_text(table([[str(known_choices()["p"])]], ["kernel"]))


def test_what_accuracy_control_logs_is_text(caplog: pytest.LogCaptureFixture) -> None:
    scores = iter((1.0, 0.0, *[1.0] * 9))
    with caplog.at_level(logging.INFO, "nmcompile"):
        sparse = nmcompile.CompileConfig(ends="sparse")
        nmcompile.compile(Net(), "weights", config=sparse, validation=lambda _: next(scores), max_drop=0.1)
    assert_is_text(caplog.text)
    assert "reverted" in caplog.text

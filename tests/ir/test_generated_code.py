"""The sources of generated code: Python's line cache has them as long as the code lives."""

import gc
import inspect
import linecache
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, fx, nn
from torch.fx.graph_module import _loader

from nmcompile.ir.generated_code import GeneratedModule
from nmcompile.own_thread import exporting_alone


def double(x: Tensor) -> Tensor:
    return x + x


def graph() -> fx.Graph:
    return fx.Tracer().trace(double)


def file_of(module: fx.GraphModule) -> str:
    return str(type(module).forward.__code__.co_filename)


def is_known(file: str) -> bool:
    return file in linecache.cache or file in _loader.eval_cache


def test_a_source_goes_with_its_code() -> None:
    module = GeneratedModule(nn.Module(), graph())
    first = file_of(module)
    assert "x + x" in inspect.getsource(type(module).forward)
    module.recompile()
    second = file_of(module)
    assert not is_known(first) and is_known(second)
    forward = type(module).forward  # as a class that is made of it holds it
    del module
    assert is_known(second)
    del forward
    gc.collect()
    assert not is_known(second)


def test_what_a_thread_exports_adds_no_source_and_what_another_makes_does() -> None:
    with ThreadPoolExecutor(1) as pool, exporting_alone():
        own = fx.GraphModule(nn.Module(), graph())
        other = pool.submit(lambda: fx.GraphModule(nn.Module(), graph())).result()
        assert not is_known(file_of(own)) and is_known(file_of(other))
    assert own(torch.ones(())) == other(torch.ones(())) == 2
    assert is_known(file_of(fx.GraphModule(nn.Module(), graph())))

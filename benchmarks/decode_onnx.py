"""A Llama as a graph of ONNX Runtime's own operators for decoders, and a loop that decodes with it."""

import logging

import numpy as np
import onnx
import onnxruntime as ort
import torch
import vision as vision  # before transformers, which imports torchvision
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

MICROSOFT = "com.microsoft"
logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)
OPSETS = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]


class Builder:
    """The nodes, initializers, inputs and outputs of a graph."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def store(self, name: str, value: Tensor) -> str:
        self.initializers.append(numpy_helper.from_array(value.detach().contiguous().numpy(), name))
        return name

    def node(self, operator: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: object) -> str:
        made = helper.make_node(operator, inputs, outputs, domain=domain, name=outputs[0], **attributes)  # type: ignore[arg-type]
        self.nodes.append(made)
        return outputs[0]

    def linear(self, x: str, layer: nn.Linear, name: str) -> str:
        return self.node("MatMul", [x, self.store(f"{name}.weight", layer.weight.t())], [name])

    def norm(self, x: str, residual: str, layer: nn.Module, name: str) -> tuple[str, str]:
        """Return the normalized sum of both, and the sum."""
        weight = self.store(f"{name}.weight", layer.weight)  # type: ignore[arg-type]
        outputs = [name, "", "", f"{name}.sum"]
        epsilon = layer.variance_epsilon
        self.node("SkipSimplifiedLayerNormalization", [x, residual, weight], outputs, MICROSOFT, epsilon=epsilon)
        return name, f"{name}.sum"

    def model(self, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "llama", inputs, outputs, self.initializers)
        return helper.make_model(graph, opset_imports=OPSETS, ir_version=10)


class FourBitBuilder(Builder):
    """Nodes in which every weight of a product is in 4-bit blocks of 32, computed in int8 (accuracy level 4).

    Each product is quantized by itself, so the graph in fp32 never takes memory.
    """

    def linear(self, x: str, layer: nn.Linear, name: str) -> str:
        alone = Builder()
        alone.linear(x, layer, name)
        config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True, accuracy_level=4)
        quantizer = MatMulNBitsQuantizer(alone.model([], []), algo_config=config)
        quantizer.process()
        graph = quantizer.model.model.graph
        assert [node.op_type for node in graph.node] == ["MatMulNBits"]
        self.nodes += graph.node
        self.initializers += graph.initializer
        return name


def llama_graph(model: LlamaForCausalLM, length: int, build: Builder) -> onnx.ModelProto:
    """Return the model for a cache of `length` positions; logits are those of the last token."""
    config, body = model.config, model.model
    angles = torch.arange(length).float()[:, None] * body.rotary_emb.inv_freq
    build.store("cosines", angles.cos())
    build.store("sines", angles.sin())
    build.store("embedding", body.embed_tokens.weight)
    residual = build.node("Gather", ["embedding", "ids"], ["embedded"])
    first = body.layers[0].input_layernorm
    gain = build.store("first.weight", first.weight)
    epsilon = first.variance_epsilon
    x = build.node("SimplifiedLayerNormalization", [residual, gain], ["first"], epsilon=epsilon, axis=-1)
    norms = [*(layer.input_layernorm for layer in body.layers[1:]), body.norm]
    for i, (layer, norm) in enumerate(zip(body.layers, norms, strict=True)):
        output = attention(build, x, layer.self_attn, config, i)
        x, residual = build.norm(output, residual, layer.post_attention_layernorm, f"{i}.before_mlp")
        x, residual = build.norm(gated_mlp(build, x, layer.mlp, i), residual, norm, f"{i}.after_mlp")
    build.initializers.append(numpy_helper.from_array(np.array([-1]), "last"))
    build.linear(build.node("Gather", [x, "last"], ["last_token"], axis=1), model.lm_head, "logits")
    inputs = [
        helper.make_tensor_value_info("ids", TensorProto.INT64, [1, "tokens"]),
        helper.make_tensor_value_info("last_position", TensorProto.INT32, [1]),
        helper.make_tensor_value_info("total", TensorProto.INT32, []),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 1, config.vocab_size])]
    for name in cache_names(config):
        shape = [1, config.num_key_value_heads, length, config.head_dim]
        inputs.append(helper.make_tensor_value_info(f"past.{name}", TensorProto.FLOAT, shape))
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    return build.model(inputs, outputs)


def attention(build: Builder, x: str, layer: nn.Module, config: LlamaConfig, i: int) -> str:
    projected = [build.linear(x, getattr(layer, f"{name}_proj"), f"{i}.{name}") for name in "qkv"]  # type: ignore[arg-type]
    inputs = [*projected, f"past.key.{i}", f"past.value.{i}", "last_position", "total", "cosines", "sines"]
    heads = {"num_heads": config.num_attention_heads, "kv_num_heads": config.num_key_value_heads}
    outputs = [f"{i}.mixed", f"key.{i}", f"value.{i}"]
    mixed = build.node("GroupQueryAttention", inputs, outputs, MICROSOFT, do_rotary=1, **heads)
    return build.linear(mixed, layer.o_proj, f"{i}.o")  # type: ignore[arg-type]


def gated_mlp(build: Builder, x: str, layer: nn.Module, i: int) -> str:
    gate, up = (build.linear(x, getattr(layer, f"{name}_proj"), f"{i}.{name}") for name in ("gate", "up"))
    silu = build.node("QuickGelu", [gate], [f"{i}.silu"], MICROSOFT, alpha=1.0)
    product = build.node("Mul", [silu, up], [f"{i}.product"])
    return build.linear(product, layer.down_proj, f"{i}.down")  # type: ignore[arg-type]


def cache_names(config: LlamaConfig) -> list[str]:
    return [f"{kind}.{i}" for i in range(config.num_hidden_layers) for kind in ("key", "value")]


class OnnxDecoder:
    """A session and the buffer of keys and values, which each run reads and extends in place."""

    def __init__(self, model: bytes, config: LlamaConfig, prompt: Tensor, length: int, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.prompt, self.binding = prompt.numpy(), self.session.io_binding()
        self.logits = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, 1, config.vocab_size), np.float32))
        self.binding.bind_ortvalue_output("logits", self.logits)
        shape = 1, config.num_key_value_heads, length, config.head_dim
        for name in cache_names(config):
            buffer = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
            self.binding.bind_ortvalue_input(f"past.{name}", buffer)
            self.binding.bind_ortvalue_output(name, buffer)

    def __call__(self, count: int) -> list[int]:
        """Return so many tokens after the prompt."""
        found, ids, past = list[int](), self.prompt, 0
        for _ in range(count):
            total = past + ids.shape[1]
            self.binding.bind_cpu_input("ids", ids)
            self.binding.bind_cpu_input("last_position", np.array([total - 1], np.int32))
            self.binding.bind_cpu_input("total", np.array(total, np.int32))
            self.session.run_with_iobinding(self.binding)
            found.append(int(self.logits.numpy().argmax()))
            ids, past = np.array([[found[-1]]]), total
        return found

"""One training step as a CUDA graph: the GPU repeats it without Python, while masks and counts of steps go on.

Only kernels are repeated. So the hooks that a step would run are made up for around each replay: stale masks are
rebuilt before it, into the tensors that the graph reads, and the step is counted after it. The random streams go on by
themselves, since their counts lie on the GPU and the graph advances them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from nmcompile.checks import check_callable, check_compiled, check_kind
from nmcompile.errors import ConfigError
from nmcompile.training.find_masks import masks_of
from nmcompile.training.optimizer_hooks import held, note_step, uncounted
from nmcompile.training.recorder import CudaRecorder, Recorder
from nmcompile.training.refresh_mask import UNTIL_FOLLOWED

WARM_UPS = 3  # steps before the capture, in which kernels are chosen and the optimizer makes its state

Settings = list[dict[str, Any]]


class GraphedStep:
    """A training step that is captured after `WARM_UPS` calls; `graphed_step` makes it and describes it."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor],
        optimizer: Optimizer,
        example: Sequence[Tensor],
        device: torch.device,
        recorder: Recorder,
    ) -> None:
        self._model = model
        self._loss = loss
        self._optimizer = optimizer
        self._recorder = recorder
        self._masks = masks_of(model).values()
        self._batch = [x.detach().to(device, copy=True) for x in example]
        self._warm_ups = WARM_UPS
        self._result: Tensor | None = None
        self._settings: Settings = []

    def __call__(self, *batch: Tensor) -> Tensor:
        """Make one step on a batch and return its loss.

        Raises:
            ConfigError: the batch differs from the example in number, shape or dtype; or a setting of the optimizer
                that the graph holds as a number has changed.
        """
        self._fill(batch)
        for mask in self._masks:
            mask.bring_up_to_date(UNTIL_FOLLOWED)
        loss = self._run().clone()
        note_step(held(self._optimizer))
        return loss

    def _fill(self, batch: Sequence[Tensor]) -> None:
        if len(batch) != len(self._batch):
            raise ConfigError(f"the step was given {len(batch)} tensors; its example has {len(self._batch)}")
        for index, (ours, given) in enumerate(zip(self._batch, batch, strict=True)):
            check_kind(f"batch[{index}]", given, Tensor, "a tensor like that of the example")
            if given.shape != ours.shape or given.dtype != ours.dtype:
                raise ConfigError(
                    f"batch[{index}] is {_described(given)}; the captured step takes {_described(ours)}, as in its "
                    "example: leave out an incomplete last batch, or make another graphed_step for this shape"
                )
        for ours, given in zip(self._batch, batch, strict=True):
            ours.copy_(given, non_blocking=True)

    def _run(self) -> Tensor:
        if self._warm_ups:
            self._warm_ups -= 1
            return self._recorder.run(self._step)
        if self._result is None:
            self._settings = _settings(self._optimizer)
            self._result = self._recorder.capture(self._step)
        self._check_settings()
        self._recorder.replay()
        return self._result

    def _step(self) -> Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        input, *others = self._batch
        loss = self._loss(self._model(input), *others)
        loss.backward()
        with uncounted(self._optimizer):
            self._optimizer.step()
        return loss.detach()

    def _check_settings(self) -> None:
        for captured, group in zip(self._settings, self._optimizer.param_groups, strict=True):
            for name, value in captured.items():
                if group[name] != value:
                    raise ConfigError(
                        f"the optimizer's {name} was {value} when the step was captured, and is {group[name]}; a graph "
                        f"holds numbers as they were: give {name} as a tensor on the GPU, which schedulers write in "
                        "place, or make another graphed_step"
                    )


def graphed_step(
    model: nn.Module, loss: Callable[..., Tensor], optimizer: Optimizer, example: Sequence[Tensor]
) -> GraphedStep:
    """Make a training step that the GPU repeats as one CUDA graph, without Python between its kernels.

    The result takes a batch, makes forward, loss, backward and optimizer step, and returns the loss, a tensor without
    gradient history. The first three calls run as they are. The next one captures the step; from then on calls copy the
    batch into the tensors that the graph reads, and replay it. Each call counts as one optimizer step, masks are
    rebuilt when they are due, and each draws new random numbers, so training is that of an ordinary loop.

    Model, optimizer and loss have to stay what they are: the graph knows the addresses of parameters, buffers and the
    optimizer's state. A learning rate that changes has to be a tensor.

    Args:
        model: a model that `nmcompile.compile` made, on a CUDA device, in the mode (train or eval) it is to run in.
        loss: takes the model's output and the tensors after the first of a batch, and returns a single number.
        optimizer: made with `capturable=True`, or `torch.optim.SGD`.
        example: a batch: the model's input first. It gives shapes and dtypes, and is not trained on.

    Raises:
        ConfigError: the model is not on one CUDA device, the optimizer is not capturable, or a masked weight is
            computed from others or split among processes.
    """
    check_compiled("model", model)
    check_callable("loss", loss, "a function of the model's output and the other tensors of a batch")
    check_kind("optimizer", optimizer, Optimizer, "a torch.optim.Optimizer")
    check_kind("example", example, tuple | list, "a batch of tensors, the model's input first: (input, target)")
    for index, x in enumerate(example):
        check_kind(f"example[{index}]", x, Tensor, "a tensor")
    if not example:
        raise ConfigError("example is empty; give a batch of tensors, the model's input first: (input, target)")
    _check_capturable(optimizer)
    _check_masks(model)
    device = _cuda_device(model)
    return GraphedStep(model, loss, optimizer, example, device, CudaRecorder(device))


def _check_capturable(optimizer: Optimizer) -> None:
    if isinstance(optimizer, SGD) or all(group.get("capturable") for group in optimizer.param_groups):
        return
    name = type(optimizer).__name__
    takes_it = "capturable" in optimizer.defaults
    advice = f"make it with {name}(..., capturable=True)" if takes_it else "take torch.optim.SGD or AdamW"
    raise ConfigError(f"optimizer {name} counts its steps on the CPU, so a CUDA graph cannot repeat them; {advice}")


def _check_masks(model: nn.Module) -> None:
    for name, mask in masks_of(model).items():
        if type(mask.weight()) is not nn.Parameter:
            raise ConfigError(
                f"weight {name!r} is computed from others or split among processes, so its mask cannot be rebuilt "
                "outside a CUDA graph; leave the layer dense with CompileConfig.layers, or train without graphed_step"
            )


def _cuda_device(model: nn.Module) -> torch.device:
    devices = {x.device for x in (*model.parameters(), *model.buffers())}
    if {device.type for device in devices} != {"cuda"} or len(devices) > 1:
        found = ", ".join(sorted(map(str, devices))) or "no device"
        raise ConfigError(f"the model is on {found}; a CUDA graph needs all of it on one GPU: model.to('cuda')")
    return devices.pop()


def _settings(optimizer: Optimizer) -> Settings:
    """Return the settings that a graph holds as numbers, of each group of parameters."""
    return [_numbers(group) for group in optimizer.param_groups]


def _numbers(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params" and not isinstance(value, Tensor)}


def _described(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}"

"""The networks of `nets` with their inputs."""

from collections.abc import Callable

import torch
from torch import nn

from benchmarks.sweep.architecture import VOCABULARY, Architecture, Inputs, images, tensors, token_inputs, tokens
from benchmarks.sweep.nets import convolutions, generators, mixtures, sequences


def pairs(first: Callable[[int], Inputs], second: Callable[[int], Inputs]) -> Callable[[int], Inputs]:
    """Return inputs of two arguments."""
    return lambda batch: ((*first(batch)[0], *second(batch)[0]), {})


def _at_times(batch: int) -> Inputs:
    return (torch.randn(batch, 3, 16, 16), torch.rand(batch) * 1000), {}


def _chosen(batch: int) -> Inputs:
    return (torch.randn(batch, 8), torch.randint(20, (batch, 3))), {}


def _graph(batch: int) -> Inputs:
    return (torch.randn(batch, 6, 16), torch.rand(batch, 6, 6).round()), {}


def by_hand(name: str, make: Callable[[], nn.Module], inputs: Callable[[int], Inputs]) -> Architecture:
    """Return an architecture that is written here."""
    return Architecture(name, "by hand", make, inputs)


BY_HAND = (
    by_hand("multilayer perceptron", lambda: nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), tensors(32)),
    by_hand("U-Net", convolutions.UNet, images(16)),
    by_hand("U-Net, transposed convolutions", lambda: convolutions.UNet(transposed=True), images(16)),
    by_hand("U-Net of volumes", convolutions.UNet3d, tensors(1, 8, 8, 8)),
    by_hand("one-stage detector", convolutions.Detector, images(32)),
    by_hand("atrous segmentation", convolutions.Pyramid, images(16)),
    by_hand("super-resolution", convolutions.SuperResolution, images(8)),
    by_hand("WaveNet", convolutions.WaveNet, tensors(1, 32)),
    by_hand("keyword spotter", convolutions.KeywordSpotter, tensors(1, 16, 16)),
    by_hand("vocoder", convolutions.Vocoder, tensors(16, 8)),
    by_hand("PointNet", convolutions.PointNet, tensors(3, 20)),
    by_hand("computed weights", convolutions.standardized, images(8)),
    by_hand("autoencoder", generators.autoencoder, images(16)),
    by_hand("DCGAN generator", generators.generator, tensors(32, 1, 1)),
    by_hand("variational autoencoder", generators.Variational, tensors(64)),
    by_hand("diffusion U-Net", generators.DiffusionUNet, _at_times),
    by_hand("DiT", generators.DiT, _at_times),
    by_hand("LSTM", lambda: sequences.Recurrent(nn.LSTM), token_inputs()),
    by_hand("GRU", lambda: sequences.Recurrent(nn.GRU), token_inputs()),
    by_hand("bidirectional LSTM", lambda: sequences.Recurrent(nn.LSTM, bidirectional=True), token_inputs()),
    by_hand("Elman network", lambda: sequences.Recurrent(nn.RNN), token_inputs()),
    by_hand("LSTM cells", lambda: sequences.Cells(nn.LSTMCell), token_inputs()),
    by_hand("GRU cells", lambda: sequences.Cells(nn.GRUCell), token_inputs()),
    by_hand("LSTM of linear layers", sequences.WrittenGates, token_inputs()),
    by_hand("selective state space", sequences.StateSpace, token_inputs()),
    by_hand("state space by FFT", sequences.ConvolvedStates, tensors(16, 4)),
    by_hand("attention of bare parameters", sequences.EinsumAttention, tensors(6, 16)),
    by_hand("recurrent encoder-decoder", sequences.Seq2Seq, lambda batch: ((tokens(batch), tokens(batch, 5)), {})),
    by_hand("Conformer", sequences.Conformer, tensors(12, 16)),
    by_hand("nn.Transformer", sequences.transformer, pairs(tensors(6, 32), tensors(5, 32))),
    by_hand("experts in a list", mixtures.ListedExperts, tensors(12, 16)),
    by_hand("experts by bmm", mixtures.StackedExperts, tensors(12, 16)),
    by_hand("experts by einsum", mixtures.EinsumExperts, tensors(12, 16)),
    by_hand("experts in a loop", mixtures.LoopedExperts, tensors(12, 16)),
    by_hand("two towers", mixtures.TwoTowers, pairs(tensors(24), tensors(40))),
    by_hand("DLRM", mixtures.Recommender, _chosen),
    by_hand("siamese network", mixtures.Siamese, pairs(images(16), images(16))),
    by_hand("graph network", mixtures.GraphNetwork, _graph),
    by_hand("bilinear score", mixtures.BilinearScore, pairs(tensors(16), tensors(16))),
    by_hand("NeRF", mixtures.RadianceField, tensors(3)),
    by_hand("bag of words", lambda: nn.Sequential(
        nn.EmbeddingBag(VOCABULARY, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)),
        token_inputs()),
)  # fmt: skip
"""The architectures that are written here."""

"""Real images that are already on disk: an IDX folder such as Fashion-MNIST, or scikit-learn's digits."""

import gzip
import io
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nmcompile.errors import ConfigError
from nmcompile.files.read_files import read_regular

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
LARGEST = 2**31  # bytes of images
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@dataclass(frozen=True)
class Images:
    """Images (N, 1, H, W) float32 of zero mean and unit variance, labels (N,) int64, for training and test."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_images(folder: Path | None) -> Images:
    """Load the images of `folder`, else Fashion-MNIST at Debian's path, else the digits. Download nothing."""
    if folder is None and FASHION_MNIST.is_dir():
        folder = FASHION_MNIST
    if folder is None:
        return digits()
    arrays = [_read_idx(folder, name, dims) for name, dims in zip(FILES, (3, 1, 3, 1), strict=True)]
    return _images(str(folder), *arrays)


def digits() -> Images:
    """Load scikit-learn's digits, 8 × 8."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError("no images: pip install 'nmcompile[demo]' for the digits, or give --data DIR") from error
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images.reshape(-1, 8, 8)[order], labels[order]
    return _images("scikit-learn's digits", images[:1297], labels[:1297], images[1297:], labels[1297:])


def _images(name: str, *arrays: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]") -> Images:
    train_images, train_labels, test_images, test_labels = (torch.from_numpy(array.copy()) for array in arrays)
    std, mean = torch.std_mean(train_images.float())
    scaled = [((x.float() - mean) / std).unsqueeze(1) for x in (train_images, test_images)]
    return Images(name, scaled[0], train_labels.long(), scaled[1], test_labels.long())


def _read_idx(folder: Path, name: str, dims: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.generic]]":
    """Read an IDX file of unsigned bytes, plain or gzipped; check its header against its size."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.exists()), None)
    if path is None:
        raise ConfigError(f"{folder} has no {name} (or {name}.gz); give a folder with the four MNIST-style IDX files")
    content = read_regular(path, LARGEST)
    header = 4 + 4 * dims
    start = _start(path, content, header)
    shape = tuple(int.from_bytes(start[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims))
    size = header + int(np.prod(shape, dtype=object))
    # One byte more than the header promises shows that the file is too long.
    data = _start(path, content, size + 1) if size <= LARGEST else b""
    if start[:4] != bytes((0, 0, 8, dims)) or len(data) != size:
        raise ConfigError(f"{path} is not an IDX file of {dims}-dimensional bytes: its header does not match its size")
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)


def _start(path: Path, content: bytes, size: int) -> bytes:
    """Return the first `size` bytes of a file, unpacked; gzip can expand a file a thousandfold."""
    if path.suffix != ".gz":
        return content[:size]
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            return file.read(size)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path} is not a gzip file: {error}") from error

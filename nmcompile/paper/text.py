"""Text as characters: a file of the user's, or the King James Bible from Debian's package bible-kjv-text."""

import subprocess
from pathlib import Path

import torch
from torch import Tensor

from nmcompile.errors import ConfigError
from nmcompile.files.read_files import read_regular
from nmcompile.paper.data import Data, TensorSource

LENGTH = 64  # characters of a sample
TESTS = 500  # samples at the end of the text
LARGEST = 2**28  # bytes
BIBLE = ("bible", "-f", "Gen1:1-Rev22:21")


def load_text(file: Path | None) -> Data:
    """Return samples of a text, each with the characters that follow: inputs and labels `(samples, LENGTH)` int64.

    Raises:
        ConfigError: no file is given and the Bible is not installed, or the text is too short.
    """
    text = read_regular(file, LARGEST).decode(errors="replace") if file is not None else _bible()
    characters = sorted(set(text))
    numbers = {character: number for number, character in enumerate(characters)}
    codes = torch.tensor([numbers[character] for character in text])
    count = (len(codes) - 1) // LENGTH
    if count <= TESTS:
        raise ConfigError(f"the text has {len(text)} characters; give one of {(TESTS + 1) * LENGTH + 1} or more")
    x, y = (_windows(part, count) for part in (codes, codes[1:]))
    name = str(file) if file is not None else "King James Bible"
    train, test = TensorSource(x[:-TESTS], y[:-TESTS]), TensorSource(x[-TESTS:], y[-TESTS:])
    return Data(name, train, test, len(characters))


def _windows(codes: Tensor, count: int) -> Tensor:
    return codes[: count * LENGTH].view(count, LENGTH)


def _bible() -> str:
    """Return the verses, each with its reference, as the program of Debian's package prints them."""
    try:
        return subprocess.run(BIBLE, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError("no text: install Debian's bible-kjv-text, or give a text file by --data FILE") from error

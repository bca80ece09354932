"""Uniform quantization to few bits: grids, SAWB and PACT scales, and the calibration of clips. Zero stays zero."""

from nmcompile.quantization.fake_quantize import fake_quantize as fake_quantize
from nmcompile.quantization.grid import Grid as Grid
from nmcompile.quantization.grid import absorbed_step as absorbed_step
from nmcompile.quantization.grid import integers as integers
from nmcompile.quantization.histogram import Histogram as Histogram
from nmcompile.quantization.pact import pact_quantize as pact_quantize
from nmcompile.quantization.pact import positive_clip as positive_clip
from nmcompile.quantization.sawb import sawb_quantize as sawb_quantize
from nmcompile.quantization.sawb import sawb_scale as sawb_scale

"""What training adds to the graphs: masks that follow the optimizer, and their saved state."""

from nmcompile.training.clips import clips as clips
from nmcompile.training.steps import step as step

"""Which tokens are meant: what is generated, the prompt, or all. Names only; imports no torch."""

from typing import Literal, get_args

Positions = Literal["generated", "prompt", "all"]
"""Which tokens are steered. The authors of the method steered what is generated and left the prompt alone."""
POSITIONS: tuple[Positions, ...] = get_args(Positions)

"""All kinds of rotations that may be at work while a model runs."""

from bitmend.linalg.greedy_rotation import BlockRotation
from bitmend.linalg.hadamard import Rotation
from bitmend.linalg.learned_rotation import LearnedRotation

AnyRotation = Rotation | BlockRotation | LearnedRotation
StreamRotation = Rotation | LearnedRotation  # of the residual stream

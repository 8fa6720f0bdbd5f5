"""The one rule of the model: a query sees a key of its own sample iff key position <= query position.

Rows of all samples lie packed in one tensor; a `Run` says which rows belong to which sample and where each
stands in its sample. Keys come as two runs, visual and text, so that nothing is concatenated, masked or padded
for the kernel. A sample of two text tokens, an image of three, and two more text tokens:

    position        0  1  2  3  4  5  6
                    t  t  v  v  v  t  t
    text query 0    1  .  .  .  .  .  .
    text query 1    1  1  .  .  .  .  .
    text query 5    1  1  1  1  1  1  .
    text query 6    1  1  1  1  1  1  1
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    """Where the rows of B samples lie in one packed tensor of N rows."""
    start: Tensor      # (B,) int32: first row of each sample
    length: Tensor     # (B,) int32: rows of each sample, 0 allowed
    position: Tensor   # (N,) int32: place of each row in its sample, never falling within a run
    max_length: int    # no length is greater; sizes a launch without asking the device

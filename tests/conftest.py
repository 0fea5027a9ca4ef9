"""Tests run on one thread each: their models are tiny, and sums come out the same in every process."""

import torch

torch.set_num_threads(1)

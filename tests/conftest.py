import os

import torch

# The tests' tensors are tiny: on a busy machine a second thread costs more than it brings.
torch.set_num_threads(1)

# Before anything imports triton, whose own functions are made to be interpreted, or not, at that moment.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import gc
import os

import torch

# The tests' tensors are tiny: on a busy machine a second thread costs more than it brings.
torch.set_num_threads(1)

# Before anything imports triton, whose own functions are made to be interpreted, or not, at that moment.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish() -> None:
    """What is imported by now stays. Collections, of which accelerate asks for many, need not look at it."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Or nanobind says at the end that its functions leak."""
    gc.unfreeze()

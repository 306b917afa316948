import torch

# The tests' tensors are tiny: on a busy machine a second thread costs more than it brings.
torch.set_num_threads(1)

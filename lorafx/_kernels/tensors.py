"""The types of tensors that the kernels know: plain ones, which do what torch's operators do."""

from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)

"""The bases of the benchmarks of serving: a small Llama of transformers, and one linear layer."""

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 1000


class Layer(nn.Module):
    """One linear layer, under a name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., width) -> the same shape."""
        y: Tensor = self.linear(x)
        return y


def frozen_llama(width: int, layers: int) -> nn.Module:
    """A frozen Llama with random weights, always the same, in eval; without layers, one linear."""
    torch.manual_seed(0)
    if not layers:
        return Layer(width).eval().requires_grad_(False)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=11 * width // 4, vocab_size=VOCABULARY,
        num_hidden_layers=layers, num_attention_heads=width // 64, num_key_value_heads=width // 64)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def adapted_layers(base: nn.Module) -> list[str]:
    """All linear layers but the head."""
    return [name for name, layer in base.named_modules()
            if isinstance(layer, nn.Linear) and name != "lm_head"]

"""Runs the README's example of five lines with the lorafx that is installed, which must be this environment's own."""

import re
import sys
from pathlib import Path

import torch
from torch import nn

import lorafx

assert Path(lorafx.__file__).is_relative_to(sys.prefix), lorafx.__file__
blocks = re.findall(r"```python\n(.*?)```", Path(sys.argv[1]).read_text(), re.S)
[example] = [block for block in blocks if ">>>" not in block and "deployed = lorafx.merge(model)" in block]


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.v_proj(self.q_proj(x).tanh())


base, x = Base(), torch.randn(3, 8)
names = {"base": base}
exec(example, names)
assert type(names["deployed"]) is Base and torch.allclose(names["deployed"](x), base(x))
assert len(list(lorafx.parameters(lorafx.load(base, "out/lora/medical_512.safetensors")))) == 4

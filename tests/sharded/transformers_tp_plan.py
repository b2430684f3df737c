"""Set-ups of transformers' own tensor parallelism: refused; the order that is named works."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.parallel import parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

import lorafx
from tests.support.sharded import adapted, loss_of
from tests.support.tensor_parallel import LINEARS, all_processes, compare, saved, shared_folder
from tests.support.torchrun import setup

NAMES = {"self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v",
         "self_attn.o_proj": "o", "mlp.gate_proj": "up", "mlp.up_proj": "up",
         "mlp.down_proj": "down"}


def spread(model: Any) -> Any:
    """The layers of a Llama parallelized by torch."""
    plan = {f"model.layers.*.{name}": LINEARS[like]() for name, like in NAMES.items()}
    return parallelize_module(model, all_processes(), plan)


def loss(model: Any) -> Tensor:
    tokens = torch.randint(64, (2, 6), generator=torch.Generator().manual_seed(5))
    return loss_of(model(tokens).logits, tokens)


@setup
def a_tp_plan_is_refused_and_the_order_that_is_named_works() -> float:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4)
    folder = shared_folder()
    if dist.get_rank() == 0:
        LlamaForCausalLM(config).save_pretrained(folder)
    dist.barrier()
    planned = LlamaForCausalLM.from_pretrained(folder, tp_plan="auto")
    with pytest.raises(lorafx.UnsupportedModelError, match="load it without tp_plan, inject"):
        lorafx.inject(planned)
    base = LlamaForCausalLM.from_pretrained(folder).eval()
    path = saved(adapted(copy.deepcopy(base)))
    with pytest.raises(lorafx.UnsupportedModelError, match="load it without tp_plan, inject"):
        lorafx.load(planned, path)
    model, alone = spread(adapted(base)), adapted(base)
    found = compare(model, alone, loss)
    path = shared_folder() / "adapter.safetensors"
    lorafx.save(model, path)
    torch.testing.assert_close(loss(lorafx.load(base, path)), loss(alone), rtol=1e-5, atol=1e-5)
    return found

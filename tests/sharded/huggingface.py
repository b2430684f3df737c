"""Set-ups of accelerate and of transformers' Trainer."""

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

import lorafx
from tests.support.sharded import VOCABULARY, batches, draw, largest_difference, loss_of, train
from tests.support.torchrun import setup


def llama() -> Any:
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2))


def adapted(base: Any = None, **config: Any) -> Any:
    """An adapter that is not zero, the same in each process."""
    base = base or llama()
    torch.manual_seed(2)
    model = lorafx.inject(base, **{"targets": "linear", "rank": 4, "trainable": "lm_head"} | config)
    draw(model)
    return model


def shared_folder() -> Path:
    """A new folder, the same for all processes."""
    names: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names)
    return Path(names[0])


def on_logits(model: Any) -> Any:
    return lambda tokens: model(input_ids=tokens).logits


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in lorafx.named_parameters(model)}


def assert_same_file(path: Path, alone: nn.Module) -> None:
    """A file has the adapter that one process has after the same steps."""
    expected = tensors(alone)
    found = tensors(lorafx.load(llama(), path))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=5e-5)


def accelerator(**plugin: Any) -> Accelerator:
    """accelerate with FSDP2 on CPUs, on which it would else use DDP whatever one asks for."""
    AcceleratorState._reset_state(True)
    made = Accelerator(cpu=True)
    made.state._shared_state |= {
        "distributed_type": DistributedType.FSDP, "fsdp_plugin": FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", **plugin)}
    return made


@setup
def accelerates_fsdp2() -> dict[str, float]:
    found = {}
    for efficient in (False, True):
        alone = adapted()
        optimizer = torch.optim.AdamW(lorafx.parameters(alone), lr=1e-2)
        losses = train(on_logits(alone), (), split=False, optimizer=optimizer)
        accelerate = accelerator(cpu_ram_efficient_loading=efficient)
        model = adapted()
        model, optimizer = accelerate.prepare(
            model, torch.optim.AdamW(lorafx.parameters(model), lr=1e-2))
        assert isinstance(model, FSDPModule) and isinstance(model.model.layers[0], FSDPModule)
        ours = train(on_logits(model), (), optimizer=optimizer)
        found[f"efficient={efficient}"] = largest_difference(ours, losses)
        assert found[f"efficient={efficient}"] < 1e-5
        path = shared_folder() / "adapter.safetensors"
        lorafx.save(accelerate.unwrap_model(model), path, optimizer=optimizer, step=5)
        assert_same_file(path, alone)
        resumed = lorafx.load(llama(), path)
        again = torch.optim.AdamW(lorafx.parameters(resumed), lr=1e-2)
        assert lorafx.resume(resumed, again, path) == 5
    return found


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Batches of tokens, a row each."""

    def __init__(self) -> None:
        self.rows = torch.cat(batches())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class InOrder(transformers.Trainer):
    """Rows as they come, so that processes together see the batches that one process sees."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(Rows())


@setup
def trainer() -> dict[str, float]:
    """DDP, as the Trainer chooses it: the same adapter as five steps of one process give."""
    AcceleratorState._reset_state(True)
    alone = adapted()
    optimizer = torch.optim.AdamW(lorafx.parameters(alone), lr=1e-2)
    losses = train(on_logits(alone), (), split=False, optimizer=optimizer)
    folder = shared_folder()
    model = adapted()
    arguments = transformers.TrainingArguments(
        str(folder), use_cpu=True, per_device_train_batch_size=8 // dist.get_world_size(),
        max_steps=5, learning_rate=1e-2, lr_scheduler_type="constant", max_grad_norm=0,
        save_steps=5, report_to=[], logging_steps=1, disable_tqdm=True, weight_decay=0.01)
    made = InOrder(model, arguments, train_dataset=Rows())
    made.train()
    found = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    largest = largest_difference(found, losses)
    path = shared_folder() / "adapter.safetensors"
    if dist.get_rank() == 0:
        lorafx.save(made.model_wrapped, path, optimizer=made.optimizer, step=5)
    dist.barrier()
    assert_same_file(path, alone)
    state = transformers.modeling_utils.load_state_dict(
        str(folder / "checkpoint-5" / "model.safetensors"))
    for name, tensor in tensors(alone).items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=5e-5)
    return {"losses": largest}

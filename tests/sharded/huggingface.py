"""Set-ups of accelerate and of transformers' Trainer."""

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

import lorafx
from tests.support.sharded import VOCABULARY, batches, draw, largest_difference, train
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


def use_fsdp2(accelerator: Accelerator, **plugin: Any) -> Accelerator:
    """Let accelerate shard on CPUs, on which it takes DDP whatever one asks for."""
    accelerator.state._shared_state |= {
        "distributed_type": DistributedType.FSDP, "fsdp_plugin": FullyShardedDataParallelPlugin(
            **{"fsdp_version": 2, "auto_wrap_policy": "transformer_based_wrap", **plugin})}
    return accelerator


@setup
def accelerates_fsdp2() -> dict[str, float]:
    found = {}
    for efficient in (False, True):
        alone = adapted()
        optimizer = torch.optim.AdamW(lorafx.parameters(alone), lr=1e-2)
        losses = train(on_logits(alone), (), split=False, optimizer=optimizer)
        AcceleratorState._reset_state(True)
        accelerate = use_fsdp2(Accelerator(cpu=True), cpu_ram_efficient_loading=efficient)
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


class Sharding(InOrder):
    """A Trainer that shards with FSDP2 on CPUs too."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        use_fsdp2(self.accelerator, **self.args.fsdp_plugin_args or {})
        self.is_fsdp_enabled = True


def trained(kind: type[transformers.Trainer], **options: Any) -> dict[str, float]:
    """Five steps and a checkpoint of a Trainer, which are those of one process."""
    AcceleratorState._reset_state(True)
    alone = adapted()
    optimizer = torch.optim.AdamW(lorafx.parameters(alone), lr=1e-2)
    losses = train(on_logits(alone), (), split=False, optimizer=optimizer)
    folder = shared_folder()
    arguments = transformers.TrainingArguments(
        str(folder), use_cpu=True, per_device_train_batch_size=8 // dist.get_world_size(),
        max_steps=5, learning_rate=1e-2, lr_scheduler_type="constant", max_grad_norm=0,
        save_steps=5, report_to=[], logging_steps=1, disable_tqdm=True, weight_decay=0.01,
        **options)
    made = kind(adapted(), arguments, train_dataset=Rows())
    made.train()
    found = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    path = folder / "adapter.safetensors"
    lorafx.save(made.model_wrapped, path, optimizer=made.optimizer, step=5)
    dist.barrier()
    assert_same_file(path, alone)
    largest = largest_difference(found, losses)
    assert largest < 1e-5
    for name, tensor in in_checkpoint(folder / "checkpoint-5", tensors(alone)).items():
        torch.testing.assert_close(tensor, tensors(alone)[name], rtol=1e-4, atol=5e-5)
    return {"losses": largest}


def in_checkpoint(folder: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of these names in what a Trainer saved of a whole model, or of a sharded one."""
    sharded = folder / "pytorch_model_fsdp_0"
    if not sharded.exists():
        whole = load_file(folder / "model.safetensors")
        return {name: whole[name] for name in like}
    found = {name: torch.full_like(tensor, torch.nan) for name, tensor in like.items()}
    dcp.load({"model": found}, checkpoint_id=sharded)
    return found


@setup
def trainer_with_ddp() -> dict[str, float]:
    return trained(InOrder)


@setup
def trainer_with_fsdp2() -> dict[str, float]:
    return trained(Sharding, fsdp=True, fsdp_config={"state_dict_type": "SHARDED_STATE_DICT"})

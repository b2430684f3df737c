"""TRL's DPO with no second base in memory: the reference is the same tensors without the adapter.

Three ways to say so to its trainer, each a recipe; all three train bit for bit the same.
"""

from typing import Any

import pytest
import tokenizers
import torch
import transformers
from torch import Tensor, nn

import lorafx
from tests.support.oracle import frozen

trl = pytest.importorskip("trl", reason="TRL is not installed; the extra `test` has it")

# transformers', of an option that TRL reads
pytestmark = pytest.mark.filterwarnings(
    "ignore:`.*gradient_checkpointing` is deprecated:FutureWarning")

CHOSEN = [("abc", "def", "nop"), ("bca", "fed", "mno"), ("ab", "de", "op"), ("cba", "ef", "pon")]


class WithoutAdapters(nn.Module):
    """An injected model without its adapters, to be the `ref_model` of a trainer."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config, self.model = model.config, [model]  # in a list: it is no child

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with lorafx.using(self.model[0], None):
            return self.model[0](*args, **kwargs)


class LoRADPOTrainer(trl.DPOTrainer):
    """Computes the reference's log-probabilities before training, by the model it is to train."""

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        with lorafx.using(self.model, None):
            return super().compute_ref_log_probs(model, inputs)


TRAINERS = {  # (base, model, arguments, what else a trainer takes) -> trainer
    "the base": lambda base, model, arguments, more: trl.DPOTrainer(
        model, ref_model=base, args=arguments(), **more),
    "a context": lambda base, model, arguments, more: trl.DPOTrainer(
        model, ref_model=WithoutAdapters(model), args=arguments(), **more),
    "computed before": lambda base, model, arguments, more: LoRADPOTrainer(
        model, args=arguments(precompute_ref_log_probs=True), **more),
}


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=19, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=1))


def adapted(base: Any) -> Any:
    """A model whose adapter is not zero, so that it differs from its reference."""
    model = lorafx.inject(base, 4, targets="linear", exclude="lm_head")
    with torch.no_grad():
        for parameter in lorafx.parameters(model):
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model


def data_and_tokenizer() -> dict[str, Any]:
    from datasets import Dataset

    letters = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefghijklmnop"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    rows = [dict(zip(("prompt", "chosen", "rejected"), row)) for row in CHOSEN]
    return {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}


def log_probs(model: Any, batch: Any) -> tuple[Tensor, ...]:
    """Of the completions, chosen and rejected, by the model's own logits."""
    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:]
    with torch.no_grad():
        logits = model(ids, attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    each = logits[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    return (each * mask).sum(1).chunk(2)


def trained(way: str, folder: Any) -> dict[str, Tensor]:
    """The model's tensors after two steps, of which all but the adapter's must be the base's."""
    def arguments(**more: Any) -> Any:
        return trl.DPOConfig(
            str(folder), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2,
            report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
            save_strategy="no", disable_tqdm=True, **more)

    base = llama()
    model = adapted(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = TRAINERS[way](base, model, arguments, data_and_tokenizer())
    batch = next(iter(trainer.get_train_dataloader()))
    expected = log_probs(frozen(llama()), batch)
    found = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)
    assert all(map(torch.equal, found, expected))
    assert not any(map(torch.equal, log_probs(model, batch), expected))
    trainer.train()
    assert trainer.model is model
    held = dict(model.named_parameters())
    for name, parameter in base.named_parameters():
        assert held[name].data_ptr() == parameter.data_ptr()
    after = model.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {name for name, _ in lorafx.named_parameters(model)}
    assert all(map(torch.equal, base.parameters(), llama().parameters()))
    return after


def test_the_reference_is_the_base_and_only_the_adapter_moves(tmp_path):
    results = [trained(way, tmp_path) for way in TRAINERS]
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in results[0])

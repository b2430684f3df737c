"""What training takes in memory over the frozen base, to the byte, through Python of others."""

import copy
import gc
import io

import pytest
import torch
import torch._dynamo
import transformers
from torch import nn

import lorafx
from common.counting import held_bytes
from lorafx._kernels import compiled
from tests.support.internals import replace_internal

CPU = torch.device("cpu")
WIDTH, RANK = 32, 2
IDS = torch.randint(50, (2, 64), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SIZES = dict(hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **SIZES, **SPECIAL, vocab_size=50, num_key_value_heads=1))


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_embd=WIDTH, n_layer=2, n_head=2, vocab_size=50, n_positions=64, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, **SPECIAL))


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(
        **SIZES, **NO_DROPOUT, vocab_size=50))


def t5():
    return transformers.T5ForConditionalGeneration(transformers.T5Config(
        d_model=WIDTH, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=50,
        dropout_rate=0.0, decoder_start_token_id=0, feed_forward_proj="gated-gelu"))


def vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(
        **SIZES, **NO_DROPOUT, image_size=32, patch_size=4))


HALF = 2 * 64 * RANK * 4  # bytes of h, (rows, rank): all that a site adds
# {name: (model, bytes alive between forward and backward over the frozen base, and those of
# recompute=False)}
MODELS = {
    "llama": (llama, (2 * 7 + 1) * HALF, 162816),
    "gpt2": (gpt2, (2 * 4 + 1) * HALF, 222208),
    "bert": (bert, (2 * 6 + 2) * HALF, 178176),
    "t5": (t5, (2 * 7 + 2 * 11 + 1) * HALF, 365568),
    "vit": (vit, 2 * 6 * HALF * 65 // 64 + 2 * RANK * 4, 162256),  # the head's are 2 rows
}


@pytest.fixture(autouse=True)
def _any_size(monkeypatch):
    replace_internal(monkeypatch, "kept_below", 0)


def loss(model):
    if isinstance(model, transformers.ViTForImageClassification):
        return model(pixel_values=PIXELS, labels=torch.zeros(2, dtype=torch.long)).loss
    return model(input_ids=IDS, labels=IDS).loss


def with_gradients_through_it(model):
    """Let a gradient flow through every layer, as it does if the adapter is on all of them."""
    model.seed = nn.Parameter(torch.zeros(WIDTH))
    for module in list(model.modules()):
        if isinstance(module, nn.Embedding) and module.embedding_dim == WIDTH:
            module.register_forward_hook(lambda _, args, y: y + model.seed)
        elif isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, args, y: y + model.seed.view(-1, 1, 1))
    return model


def adapted(base, **options):
    torch.manual_seed(1)
    model = lorafx.inject(base, RANK, targets="linear", **options)
    for parameter in lorafx.parameters(model):
        nn.init.normal_(parameter, std=0.02)
    return with_gradients_through_it(model)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def measured(model, loss=loss):
    """The bytes that are alive after a forward pass, the peak of a step, and the gradients."""
    loss(model).backward()  # recipes are proven
    model.zero_grad(set_to_none=True)
    gc.collect()
    losses = []
    alive = held_bytes(lambda: losses.append(loss(model)), CPU).after
    losses.pop().backward()
    found = gradients(model)
    model.zero_grad(set_to_none=True)
    after, peak = held_bytes(lambda: loss(model).backward(), CPU)
    assert after == sum(gradient.nbytes for gradient in found.values())
    return alive, peak, found


@pytest.mark.parametrize("make, surplus, of_full", MODELS.values(), ids=MODELS)
def test_memory_over_the_frozen_base(make, surplus, of_full):
    torch.manual_seed(0)
    base = make()
    full, lean = adapted(base, recompute=False), adapted(base)
    frozen = with_gradients_through_it(base.requires_grad_(False))
    alive, peak, _ = measured(frozen)
    kept, full_peak, wanted = measured(full)
    recomputed, lean_peak, found = measured(lean)
    assert (recomputed - alive, kept - alive) == (surplus, of_full)
    assert lean_peak - peak < (full_peak - peak) / 1.8
    assert found.keys() == wanted.keys() and len(found) > 8
    assert all(torch.equal(found[key], wanted[key]) for key in found)


def test_gradients_add_up_over_steps():
    torch.manual_seed(0)
    base, found = llama(), []
    for options in ({}, {"recompute": False}):
        model = adapted(base, **options)
        for _ in range(3):
            loss(model).backward()
        found.append(gradients(model))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def proven(model):
    return [module.proven for name, module in model.named_modules()
            if name.rpartition(".")[2] == "lora"]


def test_the_option_is_the_models():
    """Adapters that are added later and copies have it too; a copy has its own knowledge."""
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for recompute in (True, False):
        model = lorafx.inject(base, targets="0", recompute=recompute)
        lorafx.add(model, "more", targets="linear")
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for twin in (model, copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert [known is not None for known in proven(twin)] == [recompute] * 2
        assert not {*proven(copy.deepcopy(model))} & {*proven(model)} or not recompute


OF_LOSS = 2 * 2 * 64 * 4  # what the compiler chooses to keep for it, less another choice
# {name: (model of one layer, bytes alive beyond the compiled frozen base)}: h, and what is joined
COMPILED = {
    "llama": (llama, (7 + 1) * HALF + 2 * RANK * WIDTH * 4 - OF_LOSS),
    "bert": (bert, (6 + 2) * HALF - OF_LOSS),
}


@pytest.mark.parametrize("make, surplus", COMPILED.values(), ids=COMPILED)
def test_memory_over_the_compiled_frozen_base(make, surplus, monkeypatch):
    monkeypatch.setitem(SIZES, "num_hidden_layers", 1)
    torch.manual_seed(0)
    base = make()
    lean = adapted(base)
    _, _, wanted = measured(lean)
    found = []
    for model in (lean, with_gradients_through_it(base.requires_grad_(False))):
        torch._dynamo.reset()
        # inductor's choice of what to keep, without its code
        step = torch.compile(loss, backend="aot_eager_decomp_partition")
        found.append(measured(model, step))
    (recomputed, _, gradients), (alive, _, _) = found
    assert recomputed - alive == surplus
    torch.testing.assert_close(gradients, wanted)


@pytest.mark.parametrize("options, halves", [({}, 2), ({"recompute": False}, 0)])
def test_a_compiled_model(options, halves):
    """It is made of operators that a compiler can choose among, and gives the same."""
    base = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model = adapted(base, **options)
    x = torch.randn(5, 8, requires_grad=True)
    captured = []

    def capture(graph, _):
        captured.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    found = []
    for backend in ("aot_eager", "aot_eager_decomp_partition", capture):
        torch._dynamo.reset()
        call = torch.compile(model, backend=backend, fullgraph=True)
        found.append(torch.autograd.grad(call(x).sin().sum(), [x, *lorafx.parameters(model)]))
    assert captured.count(compiled.HALF) == halves
    wanted = torch.autograd.grad(model(x).sin().sum(), [x, *lorafx.parameters(model)])
    for got in found:
        torch.testing.assert_close(got, wanted)
    with torch.no_grad():
        torch._dynamo.reset()
        captured.clear()
        torch.compile(model, backend=capture)(x)
    assert compiled.HALF not in captured
    exported = torch.export.export(model, (x,))
    assert all(node.target is not compiled.HALF for node in exported.graph.nodes)

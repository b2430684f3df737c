"""Hugging Face models keep everything: injected, they generate, train, are saved as before."""

import copy

import pytest
import safetensors.torch
import tokenizers
import torch
import transformers

import lorafx
from tests.support.oracle import fingerprint, frozen, randomise
from tests.support.transformers_models import (
    IDS, PIXELS, SOUND, WITH_IMAGE, bert, classifier, clip, generate, gpt2, injected, keys, llama,
    llava, logits, t5, tied_llama, train, vit, whisper, written,
)


@pytest.mark.parametrize("build", [llama, t5, gpt2])
@pytest.mark.parametrize(
    "options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}, {"do_sample": True}]
)
def test_generate(build, options):
    """Tokens and scores: at init the base's bitwise; trained, the merged model's, cache or not."""
    base, model = injected(build, targets="linear")
    expected = generate(frozen(base), **options)
    assert all(map(torch.equal, generate(model, **options), expected))
    tokens, scores = generate(randomise(model), **options)
    assert not torch.equal(tokens, expected[0])
    without = {key: value for key, value in options.items() if key != "cache_implementation"}
    for other in (
        generate(lorafx.merge(model, untie=True), **options),
        generate(model, **without, use_cache=False),
    ):
        torch.testing.assert_close(other, (tokens, scores), rtol=1e-4, atol=1e-4)


def test_one_token_after_a_prefill():
    """The cache holds adapted keys and values: a token alone gets the full forward's logits."""
    base, model = injected(llama, targets="linear")
    expected = randomise(model)(IDS).logits[:, -1:]
    for prefill, right in ((model, True), (base, False)):
        cache = prefill(IDS[:, :-1], use_cache=True).past_key_values
        error = (model(IDS[:, -1:], past_key_values=cache).logits - expected).abs().max()
        assert error < 1e-5 if right else error > 1e-2


@pytest.mark.parametrize(
    "build, targets, more",
    [
        (llama, "linear", set()),
        (t5, "square", set()),
        (bert, "square", set()),
        (tied_llama, "lm_head", {"lm_head.weight"}),  # untied, and so written beside the embedding
    ],
)
def test_files_of_a_merged_model(build, targets, more, tmp_path):
    """A merged model is saved with the base's keys and configs, and computes the same loaded."""
    base, model = injected(build, targets=targets)
    assert model.config.to_dict() == base.config.to_dict() and model.config is not base.config
    merged = lorafx.merge(randomise(model), untie=True)
    (names, configs), expected = written(merged, tmp_path / "merged"), written(
        base, tmp_path / "base"
    )
    assert (names - more, configs) == expected and names >= more
    assert f'"architectures": [\n    "{type(base).__name__}"\n  ]' in configs[0]
    assert type(merged) is type(base)
    again = type(base).from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again), logits(merged))
    assert not torch.equal(logits(again), logits(base))


@pytest.mark.parametrize("build", [llama, t5, bert])
def test_files_of_an_injected_model(build, tmp_path):
    """The base's keys and the adapter's: transformers names the latter as unexpected."""
    (base, model), (_, fresh) = injected(build, targets="linear"), injected(build, targets="linear")
    names, configs = written(randomise(model), tmp_path / "model")
    assert (names - set(keys(model)), configs) == written(base, tmp_path / "base")
    assert names >= set(keys(model))
    again, report = type(base).from_pretrained(tmp_path / "model", output_loading_info=True)
    assert torch.equal(logits(again), logits(base))
    assert report["unexpected_keys"] == set(keys(model))
    assert not report["missing_keys"] and not report["mismatched_keys"]
    fresh.load_state_dict(
        safetensors.torch.load_file(tmp_path / "model/model.safetensors"), strict=False
    )
    assert torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize("build", [llama, t5, bert])
def test_state_dict_of_a_base(build, tmp_path):
    """An injected model reads a base's state_dict, missing exactly the adapter, which stays."""
    (_, model), other = injected(build), build().eval()
    lorafx.save(randomise(model), tmp_path / "adapter.safetensors")
    expected = logits(lorafx.load(other, tmp_path / "adapter.safetensors"))
    assert not torch.equal(logits(model), expected)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(other.state_dict())
    result = model.load_state_dict(other.state_dict(), strict=False)
    assert result.missing_keys == keys(model) and not result.unexpected_keys
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("build", [llama, bert, t5])
def test_activation_checkpointing(build, before, reentrant):
    """Layers are computed again in backward, to the same gradients; the base is not switched."""
    def gradients(model):
        calls = []
        for branch in [module for name, module in model.named_modules() if name.endswith(".lora")]:
            branch.register_forward_hook(lambda *_: calls.append(1))
        torch.manual_seed(5)
        logits(model.train()).square().sum().backward()
        assert all(
            parameter.grad is None
            for parameter in model.parameters()
            if not parameter.requires_grad
        )
        return [parameter.grad for parameter in lorafx.parameters(model)], len(calls)

    base, model = injected(build)
    expected, once = gradients(randomise(copy.deepcopy(model)))
    (base if before else model).activation_checkpointing_enable({"use_reentrant": reentrant})
    model = randomise(lorafx.inject(base, rank=2) if before else model)
    assert (
        base.is_activation_checkpointing
        == before
        == bool(base.get_input_embeddings()._forward_hooks)
    )
    found, twice = gradients(model)
    assert twice > 1.5 * once
    assert model.get_input_embeddings()(IDS).requires_grad  # enable_input_require_grads
    for theirs, ours in zip(expected, found, strict=True):
        assert (theirs - ours).abs().max() <= 1e-5 * theirs.abs().max() > 0


@pytest.mark.parametrize("build", [llama, t5, bert])
def test_trainer(build, tmp_path):
    """It trains the adapter only; checkpoints have all of `save_pretrained`, and resume bitwise."""
    base = build()
    before, names = fingerprint(base), written(base, tmp_path / "base")[0]
    model = lorafx.inject(base, rank=2)
    again, start = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    losses = train(model, tmp_path / "run", activation_checkpointing=build is llama)
    assert losses[-1] < losses[0] - 0.05 and fingerprint(base) == before
    assert {
        k for k, value in model.state_dict().items() if not torch.equal(value, start[k])
    } == set(keys(model))
    checkpoint = tmp_path / "run/checkpoint-3"
    tensors = safetensors.torch.load_file(checkpoint / "model.safetensors")
    assert set(tensors) == names | set(keys(model))
    assert train(again, tmp_path / "run", resume=str(checkpoint)) == losses
    assert all(map(torch.equal, lorafx.parameters(again), lorafx.parameters(model)))


def test_trainer_with_a_head_trained_whole(tmp_path):
    """A classifier head trains beside the adapter; both are saved, loaded into a base, merged."""
    base = classifier()
    before, fresh = fingerprint(base), copy.deepcopy(base).eval()
    model = lorafx.inject(base, rank=2, targets=["query", "value"], trainable="classifier")
    losses = train(model, tmp_path, labels=[0, 1, 2, 0], save_strategy="no")
    assert losses[-1] < losses[0] - 0.05 and fingerprint(base) == before
    assert not torch.equal(model.classifier.weight, base.classifier.weight)
    lorafx.save(model.eval(), tmp_path / "adapter.safetensors")
    loaded = lorafx.load(fresh, tmp_path / "adapter.safetensors")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert (loaded(IDS).logits - fresh(IDS).logits).abs().max() > 1e-2
    torch.testing.assert_close(lorafx.merge(model)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    "task, build, options",
    [
        ("text-generation", llama, dict(max_new_tokens=5, do_sample=False)),
        ("text-classification", classifier, {}),
    ],
)
def test_pipeline(task, build, options):
    """A pipeline takes an injected model: the base's answers at init, then the merged model's."""
    words = {f"w{i}": i for i in range(100)}
    split = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    split.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=split, pad_token="w0")

    def answers(model):
        pipe = transformers.pipeline(task, model=model, tokenizer=tokenizer)
        found = [answer for text in ("w5 w6 w7", "w9 w8") for answer in pipe(text, **options)]
        return [list(answer.values())[0] for answer in found], [
            answer.get("score", 1) for answer in found
        ]

    base, model = injected(build)
    expected = answers(frozen(base))
    assert answers(model) == expected
    texts, scores = answers(randomise(model))
    assert answers(lorafx.merge(model)) == (texts, pytest.approx(scores))
    assert (texts, scores) != expected


@pytest.mark.parametrize("build", [tied_llama, t5, bert])
def test_ties(build):
    """`tie_weights` keeps all; after `set_input_embeddings` it ties the head to the new ones."""
    base, model = injected(build, targets="linear")
    expected, names, old = (
        logits(randomise(model)), list(model.state_dict()), base.get_input_embeddings()
    )
    model.tie_weights()
    assert torch.equal(logits(model), expected)
    head = model.get_output_embeddings()._parameters
    assert head["weight"] is model.get_input_embeddings().weight is not old.weight
    model.set_input_embeddings(new := torch.nn.Embedding(100, 32))
    model.tie_weights()
    assert model.get_input_embeddings() is new
    assert head["weight"] is new.weight
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(
    "build, size", [(llama, 110), (llama, 99), (tied_llama, 110), (bert, 110), (t5, 99)]
)
def test_resized_embeddings(build, size, tmp_path):
    """Resizing after injection is resizing before: the base keeps its size, new rows are frozen."""
    def resized(model):
        torch.manual_seed(7)
        model.resize_token_embeddings(size, mean_resizing=False)
        return model

    base = build().eval()
    before, larger = fingerprint(base), resized(copy.deepcopy(base))
    model = resized(randomise(lorafx.inject(base, rank=2)))
    assert fingerprint(base) == before and base.config.vocab_size == 100
    assert (
        model.get_input_embeddings().weight.shape[0]
        == model.config.vocab_size
        == logits(model).shape[-1]
        == size
    )
    training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert training == set(keys(model))
    lorafx.save(model, tmp_path / "adapter.safetensors")
    assert torch.equal(logits(lorafx.load(larger, tmp_path / "adapter.safetensors")), logits(model))
    assert torch.equal(logits(lorafx.eject(model)), logits(larger))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("build", [llama, t5])
def test_properties_and_casts(build, dtype):
    """`to(dtype)` casts the injected model, not its base; a narrow base has wide adapters."""
    base, model = injected(build)
    count = sum(parameter.numel() for parameter in lorafx.parameters(model))
    assert (model.device, model.dtype) == (base.device, base.dtype)
    assert (
        model.num_parameters() - base.num_parameters()
        == model.num_parameters(only_trainable=True)
        == count
    )
    assert str(lorafx.eject(model)) == str(base)
    assert "GraphModule" not in str(model)
    assert "(lora)" in str(model)
    expected, narrow = logits(cast := frozen(base).to(dtype)), lorafx.inject(cast, rank=2)
    assert narrow.dtype == dtype and torch.equal(logits(narrow), expected)
    assert {p.dtype for p in lorafx.parameters(narrow)} == {
        torch.promote_types(dtype, torch.float32)
    }
    model = model.half() if dtype == torch.float16 else model.to(dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype} == {model.dtype}
    assert torch.equal(logits(model), expected)
    assert expected.dtype == dtype
    assert base.dtype == torch.float32
    found = logits(randomise(model))
    error = (logits(lorafx.merge(model)) - found).abs().max()
    assert error < 50 * torch.finfo(dtype).eps * found.abs().max() < (found - expected).abs().max()


# The number of sites is counted by hand: 6 linear layers in an encoder's layer, 7 in a llama's,
# 10 in a decoder's.
@pytest.mark.parametrize(
    "build, sites, call",
    [
        (vit, 2 * 6 + 1, lambda model: model(PIXELS).logits),
        (whisper, 2 * 6 + 2 * 10 + 1, lambda model: generate(model, SOUND)[1]),
        (
            clip, 2 * 6 + 2 * 6 + 2,
            lambda model: model(input_ids=IDS, pixel_values=PIXELS).logits_per_image
        ),
        (
            llava, 2 * 6 + 2 + 2 * 7 + 1,
            lambda model: model(input_ids=WITH_IMAGE, pixel_values=PIXELS).logits
        ),
    ]
)
def test_vision_and_sound(build, sites, call):
    """Identity at init, every linear layer a site, and merged as unmerged."""
    base, model = injected(build, targets="linear")
    expected = call(frozen(base))
    assert torch.equal(call(model), expected) and len(lorafx.summary(model).sites) == sites
    found = call(randomise(model))
    assert not torch.equal(found, expected)
    torch.testing.assert_close(call(lorafx.merge(model, untie=True)), found, rtol=1e-3, atol=1e-4)


def test_compiled():
    """An injected llama compiles into one graph, without a break, and computes the same."""
    model = randomise(injected(llama, targets="linear")[1]).requires_grad_(False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(logits(compiled), logits(model))

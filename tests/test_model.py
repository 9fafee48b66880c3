"""GPT: its logits, names and initialisation against GPT-2's, the loss and its gradients, and sampling."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from config import ModelConfig
from model import GPT

CONTEXT = 12
TINY = ModelConfig(n_layers=3, n_heads=2, n_embd=16, vocab_size=50, bias=True)
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # Hugging Face stores (in, out)


def tiny(**changes: object) -> GPT:
    torch.manual_seed(0)
    return GPT(TINY.model_copy(update=changes), CONTEXT)


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(TINY.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def logits_of(model: GPT, idx: Tensor) -> Tensor:
    logits, loss = model(idx)
    assert loss is None
    return logits


@pytest.fixture(scope="module")
def reference() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    cfg = GPT2Config(
        vocab_size=TINY.vocab_size,
        n_positions=CONTEXT,
        n_embd=TINY.n_embd,
        n_layer=TINY.n_layers,
        n_head=TINY.n_heads,
        initializer_range=0.2,  # ten times GPT-2's, so that attention and GELU matter
    )
    model = GPT2LMHeadModel(cfg).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.2)
    return model


def with_weights_of(reference: GPT2LMHeadModel) -> GPT:
    weights = {name: p.detach().clone() for name, p in reference.transformer.named_parameters()}
    model = tiny().eval()
    model.load_state_dict({name: p.T if name.endswith(TRANSPOSED) else p for name, p in weights.items()})
    return model


@pytest.mark.parametrize("T", [1, 2, 7, CONTEXT])
def test_logits_equal_hugging_faces_gpt2(reference: GPT2LMHeadModel, T: int) -> None:
    idx = tokens(3, T)
    expected = reference(idx).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(logits_of(with_weights_of(reference), idx), expected, rtol=0, atol=1e-5)


def test_loss_and_gradients_equal_hugging_faces_gpt2(reference: GPT2LMHeadModel) -> None:
    model = with_weights_of(reference)
    idx = tokens(3, CONTEXT)
    logits, loss = model(idx[:, :-1], idx[:, 1:].contiguous())
    assert logits is None
    expected = reference(idx, labels=idx).loss
    torch.testing.assert_close(loss, expected)
    reference.zero_grad()
    loss.backward()
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name, p in reference.transformer.named_parameters():
        assert p.grad is not None
        grad = p.grad.T if name.endswith(TRANSPOSED) else p.grad
        torch.testing.assert_close(gradients[name], grad, rtol=1e-4, atol=1e-6)  # wte's has input and output


def test_parameters_have_gpt2s_names_and_no_second_output_layer(reference: GPT2LMHeadModel) -> None:
    names = [name for name, _ in reference.transformer.named_parameters()]
    assert list(tiny().state_dict()) == names
    assert list(tiny(bias=False).state_dict()) == [name for name in names if not name.endswith("bias")]


def test_gpt2_small_has_its_published_size_and_flops() -> None:
    with torch.device("meta"):
        model = GPT(ModelConfig(vocab_size=50257, bias=True), 1024)
    assert model.num_params(non_embedding=False) == 124_439_808
    assert model.num_params() == 124_439_808 - 1024 * 768
    # 6 N + 12 L H Q T
    assert model.flops_per_token() == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 12 * 64 * 1024


def test_initialisation_is_gpt2s() -> None:
    torch.manual_seed(0)
    n_layers = 8
    model = GPT(ModelConfig(n_layers=n_layers, n_heads=2, n_embd=128, vocab_size=500, bias=True), 64)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any()
        elif "ln_" in name:
            assert (p == 1).all()
        else:
            std = 0.02 / math.sqrt(2 * n_layers) if "c_proj" in name else 0.02
            # the standard deviation of n samples is known to 1/sqrt(2n), the mean to std/sqrt(n): five sigma
            assert p.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * p.numel()))
            assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel())


def test_initial_loss_is_ln_of_the_vocabulary() -> None:
    _, loss = tiny()(tokens(8, CONTEXT), tokens(8, CONTEXT, seed=2))
    assert loss.item() == pytest.approx(math.log(TINY.vocab_size), abs=0.05)


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_micro_batches_and_loss_scaling_leave_the_gradient(scale: float) -> None:
    idx, targets = tokens(4, CONTEXT), tokens(4, CONTEXT, seed=2)
    whole, split = tiny(), tiny()
    whole(idx, targets)[1].backward()
    for rows in (slice(0, 2), slice(2, 4)):
        (split(idx[rows], targets[rows])[1] / 2 * scale).backward()
    grads = [[p.grad for p in model.parameters() if p.grad is not None] for model in (whole, split)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b / scale, a, rtol=1e-4, atol=1e-7)


@given(T=st.integers(2, CONTEXT), data=st.data())
@settings(max_examples=20)
def test_a_later_token_never_changes_earlier_logits(T: int, data: st.DataObject) -> None:
    changed = data.draw(st.integers(1, T - 1))
    model = tiny().eval()
    idx = tokens(2, T)
    other = idx.clone()
    other[:, changed] = (other[:, changed] + 1) % TINY.vocab_size
    before, after = logits_of(model, idx), logits_of(model, other)
    torch.testing.assert_close(before[:, :changed], after[:, :changed], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(before[:, changed], after[:, changed])


def test_dropout_acts_in_training_only() -> None:
    model = tiny(dropout=0.5)
    idx = tokens(2, 4)
    assert not torch.equal(logits_of(model, idx), logits_of(model, idx))
    torch.testing.assert_close(logits_of(model.eval(), idx), logits_of(tiny(), idx))


def test_a_sequence_above_the_context_is_an_error() -> None:
    with pytest.raises(ValueError, match="13 tokens does not fit context_length = 12"):
        tiny()(tokens(1, CONTEXT + 1))


def test_compiling_in_place_keeps_names_loss_and_gradients() -> None:
    idx, targets = tokens(2, 4), tokens(2, 4, seed=2)
    eager, compiled = tiny(n_layers=1), tiny(n_layers=1)
    compiled.compile(backend="aot_eager")  # traces forward and backward, without a compiler
    assert list(compiled.state_dict()) == list(eager.state_dict())
    losses = [model(idx, targets)[1] for model in (eager, compiled)]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("top_k", [None, 1])
def test_greedy_sampling_takes_the_most_likely_token(top_k: int | None) -> None:
    model = tiny().eval()
    idx = tokens(2, 3)
    out = model.generate(idx, 5, temperature=0.0 if top_k is None else 1.0, top_k=top_k)
    for _ in range(5):
        idx = torch.cat([idx, logits_of(model, idx)[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(out, idx)


def test_generation_reads_only_the_last_context_length_tokens() -> None:
    model = tiny().eval()
    long = tokens(1, CONTEXT + 4)
    out = model.generate(long, CONTEXT, temperature=0.0)
    assert torch.equal(out[:, : CONTEXT + 4], long)
    assert torch.equal(out[:, 4:], model.generate(long[:, 4:], CONTEXT, temperature=0.0))


def test_the_generator_determines_the_samples() -> None:
    a, b, c = (
        tiny().eval().generate(tokens(2, 3), 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@given(vocab_size=st.integers(1, 60), top_k=st.integers(1, 60), seed=st.integers(0, 2**32))
@settings(max_examples=20)
def test_sampling_takes_one_of_the_k_most_likely_ids(vocab_size: int, top_k: int, seed: int) -> None:
    model = tiny().eval()
    idx = tokens(4, 3)
    generator = torch.Generator().manual_seed(seed)
    new = model.generate(idx, 1, temperature=5.0, top_k=top_k, vocab_size=vocab_size, generator=generator)[:, -1:]
    allowed = logits_of(model, idx)[:, -1, :vocab_size]
    allowed = allowed.topk(min(top_k, allowed.shape[-1])).indices
    assert (allowed == new).any(dim=-1).all()


def test_samples_follow_the_softmax_at_the_temperature() -> None:
    model = tiny(vocab_size=3).eval()
    with torch.no_grad():
        model.wte.weight.mul_(20)  # far from uniform
    idx = torch.zeros(20_000, 1, dtype=torch.int64)
    new = model.generate(idx, 1, temperature=2.0, generator=torch.Generator().manual_seed(0))[:, 1]
    expected = (logits_of(model, idx[:1])[0, -1] / 2).softmax(dim=-1)
    assert expected.max() > 0.4
    # a frequency of 20,000 samples has a standard deviation of at most 0.0036: four of them
    torch.testing.assert_close(new.bincount(minlength=3) / len(new), expected, rtol=0, atol=0.015)


@pytest.mark.parametrize(("argument", "value"), [("temperature", -0.1), ("top_k", 0), ("vocab_size", 0)])
def test_a_sampling_argument_out_of_range_is_an_error(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{argument} = {value}"):
        tiny().generate(tokens(1, 1), 1, **{argument: value})

"""build_optimizer: which optimizer, and which parameters decay."""

from typing import Any

import pytest
import torch
from torch import nn

from config import OptimConfig
from optim import AccumAdamW, build_optimizer


def toy() -> nn.Module:
    return nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))


@pytest.mark.parametrize("name", ["adamw", "accumadamw"])
def test_only_parameters_with_two_or_more_dimensions_decay(name: str) -> None:
    module = toy()
    cfg = OptimConfig.model_validate({"name": name, "weight_decay": 0.3})
    decay, no_decay = build_optimizer(module, cfg, lr=0.1).param_groups
    embedding, gain, gain_bias, weight, bias = module.parameters()
    assert [id(p) for p in decay["params"]] == [id(embedding), id(weight)]
    assert [id(p) for p in no_decay["params"]] == [id(gain), id(gain_bias), id(bias)]
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.3, 0.0)


def test_accumadamw_gets_the_values_of_the_configuration() -> None:
    cfg = OptimConfig(name="accumadamw", betas=(0.8, 0.9), eps=1e-6, accum_steps=3)
    optimizer = build_optimizer(toy(), cfg, lr=0.1)
    assert isinstance(optimizer, AccumAdamW)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"], group["accum_steps"]) == (0.1, (0.8, 0.9), 1e-6, 3)


@pytest.mark.parametrize("compile", [True, False])
def test_accumadamw_compiles_as_it_is_told(monkeypatch: pytest.MonkeyPatch, compile: bool) -> None:
    monkeypatch.setattr("optim.factory.AccumAdamW", lambda _, **options: options)
    options: Any = build_optimizer(toy(), OptimConfig(name="accumadamw"), lr=0.1, compile=compile)
    assert options["compile"] is compile


def test_adamw_is_torchs_fused_one() -> None:
    optimizer = build_optimizer(toy(), OptimConfig(name="adamw"), lr=0.1)
    assert type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (0.1, (0.9, 0.95), 1e-8, True)


def test_frozen_parameters_are_in_no_group() -> None:
    module = toy()
    frozen = next(iter(module.parameters())).requires_grad_(False)
    optimizer = build_optimizer(module, OptimConfig(), lr=0.1)
    assert all(p is not frozen for group in optimizer.param_groups for p in group["params"])


@pytest.mark.parametrize("name", ["adamw", "accumadamw"])
def test_a_model_without_vectors_can_be_trained(name: str) -> None:
    module = nn.Linear(2, 1, bias=False)
    optimizer = build_optimizer(module, OptimConfig.model_validate({"name": name}), lr=0.1)
    before = module.weight.detach().clone()
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, module.weight)

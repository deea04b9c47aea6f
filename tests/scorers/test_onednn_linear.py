"""The packed linear layers against the layers that they stand for."""

import copy

import pytest
import torch

from llama_index_genret.scorers import onednn_linear
from llama_index_genret.scorers.onednn_linear import PackedModel, packed_linear

pytestmark = pytest.mark.torch


@pytest.fixture
def module():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(48, 80), torch.nn.SiLU(), torch.nn.Linear(80, 16, bias=False))


@pytest.fixture
def rows():
    return torch.randn(2, 7, 48)


def applied(packed, module, rows):
    with packed.applied(), torch.inference_mode():
        return module(rows)


def test_the_packed_layers_give_the_same_numbers(module, rows):
    packed = PackedModel(module)
    torch.testing.assert_close(applied(packed, module, rows), module(rows), atol=1e-5, rtol=1e-5)
    assert len(packed._packed) == 2


def test_the_module_is_as_before_afterwards(module, rows):
    before = copy.deepcopy(module.__dict__)
    with pytest.raises(RuntimeError):
        applied(PackedModel(module), module, rows[..., :5])
    assert not any("forward" in vars(part) for part in module)
    assert module.__dict__.keys() == before.keys()


def test_a_weight_that_changed_is_packed_anew(module, rows):
    packed = PackedModel(module)
    applied(packed, module, rows)
    with torch.no_grad():
        module[0].weight.mul_(3)
    module[2].weight = torch.nn.Parameter(torch.randn(16, 80))
    torch.testing.assert_close(applied(packed, module, rows), module(rows), atol=1e-5, rtol=1e-5)


def test_gradients_flow_meanwhile(module, rows):
    with PackedModel(module).applied():
        module(rows).sum().backward()
    assert module[0].weight.grad is not None


def test_two_scorers_may_hold_one_module(module, rows):
    first, second = PackedModel(module), PackedModel(module)
    with first.applied():
        torch.testing.assert_close(applied(second, module, rows), module(rows), atol=1e-5, rtol=1e-5)
    assert not any("forward" in vars(part) for part in module)


def test_what_is_not_float32_too_large_or_hooked_stays_as_it_is(module, rows, monkeypatch):
    module[2].forward = module[2].forward
    assert not PackedModel(module)._linears
    del module[2].forward
    assert not PackedModel(copy.deepcopy(module).to(torch.bfloat16))._linears
    monkeypatch.setattr(onednn_linear, "MAX_BYTES", 100)
    assert not PackedModel(module)._linears
    assert packed_linear(module[0].weight, None) is None
    torch.testing.assert_close(applied(PackedModel(module), module, rows), module(rows))


def test_a_packed_weight_is_kept_while_it_stays(module):
    weight = module[0].weight
    packed = packed_linear(weight, None)
    assert packed is not None
    assert packed_linear(weight, packed) is packed
    with torch.no_grad():
        weight.add_(1)
    rows = torch.randn(3, 48)
    with torch.inference_mode():
        torch.testing.assert_close(packed_linear(weight, packed)(rows, None), rows @ weight.T, atol=1e-4, rtol=1e-5)

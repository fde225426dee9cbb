"""Our AdamW: torch's numbers, a gate, and an average that moves where bfloat16's would stand still."""

import pytest
import torch
from torch import Tensor

from swinv2_scale.engine.adamw import AdamW


def trained(weights: list[Tensor], ema_decay: float | None = None) -> AdamW:
    groups = [{"params": weights[:1], "weight_decay": 0.1}, {"params": weights[1:], "weight_decay": 0.0}]
    return AdamW(groups, ema_decay, lr=1e-2)


def parameters() -> list[Tensor]:
    random = torch.Generator().manual_seed(3)
    return [torch.randn(7, 5, generator=random), torch.randn(11, generator=random)]


def give_gradients(weights: list[Tensor], step: int) -> None:
    random = torch.Generator().manual_seed(step)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=random)


def test_it_steps_as_torch_s_does_with_and_without_an_average() -> None:
    ours, theirs = parameters(), parameters()
    optimizer = trained(ours, ema_decay=0.99)
    groups = [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:]}]
    reference = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    reference.param_groups[1]["weight_decay"] = 0.0
    for step in range(5):
        for weights, each in ((ours, optimizer), (theirs, reference)):
            give_gradients(weights, step)
            each.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("decay", [0.5, 0.9999])
def test_the_average_is_the_formula_s_warm_up_included(decay: float) -> None:
    weights = parameters()
    optimizer = trained(weights, decay)
    expected = [weight.double() for weight in weights]
    for step in range(1, 30):
        give_gradients(weights, step)
        optimizer.step()
        now = min(decay, (1 + step) / (10 + step))
        expected = [now * e + (1 - now) * w.double() for e, w in zip(expected, weights, strict=True)]
    for weight, value in zip(weights, expected, strict=True):
        # float32 rounds the average once a step.
        torch.testing.assert_close(optimizer.state[weight]["ema"].double(), value, rtol=1e-5, atol=1e-6)


def test_a_step_of_a_ten_thousandth_moves_the_average_which_bfloat16_would_lose() -> None:
    weight = torch.ones(3)
    optimizer = trained([weight, torch.ones(1)], 0.9999)
    state = optimizer.allocate(weight)
    state["step"].fill_(10**6)  # the warm-up is over
    state["ema"].copy_(weight)
    weight.grad = torch.full((3,), 1.0)
    optimizer.step()
    moved = (weight - 1) * 1e-4
    assert (state["ema"] < 1).all()
    torch.testing.assert_close(state["ema"] - 1, moved, rtol=0.2, atol=0)  # a few units in float32's last place
    assert (torch.ones(3).bfloat16() + moved.bfloat16() == 1).all()


def test_a_closed_gate_leaves_weights_moments_and_average_alone() -> None:
    weights = parameters()
    optimizer = trained(weights, 0.9)
    give_gradients(weights, 0)
    optimizer.step()
    tensors = [*weights, *(t for weight in weights for t in optimizer.state[weight].values())]
    before = [tensor.clone() for tensor in tensors]
    optimizer.may_step = lambda: False
    give_gradients(weights, 1)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    optimizer.may_step = lambda: True
    optimizer.step()
    assert not torch.equal(weights[0], before[0])


def test_allocated_states_are_those_that_the_first_step_would_make() -> None:
    ours, theirs = parameters(), parameters()
    allocated, fresh = trained(ours), trained(theirs)
    for weight in ours:
        allocated.allocate(weight)
    for weights, optimizer in ((ours, allocated), (theirs, fresh)):
        give_gradients(weights, 1)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert allocated.state_keys == ("exp_avg", "exp_avg_sq")
    for ours_weight, theirs_weight in zip(ours, theirs, strict=True):
        assert allocated.state[ours_weight].keys() == fresh.state[theirs_weight].keys()

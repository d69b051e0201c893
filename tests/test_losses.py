"""The loss without whole logits is F.cross_entropy's, and so are its gradients."""

import pytest
import torch
from torch.nn import functional as F

from opt.model import loss


@pytest.mark.parametrize("chunk", [1024, 128, 1])
def test_fused_loss_is_the_plain_loss(monkeypatch, chunk):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(300, 64, requires_grad=True),
        torch.randn(1003, 64, requires_grad=True),
    )
    targets = torch.randint(0, 1003, (300,))
    targets[::7] = -100
    plain = F.cross_entropy(hidden @ weight.T, targets, ignore_index=-100, reduction="sum")
    fused = loss.fused_linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(fused, plain)
    expected, found = (torch.autograd.grad(loss * 0.5, (hidden, weight)) for loss in (plain, fused))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_fused_loss_under_autocast_and_without_gradients():
    """bf16 products, fp32 gradients for fp32 weights; in evaluation the loss alone."""
    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(64, 32, requires_grad=True),
        torch.randn(517, 32, requires_grad=True),
    )
    targets = torch.randint(0, 517, (64,))
    plain = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        fused = loss.fused_linear_cross_entropy(hidden, weight, targets)
    assert fused.dtype == torch.float32 and fused.item() == pytest.approx(plain.item(), rel=5e-3)
    gradient = torch.autograd.grad(fused, weight)[0]
    expected = torch.autograd.grad(plain, weight)[0]
    assert gradient.dtype == torch.float32 and (gradient - expected).norm() < 0.02 * expected.norm()
    with torch.no_grad():
        assert loss.fused_linear_cross_entropy(hidden, weight, targets).item() == pytest.approx(
            plain.item(), rel=1e-5
        )

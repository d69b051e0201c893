"""The plain form of the optimizer's state: Adam updates the weights that forward and backward work
with, which are in fp32."""

from collections.abc import Iterator

import torch
from colossalai.interface import OptimizerWrapper

from opt.colossal.pieces import Form, Piece


class Plain(Form):
    """torch_ddp, and hybrid_parallel in fp32 without ZeRO."""

    def pieces(self) -> Iterator[Piece]:
        """Whole parameters, of this tensor-parallel rank."""
        for name, working in self.trained():
            yield Piece(
                name, working.shape, 0, working.numel(), working, working.data.view(-1), None
            )


class ClippingOptimizer(OptimizerWrapper):
    """HybridAdam behind a loss scaler, which passes everything on if it is not enabled."""

    def __init__(self, optim, scaler: torch.amp.GradScaler, max_norm: float):
        """`max_norm`: gradients are scaled down to it where it is over 0, be it infinite; then
        their norm is known."""
        super().__init__(optim)
        self.scaler, self._max_norm, self._norm = scaler, max_norm, None

    def backward(self, loss, inputs=None, retain_graph=False, **kwargs):
        self.scaler.scale(loss).backward(inputs=inputs, retain_graph=retain_graph, **kwargs)

    def step(self) -> None:
        """One update; none along a gradient that is not finite, if `max_norm` is over 0."""
        if self._max_norm > 0:
            self.scaler.unscale_(self.optim)
            self._norm = self.optim.grad_norm()
        # In fp16 the scaler skips by what unscale_ has found.
        self.scaler.step(self.optim, grad_norm=self._norm, max_norm=self._max_norm)
        self.scaler.update()

    def get_grad_norm(self) -> torch.Tensor | None:
        """Before clipping, a scalar on the device."""
        return self._norm

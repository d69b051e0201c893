"""A batch in two halves, each on a stream of its own: while the processes of a tensor-parallel
group add up what one half's products have come to, a GPU multiplies for the other (the idea of
DeepSpeed's Domino, arXiv:2409.15241).

In backward as well: autograd runs each layer on the stream of its forward, of the second half ahead
of the first, and adds up the weights' gradients of both.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch


class Halves:
    """Splits hidden states (rows, length, width) by rows, if they have at least `least` tokens (by
    default never) and an even number of rows: halves of other shapes would be compiled anew. On a
    CPU there is one stream for both."""

    def __init__(self, least: float = math.inf):
        self._least = least
        self.most = 1 if least == math.inf else 2  # parts that a batch may be split into
        self._stream: torch.cuda.Stream | None = None  # the second half's

    def split(self, hidden_states: torch.Tensor, seeds=None) -> list[torch.Tensor]:
        """Two halves; or what was there, alone. `seeds`: a tensor that the layers read on both
        streams."""
        rows, length, _ = hidden_states.shape
        if rows % 2 or rows * length < self._least:
            return [hidden_states]
        if hidden_states.is_cuda:
            if self._stream is None:
                self._stream = torch.cuda.Stream()
                _expect_two_streams()
            self._stream.wait_stream(torch.cuda.current_stream())
            for tensor in (hidden_states, seeds):
                if tensor is not None:
                    tensor.record_stream(self._stream)
        return list(hidden_states.chunk(2))

    def each(self, function: Callable, given: list[tuple]) -> list[torch.Tensor]:
        """`function` of what is given of each part."""
        first, *second = given
        done = [function(*first)]
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            return done + [function(*part) for part in second]

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """What split() has split."""
        if len(parts) == 1:
            return parts[0]
        if self._stream:
            torch.cuda.current_stream().wait_stream(self._stream)
            parts[1].record_stream(torch.cuda.current_stream())
        return torch.cat(parts)


WHOLE = Halves()


def _expect_two_streams() -> None:
    """PyTorch (seen in 2.11) warns of a gradient that comes from another stream than the one it is
    added up on, as of something not meant; here it is."""
    warn = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)
    if warn is not None:
        warn(False)

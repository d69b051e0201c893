"""Steps as CUDA graphs, as far as a CPU can show: what is recorded, run as it is. The rest is in
test_gpu.py and test_several_gpus.py."""

import contextlib

import torch

from opt.train import graphs


class NoStream:
    def wait_stream(self, other):
        pass


def test_batches_of_a_recorded_step_are_added_up_once(monkeypatch):
    """Of two parameters one's product adds to the gradient that is there; the other's comes summed
    up over two pipeline stages, which must not sum up the batches before once more. The code that
    is recorded on a GPU, run as it is."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "current_stream", NoStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, **_: self.clone())
    adding, tied = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    place = torch.zeros(2)

    def backward(inputs, weight):
        if adding.grad is None:
            place.zero_()
        adding.grad = place.add_(inputs["x"])
        tied.grad = inputs["x"] + (0 if tied.grad is None else tied.grad)
        tied.grad = 2 * tied.grad  # an all-reduce of two stages with the same
        return inputs["x"].sum() * weight

    graphed = graphs.GraphedBackward(backward, [adding, tied], places={adding: place})
    for _ in range(2):  # steps
        for x in (1.0, 10.0, 100.0):
            graphed._seen = set()  # a shape that comes for the first time: not recorded
            graphed({"x": torch.full((2,), x)}, 1.0)
        assert adding.grad.tolist() == [111, 111] and tied.grad.tolist() == [222, 222]
        graphed.zero_grad()

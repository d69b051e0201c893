"""Steps as CUDA graphs: the GPU runs what was recorded without waiting for the host.

A step of OPT-350m launches thousands of kernels. With short rows the GPU is through with each
before Python has launched the next one; replayed from a graph they follow one another at once (one
H100, 32 descriptions a step, low_level_zero: 59 ms, and 12 ms replayed). Forward and backward are a
graph for each shape of batch; the update, which has no shape, is another. Collectives are parts of
both: on two GPUs the host would need 10 ms a step for them and the update, as long as the rest of
the step takes.
"""

from collections.abc import Callable

import torch

from opt.colossal import processes
from opt.colossal.plugin import Plugin
from opt.model.kernel_probe import has_kernel

# NCCL's watchdog asks about its events from a thread of its own meanwhile, which must not end the
# recording.
_MODE = "thread_local"


def record(run: Callable, plugin: Plugin, model) -> "GraphedBackward":
    """A step of a boosted model, recorded: `run(inputs, weight)` of forward and backward, and the
    plugin's update if it can be."""
    trained = [p for p in model.parameters() if p.requires_grad]
    graphed = GraphedBackward(
        run, trained, getattr(plugin.form, "reduction", None), getattr(plugin, "totals", {})
    )
    if hasattr(plugin.form, "run") and all(
        has_kernel(name, plugin.device, *kind) for name, *kind in plugin.update_kernels(plugin.plan)
    ):
        plugin.form.replay = GraphedUpdate(plugin.form.run, graphed.pool, graphed.stream)
    return graphed


class GraphedBackward:
    """Replays `run(inputs, weight)`, which leaves gradients in `parameters` and returns the loss.

    A shape of batch that comes for the first time is run as it is, which prepares libraries,
    compiled layers and connections for it, and recorded when it comes again. For parameters that
    are plain tensors: nothing else may happen in backward than arithmetic, also of several
    processes that hold one model, and what `reduction` does (a reduction.LayerwiseZero), which then
    has the gradients.
    """

    def __init__(
        self,
        run: Callable[[dict, torch.Tensor], torch.Tensor],
        parameters: list[torch.Tensor],
        reduction=None,
        places: dict[torch.Tensor, torch.Tensor] | None = None,
    ):
        """`places`: by parameter, where `run` puts its gradient, and adds to one that is there."""
        self._places = places or {}
        self._run, self._parameters, self._reduction = run, parameters, reduction
        self._recorded, self._seen = {}, set()
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        # The optimizer finds gradients by their address, whichever graph has computed them: they
        # stay where they are.
        self._gradients: list[torch.Tensor] = []
        self._nothing = [None] * len(parameters)
        processes.before_stop.append(self._recorded.clear)  # [F37]
        self._is_first = True  # of a step's batches, but for such as have been reduced

    def __call__(self, inputs: dict[str, torch.Tensor], weight: float) -> torch.Tensor:
        """Add the gradients of `weight` times the summed loss of `inputs` (host tensors); returns
        that loss."""
        reduces = self._reduction is not None and self._reduction.is_on
        if not reduces and not self._gradients:
            self._gradients = [
                self._places[parameter]
                if parameter in self._places
                else torch.zeros_like(parameter)
                for parameter in self._parameters
            ]
        key = (
            tuple(next(iter(inputs.values())).shape),
            self._is_first,
            reduces,
            reduces and bool(self._reduction.grads),
        )
        if key in self._seen and key not in self._recorded:
            self._recorded[key] = self._record(inputs, reduces)
        self._seen.add(key)
        if key in self._recorded:
            graph, own_inputs, own_weight, loss = self._recorded[key]
            for name, tensor in inputs.items():
                own_inputs[name].copy_(tensor, non_blocking=True)
            own_weight.fill_(weight)
            graph.replay()
            loss = loss.clone()  # the next graph reuses its memory
        else:
            own_inputs = {name: tensor.cuda(non_blocking=True) for name, tensor in inputs.items()}
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):  # where it will be recorded
                loss = self._backward(own_inputs, weight, reduces)
            torch.cuda.current_stream().wait_stream(self.stream)
        if reduces:
            self._reduction.take_places()
        for parameter, gradient in zip(
            self._parameters, self._nothing if reduces else self._gradients, strict=True
        ):
            parameter.grad = gradient
        self._is_first = reduces and self._is_first
        return loss

    def zero_grad(self) -> None:
        """Forget the gradients of the step before: the next ones take their place, with no zeros in
        between."""
        self._is_first = True

    def _record(self, inputs, reduces: bool):
        inputs = {name: tensor.cuda() for name, tensor in inputs.items()}
        weight = torch.ones((), device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode=_MODE):
            loss = self._backward(inputs, weight, reduces)
        return graph, inputs, weight, loss

    def _backward(self, inputs, weight, reduces: bool) -> torch.Tensor:
        """The loss; its gradients go to where the optimizer finds them."""
        # Those that are reduced with the batches before, or whose products add to them, start from
        # these; others are added together below, as a tied embedding's, which comes summed up over
        # the pipeline stages.
        start = self._nothing
        if not self._is_first:
            start = [
                gradient if reduces or parameter in self._places else None
                for parameter, gradient in zip(self._parameters, self._gradients, strict=True)
            ]
        for parameter, gradient in zip(self._parameters, start, strict=True):
            parameter.grad = gradient
        loss = self._run(inputs, weight)
        if reduces:
            self._reduction.finish()
        else:
            # [C21] In a few kernels: left to autograd, adding them to what is there is a kernel for
            # each.
            gather = torch._foreach_copy_ if self._is_first else torch._foreach_add_
            apart = [
                (gradient, parameter.grad)
                for gradient, parameter in zip(self._gradients, self._parameters, strict=True)
                if gradient is not parameter.grad
            ]
            if apart:
                gather(*zip(*apart, strict=True))
        return loss


class GraphedUpdate:
    """Replays `update()`, which returns the gradient's norm or None: run as it is at first, then
    recorded."""

    def __init__(self, update: Callable[[], torch.Tensor | None], pool, stream: torch.cuda.Stream):
        self._update, self._pool, self._stream = update, pool, stream
        self._graph, self._norm, self._is_prepared = None, None, False

    @property
    def is_recorded(self) -> bool:
        """Whether from now on it is replayed."""
        return self._graph is not None

    def __call__(self) -> torch.Tensor | None:
        """What `update()` returns."""
        if not self._is_prepared:
            self._is_prepared = True
            return self._update()
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode=_MODE
            ):
                self._norm = self._update()
            self._graph = graph
            processes.before_stop.append(graph.reset)
        self._graph.replay()
        return None if self._norm is None else self._norm.clone()

"""What tests/test_parity.py and test_export.py run under torchrun: many small cases in one start.

    torchrun --nproc_per_node N tests/parity_worker.py CASES.json RESULTS.json

CASES.json: {case: {"wanted": a function below, "flags": [of opt_train_demo.py], and what else the
function takes}}.
RESULTS.json: {case: what the function returns}, written anew after each case.
"""

import functools
import gc
import json
import sys
import threading
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.nn import functional as F

from args import resolve, train_parser
from opt.colossal import processes
from opt.colossal.hybrid import HybridPlugin
from opt.data import tokens
from opt.data.batches import Batches
from opt.data.rows import Rows
from opt.model import kernel_probe, loss, weights
from opt.model.config import load_config, with_dropout
from opt.model.opt import meta_model
from opt.train import checks
from opt.train.export import export_model
from opt.train.schedule import Steps
from opt_train_demo import Boosted, boost, evaluate, train_step

SAMPLE_MODEL = Path(__file__).resolve().parent.parent / "sample" / "opt-tiny"


def boosted(args, here, steps=None) -> Boosted:
    """The model as opt_train_demo.py has it before the first step."""
    directory = Path(args.model_name_or_path)
    config = with_dropout(load_config(directory), args.dropout)
    contents = weights.open_weights(directory, meta_model(config), args.seed)
    args, contents = checks.with_adapters(args, config, contents)
    steps = steps or Steps(10, 10, 0, 10, args.learning_rate)
    return boost(args, here, config, contents, steps)


def first_losses(args, here, rows: str) -> list[float]:
    """The loss of all rows, over all data-parallel ranks: evaluated, then at each of
    --max_train_steps steps (default none)."""
    trained = boosted(args, here)
    spread = trained.plugin.spread
    rows = Rows(Path(rows), "train")
    batches = Batches(
        rows, len(rows) // spread.dp_size, spread.dp_rank, spread.dp_size, pad_id=1, seed=None
    )
    losses = [evaluate(trained, batches)]
    for _ in range(args.max_train_steps or 0):
        share, _ = train_step(trained, list(batches.epoch()))
        dist.all_reduce(share)
        losses.append(share.item())
    return losses


def adapters(args, here, rows: str) -> dict[str, list]:
    """The loss and the gradient's norm of --max_train_steps steps at one learning rate, each on all
    rows, and the loss of all after them; the adapters come to --output_path."""
    trained = boosted(args, here, Steps.of_benchmark(args.learning_rate))
    spread = trained.plugin.spread
    rows = Rows(Path(rows), "train")
    share = len(rows) // spread.dp_size
    batches = Batches(rows, share, spread.dp_rank, spread.dp_size, pad_id=1, seed=None)
    losses, norms = [], []
    for _ in range(args.max_train_steps):
        loss, norm = train_step(trained, list(batches.epoch()))
        dist.all_reduce(loss)
        losses.append(loss.item())
        norms.append(float(norm))
    directory = Path(args.model_name_or_path)
    config, tokenizer = load_config(directory), tokens.load_tokenizer(SAMPLE_MODEL)
    export_model(trained.plugin, directory, config, tokenizer, args.output_path)
    return {"losses": losses, "norms": norms, "evaluated": evaluate(trained, batches)}


def trained(
    args, here, rows: str, tokenizer: str, adds_up: bool = False, halves: bool = False
) -> list[float]:
    """The losses of --max_train_steps steps of all rows; then the model is written to
    --output_path. `adds_up`, `halves`: see HybridPlugin's adds_up_in_products, halves_from."""
    with (
        patch.object(HybridPlugin, "adds_up_in_products", adds_up),
        patch.object(HybridPlugin, "halves_from", staticmethod(lambda plan: 1 if halves else None)),
    ):
        boosted_ = boosted(args, here)
    model, plugin, spread = boosted_.model.unwrap(), boosted_.plugin, boosted_.plugin.spread
    if adds_up:
        assert len(plugin.totals) == 6 * len(model.own_layers)
        assert plugin.scheduler.lag == spread.pp_rank
    assert not halves or len(model.halves.split(torch.zeros(4, 1, 1))) == 2
    rows = Rows(Path(rows), "train")
    batches = Batches(
        rows, len(rows) // spread.dp_size, spread.dp_rank, spread.dp_size, pad_id=1, seed=None
    )
    losses = []
    for _ in range(args.max_train_steps):
        share, _ = train_step(boosted_, list(batches.epoch()))
        dist.all_reduce(share)
        losses.append(share.item())
    directory = Path(args.model_name_or_path)
    source, tokenizer = load_config(directory), tokens.load_tokenizer(Path(tokenizer))
    export_model(boosted_.plugin, directory, source, tokenizer, args.output_path)
    if spread.tp_group is not None:  # which outlives its plugin, see F57
        del boosted_, model, plugin
        gc.collect()
        assert dist.get_process_group_ranks(spread.tp_group)
    return losses


def compiled(args, here, rows: str) -> dict[str, list]:
    """first_losses, and how many graphs compiled layers have become by then, on each process."""
    from torch._dynamo.utils import counters  # which loads the compiler

    # Graphs are Dynamo's and autograd's matter: not to wait for a C++ compiler as well
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    losses = first_losses(args, here, rows)
    graphs = torch.zeros(here.world_size, dtype=torch.int64)
    graphs[here.rank] = counters["aot_autograd"]["ok"]
    dist.all_reduce(graphs)
    return {"losses": losses, "graphs": graphs.tolist()}


def gradients(args, here, rows: str) -> dict[str, float]:
    """By parameter, how far what opt/colossal/reduction.py keeps after two backwards is from twice
    the mean gradient over all processes, in parts of that gradient's norm; the worst of the
    processes. Each process has rows of its own."""
    trained = boosted(args, here)
    model, optimizer, reduction = trained.model, trained.optimizer, trained.plugin.form.reduction
    rows = Rows(Path(rows), "train")
    inputs = next(
        iter(Batches(rows, 2, here.rank, here.world_size, pad_id=1, seed=None).epoch())
    ).inputs
    named = dict(model.unwrap().named_parameters())
    # Which runs no hook of a parameter
    wanted = torch.autograd.grad(model(**inputs)["loss"], list(named.values()))
    for _ in range(2):
        trained.booster.backward(model(**inputs)["loss"], optimizer)
    reduction.finish()
    distances = torch.zeros(len(named))
    for i, (parameter, grad) in enumerate(zip(named.values(), wanted, strict=True)):
        whole = grad.flatten().float()
        dist.all_reduce(whole)
        own = reduction.grads[parameter]
        padded = F.pad(2 * whole / here.world_size, (0, len(own) * here.world_size - len(whole)))
        distances[i] = (own - padded.chunk(here.world_size)[here.rank]).norm() / padded.norm()
    dist.all_reduce(distances, dist.ReduceOp.MAX)
    assert not any(p.grad is not None for p in named.values())
    return dict(zip(named, distances.tolist(), strict=True))


def split_loss(args, here, chunk: int) -> dict[str, float]:
    """How far the fused loss over a vocabulary that is split over all processes, in chunks of so
    many tokens a process, is from F.cross_entropy over the whole, and so its gradients, in parts of
    their norms; the worst of the processes. 1003 ids do not divide by their number."""
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 64, requires_grad=True) for n in (300, 1003))
    targets = torch.randint(0, 1003, (300,))
    targets[::7] = -100
    whole = F.cross_entropy(hidden @ weight.T, targets, ignore_index=-100, reduction="sum")
    wanted = torch.autograd.grad(whole * 0.5, (hidden, weight))
    rows = -(-1003 // here.world_size)
    first = here.rank * rows
    own = torch.ones(rows, 64)  # padding is not zero
    size = min(rows, 1003 - first)
    own[:size] = weight.detach()[first : first + size]
    own.requires_grad_()
    split = loss.Split(dist.group.WORLD, first, size)
    with patch.object(loss, "CHUNK", chunk):
        fused = loss.fused_linear_cross_entropy(hidden, own, targets, split)
        alone = loss.fused_linear_cross_entropy(hidden.detach(), own.detach(), targets, split)
    assert torch.equal(fused, alone)  # as in an evaluation
    of_hidden, of_own = torch.autograd.grad(fused * 0.5, (hidden, own))
    assert not of_own[size:].any()
    pairs = {
        "loss": (fused, whole),
        "hidden": (of_hidden, wanted[0]),
        "weight": (of_own[:size], wanted[1][first : first + size]),
    }
    distances = torch.tensor([((a - b).norm() / b.norm()).item() for a, b in pairs.values()])
    dist.all_reduce(distances, dist.ReduceOp.MAX)
    return dict(zip(pairs, distances.tolist(), strict=True))


def memory(args, here) -> dict[str, list[int]]:
    """By rank, bytes of its own memory: the most that a process came to hold while the model was
    built and filled, and what it holds then."""
    for _ in range(
        2
        # The last case's model: autograd lets go of its tensors when Python has, and then they are
        # garbage
    ):
        gc.collect()
    with _PeakMemory() as watch:
        held = boosted(args, here)
    gc.collect()
    by_rank = torch.zeros(2, here.world_size, dtype=torch.int64)
    by_rank[:, here.rank] = torch.tensor([watch.peak, watch.kept])
    dist.all_reduce(by_rank)
    del held
    return dict(zip(("peak", "kept"), by_rank.tolist(), strict=True))


def export(args, here, shard_bytes: int) -> None:
    """Write the model to --output_path without having trained it."""
    trained = boosted(args, here)
    directory = Path(args.model_name_or_path)
    config, tokenizer = load_config(directory), tokens.load_tokenizer(directory)
    export_model(trained.plugin, directory, config, tokenizer, args.output_path, shard_bytes)


class _PeakMemory(threading.Thread):
    """Watches the process's anonymous memory: not the pages of mapped files, which the kernel can
    drop at any time."""

    def __init__(self):
        super().__init__(daemon=True)
        self._done = threading.Event()
        self._before = self._most = self.now()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self._done.set()
        self.join()

    def run(self):
        while not self._done.wait(0.001):
            self._most = max(self._most, self.now())

    @property
    def peak(self) -> int:
        return self._most - self._before

    @property
    def kept(self) -> int:
        return self.now() - self._before

    @staticmethod
    def now() -> int:
        line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024


def main(cases, results) -> None:
    here = processes.place()
    processes.start(here)
    torch.set_num_threads(1)  # the models are tiny
    found = {}
    for name, case in json.loads(Path(cases).read_text()).items():
        args = resolve(
            train_parser().parse_args(case.pop("flags")),
            here.device.type,
            kernel_probe.has_bf16(here.device),
        )
        functions = {
            f.__name__: f
            for f in (
                first_losses,
                trained,
                adapters,
                compiled,
                gradients,
                split_loss,
                memory,
                export,
            )
        }
        found[name] = functions[case.pop("wanted")](args, here, **case)
        if here.is_main:
            Path(results).write_text(json.dumps(found))
    processes.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Fine-tune OPT with ColossalAI.

    python opt_train_demo.py --model_name_or_path sample/opt-tiny --dataset sample/netflix_sample.csv --num_epoch 3
    colossalai run --nproc_per_node 4 opt_train_demo.py --plugin hybrid_parallel --tp_size 2 --pp_size 2
    torchrun --nproc_per_node 2 opt_train_demo.py --plugin gemini
    python opt_train_demo.py --dry_run          (check everything, print the plan, stop)

Read it from top to bottom: flags, checks, processes, data, plan; plugin, Booster, model, HybridAdam, boost, weights; the loop; the result.
"""

import itertools
from dataclasses import dataclass

from args import train_parser
from opt import installed

if __name__ == "__main__":  # ahead of the imports below, which take seconds
    installed.check()
    FLAGS = train_parser().parse_args()

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from opt.colossal import processes, registry
from opt.colossal.adam import HybridAdam, decay_groups
from opt.data import tokens
from opt.data.batches import Batches, Position
from opt.model.opt import expect_varying_lengths
from opt.train import checkpoints, checks, export, faults, graphs, schedule
from opt.train import plan as plans
from opt.train.recorder import Recorder
from opt.train.signals import Control

from colossalai.booster import Booster  # isort: skip  behind opt.colossal, without which its import takes seconds more


def main(flags) -> None:
    """Everything up to the plan, which a dry run ends with; then train, and show the result. Raises UserError."""
    here = processes.place()
    setup = checks.check(flags, here)
    plan = setup.plan  # the flags, with what they left open
    if not plan.dry_run:
        processes.start(here, plan.mem_cap, plan.timeout_minutes)

    # By one process a node; the others map the result into memory.
    read = (plan.dataset, plan.text_column, plan.max_length, plan.eval_fraction, plan.seed, setup.tokenizer)
    dataset = tokens.open_dataset(processes.node_first(here, lambda: tokens.tokenize(*read)))
    plan = plans.with_data(plan, here, dataset)

    if not plan.dry_run:
        processes.node_first(here, lambda: checks.lock_output(plan.output_path) if here.is_main else None)
    output = export.output_directory(plan.output_path)
    before = processes.node_first(here, lambda: checkpoints.find(plan.resume, output))
    if before:
        checkpoints.check_same_run(before, plan, setup.weights, dataset.train)
    start = before.position if before else Position()
    steps = schedule.count_steps(plan, len(dataset.train), start)
    kernels = plans.missing_kernels(plan, here, setup.config, dataset.longest if plan.padding_free else None)
    if here.is_main:
        print(plans.describe(plan, here, setup, dataset, steps, before, kernels), flush=True)
    if plan.dry_run:
        return

    is_done = train(plan, here, setup, dataset, steps, start, before)
    processes.stop()
    if is_done and here.is_main and not plan.no_save and not export.is_one_file(plan.output_path):
        try:
            show_samples(plan.output_path, here.device, setup.tokenizer)
        except Exception as error:  # the model is trained and saved: what it writes is for show
            print(f"no descriptions that it writes: {type(error).__name__}: {' '.join(str(error).split()):.300}", flush=True)


@dataclass
class Boosted:
    """What ColossalAI's Booster makes of a model and its optimizer, and what goes with them."""

    booster: Booster
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    lr_schedule: torch.optim.lr_scheduler.LRScheduler
    recorded: graphs.GraphedBackward | None = None  # replays forward and backward, with --cuda_graph

    @property
    def plugin(self):
        """The Booster's."""
        return self.booster.plugin


def boost(plan, here, config, weights, learning_rate, warmup_steps, total_steps) -> Boosted:
    """Plugin, Booster, model, HybridAdam, boost, weights: in the order in which ColossalAI wants them."""
    plugin = registry.new_plugin(plan, here.device, weights.num_parameters)
    booster = Booster(plugin=plugin, mixed_precision=plugin.mixed_precision)
    model = plugin.new_model(config)
    optimizer = HybridAdam(decay_groups(model, plan.weight_decay), lr=learning_rate)
    lr_schedule = schedule.build_schedule(optimizer, warmup_steps, total_steps)
    model, optimizer, *_ = booster.boost(model, optimizer)
    plugin.place(model, weights)  # only now the plugin knows this process's share of each tensor
    boosted = Boosted(booster, model, optimizer, lr_schedule)
    if plan.cuda_graph:
        boosted.recorded = graphs.record(lambda inputs, weight: forward_backward(boosted, inputs, weight), plugin, model)
    return boosted


def train(plan, here, setup, dataset, steps, start, before) -> bool:
    """From the model to the saved model. False if a signal has stopped it."""
    control = Control(here)
    if dataset.train.lengths.min() < dataset.train.lengths.max():
        expect_varying_lengths()
    weights = before.tensors("weights") if before else setup.weights
    boosted = boost(plan, here, setup.config, weights, steps.learning_rate, steps.warmup_steps, steps.total_steps)
    plugin = boosted.plugin
    boosted.model.unwrap().longest_row = dataset.longest

    spread = (plan.batch_size, plugin.spread.dp_rank, plugin.spread.dp_size, setup.config.pad_token_id)
    train_batches = Batches(dataset.train, *spread, seed=plan.seed, padding_free=plan.padding_free)
    eval_batches = Batches(dataset.held_out, *spread, seed=None, padding_free=plan.padding_free)

    output = export.output_directory(plan.output_path)
    saver = checkpoints.Saver(plan, here, control, plugin, boosted.optimizer, boosted.lr_schedule, dataset.train, weights)
    if before:
        saver.restore(before)
    recorder = Recorder(plan, output, here.is_main, steps.total_steps, start.step, before.metrics if before else b"")
    if len(dataset.held_out) and not start.step:
        first_loss = evaluate(boosted, eval_batches)
        recorder.evaluation(0, first_loss)
        checks.check_first_loss(first_loss, setup)

    stopped_by = None
    planned = train_batches.steps(start, plan.num_epoch, plan.gradient_accumulation_steps)
    with recorder:
        for position, batches in itertools.islice(planned, steps.total_steps - start.step):
            step, is_last = position.step, position.step == steps.total_steps
            lr = boosted.lr_schedule.get_last_lr()[0]
            loss, grad_norm = train_step(boosted, batches)
            epoch = position.epoch + position.rows / len(dataset.train)
            recorder.step(step, epoch, loss, lr, grad_norm, sum(batch.tokens for batch in batches))
            if step == 1 and not len(dataset.held_out):
                checks.check_first_loss(loss.item(), setup)  # summed over all processes by recorder.step
            if len(dataset.held_out) and (step % steps.eval_steps == 0 or is_last):
                recorder.evaluation(step, evaluate(boosted, eval_batches))
            stopped_by = saver.after(position, recorder, is_last)  # checkpoints, signals, steps that lead nowhere
            if stopped_by:
                break
        saver.finish()

    if stopped_by and here.is_main:
        print(f"{stopped_by}: stopped after step {step}, saved in {saver.saved}; go on with the same command and --resume auto", flush=True)
    if not stopped_by and not plan.no_save:
        export.export_model(plugin, setup.directory, setup.source, setup.tokenizer, plan.output_path)
        if here.is_main:
            print(f"saved the model to {plan.output_path}", flush=True)
    return not stopped_by


def train_step(boosted: Boosted, batches: list):
    """Forward and backward over `batches` (gradient accumulation), then one update.

    Every target token of the step weighs the same, whichever rank, batch or micro-batch it is in: each sum of losses is
    divided by the step's number of targets over all ranks, times the data-parallel size that the plugin's average divides by.
    Where gradients are clipped, be it to infinity, a step whose gradient is not finite changes nothing.

    Returns:
        (loss, grad_norm): this process's share of the step's mean loss before the update, a scalar on the device, to be
        summed over all processes; the global gradient norm before clipping, or None where the plugin does not give it.
    """
    plugin, model, optimizer = boosted.plugin, boosted.model, boosted.optimizer
    share, targets, dp_size = 0.0, sum(batch.targets for batch in batches), plugin.spread.dp_size
    for batch in batches:
        with plugin.accumulate(model, optimizer, is_last_batch=batch is batches[-1]):
            if boosted.recorded:
                loss = boosted.recorded(batch.inputs, dp_size / targets)
            elif plugin.spread.pp_size > 1:
                loss = pipeline(boosted, batch.inputs, dp_size / targets, optimizer)
            else:
                inputs = {name: tensor.to(plugin.device, non_blocking=True) for name, tensor in batch.inputs.items()}
                loss = forward_backward(boosted, inputs, dp_size / targets)
        share += loss / dp_size if plugin.spread.counts_loss else loss.new_zeros(())
    optimizer.step()
    boosted.lr_schedule.step()
    (boosted.recorded or optimizer).zero_grad()
    return share, plugin.grad_norm(optimizer)


def forward_backward(boosted: Boosted, inputs: dict, weight):
    """The summed loss of a batch on the device, times `weight`, and its gradients."""
    loss = boosted.model(**inputs)["loss"] * weight
    boosted.booster.backward(loss, boosted.optimizer)
    return loss.detach()


def pipeline(boosted: Boosted, inputs: dict, weight: float, optimizer=None):
    """The same through pipeline stages, the gradients if there is an `optimizer`; 0 where this process has no loss."""
    # The schedule takes the mean over the micro-batches; ours is a sum.
    weight *= boosted.plugin.scheduler.num_microbatches
    result = boosted.booster.execute_pipeline(iter([inputs]), boosted.model, lambda outputs, _: outputs["loss"] * weight, optimizer)
    return result["loss"].detach() if boosted.plugin.spread.is_last_stage else torch.zeros((), device=boosted.plugin.device)


def evaluate(boosted: Boosted, batches) -> float:
    """The mean loss over all target tokens of `batches`, the same value on every process."""
    plugin = boosted.plugin
    boosted.model.eval()
    total, targets = torch.zeros((), device=plugin.device, dtype=torch.float64), 0
    with torch.no_grad():
        for batch in batches.epoch():
            if plugin.spread.pp_size > 1:
                loss = pipeline(boosted, batch.inputs, 1.0)
            else:
                loss = boosted.model(**{name: tensor.to(plugin.device, non_blocking=True) for name, tensor in batch.inputs.items()})["loss"]
            total += loss if plugin.spread.counts_loss else 0.0
            targets += batch.targets
    boosted.model.train()
    dist.all_reduce(total)
    return total.item() / targets


def show_samples(output_path, device, tokenizer, number=3) -> None:
    """Print descriptions that the saved model writes, loaded as any program would load it."""
    model = AutoModelForCausalLM.from_pretrained(output_path, torch_dtype="auto").to(device).eval()
    torch.manual_seed(0)
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id  # in OPT they are the same
    start = torch.tensor([[first]] * number, device=device)
    written = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        top_k=50,
        top_p=0.9,
        max_new_tokens=min(60, model.config.max_position_embeddings - 1),
        pad_token_id=model.config.pad_token_id,
    )
    print("three descriptions that it writes:")
    for text in tokenizer.batch_decode(written, skip_special_tokens=True):
        print(f"  - {' '.join(text.split())}")


if __name__ == "__main__":
    with faults.reported(FLAGS):
        main(FLAGS)

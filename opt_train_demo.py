"""Fine-tune OPT with ColossalAI.

    python opt_train_demo.py --model_name_or_path sample/opt-tiny \
        --dataset sample/netflix_sample.csv --num_epoch 3
    colossalai run --nproc_per_node 4 opt_train_demo.py --plugin hybrid_parallel \
        --tp_size 2 --pp_size 2
    torchrun --nproc_per_node 2 opt_train_demo.py --plugin gemini
    python opt_train_demo.py --dry_run          (check everything, print the plan, stop)

Read it from top to bottom: flags, checks, processes, data, plan; plugin, Booster, model,
HybridAdam, boost, weights; the loop; the step; the evaluation.
"""

from dataclasses import dataclass
from functools import partial

from args import train_parser
from opt import installed, registry

if __name__ == "__main__":  # ahead of the imports below, which take seconds
    installed.check()
    FLAGS = train_parser().parse_args()

import torch
import torch.distributed as dist

from opt.colossal import processes
from opt.colossal.adam import HybridAdam, decay_groups
from opt.colossal.low_memory import LowMemoryAdam
from opt.data import tokens
from opt.data.batches import Batch, Batches
from opt.data.rows import Rows, open_dataset
from opt.train import checks, faults, graphs, recorder, result, schedule
from opt.train import plan as plans
from opt.train.checkpoints import Saver
from opt.train.signals import Control

from colossalai.booster import Booster  # isort: skip  (behind opt.colossal, which makes it light)


def main(flags) -> None:
    """One run, from the flags to the result. Raises UserError."""
    here = processes.place()
    setup = checks.check(flags, here)
    if not flags.dry_run:
        processes.start(here, flags.mem_cap, flags.timeout_minutes)
    plans.refuse_early(setup, here)
    tokenized = processes.node_first(here, lambda: tokens.tokenize(setup.plan, setup.tokenizer))
    run = plans.make_run(setup, here, open_dataset(tokenized))
    if here.is_main:
        print(plans.describe(run), flush=True)
    if flags.dry_run:
        return
    is_done = evaluate_only(run) if flags.eval_only else train(run)
    processes.stop()
    if is_done and here.is_main:
        result.show(run)


@dataclass
class Boosted:
    """What ColossalAI's Booster makes of a model and its optimizer, and what goes with them."""

    booster: Booster
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    lr_schedule: torch.optim.lr_scheduler.LRScheduler
    graphed: graphs.GraphedBackward | None = None  # with --cuda_graph: replays forward, backward

    @property
    def plugin(self):
        """The Booster's: one of opt/colossal's."""
        return self.booster.plugin


def boost(plan, here, config, weights, steps: schedule.Steps) -> Boosted:
    """A model with its weights in place, and what trains it: in the order that ColossalAI wants."""
    plugin = registry.new_plugin(plan, here.device, weights.num_parameters)
    booster = Booster(plugin=plugin, mixed_precision=plugin.mixed_precision)
    model = plugin.new_model(config)
    # With --lora_r the model's own weights are frozen, and the groups hold its adapters alone.
    adam = HybridAdam if plan.optim == "adamw_torch" else LowMemoryAdam.of(plan.optim)
    optimizer = adam(
        decay_groups(model, plan.weight_decay),
        lr=steps.learning_rate,
        betas=(plan.adam_beta1, plan.adam_beta2),
        eps=plan.adam_epsilon,
    )
    lr_schedule = schedule.new_schedule(optimizer, steps)
    model, optimizer, *_ = booster.boost(model, optimizer)
    plugin.place(model, weights)  # only now it knows this process's share of each tensor
    boosted = Boosted(booster, model, optimizer, lr_schedule)
    if plan.cuda_graph:
        boosted.graphed = graphs.record(partial(forward_backward, boosted), plugin, model)
    return boosted


def boost_for(run: plans.Run) -> Boosted:
    """What trains `run`'s rows, or evaluates them."""
    boosted = boost(run.plan, run.here, run.setup.config, run.weights, run.steps)
    boosted.model.unwrap().expect_rows(run.dataset.train.shortest, run.dataset.longest)
    return boosted


def evaluate_only(run: plans.Run) -> bool:
    """--eval_only. False: there is no new model."""
    boosted = boost_for(run)
    held_out_loss = evaluate(boosted, batches_of(run.dataset.held_out, run, boosted))
    recorder.results_of_evaluation(run, held_out_loss)
    return False


def batches_of(rows: Rows, run: plans.Run, boosted: Boosted, seed=None) -> Batches:
    """This process's batches of `rows`, in their own order if there is no seed."""
    plan, spread, pad_id = run.plan, boosted.plugin.spread, run.setup.config.pad_token_id
    share = (plan.batch_size, spread.dp_rank, spread.dp_size, pad_id)
    return Batches(rows, *share, seed, plan.padding_free, plan.num_microbatches or 1)


def train(run: plans.Run) -> bool:
    """From the model to the saved model. False if a signal has stopped it, or came meanwhile."""
    plan, dataset, total = run.plan, run.dataset, run.steps.total_steps
    control = Control(run.here)
    boosted = boost_for(run)
    train_batches = batches_of(dataset.train, run, boosted, plan.seed)
    eval_batches = batches_of(dataset.held_out, run, boosted)
    saver = Saver(run, control, boosted)
    evaluations, position, stopped_by = saver.evaluations, run.start, None
    if evaluations.are_enough(plan.early_stopping_patience):  # of the run that this one goes on
        total = position.step
    ahead = position, total, plan.gradient_accumulation_steps
    with recorder.Recorder(run) as record:
        if len(dataset.held_out) and not position.step:
            evaluations.add(0, record.evaluation(0, evaluate(boosted, eval_batches)))
        for position, batches in train_batches.steps(*ahead):
            lr = boosted.lr_schedule.get_last_lr()[0]
            loss, grad_norm = train_step(boosted, batches)
            record.step(position, batches, loss, lr, grad_norm)
            is_last = position.step == total
            if len(dataset.held_out) and (position.step % run.steps.eval_steps == 0 or is_last):
                held_out_loss = record.evaluation(position.step, evaluate(boosted, eval_batches))
                evaluations.add(position.step, held_out_loss)
                is_last |= evaluations.are_enough(plan.early_stopping_patience)
            # Checkpoints, signals, steps that lead nowhere.
            stopped_by = saver.after(position, record, is_last)
            if stopped_by or is_last:
                break
        saver.finish()
    return result.save(run, boosted.plugin, saver, control, position.step, stopped_by)


def train_step(boosted: Boosted, batches: list[Batch]):
    """Forward and backward over `batches` (gradient accumulation), then one update.

    Every target token of the step weighs the same, whichever rank, batch or micro-batch it is in:
    each sum of losses is divided by the step's number of targets over all ranks, times the
    data-parallel size that the plugin's average divides by. With 10 targets on 2 ranks together the
    weight is 2/10 on either, and after the average over both 1/10 a target. Where gradients are
    clipped, be it to infinity, a step whose gradient is not finite changes nothing.

    Returns:
        loss: this process's share of the step's mean loss before the update, a scalar on the
            device, to be summed over all processes.
        grad_norm: the global gradient norm before clipping; None where the plugin does not know it.
    """
    plugin, model, optimizer = boosted.plugin, boosted.model, boosted.optimizer
    targets = sum(batch.targets for batch in batches)
    own_loss, weight = 0.0, plugin.spread.dp_size / targets
    for batch in batches:
        with plugin.accumulate(model, optimizer, is_last_batch=batch is batches[-1]):
            if boosted.graphed:
                loss = boosted.graphed(batch.inputs, weight)
            else:
                loss = forward_backward(boosted, batch.to(plugin.device), weight)
        own_loss += loss / plugin.spread.dp_size
    optimizer.step()
    boosted.lr_schedule.step()
    (boosted.graphed or optimizer).zero_grad()
    return own_loss, plugin.grad_norm(optimizer)


def forward_backward(boosted: Boosted, inputs: dict[str, torch.Tensor], weight=1.0, trains=True):
    """The summed loss of a batch on the device, times `weight`, and its gradients; unless it
    `trains`, no gradients. The loss is 0 where another process speaks for it."""
    booster, plugin, model = boosted.booster, boosted.plugin, boosted.model
    optimizer = boosted.optimizer if trains else None
    if plugin.spread.pp_size > 1:
        # Asked of each micro-batch; the schedule takes the mean over them
        scale = weight * plugin.scheduler.num_microbatches

        def criterion(outputs, _):
            return outputs["loss"] * scale

        loss = booster.execute_pipeline(iter([inputs]), model, criterion, optimizer)["loss"]
    else:
        loss = model(**inputs)["loss"] * weight
        if trains:
            booster.backward(loss, optimizer)
    return plugin.spread.counted(loss, plugin.device)


@torch.no_grad()
def evaluate(boosted: Boosted, batches: Batches) -> float:
    """The mean loss over all target tokens of `batches`, the same value on every process."""
    model, device = boosted.model, boosted.plugin.device
    model.eval()
    total, targets = torch.zeros((), device=device, dtype=torch.float64), 0
    for batch in batches.epoch():
        total += forward_backward(boosted, batch.to(device), trains=False)
        targets += batch.targets
    model.train()
    dist.all_reduce(total)
    return total.item() / targets


if __name__ == "__main__":
    with faults.reported(FLAGS):
        main(FLAGS)

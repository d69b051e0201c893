"""Fine-tune OPT with ColossalAI.

    python opt_train_demo.py --model_name_or_path sample/opt-tiny --dataset sample/netflix_sample.csv --num_epoch 3
    colossalai run --nproc_per_node 4 opt_train_demo.py --plugin hybrid_parallel --tp_size 2 --pp_size 2
    torchrun --nproc_per_node 2 opt_train_demo.py --plugin gemini
    python opt_train_demo.py --dry_run          (check everything, print the plan, stop)

Read it from top to bottom: arguments, checks, processes, data, model, optimizer, booster, weights, loop, result.
"""

import itertools
import signal

from args import train_parser
from opt import installed
from opt.errors import say_once


def main() -> None:
    args = train_parser().parse_args()
    installed.check()

    from opt.train import faults  # after the arguments: the libraries below take seconds to import

    with faults.reported(args):
        run(args)


def run(args) -> None:
    """Check, start the processes, read the data, train, show the result. Raises UserError."""
    from opt.colossal import processes
    from opt.data import tokens
    from opt.data.batches import Position
    from opt.train import checkpoints, export, plan
    from opt.train.checks import check, lock_output
    from opt.train.schedule import schedule

    here = processes.place()
    setup = check(args, here)
    if not args.dry_run:
        processes.start(here, args.mem_cap, args.timeout_minutes)
    read = (args.dataset, args.text_column, args.max_length, args.eval_fraction, args.seed, setup.tokenizer)
    dataset = tokens.open_dataset(processes.node_first(here, lambda: tokens.tokenize(*read)))
    args.padding_free = plan.is_padding_free(args, here, dataset)

    if not args.dry_run:
        processes.node_first(here, lambda: lock_output(args.output_path) if here.is_main else None)
    before = processes.node_first(here, lambda: checkpoints.find(args.resume, export.output_directory(args.output_path)))
    if before:
        checkpoints.check_same_run(before, args, setup.weights, dataset.train)

    start = before.position if before else Position()
    dp_size = here.world_size // (args.tp_size * args.pp_size)
    steps = schedule(args, len(dataset.train), dp_size, start)
    kernels = plan.missing_kernels(args, here, setup.config, dataset.longest if args.padding_free else None)
    if here.is_main:
        print(plan.describe(args, here, setup, dataset, steps, dp_size, before, kernels), flush=True)
    if not args.dry_run:
        is_done = train(args, here, setup, dataset, steps, start, before)
        processes.stop()
        if is_done and here.is_main and not args.no_save and not export.is_one_file(args.output_path):
            try:
                show_samples(args.output_path, here.device, setup.tokenizer)
            except Exception as error:  # the model is trained and saved: what it writes is for show
                print(f"no descriptions that it writes: {type(error).__name__}: {' '.join(str(error).split()):.300}", flush=True)


def train(args, here, setup, dataset, steps, start, before) -> bool:
    """Everything between the checks and the saved model. False if a signal has stopped it."""
    from opt.colossal.build import build
    from opt.data.batches import Batches
    from opt.model.opt import expect_varying_lengths
    from opt.train import checkpoints, export, recorder, step
    from opt.train.checks import check_first_loss
    from opt.train.signals import Control

    control = Control(here)
    if dataset.train.lengths.min() < dataset.train.lengths.max():
        expect_varying_lengths()
    rates = (steps.learning_rate, steps.warmup_steps, steps.total_steps)
    built = build(args, here, setup.config, before.tensors("weights") if before else setup.weights, *rates)
    parallel, model = built.parallel, built.model

    spread = (args.batch_size, parallel.dp_rank, parallel.dp_size, setup.config.pad_token_id)
    train_batches = Batches(dataset.train, *spread, seed=args.seed, padding_free=args.padding_free)
    eval_batches = Batches(dataset.held_out, *spread, seed=None, padding_free=args.padding_free)
    model.unwrap().longest_row = dataset.longest

    output = export.output_directory(args.output_path)
    saver = checkpoints.Saver(output, built, here, control, args, dataset.train)
    if before:
        saver.restore(before)
    recorder = recorder.Recorder(args, output, here.is_main, steps.total_steps, start.step, before.metrics if before else b"")
    if len(dataset.held_out) and not start.step:
        first_loss = step.evaluate(parallel, model, eval_batches)
        recorder.evaluation(0, first_loss)
        check_first_loss(first_loss, setup)
    planned = train_batches.steps(start, args.num_epoch, args.gradient_accumulation_steps)
    stopped_by = skipped = 0
    with recorder:
        for position, group in itertools.islice(planned, steps.total_steps - start.step):
            done, is_last = position.step, position.step == steps.total_steps
            lr = built.schedule.get_last_lr()[0]
            loss, grad_norm = step.train_step(parallel, model, built.optimizer, built.schedule, group, args.max_norm)
            epoch = position.epoch + position.rows / len(dataset.train)
            recorder.step(done, epoch, loss, lr, grad_norm, sum(batch.tokens for batch in group))
            if done == 1 and not len(dataset.held_out):
                check_first_loss(loss.item(), setup)  # summed over all processes by recorder.step
            if len(dataset.held_out) and (done % steps.eval_steps == 0 or is_last):
                recorder.evaluation(done, step.evaluate(parallel, model, eval_batches))

            is_due = bool(args.save_steps) and (done % args.save_steps == 0 or position.rows == 0 or is_last)
            if is_due or is_last:
                recorder.flush()
            everyones = control.agree(signal=control.signal or 0, skipped=recorder.skipped_in_a_row, writing=saver.is_writing)
            stopped_by, skipped = 0 if is_last else everyones["signal"], everyones["skipped"]
            if skipped >= args.max_bad_steps:
                break
            if stopped_by or (is_due and not skipped):
                recorder.flush()
                saver.begin(position, recorder.path)
            elif not everyones["writing"]:
                saver.finish()
            if stopped_by:
                break
        saver.finish()

    if skipped >= args.max_bad_steps:
        give_up(skipped, here, saver.saved)
    if stopped_by:
        if here.is_main:
            name = signal.Signals(stopped_by).name
            print(f"{name}: stopped after step {done}, saved in {saver.saved}; go on with the same command and --resume auto", flush=True)
        return False
    if not args.no_save:
        export.export_model(model, parallel, setup.directory, setup.source, setup.tokenizer, args.output_path)
        if here.is_main:
            print(f"saved the model to {args.output_path}", flush=True)
    return True


def give_up(skipped, here, saved) -> None:
    """End all processes with exit code 1; the model is not written."""
    if here.is_main:
        way = f"the newest checkpoint is {saved}: go on from it with --resume" if saved else "there is no checkpoint: start anew"
        reason = f"{skipped} steps in a row had a loss or a gradient that is not finite"
        say_once(f"error: {reason}; {way}, and with a lower --learning_rate")
    raise SystemExit(1)


def show_samples(output_path, device, tokenizer, number=3) -> None:
    """Print descriptions that the saved model writes, loaded as any program would load it."""
    import torch
    from transformers import AutoModelForCausalLM

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
    main()

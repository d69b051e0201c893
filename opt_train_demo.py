"""Fine-tune OPT with ColossalAI.

    python opt_train_demo.py --model_name_or_path sample/opt-tiny --dataset sample/netflix_sample.csv --num_epoch 3
    colossalai run --nproc_per_node 4 opt_train_demo.py --plugin hybrid_parallel --tp_size 2 --pp_size 2
    torchrun --nproc_per_node 2 opt_train_demo.py --plugin gemini
    python opt_train_demo.py --dry_run          (check everything, print the plan, stop)

Read it from top to bottom: arguments, checks, processes, data, model, optimizer, booster, weights, loop, result.
"""

import itertools

from args import train_parser


def main() -> None:
    args = train_parser().parse_args()

    from opt import faults  # after the arguments: the libraries below take seconds to import

    with faults.reported(args):
        run(args)


def run(args) -> None:
    """Check, start the processes, read the data, train, show the result. Raises UserError."""
    from opt import data, launch, plan

    here = launch.place()
    setup = plan.check(args, here)
    if not args.dry_run:
        launch.start(here, args.mem_cap, args.timeout_minutes)
    read = (args.dataset, args.text_column, args.max_length, args.eval_fraction, args.seed, setup.tokenizer)
    dataset = data.open_dataset(launch.node_first(here, lambda: data.tokenize(*read)))

    if not args.dry_run:
        launch.node_first(here, lambda: plan.lock_output(args.output_path) if here.is_main else None)

    dp_size = here.world_size // (args.tp_size * args.pp_size)
    steps = plan.schedule(args, len(dataset.train), dp_size)
    if here.is_main:
        print(plan.describe(args, here, setup, dataset, steps, dp_size), flush=True)
    if not args.dry_run:
        train(args, here, setup, dataset, steps)
        launch.stop()
        if here.is_main and not args.no_save:
            show_samples(args.output_path, here.device, setup.tokenizer)


def train(args, here, setup, dataset, steps) -> None:
    """Everything between the checks and the saved model."""
    from opt import checkpoint, metrics, modeling, plan, step
    from opt.build import build
    from opt.data import Batches

    if dataset.train.lengths.min() < dataset.train.lengths.max():
        modeling.expect_varying_lengths()
    built = build(args, here, setup.config, setup.weights, steps.learning_rate, steps.warmup_steps, steps.total_steps)
    parallel, model = built.parallel, built.model

    spread = (args.batch_size, parallel.dp_rank, parallel.dp_size, setup.config.pad_token_id)
    train_batches = Batches(dataset.train, *spread, seed=args.seed)
    eval_batches = Batches(dataset.held_out, *spread, seed=None)

    recorder = metrics.Recorder(checkpoint.output_directory(args.output_path), here.is_main, steps.total_steps, args.report_to, vars(args))
    if len(dataset.held_out):
        first_loss = step.evaluate(parallel, model, eval_batches)
        recorder.evaluation(0, first_loss)
        plan.check_first_loss(first_loss, setup)
    epochs = (_in_groups(train_batches.epoch(epoch), args.gradient_accumulation_steps) for epoch in range(args.num_epoch))
    groups = itertools.islice(itertools.chain.from_iterable(epochs), steps.total_steps)
    for done, group in enumerate(groups, 1):
        lr = built.schedule.get_last_lr()[0]
        loss, grad_norm = step.train_step(parallel, model, built.optimizer, built.schedule, group, args.max_norm)
        recorder.step(done, done / steps.steps_per_epoch, loss, lr, grad_norm, sum(batch.tokens for batch in group))
        if done == 1 and not len(dataset.held_out):
            plan.check_first_loss(loss.item(), setup)  # summed over all processes by recorder.step
        if len(dataset.held_out) and (done % steps.eval_steps == 0 or done == steps.total_steps):
            recorder.evaluation(done, step.evaluate(parallel, model, eval_batches))
    recorder.close()

    if not args.no_save:
        checkpoint.export_model(model, parallel, setup.config, setup.tokenizer, args.output_path)
        if here.is_main:
            print(f"saved the model to {args.output_path}", flush=True)


def _in_groups(batches, size):
    """Lists of `size` batches, the last one as long as what is left."""
    group = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def show_samples(output_path, device, tokenizer, number=3) -> None:
    """Print descriptions that the saved model writes, loaded as any program would load it."""
    import torch
    from transformers import AutoModelForCausalLM

    from opt.checkpoint import is_one_file

    if is_one_file(output_path):
        return
    model = AutoModelForCausalLM.from_pretrained(output_path, torch_dtype="auto").to(device).eval()
    torch.manual_seed(0)
    start = torch.tensor([[tokenizer.bos_token_id]] * number, device=device)
    written = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        top_k=50,
        top_p=0.9,
        max_new_tokens=60,
        pad_token_id=tokenizer.pad_token_id,
    )
    print("three descriptions that it writes:")
    for text in tokenizer.batch_decode(written, skip_special_tokens=True):
        print(f"  - {' '.join(text.split())}")


if __name__ == "__main__":
    main()

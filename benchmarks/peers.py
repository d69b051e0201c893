"""Measure what a user would pick instead of ColossalAI, on the work that opt_benchmark.py does.

    python benchmarks/peers.py --engine hf_trainer --model_name_or_path 350m --batch_size 16
    torchrun --nproc_per_node 2 benchmarks/peers.py --engine fsdp2 --fused_loss \
        --model_name_or_path 1.3b --json result.json

Plain transformers' OPTForCausalLM, with its own forward and loss, from the same initial weights, on
the same tokens, with the same AdamW. benchmarks/campaign.py runs these beside the plugins.
"""

import importlib.metadata
import importlib.util
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from args import (  # noqa: E402
    Parser,
    add_lora_arguments,
    add_measurement_arguments,
    add_run_arguments,
    benchmark_parser,
)
from opt import installed  # noqa: E402

# engine -> the packages that it needs beside PyTorch and transformers
ENGINES = {
    "hf_trainer": ["accelerate"],
    "torch_amp": [],
    "fsdp2": [],
    "torch_tp": [],
    "deepspeed_zero2": ["deepspeed"],
    "deepspeed_zero3": ["deepspeed"],
    "deepspeed_offload": ["deepspeed"],
    "peft": ["peft"],
    "peft_bf16": ["peft"],
    "peft_4bit": ["peft", "bitsandbytes"],
    "bnb_8bit": ["bitsandbytes"],
}
LORA = ("peft", "peft_bf16", "peft_4bit")
IN_FP8 = ("torch_amp", "fsdp2")  # which can have torchao's products
# Nothing in fp32 and no autocast, with --precision bf16
ALL_IN_BF16 = ("peft_bf16", "peft_4bit", "bnb_8bit")


def main() -> None:
    installed.check()
    args = parse()
    missing = [name for name in packages(args) if importlib.util.find_spec(name) is None]
    if missing:
        not_installed(args, missing)
        return

    import torch

    import opt_benchmark  # behind the flags: it takes seconds
    from opt.colossal import processes
    from opt.train import faults

    precision = args.precision or ("bf16" if torch.cuda.is_available() else "fp32")
    args = args.but(precision=precision, compile=args.compile and args.engine != "deepspeed_zero3")
    if args.engine == "torch_tp":  # to the checks and the result it is hybrid_parallel
        args = args.but(plugin="hybrid_parallel", tp_size=processes.place().world_size)
    with faults.reported(args):
        opt_benchmark.main(args, measure_engine)


def parse(arguments: list[str] | None = None):
    """The flags, of the command line by default."""
    parser = Parser(
        prog="peers.py",
        description="Measure a training engine other than ColossalAI on the work of "
        "opt_benchmark.py.",
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        required=True,
        help="what trains; benchmarks/README.md describes each",
    )
    parser.add_argument(
        "--precision",
        choices=("bf16", "fp32"),
        help="arithmetic of forward and backward, the master weights are fp32; default bf16 on a "
        "GPU, fp32 on a CPU",
    )
    parser.add_argument(
        "--no_compile",
        dest="compile",
        action="store_false",
        help="without torch.compile, which peers use where they can",
    )
    parser.add_argument(
        "--fp8",
        action="store_true",
        help="the layers' matrix products in 8-bit floats, by torchao: torch_amp and fsdp2",
    )
    add_measurement_arguments(parser)
    add_run_arguments(parser.add_argument_group("training"), seed=42)
    add_lora_arguments(parser)
    args = parser.parse_args(arguments)
    # What the checks and the result ask about beyond this: to them a peer is plain data parallel.
    args = benchmark_parser().parse_args([]).but(**vars(args))
    if bool(args.lora_r) != (args.engine in LORA):
        parser.error(f"--lora_r is for {' and '.join(LORA)}, and they need it: change one of them")

    if args.fp8 and args.engine not in IN_FP8:
        parser.error(f"--fp8 is for {' and '.join(IN_FP8)}: leave it out")
    if args.grad_checkpoint > 1:
        parser.error("--grad_checkpoint of peers is of all layers: leave the number out")
    if args.load_in_4bit:
        parser.error("--load_in_4bit is not for peers: --engine peft_4bit has it")
    return args


def packages(args) -> list[str]:
    """What has to be installed beside the project's own requirements."""
    return ENGINES[args.engine] + ["liger_kernel"] * args.fused_loss + ["torchao"] * args.fp8


def not_installed(args, missing) -> None:
    """Say so, in the terminal and as a result."""
    from opt.colossal import processes

    here = processes.place()
    if not here.is_main:
        return
    print(f"  {args.engine}: not installed ({', '.join(missing)})", flush=True)
    result = {
        "plugin": args.engine,
        "model": args.model_name_or_path,
        "batch_size": args.batch_size,
        "world_size": here.world_size,
    }
    if args.json:
        Path(args.json).write_text(
            json.dumps(result | {"status": "not installed"}, indent=1) + "\n"
        )


def measure_engine(args, here, config, contents):
    """Train on synthetic tokens with --engine; an opt_benchmark.Measured."""
    from opt import measure
    from opt.colossal import processes
    from opt.data.batches import SyntheticBatches
    from opt_benchmark import time_steps

    dp_rank = here.rank % args.dp_size
    processes.seed_everything(args.seed + dp_rank)
    model = build_model(args, here, config, contents)
    batches = SyntheticBatches(
        args.batch_size, args.seq_length, config.vocab_size, dp_rank, args.dp_size, args.seed
    )
    if args.engine == "hf_trainer":
        measured = hf_trainer(args, here, model, batches)
    else:
        plain = ("torch_amp", "bnb_8bit", *LORA)
        engines = {"fsdp2": fsdp2, "torch_tp": torch_tp, **dict.fromkeys(plain, torch_amp)}
        engine = engines.get(args.engine, deepspeed_zero)
        step, about = engine(args, here, model)

        def train_step():
            group = [next(batches).inputs for _ in range(args.gradient_accumulation_steps)]
            loss = step(
                [
                    {name: t.to(here.device, non_blocking=True) for name, t in inputs.items()}
                    for inputs in group
                ]
            )
            return loss / (len(group) * here.world_size)

        measured = time_steps(args, here, train_step)
        measured.more |= about
    versions = {name: importlib.metadata.version(name) for name in packages(args)}
    measured.more |= {"plugin": args.engine, "versions": measure.versions() | versions}
    return measured


def build_model(args, here, config, contents):
    """transformers' own model on the device, in fp32, with the weights that the plugins start
    from; with PEFT's adapters beside frozen weights in --precision."""
    import torch
    import transformers
    from transformers.modeling_utils import no_init_weights

    config.use_cache = False  # keys and values kept for generation would only cost memory
    if args.engine in (*LORA, *ALL_IN_BF16) and args.precision == "bf16":
        torch.set_default_dtype(torch.bfloat16)
    dtype = torch.get_default_dtype()
    # What is to be packed would not fit before
    device = torch.device("meta") if args.engine == "peft_4bit" else here.device
    with device, no_init_weights():
        model = transformers.OPTForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if args.engine == "peft_4bit":
        fill_packed(model, contents, here.device, dtype)
    model.tie_weights()
    if args.engine != "peft_4bit":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(contents[name])
    if args.engine in LORA:
        add_peft_adapters(model, args, contents)
    model.train()
    if args.engine == "hf_trainer" and not args.fused_loss:
        return model  # which brings its own checkpointing and compiles the whole model
    if args.grad_checkpoint and args.engine != "hf_trainer":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if args.fp8:
        from torchao.float8 import convert_to_float8_training

        convert_to_float8_training(model.model.decoder.layers)  # a scale for each tensor
    # ZeRO-3 fetches each submodule's weights in hooks, between which nothing is left to compile.
    if args.compile:
        from torch._dynamo import config as dynamo

        # Inside DistributedDataParallel it would cut each layer into a graph for every 25 MB of
        # gradients, with no fusion across the cuts.
        dynamo.optimize_ddp = False
        for layer in model.model.decoder.layers:
            layer.compile()
    if args.fused_loss:
        use_fused_loss(model, torch.bfloat16 if args.precision == "bf16" else torch.float32)
    return model


def fill_packed(model, contents, device, dtype) -> None:
    """Give `model`, which is on the meta device, its weights: the layers' matrices in
    bitsandbytes' 4 bits, computed with in `dtype`, one after the other; the rest in `dtype`."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    kind = {"compress_statistics": True, "quant_type": "nf4"}
    named = dict(model.named_parameters())
    for place, linear in list(model.named_modules()):
        if isinstance(linear, torch.nn.Linear) and ".layers." in place:
            sizes = linear.in_features, linear.out_features
            packed = Linear4bit(*sizes, compute_dtype=dtype, **kind, device="meta")
            whole = contents[f"{place}.weight"].to(device, dtype)
            packed.weight = Params4bit(whole, **kind, module=packed).to(device)
            packed.bias = linear.bias
            del named[f"{place}.weight"]
            model.set_submodule(place, packed)
    for name in named:
        place, _, leaf = name.rpartition(".")
        value = torch.nn.Parameter(contents[name].to(device, dtype))
        setattr(model.get_submodule(place), leaf, value)
    model.is_loaded_in_4bit = True  # by which PEFT knows


def add_peft_adapters(model, args, contents) -> None:
    """PEFT's adapters in place, from the values that ours start from. As PEFT has them by default
    they are in fp32 and computed under autocast; with peft_bf16 they, and Adam's state, are in
    bf16."""
    import torch
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=list(args.lora_target_modules),
        use_rslora=args.use_rslora,
    )
    get_peft_model(model, settings, autocast_adapter_dtype=args.engine == "peft")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                if args.engine == "peft_4bit" and args.precision == "bf16":
                    # PEFT takes an adapter's dtype from the weight's, which is no float there
                    parameter.data = parameter.data.bfloat16()
                place, matrix, _ = name.replace(".default.", ".").rsplit(".", 2)
                parameter.copy_(contents[f"{place}.adapter.{matrix}.weight"])


def use_fused_loss(model, dtype) -> None:
    """Let `model` compute its loss by Liger's fused linear cross-entropy, in `dtype`, without the
    whole logits."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()

    def forward(input_ids, labels):
        hidden = model.model(input_ids=input_ids).last_hidden_state[:, :-1].flatten(0, 1).to(dtype)
        return {"loss": loss(model.lm_head.weight.to(dtype), hidden, labels[:, 1:].flatten())}

    model.forward = forward


def accumulate(adam, group, forward, reducing):
    """Backward over `group`, then one update; returns the sum of the losses. `reducing(is_last)`:
    the context of each batch, in which gradients are reduced over the processes with the last one
    alone."""
    total = 0.0
    for i, inputs in enumerate(group):
        with reducing(i == len(group) - 1):
            loss = forward(inputs)
            (loss / len(group)).backward()
        total += loss.detach()
    adam.step()
    adam.zero_grad()
    return total


def adam_numbers(args) -> dict:
    """What every AdamW is given."""
    betas = args.adam_beta1, args.adam_beta2
    return {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}


def torch_amp(args, here, model):
    """PyTorch alone: fp32 weights, or with PEFT what they are, forward under autocast,
    DistributedDataParallel where there are several processes."""
    import torch
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    from opt.colossal.adam import decay_groups

    groups = decay_groups(model, args.weight_decay)
    if args.engine == "torch_tp":  # the fused update takes no list of both kinds
        groups = [
            group | {"params": [p for p in group["params"] if isinstance(p, DTensor) == is_split]}
            for group in groups
            for is_split in (True, False)
        ]
    if args.engine == "bnb_8bit":
        from bitsandbytes.optim import AdamW8bit

        adam = AdamW8bit(groups, **adam_numbers(args))
    else:
        adam = torch.optim.AdamW(groups, **adam_numbers(args), fused=True)
    if args.dp_size > 1:
        device_ids = [here.local_rank] if here.device.type == "cuda" else None
        model = DistributedDataParallel(
            model, device_ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )

    def forward(inputs):
        is_mixed = args.precision == "bf16" and args.engine not in ALL_IN_BF16
        with torch.autocast(here.device.type, torch.bfloat16, enabled=is_mixed):
            return model(**inputs)["loss"]

    def reducing(is_last):
        return nullcontext() if is_last or args.dp_size == 1 else model.no_sync()

    about = {"optimizer": type(adam).__name__, "load_in_4bit": args.engine == "peft_4bit"}
    if args.engine == "bnb_8bit":
        about["optim"] = "adamw_bnb_8bit"
    return (lambda group: accumulate(adam, group, forward, reducing)), about


def torch_tp(args, here, model):
    """PyTorch's tensor parallelism over all processes: parallelize_module cuts the layers' matrices
    as Megatron does, two all-reduces a layer forward and two backward. Embedding, norms and loss
    are whole on each; otherwise torch_amp."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh(here.device.type, (here.world_size,))
    # One tensor for q, k and v, so that its gradient is summed over the processes once
    hidden = {"hidden_states": Replicate()}
    shared = PrepareModuleInput(
        input_kwarg_layouts=hidden, desired_input_kwarg_layouts=dict(hidden)
    )
    cuts = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    cuts |= {"fc1": ColwiseParallel(), "self_attn.out_proj": RowwiseParallel()}
    cuts |= {"fc2": RowwiseParallel(), "self_attn": shared}
    for layer in model.model.decoder.layers:
        parallelize_module(layer, mesh, cuts)
        layer.self_attn.num_heads //= here.world_size
        if args.precision == "bf16":  # which norms leave under autocast: gradients would be sent so
            for norm in (layer.self_attn_layer_norm, layer.final_layer_norm):
                norm.register_forward_hook(lambda module, given, out: out.bfloat16())
    return torch_amp(args, here, model)


def fsdp2(args, here, model):
    """PyTorch's fully_shard on each layer and on the whole: parameters gathered in bf16, gradients
    reduced in fp32."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh

    from opt.colossal.adam import decay_groups

    try:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    except ImportError:  # PyTorch 2.5, which has it for CUDA devices alone
        from torch.distributed._composable.fsdp import MixedPrecisionPolicy, fully_shard

    policy = (
        MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        if args.precision == "bf16"
        else MixedPrecisionPolicy()
    )
    mesh = init_device_mesh(here.device.type, (here.world_size,))
    for layer in model.model.decoder.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    adam = torch.optim.AdamW(
        decay_groups(model, args.weight_decay), **adam_numbers(args), fused=True
    )

    def reducing(is_last):
        model.set_requires_gradient_sync(is_last)
        return nullcontext()

    return (
        lambda group: accumulate(adam, group, lambda inputs: model(**inputs)["loss"], reducing)
    ), {"zero_stage": 3}


def deepspeed_zero(args, here, model):
    """DeepSpeed's ZeRO stage 2 or 3; deepspeed_offload is stage 2 with Adam's state and step in
    host memory."""
    # Which DeepSpeed reads, though no launcher has set it
    os.environ.setdefault("LOCAL_RANK", str(here.local_rank))
    import deepspeed

    from opt.colossal.adam import decay_groups

    offload = args.engine == "deepspeed_offload"
    stage = 3 if args.engine == "deepspeed_zero3" else 2
    config = {
        "train_micro_batch_size_per_gpu": args.batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        # No other engine looks for overflows, which bf16 hardly has.
        "bf16": {"enabled": args.precision == "bf16", "check_grad_overflow": False},
        "zero_optimization": {"stage": stage, "overlap_comm": True, "contiguous_gradients": True},
        "gradient_clipping": 0.0,  # it would be 1.0; none of the others clips
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {
            "device": "cpu",
            "pin_memory": here.device.type == "cuda",
        }
    if args.fused_loss and stage == 3:
        # The loss reads the head's weight outside the head's forward, where ZeRO-3 would not have
        # gathered it.
        deepspeed.zero.register_external_parameter(model, model.lm_head.weight)
    adam = deepspeed_adam(decay_groups(model, args.weight_decay), adam_numbers(args), offload)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=config)

    def step(group):
        total = 0.0
        for inputs in group:
            loss = engine(**inputs)["loss"]
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        return total

    return step, {
        "zero_stage": stage,
        "offload_optim_frac": float(offload),
        "optimizer": type(adam).__name__,
    }


def deepspeed_adam(groups, numbers: dict, offload: bool):
    """PyTorch's fused AdamW; for parameters in host memory DeepSpeed's own, if it can be compiled
    here."""
    import torch

    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        try:
            return DeepSpeedCPUAdam(groups, **numbers)
        except Exception as error:
            # A compiler, the CUDA toolkit or its version may be what is missing
            reason = str(error.__cause__ or error).splitlines()[0]
            print(
                f"  DeepSpeedCPUAdam cannot be compiled ({reason}): PyTorch's AdamW instead",
                flush=True,
            )
    return torch.optim.AdamW(groups, **numbers, fused=True)


def hf_trainer(args, here, model, batches):
    """transformers' Trainer: autocast, the whole model compiled, fused AdamW; nothing saved,
    evaluated or logged.

    A step lasts from the end of the one before to its own end, so that the Trainer's loop and data
    loader count.
    """
    import tempfile

    import torch
    from torch.utils.data import SequentialSampler
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    from opt import measure
    from opt_benchmark import Measured

    timer = measure.StepTimer()
    steps = args.warmup_steps + args.repeats * args.max_train_steps

    class Clock(TrainerCallback):
        first_step = None

        def on_train_begin(self, *_, **__):
            timer.start()

        def on_step_end(self, _, state, *__, **___):
            timer.stop()
            if self.first_step is None:
                timer.seconds()
                self.first_step = measure.seconds_since_launch()
            if state.global_step < steps:
                timer.start()

    class BenchmarkTrainer(Trainer):
        """Takes the rows in their order, and keeps the losses of the last step."""

        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

        def training_step(self, *given, **options):
            loss = super().training_step(*given, **options)
            losses.append(loss)
            del losses[: -args.gradient_accumulation_steps]
            return loss

    losses = []
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        settings = TrainingArguments(
            output_dir=directory,
            per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            max_steps=steps,
            learning_rate=args.learning_rate,
            weight_decay=args.weight_decay,
            adam_beta1=args.adam_beta1,
            adam_beta2=args.adam_beta2,
            adam_epsilon=args.adam_epsilon,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            optim="adamw_torch_fused",
            bf16=args.precision == "bf16",
            torch_compile=args.compile and not args.fused_loss,  # its layers are already
            gradient_checkpointing=bool(args.grad_checkpoint),
            gradient_checkpointing_kwargs={"use_reentrant": False}
            if args.grad_checkpoint
            else None,
            use_cpu=here.device.type == "cpu",
            seed=args.seed,
            remove_unused_columns=False,
            dataloader_pin_memory=here.device.type == "cuda",
            accelerator_config={"non_blocking": True},
            ddp_find_unused_parameters=False,
            save_strategy="no",
            logging_strategy="no",
            logging_nan_inf_filter=False,  # it would wait for the GPU in each step
            report_to="none",
            disable_tqdm=True,
        )
        # A process that finds more GPUs would spread its batch over them
        settings._n_gpu = min(settings.n_gpu, 1)
        trainer = BenchmarkTrainer(
            model,
            settings,
            train_dataset=rows_of_all_steps(args, here, batches, steps),
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    loss = torch.stack(losses).sum() / here.world_size
    torch.distributed.all_reduce(loss)
    return Measured(
        timer.seconds()[args.warmup_steps :],
        loss.item(),
        clock.first_step,
        measure.peak_memory(here.device),
    )


def rows_of_all_steps(args, here, batches, steps) -> list[dict]:
    """The tokens of `batches` as a data set of rows, in the order in which the Trainer deals its
    batches out to the processes."""
    rows = []
    for _ in range(steps * args.gradient_accumulation_steps):
        ids = next(batches).inputs["input_ids"]
        # The Trainer divides by the number of labels, and counts the first of each row, which is no
        # target, unless it is -100.
        labels = ids.clone()
        labels[:, 0] = -100
        # Each process takes every world_size'th batch: wherever it looks, its own is there.
        rows += [
            {"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)
        ] * here.world_size
    return rows


if __name__ == "__main__":
    main()

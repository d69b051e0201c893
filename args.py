"""Command-line arguments of opt_train_demo.py and opt_benchmark.py.

Nothing heavy is imported here: `--help` and a mistyped flag answer at once. What needs the model's
configuration, the data or the device is checked in opt/train/checks.py.
"""

import argparse
import codecs
import difflib
import json
import math
import os
import re
import sys
from pathlib import Path

from opt.data.texts import parse_template
from opt.errors import UserError, report_user_error
from opt.registry import PLUGINS

PRECISIONS = ("fp32", "fp16", "bf16")
# Of transformers.SchedulerType all but reduce_lr_on_plateau, which depends on evaluations
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
)
# By the names of transformers' OptimizerNames; the first one is the default
OPTIMS = ("adamw_torch", "adamw_anyprecision", "adamw_8bit")
# What LoRA can be given to: the matrices of a decoder layer (opt/model/lora.py)
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")

# Flags of transformers' trainer and its examples that have upstream's names here
OF_TRANSFORMERS = {
    "--output_dir": "--output_path",
    "--num_train_epochs": "--num_epoch",
    "--per_device_train_batch_size": "--batch_size",
    "--gradient_checkpointing": "--grad_checkpoint",
    "--max_grad_norm": "--max_norm",
    "--max_steps": "--max_train_steps",
    "--hub_model_id": "--push_to_hub",
    "--eval_strategy": "--eval_steps",
    "--resume_from_checkpoint": "--resume",
    "--max_seq_length": "--max_length",
    "--dataset_name": "--dataset",
    "--train_file": "--dataset",
    "--bf16": "--precision bf16",
    "--fp16": "--precision fp16",
    "--torch_compile": "--compile",
}


class Settings(argparse.Namespace):
    """Values by the flags' names, which nothing writes to: the flags, that is what the user said;
    or the plan, what that means for this model, data and device."""

    def __init__(self, **values):
        self.__dict__.update(values)

    def __setattr__(self, name, value):
        raise AttributeError(f"{name} is settled: make other Settings with but()")

    def but(self, **changes) -> "Settings":
        """The same with some other values."""
        return Settings(**vars(self) | changes)


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line, once a node."""

    def parse_args(self, args=None, namespace=None) -> Settings:
        """The flags. With --auto its value is what else was given, by name."""
        for argument in sys.argv[1:] if args is None else args:
            # Names and texts end up in files of JSON and markdown
            if argument.encode(errors="replace").decode() != argument:
                self.error(
                    f"{argument!a:.200} is not UTF-8: rename what it names, or set the shell's "
                    "locale to a UTF-8 one"
                )
        flags = super().parse_args(args, namespace)
        for action in self._actions:
            # As of a shell's variable that is not set
            if getattr(flags, action.dest, None) == "":
                self.error(f"{action.option_strings[0]} is empty: give a value, or leave it out")
        if getattr(flags, "auto", False):
            flags.auto = self._given(args)
        return Settings(**vars(flags))

    def _given(self, args) -> list[str]:
        defaults = {action: action.default for action in self._actions}
        for action in self._actions:
            action.default = argparse.SUPPRESS
        given = sorted(vars(super().parse_args(args)))
        for action, default in defaults.items():
            action.default = default
        return given

    def error(self, message):
        _, unknown, flags = message.partition("unrecognized arguments: ")
        report_user_error(f"{message}{self._meant(flags) if unknown else ''} (see --help)")

    def _meant(self, unknown: str) -> str:
        """What flags that are not there are called here, where that can be said."""
        known, hints = self._option_string_actions, []
        for flag in (word.partition("=")[0] for word in unknown.split() if word[:2] == "--"):
            name = "--" + flag[2:].replace("-", "_")
            ours = name if name in known else OF_TRANSFORMERS.get(name)
            if ours and ours.split()[0] in known:
                hints.append(f"; {flag} is {ours} here")
            elif near := difflib.get_close_matches(name, known, n=1, cutoff=0.8):
                hints.append(f"; did you mean {near[0]} instead of {flag}?")
        return "".join(hints)


class _Extend(argparse.Action):
    """argparse's "extend" for a flag with a default, which it would keep in front."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest, self.default)
        given = [] if before is self.default else before
        setattr(namespace, self.dest, [*given, *values])


def is_one_file(output_path: str) -> bool:
    """Whether --output_path names one weights file and not a directory."""
    return output_path.endswith((".bin", ".safetensors"))


def output_directory(output_path: str) -> Path:
    """Where metrics.jsonl and loss.png go: --output_path, or the folder of the file that it
    names."""
    return Path(output_path).parent if is_one_file(output_path) else Path(output_path)


# An argparse type: what may be a path. Of --flag=~/folder no shell makes the home.
_path = os.path.expanduser


def _number(kind, low, high=None, low_open=False, high_open=False):
    """An argparse type: a number of `kind` in [low, high], without `low` itself with `low_open`,
    without `high` with `high_open`.

    `high` is by default what a tensor's sizes, steps and fp32 can hold.
    """
    if high is None:
        high = 2**31 - 1 if kind is int else 1e30

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text:.40}' is not a number") from None
        if not (low < value if low_open else low <= value) or not (
            value < high if high_open else value <= high
        ):
            raise argparse.ArgumentTypeError(
                f"{text:.40} must be {'over' if low_open else 'at least'} {low} and "
                f"{'under' if high_open else 'at most'} {high}"
            )
        return value

    return parse


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def _json_object(text: str) -> dict:
    """An argparse type: a JSON object."""
    try:
        value = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text:.80}' is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"'{text:.80}' is not a JSON object, {{...}}")
    return value


def _run_name(text: str) -> str:
    """An argparse type: a name that is also a folder's, and W&B's at most 128 characters."""
    if not text.strip() or len(text) > 128 or not text.isprintable():
        raise argparse.ArgumentTypeError("a name is 1 to 128 printable characters")
    if text.startswith((".", "/")) or "/." in text:
        raise argparse.ArgumentTypeError(f"'{text}' is not a name of a folder inside another")
    return text


def _repository(text: str) -> str:
    """An argparse type: the id of a repository on the Hub, with its owner."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]{0,95}", text, re.ASCII) or ".." in text:
        raise argparse.ArgumentTypeError(f"'{text:.100}' is not a repository, OWNER/NAME")
    return text


def add_run_arguments(g: argparse._ArgumentGroup, seed: int) -> None:
    """What every way of training takes, the peers in benchmarks/ too."""
    g.add_argument(
        "--batch_size",
        type=_number(int, 1),
        default=32,
        help="rows of one batch on each data-parallel rank; a step has "
        "--gradient_accumulation_steps of these; default 32",
    )
    g.add_argument(
        "--gradient_accumulation_steps",
        type=_number(int, 1),
        default=1,
        help="batches per optimizer step; default 1",
    )
    g.add_argument(
        "--mem_cap",
        type=_number(float, 0),
        default=0,
        help="GPU memory that a process may use, GiB; default 0, no cap",
    )
    g.add_argument(
        "--grad_checkpoint",
        nargs="?",
        type=_number(int, 1),
        const=1,
        default=0,
        metavar="N",
        help="recompute the activations of every N-th layer in backward: less memory, with N 1 "
        "about a third more arithmetic; default off, N 1 if it is not given",
    )
    g.add_argument(
        "--fused_loss",
        action="store_true",
        help="compute the loss and its gradients without the whole logits: less memory, and "
        "faster; default off",
    )
    g.add_argument(
        "--dropout",
        type=_number(float, 0, 1),
        help="dropout probability, 0 to 1; default the model's own; 0 turns all dropout off",
    )
    g.add_argument(
        "--learning_rate",
        type=_number(float, 0, 10),
        default=5e-5,
        help="peak learning rate, 10 at most; default 5e-5",
    )
    g.add_argument(
        "--weight_decay",
        type=_number(float, 0, 10),
        default=0.01,
        help="AdamW's decay of matrices; biases and norms have none; default 0.01",
    )
    for beta, default, what in ((1, 0.9, "the gradient"), (2, 0.999, "its square")):
        g.add_argument(
            f"--adam_beta{beta}",
            type=_number(float, 0, 1, high_open=True),
            default=default,
            help=f"AdamW's decay of its running mean of {what}; default {default}",
        )
    g.add_argument(
        "--adam_epsilon",
        type=_number(float, 1e-30, 1),
        default=1e-8,
        help="AdamW's addition to the root of the mean square; default 1e-8",
    )
    g.add_argument(
        "--seed",
        type=_number(int, 0, 2**32 - 1),
        default=seed,
        help=f"seed of initial weights, data order and dropout; default {seed}",
    )
    g.add_argument(
        "--timeout_minutes",
        type=_number(float, 0, 10**6, low_open=True),
        default=10,
        help="how long a process waits for another that does not answer, before it ends with an "
        "error; default 10",
    )


def add_lora_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """LoRA, by PEFT's names and with its defaults; for the peers in benchmarks/ too."""
    g = parser.add_argument_group("LoRA (docs/lora.md)")
    g.add_argument(
        "--lora_r",
        type=_number(int, 0),
        default=0,
        help="rank of the adapters, which alone are trained then; default 0, all parameters are "
        "trained and no adapters",
    )
    g.add_argument(
        "--lora_alpha",
        type=_number(float, 0, low_open=True),
        help="adapters are scaled by alpha / r; default 8, as PEFT's, whatever r is",
    )
    g.add_argument(
        "--lora_dropout",
        type=_number(float, 0, 1),
        help="dropout probability of what adapters read, 0 to 1; default 0",
    )
    g.add_argument(
        "--lora_target_modules",
        nargs="+",
        choices=(*LORA_TARGETS, "all-linear"),
        metavar="NAME",
        help=f"matrices that have adapters, in every layer: {', '.join(LORA_TARGETS)}, or "
        "all-linear for these six; default all-linear",
    )
    g.add_argument(
        "--use_rslora",
        action="store_true",
        help="scale adapters by alpha / sqrt(r) instead; default off",
    )
    g.add_argument(
        "--load_in_4bit",
        action="store_true",
        help="keep the layers' frozen matrices in 4 bits (nf4, double quantization, by "
        "bitsandbytes): a quarter of the memory, more arithmetic; with --lora_r, not with gemini, "
        "--tp_size over 1, --fp8 or --merge_lora; default off",
    )
    return g


def _add_setup_arguments(parser: argparse.ArgumentParser, seed: int) -> None:
    """What decides how the model is built, spread over the devices and updated: the same for
    training and benchmark."""
    g = parser.add_argument_group("model and plugin")
    g.add_argument(
        "--auto",
        action="store_true",
        help="choose what is not given by the memory that is there, and say why: plugin, offload, "
        "--optim, --fused_loss, --cuda_graph, --grad_checkpoint, and --batch_size with "
        "--gradient_accumulation_steps, of which the rows a step stay as many; default off",
    )
    g.add_argument(
        "--ignore_memory_estimate",
        action="store_true",
        help="start what cannot fit by the plan's estimate: where it is wrong, or there is more "
        "than it sees; else the run ends out of memory, or is killed; default off: it is refused",
    )
    g.add_argument(
        "--plugin",
        choices=PLUGINS,
        default="torch_ddp",
        help="the ColossalAI Booster plugin; default torch_ddp",
    )
    g.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="arithmetic of forward and backward; default bf16 on a GPU that has it, fp16 on an "
        "older GPU, fp32 on a CPU "
        "(bf16 there with gemini, which has no fp32); torch_ddp_fp16 is always fp16",
    )
    add_run_arguments(g, seed)
    g.add_argument(
        "--tp_size",
        type=_number(int, 1),
        help="tensor parallel size, hybrid_parallel only; default 1",
    )
    g.add_argument(
        "--pp_size", type=_number(int, 1), help="pipeline stages, hybrid_parallel only; default 1"
    )
    g.add_argument(
        "--num_microbatches",
        type=_number(int, 1),
        help="micro-batches that a batch is cut into, with --pp_size over 1; default twice the "
        "stages where that divides "
        "the batch, else the stages",
    )
    g.add_argument(
        "--zero_stage",
        type=int,
        choices=(0, 1, 2),
        help="what ZeRO spreads over the data-parallel ranks: 1 optimizer state, 2 gradients too; "
        "low_level_zero (default 1) "
        "and hybrid_parallel (default 0; at most 1 with pipeline stages)",
    )
    g.add_argument(
        "--offload_optim_frac",
        type=_number(float, 0, 1),
        help="share of the optimizer state kept in host memory, 0 to 1, gemini only; default 0",
    )
    g.add_argument(
        "--optim",
        choices=OPTIMS,
        default=OPTIMS[0],
        help="what AdamW keeps: adamw_torch two fp32 moments, and fp32 weights (16 bytes a "
        "parameter with gradients); adamw_anyprecision bf16 weights alone and bf16 moments (8 "
        "bytes); adamw_8bit bf16 weights alone and 8-bit moments (6 bytes), both rounded "
        "stochastically; these two with torch_ddp or low_level_zero, adamw_anyprecision with "
        "gemini too, in bf16, not with LoRA; "
        "default adamw_torch",
    )
    g.add_argument(
        "--compile",
        action="store_true",
        help="compile each decoder layer (torch.compile): faster steps and less memory, after some "
        "seconds to minutes at the start; "
        "default off",
    )
    g.add_argument(
        "--activation_memory_budget",
        type=_number(float, 0, 1),
        metavar="SHARE",
        help="with --compile: how much of what backward needs is kept, the rest is computed again; "
        "1 all of it, 0 as little as can be; default 0.92, with fp32 weights 0.98; 1 with LoRA, "
        "norms behind the maps (opt-350m), --cuda_graph, --fp8 or --tp_size over 1; 0.9 where the "
        "GPU has no kernel for dropout, residual and norm",
    )
    g.add_argument(
        "--fp8",
        action="store_true",
        help="multiply the decoder layers' matrices in 8-bit floats, scaled tensor by tensor, the "
        "rest stays in --precision: faster "
        "together with --compile; on a GPU of compute capability 8.9 or later, not in fp32, not "
        "with --tp_size over 1; default off",
    )
    g.add_argument(
        "--cuda_graph",
        action="store_true",
        help="record forward and backward of each shape of batch once and replay them: small steps "
        "no longer wait for the host; "
        "gradients keep their memory; on one GPU, not with gemini, on several with low_level_zero, "
        "or hybrid_parallel where --tp_size x --pp_size is all of them; default off",
    )


def train_parser() -> argparse.ArgumentParser:
    """The parser of opt_train_demo.py."""
    parser = Parser(
        prog="opt_train_demo.py",
        description="Fine-tune an OPT model with ColossalAI. Start it with `colossalai run "
        "--nproc_per_node N "
        "opt_train_demo.py ...`, with torchrun, or with python for one process.",
    )
    parser.add_argument(
        "--model_name_or_path",
        type=_path,
        default="facebook/opt-350m",
        help="Hub id, or a directory with config and tokenizer; weights there are loaded, without "
        "any it trains from "
        "scratch; default facebook/opt-350m",
    )
    parser.add_argument(
        "--model_revision",
        help="branch, tag or commit of a model on the Hub; default its main branch",
    )
    parser.add_argument(
        "--tokenizer_name",
        type=_path,
        help="Hub id or directory of the tokenizer; default the model's",
    )
    parser.add_argument(
        "--output_path",
        type=_path,
        default="./output_model",
        help="directory for the trained model in Hugging Face layout, metrics.jsonl and loss.png; "
        "a name that ends in .bin "
        "or .safetensors gives the weights in that one file, and config.json, the tokenizer, "
        "metrics.jsonl and loss.png beside it; "
        "default ./output_model",
    )
    _add_setup_arguments(parser, seed=42)
    g = add_lora_arguments(parser)
    g.add_argument(
        "--lora_adapter",
        type=_path,
        metavar="PATH",
        help="go on from this adapter, a folder that PEFT or an earlier run has saved: r, alpha, "
        "target modules and rslora are its own, dropout too unless it is given; default none",
    )
    g.add_argument(
        "--merge_lora",
        action="store_true",
        help="save the whole model with the adapters added to its weights, not the adapter alone; "
        "default off",
    )
    _add_data_arguments(parser)
    _add_schedule_arguments(parser)
    _add_evaluation_arguments(parser)
    _add_results_arguments(parser)
    return parser


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """What is trained on."""
    g = parser.add_argument_group("data")
    g.add_argument(
        "--dataset",
        action=_Extend,
        type=_path,
        nargs="+",
        default=["hugginglearners/netflix-shows"],
        help="Hub ids, wikitext-2-raw, local files (csv, tsv, json, jsonl, txt, parquet, arrow, "
        "feather, also .gz, .bz2, .xz, .zst), globs or folders, in this order; default "
        "hugginglearners/netflix-shows",
    )
    g.add_argument("--dataset_config_name", help="configuration of a data set; default none")
    g.add_argument("--train_split", help="split to train on; default train, or the only one")
    g.add_argument(
        "--validation_split",
        help="split to evaluate on, none to hold texts out instead; default validation, where a "
        "data set has it",
    )
    g.add_argument(
        "--validation_file",
        action="extend",
        type=_path,
        nargs="+",
        help="files, folders or Hub ids to evaluate on, of which a split validation or test if "
        "they have one; default: what is held out",
    )
    g.add_argument(
        "--text_column",
        help="column that holds the text, a nested one by dots (answer.text); default description, "
        "text, or the only column (a txt file is one text a line)",
    )
    g.add_argument(
        "--prompt_column",
        help="column before --response_column; it is read and has no loss; default none",
    )
    g.add_argument(
        "--response_column",
        help="column with the text to learn, after --prompt_column; default none",
    )
    g.add_argument(
        "--template",
        help="text with columns in braces, such as 'Q: {question}\\nA: {answer}': what stands "
        "before the last one, or before --response_column, has no loss; default none",
    )
    g.add_argument("--csv_delimiter", help="what stands between a csv's fields; default: found out")
    g.add_argument("--encoding", help="of text files; default UTF-8, or what their mark says")
    g.add_argument(
        "--max_length",
        type=_number(int, 2),
        help="longest row in tokens, start and end tokens included; default 512 or the model's "
        "positions if fewer",
    )
    g.add_argument(
        "--long_texts",
        choices=("continue", "cut"),
        default="continue",
        help="what becomes of a text over --max_length: it goes on in a next row, or its rest is "
        "cut away; default continue",
    )
    g.add_argument(
        "--block_size",
        type=_number(int, 2),
        help="join all texts, an end token between them, and cut them into rows of so many tokens; "
        "default: a row is a text, but of wikitext-2-raw a block of --max_length",
    )
    g.add_argument(
        "--padding_free",
        action=argparse.BooleanOptionalAction,
        help="put a batch's rows one after the other instead of padding them to the longest, with "
        "attention and positions for each "
        "row alone; default on where rows are on average under 0.9 of the longest, on a CPU also "
        "over 0.4 and with --pp_size 1",
    )
    g.add_argument(
        "--eval_fraction",
        type=_number(float, 0, 0.9),
        default=0.05,
        help="held-out share of the texts, 0 to 0.9; default 0.05; 0 for no evaluation",
    )
    g.add_argument(
        "--max_train_samples",
        type=_number(int, 1),
        help="texts, with --block_size blocks, to train on at most; default all",
    )
    g.add_argument(
        "--max_eval_samples",
        type=_number(int, 1),
        help="texts, with --block_size blocks, to evaluate on; default all",
    )


def _add_schedule_arguments(parser: argparse.ArgumentParser) -> None:
    """How long, and at which rates."""
    g = parser.add_argument_group("schedule")
    g.add_argument(
        "--num_epoch",
        type=_number(int, 1),
        default=10,
        help="passes over the training texts; default 10",
    )
    g.add_argument(
        "--max_train_steps",
        type=_number(int, 1),
        help="optimizer steps at most; default as many as the epochs give",
    )
    g.add_argument(
        "--lr_scheduler_type",
        choices=SCHEDULES,
        default="linear",
        metavar="NAME",
        help=f"how the learning rate goes on after the warm-up, as in transformers: "
        f"{', '.join(SCHEDULES)}; default linear, to 0 at the end",
    )
    g.add_argument(
        "--lr_scheduler_kwargs",
        type=_json_object,
        default={},
        metavar="JSON",
        help="what transformers' schedule of that name takes besides, such as "
        "'{\"num_cycles\": 3}' or '{\"min_lr_rate\": 0.1}'; default nothing",
    )
    g.add_argument(
        "--warmup_ratio",
        type=_number(float, 0, 1),
        help="share of the steps that the learning rate rises for; default 0.1 (0 for constant)",
    )
    g.add_argument(
        "--warmup_steps",
        type=_number(int, 0),
        help="the same in optimizer steps; default by --warmup_ratio",
    )
    g.add_argument(
        "--max_norm",
        type=_number(float, 0),
        default=1.0,
        help="gradients are scaled down to this global L2 norm; default 1.0; 0 for no clipping",
    )
    g.add_argument(
        "--scale_lr",
        action="store_true",
        help="multiply the learning rate by the data-parallel size; default off",
    )


def _add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """What is done with held-out texts."""
    g = parser.add_argument_group("evaluation, on the held-out texts")
    g.add_argument(
        "--eval_steps",
        type=_number(int, 1),
        help="optimizer steps between evaluations; default once an epoch",
    )
    g.add_argument(
        "--eval_only",
        action="store_true",
        help="print loss and perplexity of the model, or of the checkpoint that --resume names, "
        "write them into output_path/eval_results.json, and stop; default off",
    )
    g.add_argument(
        "--load_best_model_at_end",
        action="store_true",
        help="export the weights with the lowest held-out loss, not the last ones; each evaluation "
        "that is the best so far writes a checkpoint, which is kept beside those of "
        "--save_total_limit; default off",
    )
    g.add_argument(
        "--early_stopping_patience",
        type=_number(int, 1),
        metavar="N",
        help="end after N evaluations in a row without a lower held-out loss; default never",
    )


def _add_results_arguments(parser: argparse.ArgumentParser) -> None:
    """What is written, and where to."""
    g = parser.add_argument_group("results")
    g.add_argument(
        "--report_to",
        choices=("none", "tensorboard", "wandb"),
        default="none",
        help="where metrics go beside metrics.jsonl; default none",
    )
    g.add_argument(
        "--run_name",
        type=_run_name,
        help="what TensorBoard and W&B call the run; default W&B's WANDB_NAME, or what it makes up",
    )
    g.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="print what the trained model writes after this text; may be given several times; "
        "default three texts from their start",
    )
    g.add_argument(
        "--push_to_hub",
        type=_repository,
        metavar="OWNER/NAME",
        help="upload the trained model to this repository of the Hugging Face Hub, with the token "
        "in HF_TOKEN or that of huggingface-cli login; made if it is not there; default no upload",
    )
    g.add_argument(
        "--hub_private_repo",
        action="store_true",
        help="make that repository a private one; default as the owner's settings say",
    )
    g.add_argument(
        "--save_steps",
        type=_number(int, 1),
        help="write a checkpoint after every so many optimizer steps and after each epoch, into "
        "output_path/checkpoints; it takes 12 "
        "bytes a parameter (4 GB for opt-350m); default: only when a signal stops the run (Ctrl-C, "
        "SIGTERM, SIGUSR1)",
    )
    g.add_argument(
        "--save_total_limit",
        type=_number(int, 1),
        default=2,
        help="checkpoints to keep, the newest ones; default 2",
    )
    g.add_argument(
        "--resume",
        type=_path,
        metavar="auto|PATH",
        help="go on from a checkpoint: the newest in output_path, or from the start if there is "
        "none (auto), or this one; also with "
        "another number of processes, plugin or parallel sizes; default: start anew",
    )
    g.add_argument(
        "--max_bad_steps",
        type=_number(int, 1),
        default=10,
        help="a step whose loss or gradient is not finite is skipped; stop after so many in a row; "
        "default 10",
    )
    g.add_argument(
        "--no_save", action="store_true", help="do not write the trained model; default off"
    )
    g.add_argument(
        "--dry_run",
        action="store_true",
        help="check everything, print the plan, and do not train; one process is enough: it takes "
        "the number of processes "
        "from WORLD_SIZE; default off",
    )


def benchmark_parser() -> argparse.ArgumentParser:
    """The parser of opt_benchmark.py."""
    parser = Parser(
        prog="opt_benchmark.py",
        description="Measure throughput and peak memory of training OPT on synthetic tokens, with "
        "the training script's "
        "model, plugin and optimizer. Started like opt_train_demo.py.",
    )
    add_measurement_arguments(parser)
    _add_setup_arguments(parser, seed=42)
    add_lora_arguments(parser)
    parser.add_argument(
        "--profile",
        type=_path,
        metavar="DIR",
        help="write a torch.profiler trace of three more steps into this folder; default none",
    )
    return parser


def add_measurement_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured, and how often; for the peers in benchmarks/ too."""
    parser.add_argument(
        "--model_name_or_path",
        type=_path,
        default="125m",
        help="a published size (125m, 350m, 1.3b, 2.7b, 6.7b, 13b, 30b, 66b, 175b; "
        "facebook/opt-125m means 125m), built from "
        "constants, without network or trained weights; or a directory with config.json; default "
        "125m",
    )
    g = parser.add_argument_group("measurement")
    g.add_argument(
        "--seq_length", type=_number(int, 2), default=1024, help="tokens a row; default 1024"
    )
    g.add_argument(
        "--max_train_steps",
        type=_number(int, 1),
        default=20,
        help="optimizer steps that are timed; default 20",
    )
    g.add_argument(
        "--warmup_steps",
        type=_number(int, 1),
        default=5,
        help="optimizer steps before those, not timed; default 5",
    )
    g.add_argument(
        "--repeats",
        type=_number(int, 1),
        default=1,
        help="blocks of --max_train_steps that are timed; default 1",
    )
    g.add_argument(
        "--json",
        type=_path,
        metavar="PATH",
        help="write the result as JSON into this file; default none",
    )


def resolve(flags: Settings, device_type: str, has_bf16: bool) -> Settings:
    """The flags with what they leave open filled in, as far as it depends on plugin and device
    alone.

    Raises UserError for combinations that the plugin cannot honour. `device_type` is "cuda" or
    "cpu"; `has_bf16` says whether that GPU computes in bf16.
    """
    args = argparse.Namespace(**vars(flags))
    _check_plugins_flags(args)
    args.tp_size, args.pp_size = args.tp_size or 1, args.pp_size or 1
    args.offload_optim_frac = args.offload_optim_frac or 0.0
    # The benchmark has no such flag, and does not take the norm. Where training does not clip, the
    # norm is known all the same: a step along nan is not to be taken.
    args.max_norm = (args.max_norm or float("inf")) if hasattr(args, "max_norm") else 0.0
    if hasattr(args, "lr_scheduler_type"):
        _check_schedule(args)
        _check_evaluation(args)
    _resolve_precision(args, device_type, has_bf16)
    _check_speed(args, device_type)
    _resolve_lora(args)
    if hasattr(args, "dataset"):  # the benchmark has no data
        _check_data(args)
    _resolve_zero(args)
    _resolve_pipeline(args)
    return Settings(**vars(args))


def _check_plugins_flags(args: argparse.Namespace) -> None:
    """Raises UserError for flags of other plugins than the one that is asked for."""
    hybrid, zero, gemini = (
        args.plugin == "hybrid_parallel",
        args.plugin == "low_level_zero",
        args.plugin == "gemini",
    )
    only = {
        "--tp_size": (args.tp_size, hybrid, "hybrid_parallel"),
        "--pp_size": (args.pp_size, hybrid, "hybrid_parallel"),
        "--num_microbatches": (args.num_microbatches, hybrid, "hybrid_parallel"),
        "--zero_stage": (args.zero_stage, hybrid or zero, "low_level_zero and hybrid_parallel"),
        "--offload_optim_frac": (args.offload_optim_frac, gemini, "gemini"),
    }
    for flag, (value, honoured, by) in only.items():
        if value is not None and not honoured:
            raise UserError(
                f"{flag} has no meaning for --plugin {args.plugin}: it is for {by}; leave it out "
                "or change the plugin"
            )


def _resolve_precision(args: argparse.Namespace, device_type: str, has_bf16: bool) -> None:
    """The fastest that device and plugin have, if none is asked for. Raises UserError for one that
    they do not have."""
    if args.plugin == "torch_ddp_fp16":
        if args.precision not in (None, "fp16"):
            raise UserError(
                f"--plugin torch_ddp_fp16 computes in fp16, not {args.precision}: use --plugin "
                f"torch_ddp --precision {args.precision}"
            )
        args.precision = "fp16"
    if args.optim != OPTIMS[0]:
        _resolve_optim(args, device_type)
    if args.precision is None and device_type == "cuda":
        args.precision = "bf16" if has_bf16 else "fp16"
    elif args.precision is None:
        args.precision = "bf16" if args.plugin == "gemini" else "fp32"
    if args.precision == "bf16" and device_type == "cuda" and not has_bf16:
        raise UserError("this GPU has no bf16: use --precision fp16")
    if args.optim != OPTIMS[0] and args.precision != "bf16":
        raise UserError(f"--optim {args.optim} updates bf16 weights, and this GPU has no bf16")
    if args.plugin == "gemini" and args.precision == "fp32":
        raise UserError(
            "gemini computes in bf16 or fp16 only: drop --precision fp32 or use --plugin torch_ddp"
        )


def _check_speed(args: argparse.Namespace, device_type: str) -> None:
    """Raises UserError where what makes steps faster cannot be had."""
    if args.activation_memory_budget is not None and not args.compile:
        raise UserError(
            "--activation_memory_budget is the compiler's: give --compile too, or leave it out"
        )
    if args.cuda_graph:
        if device_type != "cuda" or args.plugin == "gemini":
            raise UserError(
                "--cuda_graph needs a GPU and a plugin other than gemini, which moves parameters "
                "in memory: leave it out"
            )
        if args.grad_checkpoint:
            raise UserError(
                "--cuda_graph cannot record --grad_checkpoint, which asks the host in between: "
                "leave one out"
            )
        if args.plugin in ("hybrid_parallel", "low_level_zero") and args.precision != "bf16":
            raise UserError(
                f"--cuda_graph with {args.plugin} is for --precision bf16: leave one out"
            )
    if args.fp8 and (args.precision == "fp32" or args.tp_size > 1):
        raise UserError(
            "--fp8 goes with --precision bf16 or fp16 and with layers in one piece (--tp_size 1): "
            "change that, or leave it out"
        )


def _resolve_zero(args: argparse.Namespace) -> None:
    """The stage: of low_level_zero 1, else 0. Raises UserError for one that the plugin lacks."""
    zero = args.plugin == "low_level_zero"
    if args.zero_stage is None:
        args.zero_stage = 1 if zero else 0
    if zero and args.zero_stage == 0:
        raise UserError("low_level_zero is ZeRO stage 1 or 2: for stage 0 use --plugin torch_ddp")
    if not zero and args.zero_stage > 0 and args.precision == "fp32":
        raise UserError(
            "hybrid_parallel has no ZeRO in fp32: use --zero_stage 0 or --precision bf16"
        )
    if args.zero_stage > 1 and args.pp_size > 1:
        raise UserError("ZeRO stage 2 does not go with pipeline stages: use --zero_stage 1 or 0")


def _resolve_pipeline(args: argparse.Namespace) -> None:
    """Micro-batches, if there are stages: two for each where the batch can be cut so. Raises
    UserError."""
    if args.pp_size == 1:
        if args.num_microbatches is not None:
            raise UserError(
                "--num_microbatches needs pipeline stages: set --pp_size 2 or more, or leave it out"
            )
        return
    if args.num_microbatches is None:
        two_each = args.batch_size % (2 * args.pp_size) == 0
        args.num_microbatches = args.pp_size * (2 if two_each else 1)
    if args.num_microbatches < args.pp_size:
        raise UserError(
            f"--num_microbatches {args.num_microbatches} is under --pp_size {args.pp_size}: a "
            f"stage would always be idle; use {args.pp_size} or more"
        )
    if args.batch_size % args.num_microbatches:
        raise UserError(
            f"--batch_size {args.batch_size} is not divisible by {args.num_microbatches} "
            "micro-batches: change --batch_size or --num_microbatches"
        )


def _resolve_optim(args: argparse.Namespace, device_type: str) -> None:
    """Settle what an optimizer of fewer bits needs. Raises UserError where it cannot be had."""
    plugins = ["torch_ddp", "low_level_zero"] + ["gemini"] * (args.optim == OPTIMS[1])
    if args.plugin not in plugins:
        *first, last = plugins
        raise UserError(
            f"--optim {args.optim} is for {', '.join(first)} and {last}, not for {args.plugin}: "
            "change the plugin, or leave it out"
        )
    if args.lora_r or getattr(args, "lora_adapter", None):
        raise UserError(
            f"--optim {args.optim} is not for LoRA, whose adapters' state is small: leave it out"
        )
    if args.precision is None and device_type == "cpu":
        args.precision = "bf16"
    if args.precision not in (None, "bf16"):
        raise UserError(
            f"--optim {args.optim} updates bf16 weights: use --precision bf16, or leave one out"
        )


def _check_schedule(args: argparse.Namespace) -> None:
    """Settle the warm-up. Raises UserError where flags contradict one another."""
    warm_up = {"--warmup_steps": args.warmup_steps, "--warmup_ratio": args.warmup_ratio}
    given = [flag for flag, value in warm_up.items() if value is not None]
    if len(given) == 2:
        raise UserError("--warmup_steps and --warmup_ratio say the same thing: give one of them")
    if args.lr_scheduler_type == "constant" and given and warm_up[given[0]]:
        raise UserError(
            f"--lr_scheduler_type constant has no warm-up: leave {given[0]} out, or use "
            "constant_with_warmup"
        )
    if args.warmup_ratio is None:
        args.warmup_ratio = 0.0 if args.lr_scheduler_type == "constant" else 0.1


def _check_evaluation(args: argparse.Namespace) -> None:
    """Raises UserError for flags that have nothing to do in this run."""
    needs_model = {
        "--load_best_model_at_end": args.load_best_model_at_end,
        "--prompt": args.prompt,
        "--push_to_hub": args.push_to_hub,
    }
    for flag, given in needs_model.items():
        if given and (args.no_save or args.eval_only):
            other = "--no_save" if args.no_save else "--eval_only"
            raise UserError(f"{flag} is for a model that is written, and {other} writes none")
    if args.hub_private_repo and not args.push_to_hub:
        raise UserError("--hub_private_repo is for --push_to_hub: give that too, or leave it out")
    if args.run_name and args.report_to == "none":
        raise UserError("--run_name is for --report_to: give that too, or leave it out")
    if args.eval_only and args.report_to != "none":
        raise UserError(
            f"--eval_only writes eval_results.json alone: leave out --report_to {args.report_to}"
        )


def _resolve_lora(args: argparse.Namespace) -> None:
    """PEFT's defaults; what an adapter's folder says is read in opt/train/checks.py."""
    adapter, merge = getattr(args, "lora_adapter", None), getattr(args, "merge_lora", False)
    of_adapter = {
        "--lora_r": args.lora_r,
        "--lora_alpha": args.lora_alpha,
        "--lora_target_modules": args.lora_target_modules,
        "--use_rslora": args.use_rslora,
    }
    given = next((flag for flag, value in of_adapter.items() if value), None)
    if adapter and given:
        raise UserError(
            f"{given} is the adapter's own where --lora_adapter is given: leave one of them out"
        )
    if not adapter and not args.lora_r:
        more = {
            "--lora_dropout": args.lora_dropout is not None,
            "--merge_lora": merge,
            "--load_in_4bit": args.load_in_4bit,
        }
        given = given or next((flag for flag, value in more.items() if value), None)
        if given:
            raise UserError(
                f"{given} is for adapters, and without --lora_r or --lora_adapter there are none: "
                "give one of these, or leave it out"
            )
    if args.load_in_4bit:
        cannot = {
            "--plugin gemini": args.plugin == "gemini",
            "--tp_size over 1": args.tp_size > 1,
            "--fp8": args.fp8,
            "--merge_lora": merge,
        }
        other = next((flag for flag, value in cannot.items() if value), None)
        if other:
            raise UserError(f"--load_in_4bit does not go with {other}: leave one of them out")
    if getattr(args, "output_path", "").endswith((".bin", ".safetensors")) and not merge:
        if adapter or args.lora_r:
            raise UserError(
                f"--output_path {args.output_path} names one file, and an adapter is a folder: "
                "name a folder, or give --merge_lora for the whole model"
            )
    if adapter:
        return
    args.lora_alpha = args.lora_alpha or 8.0
    args.lora_dropout = args.lora_dropout or 0.0
    names = args.lora_target_modules or ["all-linear"]
    args.lora_target_modules = [
        name for name in LORA_TARGETS if name in names or "all-linear" in names
    ]


def _check_data(args: argparse.Namespace) -> None:
    """Refuse flags of the data that say two things at once. Raises UserError."""
    if args.template:
        parse_template(args.template, args.response_column)
        if args.prompt_column:
            raise UserError(
                "--template and --prompt_column both say what the prompt is: leave one out"
            )
    elif bool(args.prompt_column) != bool(args.response_column):
        raise UserError(
            "--prompt_column and --response_column go together: give both, or --template"
        )
    has_prompt = args.template or args.response_column
    if has_prompt and args.text_column:
        raise UserError(
            "--text_column does not go with --template or --prompt_column: leave one out"
        )
    if has_prompt and args.block_size:
        raise UserError(
            "--block_size joins whole texts, which have no prompt: leave it out, or the prompt"
        )
    if args.validation_file and args.validation_split:
        raise UserError(
            "--validation_file and --validation_split both say what is held out: leave one out"
        )
    if args.csv_delimiter:
        args.csv_delimiter = args.csv_delimiter.replace("\\t", "\t")
        if len(args.csv_delimiter) != 1 or args.csv_delimiter in '\n\r"':
            raise UserError(f"--csv_delimiter is one character, not '{args.csv_delimiter:.20}'")
    if args.encoding:
        try:
            is_text = codecs.lookup(args.encoding)._is_text_encoding
        except (LookupError, ValueError):
            is_text = False
        if not is_text:
            raise UserError(f"--encoding {args.encoding:.40}: no such encoding; utf-8, cp1252, ...")
        if codecs.lookup(args.encoding).name == "utf-8":
            args.encoding = None  # read with or without a mark, as by default

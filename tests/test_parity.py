"""The first forward of every plugin, from every layout of a checkpoint, is plain transformers'
forward."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from opt.data.batches import collate
from opt.data.rows import Rows
from opt.model.weights import HEAD, InitialWeights

from .conftest import REPO, SAMPLE_MODEL, run, stored, train

HYBRID = ("--plugin", "hybrid_parallel")
# By number of processes. The batch's rows are shared out over the data-parallel ranks.
SETTINGS = {
    1: {
        "torch_ddp": ("--plugin", "torch_ddp"),
        "torch_ddp_fp16": ("--plugin", "torch_ddp_fp16"),
        "low_level_zero": ("--plugin", "low_level_zero"),
        "gemini": ("--plugin", "gemini"),
        "hybrid_parallel": HYBRID,
    },
    2: {
        "torch_ddp": ("--plugin", "torch_ddp"),
        "low_level_zero": ("--plugin", "low_level_zero"),
        "low_level_zero, stage 2": ("--plugin", "low_level_zero", "--zero_stage", 2),
        "gemini": ("--plugin", "gemini"),
        "gemini for accumulation": ("--plugin", "gemini", "--gradient_accumulation_steps", 2),
        "tp=2": (*HYBRID, "--tp_size", 2),
        "pp=2": (*HYBRID, "--pp_size", 2),
    },
    4: {
        "tp=2 x pp=2": (*HYBRID, "--tp_size", 2, "--pp_size", 2),
        "tp=2 x dp=2, ZeRO": (*HYBRID, "--tp_size", 2, "--zero_stage", 1),
        "pp=2 x dp=2, ZeRO": (*HYBRID, "--pp_size", 2, "--zero_stage", 1),
    },
}
# The others place weights by the same code as one of these: for them one layout is enough.
ALL_LAYOUTS = {
    (2, "torch_ddp"),
    (2, "low_level_zero"),
    (2, "gemini"),
    (2, "tp=2"),
    (2, "pp=2"),
    (4, "tp=2 x pp=2"),
}
TOLERANCE = {"fp32": 1e-4, "bf16": 0.02, "fp16": 0.02}
# The odd vocabulary is padded under tensor parallelism; the second is what opt-350m has that no
# other OPT has, the third what facebook/galactica-* have, which are OPT to transformers.
MODELS = {
    "odd vocabulary": {"vocab_size": 1003},
    "like opt-350m": {"vocab_size": 1000, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "like Galactica": {
        "vocab_size": 1000,
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
        "activation_function": "gelu",
    },
}
NO_WEIGHTS = "no weights"
TRAINED_LAYOUT = "Hub"  # for the others a forward is enough
SEED = 7
MEMORY_LAYOUTS = ("Hub", "save_pretrained", NO_WEIGHTS)
MEMORY_SETTINGS = {
    1: {"torch_ddp": ["Hub"]},
    2: {"gemini": MEMORY_LAYOUTS},
    4: {"tp=2 x pp=2": MEMORY_LAYOUTS},
}
CHUNKS = (1024, 35, 1)  # tokens a process whose logits exist at a time
LENGTHS = (9, 30, 17, 5, 24, 12, 2, 28)


def precisions(setting: str) -> tuple[str, ...]:
    if setting == "torch_ddp_fp16":
        return ("fp16",)
    return ("bf16",) if "gemini" in setting or "ZeRO" in setting else ("fp32", "bf16")


def layouts_of(nproc: int, setting: str, precision: str) -> list[str]:
    """The layouts that a case loads: all of them in a setting's first precision, since the second
    has its weights from the same places."""
    is_first = precision == precisions(setting)[0]
    return list(LAYOUTS) if is_first and (nproc, setting) in ALL_LAYOUTS else [TRAINED_LAYOUT]


def save_hub_layout(model, directory, shards=1):
    """As facebook/opt-* are on the Hub: fp16 .bin, the base model's names, no head."""
    tensors = {
        k.removeprefix("model."): v.half() for k, v in model.state_dict().items() if k != HEAD
    }
    names = sorted(tensors)
    files = (
        [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)]
        if shards > 1
        else ["pytorch_model.bin"]
    )
    for i, file in enumerate(files):
        torch.save({name: tensors[name] for name in names[i::shards]}, directory / file)
    if shards > 1:
        index = {
            "metadata": {},
            "weight_map": {name: files[i % shards] for i, name in enumerate(names)},
        }
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


LAYOUTS = {
    "Hub": save_hub_layout,
    "Hub in shards": lambda model, directory: save_hub_layout(model, directory, shards=3),
    "save_pretrained": lambda model, directory: model.save_pretrained(directory),
    "full state dict": lambda model, directory: torch.save(
        model.state_dict(), directory / "pytorch_model.bin"
    ),
    "shards, bin": lambda model, directory: model.save_pretrained(
        directory, max_shard_size="200KB", safe_serialization=False
    ),
    "shards, safetensors": lambda model, directory: model.save_pretrained(
        directory, max_shard_size="200KB"
    ),
    NO_WEIGHTS: lambda model, directory: None,
}


def random_model(**config) -> OPTForCausalLM:
    """A small OPT whose every tensor matters: with the usual initial weights its loss would be
    ln(vocabulary) whatever was lost on the way, and all biases are 0."""
    sizes = {
        "hidden_size": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    model = OPTForCausalLM(
        OPTConfig(**({"word_embed_proj_dim": 64, "init_std": 0.2} | sizes | config))
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p), alpha=0.2)
    return model


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Rows:
    """Token rows of unequal length, in the files that opt.data.Rows reads."""
    directory = tmp_path_factory.mktemp("rows")
    tokens = np.random.default_rng(0).integers(3, 1000, sum(LENGTHS))
    rows = stored(LENGTHS, directory, tokens)
    rows.directory = directory
    return rows


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict:
    """{(model, layout): directory}"""
    found = {}
    for name, config in MODELS.items():
        torch.manual_seed(0)
        model = random_model(**config)
        # Its files are like the others'
        layouts = [TRAINED_LAYOUT] if name == "like Galactica" else LAYOUTS
        for layout in layouts:
            found[name, layout] = directory = tmp_path_factory.mktemp("checkpoint")
            model.config.save_pretrained(directory)
            LAYOUTS[layout](model, directory)
    return found


def plain_loss(model, rows: Rows) -> float:
    batch = collate(
        [rows[i] for i in range(len(rows))], rows.contexts, len(rows), rows.longest, pad_id=1
    )
    with torch.no_grad():
        real = torch.arange(rows.longest) < torch.tensor(rows.lengths).unsqueeze(1)
        return model.eval()(**batch, attention_mask=real.long()).loss.item()


@pytest.fixture(scope="module")
def expected(checkpoints, rows) -> dict:
    """{(model, layout): the loss that plain transformers gives}"""
    found = {}
    for (name, layout), directory in checkpoints.items():
        if layout == NO_WEIGHTS:
            model = OPTForCausalLM(OPTConfig.from_pretrained(directory))
            initial = InitialWeights(model, seed=SEED)
            model.load_state_dict({key: initial[key] for key in model.state_dict()})
        else:
            model = AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32)
        found[name, layout] = plain_loss(model, rows)
        assert abs(found[name, layout] - math.log(MODELS[name]["vocab_size"])) > 0.5, (
            "a model that has lost its weights has this loss"
        )
    return found


@pytest.fixture(scope="module")
def big_model(tmp_path_factory) -> dict:
    """{layout: directory} of a model of about 200 MB, none of its tensors over a twelfth of that;
    and its size in bytes."""
    model = random_model(
        **{"vocab_size": 2048, "hidden_size": 1024, "word_embed_proj_dim": 1024, "ffn_dim": 4096}
    )
    found = {"bytes": 4 * sum(p.numel() for p in model.parameters())}
    for layout in MEMORY_LAYOUTS:
        found[layout] = directory = tmp_path_factory.mktemp("big")
        model.config.save_pretrained(directory)
        LAYOUTS[layout](model, directory)
    return found


def run_worker(directory, nproc, cases: dict, env: dict) -> dict:
    """{case: result} of tests/parity_worker.py, which says what a case is. Its files go into
    `directory`."""
    spec = {str(key): case | {"flags": [*map(str, case["flags"])]} for key, case in cases.items()}
    files = (directory / "cases.json", directory / "results.json")
    files[0].write_text(json.dumps(spec, default=str))
    done = run(
        REPO / "tests" / "parity_worker.py",
        *files,
        nproc=nproc,
        env={"PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])} | env,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(files[1].read_text())
    return {key: results[str(key)] for key in cases}


@pytest.fixture(scope="module")
def worker(tmp_path_factory, checkpoints, rows, big_model, untied):
    """{case: result} of tests/parity_worker.py on a number of processes, which are started once."""
    done = {}

    def on(nproc, device="cpu"):
        if (nproc, device) in done:
            return done[nproc, device]
        cases = {}
        # Host memory, which is asked about among processes on CPUs
        of_memory = MEMORY_SETTINGS.get(nproc, {}) if device == "cpu" else {}
        for setting, layouts in of_memory.items():
            for layout in layouts:
                flags = ("--model_name_or_path", big_model[layout], *SETTINGS[nproc][setting])
                cases["memory", setting, layout] = {"wanted": "memory", "flags": flags}
        for setting, flags in SETTINGS[nproc].items():
            for precision in precisions(setting):
                more = (
                    "--precision",
                    precision,
                    "--dropout",
                    0,
                    "--learning_rate",
                    0,
                    "--batch_size",
                    len(LENGTHS),
                    "--seed",
                    SEED,
                )
                for (model, layout), directory in checkpoints.items():
                    if layout not in layouts_of(nproc, setting, precision):
                        continue
                    steps = ("--max_train_steps", 2) if layout == TRAINED_LAYOUT else ()
                    case = {"wanted": "first_losses", "rows": rows.directory}
                    cases[setting, precision, model, layout] = case | {
                        "flags": ("--model_name_or_path", directory, *flags, *more, *steps)
                    }
                cases["untied", setting, precision] = untied_case(
                    untied / "model", untied / f"{setting} {precision}", rows, flags, precision
                )
                # As compiled layers on GPUs: micro-batches add up in the products, recorded batches
                # go through cut layers in halves
                case = cases["untied", setting, precision]
                halves = setting == "tp=2" and precision == "fp32"
                case |= {"adds_up": setting == "pp=2", "halves": halves}
        for chunk in CHUNKS if nproc > 1 else ():
            cases["split loss", chunk] = {"wanted": "split_loss", "flags": (), "chunk": chunk}
        # glibc keeps freed memory for later; here it is to give it back, so that the next case
        # starts from nothing.
        env = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        if device == "cpu":
            env["CUDA_VISIBLE_DEVICES"] = ""  # several processes would need a GPU each
        done[nproc, device] = run_worker(tmp_path_factory.mktemp("worker"), nproc, cases, env)
        return done[nproc, device]

    return on


# ---- an output projection of its own

STEPS, RATE, DECAY = 3, 3e-3, 0.1


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    """A folder with `model`, whose head is not its embedding: an odd vocabulary, opt-350m's narrow
    embedding, and no ReLU, whose kinks give other gradients where sums are rounded otherwise."""
    torch.manual_seed(3)
    sizes = {"vocab_size": 1003, "word_embed_proj_dim": 32, "activation_function": "gelu"}
    model = random_model(**sizes, tie_word_embeddings=False)
    folder = tmp_path_factory.mktemp("untied")
    model.save_pretrained(folder / "model")
    assert not torch.equal(model.lm_head.weight, model.model.decoder.embed_tokens.weight)
    return folder


def untied_case(model, output, rows, flags, precision) -> dict:
    more = ("--precision", precision, "--dropout", 0, "--batch_size", len(LENGTHS), "--fused_loss")
    rates = ("--learning_rate", RATE, "--weight_decay", DECAY, "--max_train_steps", STEPS)
    paths = ("--model_name_or_path", model, "--output_path", output)
    case = {"wanted": "trained", "rows": rows.directory, "tokenizer": SAMPLE_MODEL}
    return case | {"flags": (*paths, *flags, *more, *rates)}


@pytest.fixture(scope="module")
def plainly_trained(untied, rows) -> tuple[list[float], dict]:
    """Losses and weights of a plain PyTorch loop of transformers' model."""
    model = AutoModelForCausalLM.from_pretrained(untied / "model", dropout=0.0)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=RATE)
    all_rows = [rows[i] for i in range(len(rows))]
    batch = collate(all_rows, rows.contexts, len(rows), rows.longest, pad_id=1)
    real = (torch.arange(rows.longest) < torch.tensor(rows.lengths).unsqueeze(1)).long()
    losses = []
    for step in range(STEPS):
        for group in adamw.param_groups:
            group["lr"] = RATE * (10 - step) / 10
        loss = model(**batch, attention_mask=real).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    return losses, dict(model.named_parameters())


CASES = [  # four processes train in test_training.py
    pytest.param(n, setting, precision, marks=[pytest.mark.long] * (n == 4))
    for n, settings in SETTINGS.items()
    for setting in settings
    for precision in precisions(setting)
]


@pytest.mark.parametrize(("nproc", "setting", "precision"), CASES)
def test_first_loss_is_that_of_plain_transformers(worker, expected, nproc, setting, precision):
    layouts = layouts_of(nproc, setting, precision)
    check_losses(worker(nproc), expected, setting, precision, layouts)


@pytest.mark.parametrize(("nproc", "setting", "precision"), CASES)
def test_an_untied_head_learns_and_is_written(
    worker, untied, plainly_trained, nproc, setting, precision
):
    """With plain transformers' losses and update, whatever cuts the vocabulary or the layers."""
    losses, wanted = plainly_trained
    near = TOLERANCE[precision]
    assert losses[0] - losses[-1] > 5 * near
    assert worker(nproc)["untied", setting, precision] == pytest.approx(losses, abs=near)
    output = untied / f"{setting} {precision}"
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is False
    written = AutoModelForCausalLM.from_pretrained(output, torch_dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(untied / "model")
    given = dict(before.named_parameters())
    assert dict(written.named_parameters()).keys() == wanted.keys()
    for name in (HEAD, "model.decoder.embed_tokens.weight", "model.decoder.project_out.weight"):
        now, then, update = dict(written.named_parameters())[name], given[name], wanted[name]
        # 16-bit arithmetic keeps two or three digits, and so do weights that are written
        loose = 0.01 if precision == "fp32" else 0.3
        assert (now - update).norm() < loose * (update - then).norm(), name


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("setting", "precision"), [case.values[1:] for case in CASES if case.values[0] == 1]
)
def test_first_loss_on_a_gpu(worker, expected, setting, precision):
    check_losses(worker(1, "cuda"), expected, setting, precision, [TRAINED_LAYOUT])


@pytest.mark.parametrize("nproc", [2, 4])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_fused_loss_over_a_split_vocabulary_is_that_of_the_whole(worker, nproc, chunk):
    """And its gradients: in one chunk, in several of which the last is short, token by token or
    so."""
    distances = worker(nproc)["split loss", chunk]
    assert set(distances) == {"loss", "hidden", "weight"} and max(distances.values()) < 1e-5


def check_losses(results, expected, setting, precision, layouts):
    near = TOLERANCE[precision]
    wanted = {key: loss for key, loss in expected.items() if key[1] in layouts}
    found = {key: results[(setting, precision, *key)] for key in wanted}
    assert {key: steps[0] for key, steps in found.items()} == pytest.approx(wanted, abs=near)
    # After a step with a learning rate of 0 the weights come from the optimizer's master copy: it
    # must have got them too.
    trained = {key: steps[1:] for key, steps in found.items() if key[1] == TRAINED_LAYOUT}
    assert trained == {key: pytest.approx([wanted[key]] * 2, abs=near) for key in trained}


@pytest.mark.parametrize("layout", MEMORY_LAYOUTS)
def test_weights_stream_in(worker, big_model, layout):
    """With gemini and hybrid_parallel no process ever holds the whole model: users ran out of host
    memory with OPT-66B."""
    whole = big_model["bytes"]  # in fp32
    assert worker(1)["memory", "torch_ddp", "Hub"]["peak"][0] > whole, (
        "what holds a copy must be seen to do so"
    )

    quarter = worker(4)["memory", "tp=2 x pp=2", layout]
    assert max(quarter["kept"]) < 0.35 * whole
    assert max(quarter["peak"]) < 0.45 * whole
    # Gemini's half has 6 bytes a parameter, and a chunk of its parameters is put together at a
    # time.
    half = worker(2)["memory", "gemini", layout]
    assert max(half["kept"]) < 0.85 * whole
    assert max(p - k for p, k in zip(half["peak"], half["kept"], strict=True)) < 0.7 * whole


def test_initial_weights_are_distributed_as_transformers_own():
    sizes = {
        "hidden_size": 64,
        "word_embed_proj_dim": 32,
        "ffn_dim": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    model = OPTForCausalLM(OPTConfig(vocab_size=1003, **sizes))
    ours = InitialWeights(model, seed=0)
    assert HEAD not in list(ours)
    for name, theirs in model.named_parameters():
        assert ours[name].shape == theirs.shape, name
        assert ours[name].mean().item() == pytest.approx(
            theirs.mean().item(), abs=5 * 0.02 / theirs.numel() ** 0.5
        ), name
        assert ours[name].std().item() == pytest.approx(theirs.std().item(), rel=0.1), name
    assert torch.equal(
        ours["model.decoder.embed_tokens.weight"][model.config.pad_token_id], torch.zeros(32)
    )
    assert not torch.equal(
        InitialWeights(model, seed=1)["model.decoder.layers.0.fc1.weight"],
        ours["model.decoder.layers.0.fc1.weight"],
    )


def test_without_weights_it_says_that_it_trains_from_scratch(tmp_path):
    assert (
        f"none in {SAMPLE_MODEL}: it trains from scratch"
        in train(tmp_path / "out", "--dry_run").stdout
    )


def test_a_compiled_layer_is_one_graph_on_two_processes(tmp_path, rows):
    """DistributedDataParallel would have Dynamo cut a layer into graphs, of 1 MB of gradients and
    more; this one has 3 MB."""
    model = random_model(
        vocab_size=1000, hidden_size=256, word_embed_proj_dim=256, ffn_dim=1024, num_hidden_layers=2
    )
    model.save_pretrained(tmp_path)
    flags = (
        "--model_name_or_path",
        tmp_path,
        "--compile",
        "--dropout",
        0,
        "--learning_rate",
        0,
        "--max_train_steps",
        1,
    )
    case = {"wanted": "compiled", "rows": rows.directory, "flags": flags}
    found = run_worker(tmp_path, 2, {"torch_ddp": case}, {"CUDA_VISIBLE_DEVICES": ""})["torch_ddp"]
    assert found["graphs"] == [2, 2]  # one for the evaluation, one for the step
    assert found["losses"] == pytest.approx([plain_loss(model, rows)] * 2, abs=1e-4)


def test_gradients_reduced_by_layer_are_the_mean_over_three_processes(tmp_path, checkpoints, rows):
    """Most tensors do not divide by three; the two backwards without an update between them add up.
    In bf16."""
    plugins = {
        "stage 2": ("low_level_zero", "--zero_stage", 2),
        "hybrid": ("hybrid_parallel", "--zero_stage", 1),
    }
    cases = {}
    for model in MODELS:
        for setting, flags in plugins.items():
            flags = (
                "--model_name_or_path",
                checkpoints[model, "Hub"],
                "--plugin",
                *flags,
                "--precision",
                "bf16",
                "--dropout",
                0,
            )
            cases[model, setting] = {"wanted": "gradients", "rows": rows.directory, "flags": flags}
    for key, distances in run_worker(tmp_path, 3, cases, {"CUDA_VISIBLE_DEVICES": ""}).items():
        tensors = torch.load(checkpoints[key[0], "Hub"] / "pytorch_model.bin")
        assert len(distances) == len(tensors) and max(distances.values()) < 0.01, key

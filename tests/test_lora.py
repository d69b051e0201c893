"""LoRA is PEFT's: the same steps under every plugin, files that either reads; and what it costs."""

import json
import os
import shutil
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    OPTConfig,
    OPTForCausalLM,
)

from args import Settings, train_parser
from opt.colossal import processes
from opt.data.batches import collate
from opt.errors import UserError
from opt.measure import flops_per_token
from opt.model.lora import TARGETS, Adapted, Lora
from opt.model.weights import CheckpointWeights
from opt.train import checks
from opt.train.checkpoints import Checkpoint, check_same_run

from .conftest import REPO, SAMPLE_DATA, SAMPLE_MODEL, losses, run, train
from .test_parity import random_model, rows  # noqa: F401  (a fixture)

HYBRID = ("--plugin", "hybrid_parallel")
ZERO = ("--plugin", "low_level_zero")
FOUR_BITS = ("--load_in_4bit",)
SETTINGS = {
    1: {
        "gemini": ("--plugin", "gemini"),
        "torch_ddp, bf16": ("--precision", "bf16"),
        "torch_ddp, 4 bits": FOUR_BITS,
        "low_level_zero, 4 bits": (*ZERO, *FOUR_BITS, "--grad_checkpoint"),
    },
    2: {
        "torch_ddp": (),
        "low_level_zero": ZERO,
        "low_level_zero, bf16": (*ZERO, "--precision", "bf16"),
        "gemini": ("--plugin", "gemini"),
        "tp=2": (*HYBRID, "--tp_size", 2),
        "pp=2": (*HYBRID, "--pp_size", 2),
        "pp=2, 4 bits": (*HYBRID, "--pp_size", 2, *FOUR_BITS),
    },
    4: {
        "gemini for accumulation": ("--plugin", "gemini", "--gradient_accumulation_steps", 2),
        "tp=2 x pp=2": (*HYBRID, "--tp_size", 2, "--pp_size", 2),
        "tp=2 x dp=2, ZeRO": (*HYBRID, "--tp_size", 2, "--zero_stage", 1, "--precision", "bf16"),
        "tp=2 x dp=2, bf16": (*HYBRID, "--tp_size", 2, "--precision", "bf16"),
        "pp=2 x dp=2": (*HYBRID, "--pp_size", 2),
    },
    "compiled": {"low_level_zero": (*ZERO, "--compile")},
}
STEPS, RATE = 20, 1e-2


def in_four_bits(model) -> None:
    """bitsandbytes' own layers in the place of the decoder layers' matrices."""
    for layer in model.model.decoder.layers:
        for place in TARGETS.values():
            linear = layer.get_submodule(place)
            sizes = linear.in_features, linear.out_features
            quantized = bitsandbytes.nn.Linear4bit(
                *sizes, compute_dtype=torch.float32, quant_type="nf4"
            )
            quantized.weight = bitsandbytes.nn.Params4bit(
                linear.weight.data, requires_grad=False, quant_type="nf4"
            )
            quantized.bias = linear.bias
            parent, _, name = place.rpartition(".")
            setattr(layer.get_submodule(parent), name, quantized.to("cpu"))
            assert quantized.weight.dtype == torch.uint8


def twenty_steps(base, adapter, batch, folder, quantize=lambda model: None) -> dict:
    """PEFT's, on plain transformers: losses, norms, A and B after them, in `folder`, and how far
    they came."""
    model = AutoModelForCausalLM.from_pretrained(base)
    quantize(model)
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01)
    losses, norms = [], []
    for _ in range(STEPS):
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(trained, 1.0).item())
        adam.step()
        adam.zero_grad()
    model.save_pretrained(folder)
    before, tensors = (load_file(f / "adapter_model.safetensors") for f in (adapter, folder))
    moved = {name: (tensor - before[name]).norm().item() for name, tensor in tensors.items()}
    return {"losses": losses, "norms": norms, "tensors": tensors, "moved": moved}


@pytest.fixture(scope="module")
def peft(tmp_path_factory, rows):  # noqa: F811
    """A base model, an adapter of PEFT's whose B is not zero, and twenty steps of PEFT's, whole and
    on a base in 4 bits."""
    base, adapter = (tmp_path_factory.mktemp(name) for name in ("base", "adapter"))
    torch.manual_seed(0)
    random_model(vocab_size=1003, dropout=0.0).save_pretrained(base)
    settings = {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": list(TARGETS)}
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(**settings, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    model.save_pretrained(adapter)
    all_rows = [rows[i] for i in range(len(rows))]
    batch = collate(all_rows, rows.contexts, len(rows), rows.longest, pad_id=1)
    real = torch.arange(rows.longest) < torch.tensor(rows.lengths).unsqueeze(1)
    batch["attention_mask"] = real.long()
    after, packed = (tmp_path_factory.mktemp(name) for name in ("after", "packed"))
    found = {"base": base, "adapter": adapter, "batch": batch}
    found["whole"] = twenty_steps(base, adapter, batch, after)
    found["4 bits"] = twenty_steps(base, adapter, batch, packed, in_four_bits)
    return found


@pytest.mark.parametrize(
    "setting",
    [1, *(pytest.param(setting, marks=pytest.mark.long) for setting in (2, 4, "compiled"))],
)
def test_twenty_steps_are_pefts(setting, peft, rows, tmp_path):  # noqa: F811
    """Losses, norms of the gradient, A and B; in fp32, and nearly so in bf16."""
    cases, nproc = {}, 1 if setting == "compiled" else setting
    for name, flags in SETTINGS[setting].items():
        given = ("--model_name_or_path", peft["base"], "--lora_adapter", peft["adapter"])
        more = ("--learning_rate", RATE, "--max_train_steps", STEPS, "--batch_size", len(rows))
        output = ("--output_path", tmp_path / name)
        flags = [*map(str, (*given, *more, *output, *flags))]
        cases[name] = {"wanted": "adapters", "flags": flags, "rows": str(rows.directory)}
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    results = tmp_path / "results.json"
    worker = REPO / "tests" / "parity_worker.py"
    done = run(worker, tmp_path / "cases.json", results, nproc=nproc, env={"PYTHONPATH": str(REPO)})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for name, found in json.loads(results.read_text()).items():
        # Of 8.5 at first and 1.2 at last; and how far A and B are off, in parts of how far they came
        expected = peft["4 bits" if "4 bits" in name else "whole"]
        is_fp32 = not any(word in name for word in ("bf16", "gemini", "ZeRO"))
        loss, norm, distance = (1e-4, 2e-3, 5e-3) if is_fp32 else (0.1, 0.1, 0.7)
        if "4 bits" in name:  # bitsandbytes' CPU product rounds otherwise: the same for ten steps
            assert found["losses"][:10] == pytest.approx(expected["losses"][:10], abs=loss), name
            loss, norm, distance = 0.02, 2e-3, 0.1
        assert found["losses"] == pytest.approx(expected["losses"], abs=loss), name
        alike = STEPS if norm < 0.1 and "4 bits" not in name else 5  # then roundings have grown
        assert found["norms"][:alike] == pytest.approx(expected["norms"][:alike], rel=norm), name
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        assert tensors.keys() == expected["tensors"].keys()
        for key, tensor in tensors.items():
            off = (tensor.float() - expected["tensors"][key]).norm().item()
            assert off < distance * expected["moved"][key], (name, key, off)
        if "4 bits" in name:  # which PEFT would have to read again
            continue
        with torch.no_grad():
            after = with_peft(peft["base"], tmp_path / name).eval()(**peft["batch"]).loss.item()
        # In bf16 the base model that PEFT reads is the more precise one
        assert after == pytest.approx(found["evaluated"], abs=1e-4 if is_fp32 else 0.02), name


@pytest.mark.gpu
def test_four_bits_on_a_gpu_are_pefts_on_bitsandbytes(peft, rows, tmp_path):  # noqa: F811
    """As transformers quantizes: nf4, double quantization, products in bf16."""
    packed = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        peft["base"], quantization_config=packed, torch_dtype=torch.bfloat16, device_map={"": 0}
    )
    model = PeftModel.from_pretrained(model, peft["adapter"], is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01)
    batch, expected = {name: t.cuda() for name, t in peft["batch"].items()}, []
    for _ in range(STEPS):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        expected.append(loss.item())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adam.step()
        adam.zero_grad()
    given = ("--model_name_or_path", peft["base"], "--lora_adapter", peft["adapter"])
    more = ("--learning_rate", RATE, "--max_train_steps", STEPS, "--batch_size", len(rows))
    cases = {}
    for name, flags in {"low_level_zero": ZERO, "torch_ddp": ()}.items():
        output = ("--output_path", tmp_path / name, "--precision", "bf16", "--load_in_4bit")
        flags = [*map(str, (*given, *more, *output, *flags))]
        cases[name] = {"wanted": "adapters", "flags": flags, "rows": str(rows.directory)}
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    path = {"PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
    worker, results = REPO / "tests" / "parity_worker.py", tmp_path / "results.json"
    done = run(worker, tmp_path / "cases.json", results, nproc=1, env=path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for name, found in json.loads(results.read_text()).items():
        assert expected[-1] < expected[0] - 3
        assert found["losses"][0] == pytest.approx(expected[0], abs=0.01), name
        assert found["losses"][:5] == pytest.approx(expected[:5], abs=0.05), name


# ---- as a user runs it


# Rows and rate of a step are the same however many processes share it.
LORA = "--lora_r 4 --lora_alpha 6 --max_train_steps 8 --learning_rate 1e-2 --dropout 0".split()
LORA += "--eval_steps 8 --padding_free --batch_size 16 --save_total_limit 9".split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model with weights and a tokenizer, and eight steps of LoRA on the sample."""
    folder = tmp_path_factory.mktemp("trained")
    base = folder / "base"
    shutil.copytree(SAMPLE_MODEL, base)
    torch.manual_seed(0)
    config = OPTConfig.from_pretrained(base)
    config.init_std = 0.1
    OPTForCausalLM(config).save_pretrained(base)
    output = folder / "output"
    done = train(output, *LORA, "--model_name_or_path", base, "--save_steps", 4)
    return {"base": base, "output": output, "said": done.stdout}


def loss_of(model, base) -> float:
    """Of a text, by plain transformers."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer("A young chef learns to cook in a small town.", return_tensors="pt").input_ids
    with torch.no_grad():
        return model.eval()(input_ids=ids, labels=ids).loss.item()


def with_peft(base, adapter):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


def test_resumed_run_is_the_uninterrupted_one(trained, tmp_path):
    """Bit for bit; and under tensor parallelism, from there, nearly. What it merges has the loss
    of what it does not merge. A checkpoint is as small as the adapters."""
    base, step = trained["base"], "checkpoints/step-00000004"
    checkpoint = trained["output"] / step
    tensors = load_file(trained["output"] / "adapter_model.safetensors")
    elements = sum(t.numel() for t in tensors.values())
    (saved,) = checkpoint.glob("rank-*.safetensors")
    # fp32 weights and two moments; names, and 5 KB of random-number state
    assert 12 * elements < saved.stat().st_size < 12 * elements + 40_000
    assert f"{elements:,} parameters" in trained["said"] and "descriptions" in trained["said"]

    resume = (*LORA, "--model_name_or_path", base, "--resume", checkpoint)
    train(tmp_path / "same", *resume)
    again = load_file(tmp_path / "same" / "adapter_model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)

    hybrid = ("--plugin", "hybrid_parallel", "--tp_size", 2, "--merge_lora")
    other = [flag for flag in resume if flag != "--padding_free"]
    train(tmp_path / "tp", *other, *hybrid, nproc=2)
    assert losses(tmp_path / "tp") == pytest.approx(losses(trained["output"]), abs=1e-5)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "tp")
    own = loss_of(with_peft(base, trained["output"]), base)
    assert loss_of(merged, base) == pytest.approx(own, abs=1e-4)
    assert abs(own - loss_of(AutoModelForCausalLM.from_pretrained(base), base)) > 0.1


def test_adapters_beside_other_weights_are_not_taken_up(trained, tmp_path):
    checkpoint = Checkpoint.read(trained["output"] / "checkpoints/step-00000004")
    plan = Settings(**checkpoint.state["arguments"])
    data = SimpleNamespace(checksum=checkpoint.state["data"])

    def check(base):
        model = Adapted(CheckpointWeights(base), checkpoint.tensors("weights"))
        check_same_run(checkpoint, plan, model, data)

    check(trained["base"])
    other = load_file(trained["base"] / "model.safetensors")
    other["model.decoder.layers.1.fc1.weight"] *= 1.1
    save_file(other, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="adapters to other weights"):
        check(tmp_path)


def refused(*flags) -> str:
    """What check() says of flags, in this process."""
    given = ("--dataset", SAMPLE_DATA, *flags)
    with pytest.raises(UserError) as error:
        plan = train_parser().parse_args([*map(str, given)])
        checks.check(plan, processes.Place(0, 1, 0, torch.device("cpu")))
    return str(error.value)


def test_what_is_no_lora_of_this_model_is_refused(trained, tmp_path):
    model = ("--model_name_or_path", trained["base"], "--output_path", tmp_path / "output")
    assert "--lora_alpha is for adapters" in refused(*model, "--lora_alpha", 8)
    assert "--merge_lora is for adapters" in refused(*model, "--merge_lora")
    one_file = ("--output_path", tmp_path / "a.bin")
    assert "an adapter is a folder" in refused(*model, "--lora_r", 4, *one_file)
    from_scratch = ("--model_name_or_path", SAMPLE_MODEL)
    assert "has no weights" in refused(*model, *from_scratch, "--lora_r", 4)
    itself = ("--output_path", trained["base"])
    assert "is the model's own" in refused(*model, *itself, "--lora_r", 4)
    assert "is the model's own" in refused(*model, *itself)
    weights = trained["base"] / "model.safetensors"
    assert "is the model's own" in refused(*model, "--output_path", weights)

    # Nor is an adapter of use beside weights that only this project reads
    wrapped = shutil.copytree(trained["base"], tmp_path / "wrapped")
    tensors = {f"module.{name}": tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, wrapped / "model.safetensors", {"format": "pt"})
    beside = (*model, "--model_name_or_path", wrapped, "--lora_r", 4)
    assert "PEFT do not read the weights" in refused(*beside)
    train(tmp_path / "merged", *beside[4:], "--merge_lora", "--max_train_steps", 1)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert all(parameter.isfinite().all() for parameter in whole.parameters())
    adapter = ("--lora_adapter", trained["output"])
    assert "--lora_r is the adapter's own" in refused(*model, *adapter, "--lora_r", 8)
    assert "adapter_config.json cannot be read" in refused(*model, "--lora_adapter", tmp_path)

    fields = json.loads((trained["output"] / "adapter_config.json").read_text())
    changes = {
        "use_dora": (True, "use_dora is true"),
        "modules_to_save": (["lm_head"], 'modules_to_save is ["lm_head"]'),
        "bias": ("all", 'bias is "all"'),
        "rank_pattern": ({"fc1": 2}, "rank_pattern is"),
        "init_lora_weights": ("pissa", 'init_lora_weights is "pissa"'),
        "peft_type": ("IA3", 'peft_type is "IA3"'),
        "r": (8, "is (4, 128), and in this model (8, 128)"),
        "lora_alpha": ("much", "r, lora_alpha, lora_dropout or use_rslora"),
    }
    tensors = load_file(trained["output"] / "adapter_model.safetensors")
    for i, (field, (value, said)) in enumerate(changes.items()):
        folder = tmp_path / f"changed{i}"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(fields | {field: value}))
        save_file(tensors, folder / "adapter_model.safetensors")
        assert said in refused(*model, "--lora_adapter", folder)
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    lost = tensors.popitem()[0]
    save_file(tensors, folder / "adapter_model.safetensors")
    assert f"lacks {lost}" in refused(*model, "--lora_adapter", folder)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "k_proj", "v_proj"], ["fc2"]])
def test_flops_are_what_pytorch_counts(targets):
    """Of plain transformers with PEFT: none for weights' gradients, and before the first adapter no
    backward."""
    sizes = {"vocab_size": 512, "hidden_size": 64, "ffn_dim": 256, "num_hidden_layers": 2}
    narrow = {"word_embed_proj_dim": 32, "do_layer_norm_before": False}
    config = OPTConfig(**sizes, **narrow, num_attention_heads=4, max_position_embeddings=128)
    config._attn_implementation = "eager"  # whose products are counted on every device
    names = [*TARGETS] if targets == "all-linear" else targets
    model = get_peft_model(OPTForCausalLM(config), LoraConfig(r=8, target_modules=names))
    length, lora = 128, Lora(8, 8, 0.0, tuple(names), False)
    ids = torch.randint(4, 512, (2, length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    counts = counter.get_flop_counts()["Global"]
    # Eager attention computes the whole square, see tests/test_benchmark.py.
    counts[torch.ops.aten.bmm] *= (length + 1) / (2 * length)
    counted = sum(counts.values()) / ids.numel()
    assert flops_per_token(config, length, lora) == pytest.approx(counted, rel=0.01)

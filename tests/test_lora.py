"""LoRA is PEFT's: the same steps under every plugin, files that either reads; and what it costs."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from opt.data.batches import collate

from .conftest import REPO, run
from .test_parity import random_model, rows  # noqa: F401  (a fixture)

HYBRID = ("--plugin", "hybrid_parallel")
ZERO = ("--plugin", "low_level_zero")
SETTINGS = {
    1: {
        "gemini": ("--plugin", "gemini"),
        "hybrid_parallel": HYBRID,
        "torch_ddp, bf16": ("--precision", "bf16"),
    },
    2: {
        "torch_ddp": (),
        "low_level_zero": ZERO,
        "low_level_zero, bf16": (*ZERO, "--precision", "bf16"),
        "gemini": ("--plugin", "gemini"),
        "gemini for accumulation": ("--plugin", "gemini", "--gradient_accumulation_steps", 2),
        "tp=2": (*HYBRID, "--tp_size", 2),
        "pp=2": (*HYBRID, "--pp_size", 2),
    },
    4: {
        "tp=2 x pp=2": (*HYBRID, "--tp_size", 2, "--pp_size", 2),
        "tp=2 x dp=2, ZeRO": (*HYBRID, "--tp_size", 2, "--zero_stage", 1, "--precision", "bf16"),
        "tp=2 x dp=2, bf16": (*HYBRID, "--tp_size", 2, "--precision", "bf16"),
        "pp=2 x dp=2": (*HYBRID, "--pp_size", 2),
    },
    "compiled": {"low_level_zero": (*ZERO, "--compile")},
}
STEPS, RATE = 20, 1e-2


def batch_of(peft) -> dict:
    """All rows, as transformers takes them."""
    return peft["batch"] | {"attention_mask": (peft["batch"]["labels"] != -100).long()}


@pytest.fixture(scope="module")
def peft(tmp_path_factory, rows):  # noqa: F811
    """A base model, an adapter of PEFT's whose B is not zero, and twenty steps of PEFT's."""
    base, adapter = (tmp_path_factory.mktemp(name) for name in ("base", "adapter"))
    torch.manual_seed(0)
    random_model(vocab_size=1003, dropout=0.0).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    settings = {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": targets}
    model = get_peft_model(model, LoraConfig(**settings, task_type="CAUSAL_LM"))
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    model.save_pretrained(adapter)
    adam = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01)
    batch = collate([rows[i] for i in range(len(rows))], len(rows), int(rows.lengths.max()), 1)
    losses, norms = [], []
    for _ in range(STEPS):
        loss = model(**batch_of({"batch": batch})).loss
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(trained, 1.0).item())
        adam.step()
        adam.zero_grad()
    after = tmp_path_factory.mktemp("after")
    model.save_pretrained(after)
    tensors = load_file(after / "adapter_model.safetensors")
    before = load_file(adapter / "adapter_model.safetensors")
    return {
        "base": base,
        "adapter": adapter,
        "batch": batch,
        "losses": losses,
        "norms": norms,
        "tensors": tensors,
        "moved": {name: (t - before[name]).norm().item() for name, t in tensors.items()},
    }


@pytest.mark.parametrize(
    "setting",
    [1, 2, *(pytest.param(setting, marks=pytest.mark.long) for setting in (4, "compiled"))],
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
        is_fp32 = not any(word in name for word in ("bf16", "gemini", "ZeRO"))
        loss, norm, distance = (1e-4, 2e-3, 5e-3) if is_fp32 else (0.1, 0.5, 0.7)
        assert found["losses"] == pytest.approx(peft["losses"], abs=loss), name
        assert found["norms"] == pytest.approx(peft["norms"], rel=norm), name
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        assert tensors.keys() == peft["tensors"].keys()
        for key, tensor in tensors.items():
            off = (tensor.float() - peft["tensors"][key]).norm().item()
            assert off < distance * peft["moved"][key], (name, key, off)
        reads = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(peft["base"]), tmp_path / name
        )
        with torch.no_grad():
            after = reads.eval()(**batch_of(peft)).loss.item()
        # In bf16 the base model that PEFT reads is the more precise one
        assert after == pytest.approx(found["evaluated"], abs=1e-4 if is_fp32 else 0.02), name

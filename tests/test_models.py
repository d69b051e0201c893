"""Model folders as people have them: which are trained, with what loss, which are refused, and what
is left of them in the export."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from opt.data import tokens

from .conftest import REPO, SAMPLE_MODEL, metrics, run
from .hub import serving
from .test_bad_input import assert_refused

TEXTS = [f"A ferry crosses the river {i} times, and nobody is on it." for i in range(12)]
SETTINGS = {
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "do_sample": True,
    "top_k": 12,
    "temperature": 0.7,
}


@pytest.fixture(scope="module")
def model() -> OPTForCausalLM:
    """Two layers, wide enough that another head, another embedding or another text shows in the
    loss."""
    torch.manual_seed(5)
    sizes = dict(
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    made = OPTForCausalLM(OPTConfig.from_pretrained(SAMPLE_MODEL, init_std=0.12, **sizes)).eval()
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.05)
    return made


@pytest.fixture(scope="module")
def state(model) -> dict:
    """Its weights, the tied head left out."""
    return {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }


@pytest.fixture
def folder(tmp_path, model):
    """Makes a folder of config.json, tokenizer and these files: bytes, tensors, or an object for
    JSON or torch.save."""

    def make(files: dict, at="model", **config) -> Path:
        place = tmp_path / at
        place.mkdir(parents=True)
        for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copy(SAMPLE_MODEL / file, place)
        (place / "config.json").write_text(json.dumps(model.config.to_dict() | config))
        for name, content in files.items():
            file = place / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                file.write_bytes(content)
            elif name.endswith(".safetensors"):
                save_file(content, file, metadata={"format": "pt"})
            elif name.endswith(".json"):
                file.write_text(json.dumps(content))
            else:
                torch.save(content, file)
        return place

    return make


@pytest.fixture(scope="module")
def expected(model) -> float:
    """Plain transformers' loss of TEXTS, all targets alike."""
    tokenizer, total, targets = tokens.load_tokenizer(SAMPLE_MODEL), 0.0, 0
    with torch.no_grad():
        for text in TEXTS:
            ids = torch.tensor([[2, *tokenizer(text, add_special_tokens=False)["input_ids"], 2]])
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            targets += ids.shape[1] - 1
    return total / targets


def train(model, tmp_path, *flags, env=None):
    """One step of opt_train_demo.py on TEXTS, in one batch; the model is saved to `out`."""
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    given = (
        "--model_name_or_path",
        model,
        "--dataset",
        tmp_path / "texts.txt",
        "--output_path",
        tmp_path / "out",
        "--eval_fraction",
        0,
    )
    flags = ("--batch_size", len(TEXTS), "--max_train_steps", 1, "--dropout", 0, *flags)
    return run(
        REPO / "opt_train_demo.py", *given, *flags, env={"CUDA_VISIBLE_DEVICES": ""} | (env or {})
    )


def first_loss(done, tmp_path) -> float:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return metrics(tmp_path / "out")[0]["loss"]


# ---- weights in a form that is not read

LORA = {"base_model.model.model.decoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)}
UNREAD = {
    "GPTQ": (
        {"gptq_model-4bit-128g.safetensors": LORA},
        ["gptq_model-4bit-128g.safetensors", "quantized", "original"],
    ),
    "GGUF": ({"opt-350m.Q4_K_M.gguf": b"GGUF"}, ["opt-350m.Q4_K_M.gguf", "quantized", "original"]),
    "flax": ({"flax_model.msgpack": bytes(99)}, ["flax_model.msgpack", "from_flax=True"]),
    "TensorFlow": ({"tf_model.h5": bytes(99)}, ["tf_model.h5", "from_tf=True"]),
    "adapter": (
        {"adapter_model.safetensors": LORA, "adapter_config.json": {"r": 4}},
        ["adapter_model.safetensors", "merge"],
    ),
    "adapter.bin": ({"adapter_model.bin": LORA}, ["adapter_model.bin", "merge"]),
    "DeepSpeed": (
        {"latest": b"global_step1", "global_step1/mp_rank_00_model_states.pt": {}},
        ["global_step1/mp_rank_00_model_states.pt", "zero_to_fp32"],
    ),
    "FSDP": (
        {"pytorch_model_fsdp_0/__0_0.distcp": bytes(99)},
        ["pytorch_model_fsdp_0/__0_0.distcp", "join"],
    ),
    "metaseq": ({"restored.pt": {}}, ["restored.pt", "convert"]),
    "metaseq's shards": ({"reshard-model_part-0.pt": {}}, ["reshard-model_part-0.pt", "convert"]),
    "another name": (
        {"finetuned.safetensors": LORA},
        ["finetuned.safetensors", "rename it to model.safetensors"],
    ),
    "another name.bin": ({"opt.bin": LORA}, ["opt.bin", "rename it to pytorch_model.bin"]),
    "a variant": ({"model.fp16.safetensors": LORA}, ["model.fp16.safetensors", "rename it"]),
    "Lightning": ({"epoch=3-step=100.ckpt": {}}, ["epoch=3-step=100.ckpt", "convert"]),
    "ONNX": ({"onnx/decoder_model.onnx": bytes(99)}, ["onnx/decoder_model.onnx", "convert"]),
    "a checkpoint inside": (
        {"checkpoint-500/model.safetensors": LORA},
        ["checkpoint-500/model.safetensors", "give checkpoint-500/ itself"],
    ),
    "GPTQ by name of its tensors": (
        {
            "model.safetensors": {
                "model.decoder.layers.0.fc1.qweight": torch.ones(4, 4, dtype=torch.int32)
            }
        },
        ["fc1.qweight", "quantized"],
    ),
}


@pytest.mark.parametrize("form", UNREAD)
def test_weights_that_are_not_read_are_named(folder, tmp_path, form):
    """Not trained from scratch in their place."""
    files, says = UNREAD[form]
    assert_refused(train(folder(files), tmp_path, "--dry_run"), str(tmp_path / "model"), *says)


def test_from_scratch_only_without_weights(folder, tmp_path):
    """What else lies in a model's folder is none."""
    others = {
        "training_args.bin": {},
        "optimizer.pt": {},
        "rng_state_0.pth": {},
        "vocab.txt": b"",
        "README.md": b"",
        "tokenizer.bin": b"",
    }
    done = train(folder(others), tmp_path, "--dry_run")
    assert done.returncode == 0 and "it trains from scratch" in done.stdout, done.stderr


def test_weights_in_folders_beside_the_model_are_not_its_own(folder, tmp_path, state, expected):
    """On the Hub and here: a checkpoint in a folder is another model."""
    nested = {
        "pytorch_model.bin": state,
        "last-checkpoint/model.safetensors": {"x": torch.ones(1)},
        "last-checkpoint/config.json": {},
    }
    folder(nested, at="hub/models/acme/trained")
    with serving(tmp_path / "hub") as hub:
        done = train("acme/trained", tmp_path, env=hub.environment(tmp_path / "home"))
    assert first_loss(done, tmp_path) == pytest.approx(expected, abs=1e-4)
    shutil.rmtree(tmp_path / "out")
    done = train(tmp_path / "hub" / "models" / "acme" / "trained", tmp_path)
    assert first_loss(done, tmp_path) == pytest.approx(expected, abs=1e-4)


def test_a_repository_of_weights_that_are_not_read(folder, tmp_path):
    """Which are not even downloaded."""
    folder({"tf_model.h5": bytes(99)}, at="hub/models/acme/tf-only")
    with serving(tmp_path / "hub") as hub:
        done = train("acme/tf-only", tmp_path, env=hub.environment(tmp_path / "home"))
        assert_refused(done, "acme/tf-only", "tf_model.h5", "from_tf=True")
        assert not [request for request in hub.requests if "tf_model.h5" in request]


# ---- the output projection


def test_an_untied_head_is_not_dropped(folder, tmp_path, state):
    """Neither where config.json says so, nor where it was made to say that it is tied."""
    untied = state | {"lm_head.weight": state["model.decoder.embed_tokens.weight"] + 0.1}
    done = train(folder({"model.safetensors": untied}, tie_word_embeddings=False), tmp_path)
    assert_refused(done, "tie_word_embeddings", "lm_head", "not supported")
    assert "set it to true" not in done.stderr
    done = train(folder({"model.safetensors": untied}, at="tied"), tmp_path)
    assert_refused(done, "tied/model.safetensors", "lm_head.weight is not the embedding")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_head_that_is_the_embedding_is(folder, tmp_path, state, expected, dtype):
    """As torch.save writes it of a state_dict()."""
    whole = {name: tensor.to(dtype) for name, tensor in state.items()}
    whole["lm_head.weight"] = whole["model.decoder.embed_tokens.weight"]
    done = train(folder({"pytorch_model.bin": whole}), tmp_path)
    assert first_loss(done, tmp_path) == pytest.approx(
        expected, abs=1e-4 if dtype is torch.float32 else 1e-2
    )


# ---- the end of a run, and what it exports


def without(name: str) -> dict:
    """The sample's tokenizer files without one of its special tokens."""
    contents = {
        file: json.loads((SAMPLE_MODEL / file).read_text())
        for file in ("tokenizer_config.json", "special_tokens_map.json")
    }
    return {
        file: {key: value for key, value in content.items() if key != name}
        for file, content in contents.items()
    }


def test_samples_without_a_start_token(folder, tmp_path, state):
    done = train(folder({"model.safetensors": state} | without("bos_token")), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n  - ") == 3


def test_samples_no_longer_than_the_positions(folder, tmp_path, state):
    place = "model.decoder.embed_positions.weight"
    short = state | {place: state[place][:42].clone()}
    done = train(
        folder({"model.safetensors": short}, max_position_embeddings=40),
        tmp_path,
        "--max_length",
        40,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n  - ") == 3


def test_samples_that_fail_do_not_fail_the_run(folder, tmp_path, state):
    """A generation_config.json that transformers cannot generate by."""
    done = train(
        folder(
            {"model.safetensors": state, "generation_config.json": SETTINGS | {"num_beams": "many"}}
        ),
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "saved the model" in done.stdout
    assert (
        "no descriptions that it writes: " in done.stdout
        and "Traceback" not in done.stdout + done.stderr
    )


def test_the_export_keeps_what_the_model_had(folder, tmp_path, state, expected):
    """generation_config.json to the byte, dropout as it was, and no quantization that there is none
    of."""
    files = {"model.safetensors": state, "generation_config.json": SETTINGS}
    done = train(
        folder(
            files,
            quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128},
            dropout=0.1,
        ),
        tmp_path,
    )
    assert first_loss(done, tmp_path) == pytest.approx(expected, abs=1e-4)
    assert "quantization_config in config.json is left out" in done.stdout
    given, written = tmp_path / "model", tmp_path / "out"
    assert (written / "generation_config.json").read_bytes() == (
        given / "generation_config.json"
    ).read_bytes()
    config = json.loads((written / "config.json").read_text())
    assert config["dropout"] == 0.1 and "quantization_config" not in config
    assert AutoModelForCausalLM.from_pretrained(written).generation_config.top_k == 12

    # Into the same folder, from a model that has none: what is there is not this model's.
    (given / "generation_config.json").unlink()
    assert train(given, tmp_path).returncode == 0
    assert not (written / "generation_config.json").exists()

"""Model folders as people have them: which are trained, with what loss, which are refused, and what
is left of them in the export."""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from args import Settings
from opt.data import tokens
from opt.errors import UserError
from opt.model import weights
from opt.model.config import load_config
from opt.model.opt import meta_model
from opt.model.weights import HEAD
from opt.train import checkpoints, checks

from .conftest import REPO, SAMPLE_MODEL, finish, metrics, on_the_sample, run, start
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
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "acme/trained" and card.data.library_name == "transformers"
    loss = f"{first_loss(done, tmp_path):.4f}"
    assert card.text.count(loss) == 1  # of one step, which is the first and the last
    for part in ("A fine-tune of acme/trained", "torch_ddp", "--dropout 0", "torch 2."):
        assert part in card.text
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


def test_a_head_that_would_be_dropped_is_refused(folder, tmp_path, state):
    """Where config.json says that it is tied; or that it is not, and there is none."""
    other = state["model.decoder.embed_tokens.weight"] + 0.1
    with pytest.raises(UserError, match=r"model/model.safetensors: lm_head.weight is not the emb"):
        opened(folder({"model.safetensors": state | {HEAD: other}}))
    with pytest.raises(UserError, match="lm_head.weight is not the embedding"):
        opened(folder({"model.safetensors": state | {HEAD: other[:9]}}, at="short"))
    with pytest.raises(UserError, match="lack lm_head.weight.*tie_word_embeddings is false"):
        opened(folder({"model.safetensors": state}, at="none", tie_word_embeddings=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_head_that_is_the_embedding_is(folder, tmp_path, state, expected, dtype):
    """As torch.save writes it of a state_dict()."""
    whole = {name: tensor.to(dtype) for name, tensor in state.items()}
    whole["lm_head.weight"] = whole["model.decoder.embed_tokens.weight"]
    done = train(folder({"pytorch_model.bin": whole}), tmp_path)
    assert first_loss(done, tmp_path) == pytest.approx(
        expected, abs=1e-4 if dtype is torch.float32 else 1e-2
    )


def test_an_untied_head_is_resumed_on_other_processes(folder, tmp_path, state):
    """Saved by one process, taken up by two that cut the vocabulary: the same losses."""
    torch.manual_seed(1)
    untied = state | {HEAD: torch.randn_like(state["model.decoder.embed_tokens.weight"]) * 0.1}
    model = folder({"model.safetensors": untied}, tie_word_embeddings=False)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    given = ("--model_name_or_path", model, "--dataset", tmp_path / "texts.txt", "--dropout", 0)
    given += ("--batch_size", 4, "--num_epoch", 2, "--learning_rate", 1e-2, "--eval_fraction", 0)
    script, env = REPO / "opt_train_demo.py", {"CUDA_VISIBLE_DEVICES": ""}
    flags = ("--save_steps", 3, "--output_path", tmp_path / "one")
    done = run(script, *given, *flags, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    saved = tmp_path / "one" / "checkpoints" / "step-00000003"
    flags = ("--plugin", "hybrid_parallel", "--tp_size", 2, "--resume", saved)
    flags += ("--output_path", tmp_path / "two")
    done = run(script, *given, *flags, nproc=2, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = ([line["loss"] for line in metrics(tmp_path / at)] for at in ("one", "two"))
    assert len(one) == 6 and one[0] - one[-1] > 0.2
    assert two == pytest.approx(one, abs=1e-4)
    heads = [load_file(tmp_path / at / "model.safetensors")[HEAD] for at in ("one", "two")]
    assert torch.allclose(*heads, atol=1e-3) and not torch.allclose(
        heads[0], untied[HEAD], atol=1e-2
    )
    tied = folder({"model.safetensors": state}, at="tied")
    checkpoint = checkpoints.find(str(saved), tmp_path)
    rows = SimpleNamespace(checksum=checkpoint.state["data"])
    plan = Settings(**checkpoint.state["arguments"])
    checkpoints.check_same_run(checkpoint, plan, opened(model), rows)
    with pytest.raises(UserError, match="of another model.*lm_head.weight"):
        checkpoints.check_same_run(checkpoint, plan, opened(tied), rows)


def test_a_head_that_stands_for_the_embedding(folder, state):
    """safetensors' save_model writes one of two names of a tensor, the first by the alphabet."""
    one = dict(state)
    one[HEAD] = one.pop("model.decoder.embed_tokens.weight")
    contents = opened(folder({"model.safetensors": one}))
    assert_holds(contents, state)
    assert "taken for the embedding" in " ".join(contents.notes)


# ---- names, and what is beside the model's tensors


def opened(folder):
    config = load_config(folder)
    return weights.open_weights(folder, meta_model(config), seed=0)


def assert_holds(contents, state):
    assert {*contents} == {*state}
    for name, tensor in state.items():
        assert torch.equal(contents[name], tensor), name
        positions, values = contents.sample(name)
        assert torch.equal(tensor.flatten()[positions], values), name


def under(prefix: str):
    return lambda state: {f"{prefix}{name}": tensor for name, tensor in state.items()}


def bare(state: dict) -> dict:
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


def compiled_layers(state: dict) -> dict:
    return {
        re.sub(r"(layers\.\d+)\.", r"\1._orig_mod.", name): tensor for name, tensor in state.items()
    }


PREFIXES = {
    "module.": under("module."),
    "_orig_mod.": under("_orig_mod."),
    "module._orig_mod.": under("module._orig_mod."),
    "base_model.model.": under("base_model.model."),
    "model.": under("model."),
    "_fsdp_wrapped_module.": under("_fsdp_wrapped_module."),
    "rwtransformer.": lambda state: under("rwtransformer.")(bare(state)),
    "transformer.": under("transformer."),
    "pretrained_model.": under("pretrained_model."),
    "module.module.": lambda state: under("module.module.")(bare(state)),
    "_orig_mod. layers": compiled_layers,
}


@pytest.mark.parametrize("case", PREFIXES)
@pytest.mark.parametrize("head", ["no head", "head"])
def test_a_prefix_too_much_is_left_out_and_told(folder, state, case, head):
    """Of the head too, which some write and some do not."""
    whole = state | ({HEAD: state["model.decoder.embed_tokens.weight"]} if head == "head" else {})
    contents = opened(folder({"pytorch_model.bin": PREFIXES[case](whole)}))
    assert_holds(contents, state)
    for part in case.split(" ")[0].rstrip(".").split("."):
        assert f"{part}" in " ".join(contents.notes) and "too much" in " ".join(contents.notes)


ONE = torch.ones(1)
NO_USE = {
    "decoder.version": ONE,
    "model.decoder.version": ONE,
    "score.weight": torch.ones(2, 32),
    "qa_outputs.weight": torch.ones(2, 32),
    "qa_outputs.bias": torch.ones(2),
    "v_head.summary.weight": ONE,
    "classifier.weight": ONE,
    "model.decoder.layers.0.self_attn.bias": ONE,
    "model.decoder.layers.1.self_attn.masked_bias": ONE,
    "model.decoder.layers.0.self_attn.rotary_emb.inv_freq": ONE,
    "model.decoder.embed_positions._float_tensor": ONE,
}


@pytest.mark.parametrize("name", NO_USE)
def test_a_tensor_of_no_use_is_named_and_left_out(folder, state, name):
    contents = opened(folder({"model.safetensors": state | {name: NO_USE[name]}}))
    assert_holds(contents, state)
    assert f"{name} left out" in " ".join(contents.notes)


NESTED = {
    "model": lambda state: {"model": state},
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"state": {}}},
    "module": lambda state: {"module": bare(state), "global_steps": 1, "dp_world_size": 2},
    "model_state_dict": lambda state: {"model_state_dict": state, "loss": 2.5, "args": None},
    "state_dict.model": lambda state: {"state_dict": {"model": state}},
    "a step beside": lambda state: {"model": state, "step": torch.tensor(3)},
    "a number among them": lambda state: state | {"step": 3, "name": "opt"},
}


@pytest.mark.parametrize("case", NESTED)
def test_tensors_under_a_key_are_read_and_told(folder, state, case):
    contents = opened(folder({"pytorch_model.bin": NESTED[case](state)}))
    assert_holds(contents, state)
    key = {"a step beside": "model", "a number among them": "step, name left out"}.get(case, case)
    assert key in " ".join(contents.notes)


REFUSED = {
    "a key that nobody uses": (lambda s: {"net": s}, ["pytorch_model.bin", "net", "save"]),
    "two models": (lambda s: {"model": s, "module": s}, ["pytorch_model.bin", "model, module"]),
    "two models by prefix": (
        lambda s: under("actor.")(s) | under("critic.")(s),
        ["actor.", "critic."],
    ),
    "one tensor twice": (
        lambda s: s | {"decoder.embed_tokens.weight": s["model.decoder.embed_tokens.weight"] + 1},
        ["two tensors for model.decoder.embed_tokens.weight"],
    ),
    "an adapter in it": (
        lambda s: (
            under("base_model.model.")(s)
            | {"base_model.model.model.decoder.layers.0.fc1.lora_A.default.weight": ONE}
        ),
        ["fc1.lora_A.default.weight", "merge_and_unload"],
    ),
    "an adapter's base": (
        lambda s: {re.sub(r"fc1\.", "fc1.base_layer.", name): t for name, t in s.items()},
        ["base_layer", "merge_and_unload"],
    ),
    "Python objects": (
        lambda s: {"model": s, "args": argparse.Namespace(lr=1)},
        ["pytorch_model.bin", "Python objects"],
    ),
    "another tensor": (lambda s: s | {"model.decoder.extra.weight": ONE}, ["decoder.extra.weight"]),
    "no tensors": (lambda s: {"model": {"a": 1}}, ["pytorch_model.bin", "else than tensors"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_told_apart_is_refused(folder, state, case):
    change, says = REFUSED[case]
    with pytest.raises(UserError) as refused:
        opened(folder({"pytorch_model.bin": change(state)}))
    for part in says:
        assert part in str(refused.value)
    assert "download" not in str(refused.value) or case == "no tensors"


# ---- tokenizers


def of_chat() -> dict:
    """What DeepSpeed-Chat leaves of a tokenizer: no word of special tokens."""
    bpe = json.loads((SAMPLE_MODEL / "tokenizer.json").read_text())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]]
    return {
        "vocab.json": bpe["vocab"],
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
    }


TOKENIZERS = {  # files, changes of config.json, what is told of
    "no start": (lambda: without("bos_token"), {}, "bos_token </s> (2)"),
    "no end": (lambda: without("eos_token"), {}, "eos_token </s> (2)"),
    "neither": (
        lambda: without("bos_token", "eos_token"),
        {},
        "bos_token </s> (2), eos_token </s> (2)",
    ),
    "no end, a list": (lambda: without("eos_token"), {"eos_token_id": [2, 50]}, "eos_token"),
    "a list": (lambda: {}, {"eos_token_id": [50, 2]}, None),
    "null": (lambda: {}, {"eos_token_id": None}, None),
    "no start at all": (lambda: {}, {"bos_token_id": None}, None),
    "DeepSpeed-Chat": (of_chat, {}, "bos_token </s> (2), eos_token </s> (2)"),
    "DeepSpeed-Chat, room for more": (of_chat, {"vocab_size": 2056}, "eos_token </s> (2)"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_special_tokens_are_those_of_config_json(folder, case):
    """Text, start and end come out as of the tokenizer that has them."""
    make, changes, said = TOKENIZERS[case]
    place = folder(make(), **changes)
    if "merges.txt" in make():
        for file in place.glob("*token*"):
            file.unlink()
    tokenizer, told = checks.load_tokenizer(place, load_config(place))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (2, 2)
    wanted = tokens.load_tokenizer(SAMPLE_MODEL)
    for text in TEXTS[:2]:
        ids = wanted(text, add_special_tokens=False)["input_ids"]
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    assert max(tokenizer.get_vocab().values()) < 2048
    assert said in told if said else not told


def test_a_tokenizer_that_ends_otherwise_is_refused(folder):
    for number, (files, changes, says) in enumerate(
        (
            ({}, {"eos_token_id": 7}, "ends a text with token 2, its config.json's .* is 7"),
            ({}, {"eos_token_id": [7, 8]}, r"is \[7, 8\]"),
            (without("eos_token"), {"eos_token_id": None}, "special_tokens_map.json"),
            ({}, {"vocab_size": 1000}, "2048 tokens, its config.json's vocabulary 1000"),
        )
    ):
        place = folder(files, at=str(number), **changes)
        with pytest.raises(UserError, match=says):
            checks.load_tokenizer(place, load_config(place))


# ---- the end of a run, and what it exports


def without(*names: str) -> dict:
    """The sample's tokenizer files without some of its special tokens."""
    contents = {
        file: json.loads((SAMPLE_MODEL / file).read_text())
        for file in ("tokenizer_config.json", "special_tokens_map.json")
    }
    return {
        file: {key: value for key, value in content.items() if key not in names}
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


def test_samples_without_a_place_to_be_printed(tmp_path):
    """Some that start programs close their stdout."""
    closed = [*("bash", "-c", 'exec "$0" "$@" >&-'), sys.executable]
    flags = (*on_the_sample(tmp_path), "--max_train_steps", 1)
    done = finish(start(REPO / "opt_train_demo.py", *flags, launcher=closed), 100)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.safetensors").is_file()


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

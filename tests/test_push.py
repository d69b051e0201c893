"""What becomes of the trained model: what it writes after a prompt, and its upload to the Hub."""

import signal
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers

from opt.errors import UserError
from opt.train import hub as push_to_hub

from .conftest import REPO, SAMPLE_DATA, SAMPLE_MODEL, finish, run, start, train
from .hub import TOKEN, serving

PROMPTS = ["A young detective", "When the war"]


def test_prompts_and_upload(tmp_path):
    """The model that is on the Hub is the one that was written, and writes what was shown."""
    with serving(tmp_path / "hub") as hub:
        env = hub.environment(tmp_path / "home") | {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        output = tmp_path / "output"
        output.mkdir()
        (output / "private.txt").write_text("not the model's")
        flags = ("--max_train_steps", 2, "--save_steps", 1, "--push_to_hub", "lab/new")
        prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
        done = train(output, *flags, *prompts, env=env)
        assert f"uploaded the model to {hub.url}/lab/new" in done.stdout, done.stderr[-3000:]
        there = hub.repository("models", "lab/new")
        names = {path.name for path in there.rglob("*") if path.is_file()}
        assert {"model.safetensors", "config.json", "tokenizer.json", "metrics.jsonl"} <= names
        assert "private.txt" not in names and "state.json" not in names
        for name in names:
            assert (there / name).read_bytes() == (output / name).read_bytes(), name

        shown = [line for line in done.stdout.splitlines() if " -> " in line]
        model = transformers.AutoModelForCausalLM.from_pretrained(there)
        tokenizer = transformers.AutoTokenizer.from_pretrained(there)
        torch.manual_seed(0)
        for prompt, line in zip(PROMPTS, shown, strict=True):
            ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False).input_ids]
            written = model.generate(
                torch.tensor([ids]), do_sample=True, top_k=50, top_p=0.9, max_new_tokens=60
            )
            text = tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True)
            assert line == f"  - {prompt} -> {' '.join(text.split())}"


def test_a_signal_during_the_upload_ends_it(tmp_path):
    """The model is saved by then: nothing waits for a second one."""
    with serving(tmp_path / "hub") as hub:
        env = hub.environment(tmp_path / "home") | {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        flags = ("--max_train_steps", 2, "--push_to_hub", "lab/new", "--output_path", tmp_path)
        given = ("--model_name_or_path", SAMPLE_MODEL, "--dataset", SAMPLE_DATA)
        process = start(REPO / "opt_train_demo.py", *given, *flags, env=env)

        def await_request(part):
            until = time.monotonic() + 90
            while not hub.requests or part not in hub.requests[-1]:
                assert process.poll() is None and time.monotonic() < until, hub.requests
                time.sleep(0.02)

        await_request("/api/repos/create")
        hub.mode = "silent"
        await_request("/api/models/lab/new/tree/main")
        process.send_signal(signal.SIGINT)
        done = finish(process, timeout=10)
        assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.splitlines()[-1].endswith("SIGINT: stopped at once")
        assert "saved the model" in done.stdout and "stopped after step" not in done.stdout
        hub.stopped.set()


def test_a_signal_after_the_last_step():
    """It is known when all is saved, be it that moment; and another one does what it does
    anywhere."""
    code = """
import os, signal, time
from opt.colossal import processes
from opt.train.signals import Control
control = Control(processes.place())
os.kill(os.getpid(), signal.SIGUSR1)
print(control.close().name, flush=True)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(5)
"""
    done = run("-c", code)
    assert (done.stdout, done.returncode) == ("SIGUSR1\n", -signal.SIGTERM), done.stderr


def test_uploading_over_another_model_and_refusals(tmp_path, monkeypatch, capsys):
    """Shards and adapters of the model before go, other files stay; what is wrong with token or
    repository is said before training; a Hub that fails after it is a line."""
    with serving(tmp_path / "hub") as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        old = hub.repository("models", "lab/old")
        old.mkdir(parents=True)
        adapter = ("adapter_config.json", "adapter_model.safetensors")  # which loaders would follow
        for name in ("model-00001-of-00002.safetensors", "notes.txt", *adapter):
            (old / name).write_text("of another model")
        output = tmp_path / "output"
        output.mkdir()
        (output / "model.safetensors").write_text("new")
        given = {"output_path": str(output), "run_name": None, "hub_private_repo": False}
        plan = SimpleNamespace(push_to_hub="lab/old", dry_run=True, **given)
        push_to_hub.check(plan)
        push_to_hub.push(plan)
        assert {path.name for path in old.iterdir()} == {"model.safetensors", "notes.txt"}

        hub.mode = "error"
        push_to_hub.push(plan)
        assert "not uploaded to lab/old" in capsys.readouterr().err
        with pytest.raises(UserError, match="cannot be reached"):
            push_to_hub.check(plan)
        hub.mode, plan.push_to_hub = "serve", "others/new"
        with pytest.raises(UserError, match="one of somebody, lab"):
            push_to_hub.check(plan)
        plan.push_to_hub, hub.role = "lab/new", "read"
        with pytest.raises(UserError, match="may only read"):
            push_to_hub.check(plan)
        monkeypatch.setenv("HF_TOKEN", "hf_nobodys")
        with pytest.raises(UserError, match="refuses"):
            push_to_hub.check(plan)
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        with pytest.raises(UserError, match="set HF_TOKEN"):
            push_to_hub.check(plan)
        assert not hub.repository("models", "lab/new").exists()

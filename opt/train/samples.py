"""What the trained model writes, read from where it was saved as any program would read it."""

import itertools
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from args import is_one_file
from opt.errors import in_a_line
from opt.model import lora
from opt.train.plan import Run


def show(run: Run) -> None:
    """Print what the saved model writes after each --prompt, or three descriptions, or a line
    that says why there is nothing."""
    if run.plan.no_save or is_one_file(run.plan.output_path):
        return
    if run.plan.load_in_4bit:
        print(
            "no descriptions that it writes: the base model, of which there was never more than "
            "4 bits here, may not fit",
            flush=True,
        )
        return
    prompts = run.plan.prompt
    try:
        written = _write(run, prompts or [""] * 3)
        if prompts:
            _say("what it writes after each prompt:")
            for prompt, text in zip(prompts, written, strict=True):
                _say(f"  - {' '.join(prompt.split())} -> {' '.join(text.split())}")
        else:
            _say("three descriptions that it writes:")
            for text in written:
                _say(f"  - {' '.join(text.split())}")
    except Exception as error:  # the model is trained and saved: what it writes is for show
        _say(f"no descriptions that it writes: {in_a_line(error)}")


def _say(line: str) -> None:
    """Print it, of a terminal's or a file's characters those that it has."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # None: closed by who started it
    print(line.encode(encoding, "replace").decode(encoding), flush=True)


def _write(run: Run, prompts: list[str]) -> list[str]:
    """What comes after each of them. Equal ones are written together, as one batch."""
    tokenizer, device = run.setup.tokenizer, run.here.device
    is_adapter = lora.is_saved_alone(run.plan)
    saved = run.setup.directory if is_adapter else run.plan.output_path
    model = AutoModelForCausalLM.from_pretrained(saved, torch_dtype="auto")
    if is_adapter:
        lora.add_to(model, Path(run.plan.output_path))
    model = model.to(device).eval()
    torch.manual_seed(0)
    # In OPT they are the same.
    no_start = tokenizer.bos_token_id is None
    first = tokenizer.eos_token_id if no_start else tokenizer.bos_token_id
    texts = []
    for prompt, group in itertools.groupby(prompts):
        ids = [first, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        start = torch.tensor([ids] * len(list(group)), device=device)
        written = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            top_k=50,
            top_p=0.9,
            max_new_tokens=min(60, model.config.max_position_embeddings - len(ids)),
            pad_token_id=model.config.pad_token_id,
        )
        texts += tokenizer.batch_decode(written[:, len(ids) :], skip_special_tokens=True)
    return texts

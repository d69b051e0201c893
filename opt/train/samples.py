"""What the trained model writes, read from where it was saved as any program would read it."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from opt.model import lora
from opt.train.export import is_one_file
from opt.train.plan import Run


def show(run: Run, number: int = 3) -> None:
    """Print descriptions by the saved model, or a line that says why there are none."""
    if run.plan.no_save or is_one_file(run.plan.output_path):
        return
    try:
        written = _write(run, number)
    except Exception as error:  # the model is trained and saved: what it writes is for show
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
        print(f"no descriptions that it writes: {reason}", flush=True)
        return
    print("three descriptions that it writes:")
    for text in written:
        print(f"  - {' '.join(text.split())}", flush=True)


def _write(run: Run, number: int) -> list[str]:
    tokenizer, device = run.setup.tokenizer, run.here.device
    is_adapter = bool(run.plan.lora_r) and not run.plan.merge_lora
    saved = run.setup.directory if is_adapter else run.plan.output_path
    model = AutoModelForCausalLM.from_pretrained(saved, torch_dtype="auto")
    if is_adapter:
        lora.add_to(model, Path(run.plan.output_path))
    model = model.to(device).eval()
    torch.manual_seed(0)
    # In OPT they are the same.
    no_start = tokenizer.bos_token_id is None
    first = tokenizer.eos_token_id if no_start else tokenizer.bos_token_id
    start = torch.tensor([[first]] * number, device=device)
    written = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        top_k=50,
        top_p=0.9,
        max_new_tokens=min(60, model.config.max_position_embeddings - 1),
        pad_token_id=model.config.pad_token_id,
    )
    return tokenizer.batch_decode(written, skip_special_tokens=True)

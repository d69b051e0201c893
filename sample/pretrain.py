"""How sample/opt-tiny got its weights: pretrained on WordNet's glosses, on a GPU in two minutes.

    python sample/pretrain.py texts OUT.jsonl     the texts, from Debian's package wordnet-base
    python sample/pretrain.py train OUT.jsonl     trains on them, writes model.safetensors

WordNet 3.0 is Princeton University's, free to use (sample/opt-tiny/LICENSE.WordNet).
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SAMPLE = Path(__file__).resolve().parent
WORDNET = Path("/usr/share/wordnet")


def glosses():
    """What WordNet says of each of its 117,659 meanings: the definition, then examples, each a
    sentence."""
    for part in ("noun", "verb", "adj", "adv"):
        for line in (WORDNET / f"data.{part}").read_text().splitlines():
            if not line.startswith("  "):  # the licence
                yield line.split(" | ", 1)[1]


def as_text(gloss: str) -> str:
    """'a low wall; "he sat on it"' -> 'A low wall. He sat on it.'"""
    sentences = []
    for part in gloss.replace("; or ", " or ").split(";"):
        part = part.strip().strip('"').strip()
        if part:
            sentences.append(part[0].upper() + part[1:] + ("" if part[-1] in ".!?" else "."))
    return " ".join(sentences)


def write_texts(out: Path) -> None:
    if not WORDNET.is_dir():
        raise SystemExit(f"{WORDNET} is missing: apt-get install wordnet-base")
    texts = sorted(set(map(as_text, glosses())))
    random.Random(1).shuffle(texts)  # in the files, neighbours say nearly the same
    out.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def train(texts: Path) -> None:
    """From scratch, then in fp16 into sample/opt-tiny."""
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as folder:
        model, output = Path(folder) / "opt-tiny", Path(folder) / "output"
        shutil.copytree(SAMPLE / "opt-tiny", model, ignore=shutil.ignore_patterns("*.safetensors"))
        command = [sys.executable, "opt_train_demo.py", "--model_name_or_path", str(model)]
        command += ["--dataset", str(texts), "--block_size", "256", "--eval_fraction", "0.01"]
        command += ["--plugin", "low_level_zero", "--fused_loss", "--cuda_graph"]
        command += ["--batch_size", "64", "--num_epoch", "40", "--learning_rate", "3e-3"]
        command += ["--lr_scheduler_type", "cosine", "--warmup_steps", "300", "--dropout", "0"]
        command += ["--weight_decay", "0.05", "--seed", "1", "--output_path", str(output)]
        subprocess.run(command, cwd=SAMPLE.parent, check=True)
        weights = {name: t.half() for name, t in load_file(output / "model.safetensors").items()}
        save_file(weights, SAMPLE / "opt-tiny" / "model.safetensors", {"format": "pt"})
        shutil.copy(output / "metrics.jsonl", texts.with_suffix(".metrics.jsonl"))


if __name__ == "__main__":
    {"texts": write_texts, "train": train}[sys.argv[1]](Path(sys.argv[2]))

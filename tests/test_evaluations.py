"""What follows from held-out losses: the best model, an early end, an evaluation alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import OPTForCausalLM

from args import resolve, train_parser
from opt.data import tokens
from opt.data.batches import Batches
from opt.errors import UserError
from opt.train import checkpoints
from opt.train.evaluations import Evaluations

from .conftest import REPO, SAMPLE_MODEL, losses, metrics, run, tokenize, train

HYBRID = ("--plugin", "hybrid_parallel")
PATIENCE = 3
# At this rate the sample's model gets worse after some steps.
WORSE = (
    *("--learning_rate", 0.02, "--lr_scheduler_type", "constant", "--dropout", 0),
    *("--eval_steps", 1, "--eval_fraction", 0.2, "--max_train_steps", 12),
    *("--load_best_model_at_end", "--early_stopping_patience", PATIENCE),
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("".join(f"{'word ' * (n % 13 + 3)}number {n}\n" for n in range(160)))
    return file


def evaluated(output) -> dict[int, float]:
    return {line["step"]: line["eval_loss"] for line in metrics(output) if "eval_loss" in line}


def best_and_last(output) -> tuple[int, int]:
    found = evaluated(output)
    del found[0]
    return min(found, key=found.get), max(found)


def loss_of(model: Path, texts: Path) -> float:
    """transformers' own, on the held-out texts."""
    opt = OPTForCausalLM.from_pretrained(model, torch_dtype=torch.float32).eval()
    tokenizer = tokens.load_tokenizer(SAMPLE_MODEL)
    rows = tokenize(texts, "description", 512, 0.2, 42, tokenizer).held_out
    (batch,) = Batches(rows, len(rows), 0, 1, opt.config.pad_token_id, seed=None).epoch()
    real = (torch.arange(rows.longest) < torch.tensor(rows.lengths).unsqueeze(1)).long()
    with torch.no_grad():
        return opt(
            **batch.inputs, attention_mask=real[:, : batch.inputs["labels"].shape[1]]
        ).loss.item()


def long(*values):
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.mark.parametrize(
    "nproc, flags",
    [
        (2, ("--plugin", "low_level_zero", "--precision", "bf16")),
        (None, ("--plugin", "gemini")),
        long(2, ("--plugin", "gemini", "--offload_optim_frac", 1)),
        long(2, ("--plugin", "torch_ddp")),
        long(2, (*HYBRID, "--tp_size", 2, "--precision", "bf16")),
        long(4, (*HYBRID, "--tp_size", 2, "--pp_size", 2)),
        long(4, (*HYBRID, "--pp_size", 2, "--zero_stage", 1, "--precision", "bf16")),
    ],
    ids=["low_level_zero", "gemini alone", "gemini", "torch_ddp", "tp=2", "tp=2 x pp=2", "pp=2"],
)
def test_the_best_model_is_the_one_that_is_written(nproc, flags, texts, tmp_path):
    done = train(tmp_path, *WORSE, *flags, "--dataset", texts, "--batch_size", 8, nproc=nproc)
    best, last = best_and_last(tmp_path)
    assert best < last == best + PATIENCE and len(losses(tmp_path)) == last
    assert f"ended early, after step {last} of 12" in done.stdout
    assert f"saved are those after step {best}\n" in done.stdout
    found = evaluated(tmp_path)
    assert found[last] - found[best] > 0.05
    assert loss_of(tmp_path, texts) == pytest.approx(found[best], abs=0.02)
    card = (tmp_path / "README.md").read_text()
    assert f"The weights are those after step {best}, the best." in card
    assert f"| {best} | {found[best]:.4f} |" in card and f"| steps | {last} of 12 (" in card
    launcher = f"torchrun --nproc_per_node {nproc}" if nproc else "python"
    assert f"```bash\n{launcher} " in card


@pytest.fixture(scope="module")
def through(texts, tmp_path_factory) -> Path:
    """A run that is not stopped, but by its patience; a checkpoint a step, of which two stay."""
    output = tmp_path_factory.mktemp("through") / "output"
    flags = ("--dataset", texts, "--batch_size", 16, "--save_steps", 1)
    train(output, *WORSE, *flags, "--report_to", "wandb", env=fake_wandb(output.parent / "wandb"))
    return output


def fake_wandb(file: Path) -> dict:
    """The environment in which a stand-in of wandb writes into `file`."""
    variables = {"WANDB_PROJECT": "mine", "FAKE_WANDB_FILE": str(file)}
    return variables | {"PYTHONPATH": str(REPO / "tests" / "fake_wandb")}


def test_a_resumed_run_has_the_same_best_and_the_same_patience(through, texts, tmp_path):
    best, last = best_and_last(through)
    kept = sorted(path.name for path in (through / "checkpoints").glob("step-*"))
    assert kept == [f"step-{step:08d}" for step in (best, last - 1, last)]
    # Into another folder, so that the best one is elsewhere
    newest = through / "checkpoints" / f"step-{last - 1:08d}"
    flags = (*WORSE, "--dataset", texts, "--batch_size", 16, "--save_steps", 1)
    flags = (*flags, "--report_to", "wandb", "--run_name", "mine again")
    train(tmp_path / "resumed", *flags, "--resume", newest, env=fake_wandb(tmp_path / "wandb"))
    assert losses(tmp_path / "resumed") == losses(through)
    assert evaluated(tmp_path / "resumed") == evaluated(through)
    one, other = (load_file(f / "model.safetensors") for f in (through, tmp_path / "resumed"))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)

    # W&B has the same run, under the user's project, and each step with its number.
    first, second = (
        [json.loads(line) for line in file.read_text().splitlines()]
        for file in (through.parent / "wandb", tmp_path / "wandb")
    )
    assert first[0]["init"] == {"dir": str(through)} and first[0]["seed"] == 42
    given = {"dir": str(tmp_path / "resumed"), "id": "made-up", "resume": "allow"}
    assert second[0]["init"] == given | {"name": "mine again"}
    assert [line["step"] for line in first[1:-1]] == [line["step"] for line in metrics(through)]
    assert {line["step"] for line in second[1:-1]} == {last}
    assert second[-1] == {"finish": True} and second[1]["log"]["loss"] == losses(through)[-1]

    # Where the best one's checkpoint is gone, what was promised cannot be kept.
    shutil.copytree(newest, tmp_path / "alone" / newest.name)
    state = tmp_path / "alone" / newest.name / "state.json"
    content = json.loads(state.read_text())
    assert content["evaluations"]["best_step"] == best
    state.write_text(json.dumps(content | {"best": None}))
    assert checkpoints.Checkpoint.read(state.parent).has_lost_its_best
    assert not checkpoints.Checkpoint.read(newest).has_lost_its_best


def test_losses_of_other_texts_are_not_compared(through, texts, tmp_path):
    """Held-out texts that are easier: what the run had come to on the others says nothing about
    them."""
    output = shutil.copytree(through, tmp_path / "output")
    best, last = best_and_last(through)
    flags = (*WORSE, "--dataset", texts, "--batch_size", 16, "--save_steps", 1)
    flags += ("--max_eval_samples", 1, "--early_stopping_patience", 9, "--resume", "auto")
    assert last < 12
    done = train(output, *flags)
    assert "other texts are held out" in done.stdout
    found = {step: loss for step, loss in evaluated(output).items() if step > last}
    chosen = min(found, key=found.get)
    assert max(found) == 12 and f"saved are those after step {chosen}\n" in done.stdout
    assert checkpoints.find("auto", output).evaluations.best_step == chosen


def test_evaluation_alone_says_what_training_said(through, texts, tmp_path):
    best, _ = best_and_last(through)
    checkpoint = through / "checkpoints" / f"step-{best:08d}"
    flags = ("--dataset", texts, "--eval_fraction", 0.2, "--batch_size", 16)
    done = train(tmp_path, *flags, "--eval_only", "--resume", checkpoint)
    result = json.loads((tmp_path / "eval_results.json").read_text())
    assert result["step"] == best and result["eval_loss"] == evaluated(through)[best]
    assert f"step {best}: held-out loss {result['eval_loss']:.4f}" in done.stdout
    assert result["rows"] == 32 and result["model"] == str(checkpoint)
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert left == {"eval_results.json"}


def test_what_counts_as_better():
    evaluations = Evaluations()
    for step, loss in enumerate([2.0, float("nan"), 3.0, 2.5, 2.5, float("inf"), 2.6]):
        evaluations.add(step, loss)
    assert (evaluations.best_step, evaluations.best_loss) == (3, 2.5)
    assert evaluations.without_better == 3
    assert evaluations.are_enough(3) and not evaluations.are_enough(4)
    assert not evaluations.are_enough(None) and "given has 2.0000" in evaluations.describe()
    assert Evaluations(**json.loads(json.dumps(evaluations.state()))) == evaluations


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--load_best_model_at_end", "--no_save"], "--no_save writes none"),
        (["--load_best_model_at_end", "--eval_only"], "--eval_only writes none"),
        (["--eval_only", "--report_to", "wandb"], "leave out --report_to wandb"),
        (["--prompt", "a", "--no_save"], "--prompt is for a model that is written"),
        (["--push_to_hub", "a/b", "--eval_only"], "--push_to_hub is for a model"),
        (["--run_name", "a"], "--run_name is for --report_to"),
        (["--hub_private_repo"], "--hub_private_repo is for --push_to_hub"),
        (["--warmup_steps", "3", "--warmup_ratio", "0.1"], "give one of them"),
        (["--warmup_steps", "3", "--lr_scheduler_type", "constant"], "constant_with_warmup"),
    ],
)
def test_flags_without_use_are_refused(flags, said):
    with pytest.raises(UserError, match=said):
        resolve(train_parser().parse_args(flags), "cpu", False)


def test_nothing_to_evaluate_on(texts, tmp_path):
    flags = ("--model_name_or_path", SAMPLE_MODEL, "--dataset", texts, "--output_path", tmp_path)
    done = run(REPO / "opt_train_demo.py", *flags, "--eval_only", "--eval_fraction", 0, "--dry_run")
    assert done.returncode == 2 and "--eval_only needs held-out texts" in done.stderr

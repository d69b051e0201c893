"""Weights, in the layout that each plugin takes: found, read lazily, placed, and proven to be all
there.

facebook/opt-* on the Hub ship fp16 .bin files with the base model's names (`decoder.…`) and without
the tied `lm_head.weight`; save_pretrained writes `model.decoder.…`, others the whole state dict;
any of them in one file or in shards. [F10] ColossalAI 0.5.0's own loading takes some of these under
some plugins, and trains on garbage under others without a word. Here all of them become one
mapping, name -> tensor, that reads a tensor from disk when it is asked for.
"""

import hashlib
import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from opt.errors import UserError
from opt.model.names import full_names

EMBEDDING = "model.decoder.embed_tokens.weight"
HEAD = "lm_head.weight"
SAMPLE = 256  # elements of a tensor that are looked at again where it was placed
# In the order of preference of transformers' from_pretrained.
FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_SHARD = re.compile(r"[\w.-]{1,200}\.(safetensors|bin)")
# What says that there are weights -> all their files
_READ = {
    FILES[:2]: "model*.safetensors",
    FILES[2:]: "pytorch_model*.bin",
}
_DEPTH = 2  # folders in folders that are looked into for weights in another form
# Files that hold weights in a form that is not read -> what to do. By the first pattern that fits a
# name, or a path with folders.
_SAFE = (
    "convert it to model.safetensors (from_pretrained and save_pretrained of transformers do it)"
)
_NOT_READ = {
    "adapter_model.*": "it is an adapter alone: merge it into its model (PEFT's merge_and_unload), "
    "and give that",
    "*gptq*": "quantized weights cannot be trained: give the original model",
    "*awq*": "quantized weights cannot be trained: give the original model",
    "*.gguf": "quantized weights cannot be trained: give the original model",
    "*.ggml": "quantized weights cannot be trained: give the original model",
    "*.msgpack": f"{_SAFE}, with from_flax=True",
    "*.h5": f"{_SAFE}, with from_tf=True",
    "*_model_states.pt": "it is DeepSpeed's checkpoint: join it with its zero_to_fp32.py into "
    "pytorch_model.bin",
    "*_optim_states.pt": "it is DeepSpeed's checkpoint: join it with its zero_to_fp32.py into "
    "pytorch_model.bin",
    "*.distcp": "it is a distributed checkpoint: join it "
    "(torch.distributed.checkpoint.format_utils.dcp_to_torch_save) and convert it",
    "restored.pt": "it is metaseq's: convert it with transformers' "
    "convert_opt_original_pytorch_checkpoint_to_pytorch.py",
    "reshard-*.pt": "it is metaseq's: convert it with transformers' "
    "convert_opt_original_pytorch_checkpoint_to_pytorch.py",
    "model*.safetensors": "model.safetensors.index.json lacks beside it: download or copy that, or "
    "rename it if it is the whole model",
    "pytorch_model*.bin": "pytorch_model.bin.index.json lacks beside it: download or copy that, or "
    "rename it if it is the whole model",
    "*.safetensors": "if it is the whole model, rename it to model.safetensors",
    "*.bin": "if it is the whole model, rename it to pytorch_model.bin",
    **dict.fromkeys(
        (
            "*.pt",
            "*.pth",
            "*.ckpt",
            "*.npz",
            "*.npy",
            "*.onnx",
            "*.ot",
            "*.pkl",
            "*.pdparams",
            "*.mlmodel",
        ),
        _SAFE,
    ),
}
# Names that end like these and hold no weights of a model.
_OF_QUANTIZED = (
    ".qweight",
    ".qzeros",
    ".scales",
    ".SCB",
    ".absmax",
    ".quant_map",
    ".weight_packed",
    ".weight_scale",
)
_NO_WEIGHTS = (
    "training_args.*",
    "optimizer*",
    "scheduler*",
    "scaler*",
    "rng_state*",
    "random_states*",
    "trainer_state*",
    "tokenizer*",
)


class Weights(Mapping):
    """Names and tensors of an OPTForCausalLM. Iteration leaves out a head that is tied to the
    embedding, which is there all the same."""

    notes: tuple[str, ...] = ()  # what was left out or taken for something else, in words
    is_transformers_own = True  # whether transformers reads the files as they are, too

    def __init__(self, names: dict):
        self._names = names  # name -> where _read finds it

    def _read(self, where) -> torch.Tensor:
        raise NotImplementedError

    def _where(self, name: str):
        return self._names[EMBEDDING if name == HEAD and HEAD not in self._names else name]

    def sample(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Some elements of a tensor: where they are in it, flattened, and what they are."""
        return _sampled(self._read(self._where(name)))

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        raise NotImplementedError

    @property
    def num_parameters(self) -> int:
        """Parameters of the model, a tied head counted once."""
        return sum(math.prod(self.shape(name)) for name in self)

    @property
    def reading_bytes(self) -> int:
        """Host memory that reading them takes, beside what they are read into."""
        return 0

    @property
    def frozen_checksum(self) -> str | None:
        """Of a sample of those that are not trained; None where all are."""
        return None

    @property
    def trained(self) -> "Weights":
        """Those that are trained."""
        return self

    def taken_up(self, saved: "Weights") -> "Weights":
        """These, where `saved` is what those that are trained have become."""
        return saved

    def __getitem__(self, name):
        return self._read(self._where(name))

    def __contains__(self, name):
        return name in self._names or name == HEAD

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self):
        return len(self._names)


class CheckpointWeights(Weights):
    """The weights in a local directory, whatever their file format and layout. Reads with mmap, one
    tensor at a time."""

    def __init__(self, directory: Path, is_tied: bool = True):
        """`is_tied`: whether the head is the embedding, as config.json says."""
        self._open: dict[Path, object] = {}
        self._said: list[str] = []
        files = {key: file for file in weight_files(directory) for key in self._file(file).keys()}
        names, notes = full_names(files, str(directory))
        names = {name: (files[key], key) for name, key in names.items()}
        self._head = names.pop(HEAD, None) if is_tied else None
        if self._head and EMBEDDING not in names:
            # safetensors' save_model keeps the first of two names of one tensor
            names[EMBEDDING], self._head = self._head, None
            notes.append(f"{HEAD} is taken for the embedding, which lacks and is tied to it")
        super().__init__(names)
        self.notes = (*self._said, *notes)
        self.is_transformers_own = not self._said and all(
            key in (name, name.removeprefix("model.")) for name, (_, key) in names.items()
        )

    def _file(self, file: Path):
        if file not in self._open:
            try:
                if file.suffix == ".safetensors":
                    self._open[file] = safe_open(file, framework="pt")
                else:
                    # Files of torch before 1.6 are no zip archives, and are read whole.
                    content = torch.load(
                        file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
                    )
                    self._open[file], said = _tensors_in(content, file)
                    self._said += [f"{file.name}: {note}" for note in said]
            except UserError:
                raise
            except Exception as error:  # every reader has exceptions of its own for a broken file
                reason = str(error).split("\n")[0]
                if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
                    raise UserError(
                        f"{file} holds Python objects beside its tensors, which are not read, as "
                        "they could run code: save the state_dict alone, as safetensors"
                    ) from error
                raise UserError(
                    f"{file} cannot be read as weights ({reason:.200}): download or copy it again"
                ) from error
        return self._open[file]

    @property
    def reading_bytes(self):
        """One tensor in fp32; and the whole of files that are no zip archives."""
        whole = sum(
            file.stat().st_size
            for file in self._open
            if file.suffix == ".bin" and not zipfile.is_zipfile(file)
        )
        return whole + 4 * max(math.prod(self.shape(name)) for name in self)

    def _mapped(self, where) -> torch.Tensor:
        path, key = where
        file = self._file(path)
        return file.get_tensor(key) if path.suffix == ".safetensors" else file[key]

    def sample(self, name):
        """See Weights. Not from what was placed, and only those pages of the file."""
        return _sampled(self._mapped(self._where(name)))

    def _read(self, where):
        path, key = where
        tensor = self._mapped(where)
        if tensor.dtype not in _DTYPES:
            raise UserError(
                f"{path}: {key} is stored as {tensor.dtype}: a quantized checkpoint cannot be "
                "trained; use the original"
            )
        # [C20] By the extremes, which a nan or an infinity is always among: 17 GB/s, where
        # isfinite() manages 0.3.
        if not all(torch.isfinite(extreme) for extreme in tensor.aminmax()):
            raise UserError(
                f"{path}: {key} holds nan or infinity: the file is damaged, or its training had "
                "failed; use another"
            )
        return tensor

    def check(self) -> None:
        """Raise UserError for what would be read wrongly: quantized weights, a head that is not the
        embedding."""
        quantized = next((name for name in self if name.endswith(_OF_QUANTIZED)), None)
        if quantized:
            path, key = self._names[quantized]
            raise UserError(
                f"{path} has {key}, of quantized weights, which cannot be trained: give the "
                "original model"
            )
        if self._head and not _same(self._read(self._head), self[EMBEDDING]):
            path, key = self._head
            raise UserError(
                f"{path}: {key} is not the embedding, which config.json ties it to, and would be "
                "lost: if the model has an output projection of its own, set tie_word_embeddings "
                "to false there, otherwise remove it from the file"
            )

    def shape(self, name):
        path, key = self._where(name)
        file = self._file(path)
        return tuple(
            file.get_slice(key).get_shape() if path.suffix == ".safetensors" else file[key].shape
        )


class InitialWeights(Weights):
    """Untrained weights as transformers' OPT initialises them: matrices normal(0, init_std), biases
    0, norms 1.

    Each tensor has a generator of its own, seeded by `seed` and its name, so that every plugin and
    every parallel size starts from the same model, and no process needs more than the tensor at
    hand. Made on `device`: a GPU is fast at it.
    """

    def __init__(self, model: nn.Module, seed: int, device: torch.device | str = "cpu"):
        config = model.config
        self._seed, self._std, self._device = seed, config.init_std, device
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self._pad = config.pad_token_id
        self._samples: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        super().__init__({name: name for name in self._shapes})

    def sample(self, name):
        """See Weights. Of when it was made last: making it again takes as long."""
        name = self._where(name)
        if name not in self._samples:
            self._read(name)
        return self._samples[name]

    def _read(self, name):
        weight = self._make(name)
        self._samples[name] = _sampled(weight)
        return weight

    def _make(self, name):
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.full(
                shape, 1.0 if name.endswith("norm.weight") else 0.0, device=self._device
            )
        generator = generator_of(name, self._seed, self._device)
        weight = torch.empty(shape, device=self._device).normal_(
            0.0, self._std, generator=generator
        )
        if name == EMBEDDING and self._pad is not None:
            weight[self._pad] = 0.0
        return weight

    def shape(self, name):
        return self._shapes[self._where(name)]


def generator_of(name: str, seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """For a tensor's initial values: of its own, whichever others are made, and where."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _sampled(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Up to SAMPLE of its elements from all over it, in columns that differ: see Weights.sample."""
    number = min(SAMPLE, tensor.numel())
    each = torch.arange(number)
    positions = (each * (tensor.numel() // max(number, 1)) + each * 31) % max(tensor.numel(), 1)
    return positions, tensor.flatten()[positions.to(tensor.device)].float()


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.to(other.dtype), other)


# Where trainers put a model's tensors in a file of theirs
_NESTS = ("model", "state_dict", "model_state_dict", "module")


def _tensors_in(content, file: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors by name in what torch.load gave, under a key that trainers use if need be; and
    what was done for it, in words. Raises UserError, and ValueError for what holds none."""

    def own(content) -> list[str]:
        return [k for k, t in content.items() if isinstance(t, torch.Tensor)]

    def nests(content) -> list[str]:
        return [k for k, c in content.items() if isinstance(c, dict) and (own(c) or nests(c))]

    way: list[str] = []
    while isinstance(content, dict) and not any("decoder." in str(k) for k in own(content)):
        inner = nests(content)
        known = [k for k in inner if k in _NESTS]
        if len(known) != 1:
            if inner:
                raise UserError(
                    f"{file} has tensors under the keys {', '.join(map(str, inner))[:200]}: which "
                    "of them is the model cannot be told; save that one alone"
                )
            break
        content = content[known[0]]
        way += known
    if not isinstance(content, dict) or not own(content):
        raise ValueError("it holds something else than tensors by name")
    tensors = {str(k): content[k] for k in own(content)}
    notes = [f"tensors are read from under {'.'.join(way)}"] if way else []
    others = [str(k) for k in content if str(k) not in tensors]
    if others:
        notes.append(f"{', '.join(others[:3])}{' ...' * (len(others) > 3)} left out: no tensor")
    return tensors, notes


def taken_before(name: str) -> tuple[str, ...] | None:
    """Names of weights files that loaders of a folder take before the one of this `name`; None if
    they do not look for it."""
    return FILES[: FILES.index(name)] if name in FILES else None


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the directory's weights; empty where there are none. Raises UserError for
    a missing shard."""
    for name in FILES:
        file = directory / name
        if not file.is_file():
            continue
        if file.suffix != ".json":
            return [file]
        try:
            shards = sorted(
                set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
            )
            if not shards:  # not a reason to train from scratch
                raise ValueError("it names no file")
            if strange := next((s for s in shards if not _SHARD.fullmatch(s)), None):
                raise ValueError(f"{strange:.60} is no name of a file beside it")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise UserError(
                f"{file} is not an index of weight files ({error!r}): download or copy it again"
            ) from error
        missing = [s for s in shards if not (directory / s).is_file()]
        if missing:
            raise UserError(
                f"{file} names {missing[0]}, which is not there: download or copy it again"
            )
        return [directory / s for s in shards]
    names = (
        str(Path(folder, name).relative_to(directory))
        for folder, folders, files in os.walk(directory)
        if not folders.sort() and len(Path(folder).relative_to(directory).parts) <= _DEPTH
        for name in files
    )
    _refuse_unread(names, str(directory))
    return []


def _refuse_unread(files: Iterable[str], place: str) -> None:
    """Raise UserError if any of `files`, paths in `place`, holds weights: there is none that is
    read, but that is no reason to train from scratch."""
    for file in sorted(files, key=lambda file: (file.count("/"), file)):
        name = file.rsplit("/", 1)[-1]
        advice = next(
            (advice for pattern, advice in _NOT_READ.items() if fnmatch(name.lower(), pattern)),
            None,
        )
        if advice and not any(fnmatch(name.lower(), pattern) for pattern in _NO_WEIGHTS):
            if name in FILES:
                advice = (
                    f"give {file.removesuffix(name)} itself, with config.json and the "
                    "tokenizer in it, or move its files up"
                )
            raise UserError(
                f"{place} has no {' or '.join(FILES[::2])}, but {file}, which is not read: {advice}"
            )


def locate(name: str, revision: str | None = None, tokenizer_alone: bool = False) -> Path:
    """The local directory of a model: itself, or the Hub's snapshot of it, downloaded once a node
    (by a file lock).

    `revision`: a branch, tag or commit on the Hub; by default its main branch. `tokenizer_alone`:
    leave its weights there. Raises UserError.
    """
    said = f"--{'tokenizer_name' if tokenizer_alone else 'model_name_or_path'} {name}"
    if os.path.isdir(name):
        if revision:
            raise UserError(
                f"--model_revision {revision} is for a model on the Hub, and {name} is a directory "
                "here: leave it out"
            )
        return Path(name)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_local or os.path.exists(name):
        raise UserError(
            f"{said}: no such directory; give one, or a Hub id such as facebook/opt-350m"
        )

    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.utils import HfHubHTTPError, RepositoryNotFoundError

    try:
        # [F45] With a time limit: without one, as in snapshot_download, a Hub that takes the
        # connection and is silent is waited for.
        patience = constants.HF_HUB_ETAG_TIMEOUT
        listing = HfApi().model_info(name, revision=revision, timeout=patience).siblings
        files = [file.rfilename for file in listing]
        # Beside config.json: what lies in folders is of other models
        beside = [file for file in files if "/" not in file]
        weights = next(
            (pattern for names, pattern in _READ.items() if set(names) & set(beside)), None
        )
        if tokenizer_alone:
            weights = None
        elif not weights:
            _refuse_unread(files, said)
        wanted = [
            file
            for file in beside
            if fnmatch(file, "*.json")
            or fnmatch(file, "*.txt")
            or (weights and fnmatch(file, weights))
        ]
        directory = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
        if not weights or weight_files(directory):
            return directory
        # [F46] snapshot_download gives what there is
        first_try = OSError("its download broke off")
    except (HfHubHTTPError, OSError, ValueError) as error:
        first_try = error
    try:  # the Hub cannot be reached, but an earlier run may have been here
        directory = Path(snapshot_download(name, revision=revision, local_files_only=True))
        if tokenizer_alone or weight_files(
            directory
        ):  # a download that broke off would train from scratch
            return directory
    except (HfHubHTTPError, OSError, ValueError):
        pass
    reason = (
        "no such model, or a private one"
        if isinstance(first_try, RepositoryNotFoundError)
        else str(first_try).split("\n")[0]
    )
    raise UserError(
        f"{said}: not a directory here and not to be had from the Hub ({reason}); give a local "
        "directory"
    ) from first_try


def open_weights(
    directory: Path, model: nn.Module, seed: int, device: torch.device | str = "cpu"
) -> Weights:
    """The checkpoint in `directory`, checked against `model`'s names and shapes; initial weights
    where there is none.

    `model` may be on the meta device. Raises UserError.
    """
    if not weight_files(directory):
        return InitialWeights(model, seed, device)
    weights = CheckpointWeights(directory, model.config.tie_word_embeddings)
    weights.check()
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    missing = sorted(expected.keys() - set(weights))
    if missing == [HEAD]:
        raise UserError(
            f"the weights in {directory} lack {HEAD}, which its config.json says that they have "
            "(tie_word_embeddings is false): give the whole model, or set that to true if the "
            "embedding is its output projection"
        )
    if missing:
        raise UserError(
            f"the weights in {directory} lack {len(missing)} of the model's tensors, {missing[0]} "
            "the first: they do not belong to its config.json"
        )
    extra = sorted(set(weights) - expected.keys())
    if extra:
        raise UserError(
            f"the weights in {directory} have {len(extra)} tensors that the model lacks, "
            f"{extra[0]} the first: they do not belong to its config.json"
        )
    for name, shape in expected.items():
        if weights.shape(name) != shape:
            raise UserError(
                f"the weights in {directory}: {name} is {weights.shape(name)}, its config.json "
                f"says {shape}"
            )
    return weights

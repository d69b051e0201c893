"""The same for PyTorch, Triton, transformers, safetensors, huggingface_hub, datasets and pyarrow:
see faults_of_colossalai.py."""

import contextlib
import datetime
import importlib.util
import io
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent))
import faults


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(code: str, **environment) -> subprocess.Popen:
    """Python that runs `code`."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


def torchrun(name: str, code: str) -> subprocess.Popen:
    """torchrun with a script that runs `code`."""
    script = Path(FOLDER, name)
    script.write_text(code)
    main = f"from torch.distributed.run import main; main(['--standalone', {str(script)!r}])"
    return start(main)


def import_opt_beside_torchvision() -> subprocess.Popen:
    """Of another torch, as pip leaves it behind."""
    code = 'raise RuntimeError("operator torchvision::nms does not exist")'
    info = Path(FOLDER, "torchvision-0.0.1.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.0.1\n")
    Path(FOLDER, "torchvision.py").write_text(code)
    return start("from transformers import OPTForCausalLM", PYTHONPATH=FOLDER)


def F32():
    """A new group has the first one's timeout."""
    group = dist.new_group([0], use_local_synchronization=True)
    timeout = group._get_backend(torch.device("cpu")).options._timeout
    assert timeout == datetime.timedelta(seconds=9), f"it is {timeout}"


def F33():
    """Memory that the host does not have is told from any other error by its class."""
    try:
        torch.empty(2**60, dtype=torch.uint8)
    except (torch.OutOfMemoryError, MemoryError):
        pass


def F34():
    """A process that is lost is a DistError, as NCCL has it."""
    os.waitpid(LOST, 0)
    try:
        dist.all_reduce(torch.ones(1))
    except dist.DistError:
        pass


def F35():
    """torchrun ends with the exit code of the process that failed."""
    TORCHRUN.communicate()
    assert TORCHRUN.returncode == 3, f"exit code {TORCHRUN.returncode}"


def F52():
    """torchrun hands SIGUSR1 on, and ends as its process does."""
    ready = Path(FOLDER, "ready")
    while not ready.exists():
        assert WARNED.poll() is None, "it has ended by itself"
        time.sleep(0.05)
    WARNED.send_signal(signal.SIGUSR1)
    try:
        WARNED.wait(10)
    finally:
        if WARNED.poll() is None:
            WARNED.kill()
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(ready.read_text()), signal.SIGKILL)
    assert not WARNED.returncode, f"exit code {WARNED.returncode}"


def F55():
    """A product in fp8 is counted."""
    from torch.utils.flop_counter import flop_registry

    assert torch.ops.aten._scaled_mm in flop_registry, "not counted"


def F39():
    """A dtype that is a constexpr makes a pointer's type."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel_of_f39.py")
        file.write_text(
            "import triton\nimport triton.language as tl\n\n\n"
            "@triton.jit\ndef kernel(pointers, DTYPE: tl.constexpr):\n"
            "    tl.store(tl.load(pointers).to(tl.pointer_type(DTYPE)), 0.0)\n"
        )
        spec = importlib.util.spec_from_file_location("kernel_of_f39", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        given = {"pointers": "*i64", "DTYPE": "constexpr"}
        try:
            source = ASTSource(module.kernel, given, {"DTYPE": triton.language.float32})
            triton.compile(source, target=GPUTarget("cuda", 90, 32))
        except Exception as error:
            raise AssertionError(str(error)[-200:]) from error


def F40():
    """Without initial weights, too, the head is tied to the embedding."""
    from transformers.modeling_utils import no_init_weights

    with no_init_weights():
        model = small_opt()
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight, "it is not"


def small_opt():
    from transformers import OPTConfig, OPTForCausalLM

    sizes = dict(hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_attention_heads=2)
    return OPTForCausalLM(OPTConfig(vocab_size=64, num_hidden_layers=1, **sizes))


def F41():
    """A configuration that a model was made of is written down without what was chosen for it."""
    from transformers import AutoModelForCausalLM

    model = small_opt()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        small_opt().config.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder)
    right, seen = (m.config._attn_implementation for m in (model, again))
    assert seen == right, f"who loads it gets {seen} attention, not {right}"


def F42():
    """OPT, which needs no torchvision, does without one that is broken."""
    _, said = BESIDE_TORCHVISION.communicate()
    assert not BESIDE_TORCHVISION.returncode, said[-200:]


def F43():
    """A file that safetensors writes may be read by whom the umask lets."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        os.umask(0o022)
        save_file({"a": torch.ones(1)}, f"{folder}/a.safetensors")
        mode = os.stat(f"{folder}/a.safetensors").st_mode & 0o777
    assert mode == 0o644, f"its mode is {mode:o}"


def F44():
    """What the disk refuses is an OSError, which says what."""
    from safetensors.torch import save_file

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with tempfile.TemporaryDirectory() as folder:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        try:
            save_file({"a": torch.ones(1000)}, f"{folder}/a.safetensors")
        except OSError:
            pass
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def F59():
    """What the disk refuses is an OSError of torch.save too."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with tempfile.TemporaryDirectory() as folder:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
        try:
            with open(f"{folder}/a.bin", "wb") as file:
                torch.save({"a": torch.ones(1_000_000)}, file)
        except OSError:
            pass
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def F45():
    """A Hub that takes the connection and is silent is not waited for without a limit."""
    from huggingface_hub import snapshot_download

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        where = f"http://127.0.0.1:{silent.getsockname()[1]}"
        given = {"endpoint": where, "etag_timeout": 0.2, "cache_dir": tempfile.gettempdir()}
        ended = threading.Event()

        def download():
            try:
                snapshot_download("some/model", **given)
            except Exception:
                ended.set()

        threading.Thread(target=download, daemon=True).start()
        assert ended.wait(2), "2 s, with etag_timeout 0.2"


def F46():
    """What an earlier download has left out is not given for the whole."""
    from huggingface_hub import snapshot_download

    with tempfile.TemporaryDirectory() as cache:
        there = Path(cache, "models--some--model")
        for folder in ("refs", "blobs", "snapshots/0123"):
            (there / folder).mkdir(parents=True)
        (there / "refs/main").write_text("0123")
        (there / "snapshots/0123/config.json").write_text("{}")  # and no weights yet
        where = f"http://127.0.0.1:{free_port()}"
        try:
            given = snapshot_download("some/model", cache_dir=cache, endpoint=where)
        except OSError:
            return
    raise AssertionError(f"it gives the folder {Path(given).name}, in which there are no weights")


def rows_by_datasets(text: str) -> list:
    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "a.csv")
        file.write_text(text)
        return list(datasets.Dataset.from_csv(str(file), cache_dir=folder)["text"])


def F47():
    """A text in a csv stays what it is."""
    seen = rows_by_datasets("text,other\n007,a\n42,b\n") + rows_by_datasets("text\nNA\nb\n")
    assert seen == ["007", "42", "NA", "b"], f"it is {seen}"


def F48():
    """A row of a csv with a field more than the header is refused."""
    try:
        seen = rows_by_datasets("text,other\na,b,c\n")
    except Exception:
        return
    raise AssertionError(f"of a,b,c the first column is {seen}")


def F49():
    """A quote in a quoted field that is not doubled is refused."""
    import pyarrow
    from pyarrow import csv

    try:
        seen = csv.read_csv(io.BytesIO(b'text,other\n"a "b" c",d\n')).to_pylist()
    except pyarrow.ArrowException:
        return
    raise AssertionError(f"it is read as {seen}")


def F50():
    """JSON may spell half of a pair of surrogates."""
    from pyarrow import json as arrow_json

    line = json.dumps({"text": "a \ud83d b"}).encode()
    arrow_json.read_json(io.BytesIO(line)).to_pylist()


def lose_a_process() -> int:
    """Form a group with a process that ends without a word; its number."""
    join, timeout = f"tcp://127.0.0.1:{free_port()}", datetime.timedelta(seconds=9)
    other = os.fork()
    rank = 0 if other else 1
    dist.init_process_group("gloo", init_method=join, rank=rank, world_size=2, timeout=timeout)
    dist.barrier()
    if not other:
        os.kill(os.getpid(), signal.SIGKILL)
    return other


if __name__ == "__main__":
    LOST = lose_a_process()
    with tempfile.TemporaryDirectory() as FOLDER:
        TORCHRUN = torchrun("ends.py", "raise SystemExit(3)")
        waits = "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))"
        tells = f"open({FOLDER + '/part'!r}, 'w').write(str(os.getpid()))"
        shows = f"os.rename({FOLDER + '/part'!r}, {FOLDER + '/ready'!r})"
        code = ["import os, signal, sys, time", waits, tells, shows, "time.sleep(60)"]
        WARNED = torchrun("waits.py", "\n".join(code))
        BESIDE_TORCHVISION = import_opt_beside_torchvision()
        faults.main(globals())
    sys.stdout.flush()
    os._exit(0)  # its end would wait for the process that is lost

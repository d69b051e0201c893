"""Import ColossalAI without the packages that it pulls in and this project never uses: seconds of
every start.

[C1] colossalai 0.5.0 imports bitsandbytes for its GaLore optimizers and for quantization, and its
fp8 functions are decorated with torch.compile, which loads the compiler at once; transformers
imports scikit-learn, where that is installed, for assisted generation. On an H100's host these
three took 4.1, 2.3 and 2.6 s.

[F1] Its import also sets CUDA_DEVICE_MAX_CONNECTIONS to 1, for a way of overlapping that OPT's
policy does not use. Then all streams share one queue: what follows a collective that waits for the
one before waits as well, which holds up backward. It stays as it was.

[F2] And it asks for the current device and what that can do, for a default of Gemini's and for fp8
functions that nothing here calls: each process of a node would occupy some of the first GPU's
memory, whichever its own is.
"""

import functools
import importlib.abc
import importlib.machinery
import os
import sys
import types
from unittest.mock import patch

import torch
import transformers.utils.import_utils


class _StandIn(types.ModuleType):
    """A module in which every name is an empty class, fit to be inherited from."""

    __version__ = "0.0.0"
    __path__: list = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (), {})
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return (
            importlib.machinery.ModuleSpec(name, self, is_package=True)
            if name.split(".")[0] == "bitsandbytes"
            else None
        )

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module):
        pass


def _compile_at_first_call(function=None, **options):
    if function is None:
        return functools.partial(_compile_at_first_call, **options)
    compiled = functools.cache(lambda: _compile(function, **options))
    return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))


_compile = torch.compile
_connections = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
if "bitsandbytes" not in sys.modules:
    transformers.utils.import_utils._sklearn_available = False
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        with (
            patch.object(torch, "compile", _compile_at_first_call),
            patch.multiple(
                torch.cuda, current_device=lambda: 0, get_device_capability=lambda: (0, 0)
            ),
        ):
            import colossalai.booster.plugin  # noqa: F401
            import colossalai.nn.optimizer  # noqa: F401
    finally:
        sys.meta_path.remove(finder)
        # Whoever asks for bitsandbytes from now on gets the real one.
        for name in [n for n in sys.modules if n.split(".")[0] == "bitsandbytes"]:
            del sys.modules[name]
if _connections is None:
    os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
else:
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = _connections

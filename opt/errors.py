"""What a user can put right: one line, said once a node, and an exit code."""

import hashlib
import os
import sys
from pathlib import Path


class UserError(Exception):
    """Something that the user can put right. Printed as one line, once a node, with exit code 2."""

    code = 2


class Diverged(UserError):
    """Training came to nothing. Exit code 1."""

    code = 1


def in_a_line(error: Exception) -> str:
    """Another package's exception, its kind and what it says, as part of a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split()):.300}"


def report_user_error(message) -> None:
    """Print `message` as one line, once a node, and exit with code 2."""
    say_once(f"error: {message}")
    raise SystemExit(2)


def say_once(message: str) -> None:
    """Print a line to stderr, unless another process of this node has printed the same.

    The first process to get here prints: what only a later rank finds must be seen too, and
    torchrun ends the others, the first among them, as soon as one has failed. Without torchrun
    nothing tells the processes of a run apart from another run's, and each prints.
    """
    line = f"{os.path.basename(sys.argv[0])}: {' '.join(message.split())}"
    # .../attempt_0/RANK/error.json, in a directory of this run's own
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if own:
        claim = (
            Path(own).parent.parent
            / f"said-{hashlib.sha256(line.encode(errors='replace')).hexdigest()[:16]}"
        )
        try:
            claim.touch(exist_ok=False)
        except FileExistsError:
            return
        except OSError:  # no such directory, or a full disk: rather twice than never
            pass
    # The first process's progress bar may hold the cursor in its line.
    print("\n" * (os.environ.get("LOCAL_RANK", "0") != "0") + line, file=sys.stderr, flush=True)

"""Whether the installed packages are those of requirements.txt, without importing any of them; and
which scripts these are.

    python -m opt.installed run_demo.sh
        exit code 2 and one line, which begins with this name, if not

An older torch, say, beside a newer numpy ends in a traceback of its own, wherever it is imported
first. So this comes before.
"""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from opt.errors import report_user_error

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements.txt"


def check() -> None:
    """End with one line, which has the command that mends it, and exit code 2 if a package is
    missing or not one that was tested."""
    pip = f"{sys.executable} -m pip install"
    if wrong := out_of_bounds():
        report_user_error(f"{'; '.join(wrong)}: {pip} -r {REQUIREMENTS}")
    if wrong := foreign_torchvision():
        report_user_error(f"{wrong}: {pip} torch=={_version('torch').split('+')[0]} torchvision")


def required() -> dict[str, str]:
    """Of each line of requirements.txt its package."""
    lines = [
        line for line in REQUIREMENTS.read_text().splitlines() if line and not line.startswith("#")
    ]
    return {line: re.match(r"[\w-]+", line)[0] for line in lines}


def versions() -> dict[str, str | None]:
    """The installed version of each package in requirements.txt; None if it is not."""
    return {name: _version(name) for name in required().values()}


def out_of_bounds() -> list[str]:
    """What of requirements.txt is missing or in a version that it does not allow, in words."""
    names = required()
    missing = [name for name in names.values() if _version(name) is None]
    try:
        from packaging.requirements import Requirement
    except ImportError:  # transformers and datasets bring it
        return [f"not installed: {', '.join(missing or ['packaging'])}"]
    wrong = [f"not installed: {', '.join(missing)}"] if missing else []
    for line, name in names.items():
        allowed, version = Requirement(line).specifier, _version(name)
        # Builds from source and NVIDIA's containers have a pre-release's version, such as
        # 2.11.0a0+gitabc.
        if version is not None and not allowed.contains(version, prereleases=True):
            wrong.append(f"{name} {version} is installed, and {allowed} is what was tested")
    return wrong


def foreign_torchvision() -> str | None:
    """[F42] The complaint about a torchvision of another torch, left behind where pip has changed
    torch. Nothing here needs one, but transformers imports it where there is one, and that raises
    RuntimeError (4.51.3: "operator torchvision::nms does not exist")."""
    from packaging.requirements import Requirement

    version = _version("torchvision")
    for needed in map(Requirement, metadata.requires("torchvision") or [] if version else []):
        if needed.name == "torch" and not needed.specifier.contains(
            _version("torch"), prereleases=True
        ):
            return (
                f"torchvision {version} is made for torch{needed.specifier}, and torch "
                f"{_version('torch')} is installed"
            )
    return None


def commit() -> str:
    """The commit of this code, "+" behind it where files have changed since; empty outside a git
    checkout, or without git."""
    git = ["git", "-c", "safe.directory=*", "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        done = subprocess.run(git, cwd=REQUIREMENTS.parent, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.argv = sys.argv[1:] or sys.argv  # whose name the line begins with
    check()

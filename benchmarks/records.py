"""A campaign's file: a result a line."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

GIB = 2**30


def lines(file: Path) -> list[dict]:
    """A campaign's results, of each measurement on a host the last; none of a file that is not
    there. A last line that a killed campaign has left unfinished is not one."""
    found = {}
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            result = json.loads(line)
        except ValueError:
            continue
        # Records of before there were campaigns have the file that they were; what the host decides
        # is measured on two.
        host = result.get("host", {}).get("boot")
        found[result["commit"], result["command"], result.get("file"), host] = result
    return list(found.values())


def by_measurement(results: Iterable[dict]) -> list[list[dict]]:
    """Those of one measurement together, in their order: what the host decides was measured on two
    hosts, and tables have the first one's figures."""
    found = {}
    for result in results:
        same = *map(result.get, ("commit", "command", "file")), result.get("device")
        found.setdefault(same, []).append(result)
    return list(found.values())


def gpu_of(result: dict) -> str:
    """A GPU's name, short: H200 of NVIDIA H200; empty of what has failed."""
    named = re.search(r"\b[A-Z]+\d+\w*", result.get("device", ""))
    return named[0] if named else ""

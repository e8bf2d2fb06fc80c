"""What importing and looking up cost, in fresh processes: python -m tests.benchmarks.imports [--quick]."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

from .measure import Report, Table, arguments, has, seconds

CATALOGUE = """
import time, {imports}
start = time.perf_counter()
{call}
print(time.perf_counter() - start)
"""


def fresh(code: str) -> str:
    """What Python prints for it."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    return done.stdout


def importing(rounds: int) -> Table:
    """Whole processes, started in turn."""
    names = ["saewb", "torch", "transformer_lens", *(["sae_lens"] if has("sae_lens") else [])]
    code = {"Python alone": "pass"} | {f"import {name}": f"import {name}" for name in names}
    took: dict[str, list[float]] = {name: [] for name in code}
    for _ in range(rounds):
        for name, line in code.items():
            took[name].append(seconds(lambda: fresh(line)))  # noqa: B023 (called in this turn of the loop)
    return Table.made("a fresh process", {n: statistics.median(t) for n, t in took.items()}, "import saewb")


def catalogues(rounds: int) -> Table:
    """The first look at what is published, after the import."""
    code = {"saewb": CATALOGUE.format(imports="saewb, pandas, torch", call="len(saewb.catalogue())")}
    if has("sae_lens"):
        call = "len(pretrained_saes_directory.get_pretrained_saes_directory())"
        code["sae-lens"] = CATALOGUE.format(
            imports="sae_lens\nfrom sae_lens.loading import pretrained_saes_directory", call=call
        )
    took: dict[str, list[float]] = {name: [] for name in code}
    for _ in range(rounds):
        for name, lines in code.items():
            took[name].append(float(fresh(lines).split()[-1]))
    return Table.made("the whole catalogue, first time", {n: statistics.median(t) for n, t in took.items()}, "saewb")


def main() -> None:
    """Measure."""
    options = arguments(__doc__).parse_args()
    report, rounds = Report(options), 1 if options.quick else 5
    report.add(importing(rounds))
    report.add(catalogues(rounds))


if __name__ == "__main__":
    main()

"""saewb and its peers on the same work, in the same run: python -m tests.benchmarks [NAME ...] [--quick]

All benchmarks, or those named; each in a process of its own, one after the other. The peers' environments are made
where they are missing (`--envs`). Prints medians and ratios as they come, and writes one table of markdown
(`--markdown FILE`, or `--readme`: between the markers in README.md). One that fails is said to have failed in the
table, the others go on, and the exit status is 1. Where there is a GPU, those that can run there do so too.

At full size it takes an hour or more on two cores; `--quick` some minutes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from .environments import ROOT, default_folder, python_for
from .markdown import Result, markdown, put_into
from .measure import loaded

SMOL = ("--model", "smollm2-135m")


@dataclass(frozen=True)
class Job:
    """One benchmark: a module of this folder."""

    module: str
    arguments: tuple[str, ...] = ()  # at full size; with --quick only that
    cuda: bool = False  # whether it can run on a GPU
    peer: str = ""  # whose interpreter of its own it needs
    peer_only: bool = True  # whether there is nothing to measure without that


JOBS = {
    "imports": Job("imports"),
    "attach": Job("attach", SMOL, cuda=True),
    "loading": Job("loading"),
    "fingerprint": Job("fingerprint", cuda=True),
    "evaluate": Job("evaluate", SMOL, cuda=True),
    "attribution_graph": Job("attribution_graph", SMOL, cuda=True, peer="circuit-tracer", peer_only=False),
    "stats": Job("stats"),
    "contrast": Job("contrast", SMOL, cuda=True),
    "crosscoder": Job("crosscoder", cuda=True),
    "synthetic": Job("synthetic"),
    "planted": Job("planted"),
    "train_step": Job("train_step", ("--objective", "all"), cuda=True),
    "train_step_wide": Job("train_step", ("--objective", "all", "--d-sae", "18432", "--repeats", "3"), cuda=True),
    "train_step_busy": Job("train_step", ("--objective", "topk,batchtopk,standard,jumprelu", "--busy", "--no-plain")),
    "train": Job("train", (*SMOL, "--busy"), cuda=True),
    "train_wide": Job("train", (*SMOL, "--d-sae", "18432"), cuda=True),
    "quality": Job("quality", cuda=True),
    "index": Job("index", (*SMOL, "--tokens", "131072"), cuda=True),
    "index_wide": Job("index", (*SMOL, "--tokens", "65536", "--d-sae", "65536"), cuda=True),
    "dashboard": Job("dashboard", SMOL, peer="sae-dashboard"),
}


def main() -> int:
    """Run them; the exit status."""
    options = _options()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    results = []
    for name in options.names or JOBS:
        for device in devices if JOBS[name].cuda else ["cpu"]:
            print(f"\n== {name} ({device})", flush=True)
            results.append(run(name, device, options))
            if results[-1].failed:
                print(f"failed: {results[-1].failed}", flush=True)
    text = markdown(results, datetime.date.today().isoformat())
    if options.markdown:
        options.markdown.write_text(text)
    if options.readme:
        put_into(ROOT / "README.md", text)
    if not (options.markdown or options.readme):
        print(f"\n{text}")
    return int(any(result.failed for result in results))


def run(name: str, device: str, options: argparse.Namespace) -> Result:
    """One benchmark on one device. What it had measured before it failed, if it does, is kept."""
    job = JOBS[name]
    with tempfile.TemporaryDirectory() as place:
        written = Path(place) / "tables.json"
        try:
            python = Path(sys.executable) if options.no_peers else python_for("sae-lens", options.envs)
            size = ["--quick"] if options.quick else list(job.arguments)
            if job.peer and options.no_peers:
                size.append("--no-peer")
            elif job.peer and device == "cpu":
                size += ["--peer-python", str(python_for(job.peer, options.envs))]
            module = f"tests.benchmarks.{job.module}"
            command = [python, "-W", "ignore", "-m", module, "--device", device, "--json", written, *size]
            failed = _finished(command, options.timeout)
        except (RuntimeError, OSError, ValueError, subprocess.SubprocessError) as error:
            failed = str(error).strip().splitlines()[-1]
        saved = json.loads(written.read_text()) if written.exists() else {"tables": [], "facts": {}}
    failed = failed or ("" if saved["tables"] else "it wrote no table")
    return Result(name, device, tuple(loaded(saved["tables"])), saved["facts"], failed)


def _finished(command: list, timeout: float) -> str:
    """Run it, its output shown; the last line of its errors if it fails, else nothing."""
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=timeout)
    if not done.returncode:
        return ""
    return next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"exit {done.returncode}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"of {', '.join(JOBS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="small sizes on the embedded model, to try it")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument("--readme", action="store_true", help="write it into README.md")
    parser.add_argument("--envs", type=Path, default=default_folder(), help="the peers' environments; %(default)s")
    parser.add_argument("--no-peers", action="store_true", help="only what this environment has; makes none")
    parser.add_argument("--timeout", type=float, default=7200, help="seconds for one benchmark")
    options = parser.parse_args()
    options.envs = options.envs.expanduser().absolute()
    if unknown := [name for name in options.names if name not in JOBS]:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(JOBS)}")
    if options.no_peers:
        options.names = [name for name in options.names or JOBS if not (JOBS[name].peer and JOBS[name].peer_only)]
    return options


if __name__ == "__main__":
    sys.exit(main())

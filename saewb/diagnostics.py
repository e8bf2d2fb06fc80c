"""What saewb finds around it: `saewb doctor`. Looks, and changes nothing.

1. Python and the packages that saewb's own requirements name, with the versions these allow.
2. Devices, and whether the installed torch can use the ones that are there.
3. Folders that are written to: the hub's cache, saewb's own; whether they can be, and what room there is.
4. The notebook: the kernel that Jupyter starts, and the front-end half of the widgets.
5. The embedded model; and, if asked, the hub.
"""

from __future__ import annotations

import html
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from saewb.errors import explain

_MARKS = {"ok": "ok", "absent": "-", "wrong": "!!"}
_COLORS = {"ok": "#2a8a4a", "absent": "#888", "wrong": "#c33"}
_ROOM = 5 * 2**30  # bytes: less free than this is worth a word


@dataclass(frozen=True)
class Finding:
    """One thing looked at: how it is, and the line that mends it."""

    what: str
    found: str
    state: Literal["ok", "absent", "wrong"] = "ok"  # absent: not there, and only needed for what `fix` says
    fix: str = ""


@dataclass(frozen=True, repr=False)
class Checkup:
    """What `saewb.doctor` found. `print` it for a table; in a notebook it shows itself."""

    findings: tuple[Finding, ...]  # in the order they were looked at

    @property
    def ok(self) -> bool:
        """Nothing is wrong; things may be absent."""
        return all(f.state != "wrong" for f in self.findings)

    def __repr__(self) -> str:
        width = max(len(f.what) for f in self.findings)
        lines = []
        for f in self.findings:
            lines.append(f"{_MARKS[f.state]:<2} {f.what:<{width}}  {f.found}")
            lines += [f"   {'':<{width}}  fix:  {f.fix}"] if f.fix else []
        n = sum(f.state == "wrong" for f in self.findings)
        return "\n".join([*lines, "", "nothing is wrong" if self.ok else f"{n} to mend: marked !!"])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td style='color:{_COLORS[f.state]};text-align:left'>{_MARKS[f.state]}</td>"
            f"<td style='text-align:left'>{html.escape(f.what)}</td><td style='text-align:left'>{html.escape(f.found)}"
            f"{f'<br><code>{html.escape(f.fix)}</code>' if f.fix else ''}</td></tr>"
            for f in self.findings
        )
        return f"<table>{rows}</table>"


def doctor(network: bool = False, timeout: float = 5.0) -> Checkup:
    """Versions, devices, folders, notebook: what is there, what is missing, and the line that mends it.

    Nothing is changed and, unless asked, nobody is asked. As `saewb doctor` on the command line, whose exit status is 1
    if something is wrong.

    Args:
        network: ask the hub (HF_ENDPOINT, else huggingface.co) whether it answers.
        timeout: seconds to wait for it.

    Returns:
        A Checkup: `print` it; in a notebook it shows itself. `.ok` if nothing is wrong.

    Raises:
        ValueError: if `timeout` is not above 0.

    Example:
        >>> found = doctor()
        >>> [f.what for f in found.findings][:2], found.findings[1].state
        (['saewb', 'Python'], 'ok')
    """
    if timeout <= 0:
        raise ValueError(explain(f"timeout is {timeout!r}.", want="seconds above 0"))
    parts: list[Callable[[], Iterator[Finding]]] = [_python, _packages, _devices, _folders, _notebook, _embedded]
    found = [finding for part in parts for finding in part()]
    return Checkup((*found, _hub(timeout)) if network else tuple(found))


def _python() -> Iterator[Finding]:
    from saewb import __version__

    yield Finding("saewb", f"{__version__} in {Path(__file__).parent}")
    system = f"{platform.system()} {platform.machine()}"
    yield Finding("Python", f"{platform.python_version()}, {system}, {sys.executable}")


def _packages() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    for line in importlib.metadata.requires("saewb") or []:
        wanted = Requirement(line)
        extra = str(wanted.marker) if wanted.marker else ""
        if not extra:
            yield _package(wanted.name, wanted.specifier, f'pip install "{wanted.name}{wanted.specifier}"', "wrong")
        elif '"lab"' in extra:
            yield _package(wanted.name, wanted.specifier, 'pip install "saewb[lab]"    # for saewb lab', "absent")
    for name, reason in (("datasets", "texts from the hub"), ("wandb", "that sink"), ("tensorboard", "that sink")):
        yield _package(name, None, f"pip install {name}    # for {reason}", "absent")


def _package(name: str, allowed, fix: str, without: Literal["absent", "wrong"]) -> Finding:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "not installed", without, fix)
    if allowed is None or allowed.contains(version, prereleases=True):
        return Finding(name, version)
    return Finding(name, f"{version}; saewb is made for {name}{allowed}", "wrong", fix)


def _devices() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:  # not installed was said above; a broken one is worth its message
        yield Finding("torch", f"cannot be imported: {error}", "wrong", "pip install --force-reinstall torch")
        return
    threads = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("CPU", f"{cores} cores, torch uses {threads} threads{_memory()}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            yield Finding(
                f"cuda:{i}", f"{torch.cuda.get_device_name(i)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
            )
    elif shutil.which("nvidia-smi"):
        why = (
            "this torch is built without CUDA" if torch.version.cuda is None else "torch cannot use it: see nvidia-smi"
        )
        yield Finding("cuda", f"there is an NVIDIA driver, but {why}", "wrong", "see pytorch.org/get-started")
    else:
        yield Finding("cuda", "no GPU", "absent")
    if torch.backends.mps.is_available():
        yield Finding("mps", 'an Apple GPU; used if you say device="mps"')


def _memory() -> str:
    from saewb.training.memory import available

    free = available("cpu")
    if free is None:
        return ""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f", {free / 2**30:.1f} of {total / 2**30:.1f} GiB of memory unused"


def _folders() -> Iterator[Finding]:
    from huggingface_hub import constants

    yield _folder("hub cache", Path(constants.HF_HUB_CACHE), "HF_HOME")
    own = os.environ.get("SAEWB_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "saewb"
    yield _folder("saewb cache", Path(own).expanduser(), "SAEWB_CACHE")
    if constants.HF_HUB_OFFLINE:
        yield Finding("HF_HUB_OFFLINE", "set: nothing is fetched from the hub", "absent", "unset HF_HUB_OFFLINE")


def _folder(what: str, folder: Path, variable: str) -> Finding:
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        return Finding(what, f"{folder} cannot be written to", "wrong", f"export {variable}=<a folder of yours>")
    free = shutil.disk_usage(there).free
    said = f"{folder}, {free / 2**30:.1f} GiB free"
    if free < _ROOM:
        return Finding(what, said, "wrong", f"export {variable}=<a folder on a larger disk>")
    return Finding(what, said)


def _notebook() -> Iterator[Finding]:
    if "google.colab" in sys.modules:
        yield Finding("notebook", "Colab: the panels turn its custom widget manager on themselves")
        return
    if importlib.util.find_spec("jupyter_client") is None:
        yield Finding("kernel", "no Jupyter here", "absent", 'pip install "saewb[lab]"    # for saewb lab')
        return
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel
    from jupyter_core.paths import jupyter_path

    try:
        starts = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except NoSuchKernel:
        yield Finding("kernel", "Jupyter knows no python3", "wrong", f"{sys.executable} -m pip install ipykernel")
    else:
        yield _kernel(starts)
    for name, package in (("@jupyter-widgets/jupyterlab-manager", "ipywidgets"), ("anywidget", "anywidget")):
        installed = any((Path(p) / "labextensions" / name).is_dir() for p in [_beside(), *jupyter_path()])
        if installed:
            yield Finding(f"{package} in the page", "installed")
        else:
            fix = (
                f"pip install --force-reinstall {package} jupyterlab_widgets    # where JupyterLab itself is installed"
            )
            yield Finding(f"{package} in the page", "not found: panels would stay empty", "wrong", fix)


def _beside() -> Path:
    return Path(sys.prefix) / "share" / "jupyter"


def _kernel(starts: str) -> Finding:
    found = shutil.which(starts) or starts
    if Path(found).exists() and Path(found).samefile(sys.executable):
        return Finding("kernel", f"python3 is {starts}")
    if starts in ("python", "python3") and Path(_beside() / "kernels" / "python3").is_dir():
        return Finding("kernel", f"python3 is the {starts} of the environment JupyterLab is started in")
    fix = f"{sys.executable} -m ipykernel install --user --name saewb    # then choose the kernel saewb"
    return Finding("kernel", f"python3 is {starts}, not {sys.executable}: saewb may be missing there", "wrong", fix)


def _embedded() -> Iterator[Finding]:
    from saewb import tiny

    for what, file in (("model", "model.safetensors"), ("sae", "sae_weights.safetensors")):
        path = tiny.folder(what) / file
        if not path.is_file():
            yield Finding(f"embedded {what}", f"{path} is missing", "wrong", "pip install --force-reinstall saewb")
            continue
        with path.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        n = sum(name != "__metadata__" for name in header)
        yield Finding(f"embedded {what}", f"{n} tensors, {path.stat().st_size / 2**20:.1f} MiB")


def _hub(timeout: float) -> Finding:
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    url = constants.ENDPOINT
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout) as answer:
            return Finding("hub", f"{url} answers ({answer.status})")
    except urllib.error.HTTPError as error:
        return Finding("hub", f"{url} answers ({error.code})")
    except OSError as error:
        said = getattr(error, "reason", error)
        return Finding(
            "hub", f"{url} does not answer: {said}", "wrong", 'saewb.load_model("tiny") and folders work without it'
        )

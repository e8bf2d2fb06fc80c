"""`saewb doctor`: check this machine, and suggest a fix for each problem. Changes nothing.

1. Python, and the packages that saewb requires, with the versions it allows.
2. Devices, and whether the installed torch can use them.
3. Cache folders of the hub and of saewb: whether they are writable, and their free space.
4. The notebook: the kernel that Jupyter starts, and the front-end half of the widgets.
5. The bundled model and SAE; and the hub, on request.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from saewb._display import html_table
from saewb.errors import explain

if TYPE_CHECKING:
    from packaging.requirements import Requirement

State = Literal["ok", "absent", "wrong"]

_MARKS = {"ok": "ok", "absent": "-", "wrong": "!!"}
_MIN_FREE_BYTES = 5 * 2**30


@dataclass(frozen=True)
class Finding:
    """Result of one check: its state, and a line that fixes a problem."""

    name: str
    """Name of what was checked."""
    detail: str
    """Version, place or problem, in a line."""
    state: State = "ok"
    """"absent": not there, and only needed for what `fix` names; "wrong": to mend."""
    fix: str = ""
    """Line to type that fixes it; empty if there is nothing to fix."""


@dataclass(frozen=True, repr=False)
class Checkup:
    """Result of `saewb.doctor`: prints as a table, also in a notebook."""

    findings: tuple[Finding, ...]
    """In the order they were checked."""

    @property
    def ok(self) -> bool:
        """Nothing is wrong; things may be absent."""
        return all(finding.state != "wrong" for finding in self.findings)

    def __repr__(self) -> str:
        width = max(len(finding.name) for finding in self.findings)
        lines = []
        for finding in self.findings:
            lines.append(f"{_MARKS[finding.state]:<2} {finding.name:<{width}}  {finding.detail}")
            lines += [f"   {'':<{width}}  fix:  {finding.fix}"] if finding.fix else []
        return "\n".join([*lines, "", self._summary()])

    def _repr_html_(self) -> str:
        return html_table(
            self._summary(), [(_MARKS[f.state], f.name, f.detail, f.fix) for f in self.findings], sides=("left",) * 4
        )

    def _summary(self) -> str:
        n_wrong = sum(finding.state == "wrong" for finding in self.findings)
        return f"{n_wrong} to mend: marked !!" if n_wrong else "nothing is wrong"


def doctor(network: bool = False, timeout: float = 5.0) -> Checkup:
    """Check versions, devices, folders and the notebook, and suggest a line that fixes what is wrong.

    Nothing is changed, and no network is used unless requested. On the command line `saewb doctor` exits with 1 if
    something is wrong.

    Args:
        network: check whether the hub (HF_ENDPOINT, else huggingface.co) answers.
        timeout: seconds to wait for it.

    Returns:
        A Checkup; `.ok` if nothing is wrong.

    Raises:
        ValueError: if `timeout` is not above 0.

    Example:
        >>> checkup = doctor()
        >>> [finding.name for finding in checkup.findings][:2], checkup.findings[1].state
        (['saewb', 'Python'], 'ok')
    """
    if timeout <= 0:
        raise ValueError(explain(f"timeout is {timeout!r}.", want="seconds above 0"))
    checks = (_python, _packages, _devices, _folders, _notebook, _bundled)
    findings = [finding for check in checks for finding in check()]
    return Checkup((*findings, _hub(timeout)) if network else tuple(findings))


def _python() -> Iterator[Finding]:
    from saewb import __version__

    yield Finding("saewb", f"{__version__} in {Path(__file__).parent}")
    system = f"{platform.system()} {platform.machine()}"
    yield Finding("Python", f"{platform.python_version()}, {system}, {sys.executable}")


def _packages() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    for line in importlib.metadata.requires("saewb") or []:
        requirement = Requirement(line)
        if requirement.marker is None:
            yield _package(requirement, f'pip install "{requirement.name}{requirement.specifier}"', "wrong")
        elif '"lab"' in str(requirement.marker):
            yield _package(requirement, 'pip install "saewb[lab]"    # for saewb lab', "absent")
    for name, use in (("datasets", "texts from the hub"), ("wandb", "its logger"), ("tensorboard", "its logger")):
        yield _package(Requirement(name), f"pip install {name}    # for {use}", "absent")


def _package(requirement: Requirement, fix: str, if_missing: State) -> Finding:
    name, allowed = requirement.name, requirement.specifier
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "not installed", if_missing, fix)
    if allowed.contains(version, prereleases=True):
        return Finding(name, version)
    return Finding(name, f"{version}; saewb is made for {name}{allowed}", "wrong", fix)


def _devices() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:  # installed but broken: a missing one is a finding of `_packages`
        yield Finding("torch", f"cannot be imported: {error}", "wrong", "pip install --force-reinstall torch")
        return
    threads = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("CPU", f"{cores} cores, torch uses {threads} threads{_memory()}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            memory = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
            yield Finding(f"cuda:{i}", f"{torch.cuda.get_device_name(i)}, {memory}")
    elif shutil.which("nvidia-smi"):
        built = "torch cannot use it: see nvidia-smi" if torch.version.cuda else "this torch is built without CUDA"
        yield Finding("cuda", f"there is an NVIDIA driver, but {built}", "wrong", "see pytorch.org/get-started")
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

    from saewb.models.load import cache_folder

    yield _folder("hub cache", Path(constants.HF_HUB_CACHE), "HF_HOME")
    yield _folder("saewb cache", cache_folder(), "SAEWB_CACHE")
    if constants.HF_HUB_OFFLINE:
        yield Finding("HF_HUB_OFFLINE", "set: nothing is fetched from the hub", "absent", "unset HF_HUB_OFFLINE")


def _folder(name: str, folder: Path, variable: str) -> Finding:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return Finding(name, f"{folder} cannot be written to", "wrong", f"export {variable}=<a folder of yours>")
    free = shutil.disk_usage(existing).free
    detail = f"{folder}, {free / 2**30:.1f} GiB free"
    if free < _MIN_FREE_BYTES:
        return Finding(name, detail, "wrong", f"export {variable}=<a folder on a larger disk>")
    return Finding(name, detail)


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
        yield _kernel(KernelSpecManager().get_kernel_spec("python3").argv[0])
    except NoSuchKernel:
        yield Finding("kernel", "Jupyter knows no python3", "wrong", f"{sys.executable} -m pip install ipykernel")
    folders = [_share_jupyter(), *map(Path, jupyter_path())]
    for extension, package in (("@jupyter-widgets/jupyterlab-manager", "ipywidgets"), ("anywidget", "anywidget")):
        name = f"{package} in the page"
        if any((folder / "labextensions" / extension).is_dir() for folder in folders):
            yield Finding(name, "installed")
        else:
            install = f"pip install --force-reinstall {package} jupyterlab_widgets"
            fix = f"{install}    # where JupyterLab itself is installed"
            yield Finding(name, "not found: panels would stay empty", "wrong", fix)


def _share_jupyter() -> Path:
    return Path(sys.prefix) / "share" / "jupyter"


def _kernel(python: str) -> Finding:
    path = Path(shutil.which(python) or python)
    if path.exists() and path.samefile(sys.executable):
        return Finding("kernel", f"python3 is {python}")
    if python in ("python", "python3") and (_share_jupyter() / "kernels" / "python3").is_dir():
        return Finding("kernel", f"python3 is the {python} of the environment JupyterLab is started in")
    fix = f"{sys.executable} -m ipykernel install --user --name saewb    # then choose the kernel saewb"
    return Finding("kernel", f"python3 is {python}, not {sys.executable}: saewb may be missing there", "wrong", fix)


def _bundled() -> Iterator[Finding]:
    from saewb import tiny

    for part, file in (("model", "model.safetensors"), ("sae", "sae_weights.safetensors")):
        path = tiny.folder(part) / file
        if not path.is_file():
            yield Finding(f"tiny {part}", f"{path} is missing", "wrong", "pip install --force-reinstall saewb")
            continue
        with path.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        n_tensors = sum(name != "__metadata__" for name in header)
        yield Finding(f"tiny {part}", f"{n_tensors} tensors, {path.stat().st_size / 2**20:.1f} MiB")


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
        detail = f"{url} does not answer: {getattr(error, 'reason', error)}"
        return Finding("hub", detail, "wrong", 'saewb.load_model("tiny") and folders work without it')

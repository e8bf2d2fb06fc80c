"""`saewb doctor`: check this machine, and suggest a fix for each problem. Changes nothing.

1. Python, and the packages that saewb requires, with the versions it allows.
2. Devices, and whether the installed torch can use them.
3. Cache folders of the hub and of saewb: whether they are writable, and their free space.
4. The notebook: the kernel that Jupyter starts, and the front-end half of the widgets.
5. The bundled model and SAE; and the hub, on request.
6. On request, a self-check of a device: attaching, training and indexing there give what the CPU gives.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from saewb._display import html_table
from saewb.errors import check_device, explain

if TYPE_CHECKING:
    import torch
    from packaging.requirements import Requirement
    from torch import Tensor, nn

State = Literal["ok", "absent", "wrong"]

_MARKS = {"ok": "ok", "absent": "-", "wrong": "!!"}
_MIN_FREE_BYTES = 5 * 2**30
_ROWS, _CTX_LEN, _STEPS = 8, 64, 4  # of the self-check: rows of text, their tokens, training steps
_HOOK = "blocks.2.hook_resid_post"
_TOLERANCE = 1e-3  # relative error from which a device's result is wrong: above float32's, below TF32's after layers
_MISCOUNTED = 1e-3  # fraction of firings that may differ: latents within rounding of a threshold


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


def doctor(network: bool = False, timeout: float = 5.0, check: bool | str = False) -> Checkup:
    """Check versions, devices, folders and the notebook, and suggest a line that fixes what is wrong.

    Nothing is changed, and no network is used unless requested. On the command line `saewb doctor` exits with 1 if
    something is wrong.

    Args:
        network: check whether the hub (HF_ENDPOINT, else huggingface.co) answers.
        timeout: seconds to wait for it.
        check: also run the bundled model and SAE on a device for about ten seconds, and compare with the CPU: a forward
            pass with the SAE attached, training steps, an index. "cuda", "mps", "cpu", ...; True is the device that
            `load_model` uses.

    Returns:
        A Checkup; `.ok` if nothing is wrong.

    Raises:
        ValueError: if `timeout` is not above 0, or if there is no such device.

    Example:
        >>> checkup = doctor()
        >>> [finding.name for finding in checkup.findings][:2], checkup.findings[1].state
        (['saewb', 'Python'], 'ok')
    """
    if timeout <= 0:
        raise ValueError(explain(f"timeout is {timeout!r}.", want="seconds above 0"))
    checks = (_python, _packages, _devices, _folders, _notebook, _bundled)
    device = _check_device(check) if check else None
    findings = [finding for look in checks for finding in look()]
    findings += [_hub(timeout)] if network else []
    findings += _self_check(device) if device is not None else []
    return Checkup(tuple(findings))


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


# -- self-check of a device ------------------------------------------------------------------------------------------


def _check_device(check: bool | str) -> torch.device:
    import torch

    return check_device(check if isinstance(check, str) else "cuda" if torch.cuda.is_available() else "cpu")


def _self_check(device: torch.device) -> Iterator[Finding]:
    """Compare attaching, training and indexing on a device with the same on the CPU, in float64 where it can be."""
    import torch

    from saewb import tiny
    from saewb.data.tokens import token_rows
    from saewb.models.load import load_model

    model = load_model("tiny", torch.float64, "cpu")
    text = [document.text for document in tiny.held_out_texts()[:_ROWS]]
    tokens = token_rows(model, text, _CTX_LEN)[:_ROWS]
    latents, logits = _attach(model, tokens, torch.device("cpu"))
    device_model, results = None, {}

    def attach() -> tuple[float, str]:
        nonlocal device_model
        device_model = load_model("tiny", torch.float32, device)
        results["latents"], results["logits"] = _attach(device_model, tokens, device)
        return _relative_error(results["logits"], logits), "logits of the model with the SAE attached"

    def train() -> tuple[float, str]:
        expected = _losses(model, tokens, torch.device("cpu"), "plain")
        return _relative_error(_losses(model, tokens, device, "auto"), expected), f"losses of {_STEPS} training steps"

    def index() -> tuple[float, str]:
        expected = (latents[_content(model, tokens)] != 0).double().sum(0)
        return _miscounted(_firings(device_model, tokens, device), expected), "firings in an index"

    for name, run in (("attach", attach), ("train", train), ("index", index)):
        yield _compared(f"check: {name}", device, run, _MISCOUNTED if name == "index" else _TOLERANCE)


def _compared(name: str, device: torch.device, run: Callable[[], tuple[float, str]], tolerance: float) -> Finding:
    start = time.perf_counter()
    try:
        error, what = run()
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as problem:  # what torch raises on a device
        detail = f"fails on {device}: {type(problem).__name__}: {str(problem).partition(chr(10))[0]}"
        return Finding(name, detail, "wrong", _device_fix(device))
    detail = f"{what} on {device} differ from the CPU's by {error:.0e}"
    if error <= tolerance:  # not so for nan
        return Finding(name, f"{detail}, {time.perf_counter() - start:.1f} s")
    return Finding(name, f"{detail}; {tolerance:.0e} are normal", "wrong", _device_fix(device))


def _device_fix(device: torch.device) -> str:
    import torch

    if device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        return 'torch.set_float32_matmul_precision("highest")    # then: saewb doctor --check'
    if device.type == "cpu":
        return "pip install --force-reinstall torch    # then: saewb doctor --check"
    return 'saewb.load_model(..., device="cpu")    # and another version of torch: pip install -U torch'


def _attach(model: nn.Module, tokens: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Latents and logits of a pass with the bundled SAE attached, on the CPU in float64."""
    import torch

    from saewb.interventions.attachment import attach
    from saewb.pretrained.load import load_sae

    sae = load_sae("tiny", dtype=model.cfg.dtype, device=device)
    with torch.no_grad(), attach(model, sae) as attached:
        logits = model(tokens.to(device))
        return attached.latents[sae].cpu().double(), logits.cpu().double()


def _losses(model: nn.Module, tokens: Tensor, device: torch.device, step: Literal["auto", "plain"]) -> Tensor:
    """Losses of a few training steps on the model's activations."""
    import torch

    from saewb.data.stream import stream_tensors
    from saewb.models.capture import capture
    from saewb.training.config import TrainConfig
    from saewb.training.loop import Training
    from saewb.training.objectives import TopK

    with torch.no_grad():
        x = capture(model, tokens, [_HOOK])[_HOOK].float()[:, 1:].flatten(0, 1).to(device)
    config = TrainConfig(_STEPS * len(x), batch_tokens=len(x), lr=1e-3, step=step, look_every_steps=1)
    training = Training(stream_tensors({_HOOK: x}, batch_tokens=len(x), repeat=True), TopK(d_sae=512, k=16), config)
    return torch.tensor([done.only.numbers()["loss"] for done in training], dtype=torch.float64)


def _firings(model: nn.Module, tokens: Tensor, device: torch.device) -> Tensor:
    """Tokens on which each latent is active, according to an index."""
    from saewb.features.build import build_index
    from saewb.pretrained.load import load_sae

    index = build_index(model, load_sae("tiny", device=device), tokens, n_logits=0, n_nearest=0)
    return index.density.cpu() * index.n_tokens


def _content(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mask of the tokens that are not special."""
    from saewb.models.tokenizer import special_ids, special_mask

    return ~special_mask(tokens, special_ids(model, True))


def _relative_error(values: Tensor, expected: Tensor) -> float:
    return float((values - expected).norm() / expected.norm())


def _miscounted(counts: Tensor, expected: Tensor) -> float:
    return float((counts - expected).abs().sum() / expected.sum())

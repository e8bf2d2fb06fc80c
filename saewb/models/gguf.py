"""Convert a GGUF file, once, into a Hugging Face folder in saewb's cache.

transformers and the `gguf` package read the file: any of their architectures and quantizations, dequantized to float32.
That parses the metadata string by string and takes up to a minute; later loads map the converted weights into memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import reprlib
import warnings
from pathlib import Path

import numpy as np
import torch

from saewb._files import atomic_folder
from saewb.errors import FormatError, explain
from saewb.models.checkpoint import check_loading_info

# Metadata that transformers ignores, although other values than these change what the model computes.
_IGNORED_BY_TRANSFORMERS = {"rope.scaling.type": (None, "none"), "attention.clamp_kqv": (None, 0.0)}


# Sizes by which transformers allocates memory and makes names: each is a dimension or the number of some tensors.
_SIZES = (
    *("block_count", "embedding_length", "feed_forward_length", "expert_feed_forward_length", "vocab_size"),
    *("expert_count", "expert_used_count", "expert_shared_count", "rope.dimension_count", "leading_dense_block_count"),
    *(f"attention.{name}" for name in ("head_count", "head_count_kv", "key_length", "value_length")),
)


def gguf_folder(path: Path, cache: Path) -> Path:
    """Convert a GGUF file to a folder with model and tokenizer in Hugging Face layout, unless the cache has it.

    Args:
        path: the .gguf file.
        cache: folder of converted files; each is named by a hash of its content.

    Returns:
        A folder inside `cache`. Weights are dense float32, without quantization settings.

    Raises:
        FileNotFoundError: if there is no such file.
        FormatError: if it is damaged, of an architecture or tensor type that transformers does not read, or if a tensor
            would be missing or unused.

    References:
        The GGUF specification, github.com/ggml-org/ggml/blob/master/docs/gguf.md.
    """
    if not path.is_file():
        raise FileNotFoundError(explain(f"no file {str(path)!r}.", want="a .gguf file"))
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if (magic := file.read(4)) != b"GGUF":
            raise FormatError(explain(f"{path.name} begins with {magic!r}.", want="b'GGUF'"))
        while chunk := file.read(2**22):
            digest.update(chunk)
    target = cache / f"{path.stem}-{digest.hexdigest()[:16]}"
    if not (target / "config.json").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # another process may have converted it meanwhile
            atomic_folder(target, lambda folder: _convert(path, folder), ours=(), overwrite=False)
    return target


def _convert(path: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    fix = "load it elsewhere, then saewb.load_model(model, tokenizer=tokenizer)"
    try:
        _check_metadata(path)
        source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer = AutoTokenizer.from_pretrained(**source)
            model, keys = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, output_loading_info=True)
    except FormatError:
        raise
    except Exception as error:  # gguf and transformers raise whatever their parsing runs into
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise FormatError(
            explain(f"{path.name} cannot be read: {reason}", want="a whole GGUF file", fix=fix)
        ) from error
    check_loading_info(path.name, keys)
    # All weights are dense now; save_pretrained refuses a model with quantization settings.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check_metadata(path: Path) -> None:
    """Refuse files with settings that transformers would silently ignore."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    for key, plain in _IGNORED_BY_TRANSFORMERS.items():
        field = reader.fields.get(f"{architecture}.{key}")
        value = None if field is None else field.contents()
        if value not in plain:
            what = f"{path.name}: {architecture}.{key} is {value!r}, which transformers leaves out."
            raise FormatError(explain(what, want=" or ".join(map(repr, plain))))
    largest = max((int(n) for tensor in reader.tensors for n in tensor.shape), default=0)
    largest = max(largest, len(reader.tensors))
    for name in _SIZES:
        field = reader.fields.get(f"{architecture}.{name}")
        sizes = [] if field is None else np.atleast_1d(field.contents()).tolist()
        if any(not isinstance(n, (int, float)) or not 0 <= n <= largest for n in sizes):
            what = f"{path.name}: {architecture}.{name} is {reprlib.repr(field.contents())}."
            raise FormatError(explain(what, want=f"at most {largest}, as large as its tensors are"))
    if "rope_freqs.weight" in {tensor.name for tensor in reader.tensors}:
        what = f"{path.name} scales its rotary frequencies ('rope_freqs.weight'), which transformers leaves out."
        raise FormatError(explain(what, want="the model's own folder in Hugging Face layout"))

"""Check that a checkpoint is the model it is loaded as: every tensor there, none left over, a tokenizer that fits.

transformers fills missing tensors with random numbers and drops those it has no place for, with a warning that
transformer-lens silences.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from saewb.errors import FormatError, explain

_WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.", "base_model.model.", "_forward_module.")
"""Prefixes of names in checkpoints of compiled or wrapped models."""
_COMPUTED = re.compile(
    r"(^|\.)((attn|attention|self_attn)\.(attention\.)?(bias|masked_bias)|rotary_emb\.\w+|position_ids|embed_positions)$"
)
"""Causal masks and position tables that old checkpoints hold, and models compute anew."""
_OTHER_PARTS = re.compile(r"(^|\.)(vision\w*|visual|audio\w*|multi_modal_projector|mtp)\.")
"""Parts of a model of several modalities, or for several tokens ahead, that its language model is loaded without."""


@final
class CheckedClass:
    """A model class of transformers, whose `from_pretrained` raises where weights are missing or left over.

    Args:
        model_class: with `from_pretrained`, which takes `output_loading_info`.
    """

    def __init__(self, model_class: Any) -> None:
        self._model_class = model_class

    def from_pretrained(self, name: str, **options: Any) -> nn.Module:
        """Load as the class does.

        Raises:
            FormatError: as `check_loading_info`; for an adapter beside or in place of a model's own weights.
        """
        if (Path(name) / "adapter_config.json").is_file():
            what = f"{name!r} is an adapter (adapter_config.json), which changes another model."
            fix = "peft_model.merge_and_unload().save_pretrained('merged'); saewb.load_model('merged')"
            raise FormatError(explain(what, want="a model with all its weights", fix=fix))
        # Tensors of other shapes are reported with the rest, instead of in an error of their own.
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = self._model_class.from_pretrained(name, **options)
        check_loading_info(name, info)
        return model


def check_loading_info(name: str, info: Mapping[str, Any]) -> None:
    """Check the loading info of `from_pretrained(..., output_loading_info=True)`.

    Allowed are tensors left over that models compute anew (causal masks, rotary frequencies), and those of other
    modalities.

    Args:
        name: of the checkpoint, for the error.
        info: what was missing, mismatched and unexpected.

    Raises:
        FormatError: if a tensor is missing, of another shape or left over.
    """
    left_over = [str(key) for key in info["unexpected_keys"]]
    faults = {
        "missing": [str(key) for key in info["missing_keys"]],
        "of another shape": [f"{key} {tuple(got)}, not {tuple(want)}" for key, got, want in info["mismatched_keys"]],
        "left over": [key for key in left_over if not (_COMPUTED.search(key) or _OTHER_PARTS.search(key))],
        "unreadable": list(map(str, info.get("error_msgs", ()))),
    }
    texts = [_list_keys(role, keys) for role, keys in faults.items() if keys]
    if not texts:
        return
    what = f"{name!r} is not the model that its config.json describes: {'; '.join(texts)}."
    fix = ""
    if prefix := next((p for p in _WRAPPERS if any(key.startswith(p) for key in left_over)), None):
        fix = f"model.load_state_dict({{k.removeprefix({prefix!r}): t for k, t in tensors.items()}}), then save it anew"
    raise FormatError(explain(what, want="exactly the tensors of its architecture", fix=fix))


def check_tokenizer(name: str, model: nn.Module) -> None:
    """Check that the model has an embedding for every token of its tokenizer; it may have more, as padding.

    Special tokens beyond the embedding are allowed, but for BOS and EOS: many tokenizers add some that plain text has
    not, and one that is run is an error at once.

    Raises:
        FormatError: if it has not.
    """
    tokenizer, d_vocab = getattr(model, "tokenizer", None), model.cfg.d_vocab
    if tokenizer is None or len(tokenizer) <= d_vocab:
        return
    used = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    unused = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special and i not in used}
    beyond = [(token, i) for token, i in tokenizer.get_vocab().items() if i >= d_vocab and i not in unused]
    if beyond:
        token, i = beyond[0]
        what = f"{name!r} embeds {d_vocab:,} tokens, its tokenizer has {len(tokenizer):,}, such as {token!r} ({i:,})."
        raise FormatError(explain(what, want="the tokenizer of this model", fix="saewb.load_model(..., tokenizer=...)"))


def check_dense(model: nn.Module) -> None:
    """Check that weights are plain floating-point numbers, not packed ones or ones that need a scale.

    Raises:
        FormatError: for float8, integers or packed weights.
    """
    plain = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for key, parameter in model.named_parameters():
        if parameter.dtype not in plain:
            what = f"{key} of this model is {parameter.dtype}, which saewb cannot compute with."
            fix = "saewb.load_model(model.dequantize())"
            raise FormatError(explain(what, want="float32, bfloat16, float16 or float64", fix=fix))


def _list_keys(role: str, keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"{role} {', '.join(sorted(keys)[:3])}{more}"

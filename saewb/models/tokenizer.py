"""Tokenizers: the text of each token, special tokens, BOS."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from saewb.errors import explain
from saewb.sae.base import SparseCoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["special_ids", "special_mask", "special_token_ids", "token_strings", "tokenizer_of"]


def token_strings(model_or_tokenizer: Any, ids: Int[Tensor, " pos"] | Sequence[int]) -> list[str]:
    """Decode each token, so that the strings joined are the decoded text.

    A character whose UTF-8 bytes are spread over several tokens (emoji, rare CJK) belongs to the last of them, and the
    earlier ones are empty: decoded one by one, each would be U+FFFD. Bytes that never become a character are U+FFFD, at
    the token after which that is certain. Special tokens are spelled out.

        "".join(token_strings(t, ids)) == t.decode(ids, clean_up_tokenization_spaces=False)

    Args:
        model_or_tokenizer: a model from `load_model`, or a tokenizer.
        ids: token ids of one text.

    Returns:
        As many strings as ids.

    Raises:
        ValueError: if ids have more than one axis.

    Example:
        >>> from saewb.models.load import load_model
        >>> tokenizer = load_model("tiny", device="cpu").tokenizer
        >>> strings = token_strings(tokenizer, tokenizer("A 🙂 sun", add_special_tokens=False).input_ids)
        >>> "".join(strings), [s.strip() for s in strings if "🙂" in s]
        ('A 🙂 sun', ['🙂'])
    """
    tokenizer = getattr(model_or_tokenizer, "tokenizer", model_or_tokenizer)
    if isinstance(ids, Tensor):
        if ids.ndim != 1:
            raise ValueError(explain(f"token_strings got ids of shape {tuple(ids.shape)}.", want="[pos]", fix="ids[0]"))
        ids = ids.tolist()
    ids = [int(i) for i in ids]
    strings, text = _decode_windows(tokenizer, ids), _decode(tokenizer, ids)
    # A decoder that rewrites earlier text when more follows (no byte-level one does) needs the slow, exact way.
    return strings if "".join(strings) == text else _decode_prefixes(tokenizer, ids, text)


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _decode_windows(tokenizer: Any, ids: list[int]) -> list[str]:
    # A token adds the text of a short window with it, less the text of the window without it. The window begins one
    # string early, since some decoders treat the first token of a text differently (a leading space is dropped).
    strings, window_start, decoded_end = [], 0, 0
    for i in range(len(ids)):
        before = _decode(tokenizer, ids[window_start:decoded_end])
        after = _decode(tokenizer, ids[window_start : i + 1])
        is_partial_character = after.endswith("\ufffd") and i + 1 < len(ids)
        strings.append("" if is_partial_character else after[len(before) :])
        if not is_partial_character:
            window_start, decoded_end = decoded_end, i + 1
    return strings


def _decode_prefixes(tokenizer: Any, ids: list[int], text: str) -> list[str]:
    prefixes = (_decode(tokenizer, ids[: i + 1]) for i in range(len(ids)))
    ends = accumulate((_n_equal_characters(prefix, text) for prefix in prefixes), max, initial=0)
    return [text[a:b] for a, b in pairwise(ends)]


def _n_equal_characters(a: str, b: str) -> int:
    """Length of the common prefix of two texts."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


_SPECIAL = ("bos", "eos", "pad", "sep", "cls", "decoder_start")


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of the tokenizer's special tokens: BOS, EOS, PAD, SEP, CLS, and the decoder's start token.

    Only those that the tokenizer names as such. A chat marker counts only if it is one of them (as `<|im_start|>` is
    SmolLM2's BOS); UNK replaces text and never counts.

    Args:
        tokenizer: the model's tokenizer.

    Returns:
        Unique ids, ascending; empty if the tokenizer names none.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from saewb import tiny
        >>> special_token_ids(AutoTokenizer.from_pretrained(tiny.folder("model")))
        (0,)
    """
    # Most tokenizers have no decoder start of their own, hence the default.
    ids = (getattr(tokenizer, f"{name}_token_id", None) for name in _SPECIAL)
    return tuple(sorted({i for i in ids if i is not None}))


def special_mask(tokens: Int[Tensor, "*batch"], ids: Iterable[int]) -> Bool[Tensor, "*batch"]:
    """Mask of special tokens: True where a token is one of `ids`, to be left out of statistics about text.

    Args:
        tokens: token ids, of any shape.
        ids: special token ids, as from `special_token_ids`; may be empty.

    Returns:
        A mask of the shape and on the device of `tokens`.

    Example:
        >>> special_mask(torch.tensor([[0, 7, 0], [0, 5, 9]]), (0, 9)).int().tolist()
        [[1, 0, 1], [1, 0, 1]]
    """
    return torch.isin(tokens, torch.tensor(sorted(set(ids)), dtype=tokens.dtype, device=tokens.device))


def special_ids(model: nn.Module, skip_special_tokens: bool | Sequence[int]) -> tuple[int, ...]:
    """Resolve `skip_special_tokens` to token ids: the tokenizer's special tokens, none, or those listed.

    Args:
        model: its tokenizer is used.
        skip_special_tokens: True, False, or a list of token ids.

    Returns:
        Token ids, ascending where they are the tokenizer's.

    Raises:
        ValueError: for True on a model without a tokenizer.

    Example:
        >>> import saewb
        >>> model = saewb.load_model("tiny", device="cpu")
        >>> special_ids(model, True), special_ids(model, False), special_ids(model, [3, 1])
        ((0,), (), (3, 1))
    """
    if isinstance(skip_special_tokens, bool):
        return special_token_ids(tokenizer_of(model)) if skip_special_tokens else ()
    return tuple(int(i) for i in skip_special_tokens)


def prepend_bos(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Make a tokenizer prepend its BOS token, and declare that to transformer-lens; in place.

    transformer-lens reloads a tokenizer that adds no BOS by `init_kwargs["name_or_path"]`: a KeyError for one that was
    created in memory, a download for one from the Hub.

    Args:
        tokenizer: fast or slow. The post-processing of a slow one, of one without a BOS token, and of one that adds BOS
            already is not changed; for a slow one `to_tokens` writes BOS into the text.
        name: name for transformer-lens, if the tokenizer has none yet.
    """
    tokenizer.init_kwargs.setdefault("name_or_path", name)
    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    if bos is None or bos_id is None:
        return
    tokenizer.init_kwargs["add_bos_token"] = True
    if not tokenizer.is_fast or tokenizer.encode("a")[:1] == [bos_id]:
        return
    from tokenizers import processors

    backend = tokenizer.backend_tokenizer
    ahead = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, bos_id)]
    )
    before = backend.post_processor
    backend.post_processor = ahead if before is None else processors.Sequence([before, ahead])


def tokenizer_of(model: nn.Module) -> Any:
    """Return the model's tokenizer, or raise if it has none.

    Args:
        model: a TransformerBridge or HookedTransformer.

    Returns:
        A tokenizer of transformers.

    Raises:
        TypeError: if `model` is an SAE, or a model of another library.
        ValueError: if it has no tokenizer.

    Example:
        >>> import saewb
        >>> tokenizer_of(saewb.load_model("tiny", device="cpu")).bos_token
        '<|endoftext|>'
    """
    if isinstance(model, SparseCoder):
        what = f"got {type(model).__name__} where the model goes."
        raise TypeError(explain(what, want="the model first, then the SAE", fix="saewb.evaluate(model, sae, tokens)"))
    if not hasattr(model, "hook_dict"):
        what = f"got {type(model).__name__} where the model goes: it is no model of TransformerLens."
        raise TypeError(explain(what, fix="model = saewb.load_model(model, tokenizer=tokenizer)"))
    if getattr(model, "tokenizer", None) is None:
        what = "this model has no tokenizer, so neither text nor special tokens can be resolved."
        raise ValueError(explain(what, want="token ids, and the ids of special tokens", fix="skip_special_tokens=[0]"))
    return model.tokenizer

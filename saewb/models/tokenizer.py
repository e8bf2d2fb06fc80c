"""Tokenizers: the text of each token, special tokens, BOS."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import accumulate, groupby, pairwise
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from saewb._indices import indices_of
from saewb.errors import explain
from saewb.sae.base import SparseCoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "end_ids",
    "single_texts",
    "special_ids",
    "special_mask",
    "special_token_ids",
    "token_strings",
    "tokenizer_of",
]


def token_strings(model_or_tokenizer: Any, ids: Int[Tensor, " pos"] | Sequence[int]) -> list[str]:
    """Decode each token, so that the strings joined are the decoded text.

    A character whose UTF-8 bytes are spread over several tokens (emoji, rare CJK) belongs to the last of them, and the
    earlier ones are empty: decoded one by one, each would be U+FFFD. Bytes that never become a character are U+FFFD, at
    the token after which that is certain. Special tokens are spelled out.

        "".join(token_strings(t, ids)) == t.decode(ids, clean_up_tokenization_spaces=False)

    but for two things that decoding hides: the space of a first token that has one ("▁was" of SentencePiece is " was",
    wherever it stands), and ids beyond the tokenizer, which models with a padded vocabulary have: "<4000>".

    Args:
        model_or_tokenizer: a model from `load_model`, or a tokenizer.
        ids: token ids of one text.

    Returns:
        As many strings as ids.

    Raises:
        ValueError: if ids have more than one axis, or are not whole.
        TypeError: if they are no numbers.

    Example:
        >>> from saewb.models.load import load_model
        >>> tokenizer = load_model("tiny", device="cpu").tokenizer
        >>> strings = token_strings(tokenizer, tokenizer("A 🙂 sun", add_special_tokens=False).input_ids)
        >>> "".join(strings), [s.strip() for s in strings if "🙂" in s]
        ('A 🙂 sun', ['🙂'])
    """
    tokenizer = getattr(model_or_tokenizer, "tokenizer", model_or_tokenizer)
    ids = indices_of(ids, "ids", repeats=True).tolist()
    strings: list[str] = []
    for is_known, group in groupby(
        zip(ids, _raw_tokens(tokenizer, ids), strict=True), lambda pair: pair[1] is not None
    ):
        run, raw = zip(*group, strict=True)
        strings += _run_strings(tokenizer, list(run), raw[0]) if is_known else [f"<{i}>" for i in run]
    return strings


def _run_strings(tokenizer: Any, ids: list[int], first: str) -> list[str]:
    """Strings of ids that the tokenizer has, the first of which is spelled `first` in its vocabulary."""
    strings, text = _decode_windows(tokenizer, ids), _decode(tokenizer, ids)
    # A decoder that rewrites earlier text when more follows (no byte-level one does) needs the slow, exact way.
    strings = strings if "".join(strings) == text else _decode_prefixes(tokenizer, ids, text)
    strings[0] = _with_space(first, strings[0])
    return strings


def single_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, inside: bool = False) -> dict[int, str]:
    """Text of each token by itself, including the space before a word; ids that the tokenizer lacks are left out.

    A token that is only part of a character's bytes is U+FFFD.

    Args:
        tokenizer: of the vocabulary.
        ids: token ids.
        inside: as they read after another token, where tokenizers of whole words write a space.

    Returns:
        Text by id.

    Example:
        >>> from saewb.models.load import load_model
        >>> single_texts(load_model("tiny", device="cpu").tokenizer, [281, 99_999])
        {281: ' and'}
    """
    raw = {i: token for i, token in zip(ids, _raw_tokens(tokenizer, ids), strict=True) if token is not None}
    if not raw:
        return {}  # `batch_decode` of nothing is one empty text
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"] if inside else []
    before = _decode(tokenizer, anchor)
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    decoded = tokenizer.batch_decode([[*anchor, i] for i in raw], **options)
    each = zip(raw, decoded, strict=True)
    texts = (t[len(before) :] if t.startswith(before) else _decode(tokenizer, [i]) for i, t in each)
    return {i: _with_space(token, text) for (i, token), text in zip(raw.items(), texts, strict=True)}


def _raw_tokens(tokenizer: Any, ids: Sequence[int]) -> list[str | None]:
    """Each token as the vocabulary spells it; None for ids that the tokenizer lacks."""
    spelled = tokenizer.convert_ids_to_tokens([max(0, i) for i in ids])
    return [token if i >= 0 else None for i, token in zip(ids, spelled, strict=True)]


def _with_space(token: str, text: str) -> str:
    # A sentencepiece decoder drops the space of a text's first token.
    return " " + text if token.startswith("▁") and not text.startswith(" ") else text


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
    ids = (_ids(getattr(tokenizer, f"{name}_token_id", None)) for name in _SPECIAL)
    return tuple(sorted({i for several in ids for i in several}))


def end_ids(model: nn.Module) -> tuple[int, ...]:
    """Ids of the tokens that end a text: the tokenizer's EOS, and those that the model's generation config adds.

    Chat models have several (Llama 3: `<|end_of_text|>`, `<|eot_id|>`). Ids of a config count only if they are special
    tokens of the tokenizer: a model made in memory has those of another one.

    Args:
        model: with a tokenizer.

    Returns:
        Unique ids, ascending; empty if there are none.

    Example:
        >>> from saewb.models.load import load_model
        >>> end_ids(load_model("tiny", device="cpu"))
        (0,)
    """
    tokenizer, hf = tokenizer_of(model), getattr(model, "original_model", None)
    configs = (getattr(hf, "generation_config", None), getattr(hf, "config", None))
    configured = {i for config in configs for i in _ids(getattr(config, "eos_token_id", None))}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = set(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
    return tuple(sorted({*_ids(tokenizer.eos_token_id), *(configured & special)}))


def _ids(token_id: int | Sequence[int] | None) -> tuple[int, ...]:
    """One id, several, or none."""
    return () if token_id is None else tuple(token_id) if isinstance(token_id, (list, tuple)) else (token_id,)


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
        skip_special_tokens: True, False, or token ids.

    Returns:
        Token ids, ascending where they are the tokenizer's; these include every token that ends a text.

    Raises:
        ValueError: for True on a model without a tokenizer; for a fraction.
        TypeError: for anything that is no id.

    Example:
        >>> import saewb
        >>> model = saewb.load_model("tiny", device="cpu")
        >>> special_ids(model, True), special_ids(model, False), special_ids(model, [3, 1])
        ((0,), (), (3, 1))
    """
    if isinstance(skip_special_tokens, bool):
        return _special_ids(model) if skip_special_tokens else ()
    return tuple(indices_of(skip_special_tokens, "skip_special_tokens", repeats=True).tolist())


def _special_ids(model: nn.Module) -> tuple[int, ...]:
    return tuple(sorted({*special_token_ids(tokenizer_of(model)), *end_ids(model)}))


def text_ids(model: nn.Module, text: str) -> Int[Tensor, "1 pos"]:
    """Token ids of a text, with the special tokens the model's tokenizer adds; BOS that is in the text is not doubled.

    Chat templates write it themselves: `tokenizer.apply_chat_template(messages, tokenize=False)`.

    Args:
        model: with a tokenizer.
        text: may begin with the tokenizer's BOS.

    Example:
        >>> from saewb.models.load import load_model
        >>> model = load_model("tiny", device="cpu")
        >>> text_ids(model, "<|endoftext|>A cat").tolist() == text_ids(model, "A cat").tolist()
        True
    """
    tokenizer = tokenizer_of(model)
    ids, bos = model.to_tokens(text, truncate=False), tokenizer.bos_token  # too long a text is for the caller to refuse
    if not bos or not text.startswith(bos):
        return ids
    n_in_text = len(re.match(f"(?:{re.escape(bos)})*", text)[0]) // len(bos)
    n = int((ids[0] == tokenizer.bos_token_id).cumprod(0).sum())
    return ids[:, 1:] if n > n_in_text else ids


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

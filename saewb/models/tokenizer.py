"""Token ids as the text of each token, whole characters only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from saewb.errors import explain
from saewb.sae.base import SparseCoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_strings(model_or_tokenizer: Any, ids: Int[Tensor, " pos"] | Sequence[int]) -> list[str]:
    """The text of each token, such that joined they are the text of all.

    A character whose UTF-8 bytes are spread over several tokens (emoji, rare CJK) stands at the last of them, and the
    earlier ones are empty: decoded one by one, each would be U+FFFD. Bytes that never become a character are U+FFFD, at
    the token after which that is certain. Special tokens are spelled out.

        "".join(token_strings(t, ids)) == t.decode(ids, clean_up_tokenization_spaces=False)

    Args:
        model_or_tokenizer: what `load_model` returned, or a tokenizer.
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
    strings, whole = _pieces(tokenizer, ids), _decode(tokenizer, ids)
    # A decoder that rewrites earlier text when more comes (none known among byte-level ones) gets the slow, sure way.
    return strings if "".join(strings) == whole else _prefix_pieces(tokenizer, ids, whole)


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    # What a token adds is the text of a short window with it, less the text of the window without. The window begins
    # one piece early, since some decoders treat the first token of a text differently (a leading space is dropped).
    strings, before, shown = [], 0, 0
    for i in range(len(ids)):
        old, new = _decode(tokenizer, ids[before:shown]), _decode(tokenizer, ids[before : i + 1])
        open_character = new.endswith("\ufffd") and i + 1 < len(ids)
        strings.append("" if open_character else new[len(old) :])
        if not open_character:
            before, shown = shown, i + 1
    return strings


def _prefix_pieces(tokenizer: Any, ids: list[int], whole: str) -> list[str]:
    ends = [_shared(_decode(tokenizer, ids[: i + 1]), whole) for i in range(len(ids))]
    cuts = [0, *(max(ends[: i + 1]) for i in range(len(ids)))]
    return [whole[a:b] for a, b in pairwise(cuts)]


def _shared(a: str, b: str) -> int:
    """How many characters two texts have in common from their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


_SPECIAL = ("bos", "eos", "pad", "sep", "cls", "decoder_start")


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that frame text rather than say something: BOS, EOS, PAD, SEP, CLS, and the decoder's start token.

    Only those that the tokenizer names as such. A chat marker counts where it is one of them (as `<|im_start|>` is
    SmolLM2's BOS) and not otherwise; UNK stands for text and never counts.

    Args:
        tokenizer: of the model.

    Returns:
        Ids, each once, ascending; empty if the tokenizer names none.

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
    """True where a token is one of `ids`: the positions to leave out of statistics about text.

    Args:
        tokens: token ids, of any shape.
        ids: as `special_token_ids` gives them; none means that no token is special.

    Returns:
        The shape and device of `tokens`.

    Example:
        >>> special_mask(torch.tensor([[0, 7, 0], [0, 5, 9]]), (0, 9)).int().tolist()
        [[1, 0, 1], [1, 0, 1]]
    """
    return torch.isin(tokens, torch.tensor(sorted(set(ids)), dtype=tokens.dtype, device=tokens.device))


def special_ids(model: nn.Module, skip_special_tokens: bool | Sequence[int]) -> tuple[int, ...]:
    """The ids that `skip_special_tokens` means for this model: those of its tokenizer, none, or the ones listed.

    Args:
        model: asked for its tokenizer.
        skip_special_tokens: as everywhere: True, False, or a list of token ids.

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
    """Make a tokenizer put its BOS token in front, and say so to transformer-lens; in place.

    transformer-lens wants a tokenizer that adds BOS, and loads one that does not anew by `init_kwargs["name_or_path"]`:
    a KeyError for a tokenizer made in memory, a download for one from the hub.

    Args:
        tokenizer: fast or slow; one that has no BOS token, or adds it already, keeps its post-processing. A slow one
            keeps it too: `to_tokens` then writes BOS into the text.
        name: what transformer-lens shall call it, if it has no name yet.
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
    """The model's tokenizer, checked to be there.

    Args:
        model: a TransformerBridge or HookedTransformer.

    Returns:
        The tokenizer, of transformers.

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
        what = "this model has no tokenizer, so neither text nor special tokens can be told."
        raise ValueError(explain(what, want="token ids, and the ids of special tokens", fix="skip_special_tokens=[0]"))
    return model.tokenizer

"""Token rows and prompts for a model, from texts or token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor, nn

from saewb.data.packing import Packer, check_token_ids
from saewb.errors import explain
from saewb.models.tokenizer import tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def pack(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, ctx_len: int, *, bos: bool = True
) -> Int[Tensor, "rows ctx_len"]:
    """Concatenate documents and cut them into full rows, without padding.

    With `bos`, the documents make one stream, BOS before each. The stream is cut from its start: where the next token
    is a BOS (a document begins there) the row takes `ctx_len` tokens; elsewhere it takes `ctx_len - 1` after a BOS of
    its own. So every row begins with BOS, as a model sees a prompt; further ones mark where a document begins; and a
    document continues in the next row without a token lost or repeated. An incomplete row at the end is dropped.

    Without `bos`, the tokenizer's EOS, if it has one, separates the documents of a row, and rows are cut every
    `ctx_len` tokens.

    Texts are encoded as they are, without the special tokens a tokenizer adds. An empty text leaves no trace. For more
    than fits in memory, and for other documents than texts: `saewb.stream_tokens`, which makes the same rows.

    Args:
        texts: the documents, in order.
        tokenizer: of the model; or the model.
        ctx_len: tokens per row, BOS included; at least 2.
        bos: begin rows and documents with BOS; wrong only for models trained without it.

    Returns:
        int64 token ids.

    Raises:
        TypeError: if `texts` is one string.
        ValueError: if `texts` is empty or too short for one row, if ctx_len < 2, or if `bos` and there is no BOS token.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from saewb import tiny
        >>> rows = pack(["A cat.", "A dog sat."], AutoTokenizer.from_pretrained(tiny.folder("model")), 4)
        >>> rows[:, 0].tolist(), rows.shape[1]
        ([0, 0], 4)
    """
    if isinstance(texts, str):
        raise TypeError(explain("got one string.", want="a list of documents", fix="[text]"))
    if len(texts) == 0:
        raise ValueError(explain("got no texts.", want="at least one document"))
    if other := next((type(text).__name__ for text in texts if not isinstance(text, str)), None):
        fix = "[document.text for document in texts]" if other == "Document" else ""
        raise TypeError(explain(f"got a {other} among the texts.", want="strings", fix=fix))
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if bos and tokenizer.bos_token_id is None:
        raise ValueError(explain("this tokenizer has no BOS token.", fix="pack(texts, tokenizer, ctx_len, bos=False)"))
    documents = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    packer = Packer(ctx_len, *(tokenizer.bos_token_id,) * 2) if bos else Packer(ctx_len, None, tokenizer.eos_token_id)
    rows = [row for ids in documents for row in packer.rows(ids)]
    if not rows:
        what = f"{len(texts)} texts of {sum(map(len, documents))} tokens do not fill one row."
        raise ValueError(explain(what, want=f"{ctx_len} tokens or more, or shorter rows", fix="ctx_len=16"))
    return torch.tensor(rows, dtype=torch.long)


def token_rows(model: nn.Module, tokens: Tensor | Sequence[str], ctx_len: int) -> Int[Tensor, "rows ctx"]:
    """Token rows for a model: ids as they are, or texts packed with its tokenizer.

    Args:
        model: any; its tokenizer, and whether it was trained with BOS, matter if `tokens` are texts.
        tokens: ids, `[rows, ctx]`, without padding; or texts, to be packed into rows of `ctx_len`.
        ctx_len: tokens per row, BOS included, if `tokens` are texts.

    Returns:
        int64 ids on the CPU, with rows of at least two tokens.

    Raises:
        TypeError: if `tokens` are neither integers nor texts.
        ValueError: if they have another shape, or texts do not fill a row.

    Example:
        >>> import saewb
        >>> model, texts = saewb.load_model("tiny", device="cpu"), ["The river flows."] * 9
        >>> token_rows(model, texts, 16).shape
        torch.Size([2, 16])
    """
    if not isinstance(tokens, Tensor):
        tokenizer = tokenizer_of(model)
        bos = tokenizer.bos_token_id is not None and model.cfg.default_prepend_bos is not False
        return pack(tokens, tokenizer, ctx_len, bos=bos)
    check_token_ids(tokens, min_length=2)
    d_vocab = getattr(getattr(model, "cfg", None), "d_vocab", None)
    if d_vocab is not None and not 0 <= int(tokens.min()) <= int(tokens.max()) < d_vocab:
        what = f"got token ids {int(tokens.min()):,} to {int(tokens.max()):,}; this model has {d_vocab:,}."
        raise ValueError(explain(what, want="ids of this model's own tokenizer", fix="model.to_tokens(text)"))
    return tokens.detach().long().cpu()


def prompt_ids(model: nn.Module, prompt: object) -> Int[Tensor, "1 pos"]:
    """Token ids of one prompt: ids as they are, or a text with the special tokens the model's tokenizer adds.

    Args:
        model: its tokenizer, context length and device are used.
        prompt: a text; or token ids, `[pos]` or `[1, pos]`.

    Returns:
        int64 ids on the model's device.

    Raises:
        TypeError: if it is neither.
        ValueError: for several texts, none, no token, or more than the model's context.

    Example:
        >>> import saewb
        >>> model = saewb.load_model("tiny", device="cpu")
        >>> prompt_ids(model, "A cat").shape[0], prompt_ids(model, [0, 5]).tolist()
        (1, [[0, 5]])
    """
    device = next(model.parameters()).device
    if isinstance(prompt, str):
        tokenizer_of(model)  # raises if there is none
        ids = model.to_tokens(prompt, truncate=False)  # too long a prompt raises below
    elif isinstance(prompt, (list, tuple)) and all(type(i) is int for i in prompt):
        ids = torch.tensor(prompt, dtype=torch.long)
    else:
        ids = prompt
    if not isinstance(ids, Tensor) or ids.is_floating_point():
        raise TypeError(explain(f"got a {type(prompt).__name__} as prompt.", want="one text, or token ids [pos]"))
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        what = f"got a prompt of shape {tuple(ids.shape)}."
        raise ValueError(explain(what, want="one text at a time: token ids [pos] or [1, pos]"))
    n_ctx = getattr(model.cfg, "n_ctx", None)
    if n_ctx is not None and ids.shape[1] > n_ctx:
        what = f"got a prompt of {ids.shape[1]:,} tokens; {model.cfg.model_name} takes {n_ctx:,} at most."
        raise ValueError(explain(what, want="a shorter one", fix=f"model.to_tokens(prompt)[:, :{n_ctx}]"))
    return ids.long().to(device)

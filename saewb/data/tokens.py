"""Token rows and prompts for a model, from texts or token ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from saewb._indices import as_tensor
from saewb.data.chats import chat_ids, check_messages, is_chat
from saewb.data.packing import TokenStream, check_token_ids, stream_tokens, token_matrix
from saewb.errors import explain
from saewb.models.tokenizer import text_ids, tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PASS_TOKENS = 4096
"""Tokens per forward pass, about."""


def pack(
    texts: Any, tokenizer: PreTrainedTokenizerBase, ctx_len: int, *, bos: bool = True
) -> Int[Tensor, "rows ctx_len"]:
    """Concatenate documents and cut them into full rows, without padding.

    With `bos`, the documents make one stream, BOS before each. The stream is cut from its start: where the next token
    is a BOS (a document begins there) the row takes `ctx_len` tokens; elsewhere it takes `ctx_len - 1` after a BOS of
    its own. So every row begins with BOS, as a model sees a prompt; further ones mark where a document begins; and a
    document continues in the next row without a token lost or repeated. An incomplete row at the end is dropped.

    Without `bos`, the tokenizer's EOS, if it has one, separates the documents of a row, and rows are cut every
    `ctx_len` tokens.

    Texts are encoded as they are, without the special tokens a tokenizer adds. An empty text leaves no trace. For more
    than fits in memory: `saewb.stream_tokens`, which makes the same rows.

    Args:
        texts: the documents, in order: texts, or others that `saewb.stream_tokens` takes.
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
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if bos and tokenizer.bos_token_id is None:
        raise ValueError(explain("this tokenizer has no BOS token.", fix="pack(texts, tokenizer, ctx_len, bos=False)"))
    return _all_rows(stream_tokens(texts, tokenizer, ctx_len=ctx_len, bos=bos))


def _all_rows(stream: TokenStream) -> Int[Tensor, "rows ctx_len"]:
    """All rows of a stream that ends."""
    if stream.repeats:
        what, fix = "got a stream of tokens without end.", "saewb.stream_tokens(documents, tokenizer)"
        raise ValueError(explain(what, want="one with repeat=False", fix=fix))
    rows = list(stream)
    if not rows:
        what = f"these documents do not fill one row: {stream.n_unfinished} tokens for rows of {stream.ctx_len}."
        raise ValueError(explain(what, want="more text, or shorter rows", fix="ctx_len=16"))
    return torch.cat(rows)


def token_rows(model: nn.Module, tokens: Any, ctx_len: int) -> Int[Tensor, "rows ctx"]:
    """All token rows for a model: ids as they are, or documents packed with its tokenizer.

    Args:
        model: any; its tokenizer, and whether it was trained with BOS, matter if `tokens` are documents.
        tokens: ids, `[rows, ctx]`, without padding before them; or whatever `saewb.stream_tokens` takes (texts, files,
            datasets, chats), or a TokenStream, from where it stands to its end.
        ctx_len: tokens per row, BOS included, if they are packed here.

    Returns:
        int64 ids on the CPU, with rows of at least two tokens.

    Raises:
        TypeError: if `tokens` are none of these.
        ValueError: if they have another shape, do not fill a row, do not fit the model's context or vocabulary, or
            begin with padding.

    Example:
        >>> import saewb
        >>> model, texts = saewb.load_model("tiny", device="cpu"), ["The river flows."] * 9
        >>> token_rows(model, texts, 16).shape
        torch.Size([2, 16])
    """
    if not isinstance(tokens, TokenStream) and (matrix := token_matrix(tokens)) is not None:
        check_token_ids(matrix, min_length=2)
        tokens = matrix
    elif not isinstance(tokens, TokenStream):
        tokenizer_of(model)  # raises if there is none
    rows = _all_rows(model_tokens(model, tokens, ctx_len=ctx_len))
    check_vocabulary(model, rows)
    return rows


def model_tokens(
    model: nn.Module,
    tokens: Any,
    *,
    ctx_len: int,
    pass_tokens: int = PASS_TOKENS,
    repeat: bool = False,
    column: str | None = None,
) -> TokenStream:
    """Stream token rows for a model: a TokenStream as it is, anything else packed with the model's tokenizer.

    Args:
        model: as for `token_rows`.
        tokens: as for `token_rows`; a TokenStream may be without end.
        ctx_len: tokens per row, if they are packed here.
        pass_tokens: approximate tokens per batch of rows.
        repeat: begin the next epoch at the end, if tokens are packed here and are no iterator.
        column: of a dataset; None takes the first known one.

    Returns:
        The stream.

    Raises:
        TypeError, ValueError: as `token_rows`, before anything is computed; ids of documents are checked as they come.

    Example:
        >>> import saewb
        >>> model = saewb.load_model("tiny", device="cpu")
        >>> next(model_tokens(model, ["The river flows."] * 9, ctx_len=16)).shape
        torch.Size([2, 16])
    """
    if not isinstance(tokens, TokenStream):
        tokenizer = getattr(model, "tokenizer", None)
        bos = getattr(tokenizer, "bos_token_id", None) is not None and model.cfg.default_prepend_bos is not False
        matrix = token_matrix(tokens)
        row_len = matrix.shape[1] if matrix is not None and matrix.ndim == 2 else ctx_len
        options = {"ctx_len": ctx_len, "rows": max(1, pass_tokens // max(1, row_len))}
        tokens = stream_tokens(tokens, tokenizer, bos=bos, repeat=repeat, column=column, **options)
    check_context(model, tokens.ctx_len, f"rows of {tokens.ctx_len:,} tokens", "ctx_len={n_ctx}")
    if tokens.matrix is not None:
        check_vocabulary(model, tokens.matrix)
        _check_unpadded(model, tokens.matrix)
    return tokens


def check_context(model: nn.Module, n: int, what: str, fix: str) -> None:
    """Check that a text of `n` tokens fits the model's context; models with a state (Mamba) have none.

    Rotary models run beyond it without an error, on positions that they were not trained on.

    Args:
        model: its configuration has the length of the context.
        n: tokens of the text.
        what: what has that many, for the error message.
        fix: line to type, with `{n_ctx}` for the length of the context.

    Raises:
        ValueError: if it does not fit.

    Example:
        >>> import saewb
        >>> check_context(saewb.load_model("tiny", device="cpu"), 600, "600 tokens", "ctx_len={n_ctx}")
        Traceback (most recent call last):
        ...
        ValueError: got 600 tokens; tiny takes 512 at most.
          want: shorter ones
          fix:  ctx_len=512
    """
    cfg = getattr(model, "cfg", None)
    n_ctx = getattr(cfg, "n_ctx", None)
    if n_ctx is not None and n > n_ctx and not getattr(cfg, "is_stateful", False):
        got = f"got {what}; {cfg.model_name} takes {n_ctx:,} at most."
        raise ValueError(explain(got, want="shorter ones", fix=fix.format(n_ctx=n_ctx)))


def check_vocabulary(model: nn.Module, ids: Int[Tensor, "*any"]) -> None:
    """Check that ids are in the model's vocabulary; on the CPU this waits for nothing.

    Args:
        model: its configuration has the size of the vocabulary.
        ids: token ids, of any shape.

    Raises:
        ValueError: if one is not.

    Example:
        >>> import saewb
        >>> check_vocabulary(saewb.load_model("tiny", device="cpu"), torch.tensor([0, 4095]))
    """
    d_vocab = getattr(getattr(model, "cfg", None), "d_vocab", None)
    if d_vocab is not None and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < d_vocab:
        what = f"got token ids {int(ids.min()):,} to {int(ids.max()):,}; this model has {d_vocab:,}."
        raise ValueError(explain(what, want="ids of this model's own tokenizer", fix="model.to_tokens(text)"))


def _check_unpadded(model: nn.Module, ids: Int[Tensor, "rows ctx"]) -> None:
    """Check that no row has padding before its text, which would move its positions, and which it would attend to."""
    tokenizer = getattr(model, "tokenizer", None)
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None:
        return
    allowed = 1 if pad in (tokenizer.bos_token_id, tokenizer.eos_token_id) else 0  # that token itself
    padding = (ids == pad).cumprod(1).sum(1)
    if bool((rows := ((padding > allowed) & (padding < ids.shape[1])).nonzero()[:, 0]).numel()):
        what = f"row {int(rows[0])} begins with {int(padding[rows[0]])} padding tokens."
        want = "rows without padding before the text"
        raise ValueError(explain(what, want=want, fix="model.to_tokens(texts, padding_side='right')"))


def prompt_ids(model: nn.Module, prompt: object) -> Int[Tensor, "1 pos"]:
    """Token ids of one prompt: ids as they are, a text with the special tokens the tokenizer adds, or a chat.

    Args:
        model: its tokenizer, context length and device are used.
        prompt: a text; token ids, `[pos]` or `[1, pos]`; or messages, as for `saewb.chat_prompt`.

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
        ids = text_ids(model, prompt)
    elif is_chat(prompt):
        ids = torch.tensor(chat_ids(tokenizer_of(model), check_messages(prompt)))
    else:
        ids = _prompt_tensor(prompt)
        check_vocabulary(model, ids)
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        what = f"got a prompt of shape {tuple(ids.shape)}."
        raise ValueError(explain(what, want="one text at a time: token ids [pos] or [1, pos]"))
    fix = "model.to_tokens(prompt)[:, :{n_ctx}]"
    check_context(model, ids.shape[1], f"a prompt of {ids.shape[1]:,} tokens", fix)
    return ids.long().to(device)


def _prompt_tensor(prompt: object) -> Int[Tensor, "*any"]:
    """Token ids of one prompt, of any library."""
    is_float = "float" in str(getattr(prompt, "dtype", ""))
    is_text = isinstance(prompt, (list, tuple)) and any(isinstance(part, (str, Mapping)) for part in prompt)
    if is_float or is_text or isinstance(prompt, Mapping) or not hasattr(prompt, "__len__"):
        raise TypeError(explain(f"got a {type(prompt).__name__} as prompt.", want="one text, or token ids [pos]"))
    ids = as_tensor(prompt, "prompt") if len(prompt) else torch.zeros(0, dtype=torch.long)
    if ids.dtype == torch.bool:
        raise TypeError(explain("got booleans as prompt.", want="one text, or token ids [pos]"))
    return ids

"""Pool latents over the tokens of each text: one number per text and latent, kept where it is not 0.

1. Tokenize: BOS before each text where the model was trained with it; exact duplicates are found by their ids.
2. Mask: special tokens never count; `positions` restricts the others.
3. Run the model once for all SAEs, on batches of texts of similar length, padded after their end.
4. Reduce: the active latents of a batch by (text, latent), in memory proportional to their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Union, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saewb._indices import as_tensor, index_slice
from saewb.data.documents import encode
from saewb.data.tokens import PASS_TOKENS, check_context, check_vocabulary
from saewb.errors import explain, near
from saewb.interventions.site import Site
from saewb.models.capture import capture, eval_mode
from saewb.models.tokenizer import special_ids, special_mask, tokenizer_of
from saewb.sae.base import SparseEncoder
from saewb.sae.sparse import SparseLatents

if TYPE_CHECKING:
    import scipy.sparse

Pool = Literal["max", "mean", "last", "any", "sum"]
Positions = Union[slice, str, Callable[[Tensor], Any], None]


@dataclass(frozen=True, eq=False)
class TokenizedTexts:
    """Token ids of texts, and which of them count."""

    ids: list[Int[Tensor, " pos"]]
    """Of each text, BOS included."""
    masks: list[Bool[Tensor, " pos"]]
    """Tokens that count, at least one of each text."""

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        texts: Any,
        *,
        name: str = "texts",
        positions: Positions = None,
        ctx_len: int | None = None,
        cut: Literal["end", "start"] = "end",
    ) -> TokenizedTexts:
        """Tokenize texts one by one, without packing.

        Args:
            model: with a tokenizer.
            texts: a list of texts, chats or token ids.
            name: of the argument, for error messages.
            positions: tokens that count: None for all that are not special; a slice of the text's positions, BOS
                included; a chat's role; or a function of a text's ids `[pos]` that returns a mask of them.
            ctx_len: tokens of a text at most, BOS included; longer ones are cut. None does not cut.
            cut: which part of a longer text is dropped.

        Raises:
            TypeError: if `texts` is one string, or of mixed kinds.
            ValueError: without texts; for a text without a token that counts, longer than the model's context, or with
                ids outside of its vocabulary.
        """
        texts = _text_list(texts, name)
        tokenizer = tokenizer_of(model)
        documents = encode(texts, tokenizer)
        bos = tokenizer.bos_token_id if model.cfg.default_prepend_bos is not False else None
        ids = [_with_bos(document, bos, ctx_len, cut) for document in documents]
        longest = max(map(len, ids))
        check_context(model, longest, f"a text of {longest:,} tokens", "ctx_len={n_ctx}")
        special = special_ids(model, True)
        masks = [~special_mask(one, special) for one in ids]
        if positions is not None:
            roles = _role_masks(tokenizer, texts, ids, positions) if isinstance(positions, str) else None
            wanted = roles or [_position_mask(positions, one) for one in ids]
            masks = [mask & want for mask, want in zip(masks, wanted, strict=True)]
        for i, mask in enumerate(masks):
            if not mask.any():
                what = f"{name}[{i}] has no token that counts, of {len(ids[i])}."
                raise ValueError(explain(what, want="texts with tokens that are not special, at `positions`"))
        for one in ids:
            check_vocabulary(model, one)
        return cls(ids, masks)

    def first_of_equals(self) -> list[int]:
        """Index of the first text with the same ids and mask, for each text."""
        first: dict[bytes, int] = {}
        keys = (one.numpy().tobytes() + mask.numpy().tobytes() for one, mask in zip(self.ids, self.masks, strict=True))
        return [first.setdefault(key, i) for i, key in enumerate(keys)]

    def select(self, indices: Sequence[int]) -> TokenizedTexts:
        """Some of the texts."""
        return TokenizedTexts([self.ids[i] for i in indices], [self.masks[i] for i in indices])

    def n_tokens(self) -> np.ndarray:
        """Tokens that count, of each text."""
        return np.array([int(mask.sum()) for mask in self.masks])

    def presence(self, d_vocab: int) -> scipy.sparse.csr_array:
        """Which tokens a text has among those that count: 1.0, `[texts, d_vocab]`."""
        import scipy.sparse

        parts = [np.unique(one[mask].numpy()) for one, mask in zip(self.ids, self.masks, strict=True)]
        pointers = np.cumsum([0, *map(len, parts)])
        columns = np.concatenate(parts).astype(np.int32)
        shape = (len(parts), max(d_vocab, int(columns.max()) + 1))
        return scipy.sparse.csr_array((np.ones(len(columns), np.float32), columns, pointers), shape=shape)

    def batches(self, pass_tokens: int = PASS_TOKENS) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        """Indices of texts of similar length, their padded ids and masks; `pass_tokens` at a time, or one text."""
        lengths = np.array([len(one) for one in self.ids])
        order, begin = np.argsort(-lengths, kind="stable"), 0  # the longest first, so that a lack of memory shows early
        while begin < len(order):
            length = int(lengths[order[begin]])
            part = order[begin : begin + max(1, pass_tokens // length)]
            ids, mask = torch.zeros(len(part), length, dtype=torch.long), torch.zeros(len(part), length, dtype=bool)
            for row, i in enumerate(part):
                ids[row, : lengths[i]], mask[row, : lengths[i]] = self.ids[i], self.masks[i]
                ids[row, lengths[i] :] = self.ids[i][-1]  # padding: causal models do not look ahead
            yield part, ids, mask
            begin += len(part)


def _text_list(texts: Any, name: str) -> list[Any]:
    if isinstance(texts, (str, bytes)) or not hasattr(texts, "__iter__"):
        got = "one string" if isinstance(texts, (str, bytes)) else f"a {type(texts).__name__}"
        raise TypeError(explain(f"got {got} for {name}.", want="a list of texts", fix=f"{name}=[text, ...]"))
    texts = texts.tolist() if hasattr(texts, "iloc") else list(texts)
    if not texts:
        raise ValueError(explain(f"got no texts for {name}.", want="at least one"))
    return texts


def _with_bos(document: Sequence[int], bos: int | None, ctx_len: int | None, cut: str) -> Tensor:
    body = list(document)
    head = [] if bos is None else [bos]
    body = body[1:] if head and body[:1] == head else body
    room = len(body) if ctx_len is None else max(0, ctx_len - len(head))
    return torch.tensor(head + (body[:room] if cut == "end" else body[max(0, len(body) - room) :]), dtype=torch.long)


def _position_mask(positions: Any, ids: Tensor) -> Tensor:
    if isinstance(positions, slice):
        mask = torch.zeros(len(ids), dtype=torch.bool)
        mask[index_slice(positions, "positions")] = True
        return mask
    if not callable(positions):
        want = "None, a slice, a chat's role such as 'assistant', or a function of token ids"
        raise TypeError(explain(f"got positions={positions!r}.", want=want, fix="positions=slice(-5, None)"))
    mask = as_tensor(positions(ids), "positions")
    if mask.dtype != torch.bool or mask.shape != ids.shape:
        what = f"positions gave {mask.dtype} of shape {tuple(mask.shape)} for a text of {len(ids)} tokens."
        raise ValueError(explain(what, want="a mask of booleans, one per token"))
    return mask


def _role_masks(tokenizer: Any, chats: list[Any], ids: list[Tensor], role: str) -> list[Tensor]:
    """Tokens of the messages of one role, without the markers that open them."""
    if not isinstance(chats[0], (list, tuple)) or not chats[0] or not hasattr(chats[0][0], "keys"):
        what = f"got positions={role!r} for texts that are no chats."
        raise ValueError(explain(what, want='chats: lists of {"role": ..., "content": ...}'))
    roles = sorted({message["role"] for chat in chats for message in chat})
    if role not in roles:
        raise ValueError(explain(f"no message has the role {role!r}.", near=near(role, roles), want=", ".join(roles)))
    return [_role_mask(tokenizer, chat, one, role) for chat, one in zip(chats, ids, strict=True)]


def _role_mask(tokenizer: Any, chat: Any, ids: Tensor, role: str) -> Tensor:
    def length(n: int, opened: bool) -> int:
        """Tokens of the first n messages, with what opens the next one."""
        if n == 0 and not opened:
            return 0
        part = tokenizer.apply_chat_template(
            list(chat[:n]), tokenize=True, return_dict=False, add_generation_prompt=opened
        )
        part = _with_bos(part, int(ids[0]) if part[:1] == [int(ids[0])] else None, None, "end")
        if part.tolist() != ids[: len(part)].tolist() and len(part) <= len(ids):
            what = "this chat template writes the beginning of a chat in another way when more follows."
            raise ValueError(explain(what, want="a mask", fix="positions=lambda ids: mask_of(ids)"))
        return min(len(part), len(ids))

    mask = torch.zeros(len(ids), dtype=torch.bool)
    for n, message in enumerate(chat):
        if message["role"] == role:
            begin = length(n, opened=True) if n and role == "assistant" else length(n, opened=False)
            mask[begin : length(n + 1, opened=False)] = True
    return mask


# -- one pass over the model -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pooled:
    """Latents of one SAE, and the activation it reads, pooled per text."""

    latents: scipy.sparse.csr_array
    """`[texts, d_sae]`, float32; what is not stored is 0."""
    residual: Float[Tensor, "texts d_in"]
    """Mean of the activation over the tokens that count, or the last one's where `pool` is "last"; float32, CPU."""


def check_pool(pool: str) -> None:
    """Raise for a pooling that there is not."""
    if pool not in get_args(Pool):
        names = get_args(Pool)
        raise ValueError(explain(f"got pool={pool!r}.", near=near(str(pool), names), want=", ".join(map(repr, names))))


@torch.no_grad()
def pool_latents(
    model: nn.Module, sites: Sequence[Site], texts: TokenizedTexts, pool: Pool = "max", *, progress: bool = False
) -> list[Pooled]:
    """Run the model once over all texts, and pool the latents of each SAE over the tokens of each text.

        max:   largest activation        mean:  sum / tokens that count        sum:  sum of activations
        last:  at the last token         any:   1 where it is active on a token

    Zeros count: the max of a latent whose values may be negative is at least 0 unless it is active on every token.

    Args:
        model: a TransformerBridge or HookedTransformer.
        sites: where each SAE reads.
        texts: tokenized.
        pool: see above.
        progress: whether to show a progress bar.

    Returns:
        For each SAE.

    Raises:
        FloatingPointError: if activations are not finite.

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
        >>> texts = TokenizedTexts.of(model, ["The physicist won a prize.", "The river flows."])
        >>> [pooled] = pool_latents(model, [Site.of(model, sae)], texts)
        >>> pooled.latents.shape, pooled.residual.shape, bool(pooled.latents[0, 748] > pooled.latents[1, 748])
        ((2, 1024), torch.Size([2, 128]), True)
    """
    check_pool(pool)
    encoders = [SparseEncoder(site.sae) for site in sites]
    entries: list[list[tuple[np.ndarray, ...]]] = [[] for _ in sites]
    residual = [torch.zeros(len(texts), site.d_in) for site in sites]
    for index, mask, activations in _passes(model, [site.hook_name for site in sites], texts, progress):
        for i, site in enumerate(sites):
            x = site.read_input(activations[site.hook_name])
            here = mask.to(x.device)
            residual[i][torch.from_numpy(index)] = _pool_activation(x, here, pool).cpu()
            for rows, latents in encoders[i].tiles(x, here):
                row, latent, value = _reduce(latents, here[rows], pool)
                row = index[rows][row.cpu().numpy()].astype(np.int32)
                entries[i].append((row, latent.cpu().numpy().astype(np.int32), value.cpu().numpy()))
    return [
        Pooled(_csr(of_one, (len(texts), site.d_sae)), x)
        for of_one, site, x in zip(entries, sites, residual, strict=True)
    ]


@torch.no_grad()
def active_per_token(model: nn.Module, site: Site, texts: TokenizedTexts) -> float:
    """Mean number of active latents over the tokens that count.

    Example:
        >>> import saewb
        >>> model = saewb.load_model("tiny", device="cpu")
        >>> site = Site.of(model, saewb.load_sae("tiny"))
        >>> active_per_token(model, site, TokenizedTexts.of(model, ["A river."]))
        16.0
    """
    encoder, active, counted = SparseEncoder(site.sae), 0, 0
    for _, mask, activations in _passes(model, [site.hook_name], texts, False):
        x = site.read_input(activations[site.hook_name])
        here = mask.to(x.device)
        active += sum(len(latents) for _, latents in encoder.tiles(x, here))
        counted += int(mask.sum())
    return active / counted


@torch.no_grad()
def pool_activation(
    model: nn.Module, hook: str, texts: TokenizedTexts, pool: Pool = "mean", *, progress: bool = False
) -> Float[Tensor, "texts d"]:
    """Pool the activation at a hook point over the tokens of each text: the last one's, or else the mean.

    Args:
        model: a TransformerBridge or HookedTransformer.
        hook: hook point; heads are side by side.
        texts: tokenized.
        pool: "last", or the mean.
        progress: whether to show a progress bar.

    Returns:
        float32, on the CPU.

    Example:
        >>> import saewb
        >>> model = saewb.load_model("tiny", device="cpu")
        >>> pool_activation(model, "blocks.2.hook_resid_post", TokenizedTexts.of(model, ["A river."])).shape
        torch.Size([1, 128])
    """
    check_pool(pool)
    parts, order = [], []
    for index, mask, activations in _passes(model, [hook], texts, progress):
        x = activations[hook].flatten(2)
        parts.append(_pool_activation(x, mask.to(x.device), pool).cpu())
        order.append(torch.from_numpy(index))
    return torch.cat(parts)[torch.cat(order).argsort()]


def _passes(
    model: nn.Module, hooks: Sequence[str], texts: TokenizedTexts, progress: bool
) -> Iterator[tuple[np.ndarray, Tensor, dict[str, Tensor]]]:
    """Indices of the texts of each batch, masks of tokens that count, and activations."""
    from tqdm.auto import tqdm

    device = next(model.parameters()).device
    bar = tqdm(total=len(texts), desc="pool", unit="text", leave=False, disable=not progress)
    with bar, eval_mode(model):
        for index, ids, mask in texts.batches():
            yield index, mask, capture(model, ids.to(device), hooks)
            bar.update(len(index))


def _csr(entries: list[tuple[np.ndarray, ...]], shape: tuple[int, int]) -> scipy.sparse.csr_array:
    import scipy.sparse

    row, latent, value = (np.concatenate(part) for part in zip(*entries, strict=True))
    entries.clear()
    return scipy.sparse.coo_array((value, (row, latent)), shape=shape).tocsr()


def _pool_activation(x: Tensor, mask: Tensor, pool: str) -> Float[Tensor, "texts d_in"]:
    if pool == "last":
        return x[torch.arange(len(x), device=x.device), _last(mask)].float()
    weights = mask.float() / mask.sum(1, keepdim=True)
    return torch.einsum("tpd,tp->td", x.float(), weights)


def _last(mask: Tensor) -> Int[Tensor, " texts"]:
    position = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, position, -1).amax(1)


def _reduce(latents: SparseLatents, mask: Tensor, pool: str) -> tuple[Tensor, Tensor, Tensor]:
    """Text, latent and pooled value, by text, then latent; values of 0 are left out."""
    n_pos, d_sae = mask.shape[1], latents.d_sae
    if pool == "last":
        chosen = torch.arange(len(mask), device=mask.device) * n_pos + _last(mask)
        part = latents.select(chosen)
        return part.token, part.latent, part.act.float()
    key, entry = torch.unique(latents.token // n_pos * d_sae + latents.latent, return_inverse=True)
    text, latent = key // d_sae, key % d_sae
    if pool == "any":
        return text, latent, torch.ones(len(key), device=key.device)
    act = latents.act.float()
    if pool == "max":
        value = torch.full((len(key),), -torch.inf, device=key.device).scatter_reduce(0, entry, act, "amax")
        everywhere = torch.bincount(entry, minlength=len(key)) == mask.sum(1)[text]
        value = torch.where(everywhere, value, value.clamp_min(0))
    else:
        value = torch.zeros(len(key), device=key.device).index_add(0, entry, act)
        value = value / mask.sum(1)[text] if pool == "mean" else value
    stored = value.nonzero()[:, 0]
    return text[stored], latent[stored], value[stored]

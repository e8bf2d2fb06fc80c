"""`saewb demo`: the main workflow end to end; prints each step as a line of code."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import saewb
from saewb.errors import explain

if TYPE_CHECKING:
    from torch import Tensor, nn

PROMPT = "Marie Curie was a Polish physicist and chemist. She received two Nobel Prizes"


def demo(
    model_name: Literal["tiny", "smollm2-135m"] = "tiny",
    prompt: str = PROMPT,
    train_tokens: int = 300_000,
    page: str | Path = "saewb_demo.html",
) -> Path:
    """Load, attach, read latents, evaluate, train a small SAE, index, and write a page of features.

    Needs no network for "tiny". For "smollm2-135m" the SAE is random and nothing is trained.

    Args:
        model_name: a model that is bundled or installed.
        prompt: whose latents and next tokens are printed.
        train_tokens: tokens to train a small SAE on; 0 trains none.
        page: file to write.

    Returns:
        The page that was written.

    Raises:
        OSError: if the page cannot be written.
    """
    import torch

    started, page = time.perf_counter(), Path(page)
    _check_writable(page)  # now, and not after minutes of work
    _show(f'model = saewb.load_model("{model_name}")')
    model = saewb.load_model(model_name)
    print(f"{model.cfg.n_layers} layers of width {model.cfg.d_model}, on {model.cfg.device}")
    sae = _load_sae(model, model_name)
    texts = [document.text for document in saewb.tiny.held_out_texts()][: 300 if model_name == "tiny" else 20]

    _show(f"with saewb.attach(model, sae) as attached:\n        model({prompt!r})\n    attached.latents[sae]")
    tokens = model.to_tokens(prompt)
    with torch.no_grad(), saewb.attach(model, sae) as attached:
        spliced = model(tokens)
        latents = attached.latents[sae][0]
    for token, row in zip(saewb.token_strings(model, tokens[0]), latents, strict=True):
        print(_strongest(token, row))

    _show(f"saewb.attach(model, sae, error_term=True)    # what comes after {prompt[-24:]!r}")
    with torch.no_grad():
        clean = model(tokens)
        with saewb.attach(model, sae, error_term=True):
            with_error = model(tokens)
    for name, logits in (("model", clean), ("with SAE", spliced), ("with error term", with_error)):
        print(f"{name:<16} {_next_tokens(model, logits)}")

    _show("saewb.evaluate(model, sae, held_out_texts)")
    print(saewb.evaluate(model, sae, texts))

    if model_name == "tiny" and train_tokens:
        _train_small(model, sae, texts, train_tokens)

    _show("index = saewb.build_index(model, sae, held_out_texts)")
    index = saewb.build_index(model, sae, texts)
    print(index)
    for i in index.ranking(10):
        print(_top_context(index.latent(i)))
    _show(f"index.save_html({str(page)!r})    # {time.perf_counter() - started:.0f} s so far. Next: saewb lab")
    page = index.save_html(page)
    print(f"The page of features is at {page}")
    return page


def _check_writable(page: Path) -> None:
    try:
        page.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=page.absolute().parent):
            return
    except OSError as error:
        fix = "saewb demo --page ~/saewb_demo.html"
        raise OSError(explain(f"the page cannot be written to {str(page)!r}: {error.strerror}.", fix=fix)) from None


def _load_sae(model: nn.Module, model_name: str) -> nn.Module:
    if model_name == "tiny":
        _show('sae = saewb.load_sae("tiny")')
        sae = saewb.load_sae("tiny")
    else:  # none is published for it: random directions demonstrate the workflow on a real model
        d_in, hook = model.cfg.d_model, f"blocks.{model.cfg.n_layers // 2}.hook_resid_post"
        config = f'saewb.SAEConfig({d_in}, {8 * d_in}, activation="topk", k=32, hook="{hook}")'
        _show(f"sae = saewb.SAE({config})    # untrained")
        sae = saewb.SAE(saewb.SAEConfig(d_in, 8 * d_in, activation="topk", k=32, hook=hook))
    print(sae)
    return sae


def _train_small(model: nn.Module, sae: nn.Module, held_out: Sequence[str], n_tokens: int) -> None:
    """Train a small SAE at the hook point of the bundled one, and evaluate both on the same texts."""
    hook = sae.cfg.hook
    _show(
        f'run = saewb.train(model, texts, saewb.TopK(d_sae=512, k=16), hook="{hook}",\n'
        f"        n_tokens={n_tokens:_}, batch_tokens=1024, lr=3e-3)    # at once: it trains in the background"
    )
    texts = [document.text for document in saewb.tiny.texts()]
    objective = saewb.TopK(d_sae=512, k=16)
    run = saewb.train(model, texts, objective, hook=hook, n_tokens=n_tokens, batch_tokens=1024, lr=3e-3)
    print(run, flush=True)
    print(run.wait().progress)
    _show('saewb.evaluate_many(model, {"bundled": sae, "mine": run.sae}, held_out_texts, losses=False)')
    table = saewb.evaluate_many(model, {"bundled": sae, "mine": run.sae}, held_out, losses=False)
    print(table[["l0", "fvu", "cosine", "dead_frac", "n_tokens"]].round(3).to_string())


def _show(code: str) -> None:
    print(f"\n>>> {code}", flush=True)


def _strongest(token: str, acts: Tensor) -> str:
    """A token and its strongest latents, as index:activation."""
    top = acts.topk(4)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return f"{token!r:<16} {'  '.join(f'{i:>5}:{act:<6.1f}' for i, act in pairs if act > 0)}"


def _top_context(latent: saewb.Latent) -> str:
    """The strongest context of a latent around its token, and the tokens it promotes most."""
    context = latent.top[0]
    before, after = context.tokens[: context.at], context.tokens[context.at + 1 :]
    text = f"{''.join(before)[-36:]:>36}[{context.token}]{''.join(after)[:20]:<20}".replace("\n", " ")
    return f"{latent.index:>6}  {text}  {' '.join(repr(promoted.token) for promoted in latent.logits_top[:3])}"


def _next_tokens(model: nn.Module, logits: Tensor) -> str:
    top = logits[0, -1].softmax(-1).topk(4)
    tokens = [model.to_single_str_token(int(i)) for i in top.indices]
    return "  ".join(f"{token!r} {p:.0%}" for token, p in zip(tokens, top.values.tolist(), strict=True))

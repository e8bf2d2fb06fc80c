"""The command line: `saewb demo` does the main job, `lab` opens notebooks, `eval`, `train`; `doctor` looks around."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import saewb
from saewb.errors import explain

PROMPT = "Marie Curie was a Polish physicist and chemist. She received two Nobel Prizes"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    parser = argparse.ArgumentParser(prog="saewb", description=saewb.__doc__.partition("\n")[0])
    parser.add_argument("--version", action="version", version=f"saewb {saewb.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo_ = commands.add_parser("demo", help="load, attach, read latents, evaluate, index, write a page of features")
    demo_.add_argument("--model", choices=["tiny", "smollm2-135m"], default="tiny", help="smollm2-135m: a random SAE")
    demo_.add_argument("--prompt", default=PROMPT)
    demo_.add_argument("--train-tokens", type=int, default=300_000, help="of the small SAE it trains; 0: none")
    demo_.add_argument("--page", type=Path, default=Path("saewb_demo.html"), help="where to write it")
    lab_ = commands.add_parser("lab", help="open JupyterLab on the notebooks; further options go to jupyter lab")
    lab_.add_argument("folder", nargs="?", type=Path, help="of notebooks; default: saewb's own")
    _eval_options(commands.add_parser("eval", help="figures of one or many SAEs, as a table"))
    train_ = commands.add_parser("train", help="train SAEs as a YAML file says; goes on with a run that was begun")
    train_.add_argument("file", type=Path)
    doctor_ = commands.add_parser("doctor", help="versions, devices, folders: what is missing, and how to mend it")
    doctor_.add_argument("--network", action="store_true", help="ask the hub whether it answers")
    options, rest = parser.parse_known_args(arguments)
    if options.command == "lab":
        return lab(options.folder, rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command == "train":
        return train(options.file)
    if options.command == "doctor":
        return doctor(options.network)
    try:
        return evaluate(options) if options.command == "eval" else demo(options)
    except (ValueError, TypeError, OSError) as error:
        print(f"saewb {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _eval_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="what load_model takes: tiny, a name on the hub, a folder")
    parser.add_argument("saes", nargs="+", metavar="sae", help="what load_sae takes: tiny, a folder, release::id")
    parser.add_argument("--texts", type=Path, help="a text file, a document per line; default: the embedded texts")
    parser.add_argument("--n-rows", type=int, default=128, help="rows of ctx-len tokens")
    parser.add_argument("--ctx-len", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="keep results there, and go on from those that are there")
    parser.add_argument("--no-losses", action="store_true", help="reconstruction and sparsity only, much quicker")


def evaluate(options: argparse.Namespace) -> int:
    """`saewb eval`: load, evaluate, print; several SAEs as a table."""
    model = saewb.load_model(options.model)
    if options.texts is None:
        texts = [document.text for document in saewb.tiny.held_out_texts()]
    else:
        texts = [line for line in options.texts.read_text(encoding="utf-8").splitlines() if line.strip()]
    tokens = saewb.data.tokens.token_rows(model, texts, options.ctx_len)[: options.n_rows]
    saes = {name: tuple(name.split("::", 1)) if "::" in name else name for name in options.saes}
    table = saewb.evaluate_many(
        model,
        saes,
        tokens,
        folder=options.folder,
        batch_size=options.batch_size,
        losses=not options.no_losses,
        progress=sys.stderr.isatty(),
    )
    shown = table.drop(columns=["dead_below", "dense_above", "hook_out", "model", "sae"]).dropna(axis=1, how="all")
    print(shown.T.to_string(float_format=lambda value: f"{value:.4g}"))
    return 0


def demo(options: argparse.Namespace) -> int:
    """The main job, end to end, each step shown as the line one would type. Needs no network for "tiny"."""
    import torch

    model_name, prompt, page = options.model, options.prompt, options.page
    started = time.perf_counter()
    _check_place(page)  # now, and not after minutes of work
    _show(f'model = saewb.load_model("{model_name}")')
    model = saewb.load_model(model_name)
    print(f"{model.cfg.n_layers} layers of width {model.cfg.d_model}, on {model.cfg.device}")
    sae = _sae(model, model_name)
    texts = [document.text for document in saewb.tiny.held_out_texts()][: 300 if model_name == "tiny" else 20]

    _show(f"with saewb.attach(model, sae) as attached:\n        model({prompt!r})\n    attached.latents[sae]")
    tokens = model.to_tokens(prompt)
    with torch.no_grad(), saewb.attach(model, sae) as attached:
        with_sae = model(tokens)
        latents = attached.latents[sae][0]
    print(_table(saewb.token_strings(model, tokens[0]), latents))

    _show(f"saewb.attach(model, sae, error_term=True)    # what comes after {prompt[-24:]!r}")
    with torch.no_grad():
        clean = model(tokens)
        with saewb.attach(model, sae, error_term=True):
            whole = model(tokens)
    for name, logits in (("model", clean), ("with SAE", with_sae), ("with error term", whole)):
        print(f"{name:<16} {_next_tokens(model, logits)}")

    _show("saewb.evaluate(model, sae, held_out_texts)")
    print(saewb.evaluate(model, sae, texts))

    if model_name == "tiny" and options.train_tokens:
        _train_small(model, sae, texts, options.train_tokens)

    _show("index = saewb.build_index(model, sae, held_out_texts)")
    index = saewb.build_index(model, sae, texts)
    print(index)
    for i in index.ranking(10):
        print(_feature(index.latent(i)))
    _show(f"index.save_html({str(page)!r})    # {time.perf_counter() - started:.0f} s so far. Next: saewb lab")
    print(f"The page of features is at {index.save_html(page)}")
    return 0


def _check_place(page: Path) -> None:
    try:
        page.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=page.absolute().parent):
            return
    except OSError as error:
        fix = "saewb demo --page ~/saewb_demo.html"
        raise OSError(explain(f"the page cannot be written to {str(page)!r}: {error.strerror}.", fix=fix)) from None


def lab(folder: Path | None, rest: Sequence[str] = ()) -> int:
    """Open JupyterLab on a folder of notebooks, saewb's own if none is given."""
    if importlib.util.find_spec("jupyterlab") is None:
        print('JupyterLab is not installed.\n  fix:  pip install "saewb[lab]"', file=sys.stderr)
        return 1
    places = [Path(saewb.__file__).parents[1] / "notebooks", Path.cwd() / "notebooks"]
    own = [place for place in places if (place / "00_tour.ipynb").is_file()]
    if folder is None and not own:
        print(
            f"saewb's notebooks come with its repository, not with the package. Opening {Path.cwd()}", file=sys.stderr
        )
    chosen = folder or next(iter(own), Path.cwd())
    if not chosen.is_dir():
        print(f"no folder {str(chosen)!r}.\n  fix:  saewb lab", file=sys.stderr)
        return 1
    return subprocess.run([sys.executable, "-m", "jupyterlab", f"--notebook-dir={chosen}", *rest]).returncode


def train(file: Path) -> int:
    """Train as a YAML file says, with a line of progress every few seconds; Ctrl-C and SIGTERM leave a checkpoint."""
    from saewb.distributed import ParallelContext
    from saewb.training.run import exit_on_sigterm
    from saewb.training.train import train_file

    exit_on_sigterm()
    try:
        is_main = ParallelContext.from_environment().is_main  # of several processes, one speaks
        run = train_file(file)
        print(run.memory, flush=True) if is_main else None
        while run.wait(timeout=5).state in ("running", "paused"):
            print(run.progress, flush=True) if is_main else None
    except KeyboardInterrupt:
        print(f"stopped; saewb train {file} goes on", file=sys.stderr)
        return 130
    except (ValueError, TypeError, RuntimeError, OSError, ArithmeticError, MemoryError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    if not leads:
        return 0
    print(run.progress)
    for name in run.saes:
        print(f"{name}: {run.folder / 'saes' / name}")
    return 0


def doctor(network: bool) -> int:
    """Print what `saewb.doctor` finds; 1 if something is wrong."""
    found = saewb.doctor(network)
    print(found)
    return 0 if found.ok else 1


def _sae(model, model_name: str):
    if model_name == "tiny":
        _show('sae = saewb.load_sae("tiny")')
        sae = saewb.load_sae("tiny")
    else:  # no SAE is published for it: random directions, to see the machinery at work on a real model
        layer, d_in = model.cfg.n_layers // 2, model.cfg.d_model
        hook = f"blocks.{layer}.hook_resid_post"
        _show(
            f'sae = saewb.SAE(saewb.SAEConfig({d_in}, {8 * d_in}, activation="topk", k=32, hook="{hook}"))    # untrained'
        )
        sae = saewb.SAE(saewb.SAEConfig(d_in, 8 * d_in, activation="topk", k=32, hook=hook))
    print(sae)
    return sae


def _train_small(model, sae, held_out, n_tokens: int) -> None:
    """Train a small SAE where the embedded one is, and measure both on the same texts."""
    hook = sae.cfg.hook
    _show(
        f'run = saewb.train(model, texts, saewb.TopK(d_sae=512, k=16), hook="{hook}",\n'
        f"        n_tokens={n_tokens:_}, batch_tokens=1024, lr=3e-3)    # at once: it trains in the background"
    )
    texts = [document.text for document in saewb.tiny.texts()]
    run = saewb.train(
        model, texts, saewb.TopK(d_sae=512, k=16), hook=hook, n_tokens=n_tokens, batch_tokens=1024, lr=3e-3
    )
    print(run, flush=True)
    print(run.wait().progress)
    _show('saewb.evaluate_many(model, {"embedded": sae, "mine": run.sae}, held_out_texts, losses=False)')
    both = saewb.evaluate_many(model, {"embedded": sae, "mine": run.sae}, held_out, losses=False)
    print(both[["l0", "fvu", "cosine", "dead_frac", "n_tokens"]].round(3).to_string())


def _show(code: str) -> None:
    print(f"\n>>> {code}", flush=True)


def _table(words: Sequence[str], latents) -> str:
    """A line per token: its strongest latents, as index:activation."""
    lines = []
    for word, row in zip(words, latents, strict=True):
        top = row.topk(4)
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        lines.append(f"{word!r:<16} {'  '.join(f'{i:>5}:{value:<6.1f}' for i, value in pairs if value > 0)}")
    return "\n".join(lines)


def _feature(latent) -> str:
    """The strongest context of a feature around the token it is about, and the words it makes likelier."""
    context = latent.top[0]
    before, after = context.tokens[: context.at], context.tokens[context.at + 1 :]
    text = f"{''.join(before)[-36:]:>36}[{context.token}]{''.join(after)[:20]:<20}".replace("\n", " ")
    return f"{latent.index:>6}  {text}  {' '.join(repr(word.token) for word in latent.logits_top[:3])}"


def _next_tokens(model, logits) -> str:
    top = logits[0, -1].softmax(-1).topk(4)
    words = [model.to_single_str_token(int(i)) for i in top.indices]
    return "  ".join(f"{word!r} {p:.0%}" for word, p in zip(words, top.values.tolist(), strict=True))


if __name__ == "__main__":
    raise SystemExit(main())

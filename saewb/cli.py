"""The command line: `saewb demo`, `lab`, `eval`, `train` and `doctor`."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import saewb
from saewb.demo import PROMPT, demo

_INTERRUPTED = 130  # exit status of a process that SIGINT ended, as in a shell
_USER_ERRORS = (ValueError, TypeError, OSError)  # printed without a traceback


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options, rest = _parser().parse_known_args(arguments)
    if options.command == "lab":
        return lab(options.folder, rest)
    if rest:
        options.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return options.run(options)
    except options.errors as error:
        print(f"saewb {options.command}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        resume = f"; to resume: saewb train {options.file}" if options.command == "train" else ""
        print(f"stopped{resume}", file=sys.stderr)
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="saewb", description=saewb.__doc__.partition("\n")[0])
    parser.add_argument("--version", action="version", version=f"saewb {saewb.__version__}")
    parser.set_defaults(parser=parser, errors=_USER_ERRORS)
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("demo", help="load, attach, evaluate, train, index, and write a page of features")
    command.add_argument("--model", choices=["tiny", "smollm2-135m"], default="tiny", help="smollm2-135m: a random SAE")
    command.add_argument("--prompt", default=PROMPT)
    command.add_argument("--train-tokens", type=int, default=300_000, help="tokens of a small SAE; 0 trains none")
    command.add_argument("--page", type=Path, default=Path("saewb_demo.html"), help="HTML file to write")
    command.set_defaults(run=_demo)

    command = commands.add_parser("lab", help="open JupyterLab on the notebooks; other options go to jupyter lab")
    command.add_argument("folder", nargs="?", type=Path, help="of notebooks; default: those of saewb")

    command = commands.add_parser("eval", help="print the metrics of one or several SAEs as a table")
    command.add_argument("model", help="as for load_model: tiny, a name on the hub, a folder")
    command.add_argument("saes", nargs="+", metavar="sae", help="as for load_sae: tiny, a folder, release::id")
    command.add_argument("--texts", type=Path, help="text file, a document per line; default: bundled held-out texts")
    command.add_argument("--n-rows", type=int, default=128, help="number of rows of ctx-len tokens")
    command.add_argument("--ctx-len", type=int, default=128)
    command.add_argument("--batch-size", type=int, default=8)
    command.add_argument("--folder", type=Path, help="write results there, and reuse those of earlier calls")
    command.add_argument("--no-losses", action="store_true", help="only reconstruction and sparsity: much faster")
    command.set_defaults(run=_evaluate)

    command = commands.add_parser("train", help="train SAEs from a YAML file, or resume that run")
    command.add_argument("file", type=Path)
    command.set_defaults(run=_train, errors=(*_USER_ERRORS, RuntimeError, ArithmeticError, MemoryError))

    command = commands.add_parser("doctor", help="check versions, devices and folders, and suggest fixes")
    command.add_argument("--network", action="store_true", help="check whether the hub answers")
    how = (
        "run the bundled model and SAE on a device for ten seconds, and compare with the CPU; default: a GPU, else cpu"
    )
    command.add_argument("--check", nargs="?", const=True, default=False, metavar="DEVICE", help=how)
    command.set_defaults(run=_doctor)
    return parser


def lab(folder: Path | None, jupyter_options: Sequence[str] = ()) -> int:
    """Open JupyterLab on a folder of notebooks, by default those of saewb."""
    if importlib.util.find_spec("jupyterlab") is None:
        print('JupyterLab is not installed.\n  fix:  pip install "saewb[lab]"', file=sys.stderr)
        return 1
    if folder is None:
        candidates = [Path(saewb.__file__).parents[1] / "notebooks", Path.cwd() / "notebooks"]
        folder = next((path for path in candidates if (path / "00_tour.ipynb").is_file()), Path.cwd())
        if folder not in candidates:
            print(f"The notebooks are in saewb's repository, not in the package. Opening {folder}", file=sys.stderr)
    if not folder.is_dir():
        print(f"no folder {str(folder)!r}.\n  fix:  saewb lab", file=sys.stderr)
        return 1
    return subprocess.run([sys.executable, "-m", "jupyterlab", f"--notebook-dir={folder}", *jupyter_options]).returncode


def _demo(options: argparse.Namespace) -> int:
    demo(options.model, options.prompt, options.train_tokens, options.page)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from saewb.distributed import ParallelContext

    model = saewb.load_model(options.model)
    if options.texts is None:
        texts = [document.text for document in saewb.tiny.held_out_texts()]
    else:
        texts = [line for line in options.texts.read_text(encoding="utf-8").splitlines() if line.strip()]
    table = saewb.evaluate_many(
        model,
        {name: tuple(name.split("::", 1)) if "::" in name else name for name in options.saes},
        saewb.data.tokens.token_rows(model, texts, options.ctx_len)[: options.n_rows],
        folder=options.folder,
        batch_size=options.batch_size,
        losses=not options.no_losses,
        progress=sys.stderr.isatty(),
    )
    if not ParallelContext.from_environment().is_main:  # of several processes one speaks
        return 0
    table = table.drop(columns=["dead_below", "dense_above", "hook_out", "model", "sae"]).dropna(axis=1, how="all")
    print(table.T.to_string(float_format=lambda value: f"{value:.4g}"))
    return 0


def _train(options: argparse.Namespace) -> int:
    """Train with a line of progress every few seconds; Ctrl-C and SIGTERM leave a checkpoint."""
    from saewb.distributed import ParallelContext
    from saewb.training.run import exit_on_sigterm
    from saewb.training.train import train_file

    exit_on_sigterm()
    is_main = ParallelContext.from_environment().is_main
    run = train_file(options.file)
    if is_main:
        print(run.memory, flush=True)
    while run.wait(timeout=5).state in ("running", "paused"):
        if is_main:
            print(run.progress, flush=True)
    if is_main:
        print(run.progress, *(f"{name}: {run.folder / 'saes' / name}" for name in run.saes), sep="\n")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    checkup = saewb.doctor(options.network, check=options.check)
    print(checkup)
    return 0 if checkup.ok else 1


if __name__ == "__main__":
    raise SystemExit(main())

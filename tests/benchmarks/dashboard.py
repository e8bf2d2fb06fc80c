"""An index against SAEDashboard: python -m tests.benchmarks.dashboard --peer-python PYTHON [--model smollm2-135m]

The same model, SAE and tokens; everything either shows of every latent. The peer needs older libraries, hence another
interpreter (`python -m tests.benchmarks dashboard` makes one). Prints times and peak memory of both, and on how many
latents they agree: top contexts, firings, logit effects.

How their top contexts are made comparable: SAEDashboard lists the strongest tokens, saewb the strongest token of each
row of text, once where windows are equal. So SAEDashboard is asked for many, and its list is read in that way.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import saewb

from .llama_files import write_llama
from .measure import Report, Row, Table, arguments, peak_mb, reset_peak, seconds

WINDOW = (20, 10)  # tokens before and after
TIED = 2e-4, 3e-6  # activations as near as this are a tie: theirs are rounded to 4 places; and both are float32


def language_model(name: str):
    """The Hugging Face model behind a name that `saewb.load_model` takes offline."""
    from transformers import AutoModelForCausalLM

    from saewb.models.gguf import gguf_folder
    from saewb.models.load import cache_folder, smollm2_path, tiny_path

    folder = tiny_path() if name == "tiny" else gguf_folder(smollm2_path(), cache_folder() / "gguf")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def sae_for(model, d_sae: int):
    """The embedded SAE for the embedded model, else a random top-k one in the middle of the model."""
    if d_sae == 0:
        return saewb.load_sae("tiny")
    hook = f"blocks.{model.cfg.n_layers // 2}.hook_resid_post"
    return saewb.SAE(saewb.SAEConfig(model.cfg.d_model, d_sae, activation="topk", k=32, hook=hook))


def prepare(folder: Path, name: str, sae, ids: torch.Tensor, special: tuple[int, ...], compared: list[int]) -> None:
    """Write down what the peer's interpreter needs."""
    write_llama(folder, language_model(name))
    save_file({"ids": ids}, folder / "tokens.safetensors")
    saewb.save_sae(sae, folder / "sae")
    job = {"hook": sae.cfg.hook, "batch": 8, "special": list(special), "n_features": sae.cfg.d_sae}
    job |= {"compared": compared, "group": min(ids.numel(), 2000), "threads": torch.get_num_threads()}
    (folder / "job.json").write_text(json.dumps(job))


def reduced(position: list[int], value: list[float], ids: torch.Tensor, n: int) -> list[tuple[int, float]]:
    """A list of the strongest tokens read as saewb has it: one of each row, equal windows once, n at most."""
    ctx, rows, windows, saved = ids.shape[1], set(), set(), []
    for at, size in sorted(zip(position, value, strict=True), key=lambda pair: (-pair[1], pair[0])):
        row, place = divmod(at, ctx)
        window = (min(place, WINDOW[0]), *ids[row, max(0, place - WINDOW[0]) : place + WINDOW[1] + 1].tolist())
        if size <= 0 or row in rows:
            continue
        rows.add(row)
        if window not in windows:
            windows.add(window)
            saved.append((at, size))
    return saved[:n]


def same_contexts(ours: list[tuple[int, float]], theirs: list[tuple[int, float]]) -> bool:
    """The same tokens in the same order; where activations tie, any order, and any choice among the last."""
    if len(ours) != len(theirs) or not all(tied(a[1], b[1]) for a, b in zip(ours, theirs, strict=True)):
        return False
    last = ours[-1][1] if ours else 0.0
    for at, size in ours:
        near = {other for other, theirs_size in theirs if tied(size, theirs_size)}
        if at not in near and not tied(size, last):
            return False
    return True


def tied(one: float, other: float) -> bool:
    """Whether two activations could be the same."""
    return abs(one - other) <= TIED[0] + TIED[1] * abs(one)


@dataclass(frozen=True)
class Agreement:
    """On how many latents both say the same."""

    n: int
    contexts: int  # top contexts
    firings: int  # number of tokens it fires on
    logits: int  # ten largest and ten smallest effects on logits
    largest_off: float  # largest difference of an effect
    differ: tuple[int, ...] = ()  # latents whose top contexts are not the same

    def __str__(self) -> str:
        return (
            f"top contexts agree on {self.contexts} of {self.n} latents, numbers of firings on {self.firings}, "
            f"logit effects on {self.logits} (largest difference {self.largest_off:.1e})"
            + (f"; other contexts: latents {', '.join(map(str, self.differ[:10]))}" if self.differ else "")
        )


def agreement(index, theirs: dict[str, torch.Tensor], compared: list[int], ids: torch.Tensor) -> Agreement:
    """Compare pages with what the peer found on the same latents."""
    firings = logits = 0
    largest, differ = 0.0, []
    for j, i in enumerate(compared):
        page = index.latent(i)
        ours = [(c.row * ids.shape[1] + c.position, c.value) for c in page.top]
        their_top = reduced(theirs["position"][j].tolist(), theirs["value"][j].tolist(), ids, index.info.n_top)
        if not same_contexts(ours, their_top):
            differ.append(i)
        firings += page.n_active == int(theirs["n_active"][j])
        mine = torch.tensor([[x.effect for x in page.logits_top], [x.effect for x in page.logits_bottom]])
        other = torch.stack([theirs["logits_top"][j], theirs["logits_bottom"][j]])
        off = float((mine - other).abs().max())
        logits, largest = logits + (off < 1e-3), max(largest, off)
    n = len(compared)
    return Agreement(n, n - len(differ), firings, logits, largest, tuple(differ))


def compare(options, report: Report) -> Agreement:
    """Run both and add the table."""
    model = saewb.load_model(options.model, device="cpu")
    d_sae = options.d_sae if options.d_sae is not None else (0 if options.model == "tiny" else 4608)
    sae = sae_for(model, d_sae)
    texts = [document.text for document in saewb.tiny.texts()]
    ids = saewb.data.tokens.token_rows(model, texts, 128)[: 8 if options.quick else options.rows]
    special = saewb.models.tokenizer.special_ids(model, True)
    step = max(1, sae.cfg.d_sae // options.compared)
    compared = list(range(0, sae.cfg.d_sae, step))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder, options.model, sae, ids, special, compared)
        saewb.build_index(model, sae, ids[:2], n_top=2)  # imports
        held = reset_peak()
        indexes = []
        took = seconds(lambda: indexes.append(saewb.build_index(model, sae, ids, window=WINDOW)))
        grew = peak_mb() - held
        command = [options.peer_python, "-m", "tests.benchmarks.dashboard_arm", str(folder)]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"sae-dashboard failed:\n{done.stderr[-2000:]}")
        content = json.loads((folder / "theirs.json").read_text())
        result = agreement(indexes[0], load_file(folder / "theirs.safetensors"), compared, ids)
    version = content["facts"].get("sae-dashboard", "?")
    rows = [Row("saewb", took, f"peak +{grew:.0f} MB; {result}")]
    for name, how in (("plain", ""), ("cached", ", its cache")):
        rows.append(
            Row(f"sae-dashboard {version}{how}", content[name]["seconds"], f"peak +{content[name]['peak_mb']:.0f} MB")
        )
    title = f"everything about {sae.cfg.d_sae:,} latents over {ids.numel():,} tokens, {options.model}"
    report.add(Table(title, tuple(rows), "saewb"))
    return result


def main() -> None:
    """Compare."""
    parser = arguments(__doc__)
    parser.add_argument("--peer-python", help="an interpreter with sae-dashboard", required=True)
    parser.add_argument("--model", default="tiny", choices=["tiny", "smollm2-135m"])
    parser.add_argument("--d-sae", type=int, help="of a random top-k SAE; the embedded one for tiny unless given")
    parser.add_argument("--rows", type=int, default=64, help="of 128 tokens")
    parser.add_argument("--compared", type=int, default=128, help="latents to compare")
    options = parser.parse_args()
    result = compare(options, Report(options))
    if result.contexts < result.n or result.logits < result.n or result.firings < result.n:
        sys.exit(f"not the same: {result}")


if __name__ == "__main__":
    main()

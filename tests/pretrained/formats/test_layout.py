"""A layout is declared in a few lines; what is wrong with files of it is said in the names of the file."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

import pytest
import torch
from helpers.format_tensors import D, F, O, inputs, weights
from safetensors.torch import save_file

from saewb.errors import FormatError
from saewb.pretrained.formats import LAYOUTS, Provenance, TensorFile
from saewb.pretrained.formats._layout import TableLayout, check_table, locate, sum_over_targets


class Mine(TableLayout):
    """A layout as somebody may add one."""

    name = "mine"
    weights = "{path}/mine.safetensors"
    config = "{parent}/run.json"
    needs_config = False
    table = {"W_enc": "enc FD", "b_enc": "be F", "W_dec": "dec OF", "b_dec": "bd O", "W_skip": "?skip OD"}  # noqa: RUF012

    def fields(self, files):
        return {"skip": "skip" in files.weights, "hook": files.config.get("hook"), "metadata": {"l0": 3.0}}


def written(folder, **changes):
    w = {name: torch.from_numpy(array) for name, array in weights(d_out=O).items()}
    stored = {"enc": w["W_enc"].T, "be": w["b_enc"], "dec": w["W_dec"].T, "bd": w["b_dec"], **changes}
    folder.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in stored.items() if t is not None}, folder / "mine.safetensors")
    return w


@pytest.mark.parametrize("skip", [None, torch.full((O, D), 0.25)])
def test_a_table_names_turns_and_checks(skip, tmp_path):
    w = written(tmp_path / "a", skip=skip)
    (tmp_path / "run.json").write_text('{"hook": "blocks.1.hook_mlp_out"}')
    sae = Mine().read(tmp_path / "a", Provenance(model="gpt2", hook="elsewhere", overrides={"l0": 4.0}))
    assert (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.d_out, sae.cfg.skip) == (D, F, O, skip is not None)
    assert (sae.cfg.model, sae.cfg.hook, sae.cfg.metadata) == ("gpt2", "blocks.1.hook_mlp_out", {"l0": 4.0})
    x = torch.from_numpy(inputs())
    out = (x @ w["W_enc"] + w["b_enc"]).relu() @ w["W_dec"] + w["b_dec"]
    torch.testing.assert_close(sae(x), out if skip is None else out + x @ skip.T)
    assert sae.W_dec.is_contiguous()  # few rows of it are taken at a time


def test_files_of_a_layout(tmp_path):
    assert Mine().description == "mine ({parent}/run.json + mine.safetensors)"
    assert Mine().patterns("x/a[1]") == ["x/run.json", "x/a[[]1]/mine.safetensors"]
    assert locate("{path}", PurePosixPath("a/b.pt")) == PurePosixPath("a/b.pt")
    assert not Mine().detect(tmp_path)
    written(tmp_path)
    assert Mine().detect(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"be": None}, "be missing"),
        ({"more": torch.ones(2)}, "more left over"),
        ({"be": torch.ones(F + 1)}, rf"be \({F + 1},\) instead of \({F},\)"),
        ({"dec": torch.ones(O, F, 1)}, "dec"),
        ({"bd": torch.ones(O, dtype=torch.int32)}, "stores bd as torch.int32"),
        ({"bd": torch.full((O,), torch.nan)}, "NaN or infinity in bd"),
    ],
)
def test_what_does_not_fit_is_named(changes, message, tmp_path):
    written(tmp_path, **changes)
    with pytest.raises(FormatError, match=rf"cannot read {re.escape(str(tmp_path))}: [\s\S]*{message}"):
        Mine().read(tmp_path)


def test_what_was_given_and_changes_the_result_is_refused(tmp_path):
    written(tmp_path)
    with pytest.raises(FormatError, match="scaling_factor=2"):
        Mine().read(tmp_path, Provenance(scaling_factor=2.0))
    with pytest.raises(FormatError, match="would change what the SAE computes"):
        Mine().read(tmp_path, Provenance(overrides={"d_in": 3}))
    with pytest.raises(ValueError, match="layer=-1"):
        Provenance(layer=-1)


def test_side_tensors_may_be_integers(tmp_path):
    save_file({"W": torch.ones(2, 3), "k": torch.tensor(7)}, tmp_path / "a.safetensors")
    file = TensorFile(tmp_path / "a.safetensors")
    assert check_table(file, {"W_enc": "W DF"}, {"k": "", "group_sizes": "G"}) == {"W_enc": ("W", "DF")}
    with pytest.raises(FormatError, match="k left over"):
        check_table(file, {"W_enc": "W DF"})
    with pytest.raises(FormatError, match=r"W \(2, 3\) instead of \(2, 4\)"):
        check_table(file, {"W_enc": "W DF"}, {"k": None}, F=4)


def test_a_sum_over_targets_rounds_once():
    W_dec = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(sum_over_targets(W_dec, torch.float32), W_dec.float().sum(1))
    assert torch.equal(sum_over_targets(W_dec), W_dec.float().sum(1).bfloat16())


def test_every_layout_has_a_name_and_marks_of_its_own():
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS)
    assert all(layout.marks and layout.__doc__ for layout in LAYOUTS)
    aliases = [alias for layout in LAYOUTS for alias in layout.aliases]
    assert len(set(aliases)) == len(aliases)
    assert isinstance(LAYOUTS[0].weights_path(Path("a")), Path)

"""The house: who may import whom, what an import costs, and that public names are what they say."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import saewb

ROOT = Path(saewb.__file__).parent

# Each room may import from saewb only what is on its right. Torch everywhere; transformer_lens in models only.
ROOMS = {
    "errors": "",
    "field_notes": "",
    "devices": "errors",
    "checkup": "saewb",
    "config": "errors",
    "arithmetic": "config",
    "fitting": "errors",
    "sae": "arithmetic config errors fitting products",
    "products": "arithmetic config products",
    "encoding": "arithmetic products sae",
    "cross_layer": "arithmetic config errors fitting",
    "cross_layer_pass": "arithmetic cross_layer errors",
    "pursuit": "arithmetic config errors fitting",
    "temporal": "arithmetic config errors fitting",
    "metrics": "errors",
    "stats": "arithmetic errors products stats",
    "enrichment": "errors",
    "token_kinds": "errors",
    "tokens": "errors packing",
    "spans": "errors",
    "gguf": "errors",
    "hooks": "errors",
    "hub": "errors",
    "splice": "errors hooks sae",
    "activations": "errors hooks tokens",
    "placing": "cross_layer cross_layer_pass errors hooks splice",
    "passes": "hooks models",
    "on_model": "errors hooks passes",
    "attachment": "cross_layer errors on_model passes placing splice tokens",
    "positions": "errors",
    "change": "arithmetic errors hooks sae splice",
    "generation": "errors hooks passes",
    "interventions": "change errors hooks on_model passes placing positions tokens",
    "nodes": "arithmetic errors hooks placing sae splice tokens",
    "attribution": "activations errors hooks nodes spans splice",
    "direct_effects": "cross_layer index nodes",
    "prompt_reading": "activations attribution direct_effects errors hooks index nodes spans",
    "reading": "activations cross_layer direct_effects errors hooks placing predictions prompt_reading splice tokens",
    "predictions": "activations attachment errors hooks spans tokens",
    "synthetic": "errors metrics sae stats synthetic",
    "formats": "config cross_layer errors formats pursuit sae temporal",
    "gguf_llama": "errors gguf",
    "models": "devices errors gguf_llama hub spans",
    "loading": "config cross_layer devices errors formats hub_files places pursuit sae temporal",
    "evaluation": "errors",
    "firing": "arithmetic errors metrics",
    "eval_passes": "activations attachment errors firing hooks metrics placing sae splice",
    "eval_store": "errors",
    "evals": "activations errors eval_passes eval_store evaluation firing hooks loading sae tokens",
    "embedded": "errors",
    "embedded/make": "embedded errors evals loading metrics models objectives sae streams tokens training",
    "cli": "errors saewb",
    "packing": "errors",
    "orders": "",
    "documents": "errors orders",
    "token_streams": "documents errors orders packing",
    "sources": "activations errors hooks orders team tokens",
    "buffer": "activations errors",
    "prefetch": "activations buffer errors",
    "streams": "activations buffer errors prefetch sources token_streams tokens",
    "statefile": "errors",
    "activation_cache": "activations buffer errors orders sources statefile streams tokens",
    "objectives": "config errors objectives pursuit sae team",
    "sparse_step": "errors objectives products team",
    "training": "arithmetic config errors firing metrics objectives pursuit sae sparse_step team training",
    "run_folder": "errors formats loading statefile",
    "run_view": "",
    "memory": "",
    "sinks": "",
    "feed": "activations buffer streams",
    "run_record": "errors memory training",
    "run_plan": "errors objectives run_folder run_record sae streams training",
    "runs": "errors feed journal memory past_run run_folder run_record run_view sinks team training",
    "journal": "errors run_folder run_record sinks training",
    "launch": "activation_cache activations attachment devices errors feed hooks outlook run_folder "
    "run_plan run_record runs sinks sources streams team tokens training",
    "releases": "errors",
    "hub_files": "errors hub",
    "places": "errors formats hub_files releases",
    "model_card": "",
    "sharing": "errors loading model_card places pursuit sae temporal",
    "latent_pairs": "activations encoding errors splice stats tokens",
    "index": "activations arithmetic attachment encoding errors hooks products report sae spans splice stats tokens",
    "report": "errors index",
    "feature_json": "index",
    "neuronpedia": "errors feature_json index",
    "train_file": "saewb",
    "__main__": "cli",
    "team": "errors",
    "past_run": "errors objectives run_folder run_plan run_record training",
    "outlook": "activation_cache errors field_notes hooks memory past_run run_plan run_record sources token_streams "
    "training",
}
NEVER = {"ipywidgets", "IPython", "plotly", "wandb", "sae_lens", "saewb_widgets"}


def rooms():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts == ("__init__",):
            continue
        room = parts[0]
        if room == "embedded" and parts[1].startswith("make"):
            room = "embedded/make"
        yield room, path


def imported(path):
    """(module, at top level?) of each import in the file, saewb's as saewb.<room>."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "saewb":
            names = [f"saewb.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module]
        for name in names:
            yield name, id(node) in top


@pytest.mark.parametrize(("room", "path"), list(rooms()), ids=lambda v: v if isinstance(v, str) else v.stem)
def test_who_imports_whom(room, path):
    assert room in ROOMS, f"{room} is a new room: say in ROOMS what it may import"
    allowed = set(ROOMS[room].split())
    for name, at_top in imported(path):
        package, _, rest = name.partition(".")
        if package == "saewb":
            target = rest.split(".")[0]
            own = target == room.split("/")[0]
            assert "saewb" in allowed or target in allowed or own, f"{path.name} may not import {name}"
        needed = (room, package) == ("sinks", "wandb") and not at_top  # only for who asks for that sink
        assert package not in NEVER or needed, f"{path.name} imports {name}"
        if package == "transformer_lens":
            assert room == "models", f"{path.name} imports {name}"
            assert not at_top, f"{path.name} imports {name} at the top"
        # Two of the embedded model's makers and the GGUF reader are themselves imported late, for what they make.
        late = room == "embedded/make" or path.stem == "gguf_llama"
        if package in ("transformers", "huggingface_hub", "pandas") and not late:
            assert not at_top, f"{path.name} imports {name} at the top"


def test_import_is_quick_and_has_no_side_effect():
    code = (
        "import sys, time; t = time.perf_counter(); import saewb; took = time.perf_counter() - t;"
        "heavy = {'torch', 'transformers', 'transformer_lens', 'pandas', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy; print(f'import saewb: {took * 1000:.0f} ms')"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    print(out.stdout)
    assert out.stderr == ""


@pytest.mark.parametrize("name", saewb.__all__)
def test_public_names_resolve_and_stay(name):
    first = getattr(saewb, name)
    if name in saewb._HOME:
        importlib.import_module(f"saewb.{saewb._HOME[name]}")
    assert getattr(saewb, name) is first
    assert first.__doc__, f"{name} has no docstring"
    assert name in dir(saewb)


def test_no_public_name_is_also_a_modules():
    modules = {path.stem for path in ROOT.iterdir()}
    assert not modules & set(saewb._HOME)


def test_unknown_name_has_near_ones():
    with pytest.raises(AttributeError, match=r"'atach'; near: attach"):
        saewb.atach  # noqa: B018


def test_modules_stay_small():
    """350 lines is the ceiling."""
    long = {path.name: n for path in ROOT.rglob("*.py") if (n := len(path.read_text().splitlines())) > 350}
    assert not long


WIDGETS = Path(__file__).parents[1] / "widgets" / "saewb_widgets"


@pytest.mark.parametrize("path", sorted(WIDGETS.rglob("*.py")), ids=lambda path: path.stem)
def test_panels_use_public_names_and_do_no_mathematics(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                package, _, rest = alias.name.partition(".")
                assert package != "saewb" or not rest, f"{path.name} imports {alias.name}"
                assert package not in ("torch", "numpy", "scipy"), f"{path.name} imports {alias.name}"
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "saewb":
            names = {alias.name for alias in node.names}
            assert node.module == "saewb", f"{path.name} imports from {node.module}"
            assert names <= set(saewb.__all__), f"{path.name} imports {names}"
    assert len(path.read_text().splitlines()) <= 350

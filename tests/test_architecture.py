"""The house: who may import whom, what an import costs, and that public names are what they say."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import saewb

ROOT = Path(saewb.__file__).parent

LAYERS = [  # a room imports rooms of earlier lines and its own files; the first line only `errors`; the last all
    {
        "errors",
        "fingerprint",
        "_config",
        "_files",
        "_finite",
        "_http",
        "_indices",
        "_display",
        "hub",
        "distributed",
        "metrics",
        "kernels",
    },  # torch, numpy, huggingface_hub
    {"sae"},
    {"models", "stats", "pretrained"},
    {"interventions", "data", "synthetic"},
    {"features", "training"},
    {"circuits"},
    {"explanations", "probing", "prompts"},
    {"evals"},
    {"tiny"},
    {"cli", "demo", "diagnostics", "__init__", "__main__"},
]
NEVER = {"ipywidgets", "IPython", "wandb", "sae_lens", "saewb_widgets"}
LATE = {"transformer_lens", "transformers", "huggingface_hub", "pandas", "plotly"}  # imported where they are used
FILES = sorted(ROOT.rglob("*.py"))
ROOMS = {path.relative_to(ROOT).with_suffix("").parts[0] for path in FILES}


def module(path):
    """The dotted name below saewb, as a tuple."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts


def imports(path):
    """(dotted name, whether at the top of the file) of each import; `from a import b` gives a.b."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from ((f"{node.module}.{alias.name}", id(node) in top) for alias in node.names)


def layer(room):
    (index,) = [i for i, rooms in enumerate(LAYERS) if room in rooms] or pytest.fail(f"{room} is in no layer")
    return index


@pytest.mark.parametrize("path", FILES, ids=lambda path: ".".join(module(path)))
def test_a_room_imports_lower_layers_only(path):
    room = module(path)[0]
    for name, at_top in imports(path):
        package, *rest = name.split(".")
        if package == "saewb":
            target = rest[0] if rest and rest[0] in ROOMS else "__init__"
            lower = layer(target) < layer(room) or layer(room) == len(LAYERS) - 1
            leaf = target == "errors" and layer(room) == 0
            assert target == room or lower or leaf, f"{room} may not import {name}"
        assert package not in NEVER or (not at_top and "loggers" in path.stem), f"{path.name} imports {name}"
        assert package != "transformer_lens" or room == "models", f"{path.name} imports {name}"
        assert package not in LATE or not at_top or path.parent.name == "tiny", f"{path.name} imports {name} at the top"


def test_no_file_imports_in_a_circle():
    """Late imports count too: two files that need one another are one thought."""
    names = {module(path) for path in FILES}
    needs = {module(path): set() for path in FILES}
    for path in FILES:
        for name, _ in imports(path):
            parts = tuple(name.split(".")[1:])
            target = next((parts[:n] for n in range(len(parts), 0, -1) if parts[:n] in names), None)
            if name.startswith("saewb.") and target and target != module(path):
                needs[module(path)].add(target)
    while free := {name for name, needed in needs.items() if not needed & needs.keys()}:
        needs = {name: needed for name, needed in needs.items() if name not in free}
    assert not needs, {
        ".".join(name): sorted(".".join(n) for n in needed & needs.keys()) for name, needed in needs.items()
    }


def test_top_level_is_a_dozen_rooms():
    entries = {path.name for path in ROOT.iterdir() if path.name != "__pycache__"}
    assert len({name for name in entries if "." not in name}) <= 16
    assert set.union(*LAYERS) >= ROOMS


def test_import_is_quick_and_has_no_side_effect():
    code = (
        "import sys, time; t = time.perf_counter(); import saewb; took = time.perf_counter() - t;"
        "heavy = {'torch', 'pydantic', 'transformers', 'transformer_lens', 'pandas', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy; print(f'import saewb: {took * 1000:.0f} ms')"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    print(out.stdout)
    assert out.stderr == ""


@pytest.mark.parametrize("name", saewb.__all__)
def test_public_names_resolve_and_stay(name):
    first = getattr(saewb, name)
    assert first.__doc__, f"{name} has no docstring"
    if module_name := getattr(first, "__module__", ""):
        importlib.import_module(module_name)
    assert getattr(saewb, name) is first
    assert name in dir(saewb)


def test_no_public_name_is_also_a_modules():
    """Importing the module would hide the name."""
    modules = {path.stem for path in ROOT.iterdir()}
    functions = {name for name in saewb.__all__ if not isinstance(getattr(saewb, name), ModuleType)}
    assert not modules & functions


def test_unknown_name_has_near_ones():
    with pytest.raises(AttributeError, match=r"'atach'; near: attach"):
        saewb.atach  # noqa: B018


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

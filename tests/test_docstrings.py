"""What `help()` says of every public name: a claim, each argument, what comes back, what is raised, where it is from.

Shapes stand in the types (jaxtyping, or in brackets in the text), units in the text of each argument and field.
"""

import ast
import inspect
import re
import textwrap
from dataclasses import fields, is_dataclass
from itertools import pairwise

import pytest
from helpers import public_names
from helpers.public_names import NAMES

import saewb

SECTIONS = ("Args", "Returns", "Raises", "References", "Example")
# Their formulas come from papers, or are measured as another tool measures them.
FROM_PAPERS = {
    *("SAE", "PursuitSAE", "TemporalSAE", "CrossLayerTranscoder"),
    *("Standard", "Gated", "TopK", "AbsTopK", "BatchTopK", "Matryoshka", "JumpReLU", "MatchingPursuit"),
    *("superposition", "enrich", "attribute", "attribute_edges", "evaluate", "steer"),
    *("attribution_graph", "AttributionGraph", "freeze", "intervene", "faithfulness"),
}
NEEDS_NETWORK = {"push_to_hub"}


def public():
    return [pytest.param(name, value, id=name) for name, value in public_names.public()]


def sections(text):
    """The docstring's sections, the claim under ""."""
    parts = re.split(rf"(?m)^({'|'.join(SECTIONS)}):[ ]*$", text)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def tree_of(value):
    return ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]


def parameters(function):
    return [name for name in inspect.signature(function).parameters if name != "self"]


def check_arguments(name, function, text):
    """Each parameter has its line, with words."""
    if not (expected := parameters(function)):
        return
    assert "Args" in text, f"{name}: no Args"
    lines = re.findall(r"(?m)^    \*{0,2}([\w, *]+):\s+(\S.*)$", text["Args"])
    message = {one.strip(" *") for names, _ in lines for one in names.split(",")}
    assert set(expected) <= message, f"{name}: {sorted(set(expected) - message)} not in Args"
    for names, words in lines:
        assert len(words) > 6, f"{name}: {names}: {words!r} says too little"


def check_shapes(name, function, text):
    """A bare Tensor says its shape in words."""
    for parameter in inspect.signature(function).parameters.values():
        if str(parameter.annotation) in ("Tensor", "Tensor | None"):
            line = re.search(rf"(?ms)^    \*{{0,2}}{parameter.name}:.*?(?=^    \w+:|\Z)", text["Args"])[0]
            assert "[" in line or "scalar" in line, f"{name}: which shape has {parameter.name}?"


def raises(node):
    """Raised in the function's own body, and not only passed on."""
    return any(isinstance(n, ast.Raise) and n.exc is not None for n in ast.walk(node))


@pytest.mark.parametrize(("name", "value"), public())
def test_the_claim_is_a_sentence(name, value):
    claim = inspect.getdoc(value).split("\n\n")[0]
    assert re.search(r"[.:;]$", claim), f"{name}: {claim!r}"
    assert len(claim.split()) > 3, f"{name}: {claim!r}"


@pytest.mark.parametrize(("name", "value"), [p for p in public() if inspect.isfunction(p.values[1])])
def test_functions_say_all(name, value):
    text = sections(inspect.getdoc(value))
    check_arguments(name, value, text)
    check_shapes(name, value, text)
    node = tree_of(value)
    if raises(node):
        assert "Raises" in text, f"{name}: no Raises"
    returns = ast.unparse(node.returns) if node.returns else "None"
    if returns not in ("None", "Iterator[None]", "bool", "str") and parameters(value):
        assert "Returns" in text, f"{name}: no Returns, and it returns {returns}"
    if name in FROM_PAPERS or name.startswith("metrics."):
        assert "References" in text, f"{name}: no References"
    if name not in NEEDS_NETWORK:
        assert "Example" in text, f"{name}: no Example"


def field_docstrings(owner):
    """The docstring under each field of a class and its bases, or the meaning in its metadata."""
    noted = fields(owner) if is_dataclass(owner) else ()
    texts = {f.name: f.metadata["meaning"] for f in noted if "meaning" in f.metadata}
    for cls in (cls for cls in reversed(owner.__mro__) if cls.__module__.startswith("saewb")):
        for node, below in pairwise(tree_of(cls).body):
            if isinstance(node, ast.AnnAssign) and isinstance(getattr(below, "value", None), ast.Constant):
                texts[node.target.id] = below.value.value
    return texts


@pytest.mark.parametrize("name", [name for name in NAMES if is_dataclass(getattr(saewb, name))])
def test_every_field_has_a_docstring(name):
    owner = getattr(saewb, name)
    texts = field_docstrings(owner)
    for field in fields(owner):
        assert field.name.startswith("_") or str(texts.get(field.name, "")).strip(), f"{name}.{field.name}"


@pytest.mark.parametrize("name", ["TrainConfig", "TopK", "JumpReLU"])
def test_help_of_a_config_says_what_every_field_is(name):
    """With what it may be, if that is one of a few texts."""
    text = inspect.getdoc(getattr(saewb, name)).partition("\nFields:\n")[2]
    for field in fields(getattr(saewb, name)):
        assert re.search(rf"(?m)^    {field.name}: \S", text), f"{name}.{field.name}"
    assert re.search(r"(?m)^    (schedule|rows): .*\('(constant|unit)', '(linear|free)'", text)


@pytest.mark.parametrize(("name", "value"), [p for p in public() if inspect.isclass(p.values[1])])
def test_classes_say_all(name, value):
    text, node = sections(inspect.getdoc(value)), tree_of(value)
    texts = field_docstrings(value)
    for field in node.body:  # its unit stands under it, or in the docstring
        if isinstance(field, ast.AnnAssign) and not field.target.id.startswith("_"):
            described = field.target.id in texts or re.search(rf"\b{field.target.id}\b", inspect.getdoc(value))
            assert described, f"{name}.{field.target.id}"
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
            assert ast.get_docstring(method), f"{name}.{method.name} has no docstring"
    if name in FROM_PAPERS:
        assert "References" in text, f"{name}: no References"

"""saewb: the workbench for sparse autoencoders of language models, in the notebook.

    import saewb

    model, sae = saewb.load_model("tiny"), saewb.load_sae("tiny")
    with saewb.attach(model, sae) as attached:
        logits = model("The Eiffel Tower is in")
    saewb.evaluate(model, sae, [document.text for document in saewb.tiny.held_out_texts()])

The public names stand in `__init__.pyi` and are resolved on first use: `import saewb` takes milliseconds and loads
nothing else.
"""

from __future__ import annotations

from typing import Any

import lazy_loader

__version__ = "0.1.0"

_attribute, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name in __all__:
        return _attribute(name)
    from saewb.errors import near

    close = ", ".join(near(name, __all__))
    raise AttributeError(f"module 'saewb' has no attribute {name!r}; {f'near: {close}' if close else 'see dir(saewb)'}")

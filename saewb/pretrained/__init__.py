"""Published and saved SAEs: find, download, read in any layout, save, publish."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submodules=["catalogue", "formats", "load", "resolve", "share"]
)

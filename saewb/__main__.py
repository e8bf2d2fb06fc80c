"""`python -m saewb`: the command line, for launchers that start modules, such as torchrun and `accelerate launch`."""

from __future__ import annotations

from saewb.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

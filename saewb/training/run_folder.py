"""What a training run leaves on the disk.

    run.json                 what was asked for, as plain values
    history.jsonl            a line per logged step
    end.json                 how it ended, and of what; not there while it goes on, or if it was cut off (`kill -9`)
    checkpoint.safetensors   everything a resumed run needs, as of the last checkpoint
    saes/<name>/             the SAEs as of then, in the SAELens layout
    saes_at/<tokens>/<name>/ those of every checkpoint, if they are to be kept
    init/<name>/             what an SAE was started from, if from a trained one

All but the history is written whole or not at all: a full disk or a kill leaves what was there before. The history is
appended to; a last line that was cut off is dropped when it is read.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, final

from saewb._files import load_state, save_state, write_text
from saewb.errors import FormatError, explain
from saewb.pretrained.formats import saelens
from saewb.pretrained.load import load_sae, save_sae

_RUN, _HISTORY, _END = "run.json", "history.jsonl", "end.json"
_CHECKPOINT, _LOCK = "checkpoint.safetensors", ".lock"


@final
class RunFolder:
    """The folder of one run, taken by one process at a time.

    Args:
        path: made if it is not there.
        writes: False only to read what is there while another process writes.

    Raises:
        RuntimeError: if a run is going on in it, in this process or another.
    """

    def __init__(self, path: str | Path, *, writes: bool = True) -> None:
        self.path, self._writes = Path(path).expanduser(), writes
        self._lock: IO[str] | None = None
        if writes:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.path)
        self._history: IO[str] | None = None

    @property
    def checkpoint_path(self) -> Path:
        """The file of the last checkpoint."""
        return self.path / _CHECKPOINT

    def begin(self, facts: Mapping[str, Any], init: Mapping[str, Any]) -> None:
        """Note what was asked for.

        Raises:
            FileExistsError: if there is a run in the folder.
        """
        if (self.path / _RUN).exists():
            fix = f"saewb.resume_run({str(self.path)!r}, model=model, tokens=tokens)"
            raise FileExistsError(explain(f"{str(self.path)!r} holds a run already.", want="a new folder", fix=fix))
        for name, sae in init.items():
            save_sae(sae, self.path / "init" / name, overwrite=True)
        write_text(self.path / _RUN, json.dumps(facts, indent=1))

    def facts(self) -> dict[str, Any]:
        """What was asked for; see `read_facts`."""
        return read_facts(self.path)

    def init(self, name: str) -> Any:
        """The SAE that one was started from, or None."""
        path = self.path / "init" / name
        return load_sae(path) if path.is_dir() else None

    def log(self, row: Mapping[str, Any]) -> None:
        """Append a line to the history."""
        if self._history is None:
            self._history = (self.path / _HISTORY).open("a", encoding="utf-8")
        self._history.write(json.dumps(row) + "\n")
        self._history.flush()

    def resumed(self, facts: Mapping[str, Any], n_tokens: int) -> list[dict[str, Any]]:
        """Go on after `n_tokens` tokens: what came after that, and how it ended, is forgotten on the disk too.

        Args:
            facts: what is asked for now; it may have another end.
            n_tokens: of the checkpoint.

        Returns:
            The history up to there.
        """
        path = self.path / _HISTORY
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        rows = [row for row in map(_parsed, lines) if row is not None and row["n_tokens"] <= n_tokens]
        if self._writes:
            write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
            write_text(self.path / _RUN, json.dumps(facts, indent=1))
            (self.path / _END).unlink(missing_ok=True)
        return rows

    def end(self, told: Mapping[str, Any]) -> None:
        """Note how the run ended: its state, its error if it failed.

        Raises:
            OSError: if the disk is full, or the folder is gone.
        """
        if not self.path.is_dir():  # not to be made anew, with nothing but its end in it
            raise FileNotFoundError(_gone(self.path))
        write_text(self.path / _END, json.dumps(told, indent=1))

    def checkpoint(self, state: Mapping[str, Any], saes: Mapping[str, Any], keep: int | None) -> None:
        """Put a state and its SAEs in place of the last ones.

        Args:
            state: for `resume_run`.
            saes: by name.
            keep: number of tokens, to keep these SAEs under; None keeps only the newest.

        Raises:
            OSError: if the disk is full, or the folder is gone.
        """
        try:
            save_state(self.checkpoint_path, dict(state))
            self._write(saes, "saes")
            if keep is not None:
                self._write(saes, "saes_at", f"{keep:012d}")
        except OSError as error:
            if self.path.is_dir():
                raise
            raise FileNotFoundError(_gone(self.path)) from error

    def _write(self, saes: Mapping[str, Any], *below: str) -> None:
        """Folder by folder: a run's folder that somebody deletes meanwhile is not made anew."""
        folder = self.path
        for name in below:
            folder = folder / name
            folder.mkdir(exist_ok=True)
        for name, sae in saes.items():
            saelens.write(sae, folder / name, overwrite=True)

    def state(self) -> dict[str, Any]:
        """The last checkpoint.

        Raises:
            FileNotFoundError: if the run never came to one.
        """
        if not self.checkpoint_path.is_file():
            what = f"the run in {str(self.path)!r} ended before its first checkpoint."
            raise FileNotFoundError(explain(what, want="a run with a checkpoint", fix="saewb.train(...), anew"))
        return load_state(self.checkpoint_path)

    def close(self) -> None:
        """Let others have the folder."""
        for file in (self._history, self._lock):
            if file is not None:
                file.close()
        self._history = self._lock = None


def sae_names(names: Iterable[str]) -> None:
    """Check that SAEs can be folders.

    Raises:
        ValueError: for a name that is no plain file name.
    """
    for name in names:
        plain = name and all(c.isalnum() or c in "._-" for c in name) and not name.startswith(".")
        if not plain:
            raise ValueError(
                explain(f"got an SAE named {name!r}.", want="letters, digits, '_', '-', '.'", fix="'sae_1'")
            )


def _gone(path: Path) -> str:
    want = "the folder back in its place; or the SAEs, which are in run.saes, kept elsewhere"
    fix = "saewb.save_sae(run.sae, 'saes/a')"
    return explain(f"the run's folder {str(path)!r} is not there any more.", want=want, fix=fix)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "n_tokens" in row else None


def _locked(folder: Path) -> IO[str] | None:
    """An open file that nobody else can have open in this way; the system takes it back when the process ends."""
    if os.name == "nt":
        return None
    import fcntl

    file = (folder / _LOCK).open("a")
    for left in range(9, -1, -1):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if left:  # somebody who looks whether a run goes on holds it for a moment
                time.sleep(0.01)
                continue
            file.close()
            what = f"a run is going on in {str(folder)!r}."
            want = "another folder, or the end of that run"
            raise RuntimeError(explain(what, want=want, fix="run.stop()")) from error
    return file


def is_going_on(folder: Path) -> bool | None:
    """Whether a process holds a run's folder; None where that cannot be known."""
    lock = folder / _LOCK
    if os.name == "nt" or not lock.is_file():
        return None if os.name == "nt" else False
    import fcntl

    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def read_end(folder: Path) -> dict[str, Any]:
    """How the run in a folder ended: its state, its error, its last notes.

    Without a note of it: "running", if a process holds the folder; "cut off", if none does, as after `kill -9`;
    "unfinished" where that cannot be known.

    Raises:
        FormatError: if the file is not ours.
    """
    path, going = folder / _END, is_going_on(folder)
    if not path.is_file():  # written before the folder is let go, so there would be one
        return {"state": "unfinished" if going is None else "running" if going else "cut off", "error": "", "notes": []}
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return {"state": str(told["state"]), "error": str(told["error"]), "notes": list(map(str, told["notes"]))}
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(explain(f"{_END} in {str(folder)!r} cannot be read: {error!r}.", want="ours")) from error


def read_facts(path: Path) -> dict[str, Any]:
    """What was asked of the run in a folder.

    Raises:
        FileNotFoundError: if there is no run in the folder.
        FormatError: if the file is not ours.
    """
    if not (path / _RUN).is_file():
        raise FileNotFoundError(explain(f"no run in {str(path)!r}.", want=f"a folder with {_RUN}"))
    try:
        facts = json.loads((path / _RUN).read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(explain(f"{_RUN} in {str(path)!r} is no JSON: {error}.", want="ours")) from error
    if not isinstance(facts, dict) or facts.get("saewb_run") != 1:
        raise FormatError(explain(f"{_RUN} in {str(path)!r} is not a run of saewb's.", want='"saewb_run": 1'))
    return facts

"""The folder of a training run.

    run.json                 the run's `RunSpec`
    history.jsonl            a line per logged step
    end.json                 how it ended; absent while it is running, or if it was interrupted (`kill -9`)
    checkpoint.pt            the state that a resumed run continues from, see `RunFolder.write_checkpoint`
    saes/<name>/             the SAEs of that checkpoint, in the SAELens layout; both are replaced as one
    saes_at/<tokens>/<name>/ those of every checkpoint, with `keep_saes`
    init/<name>/             the trained SAE that training continued from, if there was one

All but the history is written atomically: a full disk or a kill leaves the old files intact. The history is appended
to; an incomplete last line is dropped when it is read, and any other damaged line is an error. Rows that could not be
written follow with the next one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, final

from saewb._files import (
    FolderLock,
    absolute,
    check_replaceable,
    discard,
    finish_replacing,
    fresh_state,
    is_locked,
    is_temporary,
    load_state,
    read_json,
    refuse_damage,
    remove_orphans,
    replace_together,
    temporary_path,
    write_json,
    write_text,
)
from saewb.errors import FormatError, explain
from saewb.pretrained import formats
from saewb.pretrained.load import load_sae
from saewb.training.config import FORMAT, RunSpec
from saewb.training.run_display import DENSITY_COUNTS

_BINARY = getattr(os, "O_BINARY", 0)  # of Windows
SPEC, HISTORY, END, CHECKPOINT = "run.json", "history.jsonl", "end.json", "checkpoint.pt"
_COUNTED = ("step", "n_tokens")
_CHECKPOINT_0_1_0 = "checkpoint.safetensors"


@final
class RunFolder:
    """The folder of one run, locked by one process at a time.

    Args:
        path: of the folder, created if it does not exist.
        writes: False to only read it while another process writes.

    Raises:
        RuntimeError: if a run is going on in it, in this process or another.
        FormatError: if it has links inside, through which a run would write elsewhere.
    """

    def __init__(self, path: str | Path, *, writes: bool = True) -> None:
        self.path, self._writes = absolute(path), writes
        self._lock: FolderLock | None = None
        self._history: int | None = None  # file descriptor: what is written is written, nothing waits for `close`
        self._unwritten: list[bytes] = []
        self._spec: dict[str, Any] | None = None  # of this session, which a checkpoint holds too
        if writes:
            self.path.mkdir(parents=True, exist_ok=True)
            _refuse_links(self.path)
            self._lock = FolderLock(self.path, "a run is going on", fix="run.stop()")
            finish_replacing(self.path / CHECKPOINT)
            for folder in filter(Path.is_dir, (self.path, *(self.path / name for name in ("saes", "saes_at", "init")))):
                remove_orphans(folder)

    @classmethod
    def create(cls, path: str | Path, spec: RunSpec) -> RunFolder:
        """Create the folder of a new run, with its spec and the trained SAEs that it continues from.

        It replaces a run that ended, or was killed, before its first checkpoint: there is nothing to resume.

        Raises:
            FileExistsError: if the folder holds a run with a checkpoint.
            RuntimeError: if a run is going on in it.
        """
        folder = cls(path)
        try:
            folder._begin(spec)
        except BaseException:
            folder.close()
            raise
        return folder

    def _begin(self, spec: RunSpec) -> None:
        """Write the spec and the SAEs that the run continues from, in place of a run without a checkpoint."""
        saes = self.path / "saes"
        has_saes = saes.is_dir() and not all(is_temporary(path.name) for path in saes.iterdir())
        if is_resumable(self.path) or has_saes:
            fix = f"saewb.resume_run({str(self.path)!r}, model=model, tokens=tokens)"
            raise FileExistsError(explain(f"{str(self.path)!r} holds a run already.", want="a new folder", fix=fix))
        for name in (END, HISTORY):
            (self.path / name).unlink(missing_ok=True)
        for name, sae in spec.saes.items():
            if sae.init is not None:
                formats.write(sae.init, self._subfolder("init") / name, overwrite=True)
        self._write_spec(spec)

    def _write_spec(self, spec: RunSpec) -> None:
        self._spec = json.loads(json.dumps(spec.to_dict()))
        write_json(self.path / SPEC, self._spec)

    def read_spec(self) -> RunSpec:
        """Read the spec with the SAEs that it continues from; see the function `read_spec`."""
        spec = read_spec(self.path)
        inits = {name: self.path / "init" / name for name in spec.saes}
        saes = {n: replace(s, init=load_sae(inits[n])) if inits[n].is_dir() else s for n, s in spec.saes.items()}
        return replace(spec, saes=saes)

    def append_row(self, row: Mapping[str, Any]) -> None:
        """Append a row to the history.

        Raises:
            OSError: if the disk is full: the row is appended together with the next one.
        """
        self._unwritten.append(json.dumps(row).encode() + b"\n")
        self._append_unwritten()

    def _append_unwritten(self) -> None:
        if self._history is None:
            self._history = os.open(self.path / HISTORY, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _BINARY, 0o666)
        while self._unwritten:
            n_written = os.write(self._history, self._unwritten[0])
            rest = self._unwritten[0][n_written:]  # of a line that had no room: the rest of it comes first, later on
            self._unwritten[:1] = [rest] if rest else []

    def rewind(self, spec: RunSpec, n_tokens: int) -> list[dict[str, Any]]:
        """Go back to a checkpoint: remove later rows and the end record from the disk.

        Args:
            spec: of the resumed run; its `n_tokens` may differ.
            n_tokens: of the checkpoint.

        Returns:
            The history up to the checkpoint.

        Raises:
            FormatError: if a line of the history is damaged.
        """
        path = self.path / HISTORY
        written = parse_rows(path, path.read_bytes())[0] if path.is_file() else []
        rows = [row for row in written if row["n_tokens"] <= n_tokens]
        if self._writes:
            write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
            self._write_spec(spec)
            (self.path / END).unlink(missing_ok=True)
        return rows

    def write_end(self, end: Mapping[str, Any]) -> None:
        """Write the end record: `state`, `error`, `notes`, `step`, `n_tokens` and `seconds`.

        Raises:
            OSError: if the disk is full, or the folder is gone.
        """
        if not self.path.is_dir():  # else writing would create it anew, with only its end record
            raise FileNotFoundError(_missing_folder(self.path))
        write_json(self.path / END, end)

    def write_checkpoint(
        self, training: Mapping[str, Any], seconds: float, saes: Mapping[str, Any], at_tokens: int | None
    ) -> None:
        """Replace the checkpoint and its SAEs.

        Args:
            training: `Training.state()`: weights, optimizer moments, dead latents, coefficients, normalization, and the
                state of the stream with its shuffle buffer.
            seconds: of training so far.
            saes: by name, as they would be exported now.
            at_tokens: tokens trained on, to save these SAEs under as well; None saves only the newest.

        Raises:
            OSError: if the disk is full, or the folder is gone.
        """
        try:
            if at_tokens is not None:
                kept = self._subfolder("saes_at", f"{at_tokens:012d}")
                for name, sae in saes.items():
                    formats.write(sae, kept / name, overwrite=True)
            self._replace_checkpoint({"training": dict(training), "seconds": seconds, "spec": self._spec}, saes)
        except OSError as error:
            if self.path.is_dir():
                raise
            raise FileNotFoundError(_missing_folder(self.path)) from error

    def read_checkpoint(self) -> dict[str, Any]:
        """Read the last checkpoint: `training`, a state of `Training`, and `seconds`.

        Raises:
            FileNotFoundError: if the run has none.
            FormatError: if saewb 0.1.0 wrote it, or it is of another spec than that in run.json.
        """
        path = self.path / CHECKPOINT
        if path.is_file():
            state = load_state(path)
            seconds = state.get("seconds") if isinstance(state, dict) else None
            if not isinstance(seconds, (int, float)) or not isinstance(state.get("training"), dict):
                what = f"{path} is not the checkpoint of a run."
                raise FormatError(explain(what, want="training and seconds, as saewb writes them"))
            self._check_spec(state.get("spec"))
            return state
        if (self.path / _CHECKPOINT_0_1_0).is_file():
            what = f"the run in {str(self.path)!r} is of saewb 0.1.0, whose checkpoints this version cannot continue."
            sae = next(iter(read_spec(self.path).saes))
            fix = f"saewb.Trainee(..., init=saewb.load_sae({str(self.path / 'saes' / sae)!r}))"
            raise FormatError(explain(what, want="a new run from its SAEs, which load", fix=fix))
        what = f"the run in {str(self.path)!r} ended before its first checkpoint."
        raise FileNotFoundError(explain(what, want="a run with a checkpoint", fix="saewb.train(...), anew"))

    def _check_spec(self, expected: object) -> None:
        """Check that run.json says what the checkpoint does: a changed digit would resume another training."""
        if expected is None:  # of before checkpoints held it
            return
        got, expected = _without_n_tokens(read_json(self.path / SPEC)), _without_n_tokens(expected)
        if names := sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name)):
            what = f"{SPEC} in {str(self.path)!r} is not what it was at the checkpoint: {', '.join(names)} differ."
            fix = "saewb.resume_run(folder, n_tokens=...)    # to train on; the rest stays"
            raise FormatError(explain(what, want="the file as saewb wrote it", fix=fix))

    def close(self) -> None:
        """Release the folder; rows that still cannot be written are left out of the history."""
        try:
            if self._unwritten and self.path.is_dir():
                with suppress(OSError):
                    self._append_unwritten()
        finally:
            history, self._history = self._history, None
            if history is not None:
                os.close(history)
            if self._lock is not None:
                self._lock.release()

    def _replace_checkpoint(self, state: Mapping[str, Any], saes: Mapping[str, Any]) -> None:
        """Replace the checkpoint and its SAEs, all or none."""
        folder, anchor = self._subfolder("saes"), self.path / CHECKPOINT
        fresh = {folder / name: temporary_path(folder / name) for name in saes}
        try:
            for (path, new), sae in zip(fresh.items(), saes.values(), strict=True):
                check_replaceable(path, formats.files_of(sae), overwrite=True)
                formats.write(sae, new)
            with fresh_state(anchor, state) as checkpoint:
                replace_together(anchor, {anchor: checkpoint, **fresh})
        finally:
            discard(anchor, fresh.values())

    def _subfolder(self, *names: str) -> Path:
        """A folder inside, created if needed; never the run's folder itself, which may have been deleted."""
        folder = self.path
        for name in names:
            folder = folder / name
            folder.mkdir(exist_ok=True)
        return folder


def _without_n_tokens(spec: Any) -> dict[str, Any]:
    """A spec as written, without what a resumed run may change before its first checkpoint."""
    with refuse_damage("a run's spec", "as saewb writes it"):
        return {**spec, "train": {name: value for name, value in spec["train"].items() if name != "n_tokens"}}


def _refuse_links(path: Path) -> None:
    """Raise for a symbolic link in a run's folder: the folder may come from somebody else, and a run writes there."""
    folders = [path]
    while folders:
        for entry in folders.pop().iterdir():
            if entry.is_symlink():
                what = f"{entry} is a symbolic link; a run writes into its own folder only."
                fix = f"unlink {str(entry)!r}    # in a shell"
                raise FormatError(explain(what, want="files and folders", fix=fix))
            if entry.is_dir():
                folders.append(entry)


def _missing_folder(path: Path) -> str:
    want = "the folder back in its place; or the SAEs, which are in run.saes, kept elsewhere"
    fix = "saewb.save_sae(run.sae, 'saes/a')"
    return explain(f"the run's folder {str(path)!r} is not there any more.", want=want, fix=fix)


def parse_rows(history: Path, content: bytes, n_before: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Parse the rows of a history that were read after `n_before` others, and count their bytes.

    A last line without its end was cut off by a kill, or is still being written: it is no row yet.

    Raises:
        FormatError: if another line is damaged.
    """
    content, rows = content[: content.rfind(b"\n") + 1], []
    for number, line in enumerate(content.splitlines(), n_before + 1):
        try:
            row = json.loads(line)
            problem = "" if is_row(row) else "has no step and number of tokens"
        except (ValueError, RecursionError):
            problem = "is no JSON"
        if problem:
            fix = f"sed -i {number}d {str(history)!r}    # in a shell: goes on without it"
            raise FormatError(explain(f"line {number} of {history} {problem}.", want="a row of a history", fix=fix))
        rows.append(row)
    return rows, len(content)


def is_row(row: object) -> bool:
    """Whether a value is a row of a history: its step, and numbers, or lists of numbers for densities."""
    if not isinstance(row, dict) or any(type(row.get(name)) is not int or row[name] < 0 for name in _COUNTED):
        return False
    densities = [value for name, value in row.items() if name.endswith(DENSITY_COUNTS)]
    numbers = [value for name, value in row.items() if not name.endswith(DENSITY_COUNTS)]
    if not all(isinstance(counts, list) for counts in densities):
        return False
    return all(map(_is_number, (*numbers, *(n for counts in densities for n in counts))))


def _is_number(value: object) -> bool:
    return value is None or isinstance(value, float) or (type(value) in (bool, int) and abs(value) < 2**63)


def is_resumable(folder: Path) -> bool:
    """Whether a run's folder has a checkpoint, of this version or of 0.1.0."""
    return any((folder / name).is_file() for name in (CHECKPOINT, _CHECKPOINT_0_1_0))


def read_end(folder: Path) -> dict[str, Any]:
    """Read how the run in a folder ended: its state, error and last notes.

    Without an end.json the state is "running" if a process holds the lock, "interrupted" if none does, as after
    `kill -9`, and "unfinished" where that is unknown.

    Raises:
        FormatError: if the file cannot be read.
    """
    path, locked = folder / END, is_locked(folder)
    if not path.is_file():  # it is written before the lock is released
        state = "unfinished" if locked is None else "running" if locked else "interrupted"
        return {"state": state, "error": "", "notes": []}
    end = read_json(path)
    with refuse_damage(f"{END} in {str(folder)!r}", "state, error and notes, as saewb writes them"):
        return {"state": str(end["state"]), "error": str(end["error"]), "notes": list(map(str, end["notes"]))}


def read_spec(path: Path) -> RunSpec:
    """Read the spec of the run in a folder.

    Raises:
        FileNotFoundError: if there is no run in the folder.
        FormatError: if the file is damaged, or not from saewb.
    """
    if not (path / SPEC).is_file():
        raise FileNotFoundError(explain(f"no run in {str(path)!r}.", want=f"a folder with {SPEC}"))
    content = read_json(path / SPEC)
    if not isinstance(content, dict) or content.get("saewb_run") not in (1, FORMAT):
        raise FormatError(explain(f"{SPEC} in {str(path)!r} is not a run of saewb's.", want=f'"saewb_run": {FORMAT}'))
    try:
        return RunSpec.from_dict(content)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise FormatError(f"{SPEC} in {str(path)!r}: {error}") from error

"""SAEs put on the hub, with a card that says what they are."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saewb.errors import explain
from saewb.pretrained.load import save_sae
from saewb.pretrained.model_card import model_card
from saewb.pretrained.resolve import REPO, inside
from saewb.sae.matching_pursuit import PursuitSAE
from saewb.sae.sae import SAE
from saewb.sae.temporal import TemporalSAE

AnySAE = SAE | PursuitSAE | TemporalSAE


def push_to_hub(
    sae: AnySAE | Mapping[str, AnySAE],
    repo_id: str,
    id: str | None = None,
    *,
    figures: Mapping[str, Mapping[str, Any]] | None = None,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Put SAEs into a repository of the hub, in one commit; `load_sae(repo_id, id)` reads them back, sae-lens too.

    The repository is made if it is not there. It gets a model card, unless it has one already: what the SAEs are, how
    they were trained as far as their metadata says, figures, and the lines that load them. A card that is there stays.

    Args:
        sae: one, or several by the folder each goes to.
        repo_id: "owner/name".
        id: the folder of a single one; None means its hook's name.
        figures: for the card: for each folder, numbers by name, e.g. {"blocks.8.hook_resid_pre": {"l0": 60.2}}.
        private: for a repository that is made now.
        revision: an existing branch; None means "main".
        token: of the hub; None means the one logged in with.
        commit_message: None means one that names the SAEs.

    Returns:
        The commit's address.

    Raises:
        ValueError: if `repo_id` or an id is no such name, if there is neither an id nor a hook, if the layout cannot
            express one of them (nothing is then pushed), or if `figures` names another folder.
        huggingface_hub.errors.HfHubHTTPError: if the hub refuses.
    """
    if not REPO.fullmatch(repo_id):
        raise ValueError(explain(f"push_to_hub got repo_id={repo_id!r}.", want="'owner/name'"))
    saes = _by_folder(sae, id)
    stray = sorted(set(figures or {}) - set(saes))
    if stray:
        raise ValueError(explain(f"push_to_hub got figures for {stray}.", want=f"folders of this push: {list(saes)}"))
    with tempfile.TemporaryDirectory() as place:
        for folder, one in saes.items():
            save_sae(one, Path(place) / folder)
        return _pushed(place, saes, repo_id, figures or {}, private, revision, token, commit_message)


def _by_folder(sae: AnySAE | Mapping[str, AnySAE], id: str | None) -> dict[str, AnySAE]:
    if not isinstance(sae, Mapping):
        return {inside(id or sae.cfg.hook or ""): sae}
    if id is not None or not sae:
        raise ValueError(
            explain(f"push_to_hub got {len(sae)} SAEs by folder and id={id!r}.", want="at least one, and no id besides")
        )
    return {inside(folder): one for folder, one in sae.items()}


def _pushed(
    place: str,
    saes: Mapping[str, AnySAE],
    repo_id: str,
    figures: Mapping[str, Mapping[str, Any]],
    private: bool,
    revision: str | None,
    token: str | None,
    commit_message: str | None,
) -> str:
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    if not api.file_exists(repo_id, "README.md", revision=revision):
        (Path(place) / "README.md").write_text(model_card(saes, repo_id, figures), encoding="utf-8")
    first = next(iter(saes))
    message = f"{first}: {saes[first]!r}" if len(saes) == 1 else f"{len(saes)} SAEs: {', '.join(saes)}"[:200]
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=place, revision=revision, commit_message=commit_message or message
    )
    return commit.commit_url

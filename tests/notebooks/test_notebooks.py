"""Committed notebooks: run from top to bottom, with outputs, without anything of the machine they were run on."""

import json
import re
from pathlib import Path

import pytest
import saewb_widgets

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PANELS = {  # where each is shown first
    "FeatureBrowser": "06_browse_features",
    "SteeringPanel": "07_steer_and_attribute",
    "ContrastPanel": "10_which_latents_are_about",
    "GraphPanel": "12_trace_a_circuit",
    "SuperpositionPanel": "04_superposition_and_correlation",
    "CorrelationPanel": "04_superposition_and_correlation",
    "TrainingPanel": "03_train_an_sae",
    "CataloguePicker": "02_finding_and_loading_saes",
    "PromptExplorer": "01_load_and_attach",
}


def test_there_are_some():
    assert NOTEBOOKS


@pytest.mark.parametrize("panel", saewb_widgets.__all__)
def test_every_panel_is_shown_where_its_subject_is(panel):
    """As it stood when the notebook was run: what is read where no kernel runs."""
    cells = json.loads((FOLDER / f"{PANELS[panel]}.ipynb").read_text(encoding="utf-8"))["cells"]
    shown = [output for cell in cells if f"{panel}(" in "".join(cell["source"]) for output in cell.get("outputs", ())]
    stills = ["".join(output.get("data", {}).get("text/html", "")) for output in shown]
    assert any("system-ui" in still and len(still) > 1_000 for still in stills)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_was_run_from_top_to_bottom(self, path):
        """nbval passes a notebook with cleared outputs in silence."""
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
        assert any(cell["outputs"] for cell in cells)

    def test_has_a_title_a_badge_and_an_install_cell_for_colab(self, path):
        cells = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]]
        assert cells[0].startswith("# ")
        assert f"notebooks/{path.name})" in cells[0]
        assert '"google.colab" in sys.modules' in cells[1]
        has_panels = any("from saewb_widgets import" in cell for cell in cells)
        assert ("enable_custom_widget_manager()" in cells[1]) == has_panels

    def test_says_where_to_go_next_and_how_to_run_it_on_another_model(self, path):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        assert re.search("## (Next|When you miss something)", text)
        loads = any("load_model(" in "".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        assert loads == bool(re.search('load_model\\("gpt2"\\)|To run it on GPT-2', text))

    def test_keeps_no_times(self, path):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert not any("execution" in cell["metadata"] for cell in cells)

    def test_names_no_machine(self, path):
        text = path.read_text()
        assert not re.search(r"(?<![\w.:/])/(home|root|work|tmp|opt|Users|usr)/", text)
        assert "widget-view+json" not in text

    def test_shows_its_figures_and_panels_where_no_kernel_runs(self, path):
        cells = json.loads(path.read_text())["cells"]
        shown = [output["data"] for cell in cells for output in cell.get("outputs", ()) if "data" in output]
        for data in shown:
            assert "image/png" in data or "application/vnd.plotly.v1+json" not in data
            assert "text/html" in data or not re.match(rf"({'|'.join(PANELS)})\(", "".join(data.get("text/plain", "")))

"""Run notebooks anew and keep what they show, for readers without a kernel.

From the folder tests: `python -m notebooks.run_notebooks [FILE ...]`.

1. A fresh kernel runs each from top to bottom; a cell that fails leaves the file as it was.
2. What belongs to this one run is taken out: widgets' states, times, ids.
3. Beside each plotly figure goes a picture of it (Chromium draws it), since few viewers draw plotly's own.
"""

from __future__ import annotations

import base64
import re
import sys
from pathlib import Path

from helpers import chromium

FOLDER = Path(__file__).parents[2] / "notebooks"
PLOTLY, WIDGET = "application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json"
WIDTH, HEIGHT = 700, 450  # of a figure that does not say

_DRAW = """([figure, width, height]) => Plotly.toImage(
  { data: figure.data, layout: { ...figure.layout, paper_bgcolor: "white", plot_bgcolor: "white" } },
  { format: "png", width: figure.layout.width || width, height: figure.layout.height || height, scale: 1.5 })"""


def run(path: Path, draw) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.nbformat_minor = 4  # without ids, which change each time
    for cell in notebook.cells:
        cell.pop("id", None)
        if cell.cell_type == "code":
            cell.metadata.pop("execution", None)
            cell.outputs = [pictured(output, draw) for output in joined(cell.outputs) if not is_live(output)]
    nbformat.write(notebook, path)


def joined(outputs):
    """Pieces of one stream that come one after another, as one."""
    items = []
    for output in outputs:
        if items and output.output_type == "stream" == items[-1].output_type and output.name == items[-1].name:
            items[-1].text += output.text
        else:
            items.append(output)
    return items


def is_live(output):
    """A panel itself, whose still comes next."""
    return WIDGET in output.get("data", {}) and "text/html" not in output["data"]


def pictured(output, draw):
    """Without a widget's number, which means nothing later; with a picture if it is a plotly figure."""
    data = output.get("data", {})
    data.pop(WIDGET, None)
    if "saewb-still-" in (text := "".join(data.get("text/html", ""))):
        data["text/html"] = re.sub(r"<style>.*?</style>| class='saewb-still-\w+'", "", text)
    if PLOTLY in data:
        data["image/png"] = draw(data[PLOTLY])
        layout = data[PLOTLY]["layout"]
        output.metadata["image/png"] = {"width": layout.get("width", WIDTH), "height": layout.get("height", HEIGHT)}
    return output


def main(paths: list[str]) -> None:
    import plotly

    script = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    with chromium.launched() as browser:
        page = browser.new_page()
        page.add_script_tag(path=script)

        def draw(figure):
            picture = page.evaluate(_DRAW, [figure, WIDTH, HEIGHT]).partition(",")[2]
            return base64.encodebytes(base64.b64decode(picture)).decode()

        for path in map(Path, paths or sorted(map(str, FOLDER.glob("*.ipynb")))):
            run(path, draw)
            print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])

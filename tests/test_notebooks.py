"""The notebooks of ``examples/``, run from top to bottom, with fewer steps than they show."""

import pytest


nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytestmark = pytest.mark.slow


def run(path, parameters, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(path.parent.parent))
    book = nbformat.read(path, as_version=4)
    for cell in book.cells:
        if "parameters" in cell.metadata.get("tags", []):
            for name, value in parameters.items():
                assert f"{name} = " in cell.source
                cell.source += f"\n{name} = {value}"
    nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.text for output in outputs if output.get("name") == "stdout")
    shown = [output.get("data", {}) for output in outputs]
    players = sum("data:audio/wav;base64," in one.get("text/html", "") for one in shown)
    return text, sum("image/png" in one for one in shown), players


def test_draw(root, monkeypatch):
    text, pictures, players = run(root / "examples" / "draw.ipynb", {}, monkeypatch)
    tasks, (captions, names, found, heard) = text.splitlines()[0], text.splitlines()[-4:]
    assert tasks.startswith("task") and "snowman" in captions
    assert names == "['red apple', 'sailboat', 'snowman', 'red apple']"
    assert found.startswith("['sailboat'") and pictures == 3
    assert heard == "['red apple']" and players == 1


def test_train(root, monkeypatch):
    parameters = {"max_train_steps": 2, "train_batch_size": 4}
    text, pictures, _ = run(root / "examples" / "train.ipynb", parameters, monkeypatch)
    assert text.startswith("40 ") and pictures == 1


def test_notebooks_are_kept_without_outputs(root):
    for path in sorted((root / "examples").glob("*.ipynb")):
        book = nbformat.read(path, as_version=4)
        nbformat.validate(book)
        code = [cell for cell in book.cells if cell.cell_type == "code"]
        assert code and all(not cell.outputs and cell.execution_count is None for cell in code)

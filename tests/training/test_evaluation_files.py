"""Figures that are in files as soon as they are measured, whatever ends the run."""

import json

import pytest

from diffusers_vqdit.training.evaluation_files import UNFINISHED_FILE, measure_tasks


MEASURED = {
    "text->image": {"right": {"value": 0.5, "standard_error": float("nan"), "count": 1}},
    "sizes": {},
    "likelihood": {"bits": {"value": 1.25, "standard_error": 0.1, "count": 9, "unit": "bits"}},
    "retrieval": {"first": {"value": 1.0, "standard_error": 0.0, "count": 3}},
}


@pytest.mark.parametrize("killed", range(len(MEASURED)))
@pytest.mark.parametrize("same", [True, False])
def test_what_is_measured_is_there_and_is_taken_by_the_same_run(tmp_path, killed, same, caplog):
    names, called = list(MEASURED), []

    def measures(until):
        def measure(name):
            if name == until:
                raise KeyboardInterrupt
            called.append(name)
            return MEASURED[name]

        return {name: lambda name=name: measure(name) for name in names}

    whole = measure_tasks(tmp_path, "whole", measures(None))
    text, table = ((tmp_path / f"evaluation.{end}").read_text(encoding="utf-8") for end in ("json", "md"))
    (tmp_path / UNFINISHED_FILE).unlink()
    (tmp_path / "evaluation.json").unlink()
    called.clear()
    with pytest.raises(KeyboardInterrupt):
        measure_tasks(tmp_path, "one", measures(names[killed]))
    there = [name for name in names[:killed] if MEASURED[name]]
    if killed:
        assert list(json.loads((tmp_path / "evaluation.json").read_text())) == there
        assert (tmp_path / "evaluation.md").read_text(encoding="utf-8").count("\n| ") == len(there) + (not there)
    else:
        assert not (tmp_path / "evaluation.json").exists()
    called.clear()
    again = measure_tasks(tmp_path, "one" if same else "another", measures(None))
    assert called == (names[killed:] if same else names)
    assert str(again) == str(whole) and list(again) == [name for name in names if MEASURED[name]]
    assert (tmp_path / "evaluation.json").read_text() == text
    assert (tmp_path / "evaluation.md").read_text(encoding="utf-8") == table
    assert ("measured by a run that was killed" in caplog.text) == (same and killed > 0)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"identity": "one"}', '{"figures": {"text->image": {}}}'])
def test_a_file_that_is_none_is_not_taken(tmp_path, content):
    (tmp_path / UNFINISHED_FILE).write_text(content)
    assert measure_tasks(tmp_path, "one", {name: (lambda name=name: MEASURED[name]) for name in MEASURED})
    assert json.loads((tmp_path / UNFINISHED_FILE).read_text())["figures"].keys() == MEASURED.keys()

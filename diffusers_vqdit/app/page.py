"""The whole page of a pipeline."""

from pathlib import Path
from typing import Any

import gradio as gr

from ..pipelines.pipeline_vqdit import VQDiTPipeline
from ..pipelines.segment_base import TEXT
from .abilities import TABS, CodesModel, LatentModel, by_tab, chosen_among_texts, repaintable, searches
from .comparing import find_tab, label_tab
from .examples import Examples
from .running import MAX_FILE_SIZE
from .tabs import redraw_tab, task_tab


ORDER = ["Draw", "Repaint", "Repair", "Enlarge", "Edit", "Caption", "Label", "Pairs", "Texts", "Find", "Sound"]
MAX_WAITING = 32  # people
KEPT = 3600  # seconds that files are kept

# No fonts of other hosts.
THEME = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], primary_hue="indigo")
# A picture of few pixels is shown as large as its place is.
CSS = ".fitted img { width: 100%; height: 100%; object-fit: contain; }"


def make_page(pipeline: Any, name: str) -> gr.Blocks:
    """The page of a pipeline, with a tab for each thing that it can do.

    Args:
        pipeline: a [`VQDiTPipeline`] or a [`VQDiTLatentPipeline`].
        name: the folder or Hub id that it was loaded from.

    Raises:
        ValueError: if none of its tasks is of texts, pictures, labels or sounds.
    """
    model = (CodesModel if isinstance(pipeline, VQDiTPipeline) else LatentModel)(pipeline)
    tabs: dict[str, Any] = by_tab(model.abilities)
    redrawn = repaintable(model.abilities)
    tabs |= {"Repaint": redrawn, "Repair": redrawn} if redrawn else {}
    among_texts, pairs = ([], [])
    if isinstance(model, CodesModel):
        among_texts, pairs = chosen_among_texts(model.abilities), searches(model.abilities)
    tabs |= {"Label": tabs.get("Label", [])} if among_texts else {}
    tabs |= {"Find": pairs} if pairs else {}
    if not tabs:
        raise ValueError(f"pretrained_model_name_or_path={name!r} knows no task of texts, pictures, labels or sounds")
    pipeline.set_progress_bar_config(disable=True)
    examples, model_id = Examples.load(name, pipeline_text(model)), Path(name).name
    with gr.Blocks(title=model_id, analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        gr.Markdown(
            f"# {model_id}\nWhat comes out is made by a model, and may be wrong. Files that you download say that "
            "they are generated, in their metadata."
        )
        with gr.Tabs():
            for title in (title for title in ORDER if title in tabs):
                with gr.Tab(title):
                    if title == "Find":
                        find_tab(model, pairs, examples)
                    elif title == "Label":
                        label_tab(model, tabs[title], among_texts, examples)
                    else:
                        tab = task_tab if title in TABS else redraw_tab
                        tab(model, model_id, title, tabs[title], examples)
    return page.queue(max_size=MAX_WAITING)


def pipeline_text(model: Any) -> str:
    """The segment that a prompt is of."""
    prompt = model.pipeline._prompt_segment() if isinstance(model, CodesModel) else TEXT
    return prompt or TEXT


def launch(page: gr.Blocks, **options: Any) -> Any:
    """Serve a page; `options` are gradio's."""
    return page.launch(
        theme=THEME, css=CSS, max_file_size=MAX_FILE_SIZE, ssr_mode=False, footer_links=["api"], **options
    )

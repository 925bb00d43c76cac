"""The page: its fields, its parts, and which handler answers which button."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flowturbo_jax.demo import answers, limits, markup
from flowturbo_jax.demo.handlers import Picture, Studio
from flowturbo_jax.interfaces import InputError

if TYPE_CHECKING:
    import gradio as gr

HERE = Path(__file__).parent
QUEUE = 32  # requests that wait; who comes later is told so
KEPT_SECONDS = 3600  # a visitor's picture


class Plot(NamedTuple):
    """A plot of the page.

    Attributes:
      title: above it.
      path: of the PNG.
    """

    title: str
    path: Path


def build(studio: Studio, plots: Sequence[Plot] = ()) -> "gr.Blocks":
    """The page of a model, not yet served.

    Args:
      studio: does the work.
      plots: shown as they are.

    Raises:
      InputError: a plot cannot be read.
    """
    import gradio as gr

    title = f"FlowTurbo: {studio.name}"
    with gr.Blocks(analytics_enabled=False, title=title, fill_width=True) as page:
        height, width, _ = studio.description.image_shape
        gr.HTML(
            f"<h1>{markup.escape(title)}</h1><p>{width} x {height} pixels. Heun and FlowTurbo "
            "start from the same noise; times are measured on this machine, after compiling.</p>",
            elem_id="heading",
        )
        with gr.Row(elem_id="parts"):
            with gr.Column(scale=1, min_width=260, elem_id="fields"):
                fields = _fields(studio)
            with gr.Column(scale=3, min_width=300), gr.Tabs():
                with gr.Tab("Generate", id="generate"):
                    _generate(studio, fields)
                with gr.Tab("Edit", id="edit"):
                    _edit(studio, fields)
                with gr.Tab("Inpaint", id="inpaint"):
                    _inpaint(studio, fields)
                if plots:
                    with gr.Tab("Plots", id="plots"):
                        for plot in plots:
                            gr.HTML(markup.plot(plot.path, plot.title))
    return page.queue(max_size=QUEUE, default_concurrency_limit=1, api_open=False)


def look() -> dict[str, Any]:
    """Theme, style and script, with the fonts that the visitor has."""
    import gradio as gr

    theme = gr.themes.Base(
        primary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        block_label_text_color="*neutral_700",
    )
    return {
        "theme": theme,
        "css": (HERE / "page.css").read_text(),
        "js": (HERE / "page.js").read_text(),
    }


def _fields(studio: Studio) -> list[Any]:
    """What all parts share: class, schedule, guidance, seed, number of images."""
    import gradio as gr

    description = studio.description
    names = description.class_names
    classes = [(f"{i}: {name}" if name != str(i) else name, i) for i, name in enumerate(names)]
    schedules = limits.schedules(description)
    can_guide = description.predictor.null_label is not None
    counts = [count for count in (1, 2, 4, 8, 16) if count <= studio.most_images]
    chosen_class = gr.Dropdown(
        classes or [("none", 0)],
        value=len(classes) // 3,
        label="Class",
        allow_custom_value=True,
        visible=len(classes) > 1,
        elem_id="class",
    )
    schedule = gr.Dropdown(
        schedules,
        value=schedules[0][1],
        label="Schedule",
        info="From the list, or typed, such as H1P3R2.",
        allow_custom_value=True,
        elem_id="schedule",
    )
    with gr.Row():
        guidance = gr.Number(
            description.guidance_scale if can_guide else None,
            label="Guidance",
            step=0.5,
            min_width=100,
            visible=can_guide,
            elem_id="guidance",
        )
        seed = gr.Number(0, label="Seed", step=1, min_width=100, elem_id="seed")
    count = gr.Radio(counts, value=min(4, counts[-1]), label="Images", elem_id="count")
    return [chosen_class, schedule, guidance, seed, count]


def _generate(studio: Studio, fields: list[Any]) -> None:
    import gradio as gr

    button = gr.Button("Generate", variant="primary", elem_id="generate")
    status = gr.HTML(markup.line("The first use of a schedule compiles it, once."))
    shown = gr.HTML(elem_id="generated", min_height=120)
    _on(button.click, partial(answers.generate, studio), fields, [status, shown])


def _edit(studio: Studio, fields: list[Any]) -> None:
    import gradio as gr

    take, upload, kept = _source()
    strength = gr.Slider(
        0,
        1,
        0.6,
        label="Strength",
        info="0 keeps the picture, 1 makes a new one.",
        elem_id="strength",
    )
    button = gr.Button("Edit", variant="primary", elem_id="edit")
    status = gr.HTML(markup.line("Take a picture, choose another class, and edit."))
    with gr.Row():
        source = gr.HTML(elem_id="edit-source", min_height=120, min_width=130)
        shown = gr.HTML(elem_id="edited", min_height=120, min_width=130)

    def show(picture: Picture) -> str:
        return markup.figure(picture, "Picture", "as the model sees it", "The picture to edit")

    _on(take.click, partial(answers.take, studio, show), fields, [status, source, kept])
    _on(upload.upload, partial(answers.upload, studio, show), [upload], [status, source, kept])
    given = [kept, strength, *fields]
    _on(button.click, partial(answers.edit, studio), given, [status, shown])


def _inpaint(studio: Studio, fields: list[Any]) -> None:
    import gradio as gr

    take, upload, kept = _source()
    painter = gr.HTML(
        None,
        html_template=(HERE / "painter.html").read_text(),
        js_on_load=(HERE / "painter.js").read_text(),
        elem_id="painter",
    )
    button = gr.Button("Inpaint", variant="primary", elem_id="inpaint")
    status = gr.HTML(markup.line("Take a picture, and paint over what is to be made anew."))
    shown = gr.HTML(elem_id="inpainted", min_height=120)

    def show(picture: Picture) -> dict[str, str]:
        return {"picture": markup.png(picture)}

    _on(take.click, partial(answers.take, studio, show), fields, [status, painter, kept])
    _on(upload.upload, partial(answers.upload, studio, show), [upload], [status, painter, kept])
    given = [kept, painter, *fields]
    _on(button.click, partial(answers.inpaint, studio), given, [status, shown])


def _source() -> tuple[Any, Any, Any]:
    """Two buttons that choose a picture, and where a visitor's is kept."""
    import gradio as gr

    with gr.Row():
        take = gr.Button("Generate one", size="sm", min_width=120)
        upload = gr.UploadButton("Upload one", size="sm", file_types=["image"], min_width=120)
    return take, upload, gr.State(None, time_to_live=KEPT_SECONDS)


def _on(
    event: Any, work: Callable[..., tuple[Any, ...]], given: list[Any], shown: list[Any]
) -> None:
    """Connects an event: one at a time on the device, and not offered as an interface.

    Args:
      event: such as `button.click`.
      work: takes `say` and the values of `given`; returns a line, then values to show.
      given: fields of the page.
      shown: where the line goes, then the others; the second shows what is being done.
    """
    import gradio as gr

    progress = gr.Progress()

    def answer(progress: Any = progress, *values: Any) -> tuple[Any, ...]:
        try:
            text, *rest = work(lambda text, done: progress(done, desc=text), *values)
        except InputError as error:  # beside the button, and what was shown stays
            return (markup.line(str(error), problem=True), *[gr.skip()] * (len(shown) - 1))
        return (markup.line(text), *rest)

    event(
        answer,
        given,
        shown,
        show_progress_on=shown[1],
        concurrency_id="device",
        concurrency_limit=1,
        api_visibility="private",
    )

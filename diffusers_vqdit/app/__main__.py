"""The page, ``python -m diffusers_vqdit.app``: try a pipeline in a browser, or push the page to a Space of the Hub.

    pip install -c constraints.txt -e ".[app]"
    python -m diffusers_vqdit.app
    python -m diffusers_vqdit.app --pretrained_model_name_or_path you/model --push_to_space you/space

It shows the tasks that the pipeline knows, and needs about as long to start as the pipeline to load.
"""

import argparse
from importlib.util import find_spec
from typing import Any

import torch

from ..pipelines.pipeline_vqdit import VQDiTPipeline
from ..pipelines.pipeline_vqdit_latent import VQDiTLatentPipeline
from ..utils.arguments import argument_parser, hub_token, model_name, repository
from ..utils.checks import shown
from ..utils.starter import STARTER, check_starter
from ..utils.told_errors import told_errors


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(
        prog="python -m diffusers_vqdit.app", description="A page to try a pipeline in a browser."
    )
    parser.add_argument(
        "--pretrained_model_name_or_path",
        type=model_name,
        default=str(STARTER),
        help="Pipeline: a folder or a Hub id.",
    )
    parser.add_argument(
        "--push_to_space",
        type=repository,
        help="Space of the Hub to push the page to, with the pipeline if that is a folder, in place of showing it.",
    )
    parser.add_argument("--hub_token", type=hub_token)
    return parser.parse_args(input_args)


def load_pipeline(name: str) -> Any:
    """A pipeline of ours, of the class that its model_index.json says.

    Raises:
        ValueError: if it is none, or can't be loaded.
    """
    kinds = {kind.__name__: kind for kind in (VQDiTPipeline, VQDiTLatentPipeline)}
    problem = f"pretrained_model_name_or_path={shown(name)} must be a folder or Hub id of a {' or '.join(kinds)}"
    try:
        config = VQDiTPipeline.load_config(name)
        kind = kinds.get(config["_class_name"])
        pipeline = kind and kind.from_pretrained(name).to("cuda" if torch.cuda.is_available() else "cpu")
    except Exception as error:  # of diffusers, the Hub, the connection, or the files
        raise ValueError(f"{problem}: {error}") from error
    if pipeline is None:
        raise ValueError(f"{problem}, and is a {config['_class_name']}")
    return pipeline


def main(args: argparse.Namespace) -> None:
    if find_spec("gradio") is None:
        raise ImportError('the page needs gradio: pip install "diffusers_vqdit[app]"')
    name = args.pretrained_model_name_or_path
    check_starter(name)
    from .page import launch, make_page  # which need gradio
    from .space import push_space

    pipeline = load_pipeline(name)
    page = make_page(pipeline, name)
    if args.push_to_space is None:
        launch(page)
    else:
        print(push_space(pipeline, name, args.push_to_space, args.hub_token).commit_url)


if __name__ == "__main__":
    with told_errors():
        main(parse_args())

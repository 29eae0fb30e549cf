"""What docs and cards show: their blocks of code, and the commands of our scripts in them; and small stand-ins for the
models that they are about."""

import re
import shlex

from diffusers_vqdit import MaskedDiffusionScheduler, VQDiTPipeline, VQDiTTransformer2DModel


SCRIPT = re.compile(r"(training|benchmarks|examples)[/.](\w+?)(\.py)?")
MODULES = {
    "benchmarks": "benchmarks.__main__",
    "diffusers_vqdit": "diffusers_vqdit.__main__",
    "diffusers_vqdit.app": "diffusers_vqdit.app.__main__",
    "diffusers_vqdit.interop.convert": "diffusers_vqdit.interop.convert",
}
# Flags by which evaluate.py is another script.
EVALUATIONS = {"--tokenizer": "training.evaluate_tokenizer", "--audio_column": "training.evaluate_speech"}


def lines(text):
    """The commands of a page's bash blocks, one after the other."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    for line in re.sub(r'python -c "[^"]*"', "", blocks).splitlines():
        yield from (part.strip() for part in line.split("&&") if part.strip() and not part.startswith("#"))


def script_command(line):
    """The module of a command of ours and its arguments; None of any other command."""
    words = shlex.split(line, comments=True)
    for place, word in enumerate(words):
        found = SCRIPT.fullmatch(word)
        if found or (word in MODULES and words[place - 1] == "-m"):
            name, arguments = f"{found[1]}.{found[2]}" if found else MODULES[word], words[place + 1 :]
            if name == "training.evaluate":
                name = next((other for flag, other in EVALUATIONS.items() if flag in arguments), name)
            return name, arguments
    return None


def commands(text):
    """(module, arguments) of each command of ours in a page's bash blocks, and of those within its lines."""
    inline = re.findall(r"`((?:python|accelerate launch|torchrun) [^`]+)`", text)
    shown = [part for line in inline for part in line.replace("\n", " ").split("&&")]
    for line in (*lines(text), *shown):
        if "..." not in line and (command := script_command(line)):
            yield command


def small_pipeline(codes, tasks, **parts):
    """A pipeline of a small transformer on these segments."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1}
    transformer = VQDiTTransformer2DModel(**sizes, segments=codes, tasks=tasks)
    pipe = VQDiTPipeline(transformer.eval(), MaskedDiffusionScheduler(), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe

"""Learned parameters on disk, per block: a run can be evaluated again, or gone on with, without learning it anew."""

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lrquant.errors import UsageError
from lrquant.recipe import Recipe
from lrquant.reconstruction.learnables import Learnables


def save_learned(path: Path, learned: Sequence[Learnables], recipe: Recipe) -> None:
    """One safetensors file; tensors are called `block:learnable`, and the recipe is in its metadata."""
    tensors = {
        f"{index}:{name}": tensor.contiguous() for index, block in enumerate(learned) for name, tensor in block.items()
    }
    temporary = path.with_name(f".{path.name}.part")
    save_file(tensors, temporary, {"format": "pt", "blocks": str(len(learned)), "recipe": recipe.to_yaml()})
    temporary.replace(path)


def load_learned(path: Path) -> list[Learnables]:
    """Parameters written by `save_learned`, one mapping per block.

    Raises:
        UsageError: no such file, or not one of these.
    """
    try:
        with safe_open(path, framework="pt") as file:
            blocks: list[Learnables] = [{} for _ in range(int(file.metadata()["blocks"]))]
            for key in file.keys():  # noqa: SIM118
                index, _, name = key.partition(":")
                blocks[int(index)][name] = file.get_tensor(key)
        return blocks
    except (OSError, SafetensorError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UsageError(f"{path}: not a file of learned parameters ({str(error).splitlines()[0]})") from None

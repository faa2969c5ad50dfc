"""Files of learned parameters, per block: a run can be evaluated again, or continued, without learning again."""

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lrquant.errors import LrquantError, UsageError
from lrquant.recipe import Recipe
from lrquant.reconstruction.learnables import Learnables
from lrquant.runtime.paths import reason, write_file


def save_learned(path: Path, learned: Sequence[Learnables], recipe: Recipe) -> None:
    """One safetensors file; tensors are called `block:learnable`, and the recipe is in its metadata."""
    tensors = {
        f"{index}:{name}": tensor.contiguous() for index, block in enumerate(learned) for name, tensor in block.items()
    }
    try:
        write_file(path, save(tensors, {"format": "pt", "blocks": str(len(learned)), "recipe": recipe.to_yaml()}))
    except OSError as error:
        raise LrquantError(f"{path}: cannot be written ({reason(error)})") from None


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

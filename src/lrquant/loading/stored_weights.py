"""A checkpoint's parameters as stored: quantized weights as integers with scales and zero points.

Nothing is dequantized, and only one tensor is in memory at a time. The configuration's groups define the format of each
linear; a target that names the linear takes precedence over the class `Linear`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.utils.match import match_name
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lrquant.errors import LrquantError, UsageError
from lrquant.formats import format_of
from lrquant.formats.fake_quant import QuantizedWeight
from lrquant.loading.validation import check_folder, weight_files

SCALE = ".weight_scale"


class StoredWeights:
    """The parameters of the checkpoint in `folder`, by the names that its model calls them."""

    def __init__(self, folder: Path) -> None:
        """Read only headers.

        Raises:
            UsageError: there is no checkpoint in `folder`.
            LrquantError: a file of it is damaged.
        """
        if not (folder / "config.json").is_file():
            what = "this folder has no config.json, so it is not a model" if folder.is_dir() else "no such folder"
            raise UsageError(f"{folder}: {what}")
        check_folder(folder)
        self.folder = folder
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.quantization: dict[str, Any] = self.config.get("quantization_config") or {}
        self._files: dict[str, Path] = {}
        for file in weight_files(folder):
            with safe_open(file, framework="pt") as content:
                self._files |= dict.fromkeys(content.keys(), file)
        self.quantized = {name.removesuffix(SCALE) for name in self._files if name.endswith(SCALE)}
        self.names = list(dict.fromkeys(map(self._parameter, self._files)))

    def _parameter(self, name: str) -> str:
        """The parameter that the tensor `name` is, or is a part of."""
        linear, _, part = name.rpartition(".")
        return f"{linear}.weight" if linear in self.quantized and part != "bias" else name

    def args(self, linear: str) -> QuantizationArgs:
        """How the weight of `linear` is quantized.

        Raises:
            LrquantError: the configuration does not say.
        """
        groups = (self.quantization.get("config_groups") or {}).values()
        by_class = None
        for group in groups:
            for target in group["targets"]:
                if target == "Linear":
                    by_class = group
                elif match_name(linear, target):
                    return QuantizationArgs(**group["weights"])
        if by_class is None:
            raise LrquantError(f"{self.folder}/config.json: damaged (no group says how {linear} is quantized)")
        return QuantizationArgs(**by_class["weights"])

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter; a quantized weight's is that of its integers.

        Raises:
            UsageError: it is not stored as integers.
        """
        linear = name.removesuffix(".weight")
        if f"{linear}.weight_shape" in self._files:
            return tuple(int(size) for size in self.tensor(f"{linear}.weight_shape"))
        if linear in self.quantized and name not in self._files:
            raise self._no_integers(linear)
        with self._open(name) as content:
            return tuple(content.get_slice(name).get_shape())

    def dtype(self, linear: str) -> torch.dtype:
        """What the scales of `linear` are stored in."""
        return self.tensor(f"{linear}{SCALE}").dtype

    def tensor(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        try:
            with self._open(name) as content:
                return content.get_tensor(name)  # type: ignore[no-any-return]
        except (OSError, SafetensorError) as error:
            raise LrquantError(f"{self._files[name]}: this weight file is damaged ({error})") from error

    def weight(self, linear: str) -> QuantizedWeight:
        """The integers (out, in), scales (out, groups) and zero points of a quantized linear.

        Raises:
            UsageError: it is not stored as integers.
        """
        args = self.args(linear)
        if args.type != "int":
            raise self._no_integers(linear)
        scale, zero = self.tensor(f"{linear}{SCALE}"), None
        shape = torch.Size(self.shape(f"{linear}.weight"))
        if f"{linear}.weight_packed" in self._files:
            integers = unpack_from_int32(self.tensor(f"{linear}.weight_packed"), args.num_bits, shape)
        else:
            integers = self.tensor(f"{linear}.weight")
        if not args.symmetric:
            zero = self.tensor(f"{linear}.weight_zero_point")
            if zero.dtype == torch.int32:  # packed along the outputs, and padded where transformers wants it so
                zero = unpack_from_int32(zero, args.num_bits, scale.shape, packed_dim=0)
        return QuantizedWeight(integers, scale, zero, format_of(args))

    def _no_integers(self, linear: str) -> UsageError:
        return UsageError(f"{self.folder}: {linear} holds {self.args(linear).num_bits}-bit floats, not integers")

    def _open(self, name: str) -> Any:
        if name not in self._files:
            raise LrquantError(f"{self.folder}: the checkpoint lacks {name}")
        return safe_open(self._files[name], framework="pt")

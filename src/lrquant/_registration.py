"""Registration with transformers of checkpoints that need lrquant.

Some checkpoints need more than the model's own code: a shift on an RMSNorm model needs additional biases; a run-time
Hadamard transform is described by the checkpoint's `transform_config`, which transformers (5.23) ignores; and experts
with quantized inputs or with zero points must be separate linears, which they are not in transformers 5. Without these,
such a checkpoint would give wrong results. So its `model_type` is `lrquant`, which plain transformers refuses as
unknown, and its `quant_method` is `lrquant`. `import lrquant` registers both: the configuration becomes that of the
original family, and the quantizer adds linears, biases and transforms before compressed-tensors does the rest.
"""

from typing import Any

OWN_METHOD = "lrquant"  # as quant_method
OWN_MODEL_TYPE = "lrquant"  # as model_type
BASE_MODEL_TYPE = "lrquant_base_model_type"


def register_configuration(_: Any = None) -> None:
    """Make AutoConfig read `model_type: lrquant` as the original family."""
    from transformers import AutoConfig, PretrainedConfig

    class LrquantModelConfig(PretrainedConfig):
        model_type = OWN_MODEL_TYPE

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            values = dict(config_dict)
            base = values.pop(BASE_MODEL_TYPE)
            values["model_type"] = base
            return type(AutoConfig.for_model(base)).from_dict(values, **kwargs)

    AutoConfig.register(OWN_MODEL_TYPE, LrquantModelConfig, exist_ok=True)


def register_quantizer(_: Any = None) -> None:
    """Make transformers read `quant_method: lrquant`."""
    from transformers.quantizers import auto
    from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
    from transformers.utils.quantization_config import CompressedTensorsConfig

    if OWN_METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return

    @auto.register_quantization_config(OWN_METHOD)
    class LrquantQuantizationConfig(CompressedTensorsConfig):
        """compressed-tensors' configuration, and what lrquant builds before weights are loaded."""

        def __init__(
            self,
            added_biases: list[str] | None = None,
            exposed_linears: bool = False,
            transform_config: dict[str, Any] | None = None,
            **kwargs: Any,
        ) -> None:
            from compressed_tensors.transform import TransformConfig

            kwargs.pop("quant_method", None)
            kwargs.pop("version", None)
            super().__init__(**kwargs)
            self.quant_method = OWN_METHOD  # type: ignore[assignment]  # by which transformers picks the quantizer
            self.added_biases = added_biases or []
            self.exposed_linears = exposed_linears
            self.transform_config = TransformConfig(**transform_config) if transform_config else None

    @auto.register_quantizer(OWN_METHOD)
    class LrquantHfQuantizer(CompressedTensorsHfQuantizer):
        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            from lrquant.architectures.targets import expose_linears
            from lrquant.transforms.bias_slots import add_bias_slots
            from lrquant.transforms.online import add_online_transforms

            if self.quantization_config.exposed_linears:  # type: ignore[attr-defined]
                expose_linears(model)
            add_bias_slots(model, self.quantization_config.added_biases)  # type: ignore[attr-defined]
            add_online_transforms(model, self.quantization_config.transform_config)  # type: ignore[attr-defined]
            super()._process_model_before_weight_loading(model, **kwargs)

        def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
            """Without those that would merge experts, where they are linears of their own."""
            from lrquant.architectures.experts import without_merging

            return super().update_weight_conversions(without_merging(weight_conversions, model), model)

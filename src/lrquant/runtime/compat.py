"""Private names of torch and transformers that lrquant needs, each with the releases that have it."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

MOST_GRAPHS = 64  # of one function: one per number format and kind of tensor


def passed_over_patterns(model: Any) -> list[re.Pattern[str]]:
    """Names of stored tensors that `model`'s class passes over on purpose (transformers 4 to 5.24)."""
    patterns = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return [re.compile(pattern) for pattern in sorted(patterns)]


def ignored_on_save(model: Any) -> frozenset[str]:
    """Names of tensors that `model`'s class leaves out of its checkpoints (transformers 4 to 5.24)."""
    return frozenset(getattr(model, "_keys_to_ignore_on_save", None) or ())


def attention_implementation(model: Any) -> str:
    """What `model`'s attention runs on, by its name in transformers' registry (transformers 4.48 to 5.24)."""
    return str(model.config._attn_implementation)


def can_choose_attention(model: Any) -> bool:
    """Whether `model`'s attention goes through transformers' registry (transformers 5.0 to 5.24)."""
    return bool(type(model)._can_set_attn_implementation())


def compile_errors() -> type[Exception]:
    """What torch.compile raises where a function cannot be compiled (torch 2.0 to 2.13)."""
    import torch

    return torch._dynamo.exc.TorchDynamoException


def allow_many_graphs() -> None:
    """Let torch.compile keep `MOST_GRAPHS` graphs of one function; it gives up at 8 (torch 2.0 to 2.13)."""
    import torch

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)


@contextmanager
def kept_on_disk() -> Iterator[None]:
    """Within, what is compiled is kept on disk with its derivation, so that another run does without (torch 2.13).

    PyTorch wants to be told that this is safe. Its key is the graph, which spells out both directions of fake
    quantization, and entering autocast depends on nothing but its arguments.
    """
    import torch

    known = torch._inductor.config
    entries = {f"torch.amp.autocast_mode.{name}": "1" for name in ("_enter_autocast", "_exit_autocast")}
    with ExitStack() as within:
        if hasattr(torch._functorch.config, "autograd_cache_allow_custom_autograd_functions"):
            within.enter_context(torch._functorch.config.patch(autograd_cache_allow_custom_autograd_functions=True))
        if hasattr(known, "unsafe_marked_cacheable_functions"):
            marked = known.unsafe_marked_cacheable_functions | entries
            within.enter_context(known.patch(unsafe_marked_cacheable_functions=marked))
        yield


def question_to_the_cpp_compiler() -> Any:
    """A function that has PyTorch ask the C++ compiler what it can do (torch 2.2 to 2.13); the answer is remembered.

    What it needs is imported here: two threads must not import parts of PyTorch at once.
    """
    from torch._inductor import codecache, cpu_vec_isa  # noqa: F401

    return cpu_vec_isa.pick_vec_isa


def keeps_parts_in_float32(model: Any, dtype: Any) -> bool:
    """Whether `model` has parts that stay in another precision than `dtype` (transformers 5.0 to 5.24)."""
    return bool(model._get_dtype_plan(dtype))


def remember_conversions(model: Any, conversions: list[Any]) -> None:
    """Have saving rename and split `model`'s tensors back by `conversions` (transformers 5.0 to 5.24)."""
    model._weight_conversions = conversions


def rust_tokenizer(trained: Any) -> Any:
    """What transformers wraps of a tokenizer that the package `tokenizers` has trained (tokenizers 0.20 to 0.22)."""
    return trained._tokenizer


def grouped_products() -> tuple[Any, ...]:
    """The products of fused experts (torch 2.8 to 2.13): the public function calls the private one."""
    import torch

    found = (getattr(torch, "_grouped_mm", None), getattr(torch.nn.functional, "grouped_mm", None))
    return tuple(function for function in found if function is not None)

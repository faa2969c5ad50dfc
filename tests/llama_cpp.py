"""llama.cpp in a test, by the package xllamacpp: a model's tokens, logarithms of probabilities and greedy text."""

import json
import urllib.request
from pathlib import Path
from typing import Any

_HYPHEN = 13  # its token


class LlamaCpp:
    """A GGUF file, loaded; one thread."""

    def __init__(self, path: Path, context: int) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx, settings.n_parallel, settings.warmup, settings.verbosity = context, 1, False, -1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        self._server = xllamacpp.Server(settings)

    def tokens(self, text: str) -> list[int]:
        """As llama.cpp tokenizes `text`, special tokens added."""
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        request = urllib.request.Request(
            self._server.listening_address + "/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return list(json.load(answer)["tokens"])

    def log_probabilities(self, tokens: list[int], vocabulary: int) -> dict[int, float]:
        """Of every token after `tokens`.

        What is generated is forced to be a whole character of the bundled tokenizer: an end, or a part of a character,
        would be kept back, and the probabilities with it. They are those before that force.
        """
        answer = self._complete(prompt=tokens, n_predict=1, n_probs=vocabulary, logit_bias=[[_HYPHEN, 1000.0]])
        found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return {entry["id"]: entry["logprob"] for entry in found}

    def greedy(self, tokens: list[int], count: int) -> list[int]:
        """The `count` tokens of greatest probability after `tokens`, one after the other."""
        answer = self._complete(prompt=tokens, n_predict=count, n_probs=1)
        return [entry["id"] for entry in answer["choices"][0]["logprobs"]["content"]]

    def _complete(self, **settings: Any) -> dict[str, Any]:
        answer = self._server.handle_completions({"temperature": 0.0, "cache_prompt": True} | settings)
        assert "choices" in answer, answer
        return dict(answer)

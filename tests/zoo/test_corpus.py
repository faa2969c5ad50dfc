"""The offline text is split by name, the same way everywhere, and the two sets share nothing."""

import hashlib

from lrquant.zoo import corpus, zoo_models


def test_the_split_depends_on_the_name_alone() -> None:
    assert corpus.is_held_out("json.decoder") == (hashlib.sha256(b"json.decoder").digest()[0] % 10 == 0)


def test_train_and_held_out_parts_are_disjoint_and_of_use() -> None:
    for name in ("pydoc", "pycode"):
        train, held_out = (corpus.documents(name, part) for part in ("train", "heldout"))
        assert not {text for text in set(train) & set(held_out) if len(text) > 300}  # a few stubs are alike
        assert 0.04 < sum(map(len, held_out)) / sum(map(len, train)) < 0.25
        assert sum(map(len, held_out)) > 100_000  # characters


def test_code_comes_without_its_docstrings() -> None:
    prose = "JSON (JavaScript Object Notation) is a subset"
    everything = [
        "\n".join(corpus.documents(name, "train") + corpus.documents(name, "heldout")) for name in ("pydoc", "pycode")
    ]
    assert prose.split(" <")[0] in everything[0].replace("\n", " ") or "JavaScript Object Notation" in everything[0]
    assert "JavaScript Object Notation" not in everything[1]


def test_the_bundled_model_is_there_and_small() -> None:
    from lrquant.zoo import zoo_model_path

    assert "llama" in zoo_models()
    size = sum(path.stat().st_size for path in zoo_model_path("llama").iterdir())
    assert size < 15e6

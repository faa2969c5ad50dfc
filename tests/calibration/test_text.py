"""Text from every source, its windows, and what is said when it cannot be had."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from torch import Tensor

from lrquant.calibration import calibration_samples, evaluation_ids, read_text
from lrquant.calibration.text import leading_token, text_name, windows
from lrquant.errors import LrquantError, UsageError
from lrquant.zoo import corpus


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))


class Numbers:
    """A tokenizer of texts that are numbers: "7 8 9" → 7, 8, 9."""

    def __call__(self, text: str, return_tensors: str, verbose: bool) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([[int(word) for word in text.split()]])}


def numbers(count: int) -> Any:
    """A source of the numbers 0 … count − 1, in two documents."""
    half = count // 2
    documents = [" ".join(map(str, range(half))), " ".join(map(str, range(half, count)))]
    return lambda source, train: documents


# --- Windows ---


def test_windows_are_seeded_and_do_not_overlap() -> None:
    def draw(seed: int) -> list[Tensor]:
        return calibration_samples(Numbers(), "numbers", 5, 16, seed, read=numbers(100))

    samples = draw(seed=3)
    assert [sample.shape for sample in samples] == [(1, 16)] * 5
    for sample in samples:  # whole pieces of the text
        torch.testing.assert_close(sample.diff(), torch.ones(1, 15, dtype=torch.int64))
    together = torch.cat(samples).flatten()
    assert len(together.unique()) == len(together)
    assert all(map(torch.equal, samples, draw(seed=3)))
    assert not all(map(torch.equal, samples, draw(seed=4)))


def test_a_text_that_just_suffices_is_used_up() -> None:
    samples = calibration_samples(Numbers(), "numbers", 4, 25, 0, read=numbers(100))
    assert torch.cat(samples).flatten().sort().values.tolist() == list(range(100))


def test_too_little_text_says_how_much_there_is() -> None:
    message = r"^numbers: 100 tokens are not enough for 7 samples of 16 \(112\); at most 6 samples fit"
    with pytest.raises(UsageError, match=message):
        calibration_samples(Numbers(), "numbers", 7, 16, 0, read=numbers(100))


def test_of_a_web_sized_set_enough_documents_are_drawn_by_seed() -> None:
    def read(source: str, train: bool) -> list[str]:
        return [f"{number} {number}" for number in range(10_001)]

    def draw(seed: int) -> list[int]:
        return torch.cat(calibration_samples(Numbers(), "web", 4, 8, seed, read=read)).flatten().tolist()

    assert draw(0) == draw(0) != draw(1)
    assert max(draw(0)) > 1000  # not merely the first ones


class WithBos:
    """A tokenizer of numbers that puts a 1 before a text, as Llama's does."""

    bos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True, **options: Any) -> dict[str, Any]:
        ids = [1] * add_special_tokens + [7 if word == "a" else int(word) for word in text.split()]
        return {"input_ids": torch.tensor([ids]) if options else ids}


def test_every_window_begins_with_the_token_that_the_tokenizer_adds() -> None:
    drawn = {
        bos: torch.cat(calibration_samples(WithBos(), "numbers", 3, 16, 0, read=numbers(100), bos=bos))
        for bos in ("auto", "on", "off")
    }
    assert drawn["auto"][:, 0].tolist() == [1, 1, 1]
    assert torch.equal(drawn["auto"], drawn["on"])
    body = drawn["auto"][:, 1:]
    torch.testing.assert_close(body.diff(), torch.ones(3, 14, dtype=torch.int64))
    assert (drawn["off"][:, 0] == 1).sum() <= 1
    assert leading_token(WithBos(), "auto") == 1
    assert leading_token(Numbers(), "auto") is None
    with pytest.raises(UsageError, match="no BOS token"):
        leading_token(Numbers(), "on")


def test_windows_behind_a_token_hold_the_whole_text() -> None:
    cut = windows(torch.arange(10, 22), 5, lead=1)
    assert cut.tolist() == [[1, 10, 11, 12, 13], [1, 14, 15, 16, 17], [1, 18, 19, 20, 21]]
    assert windows(torch.arange(7), 3).tolist() == [[0, 1, 2], [3, 4, 5]]


# --- Sources ---


def test_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Zoë\nsecond line", encoding="utf-8")
    assert read_text(str(tmp_path / "a.txt"), train=True) == ["Zoë\nsecond line"]


def test_json_lines(tmp_path: Path) -> None:
    rows = [{"text": "one", "id": "a"}, {"text": "", "id": "b"}, {"text": "two", "id": "c"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_text(str(tmp_path / "a.jsonl"), train=True) == ["one", "two"]


@pytest.mark.parametrize("column", ["text", "body"])  # the only column of strings does as well
@pytest.mark.parametrize("kind", ["string", "large_string"])  # pandas and polars write the large one
def test_parquet(tmp_path: Path, column: str, kind: str) -> None:
    strings = pyarrow.array(["one", "two"], kind)
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], column: strings}), tmp_path / "a.parquet")
    assert read_text(str(tmp_path / "a.parquet"), train=True) == ["one", "two"]


def test_names_of_files_are_no_patterns(tmp_path: Path) -> None:
    (tmp_path / "a[1]*.jsonl").write_text('{"text": "one"}')
    assert read_text(str(tmp_path / "a[1]*.jsonl"), train=True) == ["one"]


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "b.txt").write_text("later")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}')
    (tmp_path / "notes.md").write_text("not text to us")
    assert read_text(str(tmp_path), train=True) == ["first", "later"]


@pytest.mark.parametrize("name", ["pydoc", "pycode"])
def test_the_zoos_texts_hold_out_a_part(name: str) -> None:
    train, heldout = (read_text(f"zoo:{name}", train=part) for part in (True, False))
    assert not {text for text in train if len(text) > 100} & set(heldout)  # a comment alone may be in both
    assert len(train) > len(heldout) > 10
    assert sum(map(len, heldout)) > 100_000  # characters: several windows of 2048 tokens


def test_evaluation_takes_the_held_out_part() -> None:
    class Lengths:
        def __call__(self, text: str, return_tensors: str, verbose: bool) -> dict[str, Tensor]:
            return {"input_ids": torch.tensor([[len(text)]])}

    expected = "\n\n".join(document for document in corpus.documents("pydoc", "heldout") if document.strip())
    assert evaluation_ids(Lengths(), "zoo:pydoc").tolist() == [len(expected)]


def test_results_are_named_after_their_text() -> None:
    assert [text_name(source) for source in ("c4", "zoo:pydoc", "/some/where/my.txt", "folder/")] == [
        "c4",
        "zoo:pydoc",
        "my.txt",
        "folder",
    ]


# --- What cannot be had ---


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("wikitext3", r"^'wikitext3' is neither a data set \(wikitext2, ptb, c4, zoo:pydoc, zoo:pycode\) nor"),
        ("zoo:novels", r"^unknown data set 'zoo:novels': the zoo has zoo:pydoc, zoo:pycode"),
    ],
)
def test_unknown_names_list_the_known(source: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_text(source, train=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "it contains no text"),
        ("blank.txt", b" \n\t\n", "it contains no text"),
        ("empty.jsonl", b"", "it contains no text"),
        ("latin.txt", b"caf\xe9", "cannot be read as text"),
        ("data.csv", b"a,b", r"text is read from \.txt, \.jsonl, \.json, \.parquet files, not \.csv"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', "not a readable json file"),
        ("broken.parquet", b"not parquet", "not a readable parquet file"),
        (
            "other.jsonl",
            b'{"a": "x", "b": "y"}',
            r"needs a column named 'text', or .*; string columns: a, b",
        ),
        ("numbers.jsonl", b'{"a": 1}', r"needs a column named 'text', or .*; string columns: none"),
    ],
)
def test_files_without_text_are_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read_text(str(tmp_path / name), train=True)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_text_files(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"")
    with pytest.raises(UsageError, match=r"no \.txt, \.jsonl, \.json, \.parquet file in this folder"):
        read_text(str(tmp_path), train=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("secret")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(UsageError, match="cannot be read as text"):
        read_text(str(tmp_path / "a.txt"), train=True)


@pytest.mark.parametrize("name", ["wikitext2", "ptb", "c4"])
def test_a_hub_that_cannot_be_reached_is_failed_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(LrquantError, match=rf"^data set '{name}' cannot be fetched .*zoo:pydoc") as caught:
        read_text(name, train=True)
    assert not isinstance(caught.value, UsageError)


def test_hub_sets_are_joined_as_papers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    rows = {column: ["one", "two"] for column in ("text", "sentence")}
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: Dataset.from_dict(rows))
    assert read_text("wikitext2", train=False) == ["one\n\ntwo"]
    assert read_text("ptb", train=True) == ["one two"]
    assert read_text("c4", train=False) == ["one two"]
    assert read_text("c4", train=True) == ["one", "two"]  # so many documents that samples draw from them


CHATS = {
    "messages": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}]},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Yes?"},
}


class Template:
    """A tokenizer with a chat template, such as it is."""

    chat_template = "…"

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in messages)


@pytest.mark.parametrize("kind", CHATS)
def test_conversations_are_rendered_by_the_chat_template(kind: str, tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text(json.dumps(CHATS[kind]) + "\n")
    assert read_text(str(tmp_path / "chat.jsonl"), True, Template()) == ["<user>Hi<assistant>Yes?"]
    with pytest.raises(UsageError, match="has no chat template"):
        read_text(str(tmp_path / "chat.jsonl"), True, Numbers())


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_with_a_byte_order_mark_is_read(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "A.TXT").write_bytes("Zoë".encode(encoding))
    assert read_text(str(tmp_path / "A.TXT"), train=True) == ["Zoë"]


@pytest.mark.parametrize("name", ["fifo.txt", "fifo.jsonl"])
def test_what_never_ends_is_refused(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    for path in (tmp_path / name, tmp_path / "zero.txt"):
        with pytest.raises(UsageError, match="not a regular file"):
            read_text(str(path), train=True)

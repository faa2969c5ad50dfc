"""Train the bundled Llama: `python -m lrquant.zoo.scripts.train_llama OUT_DIR [--steps N]`.

About an hour on two CPU cores. Five million parameters, grouped-query attention, a byte-level BPE
tokenizer of 4096 tokens. Half of every batch comes from the train parts of `pydoc` and `pycode`, half
from the parts of the standard library that neither set holds (its tests, mostly), which keeps it from
overfitting. The held-out loss of both sets is written beside the weights (`training.json`), so that
anybody can see whether the curve has flattened.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from lrquant.runtime.compat import rust_tokenizer
from lrquant.zoo.corpus import documents, rest_of_library
from lrquant.zoo.scripts.training import descend, save_trained

END = "<|endoftext|>"
SEQLEN = 512


def train_tokenizer(texts: list[str], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=rust_tokenizer(bpe), eos_token=END, bos_token=END, pad_token=END, model_max_length=SEQLEN
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: tuple[str, ...]) -> torch.Tensor:
    """All documents as one row of ids, each ended by the end-of-text token."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, verbose=False)["input_ids"] + [tokenizer.eos_token_id]
    return torch.tensor(ids)


def draw(ids: torch.Tensor, count: int) -> torch.Tensor:
    """`count` random windows of `ids`: (count, SEQLEN)."""
    starts = torch.randint(0, len(ids) - SEQLEN, (count,)).tolist()
    return torch.stack([ids[start : start + SEQLEN] for start in starts])


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, ids: torch.Tensor, windows: int = 48) -> float:
    rows = ids[: len(ids) // SEQLEN * SEQLEN].view(-1, SEQLEN)
    rows = rows[torch.linspace(0, len(rows) - 1, min(windows, len(rows))).long()]
    model.eval()
    loss = sum(float(model(row[None], labels=row[None]).loss) for row in rows) / len(rows)
    model.train()
    return loss


def main(
    out: Annotated[Path, typer.Argument(help="Where the model is written.")],
    steps: int = 4800,
    batch_size: int = 8,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> None:
    torch.manual_seed(seed)
    texts = {name: documents(name, "train") for name in ("pydoc", "pycode")}
    tokenizer = train_tokenizer([*texts["pydoc"], *texts["pycode"]])
    train = torch.cat([encode(tokenizer, texts["pydoc"]), encode(tokenizer, texts["pycode"])])
    rest = encode(tokenizer, rest_of_library())
    held_out = {name: encode(tokenizer, documents(name, "heldout")) for name in texts}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=SEQLEN,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.95),
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 50, int(steps * 1.03))
    curve = []
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train):,} + {len(rest):,} training tokens",
        flush=True,
    )
    for step in range(steps + 1):
        if step % 400 == 0 or step == steps:
            losses = {name: round(held_out_loss(model, ids), 4) for name, ids in held_out.items()}
            curve.append({"step": step, "tokens": step * batch_size * SEQLEN, "held_out_loss": losses})
            print(curve[-1], flush=True)
            save_trained(model, tokenizer, out, curve, train_tokens=len(train) + len(rest))
        batch = torch.cat([draw(train, batch_size - batch_size // 2), draw(rest, batch_size // 2)])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch, labels=batch).loss
        descend(loss, list(model.parameters()), optimizer, schedule)


if __name__ == "__main__":
    typer.run(main)

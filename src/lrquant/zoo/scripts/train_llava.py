"""Train the bundled LLaVA: `python -m lrquant.zoo.scripts.train_llava OUT_DIR [--steps N]`.

About seven minutes on one idle CPU core. A CLIP-style tower of 48 × 48 pixels, a two-layer projector and a
small Llama with a byte-level BPE tokenizer of its own, learned on `zoo:shapes-vqa` as LLaVAs are: the tower
first, by itself (`patch_teacher`), then projector and language model behind the tower as it is, on captions
before questions. (Captions name every shape with its colour, from left to right; without them the language
model counts and never learns to look for the shape it is asked about.) Every picture is drawn for one step
only; its questions come in a row, none of which gives another's answer away.
The held-out accuracy of each kind of question is written beside the weights (`training.json`).
As in `train_vit`, what is written has outlier channels grown into both towers, which changes no answer.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from lrquant.runtime.compat import rust_tokenizer
from lrquant.zoo.scripts.outliers import grow_outliers
from lrquant.zoo.scripts.patch_teacher import PatchTeacher
from lrquant.zoo.scripts.training import Curve, Descent, pixels_of, save_trained
from lrquant.zoo.shapes import SIZE, Placed, Question, ask, draw_scene, questions, seeds

PATCH = 8
IMAGE_TOKENS = (SIZE // PATCH) ** 2
PICTURE, END, PAD = "<image>", "</s>", "<pad>"
CHAT = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: {% else %} ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
HELD_OUT = 200


def build_processor() -> LlavaProcessor:
    scenes = [draw_scene(seed)[1] for seed in range(400)]
    asked = [one for scene in scenes for each in ask(scene).values() for one in each]
    texts = [f"USER: {one.question} ASSISTANT: {one.answer}" for one in asked + [caption(scene) for scene in scenes]]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=384, special_tokens=[PAD, END, PICTURE], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=rust_tokenizer(bpe), eos_token=END, pad_token=PAD, model_max_length=256, padding_side="left"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [PICTURE]})
    size = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessorPil(
        size=size, do_center_crop=False, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        image_size=SIZE,
        patch_size=PATCH,
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=3,
        num_attention_heads=3,
        projection_dim=96,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.get_vocab()[PICTURE],
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


def caption(shapes: list[Placed]) -> Question:
    """Everything in the picture, from left to right."""
    inside = ", ".join(f"{placed.colour} {placed.shape}" for placed in sorted(shapes, key=lambda placed: placed.x))
    return Question("What is in the picture?", inside)


def without_leaks(shapes: list[Placed], random: np.random.Generator) -> list[Question]:
    """In random order: the count, the colour or the shape of each, one question about a pair."""
    asked = ask(shapes)
    chosen = asked["count"] + [asked[("colour", "shape")[random.integers(2)]][index] for index in range(len(shapes))]
    if "side" in asked:
        chosen.append(asked["side"][random.integers(len(asked["side"]))])
    return [chosen[index] for index in random.permutation(len(chosen))]


class Encoder:
    """Turns of a conversation as token ids, each text once."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self.tokenizer(text, verbose=False)["input_ids"]
        return self.known[text]

    def conversation(self, asked: list[Question]) -> tuple[list[int], list[int]]:
        """(ids, labels): only answers are learned."""
        ids: list[int] = []
        labels: list[int] = []
        for turn, question in enumerate(asked):
            if turn == 0:
                picture = self(PICTURE) * IMAGE_TOKENS
                prompt = self("USER: ") + picture + self(f"\n{question.question}")
            else:
                prompt = self(f"USER: {question.question}")
            prompt = prompt + self(" ASSISTANT:")
            answer = self(f" {question.answer}") + [self.tokenizer.eos_token_id]
            ids += prompt + answer
            labels += [-100] * len(prompt) + answer
        return ids, labels


def batch_of(encoder: Encoder, images: Sequence[Image.Image], asked: list[list[Question]]) -> dict[str, Tensor]:
    rows = [encoder.conversation(questions) for questions in asked]
    width = max(len(ids) for ids, _ in rows)
    padding = encoder.tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([ids + [padding] * (width - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
        "pixel_values": pixels_of(images),
    }


def draw(step: int, count: int) -> tuple[list[Image.Image], list[list[Placed]]]:
    """The pictures of one training step."""
    images, shapes = zip(*map(draw_scene, seeds(True, count, step * count)), strict=True)
    return list(images), list(shapes)


@torch.no_grad()
def accuracy(model: LlavaForConditionalGeneration, encoder: Encoder) -> dict[str, float]:
    """Share of held-out answers all of whose tokens are the most likely ones, by the question's first words."""
    model.eval()
    right: dict[str, list[bool]] = {}
    for image, question in questions(False, HELD_OUT):
        batch = batch_of(encoder, [image], [[question]])
        labels = batch.pop("labels")[0, 1:]
        guessed = model(**batch).logits[0, :-1].argmax(-1)
        kind = " ".join(question.question.split()[:2]).lower()
        right.setdefault(kind, []).append(bool((guessed == labels)[labels != -100].all()))
    model.train()
    result = {kind: round(sum(each) / len(each), 4) for kind, each in sorted(right.items())}
    return result | {"all": sum(map(sum, right.values())) / HELD_OUT}


def train_tower(model: LlavaForConditionalGeneration, steps: int, batch_size: int, learning_rate: float) -> None:
    """Teach the vision tower alone; afterwards it is not learned any more."""
    tower = model.model.vision_tower
    teacher = PatchTeacher(tower.config.hidden_size, PATCH)
    learned = [*tower.parameters(), *teacher.parameters()]
    descent = Descent(learned, steps, learning_rate)
    for step in range(steps):
        images, shapes = draw(step, batch_size)
        states = tower(pixel_values=pixels_of(images), output_hidden_states=True).hidden_states[-1]
        loss = teacher.loss(states[:, 1:], shapes)
        if step % 250 == 0:
            print(f"tower, step {step}: loss {loss.item():.4f}", flush=True)
        descent.step(loss)
    tower.requires_grad_(False)


def with_outliers(model: LlavaForConditionalGeneration) -> None:
    grow_outliers(model, factor=8, value_factor=16, share=0.05, towers=("vision", "language"))


def main(
    out: Annotated[Path, typer.Argument(help="Where the model is written.")],
    tower_steps: int = 800,
    caption_steps: int = 250,
    steps: int = 600,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> None:
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    processor = build_processor()
    encoder = Encoder(processor.tokenizer)
    model = build_model(processor.tokenizer)
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters", flush=True)
    train_tower(model, tower_steps, 2 * batch_size, learning_rate)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    descent = Descent(learned, 2 * steps, learning_rate)  # half of a cosine: answers are still improving fast
    curve: Curve = []
    for step in range(steps + 1):
        if step % 300 == 0 or step == steps:
            curve.append({"step": step, "held_out_accuracy": accuracy(model, encoder)})
            print(curve[-1], flush=True)
            save_trained(model, processor, out, curve, with_outliers, numpy=np.__version__)
        images, shapes = draw(tower_steps * 2 + step, batch_size)  # pictures that the tower has not seen
        asked = [[caption(each)] if step < caption_steps else without_leaks(each, random) for each in shapes]
        descent.step(model(**batch_of(encoder, images, asked)).loss)


if __name__ == "__main__":
    typer.run(main)

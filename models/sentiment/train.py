"""Train a one-block attention net on film-review sentences that this script writes itself.

Input ``tokens`` int64 [N, T] (lines of vocab.txt; 0 is padding and changes nothing), output
``logits`` [N, 2] for negative and positive. Tokens are runs of letters, digits and apostrophes,
or single punctuation marks, in lower case. A sentence has one or two clauses. Negators turn a
clause round; of two contrary clauses ("but", "although"), the main or the last one decides.
"""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from models.common import accuracy, export, fit, seed_everything  # noqa: E402

PAD, UNK = "[PAD]", "[UNK]"
SENTENCES, HELD_OUT = 8000, 2000

ADJECTIVES = (
    "awful bad boring clumsy dreadful dull flat forgettable horrible messy poor predictable silly "
    "slow stupid tedious terrible tiresome ugly weak",
    "amazing beautiful brilliant charming clever delightful enjoyable excellent fantastic fresh "
    "funny good great gripping lovely moving superb touching warm wonderful",
)
FEELINGS = ("disliked hated regretted resented", "admired adored enjoyed loved")
STEMS = ("dislike hate regret resent", "admire adore enjoy love")
THINGS = ("acting", "camera", "cast", "dialogue", "ending", "film", "movie", "music", "plot",
          "scenery", "script", "story")  # fmt: skip
OPENERS = (
    "after the long wait ,",
    "as my friends said ,",
    "in my opinion ,",
    "last night i saw it , and",
    "overall ,",
    "to be honest ,",
    "we watched it on friday , and",
    "with my brother at the cinema ,",
)
DEGREES = ("at times", "quite", "really", "rather", "so", "truly", "very")
NEGATORS = ("not", "not really", "not very", "never", "hardly", "not at all")
REFUSALS, DENIALS = ("did not", "didn't", "never"), ("wasn't", "isn't")
EXAMPLES = {
    "positive": "To be honest, the story was gripping and I loved the music.",
    "negative": "We watched it on Friday, and the plot was so predictable.",
    "negation": "The acting was not bad at all.",
    "contrast": "Although the camera was clumsy, the film was truly wonderful.",
}


def clause(rng: random.Random, positive: bool) -> str:
    """One statement about the film, such as "the plot was not very good"."""
    negated = rng.random() < 0.35
    word_class = int(positive != negated)
    thing = f"{rng.choice(('the', 'the', 'this', 'its'))} {rng.choice(THINGS)}"
    if rng.random() < 0.3:
        if negated:
            stem = rng.choice(STEMS[word_class].split())
            return f"i {rng.choice(REFUSALS)} {stem} {thing}"
        return f"i {rng.choice(('', 'really '))}{rng.choice(FEELINGS[word_class].split())} {thing}"
    adjective = rng.choice(ADJECTIVES[word_class].split())
    verb = rng.choice(("was", "is", "felt", "seemed"))
    if not negated:
        degree = rng.choice(DEGREES) + " " if rng.random() < 0.5 else ""
        return f"{thing} {verb} {degree}{adjective}"
    if rng.random() < 0.2:
        return f"{thing} {rng.choice(DENIALS)} {adjective}"
    tail = " at all" if rng.random() < 0.2 else ""
    return f"{thing} {verb} {rng.choice(NEGATORS)} {adjective}{tail}"


def sentence(rng: random.Random, positive: bool) -> str:
    """One or two clauses, at times with an opener, whose verdict is ``positive``."""
    main, same, contrary = (clause(rng, p) for p in (positive, positive, not positive))
    text = rng.choices(
        (
            main,
            f"{main} and {same}",
            f"{contrary} , but {main}",
            f"although {contrary} , {main}",
            f"{main} , although {contrary}",
        ),
        (5, 2, 1, 1, 1),
    )[0]
    opener = rng.choice(OPENERS) + " " if rng.random() < 0.4 else ""
    return f"{opener}{text}{rng.choice(('', ' .', ' !'))}"


def corpus(count: int, seed: int) -> list[tuple[str, int]]:
    """``count`` different sentences with labels 0 and 1 in turn."""
    rng = random.Random(seed)
    labelled: dict[str, int] = {}
    while len(labelled) < count:
        label = len(labelled) % 2
        labelled.setdefault(sentence(rng, bool(label)), label)
    return list(labelled.items())


def tokenize(text: str) -> list[str]:
    """Lower-case words (letters, digits, apostrophes) and single punctuation marks."""
    return re.findall(r"[\w']+|[^\w\s]", text.lower())


def encode(texts: list[str], vocabulary: dict[str, int]) -> Tensor:
    """Token numbers int64 [N, T], padded at the end to the longest text."""
    rows = [
        torch.tensor([vocabulary.get(token, vocabulary[UNK]) for token in tokenize(text)])
        for text in texts
    ]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=vocabulary[PAD])


class Attention(nn.Module):
    """Self-attention over [N, T, width] that sees only the keys where ``real`` [N, T] is true."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        q, k, v = (
            layer(x).reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(2, 3) * self.scale
        weights = scores.masked_fill(~real[:, None, None, :], -1e9).softmax(3)
        mixed: Tensor = self.out((weights @ v).transpose(1, 2).reshape(x.shape))
        return mixed


class Sentiment(nn.Module):
    """Embedding, sine positions, one transformer block, mean over real tokens, linear head."""

    frequencies: Tensor

    def __init__(self, vocabulary: int, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=0)
        self.register_buffer("frequencies", 0.5 ** torch.arange(width // 2))
        self.attention = Attention(width, heads)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dense1, self.dense2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        real = tokens != 0
        # Computed, not looked up: no longest sentence is built into the graph.
        angles = torch.arange(tokens.shape[1])[:, None] * self.frequencies
        x = self.embedding(tokens) + torch.cat([angles.sin(), angles.cos()], dim=1)
        x = self.norm1(x + self.attention(x, real))
        x = self.norm2(x + self.dense2(self.dense1(x).relu()))
        weight = real[:, :, None].to(x.dtype)
        logits: Tensor = self.head((x * weight).sum(1) / weight.sum(1).clamp(min=1.0))
        return logits


def main() -> None:
    seed_everything(0)
    labelled = corpus(SENTENCES + HELD_OUT, seed=0)
    texts, labels = [text for text, _ in labelled], torch.tensor([label for _, label in labelled])
    words = sorted({token for text in texts[:SENTENCES] for token in tokenize(text)})
    vocabulary = {token: number for number, token in enumerate([PAD, UNK, *words])}
    (HERE / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")

    neutral = torch.tensor([vocabulary[t] for t in [*THINGS, *tokenize(" ".join(OPENERS))]])

    def forget(tokens: Tensor) -> Tensor:
        """Now and then show a neutral word as unknown, so that new words do no harm."""
        hit = torch.isin(tokens, neutral) & (torch.rand(tokens.shape) < 0.1)
        return tokens.masked_fill(hit, vocabulary[UNK])

    x = encode(texts, vocabulary)
    net = Sentiment(len(vocabulary))
    fit(net, x[:SENTENCES], labels[:SENTENCES], epochs=15, lr=5e-3, augment=forget)
    score = accuracy(net, x[SENTENCES:], labels[SENTENCES:])
    print(f"sentiment: accuracy {score:.4f} on {HELD_OUT} held-out sentences")
    export(
        net, x[SENTENCES : SENTENCES + 5], HERE / "sentiment.onnx", input_name="tokens",
        dynamic={0: "N", 1: "T"},
    )  # fmt: skip
    (HERE / "samples").mkdir(exist_ok=True)
    for name, text in EXAMPLES.items():
        (HERE / "samples" / f"{name}.txt").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

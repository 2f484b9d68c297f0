"""A tokenizer trained on the spot, a small random encoder, and tiny folders in the formats of the text data sets."""

import csv
import json
import lzma
import random
from pathlib import Path

import torch

CITIES = ("paris", "rome", "oslo", "lima")
SONGS = ("yesterday", "hey jude", "let it be")


def save_encoder(folder: Path, words: str | None = None, **sizes) -> Path:
    """A folder with a fast tokenizer over the words of the cases below and a random BERT that belongs to it."""
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    corpus = words or " ".join(
        [*CITIES, *SONGS, "play weather in the of do not sing what is my card lost pin new in , . ?"]
    )
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer, raw.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    raw.train_from_iterator([corpus] * 3, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **names)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    how = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **{**how, **sizes})
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def write_snips(root: Path, train: int = 24) -> Path:
    """Requests for music and for the weather."""
    draw = random.Random(0)
    for part, count in (("train", train), ("valid", 6), ("test", 6)):
        folder = root / part
        folder.mkdir(parents=True)
        rows = []
        for i in range(count):
            if i % 2:
                song = draw.choice(SONGS).split()
                tags = ["O", *(f"{'I' if j else 'B'}-song" for j in range(len(song)))]
                rows.append(("play " + " ".join(song), " ".join(tags), "PlayMusic"))
            else:
                rows.append((f"weather in {draw.choice(CITIES)}", "O O B-city", "GetWeather"))
        for name, column in (("seq.in", 0), ("seq.out", 1), ("label", 2)):
            (folder / name).write_text("".join(f"{row[column]} \n" for row in rows))
    return root


def write_banking77(root: Path) -> Path:
    """Two categories."""
    root.mkdir(parents=True)
    (root / "categories.json").write_text(json.dumps(["lost_card", "new_pin"]))
    for name, count in (("train", 20), ("test", 4)):
        with open(root / f"{name}.csv", "w", newline="") as file:
            rows = [("my card is lost", "lost_card"), ("what is my\nnew pin?", "new_pin")]
            csv.writer(file).writerows([("text", "category"), *(rows[i % 2] for i in range(count))])
    return root


def write_nlupp(root: Path) -> Path:
    """Two domains of 20 folds, a text each."""
    (root / "banking").mkdir(parents=True)
    (root / "hotels").mkdir()
    (root / "ontology.json").write_text(json.dumps({"intents": {"pin": {}, "lost": {}}, "slots": {"city": {}}}))
    entries = {
        "banking": {"text": "lost my pin, in oslo.", "intents": ["pin", "lost"], "slots": {"city": {"span": [16, 20]}}},
        "hotels": {"text": "what is new in Lima?", "intents": []},
    }
    for domain, entry in entries.items():
        for fold in range(20):
            (root / domain / f"fold{fold}.json").write_text(json.dumps([entry]))
    return root


CONLLU = """# sent_id = 1
# text = Don't sing.
1-2\tDon't\t_\t_\t_\t_\t_\t_\t_\t_
1\tDo\tdo\tAUX\tVB\t_\t3\taux\t_\t_
2\tn't\tnot\tPART\tRB\t_\t3\tadvmod\t_\t_
3\tsing\tsing\tVERB\tVB\t_\t0\troot\t_\t_
3.1\tit\tit\tPRON\tPRP\t_\t_\t_\t_\t_
4\t.\t.\tPUNCT\t.\t_\t3\tpunct\t_\t_

1\tParis\tParis\tPROPN\tNNP\t_\t0\troot\t_\t_

"""


def write_ewt(root: Path) -> Path:
    """Two sentences per split; one of the files is compressed."""
    root.mkdir(parents=True)
    for name in ("train", "dev"):
        (root / f"en_ewt-ud-{name}.conllu").write_text(CONLLU)
    with lzma.open(root / "en_ewt-ud-test.conllu.xz", "wt") as file:
        file.write(CONLLU)
    return root


def write_all(root: Path) -> Path:
    """The folders of `NLUMix`."""
    write_snips(root / "snips")
    write_banking77(root / "banking77")
    write_nlupp(root / "nlupp")
    write_ewt(root / "ud_english_ewt")
    return root

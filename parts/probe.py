"""What photos tell beyond the text, before anything is trained: linear models on frozen states.

    result = photo_probe(dataset, cache, "bert-base-uncased", "test", "cpu")

In the manner of probing classifiers (Alain & Bengio, 2016; Hewitt & Liang, EMNLP 2019, whose control task is
here others' photos). Each gold mention is asked for its type, each pair of entities for its relation.
"""

import itertools
import warnings
from collections import Counter

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from data import NerExample
from encoding import collate, encode, length_batches, to_device
from parts.checks import paired_bootstrap
from parts.console import progress_bar
from parts.posts import mean_regions, shuffled_photos
from parts.scores import entity_spans
from parts.text_encoder import load_text_encoder, longest_input

# Tried on valid: C of scikit-learn, the larger, the freer the model; the photo's scale beside the text's.
PENALTIES, SCALES = (1.0, 10.0, 100.0), (0.25, 0.5, 1.0)


def questions(examples):
    """[(post's number, spans [start, end) of words to look at, the right answer)] of a split."""
    if hasattr(examples[0], "head"):
        return [(i, (example.head, example.tail), example.label) for i, example in enumerate(examples)]
    spans = ((i, span) for i, example in enumerate(examples) for span in sorted(entity_spans(example.labels)))
    return [(i, ((start, end),), kind) for i, (kind, start, end) in spans]


def text_states(encoder, tokenizer, examples, queries, device, batch_size=32):
    """[questions, S * D]: the mean frozen state of each span's words and of all words of the post.

    A word's state is that of its first sub-token. NaN where a span lies behind what the encoder can read.
    """
    words = [NerExample(e.id, e.image_id, e.words, ("O",) * len(e.words)) for e in examples]
    rows, _ = encode(tokenizer, words, ("O",), min(512, longest_input(encoder, tokenizer)))
    of_post = {}
    for number, (i, _, _) in enumerate(queries):
        of_post.setdefault(i, []).append(number)
    posts, states = list(of_post), [None] * len(queries)
    lengths = [len(rows[i]["input_ids"]) for i in posts]
    with progress_bar(len(posts), "post", True, desc="text") as bar, torch.inference_mode():
        for chosen in length_batches(lengths, batch_size):
            batch = to_device(collate([rows[posts[k]] for k in chosen], tokenizer.pad_token_id), device)
            output = encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            for k, state in zip(chosen, output.last_hidden_state.float().cpu().numpy(), strict=True):
                starts = np.array(rows[posts[k]]["word_starts"])
                for number in of_post[posts[k]]:
                    spans = [starts[start:end] for start, end in queries[number][1]]
                    parts = [state[span[span >= 0]] for span in (*spans, starts)]
                    lost = any(len(part) == 0 for part in parts)
                    nothing = np.full(state.shape[1], np.nan)
                    means = [nothing if lost else part.mean(0) for part in parts]
                    states[number] = np.concatenate(means)
            bar.update(len(chosen))
    return np.stack(states).astype(np.float32)


def standardised(states, real):
    """States {split: [N, D]} by train's mean and deviation, of length 1 on average; 0 where not `real`."""
    of_train = states["train"][real["train"]]
    mean, deviation = of_train.mean(0), of_train.std(0)
    scale = np.where(deviation > 0, deviation, 1) * states["train"].shape[1] ** 0.5
    return {split: (part - mean) / scale * real[split][:, None] for split, part in states.items()}


def fit(inputs, gold, split):
    """Answers on `split` of the logistic regression that answers most of valid rightly.

    inputs: one or two dicts {split: [N, D]}, of which the second is tried at each of `SCALES`.
    """
    best = (-1.0, None)
    for penalty, scale in itertools.product(PENALTIES, SCALES if len(inputs) > 1 else (1.0,)):
        states = {name: np.concatenate((part, *(more[name] * scale for more in inputs[1:])), 1)
                  for name, part in inputs[0].items()}  # fmt: skip
        model = LogisticRegression(C=penalty, max_iter=300)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # few steps are a penalty, too
            model.fit(states["train"], gold["train"])
        accuracy = model.score(states["valid"], gold["valid"])
        if accuracy > best[0]:
            best = accuracy, model.predict(states[split]).tolist()
    return best[1]


def photo_probe(dataset, cache, source, split, device, seed=1337):
    """Compare linear models on text, photo, both and both with others' photos; how, the README says.

    Returns a dict: units, asked on `split`; lost, left out as the encoder cannot read that far; photos, of
    those with one; majority, text, photo, both, control: accuracy; gain and control_gain: the
    `paired_bootstrap` of both and control over text. ValueError if train's answers are all
    one, or if no post of `split` has a photo.
    """
    torch.manual_seed(seed)
    encoder, tokenizer = load_text_encoder(source, "", "ner", 0.0)
    encoder = encoder.to(device).eval()
    splits = tuple(dict.fromkeys(("train", "valid", split)))
    text, photo, other, real, gold, ids, lost = {}, {}, {}, {}, {}, {}, 0
    for name in splits:
        examples = dataset.examples[name]
        queries = questions(examples)
        if not queries:
            raise ValueError(f"{dataset.name} {name}: no entity in it, so nothing to ask")
        states = text_states(encoder, tokenizer, examples, queries, device)
        whole = np.isfinite(states[:, 0])
        lost = int((~whole).sum())
        pairs = [(i, answer) for (i, _, answer), inside in zip(queries, whole, strict=True) if inside]
        text[name], gold[name] = states[whole], [answer for _, answer in pairs]
        ids[name] = [examples[i].image_id for i, _ in pairs]
        photo[name], real[name] = mean_regions(cache, ids[name])
        swap = shuffled_photos([example.image_id for example in examples], cache, seed)
        other[name], _ = mean_regions(cache, [swap[image_id] for image_id in ids[name]])
    if len(set(gold["train"])) < 2:
        raise ValueError(f"{dataset.name}: all answers of train are {gold['train'][0]}; nothing to learn")
    if not real[split].any() or not real["train"].any():
        raise ValueError(f"{cache.path}: no photo of {dataset.name}'s posts in it; nothing to look at")
    every = {name: np.ones(len(part), bool) for name, part in real.items()}
    text, photo, other = (standardised(*pair) for pair in ((text, every), (photo, real), (other, real)))
    inputs = {"text": [text], "photo": [photo], "both": [text, photo], "control": [text, other]}
    majority = Counter(gold["train"]).most_common(1)[0][0]
    answers = {name: fit(states, gold, split) for name, states in inputs.items()}

    def records(predicted):
        """As `paired_bootstrap` takes them, rows that share a photo drawn together."""
        rows = zip(ids[split], gold[split], predicted, strict=True)
        return [{"id": str(i), "image_id": photo, "gold": right, "predicted": answer}
                for i, (photo, right, answer) in enumerate(rows)]  # fmt: skip

    runs = {name: [records(predicted)] for name, predicted in answers.items()}
    result = {"split": split, "units": len(gold[split]), "lost": lost, "photos": int(real[split].sum())}
    result |= {"majority": float(np.mean([right == majority for right in gold[split]]))}
    for name, predicted in answers.items():
        result[name] = float(np.mean([a == b for a, b in zip(predicted, gold[split], strict=True)]))
    result["gain"] = paired_bootstrap(runs["both"], runs["text"], "accuracy")
    result["control_gain"] = paired_bootstrap(runs["control"], runs["text"], "accuracy")
    return result


def probe_verdict(result):
    """What a fusion could gain, in one or two sentences, of a `photo_probe`."""
    gain, control = result["gain"], result["control_gain"]
    if gain["low"] > 0 and gain["difference"] > control["difference"]:
        return ("the photos tell what the text does not: a fusion should gain about as much; if it does not,"
                " look at its training first")  # fmt: skip
    if gain["low"] > 0:
        return "others' photos gain as much: what is gained is not of the photos"
    return ("a linear model gains nothing sure from these photos: a fusion that gains must find what is not"
            " linear, so check its gain with --image-check and a run with --shuffle-photos")  # fmt: skip

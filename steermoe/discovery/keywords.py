"""Keywords of clusters of texts: class-based tf-idf, with a contrast to the other clusters. Knows no model.

Shapes: B texts, W words of the vocabulary, C clusters.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from steermoe.discovery.clustering import NOISE
from steermoe.discovery.languages import language_of, most_frequent_forms, stop_words
from steermoe.errors import CorpusError, SteerMoEError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

MIN_TEXTS = 2
MIN_SHARE = 0.05
"""A keyword must be in this many of its cluster's texts, and in this share of them, else one text's names would win."""
LANGUAGE_CHARACTERS = 1000
"""The part of a text that is read to find its language."""
RARE = 0.02
"""A language that fewer of the texts have is doubtful: such texts count as of no known language."""
EVERYWHERE = 0.2
"""Without a list, a word that this share of every cluster's texts contain is a stop word."""

# What is left of English contractions once they are cut at the apostrophe; sklearn's list lacks them.
STUMPS = frozenset(
    {
        *("aren", "couldn", "didn", "doesn", "don", "hadn", "hasn", "haven", "isn"),
        *("shouldn", "wasn", "weren", "won", "wouldn", "ll", "ve", "re"),
    }
)
# Written without spaces between words: Han, Hiragana, Katakana.
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]{2,}")


@dataclass(frozen=True)
class Keyword:
    """A word in lower case, and how typical it is for its cluster (only comparable within one corpus)."""

    word: str
    score: float


def cluster_keywords(
    texts: Sequence[str], labels: Sequence[int] | NDArray[Any], count: int = 10
) -> dict[int, list[Keyword]]:
    """The words that distinguish each cluster's texts from all others, the most typical first.

    Class-based tf-idf (Grootendorst 2022, 2203.05794): tf(w, c) * log(1 + A / f(w)), where A is the mean number of
    words per cluster. Two changes keep out names and words that are common everywhere. In tf and f a text that contains
    a word n times counts 1 + log(n), not n. And the product is multiplied by the contrast (p - q) / (p + q), where p is
    the share of the cluster's texts that contain the word, and q that of all other texts.

    Words that say nothing are left out by the list of each text's language; in texts of no known language, words that
    are frequent in all clusters. Inflected forms count as one word, shown in its most frequent form.

    Args:
        texts: B texts in any language. Chinese and Japanese runs are read as pairs of characters.
        labels: the cluster of each, [B]; -1 is noise, which is no cluster but counts as other texts.
        count: the most keywords per cluster; there are fewer if no more words are typical.

    Raises:
        CorpusError: the numbers of labels and texts differ. SteerMoEError: scikit-learn is missing.
    """
    groups = np.asarray(labels, dtype=np.int64)
    if len(groups) != len(texts):
        raise CorpusError(f"{len(texts)} texts have {len(groups)} cluster labels: give one per text")
    clusters = [int(label) for label in np.unique(groups) if label != NOISE]
    if not clusters:
        return {}
    languages = languages_of(texts)
    vocabulary, counts_BW = count_words(texts, languages)
    if not len(vocabulary):
        return {cluster: [] for cluster in clusters}
    vocabulary, counts_BW, unlisted_W = _folded(vocabulary, counts_BW, languages)
    scores = _scores(counts_BW, groups, clusters, unlisted_W)
    return {cluster: _best(vocabulary, row, count) for cluster, row in zip(clusters, scores, strict=True)}


def languages_of(texts: Sequence[str]) -> list[str]:
    """The language of each text.

    A text whose language is not found, or is one that next to none of the texts have, gets the most frequent language
    of texts in its script; "" if there is none.
    """
    read = word_analyser(frozenset())
    found, scripts = [], []
    for text in texts:
        words = read(text[:LANGUAGE_CHARACTERS])
        found.append(language_of(text, words))
        scripts.append(_script(words))
    counts = Counter(found)
    usual: dict[str, str] = {}
    for (script, code), _ in Counter(zip(scripts, found, strict=True)).most_common():
        if code and counts[code] >= RARE * len(texts):
            usual.setdefault(script, code)
    return [
        code if code and counts[code] >= RARE * len(texts) else usual.get(script, "")
        for code, script in zip(found, scripts, strict=True)
    ]


def _script(words: Sequence[str]) -> str:
    """The script of a text's first word, such as "CYRILLIC"."""
    return unicodedata.name(words[0][0], "").partition(" ")[0] if words else ""


def _folded(
    vocabulary: NDArray[Any], counts_BW: "csr_matrix", languages: Sequence[str]
) -> tuple[NDArray[Any], "csr_matrix", NDArray[np.bool_]]:
    """Vocabulary and counts with one word for all its inflected forms, and which words have no known language."""
    from scipy.sparse import csr_matrix

    of_texts = np.array(languages)
    codes = sorted(set(languages))
    totals_CW = np.stack([_sums(counts_BW[of_texts == code]) for code in codes])
    owner_W = totals_CW.argmax(0)
    forms: dict[str, str] = {}
    for number, code in enumerate(codes):
        own = np.flatnonzero(owner_W == number)
        forms |= most_frequent_forms(map(str, vocabulary[own]), totals_CW[number, own].tolist(), code)
    shown, place_W = np.unique([forms[str(word)] for word in vocabulary], return_inverse=True)
    entries = np.ones(len(vocabulary)), (np.arange(len(vocabulary)), place_W)
    folding = csr_matrix(entries, shape=(len(vocabulary), len(shown)))
    unlisted_W = np.zeros(len(shown), dtype=bool)
    if "" in codes:
        unlisted_W[place_W] = owner_W == codes.index("")
    return shown, csr_matrix(counts_BW @ folding), unlisted_W


def _scores(
    counts_BW: "csr_matrix", groups: NDArray[np.int64], clusters: Sequence[int], unlisted_W: NDArray[np.bool_]
) -> list[NDArray[np.float64]]:
    """[W] for each cluster: 0 if a word is not a candidate."""
    held_BW = counts_BW.copy()
    held_BW.data = np.ones_like(held_BW.data)
    damped_BW = counts_BW.copy()
    damped_BW.data = 1 + np.log(damped_BW.data)
    word_texts_W, word_total_W = _sums(held_BW), _sums(damped_BW)
    inverse_W = np.log1p(word_total_W.sum() / len(clusters) / word_total_W)
    rows = []
    everywhere_W = unlisted_W & (len(clusters) > 1)
    for cluster in clusters:
        is_own = groups == cluster
        size, others = int(is_own.sum()), int((~is_own).sum())
        texts_W, total_W = _sums(held_BW[is_own]), _sums(damped_BW[is_own])
        own_W = texts_W / size
        everywhere_W &= own_W >= EVERYWHERE
        other_W = (word_texts_W - texts_W) / max(others, 1)
        contrast_W = (own_W - other_W) / np.maximum(own_W + other_W, 1e-12)
        score_W = total_W / max(total_W.sum(), 1) * inverse_W * contrast_W
        enough = min(max(MIN_TEXTS, MIN_SHARE * size), size)
        rows.append(np.where((texts_W >= enough) & (contrast_W > 0), score_W, 0.0))
    return [np.where(everywhere_W, 0.0, row_W) for row_W in rows]


def _sums(matrix_BW: "csr_matrix") -> NDArray[np.float64]:
    return np.asarray(matrix_BW.sum(axis=0), dtype=np.float64).ravel()


def _best(vocabulary: NDArray[Any], score_W: NDArray[np.float64], count: int) -> list[Keyword]:
    """The best words; only the better one of a word and its plural in -s."""
    chosen: dict[str, Keyword] = {}
    for index in np.lexsort((vocabulary, -score_W)):
        word, score = str(vocabulary[index]), float(score_W[index])
        if score <= 0 or len(chosen) == count:
            break
        if f"{word}s" not in chosen and not (word.endswith("s") and word[:-1] in chosen):
            chosen[word] = Keyword(word, score)
    return list(chosen.values())


def count_words(texts: Sequence[str], languages: Sequence[str]) -> tuple[NDArray[Any], "csr_matrix"]:
    """The vocabulary [W], and how often each text contains each word, sparse [B, W]; without stop words.

    Those of English are left out of texts of all languages: there are English words in most.

    Raises:
        SteerMoEError: scikit-learn is missing.
    """
    try:
        from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer
    except ImportError as error:
        raise SteerMoEError(f"keywords need scikit-learn ({error}): pip install 'steermoe[discover]'") from error

    read = {code: word_analyser(ENGLISH_STOP_WORDS | STUMPS | stop_words(code)) for code in set(languages)}
    vectorizer = CountVectorizer(analyzer=lambda place: read[languages[place]](texts[place]), dtype=np.float64)
    try:
        counts_BW = vectorizer.fit_transform(range(len(texts)))
    except ValueError:  # sklearn's way to say that no text contains a word
        return np.array([]), None
    return vectorizer.get_feature_names_out(), counts_BW


def word_analyser(stop_words: frozenset[str]) -> Callable[[str], list[str]]:
    """A function that returns a text's words in lower case: two or more letters of any script, no digits."""
    pattern = _word_pattern()

    def words(text: str) -> list[str]:
        found = []
        for word in pattern.findall(unicodedata.normalize("NFC", text).lower()):
            if _UNSPACED.fullmatch(word):
                found += [word[i : i + 2] for i in range(len(word) - 1)]
            elif word not in stop_words:
                found.append(word)
        return found

    return words


@cache
def _word_pattern() -> re.Pattern[str]:
    """Two or more letters in a row, including vowel signs of Hindi, Thai and others, which aren't letters to Python."""
    marks = "".join(chr(code) for code in range(0x300, 0x1E950) if unicodedata.category(chr(code)).startswith("M"))
    return re.compile(rf"(?<!\w)(?:[^\W\d_]|[{marks}]){{2,}}(?!\w)")

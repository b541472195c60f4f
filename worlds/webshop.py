"""WebShop: buy what an instruction asks for, in a shop of text pages (Yao et al., 2022), as in LaMer's experiments.

Loads the genuine files or generates a catalogue of the same format, and needs no Java, no web server and no tagger:

    python train.py --env webshop                              a generated catalogue, short pages for the tiny policy
    python train.py --env webshop --data DIR                   items_shuffle_1000.json and items_ins_v2_1000.json in DIR
    python train.py --env webshop --data DIR --human_goals     the instructions people wrote, items_human_ins.json

From bottom to top: products and goals, search, reward, the shop that holds them, a `Session` (one visit: its pages,
actions and purchase), and `WebShop`, LaMer's episode around a visit. Pages, rewards, ranking and goals follow the
original (facts/webshop.md) to the letter. `WebShop` differs where the original defeats its purpose: one shuffle, with
validation goals held out; the same goal in every episode of a trial, also after a wrong purchase; no goals that cannot
be won; no `click[search]`, which does nothing. `original=True` restores the last three.
"""

import itertools
import json
import random
import re
import string
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from envs import Env, between, derive_seed

# ---------------------------------------------------------------------------------- products and goals

BUTTONS = ("back to search", "< prev", "description", "features", "reviews", "buy now")  # of an item page, in order
SUB_PAGES = ("description", "features", "reviews")
VALIDATION_SEED = 2**31  # the project evaluates with seeds from here on
MOST_VALIDATION_GOALS = 500


@dataclass(slots=True, eq=False)
class Product:
    """A product after loading. `choices` maps what can be clicked to its option's name; see `clickable_values`."""

    asin: str
    title: str
    description: str
    bullets: list[str]
    attributes: list[str]
    options: dict[str, list[str]]
    prices: list[float]  # one, or the two ends of a range
    query: str
    category: str
    product_category: str
    choices: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # A value under two names is listed once, at its first place, and sets the later name; a value that reads like
        # a button acts as the button.
        pairs = [(value, name) for name, values in self.options.items() for value in values]
        self.choices = {value: name for value, name in pairs if value not in BUTTONS}

    @property
    def tag(self) -> str:
        """The price as pages show it: `$15.9` or `$12.99 to $15.99`."""
        return " to ".join(f"${price}" for price in self.prices)

    @property
    def document(self) -> str:
        """The text that is searched."""
        options = ", and ".join(f"{name}: {', '.join(values)}" for name, values in self.options.items())
        return " ".join([self.title, self.description, self.bullets[0] if self.bullets else "", options]).lower()


@dataclass(slots=True)
class Goal:
    """What is to be bought. Options are {name: value} in generated goals and a list of values in human ones."""

    product: Product
    text: str
    attributes: tuple[str, ...]
    options: dict[str, str] | list[str]
    price_upper: float
    weight: float = 1.0

    @property
    def values(self) -> list[str]:
        """The option values asked for."""
        return list(self.options.values() if isinstance(self.options, dict) else self.options)


# What goals are made of: product, instruction, attributes, and the option values asked for, or None for all of them.
Instruction = tuple[Product, str, tuple[str, ...], list[str] | None]


def read_json(path: Path, kind: type) -> Any:
    """The content of a JSON file that must be a list or an object; ValueError names file and place."""
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 JSON: {error}".replace("\n", " ")) from None
    if not isinstance(content, kind):
        raise ValueError(f"{path}: must hold a JSON {'list' if kind is list else 'object'}")
    return content


def check(is_good: bool, place: str, problem: str) -> None:
    """ValueError in one line unless `is_good`."""
    if not is_good:
        raise ValueError(f"{place}: {problem}")


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def read_prices(pricing: Any, place: str) -> list[float]:
    """The first two prices of a text like "$12.99 to $1,015.99"; 100 where there is none."""
    if pricing in ("", None):
        return [100.0]
    check(isinstance(pricing, str), place, f"pricing {pricing!r:.60} is not text")
    prices = [re.sub(r"[^0-9.]", "", piece) for piece in pricing.split("$")[1:]]
    is_good = prices and all(re.fullmatch(r"\d+\.?\d*|\.\d+", price) for price in prices)
    check(is_good, place, f"malformed pricing {pricing!r:.60}")
    return [float(price) for price in prices[:2]]


def read_product(record: dict[str, Any], attributes: list[str], place: str) -> Product:
    """A product from its record in items_shuffle.json."""
    for key in ("name", "query", "category", "product_category"):
        check(isinstance(record.get(key), str), place, f"{key} is missing or no text")
    check(isinstance(record.get("images"), list) and record["images"] != [], place, "images is missing or empty")
    description, bullets = record.get("full_description"), record.get("small_description")
    bullets = bullets if isinstance(bullets, list) else [bullets or ""]
    check(isinstance(description, str | None), place, "full_description is no text")
    check(is_texts(bullets), place, "small_description is neither text nor a list of texts")
    options, listed = {}, record.get("customization_options") or {}
    check(isinstance(listed, dict), place, "customization_options is no object")
    for name, entries in listed.items():
        if entries is not None:
            is_list = isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)
            values = [entry.get("value") for entry in entries] if is_list else None
            check(is_texts(values), place, f"option {name!r:.40} is no list of objects with a value")
            options[name.lower()] = [value.strip().replace("/", " | ").lower() for value in values]
    prices, query = read_prices(record.get("pricing"), place), record["query"].lower().strip()
    kind = (query, record["category"], record["product_category"])
    return Product(record["asin"], record["name"], description or "", bullets, attributes, options, prices, *kind)


def read_catalogue(
    records: Sequence[Any], notes: dict[str, Any], human: dict[str, Any] | None, files: Sequence[str]
) -> tuple[list[Product], list[Instruction]]:
    """The products and the instructions, from the contents of items_shuffle, items_ins_v2 and items_human_ins.

    Without `human` the instructions are those in `notes`, where every product must then be. `files` are their names.
    """
    products, instructions, seen = [], [], set()

    def add(product: Product, text: Any, attributes: Any, values: Any, place: str) -> None:
        check(isinstance(text, str), place, "instruction is missing or no text")
        check(is_texts(attributes), place, "instruction_attributes is no list of texts")
        check(values is None or is_texts(values), place, "instruction_options is no list of texts")
        instructions.append((product, text, tuple(attributes), values))

    for i, record in enumerate(records):
        place = f"{files[0]}: product {i}"
        check(isinstance(record, dict) and isinstance(record.get("asin"), str), place, "has no asin")
        asin = record["asin"]
        if asin == "nan" or len(asin) > 10 or asin in seen:
            continue
        seen.add(asin)
        check(asin in notes or human is not None, f"{files[1]}: {asin}", f"is missing, but {files[0]} has it")
        note, place = notes.get(asin, {}), f"{files[0]}: product {i} ({asin})"
        check(isinstance(note, dict), f"{files[1]}: {asin}", "is no object")
        attributes = note.get("attributes", ["DUMMY_ATTR"])
        check(is_texts(attributes), f"{files[1]}: {asin}", "attributes is no list of texts")
        products.append(read_product(record, attributes, place))
        if human is None and note.get("instruction") is not None:
            add(products[-1], note["instruction"], note.get("instruction_attributes"), None, f"{files[1]}: {asin}")
        entries = human.get(asin, []) if human is not None else []
        check(isinstance(entries, list), f"{files[-1]}: {asin}", "is no list")
        for j, entry in enumerate(entries):
            place = f"{files[-1]}: {asin}, instruction {j}"
            check(isinstance(entry, dict), place, "is no object")
            if entry.get("instruction_attributes") != []:
                values = entry.get("instruction_options", False)
                add(products[-1], entry.get("instruction"), entry.get("instruction_attributes"), values, place)
    return products, instructions


def make_goals(instructions: Iterable[Instruction], prices: dict[str, float], rng: random.Random) -> list[Goal]:
    """One goal per human instruction, or per combination of a product's options; `rng` draws the price bounds."""
    goals = []
    for product, text, attributes, values in instructions:
        bounds = [bound for bound in range(10, 1000, 10) if bound > prices[product.asin]][:4]
        price_upper, suffix = 1000000, ""
        if len(bounds) >= 2:
            price_upper = float(max(rng.sample(bounds, 2)))
            suffix = f", and price lower than {price_upper:.2f} dollars"
        if values is not None:
            goals.append(Goal(product, text.strip(".") + suffix, attributes, values, price_upper))
            continue
        names = sorted(product.options)
        for combination in itertools.product(*(product.options[name] for name in names)):
            options = dict(zip(names, combination, strict=True))
            asked = " with " * bool(options) + ", and ".join(f"{name}: {value}" for name, value in options.items())
            goals.append(Goal(product, text + asked + suffix, attributes, options, price_upper))
    counts = Counter(attribute for goal in goals for attribute in goal.attributes)
    for goal in goals:
        if isinstance(goal.options, dict):  # people's goals all weigh 1
            goal.weight = sum(1 / counts[a] for a in goal.attributes) / max(len(goal.attributes), 1)
    return goals


# --------------------------------------------------------------------------------------------- search

K1, B, MOST_RESULTS = 0.9, 0.4, 50
STOP_WORDS = (  # noqa: SIM905
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they "
    "this to was will with"
).split()
BEYOND_ASCII = [(chr(i), unicodedata.category(chr(i))) for i in range(0x80, 0x10000)]
MARKS = "".join(c for c, kind in BEYOND_ASCII if kind[0] == "M" or (kind == "Cf" and c != "\u200b"))
MARKS += "\uff9e\uff9f"  # with the marks, these two Katakana signs belong to the character before them
NUMERALS = "".join(
    c for c, kind in BEYOND_ASCII if kind == "No"
)  # ½ and the like separate, though Python's \w has them
SINGLE = "\u3005\u3007\u3021-\u3029\u3038-\u303b\u3041-\u3096\u309d-\u309f"  # every Hiragana or Han sign is a word
SINGLE += "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
KATAKANA = "\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9d"
PICTOGRAPHS = (
    "\u00a9\u00ae\u203c\u2049\u2122\u2194-\u2199\u21a9-\u21aa\u231a-\u231b\u2328\u2388\u23cf\u23e9-\u23f3\u23f8-\u23fa"
    "\u25aa-\u25ab\u25b6\u25c0\u25fb-\u25fe\u2600-\u2605\u2607-\u2612\u2614-\u2685\u2690-\u2705\u2708-\u2712\u2714\u2716"
    "\u271d\u2721\u2728\u2733-\u2734\u2744\u2747\u274c\u274e\u2753-\u2755\u2757\u2763-\u2767\u2795-\u2797\u27a1\u27b0"
    "\u27bf\u2934-\u2935\u2b05-\u2b07\u2b1b-\u2b1c\u2b50\u2b55\u3030\u303d\U0001f000-\U0001faff"
)
APART = NUMERALS + SINGLE + KATAKANA + PICTOGRAPHS + "\uff9e\uff9f"  # no part of ordinary words
RUN = rf"[^\W{APART}]+(?:[{MARKS}]+[^\W{APART}]*)*"
LETTER = rf"[^\W\d_{APART}]"
WORD = re.compile(
    rf"{RUN}(?:(?:(?<={LETTER})[.'’‘·:：](?={LETTER})|(?<=\d)[.,;'’‘⁄](?=\d)){RUN})*"
    rf"|[{SINGLE}]|[{KATAKANA}]+|[{PICTOGRAPHS}][{MARKS}]*(?:(?<=\u200d)[{PICTOGRAPHS}][{MARKS}]*)*"
)


def analyze(text: str) -> list[str]:
    """The terms of a text, as Lucene's English analyzer finds them: Unicode words, each a `term` or dropped.

    analyze("The boys' 3.5\" Women's shoes") == ["boi", "3.5", "women", "shoe"]
    """
    return [found for word in WORD.findall(text) if (found := term(word))]


@lru_cache(maxsize=1 << 17)
def term(word: str) -> str:
    """The stem of a word without possessive s; "" for stop words and bare underscores."""
    word = re.sub(r"['’＇][sS]$", "", word).lower()
    return stem(word) if word not in STOP_WORDS and word.strip("_") else ""


SUFFIX_STEPS = [  # suffixes and what replaces them; how many vowel-consonant changes the rest must exceed
    (
        "ational>ate tional>tion enci>ence anci>ance izer>ize bli>ble alli>al entli>ent eli>e ousli>ous ization>ize "
        "ation>ate ator>ate alism>al iveness>ive fulness>ful ousness>ous aliti>al iviti>ive biliti>ble logi>log",
        0,
    ),
    ("icate>ic ative> alize>al iciti>ic ical>ic ful> ness>", 0),
    ("al> ance> ence> er> ic> able> ible> ant> ement> ment> ent> sion>s tion>t ou> ism> ate> iti> ous> ive> ize>", 1),
]


def letter_kinds(word: str) -> str:
    """`v` for each vowel and `c` for each consonant: letter_kinds("syzygy") == "cvcvcv"."""
    kinds = ""
    for letter in word:
        kinds += "v" if letter in "aeiou" or (letter == "y" and kinds[-1:] == "c") else "c"
    return kinds


def stem(word: str) -> str:
    """Porter's stemmer with his two later changes (https://tartarus.org/martin/PorterStemmer/)."""

    def changes(rest: str) -> int:
        return letter_kinds(rest).count("vc")

    def is_short(rest: str) -> bool:
        return changes(rest) == 1 and letter_kinds(rest).endswith("cvc") and rest[-1] not in "wxy"

    if len(word) < 3:
        return word
    if word.endswith(("sses", "ies")):
        word = word[:-2]
    elif word.endswith("s") and not word.endswith("ss"):
        word = word[:-1]
    if word.endswith("eed"):
        word = word[:-1] if changes(word[:-3]) else word
    elif word.endswith(("ed", "ing")) and "v" in letter_kinds(rest := word[: -2 if word[-1] == "d" else -3]):
        if rest.endswith(("at", "bl", "iz")) or is_short(rest):
            word = rest + "e"
        else:
            is_double = rest[-2:-1] == rest[-1] and letter_kinds(rest)[-1] == "c" and rest[-1] not in "lsz"
            word = rest[:-1] if is_double else rest
    if word.endswith("y") and "v" in letter_kinds(word[:-1]):
        word = word[:-1] + "i"
    for pairs, least in SUFFIX_STEPS:
        for suffix, replacement in (pair.split(">") for pair in pairs.split()):
            if word.endswith(suffix):
                rest = word.removesuffix(suffix)
                # The s or t before "ion" stays and counts; otherwise what is put in its place does not count.
                kept = rest + replacement * (suffix in ("sion", "tion"))
                word = rest + replacement if changes(kept) > least else word
                break
    if word.endswith("e") and changes(word[:-1]) > is_short(word[:-1]):
        word = word[:-1]
    return word[:-1] if word.endswith("ll") and changes(word) > 1 else word


class Index:
    """BM25 over texts, as Lucene 8 scores them. A posting is one element of two arrays.

    Texts are numbered in the order of their ids, so that equal scores rank by ascending id.
    """

    def __init__(self, texts: Iterable[str]):
        self.terms: dict[str, int] = {}
        lengths, found = [], []
        for text in texts:
            terms = analyze(text)
            lengths.append(len(terms))
            found.append(np.array([self.terms.setdefault(term, len(self.terms)) for term in terms], dtype=np.int64))
        num, total = len(lengths), sum(lengths)
        keys = np.concatenate([np.zeros(0, np.int64), *found]) * num + np.repeat(np.arange(num), lengths)
        keys, counts = np.unique(keys, return_counts=True)  # one key per (term, text), sorted
        terms, self.texts = keys // max(num, 1), (keys % max(num, 1)).astype(np.int32)
        self.starts = np.searchsorted(terms, np.arange(len(self.terms) + 1))
        df = np.diff(self.starts)
        self.idf = np.log(1 + (num - df + 0.5) / (df + 0.5)).astype(np.float32)
        length = np.array(
            lengths, dtype=np.int64
        )  # lengths are kept in a byte: from 24 on only four leading bits count
        shift = np.maximum(np.frexp(np.maximum(length - 24, 0))[1] - 4, 0)
        length = np.where(length < 24, length, 24 + (np.maximum(length - 24, 0) >> shift << shift)).astype(np.float32)
        one, k1, b = np.float32(1), np.float32(K1), np.float32(B)
        inverse = one / (k1 * ((one - b) + b * length / np.float32(total / num if total else 1)))
        self.saturation = one + counts.astype(np.float32) * inverse[self.texts]
        self.num_texts = num

    def search(self, query: str, limit: int = MOST_RESULTS) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and scores of the best texts, best first."""
        scores = np.zeros(self.num_texts)
        for term, count in Counter(analyze(query)).items():
            if (i := self.terms.get(term)) is not None:
                where = slice(self.starts[i], self.starts[i + 1])
                weight = np.float32(count) * self.idf[i]
                scores[self.texts[where]] += weight - weight / self.saturation[where]
        scores = scores.astype(np.float32)
        hits = np.flatnonzero(scores)
        if len(hits) > limit:
            hits = hits[scores[hits] >= np.partition(scores[hits], -limit)[-limit]]
        hits = hits[np.argsort(-scores[hits], kind="stable")][:limit]
        return hits, scores[hits]


# --------------------------------------------------------------------------------------------- reward

COLORS = (  # noqa: SIM905
    "alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown burgundy camel "
    "camo caramel champagne charcoal cheetah chestnut chocolate christmas coffee cognac copper coral cranberry "
    "cream crystal dark denim eggplant elephant espresso fuchsia gold granite grape graphite grass gray green grey "
    "heather indigo ivory ivy khaki lavender lemon leopard light lilac lime magenta maroon mauve merlot midnight "
    "mint mocha multicolor mushroom mustard natural navy nude olive orange peach pewter pink plum purple rainbow "
    "red rose royal rust sand sapphire seashell silver skull slate steel stone stonewash sunflower tan taupe teal "
    "tiger turquoise violet walnut wheat white wine yellow"
).split()
NO_NOUNS = (  # noqa: SIM905
    "a about after all also an and any are as at be but by can could do each else ever every extra for from had has "
    "have her his how if in into is it its just more most much my nor not of off on only onto or other our out over "
    "own per so some such than that the their them then there these they this those to too under until up upon us "
    "very via was we were what when where which while who will with within without would you your"
).split()


@lru_cache(maxsize=1 << 16)
def nouns(title: str) -> list[str]:
    """The nouns of a title. The original asks a tagger model; this stand-in takes every word that is no stop word.

    Set `webshop.nouns` to another function of this form to use a tagger.
    """
    words = [word.lower() for word in re.findall(r"[^\W\d_][^\W_]*", title)]
    return [word for word in words if len(word) >= 2 and word not in NO_NOUNS]


@lru_cache(maxsize=1 << 17)
def token_set(text: str) -> tuple[frozenset[str], str, Counter]:
    """The set of words of a text, the same as sorted text, and its letters."""
    tokens = frozenset(re.sub(r"\W", " ", re.sub(r"[\x80-\xff]", "", text)).lower().split())
    ordered = " ".join(sorted(tokens))
    return tokens, ordered, Counter(ordered)


def token_set_ratio(a: str, b: str) -> int:
    """How alike two texts are, 0 to 100, whatever the order and number of their words (thefuzz's rule).

    token_set_ratio("blue shirt", "a shirt, light blue") == 100
    """
    (tokens_a, ordered_a, _), (tokens_b, ordered_b, _) = token_set(a), token_set(b)
    if not tokens_a or not tokens_b:
        return 0
    if tokens_a <= tokens_b or tokens_b <= tokens_a:
        return 100
    pairs = [(ordered_a, ordered_b)]
    if shared := tokens_a & tokens_b:
        common = " ".join(sorted(shared))
        longer = [" ".join([common, *sorted(tokens - shared)]) for tokens in (tokens_a, tokens_b)]
        pairs = [(common, longer[0]), (common, longer[1]), (longer[0], longer[1])]
    return max(round(100 * SequenceMatcher(None, *pair).ratio()) for pair in pairs)


@lru_cache(maxsize=1 << 17)
def is_close(a: str, b: str) -> bool:
    """Whether token_set_ratio is above 85; if no word is common, the number of common letters may tell at once."""
    (tokens_a, ordered_a, letters_a), (tokens_b, ordered_b, letters_b) = token_set(a), token_set(b)
    least = 0.85 * (len(ordered_a) + len(ordered_b)) / 2
    if tokens_a.isdisjoint(tokens_b) and (
        min(len(ordered_a), len(ordered_b)) < least or (letters_a & letters_b).total() < least
    ):
        return False
    return token_set_ratio(a, b) > 85


@lru_cache(maxsize=1 << 17)
def plain_option(option: str | tuple[str, str]) -> str:
    """The first known colour that is in the option, or the option as text.

    For a (name, value) pair "in" means being one of the two, a quirk by which "black1901" cannot match itself:
    plain_option("black1901") == "black" but plain_option(("color", "black1901")) == "('color', 'black1901')"
    """
    return next((color for color in COLORS if color in option), str(option))


def plain_goal_options(goal: Goal) -> list[str]:
    options = goal.options
    return [plain_option(option) for option in (options.items() if isinstance(options, dict) else options)]


def type_score(product: Product, goal: Product) -> dict[str, Any]:
    """Whether two products are of the same kind, by query, category path and the nouns of their titles."""
    query_match = product.query == goal.query
    paths = [{part.strip() for part in p.product_category.split("›")} for p in (product, goal)]
    category_match = len(paths[0] & paths[1]) >= 2
    wanted = nouns(goal.title)
    title_score = len(set(nouns(product.title)) & set(wanted)) / len(wanted) if wanted else 0.2
    r_type = 1.0 if query_match or category_match or title_score > 0.2 else 0.5
    r_type = 0.0 if title_score == 0 else 0.1 if title_score < 0.1 else r_type
    return dict(r_type=r_type, query_match=query_match, category_match=category_match, title_score=title_score)


@lru_cache(maxsize=1 << 12)
def count_attributes(product: Product, attributes: tuple[str, ...]) -> int:
    """How many of the attributes the product has, by its attributes or in its texts."""
    texts = [product.title.lower(), " ".join(product.bullets).lower(), product.description.lower()]

    def has(attribute: str) -> bool:
        if any(attribute in text for text in texts):
            return True
        return any(is_close(own, attribute) for own in product.attributes)

    return sum(map(has, attributes))


def count_options(values: Iterable[str], wanted: Iterable[str]) -> int:
    """How many of the `wanted` options, plain ones, some chosen value is close to."""
    chosen = [plain_option(value) for value in values]
    return sum(any(is_close(value, option) for value in chosen) for option in wanted)


def score(product: Product, goal: Goal, price: float, options: dict[str, str]) -> dict[str, Any]:
    """The reward of buying a product with these options, and all its parts; 1.0 wins."""
    num_attributes, num_options = len(goal.attributes), len(goal.options)
    attributes = count_attributes(product, goal.attributes)
    matched = count_options(options.values(), plain_goal_options(goal))
    r_price, total = price <= goal.price_upper, num_attributes + num_options + 1
    parts = type_score(product, goal.product)
    parts |= dict(num_attr_matches=attributes, num_option_matches=matched, r_price=r_price, w_price=1 / total)
    parts |= dict(r_att=attributes / max(num_attributes, 1), w_att=num_attributes / total)
    if num_options:
        parts |= dict(r_option=matched / num_options, w_option=num_options / total)
    return parts | dict(reward=parts["r_type"] * (attributes + matched + r_price) / total)


# ------------------------------------------------------------------------------------------- the shop


class Shop:
    """A catalogue with its index, the prices of one visit to the market, and all goals in one shuffled order.

    Everything random follows from `seed`, drawn in the original's order: prices, price bounds, then, starting anew, the
    shuffle; `rng` is left where the original goes on drawing names of visits and goals.
    """

    def __init__(self, products: list[Product], instructions: Iterable[Instruction], seed: int):
        self.products, rng = products, random.Random(seed)
        self.prices = {p.asin: p.prices[0] if len(p.prices) == 1 else rng.uniform(*p.prices) for p in products}
        self.goals = make_goals(instructions, self.prices, rng)
        self.rng = random.Random(seed)
        self.rng.shuffle(self.goals)
        self.ranked = sorted(products, key=lambda product: product.asin)
        self.index = Index(product.document for product in self.ranked)
        self.search = lru_cache(maxsize=1024)(self.find)
        self.held: dict[str, set[int]] = {}

    def find(self, query: str) -> list[Product]:
        """The products that a search lists. `<c> category` and `<q> phrase` list all of a kind, in catalogue order."""
        first, _, rest = query.partition(" ")
        if first == "<c>":
            return [p for p in self.products if p.category == rest.split(" ")[0].strip()]
        if first == "<q>":
            return [p for p in self.products if p.query == rest.strip()]
        return [self.ranked[i] for i in self.index.search(query)[0]]

    def draw_goal(self, rng: random.Random) -> Goal:
        """The original's weighted draw: one too high, so the first goal never comes and the last has double mass."""
        mass = list(itertools.accumulate((goal.weight for goal in self.goals), initial=0))
        return self.goals[min(bisect_right(mass, rng.uniform(0, mass[-1])), len(self.goals) - 1)]

    @cached_property
    def ways(self) -> list[tuple[Product, list[str]] | None]:
        """For each goal, a product and the option values that win it; None where nothing does."""
        return [self.way_to_win(goal) for goal in self.goals]

    def way_to_win(self, goal: Goal) -> tuple[Product, list[str]] | None:
        """What to buy for the full reward: the asked product as asked if that wins, else whatever does."""
        target, wanted = goal.product, plain_goal_options(goal)
        others = ((product, None) for product in self.holding(target, wanted))
        for product, among in itertools.chain([(target, goal.values), (target, None)], others):
            if self.prices[product.asin] > goal.price_upper or type_score(product, target)["r_type"] < 1:
                continue
            if count_attributes(product, goal.attributes) == len(goal.attributes):
                values = covering_values(product, wanted, among)
                if values is not None:
                    return product, values
        return None

    def holding(self, target: Product, wanted: Sequence[str]) -> Iterator[Product]:
        """The products that have a value for each wanted option which the target has none for, if there is such one."""
        rare = [option for option in wanted if not any(is_close(plain_option(v), option) for v in target.choices)]
        held = [self.holders(option) for option in rare or wanted]
        yield from (self.products[i] for i in (sorted(set.intersection(*held)) if held else range(len(self.products))))

    def holders(self, option: str) -> set[int]:
        """The products that have a value close to a plain option."""
        if option not in self.held:
            close = [products for value, products in self.by_value.items() if is_close(value, option)]
            self.held[option] = set().union(*close)
        return self.held[option]

    @cached_property
    def by_value(self) -> dict[str, set[int]]:
        """For each plain option value, the products that have it."""
        products: dict[str, set[int]] = {}
        for i, product in enumerate(self.products):
            for value in product.choices:
                products.setdefault(plain_option(value), set()).add(i)
        return products


def covering_values(product: Product, wanted: Sequence[str], among: Sequence[str] | None) -> list[str] | None:
    """Values, at most one per option name, that together match all `wanted` options; None if none (`among` these) do."""
    ways: dict[int, list[str]] = {0: []}  # set of options matched, as bits -> values that do it
    for name in product.options:
        longer = dict(ways)
        for value in product.choices:
            if product.choices[value] == name and (among is None or value in among):
                matched = sum(1 << i for i, option in enumerate(wanted) if is_close(plain_option(value), option))
                for bits, values in ways.items():
                    longer.setdefault(bits | matched, [*values, value])
        ways = longer
    return ways.get((1 << len(wanted)) - 1)


@lru_cache(maxsize=4)
def open_shop(data: str | None, num_products: int | None, human_goals: bool, seed: int) -> Shop:
    """The shop over the files in folder `data`, or over a generated catalogue."""
    if data is None:
        records, notes = generate_catalogue(num_products or GENERATED_PRODUCTS, seed)
        return Shop(*read_catalogue(records, notes, None, ("generated", "generated")), seed)
    folder = Path(data)
    check(folder.is_dir(), f"--data {data}", "there is no such folder")
    is_small = any(folder.glob("items_*_1000.json"))  # a folder may hold both sets; LaMer plays the small one
    names = [f"items_{name}{'_1000' if is_small else ''}.json" for name in ("shuffle", "ins_v2")]
    paths = [folder / name for name in (*names, "items_human_ins.json")]
    records, notes = read_json(paths[0], list)[:num_products], read_json(paths[1], dict)
    human = read_json(paths[2], dict) if human_goals else None
    return Shop(*read_catalogue(records, notes, human, [str(path) for path in paths]), seed)


GENERATED_PRODUCTS = 300
KINDS = {  # category: queries; attributes; options. A product has one query and some of the others
    "fashion": "shirts jackets socks boots; machine wash, slim fit, long lasting, quick dry, soft lining; color size",
    "garden": "lamps rugs stools shelves; easy assembly, solid wood, heavy duty, water proof, non slip; color style",
    "electronics": "cables speakers chargers; fast charging, hands free, high speed, dust proof, non slip; color length",
    "beauty": "soaps creams brushes; sensitive skin, natural oils, travel size, long lasting, paraben free; scent pack",
    "grocery": "teas snacks cereals; gluten free, low sugar, plant based, whole grain, fair trade; flavor pack",
}
OPTION_VALUES = {
    "color": "black blue green grey pink red white yellow",
    "size": "small medium large",
    "style": "round square tall",
    "length": "short middle long",
    "scent": "honey lemon mint rose",
    "flavor": "cocoa ginger honey plum",
    "pack": "single double family",
}
BRANDS = ("Abero", "Belu", "Cando", "Dorin", "Elvo", "Fenra", "Galto", "Hindo", "Ibex", "Jarno", "Kelvi", "Lumo")


def generate_catalogue(num_products: int, seed: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A catalogue in the genuine format: the contents of items_shuffle.json and items_ins_v2.json.

    Products of a kind share attributes, so search words narrow the choice, and options and price decide. Some colours
    carry a number, like "black1901" in the genuine files, and cannot be matched.
    """
    check(num_products <= 60_000, f"--products {num_products}", "a generated catalogue has at most 60000 products")
    rng, letters = random.Random(derive_seed("webshop catalogue", seed)), string.ascii_uppercase
    records, notes = [], {}
    for code in rng.sample(range(26 * 26 * 100), num_products):
        asin = f"{letters[code // 2600]}{letters[code // 100 % 26]}{code % 100:02d}"
        category = rng.choice(list(KINDS))
        queries, attributes, names = KINDS[category].split("; ")
        query, has = rng.choice(queries.split()), rng.sample(attributes.split(", "), 3)
        options = {}
        for name in rng.sample(names.split(), rng.choice([1, 2, 2, 2])):
            values = rng.sample(OPTION_VALUES[name].split(), rng.choice([2, 2, 3]))
            if name == "color" and rng.random() < 0.1:
                values[0] += str(rng.randrange(10, 100))
            options[name] = [{"value": value} for value in values]
        low, spread = rng.randrange(6, 90), rng.randrange(1, 12)
        record = dict(asin=asin, name=f"{rng.choice(BRANDS)} {has[0]} {query}", query=query, category=category)
        record |= dict(full_description=f"These {query} stand for {has[1]}.", customization_options=options)
        record |= dict(small_description=[f"Made for {has[2]}.", f"Sold by the maker of {query}."], images=["none"])
        record |= dict(pricing=f"${low}.00 to ${low + spread}.00" if rng.random() < 0.2 else f"${low}.00")
        records.append(record | dict(product_category=f"Generated › {category} › {query}"))
        asked = sorted(rng.sample(has, 2))
        notes[asin] = dict(attributes=has, instruction_attributes=asked)
        notes[asin]["instruction"] = f"Find me {', '.join(asked)} {query}"
    return records, notes


# -------------------------------------------------------------------------------------------- one visit


DONE_PAGE = (
    "Thank you for shopping with us! [SEP] Your code: [SEP] None [SEP] (Paste it in your MTurk interface.) [SEP] "
    "Purchased [SEP] asin [SEP] {asin} [SEP] options [SEP] {options} [SEP] attrs [SEP] None [SEP] category [SEP] None "
    "[SEP] query [SEP] None [SEP] product category [SEP] None [SEP] Target [SEP] asin [SEP] options [SEP] attrs [SEP] "
    "price upper [SEP] instuction text [SEP] category [SEP] product category [SEP] query [SEP] Goal [SEP] None [SEP] "
    "Reward [SEP] Your score (min 0.0, max 1.0) [SEP] {reward} [SEP] Reward Details [SEP] None"
)


class Session:
    """One visit to the shop with a goal: the page shown, what can be clicked there, and the purchase that ends it.

    `page` is "search", "results", "item", one of SUB_PAGES, or "done"; `score` holds the reward and its parts.
    """

    def __init__(self, shop: Shop, goal: Goal, page_size: int = 10):
        self.shop, self.goal, self.page_size = shop, goal, page_size
        self.rng = random.Random(derive_seed("webshop visit", goal.text))  # for `<r>`, the only draw within a visit
        self.score: dict[str, Any] = {"reward": 0.0}
        self.go_home()

    def go_home(self) -> None:
        self.page, self.number, self.product = "search", 0, None
        self.words: list[str] | None = None
        self.results: list[Product] = []
        self.options: dict[str, str] = {}

    def open_results(self, number: int) -> None:
        self.page, self.number, self.product, self.options = "results", number, None, {}
        if self.words[0] == "<r>":  # drawn again at every page turn
            self.results = self.rng.sample(self.shop.products, min(MOST_RESULTS, len(self.shop.products)))
        else:
            self.results = self.shop.search(" ".join(self.words))

    @property
    def listed(self) -> list[Product]:
        """The products on the present page of results."""
        return self.results[(self.number - 1) * self.page_size : self.number * self.page_size]

    @property
    def clickables(self) -> list[str]:
        """What can be clicked, in the order of the page."""
        if self.page == "search":
            return ["search"]
        if self.page == "results":
            back = ["< prev"] if self.number > 1 else []
            return ["back to search", *back, "next >", *(product.asin.lower() for product in self.listed)]
        if self.page == "item":
            return [*BUTTONS, *self.product.choices]
        return ["back to search", "< prev"] if self.page in SUB_PAGES else []

    def act(self, action: str) -> None:
        """Play `search[words]`, good on every page, or `click[text]`; anything else changes nothing."""
        match = re.match(r"(.+)\[(.+)\]", action)
        verb, argument = (match[1], match[2].lower()) if match else (action, "")
        if self.page == "done" or not match:
            return
        if verb == "search":
            self.go_home()
            self.words = argument.split(" ")
            self.open_results(1)
        elif verb == "click" and argument != "search" and argument in self.clickables:
            self.click(argument)

    def click(self, text: str) -> None:
        if text == "back to search":
            self.go_home()
        elif text == "next >":
            self.open_results(self.number + 1)
        elif text == "< prev" and self.page in SUB_PAGES:
            self.page = "item"
        elif text == "< prev":
            self.open_results(self.number - (self.page == "results"))
        elif self.page == "results":
            self.page, self.product = "item", next(p for p in self.listed if p.asin.lower() == text)
        elif text in SUB_PAGES:
            self.page = text
        elif text == "buy now":
            self.page = "done"
            self.score = score(self.product, self.goal, self.shop.prices[self.product.asin], self.options)
        else:
            self.options[self.product.choices[text]] = text

    def text(self) -> str:
        """The page as the original shows it: segments joined by [SEP]."""
        head = ["Instruction:", self.goal.text, "Back to Search"]
        if self.page == "search":
            segments = ["WebShop", *head[:2], "Search"]
        elif self.page == "results":
            segments = [*head, f"Page {self.number} (Total results: {len(self.results)})"]
            segments += [*["< Prev"] * (self.number > 1), "Next >"]
            segments += [text for product in self.listed for text in (product.asin, product.title, product.tag)]
        elif self.page == "item":
            segments = [*head, "< Prev"]
            segments += [text for name, values in self.product.options.items() for text in (name, *values)]
            segments += [self.product.title, f"Price: {self.product.tag}", "Rating: N.A."]
            segments += ["Description", "Features", "Reviews", "Buy Now"]
        elif self.page == "done":
            options = json.dumps(self.options, sort_keys=True)
            return DONE_PAGE.format(asin=self.product.asin, options=options, reward=self.score["reward"])
        else:
            bullets = [f" {bullet}" for bullet in self.product.bullets]
            body = {"description": [self.product.description], "features": bullets, "reviews": []}[self.page]
            segments = [*head, "< Prev", *body]
        # Lost on the way through HTML: empty texts, and white space that has a line break in it.
        return " [SEP] ".join(s.strip() for s in segments if s and not (s.isspace() and "\n" in s))

    def short_text(self) -> str:
        """The page and the whole state of the visit in few words, without buttons, for the tiny policy."""
        lines = [self.goal.text]
        if self.page == "search":
            lines += ["search page"]
        elif self.page == "results":
            lines += [f"page {self.number}", *map(one_line, self.listed)]
        elif self.page == "done":
            chosen = " ".join(f"[{value}]" for value in self.options.values())
            lines += [f"bought [{self.product.asin.lower()}] {chosen}", f"score {self.score['reward']:.2f}"]
            lines += ["listed " + " ".join(f"[{p.asin.lower()}]" for p in self.listed)]
        else:
            lines += [one_line(self.product)]
            lines += [f"{name}: {' '.join(values)}" for name, values in self.product.options.items()]
            lines += ["chosen " + " ".join(f"[{value}]" for value in self.options.values())] if self.options else []
            if self.page in SUB_PAGES:
                lines += [self.text().split(" [SEP] < Prev")[1].replace(" [SEP] ", " ").strip()]
        return "\n".join(lines)


def one_line(product: Product) -> str:
    """A product in a short list; long titles are cut."""
    return f"[{product.asin.lower()}] {' '.join(product.title.split()[:12])} {product.tag}"


def format_page(text: str, task: str) -> str:
    """The page as LaMer's prompts show it: the segments after the task, quoted; a page without the task as it is."""
    segments = text.split(" [SEP] ")
    if task not in segments:
        return text
    return " [SEP] ".join(f"'{segment}'" for segment in segments[segments.index(task) + 1 :])


# ------------------------------------------------------------------------------------------ the episode


class WebShop(Env):
    """Buy what the instruction asks for within `turns` actions: 10 for a purchase of the full reward, else 0.

    `info["task_score"]` is the original's reward, which also pays for a purchase that is right in part. `compact` pages
    hold three products and are short (default: with the generated catalogue). Seeds from 2^31 on are the validation
    goals, in turn.
    """

    name = "webshop"
    warm_skill = 0.3
    reply_format = "Think step by step about what brings you closer to the right purchase, then give one action inside "
    reply_format += "<action> </action>."

    def __init__(
        self,
        data: str | None = None,
        products: int | None = None,
        human_goals: bool = False,
        turns: int = 12,
        compact: bool | None = None,
        shop_seed: int = 0,
        original: bool = False,
    ):
        if turns < 1:
            raise ValueError(f"webshop needs at least one turn, got --turns {turns}")
        if products is not None and products < 1:
            raise ValueError(f"webshop needs at least one product, got --products {products}")
        if human_goals and data is None:
            raise ValueError("--human_goals needs --data, a folder with items_human_ins.json")
        self.shop = open_shop(data, products, human_goals, shop_seed)
        self.turn_limit, self.original = turns, original
        self.compact = self.is_markov = data is None if compact is None else compact
        self.page_size = 3 if self.compact else 10
        self.validation, self.training = split_goals(self.shop, original)
        self.seed: int | None = None
        self.rng = random.Random()
        self.rng.setstate(self.shop.rng.getstate())
        if original:
            self.visit_anew()  # the original's constructor makes a visit of its own

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        if not (self.original and seed == self.seed):  # the original restarts with the goal that it happens to have
            part = self.validation if seed >= VALIDATION_SEED else self.training
            number = seed - VALIDATION_SEED if seed >= VALIDATION_SEED else derive_seed("webshop", seed)
            self.number = part[number % len(part)]
            self.goal, self.way = self.shop.goals[self.number], None if self.original else self.shop.ways[self.number]
            self.task = self.goal.text
        self.seed = seed
        return self.start()

    def start(self) -> tuple[str, dict[str, Any]]:
        """Begin an episode with the present goal."""
        self.visit = Session(self.shop, self.goal, self.page_size)
        self.turns, self.done = 0, False
        return (self.text() if self.compact else f"{self.task}\n{self.text()}"), {"won": False, "task_score": 0.0}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self.done and not self.original:
            return self.text(), 0.0, True, False, {"won": self.won, "task_score": self.visit.score["reward"]}
        self.turns += 1
        self.visit.act(action)
        text, task_score = self.text(), self.visit.score["reward"]
        self.done, self.won = self.visit.page == "done", task_score == 1
        if self.done and self.original:
            self.visit_anew()
        truncated = not self.done and self.turns >= self.turn_limit
        return text, 10.0 * self.won, self.done, truncated, {"won": self.won, "task_score": task_score}

    def visit_anew(self) -> None:
        """What the original does after every purchase: another visit, with another goal."""
        self.visit_name = "".join(self.rng.choices(string.ascii_lowercase, k=10))
        self.goal = self.shop.draw_goal(self.rng)
        self.visit = Session(self.shop, self.goal, self.page_size)

    def text(self) -> str:
        return self.visit.short_text() if self.compact else format_page(self.visit.text(), self.task)

    def shorten(self, observation: str, num_segments: int = 15) -> str:
        """How a history shows an observation that is not its last."""
        segments = observation.split(" [SEP] ")
        rest = len(segments) - num_segments
        return " [SEP] ".join(segments[:num_segments]) + (f" ... ({rest} more)" if rest > 0 else "")

    def rules(self, style: str = "full") -> str:
        if style == "compact":
            return ""
        return (
            "You are shopping in WebShop, an online shop of text pages. The task says what to buy: a kind of product, "
            "properties it must have, often options such as a colour or a size, and often a highest price.\n"
            "`search[words]` lists matching products, ten a page; `click[text]` presses a button, opens the product "
            "with that number, or chooses an option. Choose every option the task asks for before `click[buy now]`: "
            "the page does not show what was chosen, and leaving the product's page loses it. An action that the page "
            "does not offer does nothing but costs a turn.\n"
            f"You have {self.turn_limit} turns. Buying ends the episode; the task is solved only if product, options "
            "and price are all right. The shop and the task are the same in every episode."
        )

    def parse(self, reply: str) -> tuple[str, bool]:
        text = between(reply, "<action>", "</action>")
        return (reply[-20:] if text is None else text).lower().strip(), text is not None

    def actions(self) -> list[str]:
        clicks = [f"click[{text}]" for text in self.visit.clickables]
        if self.visit.page == "search":
            return ["search[<your query>]", *(clicks if self.original else [])]
        return clicks

    def anchor(self) -> str | None:
        if self.original:
            return None
        visit = self.visit  # the pages alone do not tell which options are chosen
        asin = visit.product.asin if visit.product else ""
        return json.dumps([visit.page, visit.words, visit.number, asin, sorted(visit.options.items())])

    def scripted(self, skill: float, rng: random.Random, memory: Sequence[str] = ()) -> str:
        action = (
            self.expert() if rng.random() < skill else self.novice(rng, memory[-1] if memory else "", " ".join(memory))
        )
        return f"<action>{action}</action>"

    def expert(self) -> str:
        """The next action on the way to a winning purchase, which the expert knows."""
        visit = self.visit
        product, values = self.way or (self.goal.product, self.goal.values)
        if visit.page in SUB_PAGES:
            return "click[< prev]"
        if visit.page == "item" and visit.product is product:
            left = [value for value in values if value not in visit.options.values()]
            return f"click[{left[0]}]" if left else "click[buy now]"
        if visit.page == "results" and product in visit.listed:
            return f"click[{product.asin.lower()}]"
        if visit.page == "results" and product in visit.results[visit.number * visit.page_size :]:
            return "click[next >]"
        if visit.page == "search":
            asked = " ".join([*self.goal.attributes, self.goal.product.query, *self.goal.values])
            queries = [re.sub(r"[\[\]\n]", " ", query) for query in (asked, product.title, product.document)]
            pages = [[p is product for p in self.shop.search(query.lower())] for query in queries]
            pages = [found.index(True) // visit.page_size if True in found else MOST_RESULTS for found in pages]
            return f"search[{queries[pages.index(min(pages))]}]"
        return "click[back to search]"

    def novice(self, rng: random.Random, last_note: str, notes: str) -> str:
        """A naive shopper: searches for words of the task, opens some product, chooses options, mostly those asked for.

        Most of the time it follows its notes: "not [a], try [b] with [c]" keeps it from a, sends it to b, and makes it
        choose c.
        """
        visit, follows = self.visit, rng.random() < 0.8
        avoided = set(re.findall(r"not \[([^\]]*)\]", notes)) if follows else set()
        advised = re.findall(r"\[([^\]]*)\]", last_note.partition("try ")[2]) if follows else []
        if rng.random() < 0.05:
            return rng.choice(self.actions()).replace("<your query>", self.goal.product.query)
        if visit.page == "search":
            words = [a for a in self.goal.attributes if rng.random() < 0.8] + [self.goal.product.query]
            return f"search[{' '.join(words + self.goal.values * (rng.random() < 0.5))}]"
        if visit.page == "results":
            found = [product.asin.lower() for product in visit.listed]
            found = [a for a in found if a in advised] or [a for a in found if a not in avoided]
            return f"click[{rng.choice(found)}]" if found else "click[next >]"
        if visit.page != "item" or visit.product.asin.lower() in avoided:
            return "click[< prev]"
        for name in visit.product.options:
            values = [value for value, owner in visit.product.choices.items() if owner == name]
            if values and name not in visit.options:
                asked = [v for v in values if v in advised] or [v for v in values if v in self.goal.values]
                return f"click[{rng.choice(asked if asked and rng.random() < 0.8 else values)}]"
        return "click[buy now]"

    def scripted_reflection(self, rng: random.Random) -> str:
        """States the product bought and what to try: the same with the options missed, else the next one listed."""
        visit, note = self.visit, "nothing"
        listed = [product.asin.lower() for product in visit.listed]
        if visit.product is not None:
            asin, choices = visit.product.asin.lower(), visit.product.choices
            missed = [v for v in self.goal.values if v in choices and v not in visit.options.values()]
            note = f"try [{asin}]" + (" with " + " ".join(f"[{value}]" for value in missed)) * bool(missed)
            if visit.page == "done" and not missed:
                after = listed[(listed.index(asin) + 1) % len(listed)] if asin in listed else ""
                note = f"not [{asin}], try [{after}]" if after else f"not [{asin}]"
        elif listed:
            note = f"try [{listed[0]}]"
        return f"<remark>{note if rng.random() < 0.8 else 'nothing'}</remark>"


def split_goals(shop: Shop, original: bool) -> tuple[Sequence[int], Sequence[int]]:
    """Numbers of the validation and the training goals: disjoint, the first 500 (at most a fifth) and the rest."""
    numbers = [i for i in range(len(shop.goals)) if original or shop.ways[i] is not None]
    if len(numbers) < 2:
        raise ValueError(f"only {len(numbers)} of {len(shop.goals)} goals of this catalogue can be won; two are needed")
    num = min(MOST_VALIDATION_GOALS, max(len(numbers) // 5, 1))
    return numbers[:num], numbers[num:]

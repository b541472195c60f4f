"""WebShop: buy what an instruction asks for, in a shop of text pages (Yao et al., 2022), as in LaMer's experiments.

    python train.py --env webshop                              a generated catalogue, short pages for the tiny policy
    python train.py --env webshop --data DIR                   items_shuffle_1000.json and items_ins_v2_1000.json in DIR
    python train.py --env webshop --data DIR --human_goals     the instructions people wrote, items_human_ins.json

A `Session`, one visit to a `Shop`, follows the original to the letter (facts/webshop.md), and so do prices, goals,
ranking and reward. `WebShop` is LaMer's episode around it. It differs where the original defeats its purpose:
validation goals are held out; every episode of a trial has the same goal, also after a wrong purchase; goals that
cannot be won are left out, and so is `click[search]`, which does nothing. `original=True` restores the last three.
"""

import itertools
import json
import random
import re
import string
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
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


@dataclass(slots=True, eq=False)
class Product:
    """A product after loading. `tag` is its price as pages show it, `choices` maps values to their option's name."""

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
    tag: str = ""
    path: frozenset[str] = frozenset()
    choices: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path = frozenset(part.strip() for part in self.product_category.split("›"))
        self.tag = " to ".join(f"${price}" for price in self.prices)
        # A value under two names is listed once and sets the later one; a value that reads like a button is the button.
        pairs = [(value, name) for name, values in self.options.items() for value in values]
        self.choices = {value: name for value, name in pairs if value not in BUTTONS}

    @property
    def document(self) -> str:
        """The text that is searched."""
        options = ", and ".join(f"{name}: {', '.join(values)}" for name, values in self.options.items())
        return " ".join([self.title, self.description, *(self.bullets[:1] or [""]), options]).lower()


@dataclass(slots=True)
class Goal:
    """What is to be bought. Options are {name: value} in generated goals and a list of values in human ones."""

    product: Product
    text: str
    attributes: tuple[str, ...]
    options: dict[str, str] | list[str]
    price_upper: float
    weight: float = 1.0  # in the original's draw

    @property
    def values(self) -> list[str]:
        return list(self.options.values() if isinstance(self.options, dict) else self.options)

    @property
    def wanted(self) -> list[str]:
        """The options as the reward compares them."""
        return [plain_option(o) for o in (self.options.items() if isinstance(self.options, dict) else self.options)]


Instruction = tuple[Product, str, tuple[str, ...], list[str] | None]  # attributes, and option values or None for all


def check(is_good: bool, place: str, problem: str) -> None:
    """ValueError in one line unless `is_good`."""
    if not is_good:
        raise ValueError(f"{place}: {problem}")


def read_json(path: Path, kind: type) -> Any:
    """The content of a JSON file, a list or a dict; ValueError names file and place."""
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 JSON: {error}".replace("\n", " ")) from None
    check(isinstance(content, kind), str(path), f"must hold a JSON {'list' if kind is list else 'object'}")
    return content


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def read_prices(pricing: Any, place: str) -> list[float]:
    """The first two prices of a text like "$12.99 to $1,015.99"; 100 where there is none."""
    check(isinstance(pricing, str | None), place, f"pricing {pricing!r:.60} is not text")
    if not pricing:
        return [100.0]
    prices = [re.sub(r"[^0-9.]", "", piece) for piece in pricing.split("$")[1:]]
    check(prices and all(re.fullmatch(r"\d+\.?\d*|\.\d+", p) for p in prices), place, f"bad pricing {pricing!r:.60}")
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
    records: Sequence[Any], notes: dict[str, Any], human: dict[str, Any] | None, files: Sequence[Path]
) -> tuple[list[Product], list[Instruction]]:
    """The products and the instructions, those of `notes`, where every product must then be, or those of `human`."""
    products, instructions, seen = [], [], set()
    for i, record in enumerate(records):
        place = f"{files[0]}: product {i}"
        check(isinstance(record, dict) and isinstance(record.get("asin"), str), place, "has no asin")
        asin = record["asin"]
        if asin == "nan" or len(asin) > 10 or asin in seen:
            continue
        seen.add(asin)
        place, source = f"{files[1]}: {asin}", f"{files[0]}: product {i} ({asin})"
        check(asin in notes or human is not None, place, f"is missing, but {files[0]} has it")
        note = notes.get(asin, {})
        check(isinstance(note, dict), place, "is no object")
        attributes = note.get("attributes", ["DUMMY_ATTR"])
        check(is_texts(attributes), place, "attributes is no list of texts")
        products.append(read_product(record, attributes, source))
        entries = [note] * (note.get("instruction") is not None)
        if human is not None:
            place, entries = f"{files[2]}: {asin}", human.get(asin, [])
        check(isinstance(entries, list) and all(isinstance(e, dict) for e in entries), place, "is no list of objects")
        for entry in entries:
            text, asked, values = (entry.get(f"instruction{end}") for end in ("", "_attributes", "_options"))
            check(
                isinstance(text, str) and is_texts(asked), place, "instruction or instruction_attributes is malformed"
            )
            check(human is None or not asked or is_texts(values), place, "instruction_options is no list of texts")
            if human is None:
                instructions.append((products[-1], text, tuple(asked), None))
            elif asked:
                instructions.append((products[-1], text.strip("."), tuple(asked), values))
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
            goals.append(Goal(product, text + suffix, attributes, values, price_upper))
            continue
        names = sorted(product.options)
        for combination in itertools.product(*(product.options[name] for name in names)):
            asked = " with " * bool(names) + ", and ".join(map(": ".join, zip(names, combination, strict=True)))
            options = dict(zip(names, combination, strict=True))
            goals.append(Goal(product, text + asked + suffix, attributes, options, price_upper))
    counts = Counter(attribute for goal in goals for attribute in goal.attributes)
    for goal in goals:
        if isinstance(goal.options, dict):  # people's goals all weigh 1
            goal.weight = sum(1 / counts[a] for a in goal.attributes) / max(len(goal.attributes), 1)
    return goals


# --------------------------------------------------------------------------------------------- search

K1, B, MOST_RESULTS = np.float32(0.9), np.float32(0.4), 50
STOP_WORDS = (  # noqa: SIM905
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they "
    "this to was will with"
).split()
BEYOND_ASCII = [(chr(i), unicodedata.category(chr(i))) for i in range(0x80, 0x10000)]
MARKS = "".join(c for c, kind in BEYOND_ASCII if kind[0] == "M" or (kind == "Cf" and c != "\u200b"))
MARKS += "\uff9e\uff9f"  # with the marks, these two Katakana signs belong to the character before them
NUMERALS = "".join(c for c, kind in BEYOND_ASCII if kind == "No")  # signs like ½ separate words, though in \w
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


SUFFIXES = [  # of three steps: suffix>what replaces it
    "ational>ate tional>tion enci>ence anci>ance izer>ize bli>ble alli>al entli>ent eli>e ousli>ous ization>ize "
    "ation>ate ator>ate alism>al iveness>ive fulness>ful ousness>ous aliti>al iviti>ive biliti>ble logi>log",
    "icate>ic ative> alize>al iciti>ic ical>ic ful> ness>",
    "al> ance> ence> er> ic> able> ible> ant> ement> ment> ent> sion>s tion>t ou> ism> ate> iti> ous> ive> ize>",
]
SUFFIX_STEPS = [[pair.split(">") for pair in step.split()] for step in SUFFIXES]
SHORT = re.compile("c+vc[^wxy]")  # the letter kinds of a short word, and its last letter


def letter_kinds(word: str) -> str:
    """`v` for each vowel and `c` for each consonant: letter_kinds("syzygy") == "cvcvcv"."""
    kinds = ""
    for letter in word:
        kinds += "v" if letter in "aeiou" or (letter == "y" and kinds[-1:] == "c") else "c"
    return kinds


def changes(word: str) -> int:
    """How often a consonant follows a vowel: Porter's measure of a word."""
    return letter_kinds(word).count("vc")


def stem(word: str) -> str:
    """Porter's stemmer with his two later changes (https://tartarus.org/martin/PorterStemmer/)."""
    if len(word) < 3:
        return word
    if word.endswith(("sses", "ies")):
        word = word[:-2]
    elif word.endswith("s") and not word.endswith("ss"):
        word = word[:-1]
    if word.endswith("eed"):
        word = word[:-1] if changes(word[:-3]) else word
    elif word.endswith(("ed", "ing")) and "v" in letter_kinds(rest := word[: -2 if word[-1] == "d" else -3]):
        if rest.endswith(("at", "bl", "iz")) or SHORT.fullmatch(letter_kinds(rest) + rest[-1]):
            word = rest + "e"
        else:
            is_double = rest[-2:-1] == rest[-1] and letter_kinds(rest)[-1] == "c" and rest[-1] not in "lsz"
            word = rest[:-1] if is_double else rest
    if word.endswith("y") and "v" in letter_kinds(word[:-1]):
        word = word[:-1] + "i"
    for step, pairs in enumerate(SUFFIX_STEPS):
        suffix, replacement = next((pair for pair in pairs if word.endswith(pair[0])), ("", ""))
        rest = word.removesuffix(suffix)
        # In the last step more must be left, and the s or t before "ion" counts.
        if suffix and changes(rest + replacement * (step == 2)) > (step == 2):
            word = rest + replacement
    if word.endswith("e") and changes(word[:-1]) > bool(SHORT.fullmatch(letter_kinds(word[:-1]) + word[-2:-1])):
        word = word[:-1]
    return word[:-1] if word.endswith("ll") and changes(word) > 1 else word


class Index:
    """BM25 as in Lucene 8; a posting is one element of two arrays. Texts come by ascending id, as equal scores rank."""

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
        # Lengths are kept in a byte: what is above 24 is cut to its four leading bits.
        above = np.maximum(np.array(lengths, dtype=np.int64) - 24, 0)
        shift = np.maximum(np.frexp(above)[1] - 4, 0)
        length = (np.minimum(lengths, 24) + (above >> shift << shift)).astype(np.float32)
        inverse = 1 / (K1 * ((1 - B) + B * length / np.float32(total / num if total else 1)))
        self.saturation = 1 + counts.astype(np.float32) * inverse[self.texts]
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

    Set `webshop.nouns` to another function of this form, before a shop is opened, to use a tagger.
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
    (tokens_a, *_), (tokens_b, *_) = token_set(a), token_set(b)
    if not tokens_a or not tokens_b:
        return 0
    shared = tokens_a & tokens_b
    texts = [" ".join(sorted(shared) + sorted(rest)) for rest in ((), tokens_a - shared, tokens_b - shared)]
    return max(round(100 * SequenceMatcher(None, x, y).ratio()) for x, y in itertools.combinations(texts, 2))


@lru_cache(maxsize=1 << 17)
def is_close(a: str, b: str) -> bool:
    """Whether token_set_ratio is above 85, which the sets of words, or too few common letters, may tell at once."""
    (tokens_a, ordered_a, letters_a), (tokens_b, ordered_b, letters_b) = token_set(a), token_set(b)
    if tokens_a.isdisjoint(tokens_b):
        least = 0.85 * (len(ordered_a) + len(ordered_b)) / 2
        if min(len(ordered_a), len(ordered_b)) < least or (letters_a & letters_b).total() < least:
            return False
    return bool(tokens_a) and (tokens_a <= tokens_b or tokens_b <= tokens_a or token_set_ratio(a, b) > 85)


@lru_cache(maxsize=1 << 17)
def plain_option(option: str | tuple[str, str]) -> str:
    """The first known colour that is in the option, or the option as text.

    For a (name, value) pair "in" means being one of the two, a quirk by which "black1901" cannot match itself:
    plain_option("black1901") == "black" but plain_option(("color", "black1901")) == "('color', 'black1901')"
    """
    return next((color for color in COLORS if color in option), str(option))


@lru_cache(maxsize=1 << 16)
def type_score(product: Product, goal: Product) -> dict[str, Any]:
    """Whether two products are of the same kind, by query, category path and the nouns of their titles."""
    query_match, category_match = product.query == goal.query, len(product.path & goal.path) >= 2
    wanted = nouns(goal.title)
    title_score = len(set(nouns(product.title)) & set(wanted)) / len(wanted) if wanted else 0.2
    r_type = 1.0 if query_match or category_match or title_score > 0.2 else 0.5
    r_type = 0.0 if title_score == 0 else 0.1 if title_score < 0.1 else r_type
    return dict(r_type=r_type, query_match=query_match, category_match=category_match, title_score=title_score)


@lru_cache(maxsize=1 << 16)
def count_attributes(product: Product, attributes: tuple[str, ...]) -> int:
    """How many of the attributes the product has, by its attributes or in its texts."""
    texts = [product.title.lower(), " ".join(product.bullets).lower(), product.description.lower()]
    return sum(any(a in t for t in texts) or any(is_close(own, a) for own in product.attributes) for a in attributes)


def score(product: Product, goal: Goal, price: float, options: dict[str, str]) -> dict[str, Any]:
    """The reward of buying a product with these options, and all its parts; 1.0 wins."""
    num_attributes, num_options = len(goal.attributes), len(goal.options)
    has = count_attributes(product, goal.attributes)
    chosen = [plain_option(value) for value in options.values()]
    matched = sum(any(is_close(value, option) for value in chosen) for option in goal.wanted)
    r_price, total = price <= goal.price_upper, num_attributes + num_options + 1
    parts = dict(num_attr_matches=has, num_option_matches=matched, r_price=r_price, w_price=1 / total)
    parts |= dict(r_att=has / max(num_attributes, 1), w_att=num_attributes / total)
    if num_options:
        parts |= dict(r_option=matched / num_options, w_option=num_options / total)
    parts |= type_score(product, goal.product)
    return parts | dict(reward=parts["r_type"] * (has + matched + r_price) / total)


# ------------------------------------------------------------------------------------------- the shop


class Shop:
    """A catalogue with its index, this seed's prices, and all goals in one shuffled order.

    Everything random is drawn in the original's order: prices, price bounds, then, starting anew from `seed`, the
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
        values = {plain_option(value) for product in products for value in product.choices}
        self.is_offered = lru_cache(maxsize=None)(lambda option: any(is_close(value, option) for value in values))

    def find(self, query: str) -> list[Product]:
        """The products that a search lists. `<c> category` and `<q> phrase` list all of a kind, in catalogue order."""
        first, _, rest = query.partition(" ")
        if first == "<c>":
            return [p for p in self.products if p.category == rest.split(" ")[0].strip()]
        if first == "<q>":
            return [p for p in self.products if p.query == rest.strip()]
        return [self.ranked[i] for i in self.index.search(query)[0]]

    @cached_property
    def ways(self) -> list[tuple[Product, list[str]] | None]:
        """For each goal, a product and the option values that win it; None where nothing does."""
        return [self.way_to_win(goal) for goal in self.goals]

    @cached_property
    def winnable(self) -> list[int]:
        return [number for number, way in enumerate(self.ways) if way is not None]

    def way_to_win(self, goal: Goal) -> tuple[Product, list[str]] | None:
        """What to buy for the full reward: the asked product as asked if that wins, else whatever does."""
        way = self.way_with(goal.product, goal, goal.values) or self.way_with(goal.product, goal, None)
        if way is None and all(map(self.is_offered, goal.wanted)):
            way = next(filter(None, (self.way_with(product, goal, None) for product in self.products)), None)
        return way

    def way_with(self, product: Product, goal: Goal, among: list[str] | None) -> tuple[Product, list[str]] | None:
        """The product and the values to choose (`among` these), at most one per name, that win; None if none do."""
        is_kind = self.prices[product.asin] <= goal.price_upper and type_score(product, goal.product)["r_type"] == 1
        if not is_kind or count_attributes(product, goal.attributes) < len(goal.attributes):
            return None
        wanted, ways = goal.wanted, {0: []}  # set of options matched, as bits -> values that do it
        for name in product.options:
            longer = dict(ways)
            for value in product.choices:  # one with a bracket cannot be clicked, see Session.act
                if product.choices[value] == name and "[" not in value and (among is None or value in among):
                    matched = sum(1 << i for i, option in enumerate(wanted) if is_close(plain_option(value), option))
                    for bits, values in ways.items():
                        longer.setdefault(bits | matched, [*values, value])
            ways = longer
        values = ways.get((1 << len(wanted)) - 1)
        return None if values is None else (product, values)


@lru_cache(maxsize=4)
def open_shop(data: str | None, num_products: int | None, human_goals: bool, seed: int) -> Shop:
    """The shop over the files in folder `data`, or over a generated catalogue."""
    if data is None:
        records, notes = generate_catalogue(num_products or 300, seed)
        return Shop(*read_catalogue(records, notes, None, [Path("generated")] * 3), seed)
    folder = Path(data)
    check(folder.is_dir(), f"--data {data}", "there is no such folder")
    small = "_1000" * any(folder.glob("items_*_1000.json"))  # a folder may hold both sets; LaMer plays the small one
    paths = [folder / f"items_{name}.json" for name in (f"shuffle{small}", f"ins_v2{small}", "human_ins")]
    records, notes = read_json(paths[0], list)[:num_products], read_json(paths[1], dict)
    return Shop(*read_catalogue(records, notes, read_json(paths[2], dict) if human_goals else None, paths), seed)


KINDS = {  # category: queries; attributes; options. A product has one query and some of the others
    "fashion": "shirts jackets socks boots; machine wash, slim fit, long lasting, quick dry, soft lining; color size",
    "garden": "lamps rugs stools shelves; easy assembly, solid wood, heavy duty, water proof, non slip; color style",
    "electronics": "cables speakers chargers; fast charging, hands free, high speed, dust proof, low heat; color style",
    "beauty": "soaps creams brushes; sensitive skin, natural oils, travel size, long lasting, paraben free; scent pack",
    "grocery": "teas snacks cereals; gluten free, low sugar, plant based, whole grain, fair trade; flavor pack",
}
OPTION_VALUES = dict(color="black blue green grey pink red white yellow", size="small medium large")
OPTION_VALUES |= dict(style="round square tall", pack="single double family")
OPTION_VALUES |= dict(scent="honey lemon mint rose", flavor="cocoa ginger honey plum")
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
        low, spread, asked = rng.randrange(6, 90), max(0, rng.randrange(-40, 12)), sorted(rng.sample(has, 2))
        record = dict(asin=asin, name=f"{rng.choice(BRANDS)} {has[0]} {query}", query=query, category=category)
        record |= dict(full_description=f"These {query} stand for {has[1]}.", customization_options=options)
        record |= dict(small_description=[f"Made for {has[2]}.", f"Sold by the maker of {query}."], images=["none"])
        record |= dict(pricing=f"${low}.00 to ${low + spread}.00" if spread else f"${low}.00")
        records.append(record | dict(product_category=f"Generated › {category} › {query}"))
        notes[asin] = dict(attributes=has, instruction_attributes=asked)
        notes[asin] |= dict(instruction=f"Find me {', '.join(asked)} {query}")
    return records, notes


# -------------------------------------------------------------------------------------------- one visit

DONE_PAGE = (
    "Thank you for shopping with us!|Your code:|None|(Paste it in your MTurk interface.)|Purchased|asin|{}|options|{}|"
    "attrs|None|category|None|query|None|product category|None|Target|asin|options|attrs|price upper|"
    "instuction text|category|product category|query|Goal|None|Reward|Your score (min 0.0, max 1.0)|{}|"
    "Reward Details|None"
).replace("|", " [SEP] ")


class Session:
    """One visit to the shop with a goal: the page shown, what can be clicked there, and the purchase that ends it.

    `page` is "search", "results", "item", one of SUB_PAGES, or "done"; `score` holds the reward and its parts.
    """

    def __init__(self, shop: Shop, goal: Goal, page_size: int = 10):
        self.shop, self.goal, self.page_size = shop, goal, page_size
        self.score: dict[str, Any] = {"reward": 0.0}
        self.go_home()

    def go_home(self) -> None:
        self.page, self.number, self.product, self.words = "search", 0, None, None
        self.results, self.options = [], {}

    def open_results(self, number: int) -> None:
        self.page, self.number, self.product, self.options = "results", number, None, {}
        if self.words[0] == "<r>":  # other products on every page, but the same in every episode
            rng, products = random.Random(derive_seed("webshop", self.goal.text, number)), self.shop.products
            self.results = rng.sample(products, min(MOST_RESULTS, len(products)))
        else:
            self.results = self.shop.search(" ".join(self.words))

    @property
    def listed(self) -> list[Product]:
        """The products on the present page of results."""
        return self.results[(self.number - 1) * self.page_size : self.number * self.page_size]

    @property
    def clickables(self) -> list[str]:
        """What can be clicked, in the order of the page."""
        if self.page == "results":
            pages = ["< prev", "next >"][self.number == 1 :]
            return ["back to search", *pages, *(product.asin.lower() for product in self.listed)]
        if self.page == "item":
            return [*BUTTONS, *self.product.choices]
        return {"search": ["search"], "done": []}.get(self.page, ["back to search", "< prev"])

    def act(self, action: str) -> None:
        """Play `search[words]`, good on every page, or `click[text]`; anything else changes nothing."""
        match = re.match(r"(.+)\[(.+)\]", action)
        verb, text = (match[1], match[2].lower()) if match and self.page != "done" else ("", "")
        if verb == "search":
            self.words = text.split(" ")
            self.open_results(1)
        elif verb != "click" or text == "search" or text not in self.clickables:
            return
        elif text == "back to search":
            self.go_home()
        elif text == "< prev" and self.page in SUB_PAGES:
            self.page = "item"
        elif text in ("< prev", "next >"):  # from a product, "< prev" goes back to the same results
            self.open_results(self.number + (text == "next >") - (text == "< prev" and self.page == "results"))
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
        segments, product = ["Instruction:", self.goal.text, "Back to Search"], self.product
        if self.page == "search":
            segments = ["WebShop", *segments[:2], "Search"]
        elif self.page == "done":
            return DONE_PAGE.format(product.asin, json.dumps(self.options, sort_keys=True), self.score["reward"])
        elif self.page == "results":
            pages = ["< Prev", "Next >"][self.number == 1 :]
            segments += [f"Page {self.number} (Total results: {len(self.results)})", *pages]
            segments += [text for p in self.listed for text in (p.asin, p.title, p.tag)]
        elif self.page == "item":
            segments += ["< Prev", *(text for name, values in product.options.items() for text in (name, *values))]
            segments += [product.title, f"Price: {product.tag}", "Rating: N.A.", *map(str.title, BUTTONS[2:])]
        else:
            texts = dict(description=[product.description], features=[f" {bullet}" for bullet in product.bullets])
            segments += ["< Prev", *texts.get(self.page, [])]
        # Lost on the way through HTML: empty texts, and white space that has a line break in it.
        return " [SEP] ".join(s.strip() for s in segments if s and not (s.isspace() and "\n" in s))

    def short_text(self) -> str:
        """The page and the whole state of the visit in few words, without buttons, for the tiny policy."""
        lines, chosen = [self.goal.text], " ".join(f"[{value}]" for value in self.options.values())
        shown = [self.product] * bool(self.product) + self.listed
        listed = [f"[{p.asin.lower()}] {' '.join(p.title.split()[:12])} {p.tag}" for p in shown]
        if self.page == "search":
            lines += ["search page"]
        elif self.page == "results":
            lines += [f"page {self.number}", *listed]
        elif self.page == "done":
            lines += [f"bought [{self.product.asin.lower()}] {chosen}", f"score {self.score['reward']:.2f}"]
            lines += ["listed " + " ".join(line.split()[0] for line in listed[1:])]
        elif self.page == "item":
            lines += [listed[0], *(f"{name}: {' '.join(values)}" for name, values in self.product.options.items())]
            lines += [f"chosen {chosen}"] * bool(chosen)
        else:
            lines += [listed[0], self.text().split(" [SEP] < Prev")[1].replace(" [SEP] ", " ").strip()]
        return "\n".join(lines)


# ------------------------------------------------------------------------------------------ the episode


class WebShop(Env):
    """Buy what the instruction asks for within `turns` actions: 10 for a purchase of the full reward, else 0.

    `info["task_score"]` is the original's reward, which also pays for what is right in part. `compact` pages are short
    and list three products (default: with the generated catalogue). Seeds from 2^31 on are the validation goals.
    """

    name = "webshop"
    history_length, history_observations = 5, 1
    warm_skill = 0.0
    action_format = "the action that serves the task best inside <action> </action>"

    def __init__(
        self,
        data: str | None = None,
        products: int | None = None,
        human_goals: bool = False,
        turns: int = 12,
        compact: bool | None = None,
        shop_seed: int = 0,  # of prices, goals, their order, and the generated catalogue
        original: bool = False,
    ):
        check(turns >= 1, f"--turns {turns}", "webshop needs at least one turn")
        check(products is None or products >= 1, f"--products {products}", "webshop needs at least one product")
        check(not human_goals or data is not None, "--human_goals", "needs --data, a folder with items_human_ins.json")
        self.shop = open_shop(data, products, human_goals, shop_seed)
        self.turn_limit, self.original, self.seed = turns, original, None
        self.compact = self.is_markov = data is None if compact is None else compact
        goals = range(len(self.shop.goals)) if original else self.shop.winnable
        check(len(goals) > 1, "webshop", f"only {len(goals)} of the {len(self.shop.goals)} goals can be won")
        self.validation = goals[: min(500, max(len(goals) // 5, 1))]
        self.training = goals[len(self.validation) :]
        self.rng = random.Random()
        self.rng.setstate(self.shop.rng.getstate())
        if original:  # the original's constructor makes a visit of its own
            self.draw_visit()

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        if not (self.original and seed == self.seed):  # the original restarts with the goal that it happens to have
            held_out = seed >= 2**31  # the project evaluates with seeds from here on
            part = self.validation if held_out else self.training
            number = part[(seed - 2**31 if held_out else derive_seed("webshop", seed)) % len(part)]
            self.goal, self.way = self.shop.goals[number], None if self.original else self.shop.ways[number]
            self.task, self.seed = self.goal.text.strip(), seed
        return self.start()

    def start(self) -> tuple[str, dict[str, Any]]:
        """Begin an episode with the present goal."""
        self.visit = Session(self.shop, self.goal, 3 if self.compact else 10)
        self.turns, self.done, self.won = 0, False, False
        return (self.text() if self.compact else f"{self.task}\n{self.text()}"), {"won": False, "task_score": 0.0}

    def draw_visit(self) -> None:
        """The original's draw of another visit with another goal, at the beginning and after every purchase."""
        self.visit_name = "".join(self.rng.choices(string.ascii_lowercase, k=10))
        goals = self.shop.goals  # the index is one too high: the first goal never comes, the last has double mass
        mass = list(itertools.accumulate((goal.weight for goal in goals), initial=0))
        self.goal = goals[min(bisect_right(mass, self.rng.uniform(0, mass[-1])), len(goals) - 1)]

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if (self.done or self.turns >= self.turn_limit) and not self.original:
            return self.text(), 0.0, True, False, {"won": self.won, "task_score": self.visit.score["reward"]}
        self.turns += 1
        self.visit.act(action)
        text, task_score, self.done = self.text(), self.visit.score["reward"], self.visit.page == "done"
        self.won, truncated = task_score == 1, not self.done and self.turns >= self.turn_limit
        result = text, 10.0 * self.won, self.done, truncated, {"won": self.won, "task_score": task_score}
        if self.done and self.original:
            self.draw_visit()
            self.start()
        return result

    def text(self) -> str:
        """The page, short or as LaMer's prompts show it: the segments after the task, quoted."""
        if self.compact:
            return self.visit.short_text()
        before, found, after = self.visit.text().partition(f" [SEP] {self.task} [SEP] ")
        return " [SEP] ".join(f"'{segment}'" for segment in after.split(" [SEP] ")) if found else before

    def shorten(self, observation: str, num_segments: int = 15) -> str:
        """How LaMer's histories show an observation that is not their last."""
        segments = observation.split(" [SEP] ")
        more = f" ... ({len(segments) - num_segments} more)" * (len(segments) > num_segments)
        return " [SEP] ".join(segments[:num_segments]) + more

    def rules(self, style: str = "full") -> str:
        if style == "compact":
            return ""
        return (
            "You are shopping in WebShop, an online shop of text pages. The task says what to buy: a kind of product, "
            "properties it must have, often options (a colour, a size) and a highest price.\n"
            "`search[words]` lists products; `click[text]` presses a button, opens a product, or chooses an option. "
            "Choose every option the task names before `click[buy now]`: pages may not show what is chosen; leaving "
            "the product loses it. Any other action does nothing but costs a turn.\n"
            f"You have {self.turn_limit} turns. Buying ends the episode; the task is solved if product, options and "
            "price are all right. Shop and task are the same in every episode."
        )

    def parse(self, reply: str) -> tuple[str, bool]:
        text = between(reply.lower(), "<action>", "</action>")
        return (reply[-20:].lower() if text is None else text).strip(), text is not None

    def actions(self) -> list[str]:
        clicks = [f"click[{text}]" for text in self.visit.clickables]
        is_search = self.visit.page == "search"
        return ["search[<your query>]"] * is_search + clicks * (self.original or not is_search)

    def anchor(self) -> str | None:
        return None if self.original else f"{self.text()} {self.visit.options}"  # full pages do not show the options

    def scripted(self, skill: float, rng: random.Random, memory: Sequence[str] = ()) -> str:
        return f"<action>{self.expert() if rng.random() < skill else self.novice(rng, memory)}</action>"

    def expert(self) -> str:
        """The next action on the way to a winning purchase, which the expert knows."""
        visit, (product, values) = self.visit, self.way or (self.goal.product, self.goal.values)
        if visit.page == "search":
            asked = " ".join([*self.goal.attributes, self.goal.product.query, *self.goal.values])
            queries = [re.sub(r"[\[\]\n]", " ", query).lower() for query in (asked, product.title, product.document)]
            easy = [query for query in queries if product in self.shop.search(query)[: visit.page_size]]
            return f"search[{(easy or queries)[0]}]"
        if visit.page == "item" and visit.product is product:
            left = [value for value in values if value not in visit.options.values()]
            return f"click[{left[0]}]" if left else "click[buy now]"
        if visit.page == "results" and product in visit.listed:
            return f"click[{product.asin.lower()}]"
        return "click[< prev]" if visit.page in SUB_PAGES else "click[back to search]"

    def novice(self, rng: random.Random, memory: Sequence[str]) -> str:
        """A naive shopper: searches for words of the task, opens some product, chooses options, mostly those asked for.

        Mostly it follows its notes: "not [a], try [b] with [c]" keeps it from a, sends it to b, and has it choose c.
        """
        visit, follows, goal = self.visit, rng.random() < 0.8, self.goal
        avoided = re.findall(r"not \[([^\]]*)\]", " ".join(memory)) if follows else []
        advised = re.findall(r"\[([^\]]*)\]", memory[-1].partition("try ")[2]) if follows and memory else []
        if rng.random() < 0.05:
            return rng.choice(self.actions() or [""]).replace("<your query>", goal.product.query)
        if visit.page == "search":
            words = [attribute for attribute in goal.attributes if rng.random() < 0.9] + [goal.product.query]
            return f"search[{' '.join(words + goal.values * (rng.random() < 0.8))}]"
        if visit.page == "results":
            found = [asin for p in visit.listed if (asin := p.asin.lower()) not in avoided] or ["next >"]
            return f"click[{rng.choice([asin for asin in found if asin in advised] or found)}]"
        if visit.page != "item" or visit.product.asin.lower() in avoided:
            return "click[< prev]"
        for name in visit.product.options:
            values = [value for value, owner in visit.product.choices.items() if owner == name]
            if values and name not in visit.options:
                asked = [v for v in values if v in advised] or [v for v in values if v in goal.values]
                return f"click[{rng.choice(asked if asked and rng.random() < 0.8 else values)}]"
        return "click[buy now]"

    def scripted_reflection(self, rng: random.Random) -> str:
        """What to try next: the product bought, if only options were missed, or else the one listed after it."""
        visit, note, listed = self.visit, "nothing", [product.asin.lower() for product in self.visit.listed]
        if visit.product is not None:
            asin, parts, values = visit.product.asin.lower(), visit.score, visit.options.values()
            missed = [value for value in self.goal.values if value not in values]
            is_right = visit.page != "done" or (parts["r_type"] * parts["r_att"] * parts["r_price"] == 1 and missed)
            if is_right and set(missed) <= set(visit.product.choices):
                note = f"try [{asin}]" + " with" * bool(missed) + "".join(f" [{value}]" for value in missed)
            else:
                note = f"not [{asin}], try [{(listed * 2)[listed.index(asin) + 1]}]"
        return f"<remark>{note if rng.random() < 0.8 else 'nothing'}</remark>"

"""WebShop: buy what an instruction asks for, in a shop of text pages (Yao et al., 2022).

    python train.py --env webshop                           generated catalogue, short pages
    python train.py --env webshop --data DIR                the genuine files (see open_shop)
    python train.py --env webshop --data DIR --human_goals  the instructions people wrote

A `Session`, one visit to a `Shop`, follows the original to the letter, and so do prices, goals,
ranking and reward: github.com/princeton-nlp/WebShop, whose files are cited relative to its folder
`web_agent_site`, as verl-agent and LaMer run it. `WebShop` is LaMer's episode around it. It differs
where the original defeats its purpose: validation goals are held out; every episode of a trial has
the same goal, also after a wrong purchase; goals that cannot be won are left out, and so is
`click[search]`, which does nothing. `original=True` restores the last three.
"""

import itertools
import json
import math
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

from envs import EVAL_SEED, WIN_REWARD, Env, Records, between, derive_seed

# --------------------------------------------------------------------- products and goals

# Of an item page, in order.
BUTTONS = ("back to search", "< prev", "description", "features", "reviews", "buy now")
SUB_PAGES = ("description", "features", "reviews")


@dataclass(slots=True, eq=False)
class Product:
    """A product after loading."""

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
    tag: str = ""  # the price as pages show it
    path: frozenset[str] = frozenset()  # the parts of product_category
    choices: dict[str, str] = field(default_factory=dict)  # value -> its option's name

    def __post_init__(self) -> None:
        self.path = frozenset(part.strip() for part in self.product_category.split("›"))
        self.tag = " to ".join(f"${price}" for price in self.prices)
        for name, values in self.options.items():
            for value in values:  # a value under two names is listed once and sets the later one
                if value not in BUTTONS:  # one that reads like a button is the button
                    self.choices[value] = name

    @property
    def document(self) -> str:
        """The text that is searched."""
        options = [f"{name}: {', '.join(values)}" for name, values in self.options.items()]
        bullet = self.bullets[0] if self.bullets else ""
        return " ".join([self.title, self.description, bullet, ", and ".join(options)]).lower()

    @property
    def brief(self) -> str:
        """The product in one line of a short page."""
        return f"[{self.asin.lower()}] {' '.join(self.title.split()[:12])} {self.tag}"


@dataclass(slots=True)
class Goal:
    """What is to be bought. Options are {name: value} in generated goals, values in human ones."""

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
        """The options as the reward compares them: generated ones with their names."""
        options = self.options.items() if isinstance(self.options, dict) else self.options
        return [plain_option(option) for option in options]


# Product, text, attributes, and option values; None for all combinations of the product's.
Instruction = tuple[Product, str, tuple[str, ...], list[str] | None]


def check(is_good: bool, place: str, problem: str) -> None:
    """ValueError in one line unless `is_good`."""
    if not is_good:
        raise ValueError(f"{place}: {problem}")


def read_json(path: Path, kind: type) -> Any:
    """The content of a JSON file, a list or a dict; ValueError names file and place."""
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # bad UTF-8 and JSON are ValueErrors
        problem = f"{path}: cannot be read as UTF-8 JSON: {error}"
        raise ValueError(problem.replace("\n", " ")) from None
    name = "list" if kind is list else "object"
    check(isinstance(content, kind), str(path), f"must hold a JSON {name}")
    return content


def is_text(value: Any) -> bool:
    """Whether it is text that can be encoded: JSON may hold half of a surrogate pair."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_text, value))


def is_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def read_prices(pricing: Any, place: str) -> list[float]:
    """The first two prices of a text like "$12.99 to $1,015.99"; 100 where there is none."""
    check(isinstance(pricing, str | None), place, f"pricing {pricing!r:.60} is not text")
    if not pricing:
        return [100.0]
    prices = [re.sub(r"[^0-9.]", "", piece) for piece in pricing.split("$")[1:]]
    is_good = len(prices) > 0 and all(re.fullmatch(r"\d+\.?\d*|\.\d+", price) for price in prices)
    check(is_good, place, f"bad pricing {pricing!r:.60}")
    return [float(price) for price in prices[:2]]


def read_options(listed: Any, place: str) -> dict[str, list[str]]:
    """Option name -> values, from a record's customization_options."""
    check(isinstance(listed, dict), place, "customization_options is no object")
    options = {}
    for name, entries in listed.items():
        if entries is None:
            continue
        values = [entry.get("value") for entry in entries] if is_objects(entries) else None
        problem = f"option {name!r:.40} is no list of objects with a value"
        check(is_text(name) and is_texts(values), place, problem)
        options[name.lower()] = [value.strip().replace("/", " | ").lower() for value in values]
    return options


def read_product(record: dict[str, Any], attributes: list[str], place: str) -> Product:
    """A product from its record in items_shuffle.json, as engine/engine.py's load_products."""
    for key in ("name", "query", "category", "product_category"):
        check(is_text(record.get(key)), place, f"{key} is missing or no text")
    images = record.get("images")
    check(isinstance(images, list) and images != [], place, "images is missing or empty")
    description, bullets = record.get("full_description"), record.get("small_description")
    if not isinstance(bullets, list):
        bullets = [bullets or ""]
    check(description is None or is_text(description), place, "full_description is no text")
    problem = "small_description is neither text nor a list of texts"
    check(is_texts(bullets), place, problem)
    return Product(
        asin=record["asin"],
        title=record["name"],
        description=description or "",
        bullets=bullets,
        attributes=attributes,
        options=read_options(record.get("customization_options") or {}, place),
        prices=read_prices(record.get("pricing"), place),
        query=record["query"].lower().strip(),
        category=record["category"],
        product_category=record["product_category"],
    )


def read_catalogue(
    records: Sequence[Any],
    notes: dict[str, Any],
    human: dict[str, Any] | None,
    files: Sequence[Path],
) -> tuple[list[Product], list[Instruction]]:
    """The products and the instructions, those of `human` or, if None, those of `notes`.

    In the second case every product must be in `notes`. `files` are named in errors.
    """
    products, instructions, seen = [], [], set()
    num_goals = 0  # seven a product in genuine files
    for i, record in enumerate(records):
        source = f"{files[0]}: product {i}"
        has_asin = isinstance(record, dict) and is_text(record.get("asin"))
        check(has_asin, source, "has no asin")
        asin = record["asin"]
        if asin == "nan" or len(asin) > 10 or asin in seen:  # the original skips these
            continue
        seen.add(asin)
        place = f"{files[1]}: {asin!r}"
        check(asin in notes or human is not None, place, f"is missing, but {files[0].name} has it")
        note = notes.get(asin, {})
        check(isinstance(note, dict), place, "is no object")
        attributes = note.get("attributes", ["DUMMY_ATTR"])
        check(is_texts(attributes), place, "attributes is no list of texts")
        source = f"{source} ({asin!r})"
        product = read_product(record, attributes, source)
        products.append(product)

        entries = []
        if human is not None:
            place, entries = f"{files[2]}: {asin!r}", human.get(asin, [])
        elif note.get("instruction") is not None:
            entries = [note]
        check(is_objects(entries), place, "is no list of objects")
        for entry in entries:
            text, asked = entry.get("instruction"), entry.get("instruction_attributes")
            problem = "instruction or instruction_attributes is malformed"
            check(is_text(text) and is_texts(asked), place, problem)
            if human is None:
                instructions.append((product, text, tuple(asked), None))
                num_goals += math.prod(map(len, product.options.values()))
                problem = f"with it there are {num_goals:,} combinations of options, too many"
                check(num_goals <= 10_000 + 20 * len(records), source, problem)
            elif asked:  # the original skips the others
                values = entry.get("instruction_options")
                check(is_texts(values), place, "instruction_options is no list of texts")
                instructions.append((product, text.strip("."), tuple(asked), values))
    return products, instructions


def make_goals(
    instructions: Iterable[Instruction], prices: dict[str, float], rng: random.Random
) -> list[Goal]:
    """One goal per human instruction, or per combination of a product's options (engine/goal.py).

    `rng` draws the price bounds, one per instruction.
    """
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
            options = dict(zip(names, combination, strict=True))
            asked = ", and ".join(f"{name}: {value}" for name, value in options.items())
            if asked:
                asked = " with " + asked
            goals.append(Goal(product, text + asked + suffix, attributes, options, price_upper))

    counts = Counter(attribute for goal in goals for attribute in goal.attributes)
    for goal in goals:
        if isinstance(goal.options, dict):  # people's goals all weigh 1
            rarity = sum(1 / counts[attribute] for attribute in goal.attributes)
            goal.weight = rarity / max(len(goal.attributes), 1)
    return goals


# --------------------------------------------------------------------------------- search
# The original asks Lucene by way of Anserini (init_search_engine in engine/engine.py). Here is what
# its English analyzer does, words by Unicode's rules (UAX 29) and Porter's stems, and its BM25.

K1, B = np.float32(0.9), np.float32(0.4)  # Anserini's parameters of BM25
MOST_RESULTS = 50  # of a search
STOP_WORDS = (  # noqa: SIM905
    "a an and are as at be but by for if in into is it no not of on or such that the their then "
    "there these they this to was will with"
).split()
BEYOND_ASCII = [(chr(i), unicodedata.category(chr(i))) for i in range(0x80, 0x10000)]
# Marks and invisible signs, but the zero-width space, belong to the character before them; so do
# two Katakana signs.
MARKS = "".join(c for c, kind in BEYOND_ASCII if kind in ("Mn", "Mc", "Me", "Cf") and c != "\u200b")
MARKS += "\uff9e\uff9f"
NUMERALS = "".join(c for c, kind in BEYOND_ASCII if kind == "No")  # ½ separates words, though in \w
# Every Hiragana or Han sign is a word.
SINGLE = "\u3005\u3007\u3021-\u3029\u3038-\u303b\u3041-\u3096\u309d-\u309f"
SINGLE += "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
KATAKANA = "\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9d"
PICTOGRAPHS = (
    "\u00a9\u00ae\u203c\u2049\u2122\u2194-\u2199\u21a9-\u21aa\u231a-\u231b\u2328\u2388\u23cf"
    "\u23e9-\u23f3\u23f8-\u23fa\u25aa-\u25ab\u25b6\u25c0\u25fb-\u25fe\u2600-\u2605\u2607-\u2612"
    "\u2614-\u2685\u2690-\u2705\u2708-\u2712\u2714\u2716\u271d\u2721\u2728\u2733-\u2734\u2744"
    "\u2747\u274c\u274e\u2753-\u2755\u2757\u2763-\u2767\u2795-\u2797\u27a1\u27b0\u27bf"
    "\u2934-\u2935\u2b05-\u2b07\u2b1b-\u2b1c\u2b50\u2b55\u3030\u303d\U0001f000-\U0001faff"
)
APART = NUMERALS + SINGLE + KATAKANA + PICTOGRAPHS + "\uff9e\uff9f"  # no part of ordinary words
LETTER = rf"[^\W\d_{APART}]"
RUN = rf"[^\W{APART}]+(?:[{MARKS}]+[^\W{APART}]*)*"
JOINT = rf"(?:(?<={LETTER})[.'’‘·:：](?={LETTER})|(?<=\d)[.,;'’‘⁄](?=\d))"  # as in o'neil, 3.5
PICTOGRAPH = rf"[{PICTOGRAPHS}][{MARKS}]*"
JOINED = rf"{PICTOGRAPH}(?:(?<=\u200d){PICTOGRAPH})*"  # by the zero-width joiner, one of the marks
WORD = re.compile(rf"{RUN}(?:{JOINT}{RUN})*|[{SINGLE}]|[{KATAKANA}]+|{JOINED}")


def analyze(text: str) -> list[str]:
    """The terms of a text: its words, each a `term` or dropped.

    analyze("The boys' 3.5\" Women's shoes") == ["boi", "3.5", "women", "shoe"]
    """
    terms = [term(word) for word in WORD.findall(text)]
    return [found for found in terms if found]


@lru_cache(maxsize=1 << 17)
def term(word: str) -> str:
    """The stem of a word without possessive s; "" for stop words and bare underscores."""
    word = re.sub(r"['’＇][sS]$", "", word).lower()
    is_dropped = word in STOP_WORDS or not word.strip("_")
    return "" if is_dropped else stem(word)


SUFFIXES = {  # step of Porter's algorithm: suffix>what replaces it
    2: "ational>ate tional>tion enci>ence anci>ance izer>ize bli>ble alli>al entli>ent eli>e "
    "ousli>ous ization>ize ation>ate ator>ate alism>al iveness>ive fulness>ful ousness>ous "
    "aliti>al iviti>ive biliti>ble logi>log",
    3: "icate>ic ative> alize>al iciti>ic ical>ic ful> ness>",
    4: "al> ance> ence> er> ic> able> ible> ant> ement> ment> ent> sion>s tion>t ou> ism> ate> "
    "iti> ous> ive> ize>",
}


def letter_kinds(word: str) -> str:
    """`v` for each vowel and `c` for each consonant: letter_kinds("syzygy") == "cvcvcv"."""
    kinds = ""
    for letter in word:
        is_vowel = letter in "aeiou" or (letter == "y" and kinds[-1:] == "c")
        kinds += "v" if is_vowel else "c"
    return kinds


def changes(word: str) -> int:
    """How often a consonant follows a vowel: Porter's measure of a word."""
    return letter_kinds(word).count("vc")


def is_short(word: str) -> bool:
    """Whether it is consonants, a vowel, and a consonant but w, x, y: "hop", not "how"."""
    return re.fullmatch("c+vc[^wxy]", letter_kinds(word) + word[-1:]) is not None


def stem(word: str) -> str:
    """Porter's stemmer with his two later changes (https://tartarus.org/martin/PorterStemmer/)."""
    if len(word) < 3:
        return word
    # Step 1: plurals, -ed, -ing, -y.
    if word.endswith(("sses", "ies")):
        word = word[:-2]
    elif word.endswith("s") and not word.endswith("ss"):
        word = word[:-1]
    if word.endswith("eed"):
        if changes(word[:-3]) > 0:
            word = word[:-1]
    elif word.endswith(("ed", "ing")):
        rest = word[:-2] if word.endswith("ed") else word[:-3]
        if "v" in letter_kinds(rest):
            word = mend(rest)
    if word.endswith("y") and "v" in letter_kinds(word[:-1]):
        word = word[:-1] + "i"
    for step, pairs in SUFFIXES.items():
        word = replace_suffix(word, pairs, step)
    # Step 5: a final e, a double l.
    if word.endswith("e"):
        rest = word[:-1]
        if changes(rest) > 1 or (changes(rest) == 1 and not is_short(rest)):
            word = rest
    if word.endswith("ll") and changes(word) > 1:
        word = word[:-1]
    return word


def mend(rest: str) -> str:
    """A word that has lost -ed or -ing: hop -> hope, hopp -> hop, fall -> fall."""
    if rest.endswith(("at", "bl", "iz")) or is_short(rest):
        return rest + "e"
    is_double = rest[-2:-1] == rest[-1] and letter_kinds(rest)[-1] == "c"
    return rest[:-1] if is_double and rest[-1] not in "lsz" else rest


def replace_suffix(word: str, pairs: str, step: int) -> str:
    """Replace the first suffix found, if enough is left of the word."""
    for pair in pairs.split():
        suffix, replacement = pair.split(">")
        if word.endswith(suffix):
            rest = word.removesuffix(suffix)
            is_enough = changes(rest) > 0
            if step == 4:  # more must be left, and the s or t before "ion" counts
                is_enough = changes(rest + replacement) > 1
            return rest + replacement if is_enough else word
    return word


class Index:
    """BM25 as in Lucene 8. Texts come by ascending id, which is how equal scores rank.

    The postings, one per (term, text), are sorted by term: those of term i are the elements from
    `starts[i]` to `starts[i + 1]` of `texts` and `saturation`.
    """

    def __init__(self, texts: Iterable[str]):
        self.terms: dict[str, int] = {}
        lengths, found = [], []
        for text in texts:
            terms = analyze(text)
            lengths.append(len(terms))
            numbers = [self.terms.setdefault(term, len(self.terms)) for term in terms]
            found.append(np.array(numbers, dtype=np.int64))
        self.num_texts = num = len(lengths)

        # Count equal (term, text) pairs, each as one number.
        all_terms = np.concatenate([np.zeros(0, np.int64), *found])
        keys = all_terms * num + np.repeat(np.arange(num), lengths)
        keys, counts = np.unique(keys, return_counts=True)
        terms, self.texts = keys // max(num, 1), (keys % max(num, 1)).astype(np.int32)
        self.starts = np.searchsorted(terms, np.arange(len(self.terms) + 1))
        df = np.diff(self.starts)
        self.idf = np.log(1 + (num - df + 0.5) / (df + 0.5)).astype(np.float32)

        # Lucene keeps a length in a byte: what is above 24 is cut to its four leading bits.
        above = np.maximum(np.array(lengths, dtype=np.int64) - 24, 0)
        shift = np.maximum(np.frexp(above)[1] - 4, 0)
        length = (np.minimum(lengths, 24) + (above >> shift << shift)).astype(np.float32)
        total = sum(lengths)
        mean_length = np.float32(total / num if total else 1)
        inverse = 1 / (K1 * ((1 - B) + B * length / mean_length))
        self.saturation = 1 + counts.astype(np.float32) * inverse[self.texts]

    def search(self, query: str, limit: int = MOST_RESULTS) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and scores of the best texts, best first."""
        scores = np.zeros(self.num_texts)  # summed in double precision, as Lucene does
        for term, count in Counter(analyze(query)).items():
            i = self.terms.get(term)
            if i is not None:
                where = slice(self.starts[i], self.starts[i + 1])
                weight = np.float32(count) * self.idf[i]
                scores[self.texts[where]] += weight - weight / self.saturation[where]
        scores = scores.astype(np.float32)
        hits = np.flatnonzero(scores)
        if len(hits) > limit:  # sort no more than can be among the best
            least = np.partition(scores[hits], -limit)[-limit]
            hits = hits[scores[hits] >= least]
        hits = hits[np.argsort(-scores[hits], kind="stable")][:limit]
        return hits, scores[hits]


# --------------------------------------------------------------------------------- reward

COLORS = (  # noqa: SIM905
    "alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown "
    "burgundy camel camo caramel champagne charcoal cheetah chestnut chocolate christmas coffee "
    "cognac copper coral cranberry cream crystal dark denim eggplant elephant espresso fuchsia "
    "gold granite grape graphite grass gray green grey heather indigo ivory ivy khaki lavender "
    "lemon leopard light lilac lime magenta maroon mauve merlot midnight mint mocha multicolor "
    "mushroom mustard natural navy nude olive orange peach pewter pink plum purple rainbow red "
    "rose royal rust sand sapphire seashell silver skull slate steel stone stonewash sunflower tan "
    "taupe teal tiger turquoise violet walnut wheat white wine yellow"
).split()
NO_NOUNS = (  # noqa: SIM905
    "a about after all also an and any are as at be but by can could do each else ever every extra "
    "for from had has have her his how if in into is it its just more most much my nor not of off "
    "on only onto or other our out over own per so some such than that the their them then there "
    "these they this those to too under until up upon us very via was we were what when where "
    "which while who will with within without would you your"
).split()
CLOSE = 85  # texts count as equal if their token_set_ratio is above


@lru_cache(maxsize=1 << 16)
def nouns(title: str) -> list[str]:
    """The nouns of a title.

    The original asks a tagger model; this stand-in takes every word that is no stop word. Set
    `webshop.nouns` to another function of this form, before a shop is opened, to use a tagger.
    """
    words = [word.lower() for word in re.findall(r"[^\W\d_][^\W_]*", title)]
    return [word for word in words if len(word) >= 2 and word not in NO_NOUNS]


@lru_cache(maxsize=1 << 17)
def token_set(text: str) -> tuple[frozenset[str], str, Counter]:
    """The set of words of a text, the same as sorted text, and its letters."""
    plain = re.sub(r"\W", " ", re.sub(r"[\x80-\xff]", "", text))
    tokens = frozenset(plain.lower().split())
    ordered = " ".join(sorted(tokens))
    return tokens, ordered, Counter(ordered)


def token_set_ratio(a: str, b: str) -> int:
    """How alike two texts are, 0 to 100, whatever the order and number of their words.

    thefuzz's rule: token_set_ratio("blue shirt", "a shirt, light blue") == 100
    """
    tokens_a, tokens_b = token_set(a)[0], token_set(b)[0]
    if not tokens_a or not tokens_b:
        return 0
    shared = sorted(tokens_a & tokens_b)
    texts = [
        " ".join(shared),
        " ".join(shared + sorted(tokens_a - tokens_b)),
        " ".join(shared + sorted(tokens_b - tokens_a)),
    ]
    pairs = itertools.combinations(texts, 2)
    return max(round(100 * SequenceMatcher(None, x, y).ratio()) for x, y in pairs)


@lru_cache(maxsize=1 << 17)
def is_close(a: str, b: str) -> bool:
    """Whether token_set_ratio(a, b) > CLOSE, told at once where sets of words or letters can."""
    tokens_a, ordered_a, letters_a = token_set(a)
    tokens_b, ordered_b, letters_b = token_set(b)
    if not tokens_a:
        return False
    if tokens_a.isdisjoint(tokens_b):  # then the ratio is that of the sorted texts
        least = CLOSE / 100 * (len(ordered_a) + len(ordered_b)) / 2  # letters they must share
        if min(len(ordered_a), len(ordered_b)) < least:
            return False
        if (letters_a & letters_b).total() < least:
            return False
    if tokens_a <= tokens_b or tokens_b <= tokens_a:
        return True
    return token_set_ratio(a, b) > CLOSE


@lru_cache(maxsize=1 << 17)
def plain_option(option: str | tuple[str, str]) -> str:
    """The first known colour that is in the option, or the option as text (engine/normalize.py).

    For a (name, value) pair "in" means being one of the two, a quirk by which "black1901" cannot
    match itself: plain_option("black1901") == "black" but
    plain_option(("color", "black1901")) == "('color', 'black1901')"
    """
    return next((color for color in COLORS if color in option), str(option))


@lru_cache(maxsize=1 << 16)
def type_score(product: Product, goal: Product) -> dict[str, Any]:
    """Whether two products are of one kind, by query, category path and nouns of their titles."""
    query_match = product.query == goal.query
    category_match = len(product.path & goal.path) >= 2
    wanted = nouns(goal.title)
    title_score = 0.2
    if wanted:
        title_score = len(set(nouns(product.title)) & set(wanted)) / len(wanted)
    if title_score == 0:
        r_type = 0.0
    elif title_score < 0.1:
        r_type = 0.1
    elif query_match or category_match or title_score > 0.2:
        r_type = 1.0
    else:
        r_type = 0.5
    return {
        "r_type": r_type,
        "query_match": query_match,
        "category_match": category_match,
        "title_score": title_score,
    }


@lru_cache(maxsize=1 << 16)
def count_attributes(product: Product, attributes: tuple[str, ...]) -> int:
    """How many of the attributes the product has, by its attributes or in its texts."""
    texts = [product.title, " ".join(product.bullets), product.description]
    texts = [text.lower() for text in texts]
    num_found = 0
    for attribute in attributes:
        is_in_text = any(attribute in text for text in texts)
        if is_in_text or any(is_close(own, attribute) for own in product.attributes):
            num_found += 1
    return num_found


def score(product: Product, goal: Goal, price: float, options: dict[str, str]) -> dict[str, Any]:
    """The reward of buying a product with these options, and its parts; 1.0 wins.

    The names are those of get_reward in engine/goal.py.
    """
    chosen = [plain_option(value) for value in options.values()]
    num_attributes, num_options = len(goal.attributes), len(goal.options)
    num_attr_matches = count_attributes(product, goal.attributes)
    num_option_matches = 0
    for option in goal.wanted:
        if any(is_close(value, option) for value in chosen):
            num_option_matches += 1
    num_right = num_attr_matches + num_option_matches
    r_price = price <= goal.price_upper
    if r_price:
        num_right += 1
    total = num_attributes + num_options + 1
    parts = {
        "num_attr_matches": num_attr_matches,
        "num_option_matches": num_option_matches,
        "r_price": r_price,
        "w_price": 1 / total,
        "r_att": num_attr_matches / max(num_attributes, 1),
        "w_att": num_attributes / total,
    }
    if num_options:
        parts["r_option"] = num_option_matches / num_options
        parts["w_option"] = num_options / total
    parts |= type_score(product, goal.product)
    parts["reward"] = parts["r_type"] * num_right / total
    return parts


# ------------------------------------------------------------------------------- the shop


class Shop:
    """A catalogue with its index, this seed's prices, and all goals in one shuffled order.

    Everything random is drawn in the original's order: prices, price bounds, then, starting anew
    from `seed`, the shuffle; `rng` is left where the original goes on drawing names of visits and
    goals (SimServer in envs/web_agent_text_env.py).
    """

    def __init__(self, products: list[Product], instructions: Iterable[Instruction], seed: int):
        self.products = products
        rng = random.Random(seed)
        self.prices = {}
        for product in products:
            is_range = len(product.prices) > 1
            price = rng.uniform(*product.prices) if is_range else product.prices[0]
            self.prices[product.asin] = price
        self.goals = make_goals(instructions, self.prices, rng)
        self.rng = random.Random(seed)
        self.rng.shuffle(self.goals)

        self.ranked = sorted(products, key=lambda product: product.asin)
        self.index = Index(product.document for product in self.ranked)
        self.search = lru_cache(maxsize=1024)(self.find)
        self.is_offered = lru_cache(maxsize=None)(self.find_option)
        self.offered = {plain_option(value) for product in products for value in product.choices}

    def find(self, query: str) -> list[Product]:
        """The products that a search lists.

        `<c> category` and `<q> phrase` list all of a kind, in catalogue order.
        """
        first, _, rest = query.partition(" ")
        if first == "<c>":
            return [p for p in self.products if p.category == rest.split(" ")[0].strip()]
        if first == "<q>":
            return [p for p in self.products if p.query == rest.strip()]
        return [self.ranked[i] for i in self.index.search(query)[0]]

    def find_option(self, option: str) -> bool:
        """Whether any product has a value that counts as this option."""
        return any(is_close(value, option) for value in self.offered)

    @cached_property
    def ways(self) -> list[tuple[Product, list[str]] | None]:
        """For each goal, a product and the option values that win it; None where nothing does."""
        return [self.way_to_win(goal) for goal in self.goals]

    @cached_property
    def winnable(self) -> list[int]:
        return [number for number, way in enumerate(self.ways) if way is not None]

    def way_to_win(self, goal: Goal) -> tuple[Product, list[str]] | None:
        """What to buy for the full reward: the asked product if that wins, else whatever does."""
        way = self.way_with(goal.product, goal, goal.values)
        if way is None:
            way = self.way_with(goal.product, goal, None)
        if way is None and all(self.is_offered(option) for option in goal.wanted):
            ways = (self.way_with(product, goal, None) for product in self.products)
            way = next((way for way in ways if way is not None), None)
        return way

    def way_with(
        self, product: Product, goal: Goal, among: list[str] | None
    ) -> tuple[Product, list[str]] | None:
        """The product and the values to choose, at most one per name, that win; None if none do.

        If given, the values are `among` these.
        """
        if self.prices[product.asin] > goal.price_upper:
            return None
        if type_score(product, goal.product)["r_type"] != 1:
            return None
        if count_attributes(product, goal.attributes) < len(goal.attributes):
            return None
        wanted = goal.wanted
        if len(wanted) > 10:  # the sets of more are too many to try
            return None
        ways: dict[int, list[str]] = {0: []}  # set of options matched, as bits -> values that do it
        for name in product.options:
            longer = dict(ways)
            for value, owner in product.choices.items():
                if owner != name or "[" in value or "\n" in value:  # no such click, see Session.act
                    continue
                if among is not None and value not in among:
                    continue
                matched = 0
                for i, option in enumerate(wanted):
                    if is_close(plain_option(value), option):
                        matched |= 1 << i
                for bits, values in ways.items():
                    longer.setdefault(bits | matched, [*values, value])
            ways = longer
        all_bits = (1 << len(wanted)) - 1
        return (product, ways[all_bits]) if all_bits in ways else None


@lru_cache(maxsize=64)
def open_shop(data: str | None, num_products: int | None, human_goals: bool, seed: int) -> Shop:
    """The shop over the files in folder `data`, or over a generated catalogue."""
    if data is None:
        records, notes = generate_catalogue(num_products or 300, seed)
        return Shop(*read_catalogue(records, notes, None, [Path("generated")] * 3), seed)
    folder = Path(data)
    check(folder.is_dir(), f"--data {data}", "there is no such folder")
    # A folder may hold the small set and the full one; LaMer plays the small one.
    small = "_1000" if any(folder.glob("items_*_1000.json")) else ""
    names = (f"items_shuffle{small}.json", f"items_ins_v2{small}.json", "items_human_ins.json")
    paths = [folder / name for name in names]
    records, notes = read_json(paths[0], list)[:num_products], read_json(paths[1], dict)
    human = read_json(paths[2], dict) if human_goals else None
    return Shop(*read_catalogue(records, notes, human, paths), seed)


# Category: queries; attributes; options. A product has one query and some of the others.
KINDS = {
    "fashion": "shirts jackets socks boots; "
    "machine wash, slim fit, long lasting, quick dry, soft lining, wind proof, light weight, "
    "stain resistant; color size",
    "garden": "lamps rugs stools shelves; "
    "easy assembly, solid wood, heavy duty, water proof, non slip, space saving, hand painted, "
    "fade resistant; color style",
    "electronics": "cables speakers chargers; "
    "fast charging, hands free, high speed, dust proof, low heat, energy saving, shock proof, "
    "noise free; color style",
    "beauty": "soaps creams brushes; "
    "sensitive skin, natural oils, travel size, long lasting, paraben free, dye free, "
    "quick drying, skin friendly; scent pack",
    "grocery": "teas snacks cereals; "
    "gluten free, low sugar, plant based, whole grain, fair trade, nut free, high fiber, "
    "hand picked; flavor pack",
}
OPTION_VALUES = {
    "color": "black blue green grey pink red white yellow",
    "size": "small medium large",
    "style": "round square tall",
    "pack": "single double family",
    "scent": "honey lemon mint rose",
    "flavor": "cocoa ginger honey plum",
}
BRANDS = "Abero Belu Cando Dorin Elvo Fenra Galto Hindo Ibex Jarno Kelvi Lumo"


def generate_catalogue(num_products: int, seed: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A catalogue in the genuine format: the contents of items_shuffle.json and items_ins_v2.json.

    Two attributes are asked for, which products of a kind share. One stands in the title, so that
    search words narrow the choice, and options and price narrow it further. The other stands on the
    page of features alone, of which the search knows nothing: whether it is there shows on that
    page or after buying, and is worth a note. Some colours carry a number, like "black1901" in the
    genuine files, and cannot be matched.
    """
    problem = "a generated catalogue has at most 60000 products"
    check(num_products <= 60_000, f"--products {num_products}", problem)
    rng = random.Random(derive_seed("webshop catalogue", seed))
    letters = string.ascii_uppercase
    records, notes = [], {}
    # All catalogues have the same numbers, other products behind them. They share few letters and
    # few digits: a number that is made of what is often met is sooner copied.
    side = math.isqrt(num_products - 1) + 1
    for code in random.Random(0).sample(range(side * side), num_products):
        asin = f"{letters[code // side // 26]}{letters[code // side % 26]}{code % side:02d}"
        category = rng.choice(list(KINDS))
        queries, attributes, names = KINDS[category].split("; ")
        query = rng.choice(queries.split())
        has = rng.sample(attributes.split(", "), 3)
        options = {}
        for name in rng.sample(names.split(), rng.choice([1, 2, 2, 2])):
            values = rng.sample(OPTION_VALUES[name].split(), rng.choice([2, 2, 3]))
            if name == "color" and rng.random() < 0.1:
                values[0] += str(rng.randrange(10, 100))
            options[name] = [{"value": value} for value in values]
        low = rng.randrange(6, 90)
        spread = max(0, rng.randrange(-40, 12))
        asked = sorted([has[0], has[2]])
        records.append(
            {
                "asin": asin,
                "name": f"{rng.choice(BRANDS.split())} {has[0]} {query}",
                "query": query,
                "category": category,
                "full_description": f"These {query} stand for {has[0]}.",
                "customization_options": options,
                # Only the first of these is searched, as in the original.
                "small_description": [
                    f"Sold by the maker of {query}.",
                    f"Made for {has[1]} and {has[2]}.",
                ],
                "images": ["none"],
                "pricing": f"${low}.00 to ${low + spread}.00" if spread else f"${low}.00",
                "product_category": f"Generated › {category} › {query}",
            }
        )
        notes[asin] = {
            "attributes": has,
            "instruction_attributes": asked,
            "instruction": f"Find me {', '.join(asked)} {query}",
        }
    return records, notes


# ------------------------------------------------------------------------------ one visit

DONE_PAGE = (
    "Thank you for shopping with us!|Your code:|None|(Paste it in your MTurk interface.)|Purchased|"
    "asin|{}|options|{}|attrs|None|category|None|query|None|product category|None|Target|asin|"
    "options|attrs|price upper|instuction text|category|product category|query|Goal|None|Reward|"
    "Your score (min 0.0, max 1.0)|{}|Reward Details|None"
).replace("|", " [SEP] ")


class Session:
    """One visit to the shop with a goal: a page, what can be clicked there, and the purchase.

    `page` is "search", "results", "item", one of SUB_PAGES, or "done"; `score` holds the reward and
    its parts. (envs/web_agent_text_env.py)
    """

    def __init__(self, shop: Shop, goal: Goal, page_size: int = 10):
        self.shop, self.goal, self.page_size = shop, goal, page_size
        self.score: dict[str, Any] = {"reward": 0.0}
        self.go_home()

    def go_home(self) -> None:
        self.page = "search"
        self.words: list[str] | None = None  # what was searched
        self.results: list[Product] = []
        self.number = 0  # of the page of results
        self.product: Product | None = None
        self.options: dict[str, str] = {}  # chosen: name -> value

    def open_results(self, number: int) -> None:
        self.page, self.number, self.product, self.options = "results", number, None, {}
        if self.words[0] == "<r>":  # other products on every page, but the same in every episode
            rng = random.Random(derive_seed("webshop", self.goal.text, number))
            products = self.shop.products
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
        if self.page == "search":
            return ["search"]
        if self.page == "done":
            return []
        if self.page == "item":
            return [*BUTTONS, *self.product.choices]
        if self.page in SUB_PAGES:
            return ["back to search", "< prev"]
        pages = ["next >"] if self.number == 1 else ["< prev", "next >"]
        return ["back to search", *pages, *(product.asin.lower() for product in self.listed)]

    def act(self, action: str) -> None:
        """Play `search[words]`, good on every page, or `click[text]`; else nothing changes."""
        line = action.partition("\n")[0]
        # To the last "]": a pattern that had to find it would look from every "[" to the end.
        match = re.match(r"(.+)\[(.+)", line[: max(line.rfind("]"), 0)])
        if match is None or self.page == "done":
            return
        verb, text = match[1], match[2].lower()
        if verb == "search":
            self.words = text.split(" ")
            self.open_results(1)
        elif verb == "click" and text != "search" and text in self.clickables:
            self.click(text)

    def click(self, text: str) -> None:
        if text == "back to search":
            self.go_home()
        elif text == "next >":
            self.open_results(self.number + 1)
        elif text == "< prev" and self.page == "results":
            self.open_results(self.number - 1)
        elif text == "< prev" and self.page == "item":  # options are lost
            self.open_results(self.number)
        elif text == "< prev":
            self.page = "item"
        elif self.page == "results":
            self.page = "item"
            self.product = next(p for p in self.listed if p.asin.lower() == text)
        elif text in SUB_PAGES:
            self.page = text
        elif text == "buy now":
            self.page = "done"
            price = self.shop.prices[self.product.asin]
            self.score = score(self.product, self.goal, price, self.options)
        else:
            self.options[self.product.choices[text]] = text

    def text(self) -> str:
        """The page as the original shows it: segments joined by [SEP]."""
        product = self.product
        head = ["Instruction:", self.goal.text]
        if self.page == "search":
            segments = ["WebShop", *head, "Search"]
        elif self.page == "results":
            pages = ["Next >"] if self.number == 1 else ["< Prev", "Next >"]
            count = f"Page {self.number} (Total results: {len(self.results)})"
            segments = [*head, "Back to Search", count, *pages]
            for found in self.listed:
                segments += [found.asin, found.title, found.tag]
        elif self.page == "done":
            options = json.dumps(self.options, sort_keys=True)
            return DONE_PAGE.format(product.asin, options, self.score["reward"])
        else:
            segments = [*head, "Back to Search", "< Prev"]
        if self.page == "item":
            for name, values in product.options.items():
                segments += [name, *values]
            segments += [product.title, f"Price: {product.tag}", "Rating: N.A."]
            segments += ["Description", "Features", "Reviews", "Buy Now"]
        elif self.page == "description":
            segments.append(product.description)
        elif self.page == "features":
            segments += [f" {bullet}" for bullet in product.bullets]
        # Lost on the way through HTML: empty texts, and white space that has a line break in it.
        kept = [s for s in segments if s and not (s.isspace() and "\n" in s)]
        return " [SEP] ".join(segment.strip() for segment in kept)

    def short_text(self) -> str:
        """The page and the whole state of the visit in few words, without buttons."""
        product = self.product
        lines = [self.goal.text]
        chosen = " ".join(f"[{value}]" for value in self.options.values())
        if self.page == "search":
            lines.append("search page")
        elif self.page == "results":
            lines += [f"page {self.number}", *(found.brief for found in self.listed)]
        elif self.page == "item":
            lines.append(product.brief)
            for name, values in product.options.items():
                lines.append(f"{name}: {' '.join(f'[{value}]' for value in values)}")
            if chosen:
                lines.append(f"chosen {chosen}")
        elif self.page == "done":
            lines.append(f"bought [{product.asin.lower()}] {chosen}")
            lines.append(f"score {self.score['reward']:.2f}")
            lines.append("listed " + " ".join(f"[{found.asin.lower()}]" for found in self.listed))
        else:
            page = self.text().split(" [SEP] < Prev")[1]
            lines += [product.brief, page.replace(" [SEP] ", " ").strip()]
        return "\n".join(lines)


# ---------------------------------------------------------------------------- the episode


class WebShop(Env):
    """Buy what the instruction asks for: 10 for a purchase of the full reward, else 0.

    `info["task_score"]` is the original's reward, which also pays for what is right in part. Seeds
    from EVAL_SEED on are the validation goals.

    Options:
        data: folder with WebShop's own items_*.json; default: a generated catalogue
        products: number of products; default: 300 generated ones, or all in the files
        human_goals: people's instructions instead of synthetic ones; needs data
        turns: turns per episode, of one action and one model call each
        compact: short pages that list three products; default: with a generated catalogue
        shops: generated catalogues to train in, lest a policy learn one by heart; validation goals
            are of the first, held out
        shop_seed: seed of prices, goals, their order, and the generated catalogue
        original: goals that cannot be won, another goal after every purchase, click[search]
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
        shops: int = 32,
        shop_seed: int = 0,
        original: bool = False,
    ):
        check(turns >= 1, f"--turns {turns}", "webshop needs at least one turn")
        is_some = products is None or products >= 1
        check(is_some, f"--products {products}", "webshop needs at least one product")
        has_data = data is not None
        check(1 <= shops <= 64, f"--shops {shops}", "webshop has 1 to 64 generated catalogues")
        problem = "needs --data, a folder with items_human_ins.json"
        check(has_data or not human_goals, "--human_goals", problem)
        self.source, self.shop_seed = (data, products, human_goals), shop_seed
        self.num_shops = 1 if has_data or original else shops
        self.shop = self.first_shop = open_shop(*self.source, shop_seed)
        self.turn_limit, self.original = turns, original
        self.compact = not has_data if compact is None else compact

        goals = range(len(self.shop.goals)) if original else self.shop.winnable
        num_goals = len(self.shop.goals)
        place = f"--data {data}" if has_data else f"--products {products}"
        problem = f"only {len(goals)} of the {num_goals} goals can be won"
        check(len(goals) > 1, place, problem)
        num_validation = min(500, max(len(goals) // 5, 1))  # 500: verl-agent's and LaMer's
        self.validation, self.training = goals[:num_validation], goals[num_validation:]

        self.seed: int | None = None  # of the last reset
        self.rng = random.Random()
        self.rng.setstate(self.shop.rng.getstate())
        if original:  # the original's constructor makes a visit of its own
            self.draw_visit()

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        if self.original and seed == self.seed:
            return self.start()  # the original restarts with the goal that it happens to have
        self.shop, goals, draw = self.first_shop, self.validation, seed - EVAL_SEED
        if seed < EVAL_SEED:
            goals, draw = self.training, derive_seed("webshop", seed)
            nth = derive_seed("webshop shop", seed) % self.num_shops
            if nth > 0:  # another catalogue, of which nothing is held out
                shop_seed = derive_seed("webshop shop", self.shop_seed, nth)
                self.shop = open_shop(*self.source, shop_seed)
                goals = self.shop.winnable
        number = goals[draw % len(goals)]
        self.goal, self.seed = self.shop.goals[number], seed
        self.way = None if self.original else self.shop.ways[number]
        self.task = self.goal.text.strip()
        return self.start()

    def start(self) -> tuple[str, dict[str, Any]]:
        """Begin an episode with the present goal."""
        self.visit = Session(self.shop, self.goal, page_size=3 if self.compact else 10)
        self.turns, self.done, self.won = 0, False, False
        observation = self.text() if self.compact else f"{self.task}\n{self.text()}"
        return observation, {"won": False, "task_score": 0.0}

    def task_key(self) -> str:
        product = self.goal.product
        return f"{product.asin} {product.title} {self.goal.text}"

    def num_eval_tasks(self) -> int:
        return len(self.validation)

    def draw_visit(self) -> None:
        """The original's draw of another visit, at the beginning and after every purchase."""
        self.visit_name = "".join(self.rng.choices(string.ascii_lowercase, k=10))
        goals = self.shop.goals
        mass = list(itertools.accumulate((goal.weight for goal in goals), initial=0))
        # The original's index is one too high: the first goal never comes, the last one twice as
        # often as it should.
        index = bisect_right(mass, self.rng.uniform(0, mass[-1]))
        self.goal = goals[min(index, len(goals) - 1)]

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        is_over = self.done or self.turns >= self.turn_limit
        if is_over and not self.original:
            info = {"won": self.won, "task_score": self.visit.score["reward"]}
            return self.text(), 0.0, True, False, info
        self.turns += 1
        self.visit.act(action)
        observation, task_score = self.text(), self.visit.score["reward"]
        self.done, self.won = self.visit.page == "done", task_score == 1
        truncated = not self.done and self.turns >= self.turn_limit
        reward = WIN_REWARD if self.won else 0.0
        info = {"won": self.won, "task_score": task_score}
        result = observation, reward, self.done, truncated, info
        if self.done and self.original:  # goes on at once with another goal
            self.draw_visit()
            self.start()
        return result

    def text(self) -> str:
        """The page, short or as LaMer's prompts show it: the segments after the task, quoted."""
        if self.compact:
            return self.visit.short_text()
        before, found, after = self.visit.text().partition(f" [SEP] {self.task} [SEP] ")
        if not found:  # the last page does not repeat the task
            return before
        return " [SEP] ".join(f"'{segment}'" for segment in after.split(" [SEP] "))

    def shorten(self, observation: str, num_segments: int = 15) -> str:
        """How LaMer's histories show an observation that is not their last."""
        segments = observation.split(" [SEP] ")
        shown = " [SEP] ".join(segments[:num_segments])
        num_more = len(segments) - num_segments
        return f"{shown} ... ({num_more} more)" if num_more > 0 else shown

    def rules(self, style: str = "full") -> str:
        if style == "compact":
            return ""
        return (
            "You are shopping in WebShop, an online shop of text pages. The task says what to buy: "
            "a kind of product, properties it must have, often options (a colour, a size) and a "
            "highest price.\n"
            "`search[words]` lists products; `click[text]` presses a button, opens a product, or "
            "chooses an option. Choose every option the task names before `click[buy now]`: pages "
            "may not show what is chosen; leaving the product loses it. Any other action does "
            "nothing but costs a turn.\n"
            f"You have {self.turn_limit} turns. Buying ends the episode; the task is solved if "
            "product, options and price are all right. Shop and task are the same in every "
            "episode."
        )

    def parse(self, reply: str) -> tuple[str, bool]:
        text = between(reply.lower(), "<action>", "</action>")
        if text is None:
            return reply[-20:].lower().strip(), False  # what the original then sends as the action
        return text.strip(), True

    def actions(self) -> list[str]:
        clicks = [f"click[{text}]" for text in self.visit.clickables]
        if self.visit.page != "search":
            return clicks
        search = ["search[<your query>]"]
        return search + clicks if self.original else search

    def brief(self, initial: str, records: Records, choices: str = "") -> str:
        """The last page, if short: it tells all, its buttons too."""
        if not self.compact:
            return super().brief(initial, records, choices)
        return records[-1][1] if records else initial

    def anchor(self) -> str | None:
        if self.original:
            return None
        return f"{self.text()} {self.visit.options}"  # full pages do not show the options

    def scripted(self, skill: float, rng: random.Random, memory: Sequence[str] = ()) -> str:
        action = self.expert() if rng.random() < skill else self.novice(rng, memory)
        return f"<action>{action}</action>"

    def expert(self) -> str:
        """The next action on the way to a winning purchase, which the expert knows."""
        visit, goal = self.visit, self.goal
        product, values = self.way or (goal.product, goal.values)
        if visit.page == "search":
            asked = " ".join([*goal.attributes, goal.product.query, *goal.values])
            queries = [asked, product.title, product.document]
            queries = [re.sub(r"[\[\]\n]", " ", query).lower() for query in queries]
            for query in queries:
                if product in self.shop.search(query)[: visit.page_size]:
                    return f"search[{query}]"
            return f"search[{queries[0]}]"
        if visit.page == "item" and visit.product is product:
            left = [value for value in values if value not in visit.options.values()]
            return f"click[{left[0]}]" if left else "click[buy now]"
        if visit.page == "results" and product in visit.listed:
            return f"click[{product.asin.lower()}]"
        return "click[< prev]" if visit.page in SUB_PAGES else "click[back to search]"

    def novice(self, rng: random.Random, memory: Sequence[str]) -> str:
        """The next action of a naive shopper.

        It searches for words of the task, opens some product, chooses options, mostly those asked
        for, and buys. Mostly it follows its notes: "not [a], try [b] with [c]" keeps it from a,
        sends it to b, and has it choose c.
        """
        visit, goal = self.visit, self.goal
        avoided, advised = [], []
        if rng.random() < 0.95:
            avoided = re.findall(r"not \[([^\]]*)\]", " ".join(memory))
            last_note = memory[-1] if memory else ""
            advised = re.findall(r"\[([^\]]*)\]", last_note.partition("try ")[2])
        if rng.random() < 0.05:
            action = rng.choice(self.actions() or [""])
            return action.replace("<your query>", goal.product.query)
        if visit.page == "search":
            # The same words in every episode, so that what its notes advise is listed again.
            return f"search[{' '.join([*goal.attributes, goal.product.query, *goal.values])}]"
        if visit.page == "results":
            listed = [product.asin.lower() for product in visit.listed]
            found = [asin for asin in listed if asin not in avoided] or ["next >"]
            return f"click[{rng.choice([asin for asin in found if asin in advised] or found)}]"
        if visit.page != "item" or visit.product.asin.lower() in avoided:
            return "click[< prev]"
        for name in visit.product.options:
            values = [value for value, owner in visit.product.choices.items() if owner == name]
            if values and name not in visit.options:
                asked = [value for value in values if value in advised]
                asked = asked or [value for value in values if value in goal.values]
                if asked and rng.random() < 0.8:
                    values = asked
                return f"click[{rng.choice(values)}]"
        return "click[buy now]"

    def scripted_reflection(self, rng: random.Random) -> str:
        """What to try next.

        The same product, if it was not bought or only options were missed, else the next one.
        """
        visit, note = self.visit, "nothing"
        if visit.product is not None:
            asin = visit.product.asin.lower()
            missed = [value for value in self.goal.values if value not in visit.options.values()]
            is_right = True
            if visit.page == "done":
                is_kind = all(visit.score[part] == 1 for part in ("r_type", "r_att", "r_price"))
                is_right = is_kind and bool(missed)
            if is_right and set(missed) <= set(visit.product.choices):
                note = f"try [{asin}]"
                if missed:
                    note += " with" + "".join(f" [{value}]" for value in missed)
            else:
                listed = [product.asin.lower() for product in visit.listed]
                after = listed[(listed.index(asin) + 1) % len(listed)]
                note = f"not [{asin}], try [{after}]"
        return f"<remark>{note if rng.random() < 0.95 else 'nothing'}</remark>"

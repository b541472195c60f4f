"""Tests of WebShop: recorded cases of the original, rules by hand, bad input, the scripted player.

    pytest worlds/test_webshop.py

Recorded cases are read from $LAMER_GOLDEN, by default the folder golden/ of this repository; a test
whose file is missing is skipped by name, or fails with LAMER_REQUIRE_GOLDEN=1. Some cases can be
checked only on the catalogue they were recorded on, which is no part of this repository: WebShop's
items_shuffle_1000.json, items_ins_v2_1000.json and items_human_ins.json in $LAMER_DATA/webshop, by
default data/webshop beside the recorded cases. Without these files such tests are skipped.
"""

import copy
import hashlib
import importlib
import itertools
import json
import os
import random
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "worlds")]
webshop = importlib.import_module("webshop")
Goal, Product, Session, WebShop = webshop.Goal, webshop.Product, webshop.Session, webshop.WebShop

GOLDEN = Path(os.environ.get("LAMER_GOLDEN", ROOT / "golden"))
DATA = Path(os.environ.get("LAMER_DATA", GOLDEN.parent / "data")) / "webshop"
FULL_SET_ONLY = {"webshop_goals", "webshop_transcripts"}  # of use with genuine data only


def golden(name, kind):
    """The recorded cases of one kind in a file: a list that is not empty."""
    path = GOLDEN / f"{name}.json"
    if not path.exists():
        is_due = os.environ.get("LAMER_REQUIRE_GOLDEN") == "1" and name not in FULL_SET_ONLY
        missing = pytest.fail if is_due else pytest.skip
        missing(f"no recorded cases: {path} is not there")
    cases = json.loads(path.read_text(encoding="utf-8"))[kind]
    assert cases, f"{path}: {kind} is empty"
    return cases


@pytest.fixture
def data():
    """The folder of genuine product files; the test is skipped where it is absent."""
    if not DATA.exists():
        pytest.skip(f"no genuine data: {DATA} is not there")
    return str(DATA)


def genuine_shop(data, seed=0, human_goals=False):
    return webshop.open_shop(data, None, human_goals, seed)


# ----------------------------------------------------------------------------------- recorded cases


def product_of(case):
    return Product(
        asin=case.get("asin", ""),
        title=case["name"],
        description=case.get("Description", ""),
        bullets=case.get("BulletPoints", ""),
        attributes=case.get("Attributes", ""),
        options={},
        prices=[],
        query=case["query"],
        category=case["category"],
        product_category=case["product_category"],
    )


def test_golden_webshop_reward():
    for case in golden("webshop_reward", "cases"):
        product, wanted = product_of(case["product"]), case["goal"]
        goal = Goal(
            product=product_of(wanted),
            text="",
            attributes=tuple(wanted["attributes"]),
            options=wanted["goal_options"],
            price_upper=wanted["price_upper"],
        )
        parts = webshop.score(product, goal, case["price"], case["options"])
        assert parts == pytest.approx(case["expected"], abs=1e-9)
        assert webshop.nouns(product.title) == case["nouns"]["purchased"]
        assert webshop.nouns(goal.product.title) == case["nouns"]["goal"]


def test_golden_webshop_fuzz():
    for case in golden("webshop_fuzz", "token_set_ratio"):
        assert webshop.token_set_ratio(case["a"], case["b"]) == case["difflib"], case
        assert webshop.is_close(case["a"], case["b"]) == (case["difflib"] > 85), case
    for case in golden("webshop_fuzz", "normalize_color"):
        assert webshop.plain_option(case["value"]) == case["normalized"], case


def test_golden_webshop_noun_reference():
    for pair in golden("webshop_noun_reference", "pairs"):
        bought, wanted = (
            product_of(dict(name=pair[key], query=key, category="", product_category=""))
            for key in ("purchased_name", "goal_name")
        )
        title_score = webshop.type_score(bought, wanted)["title_score"]
        assert title_score == pytest.approx(pair["title_score_with_stand_in"])
    for session in golden("webshop_noun_reference", "human_sessions"):
        assert len(webshop.nouns(session["goal_name"])) == session["noun_count_with_stand_in"]


@pytest.mark.parametrize(
    ("kind", "text"),
    [("analyzer_strings", "text"), ("analyzer_documents", "contents"), ("queries", "query")],
)
def test_golden_webshop_words(kind, text):
    for case in golden("webshop_search", kind):
        assert webshop.analyze(case[text]) == case["tokens"]


def test_golden_webshop_search(data):
    shop = genuine_shop(data)
    documents = {product.asin: product.document for product in shop.products}
    for case in golden("webshop_search", "analyzer_documents"):
        assert documents[case["asin"]] == case["contents"]
    for case in golden("webshop_search", "queries"):
        numbers, scores = shop.index.search(case["query"])
        asins = [shop.ranked[i].asin for i in numbers]
        assert asins == [asin for asin, _ in case["hits"]], case["query"]
        assert scores == pytest.approx([score for _, score in case["hits"]], abs=5e-4)


def test_golden_webshop_goals(data):
    for case in golden("webshop_goals", "datasets"):
        shop = genuine_shop(data, case["seed"], case["human_goals"])
        assert (len(shop.products), len(shop.goals)) == (case["n_products"], case["n_goals"])
        first = case["first_goals"]
        assert first, "no goals to compare"
        goals = [*shop.goals[: len(first)], shop.goals[-1]]
        for goal, expected in zip(goals, [*first, case["last_goal"]], strict=True):
            found = dict(
                asin=goal.product.asin,
                category=goal.product.category,
                query=goal.product.query,
                name=goal.product.title,
                product_category=goal.product.product_category,
                instruction_text=goal.text,
                attributes=list(goal.attributes),
                price_upper=goal.price_upper,
                goal_options=goal.options,
                weight=pytest.approx(goal.weight),
            )
            assert found == expected
        texts = "\n".join(goal.text for goal in shop.goals)
        digest = hashlib.sha256(texts.encode()).hexdigest()
        assert digest == case["sha256_of_all_instruction_texts_joined_by_newline"]
        assert sum(goal.weight for goal in shop.goals) == pytest.approx(case["sum_of_weights"])
        prices = case["sampled_prices"]
        assert {asin: shop.prices[asin] for asin in prices} == prices
        rng = random.Random()
        rng.setstate(shop.rng.getstate())
        assert [rng.random(), rng.random()] == case["next_random_after_shuffle"]


def state_of(env):
    visit = env.visit
    kinds = dict(search="search", results="search_results", item="item_page", done="done")
    return dict(
        session=env.visit_name,
        page_kind=kinds.get(visit.page, "item_sub_page"),
        keywords=visit.words,
        results_page=visit.number or None,
        asin=visit.product and visit.product.asin,
        options=visit.options,
    )


def check_page(env, expected, observation, raw):
    """Compare what is seen and offered after a step with what was recorded."""
    assert raw == expected["observation"]
    assert observation.removeprefix(env.task + "\n") == expected["formatted_observation"]
    bar = env.visit.page == "search"
    offered = dict(has_search_bar=bar, clickables=env.visit.clickables)
    assert offered == expected["available_actions"]
    assert env.actions() == expected["admissible_lines"]
    if "search_result_asins" in expected:
        asins = [product.asin for product in env.visit.results]
        assert asins == expected["search_result_asins"]


def history_block(env, lines, length, segments):
    """The last `length` lines of an episode, all but the last shortened, as prompts show them."""
    first = max(len(lines) - length, 0)
    block = []
    for k, (action, observation, done) in enumerate(lines[first:], start=first + 1):
        shown = observation if k == len(lines) else env.shorten(observation, segments)
        block.append(f"Action {k}: {action}\nObservation {k}: {shown}")
        if done:
            break
    return "\n".join(block)


def test_golden_webshop_transcripts(data):
    for case in golden("webshop_transcripts", "transcripts"):
        config = case["config"]
        env = WebShop(
            data,
            products=config.get("num_products"),
            human_goals=config["human_goals"],
            shop_seed=config["seed"],
            original=True,
        )
        env.goal, env.visit_name = env.shop.goals[config["goal_index"]], str(config["goal_index"])
        env.seed, env.task = 0, env.goal.text
        assert env.task == case["task"]
        observation = env.start()[0]
        check_page(env, case["initial"], observation, env.visit.text())
        lines = []
        assert case["steps"], "no steps to compare"
        for step in case["steps"]:
            before = env.visit
            if "event" in step:  # a restart
                observation, done = env.reset(0)[0], False
            else:
                observation, reward, done, _, info = env.step(step["action"])
                assert reward == step["wrapper_reward"] and done == step["done"]
                assert info["won"] == step["won"] and info["task_score"] == step["task_score"]
                lines.append((step["action"], observation, done))
            if done:
                assert before.score.items() >= step["reward_info"].items() - {("reward", 0)}
            page = before if done else env.visit
            check_page(env, step, observation, page.text())
            assert state_of(env) == step["state_after"]
        assert any("search_result_asins" in step for step in case["steps"])
        assert history_block(env, lines, 5, 15) == case["history_block_last5_max15"]
        assert history_block(env, lines, 3, 6) == case["history_block_last3_max6"]


def test_golden_unwinnable_goals_are_left_out(data):
    for seed in (0, 1000):
        assert genuine_shop(data, seed).ways.count(None) == 458
    env, original = WebShop(data), WebShop(data, original=True)
    assert len(env.training) + len(env.validation) == 6910 - 458
    assert (len(original.validation), len(original.training)) == (500, 6410)


# ------------------------------------------------------------------------------------ rules by hand


def make_product(asin="A1", title="Soft red mug", query="mugs", options=None, **fields):
    usual = dict(
        description="",
        bullets=["for tea"],
        attributes=["hand made"],
        prices=[12.0],
        category="garden",
        product_category="Home › Kitchen › Mugs",
    )
    return Product(asin=asin, title=title, query=query, options=options or {}, **usual | fields)


def make_shop(*products, instruction="a mug", attributes=("hand made",)):
    return webshop.Shop(list(products), [(products[0], instruction, tuple(attributes), None)], 0)


def test_token_set_ratio_by_hand():
    assert webshop.token_set_ratio("Blue shirt", "a shirt, light-blue") == 100  # a subset
    assert webshop.token_set_ratio("abcd", "abce") == 75  # 2 * 3 common letters of 8
    assert webshop.token_set_ratio("red cup", "red cap") == 86  # as a whole, 2 * 6 of 14
    assert webshop.token_set_ratio("\u00e9\u00fc", "x") == 0
    assert webshop.token_set_ratio("--", "--") == 0
    rng, letters = random.Random(0), "aabcde  -"
    for _ in range(3000):
        a, b = ("".join(rng.choices(letters, k=rng.randrange(1, 14))) for _ in "ab")
        assert webshop.is_close(a, b) == (webshop.token_set_ratio(a, b) > 85)


def test_colours_and_options_by_hand():
    assert webshop.plain_option("black1901") == "black"
    assert webshop.plain_option("washed") == "ash"
    assert webshop.plain_option(("color", "blue")) == "blue"
    assert webshop.plain_option(("color", "dark blue")) == "('color', 'dark blue')"
    goal = Goal(make_product(), "", ("hand made",), {"color": "blue", "size": "dark blue"}, 20.0)
    for values, matched in ((["light blue"], 2), (["x", "dark blue"], 2), (["red"], 0)):
        chosen = dict(enumerate(values))
        assert webshop.score(goal.product, goal, 12.0, chosen)["num_option_matches"] == matched


def test_reward_by_hand():
    product = make_product()
    goal = Goal(product, "", ("hand made", "for tea", "green"), {}, 12.0)
    assert webshop.score(product, goal, 12.0, {})["reward"] == 3 / 4
    assert webshop.score(product, goal, 12.5, {})["reward"] == 2 / 4
    other = make_product(title="Iron rack", query="racks", product_category="Home › Racks")
    assert webshop.score(other, goal, 12.0, {})["r_type"] == 0
    cases = {"Soft iron rack": 1.0, "Soft": 1.0, "Rack": 0.0}  # 1 of 3 nouns is above 0.2
    for title, r_type in cases.items():
        other = make_product(title=title, query="racks", product_category="Home")
        assert webshop.score(other, goal, 12.0, {})["r_type"] == r_type


def test_stem_by_hand():
    stems = (
        "running run, flies fli, relational relat, happy happi, hopping hop, hoping hope, "
        "possibly possibl, archaeology archaeolog, controlling control, adoption adopt, sky sky, "
        "at at, feed feed, agreed agre, bled bled, rate rate, hopefulness hope"
    )
    for word, expected in map(str.split, stems.split(",")):
        assert webshop.stem(word) == expected


def test_words_by_hand():
    words = {
        "cafe\u0301s": ["cafe\u0301"],
        "\uff8a\uff9f x": ["\uff8a", "x"],
        "a_b __ c": ["a_b", "c"],
        "1\u20442 3.5.x": ["1\u20442", "3.5", "x"],
        "\u2764\ufe0f\u2764": ["\u2764\ufe0f", "\u2764"],
        "5\u00bd": ["5"],
        "co\u00adop": ["co\u00adop"],
        "x\u200by": ["x", "y"],
        "rock'n'roll's": ["rock'n'rol"],
    }
    assert {text: webshop.analyze(text) for text in words} == words


def test_bm25_by_hand():
    index = webshop.Index(["red mug", "red red lamp", "blue mug mug mug"])
    numbers, scores = index.search("red")
    # idf = ln(1 + 1.5/2.5); tf / (tf + 0.9 (0.6 + 0.4 len/3)), for (tf, len) = (2, 3) and (1, 2)
    idf = 0.4700036
    assert list(numbers) == [1, 0]
    assert scores == pytest.approx([idf * 2 / 2.9, idf * 1 / (1 + 0.9 * (0.6 + 0.8 / 3))], rel=1e-5)
    assert index.search("red red")[1] == pytest.approx(2 * scores)
    assert len(index.search("the unknown")[0]) == len(index.search("")[0]) == 0
    assert list(webshop.Index(["x"] * 60).search("x")[0]) == list(range(50))  # ties by number


def test_price_bounds():
    rng = random.Random(0)
    for price in (5.0, 10.0, 37.2, 961.0, 975.0, 989.0, 990.0, 2000.0):
        grid = [10.0 * k for k in range(1, 100) if 10 * k > price][:4]
        product = make_product(prices=[price])
        instruction = (product, "x", (), None)
        goals = [webshop.make_goals([instruction], {"A1": price}, rng)[0] for _ in range(60)]
        uppers = {goal.price_upper for goal in goals}
        assert uppers == (set(grid[1:]) if len(grid) > 1 else {1000000})
        assert all(("lower than" in goal.text) == (len(grid) > 1) for goal in goals)


def test_pages_and_actions():
    options = {"color": ["red", "blue", "red"], "shade": ["blue", "buy now"]}
    cup = make_product("B2", "Tall cup", options=options, bullets=["", "x"], description=" \n ")
    shop = make_shop(make_product(), cup)
    visit = Session(shop, shop.goals[0])
    without_form = ["", "search", "search[]", "Search[mug]", "x\nsearch[mug]", "[a]"]
    for action in [*without_form, "click[search]", "search[a[b] c]"]:
        visit.act(action)
        assert visit.page == "search", action
    visit.act("search[tall CUP] and more")
    assert visit.words == ["tall", "cup"]
    assert visit.clickables == ["back to search", "next >", "b2"]
    visit.act("click[b2]")
    assert visit.clickables == [*webshop.BUTTONS, "red", "blue"]
    visit.act("click[blue]")
    visit.act("click[red]")
    assert visit.options == {"shade": "blue", "color": "red"}
    visit.act("click[description]")
    assert visit.text().endswith("Back to Search [SEP] < Prev")
    visit.act("click[< prev]")
    visit.act("click[features]")
    assert visit.text().endswith("< Prev [SEP]  [SEP] x")
    assert visit.clickables == ["back to search", "< prev"]
    visit.act("click[< prev]")
    assert visit.page == "item" and len(visit.options) == 2
    visit.act("click[< prev]")
    assert visit.page == "results" and not visit.options
    specials = {"<q> mugs": 2, "<c> garden x": 2, "<c>": 0, "<r>": 2, "<q>": 0, "<a> cup": 1}
    for words, found in specials.items():
        visit.act(f"search[{words}]")
        assert len(visit.results) == found, words
    visit.act("click[a1]" if visit.listed[0].asin == "A1" else "search[red]")
    visit.act("click[a1]")
    visit.act("click[buy now]")
    assert visit.page == "done" and visit.clickables == []
    assert visit.score["reward"] == 1
    visit.act("search[cup]")
    assert visit.page == "done"


def ways_by_colour(shop):
    return {goal.options["color"]: way for goal, way in zip(shop.goals, shop.ways, strict=True)}


def test_goals_that_only_another_product_wins():
    bad = make_product("A1", options={"color": ["black1901", "white"]})
    assert ways_by_colour(make_shop(bad)) == {"black1901": None, "white": (bad, ["white"])}
    # "color blac1901" names no colour, and is close to the wanted option, compared as
    # "color black1901".
    other = make_product("B2", options={"any": ["color blac1901"]})
    ways = {"black1901": (other, ["color blac1901"]), "white": (bad, ["white"])}
    assert ways_by_colour(make_shop(bad, other)) == ways
    # "click[8 [eu]]" is read as another action, and an action is one line.
    bracket = make_shop(make_product(options={"size": ["8 [eu]", "9"]}))
    assert [way is None for way in bracket.ways] == ["[" in goal.text for goal in bracket.goals]
    lines = make_product(options={"size": ["x\ny", "9"]})
    instructions = [(lines, "a mug", ("hand made",), [value]) for value in ("x\ny", "9")]
    assert sorted(webshop.Shop([lines], instructions, 0).ways, key=bool) == [None, (lines, ["9"])]
    many = make_product(options={f"name {i}": [f"value {i}"] for i in range(11)})
    assert make_shop(many).ways == [None], "too many sets of options to try"


# ---------------------------------------------------------------------------------------- bad input


@pytest.fixture
def folder(tmp_path):
    """A function that saves a catalogue in the genuine format, with one of its files changed."""
    records, notes = webshop.generate_catalogue(12, 0)
    contents = {
        "items_shuffle.json": records,
        "items_ins_v2.json": notes,
        "items_human_ins.json": {},
    }

    def save(name=None, change=None):
        for file, content in contents.items():
            content = copy.deepcopy(content)
            if file == name:
                changed = change(content)  # in place, unless it gives other content
                content = changed if isinstance(changed, bytes | dict | list) else content
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            (tmp_path / file).write_bytes(raw)
        webshop.open_shop.cache_clear()
        return str(tmp_path)

    return save


def test_written_catalogues_load_as_generated(folder):
    env, generated = WebShop(folder(), compact=True), WebShop(products=12, shops=1)
    assert [goal.text for goal in env.shop.goals] == [goal.text for goal in generated.shop.goals]
    assert env.reset(5)[0] == generated.reset(5)[0]


RECORDS, NOTES = "items_shuffle.json", "items_ins_v2.json"
NINE_OF_FIVE = {str(i): [{"value": f"{i} {j}"} for j in range(9)] for i in range(5)}


@pytest.mark.parametrize(
    ("name", "change", "place"),
    [
        (RECORDS, lambda c: json.dumps(c).encode()[:-9], RECORDS),
        (RECORDS, lambda c: b"\xff" + json.dumps(c).encode(), RECORDS),
        (RECORDS, lambda c: b"[" * 10**5, RECORDS),
        (RECORDS, lambda c: b"x" * 10**7, RECORDS),
        (RECORDS, lambda c: b"[" + b"9" * 5000 + b"]", RECORDS),
        (RECORDS, lambda c: [], "goals"),
        (RECORDS, lambda c: dict(a=1), RECORDS),
        (RECORDS, lambda c: c.insert(3, 7), "product 3"),
        (RECORDS, lambda c: c[2].pop("asin"), "product 2"),
        (RECORDS, lambda c: c[2].update(images=[]), "ASIN of 2"),
        (RECORDS, lambda c: c[2].pop("images") and None, "ASIN of 2"),
        (RECORDS, lambda c: c[4].update(pricing="$1.2.3"), "ASIN of 4"),
        (RECORDS, lambda c: c[4].update(pricing="cheap"), "ASIN of 4"),
        (RECORDS, lambda c: c[4].update(pricing="$"), "ASIN of 4"),
        (RECORDS, lambda c: c[4].update(pricing=7), "ASIN of 4"),
        (RECORDS, lambda c: c[5].update(name=None), "ASIN of 5"),
        (RECORDS, lambda c: c[5].update(name="half of a pair \ud800"), "ASIN of 5"),
        (RECORDS, lambda c: c[5].update(customization_options=NINE_OF_FIVE), "ASIN of 5"),
        (RECORDS, lambda c: c[5].update(asin="a\nb"), r"a\\nb': is missing, but items_shuffle"),
        (RECORDS, lambda c: c[5].update(small_description=[1]), "ASIN of 5"),
        (RECORDS, lambda c: c[5].update(customization_options={"size": ["x"]}), "ASIN of 5"),
        (RECORDS, lambda c: c.append(dict(c[0], asin="B0NEW")), "B0NEW"),
        (NOTES, lambda c: list(c), NOTES),
        (NOTES, lambda c: c.pop(next(iter(c))) and None, NOTES),
        (NOTES, lambda c: c.update({next(iter(c)): []}), NOTES),
        (NOTES, lambda c: next(iter(c.values())).update(attributes="x"), NOTES),
        (NOTES, lambda c: next(iter(c.values())).pop("instruction_attributes") and None, NOTES),
        (NOTES, lambda c: [note.pop("instruction") for note in c.values()] and None, "goals"),
    ],
)
def test_bad_data_is_named_in_one_line(folder, name, change, place):
    if place.startswith("ASIN of "):
        place = webshop.generate_catalogue(12, 0)[0][int(place.split()[-1])]["asin"]
    with pytest.raises(ValueError, match=place) as error:
        WebShop(folder(name, change))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    if place != "goals":
        assert name in str(error.value)


def test_missing_files_and_options(folder, tmp_path):
    path = Path(folder())
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        file.unlink()
        webshop.open_shop.cache_clear()
        with pytest.raises(ValueError, match=file.name):
            WebShop(str(path), human_goals=True)
        file.write_bytes(content)
    wrong = dict(data=str(path / "none"), turns=0, products=0, human_goals=True)
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            WebShop(**{name: value})


ODD_REPLIES = [
    "",
    "\x00\x1b[2J",
    "<action>click[[b1]]</action>",
    "<action>\u202e\u05d0[\u05d1]</action>",
    "<action></action>",
    "<action>click[buy now</action>",
    "</action><action>",
    "<action>search[]</action>",
    "\ud800 <action>[</action>",
    "<action>click[\u0130]</action>",
    "<action>" + "[" * 5000 + "]" * 5000 + "</action>",
]


@pytest.mark.parametrize("compact", [True, False])
def test_odd_replies_do_nothing(compact):
    env = WebShop(compact=compact)
    first = env.reset(0)[0]
    for reply in ODD_REPLIES:
        env.start()
        before = env.text()
        action, is_valid = env.parse(reply)
        assert is_valid == ("<action>" in reply and "</action>" in reply)
        observation, reward, terminated, truncated, info = env.step(action)
        assert observation == before and reward == 0
        assert not terminated and not truncated and not info["won"]
    many_words = " ".join(f"word{i} shirts" for i in range(5000))
    env.step(f"search[{many_words}]")
    assert env.visit.page == "results" and len(env.visit.results) > 0
    assert env.reset(0)[0] == first


# -------------------------------------------------------------------------------------- the episode


def play(env, seed, skill=1.0, memory=()):
    """The (action, observation, reward) of every turn of the scripted player, and the last info."""
    rng, log = random.Random(seed), []
    env.reset(seed)
    done = False
    while not done:
        action, is_valid = env.parse(env.scripted(skill, rng, memory))
        observation, reward, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        log.append((action, observation, reward))
        assert is_valid
    return log, info


@pytest.mark.parametrize("shop_seed", [0, 1])
def test_the_scripted_player_wins_every_winnable_generated_goal(shop_seed):
    env = WebShop(shop_seed=shop_seed, shops=1)
    goals, ways = env.shop.goals[:500], env.shop.ways[:500]
    for goal, way in zip(goals, ways, strict=True):
        env.reset(0)
        env.goal, env.way = goal, way or (goal.product, goal.values)
        env.start()
        done = False
        while not done:
            action, _ = env.parse(env.scripted(1.0, random.Random(0)))
            _, _, terminated, truncated, info = env.step(action)
            done = terminated or truncated
        assert info["won"] == (way is not None)
    assert len(goals) == 500 and 0 < ways.count(None) < 50


def choices_of(product):
    """Every way to choose options: of each one value or none."""
    lists = [[None, *values] for values in product.options.values()]
    for combination in itertools.product(*lists):
        chosen = zip(product.options, combination, strict=True)
        yield {name: value for name, value in chosen if value is not None}


def test_unwinnable_generated_goals_cannot_be_won_by_any_purchase():
    """Brute force: every product with every choice of options."""
    shop = WebShop(products=60, shop_seed=1).shop
    lost = [goal for goal, way in zip(shop.goals, shop.ways, strict=True) if way is None]
    assert lost
    for goal in lost:
        for product in shop.products:
            for options in choices_of(product):
                parts = webshop.score(product, goal, shop.prices[product.asin], options)
                assert parts["reward"] < 1


def test_golden_goals_are_won_by_the_scripted_player(data):
    env = WebShop(data)
    assert all(play(env, seed)[1]["won"] for seed in range(100))


def test_same_seed_same_task_and_sticky_done():
    env, other = WebShop(), WebShop()
    assert env.turn_limit == 12
    for seed in [*range(20), 2**31, 2**31 + 1]:
        first = env.reset(seed)[0]
        log, info = play(env, seed, skill=0.0)
        last_page = log[-1][1]
        replies = [env.scripted(0.3, random.Random(i)) for i in range(30)]
        for action in ["search[mug]", *(env.parse(reply)[0] for reply in replies)]:
            assert env.step(action) == (last_page, 0.0, True, False, info)
        # The same goal, also after a wrong purchase.
        assert env.reset(seed)[0] == other.reset(seed)[0] == first
        assert play(env, seed, skill=0.3) == play(other, seed, skill=0.3)
    assert len({env.reset(seed)[0] for seed in range(100)}) > 80
    assert WebShop(shop_seed=1).reset(0)[0] != env.reset(0)[0]
    env = WebShop(turns=1)
    env.reset(0)
    page, _, terminated, truncated, info = env.step("search[mug]")
    assert truncated and not terminated
    # Nothing changes after the last turn, either.
    assert env.step("search[lamp]") == (page, 0.0, True, False, info)


@pytest.mark.parametrize("compact", [True, False])
def test_anchors_tell_pages_and_options_apart(compact):
    env = WebShop(compact=compact)
    env.reset(0)
    product = next(p for p in env.shop.products if len(p.choices) > 1)
    anchors = [env.anchor()]

    def go(*actions):
        for action in actions:
            env.step(action)
            anchors.append(env.anchor())

    first, other = [f"click[{value}]" for value in list(product.choices)[:2]]
    go(f"search[{product.title}]", "click[next >]", "click[< prev]")
    assert len(env.visit.listed) == (3 if compact else 10)
    assert len(set(anchors)) == 3 and anchors[3] == anchors[1], "the first page of results twice"
    go(f"click[{product.asin.lower()}]", first, other, "click[description]")
    assert len(set(anchors)) == 7
    go("click[< prev]")
    assert anchors[-1] == anchors[-3], "back on the page, options are as before"
    go("click[back to search]")
    assert anchors[-1] == anchors[0]


def test_only_the_full_score_pays():
    options = {"color": ["red", "blue"]}
    dear = make_product("B2", options=options, prices=[500.0])
    shop = make_shop(make_product(options=options), dear)
    env = WebShop()
    env.shop = shop
    env.goal = next(goal for goal in shop.goals if goal.values == ["blue"])
    purchases = [("a1", "blue", 10.0, 1.0)]
    purchases += [("a1", "red", 0.0, 2 / 3), ("b2", "blue", 0.0, 2 / 3)]  # one of three is wrong
    for asin, value, paid, task_score in purchases:
        env.start()
        assert env.actions() == ["search[<your query>]"]
        for action in ("search[mug]", f"click[{asin}]", f"click[{value}]"):
            info = {"won": False, "task_score": 0.0}
            assert env.step(action)[1:] == (0.0, False, False, info)
        info = {"won": paid > 0, "task_score": pytest.approx(task_score)}
        assert env.step("click[buy now]")[1:] == (paid, True, False, info)


def test_validation_goals_are_held_out_and_fixed():
    env = WebShop(shops=1)
    validation = [env.shop.goals[i].text for i in env.validation]
    training = {env.shop.goals[i].text for i in env.training}
    assert set(env.validation).isdisjoint(env.training) and len(validation) >= 200
    assert all(env.shop.ways[i] is not None for i in [*env.validation, *env.training])
    assert env.num_eval_tasks() == len(validation)
    keys = set()
    for i, text in enumerate(validation):
        assert env.reset(2**31 + i)[0].splitlines()[0] == text
        keys.add(env.task_key())
    assert len(keys) >= len(set(validation))
    assert {env.reset(seed)[0].splitlines()[0] for seed in range(200)} <= training


def test_training_goes_through_several_catalogues():
    """Of the same numbers and other products; validation goals are of the first."""
    env, same, only = WebShop(shops=3), WebShop(shops=3), WebShop(shops=1)
    first, shops = env.shop, set()
    for seed in range(40):
        env.reset(seed)
        shops.add(env.shop)
        if env.shop is first:
            assert env.shop.goals.index(env.goal) in env.training
        same.reset(seed)
        assert same.goal is env.goal
        env.reset(2**31 + seed)
        only.reset(2**31 + seed)
        assert env.shop is first and env.goal is only.goal
    assert len(shops) == 3
    numbers = {tuple(product.asin for product in shop.ranked) for shop in shops}
    titles = {tuple(product.title for product in shop.ranked) for shop in shops}
    assert len(numbers) == 1 and len(titles) == 3


@pytest.mark.parametrize(("num_products", "side"), [(1, 1), (300, 18), (2000, 45)])
def test_product_numbers_are_of_few_letters_and_few_digits(num_products, side):
    records, _ = webshop.generate_catalogue(num_products, 0)
    numbers = [record["asin"] for record in records]
    halves = [re.fullmatch(r"([A-Z]{2})(\d{2})", number).groups() for number in numbers]
    assert len({*numbers}) == num_products
    assert [len({*half}) for half in zip(*halves, strict=True)] == [side, side]


def test_a_generated_catalogue_hides_an_attribute_from_the_search():
    env = WebShop()
    num_opened = 0
    for goal in env.shop.goals[:50]:
        found, hidden = sorted(goal.attributes, key=lambda a: a not in goal.product.title)
        assert found in goal.product.document and hidden not in goal.product.document
        visit = Session(env.shop, goal)
        for action in (f"search[{goal.product.title}]", f"click[{goal.product.asin.lower()}]"):
            visit.act(action)
        if visit.page == "item":  # it was on the first page of results
            num_opened += 1
            assert hidden not in visit.text().replace(goal.text, "")
            visit.act("click[features]")
            assert hidden in visit.text().replace(goal.text, "")
    assert num_opened > 20


def test_original_goes_on_with_another_goal():
    env = WebShop(original=True, compact=False)
    task = env.reset(0)[0]
    assert env.anchor() is None, "the observation"
    asin = env.goal.product.asin.lower()
    env.step(f"search[{env.goal.product.title}]")
    assert f"click[{asin}]" in env.actions()
    env.step(f"click[{asin}]")
    env.step("click[buy now]")
    # The prompt keeps the first task.
    assert task.startswith(env.task)
    assert env.reset(0)[0].startswith(env.task)
    assert env.goal.text != env.task
    assert env.actions() == ["search[<your query>]", "click[search]"]


def test_novice_follows_its_notes():
    env = WebShop()
    env.reset(1)
    env.step(f"search[{env.goal.product.query}]")
    bad, good = (product.asin.lower() for product in env.visit.listed[:2])
    notes = [f"try [{bad}]", f"not [{bad}], try [{good}]"]
    actions = [env.parse(env.scripted(0.0, random.Random(i), notes))[0] for i in range(300)]
    assert actions.count(f"click[{good}]") > 200 and actions.count(f"click[{bad}]") < 40
    blind = [env.parse(env.scripted(0.0, random.Random(i)))[0] for i in range(300)]
    assert blind.count(f"click[{bad}]") > 60
    env.step(f"click[{bad}]")
    for _ in range(9):
        env.step(env.parse(env.scripted(0.0, random.Random(0)))[0])
    notes = [env.scripted_reflection(random.Random(i)) for i in range(50)]
    assert sum(f"[{bad}]" in note for note in notes) > 30


def test_novice_repeats_its_search():
    """Else what its notes advise would not be listed again."""
    env = WebShop()
    for seed in range(5):
        env.reset(seed)
        actions = [env.parse(env.scripted(0.0, random.Random(i)))[0] for i in range(100)]
        assert max(map(actions.count, actions)) > 85


def test_reflection_tells_a_wrong_product_from_missed_options():
    options = {"color": ["red", "blue"]}
    wrong = make_product("B2", "Soft red mug", attributes=["glazed"], options=options, bullets=[])
    shop = make_shop(make_product(options=options), wrong)
    env = WebShop()
    env.goal = next(goal for goal in shop.goals if goal.values == ["blue"])
    buys = [("a1", "red", "try [a1] with [blue]"), ("b2", "blue", "not [b2], try [a1]")]
    for asin, value, note in buys:
        env.visit = Session(shop, env.goal)
        for action in ("search[mug]", f"click[{asin}]", f"click[{value}]", "click[buy now]"):
            env.visit.act(action)
        notes = {env.scripted_reflection(random.Random(i)) for i in range(30)}
        assert notes == {f"<remark>{note}</remark>", "<remark>nothing</remark>"}


def prompts_of_a_novice(env, style, episodes=3):
    """Every prompt of trials a novice plays, with reflections of the longest usual form."""
    import lamer

    note = "not [ab12], try [cd34] with [small] [yellow]"
    rng = random.Random(0)
    for seed in range(60):
        initial, _ = env.reset(seed)
        past = []
        for episode in range(episodes):
            env.start()
            records, done = [], False
            while not done:
                yield lamer.play_prompt(env, style, "reflection", initial, past, episode, records)
                action, _ = env.parse(env.scripted(0.0, rng))
                observation, _, terminated, truncated, _ = env.step(action)
                done = terminated or truncated
                records.append((action, observation, done))
            past.append(lamer.PastEpisode(records, note))


def test_compact_prompts_state_the_task_and_are_short():
    env = WebShop(compact=True)
    pieces = re.compile(r"\w+|[^\w\s]")
    longest = 0
    for text in prompts_of_a_novice(env, "compact"):
        assert env.goal.text in text
        longest = max(longest, len(pieces.findall(text)))
    assert 50 < longest <= 300
    assert env.rules("compact") == ""


def test_full_prompts_state_the_task():
    env = WebShop(compact=False)
    for text in prompts_of_a_novice(env, "full"):
        assert env.goal.text in text
    assert "webshop" in env.rules("full").lower()

"""WebShop: recorded cases of the original, rules by hand, bad input, and the scripted player. `pytest worlds`."""

import copy
import hashlib
import importlib
import json
import os
import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "worlds")]
webshop = importlib.import_module("webshop")
Goal, Product, Session, WebShop = webshop.Goal, webshop.Product, webshop.Session, webshop.WebShop

GOLDEN = Path(os.environ.get("LAMER_GOLDEN", ROOT.parent / "shared" / "golden"))
DATA = Path(os.environ.get("LAMER_DATA", ROOT.parent / "shared" / "data")) / "webshop"


def golden(name):
    """Recorded cases; a skip where they, or the genuine files they were recorded on, are absent."""
    for path in (GOLDEN / f"{name}.json", DATA):
        if not path.exists():
            is_due = path != DATA and os.environ.get("LAMER_REQUIRE_GOLDEN") == "1"
            (pytest.fail if is_due else pytest.skip)(f"{path} is not there")
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def genuine_shop(seed=0, human_goals=False):
    return webshop.open_shop(str(DATA), None, human_goals, seed)


# -------------------------------------------------------------------------------------- recorded cases


def product_of(case):
    fields = dict(description="Description", bullets="BulletPoints", attributes="Attributes", title="name")
    found = {name: case.get(key, "") for name, key in fields.items()}
    found |= {key: case[key] for key in ("query", "category", "product_category")}
    return Product(asin=case.get("asin", ""), options={}, prices=[], **found)


def test_golden_webshop_reward():
    for case in golden("webshop_reward")["cases"]:
        product, goal = product_of(case["product"]), case["goal"]
        goal = Goal(product_of(goal), "", tuple(goal["attributes"]), goal["goal_options"], goal["price_upper"])
        assert webshop.score(product, goal, case["price"], case["options"]) == pytest.approx(case["expected"], abs=1e-9)
        assert webshop.nouns(product.title) == case["nouns"]["purchased"]
        assert webshop.nouns(goal.product.title) == case["nouns"]["goal"]


def test_golden_webshop_fuzz():
    cases = golden("webshop_fuzz")
    for case in cases["token_set_ratio"]:
        assert webshop.token_set_ratio(case["a"], case["b"]) == case["difflib"], case
        assert webshop.is_close(case["a"], case["b"]) == (case["difflib"] > 85), case
    for case in cases["normalize_color"]:
        assert webshop.plain_option(case["value"]) == case["normalized"], case


def test_golden_webshop_noun_reference():
    for pair in golden("webshop_noun_reference")["pairs"]:
        products = [
            product_of(dict(name=pair[key], query=key, category="", product_category=""))
            for key in ("purchased_name", "goal_name")
        ]
        assert webshop.type_score(*products)["title_score"] == pytest.approx(pair["title_score_with_stand_in"])
    for session in golden("webshop_noun_reference")["human_sessions"]:
        assert len(webshop.nouns(session["goal_name"])) == session["noun_count_with_stand_in"]


def test_golden_webshop_search():
    cases = golden("webshop_search")
    for case in cases["analyzer_strings"]:
        assert webshop.analyze(case["text"]) == case["tokens"]
    shop = genuine_shop()
    documents = {product.asin: product.document for product in shop.products}
    for case in cases["analyzer_documents"]:
        assert documents[case["asin"]] == case["contents"]
        assert webshop.analyze(case["contents"]) == case["tokens"]
    for case in cases["queries"]:
        assert webshop.analyze(case["query"]) == case["tokens"]
        numbers, scores = shop.index.search(case["query"])
        assert [shop.ranked[i].asin for i in numbers] == [asin for asin, _ in case["hits"]], case["query"]
        assert scores == pytest.approx([score for _, score in case["hits"]], abs=5e-4)


def test_golden_webshop_goals():
    for case in golden("webshop_goals")["datasets"]:
        shop = genuine_shop(case["seed"], case["human_goals"])
        assert (len(shop.products), len(shop.goals)) == (case["n_products"], case["n_goals"])
        for goal, expected in zip(
            [*shop.goals[:12], shop.goals[-1]], [*case["first_goals"], case["last_goal"]], strict=True
        ):
            found = {key: getattr(goal.product, key) for key in ("asin", "category", "query", "product_category")}
            found |= dict(name=goal.product.title, instruction_text=goal.text, attributes=list(goal.attributes))
            found |= dict(price_upper=goal.price_upper, goal_options=goal.options, weight=pytest.approx(goal.weight))
            assert found == expected
        texts = "\n".join(goal.text for goal in shop.goals).encode()
        assert hashlib.sha256(texts).hexdigest() == case["sha256_of_all_instruction_texts_joined_by_newline"]
        assert sum(goal.weight for goal in shop.goals) == pytest.approx(case["sum_of_weights"])
        assert {asin: shop.prices[asin] for asin in case["sampled_prices"]} == case["sampled_prices"]
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


def test_golden_webshop_transcripts():
    for case in golden("webshop_transcripts")["transcripts"]:
        config = case["config"]
        options = dict(products=config.get("num_products"), human_goals=config["human_goals"], shop_seed=config["seed"])
        env = WebShop(str(DATA), **options, original=True)
        env.goal, env.visit_name = env.shop.goals[config["goal_index"]], str(config["goal_index"])
        env.seed, env.task, lines = 0, env.goal.text, []
        assert env.task == case["task"]
        expected, observation, raw = case["initial"], env.start()[0], env.visit.text()
        for step in [None, *case["steps"]]:
            if step is not None:
                expected, before = step, env.visit
                if "event" in step:
                    observation, done = env.reset(0)[0], False
                else:
                    observation, reward, done, _, info = env.step(step["action"])
                    assert (reward, done, info["won"]) == (step["wrapper_reward"], step["done"], step["won"])
                    assert info["task_score"] == step["task_score"]
                    lines.append((step["action"], observation, done))
                raw = before.text() if done else env.visit.text()
                if "reward_info" in step:
                    assert before.score.items() >= step["reward_info"].items() - {("reward", 0)}
            assert raw == expected["observation"]
            assert observation.removeprefix(env.task + "\n") == expected["formatted_observation"]
            if expected.get("available_actions"):
                bar = env.visit.page == "search"
                assert dict(has_search_bar=bar, clickables=env.visit.clickables) == expected["available_actions"]
                assert env.actions() == expected["admissible_lines"]
            if "search_result_asins" in expected:
                assert [product.asin for product in env.visit.results] == expected["search_result_asins"]
            if "state_after" in expected:
                assert state_of(env) == expected["state_after"]
        for key, length, segments in (("history_block_last5_max15", 5, 15), ("history_block_last3_max6", 3, 6)):
            first = len(lines) - min(length, len(lines))
            block = []
            for k, (action, observation, done) in enumerate(lines[first:], start=first + 1):
                shown = observation if k == len(lines) else env.shorten(observation, segments)
                block.append(f"Action {k}: {action}\nObservation {k}: {shown}")
                if done:
                    break
            assert "\n".join(block) == case[key]


def test_unwinnable_goals_are_those_of_the_facts():
    golden("webshop_goals")
    for seed in (0, 1000):
        assert genuine_shop(seed).ways.count(None) == 458
    env, original = WebShop(str(DATA)), WebShop(str(DATA), original=True)
    assert len(env.training) + len(env.validation) == 6910 - 458
    assert (len(original.validation), len(original.training)) == (500, 6410)


# --------------------------------------------------------------------------------------- rules by hand


def make_product(asin="A1", title="Soft red mug", query="mugs", options=None, **fields):
    fields = dict(description="", bullets=["for tea"], attributes=["hand made"], prices=[12.0]) | fields
    kind = dict(query=query, category="garden", product_category="Home › Kitchen › Mugs")
    return Product(asin=asin, title=title, options=options or {}, **kind | fields)


def make_shop(*products, instruction="a mug", attributes=("hand made",)):
    return webshop.Shop(list(products), [(products[0], instruction, tuple(attributes), None)], 0)


def test_token_set_ratio_by_hand():
    assert webshop.token_set_ratio("Blue shirt", "a shirt, light-blue") == 100  # a subset
    assert webshop.token_set_ratio("abcd", "abce") == 75  # 2 * 3 common letters of 8
    assert webshop.token_set_ratio("red cup", "red cap") == 86  # "red cup" against "red cap": 2 * 6 of 14
    assert webshop.token_set_ratio("\u00e9\u00fc", "x") == webshop.token_set_ratio("--", "--") == 0
    rng, letters = random.Random(0), "aabcde  -"
    for _ in range(3000):
        a, b = ("".join(rng.choices(letters, k=rng.randrange(1, 14))) for _ in "ab")
        assert webshop.is_close(a, b) == (webshop.token_set_ratio(a, b) > 85)


def test_colours_and_options_by_hand():
    assert webshop.plain_option("black1901") == "black" and webshop.plain_option("washed") == "ash"
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
    stems = dict(running="run", flies="fli", relational="relat", happy="happi", hopping="hop", hoping="hope")
    stems |= dict(possibly="possibl", archaeology="archaeolog", controlling="control", adoption="adopt", sky="sky")
    stems |= {"at": "at", "feed": "feed", "agreed": "agre", "bled": "bled", "rate": "rate", "hopefulness": "hope"}
    assert {word: webshop.stem(word) for word in stems} == stems


def test_words_by_hand():
    words = {"cafe\u0301s": ["cafe\u0301"], "\uff8a\uff9f x": ["\uff8a", "x"], "a_b __ c": ["a_b", "c"]}
    words |= {
        "1\u20442 3.5.x": ["1\u20442", "3.5", "x"],
        "\u2764\ufe0f\u2764": ["\u2764\ufe0f", "\u2764"],
        "5\u00bd": ["5"],
    }
    words |= {"co\u00adop": ["co\u00adop"], "x\u200by": ["x", "y"], "rock'n'roll's": ["rock'n'rol"]}
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
        goals = [webshop.make_goals([(product, "x", (), None)], {"A1": price}, rng)[0] for _ in range(60)]
        uppers = {goal.price_upper for goal in goals}
        assert uppers == (set(grid[1:]) if len(grid) > 1 else {1000000})
        assert all(("lower than" in goal.text) == (len(grid) > 1) for goal in goals)


def test_pages_and_actions():
    options = {"color": ["red", "blue", "red"], "shade": ["blue", "buy now"]}
    cup = make_product("B2", "Tall cup", options=options, bullets=["", "x"], description=" \n ")
    shop = make_shop(make_product(), cup)
    visit = Session(shop, shop.goals[0])
    for action in ("", "search", "search[]", "click[search]", "search[a[b] c]", "Search[mug]", "x\nsearch[mug]", "[a]"):
        visit.act(action)
        assert visit.page == "search", action
    visit.act("search[tall CUP] and more")
    assert visit.words == ["tall", "cup"] and visit.clickables == ["back to search", "next >", "b2"]
    visit.act("click[b2]")
    assert visit.clickables == [*webshop.BUTTONS, "red", "blue"]
    visit.act("click[blue]")
    visit.act("click[red]")
    assert visit.options == {"shade": "blue", "color": "red"}
    visit.act("click[description]")
    assert visit.text().endswith("Back to Search [SEP] < Prev")
    visit.act("click[< prev]")
    visit.act("click[features]")
    assert visit.text().endswith("< Prev [SEP]  [SEP] x") and visit.clickables == ["back to search", "< prev"]
    visit.act("click[< prev]")
    assert visit.page == "item" and len(visit.options) == 2
    visit.act("click[< prev]")
    assert visit.page == "results" and not visit.options
    for special, found in (("<q> mugs", 2), ("<c> garden x", 2), ("<c>", 0), ("<r>", 2), ("<q>", 0), ("<a> cup", 1)):
        visit.act(f"search[{special}]")
        assert len(visit.results) == found, special
    visit.act("click[a1]" if visit.listed[0].asin == "A1" else "search[red]")
    visit.act("click[a1]")
    visit.act("click[buy now]")
    assert visit.page == "done" and visit.score["reward"] == 1 and visit.clickables == []
    visit.act("search[cup]")
    assert visit.page == "done"


def test_goals_that_only_another_product_wins():
    bad = make_product("A1", options={"color": ["black1901", "white"]})
    shop = make_shop(bad)
    assert [goal.options["color"] for goal, way in zip(shop.goals, shop.ways, strict=True) if way is None] == [
        "black1901"
    ]
    # "color blac1901" names no colour, and is close to the option that is compared as "color black1901"
    other = make_product("B2", options={"any": ["color blac1901"]})
    shop = make_shop(bad, other)
    ways = {goal.options["color"]: way for goal, way in zip(shop.goals, shop.ways, strict=True)}
    assert ways["black1901"] == (other, ["color blac1901"]) and ways["white"] == (bad, ["white"])
    bracket = make_shop(make_product(options={"size": ["8 [eu]", "9"]}))  # click[8 [eu]] is read as another action
    assert [way is None for way in bracket.ways] == ["[" in goal.text for goal in bracket.goals]


# ------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def folder(tmp_path):
    """A writable folder of genuine format, and a function that changes and saves one of its files."""
    records, notes = webshop.generate_catalogue(12, 0)
    contents = {"items_shuffle.json": records, "items_ins_v2.json": notes, "items_human_ins.json": {}}

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
    env, generated = WebShop(folder(), compact=True), WebShop(products=12)
    assert [goal.text for goal in env.shop.goals] == [goal.text for goal in generated.shop.goals]
    assert env.reset(5)[0] == generated.reset(5)[0]


RECORDS, NOTES = "items_shuffle.json", "items_ins_v2.json"


@pytest.mark.parametrize(
    ("name", "change", "place"),
    [
        (RECORDS, lambda c: json.dumps(c).encode()[:-9], RECORDS),
        (RECORDS, lambda c: b"\xff" + json.dumps(c).encode(), RECORDS),
        (RECORDS, lambda c: b"[" * 10**5, RECORDS),
        (RECORDS, lambda c: b"x" * 10**7, RECORDS),
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
    assert name in str(error.value) or place == "goals"


def test_missing_files_and_options(folder, tmp_path):
    path = Path(folder())
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        file.unlink()
        webshop.open_shop.cache_clear()
        with pytest.raises(ValueError, match=file.name):
            WebShop(str(path), human_goals=True)
        file.write_bytes(content)
    for options in (dict(data=str(path / "none")), dict(turns=0), dict(products=0), dict(human_goals=True)):
        with pytest.raises(ValueError, match=next(iter(options))):
            WebShop(**options)


ODD_REPLIES = [
    "", "\x00\x1b[2J", "<action>click[[b1]]</action>", "<action>\u202e\u05d0[\u05d1]</action>", "<action></action>",
    "<action>click[buy now</action>", "</action><action>", "<action>search[]</action>", "\ud800 <action>[</action>",
    "<action>click[\u0130]</action>", "<action>" + "[" * 5000 + "]" * 5000 + "</action>",
]  # fmt: skip


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
        assert (observation, reward, terminated, truncated, info["won"]) == (before, 0, False, False, False)
    env.step(f"search[{' '.join(f'word{i} shirts' for i in range(5000))}]")
    assert env.visit.page == "results" and len(env.visit.results) > 0
    assert env.reset(0)[0] == first


# ----------------------------------------------------------------------------------------- the episode


def play(env, seed, skill=1.0, memory=()):
    rng, (observation, _), done, log = random.Random(seed), env.reset(seed), False, []
    while not done:
        action, is_valid = env.parse(env.scripted(skill, rng, memory))
        observation, reward, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        log.append((action, observation, reward))
        assert is_valid
    return log, info


@pytest.mark.parametrize("shop_seed", [0, 1])
def test_the_scripted_player_wins_every_winnable_generated_goal(shop_seed):
    env = WebShop(shop_seed=shop_seed)
    ways = env.shop.ways[:500]
    lost = 0
    for goal, way in zip(env.shop.goals[:500], ways, strict=True):
        env.reset(0)
        env.goal, env.way = goal, way or (goal.product, goal.values)
        env.start()
        done = False
        while not done:
            _, _, terminated, truncated, info = env.step(env.parse(env.scripted(1.0, random.Random(0)))[0])
            done = terminated or truncated
        assert info["won"] == (way is not None)
        lost += way is None
    assert lost == ways.count(None) and 0 < lost < 50


def test_unwinnable_generated_goals_cannot_be_won_by_any_purchase():
    """Brute force: every product that may win but for its options, with every choice of options."""
    shop = WebShop(products=60, shop_seed=1).shop
    lost = [goal for goal, way in zip(shop.goals, shop.ways, strict=True) if way is None]
    assert lost
    for goal in lost:
        for product in shop.products:
            lists = [[(name, value) for value in [None, *values]] for name, values in product.options.items()]
            for chosen in webshop.itertools.product(*lists):
                options = {name: value for name, value in chosen if value is not None}
                assert webshop.score(product, goal, shop.prices[product.asin], options)["reward"] < 1


def test_the_scripted_player_wins_on_genuine_data():
    golden("webshop_goals")
    env = WebShop(str(DATA))
    assert all(play(env, seed)[1]["won"] for seed in range(100))


def test_same_seed_same_task_and_sticky_done():
    env, other = WebShop(), WebShop()
    for seed in [*range(20), 2**31, 2**31 + 1]:
        first = env.reset(seed)[0]
        log, info = play(env, seed, skill=0.0)
        for action in ("search[mug]", *(env.parse(env.scripted(0.3, random.Random(i)))[0] for i in range(30))):
            assert env.step(action) == (log[-1][1], 0.0, True, False, info)
        assert env.reset(seed)[0] == other.reset(seed)[0] == first  # the same goal, also after a wrong purchase
        assert play(env, seed, skill=0.3) == play(other, seed, skill=0.3)
    assert len({env.reset(seed)[0] for seed in range(100)}) > 80
    env = WebShop(turns=1)
    env.reset(0)
    page, _, terminated, truncated, info = env.step("search[mug]")
    assert truncated and not terminated  # after the last turn, too, nothing changes
    assert env.step("search[lamp]") == (page, 0.0, True, False, info)


def test_validation_goals_are_held_out_and_fixed():
    env = WebShop()
    validation = [env.shop.goals[i].text for i in env.validation]
    training = {env.shop.goals[i].text for i in env.training}
    assert set(env.validation).isdisjoint(env.training) and len(validation) >= 200
    assert [env.reset(2**31 + i)[0].splitlines()[0] for i in range(len(validation))] == validation
    assert {env.reset(seed)[0].splitlines()[0] for seed in range(200)} <= training


def test_original_goes_on_with_another_goal():
    env = WebShop(original=True, compact=False)
    task = env.reset(0)[0]
    asin = env.goal.product.asin.lower()
    env.step(f"search[{env.goal.product.title}]")
    assert "click[" + asin + "]" in env.actions()
    env.step(f"click[{asin}]")
    env.step("click[buy now]")
    assert env.reset(0)[0].startswith(env.task) and task.startswith(env.task)  # the prompt keeps the first task
    assert env.goal.text != env.task and env.actions() == ["search[<your query>]", "click[search]"]


def test_novice_follows_its_notes():
    env = WebShop()
    env.reset(1)
    env.step(f"search[{env.goal.product.query}]")
    bad, good = (product.asin.lower() for product in env.visit.listed[:2])
    notes = [f"not [{bad}], try [{good}]"]
    actions = [env.parse(env.scripted(0.0, random.Random(i), notes))[0] for i in range(300)]
    assert actions.count(f"click[{good}]") > 200 and actions.count(f"click[{bad}]") < 40
    blind = [env.parse(env.scripted(0.0, random.Random(i)))[0] for i in range(300)]
    assert blind.count(f"click[{bad}]") > 60
    env.step(f"click[{bad}]")
    for _ in range(9):
        env.step(env.parse(env.scripted(0.0, random.Random(0)))[0])
    notes = [env.scripted_reflection(random.Random(i)) for i in range(50)]
    assert sum(f"[{bad}]" in note for note in notes) > 30


def test_reflection_tells_a_wrong_product_from_missed_options():
    options = {"color": ["red", "blue"]}
    wrong = make_product("B2", "Soft red mug", attributes=["glazed"], options=options, bullets=[])
    shop = make_shop(make_product(options=options), wrong)
    env = WebShop()
    env.goal = next(goal for goal in shop.goals if goal.values == ["blue"])
    for asin, value, note in (("a1", "red", "try [a1] with [blue]"), ("b2", "blue", "not [b2], try [a1]")):
        env.visit = Session(shop, env.goal)
        for action in ("search[mug]", f"click[{asin}]", f"click[{value}]", "click[buy now]"):
            env.visit.act(action)
        notes = {env.scripted_reflection(random.Random(i)) for i in range(30)}
        assert notes == {f"<remark>{note}</remark>", "<remark>nothing</remark>"}


def test_compact_prompts_are_short_and_full_ones_complete():
    pieces = webshop.re.compile(r"\w+|[^\w\s]")
    import lamer

    longest = 0
    for compact in (True, False):
        env, rng = WebShop(compact=compact), random.Random(0)
        for seed in range(60):
            env.reset(seed)
            past, records, done = [], [], False
            while not done:
                style = "compact" if compact else "full"
                text = lamer.play_prompt(env, style, "reflection", env.text(), past, len(past), records)
                assert env.goal.text in text or not compact
                longest = max(longest, len(pieces.findall(text))) if compact else longest
                action = env.parse(env.scripted(0.0, rng))[0]
                observation, _, terminated, truncated, _ = env.step(action)
                done = terminated or truncated
                records.append((action, observation, done))
                if done and len(past) < 2:
                    past.append(lamer.Episode(records, "not [ab12], try [cd34] with [small] [yellow]"))
                    records, done = [], False
                    env.start()
    assert longest <= 300
    assert "webshop" in env.rules("full").lower() and env.rules("compact") == ""

"""WebShop: recorded cases of the original, rules by hand, bad input, and the scripted player. `pytest worlds`."""

import hashlib
import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "worlds")]

import webshop
from webshop import Goal, Product, Session, WebShop

GOLDEN = Path(os.environ.get("LAMER_GOLDEN", ROOT.parent / "shared" / "golden"))
DATA = Path(os.environ.get("LAMER_DATA", GOLDEN.parent / "data")) / "webshop"


def golden(name):
    """Recorded cases, and the genuine files they were recorded on."""
    for path in (GOLDEN / f"{name}.json", DATA):
        if not path.exists():
            missing = pytest.fail if os.environ.get("LAMER_REQUIRE_GOLDEN") == "1" else pytest.skip
            missing(f"no recorded cases: {path} is not there")
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
        env = WebShop(str(DATA), human_goals=config["human_goals"], shop_seed=config["seed"], original=True)
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

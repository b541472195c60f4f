"""Tests of ALFWorld: recorded plays, a room played by hand, generated games, broken files.

    pytest worlds/test_alfworld.py

Recorded plays are read from $LAMER_GOLDEN, by default the folder golden/ of this repository; a test
whose file is missing is skipped by name, or fails with LAMER_REQUIRE_GOLDEN=1. Some tests need
genuine files, which are no part of this repository, in $LAMER_DATA/alfworld, by default
data/alfworld beside the recorded cases. Without these files such tests are skipped.
"""

import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from alfworld import (  # noqa: E402
    ABILITIES,
    CONTAINS,
    OBJECTS,
    TASKS,
    AlfWorld,
    State,
    find_plan,
    glimpse,
    load_game,
    make_game,
    parse_problem,
)

from envs import make_env  # noqa: E402
from lamer import parse_reflection  # noqa: E402
from policy import Recorder, scripted_trial  # noqa: E402

GOLDEN = Path(os.environ.get("LAMER_GOLDEN", HERE.parent / "golden"))
DATA = Path(os.environ.get("LAMER_DATA", GOLDEN.parent / "data")) / "alfworld"
GENUINE = "pick_heat_then_place_in_recep-Potato-None-SinkBasin-14/trial_T20190908_231731_054988"


def golden(name):
    """The recorded games in a file: a list that is not empty."""
    path = GOLDEN / f"{name}.json"
    if not path.exists():
        is_due = os.environ.get("LAMER_REQUIRE_GOLDEN") == "1"
        missing = pytest.fail if is_due else pytest.skip
        missing(f"no recorded cases: {path} is not there")
    cases = json.loads(path.read_text(encoding="utf-8"))
    assert cases, f"{path}: no games in it"
    return cases


def genuine(name):
    """A genuine file or folder; the test is skipped where it is absent."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no genuine data: {path} is not there")
    return path


# ----------------------------------------------------------------------------------- recorded plays


def check_case(case):
    """Play a recorded game and compare everything the engine said."""
    game = parse_problem(case["pddl_problem"], case["task"], case["task_type"])
    if "note" not in case:  # quirks are noted, without names
        assert case["names"].items() <= game.names.items() and case["names"]
    env = AlfWorld(turns=case["max_episode_steps"])
    env.start(game)
    reset = case["reset"]
    seen = env.observation, sorted(env.options), env.info()["won"]
    assert seen == (reset["feedback"], reset["admissible"], reset["won"])
    assert case["steps"], "no steps to compare"
    for number, step in enumerate(case["steps"]):
        feedback, _, terminated, truncated, info = env.step(step["command"])
        where = case.get("id", case.get("note")), number, step["command"]
        assert feedback == step["feedback"], where
        assert sorted(env.options) == step["admissible"], where
        assert info["won"] == step["won"] == bool(step["score"]), where
        assert (terminated or truncated) == step["done"], where


@pytest.mark.parametrize("name", ["alfworld", "alfworld_quirks"])
def test_golden_alfworld(name):
    for case in golden(name):
        check_case(case)


def test_golden_genuine_game():
    folder = genuine("genuine")
    env = AlfWorld(data=str(folder))
    walkthrough = json.loads((folder / GENUINE / "game.tw-pddl").read_text())["walkthrough"]
    for seed in (0, 2**31 + 5):  # a single game serves both training and validation
        _, info = env.reset(seed)
        assert info == {"won": False, "task_type": "pick_heat_then_place_in_recep"}
        for command in walkthrough[:-1]:
            assert env.step(command)[1:4] == (0.0, False, False)
        _, reward, terminated, truncated, info = env.step(walkthrough[-1])
        assert (reward, terminated, truncated) == (10.0, True, False)
        assert info["won"]


def test_golden_start_of_the_genuine_game():
    env = AlfWorld(data=str(genuine("genuine")))
    plays = [case for case in golden("alfworld") if case["id"] == GENUINE]
    if not plays:
        pytest.skip(f"no play of the genuine game in {GOLDEN / 'alfworld.json'}")
    for seed in (0, 2**31 + 5):
        observation, _ = env.reset(seed)
        for case in plays:
            assert observation == case["reset"]["feedback"]
            assert sorted(env.options) == case["reset"]["admissible"]


def test_golden_multi_agent_game_is_refused():
    folder = genuine("genuine_multi_agent_2024")
    with pytest.raises(ValueError, match=r"traj_data.json: missing"):
        AlfWorld(data=str(folder))
    message = r"game.tw-pddl: pddl_problem, line \d+: 3 agents, alice bob charlie"
    with pytest.raises(ValueError, match=message):
        load_game(str(folder / GENUINE / "game.tw-pddl"), "pick_heat_then_place_in_recep")


def test_golden_tables_are_alfreds():
    tables = json.loads(genuine("tables.json").read_text())
    known = {o.rstrip("?") for objects in OBJECTS.values() for o in objects}
    fitting = {r.lower(): set(map(str.lower, o)) for r, o in tables["can_contain"].items()}
    for receptacle, objects in CONTAINS.items():
        assert set(objects) & known == fitting[receptacle] & known, receptacle
    for ability in ("heatable", "coolable", "cleanable", "sliceable"):
        able = set(map(str.lower, tables["action_objects"][ability.title()]))
        assert set(ABILITIES[ability]) == able & known


# ------------------------------------------------------------------------------ a room made by hand

ROOM = """(define (problem plan_room) (:domain alfred)
(:objects agent1 - agent  start atsink atfridge atdesk atshelf - location
    Sink_bar_1_bar_SinkBasin Fridge_bar_1 Microwave_bar_1 Desk_bar_1 - receptacle
    Cabinet_bar_1 Cabinet_bar_2 - receptacle
    Mug_bar_1 Mug_bar_2 Apple_bar_1 Knife_bar_1 DeskLamp_bar_1 Sink_bar_1 - object
    SinkBasinType FridgeType MicrowaveType DeskType CabinetType - rtype
    MugType AppleType KnifeType DeskLampType SinkType - otype)
(:init (= (total-cost) 0) ; costs play no part
    (atLocation agent1 start)
    (receptacleType Fridge_bar_1 FridgeType) (openable Fridge_bar_1)
    (receptacleAtLocation Fridge_bar_1 atfridge)
    (receptacleType Microwave_bar_1 MicrowaveType) (openable Microwave_bar_1)
    (receptacleAtLocation Microwave_bar_1 atfridge)
    (receptacleType Sink_bar_1_bar_SinkBasin SinkBasinType)
    (receptacleAtLocation Sink_bar_1_bar_SinkBasin atsink)
    (receptacleType Desk_bar_1 DeskType) (receptacleAtLocation Desk_bar_1 atdesk)
    (receptacleType Cabinet_bar_1 CabinetType) (receptacleAtLocation Cabinet_bar_1 atshelf)
    (receptacleType Cabinet_bar_2 CabinetType) (receptacleAtLocation Cabinet_bar_2 atshelf)
    (canContain SinkBasinType MugType) (canContain CabinetType MugType)
    (canContain DeskType MugType) (canContain DeskType AppleType)
    (canContain DeskType KnifeType) (canContain FridgeType AppleType)
    (objectType Mug_bar_1 MugType) (pickupable Mug_bar_1) (cleanable Mug_bar_1)
    (heatable Mug_bar_1) (coolable Mug_bar_1)
    (inReceptacle Mug_bar_1 Cabinet_bar_1) (objectAtLocation Mug_bar_1 atshelf)
    (objectType Mug_bar_2 MugType) (pickupable Mug_bar_2) (isReceptacleObject Mug_bar_2)
    (inReceptacle Mug_bar_2 Desk_bar_1) (objectAtLocation Mug_bar_2 atdesk)
    (inReceptacleObject Knife_bar_1 Mug_bar_2)
    (objectType Apple_bar_1 AppleType) (pickupable Apple_bar_1) (coolable Apple_bar_1)
    (sliceable Apple_bar_1) (heatable Apple_bar_1)
    (inReceptacle Apple_bar_1 Fridge_bar_1) (objectAtLocation Apple_bar_1 atfridge)
    (objectType Knife_bar_1 KnifeType) (pickupable Knife_bar_1)
    (inReceptacle Knife_bar_1 Desk_bar_1) (objectAtLocation Knife_bar_1 atdesk)
    (objectType DeskLamp_bar_1 DeskLampType) (toggleable DeskLamp_bar_1)
    (inReceptacle DeskLamp_bar_1 Desk_bar_1) (objectAtLocation DeskLamp_bar_1 atdesk)
    (objectType Sink_bar_1 SinkType) (objectAtLocation Sink_bar_1 atsink))
(:goal GOAL))
"""


def placed(conditions="", receptacle="Desk"):
    """The goal of having a mug, with further conditions, in a receptacle of a type."""
    return f"""(and (exists (?r - receptacle) (exists (?o - object) (and {conditions}
        (objectType ?o MugType) (receptacleType ?r {receptacle}Type) (inReceptacle ?o ?r)))))"""


LIT = """(and
    (exists (?ot - object ?r - receptacle ?a - agent ?l - location) (and
        (objectType ?ot DeskLampType) (toggleable ?ot) (isToggled ?ot)
        (receptacleAtLocation ?r ?l) (atLocation ?a ?l) (inReceptacle ?ot ?r)))
    (exists (?o - object ?a - agent) (and (objectType ?o MugType) (holds ?a ?o))))"""
TWO = """(and (exists (?r - receptacle) (exists (?o1 - object) (and
    (objectType ?o1 MugType) (receptacleType ?r CabinetType) (inReceptacle ?o1 ?r)
    (exists (?o2 - object) (and (not (= ?o1 ?o2))
        (objectType ?o2 MugType) (receptacleType ?r CabinetType) (inReceptacle ?o2 ?r)))))))"""


def enter(goal=LIT, old=False, turns=50):
    """An environment in the room made by hand."""
    env = AlfWorld(turns=turns)
    env.start(parse_problem(ROOM.replace("GOAL", goal), "do it", "any", old))
    return env


def play(env, *commands):
    """The last feedback; every command but the last must leave the game unwon."""
    for command in commands:
        assert not env.done, f"over before {command}"
        feedback, reward, terminated, _, info = env.step(command)
        assert reward == 10 * info["won"] and terminated == info["won"]
    return feedback


FETCH = ("go to cabinet 2", "take mug 2 from cabinet 2")
PLACE = ("go to desk 1", "move mug 2 to desk 1")
CLEAN = ("go to sinkbasin 1", "clean mug 2 with sinkbasin 1")
HEAT = ("go to fridge 1", "heat mug 2 with microwave 1")  # they stand in one place
COOL = ("look", "cool mug 2 with fridge 1")


@pytest.mark.parametrize(
    ("conditions", "treatment"),
    [
        ("(cleanable ?o) (isClean ?o)", CLEAN),
        ("(heatable ?o) (isHot ?o)", HEAT),
        ("(coolable ?o) (isCool ?o)", [*HEAT, *COOL]),
    ],
)
def test_treat_and_place(conditions, treatment):
    # The mug on the desk is not cleanable, heatable or coolable, so only the other one counts.
    env = enter(placed(conditions))
    play(env, *FETCH, *treatment, *PLACE)
    assert env.info()["won"]
    env = enter(placed(conditions))
    play(env, *FETCH, *PLACE)
    assert not env.info()["won"]


def test_heating_undoes_cooling():
    env = enter(placed("(coolable ?o) (isCool ?o)"))
    play(env, *FETCH, "go to fridge 1", "cool mug 2 with fridge 1")
    play(env, "heat mug 2 with microwave 1", *PLACE)
    assert not env.info()["won"]


def test_look_in_light_in_either_order_and_only_there():
    env = enter(LIT)
    play(env, "go to desk 1", "take mug 1 from desk 1", "go to cabinet 1", "use desklamp 1")
    assert env.observation == "Nothing happens."
    play(env, "go to desk 1", "use desklamp 1")
    assert env.info()["won"] and env.observation == "You turn on the desklamp 1."
    env = enter(LIT)
    play(env, "go to desk 1", "use desklamp 1", *FETCH)
    assert not env.info()["won"], "the lamp is elsewhere"
    play(env, "go to desk 1")
    assert env.info()["won"]


def test_two_objects_in_one_receptacle():
    env = enter(TWO)
    play(env, "go to desk 1", "take mug 1 from desk 1")
    play(env, "go to cabinet 1", "move mug 1 to cabinet 1")
    assert not env.info()["won"], "they are in two cabinets"
    play(env, "take mug 1 from cabinet 1", "move mug 1 to cabinet 2")
    assert env.info()["won"]


def test_goal_true_at_the_start_ends_with_the_first_step():
    env = enter(placed())
    assert env.info()["won"] and not env.done
    assert env.step("look")[1:4] == (10.0, True, False)
    assert env.step("inventory")[:4] == (env.observation, 0.0, True, False)


def test_texts():
    env = enter(LIT)
    assert env.observation == (
        "-= Welcome to TextWorld, ALFRED! =-\n\n"
        "You are in the middle of a room. Looking quickly around you, you see "
        "a cabinet 2, a cabinet 1, a desk 1, a fridge 1, a microwave 1, and a sinkbasin 1.\n\n"
        "Your task is to: do it."
    )
    places = "places cabinet 2, cabinet 1, desk 1, fridge 1, microwave 1, sinkbasin 1"
    assert env.brief(env.observation, [], "choices") == f"{places}\nYour task is to: do it."
    nothing, opened = "Nothing happens.", "The fridge 1 is open. In it, you see a apple 1."
    middle = "You are in the middle of a room. Looking quickly around you, you see nothing."
    facing = "You are facing the fridge 1, and microwave 1. Next to it, you see nothing."
    desk = "You arrive at desk 1. On the desk 1, you see a desklamp 1, a knife 1, and a mug 1."
    for command, feedback in (
        ("look", middle),
        ("inventory", "You are not carrying anything."),
        ("go to fridge 1", "You arrive at fridge 1. The fridge 1 is closed."),
        ("go to microwave 1", nothing),  # it is at the same place
        (" open fridge 1\n", f"You open the fridge 1. {opened}"),
        ("look", facing),
        ("take apple 1 from fridge 1", "You pick up the apple 1 from the fridge 1."),
        ("examine apple 1", "There's nothing special about apple 1."),
        ("cool apple 1 with fridge 1", "You cool the apple 1 using the fridge 1."),
        ("examine apple 1", "This is a cold apple 1."),
        ("heat apple 1 with microwave 1", "You heat the apple 1 using the microwave 1."),
        ("examine apple 1", "This is a hot apple 1."),
        ("move apple 1 to microwave 1", nothing),  # it is closed, and takes no apples anyway
        ("move apple 1 to fridge 1", "You move the apple 1 to the fridge 1."),
        ("close fridge 1", "You close the fridge 1."),
        ("go to desk 1", desk),
        ("take knife 1 from desk 1", "You pick up the knife 1 from the desk 1."),
        ("slice apple 1 with knife 1", nothing),  # it is elsewhere
        ("go to fridge 1", "You arrive at fridge 1. The fridge 1 is closed."),
        ("slice apple 1 with knife 1", "You sliced the apple 1 with the knife 1."),
        ("inventory", "You are carrying: a knife 1."),
        ("go to desk 1", "You arrive at desk 1. On the desk 1, you see a desklamp 1, and a mug 1."),
        ("move knife 1 to desk 1", "You move the knife 1 to the desk 1."),
        ("take mug 1 from desk 1", "You pick up the mug 1 from the desk 1."),
        ("examine mug 1", "This is a normal mug 1. In it, you see a knife 1."),
    ):
        assert play(env, command) == feedback
    assert play(env, "help").startswith("Available commands:\n  look:  ")
    assert "examine desklamp 1" not in env.options
    assert "take desklamp 1 from desk 1" not in env.options


def test_look_lists_what_was_moved_between_receptacles_of_one_place():
    facing = "You are facing the cabinet 2, and cabinet 1. Next to it, you see"
    env = enter(LIT)
    play(env, *FETCH, "move mug 2 to cabinet 1")
    assert play(env, "look") == f"{facing} a mug 2."
    play(env, "take mug 2 from cabinet 1", "move mug 2 to cabinet 2")
    assert play(env, "look") == f"{facing} a mug 2."
    play(env, "take mug 2 from cabinet 2", "move mug 2 to cabinet 1", "take mug 2 from cabinet 1")
    assert play(env, "look") == f"{facing} nothing."


def test_old_dialect():
    knife_in_cabinet = placed(receptacle="Cabinet").replace("MugType", "KnifeType")
    env = enter(knife_in_cabinet, old=True)
    assert play(env, "help") == "Nothing happens."
    desk = "On the desk 1, you see a desklamp 1, a knife 1, and a mug 1."
    assert play(env, "go to desk 1") == f"You arrive at atdesk. {desk}"
    play(env, "take mug 1 from desk 1")
    assert "move mug 1 to desk 1" not in env.options
    assert play(env, "put mug 1 in/on desk 1") == "You put the mug 1 in/on the desk 1."


def test_admissible_commands():
    env = enter(LIT)
    elsewhere = [
        "go to cabinet 1",
        "go to cabinet 2",
        "go to fridge 1",
        "go to microwave 1",
        "go to sinkbasin 1",
    ]
    always = ["help", "inventory", "look"]
    assert sorted(env.options) == sorted([*elsewhere, "go to desk 1", *always])
    assert env.actions() == [command for command in sorted(env.options) if command != "help"]
    play(env, "go to desk 1", "take knife 1 from desk 1")
    here = ["examine desk 1", "examine knife 1", "move knife 1 to desk 1", "use desklamp 1"]
    assert sorted(env.options) == sorted([*elsewhere, *here, *always])


def test_anchors_tell_states_apart():
    env = enter(LIT)
    assert env.anchor() == ""
    steps = ["go to desk 1", "use desklamp 1", "go to fridge 1", "open fridge 1"]
    steps += ["take apple 1 from fridge 1", "cool apple 1 with fridge 1"]
    anchors = {""}
    for step in steps:
        play(env, step)
        anchors.add(env.anchor())
    assert len(anchors) == 1 + len(steps)
    play(env, "look", "examine fridge 1", "help", "nonsense")
    assert env.anchor() in anchors
    problem = ROOM.replace("GOAL", LIT).replace(OPENABLE, f"{OPENABLE} (opened Fridge_bar_1)")
    env.start(parse_problem(problem, "do it", "any"))
    play(env, "go to fridge 1")
    is_open = env.anchor()
    play(env, "close fridge 1")
    assert env.anchor() != is_open


def test_the_expert_plans_anew_where_another_acted():
    env = enter(TWO)
    assert env.expert() == ("go", "desk_bar_1")
    play(env, "inventory")
    assert env.expert() == ("go", "desk_bar_1")
    play(env, "go to fridge 1")
    assert env.expert() == ("go", "desk_bar_1")
    play(env, "go to desk 1")
    assert env.expert() == ("take", "mug_bar_2", "desk_bar_1")


def test_the_expert_gives_up_where_no_plan_wins():
    env = enter(placed("(inReceptacle ?o Cabinet_bar_1) (inReceptacle ?o Cabinet_bar_2)"))
    assert env.expert() == ("look",), "one mug in two cabinets"


@pytest.mark.parametrize(
    "reply",
    [
        "<action><action>look</action></action>",
        "<action>[go to [desk 1]]</action>",
        "<action>go to\tdesk 1</action>",
        "<action>go to desk 1\x00\x1b[2J</action>",
        "<action>\u202ego to desk 1\u202c</action>",
        "<action>اذهب إلى المكتب</action>",
        "</action>go to desk 1<action>",
        "<action></action>",
        "",
        "x" * 10_000_000,
    ],
)
def test_strange_replies_do_nothing_and_cost_a_turn(reply):
    env = enter(LIT, turns=2)
    facts = set(env.state.facts)
    action, is_valid = env.parse(reply)
    assert is_valid == ("<action>" in reply)
    assert len(action) <= (len(reply) if is_valid else 30)
    assert env.step(action)[:4] == ("Nothing happens.", 0.0, False, False)
    assert env.state.facts == facts
    assert env.step(action)[:4] == ("Nothing happens.", 0.0, False, True)


def test_parse():
    env = AlfWorld()
    reply = "Hm. <action> Go to Desk 1 </action> or <action>look</action>"
    assert env.parse(reply) == ("go to desk 1", True)
    assert env.parse("A" * 40) == ("a" * 30, False), "as the original, which then plays that"


# ---------------------------------------------------------------------------------- generated games


@pytest.mark.parametrize("options", [{}, {"receptacles": 8, "objects": 10}])
def test_500_games_are_won_or_cannot_be(options):
    """The expert wins in the length of its plan; few games need more than the ten turns."""
    env, rng = AlfWorld(**options), random.Random(0)
    assert env.turn_limit == 10
    unwinnable, types = [], set()
    for seed in range(500):
        _, info = env.reset(seed)
        assert not info["won"]
        types.add(info["task_type"])
        env.expert()
        least, done = len(env.plan), False
        while not done:
            _, _, terminated, truncated, info = env.step(env.parse(env.scripted(1.0, rng))[0])
            done = terminated or truncated
        assert info["won"] == (least <= env.turn_limit)
        assert env.turns == min(least, env.turn_limit)
        if not info["won"]:
            unwinnable.append(seed)
    assert len(unwinnable) <= 5 and types == {task[0] for task in TASKS.values()}
    patient = AlfWorld(turns=20, **options)
    for seed in unwinnable:  # not for want of a plan
        patient.reset(seed)
        while not patient.done:
            patient.step(patient.parse(patient.scripted(1.0, rng))[0])
        assert patient.info()["won"] and patient.turns > env.turn_limit


def least_steps(state, most):
    """Fewest commands that win, by a search over all that can be done; None if above `most`."""
    seen, frontier = {frozenset(state.facts)}, [state]
    for steps in range(1, most + 1):
        reached = []
        for state in frontier:
            for action in state.actions():
                after = state.copy()
                after.apply(action)
                if after.won:
                    return steps
                key = frozenset(fact for fact in after.facts if fact[0] != "notin")
                if key not in seen:
                    seen.add(key)
                    reached.append(after)
        frontier = reached
    return None


@pytest.mark.parametrize("task", TASKS)
def test_plans_are_shortest(task):
    for seed in range(3 if task == "pick2" else 5):
        game = make_game(seed, (task,), 3, 3, range(30))
        plans = [find_plan(State(game), way) for way in game.goal]
        lengths = [len(plan) for plan in plans if plan is not None]
        assert least_steps(State(game), 12) == min(lengths)


def test_games_of_training_and_validation_differ():
    seeds = range(150)
    for options in ({}, {"validation": "seen"}, {"receptacles": 8, "objects": 10}):
        env = AlfWorld(**options)
        splits = []
        for first in (0, 2**31):
            games = set()
            for seed in seeds:
                env.reset(first + seed)
                game = env.state.game
                games.add((game.task, frozenset(game.start), frozenset(game.static)))
            splits.append(games)
        assert not splits[0] & splits[1]
        assert min(map(len, splits)) > 147
    env, rooms = AlfWorld(), []
    for first in (0, 2**31):
        rooms.append(set())
        for seed in seeds:
            env.reset(first + seed)
            place = env.state.game.place
            if "fridge_bar_00" in place:
                rooms[-1].add(tuple(sorted(place.items())))
    assert not rooms[0] & rooms[1], "validation kitchens were never trained in"
    assert len(rooms[1]) <= 4


@pytest.mark.parametrize(("tasks", "kinds"), [("pick,look,clean,heat", 4), ("cool, pick2", 2)])
def test_tasks_are_those_asked_for(tasks, kinds):
    env = AlfWorld(tasks=tasks)
    types = {env.reset(seed)[1]["task_type"] for seed in range(60)}
    assert types == {TASKS[name.strip()][0] for name in tasks.split(",")}
    assert len(types) == kinds


def test_the_same_in_every_process():
    """Texts, plans and the scripted player's choices do not depend on the hash seed."""
    code = """if True:
        import random, zlib
        from envs import make_env
        env, rng, text = make_env("worlds/alfworld.py:AlfWorld"), random.Random(1), ""
        for seed in range(40):
            text += env.reset(seed)[0]
            notes = ["seen cabinet 1 mug 1 shelf 1"]
            while not env.done:
                action = env.parse(env.scripted(0.3, rng, notes))[0]
                text += action + env.step(action)[0] + env.anchor() + ",".join(env.actions())
            text += env.scripted_reflection(rng)
        print(zlib.crc32(text.encode()))"""
    outputs = []
    for seed in ("0", "1"):
        variables = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code]
        outputs.append(subprocess.check_output(command, cwd=HERE.parent, env=variables))
    assert outputs[0] == outputs[1]


def test_restart_is_the_same_task():
    env = make_env(str(HERE / "alfworld.py") + ":AlfWorld")
    for seed in (3, 2**31 + 3):
        first = env.reset(seed)
        while not env.done:
            env.step(env.parse(env.scripted(0.5, random.Random(seed)))[0])
        assert env.reset(seed) == first
        assert env.anchor() == ""


def novice_wins(notes_of, seeds=range(150)):
    """Share of tasks a novice wins with notes from a first episode."""
    wins, env = 0, AlfWorld(receptacles=10, objects=12)
    for seed in seeds:
        rng = random.Random(seed)
        env.reset(seed)
        while not env.done:
            env.step(env.parse(env.scripted(0.0, rng))[0])
        notes = notes_of(env, rng)
        env.reset(seed)
        while not env.done:
            env.step(env.parse(env.scripted(0.0, rng, notes))[0])
        wins += env.info()["won"]
    return wins / len(seeds)


def test_notes_help_the_novice():
    def reflect(env, rng):
        return [env.scripted_reflection(rng)[len("<remark>") : -len("</remark>")]]

    with_notes, without = novice_wins(reflect), novice_wins(lambda env, rng: [])
    assert with_notes > without + 0.2, (with_notes, without)


def test_the_novice_goes_where_its_notes_say_and_writes_what_it_saw():
    env = enter(LIT)
    assert env.scripted_reflection(random.Random(0)) == "<remark></remark>"
    note = "I have Seen: mug, knife cabinet 2 desklamp desk 1"
    goes = [env.scripted(0.0, random.Random(i), [note, note]) for i in range(200)]
    told = "find mug knife cabinet 2 <action>go to cabinet 2</action>"
    assert goes.count(told) > 120, "what is sought, the note from there to the place, the action"
    unsure = [go for go in goes if go.startswith("find mug <action>go to ")]
    assert len(unsure) > 10 and not any("desk 1" in go or "cabinet 2" in go for go in unsure)
    play(env, "go to desk 1", "go to sinkbasin 1", "go to fridge 1")  # which is closed
    note = "<remark>seen desklamp knife mug desk 1 sinkbasin 1</remark>"
    assert env.scripted_reflection(random.Random(0)) == note
    env = enter(LIT)
    play(env, *FETCH, "go to desk 1", "move mug 2 to desk 1", "examine desk 1")
    note = env.scripted_reflection(random.Random(0))
    assert " mug cabinet 2 " in note, "where it was first"
    assert " mug 1 desk 1" in note, "the second of its kind is named by its number"
    assert env.read_notes(["", note])["desk 1"] == ["desklamp", "knife", "mug 1"]
    env = enter(TWO)
    known = "seen fork cabinet 1 cabinet 2 pen desk 1 fridge 1"
    goes = [env.novice(random.Random(i), [known])[1] for i in range(200)]
    others = [("go", "microwave_bar_1"), ("go", "sink_bar_1_bar_sinkbasin")]
    assert sum(action in others for action in goes) > 150


def test_the_novice_looks_for_the_lamp_when_the_thing_is_in_hand():
    env = enter(LIT)
    play(env, *FETCH)
    replies = [env.scripted(0.0, random.Random(i)) for i in range(100)]
    assert sum(reply.startswith("find desklamp <action>") for reply in replies) > 80


def test_only_what_was_shown_is_noted():
    """Where two receptacles share a place, one may take from the one that was not looked into."""
    env, count = AlfWorld(), 0
    for seed in range(60):
        env.reset(seed)
        game = env.state.game
        for r in game.receptacles:
            env.start(game)
            env.step(f"go to {game.names[r]}")
            for command, meant in env.options.items():
                if meant[0] == "take" and meant[2] != r:
                    env.step(command)
                    assert meant[2] not in env.looked and meant[1] not in env.seen
                    count += 1
                    break
    assert count > 10


def test_compact_prompts_are_short():
    import policy

    recorder, env = policy.Recorder(), AlfWorld(receptacles=8, objects=10)
    options = dict(style="compact", max_prompt=10**6)
    for seed in range(60):
        rng = random.Random(seed)
        policy.scripted_trial(env, seed, 3, chat=recorder, skill=0.0, rng=rng, **options)
    lengths = [len(policy.PIECES.findall(text)) for text in recorder.texts]
    assert len(lengths) > 500 and max(lengths) <= 300


# ------------------------------------------------------------------------------------- broken files

LIT_ROOM = ROOM.replace("GOAL", LIT)
GRAMMAR = 'action PutObject { template :: "move {o} to {r}"; } "rhs": "Your task is to: do it."'


def write_game(folder, problem, grammar=GRAMMAR, solvable=True):
    """A data folder with one game."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "pddl_domain": "",
        "grammar": grammar,
        "pddl_problem": problem,
        "solvable": solvable,
        "walkthrough": None,
    }
    (folder / "game.tw-pddl").write_text(json.dumps(content))
    (folder / "traj_data.json").write_text(json.dumps({"task_type": "look_at_obj_in_light"}))
    return folder


def test_data_folders(tmp_path):
    for split in ("train", "valid_seen", "valid_unseen"):
        for i in range(3 if split == "train" else 2):
            grammar = GRAMMAR.replace("do it", f"{split} {i}")
            write_game(tmp_path / split / f"game{i}", LIT_ROOM, grammar)
    # Three that are passed over: one without a game, one without a solution, one of another kind.
    unsolved = write_game(tmp_path / "train" / "unsolved", LIT_ROOM)
    (unsolved / "game.tw-pddl").unlink()
    write_game(tmp_path / "train" / "hard", LIT_ROOM, solvable=False)
    write_game(tmp_path / "train" / "pick_and_place_with_movable_recep", LIT_ROOM)

    def tasks(seeds, folder=tmp_path, **options):
        env = AlfWorld(data=str(folder), **options)
        return sorted({env.reset(seed)[0].split("task is to: ")[1] for seed in seeds})

    held_out = range(2**31, 2**31 + 10)
    assert tasks(range(10)) == ["train 0.", "train 1.", "train 2."]
    assert tasks(held_out) == ["valid_unseen 0.", "valid_unseen 1."]
    assert tasks(held_out, validation="seen") == ["valid_seen 0.", "valid_seen 1."]
    # Without split folders every eighth game is held out, the first to begin with.
    flat = tmp_path / "train"
    assert tasks(range(10), flat) == ["train 1.", "train 2."]
    assert tasks(held_out, flat) == ["train 0."]
    env, keys = AlfWorld(data=str(flat)), set()
    assert env.num_eval_tasks() == 1
    for seed in range(10):
        env.reset(seed)
        keys.add(env.task_key())
    assert len(keys) == 2
    with pytest.raises(ValueError, match="no game of the wanted tasks"):
        AlfWorld(data=str(tmp_path), tasks="cool")


OPENABLE = "(openable Fridge_bar_1)"  # in line 10
MANY = "(exists (?a ?b ?c ?d ?e ?f ?g ?h - object) (and (isHot ?a) (isHot ?h)))"
ONE_EACH = f"(exists ({' '.join(f'?a{i}' for i in range(21))} - agent) (isHot ?a1))"
EXTRA = " ".join(f"spot{i}" for i in range(1000))
NO_FACTS = "(and (exists (?r - receptacle) (and)))"
PROBLEMS = {
    "unknown predicate": (ROOM.replace(OPENABLE, "\n(edible Fridge_bar_1)"), "line 11: unknown"),
    "arguments": (ROOM.replace(OPENABLE, "(openable Fridge_bar_1 start)"), "line 10: unknown"),
    "undeclared": (ROOM.replace(OPENABLE, "(openable Fridge_bar_7)"), "line 10: fridge_bar_7"),
    "never closed": (ROOM.replace("(:init", "((:init"), "line 1: the parenthesis"),
    "one too many": (ROOM + ")", "one closing parenthesis too many"),
    "no problem": ("hello", "line 1: a problem is"),
    "nothing": ("", "line 1: a problem is"),
    "bare goal": (ROOM.replace("GOAL", ""), "the goal is empty"),
    "empty and": (ROOM.replace("GOAL", "(and)"), "the goal is empty"),
    "empty inside": (ROOM.replace("GOAL", NO_FACTS), "unknown predicate"),
    "goal predicate": (ROOM.replace("GOAL", "(and (edible ?o))"), "unknown predicate"),
    "unbound": (ROOM.replace("GOAL", "(and (isHot ?o))"), r"the goal names \?o"),
    "goal type": (ROOM.replace("GOAL", "(exists (?o - thing) (isHot ?o))"), "the goal names thing"),
    "word as goal": (ROOM.replace("GOAL", "win"), "no fact|unknown predicate"),
    "untyped": (ROOM.replace("- location", ""), "has no type|not declared|no agent"),
    "no place": (ROOM.replace("(atLocation agent1 start)", ""), "exactly one place"),
    "no agent's place": (ROOM.replace("atLocation agent1", "atLocation Mug_bar_1"), "exactly one"),
    "two agents": (ROOM.replace("agent1 - agent", "agent1 bob - agent"), "2 agents, agent1 bob"),
    "no init": (ROOM.replace("(:init", "(:start"), "exactly one place"),
    "deep": ("(" * 100_000, "nested too deeply"),
    "large goal": (ROOM.replace("GOAL", MANY), "too many variables"),
    "many variables": (ROOM.replace("GOAL", ONE_EACH), "line 36: .* too many variables or"),
    "many conditions": (ROOM.replace("GOAL", f"(and {OPENABLE * 51})"), "too many .* conditions"),
    "many names": (ROOM.replace("start at", f"start {EXTRA} at"), "line 2: 1,028 names"),
    "half a pair": (ROOM.replace("Mug_bar_1", "Mug_bar_\ud800"), r"encode character '\\ud800'"),
}


def check_line(message):
    """A message for people is one line, and no page."""
    assert len(message.splitlines()) == 1 and len(message) < 400


@pytest.mark.parametrize("name", PROBLEMS)
def test_broken_problems_end_in_one_clear_line(name, tmp_path):
    problem, message = PROBLEMS[name]
    folder = write_game(tmp_path, problem.replace("GOAL", LIT))
    with pytest.raises(ValueError, match=message) as error:
        AlfWorld(data=str(folder))
    check_line(str(error.value))
    assert str(folder / "game.tw-pddl") in str(error.value)
    assert "line " in str(error.value) or name == "half a pair"


# Looking from each of them to the end of the line would take a minute.
MANY_TASKS = {"grammar": "Your task is to: " * 25_000, "pddl_problem": "", "solvable": True}
FILES = {
    "game missing": ("game.tw-pddl", None, "is missing"),
    "trajectory missing": ("traj_data.json", None, "missing, though there is"),
    "truncated": ("game.tw-pddl", b'{"grammar": "Your task', r"line 1 column 13"),
    "trajectory truncated": ("traj_data.json", b'{\n"task_type": ', r"line 2 column 1"),
    "not utf-8": ("game.tw-pddl", b'{"grammar": "\xff\xfe"}', "position 13"),
    "long line": ("game.tw-pddl", b'{"grammar": "' + b"x" * 10_000_000 + b'"}', "10,000,015 bytes"),
    "list": ("game.tw-pddl", b"[1, 2]", "not a JSON object"),
    "no texts": ("game.tw-pddl", b'{"solvable": true, "grammar": 7}', "no pddl_problem"),
    "deep": ("game.tw-pddl", b"[" * 1_000_000, "recursion"),
    "huge number": ("game.tw-pddl", b'{"solvable": ' + b"9" * 10_000 + b"}", "digits"),
    "many tasks": ("game.tw-pddl", json.dumps(MANY_TASKS).encode(), "no sentence 'Your task"),
    "not solvable": ("game.tw-pddl", b'{"solvable": null}', "not marked as solvable"),
}


@pytest.mark.parametrize("name", FILES)
def test_broken_files_end_in_one_clear_line(name, tmp_path):
    filename, content, message = FILES[name]
    folder = write_game(tmp_path / "train", LIT_ROOM)
    shutil.copytree(folder, tmp_path / "valid_unseen")
    path = folder / filename
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    start = time.process_time()
    with pytest.raises(ValueError, match=message) as error:
        AlfWorld(data=str(tmp_path))
    assert time.process_time() - start < 5
    check_line(str(error.value))
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"tasks": "pick,fly"},
        {"tasks": ""},
        {"turns": 0},
        {"receptacles": 2},
        {"objects": 0},
        {"validation": "both"},
        {"data": "/nowhere/at/all"},
        {"data": ".", "objects": 5},
    ],
)
def test_bad_options_end_in_one_clear_line(options):
    with pytest.raises(ValueError, match="--") as error:
        AlfWorld(**options)
    check_line(str(error.value))


def test_a_compact_prompt_names_all_that_actions_are_about():
    """It has no list of them, so what they are made of must have been shown."""
    env, rng = make_env("alfworld", receptacles=8, objects=8), random.Random(0)
    for seed in range(30):
        initial, _ = env.reset(seed)
        records = []
        while len(records) < 10:
            named = set(re.findall(r"\w+ \d+", " ".join(env.actions())))
            shown = env.brief(initial, records, "the list")
            assert "the list" not in shown
            assert named <= set(re.findall(r"\w+ \d+", shown)), shown
            action = rng.choice(env.actions() + ["jump"])
            observation, _, terminated, truncated, _ = env.step(action)
            records.append((action, observation, terminated or truncated))
            if records[-1][2]:
                break
    for observation, shown in (
        ("Nothing happens.", "Nothing happens."),
        ("You arrive at fridge 1. The fridge 1 is closed.", "closed"),
        ("You open the fridge 1. The fridge 1 is open. In it, you see nothing.", "nothing"),
        ("On the desk 1, you see a pen 1, and a mug 2.", "pen 1, mug 2"),
        ("You pick up the pen 1 from the desk 1.", "done"),
        ("This is a hot mug 2.", "This is a hot mug 2."),
    ):
        assert glimpse(observation) == shown


def test_a_compact_prompt_shows_what_a_note_is_made_of():
    """Else no policy could learn to write it: things seen, also those seen long ago."""
    env, rng, num_notes = make_env("alfworld", receptacles=8, objects=8), random.Random(0), 0
    for seed in range(60):
        recorder = Recorder()
        scripted_trial(env, seed, 3, recorder, 0.0, rng, style="compact", max_prompt=10**6)
        for prompt, reply in itertools.pairwise(recorder.texts):
            if reply.startswith("<remark>"):
                assert parse_reflection(reply)[0] + "\n" in prompt, (prompt, reply)
                num_notes += 1
    assert num_notes > 20

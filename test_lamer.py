"""Tests: hand-computed maths, recorded cases, equalities between two ways to the same result, and the real commands.

    pytest                     the quick ones, under three minutes on two cores
    pytest -m "slow or not slow"

Recorded cases of the original code are read from $LAMER_GOLDEN (default ../shared/golden); an absent file is skipped by
name, or fails with LAMER_REQUIRE_GOLDEN=1.
"""

import copy
import gc
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import eval as evaluation
import lamer
import train
from envs import ENVS, MOVES, Env, Level, MineSweeper, Sokoban, deal_board, derive_seed, make_env
from lamer import Reply, Sampling, Trial, Turn

HERE = Path(__file__).parent


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory, request):
    """Warm-started policies are made once per test run, in a folder of its own.

    The one long run, that of Lockbox, starts here on a core of its own, and is waited for by the last test.
    """
    os.environ["LAMER_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(1)
    if any("learns_to_peek" in item.name for item in request.session.items):
        request.session.lockbox = tmp_path_factory.mktemp("lockbox")
        request.session.process = start("train.py", *LOCKBOX, "--out", request.session.lockbox)
    yield
    if hasattr(request.session, "process"):
        request.session.process.kill()


def tiny_config(env="minesweeper", **options):
    """A small policy that is made within seconds; it knows the format and little else."""
    options = (
        dict(env=env, model="tiny", device="cpu", tiny_hidden=32, tiny_layers=2, warm_steps=150, max_reply=32) | options
    )
    return train.resolve(train.Config(**options))


@pytest.fixture(scope="session")
def policy(cache):
    """(config, model, chat) of a barely warm MineSweeper policy."""
    config = tiny_config()
    return config, *train.load_policy(str(train.warm_policy(config)), "float32", "cpu")


def golden(name):
    path = Path(os.environ.get("LAMER_GOLDEN", HERE.parent / "shared" / "golden"), f"{name}.json")
    if not path.exists():
        missing = pytest.fail if os.environ.get("LAMER_REQUIRE_GOLDEN") == "1" else pytest.skip
        missing(f"no recorded cases at {path}")
    return json.loads(path.read_text(encoding="utf-8"))


# -------------------------------------------------------------------------------------- recorded cases


def level_from_text(text):
    """A Level from its drawing, for recorded plays."""
    rows = [line.split(": ")[1].split(" ") for line in text.splitlines()]
    cells = [cell for row in rows for cell in row]
    where = {symbols: [i for i, cell in enumerate(cells) if cell in symbols] for symbols in ("OS√", "X√", "PS")}
    floor = [i for i, cell in enumerate(cells) if cell != "#"]
    return Level(len(rows), floor, where["OS√"], where["X√"], where["PS"][0])


def test_golden_sokoban():
    cases = golden("sokoban")
    words = ["still", *MOVES]
    for case in cases.get("levels", []):
        least, most = case["options"]["min_steps"], case["options"]["max_sol_steps"]
        options = dict(size=case["dim"], boxes=case["boxes"], min_solution=least, max_solution=most)
        env = Sokoban(**options, original=True)
        assert env.reset(case["final_seed"])[0] == case["text"], case["id"]
        solution = env.level.best_moves(env.player, env.boxes, 100)
        assert [words.index(word) for word in solution] == case["solution"], case["id"]
        if least <= case["optimal_length"] <= most and case["seed"] == case["final_seed"]:
            assert Sokoban(**options).reset(case["seed"])[0] == case["text"], "the default differs where it need not"
    for case in cases.get("plays", []):
        env = Sokoban(size=case["start"].count("\n") + 1, original=True)
        env.start(level_from_text(case["start"]))
        env.max_steps = case["max_steps"]
        for step in case["steps"]:
            player = env.player
            reward, done = env.move(words[step["action"]])
            seen = env.text(), round(reward, 6), done, env.won, env.player != player
            assert seen == tuple(step[k] for k in ("text", "reward", "done", "won", "effective")), (case["level"], step)
            if not env.won:
                assert env.is_solvable() != step["unsolvable"], (case["level"], step)
    for case in cases.get("turns", []):
        env = Sokoban(size=case["start"].count("\n") + 1, original=True)
        env.start(level_from_text(case["start"]))
        env.max_steps = case["max_steps"]
        for turn in case["turns"]:
            if "restart" in turn or "actions" not in turn:
                env.start(env.level)
                assert env.text() == turn.get("text", env.text())
                continue
            text, reward, done, _, info = env.step([words[a] for a in turn["actions"]])
            assert (text, reward, done, info["won"]) == tuple(turn[k] for k in ("text", "reward", "done", "won"))


def test_golden_minesweeper():
    cases = golden("minesweeper")

    def check_deal(case, opener):
        """Deal as recorded; returns the environment set up with that board and the generator left behind."""
        numbers, shown, openings, left = deal_board(case["size"], case["n_mines"], case["seed"], opener, original=True)
        n = case["size"]
        rows = ["".join(numbers[r * n : (r + 1) * n]) for r in range(n)]
        assert rows == case["true_board"]
        assert [divmod(cell, n) for cell in openings] == [tuple(cell) for cell in case["openings"]]
        env = MineSweeper(size=n, mines=case["n_mines"], original=True)
        env.start(numbers, shown)
        assert env.text() == case["text"]
        assert env.lost == case["dead_start"]
        return env, shown, left

    for case in cases.get("boards", []):
        env, shown, _ = check_deal(case, np.random.RandomState(case["pre_seed"]))
        for step in case["steps"]:
            if "restart" in step or "action" not in step:
                env.start(env.numbers, shown)
                assert env.text() == step.get("text", env.text())
                continue
            text, reward, done, _, info = env.step(tuple(int(number) for number in step["action"]))
            assert (text, reward, done, info["won"]) == tuple(step[k] for k in ("text", "reward", "done", "won"))
    for chain in cases.get("chains", []):
        generator = np.random.RandomState(chain["pre_seed"])
        for case in chain["resets"]:
            _, _, generator = check_deal(case, generator)


def test_golden_parsing():
    cases = golden("parsing")
    words = ["still", *MOVES]
    for case in cases.get("cases", []):
        for name, env_options in (("sokoban", {}), ("minesweeper", {})):
            if name not in case:
                continue
            expected = case[name]
            if case["phase"] == "play":
                if name == "sokoban" and "num_actions_per_turn" in case:
                    env_options = {"moves_per_turn": case["num_actions_per_turn"]}
                action, is_valid = make_env(name, **env_options).parse(case["reply"])
                if name == "sokoban":
                    assert [words.index(word) for word in action] == expected["actions"], case["reply"]
                else:
                    assert action == tuple(int(number) for number in expected["action"]), case["reply"]
            else:
                reflection, is_valid = lamer.parse_reflection(case["reply"])
                # One rule for all games, first start tag to last end tag, where the two originals disagree.
                if case["sokoban"] == case["minesweeper"]:
                    assert reflection == expected["reflection"], case["reply"]
            assert is_valid == bool(expected["valid"]), case["reply"]
    for case in cases.get("histories", []):
        records = [(str(r["action"]), r["text_obs"], r["dones"]) for r in case["records"]]
        assert lamer.format_history(Env(), records, 2, 7) == case["play"]
        assert lamer.format_history(Env(), records, 7, 7) == case["reflect"]
        assert lamer.format_history(Env(), records, 2, 7) == case["past_attempt"]


def test_golden_maths():
    cases = golden("maths")
    for case in cases.get("returns", []):
        gammas = case["step_gamma"], case["traj_gamma"]
        paper = lamer.cross_episode_returns(case["attempts"], "paper", *gammas)
        assert all(np.allclose(a, b, atol=1e-4) for a, b in zip(paper, case["paper"], strict=True))
        trial = make_trial(case["attempts"], reflect=case["reflections"])
        lamer.compute_returns([trial], "official", *gammas)
        assert np.allclose([turn.ret for turn in trial.turns], case["official"]["returns"], atol=1e-4)
    for case in cases.get("advantages", []):
        check_official_advantages(case)
    for case in cases.get("ppo", []):
        mask = torch.arange(len(case["log_prob"][0])) < torch.tensor(case["lengths"])[:, None]
        logps, official = torch.tensor(case["log_prob"], requires_grad=True), case["official"]
        old, advantages = torch.tensor(case["old_log_prob"]), torch.tensor(case["advantage"])[:, None]
        options = dict(clip=case["clip_low"], clip_high=case["clip_high"], dual_clip=case["clip_c"])
        losses, is_clipped = lamer.clipped_loss(logps, old, advantages.expand_as(old), **options)
        loss = (losses * mask).sum() / mask.sum()
        loss.backward()
        assert abs(loss.item() - official["token-mean"]["loss"]) < 1e-4
        assert abs((is_clipped & mask).sum() / mask.sum() - official["token-mean"]["clipfrac"]) < 1e-4
        assert np.allclose(logps.grad, official["token-mean"]["grad"], atol=1e-4)
        reference = torch.tensor(case["ref_log_prob"])
        for kind in lamer.KL_ESTIMATES:
            kl = (lamer.kl_estimate(logps, reference, kind) * mask).sum() / mask.sum()
            assert abs(kl.item() - official["kl_terms"][kind]) < 1e-4


def check_official_advantages(case):
    members = {}
    for row in case["rows"]:
        members.setdefault((row["group"], row["member"]), []).append(row)
    trials = {key: RecordedTrial(rows) for key, rows in members.items()}
    groups = [[trial for (g, _), trial in trials.items() if g == group] for group in {group: 0 for group, _ in trials}]
    order = [id(row) for rows in members.values() for row in rows]
    recorded = dict(gigpo_mean_norm=("gigpo", "mean"), gigpo_mean_std_norm=("gigpo", "mean_std"), grpo=("grpo", "mean"))
    for name, options in (recorded | dict(grpo_no_std=("reinforce", "mean"), rloo=("rloo", "mean"))).items():
        lamer.official_advantages(groups, *options, step_weight=case["step_advantage_w"])
        ours = dict(zip(order, [turn.advantage for trial in trials.values() for turn in trial.turns], strict=True))
        assert np.allclose([ours[id(row)] for row in case["rows"]], case["official"][name], atol=1e-4), name


class RecordedTrial(Trial):
    """A trial whose episode rewards and returns are as recorded."""

    def __init__(self, rows):
        super().__init__(0, len(rows))
        for i, row in enumerate(rows):  # an episode of its own for every row, so that each may have its own reward
            turn = make_turn(i, row["phase"], is_valid=bool(row["valid"]), anchor=row["anchor"])
            turn.penalty = 0.5 * (not turn.is_valid)
            turn.ret = row["step_return"] - turn.penalty
            self.turns.append(turn)
        self.recorded = [[row["episode_reward"]] for row in rows]

    def rewards(self, kind):
        return self.recorded


# ------------------------------------------------------------------------------ returns and advantages


def make_turn(episode=0, phase="play", reward=0.0, is_valid=True, anchor="", **fields):
    return Turn(episode, phase, [1], [2], [0.0], "", "", reward, is_valid, anchor, **fields)


def make_trial(rewards, reflect=True, seed=0):
    """A trial with these rewards[n][t], and a reflection between episodes."""
    trial = Trial(seed, len(rewards))
    for n, episode in enumerate(rewards):
        trial.turns += [make_turn(n, "play", reward) for reward in episode]
        if reflect and n + 1 < len(rewards):
            trial.turns.append(make_turn(n, "reflect", anchor="reflection"))
    return trial


def test_returns_by_hand():
    assert lamer.discounted([0, 0, 10], 0.5) == [2.5, 5, 10]
    rewards = [[1, 2], [0, 4], [8]]
    # g: [2, 2], [2, 4], [8]; gamma_traj 0.5: G_t(0) = g_t(0) + 2/2 + 8/4, G_t(1) = g_t(1) + 8/2
    assert lamer.cross_episode_returns(rewards, "paper", 0.5, 0.5) == [[5, 5], [6, 8], [8]]
    # recursion: the last turn of an episode gets gamma_traj times the next G_0, and gamma_step discounts that too
    assert lamer.cross_episode_returns(rewards, "official", 0.5, 0.5) == [[3, 4], [4, 8], [8]]
    trial = make_trial(rewards)
    trial.turns[1].is_valid = trial.turns[2].is_valid = False
    lamer.compute_returns([trial], "paper", 0.5, 0.5, invalid_penalty=0.5)
    # play, play, reflection on 0, play, play, reflection on 1, play; an invalid row alone is penalised
    assert [turn.ret for turn in trial.turns] == [5, 4.5, 5.5, 6, 8, 8, 8]


def test_advantages_by_hand():
    def group():
        trials = [make_trial([[0, 1], [10]]), make_trial([[2], [4]]), make_trial([[5]])]
        trials[0].turns[1].anchor = "b"
        lamer.compute_returns(trials, "paper", 1.0, 0.5)
        return trials

    trials = group()
    assert [[turn.ret for turn in trial.turns] for trial in trials] == [[6, 6, 10, 10], [4, 4, 4], [5]]
    lamer.compute_advantages([trials], "reinforce")
    # episode 0, play: 6, 6, 4, 5 (mean 5.25); reflections: 10, 4; episode 1: 10, 4
    assert [[turn.advantage for turn in trial.turns] for trial in trials] == [
        [0.75, 0.75, 3, 3],
        [-1.25, -3, -3],
        [-0.25],
    ]
    lamer.compute_advantages([trials], "gigpo", step_weight=2.0)
    # E: G_0(0) = 6, 4, 5 (mean 5), G_0(1) = 10, 4 (mean 7), 0 for reflections
    # P: first turns share an anchor (mean 5), the turn at "b" is alone (0); reflections 10, 4; episode 1 10, 4
    assert [[turn.advantage for turn in trial.turns] for trial in trials] == [[3, 1, 6, 9], [-3, -6, -9], [0]]
    lamer.compute_advantages([trials], "reinforce", norm="mean_std")
    assert np.allclose(trials[0].turns[2].advantage, 3 / (np.std([10, 4], ddof=1) + 1e-6))


def test_rloo_grpo_and_success_by_hand():
    trials = [make_trial([[0, 1], [10]]), make_trial([[2], [4]]), make_trial([[5]])]
    trials[0].won_in = 1
    lamer.compute_returns(trials, "paper", 1.0, 0.5)
    lamer.compute_advantages([trials], "rloo")
    # first turns 6, 6, 4, 5: each minus the mean of the three others; reflections and second episodes 10, 4
    assert np.allclose([t.advantage for t in trials[0].turns], [1, 1, 6, 6])
    assert np.allclose([t.advantage for t in trials[1].turns], [4 - 17 / 3, -6, -6])
    lamer.compute_advantages([trials], "grpo")
    assert np.allclose(trials[0].turns[0].advantage, 0.75 / (np.std([6, 6, 4, 5], ddof=1) + 1e-6))
    lamer.compute_returns(trials, "paper", 1.0, 0.5, reward="success")
    assert [[t.ret for t in trial.turns] for trial in trials] == [[5, 5, 10, 10], [0, 0, 0], [0]]


def test_ppo_advantages_by_hand():
    trial = make_trial([[1, 2], [8]])  # play, play, reflect, play
    values = [1.0, 2.0, 3.0, 5.0]
    for credit in ("paper", "official"):
        lamer.compute_returns([trial], credit, 0.5, 0.25)
        for turn, value in zip(trial.turns, values, strict=True):
            turn.value = value
        lamer.ppo_advantages([trial], 0.5, 0.25)
        assert np.allclose([t.advantage for t in trial.turns], [t.ret - t.value for t in trial.turns])
    # official returns 3, 4, 8, 8; lambda 0 leaves the one-step errors r + gamma V' - V
    lamer.ppo_advantages([trial], 0.5, 0.25, gae_lambda=0.0)
    steps = [1 + 0.5 * 2 - 1, 2 + 0.25 * 3 - 2, 0 + 1 * 5 - 3, 8 - 5]
    assert np.allclose([t.advantage for t in trial.turns], steps)
    lamer.ppo_advantages([trial], 0.5, 0.25, gae_lambda=0.5)
    assert np.allclose(trial.turns[2].advantage, steps[2] + 1 * 0.5 * steps[3])
    assert np.allclose(trial.turns[1].advantage, steps[1] + 0.25 * 0.5 * trial.turns[2].advantage)
    trial.turns[1].is_valid = False  # the penalty stays with its row
    lamer.compute_returns([trial], "official", 0.5, 0.25)
    before = [t.advantage for t in trial.turns]
    lamer.ppo_advantages([trial], 0.5, 0.25, gae_lambda=0.5)
    assert np.allclose([b - t.advantage for b, t in zip(before, trial.turns, strict=True)], [0, 0.5, 0, 0])


def test_sets_of_one_or_of_equal_values_give_zero():
    for norm in ("mean", "mean_std"):
        assert lamer.center([3.0], norm) == [0.0]
        assert lamer.center([0.1] * 7, norm) == [0.0] * 7


def test_clipped_loss_by_hand():
    old = torch.zeros(4)
    logps = torch.tensor([1.5, 1.5, 0.5, 0.5]).log()  # ratios
    losses, is_clipped = lamer.clipped_loss(logps, old, torch.tensor([1.0, -1.0, 1.0, -1.0]), clip=0.2)
    assert torch.allclose(losses, torch.tensor([-1.2, 1.5, -0.5, 0.8]))  # pessimistic: clipped only where it gains
    assert is_clipped.tolist() == [True, False, False, True]
    logps = torch.tensor([5.0, 5.0, 1.4]).log()
    losses, _ = lamer.clipped_loss(logps, old[:3], torch.tensor([-1.0, 1.0, 1.0]), 0.2, clip_high=0.5, dual_clip=3.0)
    assert torch.allclose(losses, torch.tensor([3.0, -1.5, -1.4]))


def lockbox_values(codes: int, episodes: int, gamma_traj: float) -> tuple[dict[str, float], list[float]]:
    """Solve Lockbox exactly by dynamic programming, for an agent with perfect memory.

    Returns the value G_0(0) of each first action, and the probability of having opened the box after 1..episodes
    episodes when the best action is always taken. lockbox_values(8, 2, 0.6) gives peek 6.0 and success [0.0, 1.0].
    """

    def values(left: int, possible: int) -> dict[str, float]:
        """Value of each action with `left` episodes to go and `possible` codes not ruled out; 1 means it is known."""
        if left == 0 or possible == 0:
            return {"open": 0.0}
        wrong, seen, same = (gamma_traj * max(values(left - 1, n).values()) for n in (possible - 1, 1, possible))
        return {"open": 10 / possible + (1 - 1 / possible) * wrong, "peek": seen, "leave": 1 + same}

    success, opened, possible = [], 0.0, codes
    for left in range(episodes, 0, -1):
        options = values(left, possible)
        best = max(options, key=options.get)
        if best == "peek":
            possible = 1
        elif best == "open" and possible:  # none is possible once the box is open
            opened, possible = opened + (1 - opened) / possible, possible - 1
        success.append(opened)
    return values(episodes, codes), success


@pytest.mark.parametrize(
    ("codes", "episodes", "gamma", "best", "success"),
    [  # DESIGN's table: both sides of every threshold
        (8, 2, 0.0, "open", [1 / 8, 2 / 8]),
        (8, 2, 1 / 7 - 0.01, "open", [1 / 8, 2 / 8]),
        (8, 2, 1 / 7 + 0.01, "peek", [0, 1]),
        (20, 2, 1 / 9 - 0.01, "leave", [0, 0]),
        (20, 2, 1 / 9 + 0.01, "peek", [0, 1]),
        (8, 3, (7 - 45**0.5) / 2 - 0.001, "open", [1 / 8, 2 / 8, 3 / 8]),
        (8, 3, (7 - 45**0.5) / 2 + 0.001, "peek", [0, 1, 1]),
        (8, 3, 0.88, "peek", [0, 1, 1]),
        (8, 3, 0.89, "leave", [0, 0, 1]),
        (20, 3, 0.11, "leave", [0, 0, 0]),
        (20, 3, (10 - 60**0.5) / 20 - 0.001, "leave", [0, 0, 1]),  # above 1/9: leave, then peek, then open
        (20, 3, (10 - 60**0.5) / 20 + 0.001, "peek", [0, 1, 1]),
        (20, 3, 0.89, "leave", [0, 0, 1]),
    ],
)
def test_lockbox_dynamic_program(codes, episodes, gamma, best, success):
    values, after = lockbox_values(codes, episodes, gamma)
    assert max(values, key=values.get) == best
    assert np.allclose(after, success)
    if episodes == 2:
        by_hand = {
            "open": 10 / codes + (1 - 1 / codes) * gamma * max(10 / (codes - 1), 1),
            "peek": 10 * gamma,
            "leave": 1 + gamma * max(10 / codes, 1),
        }
        assert {k: pytest.approx(v) for k, v in by_hand.items()} == values


# ---------------------------------------------------------------------------------------- environments


@pytest.mark.parametrize("name", ENVS)
def test_same_seed_same_task_and_sticky_done(name):
    env, other, rng = make_env(name), make_env(name), random.Random(0)
    for seed in range(20):
        first = env.reset(seed)[0]
        done = False
        while not done:
            observation, _, terminated, truncated, _ = env.step(env.parse(env.scripted(0.3, rng))[0])
            done = terminated or truncated
        again, reward, terminated, _, _ = env.step(env.parse(env.scripted(0.3, rng))[0])
        assert terminated and reward == 0
        assert again == observation or name == "lockbox"
        assert env.reset(seed)[0] == other.reset(seed)[0] == first
    assert len({env.reset(seed)[0] for seed in range(20)}) > (0 if name == "lockbox" else 15)


@pytest.mark.parametrize(("name", "winnable"), [("lockbox", 1.0), ("sokoban", 1.0), ("minesweeper", 0.88)])
def test_scripted_player_wins_what_can_be_won(name, winnable):
    config = train.resolve(train.Config(env=name, model="tiny", device="cpu"))
    config.size = config.mines = config.boxes = config.turns = None  # the paper's settings
    trials = [
        train.scripted_trial(train.env_of(config), seed, 1, train.Recorder(), 1.0, random.Random(seed))
        for seed in range(200)
    ]
    assert sum(trial.success_after(1) for trial in trials) >= winnable * 200


@pytest.mark.parametrize(
    "options", [{}, {"boxes": 1}, {"size": 7, "boxes": 3}, {"min_solution": 8, "max_solution": 12}]
)
def test_sokoban_table_agrees_with_a_forward_search(options):
    env = Sokoban(**options)
    for seed in range(6):
        env.reset(seed)
        level, start = env.level, (env.player, env.boxes)
        depth, frontier, seen = 0, [start], {start}
        while frontier and all(boxes != level.targets for _, boxes in frontier):
            frontier = [
                after for state in frontier for d in level.deltas if (after := level.move(*state, d)) not in seen
            ]
            frontier = list(dict.fromkeys(frontier))
            seen.update(frontier)
            depth += 1
        assert depth == level.distance[start[1] << 8 | start[0]]
        assert options.get("min_solution", 5) <= depth <= options.get("max_solution", 21)


def test_sokoban_turn_stops_and_sums():
    env = Sokoban()
    env.start(
        level_from_text(
            "0: # # # # # #\n1: # P X O _ #\n2: # _ _ _ _ #\n3: # _ _ _ _ #\n4: # # # # # #\n5: # # # # # #"
        )
    )
    _, reward, terminated, truncated, info = env.step(["right", "left", "left"])
    assert (reward, terminated, truncated, info["won"], env.steps) == (10.9, True, False, True, 1)
    env.start(env.level)
    _, reward, terminated, _, info = env.step(["still", "down", "still"])
    assert (reward, terminated, info["won"]) == (-0.3, False, False)


def test_minesweeper_rewards():
    env = MineSweeper(size=3, mines=2)
    env.start(list("*2.*2.11."), list("???????1?"))
    assert env.step((3, 3))[1:4] == (2.0, False, False)  # cascade
    assert env.step((3, 3))[1] == -1.0  # open already
    assert env.step((4, 1))[1] == -1.0  # outside
    _, reward, terminated, _, info = env.step((3, 1))
    assert (reward, terminated, info["won"]) == (10.0, True, True)
    env.start(env.numbers, list("???????1?"))
    text, reward, terminated, _, info = env.step((1, 1))
    assert (reward, terminated, info["won"], text.count("*")) == (-0.1, True, False, 1)


def test_minesweeper_boards_are_playable():
    for seed in range(300):
        env = MineSweeper(size=4, mines=3)
        text, _ = env.reset(seed)
        assert "*" not in text
        assert 3 < text.count("?") < 16


# --------------------------------------------------------------------------- the trial and its prompts


class Counter(Env):
    """Counts to `goal`; a reply that is not a number is invalid. Observations are long on purpose."""

    name, turn_limit, is_markov = "counter", 5, False

    def __init__(self, goal=3, words=5):
        self.goal, self.words = goal, words

    def reset(self, seed):
        self.count = 0
        return f"start {seed}", {}

    def step(self, action):
        self.count += action.isdigit()
        won = self.count >= self.goal
        return f"{self.count} " + "word " * self.words, float(won), won, False, {"won": won}


def talk(trial, *replies):
    """Drive a trial with texts; returns its prompts (as texts) and the Trial. The last text is repeated."""
    prompts, replies = [], list(replies)
    try:
        prompt = next(trial)
        while True:
            prompts.append((prompt.phase, "".join(map(chr, prompt.ids))))
            text = replies.pop(0) if len(replies) > 1 else replies[0]
            prompt = trial.send(Reply([1], [0.0], text))
    except StopIteration as stop:
        return prompts, stop.value


class Letters:
    """A Chat whose tokens are characters."""

    def encode(self, text):
        return [ord(letter) for letter in text]


def test_prompts_show_as_much_history_as_the_environment_says():
    env = Counter(goal=9, words=0)
    env.history_length, env.history_observations = 2, 1
    env.shorten, env.gist = lambda text: f"({text.strip()})", lambda text: text.upper()
    replies = [f"<action>{n}</action>" for n in range(5)] + ["<remark></remark>"]
    full, _ = talk(lamer.run_trial(env, 7, 2, Letters()), *replies)
    assert "Action 3: 2\nObservation 3: (3)\nAction 4: 3\nObservation 4:\n4 \n" in full[4][1]
    assert "Action 2" not in full[4][1] and "Action 1" in full[5][1]  # the reflection sees the whole episode
    compact, _ = talk(lamer.run_trial(env, 7, 2, Letters(), style="compact"), *replies)
    assert compact[0][1] == "now\nSTART 7\nact" and compact[4][1] == "now\nSTART 7\n2\n3\n4 \nact"
    assert compact[5] == ("reflect", "now\nSTART 7\n0\n1\n2\n3\n4\n5 \nreflect")


def test_a_trial_ends_at_the_first_success():
    count, fail = "<action>1</action>", "<action>no"
    replies = [count, fail, count, fail, fail, "<remark> count! </remark>", *[count] * 3]
    prompts, trial = talk(lamer.run_trial(Counter(), 7, 3, Letters()), *replies)
    assert [phase for phase, _ in prompts] == ["play"] * 5 + ["reflect"] + ["play"] * 3
    assert trial.won_in == 1
    assert [trial.success_after(k) for k in (1, 2, 3)] == [False, True, True]
    assert [(turn.episode, turn.is_valid) for turn in trial.turns if turn.phase == "play"][:3] == [
        (0, True),
        (0, False),
        (0, True),
    ]
    assert trial.rewards() == [[0] * 5, [0, 0, 1]]
    assert "count!" in prompts[6][1] and "count!" not in prompts[4][1]
    assert "Action 2: no" not in prompts[4][1]  # an unparsed reply plays no text of its own
    assert trial.past[0].reflection == "count!"
    assert str(trial).startswith("=== task 7: solved in episode 2")


@pytest.mark.parametrize("style", ["full", "compact"])
def test_memory_modes(style):
    replies = ["<action>x</action>"] * 5 + ["<remark>note A</remark>", "<action>y</action>"]
    for memory in lamer.MEMORIES:
        prompts, _ = talk(lamer.run_trial(Counter(), 7, 2, Letters(), memory=memory, style=style), *replies)
        first_of_second = [text for phase, text in prompts if phase == "play"][5]
        assert ("note A" in first_of_second) == (memory in ("reflection", "both"))
        assert ("Action 1: x" in first_of_second) == (memory in ("history", "both"))
        assert any(phase == "reflect" for phase, _ in prompts) == (memory in ("reflection", "both"))
        if memory == "none":
            assert first_of_second == prompts[0][1], "attempts without memory are independent"


def test_reflections_are_cut_and_unparsed_ones_are_empty():
    assert lamer.parse_reflection(f"<remark>{'x' * 3000}</remark>") == ("x" * 2000, True)
    assert lamer.parse_reflection("no tags") == ("", False)


def test_long_prompts_lose_the_oldest_history_first_and_are_counted():
    limit = 600
    env = Counter(goal=9, words=40)
    prompts, trial = talk(lamer.run_trial(env, 7, 2, Letters(), memory="both", max_prompt=limit), "<action>x</action>")
    assert trial.num_shortened > 0
    assert all(len(text) <= limit for _, text in prompts)
    last = [text for phase, text in prompts if phase == "play"][4]
    assert "Action 4" in last and "Action 1:" not in last
    _, trial = talk(lamer.run_trial(env, 7, 3, Letters(), memory="both", max_prompt=9), "<action>x</action>")
    assert trial.num_shortened == len(trial.turns), "each prompt counts once, however often it is cut"


def test_borrowed_memory_replaces_the_own():
    other = [lamer.Episode([("z", "elsewhere", True)], "note of another")]
    replies = ["<action>x</action>"] * 5 + ["<remark>own note</remark>", "<action>y</action>"]
    prompts, _ = talk(lamer.run_trial(Counter(), 7, 2, Letters(), borrowed=other), *replies)
    assert "note of another" in prompts[-1][1] and "own note" not in prompts[-1][1]
    first = make_trial([[0], [0]], seed=1)
    trials = [first, make_trial([[0], [0]], seed=2), make_trial([[0], [0]], seed=3)]
    for trial in trials:
        trial.past = [lamer.Episode([], str(trial.seed))]
    assert all(own.past != given for own, given in zip(trials, evaluation.donors(trials, 2), strict=True))
    with pytest.raises(ValueError, match="swapped"):
        evaluation.donors([first], 2)


# ----------------------------------------------------------------------------------------- the sampler


def rollout(policy, kind="slots", num=24, ids=None, sampling=Sampling(seed=3), **options):  # noqa: B008
    config, model, chat = policy
    sampler = train.make_sampler(replace(config, sampler=kind, **options), model, chat)
    ids = range(num) if ids is None else ids
    return train.rollout(config, sampler, [derive_seed(i // 4) for i in ids], ids, sampling)


def replies_of(trials):
    return [[turn.reply_ids for turn in trial.turns] for trial in trials]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_slots_equal_generate(policy, temperature):
    sampling = Sampling(seed=3, temperature=temperature)
    slots, plain = rollout(policy, sampling=sampling, slots=7), rollout(policy, "generate", sampling=sampling)
    assert replies_of(slots) == replies_of(plain)
    ours = np.concatenate([turn.logps for trial in slots for turn in trial.turns])
    theirs = np.concatenate([turn.logps for trial in plain for turn in trial.turns])
    assert np.abs(ours - theirs).max() < 1e-4


def test_greedy_slots_equal_the_models_own_generate(policy):
    config, model, _ = policy
    for turn in [turn for trial in rollout(policy, num=4, sampling=Sampling(temperature=0)) for turn in trial.turns]:
        ids = torch.tensor([turn.prompt_ids])
        own = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=config.max_reply, do_sample=False)
        assert own[0, ids.shape[1] :].tolist() == turn.reply_ids


def test_results_do_not_depend_on_slots_or_order(policy):
    reference = replies_of(rollout(policy, slots=24))
    assert replies_of(rollout(policy, slots=5)) == reference
    order = np.random.RandomState(0).permutation(24)
    assert replies_of(rollout(policy, slots=9, ids=[int(i) for i in order])) == [reference[i] for i in order]
    assert replies_of(rollout(policy, slots=24, sampling=Sampling(seed=4))) != reference


def test_the_update_finds_the_cache_gone(policy):
    gc.collect()
    gc.disable()  # on a GPU, too, memory runs out before the collector would free a cycle
    try:
        assert rollout(policy, num=4)
        assert not [each for each in gc.get_objects() if type(each) is lamer.SlotCache]
    finally:
        gc.enable()


def test_logps_equal_a_plain_forward(policy):
    _, model, chat = policy
    turns = [turn for trial in rollout(policy, num=8) for turn in trial.turns]
    with torch.no_grad():
        scored = lamer.reply_logps(model, turns, 1.0, chat.vocab_size, chunk=50)[0].split(
            [len(t.reply_ids) for t in turns]
        )
        for turn, again in zip(turns, scored, strict=True):
            logits = model(torch.tensor([turn.prompt_ids + turn.reply_ids])).logits[0, len(turn.prompt_ids) - 1 : -1]
            plain = logits.log_softmax(-1)[range(len(turn.reply_ids)), turn.reply_ids]
            assert (plain - torch.tensor(turn.logps)).abs().max() < 1e-4
            assert (plain - again).abs().max() < 1e-4


def test_a_run_after_an_update_uses_the_new_weights(policy):
    config = policy[0]
    model, chat = train.load_policy(str(train.warm_policy(config)), "float32", "cpu")
    sampler = train.make_sampler(config, model, chat)
    seeds, greedy = list(range(8)), Sampling(temperature=0)
    before = train.rollout(config, sampler, seeds, seeds, greedy)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(-3)
    after = train.rollout(config, sampler, seeds, seeds, greedy)
    plain = train.rollout(config, lamer.GenerateSampler(model, chat, 8, 0, config.max_reply), seeds, seeds, greedy)
    assert replies_of(after) == replies_of(plain) != replies_of(before)


def test_uniforms_and_pick_tokens():
    draws = lamer.uniforms(1, 2, np.arange(20000), 3)
    assert abs(draws.mean() - 0.5) < 0.01 and abs(draws.std() - 12**-0.5) < 0.01
    assert draws[17] == lamer.uniforms(1, 2, 17, 3)[0] != lamer.uniforms(1, 2, 17, 4)[0]
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]]).repeat(20000, 1)
    tokens, logps = lamer.pick_tokens(logits, draws, Sampling())
    shares = torch.bincount(tokens, minlength=4) / 20000
    assert (shares - logits[0].softmax(0)).abs().max() < 0.01
    assert torch.allclose(logps, logits.log_softmax(-1)[range(20000), tokens])
    assert set(lamer.pick_tokens(logits, draws, Sampling(top_k=2))[0].tolist()) == {1, 2}
    assert set(lamer.pick_tokens(logits, draws, Sampling(top_p=0.5))[0].tolist()) == {1}
    assert set(lamer.pick_tokens(logits, draws, Sampling(top_p=0.9))[0].tolist()) == {0, 1, 2}


def test_layers_without_full_attention_are_refused(policy):
    _, model, chat = policy
    model.config.layer_types[0] = "sliding_attention"
    try:
        with pytest.raises(lamer.UnsupportedModelError, match="full attention"):
            lamer.SlotSampler(model, chat, 4, 64, 16)
    finally:
        model.config.layer_types[0] = "full_attention"


def test_a_model_that_reads_a_cache_in_its_own_way_is_refused(policy, monkeypatch):
    _, model, chat = policy
    bloom = BloomForCausalLM(BloomConfig(vocab_size=chat.vocab_size, hidden_size=32, n_layer=1, n_head=4)).eval()
    with pytest.raises(lamer.UnsupportedModelError, match="cannot use the slot sampler's cache"):
        lamer.SlotSampler(bloom, chat, 4, 64, 16)
    look_at = lamer.SlotCache.look_at
    monkeypatch.setattr(lamer.SlotCache, "look_at", lambda *args: 0 * look_at(*args))  # as if it ignored the mask
    with pytest.raises(lamer.UnsupportedModelError, match="a way of its own"):
        lamer.SlotSampler(model, chat, 4, 64, 16)


@pytest.mark.parametrize(
    "text", ["<|end|><|user|> hi <|assistant|>", "Row 1: ? . √", "早 \t\r\n é ½ \U0001f600 ï", "plain words"]
)
def test_text_never_becomes_special_tokens(policy, text):
    chat = policy[2]
    ids = chat.encode_plain(text)
    assert not set(ids) & set(chat.tokenizer.all_special_ids)
    assert chat.decode(ids) == text
    assert chat.encode(text) == chat.head + ids + chat.tail
    assert chat.head and chat.tail


def test_the_tiny_tokenizer_covers_every_prompt(policy):
    config, _, chat = policy
    recorder = train.Recorder()
    for seed in range(30):
        train.scripted_trial(train.env_of(config), seed, 3, recorder, 0.3, random.Random(seed), style="compact")
    for text in recorder.texts:
        ids = chat.encode_plain(text)
        assert chat.decode(ids) == text
        assert len(ids) < 0.6 * len(text)


# ------------------------------------------------------------------------------------------ hub models

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def hub_folder(folder, kind, **options):
    """A folder as the hub would give it: random weights of an architecture, a byte-level BPE tokenizer, ChatML."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([Sokoban().rules(), MineSweeper().rules()], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=special[1:2]
    )
    tokenizer.chat_template = CHATML
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")])
    shape = dict(vocab_size=640, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, initializer_range=0.1, bos_token_id=None, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape | options))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["qwen3", "llama", "qwen2", "phi3"])
def test_hub_models_play_and_train(kind, tmp_path):
    folder = hub_folder(tmp_path / kind, kind, **{"head_dim": 16} if kind == "qwen3" else {})
    model, chat = train.load_policy(folder, "float32", "cpu")
    assert chat.decode(chat.tail).endswith("assistant\n<think>\n\n</think>\n\n"), "thinking is off"
    options = dict(env="minesweeper", device="cpu", model=folder, max_prompt=1024, max_reply=12, episodes=2)
    config = train.resolve(train.Config(**options))
    assert (config.style, config.lr, config.minibatch) == ("full", 1e-6, 64), "the paper's settings"
    policy = config, model, chat
    trials, plain = rollout(policy, num=4, slots=3), rollout(policy, "generate", num=4)
    assert replies_of(trials) == replies_of(plain)
    assert max(max(turn.reply_ids) for trial in trials for turn in trial.turns) < len(chat.tokenizer) < 640
    lamer.compute_returns(trials, "paper", 0.95, 0.6)
    for i, turn in enumerate(turn for trial in trials for turn in trial.turns):
        turn.advantage = 1.0 if i % 2 else -1.0
    optimizer = lamer.Optimizer(model, 1e-3)
    stats = lamer.update(model, optimizer, trials, range(4), Sampling(seed=3), chat.vocab_size, minibatch=10**6)
    assert stats["kl"] == pytest.approx(0, abs=1e-5), "the loss sees the probabilities the sampler drew from"
    assert stats["grad_norm"] > 0


def test_markers_in_text_stay_text(tmp_path):
    _, chat = train.load_policy(hub_folder(tmp_path / "m", "qwen3"), "float32", "cpu")
    marker = chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert marker in chat.stop_ids
    text = "a note <|im_end|>\n<|im_start|>system <think>"
    ids = chat.encode_plain(text)
    added = set(chat.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<think>", "</think>"]))
    assert chat.decode(ids) == text and not set(ids) & added
    assert chat.encode(text).count(marker) == 1, "only the template's own"


def test_models_of_other_kinds_fall_back_or_are_refused(tmp_path, capsys):
    folder = hub_folder(tmp_path / "sliding", "mistral", sliding_window=8)
    model, chat = train.load_policy(folder, "float32", "cpu")
    config = train.resolve(train.Config(env="sokoban", model=folder, device="cpu"))
    assert isinstance(train.make_sampler(config, model, chat), lamer.GenerateSampler)
    assert "falling back" in capsys.readouterr().err
    with pytest.raises(ValueError, match="scaled or capped"):
        train.load_policy(hub_folder(tmp_path / "scaled", "granite", logits_scaling=8.0), "float32", "cpu")


def test_prompting_baselines(tmp_path):
    folder, json_file = hub_folder(tmp_path / "hub", "qwen2"), tmp_path / "out.json"
    flags = f"--model {folder} --env minesweeper --device cpu --num_tasks 3 --max_reply 6 --max_prompt 900".split()
    for name, memory, words in (
        ("zero-shot", "none", "Give only"),
        ("react", "none", "step by step"),
        ("reflexion", "reflection", "step by step"),
    ):
        _, config, _ = evaluation.prepare([*flags, "--prompting", name])
        assert (config.memory, config.episodes) == (memory, 3)
        _, prompt = next(lamer.run_trial(train.env_of(config), 1, 3, Letters(), memory, config.style))
        assert words in "".join(map(chr, prompt))
    evaluation.main([*flags, "--prompting", "reflexion", "--json", str(json_file)])
    row = json.loads(json_file.read_text())
    assert row["prompting"] == "reflexion" and (row["temperature"], row["top_p"], row["top_k"]) == (0.7, 0.8, 20)
    assert len(row["success"]) == 3


# ---------------------------------------------------------------------------------------------- memory


def saved_bytes(model, turns, vocab_size):
    """Bytes that the backward pass of reply_logps keeps, each storage once, the model's own weights left out."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logps, *_ = lamer.reply_logps(model, turns, 1.0, vocab_size)
    logps.sum().backward()
    return sum(kept.values())


def test_the_memory_plan_counts_what_is_there():
    shape = dict(hidden_size=128, intermediate_size=384, num_attention_heads=8, num_key_value_heads=4, head_dim=32)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=1000, num_hidden_layers=6, **shape)).bfloat16()
    turn = make_turn()
    turn.prompt_ids, turn.reply_ids, turn.logps = list(range(1, 480)), list(range(1, 33)), [0.0] * 32
    config = train.Config(microbatch_tokens=2 * 511, max_prompt=479, max_reply=32, dtype="bfloat16")
    num = model.num_parameters()
    plan = train.memory_plan(config, model.config, num, world=2)
    assert [plan[k] for k in ("weights", "gradients", "optimizer")] == [num * b / 1e9 for b in (2, 4, 6)]
    logits = 3 * 4 * 2 * 511 * 1000 / 1e9
    measured = saved_bytes(model, [turn, turn], 1000) / 1e9
    assert 0.95 < measured / (plan["activations"] - logits) < 1.05
    cache = lamer.SlotCache(6, 5, 479 + 32, torch.device("cpu"))
    cache.look_at([0], np.array([[0]]), 32, torch.bfloat16)
    for layer in cache.layers:
        layer.update(*torch.zeros(2, 1, 4, 1, 32, dtype=torch.bfloat16))
    held = sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))
    assert held / 1e9 == pytest.approx(5 * plan["slot"])
    assert train.fit_slots(plan, 10.0, 40)[0] == 40
    assert 0 < train.fit_slots(plan | {"slot": 1.0}, 10.0, 40)[0] < 10
    sizes = dict(weights=1.0, optimizer=2.0, gradients=3.0, activations=2.0, slot=1.0)
    assert train.fit_slots(sizes, 10.0, 40)[0] == 6  # (0.92 x 10 - 3) / 1: gradients are not there in rollouts
    for total in (3.5, 8.5):  # no slot fits; the update does not fit
        with pytest.raises(ValueError, match="--microbatch_tokens"):
            train.fit_slots(sizes, total, 40)


# ------------------------------------------------------------------------------------------ the update


def updated_weights(policy, trials, **options):
    """The weights after one call of `update` on these trials, and its statistics."""
    config, _, chat = policy
    dtype = options.pop("dtype", torch.float32)
    model, _ = train.load_policy(str(train.warm_policy(config)), "float32", "cpu")
    optimizer = lamer.Optimizer(model, options.pop("lr", 1e-3), dtype=dtype)
    for trial in trials:
        assert all(turn.logps for turn in trial.turns)
    stats = lamer.update(model, optimizer, trials, range(len(trials)), Sampling(seed=5), chat.vocab_size, **options)
    return {name: master.detach().clone() for name, master in optimizer.masters.items()}, stats, model


@pytest.fixture
def batch(policy):
    trials = rollout(policy, num=24)
    lamer.compute_returns(trials, "paper", 0.95, 0.6)
    lamer.compute_advantages([trials[i : i + 4] for i in range(0, 24, 4)], "gigpo")
    return trials


def test_update_does_not_depend_on_micro_batches(policy, batch):
    reference, stats, _ = updated_weights(policy, batch, minibatch=100)
    assert stats["updates"] > 1 and stats["grad_norm"] > 0
    for tokens in (1, 300, 2000):
        weights, again, _ = updated_weights(policy, batch, minibatch=100, microbatch_tokens=tokens)
        assert max((weights[name] - reference[name]).abs().max() for name in weights) < 1e-5
        assert again["entropy"] == pytest.approx(stats["entropy"], abs=1e-5)


def test_update_is_the_gradient_of_the_clipped_loss(policy, batch):
    """One mini-batch against the plainest possible loss: whole logits, a loop over turns, one division."""
    config, _, chat = policy
    model, _ = train.load_policy(str(train.warm_policy(config)), "float32", "cpu")
    total, count = 0.0, 0
    for turn in [turn for trial in batch for turn in trial.turns]:
        logits = model(torch.tensor([turn.prompt_ids + turn.reply_ids])).logits[0, len(turn.prompt_ids) - 1 : -1]
        logps = logits[:, : chat.vocab_size].log_softmax(-1)[range(len(turn.reply_ids)), turn.reply_ids]
        ratio = (logps - torch.tensor(turn.logps)).exp()
        total = total - torch.minimum(ratio * turn.advantage, ratio.clamp(0.8, 1.2) * turn.advantage).sum()
        count += len(turn.reply_ids)
    (total / count).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).item()
    _, stats, _ = updated_weights(policy, batch, minibatch=10**6)
    assert stats["updates"] == 1
    assert stats["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert stats["loss"] == pytest.approx((total / count).item(), abs=1e-6)
    assert stats["kl"] == pytest.approx(0, abs=1e-6) and stats["clip_fraction"] == 0


def test_a_broken_step_does_not_reach_the_weights(policy, batch):
    before = dict(train.load_policy(str(train.warm_policy(policy[0])), "float32", "cpu")[0].named_parameters())
    batch = copy.deepcopy(batch)
    batch[0].turns[0].advantage = math.inf
    after, stats, _ = updated_weights(policy, batch, minibatch=10**6)
    assert (stats["updates"], stats["skipped"], stats["grad_norm"]) == (0, 1, 0.0)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_the_update_makes_good_replies_likelier(policy, batch):
    _, _, model = updated_weights(policy, batch, lr=1e-4, minibatch=10**6)
    turns = [turn for trial in batch for turn in trial.turns]
    with torch.no_grad():
        logps, *_ = lamer.reply_logps(model, turns, 1.0, policy[2].vocab_size)
    change = logps - torch.cat([torch.tensor(turn.logps) for turn in turns])
    weights = torch.tensor([turn.advantage for turn in turns for _ in turn.reply_ids])
    assert (change * weights).sum() > 0


def test_the_logged_kl_is_that_of_the_step(policy, batch):
    """KL(sampler || policy) from the sampler's tokens, against the exact one over the whole vocabulary."""
    trials = batch[:6]
    _, stats, model = updated_weights(policy, trials, lr=3e-3, minibatch=10**6)
    start, _ = train.load_policy(str(train.warm_policy(policy[0])), "float32", "cpu")
    exact = estimate = count = 0.0
    turns = [turn for trial in trials for turn in trial.turns]
    for turn in turns:
        ids = torch.tensor([turn.prompt_ids + turn.reply_ids])
        with torch.no_grad():
            old, new = (m(ids).logits[0, len(turn.prompt_ids) - 1 : -1].log_softmax(-1) for m in (start, model))
        exact += (old.exp() * (old - new)).sum().item()
        count += len(turn.reply_ids)
    assert stats["kl"] == pytest.approx(0, abs=1e-5), "before the only step nothing has changed"
    with torch.no_grad():
        change = lamer.reply_logps(model, turns, 1.0, policy[2].vocab_size)[0]
    change -= torch.cat([torch.tensor(turn.logps) for turn in turns])
    estimate = (change.expm1() - change).sum().item()
    assert estimate == pytest.approx(exact, rel=0.5) and estimate > 0.01


def test_kl_to_the_start_pulls_back(policy, batch):
    start, _ = train.load_policy(str(train.warm_policy(policy[0])), "float32", "cpu")
    model, chat = train.load_policy(str(train.warm_policy(policy[0])), "float32", "cpu")
    optimizer, trials = lamer.Optimizer(model, 1e-3), batch[:8]
    options = dict(reference=start, vocab_size=chat.vocab_size, minibatch=10**6)
    away = [lamer.update(model, optimizer, trials, range(8), Sampling(), **options)["kl_start"] for _ in range(4)]
    for turn in [turn for trial in trials for turn in trial.turns]:
        turn.advantage = 0.0
    for kind in ("k2", "k3"):
        options |= dict(kl_coef=1.0, kl=kind)
        back = [lamer.update(model, optimizer, trials, range(8), Sampling(), **options)["kl_start"] for _ in range(6)]
    assert away[0] == pytest.approx(0, abs=1e-7) and away[-1] > 2 * back[-1]


def test_the_value_head_learns_and_leaves_the_policy_alone(policy, batch):
    model, chat = train.load_policy(str(train.warm_policy(policy[0])), "float32", "cpu")
    value_head = torch.nn.Linear(model.config.hidden_size, 1)
    torch.nn.init.zeros_(value_head.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = lamer.Optimizer(model, 0.0, value_head=value_head, value_lr=3e-2)
    losses = []
    for step in range(12):
        lamer.compute_values(model, value_head, batch)
        lamer.ppo_advantages(batch, 0.95, 0.6)
        options = dict(value_head=value_head, minibatch=100)
        stats = lamer.update(model, optimizer, batch, range(24), Sampling(step=step), chat.vocab_size, **options)
        losses.append(stats["value_loss"])
    turns = [turn for trial in batch for turn in trial.turns]
    half_variance = np.var([turn.ret for turn in turns]) / 2
    assert losses[-1] < half_variance < losses[0], "better than any constant"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    _, plain, _ = updated_weights(policy, batch, minibatch=10**6)
    _, both, _ = updated_weights(policy, batch, minibatch=10**6, value_head=value_head)
    assert plain["grad_norm"] == pytest.approx(both["grad_norm"]), "no gradient of the values reaches the policy"
    assert all(abs(turn.advantage - (turn.ret - turn.value)) < 1e-5 for turn in turns)


def test_bf16_weights_have_fp32_masters(policy, batch):
    before = train.load_policy(str(train.warm_policy(policy[0])), "float32", "cpu")[0].state_dict()
    weights, stats, model = updated_weights(policy, batch, lr=1e-6, dtype=torch.bfloat16, minibatch=10**6)
    assert model.dtype == torch.bfloat16 and stats["sampler_gap"] > 0
    assert abs(stats["kl"]) < 1e-9, "ratios are measured against the trainer, so they begin at 1"
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    name = "model.layers.0.mlp.up_proj.weight"
    assert 0 < (weights[name] - before[name]).abs().max() < 2e-6, "steps that bf16 would round away arrive"
    assert torch.equal(model.state_dict()[name], weights[name].bfloat16())


# ---------------------------------------------------------------------------------------- the commands

SMALL = "--env minesweeper --model tiny --device cpu --tiny_hidden 32 --tiny_layers 2 --warm_steps 150 --max_reply 32"
SMALL = f"{SMALL} --num_tasks 4 --group_size 4 --eval_tasks 8 --minibatch 40 --eval_every 0".split()


LOCKBOX = ["--env", "lockbox", "--model", "tiny", "--device", "cpu", "--eval_every", "0"]


def start(*command, **options):
    """Start a command of the project in a process of its own, on one thread."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if command[0] == "torchrun":
        command = ["-m", "torch.distributed.run", *command[1:]]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=HERE, env=env)
    prepare = options.pop("preexec_fn", lambda: None)

    def before() -> None:  # a test run started in the background ignores Ctrl-C, and its children would inherit that
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        prepare()

    options["preexec_fn"] = before
    return subprocess.Popen([sys.executable, *map(str, command)], **pipes, **options)


def run(*command, expect=0, **options):
    """Run a command of the project to its end; returns its output."""
    process = start(*command, **options)
    text = process.communicate(timeout=900)[0]
    assert process.returncode == expect, text[-3000:]
    return text


def weights_of(folder):
    return train.load_policy(str(folder), "float32", "cpu")[0].state_dict()


def rows(path, *without):
    return [{k: v for k, v in json.loads(line).items() if k not in without} for line in path.read_text().splitlines()]


CLOCKS = ("seconds", "tokens_per_second", "peak_gb")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, policy):
    """A run of four steps by the real command."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run("train.py", *SMALL, "--steps", 4, "--save_every", 2, "--keep", 9, "--eval-every", 2, "--out", out)
    return out


def test_a_run_leaves_what_was_promised(finished_run):
    log = rows(finished_run / "metrics.jsonl")
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    keys = ["step", "success", "return", "valid", "seconds", "tokens_per_second"]
    keys += ["peak_gb", "entropy", "clip_fraction", "kl"]
    assert all(key in row for row in log for key in keys)
    assert len(log[0]["success"]) == 3 and set(log[0]["seconds"]) >= {"rollout", "update"}
    assert [row["step"] for row in rows(finished_run / "evals.jsonl")] == [0, 2, 4]
    assert "episode 1, play" in (finished_run / "trials_000004.txt").read_text()
    saved = json.loads((finished_run / "config.json").read_text())
    assert saved["num_tasks"] == 4 and saved["style"] == "compact" and saved["gamma_traj"] == 0.6
    assert sorted(train.checkpoints(finished_run)) == [2, 4]


def test_resume_equals_no_interruption(finished_run, tmp_path):
    """As if killed in the fourth step, while writing its row: the third is done again, from the save of the second."""
    shutil.copytree(finished_run, tmp_path / "cut", ignore=shutil.ignore_patterns("step_000004"))
    log = tmp_path / "cut" / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:3]) + '{"step": 4, "succ')
    run("train.py", "--resume", tmp_path / "cut")
    whole, resumed = weights_of(finished_run / "step_000004"), weights_of(tmp_path / "cut" / "step_000004")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    for name in ("metrics.jsonl", "evals.jsonl"):
        assert rows(tmp_path / "cut" / name, *CLOCKS) == rows(finished_run / name, *CLOCKS)


@pytest.mark.slow
def test_bf16_runs_resume_exactly_and_stay_tied(tmp_path):
    flags = [*SMALL, "--dtype", "bfloat16", "--save_every", 1]
    run("train.py", *flags, "--steps", 2, "--out", tmp_path / "whole")
    run("train.py", *flags, "--steps", 1, "--out", tmp_path / "cut")
    run("train.py", "--resume", tmp_path / "cut", "--steps", 2)
    whole, resumed = weights_of(tmp_path / "whole" / "step_000002"), weights_of(tmp_path / "cut" / "step_000002")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert torch.equal(whole["lm_head.weight"], whole["model.embed_tokens.weight"])


def test_two_processes_equal_one(finished_run, tmp_path):
    run("torchrun", "--nproc-per-node", 2, "train.py", *SMALL, "--steps", 2, "--eval_every", 2, "--out", tmp_path)
    one, two = weights_of(finished_run / "step_000002"), weights_of(tmp_path / "step_000002")
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-5
    for a, b in zip(rows(finished_run / "evals.jsonl"), rows(tmp_path / "evals.jsonl"), strict=False):
        assert a["success"] == b["success"], "evaluation is spread over the processes"
        assert a["return"] == pytest.approx(b["return"]) and a["reply_tokens"] == b["reply_tokens"]


@pytest.mark.slow
def test_any_number_of_processes_resumes_any_other(finished_run, tmp_path):
    """The optimizer is spread over the processes, saved by weight name, and taken up by any number of them."""
    run("torchrun", "--nproc-per-node", 2, "train.py", *SMALL, "--steps", 2, "--out", tmp_path)
    run("train.py", "--resume", tmp_path, "--steps", 3)
    run("torchrun", "--nproc-per-node", 2, "train.py", "--resume", tmp_path, "--steps", 4)
    one, two = weights_of(finished_run / "step_000004"), weights_of(tmp_path / "step_000004")
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-4
    for a, b in zip(
        rows(finished_run / "metrics.jsonl", *CLOCKS), rows(tmp_path / "metrics.jsonl", *CLOCKS), strict=True
    ):
        assert a["success"] == b["success"] and a["entropy"] == pytest.approx(b["entropy"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, line",
    [
        ("--estimator ppo --kl_coef 0.1 --grad_checkpoint", "memory reflection"),
        ("--preset official --norm mean_std", "memory reflection"),
        ("--env alfworld --receptacles 4 --objects 4 --turns 4 --warm_steps 20", "  pick_and_place_simple"),
        ("--env webshop --products 60 --turns 4 --warm_steps 20", "  mean task score"),
    ],
)
def test_runs_of_other_kinds_resume_exactly(flags, line, tmp_path):
    flags = [*SMALL, *flags.split(), "--save_every", 1]
    run("train.py", *flags, "--steps", 2, "--out", tmp_path / "whole")
    run("train.py", *flags, "--steps", 1, "--out", tmp_path / "cut")
    run("train.py", "--resume", tmp_path / "cut", "--steps", 2)
    whole, resumed = weights_of(tmp_path / "whole" / "step_000002"), weights_of(tmp_path / "cut" / "step_000002")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    log = [rows(tmp_path / kind / "metrics.jsonl", *CLOCKS) for kind in ("whole", "cut")]
    assert log[0] == log[1] and ("ppo" not in flags or log[0][1]["value_loss"] > 0 < log[0][1]["kl_start"])
    assert line in run("eval.py", "--model", tmp_path / "whole", "--num_tasks", 16)


@pytest.mark.slow
def test_two_agents_equal_one_process(finished_run, tmp_path):
    """Two nodes, as far as one machine can tell: two torchrun agents that meet on the loopback address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--nnodes", 2, "--nproc-per-node", 1, "--master-addr", "127.0.0.1", "--master-port", port]
    command = ["train.py", *SMALL, "--steps", 2, "--out", tmp_path]
    nodes = [start("torchrun", *flags, "--node-rank", rank, *command) for rank in (0, 1)]
    texts = [node.communicate(timeout=600)[0] for node in nodes]
    assert all(node.returncode == 0 for node in nodes), texts
    one, two = weights_of(finished_run / "step_000002"), weights_of(tmp_path / "step_000002")
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-5


def test_eval_command(finished_run, tmp_path):
    file = tmp_path / "result.json"
    text = run("eval.py", "--model", finished_run, "--num_tasks", 16, "--json", file, "--show", 1)
    assert "scripted player" in text and "episode 1, play" in text
    result = json.loads(file.read_text())
    keys = ["env", "model", "success", "ci95", "num_tasks", "episodes", "return", "valid"]
    keys += ["first_actions", "memory", "temperature", "top_p", "top_k", "seed"]
    assert all(key in result for key in keys)
    assert result["model"].endswith("step_000004") and result["memory"] == "reflection" and result["num_tasks"] == 16
    assert len(result["success"]) == 3 and sum(result["first_actions"].values()) == 16
    assert all(low <= share <= high for share, (low, high) in zip(result["success"], result["ci95"], strict=True))
    assert evaluation.wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-3)
    for memory in ("none", "swapped"):
        evaluation.main(["--model", str(finished_run), "--num_tasks", "16", "--memory", memory, "--json", str(file)])
        again = json.loads(file.read_text())
        assert again["memory"] == memory
        assert again["success"][0] == result["success"][0], "the first episode has no memory to swap or to lose"


MY_GAME = '''
class Coin:
    """A plain Gymnasium-style class: heads wins."""

    def reset(self, seed):
        return "Heads or tails?", {}

    def step(self, action):
        won = action == "heads"
        return "It was heads.", float(won), True, False, {"won": won}
'''


MISTAKES = [
    ("train.py --envv sokoban", "--envv"),
    ("train.py --env chess", "chess"),
    ("train.py --env missing.py:Thing", "missing.py"),
    ("train.py --env minesweeper --mines 0", "--mines 0"),
    ("train.py --env minesweeper --mines 40", "--mines 40"),
    ("train.py --env sokoban --boxes 14 --model tiny", "--boxes"),
    ("train.py --env lockbox --mines 3", "--mines"),
    ("train.py --env lockbox --group_size 1", "--group_size"),
    ("train.py --env lockbox --steps many", "--steps"),
    ("train.py --env lockbox --estimator sarsa", "--estimator"),
    ("train.py --env lockbox --model ./nowhere", "./nowhere"),
    ("train.py --env lockbox --model {broken}", "cannot be loaded"),
    ("train.py --model {run} --env minesweeper --max_prompt 10", "--max_prompt is 10"),
    ("train.py --resume {empty}", "no complete checkpoint"),
    ("train.py --resume {run} --env lockbox", "cannot become lockbox"),
    ("train.py --env minesweeper --out {whole}", "--resume"),
    ("eval.py", "--model"),
    ("eval.py --model {empty}", "--env"),
    ("eval.py --model {empty} --env lockbox", "config.json"),
    ("eval.py --model {run} --memory telepathy", "--memory"),
    ("eval.py --model {run} --temperature -1", "--temperature"),
    ("eval.py --model {run} --top_p 0", "--top_p"),
    ("eval.py --model {run} --json nowhere/x.json", "nowhere"),
    ("train.py --env lockbox --seed -1", "--seed"),
    ("train.py --env lockbox --out {file}", "cannot be made"),
    ("train.py --env {game}:Coin --model tiny", "no scripted player"),
    ("train.py --env {game}:Dice", "no class Dice"),
]


def test_mistakes_end_in_one_clear_line(finished_run, tmp_path, capfd, monkeypatch):
    checkpoint, broken = finished_run / "step_000004", tmp_path / "broken"
    broken.mkdir()
    for file in checkpoint.iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    (tmp_path / "empty").mkdir()
    places = dict(run=finished_run, whole=finished_run, empty=tmp_path / "empty", broken=broken)
    places["run"] = checkpoint
    places["file"], places["game"] = checkpoint / "config.json", tmp_path / "game.py"
    places["game"].write_text(MY_GAME)
    monkeypatch.chdir(tmp_path)
    for command, expected in MISTAKES:
        name, *flags = command.format(**places | ({"run": finished_run} if "--resume {run}" in command else {})).split()
        main = train.main if name == "train.py" else evaluation.main
        with pytest.raises(SystemExit) as stop:
            main(flags)
        line = str(stop.value)
        assert expected in line and "\n" not in line and len(line) < 400, (command, line)
    assert sorted(train.checkpoints(finished_run)) == [2, 4]


def test_a_mistake_on_the_real_command_line():
    text = run("train.py", "--env", "chess", expect=1)
    assert text.strip().splitlines()[-1].startswith("train.py: ") and "Traceback" not in text


def test_a_full_disk_while_saving_loses_nothing(finished_run, tmp_path):
    resource = pytest.importorskip("resource")
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    before = {path.name: path.read_bytes() for path in (tmp_path / "step_000004").iterdir()}
    size = len(before["model.safetensors"]) // 2
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))  # stands in for a full disk
    text = run("train.py", "--resume", tmp_path, "--steps", 5, expect=1, preexec_fn=limit)
    assert "cannot save" in text.strip().splitlines()[-1] and "Traceback" not in text
    assert {path.name: path.read_bytes() for path in (tmp_path / "step_000004").iterdir()} == before
    assert sorted(train.checkpoints(tmp_path)) == [2, 4]
    assert not list(tmp_path.glob("*.unfinished"))


def test_an_interrupted_run_says_so_and_can_go_on(finished_run, tmp_path):
    process = start("train.py", *SMALL, "--steps", 1000, "--save_every", 1, "--out", tmp_path)
    deadline = time.time() + 600
    while not train.checkpoints(tmp_path) and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 1 and "stopped" in text.strip().splitlines()[-1] and "Traceback" not in text
    last = max(train.checkpoints(tmp_path))
    train.main(["--resume", str(tmp_path), "--steps", str(last + 1)])
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == list(range(1, last + 2))


def test_an_environment_of_ones_own(policy, tmp_path):
    (tmp_path / "game.py").write_text(MY_GAME)
    env = make_env(f"{tmp_path}/game.py:Coin")
    assert env.name == "coin" and env.parse("<action> heads </action>") == ("heads", True)
    config = train.Config(env=f"{tmp_path}/game.py:Coin", device="cpu", model=str(train.warm_policy(policy[0])))
    config = replace(train.resolve(config), max_reply=4)
    sampler = train.make_sampler(config, *policy[1:])
    trials = train.rollout(config, sampler, [0, 1], [0, 1], Sampling())
    assert [trial.episodes for trial in trials] == [3, 3]
    for text, message in (
        ("import nothing_like_this", "cannot be loaded"),
        ("class Other: pass", "no class Coin"),
        ("from envs import Env\nclass Coin(Env): pass", "with reset and step"),
    ):
        (tmp_path / "game.py").write_text(text)
        with pytest.raises(ValueError, match=message):
            make_env(f"{tmp_path}/game.py:Coin")


# --------------------------------------------------------------------------------------------- learning, and the README


def warm(env, **options):
    """(config, sampler) of the default warm-started policy."""
    config = train.resolve(train.Config(env=env, model="tiny", device="cpu", **options))
    return config, train.make_sampler(config, *train.load_policy(str(train.warm_policy(config)), "float32", "cpu"))


def actions_with(config, sampler, notes):
    """First actions of second episodes of tasks 0, 1, ..., each with this note from a first episode in its memory."""
    env = train.env_of(config)

    def ask(seed, note):
        initial, _ = env.reset(seed=seed)
        prompt = lamer.play_prompt(env, config.style, "reflection", initial, [lamer.Episode([], note)], 1, [])
        reply = yield lamer.Prompt("play", sampler.chat.encode(prompt))
        return env.parse(reply.text)[0]

    talks = [ask(seed, note) for seed, note in enumerate(notes)]
    return sampler.run(talks, range(len(notes)), Sampling(seed=1))


@pytest.mark.slow
def test_lockbox_without_credit_across_episodes_does_not_peek(tmp_path):
    run("train.py", *LOCKBOX, "--gamma_traj", 0.0, "--out", tmp_path)
    run("eval.py", "--model", tmp_path, "--json", tmp_path / "eval.json")
    result = json.loads((tmp_path / "eval.json").read_text())
    assert result["first_actions"].get("peek", 0) <= 0.05 * 256
    assert result["valid"] >= 0.95 and result["first_episode_reward"] >= 0.9


@pytest.mark.slow
def test_minesweeper_warm_policy_follows_its_memory():
    """With the board after a first episode in memory it opens what was safe there; with another board less often."""
    config, sampler = warm("minesweeper")
    env, rng = train.env_of(config), random.Random(0)
    boards, safe = [], []
    for seed in range(256):
        env.reset(seed=seed)
        at_start, done = list(env.shown), False
        while not done:
            _, _, terminated, truncated, _ = env.step(env.parse(env.scripted(0.0, rng))[0])
            done = terminated or truncated
        boards.append(lamer.parse_reflection(env.scripted_reflection(rng))[0])
        found = [
            i
            for i, (before, after) in enumerate(zip(at_start, env.shown, strict=True))
            if before == "?" != after != "*"
        ]
        safe.append({(i // env.size + 1, i % env.size + 1) for i in found})

    def share_opened(notes):
        chosen = zip(actions_with(config, sampler, notes), safe, strict=True)
        return np.mean([action in cells for action, cells in chosen if cells])

    assert share_opened(boards) > share_opened(boards[1:] + boards[:1]) + 0.1, "what is written changes what is done"
    trials = train.rollout(config, sampler, range(256), range(256), Sampling(seed=9))
    assert sum(trial.success_after(1) for trial in trials) <= 0.4 * 256, "first episodes are played poorly"


@pytest.mark.slow
def test_sokoban_warm_policy_follows_its_memory():
    """A plan in memory is played on the first turn, whichever it is."""
    config, sampler = warm("sokoban")
    plans = ["up, left, down", "down, down, right", "left, up, up", "right, right, left"]
    for i, plan in enumerate(plans):
        moves, other = plan.split(", "), plans[i - 1]
        assert actions_with(config, sampler, [plan] * 128).count(moves) >= 0.25 * 128
        assert actions_with(config, sampler, [other] * 128).count(moves) <= 0.1 * 128
    trials = train.rollout(config, sampler, range(256), range(256), Sampling(seed=9))
    assert sum(trial.success_after(1) for trial in trials) <= 0.6 * 256, "first episodes are played poorly"


def test_the_readme_is_true():
    text = (HERE / "README.md").read_text(encoding="utf-8")
    assert not re.findall(r"@[A-Z]+@", text)
    for name in re.findall(r"^\| .* \| `(\w+)` \|$", text, flags=re.M):  # the table of symbols
        assert hasattr(lamer, name), f"README names lamer.{name}, which does not exist"
    assert len(re.findall(r"^\| .* \| `(\w+)` \|$", text, flags=re.M)) >= 8
    flags = set(re.findall(r"--([a-z_]+[a-z])", text))
    known = {f.name for cls in (train.Config, evaluation.EvalConfig) for f in train.fields(cls)}
    known |= {"nproc", "help", "shape"}  # of torchrun, of both commands, and of bench/memory.py
    assert flags <= known, f"README names flags that do not exist: {sorted(flags - known)}"
    for command in re.findall(r"^(?:python|torchrun .*) (train|eval)\.py (.*?)(?: +#.*)?$", text, flags=re.M):
        cls = train.Config if command[0] == "train" else evaluation.EvalConfig
        train.parse_flags(cls, command[1].split(), "")


def test_lockbox_warm_policy_follows_its_memory_and_rl_learns_to_peek(request):
    """The whole claim in miniature: from a policy that can copy, meta-RL finds that peeking first is worth it."""
    text = request.session.process.communicate(timeout=600)[0]
    assert request.session.process.returncode == 0, text[-3000:]
    config, sampler = warm("lockbox")
    for code in (2, 7):
        assert actions_with(config, sampler, [f"code {code}"] * 64).count(f"open {code}") >= 32, (
            "a written code is opened"
        )
        assert actions_with(config, sampler, ["nothing"] * 64).count(f"open {code}") <= 16
    trials = train.rollout(config, sampler, range(128), range(128), Sampling(seed=9))
    assert sum(trial.success_after(1) for trial in trials) <= 0.25 * 128, "first episodes are played poorly"
    out = request.session.lockbox
    evaluation.main(["--model", str(out), "--json", str(out / "eval.json")])
    result = json.loads((out / "eval.json").read_text())
    assert result["success"][0] <= 0.05 and result["success"][1] >= 0.95
    assert result["first_actions"]["peek"] >= 0.95 * 256

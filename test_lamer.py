"""Tests: maths by hand, recorded cases, equalities of two ways to one result, real commands.

    pytest                     the quick ones, under three minutes on two cores
    pytest -m "slow or not slow"

Recorded cases of the original code stand in golden/, a selection; LAMER_GOLDEN=FOLDER takes those
of another folder.
"""

import copy
import ctypes
import functools
import gc
import inspect
import itertools
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
import zlib
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import eval as evaluation
import lamer
import sampler
import train
from envs import (
    ENVS,
    MOVES,
    WORLDS,
    Env,
    Level,
    MineSweeper,
    Sokoban,
    check_env,
    deal_board,
    derive_seed,
    make_env,
    make_level,
    playable_board,
)
from lamer import PastEpisode, Policy, Reply, Trial, Turn, run_trial
from policy import (
    Muon,
    Recorder,
    begin_to_copy,
    checkpoints,
    copying,
    imitate,
    load_policy,
    make_tokenizer,
    newest_checkpoint,
    orthogonal,
    save_policy,
    scripted_batches,
    scripted_trial,
    tiny_shape,
    warm_folder,
    warm_policy,
)
from sampler import EVAL_SEED, ContinuousSampler, GenerateSampler, RowCache, Sampling, make_sampler

HERE = Path(__file__).parent
GOLDEN = Path(os.environ.get("LAMER_GOLDEN", HERE / "golden"))
SMOLLM2 = os.environ.get("LAMER_SMOLLM2", "")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory, request):
    """Warm-started policies are made once per test run, in a folder of its own.

    The long runs, one of the quick tests and one of the slow ones, start here on a core of their
    own, and are waited for by the last tests.
    """
    os.environ["LAMER_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(1)
    request.session.long_runs = {}
    for name, flags in LONG_RUNS.items():
        if any(name in item.name for item in request.session.items):
            out = tmp_path_factory.mktemp("long") / "run"
            with out.with_suffix(".log").open("w") as log:  # a pipe would be full before it is read
                process = start("train.py", *flags, "--out", out, stdout=log)
            request.session.long_runs[name] = process, out
    yield
    for process, _ in request.session.long_runs.values():
        process.kill()


TINY = dict(env="minesweeper", model="tiny", device="cpu", max_reply=32)
# The seed of SMALL below, so that both are warm-started once.
TINY |= dict(tiny_hidden=32, tiny_layers=2, warm_steps=160, warm_batch=32, seed=1)


@pytest.fixture(scope="session")
def tiny(cache):
    """(config, model, chat) of a MineSweeper policy that knows the format and little else."""
    config = train.make_config(**TINY)
    return config, *load_policy(str(warm_policy(config)), torch.float32, "cpu")


def golden(name, *keys):
    """The recorded cases under these keys of a file; having none is a failure, not a pass."""
    path = GOLDEN / f"{name}.json"
    assert path.is_file(), f"no recorded cases at {path}"
    recorded = json.loads(path.read_text(encoding="utf-8"))
    for key in keys:
        assert recorded.get(key), f"{path} has no {key}"
    return [recorded[key] for key in keys]


# ------------------------------------------------------------------------- recorded cases


def test_recorded_cases_that_are_not_there_do_not_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "GOLDEN", tmp_path)
    for content in (None, "{}", '{"levels": []}'):
        if content:
            (tmp_path / "sokoban.json").write_text(content)
        with pytest.raises(AssertionError, match="sokoban"):
            golden("sokoban", "levels")


def level_from_text(text):
    """A Level from its drawing, for recorded plays."""
    rows = [line.split(": ")[1].split(" ") for line in text.splitlines()]
    cells = [cell for row in rows for cell in row]

    def cells_with(symbols):
        return [i for i, cell in enumerate(cells) if cell in symbols]

    floor = [i for i, cell in enumerate(cells) if cell != "#"]
    [player] = cells_with("PS")
    return Level(len(rows), floor, cells_with("OS√"), cells_with("X√"), player)


def recorded_sokoban(case):
    env = Sokoban(size=case["start"].count("\n") + 1, original=True)
    env.start(level_from_text(case["start"]))
    env.max_steps = case["max_steps"]
    return env


def test_golden_sokoban():
    levels, plays, talks = golden("sokoban", "levels", "plays", "turns")
    words = ["still", *MOVES]
    for case in levels:
        least, most = case["options"]["min_steps"], case["options"]["max_sol_steps"]
        options = dict(size=case["dim"], boxes=case["boxes"], min_solution=least, max_solution=most)
        env = Sokoban(**options, original=True)
        assert env.reset(case["final_seed"])[0] == case["text"], case["id"]
        solution = env.level.best_moves(env.player, env.boxes, 100)
        assert [words.index(word) for word in solution] == case["solution"], case["id"]
        if least <= case["optimal_length"] <= most and case["seed"] == case["final_seed"]:
            text, _ = Sokoban(**options).reset(case["seed"])
            assert text == case["text"], "the default differs where it need not"
    for case in plays:
        env = recorded_sokoban(case)
        assert case["steps"]
        for step in case["steps"]:
            player = env.player
            reward, done = env.move(words[step["action"]])
            seen = env.text(), round(reward, 6), done, env.won, env.player != player
            expected = [step[key] for key in ("text", "reward", "done", "won", "effective")]
            assert [*seen] == expected, (case["level"], step)
            if not env.won:
                assert env.is_solvable() != step["unsolvable"], (case["level"], step)
    for case in talks:
        env = recorded_sokoban(case)
        assert case["turns"]
        for turn in case["turns"]:
            if "restart" in turn:
                env.start(env.level)
                assert env.text() == turn["text"]
                continue
            text, reward, done, _, info = env.step([words[a] for a in turn["actions"]])
            expected = [turn[key] for key in ("text", "reward", "done", "won")]
            assert [text, reward, done, info["won"]] == expected


def test_golden_minesweeper():
    boards, chains = golden("minesweeper", "boards", "chains")

    def check_deal(case, opener):
        """Deal as recorded; returns the environment with that board, and deal_board's results."""
        n = case["size"]
        dealt = deal_board(n, case["n_mines"], case["seed"], opener, original=True)
        numbers, shown, openings, left = dealt
        assert ["".join(numbers[r * n : (r + 1) * n]) for r in range(n)] == case["true_board"]
        assert [divmod(cell, n) for cell in openings] == [tuple(cell) for cell in case["openings"]]
        env = MineSweeper(size=n, mines=case["n_mines"], original=True)
        env.start(numbers, shown)
        assert env.text() == case["text"]
        assert env.lost == case["dead_start"]
        return env, shown, left

    for case in boards:
        env, shown, _ = check_deal(case, np.random.RandomState(case["pre_seed"]))
        assert case["steps"]
        for step in case["steps"]:
            if "restart" in step:
                env.start(env.numbers, shown)
                assert env.text() == step["text"]
                continue
            text, reward, done, _, info = env.step(tuple(int(number) for number in step["action"]))
            expected = [step[key] for key in ("text", "reward", "done", "won")]
            assert [text, reward, done, info["won"]] == expected
    for chain in chains:
        generator = np.random.RandomState(chain["pre_seed"])
        assert chain["resets"]
        for case in chain["resets"]:
            _, _, generator = check_deal(case, generator)


def test_golden_parsing():
    cases, histories = golden("parsing", "cases", "histories")
    words, seen = ["still", *MOVES], set()
    for case in cases:
        reply = case["reply"]
        for name in ("sokoban", "minesweeper"):
            if name not in case:
                continue
            expected, options = case[name], {}
            seen.add((name, case["phase"]))
            if case["phase"] == "reflect":
                reflection, is_valid = lamer.parse_reflection(reply)
                # One rule for all games, first start tag to last end tag, where originals differ.
                if case["sokoban"] == case["minesweeper"]:
                    assert reflection == expected["reflection"], reply
            elif name == "sokoban":
                if "num_actions_per_turn" in case:
                    options = {"moves_per_turn": case["num_actions_per_turn"]}
                action, is_valid = Sokoban(**options).parse(reply)
                assert [words.index(word) for word in action] == expected["actions"], reply
            else:
                action, is_valid = MineSweeper().parse(reply)
                assert action == tuple(int(number) for number in expected["action"]), reply
            assert is_valid == bool(expected["valid"]), reply
    assert len(seen) == 4, "both games, both phases"
    for case in histories:
        records = [(str(r["action"]), r["text_obs"], r["dones"]) for r in case["records"]]
        assert records
        assert lamer.format_history(Env(), records, 2, 7) == case["play"]
        assert lamer.format_history(Env(), records, 7, 7) == case["reflect"]
        assert lamer.format_history(Env(), records, 2, 7) == case["past_attempt"]


def test_golden_returns():
    [cases] = golden("maths", "returns")
    for case in cases:
        gammas = case["step_gamma"], case["traj_gamma"]
        paper = lamer.cross_episode_returns(case["attempts"], "paper", *gammas)
        assert all(np.allclose(a, b, atol=1e-4) for a, b in zip(paper, case["paper"], strict=True))
        trial = make_trial(case["attempts"], reflect=case["reflections"])
        lamer.compute_returns([trial], "official", *gammas)
        returns = [turn.ret for turn in trial.turns]
        assert np.allclose(returns, case["official"]["returns"], atol=1e-4)


def test_golden_advantages():
    [cases] = golden("maths", "advantages")
    estimators = dict(
        gigpo_mean_norm=("gigpo", "mean"),
        gigpo_mean_std_norm=("gigpo", "mean_std"),
        grpo=("grpo", "mean"),
        grpo_no_std=("reinforce", "mean"),
        rloo=("rloo", "mean"),
    )
    for case in cases:
        rows_of = {}
        for row in case["rows"]:
            rows_of.setdefault(row["group"], {}).setdefault(row["member"], []).append(row)
        groups = [[RecordedTrial(rows) for rows in group.values()] for group in rows_of.values()]
        for name, how in estimators.items():
            lamer.official_advantages(groups, *how, step_weight=case["step_advantage_w"])
            turns = [turn for group in groups for trial in group for turn in trial.turns]
            rows = [row for group in rows_of.values() for rows in group.values() for row in rows]
            ours = {id(row): turn.advantage for row, turn in zip(rows, turns, strict=True)}
            ours = [ours[id(row)] for row in case["rows"]]
            assert np.allclose(ours, case["official"][name], atol=1e-4), name


class RecordedTrial(Trial):
    """A trial whose episode rewards and returns are as recorded."""

    def __init__(self, rows):
        super().__init__(0, len(rows))
        # An episode of its own for every row, so that each may have its own reward.
        for i, row in enumerate(rows):
            turn = make_turn(i, row["phase"], is_valid=bool(row["valid"]), anchor=row["anchor"])
            turn.ret = row["step_return"]
            self.turns.append(turn)
        self.recorded = [[row["episode_reward"]] for row in rows]

    def rewards(self, kind):
        return self.recorded


def test_golden_ppo():
    [cases] = golden("maths", "ppo")
    cases = [case for case in cases if case["clip_low"] == case["clip_high"]]  # ours has one range
    assert len(cases) >= 2
    for case in cases:
        mask = torch.arange(len(case["log_prob"][0])) < torch.tensor(case["lengths"])[:, None]
        logps, official = torch.tensor(case["log_prob"], requires_grad=True), case["official"]
        old = torch.tensor(case["old_log_prob"])
        advantages = torch.tensor(case["advantage"])[:, None].expand_as(old)
        options = dict(clip=case["clip_low"], dual_clip=case["clip_c"])
        losses, is_clipped = lamer.clipped_loss(logps, old, advantages, **options)
        loss = (losses * mask).sum() / mask.sum()
        loss.backward()
        official_loss = official["token-mean"]
        assert abs(loss.item() - official_loss["loss"]) < 1e-4
        assert abs((is_clipped & mask).sum() / mask.sum() - official_loss["clipfrac"]) < 1e-4
        assert np.allclose(logps.grad, official_loss["grad"], atol=1e-4)
        kl = lamer.kl_estimate(logps, torch.tensor(case["ref_log_prob"])) * mask
        assert abs(kl.sum() / mask.sum() - official["kl_terms"]["k3"]) < 1e-4


# ---------------------------------------------------------------- returns and advantages


def make_turn(episode=0, phase="play", reward=0.0, is_valid=True, anchor=""):
    turn = Turn(episode, phase, [1], [2], [0.0], "", "", anchor)
    turn.reward, turn.is_valid = reward, is_valid
    return turn


def make_trial(rewards, reflect=True, seed=0):
    """A trial with these rewards[n][t], and a reflection between episodes."""
    trial = Trial(seed, len(rewards))
    for n, episode in enumerate(rewards):
        trial.turns += [make_turn(n, "play", reward) for reward in episode]
        if reflect and n + 1 < len(rewards):
            trial.turns.append(make_turn(n, "reflect", anchor="reflection"))
    return trial


def of_turns(name, trials):
    """A field of every turn, one list per trial."""
    return [[getattr(turn, name) for turn in trial.turns] for trial in trials]


def test_returns_by_hand():
    assert lamer.discounted([0, 0, 10], 0.5) == [2.5, 5, 10]
    rewards = [[1, 2], [0, 4], [8]]
    # g: [2, 2], [2, 4], [8]; gamma_traj 0.5: G_t(0) = g_t(0) + 2/2 + 8/4, G_t(1) = g_t(1) + 8/2
    returns = lamer.cross_episode_returns(rewards, "paper", 0.5, 0.5)
    assert returns == [[5, 5], [6, 8], [8]]
    # recursion: an episode's last turn gets gamma_traj times the next G_0, discounted further on
    returns = lamer.cross_episode_returns(rewards, "official", 0.5, 0.5)
    assert returns == [[3, 4], [4, 8], [8]]
    trial = make_trial(rewards)
    trial.turns[1].is_valid = False  # returns know no penalty
    lamer.compute_returns([trial], "paper", 0.5, 0.5)
    # play, play, reflection on 0, play, play, reflection on 1, play
    assert of_turns("ret", [trial]) == [[5, 5, 6, 6, 8, 8, 8]]


@pytest.mark.parametrize("estimator", lamer.ESTIMATORS)
def test_an_invalid_reply_pays_its_penalty(estimator):
    """Also where it is alone in its set; nothing where all of its phase are invalid."""
    config = train.make_config(env="lockbox", device="cpu", estimator=estimator, group_size=3)

    def zeros(batch):
        return SimpleNamespace(values=torch.zeros(len(batch)))

    zeros.most_nodes = lambda turns: 100

    def credit(*invalid):
        """Advantages and value targets, with these turns invalid."""
        turns = turns_of(trials := three_trials())
        for i, turn in enumerate(turns):
            turn.anchor, turn.is_valid = str(i), i not in invalid  # each state was reached once
        train.assign_credit(config, zeros, trials)
        fields = [(turn.advantage, turn.value_target) for turn in turns]
        return np.array(fields).T

    # play, play, reflect, play; play, reflect, play; play
    change = credit(3) - credit()
    sixth = 0.5 / 6
    assert np.allclose(change[0], [sixth, sixth, 0, sixth - 0.5, sixth, 0, sixth, sixth])
    assert np.allclose(change[1], 0), "values are learned without it"
    assert np.allclose(credit(2)[0] - credit()[0], [0, 0, -0.25, 0, 0, 0.25, 0, 0])
    assert np.allclose(credit(0, 1, 3, 4, 6, 7), credit())


def three_trials():
    return [make_trial([[0, 1], [10]]), make_trial([[2], [4]]), make_trial([[5]])]


def test_advantages_by_hand():
    trials = three_trials()
    trials[0].turns[1].anchor = "b"
    lamer.compute_returns(trials, "paper", 1.0, 0.5)
    assert of_turns("ret", trials) == [[6, 6, 10, 10], [4, 4, 4], [5]]
    lamer.compute_advantages([trials], "reinforce")
    # episode 0, play: trials' means 6, 4, 5 (mean 5); reflections: 10, 4; episode 1: 10, 4
    assert of_turns("advantage", trials) == [[1, 1, 3, 3], [-1, -3, -3], [0]]
    lamer.compute_advantages([trials], "gigpo", step_weight=2.0)
    # E: G_0(0) = 6, 4, 5 (mean 5), G_0(1) = 10, 4 (mean 7), 0 for reflections
    # P: first turns share an anchor (mean 5), the turn at "b" is alone (0);
    #    reflections 10, 4, which the weight leaves alone; episode 1 10, 4
    assert of_turns("advantage", trials) == [[3, 1, 3, 9], [-3, -3, -9], [0]]
    lamer.compute_advantages([trials], "reinforce", advantage_norm="mean_std")
    assert np.allclose(trials[0].turns[2].advantage, 3 / (np.std([10, 4], ddof=1) + 1e-6))


def test_gigpo_compares_whole_episodes_by_what_they_were_worth_at_their_start():
    trials = [make_trial([[0, 8]]), make_trial([[2]])]
    lamer.compute_returns(trials, "paper", 0.5, 0.0)
    assert of_turns("ret", trials) == [[4, 8], [2]]
    lamer.compute_advantages([trials], "gigpo", step_weight=0.0)
    assert of_turns("advantage", trials) == [[1, 1], [-1]]  # 4 and 2, of mean 3


def test_official_advantages_by_hand():
    trials = [make_trial([[0, 1], [10]]), make_trial([[2], [4], [0]])]
    for trial, returns in zip(trials, ([6, 6, 12, 10], [4, 7, 4, 2, 0]), strict=True):
        for turn, ret in zip(trial.turns, returns, strict=True):
            turn.ret = ret
    lamer.official_advantages([trials], "reinforce")
    # E: rewards of episodes 1, 1, 10 and 2, 4, 0, of reflections 0; of mean 2 over the nine rows
    assert of_turns("advantage", trials) == [[-1, -1, -2, 8], [0, -2, 2, -2, -2]]
    lamer.official_advantages([trials], "gigpo")
    # P: all play turns share an anchor (mean 5), all reflections another (12, 7, 2: mean 7)
    assert of_turns("advantage", trials) == [[0, 0, 3, 13], [-1, -2, 1, -7, -7]]
    trials[0].won_in = 1
    lamer.official_advantages([trials], "reinforce", reward="success")
    assert np.allclose(of_turns("advantage", trials)[0], [-10 / 9, -10 / 9, -10 / 9, 80 / 9])


def test_rloo_grpo_and_success_by_hand():
    trials = three_trials()
    trials[0].won_in = 1
    lamer.compute_returns(trials, "paper", 1.0, 0.5)
    lamer.compute_advantages([trials], "rloo")
    # first episodes, of means 6, 4, 5: each minus the mean of the two other trials; else 10, 4
    assert of_turns("advantage", trials) == [[1.5, 1.5, 6, 6], [-1.5, -6, -6], [0]]
    lamer.compute_advantages([trials], "grpo")
    std = np.std([6, 6, 4, 5], ddof=1)
    assert np.allclose(trials[0].turns[0].advantage, 1 / (std + 1e-6))
    trials[0].turns[0].ret, trials[0].turns[1].ret = 3.0, 7.0  # of mean 5
    trials[1].turns[0].ret = 5.0
    for estimator, scale in (("reinforce", 1), ("rloo", 1), ("grpo", np.std([3, 7, 5, 5], ddof=1))):
        lamer.compute_advantages([trials], estimator)
        plain = [turn.advantage * scale for trial in trials for turn in trial.turns[:2]]
        assert np.allclose(plain[:3], [-2, 2, 0], atol=1e-4), "equal means: plain differences"
    lamer.compute_returns(trials, "paper", 1.0, 0.5, reward="success")
    assert of_turns("ret", trials) == [[5, 5, 10, 10], [0, 0, 0], [0]]
    won_late = make_trial([[3, 3], [3, 3]])
    won_late.won_in = 1
    assert won_late.rewards("success") == [[0, 0], [0, 10]], "only the turn that wins is paid"


def test_ppo_advantages_by_hand():
    trial = make_trial([[1, 2], [8]])  # play, play, reflect, play
    for turn, value in zip(trial.turns, [1.0, 2.0, 3.0, 5.0], strict=True):
        turn.value = value

    def advantages(**options):
        lamer.ppo_advantages([trial], 0.5, 0.25, **options)
        return [turn.advantage for turn in trial.turns]

    for credit in ("paper", "official"):
        lamer.compute_returns([trial], credit, 0.5, 0.25)
        assert np.allclose(advantages(), [turn.ret - turn.value for turn in trial.turns])
    # official returns 3, 4, 8, 8; lambda 0 leaves the one-step errors r + gamma V' - V
    steps = [1 + 0.5 * 2 - 1, 2 + 0.25 * 3 - 2, 0 + 1 * 5 - 3, 8 - 5]
    assert np.allclose(advantages(gae_lambda=0.0), steps)
    before = advantages(gae_lambda=0.5)
    assert np.allclose(before[2], steps[2] + 1 * 0.5 * steps[3])
    assert np.allclose(before[1], steps[1] + 0.25 * 0.5 * before[2])
    targets = [turn.value_target - turn.value for turn in trial.turns]
    assert np.allclose(targets, before)


def test_sets_of_one_or_of_equal_values_give_zero():
    for estimator in ("reinforce", "rloo", "grpo", "gigpo"):
        for rewards in ([[0.1]], [[0.1]] * 7):
            trials = [make_trial([reward]) for reward in rewards]
            lamer.compute_returns(trials, "paper", 0.95, 0.6)
            lamer.compute_advantages([trials], estimator)
            assert of_turns("advantage", trials) == [[0.0]] * len(trials)
    for norm in ("mean", "mean_std", "leave_one_out"):
        assert lamer.center([3.0], norm) == [0.0]
        assert lamer.center([0.1] * 7, norm) == [0.0] * 7


def test_the_share_without_advantage_by_hand():
    config = train.make_config(env="lockbox", device="cpu", estimator="reinforce", group_size=3)
    trials = [*three_trials(), *[make_trial([[1], [2]])] * 3]  # the second task teaches nothing
    trials[0].turns[0].is_valid = False  # a penalty is no signal of the group
    shares = train.assign_credit(config, None, trials)
    # first episodes: 5, 5.95 and 3.4, 5 with no turn at its trials' mean; 3 of 7 turns are the same
    assert shares == {"play 1": 3 / 7, "reflect 1": 3 / 5, "play 2": 3 / 5, "groups": 1 / 2}


def test_clipped_loss_by_hand():
    old = torch.zeros(4)
    logps = torch.tensor([1.5, 1.5, 0.5, 0.5]).log()  # ratios
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    losses, is_clipped = lamer.clipped_loss(logps, old, advantages, clip=0.2)
    # pessimistic: clipped only where it gains
    assert torch.allclose(losses, torch.tensor([-1.2, 1.5, -0.5, 0.8]))
    assert is_clipped.tolist() == [True, False, False, True]
    far = torch.tensor([0.0, -200.0], requires_grad=True)
    lamer.clipped_loss(far, torch.tensor([-200.0, 0.0]), torch.zeros(2))[0].sum().backward()
    assert far.grad.isfinite().all(), "a token that was all but impossible breaks nothing"
    logps = torch.tensor([5.0, 5.0, 1.4]).log()
    advantages = torch.tensor([-1.0, 1.0, 1.0])
    losses, _ = lamer.clipped_loss(logps, old[:3], advantages, 0.5, dual_clip=3.0)
    assert torch.allclose(losses, torch.tensor([3.0, -1.5, -1.4]))


def test_kl_estimate_by_hand():
    d = torch.tensor([0.0, math.log(2), -math.log(2), -20.0, -200.0], requires_grad=True)
    kl = lamer.kl_estimate(d, torch.zeros(5))
    expected = [0, 0.5 - 1 + math.log(2), 2 - 1 - math.log(2), 10, 10]
    assert torch.allclose(kl, torch.tensor(expected))
    kl.sum().backward()
    assert torch.allclose(d.grad[:3], torch.tensor([0.0, 0.5, -1.0]))
    assert d.grad.isfinite().all(), "one token that has become unthinkable must not stop a step"


def lockbox_values(codes, episodes, gamma_traj):
    """Solve Lockbox exactly, for an agent with perfect memory, from plays of every action and code.

    Returns for each first action its value G_0(0), and the probabilities of having opened the box
    after 1..episodes episodes if only best actions follow.
    lockbox_values(8, 2, 0.6)["peek"] is (6.0, [0.0, 1.0]).
    """
    env, tasks, played = make_env("lockbox", codes=codes), {}, {}
    for seed in range(20 * codes):
        env.reset(seed)
        tasks.setdefault(env.task_key(), seed)  # one seed for each code
    assert len(tasks) == codes
    actions = ["nothing", *[f"open {code}" for code in range(1, codes + 1)], "peek", "leave"]
    for action in actions:
        for seed in tasks.values():
            env.reset(seed)
            observation, reward, _, _, info = env.step(action)
            played[action, seed] = observation, reward, info["won"]

    @functools.cache
    def options(left, possible):
        """Each action with `left` episodes to go and tasks that fit all that was seen so far."""
        found = {}
        for action in actions:
            groups = {}  # tasks that look alike after this action
            for seed in possible:
                groups.setdefault(played[action, seed], []).append(seed)
            value, success = 0.0, np.zeros(left)
            for (_, reward, won), group in groups.items():
                share = len(group) / len(possible)
                value += share * reward
                if won:
                    success += share
                elif left > 1:
                    after = best(left - 1, tuple(group))
                    value += share * gamma_traj * after[0]
                    success[1:] += share * after[1]
            found[action] = value, success
        return found

    def best(left, possible):
        return max(options(left, possible).values(), key=lambda option: option[0])

    return options(episodes, tuple(tasks.values()))


@pytest.mark.parametrize(
    ("codes", "episodes", "gamma", "best", "success"),
    [  # both sides of every threshold
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
        # above 1/9: leave, then peek, then open
        (20, 3, (10 - 60**0.5) / 20 - 0.001, "leave", [0, 0, 1]),
        (20, 3, (10 - 60**0.5) / 20 + 0.001, "peek", [0, 1, 1]),
        (20, 3, 0.89, "leave", [0, 0, 1]),
    ],
)
def test_lockbox_dynamic_program(codes, episodes, gamma, best, success):
    options = lockbox_values(codes, episodes, gamma)
    first = max(options, key=lambda action: options[action][0])
    assert first.split()[0] == best
    assert np.allclose(options[first][1], success)
    if episodes == 2:
        by_hand = {
            "nothing": gamma * max(10 / codes, 1),
            "peek": 10 * gamma,
            "leave": 1 + gamma * max(10 / codes, 1),
        }
        for code in range(1, codes + 1):
            later = max(10 / (codes - 1), 1)
            by_hand[f"open {code}"] = 10 / codes + (1 - 1 / codes) * gamma * later
        assert {action: value for action, (value, _) in options.items()} == pytest.approx(by_hand)


# --------------------------------------------------------------------------- environments


@pytest.mark.parametrize("name", ENVS)
def test_same_seed_same_task_and_sticky_done(name):
    env, other, rng = make_env(name), make_env(name), random.Random(0)

    def step(skill=0.3):
        return env.step(env.parse(env.scripted(skill, rng))[0])

    for seed in range(20):
        first, task = env.reset(seed)[0], env.task_key()
        done = False
        while not done:
            observation, _, terminated, truncated, _ = step()
            done = terminated or truncated
        again, reward, terminated, _, _ = step(skill=1.0)
        assert terminated and reward == 0, "the expert's action pays no more"
        assert again == observation or name == "lockbox"
        playable_board.cache_clear()
        make_level.cache_clear()
        assert other.reset(seed)[0] == env.reset(seed)[0] == first
        assert other.task_key() == env.task_key() == task
    assert len({env.reset(seed)[0] for seed in range(20)}) > (0 if name == "lockbox" else 15)


@pytest.mark.parametrize(
    ("name", "checksum"),
    [("lockbox", 2410472122), ("minesweeper", 64973555), ("sokoban", 2898180348)],
)
def test_tasks_are_the_same_on_every_machine(name, checksum):
    env, keys = make_env(name), []
    for seed in [*range(100), EVAL_SEED]:
        env.reset(seed)
        keys.append(env.task_key())
    assert zlib.crc32(" ".join(keys).encode()) == checksum, "other tasks than the README's"


@pytest.mark.slow
def test_tasks_do_not_depend_on_the_process(monkeypatch):
    """In particular not on Python's hashes, which are salted anew in each."""
    code = (
        "from envs import ENVS, make_env\n"
        "for name in ENVS:\n"
        "    env = make_env(name)\n"
        "    print([(env.reset(seed), env.task_key(), env.actions()) for seed in range(20)])"
    )
    texts = set()
    for salt in ("0", "1"):
        monkeypatch.setenv("PYTHONHASHSEED", salt)
        texts.add(run("-c", code))
    assert len(texts) == 1 and all(text.count("\n[") == len(ENVS) - 1 for text in texts)


@pytest.mark.parametrize(("name", "options"), [("minesweeper", dict(size=12)), ("sokoban", {})])
def test_levels_that_are_drawn_again_differ(name, options, monkeypatch):
    monkeypatch.setattr("envs.MAX_DEALS", 4)  # so that some boards are dealt again, too
    env, keys = make_env(name, **options), set()
    for seed in range(120):
        env.reset(seed)
        keys.add(env.task_key())
    assert len(keys) == 120


def test_neighbouring_seeds_are_independent():
    env, codes = make_env("lockbox", codes=8), []
    for seed in range(4000):
        env.reset(seed)
        codes.append(env.code)
    for step in (1, 2, 10):
        share = np.mean([a == b for a, b in zip(codes, codes[step:], strict=False)])
        assert abs(share - 1 / 8) < 0.025, "within five standard deviations of chance"
    assert derive_seed(1, 23) != derive_seed(12, 3)


@pytest.mark.parametrize(
    ("name", "winnable"), [("lockbox", 1.0), ("sokoban", 1.0), ("minesweeper", 0.88)]
)
def test_scripted_player_wins_what_can_be_won(name, winnable):
    env, recorder = make_env(name), Recorder()  # the paper's settings
    trials = [
        scripted_trial(env, seed, 1, recorder, 1.0, random.Random(seed)) for seed in range(200)
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
            reached = [level.move(*state, d) for state in frontier for d in level.deltas]
            frontier = [state for state in dict.fromkeys(reached) if state not in seen]
            seen.update(frontier)
            depth += 1
        assert depth == level.distance[start[1] << 8 | start[0]]
        assert options.get("min_solution", 5) <= depth <= options.get("max_solution", 21)


@pytest.mark.parametrize("original", [False, True])
def test_only_the_originals_rule_keeps_a_tenth_room_out_of_range(original):
    env = Sokoban(size=5, boxes=1, original=original)
    env.reset(11)
    is_in_range = 5 <= env.level.moves_left(env.player, env.boxes) <= 21
    assert is_in_range != original


@pytest.mark.parametrize("name", ["minesweeper", "sokoban"])
def test_every_episode_of_the_games_has_seven_turns(name):
    env = make_env(name)
    for _ in range(2):
        env.reset(0)
        ends = [env.step(env.parse("")[0])[2:4] for _ in range(8)]
        assert ends == [(False, False)] * 6 + [(False, True), (True, False)]


def test_lockbox_rules():
    env = make_env("lockbox", codes=12)
    for code in range(1, 13):
        for seed in range(40):
            env.reset(seed)
            won = code == env.code
            text = "The box opens." if won else f"{code} is wrong."
            assert env.step(f"open {code}") == (text, 10.0 * won, True, False, {"won": won})
            env.reset(seed)
            text = f"The code is {env.code}."
            assert env.step("peek") == (text, 0.0, True, False, {"won": False})
            env.reset(seed)
            assert env.step("leave") == ("You leave.", 1.0, True, False, {"won": False})


def test_lockbox_parsing():
    env = make_env("lockbox", codes=8)
    codes = [code for code in range(20) if env.parse(f"<action>open {code}</action>")[1]]
    assert codes == [*range(1, 9)]
    assert env.parse("<action>peek</action>") == ("peek", True)
    assert env.parse("Better so. <action> Leave\n</action>") == ("leave", True)
    assert env.parse("<action>Open  03</action>") == ("open 3", True)
    assert env.parse("open 3") == env.parse("<action>3</action>") == ("nothing", False)


def share_of(replies, *texts):
    """The share of replies that hold one of these texts, between its tags."""
    return np.mean([any(f">{text}<" in reply for text in texts) for reply in replies])


def test_the_lockbox_novice_reads_and_writes_with_care():
    env, rng = make_env("lockbox", codes=8), random.Random(0)
    env.reset(0)
    blind = [env.scripted(0.0, rng) for _ in range(2000)]
    for action in ["peek", "leave", *[f"open {code}" for code in range(1, 9)]]:
        assert abs(share_of(blind, action) - 0.1) < 0.03
    told = [env.scripted(0.0, rng, ["code 3", "code 5"]) for _ in range(2000)]
    assert abs(share_of(told, "open 5") - (0.7 + 0.3 * 0.1)) < 0.05
    env.step("peek")
    notes = [env.scripted_reflection(rng) for _ in range(2000)]
    assert abs(share_of(notes, f"code {env.code}") - 0.7) < 0.05
    env.reset(0)
    assert share_of([env.scripted_reflection(rng) for _ in range(20)], "nothing") == 1
    env = make_env("lockbox", novice_peeks=0.4, novice_care=1.0)
    env.reset(0)
    blind = [env.scripted(0.0, rng) for _ in range(2000)]
    assert abs(share_of(blind, "peek") - 0.4) < 0.05 and share_of(blind, "open 3") < 0.1
    assert env.scripted(0.0, rng, ["code 5"]) == "<action>open 5</action>"


ROOM = """\
0: # # # # # #
1: # P X O _ #
2: # _ _ _ _ #
3: # _ _ _ _ #
4: # # # # # #
5: # # # # # #"""


def test_sokoban_turn_stops_and_sums():
    env = Sokoban()
    env.start(level_from_text(ROOM))
    _, reward, terminated, truncated, info = env.step(["right", "left", "left"])
    assert (reward, terminated, truncated, info["won"], env.steps) == (10.9, True, False, True, 1)
    env.start(env.level)
    _, reward, terminated, _, info = env.step(["still", "down", "still"])
    assert (reward, terminated, info["won"], env.steps) == (-0.3, False, False, 1)


def test_the_sokoban_player_begins_with_its_newest_plan():
    env, rng = Sokoban(), random.Random(0)
    env.start(level_from_text(ROOM))
    notes = ["up, up, up", "left, down, left"]
    assert share_of([env.scripted(0.0, rng, notes) for _ in range(500)], notes[1]) > 0.85
    env.step(["down"])
    assert share_of([env.scripted(0.0, rng, notes) for _ in range(500)], notes[1]) < 0.1
    reflections = [env.scripted_reflection(rng) for _ in range(500)]
    assert 0.4 < share_of(reflections, "right") < 0.6, "the solution from the start"
    env.start(env.level)
    assert share_of([env.scripted(0.0, rng, notes) for _ in range(500)], notes[1]) > 0.85


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


def test_minesweeper_openings_are_all_over_the_board():
    env, opened = MineSweeper(), np.zeros(36)
    for seed in range(300):
        env.reset(seed)
        opened += [cell != "?" for cell in env.shown]
    assert opened.min() > 0.25 * 300 and opened.max() < 0.6 * 300


def test_the_minesweeper_novice_reads_its_notes():
    env, rng = MineSweeper(size=3, mines=2), random.Random(0)
    env.start(list("*2.*2.11."), list("???????1?"))
    note = env.scripted_reflection(rng)
    assert note == "<remark>\nRow 1: ? ? ?\nRow 2: ? ? ?\nRow 3: ? 1 ?\n</remark>"

    def choices(*notes):
        return [env.scripted(0.0, rng, notes) for _ in range(2000)]

    cascade, mine = ["(1, 3)", "(2, 3)", "(3, 3)"], "(1, 1)"
    assert abs(share_of(choices(note), *cascade) - 3 / 8) < 0.05
    assert abs(share_of(choices(note), mine) - 1 / 8) < 0.03
    opened = note.replace("Row 3: ? 1 ?", "Row 3: ? 1 .")
    lost = note.replace("Row 1: ?", "Row 1: *")
    read = choices(opened, lost)  # half of the time
    assert abs(share_of(read, "(3, 3)") - (1 / 2 + 1 / 16)) < 0.05
    assert abs(share_of(choices(lost, note), mine) - 1 / 16) < 0.03


# ------------------------------------------------------------- environments and rubbish

GAMES = [*((name, {}) for name in (*ENVS, *WORLDS)), ("webshop", dict(compact=False))]
REWARDS = dict(lockbox=(0, 10), minesweeper=(-1, 10), webshop=(0, 10), alfworld=(0, 10))
REWARDS |= dict(sokoban=(-3.3, 12.7))  # of three moves, the best place two boxes and win
PIECES = (  # noqa: SIM905
    "<action> </action> <remark> </remark> <ACTION> </Action> <action <//action> </think> %s {0} "
    "<|im_end|> <|endoftext|> &lt;action&gt; ( ) [ ] ]] , - . -1 0 1 3 7 ٣ ２ ² Ⅷ 1e400 NaN None "
    "(1,1) (２,٣) (0,-1) open peek leave up upright still click[ search[ next \\n \\ud800 İ ß אב 🜁 "
    "\u202e \u200d \ufeff"
).split()
PIECES += [" ", "\n", "\t", "\r\n", "\0", "\x1b[2J", "\x85", "\u2028", "(-1" * 1000]
PIECES += ["9" * 5000, f"({'9' * 5000}, 1)", f"open {'9' * 5000}"]  # int() takes 4,300 digits
PIECES += ["search[<q> mug]", "search[<r>]", "click[< prev]", "click[buy now]", "go to desk 1"]


def rubbish(rng, valid):
    """A reply no one asked for: pieces of any kind, or a valid reply cut, doubled, overwritten.

    Rarely a very long one; never half of a surrogate pair, which no tokenizer decodes to.
    """
    pieces = rng.choices(PIECES, k=rng.choice([0, 1, 2, 4, 8, 30]))
    for first, last in [(0, 0x7F), (0x80, 0xD7FF), (0xE000, 0x10FFFF)] * rng.randrange(2):
        pieces.insert(rng.randrange(len(pieces) + 1), chr(rng.randint(first, last)))
    text, cut = "".join(pieces), rng.randrange(len(valid) + 1)
    match rng.randrange(6):
        case 0:
            text = f"<action>{text}</action>"
        case 1:
            text = valid[:cut] + text[:20] + valid[cut:]
        case 2:
            text = valid[:cut] + rng.choice([valid, valid.upper(), valid[::-1], text])
    return text * (100_000 // max(1, len(text)) if rng.random() < 0.003 else 1)


def state_of(env):
    """All that play changes, in a form to compare; what must hold in every state is checked."""
    match env.name:
        case "lockbox":
            assert env.seen in (None, env.code)
            return env.seen, env.done
        case "minesweeper":
            assert all(s in ("?", n) for s, n in zip(env.shown, env.numbers, strict=True))
            return [*env.shown]
        case "sokoban":
            drawn = [re.sub(r"\d+:|\s", "", text) for text in (env.first, env.text())]
            for symbols in ("#", "PS", "X√", "OS√"):  # walls, the player, boxes, targets
                places = [[i for i, cell in enumerate(cells) if cell in symbols] for cells in drawn]
                assert len(places[0]) == len(places[1])
                assert symbols in ("PS", "X√") or places[0] == places[1]
            return env.player, env.boxes
        case "webshop":
            visit, product = env.visit, env.visit.product
            assert (product is None) == (visit.page in ("search", "results"))
            assert all(product.choices[value] == name for name, value in visit.options.items())
            assert 0 <= visit.score["reward"] <= 1
            return visit.page, visit.words, visit.number, product, {**visit.options}
        case "alfworld":
            facts, contents, held = env.state.facts, env.state.contents, env.state.held
            assert [fact[2] for fact in facts if fact[0] == "atlocation"] == [env.state.place]
            assert [fact[2] for fact in facts if fact[0] == "holds"] == [held] * bool(held)
            lie = [(o, r) for r, objects in contents.items() for o in objects]
            objects = [o for o, _ in lie] + [held] * bool(held)
            assert sorted(objects) == sorted(env.state.game.fits), "each in one place"
            assert {fact[1:] for fact in facts if fact[0] == "inreceptacle"} == {*lie}
            return set(facts)


def watched(env):
    """The environment, with its states and rewards checked, and that nothing follows the end."""
    low, high = REWARDS[env.name]
    reset, step = env.reset, env.step

    def checked_reset(seed):
        env.first, info = reset(seed)
        return env.first, info

    def checked_step(action):
        before = state_of(env)
        observation, reward, terminated, truncated, info = step(action)
        after = state_of(env)
        assert observation.encode() and low <= reward <= high
        assert terminated or not info["won"]
        if env.name == "minesweeper":
            changed = [old for old, new in zip(before, after, strict=True) if old != new]
            assert set(changed) <= {"?"}, "what is open stays as it is"
        if terminated or truncated:
            for late in (action, env.parse(env.scripted(1, random.Random(0)))[0]):
                assert step(late)[1:4] == (0.0, True, False) and state_of(env) == after
        return observation, reward, terminated, truncated, info

    env.reset, env.step = checked_reset, checked_step
    return env


def check_rubbish(name, options, num_turns):
    """Play trials with every other reply rubbish, and the others valid, to get somewhere."""
    env, rng, count, seen = watched(make_env(name, **options)), random.Random(name), 0, set()
    while count < num_turns or (len(seen) < 6 and count < 4 * num_turns):  # wins are rare
        episodes, seed = rng.randint(1, 3), rng.choice([0, EVAL_SEED]) + rng.randrange(500)
        memory, style = rng.choice(lamer.MEMORIES), rng.choice(["full", "compact"])
        trial = run_trial(env, seed, episodes, Letters(), memory, style, max_prompt=3000)
        prompt = next(trial)
        while isinstance(prompt, lamer.Prompt):
            assert len(prompt.ids) <= 3000
            reply = env.scripted(rng.choice([0, 1]), rng)
            if env.actions() and rng.random() < 0.5:
                reply = f"<action>{rng.choice(env.actions())}</action>"
            if prompt.phase == "reflect":
                reply = env.scripted_reflection(rng)
            if rng.random() < 0.5:
                reply = rubbish(rng, reply)
            remark, is_valid = lamer.parse_reflection(reply)
            assert len(remark) <= 2000
            assert is_valid == ("<remark>" in reply and "</remark>" in reply)
            try:
                prompt = trial.send(Reply([1], [0.0], reply))
            except StopIteration as stop:
                prompt = stop.value
        played = prompt.episodes_played()
        assert len(played) <= episodes and max(map(len, played)) <= env.turn_limit
        assert prompt.won_in in (None, len(played) - 1) and str(prompt).encode()
        count += sum(map(len, played))
        seen.update((turn.phase, turn.is_valid) for turn in prompt.turns)
        seen.add("won" if prompt.won_in is not None else "lost")
    assert len(seen) == 6, "both phases with replies of both kinds, and both ends"


@pytest.mark.parametrize("num_turns", [500, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "options"), GAMES)
def test_rubbish_breaks_no_environment(name, options, num_turns):
    check_rubbish(name, options, num_turns)


@pytest.mark.parametrize(("name", "options"), GAMES)
def test_long_replies_are_read_at_once(name, options):
    """Reading on to the end from every character would take minutes."""
    env = make_env(name, **options)
    for piece in PIECES:
        env.reset(0)
        long = piece * (100_000 // len(piece))
        for action in (long, f"({long}", f"a]{long}", f"search[{long}]"):
            start = time.process_time()
            env.step(env.parse(f"<action>{action}</action>")[0])
            assert time.process_time() - start < 5, piece


@pytest.mark.parametrize(
    "code", ["raise KeyError('a\\nb' * 99)", "exit(3)", "\xff", "\0", "(" * 10**5, "9" * 5000]
)
def test_a_file_that_cannot_be_run_is_named_in_one_line(code, tmp_path):
    (tmp_path / "game.py").write_text(code, encoding="latin-1")
    with pytest.raises(ValueError, match=r"/game.py cannot be loaded: \w+: ") as error:
        make_env(f"{tmp_path}/game.py:Game")
    line = str(error.value)
    assert len(line.splitlines()) == 1 and len(line) < 300


# --------------------------------------------------------------- the trial and its prompts


class Counter(Env):
    """Counts to `goal`; what is not a number is invalid. Observations are long on purpose."""

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
    """Drive a trial with texts, the last one again and again.

    Returns its prompts as (phase, text), and the Trial.
    """
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
    env.shorten, env.actions = lambda text: f"({text.strip()})", lambda: ["1", "2"]
    replies = [f"<action>{n}</action>" for n in range(5)] + ["<remark></remark>"]
    full, _ = talk(run_trial(env, 7, 2, Letters()), *replies)
    history = "Action 3: 2\nObservation 3: (3)\nAction 4: 3\nObservation 4:\n4 \n"
    assert history in full[4][1] and "Action 2" not in full[4][1]
    assert "Action 1" in full[5][1]  # the reflection sees the whole episode
    compact, _ = talk(run_trial(env, 7, 2, Letters(), style="compact"), *replies)
    choices = "You can choose from: 1, 2"
    assert compact[0][1] == f"now\nstart 7\n{choices}\nact"
    assert compact[4][1] == f"now\nstart 7\n2\n3\n4 \n{choices}\nact"
    assert compact[5] == ("reflect", "now\nstart 7\n0\n1\n2\n3\n4\n5 \nreflect")
    env.is_markov = True
    compact, _ = talk(run_trial(env, 7, 2, Letters(), style="compact"), *replies)
    assert compact[4][1] == f"now\n4 \n{choices}\nact"


def test_a_trial_ends_at_the_first_success():
    count, fail = "<action>1</action>", "<action>no"
    replies = [count, fail, count, fail, fail, "<remark> count! </remark>", *[count] * 3]
    prompts, trial = talk(run_trial(Counter(), 7, 3, Letters()), *replies)
    assert [phase for phase, _ in prompts] == ["play"] * 5 + ["reflect"] + ["play"] * 3
    assert trial.won_in == 1
    assert [trial.success_after(k) for k in (1, 2, 3)] == [False, True, True]
    played = [(turn.episode, turn.is_valid) for turn in trial.turns if turn.phase == "play"]
    assert played[:3] == [(0, True), (0, False), (0, True)]
    assert trial.rewards() == [[0] * 5, [0, 0, 1]]
    assert "count!" in prompts[6][1] and "count!" not in prompts[4][1]
    assert "Action 2: no" not in prompts[4][1]  # an unparsed reply plays no text of its own
    assert trial.past[0].reflection == "count!"
    assert str(trial).startswith("=== task 7: solved in episode 2")


def test_the_anchor_is_the_state_a_turn_was_taken_in():
    env = Counter(words=0)
    _, trial = talk(run_trial(env, 7, 1, Letters()), "<action>1</action>")
    assert [turn.anchor for turn in trial.turns] == ["start 7", "1 ", "2 "]
    env.anchor = lambda: f"state {env.count}"
    _, trial = talk(run_trial(env, 7, 1, Letters()), "<action>1</action>")
    assert [turn.anchor for turn in trial.turns] == ["state 0", "state 1", "state 2"]


@pytest.mark.parametrize("style", ["full", "compact"])
@pytest.mark.parametrize("memory", lamer.MEMORIES)
def test_memory_modes(memory, style):
    replies = ["<action>x</action>"] * 5 + ["<remark>note A</remark>", "<action>y</action>"]
    trial = run_trial(Counter(), 7, 2, Letters(), memory=memory, style=style)
    prompts, _ = talk(trial, *replies)
    first_of_second = [text for phase, text in prompts if phase == "play"][5]
    assert ("note A" in first_of_second) == (memory in ("reflection", "both"))
    assert ("Action 1: x" in first_of_second) == (memory in ("history", "both"))
    assert any(phase == "reflect" for phase, _ in prompts) == (memory in ("reflection", "both"))
    if memory == "none":
        assert first_of_second == prompts[0][1], "attempts without memory are independent"


@pytest.mark.parametrize("style", ["full", "compact"])
def test_memory_shows_all_past_episodes_oldest_first(style):
    replies = ["<action>do A</action>"] * 5 + ["<remark>note A</remark>"]
    replies += ["<action>do B</action>"] * 5 + ["<remark>note B</remark>", "<action>x</action>"]
    prompts, trial = talk(
        run_trial(Counter(words=0), 7, 3, Letters(), memory="both", style=style), *replies
    )
    second, on_second, third = (prompts[i][1] for i in (6, 11, 12))
    assert "note A" in second and "note B" not in second
    assert "do B" in on_second and "do A" not in on_second, "a reflection is on its own episode"
    places = [third.index(words) for words in ("do A", "note A", "do B", "note B")]
    assert places == sorted(places)
    reflections = [turn for turn in trial.turns if turn.phase == "reflect"]
    assert [turn.anchor for turn in reflections] == ["reflection"] * 2, "one set for GiGPO"


def test_reflections_are_cut_and_unparsed_ones_are_empty():
    assert lamer.parse_reflection(f"<remark>{'x' * 3000}</remark>") == ("x" * 2000, True)
    assert lamer.parse_reflection("no tags") == ("", False)


def test_long_prompts_lose_the_oldest_history_first_and_are_counted():
    env, limit = Counter(goal=9, words=40), 600
    options = dict(memory="both", max_prompt=limit)
    prompts, trial = talk(run_trial(env, 7, 2, Letters(), **options), "<action>x</action>")
    assert trial.num_shortened > 0
    assert all(len(text) <= limit for _, text in prompts)
    last = [text for phase, text in prompts if phase == "play"][4]
    assert "Action 4" in last and "Action 1:" not in last
    options["max_prompt"] = 9
    _, trial = talk(run_trial(env, 7, 3, Letters(), **options), "<action>x</action>")
    assert trial.num_shortened == len(trial.turns), "each prompt counts once, however often cut"


def test_borrowed_memory_replaces_the_own():
    other = [PastEpisode([("z", "elsewhere", True)], "note of another")]
    replies = ["<action>x</action>"] * 5 + ["<remark>own note</remark>", "<action>y</action>"]
    prompts, _ = talk(run_trial(Counter(), 7, 2, Letters(), borrowed=other), *replies)
    assert "note of another" in prompts[-1][1] and "own note" not in prompts[-1][1]
    other.append(PastEpisode([], "a later note"))
    prompts, _ = talk(run_trial(Counter(), 7, 3, Letters(), borrowed=other), *replies)
    firsts = [prompts[i][1] for i in (0, 6, 12)]
    assert ["note of another" in text for text in firsts] == [False, True, True]
    assert ["a later note" in text for text in firsts] == [False, False, True], "as one's own would"


class NoteTaker:
    """A sampler that notes the number of its trial, and does nothing else; keeps the prompts."""

    chat = Letters()

    def run(self, trials, trial_ids, sampling):
        pairs = zip(trial_ids, trials, strict=True)
        talks = [talk(trial, f"<remark>note {i}.</remark>") for i, trial in pairs]
        self.prompts = [prompts for prompts, _ in talks]
        return [trial for _, trial in talks]


@pytest.mark.parametrize("memory", lamer.MEMORIES)
def test_rollout_plays_with_the_memory_asked_for(memory):
    options = dict(memory=memory, episodes=2, max_prompt=999)
    config, player = train.make_config(env="lockbox", device="cpu", **options), NoteTaker()
    lent = [[PastEpisode([("knock", "", True)], f"lent {i}.")] for i in range(3)]
    sampler.rollout(config, player, range(3), range(3), Sampling(), lent)
    for i, prompts in enumerate(player.prompts):
        phases, texts = zip(*prompts, strict=True)
        has_notes = memory in ("reflection", "both")
        assert ("reflect" in phases) == has_notes
        assert (f"lent {i}." in texts[-1]) == has_notes, "what was lent to this trial"
        assert ("knock" in texts[-1]) == (memory in ("history", "both"))


def test_swapped_memory_is_that_of_another_trial(finished_run, monkeypatch):
    player = NoteTaker()
    monkeypatch.setattr(evaluation, "make_sampler", lambda *_: player)
    flags = f"--model {finished_run} --env lockbox --num_tasks 8 --max_prompt 999".split()
    for memory, is_own in (("reflection", True), ("swapped", False)):
        evaluation.main([*flags, "--memory", memory])
        for i, prompts in enumerate(player.prompts):
            last = prompts[-1][1]
            assert "note" in last and (f"note {i}." in last) == is_own


def test_donors_are_trials_of_other_tasks():
    trials = [make_trial([[0], [0]], seed=seed) for seed in range(40)]
    for trial in trials:
        trial.past = [PastEpisode([], str(trial.seed))]
        trial.task_key = f"task {trial.seed % 4}"  # a finite list: seeds repeat its tasks
    trials[39].past = []  # solved at once: no memory to lend
    chosen = evaluation.donors(trials, 2, seed=0)
    pairs = [*zip(trials, chosen, strict=True)]
    assert all(trial.task_key != donor.task_key for trial, donor in pairs)
    assert all(donor.past for donor in chosen) and len({donor.seed for donor in chosen}) > 20
    assert chosen != evaluation.donors(trials, 2, seed=1)
    with pytest.raises(ValueError, match="swapped"):
        evaluation.donors(trials[::4], 2, seed=0)


@pytest.mark.parametrize("name", ["lockbox", "minesweeper", "sokoban"])
def test_a_task_key_tells_tasks_apart(name):
    options = dict(minesweeper=dict(size=3, mines=1), sokoban=dict(size=5, boxes=1))
    env, starts, keys = make_env(name, **options.get(name, {})), {}, set()
    for seed in range(60):
        initial, _ = env.reset(seed)
        hidden = env.code if name == "lockbox" else env.numbers if name == "minesweeper" else ""
        state = f"{initial} {hidden}"
        assert starts.setdefault(state, env.task_key()) == env.task_key()
        env.step(env.parse(env.scripted(0.5, random.Random(seed)))[0])
        assert starts[state] == env.task_key(), "the key is that of the task, not of the state"
        keys.add(env.task_key())
    assert len(keys) == len(starts) < 60


# --------------------------------------------------------------------------- the sampler


SAMPLERS = {"continuous": ContinuousSampler, "generate": GenerateSampler}


def make_player(tiny, kind="continuous", slots=24, **options):
    """The sampler of this kind, and no other: a silent fallback would leave it untested."""
    config, model, chat = tiny
    player = make_sampler(replace(config, sampler=kind, **options), model, chat, slots)
    assert type(player) is SAMPLERS[kind]
    return player


SEED_3 = Sampling(seed=3)


def play(tiny, kind="continuous", num=24, ids=None, sampling=SEED_3, slots=24):
    """Trials of the policy, four of each task."""
    ids = range(num) if ids is None else ids
    seeds = [derive_seed(i // 4) for i in ids]
    return sampler.rollout(tiny[0], make_player(tiny, kind, slots), seeds, ids, sampling)


@pytest.fixture(scope="session")
def exact(tiny):
    """The tiny policy in float64: in float32 a draw may lie within a rounding of another token."""
    config, model, chat = tiny
    return config, copy.deepcopy(model).double(), chat


@pytest.fixture(scope="session")
def played(exact):
    """Trials of the tiny policy; not to be changed."""
    return play(exact)


def turns_of(trials):
    return [turn for trial in trials for turn in trial.turns]


def replies_of(trials):
    return of_turns("reply_ids", trials)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_continuous_batching_equals_generate(exact, temperature):
    sampling = Sampling(seed=3, temperature=temperature)
    ours = play(exact, num=12, sampling=sampling, slots=5)
    plain = play(exact, "generate", num=12, sampling=sampling)
    assert replies_of(ours) == replies_of(plain)
    for a, b in zip(turns_of(ours), turns_of(plain), strict=True):
        assert np.allclose(a.logps, b.logps, atol=1e-4)


def test_greedy_replies_equal_the_models_own_generate(tiny):
    config, model, _ = tiny
    options = dict(max_new_tokens=config.max_reply, do_sample=False)
    for turn in turns_of(play(tiny, num=4, sampling=Sampling(temperature=0))):
        ids = torch.tensor([turn.prompt_ids])
        own = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert own[0, ids.shape[1] :].tolist() == turn.reply_ids


def test_results_do_not_depend_on_slots_or_order(exact, played):
    reference = replies_of(played)
    assert replies_of(play(exact, num=12, slots=5)) == reference[:12]
    order = [int(i) for i in np.random.RandomState(0).permutation(24)[:12]]
    assert replies_of(play(exact, slots=5, ids=order)) == [reference[i] for i in order]
    assert replies_of(play(exact, num=4, sampling=Sampling(seed=4))) != reference[:4]


def test_the_mask_shows_what_stands_before_and_the_token_itself():
    cache = RowCache(1, 3, 7, torch.device("cpu"))
    mask = cache.select([2, 0], np.array([[3, 4], [0, 1]]), 6, torch.float32)  # (B, 1, T, W)
    shown = (mask[:, 0] == 0).int().tolist()
    assert shown[0] == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]
    assert shown[1] == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]]
    assert mask.min() == torch.finfo(torch.float32).min
    keys = torch.arange(4.0).view(2, 1, 2, 1)  # (B, H, T, D)
    held, _ = cache.layers[0].update(keys, -keys)
    assert held[0, 0, :, 0].tolist() == [0, 0, 0, 0, 1, 0], "row 2 holds 0 and 1 at 3 and 4"
    assert held[1, 0, :, 0].tolist() == [2, 3, 0, 0, 0, 0], "row 0 holds 2 and 3 at 0 and 1"


def test_prompts_share_what_is_computed_by_hand():
    def row(cached, pending):
        return sampler.CacheRow(cached_ids=[*cached], pending_ids=[*pending])

    rules, board, copies = range(100, 120), [1] * 10, []
    cache = SimpleNamespace(copy=lambda *args: copies.append(args))
    rows = [
        row([*rules, *board, 7, 8], []),  # being decoded
        row([], [*rules, *board, 9, 9]),
        row([], [*rules, 2, *board]),
        row([*rules, 2], [*board, 5]),
        row([], [50, *rules, 6]),
        row([], [50, *rules, 6]),
    ]
    now, later = sampler.share_prefixes(cache, rows, [1, 2, 3, 4, 5])
    assert sorted(copies) == [(0, [1], 30), (3, [2], 21)], "the longest that any row holds"
    assert rows[1].cached_ids == [*rules, *board] and rows[1].pending_ids == [9, 9]
    assert now == [4, 1, 2] and later == [5, 3], "5 copies from 4, 3 from 2"
    rows[4].cached_ids, rows[2].cached_ids = [50, *rules, 6], [*rules, 2, *board]
    copies.clear()
    assert sampler.share_prefixes(cache, rows, later) == ([5, 3], [])
    assert sorted(copies) == [(2, [3], 31), (4, [5], 21)], "the last token is never copied"


def test_prompts_of_like_length_are_computed_together():
    def batches(pass_tokens, *lengths):
        """Numbers of rows by (new tokens, cached tokens)."""
        rows = [sampler.CacheRow() for _ in lengths]
        for row, (new, cached) in zip(rows, lengths, strict=True):
            row.pending_ids, row.cached_ids = [1] * new, [1] * cached
        return sampler.prefill_batches(rows, range(len(rows)), pass_tokens)

    lengths = (30, 0), (3, 0), (5, 0), (29, 0)
    assert batches(48, *lengths) == [[1, 2, 3, 0]], "24 more in each of two rows"
    assert batches(47, *lengths) == [[1, 2], [3, 0]]
    assert batches(1, *lengths) == [[1], [2], [3, 0]], "one more in one row"
    most = sampler.PREFILL_TOKENS
    assert batches(10**6, (most // 2, 0), (most // 2, 0), (1, 0)) == [[2, 0], [1]]
    assert batches(10**6, (1, 2 * most), (1, 2 * most), (1, 0)) == [[0, 1], [2]], "to be read"
    assert batches(10**6, (2 * most, 0), (1, 0)) == [[1], [0]], "alone, however long"


def test_the_rules_are_computed_once(tiny, monkeypatch):
    """Of the prompt tokens of four trials of each task, played at once."""
    computed, forward = [], sampler.ContinuousSampler.forward

    def counting(self, cache, rows, numbers, new_ids):
        computed.append(sum(map(len, new_ids)))
        return forward(self, cache, rows, numbers, new_ids)

    monkeypatch.setattr(sampler.ContinuousSampler, "forward", counting)
    tokens = {}
    for least in (sampler.LEAST_SHARED, 10**6):
        monkeypatch.setattr(sampler, "LEAST_SHARED", least)
        trials, tokens[least] = play(tiny), computed.copy()
        computed.clear()
    firsts = {tuple(trial.turns[0].prompt_ids) for trial in trials}
    replies = lamer.count_tokens(turns_of(trials))
    assert sum(tokens[10**6]) > sum(len(trial.turns[0].prompt_ids) for trial in trials) + replies
    assert sum(tokens[10**6]) - sum(tokens[8]) > 18 * (min(map(len, firsts)) - 1)


def test_the_update_finds_the_cache_gone(tiny):
    gc.collect()
    gc.disable()  # on a GPU, too, memory runs out before the collector would free a cycle
    try:
        assert play(tiny, num=4)
        assert not [each for each in gc.get_objects() if type(each) is RowCache]
    finally:
        gc.enable()


def test_a_policy_equals_a_plain_forward(tiny, played):
    _, model, chat = tiny
    turns = turns_of(played[:8])
    value_head = nn.Linear(model.config.hidden_size, 1)
    policy = Policy(model, chat.vocab_size, value_head=value_head)
    policy.chunk = 50  # several chunks
    lengths = [len(turn.reply_ids) for turn in turns]
    with torch.no_grad():
        output = policy(turns)
        scored, entropies = output.logps.split(lengths), output.entropies.split(lengths)
        parts = zip(turns, scored, entropies, output.values, strict=True)
        for turn, logps, entropy, value in parts:
            logits = model(torch.tensor([turn.prompt_ids + turn.reply_ids])).logits
            plain = logits[0, len(turn.prompt_ids) - 1 : -1].log_softmax(-1)  # (T, V)
            assert torch.allclose(entropy, -(plain.exp() * plain).sum(-1), atol=1e-4)
            plain = plain[range(len(turn.reply_ids)), turn.reply_ids]
            assert torch.allclose(plain, torch.tensor(turn.logps), atol=1e-4)
            assert torch.allclose(plain, logps, atol=1e-4)
            hidden = model.model(torch.tensor([turn.prompt_ids])).last_hidden_state
            seen = value_head(hidden[0, -1])[0]
            assert torch.allclose(value, seen, atol=1e-4), "a value sees the prompt alone"


def test_the_temperature_is_that_of_sampler_and_policy(tiny):
    _, model, chat = tiny
    turns = turns_of(play(tiny, num=4, sampling=Sampling(seed=3, temperature=0.5)))
    with torch.no_grad():
        logps = Policy(model, chat.vocab_size, temperature=0.5)(turns).logps
    sampled = torch.tensor([logp for turn in turns for logp in turn.logps])
    assert torch.allclose(logps, sampled, atol=1e-4)


def test_a_run_after_an_update_uses_the_new_weights(tiny):
    config, model, chat = tiny
    changed = config, copy.deepcopy(model), chat
    player, seeds, greedy = make_player(changed), range(4), Sampling(temperature=0)
    before = sampler.rollout(config, player, seeds, seeds, greedy)
    with torch.no_grad():
        changed[1].model.layers[0].self_attn.v_proj.weight.mul_(-3)
    after = sampler.rollout(config, player, seeds, seeds, greedy)
    plain = sampler.rollout(config, make_player(changed, "generate"), seeds, seeds, greedy)
    assert replies_of(after) == replies_of(plain) != replies_of(before)


def test_summarize_by_hand():
    options = dict(episodes=3, gamma_step=1.0, gamma_traj=0.5)
    config = train.make_config(env="lockbox", device="cpu", **options)
    trials = [make_trial([[0, 10]]), make_trial([[1], [10]]), make_trial([[0], [0], [8]])]
    trials[0].won_in, trials[1].won_in = 0, 1
    trials[2].num_shortened, trials[2].turns[1].is_valid = 4, False
    assert sampler.summarize(trials, config) == {
        "success": [1 / 3, 2 / 3, 2 / 3],
        "return": (10 + (1 + 10 / 2) + 8 / 4) / 3,
        "valid": 0.9,
        "turns": 10,
        "reply_tokens": 10,
        "shortened": 4,
    }


def test_uniforms_and_pick_tokens():
    draws = sampler.uniforms(1, 2, np.arange(20000), 3)
    assert abs(draws.mean() - 0.5) < 0.01 and abs(draws.std() - 12**-0.5) < 0.01
    assert draws[17] == sampler.uniforms(1, 2, 17, 3)[0] != sampler.uniforms(1, 2, 17, 4)[0]
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]]).repeat(20000, 1)

    def picked(**options):
        return sampler.pick_tokens(logits, draws, Sampling(**options))

    tokens, logps = picked()
    shares = torch.bincount(tokens, minlength=4) / 20000
    assert (shares - logits[0].softmax(0)).abs().max() < 0.01
    assert torch.allclose(logps, logits.log_softmax(-1)[range(20000), tokens])
    assert set(picked(top_k=2)[0].tolist()) == {1, 2}
    assert set(picked(top_p=0.5)[0].tolist()) == {1}
    assert set(picked(top_p=0.9)[0].tolist()) == {0, 1, 2}


def test_layers_without_full_attention_are_refused(tiny):
    _, model, chat = tiny
    model.config.layer_types[0] = "sliding_attention"
    try:
        with pytest.raises(sampler.UnsupportedModelError, match="full attention"):
            ContinuousSampler(model, chat, 4, 64, 16, [1, 2, 3])
    finally:
        model.config.layer_types[0] = "full_attention"


@pytest.mark.parametrize(
    "text",
    [
        "Row 1: ? . √",
        "早 \t\r\n é ½ \U0001f600 ï",
        "plain words",
    ],
)
def test_the_tiny_tokenizer_takes_any_text(tiny, text):
    chat = tiny[2]
    ids = chat.encode_plain(text)
    assert chat.decode(ids) == text
    assert chat.encode(text) == chat.head + ids + chat.tail
    assert chat.head and chat.tail


def test_a_number_is_told_by_its_letters_and_its_digits():
    tokenizer = make_tokenizer(["try [ab12]", "go to mug 1", "(1, 2)", " ab", "12"])
    for text, parts in (
        ("try [ab12]", ["try", " [", "ab", "12", "]"]),
        ("go to mug 1", ["go", " to", " mug", " 1"]),
        ("(1, 2)", ["(1, 2)"]),
    ):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert [tokenizer.decode([i]) for i in ids] == parts


def test_the_tiny_tokenizer_covers_every_prompt(tiny):
    config, _, chat = tiny
    recorder, env = Recorder(), make_env(config.env, **config.env_options)
    for seed in range(30):
        scripted_trial(env, seed, 3, recorder, 0.3, random.Random(seed), style="compact")
    for text in recorder.texts:
        ids = chat.encode_plain(text)
        assert chat.decode(ids) == text
        assert len(ids) < 0.6 * len(text)


# ---------------------------------------------------------------------------- hub models

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)


@functools.cache
def hub_tokenizer():
    """A byte-level BPE tokenizer with ChatML's markers, as Qwen's are."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([Sokoban().rules(), MineSweeper().rules()], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHATML
    thinking = [AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")]
    tokenizer.add_tokens(thinking)
    return tokenizer


def hub_folder(folder, kind, **options):
    """A folder as the hub would give it, with random weights of an architecture."""
    shape = dict(vocab_size=640, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    shape |= dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1)
    shape |= dict(bos_token_id=None, eos_token_id=2, pad_token_id=0)
    if kind == "qwen3":
        shape["head_dim"] = 16
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape | options))
    model.save_pretrained(folder)
    hub_tokenizer().save_pretrained(folder)
    return str(folder)


def hub_policy(folder, kind, dtype=torch.float32, **options):
    """(config, model, chat) of such a folder, with options of its shape."""
    folder = hub_folder(folder, kind, **options)
    config = dict(env="minesweeper", device="cpu", model=folder, max_prompt=1024, max_reply=12)
    config = train.make_config(**config, episodes=2)
    return config, *load_policy(folder, dtype, "cpu")


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "kind", ["qwen3", *(pytest.param(kind, marks=SLOW) for kind in ("llama", "qwen2", "phi3"))]
)
def test_hub_models_play_and_train(kind, tmp_path):
    config, model, chat = hub_policy(tmp_path, kind)
    assert chat.decode(chat.tail).endswith("assistant\n<think>\n\n</think>\n\n"), "thinking is off"
    assert (config.style, config.lr, config.minibatch) == ("full", 1e-6, 64), "the paper's settings"
    exact = config, copy.deepcopy(model).double(), chat
    trials, plain = play(exact, num=4, slots=3), play(exact, "generate", num=4)
    assert replies_of(trials) == replies_of(plain)
    sampled = [max(turn.reply_ids) for turn in turns_of(trials)]
    assert max(sampled) < len(chat.tokenizer) < 640
    for i, turn in enumerate(turns_of(trials)):
        turn.advantage = 1.0 if i % 2 else -1.0
    config = replace(config, lr=1e-3, minibatch=10**6)
    policy = Policy(model, chat.vocab_size)
    optimizer = train.make_optimizer(policy, config)
    minibatches = train.deal_minibatches(config, trials, range(4), step=0)
    stats = lamer.update(policy, optimizer, minibatches, config)
    close = pytest.approx(0, abs=1e-5)
    assert stats["approx_kl"] == close, "the loss sees the probabilities the sampler drew from"
    assert stats["grad_norm"] > 0


def test_a_hub_model_with_short_prompts_is_not_the_tiny_one(tmp_path, tiny):
    config, model, chat = hub_policy(tmp_path, "llama")
    save_policy(tmp_path / "short", model, chat.tokenizer, replace(config, style="compact"), 0)
    again = train.make_config(env="lockbox", model=str(tmp_path / "short"), device="cpu")
    assert (again.lr, again.max_prompt) == (1e-6, 2048)
    assert train.eval_sampling(chat).temperature == 0.7
    again = train.make_config(env="lockbox", model=str(warm_policy(tiny[0])), device="cpu")
    assert (again.lr, again.style) == (5e-4, "compact")
    assert train.eval_sampling(tiny[2]).temperature == 1


def test_a_hub_model_computes_in_bfloat16_where_the_cpu_does(monkeypatch):
    given = dict(env="lockbox", model="some/model", device="cpu", warm_steps=1)
    x86 = {"avx512_bf16": False, "amx_bf16": False, "avx2": True}
    for able, dtype in (
        (x86, "float32"),
        (x86 | {"avx512_bf16": True}, "bfloat16"),
        (x86 | {"amx_bf16": True}, "bfloat16"),
        ({"neon": True, "bf16": True}, "bfloat16"),
        ({"neon": True, "bf16": False}, "float32"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
        assert train.make_config(**given).dtype == dtype
        assert train.make_config(**given, dtype="bfloat16").dtype == "bfloat16", "given"
        assert train.make_config(**given | {"model": "tiny"}).dtype == "float32"


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=SLOW)])
def test_any_model_can_be_warm_started(dtype, tmp_path):
    folder = hub_folder(tmp_path / "hub", "llama")
    given = dict(env="lockbox", model=folder, device="cpu", dtype=dtype)
    paper = train.make_config(**given)
    assert (paper.warm_steps, paper.style, paper.lr) == (0, "full", 1e-6), "as in the paper"
    config = train.make_config(**given, warm_steps=40, warm_batch=8, warm_lr=0.01, max_prompt=900)
    assert (config.style, config.lr, config.minibatch) == ("direct", 1e-5, 1024)
    assert config.env_options == dict(novice_peeks=0.4, novice_care=0.9)
    start = warm_policy(config)
    assert warm_policy(config) == start, "made once"
    again = train.make_config(env="lockbox", model=str(start), device="cpu")
    assert again.warm_steps == 0, "not twice"

    def going_on(*flags):
        flags = ["--model", start, "--device", "cpu", "--out", tmp_path / "run", *flags]
        config = train.prepare([*map(str, flags)])[0]
        return config.env, config.style, config.env_options

    known = config.env_options
    assert going_on() == ("lockbox", "direct", known), "the game and the prompts that it knows"
    assert going_on("--novice_care", 0.5)[2] == known | dict(novice_care=0.5)
    assert going_on("--env", "sokoban", "--style", "full") == ("sokoban", "full", {})

    losses = []
    for name in (folder, str(start)):
        model, chat = load_policy(name, torch.float32, "cpu")
        play = dict(episodes=2, style="direct", max_prompt=900)
        batches = scripted_batches(make_env("lockbox"), chat, config, random.Random(1), play)
        losses.append(imitate(Policy(model, chat.vocab_size), next(batches), 2048, False))
    assert losses[1] < losses[0] / 4, "of replies it had not seen"


class Marked(Counter):
    """Shows a text in every observation, and offers it."""

    def __init__(self, text):
        super().__init__()
        self.text = text

    def reset(self, seed):
        return super().reset(seed)[0] + self.text, {}

    def step(self, action):
        observation, *outcome = super().step("wrong")
        return observation + self.text, *outcome

    def actions(self):
        return [self.text]


def check_markers_stay_text(chat):
    """In observations, choices, actions and reflections: only the template has special tokens."""
    words = {*chat.tokenizer.all_special_tokens}
    if not chat.tokenizer.init_kwargs.get("is_tiny"):  # whose own pieces are added tokens
        words |= {token.content for token in chat.tokenizer.added_tokens_decoder.values()}
    special = {*chat.tokenizer.convert_tokens_to_ids([*words])}
    text = "a note " + "\n".join(sorted(words)) + " the end"
    assert chat.decode(chat.encode_plain(text)) == text
    assert len(words) > 2 and special & {*chat.head} and special & {*chat.tail}
    for style in train.STYLES:
        trial = run_trial(Marked(text), 7, 2, chat, "both", style, max_prompt=10**6)
        prompt, phases = next(trial), []
        with pytest.raises(StopIteration):
            while True:
                phases.append(prompt.phase)
                end = len(prompt.ids) - len(chat.tail)
                assert prompt.ids == chat.head + prompt.ids[len(chat.head) : end] + chat.tail
                assert not special & {*prompt.ids[len(chat.head) : end]}
                tag = "action" if prompt.phase == "play" else "remark"
                prompt = trial.send(Reply([1], [0.0], f"<{tag}>{text}</{tag}>"))
        assert phases == ["play"] * 5 + ["reflect"] + ["play"] * 5


def test_markers_in_text_stay_text(tiny, tmp_path):
    check_markers_stay_text(tiny[2])
    check_markers_stay_text(hub_policy(tmp_path, "qwen3")[2])


def test_models_of_other_kinds_fall_back_or_are_refused(tmp_path, capsys):
    config, model, chat = hub_policy(tmp_path / "sliding", "mistral", sliding_window=8)
    assert type(make_sampler(config, model, chat, 4)) is GenerateSampler
    assert "falling back" in capsys.readouterr().err
    policy, turns = (
        Policy(model, chat.vocab_size),
        turns_of(play((config, model, chat), "generate", num=2)),
    )
    policy.check_trees(turns[0].prompt_ids)
    assert "every turn alone" in capsys.readouterr().err
    assert [*map(len, lamer.micro_batches(policy, turns, 10**6))] == [1] * len(turns)
    with pytest.raises(ValueError, match="scaled or capped"):
        hub_policy(tmp_path / "scaled", "granite", logits_scaling=8.0)


@SLOW
@pytest.mark.skipif(not SMOLLM2, reason="no $LAMER_SMOLLM2, a folder made by bench/smollm2.py")
def test_a_real_language_model_plays_and_trains(tmp_path):
    model, chat = load_policy(SMOLLM2, torch.float32, "cpu")
    prompt = chat.encode("What is the capital of France?")
    assert chat.tokenizer.convert_tokens_to_ids("<|im_end|>") in chat.stop_ids
    check_markers_stay_text(chat)
    assert chat.tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")
    answer = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
    assert "Paris" in chat.decode(answer[0, len(prompt) :].tolist())
    config = train.make_config(env="lockbox", model=SMOLLM2, device="cpu", style="direct")
    real = replace(config, max_prompt=512, max_reply=12), model, chat
    greedy = Sampling(3, 0, temperature=0.0)  # a draw from 49,152 tokens may turn on a rounding
    plain = play(real, "generate", num=4, sampling=greedy)
    assert replies_of(play(real, num=4, sampling=greedy, slots=3)) == replies_of(plain)

    out = tmp_path / "run"
    flags = f"--env lockbox --model {SMOLLM2} --device cpu --warm_steps 3 --warm_batch 16"
    flags += f" --num_tasks 2 --group_size 4 --eval_every 0 --out {out}"
    train.main([*flags.split(), "--steps", "1"])
    train.main(["--resume", str(out), "--steps", "2"])
    log = rows(out / "metrics.jsonl")
    assert [row["step"] for row in log] == [1, 2] and all(row["updates"] for row in log)
    assert max(row["valid"] for row in log) > 0.1, "zero without a warm start"
    assert max(row["sampler_gap"] for row in log) < 0.1
    evaluation.main(["--model", str(out), "--num_tasks", "4", "--json", str(tmp_path / "r.json")])
    assert json.loads((tmp_path / "r.json").read_text())["num_tasks"] == 4


def test_prompting_baselines(tmp_path):
    folder, json_file = hub_folder(tmp_path / "hub", "qwen2"), tmp_path / "out.json"
    flags = f"--model {folder} --env minesweeper --device cpu --num_tasks 3".split()
    flags += ["--max_reply", "6", "--max_prompt", "900"]
    for name, memory, words in (
        ("zero-shot", "none", "Give only"),
        ("react", "none", "step by step"),
        ("reflexion", "reflection", "step by step"),
    ):
        _, config, _ = evaluation.prepare([*flags, "--prompting", name])
        assert (config.memory, config.episodes) == (memory, 3)
        env = make_env(config.env, **config.env_options)
        prompt = next(run_trial(env, 1, 3, Letters(), memory, config.style))
        assert words in "".join(map(chr, prompt.ids))
    evaluation.main([*flags, "--prompting", "reflexion", "--json", str(json_file)])
    row = json.loads(json_file.read_text())
    assert row["prompting"] == "reflexion" and len(row["success"]) == 3
    assert (row["temperature"], row["top_p"], row["top_k"]) == (0.7, 0.8, 20)
    assert row["command"].startswith(f"eval.py --model {folder} --env minesweeper")
    assert row["measured"]["torch"] == torch.__version__


# -------------------------------------------------- what is relied on in transformers

# Beyond loading, saving and calling a model. If an upgrade breaks one of these, the docstring says
# what of ours stands on it.


@pytest.fixture
def hub(tmp_path):
    """(model, chat) of a small Qwen3."""
    return hub_policy(tmp_path, "qwen3")[1:]


IDS = torch.tensor([[5, 6, 7, 6]])


def test_transformers_takes_a_mask_and_positions_as_given(hub):
    """Policy.hidden_states, ContinuousSampler.forward."""
    decoder = hub[0].get_decoder()
    hidden = decoder(IDS).last_hidden_state[0]
    mask = torch.full((4, 4), torch.finfo(torch.float32).min).triu(1)
    mask[3, 1:3] = mask[0, 1]  # the last token stands behind the first
    given = dict(position_ids=torch.tensor([[0, 1, 2, 1]]), attention_mask=mask[None, None])
    forked = decoder(IDS, **given, use_cache=False).last_hidden_state[0]
    assert torch.allclose(forked[[0, 1, 2, 3]], hidden[[0, 1, 2, 1]], atol=1e-5)


def test_transformers_lets_layers_of_a_cache_be_ours(hub):
    """sampler.RowLayer: what is asked of it, and that its update is called for every layer."""
    assert not sampler.RowLayer.__abstractmethods__
    cache = sampler.RowCache(2, 1, 8, "cpu")
    cache.select([0], np.arange(4)[None], 4, torch.float32)
    states = torch.ones(1, 2, 4, 16)
    keys, values = cache.update(states, 2 * states, 1)
    assert keys.equal(states) and values.equal(2 * states)
    assert cache.layers[1].is_initialized and not cache.layers[0].is_initialized
    parameters = {*inspect.signature(hub[0].get_decoder().forward).parameters}
    assert len({"cache", "past_key_values"} & parameters) == 1


def test_transformers_shapes_tell_their_kind_of_attention(hub):
    """ContinuousSampler refuses windows and kernels that take no mask by these names."""
    shape = hub[0].config.get_text_config()
    assert {*shape.layer_types} == {"full_attention"} and shape.sliding_window is None
    assert hub[0].config._attn_implementation == "sdpa"


def test_transformers_models_are_a_decoder_and_an_output_layer(hub):
    """Policy.score computes logits where they are needed only."""
    hidden = hub[0].get_decoder()(IDS).last_hidden_state
    assert hub[0].get_output_embeddings()(hidden).equal(hub[0](IDS).logits)


def test_transformers_recomputes_activations_when_told(hub):
    """--grad_checkpoint."""
    hub[0].activation_checkpointing_enable({"use_reentrant": False})
    assert hub[0].is_gradient_checkpointing


def test_transformers_generate_leaves_the_choice_to_a_processor(hub):
    """GenerateSampler: also without a repetition penalty or the like of the model's own."""
    model, chat = hub
    model.generation_config.repetition_penalty = 1e9
    draw = sampler.DrawTokens([0], 0, SEED_3, chat)
    [reply] = GenerateSampler(model, chat, 1, 3).generate([[5, 6]], draw)
    assert 1 <= len(reply.ids) == len(draw.tokens) <= 3


def test_transformers_tokenizers_can_take_special_tokens_as_text(hub):
    """Chat.encode_plain, for those with a backend."""
    backend = hub[1].tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    assert len(backend.encode("<|im_end|>", add_special_tokens=False).ids) > 1
    backend.encode_special_tokens = False
    assert len(backend.encode("<|im_end|>", add_special_tokens=False).ids) == 1


# ---------------------------------------------------------------- the fast sampler's check


@pytest.fixture(scope="session")
def real_shapes(tiny, tmp_path_factory):
    """(config, model, chat) by name, sound ones: the tiny policy, and hub models with depth."""
    shape = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=8, head_dim=64)
    shape |= dict(num_attention_heads=8, num_key_value_heads=4, initializer_range=0.02)
    folder = tmp_path_factory.mktemp("shapes")
    hubs = {kind: hub_policy(folder / kind, kind, **shape) for kind in ("qwen3", "llama")}
    return {"tiny": tiny, **hubs}


def without(name, forward):
    """A forward pass that ignores this argument."""

    @functools.wraps(forward)
    def ignoring(*args, **kwargs):
        kwargs.pop(name, None)
        return forward(*args, **kwargs)

    return ignoring


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["tiny", "qwen3", "llama"])
def test_a_sound_model_passes_and_one_that_ignores_the_mask_does_not(
    kind, dtype, real_shapes, monkeypatch, capsys
):
    config, model, chat = real_shapes[kind]
    if dtype == "bfloat16":
        model = train.half_copy(model)
    assert type(make_sampler(config, model, chat, 4)) is ContinuousSampler
    assert "sampler: continuous batching, 4 trials at once" in capsys.readouterr().err
    select = RowCache.select
    monkeypatch.setattr(RowCache, "select", lambda *args: 0 * select(*args))
    assert type(make_sampler(config, model, chat, 4)) is GenerateSampler
    line = capsys.readouterr().err
    assert "model.generate in lock-step" in line and "a way of its own" in line


@pytest.mark.parametrize("shift", [-1, 1])
def test_the_check_sees_positions_and_masks_that_are_off_by_one(tiny, shift, monkeypatch):
    _, model, chat = tiny
    ids = next(run_trial(MineSweeper(), EVAL_SEED, 1, chat, style="compact")).ids
    assert ContinuousSampler(model, chat, 4, 128, 16, ids)
    select = RowCache.select

    def shifted_positions(cache, rows, positions, *rest):
        return select(cache, rows, positions + shift, *rest)

    def shifted_mask(cache, rows, positions, *rest):
        mask = select(cache, rows, positions + shift, *rest)
        select(cache, rows, positions, *rest)
        return mask

    for broken in (shifted_positions, shifted_mask):
        monkeypatch.setattr(RowCache, "select", broken)
        with pytest.raises(sampler.UnsupportedModelError, match="a way of its own"):
            ContinuousSampler(model, chat, 4, 128, 16, ids)


def test_the_check_sees_a_model_that_ignores_an_argument(tiny, monkeypatch):
    config, model, chat = tiny
    decoder = model.get_decoder()
    forward = decoder.forward
    for name in ("position_ids", "attention_mask"):
        monkeypatch.setattr(decoder, "forward", without(name, forward))
        assert type(make_sampler(config, model, chat, 4)) is GenerateSampler, name


def test_a_model_with_a_cache_of_its_own_falls_back(tmp_path, capsys):
    bloom = hub_policy(tmp_path, "bloom", n_layer=2, n_head=4)
    assert type(make_sampler(*bloom, 4)) is GenerateSampler
    line = capsys.readouterr().err
    assert "cannot use our cache" in line and "falling back to the plain sampler" in line
    assert all(play(bloom, "generate", num=2)), "and plays"


def test_the_sampler_asked_for_is_named(tiny, capsys):
    make_player(tiny, "generate", slots=3)
    line = "sampler: model.generate in lock-step (--sampler generate), 3 trials at once\n"
    assert capsys.readouterr().err == line


# -------------------------------------------------------------------------------- memory


def saved_bytes(policy, turns):
    """Bytes that the backward pass of a policy keeps, each storage once, its weights left out."""
    own = {p.untyped_storage().data_ptr() for p in (*policy.parameters(), *policy.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logps = policy(turns).logps
    logps.sum().backward()
    return sum(kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_memory_plan_counts_what_is_there(dtype):
    shape = dict(hidden_size=128, intermediate_size=384, num_attention_heads=8, head_dim=32)
    shape = Qwen3Config(vocab_size=1000, num_hidden_layers=6, num_key_value_heads=4, **shape)
    model, is_bf16 = Qwen3ForCausalLM(shape), dtype == "bfloat16"
    turn = make_turn()
    turn.prompt_ids, turn.reply_ids = list(range(1, 480)), list(range(1, 33))
    turn.logps = [0.0] * 32
    config = train.Config(microbatch_tokens=2 * 511, max_prompt=479, max_reply=32, dtype=dtype)
    config.grad_checkpoint = False
    num = model.num_parameters()
    plan = train.memory_plan(config, shape, num, world=2)
    sizes = dict(weights=6 if is_bf16 else 4, moments=4, reference=0, gradients=4)
    assert {name: plan[name] for name in sizes} == {k: num * b / 1e9 for k, b in sizes.items()}
    config.kl_coef = 0.1
    reference = train.memory_plan(config, shape, num, world=2)["reference"]
    assert reference == num * (2 if is_bf16 else 4) / 1e9

    logits = 3 * 4 * 2 * 511 * 1000 / 1e9
    other = replace(turn, prompt_ids=[0, *turn.prompt_ids[1:]])  # nothing is shared
    measured = saved_bytes(Policy(model, 1000, bf16=is_bf16), [turn, other]) / 1e9
    assert 0.95 < measured / (plan["activations"] - logits) < 1.05
    config.grad_checkpoint = True  # the inputs of every layer, and one layer in full
    plan = train.memory_plan(config, shape, num, world=2)
    inputs, mask = 6 * 2 * 511 * 128 * 4 / 1e9, (2 * 511) ** 2 * (2 if is_bf16 else 4) / 1e9
    assert 0.95 < (inputs + mask + (measured - mask) / 6) / (plan["activations"] - logits) < 1.05

    cache = RowCache(6, 5, 479 + 32, torch.device("cpu"))
    cache.select([0], np.array([[0]]), 32, getattr(torch, dtype))
    held = 0
    for layer in cache.layers:
        layer.update(*torch.zeros(2, 1, 4, 1, 32, dtype=getattr(torch, dtype)))
        held += layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes()
    assert held / 1e9 == pytest.approx(5 * plan["slot"])


def test_slots_fit_into_what_is_left():
    plan = dict(weights=1.0, moments=2.0, gradients=3.0, activations=2.0, slot=1.0)
    assert train.fit_slots(plan, 10.0, 40, world=1) == 6  # (0.92 x 10 - 3) / 1: no gradients yet
    assert train.fit_slots(plan, 10.0, 40, world=2) == 3  # DDP keeps them
    assert train.fit_slots(plan, 10.0, 5, world=1) == 5
    # no slot fits; the update does not fit: (5 and 2 beside what stays)
    for total, world in ((3.5, 1), (8.5, 1), (7.0, 2), (8.6, 2)):
        with pytest.raises(ValueError, match="--microbatch_tokens"):
            train.fit_slots(plan, total, 40, world)
    config = train.Config(device="cpu")
    assert train.count_slots(config, None, 200) == 128
    assert train.count_slots(replace(config, slots=7), None, 200) == 7


# ---------------------------------------------------------------------------- the update


@pytest.fixture
def batch(played):
    """Trials with returns and advantages."""
    trials = copy.deepcopy(played)
    lamer.compute_returns(trials, "paper", 0.95, 0.6)
    lamer.compute_advantages([trials[i : i + 4] for i in range(0, 24, 4)], "gigpo")
    return trials


def learner(tiny, value_head=None, **options):
    """(config, policy, optimizer) from the start of `tiny`; one mini-batch unless told."""
    config = replace(tiny[0], **dict(lr=1e-3, minibatch=10**6) | options)
    model, is_bf16 = copy.deepcopy(tiny[1]), config.dtype == "bfloat16"
    policy = Policy(model, tiny[2].vocab_size, config.temperature, is_bf16, value_head).eval()
    return config, policy, train.make_optimizer(policy, config)


# AdamW makes a step of a learning rate, 1e-3, of any gradient, and part of one of what is rounding.
CLOSE = 1e-4


def update(config, policy, optimizer, trials, reference=None, step=5):
    """One call of lamer.update on the turns of these trials; returns its statistics."""
    minibatches = train.deal_minibatches(config, trials, range(len(trials)), step)
    return lamer.update(policy, optimizer, minibatches, config, reference)


def largest_gap(weights, others):
    """The largest difference of two sets of weights."""
    assert weights.keys() == others.keys()
    return max((weights[name] - others[name]).abs().max() for name in weights)


def test_a_prefix_tree_by_hand():
    tree = lamer.prefix_tree([[7, 8, 6, 2], [7, 8, 5], [9], [7, 8, 6], [7, 8, 5]])
    assert tree.ids == [7, 8, 5, 6, 2, 9]
    assert tree.depths == [0, 1, 2, 2, 3, 0]
    assert tree.parents == [-1, 0, 1, 1, 3, -1]
    assert tree.ends == [5, 5, 3, 5, 5, 6], "5 begins another tree"
    assert tree.paths == [[0, 1, 3, 4], [0, 1, 2], [5], [0, 1, 3], [0, 1, 2]]
    turns = [lamer.make_turn(row[:1], row[1:]) for row in ([7, 8, 6, 2], [9, 9], [7, 8, 5])]
    policy = SimpleNamespace(most_nodes=lambda turns: 6)

    def rows(most):
        batches = lamer.micro_batches(policy, turns, most)
        return [[turn.token_ids() for turn in batch] for batch in batches]

    assert rows(5) == [[[7, 8, 5], [7, 8, 6, 2]], [[9, 9]]], "five nodes, then two"
    assert rows(4) == [[[7, 8, 5]], [[7, 8, 6, 2]], [[9, 9]]], "shared with none, cut after each"
    policy.most_nodes = lambda turns: 7
    assert rows(6) == rows(5) and rows(7) == [[[7, 8, 5], [7, 8, 6, 2], [9, 9]]]
    policy.most_nodes = lambda turns: 6
    assert rows(7) == rows(6), "the policy's own bound"
    assert len(rows(1)) == 3


def test_a_tree_is_bounded_by_its_turns_and_the_models_width(tiny):
    policy = learner(tiny)[1]
    turns = [lamer.make_turn([1] * length, [2] * 10) for length in (290, 490)]
    assert policy.most_nodes(turns) == 2 * 400 + 32
    assert policy.most_nodes(turns[:0]) == policy.most_nodes([lamer.make_turn([1], [2])]) == 512
    policy.takes_trees = False
    assert policy.most_nodes(turns) == 0


def test_trees_in_bf16_are_as_exact_as_rows(tiny, batch):
    """Gradients against those of fp32, one row at a time."""

    def gradient(dtype, tokens):
        policy, turns = learner(tiny, dtype=dtype)[1], turns_of(batch[:8])
        for part in lamer.micro_batches(policy, turns, tokens):
            advantages = lamer.per_token(part, "cpu")[2]
            (policy(part).logps * advantages).sum().backward()
        return torch.cat([weight.grad.flatten() for weight in policy.parameters()])

    for turn in turns_of(batch):
        turn.old_logps = turn.logps
    exact = gradient("float32", 1)
    error = {tokens: gradient("bfloat16", tokens) - exact for tokens in (1, 512)}
    assert error[512].norm() < 0.05 * exact.norm()
    assert error[512].norm() < 1.2 * error[1].norm()


def test_turns_without_advantage_need_no_backward(tiny, batch):
    """They stay in the statistics, and a step without any gradient still moves by momentum."""

    def updated(flat, **options):
        config, policy, optimizer = learner(tiny, microbatch_tokens=2000, **options)
        trials = copy.deepcopy(batch[:8])
        update(config, policy, optimizer, trials)
        before = copy.deepcopy(policy.state_dict())
        for turn in turns_of(trials)[flat:]:
            turn.advantage = 0.0
        has_grad, forward = set(), policy.forward
        policy.forward = lambda *args: has_grad.add(torch.is_grad_enabled()) or forward(*args)
        stats = update(config, policy, optimizer, trials)
        assert largest_gap(policy.state_dict(), before) > 1e-5
        return stats, policy.state_dict(), has_grad

    stats, weights, has_grad = updated(flat=8)
    assert has_grad == {True, False}
    with_all, same_weights, has_grad = updated(flat=8, entropy_coef=1e-12)
    assert has_grad == {True}, "entropy has a gradient everywhere"
    assert stats == pytest.approx(with_all, rel=1e-3, abs=1e-6)
    assert largest_gap(weights, same_weights) < CLOSE
    stats, _, has_grad = updated(flat=0)
    assert has_grad == {False} and stats["grad_norm"] == 0 and stats["updates"] == 1


@pytest.mark.parametrize("checkpoint", [False, True])
def test_update_does_not_depend_on_micro_batches(tiny, batch, checkpoint):
    def updated(tokens):
        options = dict(minibatch=100, microbatch_tokens=tokens, grad_clip=1e9)
        config, policy, _ = learner(tiny, **options)
        if checkpoint:
            policy.model.activation_checkpointing_enable({"use_reentrant": False})
        # AdamW would blow up rounding where a gradient is nearly 0, and hide a wrong scale.
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.01)
        return update(config, policy, optimizer, batch[:12]), policy.state_dict()

    stats, weights = updated(8192)
    assert stats["updates"] > 1 and stats["grad_norm"] > 0
    assert largest_gap(weights, learner(tiny)[1].state_dict()) > 1e-3
    for tokens in (1, 300, 2000)[checkpoint:]:
        again, others = updated(tokens)
        assert largest_gap(weights, others) < 1e-5
        assert again["entropy"] == pytest.approx(stats["entropy"], abs=1e-5)


def distributions(model, turn, vocab_size, temperature=1.0):
    """Log-probabilities of every token where the reply's were drawn, from whole logits: (T, V)."""
    logits = model(torch.tensor([turn.prompt_ids + turn.reply_ids])).logits
    logits = logits[0, len(turn.prompt_ids) - 1 : -1, :vocab_size]
    return (logits / temperature).log_softmax(-1)


def test_update_is_the_gradient_of_the_clipped_loss(tiny, batch):
    """One mini-batch against the plainest loss: whole logits, a loop over turns, one division."""
    turns, model, max_norm = turns_of(batch[:10]), copy.deepcopy(tiny[1]), 0.05
    total, kl, num_clipped, count, kinds = 0.0, 0.0, 0, 0, set()
    for i, turn in enumerate(turns):
        logps = distributions(model, turn, tiny[2].vocab_size)
        logps = logps[range(len(turn.reply_ids)), turn.reply_ids]
        target = (0.2, 0.8, 1.2, 5.0)[i % 4]  # a ratio: far or near, on either side of 1
        kinds.add((target, turn.advantage > 0))
        turn.logps = (logps.detach() - math.log(target)).tolist()
        ratio = (logps - torch.tensor(turn.logps)).exp()
        plain, clipped = ratio * turn.advantage, ratio.clamp(0.7, 1.3) * turn.advantage
        objective = torch.minimum(plain, clipped)
        if turn.advantage < 0:
            objective = objective.clamp(min=3 * turn.advantage)
        total = total - objective.sum()
        kl += (ratio - 1 - ratio.log()).sum().item()
        num_clipped += (clipped < plain).sum().item()
        count += len(turn.reply_ids)
    assert len(kinds) == 8, "each ratio with advantages of both signs"
    (total / count).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()
    assert norm > 2 * max_norm, "a gradient to clip"
    torch.optim.SGD(model.parameters(), lr=1.0).step()

    config, policy, _ = learner(tiny, clip=0.3, dual_clip=3.0, grad_clip=max_norm)
    stats = update(config, policy, torch.optim.SGD(policy.parameters(), lr=1.0), batch[:10])
    assert largest_gap(policy.model.state_dict(), model.state_dict()) < 1e-6
    assert largest_gap(policy.model.state_dict(), tiny[1].state_dict()) > 1e-3
    assert stats["updates"] == 1
    assert stats["grad_norm"] == pytest.approx(norm, rel=1e-4), "before clipping"
    assert stats["loss"] == pytest.approx((total / count).item(), rel=1e-4)
    assert stats["approx_kl"] == pytest.approx(kl / count, rel=1e-4)
    assert stats["clip_fraction"] == pytest.approx(num_clipped / count)


def test_update_adds_entropy_kl_and_value_terms(tiny, batch):
    """Against plain ones: means over tokens for entropy and KL, over turns for values."""
    turns, temperature = turns_of(batch[:10]), 0.7
    value_head = nn.Linear(tiny[1].config.hidden_size, 1)
    options = dict(temperature=temperature, entropy_coef=0.3, kl_coef=0.2, grad_clip=0.05)
    config, policy, _ = learner(tiny, copy.deepcopy(value_head), **options)
    model, other = copy.deepcopy(tiny[1]), copy.deepcopy(tiny[1])
    other.model.norm.weight.data *= 1.5
    entropy = kl = error = count = 0.0
    for turn in turns:
        turn.advantage, turn.value_target = 0.0, turn.ret
        logps, others = (
            distributions(each, turn, tiny[2].vocab_size, temperature) for each in (model, other)
        )
        entropy = entropy - (logps.exp() * logps).sum()
        d = (logps - others.detach())[range(len(turn.reply_ids)), turn.reply_ids]
        kl = kl + ((-d).exp() - 1 + d).clamp(max=10).sum()
        state = model.model(torch.tensor([turn.prompt_ids])).last_hidden_state[0, -1].detach()
        error = error + (value_head(state)[0] - turn.ret) ** 2 / 2
        count += len(turn.reply_ids)
    (-0.3 * entropy / count + 0.2 * kl / count + error / len(turns)).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05).item()
    assert norm > 0.1, "a gradient to clip"
    torch.optim.SGD([*model.parameters(), *value_head.parameters()], lr=1.0).step()

    sgd = torch.optim.SGD(policy.parameters(), lr=1.0)
    reference = Policy(other, tiny[2].vocab_size, temperature).eval()
    stats = update(config, policy, sgd, batch[:10], reference)
    assert largest_gap(policy.model.state_dict(), model.state_dict()) < 1e-6
    assert largest_gap(policy.value_head.state_dict(), value_head.state_dict()) < 1e-4
    assert stats["grad_norm"] == pytest.approx(norm, rel=1e-4), "of the model alone"
    assert stats["entropy"] == pytest.approx(entropy.item() / count, rel=1e-4)
    assert stats["ref_kl"] == pytest.approx(kl.item() / count, rel=1e-4)
    assert stats["value_loss"] == pytest.approx(error.item() / len(turns), rel=1e-4)


def test_an_update_that_runs_out_of_memory_goes_on_with_smaller_batches(
    tiny, batch, capsys, monkeypatch
):
    def updated(most_nodes, **options):
        config, policy, optimizer = learner(tiny, microbatch_tokens=1200, **options)
        forward = policy.forward

        def bounded(turns, *args):
            if len(lamer.prefix_tree([turn.token_ids() for turn in turns]).ids) > most_nodes:
                raise torch.OutOfMemoryError("no memory")
            return forward(turns, *args)

        policy.forward = bounded
        stats = update(config, policy, optimizer, copy.deepcopy(batch[:8]))
        return stats, policy.state_dict(), config.microbatch_tokens

    for dtype in ("float32", "bfloat16"):  # the latter also scores before it updates
        stats, weights, _ = updated(10**6, dtype=dtype)
        same_stats, same_weights, tokens = updated(300, dtype=dtype)
        assert tokens == 300
        assert same_stats["loss"] == pytest.approx(stats["loss"], abs=1e-3)
        assert dtype == "bfloat16" or largest_gap(weights, same_weights) < CLOSE
        said = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
        assert [line.split()[-1] for line in said] == ["600", "300"]
    _, weights, _ = updated(10**6)
    # With the gradients of two micro-batches at hand, which must not be counted twice.
    monkeypatch.setattr(lamer, "clipped_loss", no_memory_at(3, lamer.clipped_loss))
    _, same_weights, tokens = updated(10**6)
    assert tokens == 600 and largest_gap(weights, same_weights) < CLOSE
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        updated(100)


def test_the_gap_to_the_sampler_is_that_before_the_first_step(tiny, batch):
    config, policy, optimizer = learner(tiny, minibatch=50, lr=1e-2)
    stats = update(config, policy, optimizer, batch)
    assert stats["updates"] > 1 and stats["approx_kl"] > 1e-3
    assert 0 < stats["sampler_gap"] < 1e-5
    for turn in turns_of(batch):
        turn.logps = [logp - 0.25 for logp in turn.logps]
    config, policy, optimizer = learner(tiny, minibatch=50, lr=1e-2)
    assert update(config, policy, optimizer, batch)["sampler_gap"] == pytest.approx(0.25, abs=1e-5)


def test_a_rollout_that_runs_out_of_memory_begins_anew_with_fewer_rows(exact, played, capsys):
    player = make_player(exact, slots=24)
    run, asked = player.run, []

    def bounded(*args):
        asked.append(player.slots)
        if player.slots > 6:
            next(args[0][0])  # a trial has begun
            raise torch.OutOfMemoryError("no memory")
        return run(*args)

    player.run = bounded
    seeds, ids = [trial.seed for trial in played], range(len(played))
    trials = sampler.rollout(exact[0], player, seeds, ids, SEED_3)
    assert asked == [24, 12, 6] and "--slots 6" in capsys.readouterr().err
    assert replies_of(trials) == replies_of(played)
    player.run = fail(torch.OutOfMemoryError("no memory"))
    with pytest.raises(torch.OutOfMemoryError):
        sampler.rollout(exact[0], player, seeds, ids, SEED_3)
    assert player.slots == 1


class Reader:
    """Scores replies by how many of their tokens the prompt holds, or without a look at it."""

    bf16 = False

    def __init__(self, reads):
        self.reads = reads

    def most_nodes(self, turns):
        return 10**6

    def __call__(self, turns):
        found = [
            float(self.reads and token in turn.prompt_ids)
            for turn in turns
            for token in turn.reply_ids
        ]
        return SimpleNamespace(logps=torch.tensor(found) - 2)


def test_the_gap_of_prompts_by_hand():
    def trial_of(*turns):
        return Trial(0, 1, turns=[lamer.make_turn(*ids) for ids in turns])

    trials = [
        trial_of(([9], [9]), ([1, 2], [1, 2, 5])),  # 2 of its own prompt, 1 of the next other
        trial_of(([1, 2], [1])),  # as the first: 1 and 0
        trial_of(([2, 3], [3, 3])),  # 2 and 0
    ]
    config = train.Config(device="cpu")
    assert lamer.prompt_gap(Reader(True), trials, config) == pytest.approx((1 + 1 + 2) / 3)
    assert lamer.prompt_gap(Reader(False), trials, config) == 0
    assert lamer.prompt_gap(Reader(True), trials[:2], config) is None, "prompts are all alike"


def test_what_goes_wrong_is_said_once(tmp_path, capsys):
    good = dict(valid=0.99, shortened=1, turns=100, entropy=0.2, success=[0.1, 0.2])
    good |= dict(prompt_gap=0.5, sampler_gap=0.01)
    bad = dict(valid=0.3, shortened=20, entropy=0.001, prompt_gap=0.01, sampler_gap=0.2)
    assert bad.keys() == train.WARNINGS.keys()
    config = train.Config(out=str(tmp_path))
    for name, value in bad.items():
        log = train.Log(config, is_first=True)
        log.add("rows", good | {"step": 1})
        assert not capsys.readouterr().err
        for step in (2, 3):
            log.add("rows", good | {"step": step, name: value})
            train.Log(config, is_first=False).add("rows", good | {"step": step, name: value})
        [line] = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"warning: step 2: {name} {value:.3g}: ") and "--" in line
    assert len(rows(tmp_path / "rows.jsonl")) == 3 * len(bad)
    log = train.Log(config, is_first=True)
    log.add("rows", good | {"step": 1, "entropy": 0.0, "success": [0.1, 0.95]})
    log.add("rows", good | {"step": 1, "prompt_gap": None})
    log.add("rows", {"step": 1, "valid": 0.9})
    assert not capsys.readouterr().err, "a policy that wins need not vary"


def test_tensorboard_gets_every_number(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--tensorboard: pip install tensorboard"):
        train.make_config(env="lockbox", device="cpu", tensorboard=True)
    log, written = train.Log(train.Config(out=str(tmp_path)), is_first=True), []
    log.board = SimpleNamespace(add_scalar=lambda *args: written.append(args))
    row = dict(step=7, success=[0.25, 0.5], loss=math.nan, seconds={"rollout": 2.0}, turns=9)
    log.add("metrics", row)
    expected = [("step", 7), ("success 1", 0.25), ("success 2", 0.5), ("seconds rollout", 2.0)]
    expected = [(f"metrics/{name}", number, 7) for name, number in [*expected, ("turns", 9)]]
    assert written == expected, "but for what is no number"


def test_a_run_draws_its_success_where_it_can(tmp_path):
    pytest.importorskip("matplotlib")
    log = train.Log(train.Config(out=str(tmp_path)), is_first=True)
    for step in (0, 25):
        log.add("evals", {"step": step, "success": [0.1, 0.2 + step / 100]})
    train.draw_success(tmp_path)
    assert (tmp_path / "success.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_finite_gradients_stops(finished_run, tmp_path, monkeypatch):
    checkpoint = finished_run / "step_000002"
    clipped_loss = lamer.clipped_loss

    def broken(*args):
        losses, is_clipped = clipped_loss(*args)
        return losses * math.nan, is_clipped

    monkeypatch.setattr(lamer, "clipped_loss", broken)
    with pytest.raises(SystemExit, match="no finite gradient in 3 steps: lower --lr"):
        train.main(["--resume", str(checkpoint), "--out", str(tmp_path), "--steps", "9"])
    log = rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5]
    assert all(row["updates"] == 0 < row["skipped"] for row in log[2:])
    assert log[2]["loss"] is None, "JSON has no NaN"


def test_a_broken_step_does_not_reach_the_weights(tiny, batch):
    batch = copy.deepcopy(batch)
    batch[0].turns[0].advantage = math.inf
    config, policy, optimizer = learner(tiny)
    stats = update(config, policy, optimizer, batch)
    assert (stats["updates"], stats["skipped"], stats["grad_norm"]) == (0, 1, 0.0)
    assert largest_gap(policy.model.state_dict(), tiny[1].state_dict()) == 0


def test_the_update_makes_good_replies_likelier(tiny, batch):
    config, policy, optimizer = learner(tiny, lr=1e-4)
    update(config, policy, optimizer, batch)
    turns = turns_of(batch)
    with torch.no_grad():
        logps = policy(turns).logps
    change = logps - torch.tensor([logp for turn in turns for logp in turn.logps])
    weights = torch.tensor([turn.advantage for turn in turns for _ in turn.reply_ids])
    assert (change * weights).sum() > 0


def test_the_logged_kl_is_that_of_the_step(tiny, batch):
    """KL(sampler || policy): k3 of the sampler's tokens; near the exact one, over all tokens."""
    config, policy, optimizer = learner(tiny, lr=3e-3)
    trials, start = batch[:6], tiny[1]
    stats = update(config, policy, optimizer, trials)
    small = pytest.approx(0, abs=1e-5)
    assert stats["approx_kl"] == small, "before the only step nothing has changed"
    exact, k3, count = 0.0, 0.0, 0
    for turn in turns_of(trials):
        with torch.no_grad():
            old, new = (
                distributions(model, turn, tiny[2].vocab_size) for model in (start, policy.model)
            )
        exact += (old.exp() * (old - new)).sum().item()
        d = (new - old)[range(len(turn.reply_ids)), turn.reply_ids]
        k3 += (d.exp() - 1 - d).sum().item()
        count += len(turn.reply_ids)
    again = update(config, policy, optimizer, trials)
    assert again["approx_kl"] == pytest.approx(k3 / count, rel=1e-3)
    assert k3 == pytest.approx(exact, rel=0.5) and k3 > 0.01


def test_kl_to_the_start_pulls_back(tiny, batch):
    start, trials = Policy(tiny[1], tiny[2].vocab_size), batch[:4]
    config, *rest = learner(tiny)
    away = [update(config, *rest, trials, start)["ref_kl"] for _ in range(4)]
    for turn in turns_of(trials):
        turn.advantage = 0.0
    config = replace(config, kl_coef=1.0)
    back = [update(config, *rest, trials, start)["ref_kl"] for _ in range(12)]
    assert away[0] == pytest.approx(0, abs=1e-7) and away[-1] > 2 * back[-1]


def test_the_entropy_term_spreads_the_policy(tiny, batch):
    for turn in turns_of(batch):
        turn.advantage = 0.0
    config, *rest = learner(tiny, entropy_coef=0.1)
    entropies = [update(config, *rest, batch[:12])["entropy"] for _ in range(5)]
    assert entropies[-1] > entropies[0] + 0.1


def test_the_value_head_learns_and_leaves_the_policy_alone(tiny, batch):
    value_head = nn.Linear(tiny[1].config.hidden_size, 1)
    nn.init.zeros_(value_head.weight)
    batch = batch[:8]
    options = dict(estimator="ppo", lr=0.0, value_lr=1e-1)
    config, policy, optimizer = learner(tiny, value_head, **options)
    losses = []
    for step in range(30):
        lamer.compute_values(policy, batch, config)
        lamer.ppo_advantages(batch, 0.95, 0.6)
        losses.append(update(config, policy, optimizer, batch, step=step)["value_loss"])
    turns = turns_of(batch)
    half_variance = np.var([turn.ret for turn in turns]) / 2
    assert losses[-1] < half_variance < losses[0], "better than any constant"
    assert largest_gap(policy.model.state_dict(), tiny[1].state_dict()) == 0
    plain, both = update(*learner(tiny), batch), update(*learner(tiny, value_head), batch)
    same = pytest.approx(both["grad_norm"])
    assert plain["grad_norm"] == same, "no gradient of the values reaches the policy"
    assert all(abs(turn.advantage - (turn.ret - turn.value)) < 1e-5 for turn in turns)


def test_bf16_products_move_fp32_weights(tiny):
    config, policy, optimizer = learner(tiny, lr=1e-6, dtype="bfloat16")
    model, half = policy.model, train.half_copy(policy.model)
    assert half.dtype == torch.bfloat16 and model.dtype == torch.float32
    trials = play((config, half, tiny[2]))
    lamer.compute_returns(trials, "paper", 0.95, 0.6)
    lamer.compute_advantages([trials[i : i + 4] for i in range(0, 24, 4)], "gigpo")
    stats = update(config, policy, optimizer, trials)
    assert stats["updates"] == 1 and stats["sampler_gap"] > 0
    assert stats["clip_fraction"] == 0
    assert abs(stats["approx_kl"]) < 1e-9, "ratios to the trainer's own logps begin at 1"
    name = "model.layers.0.mlp.up_proj.weight"
    step = (model.state_dict()[name] - tiny[1].state_dict()[name]).abs().max()
    assert 0 < step < 2e-6, "steps that bf16 would round away arrive"

    train.refresh(half, policy)
    ours, weights = dict(half.named_parameters()), dict(model.named_parameters())
    assert ours.keys() == weights.keys()
    assert all(torch.equal(ours[name], weights[name].bfloat16()) for name in ours)
    for each in (half, model):
        assert each.lm_head.weight is each.model.embed_tokens.weight, "tied weights stay tied"
        assert each.model.rotary_emb.inv_freq.dtype == torch.float32
    assert not any(weight.requires_grad for weight in half.parameters())
    train.refresh(model, policy)  # fp32 has no copy: nothing to do


# -------------------------------------------------------------------------- two processes

# How the turns of each mini-batch are dealt to the two: unevenly, to one alone, to none.
SHARES = [(0.75, 0.25), (1.0, 0.0), (0.0, 0.0), (0.0, 1.0), (0.5, 0.5)]


def dealt(trials):
    """For each mini-batch the turns of process 0 and of process 1."""
    turns, size = turns_of(trials), 30
    minibatches = []
    for i, shares in enumerate(SHARES):
        rows = turns[i * size : (i + 1) * size] if sum(shares) else []
        cut = int(shares[0] * len(rows))
        minibatches.append((rows[:cut], rows[cut:]))
    return minibatches


def fail(error):
    """A function that raises this, whatever it is called with."""

    def raising(*args, **kwargs):
        raise error

    return raising


def failing_save(config, run, rank, step):
    """What save_checkpoint raises on this process when torch.save fails on process `rank`."""
    with pytest.MonkeyPatch.context() as patch:
        if run.rank == rank:
            patch.setattr(torch, "save", fail(OSError("No space left on device")))
        with pytest.raises(OSError) as error:
            train.save_checkpoint(config, run, step)
    return str(error.value)


def no_memory_at(call, compute):
    """A function that runs out of memory when called for the `call`-th time."""
    calls = itertools.count(1)

    def computing(*args, **kwargs):
        if next(calls) == call:
            raise torch.OutOfMemoryError("no memory")
        return compute(*args, **kwargs)

    return computing


def out_of_memory(config, run, minibatches):
    """What update raises on this process when every pass runs out of memory on process 1."""
    with pytest.MonkeyPatch.context() as patch:
        if run.rank == 1:
            patch.setattr(lamer, "clipped_loss", fail(torch.OutOfMemoryError("no memory")))
        with pytest.raises(torch.OutOfMemoryError) as error:
            lamer.update(run.policy, run.optimizer, minibatches, config, run.reference)
    return str(error.value)


def one_of_two(rank, config, trials, port):
    """What each of the two processes does; it leaves its findings in config.out."""
    os.environ |= dict(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    folder = Path(config.out)
    if rank == 1:  # as if it had found another number free
        config.out = f"{config.out}-2"
    loads, load_policy = [], train.load_policy

    def timed(*args):
        begin = time.monotonic()
        loaded = load_policy(*args)
        time.sleep(0.2)
        loads.append((begin, time.monotonic()))
        return loaded

    train.load_policy = timed
    run = train.start_run(config)
    minibatches = [shares[rank] for shares in dealt(trials)]
    found = dict(out=config.out, optimizer=type(run.optimizer), policy=type(run.policy))
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:  # in the midst of the first mini-batch
            patch.setattr(lamer, "clipped_loss", no_memory_at(2, lamer.clipped_loss))
        found["stats"] = lamer.update(run.policy, run.optimizer, minibatches, config, run.reference)
    found |= dict(tokens=config.microbatch_tokens, loads=loads)
    policy = lamer.unwrap(run.policy)
    found["owned"] = [*train.own_moments(policy, run.optimizer)]
    found["weights"] = {name: value.clone() for name, value in policy.state_dict().items()}

    train.save_checkpoint(config, run, 1)
    if rank == 0:
        found["before"] = contents_of(folder / "step_000001")
    found["failures"] = [failing_save(config, run, failed, 2 + failed) for failed in (0, 1)]
    found["out_of_memory"] = out_of_memory(config, run, minibatches)
    found["after_failing"] = policy.state_dict()
    torch.save(found, folder / f"found_{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def contents_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


PAIR = TINY | dict(estimator="ppo", kl_coef=0.5, entropy_coef=0.01, lr=1e-3, keep=1)
PAIR |= dict(microbatch_tokens=800, grad_checkpoint=True)


@pytest.fixture(scope="session")
def pair(tiny, played, tmp_path_factory):
    """What two processes found, what one finds from the same turns, and their folder.

    (findings of process 0, of process 1, statistics and Run of the one, folder)
    """
    folder = tmp_path_factory.mktemp("pair")
    options = PAIR | dict(model=str(warm_policy(tiny[0])), warm_steps=0, out=str(folder))
    config, trials = train.make_config(**options), copy.deepcopy(played)
    for i, turn in enumerate(turns_of(trials)):
        turn.advantage, turn.value_target = (-1.0) ** i, 0.3 * (i % 3)
    args = config, trials, str(free_port())
    processes = torch.multiprocessing.spawn(one_of_two, args, nprocs=2, join=False)
    try:
        one = train.start_run(replace(config, out=str(folder / "one")))
        minibatches = [first + second for first, second in dealt(trials)]
        stats = lamer.update(one.policy, one.optimizer, minibatches, config, one.reference)
        deadline = time.time() + 120
        while not processes.join(timeout=1):
            assert time.time() < deadline, "two processes wait for each other"
    finally:
        for process in processes.processes:
            process.kill()
    found = [torch.load(folder / f"found_{rank}.pt", weights_only=False) for rank in (0, 1)]
    return *found, (stats, one), folder


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_make_the_update_of_one(pair):
    """With uneven work and none, and the KL, the entropy and a value head in the loss.

    And with a process that once runs out of memory: both go on with half the micro-batches.
    """
    first, second, (stats, one), _ = pair
    assert first["tokens"] == second["tokens"] == 400
    assert first["policy"] is torch.nn.parallel.DistributedDataParallel
    assert largest_gap(first["weights"], second["weights"]) == 0
    assert largest_gap(first["weights"], one.policy.state_dict()) < CLOSE
    assert stats["updates"] == 4 and stats["ref_kl"] > 0 < stats["value_loss"]
    for found in (first, second):
        assert found["stats"] == pytest.approx(stats, rel=1e-4, abs=1e-7)


def test_a_model_is_loaded_by_one_process_after_another(pair):
    loads = sorted(pair[0]["loads"] + pair[1]["loads"])
    assert len(loads) == 4, "the policy and the reference, by each"
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(loads))


def test_the_moments_are_divided_among_processes(pair):
    first, second, (_, one), folder = pair
    assert first["optimizer"] is torch.distributed.optim.ZeroRedundancyOptimizer
    weights = {name for name, _ in one.policy.named_parameters()}
    assert first["owned"] and second["owned"] and not {*first["owned"]} & {*second["owned"]}
    assert {*first["owned"], *second["owned"]} == weights
    names = sorted(path.name for path in (folder / "step_000001").glob("optimizer_*"))
    assert names == ["optimizer_0.pt", "optimizer_1.pt"]


def test_one_process_takes_up_the_moments_of_two(pair, tiny):
    _, _, (_, one), folder = pair
    head = nn.Linear(tiny[1].config.hidden_size, 1)
    _, policy, optimizer = learner(tiny, head)
    train.load_moments(policy, optimizer, folder / "step_000001")
    ours = train.own_moments(policy, optimizer)
    theirs = train.own_moments(one.policy, one.optimizer)
    assert ours.keys() == theirs.keys()
    for name, state in theirs.items():
        assert state.keys() == ours[name].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key in ("exp_avg", "exp_avg_sq"):
            gap = (state[key] - ours[name][key]).abs().max()
            assert gap <= 1e-3 * state[key].abs().max(), (name, key)
        assert state["step"] == 4


def test_the_processes_share_one_folder(pair):
    first, second, _, folder = pair
    assert first["out"] == second["out"] == str(folder)
    assert not Path(f"{folder}-2").exists()


def test_a_process_that_cannot_save_stops_all_and_leaves_no_trace(pair):
    first, second, _, folder = pair
    for failed in (0, 1):
        for rank, found in enumerate((first, second)):
            reason = "No space left" if rank == failed else "another process failed"
            assert "cannot save" in found["failures"][failed]
            assert reason in found["failures"][failed]
    assert sorted(checkpoints(folder)) == [1] and not [*folder.glob("*.unfinished")]
    assert contents_of(folder / "step_000001") == first["before"], "the last one is untouched"


def test_a_process_that_runs_out_of_memory_stops_all(pair):
    first, second, _, _ = pair
    assert first["out_of_memory"] == "another process ran out of memory"
    assert second["out_of_memory"] == "no memory"
    for found in (first, second):
        assert largest_gap(found["after_failing"], found["weights"]) == 0


# --------------------------------------------------------------------------- the options

DICE = '''
from pathlib import Path

Path(__file__).with_suffix(".was_run").touch()


class Dice:
    """Throw as high as you can.

    Options:
        sides: of the die
        luck: between 0 and 1
    """

    def __init__(self, sides: int = 6, luck: float = 0.5, is_loaded: bool = False):
        self.sides = sides

    def reset(self, seed):
        return f"A die of {self.sides} sides.", {}

    def step(self, action):
        return "You throw.", 1.0, True, False, {"won": True}


class Clash(Dice):
    def __init__(self, seed: int = 0):
        pass
'''


@pytest.fixture
def dice(tmp_path):
    """A user's file, which leaves a trace when it is run."""
    path = tmp_path / "dice.py"
    path.write_text(DICE)
    return path


def test_the_defaults_are_the_papers():
    paper = dict(lr=1e-6, minibatch=64, clip=0.2, steps=300, num_tasks=16, group_size=8)
    paper |= dict(episodes=3, max_prompt=2048, max_reply=1024, temperature=1.0, memory="reflection")
    paper |= dict(gamma_step=0.95, gamma_traj=0.6, estimator="gigpo", invalid_penalty=0.5)
    paper |= dict(kl_coef=0.0, entropy_coef=0.0, model="Qwen/Qwen3-4B", dtype="bfloat16")
    config = train.Config()
    assert {name: getattr(config, name) for name in paper} == paper
    options = dict(env="minesweeper", model="some/model", device="cpu", dtype="bfloat16")
    assert train.make_config(**options) == train.Config(**options), "no recipe changes more"


def test_what_is_given_wins_over_recipe_preset_and_paper(monkeypatch):
    recipes = train.ENV_RECIPES | {"sokoban": dict(weight_decay=0.3, gamma_traj=0.9)}
    monkeypatch.setattr(train, "ENV_RECIPES", recipes)
    hub = dict(device="cpu", model="some/model")

    def weight_decay(**given):
        return train.make_config(**hub, **given).weight_decay

    official = dict(preset="official")
    assert weight_decay(env="minesweeper") == 0.0, "the paper's"
    assert weight_decay(env="minesweeper", **official) == 0.01, "the preset's"
    assert weight_decay(env="sokoban", **official) == 0.3, "the recipe's"
    assert weight_decay(env="sokoban", **official, weight_decay=0.7) == 0.7, "given"
    config = train.make_config(env="minesweeper", device="cpu", env_options={"mines": 3})
    assert config.env_options == dict(size=4, mines=3, turns=9), "one by one"
    assert (config.model, config.dtype) == ("tiny", "float32"), "the machine's recipe"
    config = train.make_config(env="alfworld", device="cpu", env_options={"data": "somewhere"})
    assert config.env_options == {"data": "somewhere"}, "the recipe's sizes are not of these"


def test_an_option_is_described_by_where_it_comes_from():
    given = dict(env="minesweeper", device="cpu", lr=1e-6, env_options={"mines": 3})
    lines = train.describe(train.make_config(**given), given).splitlines()
    words = {name: line.split() for name, line in (line.split(": ", 1) for line in lines)}
    assert words["given"] == ["env=minesweeper", "lr=1e-06", "device=cpu", "mines=3"]
    recipe = {"model=tiny", "style=compact", "minibatch=256", "dtype=float32", "size=4", "turns=9"}
    assert recipe <= {*words["by recipe"]}
    paper = {*words["as by default"]}
    assert {"gamma_traj=0.6", "clip=0.2", "episodes=3"} <= paper
    names = [word.partition("=")[0] for kind in words.values() for word in kind]
    assert len(names) == len({*names}), "each once"
    unnamed = {each.name for each in fields(train.Config)} - {*names}
    assert unnamed == {"out", "resume", "env_options"}


def test_dashes_serve_as_underscores():
    dashes = "--eval-every 7 --no-grad-checkpoint --out=my--run --env sokoban --min-solution 3"
    underscores = "--eval_every 7 --no-grad_checkpoint --out my--run --env sokoban --min_solution 3"
    given = dict(eval_every=7, grad_checkpoint=False, out="my--run", env="sokoban")
    given["env_options"] = {"min_solution": 3}
    for flags in (dashes, underscores):
        assert train.parse_flags(train.Config, flags.split(), "") == given


def test_a_group_shares_its_task_and_every_step_has_others():
    def seeds_of(step, seed=0):
        return train.task_seeds(SimpleNamespace(seed=seed, group_size=4), range(12), step)

    steps = [seeds_of(step) for step in range(50)]
    for seeds in steps:
        assert seeds == [seeds[i - i % 4] for i in range(12)]
    different = {seed for seeds in steps for seed in seeds}
    assert len(different) == 50 * 3 and max(different) < EVAL_SEED
    assert not different & {*seeds_of(0, seed=1)}


def test_a_saved_policy_goes_on_in_its_own_environment(tmp_path):
    saved = {"step": 1, "config": vars(train.make_config(**TINY))}
    (tmp_path / "lamer.json").write_text(json.dumps(saved))
    flags = ["--model", str(tmp_path), "--device", "cpu"]
    config = train.prepare([*flags, "--mines", "3"])[0]
    assert (config.env, config.env_options["mines"]) == ("minesweeper", 3)
    assert train.prepare([*flags, "--env", "sokoban"])[0].env == "sokoban"


def prepared(flags, folder):
    """The options of a run that starts from some policy."""
    start = f"--env lockbox --model {folder} --device cpu --out {folder}/run --group_size 3"
    return train.prepare(f"{start} {flags}".split())[0]


def test_credit_is_assigned_as_the_options_say(tmp_path):
    def value(batch):
        return SimpleNamespace(values=torch.tensor([len(turn.prompt_ids) for turn in batch]))

    value.most_nodes = lambda turns: 100

    def credit(flags=None):
        """Two groups of trials, and with flags their advantages."""
        trials = three_trials() + three_trials()[::-1]
        trials[0].won_in = trials[4].won_in = 1
        for i, turn in enumerate(turns_of(trials)):
            turn.is_valid, turn.prompt_ids = i % 5 != 0, [1] * (i % 3)
        if flags is not None:
            train.assign_credit(prepared(flags, tmp_path), value, trials)
        return trials if flags is None else of_turns("advantage", trials)

    discounts = "--gamma_step 0.9 --gamma_traj 0.5"
    trials = credit()
    lamer.compute_returns(trials, "official", 0.9, 0.5)
    lamer.compute_values(value, trials, train.Config(device="cpu"))
    lamer.ppo_advantages(trials, 0.9, 0.5, gae_lambda=0.7)
    lamer.penalize_invalid(trials, 0.5, "cpu")
    given = credit(f"--estimator ppo --credit official --gae_lambda 0.7 {discounts}")
    assert given == of_turns("advantage", trials)

    trials = credit()
    lamer.compute_returns(trials, "official", 0.9, 0.5, "success")
    how = dict(advantage_norm="mean_std", step_weight=3, invalid_penalty=0.2, reward="success")
    lamer.official_advantages([trials[:3], trials[3:]], "gigpo", **how)
    flags = "--advantage_norm mean_std --step_weight 3 --invalid_penalty 0.2 --reward success"
    assert credit(f"--preset official {flags} {discounts}") == of_turns("advantage", trials)


def test_a_run_is_set_up_as_its_options_say(tiny, tmp_path):
    flags = "--style direct --estimator ppo --lr 0.1 --value_lr 0.2 --grad_checkpoint"
    flags += " --dtype bfloat16 --kl_coef 0.1 --slots 3 --max_prompt 900 --max_reply 7"
    config = prepared(flags, warm_policy(tiny[0]))
    run = train.start_run(replace(config, out=str(tmp_path)))
    assert run.policy.bf16 and run.policy.model.is_gradient_checkpointing
    assert run.policy.model.dtype == torch.float32
    assert run.reference.model.dtype == run.sampler.model.dtype == torch.bfloat16
    assert [group["lr"] for group in run.optimizer.param_groups] == [0.1, 0.2]
    limits = run.sampler.slots, run.sampler.max_reply, run.sampler.capacity
    assert limits == (3, 7, 900 + 7)
    [trial] = sampler.rollout(config, run.sampler, [0], [0], Sampling())
    assert "Give only" in run.sampler.chat.decode(trial.turns[0].prompt_ids)


def test_muon_moves_matrices_as_torchs_does():
    torch.manual_seed(0)
    shapes = [(24, 24), (48, 24), (24, 48), (24, 24)]
    start = [torch.randn(shape) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(each.clone()) for each in start] for _ in range(2))
    optimizers = Muon(ours, lr=0.02), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0)
    for _ in range(3):
        for mine, their in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape)
            their.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, their, before in zip(ours, theirs, start, strict=True):
        assert (mine - their).norm() < 0.02 * (their - before).norm(), "torch's is rounded to bf16"
        around_1 = torch.linalg.svdvals(orthogonal(before[None])[0])
        assert around_1.min() > 0.3 and around_1.max() < 1.3


def test_the_warm_start_is_as_its_options_say(tmp_path, monkeypatch):
    batches, rates, trials = [], [], []
    monkeypatch.setenv("LAMER_CACHE", str(tmp_path))

    def record(*args, **options):
        trials.append(scripted_trial(*args, **options))
        return trials[-1]

    monkeypatch.setattr("policy.scripted_trial", record)
    monkeypatch.setattr("policy.make_optimizers", lambda model, lr: rates.append(lr) or [])
    monkeypatch.setattr("policy.imitate", lambda _, turns, *args, **how: batches.append(turns) or 0)
    flags = "--env minesweeper --model tiny --device cpu --tiny_hidden 16 --tiny_layers 1"
    flags += " --episodes 1 --warm_steps 2 --warm_batch 30 --warm_lr 0.1 --warm_episodes 2"
    config = train.prepare(flags.split())[0]
    monkeypatch.setattr(MineSweeper, "warm_token", r"rules? \d")
    monkeypatch.setattr(MineSweeper, "rules", lambda self, style: "rule 7")
    model, chat = load_policy(str(warm_policy(config)), torch.float32, "cpu")
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (16, 1)
    assert len(chat.encode_plain("rule 7")) == 1
    assert len(batches) == 2 and rates == [0.1]
    for batch in batches:  # whole trials, as many as it takes
        taken = []
        while len(taken) < 30:
            taken += trials.pop(256).turns  # the first were for the vocabulary
        assert batch == taken
    assert {turn.episode for batch in batches for turn in batch} == {0, 1}


def test_another_imitation_has_another_folder(tiny, monkeypatch):
    def folder():
        return warm_folder(tiny[0], make_env("minesweeper"), dict(episodes=3), ["a text"])

    folders = [folder(), folder()]
    monkeypatch.setattr("policy.PIECES", re.compile("."))
    folders.append(folder())
    for name, value in (("warm_share", 0.3), ("warm_copies", 3), ("warm_token", "a b")):
        monkeypatch.setattr(MineSweeper, name, value)
        folders.append(folder())
    assert folders[0] == folders[1] and len({*folders}) == 5


def test_a_policy_that_begins_to_copy_goes_on_as_the_text_did():
    config = train.make_config(env="alfworld", model="tiny", device="cpu")
    shares = []
    for prepare in (begin_to_copy, lambda model: None):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_shape(config, 500, 0))
        prepare(model)
        turns = copying(500, random.Random(0))
        found = []
        for turn in turns:
            row, reply = turn.token_ids(), turn.reply_ids
            assert min(row) >= 256 and max(row) < 497 and len(reply) >= 3
            start = next(i for i in range(len(row)) if row[i : i + len(reply)] == reply)
            assert start + len(reply) < len(turn.prompt_ids) and start > 1, "shown before"
            assert row[start - 1] == turn.prompt_ids[-1], "the piece before it is given"
            logits = model(torch.tensor([row])).logits[0, -len(reply) - 1 : -1]
            found += (logits.argmax(-1) == torch.tensor(reply)).tolist()
        shares.append(np.mean(found))
    assert shares[0] > 0.1 and shares[1] < 0.02, shares


def test_copying_is_taught_where_an_environment_asks_for_it(monkeypatch, tmp_path):
    monkeypatch.setenv("LAMER_CACHE", str(tmp_path))
    asked, begun = [], []
    monkeypatch.setattr("policy.copying", lambda *args: asked.append(args) or copying(*args))
    monkeypatch.setattr("policy.begin_to_copy", lambda model: begun.append(begin_to_copy(model)))
    given = dict(env="minesweeper", model="tiny", device="cpu", warm_steps=3, warm_batch=8)
    warm_policy(train.make_config(**given))
    assert not asked and not begun
    monkeypatch.setattr(MineSweeper, "warm_copies", 2)
    warm_policy(train.make_config(**given))
    assert len(asked) == 2 and len(begun) == 1
    warm_policy(train.make_config(**given, tiny_layers=1))
    assert len(asked) == 4 and len(begun) == 1, "it takes two layers"


def help_of(main, *flags, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*map(str, flags), "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", [train, evaluation])
def test_help_shows_options_with_meaning_and_default(command, dice, capsys):
    text = " ".join(help_of(command.main, "--env", f"{dice}:Dice", capsys=capsys).split())
    assert "--sides INT of the die [6]" in text and "--luck FLOAT between 0 and 1 [0.5]" in text
    assert "--is_loaded, --no-is_loaded [False]" in text
    assert "--max_prompt INT tokens" in text
    text = help_of(command.main, "--env", "sokoban", capsys=capsys)
    own = text.partition("options of sokoban")[2]
    assert "--boxes INT" in own and "--mines" not in own and "--steps" not in own


def test_no_file_is_run_that_is_not_named(dice, tmp_path, capsys):
    checkpoint = tmp_path / "run" / "step_000001"
    checkpoint.mkdir(parents=True)
    saved = {"step": 1, "config": {"env": f"{dice}:Dice"}}
    (checkpoint / "lamer.json").write_text(json.dumps(saved))
    run, trace = tmp_path / "run", dice.with_suffix(".was_run")
    for main, flags in (
        (train.main, ["--resume", run]),
        (train.main, ["--model", run]),
        (evaluation.main, ["--model", checkpoint]),
    ):
        assert "--sides" not in help_of(main, *flags, capsys=capsys)
        assert not trace.exists()
    flags = ["--model", str(run), "--sides", "4"]
    with pytest.raises(ValueError, match=f"only when named: --env {dice}:Dice"):
        train.parse_flags(evaluation.EvalConfig, flags, "")
    assert not trace.exists()
    given = train.parse_flags(evaluation.EvalConfig, [*flags, "--env", f"{dice}:Dice"], "")
    assert given["env_options"] == {"sides": 4} and trace.exists()


def test_a_users_class_gets_its_options_as_flags(dice):
    flags = f"--env {dice}:Dice --sides 20 --luck 0.1 --is_loaded --model some/model --device cpu"
    given = train.parse_flags(train.Config, flags.split(), "")
    assert given["env_options"] == dict(sides=20, luck=0.1, is_loaded=True)
    config = train.make_config(**given)
    assert make_env(config.env, **config.env_options).sides == 20
    with pytest.raises(ValueError, match="its option seed is taken") as error:
        train.parse_flags(train.Config, ["--env", f"{dice}:Clash"], "")
    assert "\n" not in str(error.value)


def test_what_is_imported():
    """The games run without torch, the method without transformers."""
    lines = [
        "import sys, envs",
        "assert 'torch' not in sys.modules",
        "import lamer",
        "assert 'transformers' not in sys.modules",
    ]
    run("-c", "; ".join(lines))


# -------------------------------------------------------------------------- the commands

SMALL = "--env minesweeper --model tiny --device cpu --tiny_hidden 32 --tiny_layers 2"
SMALL = f"{SMALL} --warm_steps 160 --warm_batch 32 --max_reply 32 --num_tasks 4 --group_size 4"
# With seed 0 one of the 2,878 draws of the first step is 3e-8 from the next token, and another
# number of rows, as with two processes, rounds it there.
SMALL = f"{SMALL} --eval_tasks 8 --minibatch 40 --eval_every 0 --seed 1".split()

LOCKBOX = ["--env", "lockbox", "--model", "tiny", "--device", "cpu", "--eval_every", "0"]
MINESWEEPER = ["--env", "minesweeper", "--model", "tiny", "--device", "cpu", "--steps", "0"]
LONG_RUNS = {"learns_to_peek": LOCKBOX, "uses_its_notes_before_rl": MINESWEEPER}  # test: flags

MORTAL = "--env lockbox --model tiny --device cpu --tiny_hidden 32 --tiny_layers 2 --warm_steps 50"
MORTAL = f"{MORTAL} --num_tasks 4 --group_size 8 --estimator ppo --eval_tasks 8 --eval_every 2"
MORTAL = f"{MORTAL} --steps 4 --save_every 1 --keep 1".split()
TWO = ["torchrun", "--nproc-per-node", 2]


def start(*command, **options):
    """Start a command of the project in a process of its own, on one thread."""
    env = dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    if command[0] == "torchrun":
        command = ["-m", "torch.distributed.run", *command[1:]]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=HERE)
    prepare = options.pop("preexec_fn", lambda: None)

    def before() -> None:
        # A test run started in the background ignores Ctrl-C, and its children would inherit that.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        prepare()

    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(command, env=os.environ | env, preexec_fn=before, **pipes | options)


def run(*command, expect=0, **options):
    """Run a command of the project to its end; returns its output."""
    process = start(*command, **options)
    text = process.communicate(timeout=900)[0]
    assert process.returncode == expect, text[-3000:]
    return text


def weights_of(folder):
    return load_policy(str(folder), torch.float32, "cpu")[0].state_dict()


def rows(path, *without):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: row[name] for name in row if name not in without} for row in rows]


CLOCKS = ("seconds", "tokens_per_second", "peak_gb")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, tiny):
    """A run of four steps by the real command; what it printed lies beside its folder."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    flags = ["--steps", 4, "--save_every", 2, "--keep", 9, "--eval-every", 2, "--grad_checkpoint"]
    flags += ["--out", out]
    warn = ["-W", "always::FutureWarning", "-W", "always::DeprecationWarning"]
    out.with_suffix(".txt").write_text(run(*warn, "train.py", *SMALL, *flags))
    return out


def test_a_run_says_how_it_samples_and_uses_nothing_deprecated(finished_run):
    text = finished_run.with_suffix(".txt").read_text()
    assert "sampler: continuous batching" in text and "\nby recipe: " in text
    deprecated = re.findall(r".*(?:Future|Deprecation)Warning: (?!`torch\.jit).*", text)
    assert not deprecated, "what torch does with its own jit is not ours"


def test_a_run_leaves_what_was_promised(finished_run):
    log = rows(finished_run / "metrics.jsonl")
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    keys = ["step", "success", "return", "valid", "seconds", "tokens_per_second"]
    keys += ["peak_gb", "entropy", "clip_fraction", "approx_kl", "zero_advantage"]
    assert all(key in row for row in log for key in keys)
    for row in log:
        assert all(0 <= share <= 1 for share in row["zero_advantage"].values())
        assert {"play 1", "reflect 1", "play 3"} <= {*row["zero_advantage"]}
    assert len(log[0]["success"]) == 3 and set(log[0]["seconds"]) >= {"rollout", "update"}
    assert [row["step"] for row in rows(finished_run / "evals.jsonl")] == [0, 2, 4]
    assert "episode 1, play" in (finished_run / "trials_000004.txt").read_text()
    saved = json.loads((finished_run / "config.json").read_text())
    assert saved["num_tasks"] == 4 and saved["style"] == "compact" and saved["gamma_traj"] == 0.6
    assert sorted(checkpoints(finished_run)) == [2, 4]


def test_no_model_is_not_the_run_that_one_stands_in(finished_run, monkeypatch):
    assert newest_checkpoint(str(finished_run)) == str(finished_run / "step_000004")
    monkeypatch.chdir(finished_run)
    assert newest_checkpoint("") == ""


def test_a_run_does_what_its_options_say(tiny, tmp_path, monkeypatch):
    """Two steps of the command equal, to the last bit, two made by hand with the same numbers."""
    monkeypatch.setattr(train, "default_device", lambda: "cuda")
    start, out = warm_policy(tiny[0]), tmp_path / "run"
    flags = f"--model {start} --out {out} --device cpu --env minesweeper --mines 1 --turns 3"
    flags += " --seed 5 --steps 2 --num_tasks 3 --group_size 3 --episodes 2 --memory both"
    flags += " --reward success --gamma_step 0.9 --gamma_traj 0.5 --advantage_norm mean_std"
    flags += " --step_weight 2 --invalid_penalty 0.7 --lr 0.003 --beta2 0.9 --weight_decay 0.1"
    flags += " --clip 0.05 --dual_clip 1.1 --entropy_coef 0.01 --kl_coef 0.1 --grad_clip 0.3"
    flags += " --minibatch 30 --microbatch_tokens 700 --sampler generate --slots 5"
    flags += " --max_prompt 80 --max_reply 24 --temperature 0.8"
    flags += " --eval_every 2 --eval_tasks 3 --save_every 1 --keep 1"
    train.main(flags.split())

    model, chat = load_policy(str(start), torch.float32, "cpu")
    policy, reference = (Policy(each, chat.vocab_size, 0.8) for each in (model, tiny[1]))
    adamw = dict(lr=0.003, betas=(0.9, 0.9), weight_decay=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), **adamw)
    player = GenerateSampler(model, chat, slots=5, max_reply=24)
    game = dict(env="minesweeper", env_options=dict(size=4, mines=1, turns=3))
    trial = SimpleNamespace(**game, episodes=2, memory="both", style="compact", max_prompt=80)
    learning = dict(clip=0.05, dual_clip=1.1, entropy_coef=0.01, kl_coef=0.1, grad_clip=0.3)
    learning = SimpleNamespace(**learning, microbatch_tokens=700, device="cpu")
    dealing = SimpleNamespace(seed=5, group_size=3, minibatch=30, device="cpu")
    log = rows(out / "metrics.jsonl")
    for step in (0, 1):
        seeds = train.task_seeds(dealing, range(9), step)
        sampling = Sampling(seed=5, step=step, temperature=0.8)
        trials = sampler.rollout(trial, player, seeds, range(9), sampling)
        lamer.compute_returns(trials, "paper", 0.9, 0.5, reward="success")
        groups = trials[:3], trials[3:6], trials[6:]
        lamer.compute_advantages(groups, "gigpo", "mean_std", step_weight=2)
        lamer.penalize_invalid(trials, 0.7, "cpu")
        minibatches = train.deal_minibatches(dealing, trials, range(9), step)
        stats = lamer.update(policy, optimizer, minibatches, learning, reference)
        assert {name: log[step][name] for name in stats} == stats
        returns = [trial.turns[0].ret for trial in trials]
        assert log[step]["return"] == pytest.approx(np.mean(returns))
        assert log[step]["success"][1] == sum(trial.success_after(2) for trial in trials) / 9
    assert largest_gap(weights_of(out / "step_000002"), model.state_dict()) == 0
    assert len(log) == 2 and [*checkpoints(out)] == [2], "one is kept"
    evals = [(row["step"], row["num_tasks"]) for row in rows(out / "evals.jsonl")]
    assert evals == [(0, 3), (2, 3)]


def test_resume_equals_no_interruption(finished_run, tmp_path):
    """As if killed in the fourth step, while writing its row.

    The third is done again, from the save of the second.
    """
    cut = tmp_path / "cut"
    shutil.copytree(finished_run, cut, ignore=shutil.ignore_patterns("step_000004"))
    lines = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
    (cut / "metrics.jsonl").write_text("".join(lines[:3]) + '{"step": 4, "succ')
    draft = shutil.copytree(cut / "step_000002", cut / "step_000004.unfinished")
    (draft / "optimizer_0.pt").rename(draft / "optimizer_1.pt")
    run("train.py", "--resume", cut)
    whole, resumed = contents_of(finished_run / "step_000004"), contents_of(cut / "step_000004")
    assert whole.keys() == resumed.keys(), "nothing of the killed process' draft"
    assert [name for name in whole if whole[name] != resumed[name]] == ["lamer.json"]
    for name in ("metrics.jsonl", "evals.jsonl"):
        assert rows(cut / name, *CLOCKS) == rows(finished_run / name, *CLOCKS)


def test_an_older_checkpoint_goes_on_in_a_new_folder(finished_run, tmp_path):
    flags = ["--resume", str(finished_run / "step_000002"), "--out", str(tmp_path / "new")]
    train.main([*flags, "--steps", "3"])
    assert sorted(checkpoints(tmp_path / "new")) == [3] and 4 in checkpoints(finished_run)
    log = rows(tmp_path / "new" / "metrics.jsonl", *CLOCKS)
    assert log == rows(finished_run / "metrics.jsonl", *CLOCKS)[:3]


@pytest.mark.slow
def test_a_long_run_does_not_grow(finished_run, tmp_path):
    flags = "--num_tasks 2 --group_size 4 --steps 200 --eval_every 50 --save_every 50 --device cpu"
    flags = [*flags.split(), "--lr", 1e-6]  # it stays what it is: its replies do not grow either
    run("train.py", "--model", finished_run, "--out", tmp_path / "run", *flags)
    peaks = [row["peak_gb"] for row in rows(tmp_path / "run" / "metrics.jsonl")]
    assert peaks[199] - peaks[99] < 0.01, "in GB"


@pytest.mark.slow
def test_no_steps_save_the_start(tmp_path):
    train.main([*map(str, SMALL), "--steps", "0", "--out", str(tmp_path / "start")])
    assert sorted(checkpoints(tmp_path / "start")) == [0]
    train.main(["--resume", str(tmp_path / "start"), "--steps", "1", "--eval_every", "1"])
    assert sorted(checkpoints(tmp_path / "start")) == [0, 1]
    assert [row["step"] for row in rows(tmp_path / "start" / "evals.jsonl")] == [1]


@pytest.mark.slow
def test_bf16_runs_resume_exactly_and_stay_tied(tmp_path):
    flags, whole, cut = [*SMALL, "--save_every", 1], tmp_path / "whole", tmp_path / "cut"
    flags += ["--dtype", "bfloat16"]
    run("train.py", *flags, "--steps", 2, "--out", whole)
    run("train.py", *flags, "--steps", 1, "--out", cut)
    run("train.py", "--resume", cut, "--steps", 2)
    whole, resumed = weights_of(whole / "step_000002"), weights_of(cut / "step_000002")
    assert largest_gap(whole, resumed) == 0
    assert torch.equal(whole["lm_head.weight"], whole["model.embed_tokens.weight"])


def test_two_processes_equal_one(finished_run, tmp_path):
    flags = ["--steps", 2, "--eval_every", 2, "--out", tmp_path]
    run("torchrun", "--nproc-per-node", 2, "train.py", *SMALL, *flags)
    one, two = weights_of(finished_run / "step_000002"), weights_of(tmp_path / "step_000002")
    assert largest_gap(one, two) < 1e-5
    of_one, of_two = rows(finished_run / "evals.jsonl"), rows(tmp_path / "evals.jsonl")
    assert len(of_two) == 2
    for a, b in zip(of_one, of_two, strict=False):
        assert a["success"] == b["success"], "evaluation is spread over the processes"
        assert a["return"] == pytest.approx(b["return"]) and a["reply_tokens"] == b["reply_tokens"]


# train.py, refusing to end while DDP holds the process group: freed by it, the group may hang.
ENDS_WELL = """
import gc, sys
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, sys.argv[1])
import train

def destroy(destroy=dist.destroy_process_group):
    assert not any(type(thing) is DistributedDataParallel for thing in gc.get_objects())
    destroy()

dist.destroy_process_group = destroy
train.main(sys.argv[2:])
"""


@pytest.mark.slow
def test_any_number_of_processes_resumes_any_other(finished_run, tmp_path):
    """The moments are divided among processes, saved by name, and taken up by any number."""
    two = ["torchrun", "--nproc-per-node", 2, "train.py"]
    run(*two, *SMALL, "--steps", 2, "--out", tmp_path)
    run("train.py", "--resume", tmp_path, "--steps", 3)
    ends_well = tmp_path / "ends_well.py"
    ends_well.write_text(ENDS_WELL)
    run(*two[:-1], ends_well, HERE, "--resume", tmp_path, "--steps", 4)
    one, other = weights_of(finished_run / "step_000004"), weights_of(tmp_path / "step_000004")
    assert largest_gap(one, other) < 1e-4
    logs = [rows(folder / "metrics.jsonl", *CLOCKS) for folder in (finished_run, tmp_path)]
    for a, b in zip(*logs, strict=True):
        assert a["success"] == b["success"]
        assert a["entropy"] == pytest.approx(b["entropy"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--estimator ppo --kl_coef 0.1 --grad_checkpoint", "memory reflection"),
        ("--preset official --advantage_norm mean_std", "memory reflection"),
        (
            "--env alfworld --receptacles 4 --objects 4 --turns 4 --warm_steps 20",
            "  pick_and_place_simple",
        ),
        ("--env webshop --products 60 --turns 4 --warm_steps 20", "  mean task score"),
    ],
)
def test_runs_of_other_kinds_resume_exactly(flags, line, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = [*SMALL, *flags.split(), "--save_every", 1]
    run("train.py", *flags, "--steps", 2, "--out", whole)
    run("train.py", *flags, "--steps", 1, "--out", cut)
    run("train.py", "--resume", cut, "--steps", 2)
    weights = weights_of(whole / "step_000002")
    assert largest_gap(weights, weights_of(cut / "step_000002")) == 0
    log, other = (rows(folder / "metrics.jsonl", *CLOCKS) for folder in (whole, cut))
    assert log == other
    if "ppo" in flags:
        assert log[1]["value_loss"] > 0 < log[1]["ref_kl"]
    assert line in run("eval.py", "--model", whole, "--num_tasks", 16)


@pytest.mark.slow
def test_two_agents_equal_one_process(finished_run, tmp_path):
    """Two nodes, as far as one machine can tell: two torchrun agents that meet on loopback."""
    flags = ["--nnodes", 2, "--nproc-per-node", 1]
    flags += ["--master-addr", "127.0.0.1", "--master-port", free_port()]
    command = ["train.py", *SMALL, "--steps", 2, "--out", tmp_path]
    nodes = [start("torchrun", *flags, "--node-rank", rank, *command) for rank in (0, 1)]
    texts = [node.communicate(timeout=600)[0] for node in nodes]
    assert all(node.returncode == 0 for node in nodes), texts
    one, two = weights_of(finished_run / "step_000002"), weights_of(tmp_path / "step_000002")
    assert largest_gap(one, two) < 1e-5


def test_training_samples_and_scores_at_its_temperature(finished_run, tmp_path):
    flags = ["--steps", "1", "--minibatch", "9999", "--kl_coef", "0.1", "--out", str(tmp_path)]
    train.main([*SMALL, *flags, "--temperature", "0.25"])
    [cold], warm = rows(tmp_path / "metrics.jsonl"), rows(finished_run / "metrics.jsonl")[0]
    assert cold["entropy"] < warm["entropy"] / 2
    assert cold["approx_kl"] == pytest.approx(0, abs=1e-6), "sampler and policy agree"
    assert cold["ref_kl"] == pytest.approx(0, abs=1e-6), "policy and reference agree"


def test_evaluation_samples_at_the_temperature_given(finished_run, tmp_path):
    file, results = tmp_path / "result.json", []
    flags = ["--model", str(finished_run), "--num_tasks", "4", "--json", str(file)]
    for temperature, seed in (("1", "1"), ("1", "2"), ("0", "1"), ("0", "2")):
        evaluation.main([*flags, "--temperature", temperature, "--seed", seed])
        results.append(json.loads(file.read_text()))
        assert results[-1]["temperature"] == float(temperature)
    drawn, redrawn, likeliest, again = (row["reply_tokens"] for row in results)
    assert drawn != redrawn and likeliest == again, "at 0 no draw matters"


def test_eval_command(finished_run, tmp_path):
    file = tmp_path / "result.json"
    flags = ["--model", str(finished_run), "--num_tasks", "16", "--json", str(file)]
    text = run("eval.py", *flags, "--show", 1)
    assert "scripted player" in text and "episode 1, play" in text
    assert "sampler: continuous batching" in text
    result = json.loads(file.read_text())
    keys = ["env", "model", "success", "ci95", "num_tasks", "episodes", "return", "valid"]
    keys += ["first_actions", "memory", "temperature", "top_p", "top_k", "seed"]
    assert all(key in result for key in keys)
    assert result["model"].endswith("step_000004")
    assert result["memory"] == "reflection" and result["num_tasks"] == 16
    assert len(result["success"]) == 3 and sum(result["first_actions"].values()) == 16
    for share, (low, high) in zip(result["success"], result["ci95"], strict=True):
        assert low <= share <= high
    assert evaluation.wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-3)
    seeds = [task["seed"] for task in result["tasks"]]
    assert len({*seeds}) == 16 and min(seeds) >= EVAL_SEED + 2**30, "no task of training's own"
    won = [sum(task["won_in"] == k for task in result["tasks"]) / 16 for k in range(3)]
    assert np.allclose(np.cumsum(won), result["success"])
    assert result["num_different_tasks"] == len({task["key"] for task in result["tasks"]})
    for memory in ("none", "swapped"):
        evaluation.main([*flags, "--memory", memory])
        again = json.loads(file.read_text())
        assert again["memory"] == memory
        assert memory == "none" or again["num_donors"] > 8
        same = again["success"][0] == result["success"][0]
        assert same, "the first episode has no memory to swap or to lose"
        _, config, _ = evaluation.prepare([*flags, "--memory", memory])
        assert config.memory == dict(none="none", swapped="reflection")[memory]


@pytest.mark.parametrize("memory", ["both", "swapped"])
def test_eval_does_what_its_options_say(memory, tiny, tmp_path, monkeypatch, capsys):
    """What it prints and writes is that of trials played by hand with the same numbers."""
    monkeypatch.setattr(evaluation, "default_device", lambda: "cuda")
    start, file = warm_policy(tiny[0]), tmp_path / "result.json"
    flags = f"--model {start} --device cpu --dtype bfloat16 --mines 3 --turns 3 --memory {memory}"
    flags += " --episodes 2 --num_tasks 6 --temperature 0.8 --top_p 0.9 --top_k 9 --seed 4"
    flags += f" --sampler generate --slots 4 --max_prompt 72 --max_reply 40 --json {file} --show 5"
    evaluation.main(flags.split())
    printed = capsys.readouterr()

    model, chat = load_policy(str(start), torch.bfloat16, "cpu")
    player = GenerateSampler(model, chat, slots=4, max_reply=40)
    config = SimpleNamespace(env="minesweeper", env_options=dict(size=4, mines=3, turns=3))
    config.memory = "reflection" if memory == "swapped" else memory
    vars(config).update(episodes=2, style="compact", max_prompt=72)
    seeds, step = [EVAL_SEED + 2**30 + i for i in range(6)], evaluation.EVAL_PY_DRAWS
    sampling = Sampling(seed=4, step=step, temperature=0.8, top_p=0.9, top_k=9)
    play = partial(sampler.rollout, config, player, seeds, range(6), sampling)
    trials, result = play(), json.loads(file.read_text())
    if memory == "swapped":
        lenders = evaluation.donors(trials, 2, seed=4)
        own, trials = trials, play([lender.past for lender in lenders])
        prompts, others = ([t.prompt_ids for t in turns_of(each)] for each in (own, trials))
        assert prompts != others, "another memory"
        assert result["num_donors"] == len({lender.seed for lender in lenders}) > 1
    assert printed.out.endswith("".join(f"\n{trial}\n" for trial in trials[:5]))
    assert str(trials[5]) not in printed.out
    assert [task["won_in"] for task in result["tasks"]] == [trial.won_in for trial in trials]
    assert [task["seed"] for task in result["tasks"]] == seeds
    assert result["shortened"] == sum(trial.num_shortened for trial in trials)
    assert "generate), 4 trials at once" in printed.err


def test_the_checksum_is_that_of_the_tasks():
    """Of what they show at their start, not of how they are played."""
    config = train.make_config(env="minesweeper", device="cpu")
    tasks = evaluation.play_scripted(config, range(4))
    same = evaluation.play_scripted(replace(config, episodes=1), range(4))
    assert evaluation.checksum(tasks) == evaluation.checksum(same)
    other = evaluation.play_scripted(replace(config, env_options={"mines": 4}), range(4))
    checksums = {evaluation.checksum(each) for each in (tasks, other, tasks[:3], tasks[::-1])}
    assert len(checksums) == 4


def test_the_scripted_row_is_that_of_full_skill():
    config = train.make_config(env="sokoban", device="cpu")
    trials = evaluation.play_scripted(config, range(20))
    assert [(trial.seed, trial.won_in) for trial in trials] == [(seed, 0) for seed in range(20)]


def test_training_evaluates_on_tasks_of_its_own(tiny):
    """RL's single episodes become three independent attempts."""
    options = TINY | dict(env_options={"turns": 3}, eval_tasks=6)
    config = train.make_config(**options, episodes=1, memory="reflection")
    player = make_player(tiny, slots=6)
    run = train.Run(learner(tiny)[1], None, player, reference=None, rank=0, world=1)
    row, trials = train.evaluate(config, run, step=7)
    assert row["prompt_gap"] == lamer.prompt_gap(run.policy, trials, config)
    assert (row["step"], row["num_tasks"], len(row["success"])) == (7, 6, 3)
    seeds = [EVAL_SEED + i for i in range(6)]
    assert [trial.seed for trial in trials] == seeds
    assert {trial.episodes for trial in trials} == {3}
    last = [trial.episodes_played()[2][0] for trial in trials if len(trial.episodes_played()) == 3]
    assert last and all(turn.phase == "play" for turn in turns_of(trials))
    firsts = [trial.turns[0].prompt_ids for trial in trials]
    assert all(turn.prompt_ids in firsts for turn in last), "no memory"
    sampling = Sampling(config.seed, train.EVAL_DRAWS + 7)
    same = sampler.rollout(replace(config, episodes=3), player, seeds, range(6), sampling)
    assert replies_of(trials) == replies_of(same)
    assert replies_of(trials) != replies_of(train.evaluate(config, run, step=8)[1])


def test_an_rl_policy_is_evaluated_by_independent_attempts(tmp_path):
    def evaluated(*flags, **trained):
        saved = {"step": 1, "config": vars(train.make_config(**TINY, **trained))}
        (tmp_path / "lamer.json").write_text(json.dumps(saved))
        config = evaluation.prepare(["--model", str(tmp_path), *flags])[1]
        return config.episodes, config.memory

    assert evaluated(episodes=1, memory="both") == (3, "none")
    assert evaluated("--episodes", "2", "--memory", "both", episodes=1) == (2, "both")
    assert evaluated(episodes=4, memory="both") == (4, "both"), "as it was trained"
    assert evaluated("--memory", "none", episodes=4) == (4, "none")


MY_GAME = '''
class Coin:
    """A plain Gymnasium-style class: heads wins."""

    def reset(self, seed):
        return "Heads or tails?", {}

    def step(self, action):
        won = action == "heads"
        return "It was heads.", float(won), True, False, {"won": won}
'''


def test_a_finite_list_of_tasks_is_played_once(finished_run, tmp_path, capfd):
    three = MY_GAME + "\n    def num_eval_tasks(self):\n        return 3\n"
    (tmp_path / "game.py").write_text(three)
    flags = ["--model", str(finished_run), "--env", f"{tmp_path}/game.py:Coin"]
    evaluation.main([*flags, "--num_tasks", "9", "--json", str(tmp_path / "three.json")])
    assert "3 tasks for evaluation" in capfd.readouterr().err
    row = json.loads((tmp_path / "three.json").read_text())
    assert row["num_tasks"] == len(row["tasks"]) == 3


BAD_GAMES = """
class Good:
    def reset(self, seed):
        return "now", {}

    def step(self, action):
        return "then", 0.0, True, False, {}


class Needy(Good):
    def __init__(self, level: int):
        self.level = level


class Raising(Good):
    def reset(self, seed):
        raise KeyError("no such room")


class Quitting(Good):
    def step(self, action):
        raise SystemExit(3)


class Four(Good):
    def step(self, action):
        return "then", 0.0, True, {}


class Numbers(Good):
    def reset(self, seed):
        return 7, {}
"""


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
    ("train.py --env lockbox --sampler slots", "--sampler"),
    ("train.py --env lockbox --temperature 0", "--temperature"),
    ("train.py --env lockbox --kl_coef -1", "--kl_coef"),
    ("train.py --env lockbox --dual_clip 0.5", "--dual_clip"),
    ("train.py --env lockbox --gae_lambda 0.5", "--credit official"),
    ("train.py --env lockbox --estimator ppo --preset official", "--preset official"),
    ("train.py --env lockbox --model ./nowhere", "./nowhere"),
    ("train.py --env lockbox --model {broken}", "cannot be loaded"),
    ("train.py --model {checkpoint} --env minesweeper --max_prompt 10", "--max_prompt is 10"),
    ("train.py --model {short} --env minesweeper", "missing keys: model.layers.1"),
    ("train.py --env lockbox --lr nan", "--lr must be a finite number"),
    ("train.py --env lockbox --lr inf", "--lr must be a finite number"),
    ("train.py --env lockbox --lr 1e38", "--lr must be at most 1"),
    ("train.py --env lockbox --model {pickled}", "model.safetensors"),
    ("train.py --env lockbox --model {foreign}", "cannot be loaded"),
    ("train.py --env lockbox --gamma_traj 1.5", "--gamma_traj must be at most 1"),
    ("train.py --env lockbox --grad_clip -1", "--grad_clip must be above 0"),
    ("train.py --env lockbox --clip 0", "--clip must be above 0"),
    ("train.py --env lockbox --device tpu", "--device must be one of cpu, cuda"),
    ("train.py --env webshop --data nowhere --warm_steps 100000", "nowhere"),
    ("train.py --env webshop --shops 0", "--shops 0"),
    ("train.py --env lockbox --seed 18446744073709551616", "--seed must be at most"),
    ("train.py --env lockbox --group_size 100000000000", "--group_size must be at most"),
    ("train.py --env lockbox --codes 1000000000000", "--codes 1000000000000"),
    ("train.py --env lockbox --model tiny --tiny_hidden 24", "--tiny_hidden must be a multiple"),
    ("train.py --env {bad}:Needy", "needs a value for --level"),
    ("train.py --env {bad}:Raising", "KeyError: 'no such room'"),
    ("train.py --env {bad}:Quitting", "SystemExit: 3"),
    ("train.py --env {bad}:Four", "not enough values to unpack"),
    ("train.py --env {bad}:Numbers", "observations are not text"),
    ("train.py --model {untold} --env minesweeper", "cannot be loaded"),
    ("train.py --model {half} --env minesweeper", "lamer.json cannot be read"),
    ("train.py --resume {cut}", "optimizer_0.pt cannot be read"),
    ("train.py --resume {cut}", "step_000002 --out NEW"),
    (
        "train.py --resume {gone}",
        "no optimizer_*.pt has the moments of model.model.embed_tokens.weight",
    ),
    ("train.py --resume {old}", "another version of lamer"),
    ("train.py --resume {checkpoint}", "--out NEW"),
    ("train.py --resume {checkpoint} --out {run}", "holds a run already"),
    ("eval.py --model {checkpoint} --json {empty}", "is a folder"),
    ("eval.py --model {checkpoint} --temperature nan", "--temperature must be a finite number"),
    ("eval.py --model {checkpoint} --top_k -1", "--top_k must be at least 0"),
    ("eval.py --model {checkpoint} --show -1", "--show must be at least 0"),
    ("train.py --resume {empty}", "no complete checkpoint"),
    ("train.py --resume {run} --env lockbox", "cannot become lockbox"),
    ("train.py --resume {run} --lr 1", "cannot become 1"),
    ("train.py --resume {run} --mines 3", "--mines 2, which cannot become 3"),
    ("train.py --env minesweeper --out {run}", "--resume"),
    ("eval.py", "--model"),
    ("eval.py --model {empty}", "--env"),
    ("eval.py --model {empty} --env lockbox", "config.json"),
    ("eval.py --model {checkpoint} --memory telepathy", "--memory"),
    ("eval.py --model {checkpoint} --temperature -1", "--temperature"),
    ("eval.py --model {checkpoint} --top_p 0", "--top_p"),
    ("eval.py --model {checkpoint} --json nowhere/x.json", "nowhere"),
    ("eval.py --model {checkpoint} --memory swapped --episodes 1", "--episodes"),
    ("eval.py --model {checkpoint} --memory none --prompting react", "--memory"),
    ("eval.py --model {checkpoint} --prompting react", "understand instructions"),
    ("train.py --env lockbox --seed -1", "--seed"),
    ("train.py --env lockbox --out {file}", "cannot be made"),
    ("train.py --env lockbox --out {file}/run", "cannot be made"),
    ("train.py --env {game}:Coin --model tiny", "no scripted player"),
    ("train.py --env {game}:Dice", "no class Dice"),
]


def test_mistakes_end_in_one_clear_line(finished_run, tmp_path, monkeypatch):
    checkpoint, broken = finished_run / "step_000004", tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    short = shutil.copytree(checkpoint, tmp_path / "short")
    weights = short / "model.safetensors"
    kept = {k: v for k, v in load_file(weights).items() if ".layers.1." not in k}
    save_file(kept, weights, metadata={"format": "pt"})
    (tmp_path / "empty").mkdir()
    (tmp_path / "game.py").write_text(MY_GAME)
    places = dict(run=finished_run, checkpoint=checkpoint, file=checkpoint / "config.json")
    places |= dict(empty=tmp_path / "empty", broken=broken, game=tmp_path / "game.py")
    places |= dict(short=short, bad=tmp_path / "bad.py")
    (tmp_path / "bad.py").write_text(BAD_GAMES)
    for name in ("untold", "half", "pickled", "foreign"):
        places[name] = shutil.copytree(checkpoint, tmp_path / name)
    for file in places["untold"].glob("token*"):
        file.unlink()
    (places["half"] / "lamer.json").write_text('{"step": 4, "conf')
    weights = places["pickled"] / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    shape = json.loads((places["foreign"] / "config.json").read_text())
    shape |= dict(model_type="own", auto_map={"AutoConfig": "own.Own"})
    (places["foreign"] / "config.json").write_text(json.dumps(shape))
    (places["foreign"] / "own.py").write_text("import os\nos._exit(7)")
    for name in ("cut", "old", "gone"):
        places[name] = shutil.copytree(finished_run, tmp_path / name)
    moments = places["cut"] / "step_000004" / "optimizer_0.pt"
    moments.write_bytes(moments.read_bytes()[:1000])
    moments = places["gone"] / "step_000004" / "optimizer_0.pt"
    kept = torch.load(moments, weights_only=True)
    del kept["model.model.embed_tokens.weight"]
    torch.save(kept, moments)
    old = places["old"] / "step_000004" / "lamer.json"
    old.write_text(old.read_text().replace('"gamma_step"', '"gamma"'))
    monkeypatch.chdir(tmp_path)
    for command, expected in MISTAKES:
        name, *flags = command.format(**places).split()
        main = train.main if name == "train.py" else evaluation.main
        with pytest.raises(SystemExit) as stop:
            main(flags)
        line = str(stop.value)
        assert expected in line and "\n" not in line and len(line) < 400, (command, line)
        is_broken = "{cut}" in command or "{gone}" in command
        assert ("older: --resume" in line) == is_broken, "no advice but where a file is broken"
    assert sorted(checkpoints(finished_run)) == [2, 4]


FILES = ["model.safetensors", "tokenizer.json", "chat_template.jinja", "config.json"]
FILES += ["optimizer_1.pt", "value_head.pt", "lamer.json"]


@pytest.mark.parametrize("is_cut", [False, True])
def test_a_broken_checkpoint_is_named_with_the_one_before(pair, is_cut, tmp_path):
    folder = pair[3] / "step_000001"
    good = shutil.copytree(folder, tmp_path / "step_000001")
    for name in FILES:
        broken = shutil.copytree(folder, tmp_path / "step_000002")
        file = broken / name
        if is_cut:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        else:
            file.unlink()
        with pytest.raises(SystemExit) as stop:
            train.main(["--resume", str(tmp_path), "--steps", "2"])
        line = str(stop.value)
        assert str(broken) in line and str(good) in line and "\n" not in line, (name, line)
        train.main(["--resume", str(good), "--out", str(tmp_path / name), "--steps", "1"])
        shutil.rmtree(broken)


def test_a_lost_or_cut_log_keeps_the_rows_that_can_be_read(tmp_path):
    old, new = tmp_path / "old.jsonl", tmp_path / "metrics.jsonl"
    train.trim_log(old, new, 3)
    assert rows(new) == []
    old.write_text('{"step": 1}\n{"ste\n{"step": 3}\n{"step": 4}\n{"st')
    train.trim_log(old, new, 3)
    assert rows(new) == [{"step": 1}, {"step": 3}]


def test_a_mistake_on_the_real_command_line():
    text = run("train.py", "--env", "chess", expect=1)
    assert text.strip().splitlines()[-1].startswith("train.py: ") and "Traceback" not in text


@pytest.mark.slow
def test_a_full_disk_while_saving_loses_nothing(finished_run, tmp_path):
    resource = pytest.importorskip("resource")
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    before = contents_of(tmp_path / "step_000004")
    size = len(before["model.safetensors"]) // 2
    # stands in for a full disk
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    text = run("train.py", "--resume", tmp_path, "--steps", 5, expect=1, preexec_fn=limit)
    assert "cannot save" in text.strip().splitlines()[-1] and "Traceback" not in text
    assert contents_of(tmp_path / "step_000004") == before
    assert sorted(checkpoints(tmp_path)) == [2, 4]
    assert not list(tmp_path.glob("*.unfinished"))


def as_a_user():
    """Root may write everywhere; without this right permissions mean for it what they say."""
    drop_from_all, may_write_everywhere = 24, 1  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE
    ctypes.CDLL(None).prctl(drop_from_all, may_write_everywhere)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="as_a_user is for Linux")
def test_a_folder_that_cannot_be_written_to_is_said_before_the_warm_start(tmp_path):
    tmp_path.chmod(0o500)
    flags = [*MORTAL, "--seed", 1, "--out", tmp_path]
    text = run("train.py", *flags, expect=1, preexec_fn=as_a_user)
    assert text == f"train.py: --out {tmp_path} cannot be written to\n"


def test_an_interrupted_run_says_so_and_can_go_on(finished_run, tmp_path):
    flags = ["--steps", 1000, "--save_every", 1, "--out", tmp_path]
    process = start("train.py", *SMALL, *flags)
    deadline = time.time() + 600
    while not checkpoints(tmp_path) and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 1
    assert "stopped" in text.strip().splitlines()[-1] and "Traceback" not in text
    last = max(checkpoints(tmp_path))
    train.main(["--resume", str(tmp_path), "--steps", str(last + 1)])
    steps = [row["step"] for row in rows(tmp_path / "metrics.jsonl")]
    assert steps == list(range(1, last + 2))


@pytest.mark.slow
def test_ctrl_c_ends_two_processes_and_they_can_go_on(tmp_path):
    flags = ["train.py", *MORTAL, "--steps", 1000, "--out", tmp_path]
    process = start(*TWO, *flags, start_new_session=True)
    while not checkpoints(tmp_path) and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    text = process.communicate(timeout=60)[0]  # to the end of the last process that could write
    assert text.count("train.py: stopped; --resume goes on") == 2
    assert all("optimizer_1.pt" in contents_of(folder) for folder in checkpoints(tmp_path).values())
    steps = max(checkpoints(tmp_path)) + 1
    run(*TWO, "train.py", "--resume", tmp_path, "--steps", steps)
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [*range(1, steps + 1)]
    assert not [*tmp_path.glob("*.unfinished")]


# train.py, killed at its n-th pass of the model, or n-th opening, renaming or deleting of a file.
KILLED_AT = """
import json, os, runpy, signal, sys, torch
kind, nth, out = sys.argv.pop(1), int(sys.argv.pop(1)), sys.argv[-1]
counts, forward = {"pass": 0, "file": 0}, torch.nn.Embedding.forward

def count(what):
    counts[what] += 1
    if what == kind and counts[what] == nth:
        os.kill(os.getpid(), signal.SIGKILL)

def on_event(name, args):
    if name in ("os.remove", "os.rmdir") or (name in ("open", "os.rename") and out in str(args)):
        count("file")

def counting_forward(*args):
    count("pass")
    return forward(*args)

torch.nn.Embedding.forward = counting_forward
sys.addaudithook(on_event)
runpy.run_path("train.py", run_name="__main__")
if os.environ.get("RANK", "0") == "0":
    print(json.dumps(counts))
"""


def what_a_run_is(out):
    """What must be the same however often it was killed."""
    last = contents_of(out / "step_000004")
    del last["lamer.json"]  # has the name of the folder
    texts = {path.name: path.read_text() for path in out.glob("trials_*.txt")}
    return last, texts, rows(out / "evals.jsonl"), rows(out / "metrics.jsonl", *CLOCKS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_processes", "kills"),
    [(1, {"second": 8, "pass": 6, "file": 6}), (2, {"second": 2, "pass": 1, "file": 1})],
)
def test_a_killed_run_goes_on_as_if_never_killed(num_processes, kills, tmp_path):
    """`kill -9` at moments spread over a run, and between the files of a checkpoint."""
    launch = ["-c"]
    if num_processes == 2:
        launch = [*TWO, "--no-python", sys.executable, "-c"]

    def begin(out, kind, nth):
        flags = [KILLED_AT, kind, nth, *MORTAL, "--out", out]
        process = start(*launch, *flags, start_new_session=True)
        has_begun = any("sampler:" in line for line in process.stdout)
        assert has_begun or kind != "second", "the others may come earlier"
        return process

    whole = tmp_path / "whole"
    process, begun = begin(whole, "second", 0), time.time()
    assert any("done:" in line for line in process.stdout)
    ends = {"second": time.time() - begun}
    ends |= json.loads(next(line for line in process.stdout if line.startswith("{")))
    process.communicate()
    complete = contents_of(whole / "step_000004").keys()

    rng = random.Random(num_processes)
    for kind, i in [(kind, i) for kind, num in kills.items() for i in range(num)]:
        moment = (i + rng.random()) / kills[kind] * ends[kind]
        out = tmp_path / f"killed_{kind}_{i}"
        process = begin(out, kind, 1 + int(moment))
        if kind == "second":
            time.sleep(moment)
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)  # to the end of the last process that could write
        assert kind == "second" or process.returncode != 0, "it was killed"
        for folder in checkpoints(out).values():
            assert contents_of(folder).keys() == complete, f"half a checkpoint at {kind} {moment}"

        log = out / "metrics.jsonl"
        num_rows = log.read_text().count("\n") if log.exists() else 0
        assert max(checkpoints(out), default=0) >= num_rows - 1, "at most the last step is lost"
        flags = ["--resume", out] if checkpoints(out) else [*MORTAL, "--out", out]
        if num_processes == 2:
            run(*TWO, "train.py", *flags)
        else:
            train.main([*map(str, flags)])
        assert what_a_run_is(out) == what_a_run_is(whole), f"another run at {kind} {moment}"
        assert not [*out.glob("*.unfinished")]


@pytest.mark.slow
def test_a_killed_torchrun_takes_its_processes_along(tmp_path):
    process = start(*TWO, "train.py", *MORTAL, "--steps", 500, "--out", tmp_path)
    while not checkpoints(tmp_path) and process.poll() is None:
        time.sleep(0.1)
    process.kill()
    process.communicate(timeout=20)  # would wait for the end of the last that could write


# train.py, where the second process fails in one phase.
FAILING_IN = """
import os, runpy, sys
import lamer, sampler
phase, update, rollout = sys.argv.pop(1), lamer.update, sampler.rollout

def failing(*args):
    raise RuntimeError(f"{phase} has failed here")

def failing_rollout(config, player, seeds, *args):
    is_phase = phase == ("evaluation" if min(seeds) >= sampler.EVAL_SEED else "rollout")
    return (failing if is_phase else rollout)(config, player, seeds, *args)

if os.environ["RANK"] == "1":
    sampler.rollout = failing_rollout
    lamer.update = failing if phase == "update" else update
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["rollout", "update", "evaluation"])
def test_a_process_that_fails_ends_all_with_its_error(phase, tmp_path):
    launch = [*TWO, "--no-python", sys.executable, "-c", FAILING_IN, phase]
    begun = time.time()
    text = run(*launch, *MORTAL, "--out", tmp_path, expect=1)
    assert f"RuntimeError: {phase} has failed here" in text
    assert time.time() - begun < 60


def test_an_environment_of_ones_own(tiny, tmp_path):
    name = f"{tmp_path}/game.py:Coin"
    (tmp_path / "game.py").write_text(MY_GAME)
    env = make_env(name)
    assert env.name == "coin" and env.parse("<action> heads </action>") == ("heads", True)
    config = train.make_config(env=name, device="cpu", model=str(warm_policy(tiny[0])), max_reply=4)
    player = make_player((config, *tiny[1:]), slots=2)
    trials = sampler.rollout(config, player, [0, 1], [0, 1], Sampling())
    assert [trial.episodes for trial in trials] == [3, 3]
    (tmp_path / "game.py").write_text("being edited while a run goes on")
    assert type(make_env(name)).step is type(env).step
    for file, text, message in (
        ("a.py", "import nothing_like_this", "cannot be loaded"),
        ("b.py", "class Other: pass", "no class Coin"),
        ("c.py", "from envs import Env\nclass Coin(Env): pass", "with reset and step"),
    ):
        (tmp_path / file).write_text(text)
        with pytest.raises(ValueError, match=message):
            make_env(f"{tmp_path}/{file}:Coin")


# --------------------------------------------------------------- learning, and the README


def warm(env, **options):
    """(config, sampler) of the default warm-started policy."""
    config = train.make_config(env=env, model="tiny", device="cpu", **options)
    model, chat = load_policy(str(warm_policy(config)), torch.float32, "cpu")
    return config, make_player((config, model, chat), slots=128)


def actions_with(config, player, notes):
    """First actions of second episodes of tasks 0, 1, ..., each with a note in its memory."""
    env = make_env(config.env, **config.env_options)

    def ask(seed, note):
        initial, _ = env.reset(seed=seed)
        past = [PastEpisode([], note)]
        prompt = lamer.play_prompt(env, config.style, "reflection", initial, past, 1, [])
        reply = yield lamer.Prompt("play", player.chat.encode(prompt))
        return env.parse(reply.text)[0]

    talks = [ask(seed, note) for seed, note in enumerate(notes)]
    return player.run(talks, range(len(notes)), Sampling(seed=1))


def share_won_at_once(config, player, num):
    """Success in the first episode, on tasks 0, 1, ..."""
    trials = sampler.rollout(config, player, range(num), range(num), Sampling(seed=9))
    return sum(trial.success_after(1) for trial in trials) / num


@pytest.mark.slow
def test_lockbox_without_credit_across_episodes_does_not_peek(tmp_path):
    run("train.py", *LOCKBOX, "--gamma_traj", 0.0, "--out", tmp_path)
    run("eval.py", "--model", tmp_path, "--json", tmp_path / "eval.json")
    result = json.loads((tmp_path / "eval.json").read_text())
    assert result["first_actions"].get("peek", 0) <= 0.05 * 256
    # Chance earns 1.25, standard deviation 0.2 on 256 tasks; who peeks or leaves earns 0.
    assert result["valid"] >= 0.95 and result["first_episode_reward"] >= 0.65


def end_of(name, request):
    """What a long run printed, and its folder."""
    process, out = request.session.long_runs[name]
    process.wait(timeout=3600)
    text = out.with_suffix(".log").read_text()
    assert process.returncode == 0, text[-3000:]
    return text, out


@pytest.mark.slow
def test_minesweeper_warm_policy_uses_its_notes_before_rl(request):
    """It wins more often with its own than with another task's: 1,024 tasks, each twice."""
    _, out = end_of("uses_its_notes_before_rl", request)
    won = []
    for memory, seed in itertools.product(("reflection", "swapped"), (0, 1)):
        flags = ["--memory", memory, "--seed", str(seed), "--num_tasks", "1024"]
        evaluation.main(["--model", str(out), *flags, "--json", str(out / "eval.json")])
        tasks = json.loads((out / "eval.json").read_text())["tasks"]
        won.append([task["won_in"] is not None for task in tasks])
    gains = np.mean(won[:2], axis=0) - np.mean(won[2:], axis=0)
    assert gains.mean() > 1.96 * gains.std() / 1024**0.5, "a 95% interval above 0"


@pytest.mark.slow
def test_minesweeper_warm_policy_follows_its_memory():
    """With the board after a first episode in memory it opens what was safe there.

    With another board it does so less often.
    """
    config, player = warm("minesweeper")
    env, rng = make_env(config.env, **config.env_options), random.Random(0)
    boards, safe = [], []
    for seed in range(1024):
        env.reset(seed=seed)
        at_start, done = list(env.shown), False
        while not done:
            _, _, terminated, truncated, _ = env.step(env.parse(env.scripted(0.0, rng))[0])
            done = terminated or truncated
        boards.append(lamer.parse_reflection(env.scripted_reflection(rng))[0])
        changes = enumerate(zip(at_start, env.shown, strict=True))
        found = [i for i, (before, after) in changes if before == "?" != after != "*"]
        safe.append({(i // env.size + 1, i % env.size + 1) for i in found})

    def share_opened(notes):
        chosen = zip(actions_with(config, player, notes), safe, strict=True)
        return np.mean([action in cells for action, cells in chosen if cells])

    others = share_opened(boards[1:] + boards[:1])
    # about .6 and .51; the difference of 800 pairs has a standard deviation of about .02
    assert share_opened(boards) > others + 0.04, "what is written changes what is done"
    assert share_won_at_once(config, player, 256) <= 0.4, "first episodes are played poorly"


@pytest.mark.slow
def test_sokoban_warm_policy_follows_its_memory():
    """A plan in memory is played on the first turn, whichever it is."""
    config, player = warm("sokoban")
    plans = ["up, left, down", "down, down, right", "left, up, up", "right, right, left"]
    for i, plan in enumerate(plans):
        moves, other = plan.split(", "), plans[i - 1]
        assert actions_with(config, player, [plan] * 128).count(moves) >= 0.25 * 128
        assert actions_with(config, player, [other] * 128).count(moves) <= 0.1 * 128
    assert share_won_at_once(config, player, 256) <= 0.6, "first episodes are played poorly"


def test_the_readme_is_true():
    text = (HERE / "README.md").read_text(encoding="utf-8")
    assert not re.findall(r"@[A-Z]+@", text)
    method = text.partition("| symbol |")[2].partition("## ")[0]
    symbols = re.findall(r"^\| .* \| `(\w+)` \|$", method, flags=re.M)
    assert len(symbols) >= 8
    for name in symbols:
        is_there = hasattr(lamer, name) or hasattr(sampler, name)
        assert is_there, f"README names {name}, which does not exist"
    flags = set(re.findall(r"--(?:no-)?([a-z_]+[a-z])", text))
    known = {each.name for cls in (train.Config, evaluation.EvalConfig) for each in fields(cls)}
    for env in (*ENVS, "webshop", "alfworld"):
        known |= {*train.env_flags(env)}
    known |= {"nproc", "help", "shape", "deps"}  # of torchrun, both commands, bench/memory.py, pip
    assert flags <= known, f"README names flags that do not exist: {sorted(flags - known)}"
    faults = text.partition("## What can go wrong")[2].partition("\n## ")[0]
    files = [HERE / "test_lamer.py", *HERE.glob("*/test_*.py")]
    tests = {name for file in files for name in re.findall(r"def test_(\w+)", file.read_text())}
    named = set(re.findall(r"`(\w+_\w+_\w+)`", faults))
    assert len(named) >= 15 and named <= tests, f"no such tests: {sorted(named - tests)}"
    [released] = re.findall(r"^version: (.*)$", (HERE / "CITATION.cff").read_text(), flags=re.M)
    assert f"\n## {released}, " in (HERE / "CHANGELOG.md").read_text()


def test_the_readmes_own_environment_can_be_played(tiny, tmp_path):
    [code] = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), flags=re.S)
    (tmp_path / "my_game.py").write_text(code)
    name = f"{tmp_path}/my_game.py:Game"
    check_env(name, make_env(name))
    env = make_env(name)
    for seed in range(20):
        env.reset(seed)
        wins = [guess for guess in range(10) if env.step(str(guess))[4]["won"]]
        assert len(wins) == 1 and wins[0] > 0
    prompts, trial = talk(run_trial(env, 4, 2, Letters()), "<action>1</action>", "<remark>not 1")
    assert "1 is not it." in prompts[1][1] and trial.won_in is None


@pytest.mark.parametrize("place", ["README.md", "train.py", "eval.py"])
def test_the_commands_shown_are_commands(place, tmp_path, monkeypatch):
    """The README's commands, and those in the docstrings of the two files."""
    text = (HERE / place).read_text(encoding="utf-8")
    (tmp_path / "my_game.py").write_text(MY_GAME.replace("Coin", "Game"))
    monkeypatch.chdir(tmp_path)

    def saved_config(name):
        """As if the run folders named in the commands were there."""
        return {"env": Path(name).name.rpartition("-")[0]} if name.startswith("runs/") else {}

    monkeypatch.setattr(train, "saved_config", saved_config)
    command = r"^ *(?:\S.* && )?(?:python|torchrun .*) (train|eval)\.py (.*?)(?:  +.*| +#.*)?$"
    found = re.findall(command, text, flags=re.M)
    assert len(found) >= 5
    for name, flags in found:
        cls = train.Config if name == "train" else evaluation.EvalConfig
        if "--help" not in flags:
            assert train.parse_flags(cls, flags.split(), "")


def test_lockbox_warm_policy_follows_its_memory_and_rl_learns_to_peek(request):
    """The whole claim in miniature: from a policy that can copy, peeking first is learned."""
    text, out = end_of("learns_to_peek", request)
    assert "sampler: continuous batching" in text
    config, player = warm("lockbox")
    for code in (2, 7):
        opened = actions_with(config, player, [f"code {code}"] * 64).count(f"open {code}")
        assert opened >= 32, "a written code is opened"
        assert actions_with(config, player, ["nothing"] * 64).count(f"open {code}") <= 16
    assert share_won_at_once(config, player, 128) <= 0.25, "first episodes are played poorly"
    evaluation.main(["--model", str(out), "--json", str(out / "eval.json")])
    result = json.loads((out / "eval.json").read_text())
    assert result["success"][0] <= 0.05 and result["success"][1] >= 0.95
    assert result["first_actions"]["peek"] >= 0.95 * 256

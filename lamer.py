"""LaMer: meta-RL that teaches a language model to explore (Jiang et al., ICLR 2026).

*Meta-RL Induces Exploration in Language Agents*, arXiv 2512.16848. This file is the method.

A *trial* is up to N episodes of the same task from the same initial state. After an episode that
fails, the model writes a reflection; the next episode's prompts carry it. Returns cross episodes
with the discount gamma_traj, so an early episode is paid for what it lets later ones achieve: that
is what makes exploring worth learning. At test time only the context adapts.

Read from the top; the data flows in this order:

    run_trial              one trial as a coroutine: yields prompts, receives replies
    play_prompt            what the model is asked, its memory included
    compute_returns        G_t(n) = g_t(n) + sum_{m>n} gamma_traj^(m-n) g_0(m)
    compute_advantages     G minus what the same task's other trials got at the same point
    Policy                 turns in, log-probabilities of their reply tokens out
    update                 clipped policy gradient on every reply token, reflections included

A Turn is one model call and the unit of training. Each stage fills its own fields; only the penalty
of invalid replies changes another's, the advantage. Environments are known only by the interface in
envs.py. The replies come from sampler.py.
"""

import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.utils.checkpoint import checkpoint

from envs import Env, Records, between

# ------------------------------------------------------------------------------ the trial


@dataclass
class Turn:
    """One model call: what was asked, what was answered, what it earned."""

    episode: int  # 0-based
    phase: str  # "play" or "reflect"
    prompt_ids: list[int]
    reply_ids: list[int]  # exactly as sampled, the end token included; what is trained on
    logps: list[float]  # of the reply tokens, as the sampler drew them
    reply: str
    observation: str  # what the environment showed before
    anchor: str  # key of the state the turn was taken in, for GiGPO
    action: str = ""  # as parsed
    is_valid: bool = True  # the reply could be parsed
    reward: float = 0.0  # of the environment; 0 for a reflection
    ret: float = 0.0  # the return G, set by compute_returns
    value: float = 0.0  # the value head's estimate of the return, set by compute_values (ppo only)
    value_target: float = 0.0  # what that estimate is to become, set by ppo_advantages
    advantage: float = 0.0  # set by compute_advantages, less the penalty of invalid replies
    old_logps: list[float] = field(default_factory=list)  # what ratios are measured against

    def token_ids(self) -> list[int]:
        """Prompt and reply: what the model reads."""
        return self.prompt_ids + self.reply_ids


def make_turn(prompt_ids: list[int], reply_ids: list[int]) -> Turn:
    """A turn of bare token ids, to be scored."""
    return Turn(
        episode=0,
        phase="play",
        prompt_ids=prompt_ids,
        reply_ids=reply_ids,
        logps=[],
        reply="",
        observation="",
        anchor="",
    )


class PastEpisode(NamedTuple):
    """What memory keeps of a failed episode."""

    records: Records
    reflection: str


@dataclass
class Trial:
    """Up to N episodes of one task by one agent."""

    seed: int  # of the task
    episodes: int  # N, as planned; a trial ends earlier at the first success
    task_key: str = ""  # equal for equal tasks, whatever their seeds
    turns: list[Turn] = field(default_factory=list)
    past: list[PastEpisode] = field(default_factory=list)  # what later episodes can see
    won_in: int | None = None  # the episode that solved the task
    info: dict[str, Any] = field(default_factory=dict)  # the environment's, after the last turn
    num_shortened: int = 0  # prompts that had to be shortened

    def success_after(self, episodes: int) -> bool:
        """Whether the task was solved within the first `episodes` episodes."""
        return self.won_in is not None and self.won_in < episodes

    def episodes_played(self) -> list[list[Turn]]:
        """The play turns, one list per episode."""
        played = [turn for turn in self.turns if turn.phase == "play"]
        return [*sets_by(lambda turn: turn.episode, played)]

    def rewards(self, kind: str = "env") -> list[list[float]]:
        """Rewards of the play turns, one list per episode played.

        With kind "success" only the win counts, with 10. Where early rewards are kept and a trial
        ends at the first win, a large gamma_traj can pay for putting the win off: the control.
        """
        if kind != "success":
            return [[turn.reward for turn in turns] for turns in self.episodes_played()]
        rewards = [[0.0] * len(turns) for turns in self.episodes_played()]
        if self.won_in is not None:
            rewards[-1][-1] = 10.0
        return rewards

    def __str__(self) -> str:
        """The trial as a person would read it."""
        outcome = "not solved" if self.won_in is None else f"solved in episode {self.won_in + 1}"
        lines = [f"=== task {self.seed}: {outcome}"]
        for turn in self.turns:
            lines.append(f"--- episode {turn.episode + 1}, {turn.phase}\n{turn.observation}")
            reply = f">>> {turn.reply}"
            if not turn.is_valid:
                reply += "  [not valid]"
            if turn.phase == "play":
                reply += f"  [reward {turn.reward:g}]"
            lines.append(reply)
        return "\n".join(lines)


class Prompt(NamedTuple):
    """What a trial yields."""

    phase: str  # "play" or "reflect"
    ids: list[int]
    is_shortened: bool = False  # it would have been longer than --max_prompt


class Reply(NamedTuple):
    """What a sampler sends back into a trial."""

    ids: list[int]
    logps: list[float]
    text: str


MEMORIES = ("none", "history", "reflection", "both")


def run_trial(
    env: Env,
    seed: int,
    episodes: int,
    chat: Any,
    memory: str = "reflection",
    style: str = "full",
    max_prompt: int = 2048,
    borrowed: Sequence[PastEpisode] | None = None,
) -> Generator[Prompt, Reply, Trial]:
    """Play one trial: yields a Prompt, receives a Reply, returns the Trial.

    `chat` turns text into token ids (sampler.Chat). `memory` says what later episodes see of a
    failed one; with "none" the episodes are independent attempts. `borrowed` is what they see
    instead, from a trial of another task: the control that shows whether memory is used.
    """
    trial = Trial(seed, episodes)
    for episode in range(episodes):
        initial, _ = env.reset(seed=seed)
        trial.task_key = env.task_key() or f"seed {seed}"
        past = trial.past if borrowed is None else borrowed[:episode]
        observation, records, done = initial, [], False
        while not done:
            state = env.anchor()
            anchor = observation if state is None else state
            write = partial(play_prompt, env, style, memory, initial, past, episode, records)
            prompt = fit("play", write, chat, env.history_length, len(past), max_prompt)
            turn = yield from ask(trial, episode, prompt, observation, anchor)
            action, turn.is_valid = env.parse(turn.reply)
            observation, reward, terminated, truncated, info = env.step(action)
            done = terminated or truncated or len(records) + 1 >= env.turn_limit
            turn.action, turn.reward = str(action), float(reward)
            records.append((turn.action, observation, done))
        trial.info = info
        if info.get("won", terminated and reward > 0):  # a plain Gymnasium game may not say "won"
            trial.won_in = episode
        if trial.won_in is not None or episode + 1 == episodes:
            return trial
        reflection = ""
        if memory in ("reflection", "both"):
            write = partial(reflection_prompt, env, style, initial, episode, records)
            prompt = fit("reflect", write, chat, len(records), 0, max_prompt)
            turn = yield from ask(trial, episode, prompt, observation, "reflection")
            reflection, turn.is_valid = parse_reflection(turn.reply)
        trial.past.append(PastEpisode(records, reflection))


def ask(
    trial: Trial, episode: int, prompt: Prompt, observation: str, anchor: str
) -> Generator[Prompt, Reply, Turn]:
    """One model call: yields the prompt, receives the reply, adds the Turn to the trial."""
    reply = yield prompt
    turn = Turn(
        episode=episode,
        phase=prompt.phase,
        prompt_ids=prompt.ids,
        reply_ids=reply.ids,
        logps=reply.logps,
        reply=reply.text,
        observation=observation,
        anchor=anchor,
    )
    trial.turns.append(turn)
    trial.num_shortened += int(prompt.is_shortened)
    return turn


def parse_reflection(reply: str) -> tuple[str, bool]:
    """The text inside <remark> </remark>, cut at 2,000 characters, and whether both tags stood."""
    text = between(reply, "<remark>", "</remark>")
    return (text or "").strip()[:2000], text is not None


# ---------------------------------------------------------------------------- the prompts


def fit(
    phase: str,
    write: Callable[[int, int], str],
    chat: Any,
    history: int,
    num_past: int,
    max_prompt: int,
) -> Prompt:
    """Encode what `write(history, forget)` gives, cut to max_prompt tokens.

    A prompt over the limit first loses its oldest history, then the oldest of the `num_past`
    remembered episodes, at last its own middle.
    """
    cuts = [(length, 0) for length in range(max(1, history), 0, -1)]
    cuts += [(1, forget) for forget in range(1, num_past + 1)]
    for cut in cuts:
        ids = chat.encode(write(*cut))
        if len(ids) <= max_prompt:
            return Prompt(phase, ids, is_shortened=cut != cuts[0])
    half = max_prompt // 2
    return Prompt(phase, ids[:half] + ids[half - max_prompt :], is_shortened=True)


def play_prompt(
    env: Env,
    style: str,
    memory: str,
    initial: str,
    past: Sequence[PastEpisode],
    episode: int,
    records: Records,
    history: int = 7,
    forget: int = 0,
) -> str:
    """The prompt of one play turn: s_t(n) and the memory H(n).

    "full" asks for reasoning before the action, "direct" for the action alone. "compact" has the
    same sections in the same order for the tiny policy, in a form a small model can learn within
    minutes: a reflection that redraws a board stands at a constant distance from the present one.
    `history` turns are shown of an episode; the oldest `forget` episodes are left out.
    """
    # What is fixed stands first, what changes last, since the sampler re-uses common prefixes.
    sections = [env.rules("compact" if style == "compact" else "full")]
    if style != "compact":
        sections.append(f"The task at the start:\n{initial}")
    seen = past[forget:] if memory != "none" else ()
    for number, old in enumerate(seen, start=forget + 1):
        events, note = "", ""
        if memory in ("history", "both"):
            events = format_history(env, old.records, env.history_observations, history)
        if memory in ("reflection", "both"):
            note = old.reflection
        if style == "compact":
            sections += ["memory", events, note]
            continue
        sections.append(f"Episode {number} did not solve the task.")
        if events:
            sections.append(f"What happened in it:\n{events}")
        if note:
            sections.append(f"What you noted for the next episodes:\n{note}")
    options = env.actions()
    choices = "You can choose from: " + ", ".join(options) if options else ""
    if style == "compact":
        sections += ["now", env.brief(initial, records[-history:], choices), "act"]
        return join("\n", sections)
    if seen:
        sections.append(f"This is episode {episode + 1}, again from the start.")
    if records:
        so_far = format_history(env, records, env.history_observations, history)
        sections.append(f"What you did so far in this episode:\n{so_far}")
    ask = "Give only" if style == "direct" else "Think step by step, then give"
    sections += [choices, f"{ask} {env.action_format}."]
    return join("\n\n", sections)


def reflection_prompt(
    env: Env,
    style: str,
    initial: str,
    episode: int,
    records: Records,
    history: int = 7,
    forget: int = 0,  # earlier episodes are not shown: nothing to forget
) -> str:
    """The prompt for a reflection on the episode just failed."""
    if style == "compact":
        sections = [env.rules("compact"), initial if env.plans_from_start else "", "now"]
        sections += [env.brief(initial, records[-history:]), "reflect"]
        return join("\n", sections)
    sections = [
        env.rules("full"),
        f"The task at the start:\n{initial}",
        f"Below is episode {episode + 1} of your attempts at this task. It did not solve it.",
        format_history(env, records, history, history),
        "Study it: what went wrong, and what did you find out? Then write what the next episode, "
        "from the same start, should know and do, briefly, inside <remark> </remark>.",
    ]
    return join("\n\n", sections)


def format_history(env: Env, records: Records, num_observations: int, length: int) -> str:
    """The last `length` records, the last `num_observations` of them with the whole observation.

    [("(2, 3)", "? 1", False)] -> "Action 1: (2, 3)\\nObservation 1:\\n? 1"
    """
    lines = []
    for i, (action, observation, done) in [*enumerate(records)][-length:]:
        is_recent = i >= len(records) - num_observations
        shown = f"\n{observation}" if is_recent else f" {env.shorten(observation)}"
        lines.append(f"Action {i + 1}: {action}\nObservation {i + 1}:{shown}")
        if done:
            break
    return "\n".join(lines)


def join(separator: str, sections: Iterable[str]) -> str:
    """The sections that are not empty."""
    return separator.join(filter(None, sections))


# ------------------------------------------------------------------------------- returns


def discounted(rewards: Sequence[float], gamma_step: float, tail: float = 0.0) -> list[float]:
    """Discounted sums from every turn on (eq. 1).

    `tail` stands where a next return would stand at the last turn, undiscounted.
    discounted([0, 0, 10], 0.5) == [2.5, 5.0, 10.0]
    """
    returns = []
    for reward in reversed(rewards):
        tail = reward + (gamma_step * tail if returns else tail)
        returns.append(tail)
    return returns[::-1]


def cross_episode_returns(
    rewards: Sequence[Sequence[float]], credit: str, gamma_step: float, gamma_traj: float
) -> list[list[float]]:
    """G_t(n) of every play turn, for rewards[n][t] (eq. 2).

    paper:    G_t(n) = g_t(n) + sum_{m>n} gamma_traj^(m-n) g_0(m)
    official: one recursion, so that gamma_step also discounts what comes from later episodes
    """
    returns: list[list[float]] = []
    later = 0.0  # gamma_traj-discounted value of all that follows the episode
    for episode in reversed(rewards):
        if credit == "official":
            returns.append(discounted(episode, gamma_step, later))
        else:
            returns.append([g + later for g in discounted(episode, gamma_step)])
        later = gamma_traj * returns[-1][0]
    return returns[::-1]


def compute_returns(
    trials: Iterable[Trial],
    credit: str,
    gamma_step: float,
    gamma_traj: float,
    reward: str = "env",
) -> None:
    """Set `ret` of every turn: the cross-episode return, for `reward` see Trial.rewards.

    A reflection gets G_0 of the episode it prepares, undiscounted (eq. 3).
    """
    for trial in trials:
        returns = cross_episode_returns(trial.rewards(reward), credit, gamma_step, gamma_traj)
        played = chain.from_iterable(returns)
        for turn in trial.turns:
            turn.ret = next(played) if turn.phase == "play" else returns[turn.episode + 1][0]


# ----------------------------------------------------------------------------- advantages

ESTIMATORS = ("reinforce", "rloo", "grpo", "gigpo", "ppo")
NORM_OF = {"rloo": "leave_one_out", "grpo": "mean_std"}  # what these are; the others have a choice


def compute_advantages(
    groups: Iterable[Sequence[Trial]],
    estimator: str,
    advantage_norm: str = "mean",
    step_weight: float = 1.0,
) -> None:
    """Set `advantage` of every turn (eq. 4); a group is the trials of one task.

    Episode and phase are part of every key: memory differs between episodes, so equal boards are
    not equal states, and a baseline over all episodes would punish the very action that made the
    next one succeed.

    reinforce: G minus the mean over the group's trials of the mean G of the trial's turns in the
               same episode and phase, so a trial of many turns weighs as much as one of few;
               rloo: minus that of the other trials; grpo: also divided by the standard deviation
               over all these turns.
    gigpo:     E + step_weight * P. E: the member's G_0(n) minus the mean over members that played
               episode n. P: G minus its mean over rows with the same episode and anchor. For a
               reflection, which is no step of an episode, P alone, with weight 1.
    ppo:       see `ppo_advantages`.
    """
    norm = NORM_OF.get(estimator, advantage_norm)
    for group in groups:
        turns = [turn for trial in group for turn in trial.turns]
        for turn in turns:
            turn.advantage = 0.0
        if estimator != "gigpo":
            keyed = [(i, turn) for i, trial in enumerate(group) for turn in trial.turns]
            for same in sets_by(lambda pair: (pair[1].episode, pair[1].phase), keyed):
                members = sets_by(lambda pair: pair[0], same)  # one for each trial
                subtract_baseline([[turn for _, turn in pairs] for pairs in members], norm)
            continue
        for same in sets_by(lambda turn: (turn.episode, turn.phase, turn.anchor), turns):
            weight = step_weight if same[0].phase == "play" else 1.0
            add_centered(same, [turn.ret for turn in same], norm, weight)
        played = [turns for trial in group for turns in trial.episodes_played()]
        for members in sets_by(lambda turns: turns[0].episode, played):
            starts = [turns[0].ret for turns in members]
            for turns, value in zip(members, center(starts, norm), strict=True):
                for turn in turns:
                    turn.advantage += value


def center(values: Sequence[float], norm: str = "mean") -> list[float]:
    """Values minus their mean; a set of one gives 0, never NaN.

    norm "mean_std" also divides by (std + 1e-6); "leave_one_out" takes the mean of the others.
    """
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2 or array.max() == array.min():
        return [0.0] * len(array)
    array = array - array.mean()
    if norm == "mean_std":
        array = array / (array.std(ddof=1) + 1e-6)
    elif norm == "leave_one_out":
        array = array * (len(array) / (len(array) - 1))
    return array.tolist()


def subtract_baseline(members: Sequence[Sequence[Turn]], norm: str) -> None:
    """Set advantages on one set: `members` are its turns, trial by trial; 0 where all are equal."""
    returns = [turn.ret for turns in members for turn in turns]
    if len(members) < 2 or max(returns) == min(returns):
        return
    means = [float(np.mean([turn.ret for turn in turns])) for turns in members]
    scale = np.std(returns, ddof=1) + 1e-6 if norm == "mean_std" else 1.0
    for turns, mean in zip(members, means, strict=True):
        baseline = sum(means) / len(means)
        if norm == "leave_one_out":
            baseline = (sum(means) - mean) / (len(means) - 1)
        for turn in turns:
            turn.advantage = float((turn.ret - baseline) / scale)


def add_centered(
    turns: Sequence[Turn], values: Sequence[float], norm: str, weight: float = 1.0
) -> None:
    """Add the centered values, times weight, to the turns' advantages."""
    for turn, value in zip(turns, center(values, norm), strict=True):
        turn.advantage += weight * value


def sets_by(key: Callable[[Any], Any], items: Iterable[Any]) -> Iterable[list[Any]]:
    """The items in sets of equal key, in the order in which keys first appear."""
    sets = defaultdict(list)
    for item in items:
        sets[key(item)].append(item)
    return sets.values()


def penalize_invalid(trials: Sequence[Trial], penalty: float, device: torch.device | str) -> None:
    """Take the penalty from the advantage of every reply that could not be parsed.

    Centred by phase over the step of all processes: A -= penalty * (is_invalid - share invalid).
    Through the baselines above it would vanish where a turn is alone in its set; uncentred it
    would push on noise where all replies are invalid.
    """
    for phase in ("play", "reflect"):
        turns = [turn for trial in trials for turn in trial.turns if turn.phase == phase]
        num_invalid = sum(1 for turn in turns if not turn.is_valid)
        num_invalid, num_turns = all_reduce_sum([num_invalid, len(turns)], device)
        for turn in turns:
            share = num_invalid / num_turns
            turn.advantage -= penalty * ((0.0 if turn.is_valid else 1.0) - share)


# Beside the paper's default: a learned value, and the choices of the official code


@torch.no_grad()
def compute_values(policy: "Policy", trials: Iterable[Trial], config: Any) -> None:
    """Set `value` of every turn: what the value head sees in the state after its prompt."""
    turns = [turn for trial in trials for turn in trial.turns]

    def set_values() -> None:
        for batch in micro_batches(policy, turns, config.microbatch_tokens):
            for turn, value in zip(batch, policy(batch).values.tolist(), strict=True):
                turn.value = value

    within_memory(policy, config, set_values)


def ppo_advantages(
    trials: Iterable[Trial], gamma_step: float, gamma_traj: float, gae_lambda: float = 1.0
) -> None:
    """Set `advantage` of every turn by generalised advantage estimation along the trial.

    A turn's discount to the next is gamma_step inside an episode, gamma_traj at its end, 1 from a
    reflection to the episode it prepares. With lambda 1 that is G - V, for either credit; below 1
    it needs credit "official", the one that is a recursion.
    """
    for trial in trials:
        advantage = ret_after = value_after = gamma = 0.0
        pairs = zip(trial.turns, [*trial.turns[1:], None], strict=True)
        for turn, after in reversed([*pairs]):
            if after is not None and turn.phase == "reflect":
                gamma = 1.0
            elif after is not None:
                is_inside = after.episode == turn.episode and after.phase == "play"
                gamma = gamma_step if is_inside else gamma_traj
            reward = turn.ret - gamma * ret_after
            error = reward + gamma * value_after - turn.value
            advantage = error + gamma * gae_lambda * advantage
            turn.advantage, turn.value_target = advantage, advantage + turn.value
            ret_after, value_after = turn.ret, turn.value


def official_advantages(
    groups: Iterable[Sequence[Trial]],
    estimator: str,
    advantage_norm: str = "mean",
    step_weight: float = 1.0,
    invalid_penalty: float = 0.5,
    reward: str = "env",
) -> None:
    """Set `advantage` of every turn as the official code does, a group's rows in one pot.

    E compares the plain reward of the turn's episode (0 for a reflection) minus the penalty with
    that of all rows of the group, so the return across episodes reaches only gigpo's P, which
    pools equal anchors of all episodes and knows no penalty. A group of one row keeps its score.
    (github.com/mlbio-epfl/LaMer, gigpo/core_gigpo.py.)
    """
    norm = NORM_OF.get(estimator, advantage_norm)
    for group in groups:
        turns, scores = [], []
        for trial in group:
            totals = [sum(episode) for episode in trial.rewards(reward)]
            for turn in trial.turns:
                total = totals[turn.episode] if turn.phase == "play" else 0.0
                turns.append(turn)
                scores.append(total - (0.0 if turn.is_valid else invalid_penalty))
        if len(scores) > 1:
            scores = center(scores, norm)
        for turn, score in zip(turns, scores, strict=True):
            turn.advantage = score
        if estimator == "gigpo":
            for same in sets_by(lambda turn: turn.anchor, turns):
                add_centered(same, [turn.ret for turn in same], norm, step_weight)


# ----------------------------------------------------------------------------- the policy


class PrefixTree(NamedTuple):
    """Rows of token ids in which a shared prefix stands once; see `prefix_tree`."""

    ids: list[int]  # (N,) the token of every node
    depths: list[int]  # (N,) its position in the rows that pass through it
    parents: list[int]  # (N,) the node before it; -1 at the start of a row
    ends: list[int]  # (N,) its descendants are the nodes up to here, this one excluded
    paths: list[list[int]]  # for every row, in the order given, the nodes of its tokens


def prefix_tree(rows: Sequence[Sequence[int]]) -> PrefixTree:
    """Merge rows of token ids where they begin alike.

        A  7 8 5      7 - 8 - 5         node     0  1  2  3  4      path of A  0 1 2
        B  7 8 6 2        |             token    7  8  5  6  2      path of B  0 1 3 4
        C  7 8 6          6 - 2         depth    0  1  2  2  3      path of C  0 1 3
                                        parent  -1  0  1  1  3
                                        end      5  5  3  5  5

    What a causal model computes at a token depends on nothing but the tokens before it, so a node
    serves all rows that pass through it. Nodes are numbered along the sorted rows: each row shares
    as much with the one before it as with any, and what descends from a node stands right behind
    it. So node j sees node i if i <= j < ends[i].
    """
    tree = PrefixTree([], [], [], [], [[] for _ in rows])
    before: Sequence[int] = []
    path: list[int] = []  # of the row before
    for number in sorted(range(len(rows)), key=rows.__getitem__):
        row, size = rows[number], len(tree.ids)
        shared = common_prefix(before, row)
        for node in path[shared:]:
            tree.ends[node] = size
        new = range(size, size + len(row) - shared)
        path = [*path[:shared], *new]
        tree.ids.extend(row[shared:])
        tree.depths.extend(range(shared, len(row)))
        tree.parents.extend([-1, *path][shared:-1])
        tree.ends.extend([0] * len(new))
        tree.paths[number] = path
        before = row
    for node in path:
        tree.ends[node] = len(tree.ids)
    return tree


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    limit = min(len(a), len(b))
    if a[:limit] == b[:limit]:
        return limit
    return next(i for i in range(limit) if a[i] != b[i])


def micro_batches(policy: Any, turns: Iterable[Turn], max_tokens: int) -> list[list[Turn]]:
    """Turns in batches whose trees have at most max_tokens nodes, or of one turn.

    In sorted order, so that turns with much in common meet. The policy may know a lower bound.
    """
    turns = list(turns)
    max_tokens = min(max_tokens, unwrap(policy).most_nodes(turns))
    batches: list[list[Turn]] = []
    size, before = max_tokens, []
    for turn in sorted(turns, key=Turn.token_ids):
        row = turn.token_ids()
        size += len(row) - common_prefix(before, row)
        if size > max_tokens or not batches:
            batches.append([])
            size = len(row)
        batches[-1].append(turn)
        before = row
    return batches


class PolicyOutput(NamedTuple):
    """For a batch of turns with T reply tokens in all."""

    logps: Tensor  # (T,) log-probabilities of the reply tokens, turn by turn
    entropies: Tensor  # (T,) of the distributions they were drawn from
    values: Tensor | None  # (B,) estimates of the returns, where there is a value head


class Policy(torch.nn.Module):
    """The language model as training sees it: turns in, log-probabilities of their replies out.

    All that has a gradient happens in `forward`, so DistributedDataParallel can wrap it. Weights
    are fp32; with `bf16` products are computed in bfloat16 under autocast.
    """

    def __init__(
        self,
        model: Any,
        vocab_size: int,
        temperature: float = 1.0,
        bf16: bool = False,
        value_head: torch.nn.Linear | None = None,
    ):
        super().__init__()
        self.model, self.value_head = model, value_head
        self.vocab_size, self.temperature, self.bf16 = vocab_size, temperature, bf16
        self.chunk = max(1, 2**26 // vocab_size)  # tokens: 256 MB of fp32 logits at a time
        self.takes_trees = True  # until `check_trees` finds otherwise

    def forward(self, turns: Sequence[Turn], need_entropy_grad: bool = False) -> PolicyOutput:
        """Score the replies of a batch of turns, on their prefix tree.

        Only the states that predict reply tokens reach the output layer, in chunks that are
        recomputed in the backward pass: the logits of a whole batch never exist.
        """
        device = self.model.device
        tree = prefix_tree([turn.token_ids() for turn in turns])
        ids, parents = torch.tensor([tree.ids, tree.parents], device=device)  # (N,), (N,)
        pairs = [(len(turn.prompt_ids), p) for turn, p in zip(turns, tree.paths, strict=True)]
        replies = torch.tensor([node for start, path in pairs for node in path[start:]])  # (T,)
        # Turns that replied alike so far share the prediction of the next token, too.
        nodes, where = replies.to(device).unique(return_inverse=True)  # (U,), (T,)

        # Autocast would keep the bf16 copy of every weight it casts; each is used once a pass.
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            hidden = self.hidden_states(tree)  # (N, h)
            states = hidden[parents[nodes]].split(self.chunk)  # of (C, h)
            chunks = [*zip(states, ids[nodes].split(self.chunk), strict=True)]
            score = partial(self.score, need_entropy_grad=need_entropy_grad)
            if len(chunks) > 1:
                score = partial(checkpoint, score, use_reentrant=False)
            scored = [score(*chunk) for chunk in chunks]
        logps, entropies = (torch.cat(parts)[where] for parts in zip(*scored, strict=True))  # (T,)
        values = None
        if self.value_head is not None:  # detached: values must not move the policy
            last = [path[start - 1] for start, path in pairs]
            values = self.value_head(hidden[last].detach().float())[:, 0]  # (B,)
        return PolicyOutput(logps, entropies, values)

    def hidden_states(self, tree: PrefixTree) -> Tensor:
        """The decoder's states at the nodes of a tree (N, h), in one pass.

        Positions are depths, and a mask shows each node its ancestors and itself.
        """
        device = self.model.device
        ids, depths, ends = torch.tensor([tree.ids, tree.depths, tree.ends], device=device)
        mask = None
        if len(tree.paths) > 1:  # one row alone is what the model expects
            node = torch.arange(len(ids), device=device)
            is_hidden = (node > node[:, None]) | (node[:, None] >= ends)  # (N, N)
            dtype = torch.bfloat16 if self.bf16 else self.model.dtype
            mask = torch.zeros(is_hidden.shape, dtype=dtype, device=device)
            mask = mask.masked_fill_(is_hidden, torch.finfo(dtype).min)[None, None]
        output = self.model.get_decoder()(
            input_ids=ids[None],
            position_ids=depths[None],
            attention_mask=mask,
            use_cache=False,
        )
        return output.last_hidden_state[0]

    def most_nodes(self, turns: Sequence[Turn]) -> int:
        """The size of a tree from which on attention, its square, costs what more sharing saves.

        Where attention costs as much as all the rest at c nodes, turns that share s tokens are
        cheapest in trees of s + sqrt(s^2 + cs): about 2s + c/2. Measured on CPUs, c is about twice
        the model's width; s is at most the length of a turn.
        """
        if not self.takes_trees:
            return 0
        mean = sum(len(turn.token_ids()) for turn in turns) // max(1, len(turns))
        return max(512, 2 * mean + self.model.config.get_text_config().hidden_size)

    @torch.no_grad()
    def check_trees(self, ids: Sequence[int]) -> None:
        """See whether the model takes mask and positions as given, on two turns that fork.

        `ids` is a real prompt. If not (layers with a window or a state of their own, positions
        counted by themselves), every turn is computed alone.
        """
        half = len(ids) // 2
        turns = [make_turn(ids[:half], ids[half:]), make_turn(ids[:half], ids[half + 1 :])]
        bf16, self.bf16 = self.bf16, False  # what rounds little shows little mistakes
        alone = torch.cat([self(turns[:1]).logps, self(turns[1:]).logps])
        try:
            self.takes_trees = torch.allclose(self(turns).logps, alone, rtol=1e-4, atol=1e-4)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # every architecture fails in a way of its own
            self.takes_trees = False
        self.bf16 = bf16
        if not self.takes_trees:
            print0("this model takes no mask of ours: the update computes every turn alone")

    def score(
        self, states: Tensor, targets: Tensor, need_entropy_grad: bool
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the targets and entropies: (C, h), (C,) -> (C,), (C,)."""
        logits = self.model.get_output_embeddings()(states)[:, : self.vocab_size].float()
        if self.temperature != 1:  # with a large vocabulary every pass over (C, V) costs
            logits = logits / self.temperature
        logps = logits.log_softmax(-1)  # (C, V)
        is_needed = torch.is_grad_enabled() and need_entropy_grad
        with torch.set_grad_enabled(is_needed), torch.autocast(states.device.type, enabled=False):
            entropies = -torch.einsum("cv,cv->c", logps.exp(), logps)  # (C,)
        return logps.gather(-1, targets[:, None])[:, 0], entropies


# ----------------------------------------------------------------------------- the update


def clipped_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, clip: float = 0.2, dual_clip: float = 0.0
) -> tuple[Tensor, Tensor]:
    """PPO's clipped objective per token, as a loss, and where `clip` was active: (T,), (T,) bool.

    `dual_clip` c > 1 also bounds the loss of a token with negative advantage by -c A, however
    likely it has become; 0 is off. (eq. 5)
    """
    ratio = (logps - old_logps).clamp(-20, 20).exp()  # inf * 0 would be NaN
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    losses = torch.maximum(plain, clipped)
    if dual_clip:
        bounded = torch.minimum(losses, -dual_clip * advantages)
        losses = torch.where(advantages < 0, bounded, losses)
    return losses, clipped > plain


def kl_estimate(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """k3, exp(-d) - 1 + d with d = logps - ref_logps: an estimate per token of KL(policy || ref).

    From tokens the policy drew (Schulman 2020). Capped at 10, as in the official code.
    """
    d = (logps - ref_logps).clamp(min=-20)  # far beyond the cap; inf would make its gradient NaN
    return (torch.expm1(-d) + d).clamp(max=10)


def update(
    policy: Policy | DistributedDataParallel,
    optimizer: torch.optim.Optimizer,
    minibatches: Sequence[Sequence[Turn]],
    config: Any,
    reference: Policy | None = None,
) -> dict[str, float]:
    """One pass of policy gradient, an optimizer step for every mini-batch; returns what to log.

    `minibatches` holds this process' turns of each, maybe none. From `config`: clip, dual_clip,
    entropy_coef, kl_coef (weight of the KL to the `reference`), grad_clip, microbatch_tokens.
    """
    device = next(policy.parameters()).device
    policy.train()
    set_old_logps(policy, list(chain.from_iterable(minibatches)), config)
    rows: list[Tensor] = []  # a mini-batch each: tokens, turns, sums of the STATISTICS
    norms: list[float] = []
    for turns in minibatches:
        counts = all_reduce_sum([count_tokens(turns), len(turns)], device)
        if counts[0] == 0:
            continue
        gradient = partial(add_gradient, policy, turns, *counts, config, reference)
        rows.append(within_memory(policy, config, gradient))
        norms.append(optimizer_step(policy, optimizer, config.grad_clip))
    policy.eval()
    return update_statistics(rows, norms, device)


def add_gradient(
    policy: Policy | DistributedDataParallel,
    turns: Sequence[Turn],
    num_tokens: float,
    num_turns: float,
    config: Any,
    reference: Policy | None,
) -> Tensor:
    """Add the gradient of one mini-batch; returns its row of statistics, of this process' turns.

    The loss is a sum over tokens divided by their number over all processes, so that neither
    micro-batches nor the number of processes change the result.
    """
    device, world = next(policy.parameters()).device, world_size()
    row = torch.zeros(2 + len(STATISTICS), dtype=torch.float64, device=device)
    row[0], row[1] = count_tokens(turns), len(turns)
    with local_gradients(policy):
        for batch, is_flat in batches_by_gradient(policy, turns, config):
            with torch.set_grad_enabled(not is_flat):
                logps, entropies, values = policy(batch, config.entropy_coef != 0)
                sampled, old_logps, advantages = per_token(batch, device)  # (T,) each
                losses, is_clipped = clipped_loss(
                    logps, old_logps, advantages, config.clip, config.dual_clip
                )
                ref_kls = kl_to_reference(logps, reference, batch)  # (T,)
                errors = value_errors(values, batch, device)  # (B,)
                loss = losses - config.entropy_coef * entropies + config.kl_coef * ref_kls
                loss = loss.sum() / num_tokens + errors.sum() / num_turns
            if not is_flat:
                (loss * world).backward()  # DDP averages over processes; this is a sum
            change = (logps.detach() - old_logps).clamp(-20, 20)
            approx_kls = change.expm1() - change  # k3 of KL(old policy || policy)
            gaps = (logps - sampled).abs()
            logged = losses, entropies, is_clipped, approx_kls, ref_kls, errors, gaps
            row[2:] += torch.stack([each.detach().sum().double() for each in logged])
    return row


def batches_by_gradient(
    policy: Any, turns: Sequence[Turn], config: Any
) -> Iterator[tuple[list[Turn], bool]]:
    """Micro-batches, and whether the loss is flat there: then no backward pass is needed.

    It is where the advantage is exactly 0, unless entropy, KL or a value have a part in it. Such
    turns stay in all counts and statistics.
    """
    is_alone = not config.entropy_coef and not config.kl_coef and unwrap(policy).value_head is None
    flat = [turn for turn in turns if is_alone and turn.advantage == 0]
    steep = [turn for turn in turns if not is_alone or turn.advantage != 0]
    for batch in micro_batches(policy, steep, config.microbatch_tokens):
        yield batch, False
    for batch in micro_batches(policy, flat, config.microbatch_tokens):
        yield batch, True


def per_token(turns: Iterable[Turn], device: torch.device) -> Tensor:
    """Of all reply tokens sampled and old log-probabilities, and advantages: (3, T).

    Every token of a reply carries its turn's advantage.
    """
    sampled = [logp for turn in turns for logp in turn.logps]
    old_logps = [logp for turn in turns for logp in turn.old_logps]
    advantages = [turn.advantage for turn in turns for _ in turn.reply_ids]
    return torch.tensor([sampled, old_logps, advantages], device=device)


def kl_to_reference(logps: Tensor, reference: Policy | None, turns: Sequence[Turn]) -> Tensor:
    """The estimate of KL(policy || reference) per reply token (T,); 0 without a reference."""
    if reference is None:
        return torch.zeros_like(logps)
    with torch.no_grad():
        ref_logps = reference(turns).logps
    return kl_estimate(logps, ref_logps)


def value_errors(values: Tensor | None, turns: Sequence[Turn], device: torch.device) -> Tensor:
    """Half the squared errors of a value head (B,); 0 without one."""
    if values is None:
        return torch.zeros(len(turns), device=device)
    targets = torch.tensor([turn.value_target for turn in turns], device=device)
    return (values - targets) ** 2 / 2


STATISTICS = ("loss", "entropy", "clip_fraction", "approx_kl", "ref_kl", "value_loss")
STATISTICS += ("sampler_gap",)


def update_statistics(
    rows: Sequence[Tensor], norms: Sequence[float], device: torch.device
) -> dict[str, float]:
    """Means over the tokens (value_loss: the turns) of all processes, from this one's rows.

    sampler_gap: how far the log-probabilities are from the sampled ones, before the first step.
    """
    flat = all_reduce_sum(torch.stack(rows).flatten().tolist(), device)
    table = np.array(flat).reshape(len(rows), -1)  # (mini-batches, 2 + statistics)
    (num_tokens, num_turns), sums = table[:, :2].sum(0), table[:, 2:].sum(0)
    stats = dict(zip(STATISTICS, (sums / num_tokens).tolist(), strict=True))
    stats["value_loss"] *= num_tokens / num_turns
    stats["sampler_gap"] = table[0, -1] / table[0, 0]
    finite = [norm for norm in norms if math.isfinite(norm)]
    stats["grad_norm"] = sum(finite) / max(1, len(finite))
    return stats | {"updates": len(finite), "skipped": len(norms) - len(finite)}


def set_old_logps(policy: Any, turns: Sequence[Turn], config: Any) -> None:
    """Set `old_logps` of every turn, what ratios are measured against.

    In fp32 they are the sampled ones. In bf16 sampler and trainer round differently, and a ratio
    must begin at 1: there they are the trainer's, before the update.
    """
    if unwrap(policy).bf16:
        score(policy, turns, config)
        return
    for turn in turns:
        turn.old_logps = turn.logps


@torch.no_grad()
def score(policy: Any, turns: Sequence[Turn], config: Any) -> None:
    """Set `old_logps` of every turn to what the policy gives its reply tokens."""

    def set_logps() -> None:
        for batch in micro_batches(policy, turns, config.microbatch_tokens):
            logps = policy(batch).logps.split([len(turn.reply_ids) for turn in batch])
            for turn, new in zip(batch, logps, strict=True):
                turn.old_logps = new.tolist()

    within_memory(policy, config, set_logps)


def prompt_gap(policy: Any, trials: Sequence[Trial], config: Any) -> float | None:
    """How much likelier a reply is after its own prompt than after another task's, in nats.

    The mean over the last turns of all trials, which have the most to go by. Near 0 the policy no
    longer reads. None where all their prompts are alike.
    """
    last = [trial.turns[-1] for trial in trials]
    own, swapped = [], []
    for i, turn in enumerate(last):
        others = (each.prompt_ids for each in last[i + 1 :] + last[:i])
        other = next((ids for ids in others if ids != turn.prompt_ids), None)
        if other is not None:
            own.append(make_turn(turn.prompt_ids, turn.reply_ids))
            swapped.append(make_turn(other, turn.reply_ids))
    score(policy, own + swapped, config)
    totals = [sum(sum(turn.old_logps) for turn in turns) for turns in (own, swapped)]
    num_turns, with_own, with_other = all_reduce_sum([len(own), *totals], config.device)
    return (with_own - with_other) / num_turns if num_turns else None


def optimizer_step(policy: Any, optimizer: torch.optim.Optimizer, max_norm: float) -> float:
    """Sum gradients over processes, clip the model's, step; returns the norm before clipping.

    A gradient that is not finite, the same on every process, does not reach the weights.
    """
    synchronize(policy)
    model, value_head = unwrap(policy).model, unwrap(policy).value_head
    for weight in model.parameters():
        if weight.grad is None:  # of a mini-batch without any gradient, which moves by momentum
            weight.grad = torch.zeros_like(weight)
    norm = clip_grad_norm_(model.parameters(), max_norm).item()
    if value_head is not None:  # not clipped, and no part of the norm, unless it is broken
        head_norm = get_total_norm([p.grad for p in value_head.parameters()])
        norm = norm if head_norm.isfinite() else math.inf
    if math.isfinite(norm):
        optimizer.step()
    clear_gradients(policy)
    return norm


def clear_gradients(policy: Any) -> None:
    """With DDP gradients are views into its buckets; None would make a second copy of them."""
    policy.zero_grad(set_to_none=not isinstance(policy, DistributedDataParallel))


def synchronize(policy: Any) -> None:
    """Sum gradients over processes: one backward pass that DDP sees, of zeros.

    All that `local_gradients` left in .grad is reduced with it. The token it computes is in no
    count and no statistic.
    """
    if isinstance(policy, DistributedDataParallel):
        outputs = [output for output in policy([make_turn([0], [0])]) if output is not None]
        (sum(output.sum() for output in outputs) * 0).backward()


def local_gradients(policy: Any) -> Any:
    """Backward passes in this block add to this process' own gradients, without all-reduce.

    So processes may have different numbers of micro-batches. The forward must be inside, too.
    """
    return policy.no_sync() if isinstance(policy, DistributedDataParallel) else nullcontext()


LEAST_MICROBATCH = 256  # tokens; what needs more memory than that has no room to train


def within_memory(policy: Any, config: Any, compute: Callable[[], Any]) -> Any:
    """What `compute()` returns; where memory runs out, again with half the micro-batches.

    All processes call it and, if one runs out, all begin anew, without gradients, so that they
    stay alike and none waits for another. The smaller `microbatch_tokens` stays in the config.
    """
    while True:
        result, problem = None, ""
        try:
            result = compute()
        except torch.OutOfMemoryError as error:
            problem = f"{error}" or "?"  # the error itself keeps tensors alive
        [num_failed] = all_reduce_sum([1.0 if problem else 0.0], config.device)
        if not num_failed:
            return result
        if config.microbatch_tokens // 2 < LEAST_MICROBATCH:
            raise torch.OutOfMemoryError(problem or "another process ran out of memory")
        config.microbatch_tokens //= 2
        clear_gradients(policy)
        if config.device == "cuda":
            torch.cuda.empty_cache()
        print0(f"out of memory: going on with --microbatch_tokens {config.microbatch_tokens}")


def unwrap(policy: Policy | DistributedDataParallel) -> Policy:
    """The policy inside DDP; the policy itself where there is one process."""
    return policy.module if isinstance(policy, DistributedDataParallel) else policy


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(text: str) -> None:
    """Say something to the user, from the first process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, file=sys.stderr)


def all_reduce_sum(values: Sequence[float], device: torch.device | str) -> list[float]:
    """Sum numbers over all processes; the same list where there is only one."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def count_tokens(turns: Iterable[Turn]) -> int:
    """Reply tokens, the ones that are trained."""
    return sum(len(turn.reply_ids) for turn in turns)

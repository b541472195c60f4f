"""Environments: Lockbox, MineSweeper, Sokoban, and the small interface that any other text environment can fill.

LaMer trains on *trials*: several episodes of the same task from the same initial state. So the one rule every
environment here keeps is that `reset(seed)` with the same seed gives the same task and the same initial state, on
every machine and in every process; that is also how an episode is restarted. No global random state is read or
written, and no salted `hash`.

The rules follow the environments of LaMer's official code. Where those are odd (the last action of a turn alone
decides its reward, dead MineSweeper boards, levels that depend on a salted hash) the sensible rule is the default and
`original=True` gives the recorded behaviour. The README lists these differences.

    env = make_env("minesweeper", size=6, mines=3)
    observation, info = env.reset(seed=7)
    action, is_valid = env.parse("I try a corner. <action>(1, 1)</action>")
    observation, reward, terminated, truncated, info = env.step(action)

This file needs numpy only.
"""

import importlib.util
import inspect
import math
import random
import re
import sys
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^32) made from the parts, the same in every process: `derive_seed(7, 1) == derive_seed(7, 1)`."""
    return zlib.crc32(" ".join(map(str, parts)).encode())


def require(is_fine: bool, message: str) -> None:
    """An option that is not fine ends the program with this message."""
    if not is_fine:
        raise ValueError(message)


class Env:
    """Base class: Gymnasium's `reset` and `step`, plus what turns an environment into text, with defaults.

    A subclass must define `reset` and `step`; everything else may stay as it is. `info["won"]` says whether the task is
    solved. A trial ends at the first win.
    """

    name = "env"
    turn_limit = 10  # model calls per episode
    is_markov = False  # True: the last observation tells the whole state, so compact prompts leave out the history
    action_format = "one action inside <action> </action>"  # what the prompt asks for
    history_length = 7  # turns of an episode that play prompts show (official scripts)
    history_observations = 2  # the last of these with the whole observation, the others as `shorten` has it
    plans_from_start = False  # True: compact reflection prompts show the first observation, too
    warm_skill = 0.5  # skill of the scripted player that the built-in tiny policy is warm-started on
    warm_share = 1.0  # share of the turns after an episode's first that it is warm-started on

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        """Start the task that belongs to `seed` and return (observation, info)."""
        raise NotImplementedError(f"{type(self).__name__} has no reset(seed)")

    def step(self, action: Any) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Play one turn and return (observation, reward, terminated, truncated, info)."""
        raise NotImplementedError(f"{type(self).__name__} has no step(action)")

    def rules(self, style: str = "full") -> str:
        """The fixed text at the head of every prompt: role, rules, goal. Empty for style "compact" by convention."""
        return ""

    def parse(self, reply: str) -> tuple[Any, bool]:
        """Read an action from a reply: (action, is_valid). Must accept any text; never raises."""
        text = between(reply, "<action>", "</action>")
        return (text or "").strip(), text is not None

    def actions(self) -> list[str]:
        """The admissible actions, where the prompt should list them; empty where the rules already say them."""
        return []

    def shorten(self, observation: str) -> str:
        """How histories show an observation that is not among their last."""
        return "..."

    def gist(self, initial: str) -> str:
        """What compact prompts show of the first observation."""
        return initial

    def anchor(self) -> str | None:
        """Key of the present state for GiGPO's step groups; None takes the observation the turn was played from."""
        return None

    def scripted(self, skill: float, rng: random.Random, memory: Sequence[str] = ()) -> str:
        """A reply of the scripted player: with probability `skill` the expert's, else a novice's who reads `memory`."""
        raise NotImplementedError(f"{type(self).__name__} has no scripted player")

    def scripted_reflection(self, rng: random.Random) -> str:
        """The scripted player's reflection on the episode just ended."""
        return "<remark></remark>"

    def has_scripted_player(self) -> bool:
        """Whether the class defines `scripted`: the tiny policy's warm start and an evaluation's last row need it."""
        return type(self).scripted is not Env.scripted


def between(text: str, start: str, end: str) -> str | None:
    """The text from the first `start` to the last `end`; None if one is missing, "" if they stand the wrong way round.

    between("a <x> b </x> c", "<x>", "</x>") == " b "
    """
    i, j = text.find(start), text.rfind(end)
    return None if i < 0 or j < 0 else text[i + len(start) : max(j, i + len(start))]


# --------------------------------------------------------------------------------------------- Lockbox


class Lockbox(Env):
    """The smallest task in which exploring pays only in a later episode; test_lamer.py solves it exactly.

    Greedy play opens or leaves (see `rules`); across episodes one should peek first, then open.
    """

    name = "lockbox"
    turn_limit = 1
    is_markov = True
    warm_skill = 0.0
    action_format = "one action inside <action> </action>: open and a code, peek, or leave"

    def __init__(self, codes: int = 8):
        require(codes >= 2, f"lockbox needs at least 2 codes, got --codes {codes}")
        self.codes = codes

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        self.code = derive_seed("lockbox", seed) % self.codes + 1
        self.done, self.seen = False, None
        return f"A locked box. Codes 1 to {self.codes}.", {"won": False}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self.done:
            return "The episode is over.", 0.0, True, False, {"won": False}
        self.done, won = True, action == f"open {self.code}"
        verb, _, number = action.partition(" ")
        observations = {
            "open": "The box opens." if won else f"{number} is wrong.",
            "peek": f"The code is {self.code}.",
            "leave": "You leave.",
        }
        self.seen = self.code if won or verb == "peek" else None
        reward = 10.0 if won else float(verb == "leave")
        return observations.get(verb, "Nothing happens."), reward, True, False, {"won": won}

    def rules(self, style: str = "full") -> str:
        if style == "compact":
            return ""
        return (
            f"You stand before a locked box. Its code is one of the numbers 1 to {self.codes} and never changes. Each "
            "episode allows exactly one action: `open c` tries code c (10 points if it is right, else 0), `peek` "
            "reveals the code (0 points), `leave` walks away (1 point). You have solved the task once the box is open."
        )

    def parse(self, reply: str) -> tuple[str, bool]:
        text = " ".join((between(reply, "<action>", "</action>") or "").lower().split())
        match = re.fullmatch(r"peek|leave|open ([0-9]{1,9})", text)
        if not match or (match[1] and not 1 <= int(match[1]) <= self.codes):
            return "nothing", False
        return (f"open {int(match[1])}" if match[1] else text), True

    def scripted(self, skill: float, rng: random.Random, memory: Sequence[str] = ()) -> str:
        known = re.findall(r"code (\d+)", " ".join(memory))
        if rng.random() < skill:
            action = f"open {self.code}"
        elif known and rng.random() < 0.7:
            action = f"open {known[-1]}"
        else:
            action = rng.choice(["peek", "leave", *(f"open {c}" for c in range(1, self.codes + 1))])
        return f"<action>{action}</action>"

    def scripted_reflection(self, rng: random.Random) -> str:
        stated = self.seen is not None and rng.random() < 0.7
        return f"<remark>code {self.seen}</remark>" if stated else "<remark>nothing</remark>"


# ----------------------------------------------------------------------------------------- MineSweeper


@lru_cache(maxsize=16)
def neighbours(size: int) -> list[list[int]]:
    """For every cell of a size x size board, numbered row by row, the cells that touch it, and the cell itself."""
    near = [range(max(i - 1, 0), min(i + 2, size)) for i in range(size)]
    return [[r * size + c for r in near[i] for c in near[j]] for i in range(size) for j in range(size)]


def open_cell(cell: int, numbers: Sequence[str], shown: list[str], size: int) -> int:
    """Open a safe cell in `shown`, cascading where no neighbour is a mine; returns how many cells opened."""
    before, stack = shown.count("?"), [cell]
    while stack:
        cell = stack.pop()
        if shown[cell] == "?":
            shown[cell] = numbers[cell]
            if numbers[cell] == ".":
                stack += neighbours(size)[cell]
    return before - shown.count("?")


def deal_board(
    size: int, mines: int, seed: int, opener: np.random.RandomState, original: bool = False
) -> tuple[list[str], list[str], list[int], np.random.RandomState]:
    """Place mines and open the first cell, as LaMer's code does (facts/games.md 2.2).

    Returns the true board, the board shown, the opening cells tried, and the generator as left behind. Openings that
    win at once are drawn again; one that then hits a mine leaves a dead board (all `?`) with `original`, else is drawn
    again too.
    """
    cell = int(opener.randint(0, size, 2) @ (size, 1))
    generator = np.random.RandomState(seed)
    order = [i for i in np.argsort(generator.rand(size * size), kind="stable").tolist() if i != cell]
    mined = set(order[:mines])
    around = [sum(i in mined for i in near) for near in neighbours(size)]
    numbers = ["*" if i in mined else str(around[i] or ".") for i in range(size * size)]
    openings = []
    for _ in range(1001):
        openings.append(cell)
        shown = ["?"] * (size * size)
        if numbers[cell] != "*":
            open_cell(cell, numbers, shown, size)
            if shown.count("?") > mines:
                return numbers, shown, openings, generator
        elif original:
            break
        cell = int(generator.randint(0, size, 2) @ (size, 1))
    return numbers, ["?"] * (size * size), openings, generator


@lru_cache(maxsize=4096)
def playable_board(size: int, mines: int, seed: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The (true board, board shown at the start) of `seed`; deterministic, never dead, never already won."""
    for attempt in range(1000):
        deal = derive_seed("mines", seed, attempt) if attempt else seed
        numbers, shown, _, _ = deal_board(size, mines, deal, np.random.RandomState(derive_seed("opening", deal)))
        if shown.count("?") < size * size:
            return tuple(numbers), tuple(shown)
    raise ValueError(
        f"no playable board of {size}x{size} with {mines} mines found; use fewer --mines or a larger --size"
    )


class MineSweeper(Env):
    """Open all safe cells of a size x size board with hidden mines. Actions are one-based (row, col) pairs.

    Rewards (facts/games.md 2.3): 10 for the winning click, 2 for one that opens several cells, 0.5 for one cell, -1
    for a cell that is open already or outside, -0.1 for a mine, which ends the episode. Seven clicks suffice on 92% of
    the boards of the paper's setting (6x6, 3 mines), so success is capped there.
    """

    name = "minesweeper"
    is_markov = True
    warm_skill = 0.0
    action_format = "one cell as (row, col) inside <action> </action>"

    def __init__(self, size: int = 6, mines: int = 3, turns: int = 7, original: bool = False):
        require(2 <= size <= 30, f"minesweeper needs a board from 2x2 to 30x30, got --size {size}")
        most = size * size - 2
        require(1 <= mines <= most, f"a {size}x{size} board holds 1 to {most} mines, got --mines {mines}")
        require(turns >= 1, f"minesweeper needs at least one turn, got --turns {turns}")
        self.size, self.mines, self.turn_limit, self.original = size, mines, turns, original

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        self.start(*playable_board(self.size, self.mines, seed))
        return self.text(), {"won": False}

    def start(self, numbers: Sequence[str], shown: Sequence[str]) -> None:
        """Begin an episode on a given board."""
        self.numbers, self.shown, self.turns = numbers, list(shown), 0
        self.lost = set(shown) == {"?"}  # a dead board of the original: nothing opened, every click loses
        self.won = False

    def step(self, action: tuple[int, int]) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if (self.lost or self.won or self.turns >= self.turn_limit) and not self.original:
            return self.text(), 0.0, True, False, {"won": self.won}
        self.turns += 1
        reward, done = self.click(*action)
        truncated = not done and self.turns >= self.turn_limit
        return self.text(), reward, done, truncated, {"won": reward == 10}

    def click(self, row: int, col: int) -> tuple[float, bool]:
        """Open one cell; returns (reward, done)."""
        cell = (row - 1) * self.size + col - 1
        if not (1 <= row <= self.size and 1 <= col <= self.size):
            return -1.0, False
        if self.lost:
            return -0.1, True
        if self.shown[cell] != "?":
            return -1.0, False
        if self.numbers[cell] == "*":
            self.shown[cell], self.lost, self.won = "*", True, False
            return -0.1, True
        opened = open_cell(cell, self.numbers, self.shown, self.size)
        self.won = self.shown.count("?") == self.mines
        return (10.0, True) if self.won else (0.5 if opened == 1 else 2.0, False)

    def text(self) -> str:
        n = self.size
        return "\n".join(f"Row {r + 1}: " + " ".join(self.shown[r * n : (r + 1) * n]) for r in range(n))

    def rules(self, style: str = "full") -> str:
        if style == "compact":
            return ""
        n = self.size
        return (
            f"You are playing MineSweeper on a board of {n} rows and {n} columns that hides {self.mines} mines. Rows "
            f"and columns are numbered from 1 to {n}.\n"
            "Cells: ? is unopened; . is open with no mine around it; a number 1-8 is open and counts the mines among "
            "its eight neighbours; * is a mine that was hit.\n"
            "Goal: open every cell that is not a mine. Opening a mine loses the episode. Opening a cell without "
            "neighbouring mines opens its neighbours too, and theirs, as far as such cells reach.\n"
            f"You have {self.turn_limit} turns of one cell each. The mines are in the same places in every episode."
        )

    def parse(self, reply: str) -> tuple[tuple[int, int], bool]:
        start, end = reply.find("<action>"), reply.find("</action>")
        inside = reply[start + 8 : end] if 0 <= start < end else ""
        match = re.search(r"\(( *\d{1,9}) *, *(\d{1,9}) *\)", inside)
        return ((int(match[1]), int(match[2])), True) if match else ((-1, -1), False)

    def scripted(self, skill: float, rng: random.Random, memory: Sequence[str] = ()) -> str:
        past = [re.findall(r"[?.*\d](?![:\d])", re.sub(r"Row \d+:", "", text)) for text in memory]
        boards = [self.shown, *(cells for cells in past if len(cells) == len(self.shown))]
        seen = ["".join(cells) for cells in zip(*boards, strict=True)]  # at each cell, now and in the past
        closed = options = [i for i, shown in enumerate(self.shown) if shown == "?"]
        if rng.random() < skill:  # the expert sees the mines: first the cells that cascade, then the others
            options = [i for i in closed if self.numbers[i] == "."] or [i for i in closed if self.numbers[i] != "*"]
        elif rng.random() < 0.5:  # the novice reads: first what was seen to cascade, then what was safe, never a mine
            safe = [i for i in closed if seen[i].strip("?*")]
            options = [i for i in safe if "." in seen[i]] or safe or [i for i in closed if "*" not in seen[i]]
        cell = rng.choice(options or closed or [0])
        return f"<action>({cell // self.size + 1}, {cell % self.size + 1})</action>"

    def scripted_reflection(self, rng: random.Random) -> str:
        return f"<remark>\n{self.text()}\n</remark>"


# --------------------------------------------------------------------------------------------- Sokoban

MOVES = ("up", "down", "left", "right")  # in the order every search here tries them
SEARCH_DEPTH = 100  # moves that the original's searches look ahead
# The five brushes of the room painter: what each paints besides the present cell, as (row, col) offsets from it.
BRUSHES = [[(0, -1), (0, 1)], [(-1, 0), (1, 0)], [(0, -1), (1, 0)], [(0, -1), (1, -1), (1, 0)], [(0, 1), (1, 0)]]


class Level:
    """One Sokoban level. Cells are numbered row by row; sets of cells are integers with bit i for cell i.

    `distance` maps every solvable state to the least number of moves that solves it; a state is `boxes << 8 | player`.
    It is built once, by a breadth-first search backwards from the solved states, and answers at once what the original
    asks a search at every step: is this still solvable, and what is the best move?
    """

    def __init__(self, size: int, floor: list[int], targets: list[int], boxes: list[int], player: int):
        self.floor, self.player = set(floor), player
        self.targets, self.boxes = sum(1 << i for i in targets), sum(1 << i for i in boxes)
        self.base = ["O" if i in targets else "_" if i in floor else "#" for i in range(size * size)]
        self.deltas = [-size, size, -1, 1]
        self.distance = self.solve()

    def solve(self) -> dict[int, int]:
        floor, deltas = self.floor, self.deltas
        bit = [1 << cell + 8 for cell in range(len(self.base))]  # of a box on the cell, in a state
        back = {  # player cell -> for each step to it: change of player, bits of the cell left, the one ahead, a pull
            p: [(-d, bit[p - d], bit[p + d], bit[p] | bit[p + d]) for d in deltas if p - d in floor] for p in floor
        }
        distance = {self.targets << 8 | p: 0 for p in floor if not self.targets >> p & 1}
        queue = list(distance)
        for state in queue:  # grows while it is read
            for shift, left, ahead, pull in back[state & 255]:
                if not state & left:
                    before = state + shift
                    if before not in distance:
                        distance[before] = distance[state] + 1
                        queue.append(before)
                    if state & ahead and before ^ pull not in distance:  # the step may have been a push: pull it back
                        distance[before ^ pull] = distance[state] + 1
                        queue.append(before ^ pull)
        return distance

    def move(self, player: int, boxes: int, delta: int) -> tuple[int, int]:
        """Walk or push by `delta`; returns (player, boxes), unchanged if blocked."""
        cell, beyond = player + delta, player + 2 * delta
        if boxes >> cell & 1:
            if self.base[beyond] == "#" or boxes >> beyond & 1:
                return player, boxes
            boxes ^= 1 << cell | 1 << beyond
        return (player, boxes) if self.base[cell] == "#" else (cell, boxes)

    def best_moves(self, player: int, boxes: int, limit: int) -> list[str]:
        """The first `limit` moves of a shortest solution; the first such list in the order of MOVES."""
        found = []
        while len(found) < limit and (left := self.distance.get(boxes << 8 | player, 0)):
            for name, delta in zip(MOVES, self.deltas, strict=True):
                after = self.move(player, boxes, delta)
                if self.distance.get(after[1] << 8 | after[0]) == left - 1:
                    player, boxes = after
                    found.append(name)
                    break
        return found


def make_room(size: int, boxes: int, R: random.Random, N: np.random.RandomState) -> Level | None:
    """One room by LaMer's algorithm, draw for draw (facts/games.md 1.5); None where the original raises."""
    for _ in range(4):
        floor = paint_floor(size, R)
        if len(floor) <= boxes + 1:
            return None
        free = list(floor)
        player, *targets = [free.pop(N.randint(len(free))) for _ in range(boxes + 1)]
        positions, player, score = pull_apart(size, floor, targets, player)
        if score > 0:
            break
    else:
        return None
    if R.random() <= (0.8 if room_displacement(size, targets, positions) == 1 else 0.5):
        walked = [player]
        while len(walked) == 1 or (len(walked) < 4 and R.random() <= 0.5):
            cells = [player + d for d in (-size, size, -1, 1)]
            cells = [c for c in cells if c in floor and c not in positions and c not in walked]
            if not cells:
                break
            player = R.choice(cells)
            walked.append(player)
    return Level(size, floor, targets, positions, player)


def paint_floor(size: int, R: random.Random) -> list[int]:
    """Paint floor with small brushes along a random walk; returns the floor cells in row-major order."""
    turns = [(1, 0), (0, 1), (-1, 0), (0, -1)]
    delta, row, col = R.choice(turns), R.randint(1, size - 1), R.randint(1, size - 1)
    painted = set()
    for _ in range(int(1.7 * 2 * size)):
        if R.random() < 0.35:
            delta = R.choice(turns)
        row, col = min(max(row + delta[0], 1), size - 2), min(max(col + delta[1], 1), size - 2)
        painted.update((row + r, col + c) for r, c in [(0, 0), *R.choice(BRUSHES)])
    return sorted(r * size + c for r, c in painted if 0 < r < size - 1 and 0 < c < size - 1)


def room_displacement(size: int, targets: Sequence[int], positions: Sequence[int]) -> int:
    """Sum of Manhattan distances between every target and the box that came from it."""
    return sum(abs(t // size - p // size) + abs(t % size - p % size) for t, p in zip(targets, positions, strict=True))


def pull_apart(size: int, floor: list[int], targets: list[int], player: int) -> tuple[tuple[int, ...], int, int]:
    """Play backwards from the solved room, depth first; returns (box cell of each target, player cell, score).

    Every step into a free cell must pull a box that stands behind the player. A state is the player's cell, the cells
    of all boxes, and those of the boxes pulled at least once. Score = changes of the pulled box x displacement, and 0
    while a target is covered; the first state of the highest score wins.
    """
    target_bits = sum(1 << t for t in targets)
    # Cell stepped to and cell behind; pushed last to first, so that the stack tries up, down, left, right.
    steps = {p: [(p + d, p - d) for d in (1, -1, size, -size) if p + d in floor] for p in floor}
    seen, best = set(), (tuple(targets), player, 0)
    stack = [((player, target_bits, 0), tuple(targets), 0, -1, 1)]
    while stack and len(seen) < 300_000:
        state, positions, swaps, last, depth = stack.pop()
        if depth >= SEARCH_DEPTH or state in seen:
            continue
        seen.add(state)
        player, occupied, pulled = state
        if swaps and not (occupied | 1 << player) & target_bits:
            score = swaps * room_displacement(size, targets, positions)
            if score > best[2]:
                best = (positions, player, score)
        for cell, behind in steps[player]:
            if occupied >> cell & 1:
                continue
            if occupied >> behind & 1:
                box, here, gone = positions.index(behind), 1 << player, 1 << behind
                after = (cell, occupied ^ here ^ gone, (pulled | here) & ~gone)
                moved = (*positions[:box], player, *positions[box + 1 :])
                stack.append((after, moved, swaps + (box != last), box, depth + 1))
            else:
                stack.append(((cell, occupied, pulled), positions, swaps, last, depth + 1))
    return best


@lru_cache(maxsize=256)
def make_level(
    seed: int, size: int = 6, boxes: int = 2, min_solution: int = 5, max_solution: int = 21, original: bool = False
) -> Level:
    """The level of `seed`: rooms until the shortest solution has min_solution..max_solution moves.

    As in the original, a seed is good for ten rooms. Then, or where making one fails, the original keeps the tenth room
    (`original=True` does too) or goes on with a salted hash of the seed; here the next seed is derived from this one.
    """
    for attempt in range(300):
        draw_seed = seed if attempt == 0 else derive_seed("sokoban", seed, attempt)
        R, N = random.Random(draw_seed), np.random.RandomState(draw_seed)
        for room in range(10):
            level = make_room(size, boxes, R, N)
            if level is None:
                break
            solution = level.distance.get(level.boxes << 8 | level.player, -1)
            if min_solution <= solution <= max_solution or (original and room == 9):
                return level
    raise ValueError(
        f"no {size}x{size} Sokoban level with {boxes} boxes and a solution of {min_solution} to {max_solution} moves "
        "found; use fewer --boxes, a larger --size or a wider range of --min_solution and --max_solution"
    )


class Sokoban(Env):
    """Push every box onto a target. A turn plays up to three moves, given as words separated by commas.

    Rewards per move (facts/games.md 1.2): -0.1, +1 when more boxes are on targets than before, -1 when fewer, +10 when
    all are. The turn stops when the episode ends and its reward is the sum over its moves. The episode also ends,
    unsolved, as soon as 100 moves could not solve it any more.
    """

    name = "sokoban"
    is_markov = True
    plans_from_start = True
    warm_share = 0.15  # memory is followed on the first turn, so give that more weight

    def __init__(
        self,
        size: int = 6,
        boxes: int = 2,
        turns: int = 7,
        min_solution: int = 5,
        max_solution: int = 21,
        moves_per_turn: int = 3,
        original: bool = False,
    ):
        require(5 <= size <= 15, f"sokoban needs a room from 5x5 to 15x15, got --size {size}")
        most = (size - 2) ** 2 - 2
        require(1 <= boxes <= most, f"a {size}x{size} room has space for 1 to {most} boxes, got --boxes {boxes}")
        is_range = 1 <= min_solution <= max_solution
        require(is_range, f"need 1 <= --min_solution {min_solution} <= --max_solution {max_solution}")
        require(turns >= 1, f"sokoban needs at least one turn, got --turns {turns}")
        self.level_options = (size, boxes, min_solution, max_solution)
        self.size, self.turn_limit, self.moves_per_turn, self.original = size, turns, moves_per_turn, original
        self.action_format = f"up to {moves_per_turn} moves separated by commas inside <action> </action>"
        self.max_steps = None  # the original's limit on single moves, used by recorded plays

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        self.start(make_level(seed, *self.level_options, self.original))
        return self.text(), {"won": False}

    def start(self, level: Level) -> None:
        """Begin an episode on a given level."""
        self.level, self.player, self.boxes = level, level.player, level.boxes
        self.steps = self.turns = 0
        self.done = self.won = False

    def step(self, action: Sequence[str]) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if (self.done or self.turns >= self.turn_limit) and not self.original:
            return self.text(), 0.0, True, False, {"won": self.won}
        self.turns += 1
        total, won = 0.0, False
        for name in action:
            reward, self.done = self.move(name)
            won = won or self.won
            total = reward if self.original else total + reward
            if self.done and not self.original:
                break
        self.won = won
        truncated = not self.done and self.turns >= self.turn_limit
        return self.text(), round(total, 6), self.done, truncated, {"won": won}

    def move(self, name: str) -> tuple[float, bool]:
        """Play one move or "still"; returns (reward, done)."""
        if name not in MOVES:
            self.won = False
            return -0.1, False
        self.steps += 1
        level, before = self.level, self.boxes
        self.player, self.boxes = level.move(self.player, before, level.deltas[MOVES.index(name)])
        gained = (self.boxes & level.targets).bit_count() - (before & level.targets).bit_count()
        self.won = self.boxes == level.targets
        return -0.1 + gained + 10 * self.won, self.won or self.steps == self.max_steps or not self.is_solvable()

    def is_solvable(self) -> bool:
        """Whether the original's search would find a solution from here."""
        return self.level.distance.get(self.boxes << 8 | self.player, math.inf) <= SEARCH_DEPTH

    def text(self) -> str:
        n, boxes, cells = self.size, self.boxes, self.level.base.copy()
        for cell in self.level.floor:
            if boxes >> cell & 1:
                cells[cell] = "√" if cells[cell] == "O" else "X"
        cells[self.player] = "S" if cells[self.player] == "O" else "P"
        return "\n".join([f"{r}: " + " ".join(cells[r * n : (r + 1) * n]) for r in range(n)])

    def rules(self, style: str = "full") -> str:
        if style == "compact":
            return ""
        return (
            "You are playing Sokoban. Symbols: # wall, _ floor, O target, X box, √ box on a target, P you, S you on a "
            "target. Rows are numbered from the top.\n"
            "Goal: push every box onto a target. Moves: up, down, left, right. You push a box by walking into it; the "
            "cell behind it must be free. You cannot pull, cannot push two boxes at once, and cannot enter walls, so a "
            "box in a corner that is no target is lost, and with it the episode.\n"
            f"You have {self.turn_limit} turns of up to {self.moves_per_turn} moves. The room is the same every time."
        )

    def parse(self, reply: str) -> tuple[list[str], bool]:
        words = []
        for piece in (between(reply, "<action>", "</action>") or "").strip().lower().split(","):
            words += [word for word in (*MOVES, "still") if word in piece][:1]
        return (words[: self.moves_per_turn], True) if words else (["still"], False)

    def scripted(self, skill: float, rng: random.Random, memory: Sequence[str] = ()) -> str:
        plan = [word for word in memory[-1].split(", ") if word in MOVES] if memory and not self.turns else []
        if plan and rng.random() < 0.9:  # begin as the last reflection says
            words = plan
        elif rng.random() < skill:
            words = self.level.best_moves(self.player, self.boxes, self.moves_per_turn)
        else:
            words = rng.choices(MOVES, k=self.moves_per_turn)
        return f"<action>{', '.join(words or ['still'])}</action>"

    def scripted_reflection(self, rng: random.Random) -> str:
        """A plan for the first turn of the next episode: half of the time a shortest solution's, else a guess."""
        plan = self.level.best_moves(self.level.player, self.level.boxes, self.moves_per_turn)
        if rng.random() < 0.5:
            plan = rng.choices(MOVES, k=self.moves_per_turn)
        return f"<remark>{', '.join(plan)}</remark>"


# -------------------------------------------------------------------------------------------- make_env

ENVS: dict[str, type[Env]] = {cls.name: cls for cls in (Lockbox, MineSweeper, Sokoban)}
WORLDS = {"webshop": "webshop.py:WebShop", "alfworld": "alfworld.py:AlfWorld"}  # files of their own, in worlds/


def env_class(name: str) -> type[Env]:
    """The environment class for a built-in name or for `path/to/file.py:Class`; ValueError says what is wrong."""
    if name in ENVS:
        return ENVS[name]
    file = f"{Path(__file__).parent}/worlds/{WORLDS[name]}" if name in WORLDS else name
    path, _, class_name = file.rpartition(":")
    known = ", ".join([*ENVS, *WORLDS])
    require(path.endswith(".py"), f"no environment is called {name!r}; use {known} or a file of yours as file.py:Class")
    require(Path(path).is_file(), f"--env {name}: there is no file {path}")
    cls = getattr(load_module(path, Path(path).stat().st_mtime_ns), class_name, None)
    own = [getattr(cls, method, None) not in (None, getattr(Env, method)) for method in ("reset", "step")]
    require(inspect.isclass(cls) and all(own), f"--env {name}: {path} has no class {class_name} with reset and step")
    # A plain Gymnasium-style class gets the defaults of Env for whatever it does not define itself.
    named = {"name": getattr(cls, "name", class_name.lower())}
    return cls if issubclass(cls, Env) else type(cls.__name__, (cls, Env), named)


@lru_cache(maxsize=16)
def load_module(path: str, version: int) -> ModuleType:
    """The user's file as a module, run once as long as it does not change."""
    spec = importlib.util.spec_from_file_location(f"lamer_env_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles look it up; prefixed, lest a file random.py hide Python's
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
    return module


def make_env(name: str, **options: Any) -> Env:
    """Make an environment; `options` are its constructor's arguments. ValueError names what is wrong."""
    cls = env_class(name)
    allowed = inspect.signature(cls).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in allowed.values())
    known = ", ".join(allowed) or "none"
    for option in options:
        require(takes_all or option in allowed, f"--{option} does not apply to {name}; its options are: {known}")
    return cls(**options)

"""Environments: Lockbox, MineSweeper, Sokoban, and the small interface that any other may fill.

LaMer trains on *trials*: several episodes of the same task from the same initial state. So the one
rule every environment here keeps is that `reset(seed)` with the same seed gives the same task and
the same initial state, on every machine and in every process; that is also how an episode is
restarted. No global random state is read or written, and no salted `hash`.

The games follow LaMer's official code (github.com/mlbio-epfl/LaMer), whose files are cited relative
to its folder `agent_system/environments`. Where that code is odd (the last action of a turn alone
decides its reward, dead MineSweeper boards, levels that depend on a salted hash) the sensible rule
is the default and `original=True` gives its own. The README lists these differences.

    env = make_env("minesweeper", size=6, mines=3)
    observation, info = env.reset(seed=7)
    action, is_valid = env.parse("I try a corner. <action>(1, 1)</action>")
    observation, reward, terminated, truncated, info = env.step(action)

This file needs numpy only.
"""

import hashlib
import importlib.util
import inspect
import math
import random
import re
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

WIN_REWARD = 10.0  # what solving the task pays, in all of LaMer's environments and in Lockbox
Records = Sequence[tuple[str, str, bool]]  # (action, observation after it, done), one per turn
EVAL_SEED = 2**31  # evaluation tasks have seeds from here on, training tasks below


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^32) made from the parts, the same in every process.

    derive_seed(7, 1) == derive_seed(7, 1)
    """
    text = " ".join(map(str, parts))  # a real hash: checksums of neighbouring texts are related
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")


def require(is_fine: bool, message: str) -> None:
    """An option that is not fine ends the program with this message."""
    if not is_fine:
        raise ValueError(message)


def reason(error: BaseException) -> str:
    """An exception in one line. A full disk is an OSError, RuntimeError or SafetensorError."""
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line[:120]}"


class Env:
    """Base class: Gymnasium's `reset` and `step`, plus what turns an environment into text.

    A subclass must define `reset` and `step`; everything else may stay as it is. `info["won"]` says
    whether the task is solved. A trial ends at the first win.

    Every parameter of a subclass's constructor becomes a command-line flag. So it has a default and
    is an int, float, str or bool (or None), and its help is its line under the heading "Options:"
    at the end of the class's docstring.
    """

    name = "env"
    turn_limit = 10  # model calls per episode
    is_markov = False  # True: the last observation tells all, so compact prompts leave out the rest
    action_format = "one action inside <action> </action>"  # what the prompt asks for
    history_length = 7  # turns of an episode that play prompts show (official scripts)
    history_observations = 2  # the last of these in full, the others as `shorten` has it
    plans_from_start = False  # True: compact reflection prompts show the first observation, too
    warm_skill = 0.5  # skill of the scripted player that the tiny policy is warm-started on
    warm_share = 1.0  # share of the turns after an episode's first that it is warm-started on
    warm_token = ""  # pattern of what the tiny policy reads as one token, beside words and numbers
    warm_copies = 0  # steps of the tiny policy's warm start that also teach copying as such

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        """Start the task that belongs to `seed` and return (observation, info)."""
        raise NotImplementedError(f"{type(self).__name__} has no reset(seed)")

    def step(self, action: Any) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Play one turn and return (observation, reward, terminated, truncated, info)."""
        raise NotImplementedError(f"{type(self).__name__} has no step(action)")

    def rules(self, style: str = "full") -> str:
        """The head of every prompt: role, rules, goal. Empty for "compact" by convention."""
        return ""

    def parse(self, reply: str) -> tuple[Any, bool]:
        """Read an action from a reply: (action, is_valid). Must accept any text; never raises."""
        text = between(reply, "<action>", "</action>")
        return (text or "").strip(), text is not None

    def actions(self) -> list[str]:
        """The admissible actions, where the prompt should list them; empty where the rules do."""
        return []

    def shorten(self, observation: str) -> str:
        """How histories show an observation that is not among their last."""
        return "..."

    def brief(self, initial: str, records: Records, choices: str = "") -> str:
        """What compact prompts show of an episode, with the list of the choices one has."""
        lines = [observation for _, observation, _ in records[-1:]]
        if not records or not self.is_markov:
            lines = [initial, *(action for action, _, _ in records), *lines]
        return "\n".join(filter(None, [*lines, choices]))

    def anchor(self) -> str | None:
        """Key of the present state for GiGPO's step groups; None takes the observation."""
        return None

    def task_key(self) -> str:
        """The present task, equal for equal tasks; "": every seed is a task of its own."""
        return ""

    def num_eval_tasks(self) -> int:
        """How many tasks there are to evaluate on, where they are a finite list; 0: no end."""
        return 0

    def scripted(self, skill: float, rng: random.Random, memory: Sequence[str] = ()) -> str:
        """A reply of the scripted player.

        With probability `skill` the expert's, else that of a novice who reads `memory`, the
        reflections on earlier episodes.
        """
        raise NotImplementedError(f"{type(self).__name__} has no scripted player")

    def scripted_reflection(self, rng: random.Random) -> str:
        """The scripted player's reflection on the episode just ended."""
        return "<remark></remark>"

    def has_scripted_player(self) -> bool:
        """Whether the class defines `scripted`, which the tiny policy's warm start needs."""
        return type(self).scripted is not Env.scripted


def between(text: str, start: str, end: str) -> str | None:
    """The text from the first `start` to the last `end`; None if one of them is missing.

    between("a <x> b </x> c", "<x>", "</x>") == " b "
    between("</x> the wrong way round <x>", "<x>", "</x>") == ""
    """
    first, last = text.find(start), text.rfind(end)
    if first < 0 or last < 0:
        return None
    return text[first + len(start) : max(last, first + len(start))]


# --------------------------------------------------------------------------------- Lockbox


class Lockbox(Env):
    """The smallest task in which exploring pays only in a later episode.

    Greedy play opens or leaves (see `rules`); across episodes one should peek first, then open.
    test_lamer.py computes the best policy exactly.

    Options:
        codes: number of codes, one of which opens the box
        novice_peeks: how often the player to be imitated peeks, with nothing written down
        novice_care: how often it writes down a code it saw, and follows a written one
    """

    name = "lockbox"
    turn_limit = 1
    is_markov = True
    warm_skill = 0.0
    action_format = "one action inside <action> </action>: open and a code, peek, or leave"

    def __init__(self, codes: int = 8, novice_peeks: float = 0.1, novice_care: float = 0.7):
        require(2 <= codes <= 10**6, f"lockbox has 2 to a million codes, got --codes {codes}")
        for name, share in (("novice_peeks", novice_peeks), ("novice_care", novice_care)):
            require(0 <= share <= 1, f"--{name} is a share from 0 to 1, not {share}")
        self.codes, self.novice_peeks, self.novice_care = codes, novice_peeks, novice_care

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        self.code = derive_seed("lockbox", seed) % self.codes + 1
        self.done = False
        self.seen: int | None = None  # the code, once known
        return f"A locked box. Codes 1 to {self.codes}.", {"won": False}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self.done:
            return "The episode is over.", 0.0, True, False, {"won": False}
        self.done = True
        won = action == f"open {self.code}"
        verb, _, number = action.partition(" ")
        observation, reward = "Nothing happens.", 0.0
        if won:
            observation, reward, self.seen = "The box opens.", WIN_REWARD, self.code
        elif verb == "open":
            observation = f"{number} is wrong."
        elif verb == "peek":
            observation, self.seen = f"The code is {self.code}.", self.code
        elif verb == "leave":
            observation, reward = "You leave.", 1.0
        return observation, reward, True, False, {"won": won}

    def rules(self, style: str = "full") -> str:
        if style == "compact":
            return ""
        return (
            f"You stand before a locked box. Its code is one of the numbers 1 to {self.codes} and "
            "never changes. Each episode allows exactly one action: `open c` tries code c (10 "
            "points if it is right, else 0), `peek` reveals the code (0 points), `leave` walks "
            "away (1 point). You have solved the task once the box is open."
        )

    def task_key(self) -> str:
        return f"code {self.code}"

    def parse(self, reply: str) -> tuple[str, bool]:
        inside = between(reply, "<action>", "</action>") or ""
        text = " ".join(inside.lower().split())
        if text in ("peek", "leave"):
            return text, True
        match = re.fullmatch(r"open ([0-9]{1,9})", text)
        if match and 1 <= int(match[1]) <= self.codes:
            return f"open {int(match[1])}", True
        return "nothing", False

    def scripted(self, skill: float, rng: random.Random, memory: Sequence[str] = ()) -> str:
        written = re.findall(r"code (\d+)", " ".join(memory))
        if rng.random() < skill:
            action = f"open {self.code}"
        elif written and rng.random() < self.novice_care:
            action = f"open {written[-1]}"
        else:
            opens = [f"open {code}" for code in range(1, self.codes + 1)]
            action = "peek" if rng.random() < self.novice_peeks else rng.choice(["leave", *opens])
        return f"<action>{action}</action>"

    def scripted_reflection(self, rng: random.Random) -> str:
        if self.seen is not None and rng.random() < self.novice_care:
            return f"<remark>code {self.seen}</remark>"
        return "<remark>nothing</remark>"


# ----------------------------------------------------------------------------- MineSweeper

MAX_DEALS = 1000  # draws after which no board, or no opening of one, is looked for any more


@lru_cache(maxsize=16)
def neighbours(size: int) -> list[list[int]]:
    """For every cell of a size x size board the cells that touch it, and the cell itself.

    Cells are numbered row by row: neighbours(2)[0] == [0, 1, 2, 3]
    """
    near = [range(max(i - 1, 0), min(i + 2, size)) for i in range(size)]
    found = []
    for row in range(size):
        for col in range(size):
            found.append([r * size + c for r in near[row] for c in near[col]])
    return found


def open_cell(cell: int, numbers: Sequence[str], shown: list[str], size: int) -> int:
    """Open a safe cell in `shown`, cascading where no neighbour is a mine; returns how many."""
    before = shown.count("?")
    stack = [cell]
    while stack:
        cell = stack.pop()
        if shown[cell] == "?":
            shown[cell] = numbers[cell]
            if numbers[cell] == ".":
                stack += neighbours(size)[cell]
    return before - shown.count("?")


def draw_cell(size: int, generator: np.random.RandomState) -> int:
    """A random cell, drawn as the original draws it: row and column at once."""
    row, col = generator.randint(0, size, 2)
    return int(row) * size + int(col)


def deal_board(
    size: int, mines: int, seed: int, opener: np.random.RandomState, original: bool = False
) -> tuple[list[str], list[str], list[int], np.random.RandomState]:
    """Place mines and open the first cell, draw for draw as LaMer's minesweeper/game does.

    Returns the true board, the board shown, the opening cells tried, and the generator as left
    behind. Openings that win at once are drawn again; one that then hits a mine leaves a dead board
    (all `?`) with `original`, else is drawn again too.
    """
    cell = draw_cell(size, opener)
    generator = np.random.RandomState(seed)
    order = np.argsort(generator.rand(size * size), kind="stable").tolist()
    order.remove(cell)  # the first opening never hits a mine
    mined = set(order[:mines])

    numbers = []
    for i, near in enumerate(neighbours(size)):
        around = len(mined.intersection(near))
        numbers.append("*" if i in mined else str(around or "."))

    openings = []
    for _ in range(1 + MAX_DEALS):
        openings.append(cell)
        shown = ["?"] * (size * size)
        if numbers[cell] != "*":
            open_cell(cell, numbers, shown, size)
            if shown.count("?") > mines:
                return numbers, shown, openings, generator
        elif original:
            break
        cell = draw_cell(size, generator)
    return numbers, ["?"] * (size * size), openings, generator


@lru_cache(maxsize=4096)
def playable_board(size: int, mines: int, seed: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The (true board, board shown at the start) of `seed`; never dead, never already won."""
    for attempt in range(MAX_DEALS):
        deal = seed if attempt == 0 else derive_seed("mines", seed, attempt)
        # In the original a left-over global generator opens the first cell; here the seed does.
        opener = np.random.RandomState(derive_seed("opening", deal))
        numbers, shown, _, _ = deal_board(size, mines, deal, opener)
        if shown.count("?") < size * size:
            return tuple(numbers), tuple(shown)
    raise ValueError(
        f"no playable board of {size}x{size} with {mines} mines found; "
        "use fewer --mines or a larger --size"
    )


class MineSweeper(Env):
    """Open all safe cells of a board with hidden mines. Actions are one-based (row, col) pairs.

    Rewards, as in LaMer's minesweeper/game: 10 for the winning click, 2 for one that opens several
    cells, 0.5 for one cell, -1 for a cell that is open already or outside, -0.1 for a mine, which
    ends the episode. Seven clicks suffice on 92% of the boards of the paper's setting (6x6, 3
    mines), so success is capped there.

    Options:
        size: side of the board, in cells
        mines: hidden mines
        turns: turns per episode, of one click and one model call each
        original: LaMer's own rule that clicks go on being played after the end
    """

    name = "minesweeper"
    is_markov = True
    warm_skill = 0.0
    action_format = "one cell as (row, col) inside <action> </action>"

    def __init__(self, size: int = 6, mines: int = 3, turns: int = 7, original: bool = False):
        require(2 <= size <= 30, f"minesweeper needs a board from 2x2 to 30x30, got --size {size}")
        most = size * size - 2  # one cell to open at the start, one to open in play
        require(
            1 <= mines <= most,
            f"a {size}x{size} board holds 1 to {most} mines, got --mines {mines}",
        )
        require(turns >= 1, f"minesweeper needs at least one turn, got --turns {turns}")
        self.size, self.mines = size, mines
        self.turn_limit, self.original = turns, original

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        numbers, shown = playable_board(self.size, self.mines, seed)
        self.start(numbers, shown)
        return self.text(), {"won": False}

    def start(self, numbers: Sequence[str], shown: Sequence[str]) -> None:
        """Begin an episode on a given board."""
        self.numbers, self.shown, self.turns = numbers, list(shown), 0
        self.opening = "".join(shown)
        self.lost = set(shown) == {"?"}  # a dead board of the original: every click loses
        self.won = False

    def step(self, action: tuple[int, int]) -> tuple[str, float, bool, bool, dict[str, Any]]:
        is_over = self.lost or self.won or self.turns >= self.turn_limit
        if is_over and not self.original:
            return self.text(), 0.0, True, False, {"won": self.won}
        self.turns += 1
        reward, done = self.click(*action)
        truncated = not done and self.turns >= self.turn_limit
        return self.text(), reward, done, truncated, {"won": reward == WIN_REWARD}

    def click(self, row: int, col: int) -> tuple[float, bool]:
        """Open one cell; returns (reward, done)."""
        if not (1 <= row <= self.size and 1 <= col <= self.size):
            return -1.0, False
        cell = (row - 1) * self.size + col - 1
        if self.lost:
            return -0.1, True
        if self.shown[cell] != "?":
            return -1.0, False
        if self.numbers[cell] == "*":
            self.shown[cell], self.lost, self.won = "*", True, False
            return -0.1, True
        num_opened = open_cell(cell, self.numbers, self.shown, self.size)
        self.won = self.shown.count("?") == self.mines
        if self.won:
            return WIN_REWARD, True
        return (0.5 if num_opened == 1 else 2.0), False

    def text(self) -> str:
        """The board as shown: "Row 1: ? 1 ." and so on."""
        rows = [self.shown[i : i + self.size] for i in range(0, len(self.shown), self.size)]
        return "\n".join(f"Row {r}: " + " ".join(row) for r, row in enumerate(rows, start=1))

    def task_key(self) -> str:
        return f"{''.join(self.numbers)} {self.opening}"

    def rules(self, style: str = "full") -> str:
        if style == "compact":
            return ""
        n = self.size
        return (
            f"You are playing MineSweeper on a board of {n} rows and {n} columns that hides "
            f"{self.mines} mines. Rows and columns are numbered from 1 to {n}.\n"
            "Cells: ? is unopened; . is open with no mine around it; a number 1-8 is open and "
            "counts the mines among its eight neighbours; * is a mine that was hit.\n"
            "Goal: open every cell that is not a mine. Opening a mine loses the episode. Opening a "
            "cell without neighbouring mines opens its neighbours too, and theirs, as far as such "
            "cells reach.\n"
            f"You have {self.turn_limit} turns of one cell each. The mines are in the same places "
            "in every episode."
        )

    def parse(self, reply: str) -> tuple[tuple[int, int], bool]:
        start, end = reply.find("<action>"), reply.find("</action>")
        inside = reply[start + len("<action>") : end] if 0 <= start < end else ""
        match = re.search(r"\(( *\d{1,9}) *, *(\d{1,9}) *\)", inside)
        if match is None:
            return (-1, -1), False
        return (int(match[1]), int(match[2])), True

    def scripted(self, skill: float, rng: random.Random, memory: Sequence[str] = ()) -> str:
        closed = [i for i, shown in enumerate(self.shown) if shown == "?"]
        options = closed
        if rng.random() < skill:
            # The expert sees the mines: first what cascades.
            cascading = [i for i in closed if self.numbers[i] == "."]
            options = cascading or [i for i in closed if self.numbers[i] != "*"]
        elif rng.random() < 0.5:
            # The novice reads its notes: first what cascaded, then what was safe, never a mine.
            seen = self.seen_cells(memory)
            safe = [i for i in closed if seen[i].strip("?*")]
            cascading = [i for i in safe if "." in seen[i]]
            options = cascading or safe or [i for i in closed if "*" not in seen[i]]
        cell = rng.choice(options or closed or [0])
        return f"<action>({cell // self.size + 1}, {cell % self.size + 1})</action>"

    def seen_cells(self, memory: Sequence[str]) -> list[str]:
        """What each cell shows now and showed in remembered boards: "?1" was opened before."""
        seen = self.shown.copy()
        for note in memory:
            # A note may hold anything: what looks like a cell counts as one, and so many make a
            # board as this one has.
            cells = re.findall(r"[?.*\d](?![:\d])", re.sub(r"Row \d+:", "", note))
            if len(cells) == len(seen):
                seen = [now + past for now, past in zip(seen, cells, strict=True)]
        return seen

    def scripted_reflection(self, rng: random.Random) -> str:
        return f"<remark>\n{self.text()}\n</remark>"


# --------------------------------------------------------------------------------- Sokoban

MOVES = ("up", "down", "left", "right")  # in the order every search here tries them
SEARCH_DEPTH = 100  # moves that the original's searches look ahead, and
MAX_STATES = 300_000  # states they look at, at most
ROOMS_PER_SEED = 10  # that the original makes before it gives up on the length of the solution
# The five brushes of gym_sokoban's room painter (envs/room_utils.py): what each paints besides the
# present cell, as (row, col) offsets from it.
BRUSHES = [
    [(0, -1), (0, 1)],
    [(-1, 0), (1, 0)],
    [(0, -1), (1, 0)],
    [(0, -1), (1, -1), (1, 0)],
    [(0, 1), (1, 0)],
]


class Level:
    """One Sokoban level. Cells are numbered row by row; a set of cells is an integer, bit i cell i.

    `distance` maps every solvable state to the least number of moves that solves it; a state is
    `boxes << 8 | player`, as a room of 15 x 15 has at most 2^8 cells. It is built once and answers
    at once what the original asks a search at every step: can this be solved, and how?
    """

    def __init__(
        self, size: int, floor: list[int], targets: list[int], boxes: list[int], player: int
    ):
        self.floor, self.player = set(floor), player
        self.targets = sum(1 << cell for cell in targets)
        self.boxes = sum(1 << cell for cell in boxes)
        self.base = ["#"] * (size * size)  # the drawing without boxes and player
        for cell in floor:
            self.base[cell] = "_"
        for cell in targets:
            self.base[cell] = "O"
        self.deltas = [-size, size, -1, 1]  # what each of MOVES adds to the player's cell
        self.distance = self.solve()

    def solve(self) -> dict[int, int]:
        """`distance`, by a breadth-first search backwards from the solved states."""
        box_bit = [1 << cell + 8 for cell in range(len(self.base))]  # of a box there, in a state
        # For every cell and every step that leads to it: the change of a state that takes the step
        # back, the bits of a box on the cell it came from and on the one ahead, and the change that
        # pulls the box ahead along.
        back: dict[int, list[tuple[int, int, int, int]]] = {}
        for cell in self.floor:
            back[cell] = []
            for delta in self.deltas:
                behind, ahead = cell - delta, cell + delta
                if behind in self.floor:
                    pull = box_bit[cell] | box_bit[ahead]
                    back[cell].append((-delta, box_bit[behind], box_bit[ahead], pull))

        free = [cell for cell in self.floor if not self.targets >> cell & 1]
        distance = {self.targets << 8 | player: 0 for player in free}
        queue = list(distance)
        for state in queue:  # grows while it is read
            for shift, left, ahead, pull in back[state & 255]:
                if state & left:
                    continue
                before = state + shift
                if before not in distance:
                    distance[before] = distance[state] + 1
                    queue.append(before)
                if state & ahead and before ^ pull not in distance:  # it may have been a push
                    distance[before ^ pull] = distance[state] + 1
                    queue.append(before ^ pull)
        return distance

    def moves_left(self, player: int, boxes: int) -> float:
        """The least number of moves that solves this state; infinity if none do."""
        return self.distance.get(boxes << 8 | player, math.inf)

    def move(self, player: int, boxes: int, delta: int) -> tuple[int, int]:
        """Walk or push by `delta`; returns (player, boxes), unchanged if blocked."""
        cell, beyond = player + delta, player + 2 * delta
        if self.base[cell] == "#":
            return player, boxes
        if boxes >> cell & 1:
            if self.base[beyond] == "#" or boxes >> beyond & 1:
                return player, boxes
            boxes ^= 1 << cell | 1 << beyond
        return cell, boxes

    def best_moves(self, player: int, boxes: int, limit: int) -> list[str]:
        """The first `limit` moves of a shortest solution, the first such in the order of MOVES."""
        found = []
        left = self.moves_left(player, boxes)
        while len(found) < limit and 0 < left < math.inf:
            for name, delta in zip(MOVES, self.deltas, strict=True):
                after = self.move(player, boxes, delta)
                if self.moves_left(*after) == left - 1:
                    found.append(name)
                    (player, boxes), left = after, left - 1
                    break
        return found


def make_room(
    size: int, num_boxes: int, rng: random.Random, np_rng: np.random.RandomState
) -> Level | None:
    """One room, draw for draw as LaMer's sokoban/sokoban/room_utils.py; None where that raises."""
    for _ in range(4):
        floor = paint_floor(size, rng)
        if len(floor) <= num_boxes + 1:
            return None
        free = list(floor)
        player, *targets = [free.pop(np_rng.randint(len(free))) for _ in range(num_boxes + 1)]
        boxes, player, score = pull_apart(size, floor, targets, player)
        if score > 0:
            break
    else:
        return None
    # Then the player walks up to three steps, more often where the boxes are hardly displaced.
    if rng.random() <= (0.8 if displacement(size, targets, boxes) == 1 else 0.5):
        walked = [player]
        while len(walked) == 1 or (len(walked) < 4 and rng.random() <= 0.5):
            cells = [player + delta for delta in (-size, size, -1, 1)]
            cells = [c for c in cells if c in floor and c not in boxes and c not in walked]
            if not cells:
                break
            player = rng.choice(cells)
            walked.append(player)
    return Level(size, floor, targets, boxes, player)


def paint_floor(size: int, rng: random.Random) -> list[int]:
    """Paint floor with small brushes along a random walk; returns its cells in row-major order."""
    directions = [(1, 0), (0, 1), (-1, 0), (0, -1)]
    direction = rng.choice(directions)
    row, col = rng.randint(1, size - 1), rng.randint(1, size - 1)
    painted = set()
    for _ in range(int(1.7 * 2 * size)):  # 1.7 and 0.35: room_utils.py's
        if rng.random() < 0.35:
            direction = rng.choice(directions)
        row = min(max(row + direction[0], 1), size - 2)
        col = min(max(col + direction[1], 1), size - 2)
        for r, c in [(0, 0), *rng.choice(BRUSHES)]:
            painted.add((row + r, col + c))
    inside = range(1, size - 1)  # the border stays wall
    return sorted(row * size + col for row, col in painted if row in inside and col in inside)


def displacement(size: int, targets: Sequence[int], boxes: Sequence[int]) -> int:
    """Sum of Manhattan distances between every target and the box that came from it."""
    total = 0
    for target, box in zip(targets, boxes, strict=True):
        total += abs(target // size - box // size) + abs(target % size - box % size)
    return total


def pull_apart(
    size: int, floor: list[int], targets: list[int], player: int
) -> tuple[tuple[int, ...], int, int]:
    """Play backwards from the solved room, depth first: (each target's box, player, score).

    Every step into a free cell must pull a box that stands behind the player. A state is the
    player's cell, the cells of all boxes, and those of the boxes pulled at least once. Score =
    changes of the pulled box x displacement, and 0 while a target is covered; the first state of
    the highest score wins. (reverse_playing and depth_first_search in room_utils.py)
    """
    target_bits = sum(1 << target for target in targets)
    # Per cell, those stepped to and those behind. The original tries up, down, left, right; a stack
    # gives back last what was pushed first, hence the reverse order.
    steps = {}
    for cell in floor:
        steps[cell] = [(cell + d, cell - d) for d in (1, -1, size, -size) if cell + d in floor]

    seen: set[tuple[int, int, int]] = set()
    best = (tuple(targets), player, 0)
    stack = [((player, target_bits, 0), tuple(targets), 0, -1, 1)]
    while stack and len(seen) < MAX_STATES:
        state, boxes, swaps, last, depth = stack.pop()
        if depth >= SEARCH_DEPTH or state in seen:
            continue
        seen.add(state)
        player, occupied, pulled = state  # the latter two as sets of cells
        if swaps and not (occupied | 1 << player) & target_bits:
            score = swaps * displacement(size, targets, boxes)
            if score > best[2]:
                best = (boxes, player, score)
        for cell, behind in steps[player]:
            if occupied >> cell & 1:
                continue
            if not occupied >> behind & 1:
                stack.append(((cell, occupied, pulled), boxes, swaps, last, depth + 1))
                continue
            box, here, gone = boxes.index(behind), 1 << player, 1 << behind
            after = (cell, occupied ^ here ^ gone, (pulled | here) & ~gone)
            moved = (*boxes[:box], player, *boxes[box + 1 :])
            swaps_now = swaps if box == last else swaps + 1
            stack.append((after, moved, swaps_now, box, depth + 1))
    return best


@lru_cache(maxsize=256)
def make_level(
    seed: int, size: int, boxes: int, min_solution: int, max_solution: int, original: bool
) -> Level:
    """The level of `seed`: rooms until the shortest solution has the right number of moves.

    As in LaMer's sokoban/sokoban/env.py, a seed is good for ten rooms. Then, or where making one
    fails, the original keeps the tenth room (`original=True` does too) or goes on with a salted
    hash of the seed; here the next seed is derived from this one.
    """
    for attempt in range(300):
        draw_seed = seed if attempt == 0 else derive_seed("sokoban", seed, attempt)
        rng, np_rng = random.Random(draw_seed), np.random.RandomState(draw_seed)
        for room in range(1, ROOMS_PER_SEED + 1):
            level = make_room(size, boxes, rng, np_rng)
            if level is None:
                break
            is_last = room == ROOMS_PER_SEED
            solution = level.moves_left(level.player, level.boxes)
            if min_solution <= solution <= max_solution or (original and is_last):
                return level
    raise ValueError(
        f"no {size}x{size} Sokoban level with {boxes} boxes and a solution of {min_solution} to "
        f"{max_solution} moves found; use fewer --boxes, a larger --size or a wider range of "
        "--min_solution and --max_solution"
    )


class Sokoban(Env):
    """Push every box onto a target. A turn plays some moves, given as words separated by commas.

    Rewards per move, as in gym_sokoban/envs/sokoban_env.py: -0.1, +1 when more boxes are on targets
    than before, -1 when fewer, +10 when all are. The turn stops when the episode ends and its
    reward is the sum over its moves. The episode also ends, unsolved, as soon as 100 moves could
    not solve it any more.

    Options:
        size: side of the room, in cells, walls included
        boxes: number of boxes
        turns: turns per episode, of one model call each
        min_solution: least number of moves of a level's shortest solution
        max_solution: most moves of a level's shortest solution
        moves_per_turn: moves that one turn plays at most
        original: LaMer's own rules: a turn counts its last move only, every tenth room is kept
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
        most = (size - 2) ** 2 - 2  # one cell for the player, one to push into
        require(
            1 <= boxes <= most,
            f"a {size}x{size} room has space for 1 to {most} boxes, got --boxes {boxes}",
        )
        require(
            1 <= min_solution <= max_solution,
            f"need 1 <= --min_solution {min_solution} <= --max_solution {max_solution}",
        )
        require(turns >= 1, f"sokoban needs at least one turn, got --turns {turns}")
        self.level_options = (size, boxes, min_solution, max_solution, original)
        self.size, self.original = size, original
        self.turn_limit, self.moves_per_turn = turns, moves_per_turn
        self.action_format = (
            f"up to {moves_per_turn} moves separated by commas inside <action> </action>"
        )
        self.max_steps: int | None = None  # the original's limit on moves, used by recorded plays

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        self.start(make_level(seed, *self.level_options))
        return self.text(), {"won": False}

    def start(self, level: Level) -> None:
        """Begin an episode on a given level."""
        self.level, self.player, self.boxes = level, level.player, level.boxes
        self.steps = self.turns = 0  # moves and turns played
        self.done = self.won = False

    def step(self, action: Sequence[str]) -> tuple[str, float, bool, bool, dict[str, Any]]:
        is_over = self.done or self.turns >= self.turn_limit
        if is_over and not self.original:
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
        before = (self.boxes & self.level.targets).bit_count()
        delta = self.level.deltas[MOVES.index(name)]
        self.player, self.boxes = self.level.move(self.player, self.boxes, delta)
        after = (self.boxes & self.level.targets).bit_count()
        reward = -0.1 + after - before
        self.won = self.boxes == self.level.targets
        if self.won:
            reward += WIN_REWARD
        done = self.won or self.steps == self.max_steps or not self.is_solvable()
        return reward, done

    def is_solvable(self) -> bool:
        """Whether the original's search would find a solution from here."""
        return self.level.moves_left(self.player, self.boxes) <= SEARCH_DEPTH

    def text(self) -> str:
        """The room: "0: # # #" and so on."""
        cells = self.level.base.copy()
        for cell in self.level.floor:
            if self.boxes >> cell & 1:
                cells[cell] = "√" if cells[cell] == "O" else "X"
        cells[self.player] = "S" if cells[self.player] == "O" else "P"
        rows = [cells[i : i + self.size] for i in range(0, len(cells), self.size)]
        return "\n".join(f"{r}: " + " ".join(row) for r, row in enumerate(rows))

    def task_key(self) -> str:
        return f"{''.join(self.level.base)} {self.level.boxes} {self.level.player}"

    def rules(self, style: str = "full") -> str:
        if style == "compact":
            return ""
        return (
            "You are playing Sokoban. Symbols: # wall, _ floor, O target, X box, √ box on a "
            "target, P you, S you on a target. Rows are numbered from the top.\n"
            "Goal: push every box onto a target. Moves: up, down, left, right. You push a box by "
            "walking into it; the cell behind it must be free. You cannot pull, cannot push two "
            "boxes at once, and cannot enter walls, so a box in a corner that is no target is "
            "lost, and with it the episode.\n"
            f"You have {self.turn_limit} turns of up to {self.moves_per_turn} moves. The room is "
            "the same every time."
        )

    def parse(self, reply: str) -> tuple[list[str], bool]:
        inside = between(reply, "<action>", "</action>") or ""
        words = []
        for piece in inside.strip().lower().split(","):
            found = [word for word in (*MOVES, "still") if word in piece]
            words += found[:1]  # as the original: "upright" is up, "left and up" too
        if not words:
            return ["still"], False
        return words[: self.moves_per_turn], True

    def scripted(self, skill: float, rng: random.Random, memory: Sequence[str] = ()) -> str:
        plan = []
        if memory and self.turns == 0:
            plan = [word for word in memory[-1].split(", ") if word in MOVES]
        if plan and rng.random() < 0.9:  # begin as the last reflection says
            words = plan
        elif rng.random() < skill:
            words = self.level.best_moves(self.player, self.boxes, self.moves_per_turn)
        else:
            words = rng.choices(MOVES, k=self.moves_per_turn)
        return f"<action>{', '.join(words or ['still'])}</action>"

    def scripted_reflection(self, rng: random.Random) -> str:
        """A plan for the next first turn: half of the time a shortest solution's, else a guess."""
        level = self.level
        plan = level.best_moves(level.player, level.boxes, self.moves_per_turn)
        if rng.random() < 0.5:
            plan = rng.choices(MOVES, k=self.moves_per_turn)
        return f"<remark>{', '.join(plan)}</remark>"


# -------------------------------------------------------------------------------- make_env

ENVS: dict[str, type[Env]] = {cls.name: cls for cls in (Lockbox, MineSweeper, Sokoban)}
WORLDS = {  # files of their own
    "webshop": "worlds/webshop.py:WebShop",
    "alfworld": "worlds/alfworld.py:AlfWorld",
}


def env_class(name: str) -> type[Env]:
    """The class for a built-in name or for `path/to/file.py:Class`."""
    if name in ENVS:
        return ENVS[name]
    file = f"{Path(__file__).parent}/{WORLDS[name]}" if name in WORLDS else name
    path, _, class_name = file.rpartition(":")
    known = ", ".join([*ENVS, *WORLDS])
    require(
        path.endswith(".py"),
        f"no environment is called {name!r}; use {known} or a file of yours as file.py:Class",
    )
    require(Path(path).is_file(), f"--env {name}: there is no file {path}")
    cls = getattr(load_module(str(Path(path).resolve())), class_name, None)
    is_env = inspect.isclass(cls)
    for method in ("reset", "step"):
        is_env = is_env and getattr(cls, method, None) not in (None, getattr(Env, method))
    require(is_env, f"--env {name}: {path} has no class {class_name} with reset and step")
    if issubclass(cls, Env):
        return cls
    # A plain Gymnasium-style class gets the defaults of Env for whatever it does not define itself.
    return type(cls.__name__, (cls, Env), {"name": getattr(cls, "name", class_name.lower())})


@lru_cache(maxsize=16)
def load_module(path: str) -> ModuleType:
    """The user's file as a module, run once: who edits it leaves a run that goes on as it is."""
    # The prefix keeps a file random.py from hiding Python's.
    spec = importlib.util.spec_from_file_location(f"lamer_env_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles look it up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path} cannot be loaded: {reason(error)}") from error
    return module


def make_env(name: str, **options: Any) -> Env:
    """Make an environment; `options` are its constructor's. ValueError says what is wrong."""
    cls = env_class(name)
    allowed = inspect.signature(cls).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in allowed.values())
    known = ", ".join(allowed) or "none"
    for option in options:
        require(
            takes_all or option in allowed,
            f"--{option} does not apply to {name}; its options are: {known}",
        )
    for option, parameter in allowed.items():
        is_needed = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        require(not is_needed or option in options, f"--env {name} needs a value for --{option}")
    return cls(**options)


def check_env(name: str, env: Env) -> None:
    """Play one turn; ValueError in one line if the environment does not keep to the interface."""
    try:
        observation, info = env.reset(seed=EVAL_SEED)
        action, _ = env.parse("")
        after, reward, _, _, step_info = env.step(action)
        is_text = isinstance(observation, str) and isinstance(after, str)
        require(is_text, "observations are not text")
        require(isinstance(info, dict) and isinstance(step_info, dict), "info is not a dict")
        float(reward)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"--env {name}: reset(seed) must give (text, info), step(action) (text, reward, "
            f"terminated, truncated, info); trying them: {reason(error)}"
        ) from error

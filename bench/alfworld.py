"""Speed of ALFWorld on one core: time to load a game and steps per second of a random walk.

python bench/alfworld.py [DIR with genuine games]          from the project's root
"""

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "worlds")]

from alfworld import TASKS, AlfWorld, Game, load_game, make_game  # noqa: E402


def measure(name: str, env: AlfWorld, load: Callable[[int], Game], games: int, steps: int = 40_000) -> None:
    """Load every game once, then walk at random through admissible commands, 50 steps a game; print both speeds."""
    start = time.perf_counter()
    loaded = [load(i) for i in range(games)]
    milliseconds = 1000 * (time.perf_counter() - start) / games
    rng = random.Random(0)
    start = time.perf_counter()
    for i in range(steps):
        if i % env.turn_limit == 0 or env.done:
            env.start(loaded[i // env.turn_limit % games])
        env.step(rng.choice(env.actions()))  # the sorted list, as a prompt needs it
    print(f"{name:16s} {milliseconds:6.2f} ms to load, {steps / (time.perf_counter() - start):8,.0f} steps/s")


def main(argv: list[str]) -> None:
    if argv:
        env = AlfWorld(data=argv[0], turns=50)
        games = [game for split in env.games for game in split]
        measure("genuine games", env, lambda i: load_game.__wrapped__(*games[i % len(games)]), 100)
    scenes = range(30)
    for name, size in (("generated games", (None, None)), ("8 x 10 of them", (8, 10))):
        measure(name, AlfWorld(turns=50), lambda i, size=size: make_game(i, tuple(TASKS), *size, scenes), 100)


if __name__ == "__main__":
    main(sys.argv[1:])

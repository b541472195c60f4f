"""Speed of ALFWorld on one core: time to load a game, and steps per second of a random walk.

python bench/alfworld.py [DIR with genuine games]          from the project's root
"""

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "worlds")]

from alfworld import NUM_SCENES, TASKS, AlfWorld, Game, load_game, make_game  # noqa: E402

NUM_GAMES, NUM_STEPS = 100, 40_000


def measure(name: str, env: AlfWorld, load: Callable[[int], Game]) -> None:
    """Load every game once, then walk at random through admissible commands; print both speeds."""
    start = time.perf_counter()
    games = [load(i) for i in range(NUM_GAMES)]
    milliseconds = 1000 * (time.perf_counter() - start) / NUM_GAMES
    rng = random.Random(0)
    start = time.perf_counter()
    for i in range(NUM_STEPS):
        if i % env.turn_limit == 0 or env.done:
            env.start(games[i // env.turn_limit % NUM_GAMES])
        env.step(rng.choice(env.actions()))  # the sorted list, as a prompt needs it
    speed = NUM_STEPS / (time.perf_counter() - start)
    print(f"{name:16s} {milliseconds:6.2f} ms to load, {speed:8,.0f} steps/s")


def main(argv: list[str]) -> None:
    if argv:
        env = AlfWorld(data=argv[0], turns=50)
        files = [file for split in env.games for file in split]
        load = load_game.__wrapped__  # without its cache
        measure("genuine games", env, lambda i: load(*files[i % len(files)]))
    for name, size in (("generated games", (None, None)), ("8 x 10 of them", (8, 10))):

        def make(seed: int, size: tuple[int | None, int | None] = size) -> Game:
            return make_game(seed, tuple(TASKS), *size, range(NUM_SCENES))

        measure(name, AlfWorld(turns=50), make)


if __name__ == "__main__":
    main(sys.argv[1:])
